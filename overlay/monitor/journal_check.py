"""Findings about a leader's journal: where it lies, and what the leader says of its jobs.

The journal is an SQLite file that must not change under its leader, and that is safe once the disk
says so. A network file system promises neither, and a program that keeps folders in step with other
machines copies the file while it is written, or puts an older one in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from overlay.model.program import CLIENT
from overlay.model.topology import Process
from overlay.monitor.diagnosis import Finding, Grade
from overlay.transport.codec import pb2

ELSEWHERE = "the jobs are with "  # another leader: all is well
NETWORK = (
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "afpfs", "webdav", "davfs", "9p", "afs", "ceph",
    "glusterfs", "lustre", "sshfs", "rclone", "virtiofs", "vboxsf", "vmhgfs", "prl_fs",
)  # fmt: skip
"""File systems of another machine, or of the host of a virtual one. With FUSE: fuse.sshfs."""
SYNCHRONISED = {
    "onedrive": "OneDrive",
    "dropbox": "Dropbox",
    "google drive": "Google Drive",
    "googledrive": "Google Drive",
    "my drive": "Google Drive",
    "mobile documents": "iCloud Drive",
    "icloud drive": "iCloud Drive",
    "iclouddrive": "iCloud Drive",
}
"""What the name of such a folder is, or begins with: "OneDrive - Company", "GoogleDrive-a@b.c"."""


@dataclass(frozen=True)
class Place:
    """folder: of the journal, without links. file_system: the kind of its volume; empty: not known.
    is_remote: the system says that the volume is another machine's. in_syncthing: it, or a folder
    above it, is one of Syncthing's."""

    folder: PurePath
    file_system: str = ""
    is_remote: bool = False
    in_syncthing: bool = False


def findings(
    leader: Process, place: Place | None, metrics: pb2.MetricsResponse | None
) -> list[Finding]:
    """place: None if the leader is on another machine. metrics: the leader's, if it answers."""
    found = [] if place is None else _of_place(place)
    if metrics is None or not metrics.jobs.max_jobs:
        return found
    if metrics.jobs.elsewhere and not metrics.jobs.elsewhere.startswith(ELSEWHERE):
        do = "see the jobs' servers: a majority of them must run and reach each other"
        why = f"it cannot follow the other leaders: {metrics.jobs.elsewhere}"
        found.append(Finding(Grade.BAD, "no jobs", why, do))
        return found
    if problem := metrics.jobs.problem:
        do = "make room there, or see its log; jobs that it has accepted are kept"
        found.append(Finding(Grade.BAD, "no jobs", f"no jobs are accepted: {problem}", do))
    if number := metrics.jobs.quarantined:
        jobs, them = ("1 job is", "it") if number == 1 else (f"{number:,} jobs are", "them")
        why = f"{jobs} quarantined: an attempt may have run; somebody must release or drop {them}"
        do = f"see which: {CLIENT} {leader.host} {leader.port} quarantine list"
        found.append(Finding(Grade.NOTE, "quarantine", why, do))
    return found


def _of_place(place: Place) -> list[Finding]:
    do = 'put it on a disk of this machine alone: "journal" in the file may name another folder'
    kind = place.file_system.lower().removeprefix("fuse.").removesuffix("-fuse")
    if place.is_remote or kind in NETWORK or str(place.folder).startswith("\\\\"):
        named = f" ({place.file_system})" if place.file_system else ""
        on = f"a network file system{named}"
        why = f"its journal is in {place.folder}, on {on}: that can damage it"
        return [Finding(Grade.NOTE, "journal", why, do)]
    if program := synchronised_by(place):
        why = (
            f"its journal is in {place.folder}, which {program} seems to keep in step with other "
            "machines: that can damage it"
        )
        return [Finding(Grade.NOTE, "journal", why, do)]
    return []


def synchronised_by(place: Place) -> str:
    """The program, as far as the names of the folders tell; else empty."""
    for part in place.folder.parts:
        name = part.lower()
        for begin, program in SYNCHRONISED.items():
            rest = name.removeprefix(begin)
            if rest != name and rest[:1] in ("", " ", "-"):
                return program
    return "Syncthing" if place.in_syncthing else ""


def volume_of(folder: PurePath, mounts: Sequence[tuple[PurePath, str, str]]) -> tuple[str, bool]:
    """The kind of the folder's volume, and whether it is another machine's.

    mounts: (where, kind, options), in the order of the system; a later one hides an earlier one.
    """
    holding = [one for one in mounts if one[0] == folder or one[0] in folder.parents]
    if not holding:
        return "", False
    _, kind, options = max(reversed(holding), key=lambda one: len(one[0].parts))
    return kind, "remote" in options.split(",")
