"""What is said of a leader's journal, by tables."""

from __future__ import annotations

from pathlib import PurePath, PurePosixPath, PureWindowsPath

import pytest

from overlay.model.topology import Process
from overlay.monitor.diagnosis import Grade
from overlay.monitor.journal_check import Place, findings, synchronised_by, volume_of
from overlay.transport.codec import pb2

LEADER = Process("A", "leader", "green", "10.0.0.1", 50051)
HOME = PurePosixPath("/home/ann/overlay")


@pytest.mark.parametrize(
    "place",
    [
        Place(HOME, "nfs4"),
        Place(HOME, "cifs"),
        Place(HOME, "smbfs"),
        Place(HOME, "9p"),
        Place(HOME, "fuse.sshfs"),
        Place(HOME, "fuse.vmhgfs-fuse"),
        Place(PureWindowsPath(r"Z:\overlay"), "NTFS", is_remote=True),
        Place(PureWindowsPath(r"\\server\share\overlay"), ""),
    ],
)
def test_a_journal_on_a_network_file_system_is_a_warning(place: Place) -> None:
    (found,) = findings(LEADER, place, None)

    assert found.grade is Grade.NOTE
    assert f"{place.folder}, on a network file system" in found.why
    assert "on a disk of this machine alone" in found.do


@pytest.mark.parametrize("file_system", ["ext4", "apfs", "NTFS", "overlay", "fuseblk", ""])
def test_a_journal_on_a_disk_of_this_machine_is_fine(file_system: str) -> None:
    assert findings(LEADER, Place(HOME, file_system), None) == []


@pytest.mark.parametrize(
    ("folder", "program"),
    [
        (PureWindowsPath(r"C:\Users\Ann\OneDrive\overlay"), "OneDrive"),
        (PureWindowsPath(r"C:\Users\Ann\OneDrive - Works Ltd\overlay"), "OneDrive"),
        (PureWindowsPath(r"C:\Users\Ann\iCloudDrive\overlay"), "iCloud Drive"),
        (PureWindowsPath(r"G:\My Drive\overlay"), "Google Drive"),
        (PurePosixPath("/Users/ann/Library/Mobile Documents/com~apple~CloudDocs"), "iCloud Drive"),
        (PurePosixPath("/Users/ann/Library/CloudStorage/GoogleDrive-a@b.c/x"), "Google Drive"),
        (PurePosixPath("/home/ann/Dropbox (Personal)/overlay"), "Dropbox"),
        (PurePosixPath("/home/ann/dropboxes"), ""),
        (HOME, ""),
    ],
)
def test_a_synchronised_folder_is_known_by_its_name(folder: PurePath, program: str) -> None:
    assert synchronised_by(Place(folder, "ext4")) == program
    assert len(findings(LEADER, Place(folder, "ext4"), None)) == bool(program)


def test_a_folder_of_syncthing_is_known_by_its_mark() -> None:
    (found,) = findings(LEADER, Place(HOME, "ext4", in_syncthing=True), None)

    assert f"{HOME}, which Syncthing seems to keep in step with other machines" in found.why


@pytest.mark.parametrize(
    ("jobs", "grades", "says"),
    [
        (pb2.JobCounts(), [], ""),
        (pb2.JobCounts(max_jobs=9, waiting=4, failed=2), [], ""),
        (pb2.JobCounts(max_jobs=9, problem="the disk is full"), [Grade.BAD], "the disk is full"),
        (pb2.JobCounts(max_jobs=9, quarantined=1), [Grade.NOTE], "1 job is quarantined"),
        (
            pb2.JobCounts(max_jobs=9, quarantined=1200),
            [Grade.NOTE],
            "client.py 10.0.0.1 50051 quarantine list",
        ),
    ],
)
def test_what_the_leader_says_of_its_jobs(
    jobs: pb2.JobCounts, grades: list[Grade], says: str
) -> None:
    found = findings(LEADER, None, pb2.MetricsResponse(process_id="A", jobs=jobs))

    assert [one.grade for one in found] == grades
    assert says in "".join(f"{one.why} {one.do}" for one in found)


@pytest.mark.parametrize(
    ("folder", "volume"),
    [
        ("/home/ann/overlay", ("ext4", False)),
        ("/mnt/nas/overlay", ("nfs4", False)),
        ("/mnt/nas", ("nfs4", False)),
        ("/mnt/nasty", ("ext4", False)),
        ("/mnt/twice/x", ("cifs", False)),
        ("/mnt/drive", ("NTFS", True)),
    ],
)
def test_a_folder_is_on_the_volume_mounted_last_and_deepest(
    folder: str, volume: tuple[str, bool]
) -> None:
    mounts = [
        ("/", "rootfs", "rw"),
        ("/", "ext4", "rw"),
        ("/mnt/nas", "nfs4", "rw,hard"),
        ("/mnt/twice", "autofs", "rw"),
        ("/mnt/twice", "cifs", "rw"),
        ("/mnt/drive", "NTFS", "rw,remote"),
    ]

    found = volume_of(PurePosixPath(folder), [(PurePosixPath(a), b, c) for a, b, c in mounts])

    assert found == volume


def test_the_volume_of_an_unknown_drive_is_not_known() -> None:
    assert volume_of(PureWindowsPath(r"Z:\overlay"), [(PureWindowsPath("C:\\"), "NTFS", "rw")]) == (
        "",
        False,
    )
