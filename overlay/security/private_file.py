"""Closes a file to everyone but this user, and makes sure that it is closed.

On POSIX by its mode. On Windows by its list of rights: Administrators and the system could take
their own rights anyway, so the list names this user only. Some file systems (a USB stick's FAT,
some network shares) keep neither; they are refused, because a key there would be anybody's.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

NOT_CLOSED = (
    "it cannot be closed to the other users of this machine: its file system keeps no rights (a "
    "USB stick, a network share?); put the folder on the machine's own disk"
)
# As Windows writes them: this file's owner, the system, administrators.
_TRUSTED = {"OW", "SY", "BA", "S-1-5-18", "S-1-5-32-544", "S-1-3-4"}


def keep_private(path: Path) -> None:
    """Call it before there is a secret in the file. Raises OSError where it stays readable."""
    if sys.platform == "win32":
        with _descriptor(f"D:P(A;;FA;;;{_this_user()})") as wanted:
            with contextlib.suppress(OSError):  # what counts is how the file is then
                _write_rights(path, wanted)
            # Windows writes some users, the built-in Administrator among them, as two letters.
            trusted = {*readers(_text_of(wanted)), *_TRUSTED}
        is_closed = set(readers(_read_rights(path))) <= trusted
    else:
        with contextlib.suppress(OSError):
            os.chmod(path, 0o600)
        is_closed = not stat.S_IMODE(path.stat().st_mode) & 0o077
    if not is_closed:
        raise OSError(None, NOT_CLOSED)


def readers(rights: str) -> list[str]:
    """Whom a list of rights, in Windows' text form (SDDL), lets do anything.

    Without a list (no "D:", or "NO_ACCESS_CONTROL") that is everyone, "WD".
    """
    _, found, acl = rights.partition("D:")
    if not found or "NO_ACCESS_CONTROL" in acl:
        return ["WD"]
    return re.findall(r"\(A;[^;)]*;[^;)]*;[^;)]*;[^;)]*;([^;)]*)", acl)


if sys.platform == "win32":
    import ctypes
    from ctypes import wintypes

    _DACL, _PROTECTED_DACL = 0x4, 0x80000000  # SECURITY_INFORMATION
    _TOKEN_QUERY, _TOKEN_USER, _SDDL_1 = 0x8, 1, 1

    def _library(name: str) -> ctypes.WinDLL:
        return ctypes.WinDLL(name, use_last_error=True)

    def _checked(succeeded: int) -> None:
        if not succeeded:
            raise ctypes.WinError(ctypes.get_last_error())

    def _this_user() -> str:
        """The security identifier of the user of this process."""
        kernel, advapi = _library("kernel32"), _library("advapi32")
        kernel.GetCurrentProcess.restype = wintypes.HANDLE
        token, needed = wintypes.HANDLE(), wintypes.DWORD()
        process = wintypes.HANDLE(kernel.GetCurrentProcess())
        _checked(advapi.OpenProcessToken(process, _TOKEN_QUERY, ctypes.byref(token)))
        try:
            buffer = ctypes.create_string_buffer(256)  # a pointer, its attributes, the identifier
            _checked(
                advapi.GetTokenInformation(
                    token, _TOKEN_USER, buffer, len(buffer), ctypes.byref(needed)
                )
            )
        finally:
            kernel.CloseHandle(token)
        sid = ctypes.cast(buffer, ctypes.POINTER(ctypes.c_void_p))[0]
        text = wintypes.LPWSTR()
        _checked(advapi.ConvertSidToStringSidW(ctypes.c_void_p(sid), ctypes.byref(text)))
        return _taken(text)

    @contextlib.contextmanager
    def _descriptor(rights: str) -> Iterator[ctypes.c_void_p]:
        """Windows' form of a list of rights."""
        made = ctypes.c_void_p()
        _checked(
            _library("advapi32").ConvertStringSecurityDescriptorToSecurityDescriptorW(
                wintypes.LPCWSTR(rights), _SDDL_1, ctypes.byref(made), None
            )
        )
        try:
            yield made
        finally:
            _library("kernel32").LocalFree(made)

    def _text_of(descriptor: ctypes.c_void_p | ctypes.Array[ctypes.c_char]) -> str:
        text = wintypes.LPWSTR()
        _checked(
            _library("advapi32").ConvertSecurityDescriptorToStringSecurityDescriptorW(
                descriptor, _SDDL_1, wintypes.DWORD(_DACL), ctypes.byref(text), None
            )
        )
        return _taken(text)

    def _write_rights(path: Path, descriptor: ctypes.c_void_p) -> None:
        what = wintypes.DWORD(_DACL | _PROTECTED_DACL)
        set_rights = _library("advapi32").SetFileSecurityW
        _checked(set_rights(wintypes.LPCWSTR(str(path)), what, descriptor))

    def _read_rights(path: Path) -> str:
        get_rights, needed = _library("advapi32").GetFileSecurityW, wintypes.DWORD()
        name, what = wintypes.LPCWSTR(str(path)), wintypes.DWORD(_DACL)
        get_rights(name, what, None, 0, ctypes.byref(needed))
        buffer = ctypes.create_string_buffer(needed.value)
        _checked(get_rights(name, what, buffer, needed, ctypes.byref(needed)))
        return _text_of(buffer)

    def _taken(text: wintypes.LPWSTR) -> str:
        """The text of a buffer that Windows has made, which is freed."""
        try:
            return text.value or ""
        finally:
            _library("kernel32").LocalFree(text)
