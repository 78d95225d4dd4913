"""Processes with different configurations: only what one of them lacks fails, and the answer
blames the configuration and not the client."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import overlay
from overlay.client.sync import CallFailed, Client
from overlay.model.segments import Code, Executed
from tests.harness.cluster import Overlay, free_port, six_processes

MODULE = """
def shout(payload, context):
    return context.process_id.encode() + b": " + payload.upper()
"""
DIFFERS = "E reads another configuration: it"


class Drifted(Overlay):
    """A, B and C read the new file, which adds worker G to E's team and the handler `shout`. E, D
    and F read the old one."""

    def __init__(self, folder: Path) -> None:
        old = six_processes()
        new = copy.deepcopy(old)
        new["processes"]["G"] = {
            **new["processes"]["F"], "id": "G", "port": free_port(), "neighbors": ["E"]
        }  # fmt: skip
        new["processes"]["E"]["neighbors"].append("G")
        new["handlers"] = {"shout": {"call": "mine:shout"}}
        super().__init__(folder, new)
        (folder / "old.json").write_text(json.dumps(old))
        (folder / "mine.py").write_text(MODULE)
        self.files = dict.fromkeys("EDF", "old.json")


@pytest.fixture(scope="module")
def drifted(tmp_path_factory: Any) -> Iterator[Overlay]:
    with Drifted(tmp_path_factory.mktemp("drifted")) as made:
        yield made.start()


@pytest.fixture
def client(drifted: Overlay) -> Iterator[Client]:
    with overlay.connect(drifted.address("A")) as made:
        yield made


@pytest.mark.parametrize("verb", ["call", "forward"])
def test_only_the_unknown_worker_is_missing_with_a_reason(client: Client, verb: str) -> None:
    answer = getattr(client, verb)(b"hi")

    assert answer.coverage == (3, 4)
    assert [part.process_id for part in answer.parts if part.ok] == ["C", "D", "F"]
    (missing,) = answer.missing
    assert (missing.process_id, missing.code) == ("G", Code.FAILED_PRECONDITION)
    assert missing.executed is Executed.NO
    assert missing.reason == f"{DIFFERS} does not know worker G"


def test_parts_and_maps_report_an_unknown_worker_too(client: Client) -> None:
    parts = {part.process_id: part for part in client.parts(b"hi")}
    assert {worker for worker, part in parts.items() if part.ok} == {"C", "D", "F"}
    assert parts["G"].reason == f"{DIFFERS} does not know worker G"

    for result in client.map(None, [b"a", b"b", b"c"], mode="all"):
        assert [part.process_id for part in result.missing] == ["G"]


@pytest.mark.parametrize("verb", ["call", "forward"])
def test_mode_any_never_picks_the_unknown_worker(client: Client, verb: str) -> None:
    for _ in range(20):
        answer = getattr(client, verb)(b"hi", mode="any")
        assert answer.parts[0].process_id in "CDF"


@pytest.mark.parametrize("verb", ["call", "forward"])
def test_only_the_branch_without_the_handler_fails(client: Client, verb: str) -> None:
    answer = getattr(client, verb)(b"hi", handler="shout")
    assert answer.result == b"C: HI"
    reasons = {part.process_id: (part.code, part.reason) for part in answer.missing}
    assert set(reasons) == {"D", "F", "G"}
    assert {code for code, _ in reasons.values()} == {Code.FAILED_PRECONDITION}
    assert f"{DIFFERS} has no handler 'shout'" in reasons["F"][1]

    for _ in range(10):
        one = getattr(client, verb)(b"hi", handler="shout", mode="any")
        assert one.result == b"C: HI"


@pytest.mark.parametrize("verb", ["call", "forward"])
@pytest.mark.parametrize("mode", ["all", "any"])
def test_if_no_worker_has_the_handler_the_error_blames_the_configuration(
    client: Client, verb: str, mode: str
) -> None:
    with pytest.raises(CallFailed, match="reads another configuration") as raised:
        getattr(client, verb)(b"hi", handler="shout", team="pink", mode=mode)
    assert (raised.value.code, raised.value.executed) == (Code.FAILED_PRECONDITION, Executed.NO)
