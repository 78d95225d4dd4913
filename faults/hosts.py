"""Two hosts on this one machine: network namespaces with a wire between them.

    host 1, 192.168.1.1  wire ======== wire  host 2, 192.168.1.2

`Hosts` makes and removes them; `Wire` is what can be done to them, also by a program inside one.
Linux only, as root.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ADDRESSES = {1: "192.168.1.1", 2: "192.168.1.2"}

# Waits until the process that made the hosts is gone or lets go, then removes them with all that
# runs in them. Deleting a namespace alone would leave its processes behind.
JANITOR = """
cat >/dev/null
for host do
    for pid in $(ip netns pids "$host" 2>/dev/null); do kill -KILL "$pid"; done
    ip netns del "$host" 2>/dev/null
done
"""

_numbers = itertools.count(1)


class CannotBuild(Exception):
    """Two hosts cannot be made here; says why."""


def why_not() -> str:
    """Why there can be no hosts here; empty when nothing is known that speaks against it."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are a thing of Linux"
    if os.geteuid() != 0:
        return "two hosts need root, for network namespaces"
    return "" if shutil.which("ip") else "two hosts need the program 'ip'"


class Wire:
    """Two hosts that are there, and the wire between them. names: those of the namespaces."""

    def __init__(self, names: Mapping[int, str]) -> None:
        self.names = dict(names)

    def popen(self, host: int, *command: str, **options: Any) -> subprocess.Popen[str]:
        """Starts a program in the host. The pid is the program's own: `ip` becomes it."""
        options = {"text": True, "encoding": "utf-8", **options}
        return subprocess.Popen(self.inside(host, *command), **options)

    def inside(self, host: int, *command: str) -> list[str]:
        """The command that runs this one in the host."""
        return ["ip", "netns", "exec", self.names[host], *command]

    def run(self, host: int, *command: str, within_s: float = 30) -> subprocess.CompletedProcess:
        """Runs a program in the host to its end; gives its exit code and all it printed."""
        pipes = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
        }
        with self.popen(host, *command, cwd=ROOT, **pipes) as program:
            try:
                printed, _ = program.communicate(timeout=within_s)
            finally:
                program.kill()
        return subprocess.CompletedProcess(command, program.returncode, printed)

    def cut(self) -> None:
        """Pulls the wire out of host 2."""
        ip("-n", self.names[2], "link", "set", "wire", "down")

    def heal(self) -> None:
        ip("-n", self.names[2], "link", "set", "wire", "up")

    def deafen(self, host: int) -> None:
        """The host hears nothing from the other any more, and is still heard by it."""
        self._deafness(host, "-A", "add")

    def undeafen(self, host: int) -> None:
        self._deafness(host, "-D", "del")

    def _deafness(self, host: int, rule: str, route: str) -> None:
        if shutil.which("iptables"):
            done = self.run(host, "iptables", rule, "INPUT", "-i", "wire", "-j", "DROP")
            if done.returncode:
                raise CannotBuild(f"iptables in a namespace: {done.stdout.strip()}")
        else:  # nearly the same: the other host notices at once that it cannot send
            ip("-n", self.names[3 - host], "route", route, "blackhole", f"{ADDRESSES[host]}/32")


class Hosts(Wire):
    """Makes both. They go on `close`, or when this process ends. Raises CannotBuild."""

    def __init__(self) -> None:
        if why := why_not():
            raise CannotBuild(why)
        number = next(_numbers)
        super().__init__({host: f"overlay-{os.getpid()}-{number}-{host}" for host in ADDRESSES})
        self._janitor = subprocess.Popen(
            ["sh", "-c", JANITOR, "janitor", *self.names.values()],
            stdin=subprocess.PIPE,
            start_new_session=True,  # what ends this process must not end it too
        )
        try:
            for name in self.names.values():
                ip("netns", "add", name)
                ip("-n", name, "link", "set", "lo", "up")
            self._join()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._janitor.stdin and not self._janitor.stdin.closed:
            self._janitor.stdin.close()
        self._janitor.wait(10)

    def _join(self) -> None:
        end1, end2 = self.names.values()
        ip(*f"link add wire netns {end1} type veth peer name wire netns {end2}".split())
        for host, name in self.names.items():
            ip("-n", name, "addr", "add", f"{ADDRESSES[host]}/24", "dev", "wire")
            ip("-n", name, "link", "set", "wire", "up")


def ip(*words: str) -> str:
    """Runs `ip`, gives what it prints. Raises CannotBuild with its complaint."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotBuild(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout
