"""Any value for any argument works or is rejected by name, and affects no other request."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import fractions
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import overlay
from overlay.client import arguments
from overlay.client import sync as library
from overlay.client.outbox import CallKind, Submission
from overlay.model.segments import Code, Executed, Mode, Route
from tests.harness.cluster import Overlay, running_one, until


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Overlay]:
    """A worker, asked directly."""
    with running_one(tmp_path_factory.mktemp("arguments"), HANDLERS, ["upper"]) as found:
        yield found


HANDLERS = """
def upper(payload, context):
    return payload.upper()
"""


@pytest.fixture(scope="module")
def client(one: Overlay) -> Iterator[overlay.Client]:
    with overlay.connect(one.address("C")) as found:
        yield found


@pytest.fixture(scope="module")
def other(one: Overlay) -> Iterator[overlay.Client]:
    """Another client in this Python process."""
    with overlay.connect(one.address("C")) as found:
        yield found


# The values


class OddityError(Exception):
    pass


class Oddity:
    """Every operation on it raises."""

    def fail(self, *_: object) -> Any:
        raise OddityError

    __eq__ = __hash__ = __bool__ = __len__ = __index__ = __int__ = __float__ = fail
    __iter__ = __aiter__ = __str__ = __format__ = __lt__ = __gt__ = __le__ = __ge__ = fail


class Text(str):
    """A str whose own methods raise."""

    __slots__ = ()

    def encode(self, *_: Any) -> bytes:
        raise OddityError

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        raise OddityError


class Number(int):
    def __index__(self) -> Any:
        raise OddityError

    __float__ = __int__ = __le__ = __lt__ = __ge__ = __gt__ = __index__


class Share(float):
    def __float__(self) -> Any:
        raise OddityError


class Way(str, enum.Enum):
    ANY = "any"


class Urgency(enum.IntEnum):
    FIRST = 1


ODD = [
    *(None, True, False, 0, 1, 1.0, -1, 10, 10**400, 2**63, 2**64, 1j, ..., NotImplemented),
    *(float("nan"), float("inf"), -0.0, 5e-324, fractions.Fraction(1, 3)),
    *("", "any", "all", "upper", "\ud800", "\0", "x" * 100_000, b"any", bytearray(b"x"), [1], {}),
    *(print, int, Oddity, Oddity(), Text("any"), Text("upper"), Number(1), Share(1.0)),
    *(Way.ANY, Urgency.FIRST, mock.MagicMock(spec=str), mock.MagicMock(spec=int)),
    *(memoryview(b"abcd")[::2], range(3), [b"a", 1.0], ["a", None], (b"a", "\ud800")),
]
SOMETHING_ODD = st.sampled_from(range(len(ODD))).map(ODD.__getitem__)
ANYTHING = st.one_of(
    SOMETHING_ODD,
    st.integers(),
    st.floats(),
    st.text(st.characters(exclude_categories=())),
    st.binary(),
    st.lists(st.integers() | st.binary()),
    st.fractions(),
    st.decimals(),
    st.complex_numbers(),
)

PLAIN = {"handler": "upper", "timeout": 5}
# For each method: the other arguments, and the names of the arguments to vary.
VERBS: dict[str, tuple[dict[str, Any], str]] = {
    "call": (
        {"payload": b"x", **PLAIN, "mode": "any"},
        "payload mode team handler timeout want_parts idempotency_key priority",
    ),
    "forward": (
        {"payload": b"x", **PLAIN, "mode": "any"},
        "payload mode team handler timeout want_parts idempotency_key priority want_trace "
        "request_id",
    ),
    "submit": ({"payload": b"x", **PLAIN}, "handler payload mode team timeout priority"),
    "map": (
        {"payloads": [b"x", b"y"], **PLAIN},
        "handler payloads mode team timeout window chunksize priority patience_s",
    ),
    "map_as_completed": (
        {"payloads": [b"x", b"y"], **PLAIN},
        "handler payloads mode team timeout window chunksize ordered priority patience_s",
    ),
    "parts": ({"payload": b"x", **PLAIN}, "payload team handler timeout first priority"),
    "metrics": ({"timeout": 5}, "timeout events requests"),
    "logs": ({"timeout": 5}, "process_id lines request_id timeout"),
    "is_serving": ({}, "timeout"),
}
CASES = st.sampled_from(
    [(verb, name) for verb, (_, names) in VERBS.items() for name in names.split()]
)
ASYNC_VERBS = {"call", "submit", "map", "map_as_completed", "parts", "metrics", "is_serving"}
# The word that identifies an argument in a message, if it is not its name.
WORDS = {"payloads": "payload", "patience_s": "patience"}


def check_refusal(name: str, error: Exception) -> None:
    if isinstance(error, OddityError):
        assert name == "payloads", "an error of the caller's iterator is raised as it is"
    elif isinstance(error, (TypeError, ValueError)):
        assert WORDS.get(name, name) in str(error), f"{name} is not named: {error}"
    else:
        assert isinstance(error, library.CallFailed), f"{type(error)}: {error}"


def ask(client: overlay.Client, verb: str, given: dict[str, Any]) -> None:
    delivered = getattr(client, verb)(**given)
    if verb == "submit":
        delivered.result(10)
    elif hasattr(type(delivered), "__next__"):
        for _ in delivered:
            pass


@settings(max_examples=200)
@given(CASES, ANYTHING)
@example(("call", "priority"), 1.0)
@example(("submit", "priority"), True)
@example(("call", "want_parts"), 1)
@example(("submit", "handler"), 0)
@example(("call", "idempotency_key"), [])
@example(("map", "chunksize"), 2.0)
@example(("forward", "request_id"), -1)
def test_an_invalid_argument_raises_an_error_that_names_it(
    client: overlay.Client, other: overlay.Client, case: tuple[str, str], value: Any
) -> None:
    verb, name = case
    bystanders = [one.submit("upper", b"before", priority=1) for one in (client, other)]

    try:
        ask(client, verb, {**VERBS[verb][0], name: value})
    except Exception as e:  # noqa: BLE001 - any may come
        check_refusal(name, e)

    bystanders += [one.submit("upper", b"after", priority=1) for one in (client, other)]
    found = [future.result(10) for future in bystanders]
    assert found == [b"BEFORE", b"BEFORE", b"AFTER", b"AFTER"]


def test_an_invalid_argument_raises_an_error_that_names_it_with_asyncio(one: Overlay) -> None:
    async def ask(client: overlay.AsyncClient, verb: str, given: dict[str, Any]) -> None:
        delivered = getattr(client, verb)(**given)
        if hasattr(type(delivered), "__anext__"):
            async for _ in delivered:
                pass
        else:
            await delivered

    async def main() -> None:
        cases = [(v, name) for v in sorted(ASYNC_VERBS) for name in VERBS[v][1].split()]
        async with overlay.connect_async(one.address("C")) as client:
            for verb, name in cases:
                if name == "idempotency_key":  # it has none
                    continue
                for value in ODD[::2]:
                    bystander = client.submit("upper", b"x", priority=1)
                    try:
                        await ask(client, verb, {**VERBS[verb][0], name: value})
                    except Exception as e:  # noqa: BLE001 - any may come
                        check_refusal(name, e)
                    assert await bystander == b"X"

    asyncio.run(main())


@pytest.mark.parametrize("connect", [overlay.connect, overlay.connect_async])
@given(value=ANYTHING)
def test_an_invalid_address_or_patience_is_named(connect: Any, value: Any) -> None:
    for name, given_ in (("address", {}), ("patience_s", {"address": "127.0.0.1:5"})):
        try:
            connect(**given_, **{name: value})
        except Exception as e:  # noqa: BLE001 - any may come
            check_refusal(name, e)


@settings(max_examples=50)
@given(ANYTHING, ANYTHING)
def test_an_invalid_grace_period_does_not_start_a_drain(grace_s: Any, wait: Any) -> None:
    with overlay.connect("127.0.0.1:1", patience_s=0) as client:
        for given_, name in (({"grace_s": grace_s}, "grace_s"), ({"wait": wait}, "wait")):
            try:
                client.drain(**given_)
            except Exception as e:  # noqa: BLE001 - any may come
                check_refusal(name, e)


@given(SOMETHING_ODD | ANYTHING)
def test_accepted_arguments_have_the_exact_type(value: Any) -> None:
    for take, kind in (
        (arguments.as_bytes, bytes),
        (arguments.as_key, str),
        (arguments.as_timeout, float),
        (arguments.as_patience, float),
        (lambda given: arguments.as_int("n", given), int),
        (lambda given: arguments.call_kind("any", "", "", False, given).priority, int),
        (lambda given: arguments.call_kind("any", given, "", False).route.team, str),
        (lambda given: arguments.call_kind("any", "", "", given).want_parts, bool),
    ):
        with contextlib.suppress(TypeError, ValueError):
            assert type(take(value)) is kind


def test_a_priority_must_be_an_int_and_not_an_equal_bool_or_float(client: overlay.Client) -> None:
    for priority in (True, 1.0, "1"):
        with pytest.raises(TypeError, match="priority must be an integer, not"):
            client.call(b"x", priority=priority)  # type: ignore[arg-type]

    kind = arguments.call_kind("any", "", "", False, 1)

    assert (type(kind.priority), kind.priority) == (int, 1)


def test_a_range_that_is_too_long_for_len_is_rejected_by_its_items(client: overlay.Client) -> None:
    with pytest.raises(TypeError, match="a payload must be bytes or str, not int"):
        list(client.map("upper", range(10**30)))  # type: ignore[arg-type]


def test_a_released_memoryview_is_rejected(client: overlay.Client) -> None:
    view = memoryview(b"x")
    view.release()

    with pytest.raises(ValueError, match="the payload cannot be read"):
        client.call(view)  # type: ignore[arg-type]


# A frame that cannot be built


def test_a_request_that_cannot_be_encoded_fails_alone(client: overlay.Client) -> None:
    """Bypasses the checks, as a bug would: in a segment with valid requests, and in its own."""
    delivered: dict[str, Any] = {}
    good, bad = (
        CallKind(Route(Mode.ANY, "", "upper")),
        CallKind(Route(Mode.ANY, "", "upper"), priority=-1),
    )
    client.call(b"x")
    submitter = client._connection.begin()

    def submission(name: str, kind: CallKind, *payloads: Any) -> Submission:
        def keep(rows: Any, what: Any, at: int, request_id: int) -> None:
            for n, row in enumerate(rows):
                is_failure = not hasattr(what, "results")
                delivered[f"{name}{row}"] = what if is_failure else what.results[at + n]

        return Submission(kind, payloads, deadline, keep)

    # While another frame is being sent, they all wait for the next one.
    deadline = time.monotonic() + 10
    with submitter._stream._sending:
        for made in (
            submission("a", good, b"a"),
            submission("b", good, b"b", "text", b"c"),
            submission("c", bad, b"d", b"e"),
            submission("d", good, b"f"),
        ):
            submitter.send(made)
    submitter._stream.kick()
    until(lambda: len(delivered) == 7)

    assert {name: what for name, what in delivered.items() if isinstance(what, bytes)} == {
        "a0": b"A", "b0": b"B", "b2": b"C", "d0": b"F",
    }  # fmt: skip
    for name in ("b1", "c0", "c1"):
        failure = delivered[name]
        assert (failure.code, failure.executed) == (Code.INVALID_ARGUMENT, Executed.NO)
        assert "the request cannot be sent: " in failure.reason
    assert submitter.open_rows == 0
    assert client.call(b"x", handler="upper").result == b"X"
