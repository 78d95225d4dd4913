"""What a segment keeps on its way down."""

from __future__ import annotations

from overlay.model.segments import Column, Mode, Route, Segment


def test_a_segment_keeps_all_of_its_route_but_where_it_has_been_and_goes():
    route = Route(Mode.ANY, "green", "h", ("A",), ("C", "D"))
    assert all(getattr(route, name) != default for name, default in Route._field_defaults.items())

    onward = Segment(route, Column([b""]), 1.0, 1).onward("B", ("C",)).route

    assert (onward.hops, onward.targets) == (("A", "B"), ("C",))
    assert onward._replace(hops=route.hops, targets=route.targets) == route
