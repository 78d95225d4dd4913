"""The configuration file: all problems are named at once, always in a ConfigError."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from overlay.model import config
from overlay.model.access import Access, Rights
from overlay.model.addresses import join_address
from overlay.model.errors import ConfigError
from overlay.model.limits import MIB
from overlay.model.topology import Topology
from tests.harness.machine import ROOT

GOOD = json.loads((ROOT / "two_hosts_config.json").read_text("utf-8"))
ONE_HOST = json.loads((ROOT / "one_host_config.json").read_text("utf-8"))
SCHEMA = ROOT / "overlay" / "configuration.schema.json"

Change = Callable[[dict[str, Any], dict[str, Any]], object]


class File:
    """A configuration file in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "mine.json"

    def load(self, raw: Any) -> Topology:
        self.path.write_text(json.dumps(raw), "utf-8")
        return config.load(self.path)

    def load_text(self, text: str | bytes) -> Topology:
        self.path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
        return config.load(self.path)

    def problems(self, raw: Any) -> list[str]:
        with pytest.raises(ConfigError) as raised:
            self.load(raw)
        assert all(problem.startswith("mine.json: ") for problem in raised.value.problems)
        return [problem.removeprefix("mine.json: ") for problem in raised.value.problems]


@pytest.fixture
def file(tmp_path: Path) -> File:
    return File(tmp_path)


def changed(change: Change) -> dict[str, Any]:
    """The good file after `change(file, processes)`."""
    raw = copy.deepcopy(GOOD)
    change(raw, raw["processes"])
    return raw


def access(entries: dict[str, Any]) -> Change:
    """A closed overlay whose callers may do this."""
    return lambda raw, processes: raw.update(tls="tls", access=entries)


def test_the_shipped_file_describes_the_six_processes(file):
    six = config.load(ROOT / "two_hosts_config.json")

    rows = [
        (p.id, p.role, p.team, p.host, p.port, "".join(p.neighbors)) for p in six.processes.values()
    ]
    assert rows == [
        ("A", "leader", "green", "192.168.1.1", 50051, "BE"),
        ("B", "team_leader", "green", "192.168.1.1", 50052, "ACD"),
        ("C", "worker", "green", "192.168.1.2", 50053, "B"),
        ("D", "worker", "pink", "192.168.1.1", 50054, "BE"),
        ("E", "team_leader", "pink", "192.168.1.2", 50055, "AFD"),
        ("F", "worker", "pink", "192.168.1.2", 50056, "E"),
    ]
    assert config.warnings(six) == []
    assert [p.id for p in six.below("A")] == ["B", "E"]
    assert [p.id for p in six.below("E")] == ["F", "D"]
    assert six.below("C") == ()
    assert [six.hops_below(p) for p in "ABC"] == [2, 1, 0]


def test_the_file_for_one_host_differs_only_in_the_hosts():
    moved = changed(lambda raw, six: [p.update(host="127.0.0.1") for p in six.values()])

    assert moved == ONE_HOST


def test_omitted_settings_have_their_defaults(file):
    six = file.load(GOOD)

    limits, c = six.limits, six.processes["C"]
    assert (limits.queue_slots, limits.in_service) == (200, 100)
    assert (limits.default_deadline_s, limits.max_deadline_s, limits.drain_grace_s) == (
        30,
        3600,
        30,
    )
    assert (limits.max_message_bytes, limits.max_waiting_bytes) == (16 * MIB, 256 * MIB)
    assert (limits.key_window_s, limits.kept_bytes) == (600, 128 * MIB)
    assert (c.handler, c.slots, c.in_service, c.log_dir, c.options) == (
        "echo",
        None,
        100,
        "logs",
        {},
    )
    assert c.listen_address == c.address == "192.168.1.2:50053"
    assert list(six.handlers) == ["echo"]
    assert six.folder == file.path.parent
    assert (six.queue_slots("A"), six.queue_slots("B"), six.queue_slots("C")) == (200, 100, 100)


def test_settings_of_the_file_are_used(file):
    def change(raw, processes):
        raw.update(
            queue_slots=7,
            in_service=5,
            default_deadline_s=2.5,
            max_deadline_s=60,
            drain_grace_s=1,
            max_message_mib=2,
            max_waiting_mib=3,
            key_window_s=60,
            max_kept_mib=4,
            log_dir="elsewhere",
            handlers={
                "short": "mine:work",
                "long": {
                    "call": "mine.sub:work",
                    "merge": "mine:merge",
                    "run": "process",
                    "slots": 3,
                    "limit_s": 1.5,
                    "memory_mib": 512,
                    "max_requests": 9,
                    "options": {"a": [1]},
                },
            },
        )
        processes["C"].update(
            bind="0.0.0.0", handler="long", slots=2, in_service=4, log_dir="c", options={"b": 2}
        )

    six = file.load(changed(change))

    limits, b, c = six.limits, six.processes["B"], six.processes["C"]
    assert (limits.queue_slots, limits.in_service, limits.max_message_bytes) == (7, 5, 2 * MIB)
    assert (limits.key_window_s, limits.kept_bytes) == (60, 4 * MIB)
    assert (limits.default_deadline_s, limits.max_deadline_s, limits.drain_grace_s) == (2.5, 60, 1)
    assert (b.in_service, b.log_dir) == (5, "elsewhere")
    assert (c.in_service, c.log_dir, c.options) == (4, "c", {"b": 2})
    assert (c.address, c.listen_address) == ("192.168.1.2:50053", "0.0.0.0:50053")
    assert list(six.handlers) == ["echo", "short", "long"]
    assert six.handlers["short"].call == "mine:work"
    long = six.handlers["long"]
    assert (long.merge, long.run) == ("mine:merge", "process")
    assert (long.limit_s, long.memory_mib, long.max_requests) == (1.5, 512, 9)
    assert long.options == {"a": [1]}
    assert six.handler_slots(c, long) == 2
    assert (six.queue_slots("A"), six.queue_slots("C")) == (7, 4)


def test_the_default_deadline_is_cut_to_the_maximum(file):
    six = file.load({**GOOD, "max_deadline_s": 5})
    assert six.limits.default_deadline_s == 5


# A change of the file, and all problems that it causes.
BROKEN: list[tuple[Change, list[str]]] = [
    (
        lambda raw, p: p["C"].update(neighbors=["Z"]),
        ["process C: neighbor 'Z' is not in the file"],
    ),
    (
        lambda raw, p: p["C"].update(neighbors=["C", "B"]),
        ["process C: it names itself as neighbor"],
    ),
    (
        lambda raw, p: p["C"].update(neighbors=["B", "B"]),
        ["process C: neighbor 'B' appears twice"],
    ),
    (lambda raw, p: p["B"].update(port=99999), ["process B: port 99999 is not 1..65535"]),
    (lambda raw, p: p["B"].update(port=0), ["process B: port 0 is not 1..65535"]),
    (
        lambda raw, p: p["B"].update(port="50052"),
        ["process B: port: input should be a valid integer, not '50052'"],
    ),
    (
        lambda raw, p: p["B"].update(port=True),
        ["process B: port: input should be a valid integer, not 'True'"],
    ),
    (
        lambda raw, p: p["C"].update(role="boss"),
        ["process C: role 'boss' is not 'leader', 'team_leader' or 'worker'"],
    ),
    (lambda raw, p: p["C"].pop("team"), ["process C: 'team' is missing"]),
    (lambda raw, p: p["C"].update(id="X"), ["process C: its id is 'X'; key and id must be equal"]),
    (
        lambda raw, p: p["C"].update(prot=1),
        ["process C: unknown key 'prot'; did you mean 'port'?"],
    ),
    (
        lambda raw, p: raw.update(queue_slot=9),
        ["unknown key 'queue_slot'; did you mean 'queue_slots'?"],
    ),
    (
        lambda raw, p: raw.update(handlers={"h": {"cal": "m:f"}}),
        ["handler h: 'call' is missing", "handler h: unknown key 'cal'; did you mean 'call'?"],
    ),
    (
        lambda raw, p: raw.update(handlers={"h": "just_a_name"}),
        ["handler h: call 'just_a_name' is not \"module:function\""],
    ),
    (
        lambda raw, p: raw.update(handlers={"h": {"call": "m:f", "run": "fork"}}),
        ["handler h: run 'fork' is not 'thread' or 'process'"],
    ),
    (
        lambda raw, p: raw.update(
            handlers={"h": {"call": "m:f", "limit_s": 1, "memory_mib": 9, "max_requests": 2}}
        ),
        [
            'handler h: limit_s needs "run": "process"; a thread cannot be killed',
            'handler h: memory_mib needs "run": "process"; threads share this process\'s memory',
            'handler h: max_requests needs "run": "process"; a thread is not replaced',
        ],
    ),
    (
        lambda raw, p: raw.update(
            handlers={"h": {"call": "m:f", "run": "process", "memory_mib": 0.5}}
        ),
        ["handler h: memory_mib: input should be a valid integer, not '0.5'"],
    ),
    (
        lambda raw, p: p["C"].update(handler="ecko"),
        ["process C: handler 'ecko' is not in the file's handlers; did you mean 'echo'?"],
    ),
    (
        lambda raw, p: p["D"].update(host="192.168.1.1", port=50052),
        ["process D: port 50052 on 192.168.1.1 is process B's already"],
    ),
    (
        lambda raw, p: p["E"].update(role="leader"),
        [
            "there must be one leader, not 2 (A, E): several need a journal on NATS servers, "
            '"journal": "nats://…"',
            "team 'pink' has workers but no team_leader",
        ],
    ),
    (
        lambda raw, p: raw.update(journal="nats://10.0.0.1:4222,10.0.0.2:4222"),
        [
            "journal: 2 servers have no majority when one of them is lost: name at least 3, on 3 "
            "machines; the journal of one leader can be a file"
        ],
    ),
    (
        lambda raw, p: raw.update(journal="nats://a:4222,b:4222,b:4223"),
        [
            "journal: two machines have no majority when the one with more servers is lost: the "
            "third server needs a machine of its own (a small one will do, it need not run a "
            "process)"
        ],
    ),
    (
        lambda raw, p: raw.update(journal="nats://a:4222,b:4222,a:4222"),
        ["journal: a server is named twice"],
    ),
    (
        lambda raw, p: raw.update(journal="nats://a:4222,b,c:4222"),
        ["journal: 'b' is not host:port with a port up to 61535"],
    ),
    (
        lambda raw, p: p["A"].update(role="team_leader"),
        ["there must be one leader, not 0 (none)"],
    ),
    (
        lambda raw, p: p["A"].update(neighbors=["B"]),
        [
            "process F: leader A has no path down to it; "
            "a team_leader among the neighbors of A must have F as neighbor"
        ],
    ),
    (
        lambda raw, p: p["F"].update(team="blue"),
        ["team 'blue' has workers but no team_leader"],
    ),
    (
        lambda raw, p: raw.update(access={"anna": {}}),
        [
            'access needs "tls", as callers are known by their certificates: run '
            "'client.py secure' on the file without access, then add access"
        ],
    ),
    (
        access({"anna": {"handlers": ["echo", "ecko", "os:system"]}}),
        [
            "access anna: handlers 'ecko' is not among the file's handlers; did you mean 'echo'?",
            "access anna: handlers 'os:system' is not among the file's handlers; it has echo",
        ],
    ),
    (
        access({"*": {"teams": ["pnik", "blue"]}}),
        [
            "access *: teams 'pnik' is not among the file's teams with workers; "
            "did you mean 'pink'?",
            "access *: teams 'blue' is not among the file's teams with workers; it has green, pink",
        ],
    ),
    (
        access({"anna": {"verbs": ["request", "drain"]}}),
        [
            "access anna: verbs 'request' is not 'requests', 'metrics' or 'logs'; "
            "did you mean 'requests'?",
            "access anna: verbs 'drain' is not 'requests', 'metrics' or 'logs'",
        ],
    ),
    (
        access({"anna": {"handler": ["echo"]}}),
        ["access anna: unknown key 'handler'; did you mean 'handlers'?"],
    ),
    (
        access({"anna": {"waiting": 0}}),
        ["access anna: waiting: input should be greater than or equal to 1, not '0'"],
    ),
    (
        access({"anna lee": {}}),
        ["access anna lee: name 'anna lee' does not match ^([A-Za-z0-9._-]{1,64}|\\*)$"],
    ),
    (
        access({"anna": {"handlers": [5], "teams": "green"}}),
        [
            "access anna: handlers.0: input should be a valid string, not '5'",
            "access anna: teams: input should be a valid list, not 'green'",
        ],
    ),
]


def test_access_is_read_by_the_names_of_callers(file):
    entries = {"anna": {"handlers": ["echo"], "teams": [], "waiting": 20}, "*": {"verbs": ["logs"]}}

    found = file.load(changed(access(entries))).access

    assert found == Access(
        {"anna": Rights(handlers=("echo",), teams=(), waiting=20), "*": Rights(verbs=("logs",))}
    )
    assert file.load(GOOD).access == Access()


def test_the_example_of_the_page_is_right(file):
    page = (ROOT / "docs" / "security.md").read_text("utf-8")
    (example,) = re.findall(r'```text\n("access": .*?)```', page, re.DOTALL)
    raw = {**GOOD, "tls": "tls", "handlers": {"render": "mine:render"}}

    found = file.load(raw | json.loads("{" + example + "}")).access

    assert found.entries["anna"] == Rights(handlers=("render",), teams=("pink",), waiting=20)


def test_teams_are_not_judged_while_a_process_cannot_be_read(file):
    def change(raw, processes):
        access({"anna": {"teams": ["pink"]}})(raw, processes)
        processes["F"].update(port=0)

    assert file.problems(changed(change)) == ["process F: port 0 is not 1..65535"]


@pytest.mark.parametrize(("change", "problems"), BROKEN)
def test_a_problem_is_named_with_process_field_and_value(file, change, problems):
    assert file.problems(changed(change)) == problems


def test_every_problem_in_a_config_is_named(file):
    def change(raw, processes):
        raw.update(queue_slots=0, nonsense=1, default_deadline_s=-1)
        processes["A"].update(port=70000)
        processes["B"].pop("host")
        processes["C"].update(neighbors=["B", "Q"], handler="nope")
        processes["D"].update(id="Y")
        processes["F"].update(rolle="x", slots=0)

    problems = "\n".join(file.problems(changed(change)))

    for expected in (
        "queue_slots: ",
        "unknown key 'nonsense'",
        "default_deadline_s: ",
        "process A: port 70000",
        "process B: 'host' is missing",
        "process C: neighbor 'Q' is not in the file",
        "process C: handler 'nope'",
        "process D: its id is 'Y'",
        "process F: unknown key 'rolle'; did you mean 'role'?",
        "process F: slots",
    ):
        assert expected in problems
    assert len(problems.splitlines()) == 10


WRONG_VALUES = [
    ("queue_slots", 0),
    ("queue_slots", 1.5),
    ("queue_slots", True),
    ("queue_slots", "200"),
    ("in_service", 1001),
    ("default_deadline_s", 0),
    ("default_deadline_s", "30"),
    ("default_deadline_s", True),
    ("max_deadline_s", 1e9),
    ("drain_grace_s", None),
    ("max_message_mib", 0),
    ("max_waiting_mib", -1),
    ("key_window_s", 0),
    ("max_kept_mib", 1.5),
    ("log_dir", 5),
    ("log_dir", "a\0b"),
    ("handlers", []),
    ("processes", []),
    ("processes", {}),
    ("processes", None),
    ("access", []),
    ("access", None),
]


@pytest.mark.parametrize(("key", "value"), WRONG_VALUES)
def test_a_wrong_top_level_value_is_named(file, key, value):
    (problem,) = file.problems({**GOOD, key: value})
    assert problem.startswith(f"{key}")


WRONG_IN_C = [
    ("id", "C\n"),
    ("team", ""),
    ("team", "a b"),
    ("host", ""),
    ("host", "a b"),
    ("host", "a\0b"),
    ("host", "x" * 256),
    ("host", None),
    ("bind", "http://x"),
    ("port", -1),
    ("port", 50053.0),
    ("neighbors", "B"),
    ("neighbors", [1]),
    ("slots", 0),
    ("in_service", 2000),
    ("options", []),
    ("log_dir", "a\0b"),
    ("handler", "a b"),
]


@pytest.mark.parametrize(("field", "value"), WRONG_IN_C)
def test_a_wrong_value_in_a_process_is_named(file, field, value):
    problems = file.problems(changed(lambda raw, p: p["C"].update({field: value})))
    assert problems[0].startswith(f"process C: {field}")
    assert all(problem.isprintable() for problem in problems)


def test_problems_with_unprintable_names_are_printable(file):
    def change(raw, processes):
        raw["handlers"] = {"a\nb": "m:f"}
        processes["x\ny"] = {**processes["C"], "id": "x", "port": 9, "handler": "a\rb"}
        processes["C"].update(handler="nope", neighbors=["\x1b[2J"])

    for problem in file.problems(changed(change)):
        assert problem.isprintable()

    raw = changed(lambda raw, p: p.update({"x\ny": {**p["C"], "port": 9, "neighbors": []}}))
    for problem in file.problems(raw):
        assert problem.isprintable()


TEXTS = [
    ("", "mine.json is not JSON: line 1, column 1"),
    ("{", "mine.json is not JSON: line 1, column 2"),
    ('{"processes": {}', "mine.json is not JSON: line 1, column 17"),
    ("[]", 'mine.json must be an object like {"processes"'),
    ("null", "mine.json must be an object"),
    ('{"a": 1, "a": 2}', "mine.json: key 'a' appears twice"),
    ('{"processes": {"A": {"id": 1, "id": 2}}}', "mine.json: key 'id' appears twice"),
    ('{"processes": NaN}', "mine.json is not usable JSON: NaN is not JSON"),
    ('{"processes": -Infinity}', "mine.json is not usable JSON: -Infinity is not JSON"),
    ('{"x": ' + "9" * 5000 + "}", "mine.json is not usable JSON: "),
    ('{"x": ' + "[" * 100_000, "mine.json is not usable JSON: "),
    ('{"x": ' * 100_000, "mine.json is not usable JSON: "),
    (b'{"\xff\xfe": 1}', "mine.json is not UTF-8 text (byte 2); save it again as UTF-8"),
    ("{}".encode("utf-16"), "mine.json is not UTF-8 text (byte 0); save it again as UTF-8"),
]


@pytest.mark.parametrize(("text", "sentence"), TEXTS)
def test_a_file_that_is_no_configuration_is_one_problem(file, text, sentence):
    with pytest.raises(ConfigError) as raised:
        file.load_text(text)
    (problem,) = raised.value.problems
    assert problem.startswith(sentence)
    assert problem.isprintable()


@pytest.mark.parametrize("place", ["options", "port"])
def test_any_depth_of_nesting_is_loaded_or_reported(file, place):
    good = json.dumps(GOOD)
    for depth in [*range(10, 900, 89), *range(900, 1010)]:
        nest = "[" * depth + "]" * depth
        value = f'50051, "options": {{"x": {nest}}}' if place == "options" else nest
        assert _outcome(file, good.replace("50051", value)) is not None


def test_a_byte_order_mark_is_accepted(file):
    assert file.load_text(b"\xef\xbb\xbf" + json.dumps(GOOD).encode()).processes


def test_windows_line_endings_are_accepted(file):
    assert file.load_text(json.dumps(GOOD, indent=1).replace("\n", "\r\n")).processes


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"^no configuration file at '.*nowhere\.json'$"):
        config.load(tmp_path / "nowhere.json")


def test_a_folder_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(tmp_path)


def test_a_name_with_a_null_byte_cannot_be_read():
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load("a\0b")


def test_a_neighbour_that_does_not_name_the_process_back_is_a_warning(file):
    six = file.load(changed(lambda raw, p: p["C"].update(neighbors=[])))
    assert config.warnings(six) == ["process B: neighbor 'C' does not name B back"]


def test_the_digest_depends_on_the_content_and_not_on_its_layout(file):
    digest = file.load(GOOD).digest
    shuffled = {
        "processes": {key: dict(reversed(p.items())) for key, p in GOOD["processes"].items()}
    }
    assert file.load_text(json.dumps(shuffled, indent=4)).digest == digest
    assert file.load({**GOOD, "queue_slots": 199}).digest != digest


def test_an_unknown_process_is_named(file):
    with pytest.raises(ConfigError) as raised:
        file.load(GOOD).process("G")
    assert str(raised.value) == "no process 'G' in mine.json; it has A, B, C, D, E, F"


def test_prometheus_is_off_unless_configured(file):
    plain = file.load(GOOD)
    assert {process.metrics_port for process in plain.processes.values()} == {None}

    asked = file.load({**GOOD, "metrics_port_offset": 1000, "metrics_bind": "0.0.0.0"})
    for process in asked.processes.values():
        assert (process.metrics_port, process.metrics_bind) == (process.port + 1000, "0.0.0.0")


def test_a_process_may_have_a_metrics_port_of_its_own(file):
    found = file.load(changed(lambda raw, p: p["C"].update(metrics_port=9100)))
    assert [i for i, process in found.processes.items() if process.metrics_port] == ["C"]


def test_impossible_metrics_ports_are_named(file):
    at_c = GOOD["processes"]["C"]["port"]
    (problem,) = file.problems(changed(lambda raw, p: p["C"].update(metrics_port=at_c)))
    assert problem.startswith(f"process C: metrics_port {at_c} is already process C's port on ")

    (problem,) = file.problems(changed(lambda raw, p: p["C"].update(metrics_port=99_999)))
    assert problem == "process C: metrics_port 99999 is not 1..65535"

    for problem in file.problems({**GOOD, "metrics_port_offset": 60_000}):
        assert re.match(
            r"process \w: metrics_port \d+ \(port \d+ with metrics_port_offset", problem
        )
        assert problem.endswith("is not 1..65535")


def test_the_file_may_name_its_schema(file):
    assert file.load({"$schema": "overlay/configuration.schema.json", **GOOD}).processes


def test_the_schema_beside_the_code_is_current():
    text = json.dumps(config.schema(), indent=2) + "\n"
    assert SCHEMA.read_text("utf-8") == text, (
        "run: python scripts/reference.py (after a change of config.py)"
    )


def test_the_schema_knows_every_key_and_both_ways_to_write_a_handler():
    schema = config.schema()
    top = schema["properties"]
    assert set(top) > {"$schema", "processes", "handlers", "queue_slots", "log_dir"}
    kinds = top["handlers"]["additionalProperties"]["anyOf"]
    assert {"type": "string"} in kinds
    process = schema["$defs"]["ProcessEntry"]
    assert process["required"] == ["id", "role", "team", "host", "port", "neighbors"]
    assert process["additionalProperties"] is False


@pytest.mark.parametrize(
    ("host", "address"),
    [("127.0.0.1", "127.0.0.1:5"), ("::1", "[::1]:5"), ("[::1]", "[::1]:5"), ("pc-7", "pc-7:5")],
)
def test_an_address_has_its_ipv6_host_in_brackets(host, address):
    assert join_address(host, 5) == address


def _outcome(file: File, text: str) -> Topology | tuple[str, ...] | None:
    """The topology or the problems; None when a problem is empty or not one line."""
    try:
        return file.load_text(text)
    except ConfigError as e:
        valid = e.problems and all(problem.isprintable() and problem for problem in e.problems)
        return e.problems if valid else None


def test_several_leaders_share_a_journal_on_three_servers(file):
    def change(raw, p):
        raw["journal"] = "nats://10.0.0.1:4222,10.0.0.2:4222,[fd00::3]:4222"
        p["Z"] = {**p["A"], "id": "Z", "port": 50060}

    topology = file.load(changed(change))
    assert [leader.id for leader in topology.leaders] == ["A", "Z"]
    assert topology.leader.id == "A"
    assert [server.address for server in topology.jobs_servers][1:] == [
        "10.0.0.2:4222",
        "[fd00::3]:4222",
    ]
    assert topology.journal_of("Z") == topology.folder / "journal-Z.db"


def test_the_servers_of_jobs_can_be_closed_with_the_overlay(file):
    journal = "nats://pc-1:4222,pc-2:4223,[fd00::3%eth0]:4222"
    topology = file.load(changed(lambda raw, p: raw.update(journal=journal, tls="tls")))

    assert [server.name for server in topology.jobs_servers] == [
        "pc-1-4222",
        "pc-2-4223",
        "fd00--3-eth0-4222",
    ]
