"""What can go wrong: one tree for the processes and for the library, each class with its status.

Raised where it is known. A process turns it into a gRPC status in one place, and the library turns
a status back into the kind of `CallFailed` that `of_status` names.
"""

from __future__ import annotations

import concurrent.futures

from overlay.model.segments import Code, Executed


class OverlayError(Exception):
    """The root.

    code: the gRPC status. executed: whether a handler saw the request; NO is proof that none did,
    and makes a retry safe. Both are the class's own where they are not given. retry_after_s: when
    the process asks to be tried again; None where it does not say. request_id: under which the
    processes that the request passed have lines in their logs; 0 where there is none.
    """

    code = Code.UNKNOWN
    executed = Executed.NO
    cause = ""  # the word that metrics count a refusal under

    def __init__(
        self,
        message: str,
        *,
        code: Code | None = None,
        executed: Executed | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code
        if executed is not None:
            self.executed = executed
        self.retry_after_s = retry_after_s
        self.request_id = 0


# A request without an answer: what the library raises, and the processes' own reasons for it.


class CallFailed(OverlayError):
    """A call without an answer; itself for every status without a class of its own below."""

    executed = Executed.UNKNOWN


class InvalidCall(CallFailed, ValueError):
    """The request itself is not right."""

    code = Code.INVALID_ARGUMENT


class NameNotFound(CallFailed):
    """No such team, handler or worker."""

    code = Code.NOT_FOUND


class UnknownName(NameNotFound):
    """No such team, handler or process in the configuration of the process asked."""

    executed = Executed.NO
    cause = "unknown name"


class Refused(CallFailed):
    """The queue is full or its time too short; no handler saw it, and later is worth a try."""

    code = Code.RESOURCE_EXHAUSTED
    executed = Executed.NO


class QueueFull(Refused):
    cause = "queue full"


class CrowdedOut(Refused):
    """Ended, or not let in, for others: more of its kind are open than there is room for."""

    cause = "crowded out"


class NoTimeLeft(Refused):
    """The deadline passed before a handler could start."""

    cause = "no time left"


class IdsFull(Refused):
    """There is no room to remember one more request id that its caller chose."""

    cause = "ids full"


class KeysFull(Refused):
    """There is no room to remember one more idempotency key."""

    cause = "keys full"


class Unavailable(CallFailed):
    """The process asked is stopping, or the connection or all workers were lost."""

    code = Code.UNAVAILABLE


class Draining(Unavailable):
    executed = Executed.NO
    cause = "draining"


class MadeRoom(Unavailable):
    """A stream that had nothing to do, ended to make room for another client's."""

    executed = Executed.NO
    cause = "crowded out"


class Unreachable(Unavailable):
    """No worker in scope can be asked now."""

    executed = Executed.NO
    cause = "unreachable"


class NotReached(Unavailable):
    """Nothing serves at the address: the request never left this machine."""

    executed = Executed.NO


class NoSuchHost(NotReached):
    """The name of the machine stands for no address on this one."""


class HandlerFailed(CallFailed):
    """The handler raised; the message has the id under which the process's log says more."""

    code = Code.INTERNAL
    executed = Executed.YES
    cause = "handler failed"


class DeadlinePassed(CallFailed, concurrent.futures.TimeoutError):
    """No answer in time; work may have begun. To callers of an Executor a TimeoutError."""

    code = Code.DEADLINE_EXCEEDED
    cause = "deadline passed"


class CallCancelled(CallFailed, RuntimeError):
    """The caller left, or closed its client before the answer came or before the call: an
    Executor's RuntimeError after its shutdown."""

    code = Code.CANCELLED
    cause = "cancelled"


def of_status(code: Code, executed: Executed) -> type[CallFailed]:
    """The class of what the library raises for a status."""
    kind = _KINDS.get(code, CallFailed)
    if kind is Refused and executed is not Executed.NO:
        return CallFailed  # such as an answer too large for a process on its way
    return kind


_KINDS = {
    kind.code: kind
    for kind in (
        InvalidCall,
        NameNotFound,
        Refused,
        Unavailable,
        HandlerFailed,
        DeadlinePassed,
        CallCancelled,
    )
}

# What only the processes themselves tell apart.


class ConfigError(OverlayError):
    """The configuration, or what a process needs to start, is wrong. `problems`: all of them."""

    code = Code.FAILED_PRECONDITION
    cause = "configuration"

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class BadRequest(OverlayError):
    """The request is not right; raised by handlers too.

    It is no ValueError as InvalidCall is: a handler's own `except ValueError`, and pydantic, would
    take it for one of theirs.
    """

    code = Code.INVALID_ARGUMENT
    cause = "bad request"


class NotAllowed(OverlayError):
    """This caller may not ask for it."""

    code = Code.PERMISSION_DENIED
    cause = "not allowed"


class NotTold(OverlayError):
    """Another process was asked on the caller's behalf and did not answer; with its status."""

    def __init__(self, message: str, code: Code) -> None:
        super().__init__(message, code=code)


class Misspoken(OverlayError):
    """What another process answered does not fit what it was asked, or exceeds every bound."""

    code = Code.DATA_LOSS
    executed = Executed.UNKNOWN
    cause = "misspoken"


class OtherConfiguration(OverlayError):
    """The process that asks names something that the configuration here does not have."""

    code = Code.FAILED_PRECONDITION
    cause = "another configuration"


class LoopDetected(OverlayError):
    code = Code.FAILED_PRECONDITION
    cause = "loop"


class AlreadyExecuted(OverlayError):
    """This request id was run here before; its outcome is not known to this call."""

    code = Code.ALREADY_EXISTS
    executed = Executed.UNKNOWN
    cause = "already executed"


class KeyBusy(OverlayError):
    """Too many requests wait for the answer to a key; the first one may have run."""

    code = Code.RESOURCE_EXHAUSTED
    executed = Executed.UNKNOWN
    cause = "key busy"


class AnswerNotKept(OverlayError):
    """The request of this key ran; its answer was too large to be kept for others."""

    code = Code.ALREADY_EXISTS
    executed = Executed.YES
    cause = "answer not kept"


class PartsFailed(OverlayError):
    """No worker answered OK; carries the status of the first part that says why."""

    def __init__(
        self, message: str, code: Code, executed: Executed, cause: str, retry_after_s: float | None
    ) -> None:
        super().__init__(message, code=code, executed=executed, retry_after_s=retry_after_s)
        self.cause = cause
