"""What can go wrong, each with the status its caller sees.

Raised where it is known; `service` turns it into a gRPC status in one place.
"""

from __future__ import annotations

from overlay.model.segments import Code, Executed


class OverlayError(Exception):
    """The root. `executed` says whether a handler saw the request; NO makes a retry safe.

    request_id: of the request that it became of, as its log lines have it; 0 where there is none.
    """

    code = Code.UNKNOWN
    executed = Executed.NO
    cause = ""  # the word that metrics count a refusal under

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.request_id = 0


class ConfigError(OverlayError):
    """The configuration, or what a process needs to start, is wrong. `problems`: all of them."""

    code = Code.FAILED_PRECONDITION
    cause = "configuration"

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class BadRequest(OverlayError):
    code = Code.INVALID_ARGUMENT
    cause = "bad request"


class UnknownName(OverlayError):
    """No such team, handler or process."""

    code = Code.NOT_FOUND
    cause = "unknown name"


class NotAllowed(OverlayError):
    """This caller may not ask for it."""

    code = Code.PERMISSION_DENIED
    cause = "not allowed"


class NotTold(OverlayError):
    """Another process was asked in the caller's stead and did not say; with that one's status."""

    def __init__(self, message: str, code: Code) -> None:
        super().__init__(message)
        self.code = code


class Misspoken(OverlayError):
    """What another process said does not fit what it was asked, or is out of all bounds."""

    code = Code.DATA_LOSS
    executed = Executed.UNKNOWN
    cause = "misspoken"


class OtherConfiguration(OverlayError):
    """The process that asks means what the configuration here does not have."""

    code = Code.FAILED_PRECONDITION
    cause = "another configuration"


class TooLarge(OverlayError):
    """Larger than the process takes that would be asked next."""

    code = Code.FAILED_PRECONDITION
    cause = "too large"


class LoopDetected(OverlayError):
    code = Code.FAILED_PRECONDITION
    cause = "loop"


class QueueFull(OverlayError):
    code = Code.RESOURCE_EXHAUSTED
    cause = "queue full"


class CrowdedOut(OverlayError):
    """Ended, or not let in, for others: more of its kind are open than there is room for."""

    code = Code.RESOURCE_EXHAUSTED
    cause = "crowded out"


class NoTimeLeft(OverlayError):
    """The deadline passed before a handler could start."""

    code = Code.RESOURCE_EXHAUSTED
    cause = "no time left"


class Draining(OverlayError):
    code = Code.UNAVAILABLE
    cause = "draining"


class MadeRoom(OverlayError):
    """A stream that had nothing to do, ended for another client's."""

    code = Code.UNAVAILABLE
    cause = "crowded out"


class Unreachable(OverlayError):
    """No worker in scope can be asked now."""

    code = Code.UNAVAILABLE
    cause = "unreachable"


class AlreadyExecuted(OverlayError):
    """This request id was run here before; what came of it is not known to this call."""

    code = Code.ALREADY_EXISTS
    executed = Executed.UNKNOWN
    cause = "already executed"


class IdsFull(OverlayError):
    """There is no room to remember one more request id that its caller chose."""

    code = Code.RESOURCE_EXHAUSTED
    cause = "ids full"


class KeysFull(OverlayError):
    """There is no room to remember one more idempotency key."""

    code = Code.RESOURCE_EXHAUSTED
    cause = "keys full"


class KeyBusy(OverlayError):
    """Too many wait for the answer to a key; the first request of it may have run."""

    code = Code.RESOURCE_EXHAUSTED
    executed = Executed.UNKNOWN
    cause = "key busy"


class AnswerNotKept(OverlayError):
    """The request of this key ran; its answer was too large to be kept for others."""

    code = Code.ALREADY_EXISTS
    executed = Executed.YES
    cause = "answer not kept"


class HandlerFailed(OverlayError):
    code = Code.INTERNAL
    executed = Executed.YES
    cause = "handler failed"


class DeadlinePassed(OverlayError):
    """The deadline passed after work may have begun."""

    code = Code.DEADLINE_EXCEEDED
    executed = Executed.UNKNOWN
    cause = "deadline passed"


class Cancelled(OverlayError):
    code = Code.CANCELLED
    executed = Executed.UNKNOWN
    cause = "cancelled"


class PartsFailed(OverlayError):
    """No worker answered OK; carries the status of the first part that says why."""

    def __init__(
        self, message: str, code: Code, executed: Executed, cause: str, retry_after_s: float | None
    ) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.code = code
        self.executed = executed
        self.cause = cause
