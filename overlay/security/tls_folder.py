"""The folder of one overlay's certificates on one machine, beside the configuration.

    ca.pem            the authority that is trusted here; several while it is being changed
    revoked.pem       the certificates that are not, signed by it
    process_a.pem     key and certificate of process A, as of every process of this machine
    server_pc-1-4222.pem  of the server pc-1:4222 that keeps jobs, if it is on this machine
    user.pem          of the people of this machine, who call
    overlay.json      which configuration it belongs to

    on the machine that can issue certificates:
    ca.key            whoever reads it can issue what he likes: mode 0600
    next.key          of an authority that does not sign yet
    issued/           the certificates in use, one file each
    revoked/          those that were revoked and have not expired
    invitations/      the open ones

Each file is replaced whole or not at all, and each certificate and invitation is a file of its own:
so the verbs and the processes of this machine need no lock between them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from overlay.model import clocks
from overlay.model.errors import ConfigError
from overlay.model.identity import KINDS, PROCESS, SERVER, Identity, check_name
from overlay.security.certificates import (
    HOLDER_S,
    INVITATION_S,
    SKEW_S,
    Authority,
    Trust,
    identity_of,
    key_pem,
    new_key,
    pem_of,
    read_authorities,
    read_certificate,
    read_signing_request,
    seconds_left,
    signing_request,
)
from overlay.security.invitation import Invitation
from overlay.security.private_file import keep_private

USER = "user"
ABOUT_FILE, NEXT_KEY = "overlay.json", "next.key"
RETRIES, RETRY_S = 20, 0.05
_END = b"-----END PRIVATE KEY-----\n"


@dataclass(frozen=True)
class Guest:
    """What an invitation is for.

    processes: the ids that join with it, at these hosts. servers: the names of those that keep
    jobs. kind and name: of the person's own certificate. until: seconds since 1970.
    """

    name: str
    kind: str
    until: float
    authority: str
    processes: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    servers: tuple[str, ...] = ()


class TlsFolder:
    """Raises ConfigError, with the file and what would do, for what cannot be read or written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def exists(self) -> bool:
        return os.path.exists(self.path / "ca.pem")  # Path.exists raises if it may not look

    @property
    def can_issue(self) -> bool:
        return os.path.exists(self.path / "ca.key")

    @staticmethod
    def stem(process_id: str) -> str:
        return f"process_{process_id.lower()}"

    @staticmethod
    def server_stem(name: str) -> str:
        return f"server_{name.lower()}"

    @staticmethod
    def stem_of(identity: Identity) -> str:
        """Of a process, a server, or a person of this machine."""
        if identity.kind == SERVER:
            return TlsFolder.server_stem(identity.name)
        return TlsFolder.stem(identity.name) if identity.kind == PROCESS else USER

    def holder(self, stem: str) -> Path:
        """The file of a key and its certificate."""
        return self.path / f"{stem}.pem"

    def trust(self) -> Trust:
        try:
            return Trust(self.read("ca.pem"), self.revoked())
        except ValueError as e:
            raise ConfigError(f"{self.path}: {e}; join this overlay again") from None

    def revoked(self) -> bytes:
        """The list of those that are revoked; empty where there is none."""
        return self.read("revoked.pem") if os.path.exists(self.path / "revoked.pem") else b""

    def read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as e:
            raise ConfigError(f"{self.path / name} cannot be read: {e.strerror or e}") from None

    def key_and_certificate(self, stem: str) -> tuple[bytes, bytes]:
        """Both as PEM."""
        key, end, certificate = self.read(f"{stem}.pem").partition(_END)
        if not end:
            raise ConfigError(f"{self.holder(stem)} has no key; join this overlay again")
        return key + end, certificate

    def certificate(self, stem: str) -> x509.Certificate:
        try:
            return read_certificate(self.key_and_certificate(stem)[1])
        except ValueError as e:
            raise ConfigError(f"{self.holder(stem)}: {e}; join this overlay again") from None

    def write(self, name: str, data: bytes, is_secret: bool = False) -> None:
        path = self.path / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Made with mode 0600, and closed to others before there is a secret in it.
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
            try:
                with os.fdopen(handle, "wb") as file:
                    if is_secret:
                        keep_private(Path(temporary))
                    else:
                        os.chmod(temporary, 0o644)
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                _replace(temporary, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
        except OSError as e:
            raise ConfigError(f"{path} cannot be written: {e.strerror or e}") from None

    def check_room(self) -> None:
        """Raises ConfigError if a key and its certificate could not be written now."""
        self.write(".room", bytes(8192))
        (self.path / ".room").unlink(missing_ok=True)

    def write_holder(self, stem: str, key: bytes, certificate: bytes) -> None:
        """In one file, so that there is no moment at which the two do not belong together."""
        self.write(f"{stem}.pem", key + certificate, is_secret=True)

    # The overlay

    def about(self) -> dict[str, str]:
        """What overlay.json says: configuration (a file name), cluster, leader (host:port)."""
        try:
            found = json.loads((self.path / ABOUT_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        is_ours = isinstance(found, dict) and all(isinstance(v, str) for v in found.values())
        return found if is_ours else {}

    def write_about(self, configuration: str, cluster: str, leader: str) -> None:
        about = {"configuration": configuration, "cluster": cluster, "leader": leader}
        self.write(ABOUT_FILE, json.dumps(about, indent=2).encode() + b"\n")

    # Issuing, on the machine that has the authority's key

    def create_authority(self, cluster: str) -> Authority:
        made = Authority.create(cluster)
        self.write("ca.key", key_pem(made.key), is_secret=True)
        self.write("revoked.pem", pem_of(made.revoke((), 1)))
        self.write("ca.pem", pem_of(made.certificate))  # last: with it the authority is there
        return made

    def change_authority(self) -> str:
        """The next of three steps to another authority. Returns what it did.

        In between, all processes have to fetch what the step made, which takes them a second.
        Raises ConfigError for one that would shut anybody out.
        """
        known = read_authorities(self.read("ca.pem"))
        if os.path.exists(self.path / NEXT_KEY):
            return self._sign_with_next(known)
        if len(known) > 1:
            return self._drop_others()
        made = Authority.create(self.authority().cluster)
        self.write(NEXT_KEY, key_pem(made.key), is_secret=True)
        self.write("ca.pem", self.read("ca.pem") + pem_of(made.certificate))
        return "step 1 of 3: a new authority is known from now on, and signs nothing yet"

    def _sign_with_next(self, known: list[x509.Certificate]) -> str:
        key = self.read(NEXT_KEY)
        made = Authority.read(self.read("ca.pem"), key).certificate
        # Each of these leaves a folder that works, and another try goes on from there.
        self.write("ca.pem", b"".join(map(pem_of, [made, *(one for one in known if one != made)])))
        self.write("ca.key", key, is_secret=True)
        self._list_revoked(is_new=True)
        (self.path / NEXT_KEY).unlink(missing_ok=True)
        return "step 2 of 3: the new authority signs from now on; the old one still counts"

    def _drop_others(self) -> str:
        signs = self.authority().certificate
        trust, issued = Trust(pem_of(signs)), [one for _, one in self.issued()]
        renewed = {identity_of(one) for one in issued if trust.is_of_first(one)}
        if old := sorted(map(str, {identity_of(one) for one in issued} - renewed)):
            raise ConfigError(
                f"the old authority is still needed by {', '.join(old)}: a process that runs has a "
                f"new certificate within a minute, a person joins again with a new line, and who "
                f"is gone is revoked"
            )
        self.write("ca.pem", pem_of(signs))
        return "step 3 of 3: the old authority counts no more"

    def authority(self) -> Authority:
        try:
            return Authority.read(self.read("ca.pem"), self.read("ca.key"))
        except ValueError as e:
            raise ConfigError(f"{self.path}: {e}; ca.pem and ca.key belong together") from None

    def issue(
        self,
        request: bytes,
        identity: Identity,
        hosts: Iterable[str] = (),
        valid_s: float = HOLDER_S,
    ) -> bytes:
        """The PEM of a certificate for the key of this signing request. Raises ValueError."""
        made = self.authority().issue(read_signing_request(request), identity, hosts, valid_s)
        self._drop_expired()
        self.write(f"issued/{_file_name(made)}", pem_of(made))
        return pem_of(made)

    def withdraw(self, pem: bytes) -> None:
        """Forgets a certificate that was issued, and that nobody has got."""
        (self.path / "issued" / _file_name(read_certificate(pem))).unlink(missing_ok=True)

    def count_issued(self, identity: Identity) -> int:
        """How many certificates of this holder are in use."""
        begin = f"{identity.kind}_{identity.name}"
        names = (path.stem for path in (self.path / "issued").glob("*.pem"))
        return sum(name.rpartition("_")[0] == begin for name in names)

    def issue_here(
        self, stem: str, identity: Identity, hosts: Iterable[str] = (), valid_s: float = HOLDER_S
    ) -> None:
        """A key and certificate for a process, or the user, of this machine."""
        key = new_key()
        made = self.issue(signing_request(key), identity, hosts, valid_s)
        self.write_holder(stem, key_pem(key), made)

    def issued(self) -> Iterator[tuple[Path, x509.Certificate]]:
        """The certificates in use."""
        yield from self._certificates("issued")

    def revoke(self, name: str) -> list[Identity]:
        """Revokes all certificates of this name, and what was invited under it. Returns whose.

        Of a revocation that failed halfway, as on a full disk, the next one does the rest.
        """
        gone: list[Identity] = []
        while True:  # until the list has them all: another revoke, or a renewal, may run
            self._put_aside(name)
            listed = self._list_revoked()
            if not listed:
                return gone
            gone += [one for one in map(identity_of, listed) if one.name == name]

    def _put_aside(self, name: str) -> None:
        for path, certificate in self.issued():
            if identity_of(certificate).name == name:
                self.write(f"revoked/{path.name}", pem_of(certificate))
                path.unlink(missing_ok=True)
        for path, guest in self._guests():
            if guest.name == name:
                path.unlink(missing_ok=True)

    def _list_revoked(self, is_new: bool = False) -> list[x509.Certificate]:
        """Writes the list anew if any are missing in it, or in any case. Returns those."""
        trust = self.trust()
        found = [certificate for _, certificate in self._certificates("revoked")]
        missing = [one for one in found if not trust.has_revoked(one)]
        if missing or is_new:
            number = max(trust.number + 1, int(clocks.time()))
            self.write("revoked.pem", pem_of(self.authority().revoke(found, number)))
        return missing

    # Invitations

    def invite(self, invitation: Invitation, guest: Guest) -> None:
        self._drop_expired()
        text = json.dumps(dataclasses.asdict(guest))
        self.write(f"invitations/{invitation.id}.json", text.encode(), is_secret=True)

    def guests(self) -> dict[str, Guest]:
        """The open invitations by their id."""
        return {path.stem: guest for path, guest in self._guests()}

    def guest(self, invitation_id: str) -> Guest | None:
        """What an open invitation is for; it stays open."""
        return self.guests().get(invitation_id)

    def accept(self, invitation_id: str) -> Guest | None:
        """The same, once: of two that come at a time, one gets None."""
        guest = self.guest(invitation_id)
        try:
            (self.path / "invitations" / f"{invitation_id}.json").unlink()
        except OSError:
            return None
        return guest

    def _guests(self) -> Iterator[tuple[Path, Guest]]:
        for path in sorted((self.path / "invitations").glob("*.json")):
            with contextlib.suppress(OSError, ValueError, TypeError, LookupError, AttributeError):
                guest = _guest_of(path.read_text(encoding="utf-8"))
                if clocks.time() < guest.until <= clocks.time() + 2 * INVITATION_S:
                    yield path, guest

    def _certificates(self, folder: str) -> Iterator[tuple[Path, x509.Certificate]]:
        for path in sorted((self.path / folder).glob("*.pem")):
            with contextlib.suppress(OSError, ValueError):
                certificate = read_certificate(path.read_bytes())
                identity_of(certificate)
                yield path, certificate

    def _drop_expired(self) -> None:
        for folder in ("issued", "revoked"):
            for path, certificate in self._certificates(folder):
                if seconds_left(certificate) < -SKEW_S:  # by every clock of this overlay
                    path.unlink(missing_ok=True)
        known = {path for path, _ in self._guests()}
        for path in (self.path / "invitations").glob("*.json"):
            if path not in known:
                path.unlink(missing_ok=True)


def joining(
    cluster: str, kind: str, name: str, processes: Iterable[str], servers: Iterable[str]
) -> dict[str, Identity]:
    """Who gets a certificate with one invitation, by the keys of the signing requests."""
    made = {"": Identity(cluster, kind, name)}
    made |= {id_: Identity(cluster, PROCESS, id_) for id_ in processes}
    return made | {str(one): one for one in (Identity(cluster, SERVER, n) for n in servers)}


def _file_name(certificate: x509.Certificate) -> str:
    identity = identity_of(certificate)
    return f"{identity.kind}_{identity.name}_{certificate.serial_number:x}.pem"


def _guest_of(text: str) -> Guest:
    """Raises ValueError, TypeError, LookupError or AttributeError for anything else."""
    found = json.loads(text)
    lists = {key: tuple(found[key]) for key in ("processes", "hosts", "servers")}
    guest = Guest(**{**found, **lists})
    read_certificate(guest.authority.encode())
    for name in (guest.name, *guest.processes, *guest.servers):
        check_name(name)
    if guest.kind not in KINDS:
        raise ValueError(f"{guest.kind!r} is no kind")
    return guest


def cluster_name(configuration: str, chance: str) -> str:
    """A name for an overlay: that of its file, and something by chance."""
    word = re.sub(r"[^a-z0-9-]+", "-", Path(configuration).stem.lower()).strip("-")[:40]
    return f"{word or 'overlay'}-{chance}"


def _replace(temporary: str, path: Path) -> None:
    """On Windows a file cannot be replaced in the moment in which another process reads it."""
    for _ in range(RETRIES if os.name == "nt" else 0):
        try:
            return os.replace(temporary, path)
        except PermissionError:
            clocks.sleep(RETRY_S)
    return os.replace(temporary, path)
