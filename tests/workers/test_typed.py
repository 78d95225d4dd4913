"""Typed functions: recognised, validated, called; also on real processes, by all clients."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import functools
import importlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import overlay
from overlay.client import sync as library
from overlay.client.partials import Parts
from overlay.model import json_values, signatures
from overlay.model.errors import BadResponse, ConfigError
from overlay.model.segments import Code, Detail, Executed
from overlay.model.signatures import Function
from overlay.transport.chunks import ItemSender
from overlay.transport.codec import pb2, pb2_grpc, read_metrics
from overlay.workers import typed
from overlay.workers.api import Context
from overlay.workers.job import outcome_of, outcome_of_error, read_outcome
from tests.harness.cluster import ROOT, Overlay, free_port, running, until
from tests.transport.test_chunks import delivery

MINE = '''
"""Functions as people write them."""
from __future__ import annotations

import asyncio, dataclasses, datetime, decimal, enum, functools, pathlib, time, typing, uuid
from typing import Annotated, Any, TYPE_CHECKING

import pydantic

from overlay import BadRequest
from overlay.workers.api import Context

if TYPE_CHECKING:
    from nowhere import Nowhere

class HasLog(typing.Protocol):
    log: Any

class Fit(enum.Enum):
    CUT = "cut"
    PAD = "pad"

@dataclasses.dataclass
class Size:
    width: int
    height: int = 100
    pixels: bytes = b""

class Model(pydantic.BaseModel):
    name: str
    sizes: list[Size] = []

class Thing:
    pass

def resize(path: str, width: int = 200) -> dict:
    """Makes a picture smaller.

    The path is the worker's.
    """
    return {"path": path, "width": width}

def shout(payload: bytes, context) -> bytes:
    """Says it louder."""
    return payload.upper()

def everything(
    path: pathlib.Path,
    size: Size,
    *,
    at: datetime.datetime,
    day: datetime.date | None = None,
    image: bytes = b"",
    fit: Fit = Fit.CUT,
    model: Model | None = None,
    tags: set[str] = frozenset(),
    price: decimal.Decimal = decimal.Decimal(0),
    few: Annotated[int, pydantic.Field(ge=1, le=3)] = 1,
    options: Any = None,
) -> list:
    return [type(value).__name__ for value in (path, size, at, day, image, fit, model, tags, price)]

def known(values: list[float]) -> Any:
    at = datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.timezone.utc)
    return {"sum": sum(values), "at": at}

def picture(data: bytes) -> Size:
    return Size(len(data), pixels=bytes(range(256)))

def model(name: str) -> Model:
    return Model(name=name, sizes=[Size(1)])

def thing(deep: bool = False) -> Any:
    return {"a": [Thing()]} if deep else Thing()

def refused(path: str) -> str:
    raise BadRequest("no such path: " + path)

def broken(path: str) -> str:
    raise ValueError("a secret")

def who(context: Context) -> str:
    return context.process_id

def asked(context: str) -> str:
    return context

def slow(seconds: float, context) -> str:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not context.cancelled:
        time.sleep(0.01)
    return "slept"

def count(to: int, fail_at: int = -1) -> typing.Iterator[dict]:
    """Counts."""
    for n in range(to):
        if n == fail_at:
            yield Thing()
        yield {"n": n}

def known_items() -> Any:
    return iter([0, 1])

def steps(to: int, seconds: float, fail: bool = False, context: Context = None) -> typing.Iterator:
    """Waits after each item."""
    for n in range(to):
        yield {"n": n}
        until = time.monotonic() + seconds
        while time.monotonic() < until and not context.cancelled:
            time.sleep(0.01)
        if context.cancelled:
            gate["steps ended"] = True
            return
    if fail:
        raise ValueError("at the end")

async def later(path: str, seconds: float = 0.0, context: Context = None) -> dict:
    """After a while."""
    await asyncio.sleep(seconds)
    return {"path": path, "on": context.process_id}

async def later_bytes(payload: bytes, context) -> bytes:
    await asyncio.sleep(0)
    return payload.upper()

async def later_count(to: int) -> typing.AsyncIterator[int]:
    for n in range(to):
        await asyncio.sleep(0)
        yield n

gate = {}

async def meet(name: str) -> list:
    """Waits for another call on the same event loop."""
    make, names = asyncio.get_running_loop().create_future, (name, "ab"[name == "a"])
    mine, other = (gate.setdefault(n, make()) for n in names)
    mine.set_result(name)
    return [await other, name]

async def stays(seconds: float) -> None:
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        gate["left"] = True
        raise

async def exits(path: str) -> None:
    raise SystemExit(3)

def scaled(path: str, factor: int, width: int = 10) -> int:
    return factor * width

twice = functools.partial(scaled, factor=2)

def passing_on(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)
    return wrapper

def from_json(function):
    @functools.wraps(function)
    def wrapper(payload, context):
        import json
        return json.dumps(function(**json.loads(payload))).encode()
    return wrapper

wrapped = passing_on(resize)
wrapped_shout = passing_on(shout)
converted = from_json(resize)

class Resizer:
    """A callable object."""
    def __call__(self, path: str) -> str:
        return path

resizer = Resizer()

def p0(payload, context): ...
def p1(data: bytes, ctx): ...
def p2(data: bytes, ctx: Any = None): ...
def p3(payload, context, /): ...
def p4(*args): ...
def p5(*args, **kwargs): ...
def p6(payload: bytes, ctx: "Context"): ...
def p7(payload: "bytes | bytearray", context: "Nowhere"): ...
def p8(payload: memoryview, c: object): ...
def p9(payload, *rest): ...
p10 = lambda p, c: p
def p11(payload, context, more=1): ...
def p12(payload: bytes, ctx: HasLog): ...

def t0(): ...
def t1(path): ...
def t2(image: bytes, width: int): ...
def t3(image: bytes, width=200): ...
def t4(name: str, context): ...
def t5(payload, context, more): ...
def t6(a: Any, b: int = 1): ...
def t7(payload, *, width: int): ...

def e0(item: Nowhere, width: int = 1): ...
def e1(path: str, *more: str): ...
def e2(path: str, /, width: int): ...
def e3(path: str, **options): ...
def e4(width: int, thing: Thing): ...
def e5(width: int, things: "list[Nowhere]" = ()): ...
def e6(width: int, inner: "Open" = None): ...

@dataclasses.dataclass
class Open:
    what: Nowhere
'''

BYTES = [f"p{n}" for n in range(13)] + ["shout", "wrapped_shout", "converted", "later_bytes"]
TYPED = [f"t{n}" for n in range(8)] + ["resize", "wrapped", "resizer", "twice", "who", "later"]


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The module of functions."""
    folder = tmp_path_factory.mktemp("typed")
    (folder / "typed_mine.py").write_text(MINE)
    sys.path.insert(0, str(folder))
    yield importlib.import_module("typed_mine")
    sys.path.remove(str(folder))


def at(left_s: float = 10.0, ended: bytearray | None = None) -> Context:
    return Context("C", "green", 7, 0, time.monotonic() + left_s, {}, ended or bytearray(1))


@pytest.fixture(scope="module")
def call(mine: Any) -> Iterator[Callable[..., Any]]:
    """Calls a function as a worker does; returns the JSON value, or the failure for the caller."""
    kept: dict[str, typed.Loaded] = {}
    lock = threading.Lock()

    def called(name: str, args: Any = None, context: Context | None = None) -> Any:
        with lock:
            if name not in kept:
                kept[name] = typed.prepared(name, getattr(mine, name))
        payload = args if isinstance(args, bytes) else json.dumps(args or {}).encode()
        try:
            kind, value = outcome_of(kept[name].call(payload, context or at()), 10**6)
        except BaseException as e:  # noqa: BLE001 - as the runners have it
            kind, value = outcome_of_error(e)
        outcome = read_outcome(name, kind, value)
        return outcome if isinstance(outcome, Detail) else json.loads(outcome)

    yield called
    for loaded in kept.values():
        loaded.close()


# Which kind it is


@pytest.mark.parametrize("name", BYTES)
def test_a_function_of_payload_and_context_is_a_function_of_bytes(mine, name):
    found = typed.prepared("h", getattr(mine, name))

    assert found.function.arguments == ""
    if name != "later_bytes":
        assert found.call is getattr(mine, name)  # the very same: nothing is added to a call
    found.close()


@pytest.mark.parametrize("name", TYPED)
def test_any_other_function_is_a_typed_one(mine, name):
    found = typed.prepared("h", getattr(mine, name))

    assert json.loads(found.function.arguments)["type"] == "object"
    found.close()


def test_a_callable_without_a_signature_gets_bytes():
    assert typed.prepared("h", dict.fromkeys).call is not None
    assert typed.prepared("h", max).function.arguments == ""


@pytest.mark.parametrize(
    ("name", "argument", "why"),
    [
        ("e0", "item", "its annotation 'Nowhere' cannot be resolved"),
        ("e1", "more", "it takes any number of values; arguments come from JSON by their names"),
        ("e2", "path", "it is positional-only; arguments come"),
        ("e3", "options", "it takes any names; arguments come"),
        ("e4", "thing", "JSON cannot be converted to its annotation"),
        ("e5", "things", "its annotation 'list[Nowhere]' cannot be resolved"),
        ("e6", "inner", "'Nowhere' is not defined"),
    ],
)
def test_an_argument_that_json_cannot_supply_is_reported_at_startup(mine, name, argument, why):
    with pytest.raises(ConfigError) as raised:
        typed.prepared("h", getattr(mine, name))

    message = str(raised.value)
    place = f"handler 'h': {Path(mine.__file__)}, function {name}: argument '{argument}': "
    assert message.startswith(place)
    assert why in message


# Arguments


def test_arguments_are_converted_by_their_annotations(call):
    args = {
        "path": "a/b", "size": {"width": 3}, "at": "2026-01-02T03:04:05Z", "day": "2026-01-02",
        "image": "AP8=", "fit": "pad", "model": {"name": "m", "sizes": [{"width": 1}]},
        "tags": ["a", "b"], "price": "1.10",
    }  # fmt: skip

    kinds = call("everything", args)

    assert kinds[0] in ("PosixPath", "WindowsPath")
    assert kinds[1:] == [
        "Size", "datetime", "date", "bytes", "Fit", "Model", "set", "Decimal",
    ]  # fmt: skip


def test_a_missing_argument_gets_the_functions_default(call):
    assert call("resize", {"path": "a"}) == {"path": "a", "width": 200}
    assert call("resizer", {"path": "a"}) == "a"
    assert call("wrapped", {"path": "a", "width": 1}) == {"path": "a", "width": 1}
    assert call("twice", {"path": "a", "width": 3}) == 6


def test_bytes_may_be_in_either_base64_alphabet(call):
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        assert call("picture", {"data": encode(b"\xff\xfe\xfd").decode()})["width"] == 3


EVERYTHING = {"path": "a", "size": {"width": 1}, "at": "2026-01-02T03:04:05Z"}


@pytest.mark.parametrize(
    ("name", "args", "sentence"),
    [
        ("resize", {}, "argument 'path' is missing"),
        ("resize", b"", "argument 'path' is missing"),
        ("resize", {"path": "a", "width": "200"}, "argument 'width': input should be a valid "
            "integer, not '200'"),
        ("resize", {"path": "a", "width": True}, "argument 'width': input should be a valid "
            "integer, not True"),
        ("resize", {"path": "a", "width": 1.5}, "argument 'width': input should be a valid int"),
        ("resize", {"path": None}, "argument 'path': input should be a valid string, not None"),
        ("resize", {"pth": "a"}, "there is no argument 'pth'; did you mean 'path'?"),
        ("resize", {"path": "a", "zoom": 1}, "there is no argument 'zoom'; it has path, width"),
        ("resize", ["a", 3], "the payload is not a JSON object of the arguments by name (path, "),
        ("resize", b"hello", "the payload is not JSON: expected value at line 1 column 1"),
        ("resize", b'{"path": "a"', "the payload is not JSON: EOF while parsing an object at line"),
        ("resize", b"\xff\xfe", "the payload is not JSON"),
        ("resize", b'{"path": "\\ud800"}', "the payload is not JSON"),
        ("everything", {**EVERYTHING, "size": {"width": "x"}}, "argument 'size.width': input"),
        ("everything", {**EVERYTHING, "few": 4}, "argument 'few': input should be less than"),
        ("everything", {**EVERYTHING, "fit": "x"}, "argument 'fit': input should be 'cut' or"),
        ("everything", {**EVERYTHING, "at": "noon"}, "argument 'at': input should be a valid da"),
        ("who", {"context": "mine"}, "there is no argument 'context'; it has none"),
        ("known", {"values": ["x"] * 9}, "; and 4 more"),
    ],
)  # fmt: skip
def test_an_invalid_argument_is_named(call, name, args, sentence):
    outcome = call(name, args)

    assert isinstance(outcome, Detail)
    assert (outcome.code, outcome.executed) == (Code.INVALID_ARGUMENT, Executed.YES)
    assert outcome.reason.startswith(f"handler '{name}': ")
    assert sentence in outcome.reason


def test_a_context_parameter_gets_the_context_unless_annotated_otherwise(call):
    assert call("who") == "C"
    assert call("asked", {"context": "of a question"}) == "of a question"


# Results


def test_return_values_are_written_as_json(call):
    assert call("known", {"values": [1, 0.5]}) == {"sum": 1.5, "at": "2026-01-02T03:04:00Z"}
    assert call("model", {"name": "m"})["sizes"] == [{"width": 1, "height": 100, "pixels": ""}]
    made = call("picture", {"data": ""})
    assert base64.b64decode(made["pixels"], validate=True) == bytes(range(256))


def test_scalars_and_arrays_like_numpys_are_written_as_json():
    class Scalar:
        """Like numpy's, without needing numpy."""

        def tolist(self):
            return 3

    assert json_values.write({"n": Scalar(), "of": [Scalar()]}) == b'{"n":3,"of":[3]}'


def test_numpy_values_are_written_as_json():
    numpy = pytest.importorskip("numpy")
    value = {
        "i": numpy.int64(3), "f": numpy.float32(0.5), "b": numpy.bool_(True),
        "nan": numpy.float64("nan"), "a": numpy.arange(3), "s": numpy.str_("x"),
    }  # fmt: skip

    assert json_values.read(json_values.write(value)) == {
        "i": 3, "f": 0.5, "b": True, "nan": None, "a": [0, 1, 2], "s": "x",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "args", "what"),
    [
        ("thing", {}, "returned typed_mine.Thing, which is not JSON"),
        ("thing", {"deep": True}, "returned dict with typed_mine.Thing in it, which is not JSON"),
        ("count", {"to": 3, "fail_at": 1}, "returned typed_mine.Thing, which is not JSON"),
    ],
)
def test_a_result_that_is_not_json_fails_with_its_type(call, name, args, what):
    outcome = call(name, args)

    assert (outcome.code, outcome.reason) == (Code.INTERNAL, f"handler '{name}' {what}")


def test_a_result_that_contains_itself_is_not_json():
    loop: list[Any] = []
    loop.append([loop])
    with pytest.raises(json_values.NotJson, match="list, which is not JSON: "):
        json_values.write(loop)


def test_an_exception_of_a_typed_function_is_its_failure(call):
    assert call("refused", {"path": "a"}).reason == "no such path: a"
    assert call("broken", {"path": "a"}).reason.startswith("handler 'broken' failed; error id ")


def test_yielded_items_are_a_json_array(call):
    assert call("count", {"to": 3}) == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert call("count", {"to": 0}) == []
    assert call("known_items") == [0, 1]


def test_an_array_is_sent_in_chunks_while_it_is_generated(mine):
    loaded = typed.prepared("count", mine.count)
    chunks: list[bytes] = []

    def send(chunk: bytes) -> bool:
        chunks.append(chunk)
        return True

    kind, last = outcome_of(loaded.call(b'{"to": 50000}', at()), 10**5, send)

    assert kind == "ok"
    assert len(chunks) > 3
    assert len(json.loads(b"".join([*chunks, last]))) == 50_000


# Async ones


def test_an_async_function_is_awaited(call):
    assert call("later", {"path": "a"}) == {"path": "a", "on": "C"}
    assert call("later_count", {"to": 3}) == [0, 1, 2]
    assert call("later_bytes", b'"as it is"') == "AS IT IS"


def test_calls_of_an_async_function_share_an_event_loop(call):
    with concurrent.futures.ThreadPoolExecutor(2) as two:
        outcome = list(two.map(lambda name: call("meet", {"name": name}), "ab"))
    assert outcome == [["b", "a"], ["a", "b"]]


def test_an_async_function_is_cancelled_when_its_caller_leaves(mine, call):
    ended = bytearray(1)
    threading.Timer(0.05, ended.__setitem__, (0, 1)).start()

    outcome = call("stays", {"seconds": 60}, at(ended=ended))

    assert outcome.code is Code.CANCELLED
    until(lambda: mine.gate.get("left"), what="the function was cancelled")


def test_an_async_function_that_raises_system_exit_fails_one_request(call):
    assert call("exits", {"path": "a"}).code is Code.INTERNAL
    assert call("exits", {"path": "a"}).code is Code.INTERNAL


def test_the_event_loop_ends_with_its_handler(mine):
    loaded = typed.prepared("ending", mine.later)
    assert loaded.call(b'{"path": "a"}', at())

    loaded.close()
    loaded.close()

    names = lambda: [t.name for t in threading.enumerate()]  # noqa: E731
    until(lambda: "handler-ending-loop" not in names(), what="the loop's thread has ended")


# Descriptions


def test_a_function_is_described_by_signature_docstring_and_schema(mine):
    described = typed.prepared("resize", mine.resize).function
    schema = json.loads(described.arguments)

    assert described.signature == "resize(path: str, width: int = 200) -> dict"
    assert described.doc == "Makes a picture smaller.\n\nThe path is the worker's."
    assert schema["properties"]["width"] == {"default": 200, "title": "Width", "type": "integer"}
    assert (schema["required"], schema["additionalProperties"]) == (["path"], False)
    assert json.loads(described.result)["type"] == "object"


@pytest.mark.parametrize(
    ("name", "signature", "result"),
    [
        ("shout", "h(payload: bytes, context) -> bytes", ""),
        ("who", "h() -> str", "string"),
        ("count", "h(to: int, fail_at: int = -1) -> typing.Iterator[dict]", "array"),
        ("later_count", "h(to: int) -> typing.AsyncIterator[int]", "array"),
        ("later", "h(path: str, seconds: float = 0.0) -> dict", "object"),
        (
            "steps",
            "h(to: int, seconds: float, fail: bool = False) -> typing.Iterator",
            "array",
        ),
    ],
)
def test_a_signature_is_shown_as_written(mine, name, signature, result):
    loaded = typed.prepared("h", getattr(mine, name))
    loaded.close()

    assert loaded.function.signature == signature
    assert (json.loads(loaded.function.result)["type"] if result else "") == result


def test_equal_functions_are_listed_once_with_their_workers():
    one = Function("f", "f(a: int)", workers=("C",))
    other = one._replace(signature="f(a: str)", workers=("F",))

    described = signatures.gathered([one, other, one._replace(workers=("D",))])

    assert described == (one._replace(workers=("C", "D")), other)
    assert (
        signatures.digest(described)
        == signatures.digest(list(described))
        != signatures.digest([one])
    )
    assert signatures.digest(()) == 0


def test_a_description_that_is_too_long_is_left_out():
    long = signatures.bounded(
        Function("f", "s" * 1000, "d\ud800" * 5000, "x" * 20_000, "y" * 20_000)
    )
    many = signatures.gathered(long._replace(name=f"f{n:04}", doc="d" * 4000) for n in range(400))

    assert (len(long.signature), len(long.doc), long.arguments, long.result) == (
        500,
        4000,
        "{}",
        "",
    )
    assert sum(function.size for function in many) < 2 * signatures.MAX_CHARACTERS
    assert (many[0].doc, many[-1].doc, many[-1].name) == ("d" * 4000, "", "f0399")
    assert signatures.bounded(Function("f", doc="a\x1b[2J\nb")).doc == "a [2J\nb"


def test_descriptions_from_another_process_are_validated():
    def described(*made: pb2.Function) -> pb2.MetricsResponse:
        me = pb2.Process(id="C", role="worker", team="t", address="h:1")
        return pb2.MetricsResponse(process_id="C", topology=[me], functions=made)

    fine = described(
        pb2.Function(name="f", doc="one\ntwo \x1b[2J", signature="f\n()", workers=["C"])
    )
    read_metrics(fine)

    assert fine.functions[0].doc == "one\ntwo \\x1b[2J"
    assert fine.functions[0].signature == "f | ()"
    wrong = (
        [pb2.Function(name="f", doc="x" * 16_000)] * 80,
        [pb2.Function(name="x" * 65)],
        [pb2.Function(name="f", workers=["\x1b"])],
    )
    for made in wrong:
        with pytest.raises(BadResponse):
            read_metrics(described(*made))


# On real processes

NAMES = (
    "resize",
    "shout",
    "picture",
    "thing",
    "who",
    "slow",
    "count",
    "steps",
    "later",
    "later_bytes",
)


def configuration() -> dict[str, Any]:
    ports = iter(sorted({free_port() for _ in range(20)})[:4])
    neighbours = {"A": ["B"], "B": ["A", "C", "D"], "C": ["B"], "D": ["B"]}
    roles = {"A": "leader", "B": "team_leader", "C": "worker", "D": "worker"}
    spec = {name: f"typed_mine:{name}" for name in NAMES}
    apart = {
        f"{name}_apart": {"call": f"typed_mine:{name}", "run": "process", "slots": 1}
        for name in ("resize", "later", "count", "steps")
    }
    return {
        "handlers": {**spec, **apart, "offer": "loans:offer", "payments": "loans:payments",
                     "total": {"call": "typed_mine:who", "merge": "typed_mine_merge:total"}},
        "processes": {
            id_: {"id": id_, "role": roles[id_], "team": "green", "host": "127.0.0.1",
                  "port": next(ports), "neighbors": neighbours[id_]}
            for id_ in roles
        },
    }  # fmt: skip


MERGE = """
import json

def total(parts):
    return json.dumps("+".join(part.value for part in parts)).encode()
"""


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Overlay]:
    """A, B and the workers C and D, with functions on threads and in processes."""
    folder = tmp_path_factory.mktemp("four")
    (folder / "typed_mine.py").write_text(MINE)
    (folder / "typed_mine_merge.py").write_text(MERGE)
    (folder / "loans.py").write_text((ROOT / "examples" / "loans.py").read_text())
    with running(folder, configuration()) as found:
        yield found


@pytest.fixture(scope="module")
def leader(four: Overlay) -> Iterator[library.Client]:
    with overlay.connect(four.address("A")) as client:
        yield client


@pytest.mark.parametrize("name", ["resize", "resize_apart", "later", "later_apart"])
def test_a_typed_function_is_called_on_threads_and_in_processes(leader, name):
    answer = leader.call(handler=name, args={"path": "a.jpg"}, mode="any")

    assert answer.value["path"] == "a.jpg"
    assert answer.values == {answer.parts[0].process_id: answer.value}
    assert json.loads(answer.result) == answer.value
    with pytest.raises(library.InvalidCall, match="argument 'path' is missing"):
        leader.call(handler=name, args={}, mode="any")


def test_each_worker_gives_its_own_value(leader):
    answer = leader.call(handler="resize", args={"path": "a.jpg"})

    assert answer.values == {worker: {"path": "a.jpg", "width": 200} for worker in "CD"}
    with pytest.raises(ValueError, match=r"2 workers returned a value each: use `values`"):
        answer.value  # noqa: B018
    merged = leader.call(handler="total", args={})
    assert (merged.value, merged.values) == ("C+D", {"C": "C", "D": "D"})
    parts = list(leader.parts(handler="who", args={}))
    assert {part.process_id: part.value for part in parts} == {"C": "C", "D": "D"}


def test_submit_and_map_return_values(leader):
    future = leader.submit("resize", args={"path": "a.jpg", "width": 3})
    assert future.result(10) == {"path": "a.jpg", "width": 3}
    assert future.result() is future.result()
    widths = leader.map("resize", args=({"path": "a", "width": n} for n in range(50)))
    assert [value["width"] for value in widths] == list(range(50))
    mixed = [{"path": "a"}, {"path": 1}, {"path": "c"}]
    outcome = dict(leader.map_as_completed("resize", args=mixed))
    assert (outcome[0]["path"], outcome[2]["path"]) == ("a", "c")
    assert isinstance(outcome[1], library.InvalidCall)
    with pytest.raises(library.InvalidCall, match="argument 'path'"):
        list(leader.map("resize", args=mixed))
    with pytest.raises(library.InvalidCall, match="argument 'path' is missing"):
        leader.submit("resize", args={}).result(10)


def test_bytes_dates_and_dataclasses_can_be_arguments(leader):
    sent = leader.submit("picture", args={"data": bytes(range(256))})
    assert base64.b64decode(sent.result(10)["pixels"]) == bytes(range(256))


def test_args_for_a_function_of_bytes_are_rejected_with_the_reason(leader):
    with pytest.raises(library.InvalidCall, match="the result is not JSON"):
        leader.submit("echo", args={"a": 1}).result(10)
    with pytest.raises(ValueError, match="the result is not JSON"):
        leader.call(handler="echo", args={"a": 1}, mode="any").value  # noqa: B018


@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        ({"args": [1]}, TypeError, "args must be a dict of arguments by name, not list"),
        ({"args": {1: 2}}, TypeError, "args: 1 is not the name of an argument"),
        ({"args": {"a": object()}}, TypeError, "args: dict with object in it, which is not JSON"),
        ({"payload": b"x", "args": {}}, TypeError, "a payload or args, not both"),
        ({}, TypeError, "a request needs a payload, or the args of a typed function"),
    ],
)
def test_invalid_args_are_rejected_before_anything_is_sent(leader, given, error, sentence):
    for verb in (leader.call, leader.forward, functools.partial(leader.submit, "resize")):
        with pytest.raises(error, match=sentence):
            verb(**given)
    with pytest.raises(error, match=sentence):
        list(leader.parts(**given))


def test_submit_and_map_with_args_ask_one_worker(leader):
    for verb in (leader.submit, leader.map):
        with pytest.raises(ValueError, match="mode 'all' with args returns one value per worker"):
            verb("resize", args={}, mode="all")
    with pytest.raises(TypeError, match="args of a map must be an iterable of dicts"):
        leader.map("resize", args={"path": "a"})
    with pytest.raises(TypeError, match="a map needs either payloads, or the args"):
        leader.map("resize")


def test_typed_functions_work_with_asyncio(four):
    async def ask() -> None:
        async with overlay.connect_async(four.address("A")) as client:
            args = {"path": "a", "width": 3}
            assert (await client.call(handler="resize", args=args, mode="any")).value == args
            assert (await client.call(handler="resize", args=args)).values["D"] == args
            assert await client.submit("resize", args=args) == args
            outcome = [value async for value in client.map("resize", args=[args, args])]
            assert outcome == [args, args]

            async def many():
                for n in range(3):
                    yield {"path": str(n)}

            assert [v["path"] async for v in client.map("resize", args=many())] == ["0", "1", "2"]
            parts = [part.value async for part in client.parts(handler="resize", args=args)]
            assert parts == [args, args]
            with pytest.raises(library.InvalidCall, match="argument 'path' is missing"):
                await client.submit("resize", args={})
            with pytest.raises(ValueError, match="mode 'all' with args"):
                client.submit("resize", args={}, mode="all")

    asyncio.run(ask())


def test_other_languages_can_send_json_as_the_payload(four):
    response = four.ask("A", b'{"path": "a.jpg"}', handler="resize", mode="ANY")
    assert response.result == b'{"path":"a.jpg","width":200}'


@pytest.mark.parametrize("name", ["count", "count_apart"])
def test_each_yielded_item_is_a_part(leader, name):
    parts = list(leader.parts(handler=name, args={"to": 5_000}))

    for worker in "CD":
        found = [part.value["n"] for part in parts if part.process_id == worker]
        assert found == list(range(5_000))
    assert list(leader.parts(handler=name, args={"to": 0})) == []
    assert leader.call(handler=name, args={"to": 2}, mode="any").value == [{"n": 0}, {"n": 1}]


@pytest.mark.parametrize("name", ["steps", "steps_apart"])
def test_an_item_arrives_while_the_function_is_running(leader, name):
    outcome = leader.parts(handler=name, args={"to": 2, "seconds": 60})
    assert {next(outcome).process_id, next(outcome).process_id} == {"C", "D"}
    outcome.close()
    assert len(list(leader.parts(handler=name, args={"to": 9, "seconds": 0}, first=3))) == 3


def test_a_failure_after_yielded_items_is_reported_at_the_end(leader):
    outcome = leader.parts(handler="steps", args={"to": 2, "seconds": 0, "fail": True})
    given = [next(outcome) for _ in range(4)]

    assert sorted((part.process_id, part.value["n"]) for part in given) == [
        ("C", 0), ("C", 1), ("D", 0), ("D", 1),
    ]  # fmt: skip
    with pytest.raises(library.HandlerFailed, match=r"C: handler 'steps' failed; error id .* D: "):
        next(outcome)


@pytest.mark.parametrize("size", [1, 7, 100, 10**6])
def test_items_are_found_wherever_the_array_is_split(mine, size):
    text = b"".join(typed.prepared("count", mine.count).call(b'{"to": 20}', at()))
    assert text.count(b"\n") == 0  # so that a result stays a line
    parts, given = Parts(None, in_items=True), []
    for start in range(0, len(text), size):
        chunk = start, text[start : start + size], start + size < len(text)
        given += parts.early(delivery(lambda worker: None, C=chunk), 0)
    assert [part.value["n"] for part in given] == list(range(20))


def test_many_quick_items_are_sent_together():
    sent: list[bytes] = []
    leaving = ItemSender(lambda chunk: sent.append(chunk) or True)

    for n in range(5_000):
        assert leaving.add(b"%d\t" % n)
    before = len(sent)
    until(lambda: len(sent) > before or not leaving._held, what="the timer has passed them on")

    assert len(sent) < 2_500
    assert sent[0] == b"0\t"
    assert b"".join(sent) + leaving.rest() == b"".join(b"%d\t" % n for n in range(5_000))


def test_quick_items_are_sent_together_over_a_slow_way():
    sent: list[bytes] = []

    def send(chunk: bytes) -> bool:
        time.sleep(0.004)  # in which two more items might go at once
        sent.append(chunk)
        return True

    leaving = ItemSender(send)
    for n in range(2_000):
        leaving.add(b"%d\t" % n)
    rest = leaving.rest()

    assert len(sent) < 1_000
    assert b"".join(sent) + rest == b"".join(b"%d\t" % n for n in range(2_000))


def test_an_idempotency_key_works_with_args(leader):
    asked = {"handler": "resize", "args": {"path": "a"}, "mode": "any", "idempotency_key": "one"}
    assert leader.call(**asked).request_id == leader.call(**asked).request_id


def run(*words: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "client.py"), *map(str, words)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=30)


def test_client_py_sends_args(four, tmp_path):
    at_a = ("127.0.0.1", four.port("A"), "--handler", "resize")
    (tmp_path / "args.json").write_text('{"path": "a.jpg", "width": 3}')

    any_one = run(*at_a, "--mode", "any", "--args", f"@{tmp_path / 'args.json'}", "--json")
    all_ = run(*at_a, "--args", "-", "--json", stdin='{"path": "a.jpg"}')
    wrong = run(*at_a, "--args", '{"width": 3}')

    assert json.loads(any_one.stdout)["value"] == {"path": "a.jpg", "width": 3}
    assert set(json.loads(all_.stdout)["values"]) == {"C", "D"}
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert "argument 'path' is missing" in wrong.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--args", "{path: 1}"], "--args: not JSON: key must be a string"),
        (["--args", "[1]"], '--args: not a JSON object, such as {"path": "a.jpg"}'),
        (["--args", "{}", "--payload", "x"], "not allowed with argument --args"),
    ],
)
def test_client_py_rejects_invalid_args(words, sentence, capsys):
    from overlay.cli import ask as asking
    from overlay.cli.usage import Parser

    parser = Parser("client.py", "", "")
    asking.arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(words)
    assert sentence in capsys.readouterr().err


def test_client_py_shows_the_arguments_of_handlers(four):
    def described(process_id: str) -> set[str]:
        found = four.channel(process_id)
        ask = pb2_grpc.OverlayNodeStub(found).GetMetrics
        made = ask(pb2.MetricsRequest(functions=True), timeout=5).functions
        return {function.name for function in made if len(function.workers) == 2}

    names = set(four.config["handlers"]) | {"echo"}
    until(lambda: described("A") == names, what="the leader knows all functions")

    shown = run("127.0.0.1", four.port("A"), "handlers")
    message = json.loads(run("127.0.0.1", four.port("A"), "handlers", "--json").stdout)

    assert (shown.returncode, shown.stderr) == (0, "")
    assert (
        "resize(path: str, width: int = 200) -> dict\n    Makes a picture smaller.\n"
        in shown.stdout
    )
    assert "    (typed, called with --args; on C, D)" in shown.stdout
    assert "shout(payload: bytes, context) -> bytes\n    Says it louder.\n" in shown.stdout
    found = {handler["name"]: handler for handler in message["handlers"]}
    assert found["resize_apart"]["arguments"]["properties"]["path"]["type"] == "string"
    assert found["shout"]["arguments"] is None
    assert found["picture"]["result"]["$defs"]["Size"]["properties"]["pixels"]["type"] == "string"


def test_functions_are_described_only_on_request(four):
    assert not four.metrics("A").functions
    assert four.metrics("A").functions_digest


def test_the_poller_collects_functions(four):
    from overlay.monitor.poller import Poller

    watch = Poller(four.address("A"), 0.1).start()
    try:
        described = until(lambda: watch.newer(within_s=1).get("functions"), what="functions")
    finally:
        watch.close()
    found = {function["name"]: function for function in described}
    assert found["resize"]["signature"] == "resize(path: str, width: int = 200) -> dict"
    assert found["resize"]["workers"] == ["C", "D"]


def test_a_function_that_cannot_be_called_with_json_aborts_the_startup(tmp_path):
    (tmp_path / "typed_wrong.py").write_text("def f(path: 'Nowhere') -> str: ...\n")
    config = configuration()
    for how in ("thread", "process"):
        config["handlers"] = {"f": {"call": "typed_wrong:f", "run": how}}
        (tmp_path / "overlay.json").write_text(json.dumps(config))
        command = [sys.executable, str(ROOT / "node.py"), "overlay.json", "C"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=30)

        assert done.returncode == 2
        assert "handler 'f': " in done.stderr
        assert (
            "typed_wrong.py, function f: argument 'path': its annotation 'Nowhere'" in done.stderr
        )
        assert "Traceback" not in done.stderr


# The example


def test_the_example_makes_an_offer(leader):
    loan = {"amount": "10000.00", "percent": "4.5", "months": 24}
    offer = leader.submit("offer", args={"loan": loan, "first": "2026-01-31"}).result(10)
    paid = leader.submit("payments", args={"loan": loan, "first": "2026-01-31"}).result(10)

    assert {k: offer[k] for k in ("monthly", "last")} == {"monthly": "436.48", "last": "2027-12-31"}
    assert offer["made_by"] in "CD"
    assert [payment["due"] for payment in paid[:2]] == ["2026-01-31", "2026-02-28"]
    assert (len(paid), paid[-1]["left"]) == (24, "0.00")
    with pytest.raises(library.InvalidCall, match=r"argument 'loan\.months': input should be less"):
        leader.submit(
            "offer", args={"loan": {**loan, "months": 601}, "first": "2026-01-31"}
        ).result(10)
    with pytest.raises(library.InvalidCall, match=r"a loan of 0 at 4\.5 % is not possible"):
        leader.submit(
            "payments", args={"loan": {**loan, "amount": "0"}, "first": "2026-01-31"}
        ).result(10)


# The last one: a worker of the overlay is another one from here on


def test_a_worker_with_different_code_is_listed_separately(four):
    def described() -> dict[str, list[str]]:
        asked = pb2.MetricsRequest(functions=True)
        found = four.stub("A").GetMetrics(asked, timeout=5).functions
        return {f.doc.partition("\n")[0]: list(f.workers) for f in found if f.name == "resize"}

    until(lambda: described() == {"Makes a picture smaller.": ["C", "D"]}, what="both are equal")
    text = MINE.replace("Makes a picture smaller.", "Makes it smaller.")
    (four.folder / "typed_mine.py").write_text(text)

    four.kill("D")
    until(lambda: described() == {"Makes a picture smaller.": ["C"]}, what="D is gone")
    four.start("D")

    both = {"Makes a picture smaller.": ["C"], "Makes it smaller.": ["D"]}
    until(lambda: described() == both, what="D is listed separately")
