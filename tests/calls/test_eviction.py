"""Which item is evicted when the limit is reached."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from overlay.calls.eviction import EvictionQueue


def test_the_oldest_item_of_the_largest_address_is_evicted():
    items: EvictionQueue[str] = EvictionQueue(4)
    for item, address in (("a", "pc"), ("b", "mac"), ("c", "pc"), ("d", "pc")):
        assert items.add(item, address) == []

    assert items.add("e", "mac") == ["a"]
    assert items.add("f", "new") == ["c"]


def test_a_greedy_address_evicts_only_its_own_items():
    items: EvictionQueue[int] = EvictionQueue(10)
    items.add(-1, "honest")
    for n in range(1000):
        assert -1 not in items.add(n, "greedy")
    assert -1 in items
    assert len(items) == 10


def test_sizes_count_rather_than_the_number_of_items():
    items: EvictionQueue[str] = EvictionQueue(100)
    items.add("large", "pc", 90)
    items.add("one", "mac", 5)
    items.add("two", "mac", 5)

    assert items.add("three", "mac", 5) == ["large"]
    assert items.size == 15


def test_pop_older_removes_what_was_added_before_then():
    items: EvictionQueue[str] = EvictionQueue(10)
    for n, item in enumerate("abc"):
        items.add(item, "pc", now=float(n))

    assert items.pop_older(2.0) == ["a", "b"]
    assert (len(items), items.size_of("pc")) == (1, 1)


@given(
    st.lists(st.tuples(st.sampled_from("abcde"), st.integers(1, 30), st.booleans()), max_size=80)
)
def test_it_stays_within_its_limit_and_loses_no_item(steps):
    items: EvictionQueue[int] = EvictionQueue(60)
    kept: dict[int, tuple[str, int]] = {}
    for n, (address, size, discards) in enumerate(steps):
        if discards and kept:
            item = next(iter(kept))
            assert items.discard(item)
            assert not items.discard(item)
            del kept[item]
            continue
        evicted = items.add(n, address, size)
        for item in evicted:
            del kept[item]
        kept[n] = address, size
        assert items.size == sum(size for _, size in kept.values()) <= 60
        assert {item for item in range(n + 1) if item in items} == set(kept)
        for name in "abcde":
            assert items.size_of(name) == sum(s for a, s in kept.values() if a == name)
