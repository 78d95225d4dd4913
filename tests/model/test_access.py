"""What a caller may do, by its certificate's name: a table, and properties of every request."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlay.model import access
from overlay.model.access import OTHERS, UNRESTRICTED, VERBS, Access, Rights
from overlay.model.errors import NotAllowed
from overlay.model.identity import CALLER, OPERATOR, PROCESS, Identity
from overlay.model.segments import Code, Executed, Mode, Route
from overlay.model.topology import Process

ANNA = Rights(handlers=("echo", "upper"), teams=("green",), verbs=("requests",), waiting=20)
ALLOWED = Access({"anna": ANNA, OTHERS: Rights(verbs=("metrics",))})

C = Process("C", "worker", "green", "", 0, handler="echo")
D = Process("D", "worker", "pink", "", 0, handler="echo")
F = Process("F", "worker", "pink", "", 0, handler="render")


def named(name: str, kind: str = CALLER) -> Identity:
    return Identity("office", kind, name)


# An identity -> as refusals name it, whose entry holds


@pytest.mark.parametrize(
    ("identity", "rights"),
    [
        (named("anna"), Rights("anna", ("echo", "upper"), ("green",), ("requests",), 20)),
        (named("bob"), Rights("bob", verbs=("metrics",))),
        (None, Rights("a caller without a certificate", verbs=("metrics",))),
        (named("anna", OPERATOR), UNRESTRICTED),
        (named("anna", PROCESS), UNRESTRICTED),
    ],
    ids=str,
)
def test_a_caller_has_the_rights_of_its_own_entry_or_those_of_all_others(identity, rights):
    assert ALLOWED.of(identity) == rights


def test_without_an_entry_that_holds_everything_is_allowed():
    rights = Access({"anna": ANNA}).of(named("bob"))

    assert rights == Rights("bob")
    access.check_verb(rights, "logs")
    access.check_request(rights, Route(), [C, D, F])


def test_without_access_nothing_is_looked_up():
    assert Access().of(named("anna")) is UNRESTRICTED
    assert Access().of(None) is UNRESTRICTED


ANYTHING = Rights("anna")
ECHO, NO_HANDLERS = Rights("anna", handlers=("echo",)), Rights("anna", handlers=())
GREEN, NO_TEAMS = Rights("anna", teams=("green",)), Rights("anna", teams=())
BOTH_TEAMS = Rights("anna", teams=("green", "pink"))

# The rights, the request, the workers that it is for -> the refusal, "" if there is none
REQUESTS = [
    (ANYTHING, Route(handler="render"), [C, D, F], ""),
    (ECHO, Route(handler="echo"), [C, D, F], ""),
    (ECHO, Route(handler="render"), [C], "anna may not use handler 'render'; allowed is echo"),
    (ECHO, Route(), [C, D], ""),
    (
        ECHO,
        Route(),
        [C, D, F],
        "anna may not use handler 'render', which F runs when a request names none; "
        "allowed is echo",
    ),
    (
        ECHO,
        Route(mode=Mode.ANY),
        [C, F],
        "anna may not use handler 'render', which F runs when a request names none; "
        "allowed is echo",
    ),
    (NO_HANDLERS, Route(handler="echo"), [C], "anna may not use handler 'echo'; none is allowed"),
    (GREEN, Route(team="green"), [C], ""),
    (GREEN, Route(team="pink"), [D, F], "anna may not ask team 'pink'; allowed is green"),
    (
        GREEN,
        Route(),
        [C, D],
        "anna may not ask team 'pink', which a request without a team goes to as well; "
        "allowed is green",
    ),
    (BOTH_TEAMS, Route(), [C, D, F], ""),
    (NO_TEAMS, Route(team="green"), [C], "anna may not ask team 'green'; none is allowed"),
    # The workers that a caller names itself, as processes do, are judged like all others.
    (GREEN, Route(team="green", targets=("D",)), [D], "anna may not ask team 'pink'; allowed is"),
    (
        Rights("anna", verbs=("metrics", "logs")),
        Route(),
        [C],
        "anna may not send requests here; allowed are metrics, logs",
    ),
    (Rights("anna", verbs=()), Route(), [C], "anna may not send requests here; none is allowed"),
]


@pytest.mark.parametrize(("rights", "route", "scope", "refusal"), REQUESTS)
def test_a_request_is_allowed_as_the_table_says(rights, route, scope, refusal):
    if not refusal:
        access.check_request(rights, route, scope)
        return

    with pytest.raises(NotAllowed) as refused:
        access.check_request(rights, route, scope)

    assert str(refused.value).startswith(refusal)
    assert (refused.value.code, refused.value.executed) == (Code.PERMISSION_DENIED, Executed.NO)
    assert refused.value.cause == "not allowed"


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_is_allowed_by_its_own_word_alone(verb):
    access.check_verb(Rights("anna", verbs=(verb,)), verb)

    with pytest.raises(NotAllowed, match=f"anna may not {VERBS[verb]} here; allowed are "):
        access.check_verb(Rights("anna", verbs=tuple(v for v in VERBS if v != verb)), verb)


@pytest.mark.parametrize(("waiting", "says"), [(1, "1 request waiting"), (20, "20 requests wait")])
def test_too_many_waiting_requests_are_refused_like_a_full_queue(waiting, says):
    refused = Rights("anna", waiting=waiting).too_many()

    assert str(refused).startswith(f"anna has {says}")
    assert (refused.code, refused.executed) == (Code.RESOURCE_EXHAUSTED, Executed.NO)


HANDLERS, TEAMS = st.sampled_from(["echo", "upper", "render"]), st.sampled_from(["green", "pink"])
WORKERS = st.lists(
    st.builds(
        lambda team, handler: Process("W", "worker", team, "", 0, handler=handler), TEAMS, HANDLERS
    ),
    min_size=1,
    max_size=6,
)


def some(names: st.SearchStrategy[str]) -> st.SearchStrategy[tuple[str, ...] | None]:
    return st.none() | st.lists(names, max_size=3, unique=True).map(tuple)


def is_allowed(rights: Rights, route: Route, scope: list[Process]) -> bool:
    try:
        access.check_request(rights, route, scope)
    except NotAllowed:
        return False
    return True


RIGHTS = st.builds(
    Rights, st.just("anna"), some(HANDLERS), some(TEAMS), some(st.sampled_from(list(VERBS)))
)
ROUTES = st.builds(Route, handler=st.just("") | HANDLERS)


@given(RIGHTS, ROUTES, WORKERS)
def test_what_is_allowed_is_all_that_would_run_where_it_would_run(rights, route, scope):
    runs = {route.handler or worker.handler for worker in scope}
    where = {worker.team for worker in scope}
    expected = (
        (rights.handlers is None or runs <= set(rights.handlers))
        and (rights.teams is None or where <= set(rights.teams))
        and (rights.verbs is None or "requests" in rights.verbs)
    )

    assert is_allowed(rights, route, scope) == expected


@given(RIGHTS, ROUTES, WORKERS, WORKERS)
def test_a_request_for_more_workers_is_never_allowed_more(rights, route, scope, more):
    if is_allowed(rights, route, scope + more):
        assert is_allowed(rights, route, scope)


@given(st.dictionaries(st.sampled_from(["anna", "bob", OTHERS]), RIGHTS), st.text(max_size=5))
def test_operators_and_processes_are_never_restricted(entries, name):
    for kind in (OPERATOR, PROCESS):
        assert Access(entries).of(named(name, kind)) is UNRESTRICTED
