"""What a certificate says of its holder: overlay://CLUSTER/KIND/NAME."""

from __future__ import annotations

import re
from dataclasses import dataclass

PROCESS, CALLER, OPERATOR, INVITATION = "process", "caller", "operator", "invitation"
SERVER = "server"  # that keeps jobs for several leaders
KINDS = (PROCESS, CALLER, OPERATOR, INVITATION, SERVER)
NAME = "[A-Za-z0-9._-]{1,64}"  # of processes, callers, handlers, teams and overlays
_URI = re.compile(f"overlay://({NAME})/([a-z]{{1,16}})/({NAME})")


@dataclass(frozen=True)
class Identity:
    """kind: one of KINDS. cluster: the name of the overlay's certificate authority."""

    cluster: str
    kind: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"

    @property
    def uri(self) -> str:
        return f"overlay://{self.cluster}/{self.kind}/{self.name}"

    @property
    def dns_name(self) -> str:
        """What another process's certificate is checked for: this very process."""
        label = self.name.lower().replace(".", "~")  # "a..b" would have an empty label
        return f"{label}.{any_process(self.cluster)}"

    @property
    def dns_names(self) -> tuple[str, ...]:
        """What the certificate of one that is connected to is checked for; none for the others."""
        if self.kind == PROCESS:
            return self.dns_name, any_process(self.cluster)
        return (any_server(self.cluster),) if self.kind == SERVER else ()

    @staticmethod
    def of_uri(uri: str) -> Identity:
        """Raises ValueError."""
        found = _URI.fullmatch(uri)
        if found is None or found[2] not in KINDS:
            raise ValueError(f"{uri[:200]!r} is no identity of an overlay")
        return Identity(*found.groups())


def any_process(cluster: str) -> str:
    """The name that the certificates of all the processes of an overlay have in common."""
    return f"{cluster.lower()}.overlay"


def any_server(cluster: str) -> str:
    """The name that the certificates of the servers of its jobs have in common; no process's."""
    return f"{cluster.lower()}.overlay-jobs"


def check_name(text: str) -> str:
    """The same. Raises ValueError for what cannot be a name."""
    if not re.fullmatch(NAME, text):
        raise ValueError(f"{text[:200]!r} is not a name")
    return text
