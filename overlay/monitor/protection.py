"""Whether an overlay is open or closed, in one line, and what is wrong with its certificates.

Sans-IO: made from what processes say of themselves in GetMetrics.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from overlay.model.clocks import utc_day
from overlay.model.program import CLIENT
from overlay.transport.codec import pb2

OPEN, LOCAL, TLS = "open", "local", "tls"
SECURE = f"{CLIENT} secure CONFIG"


@dataclass(frozen=True)
class Protection:
    """Of one process, or of several.

    mode: open if one of them is; else tls if one of them is, else local; empty if none says it.
    text: the same for people, empty where only this machine reaches them. problems: a sentence
    each, about certificates that expire within a month or cannot be used.
    """

    mode: str = ""
    text: str = ""
    problems: tuple[str, ...] = ()

    @property
    def lines(self) -> list[str]:
        warnings = [f"warning: {problem}" for problem in self.problems]
        return [self.text, *warnings] if self.text else warnings


def protection(
    answers: Iterable[pb2.MetricsResponse], secure: str = SECURE, own_problem: str = ""
) -> Protection:
    """secure: the command that closes the overlay, as it is to be typed. own_problem: what is wrong
    with the certificate of the person who asks."""
    said = {one.process_id: one.security for one in answers if one.security.mode}
    problems = (*filter(None, [own_problem]), *_named(said))
    if opened := [id_ for id_, one in said.items() if one.mode == OPEN]:
        which = "" if len(opened) == len(said) else f" ({', '.join(opened)})"
        text = f"OPEN{which}: anyone who can reach it can run its handlers; {secure} closes it"
        return Protection(OPEN, text, problems)
    if ends := [one.expires_s for one in said.values() if one.mode == TLS]:
        text = f"closed: mutual TLS, certificates until {utc_day(min(ends))}"
        return Protection(TLS, text, problems)
    return Protection(LOCAL if said else "", "", problems)


def _named(said: dict[str, pb2.Security]) -> Iterable[str]:
    """Each problem once, with the ids of those that have it."""
    having: dict[str, list[str]] = {}
    for process_id, one in said.items():
        if one.problem:
            having.setdefault(one.problem, []).append(process_id)
    return (f"{', '.join(ids)}: {problem}" for problem, ids in having.items())
