"""Who has to go when there are too many."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from overlay.calls.eviction import EvictionQueue


def test_the_oldest_of_the_address_that_has_most_goes():
    crowd: EvictionQueue[str] = EvictionQueue(4)
    for item, address in (("a", "pc"), ("b", "mac"), ("c", "pc"), ("d", "pc")):
        assert crowd.add(item, address) == []

    assert crowd.add("e", "mac") == ["a"]
    assert crowd.add("f", "new") == ["c"]


def test_one_address_pushes_out_only_its_own():
    crowd: EvictionQueue[int] = EvictionQueue(10)
    crowd.add(-1, "honest")
    for n in range(1000):
        assert -1 not in crowd.add(n, "greedy")
    assert -1 in crowd
    assert len(crowd) == 10


def test_sizes_count_and_not_heads():
    crowd: EvictionQueue[str] = EvictionQueue(100)
    crowd.add("large", "pc", 90)
    crowd.add("one", "mac", 5)
    crowd.add("two", "mac", 5)

    assert crowd.add("three", "mac", 5) == ["large"]
    assert crowd.size == 15


def test_what_is_older_than_a_time_is_taken_out():
    crowd: EvictionQueue[str] = EvictionQueue(10)
    for n, item in enumerate("abc"):
        crowd.add(item, "pc", now=float(n))

    assert crowd.pop_older(2.0) == ["a", "b"]
    assert (len(crowd), crowd.size_of("pc")) == (1, 1)


@given(
    st.lists(st.tuples(st.sampled_from("abcde"), st.integers(1, 30), st.booleans()), max_size=80)
)
def test_it_never_holds_more_than_it_may_and_forgets_nobody(steps):
    crowd: EvictionQueue[int] = EvictionQueue(60)
    held: dict[int, tuple[str, int]] = {}
    for n, (address, size, leaves) in enumerate(steps):
        if leaves and held:
            item = next(iter(held))
            assert crowd.discard(item)
            assert not crowd.discard(item)
            del held[item]
            continue
        gone = crowd.add(n, address, size)
        for item in gone:
            del held[item]
        held[n] = address, size
        assert crowd.size == sum(size for _, size in held.values()) <= 60
        assert {item for item in range(n + 1) if item in crowd} == set(held)
        for name in "abcde":
            assert crowd.size_of(name) == sum(s for a, s in held.values() if a == name)
