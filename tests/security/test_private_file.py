"""Who can read a file of keys."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from overlay.security.private_file import keep_private, readers


@pytest.mark.parametrize(
    ("rights", "who"),
    [
        ("D:P(A;;FA;;;S-1-5-21-1-2-3-1001)", ["S-1-5-21-1-2-3-1001"]),
        ("D:AI(A;ID;FA;;;BA)(A;ID;FA;;;SY)(A;ID;0x1200a9;;;BU)", ["BA", "SY", "BU"]),
        ("D:(D;;FA;;;WD)(A;;FA;;;SY)", ["SY"]),
        ("O:BAG:SYD:(A;;FA;;;WD)", ["WD"]),
        ("D:NO_ACCESS_CONTROL", ["WD"]),
        ("", ["WD"]),
        ("D:P", []),
    ],
)
def test_a_list_of_rights_says_who_is_let_in(rights: str, who: list[str]) -> None:
    assert readers(rights) == who


@pytest.mark.skipif(os.name == "nt", reason="Windows has other rights than a mode")
def test_a_file_is_closed_to_others(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.touch(0o644)

    keep_private(file)

    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.skipif(os.name == "nt", reason="Windows has other rights than a mode")
def test_a_file_system_without_rights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "key"
    file.touch(0o644)
    monkeypatch.setattr(os, "chmod", lambda path, mode: None)

    with pytest.raises(OSError, match="it cannot be closed to the other users of this machine"):
        keep_private(file)
