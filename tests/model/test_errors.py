"""One tree of errors: the library raises the kind of error that the process raised."""

from __future__ import annotations

import concurrent.futures
import pickle

import pytest

from overlay import client
from overlay.model import errors
from overlay.model.segments import Code, Executed


def all_below(kind: type) -> set[type]:
    return {kind}.union(*map(all_below, kind.__subclasses__()))


@pytest.mark.parametrize("kind", sorted(all_below(errors.CallFailed), key=lambda k: k.__name__))
def test_the_library_raises_the_kind_of_the_processes_error(kind) -> None:
    assert issubclass(kind, errors.of_status(kind.code, kind.executed))


RAISED = [
    (Code.INVALID_ARGUMENT, Executed.NO, client.InvalidCall),
    (Code.NOT_FOUND, Executed.NO, client.NameNotFound),
    (Code.RESOURCE_EXHAUSTED, Executed.NO, client.Refused),
    (Code.RESOURCE_EXHAUSTED, Executed.YES, client.CallFailed),
    (Code.RESOURCE_EXHAUSTED, Executed.UNKNOWN, client.CallFailed),
    (Code.UNAVAILABLE, Executed.UNKNOWN, client.Unavailable),
    (Code.INTERNAL, Executed.YES, client.HandlerFailed),
    (Code.DEADLINE_EXCEEDED, Executed.UNKNOWN, client.DeadlinePassed),
    (Code.CANCELLED, Executed.UNKNOWN, client.CallCancelled),
    (Code.FAILED_PRECONDITION, Executed.NO, client.CallFailed),
    (Code.DATA_LOSS, Executed.UNKNOWN, client.CallFailed),
]


@pytest.mark.parametrize(("code", "executed", "kind"), RAISED)
def test_each_status_is_raised_as_its_kind(code, executed, kind) -> None:
    assert errors.of_status(code, executed) is kind


def test_programs_can_catch_the_standard_exceptions() -> None:
    assert issubclass(client.InvalidCall, ValueError)
    assert issubclass(client.DeadlinePassed, concurrent.futures.TimeoutError)
    assert issubclass(client.CallCancelled, RuntimeError)
    assert issubclass(client.NoSuchHost, client.NotReached)
    assert issubclass(client.NotReached, client.Unavailable)


def test_a_bad_request_is_not_a_value_error() -> None:
    assert not issubclass(errors.BadRequest, ValueError)


def test_an_error_survives_pickling() -> None:
    error = client.Refused("all slots are taken", executed=Executed.NO, retry_after_s=1.5)
    error.request_id = 7

    found = pickle.loads(pickle.dumps(error))

    assert (type(found), str(found), vars(found)) == (type(error), str(error), vars(error))


def test_an_error_has_the_status_of_its_class_or_its_own() -> None:
    assert errors.QueueFull("full").executed is Executed.NO
    assert errors.DeadlinePassed("late").code is Code.DEADLINE_EXCEEDED
    assert errors.CallFailed("odd", code=Code.ABORTED).code is Code.ABORTED
