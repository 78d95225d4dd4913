"""The errors of processes and library: one tree, in which each class has its gRPC status.

An error is raised where it is known. A process turns it into a status in one place, and the library
turns a status back into the kind of `CallFailed` that `of_status` returns.
"""

from __future__ import annotations

import concurrent.futures

from overlay.model.segments import Code, Executed


class OverlayError(Exception):
    """The root of the tree.

    code: the gRPC status. executed: whether a handler saw the request; NO proves that none did, so
    a retry is safe. Both default to the class's own. retry_after_s: how long the process asks the
    caller to wait before a retry; None if it does not say. request_id: the id under which processes
    logged the request; 0 if there is none.
    """

    code = Code.UNKNOWN
    executed = Executed.NO
    cause = ""  # under which metrics count a refusal

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


# A request without an answer: what the library raises, and the reasons that processes give.


class CallFailed(OverlayError):
    """A call without an answer; raised itself for a status that has no class of its own below."""

    executed = Executed.UNKNOWN


class InvalidCall(CallFailed, ValueError):
    """The request itself is invalid."""

    code = Code.INVALID_ARGUMENT


class NameNotFound(CallFailed):
    """No such team, handler or worker."""

    code = Code.NOT_FOUND


class UnknownName(NameNotFound):
    """No such team, handler or process in the configuration of the process asked."""

    executed = Executed.NO
    cause = "unknown name"


class Refused(CallFailed):
    """The queue is full or the time too short. No handler saw the request; a retry may succeed."""

    code = Code.RESOURCE_EXHAUSTED
    executed = Executed.NO


class QueueFull(Refused):
    cause = "queue full"


class CrowdedOut(Refused):
    """Closed or not admitted to leave room for others: too many of its kind are open."""

    cause = "crowded out"


class NoTimeLeft(Refused):
    """The deadline has passed, or the request cannot be answered before it. No handler started."""

    cause = "no time left"


class IdsFull(Refused):
    """There is no room to remember another request id chosen by a caller."""

    cause = "ids full"


class KeysFull(Refused):
    """There is no room to remember another idempotency key."""

    cause = "keys full"


class JournalFull(Refused):
    """The journal, or its disk, has no room for another job."""

    cause = "journal full"


class Unavailable(CallFailed):
    """The process asked is stopping, or the connection or all workers were lost."""

    code = Code.UNAVAILABLE


class Draining(Unavailable):
    executed = Executed.NO
    cause = "draining"


class MadeRoom(Unavailable):
    """An idle stream was closed to make room for another client's."""

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
    """The host name does not resolve on this machine."""


class HandlerFailed(CallFailed):
    """The handler raised an exception; its process's log has details under the error id given."""

    code = Code.INTERNAL
    executed = Executed.YES
    cause = "handler failed"


class DeadlinePassed(CallFailed, concurrent.futures.TimeoutError):
    """No answer in time; work may have begun. A TimeoutError, as callers of an Executor expect."""

    code = Code.DEADLINE_EXCEEDED
    cause = "deadline passed"


class CallCancelled(CallFailed, RuntimeError):
    """The caller left, or closed its client before the call or before its answer arrived. A
    RuntimeError, as an Executor raises after its shutdown."""

    code = Code.CANCELLED
    cause = "cancelled"


class JobQuarantined(CallFailed):
    """The job may have run, and is not started again unless it is released."""

    code = Code.ABORTED


class JobExpired(CallFailed):
    """The job was not started in time."""

    code = Code.ABORTED
    executed = Executed.NO


class ResumeError(OverlayError):
    """The file from which a map should go on cannot be used, or is that of another map."""

    code = Code.FAILED_PRECONDITION
    executed = Executed.UNKNOWN
    cause = "cannot resume"


def of_status(code: Code, executed: Executed) -> type[CallFailed]:
    """The class that the library raises for a status."""
    kind = _KINDS.get(code, CallFailed)
    if kind is Refused and executed is not Executed.NO:
        return CallFailed  # for example an answer too large for a process on the return path
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

# Distinguished only inside the processes.


class ConfigError(OverlayError):
    """The configuration, or another precondition of a start, is wrong. problems: all of them."""

    code = Code.FAILED_PRECONDITION
    cause = "configuration"

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class BadRequest(OverlayError):
    """The request is invalid; handlers raise it too.

    Unlike InvalidCall it is not a ValueError: a handler's own `except ValueError`, or pydantic,
    would catch it.
    """

    code = Code.INVALID_ARGUMENT
    cause = "bad request"


class NotAllowed(OverlayError):
    """This caller may not make this request."""

    code = Code.PERMISSION_DENIED
    cause = "not allowed"


class ProxyError(OverlayError):
    """A process that was asked on the caller's behalf did not answer; has that call's status."""

    def __init__(self, message: str, code: Code) -> None:
        super().__init__(message, code=code)


class BadResponse(OverlayError):
    """Another process's answer does not match its request, or exceeds a limit."""

    code = Code.DATA_LOSS
    executed = Executed.UNKNOWN
    cause = "bad response"


class ConfigurationMismatch(OverlayError):
    """The calling process names something that this process's configuration does not have."""

    code = Code.FAILED_PRECONDITION
    cause = "another configuration"


class NotLent(OverlayError):
    """A stream that claims a lease of this worker has none, or sends more than it allows."""

    code = Code.FAILED_PRECONDITION
    cause = "not lent"


class NoJournal(OverlayError):
    """The process asked keeps no jobs, or cannot use its journal now."""

    code = Code.FAILED_PRECONDITION
    cause = "no journal"


class LoopDetected(OverlayError):
    code = Code.FAILED_PRECONDITION
    cause = "loop"


class AlreadyExecuted(OverlayError):
    """A request with this id has run here before; its outcome is not known to this call."""

    code = Code.ALREADY_EXISTS
    executed = Executed.UNKNOWN
    cause = "already executed"


class KeyBusy(OverlayError):
    """Too many requests wait for this key's answer; the first one may have run."""

    code = Code.RESOURCE_EXHAUSTED
    executed = Executed.UNKNOWN
    cause = "key busy"


class AnswerNotKept(OverlayError):
    """The request with this key ran, but its answer was too large to keep."""

    code = Code.ALREADY_EXISTS
    executed = Executed.YES
    cause = "answer not kept"


class PartsFailed(OverlayError):
    """No worker answered OK; has the status of the first part."""

    def __init__(
        self, message: str, code: Code, executed: Executed, cause: str, retry_after_s: float | None
    ) -> None:
        super().__init__(message, code=code, executed=executed, retry_after_s=retry_after_s)
        self.cause = cause
