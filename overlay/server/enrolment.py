"""How certificates come to this process and go out from it: joining, renewing, revoking.

    Join, Renew     answered where the authority's key is: on the machine of `client.py secure`
    keeper          a thread, "certificates": renews the own certificate a month after it was made,
                    and fetches what was revoked, within `LOOK_S` of its being so. Others in one
                    process of a machine renew those of its user and of its jobs' servers

A process on another machine asks the leader, which it can reach: its machine joined there.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

import grpc

from overlay.jobs.jetstream import reload
from overlay.jobs.log import LogAway
from overlay.model import clocks as time
from overlay.model.errors import BadRequest, ConfigError, NotAllowed, OverlayError
from overlay.model.identity import PROCESS, SERVER, Identity
from overlay.model.jobs_servers import JobsServer
from overlay.model.program import CLIENT
from overlay.model.topology import Process, Topology
from overlay.transport.channels import Channel
from overlay.transport.codec import pb2, pb2_grpc

if TYPE_CHECKING:
    from overlay.security.credentials import Credentials

log = logging.getLogger(__name__)

LOOK_S = 0.5  # a revoked certificate counts no more within twice this
ASK_S = 2.0  # the leader is waited for so long
RENEW_AGE_S = 30 * 86_400.0  # how old a certificate gets
RETRY_S = 60.0  # after a renewal that failed
MAX_OF_ONE = 100  # certificates of one holder in use: one a month, and what goes wrong


class Enrolment:
    """Answers Join and Renew."""

    def __init__(self, topology: Topology, me: Process, credentials: Credentials | None) -> None:
        self._topology = topology
        self._me = me
        self._credentials = credentials

    def join(self, request: pb2.JoinRequest, invitation: str, pem: bytes) -> pb2.JoinResponse:
        """invitation: the id that the caller's certificate says, in `pem`. Raises OverlayError."""
        from overlay.security.certificates import is_signed_by
        from overlay.security.tls_folder import joining

        credentials = self._issuing("joins")
        folder = credentials.folder
        guest = folder.guest(invitation)
        if guest is None or not is_signed_by(pem, guest.authority.encode()):
            raise NotAllowed(
                "this invitation was used, was revoked or is older than 15 minutes; ask for "
                "another line"
            )
        holders = joining(
            credentials.trust.cluster, guest.kind, guest.name, guest.processes, guest.servers
        )
        if request.signing_requests and set(request.signing_requests) != set(holders):
            raise BadRequest(f"signing_requests: needed are those of {sorted(holders)}")
        for text in request.signing_requests.values():
            self._check_request(text)  # before the invitation is used up
        made = pb2.JoinResponse(
            name=guest.name,
            kind=guest.kind,
            processes=guest.processes,
            servers=guest.servers,
            configuration_name=self._topology.name,
            configuration=self._configuration(),
            cluster=credentials.trust.cluster,
            leader=self._topology.leader.address,
            authorities=folder.read("ca.pem"),
            revoked=folder.read("revoked.pem"),
        )
        if request.signing_requests:
            if folder.accept(invitation) is None:
                raise NotAllowed("this invitation was used just now; ask for another line")
            for key, text in request.signing_requests.items():
                made.certificates[key] = folder.issue(text, holders[key], guest.hosts)
            others = ", ".join(str(one) for key, one in holders.items() if key) or "nobody else"
            log.info("joined: %s, and %s", holders[""], others)
        return made

    def renew(self, request: pb2.RenewRequest, pem: bytes) -> pb2.RenewResponse:
        """pem: the caller's certificate. Raises OverlayError."""
        credentials = self._issuing("renews")
        if not pem:
            raise NotAllowed("only the holder of a certificate can renew it")
        identity = self._holder(pem)
        made = pb2.RenewResponse(authorities=credentials.folder.read("ca.pem"))
        if request.revoked_number < credentials.trust.number:
            made.revoked = credentials.folder.read("revoked.pem")
        if request.signing_request:
            made.certificate = self._renewed(request.signing_request, identity, pem)
            log.info("renewed: the certificate of %s", identity)
        return made

    def _renewed(self, text: bytes, identity: Identity, pem: bytes) -> bytes:
        assert self._credentials is not None
        folder = self._credentials.folder
        if (count := folder.count_issued(identity)) >= MAX_OF_ONE:
            raise NotAllowed(
                f"{identity} has {count} certificates in use, as many as one may have; "
                f"'revoke' ends them, and 'invite' makes a line for a new one"
            )
        self._check_request(text)
        made = folder.issue(text, identity, self._hosts(identity))
        try:
            self._holder(pem)  # or who is revoked just now would have one that is not
        except OverlayError:
            folder.withdraw(made)
            raise
        return made

    def _holder(self, pem: bytes) -> Identity:
        """Whose certificate it is, by the files as they are now. Raises NotTrusted."""
        assert self._credentials is not None
        self._credentials.current()
        return self._credentials.trust.identify(pem)

    def renew_own(self) -> None:
        """Where the authority's key is on this machine."""
        assert self._credentials is not None
        identity = self._credentials.identity
        self._credentials.folder.issue_here(self._credentials.stem, identity, self._hosts(identity))

    def _issuing(self, what: str) -> Credentials:
        if self._credentials is None:
            raise NotAllowed(
                f"{self._me.id} has no TLS; on the leader's machine '{CLIENT} secure "
                f"{self._topology.name}' sets it up"
            )
        if not self._credentials.folder.can_issue:
            leader = self._topology.leader
            raise NotAllowed(
                f"{self._me.id} {what} nobody: the authority's key is not on its machine; "
                f"ask {leader.id} at {leader.address}"
            )
        return self._credentials

    def _check_request(self, text: bytes) -> None:
        from overlay.security.certificates import read_signing_request

        try:
            read_signing_request(text)
        except ValueError as e:
            raise BadRequest(f"the signing request cannot be used: {e}") from None

    def _configuration(self) -> bytes:
        try:
            return (self._topology.folder / self._topology.name).read_bytes()
        except OSError as e:
            name = self._topology.name
            raise ConfigError(f"{name} cannot be read there: {e.strerror or e}") from None

    def _hosts(self, identity: Identity) -> tuple[str, ...]:
        process = self._topology.processes.get(identity.name)
        if identity.kind == PROCESS and process is not None:
            return process.certified_hosts
        servers = self._topology.jobs_servers if identity.kind == SERVER else ()
        return tuple(one.host for one in servers if one.name == identity.name)


def keepers(topology: Topology, me: Process, credentials: Credentials) -> list[CertificateKeeper]:
    """Of this process's certificate, and in one process of each machine also of those of its user
    and its jobs' servers."""
    from overlay.security.credentials import Credentials
    from overlay.security.tls_folder import USER, TlsFolder

    made = [CertificateKeeper(topology, me, credentials)]
    folder = credentials.folder
    if credentials.stem != min(
        stem for stem in map(TlsFolder.stem, topology.processes) if folder.holder(stem).exists()
    ):
        return made
    servers = {TlsFolder.server_stem(server.name): server for server in topology.jobs_servers}
    for stem in filter(lambda stem: folder.holder(stem).exists(), (USER, *servers)):
        try:
            held = Credentials(folder, stem)
        except OverlayError as e:
            log.warning("a certificate of this machine is not kept: %s", e)
        else:
            made.append(CertificateKeeper(topology, me, held, False, servers.get(stem)))
    return made


class CertificateKeeper:
    """Keeps a certificate of this machine young, and knows what was revoked, while it runs.

    follows: fetches what was revoked, too; one keeper of a process does. server: of the jobs, whose
    certificate it is; it reads its files only when it is told to.
    """

    def __init__(
        self,
        topology: Topology,
        me: Process,
        credentials: Credentials,
        follows: bool = True,
        server: JobsServer | None = None,
    ) -> None:
        self._leader = topology.leader
        self._credentials = credentials
        self._follows = follows
        self._server = server
        self._told: tuple[bytes, ...] = ()  # the certificates that the server has read
        self._next_telling = 0.0
        self._enrolment = Enrolment(topology, me, credentials)
        self._channel: Channel | None = None
        self._next_renewal = 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="certificates", daemon=True)

    def start(self) -> None:
        self._say_what_is_wrong()
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(LOOK_S):
            try:
                self._look()
            except Exception as e:  # noqa: BLE001 - a look fails, the next one may not
                self._set_problem(f"the certificates cannot be kept: {e}")
        if self._channel is not None:
            self._channel.close()

    def _look(self) -> None:
        credentials = self._credentials
        credentials.current()
        self._tell_server()
        is_old = credentials.age_s > RENEW_AGE_S or not credentials.is_of_new_authority
        is_due = is_old and time.monotonic() > self._next_renewal
        if not self._follows and (credentials.certificate_problem or not is_due):
            return  # a certificate that does not count any more cannot ask for another
        if is_due:
            self._next_renewal = time.monotonic() + RETRY_S
            credentials.folder.check_room()  # or the leader would issue what cannot be kept
        if credentials.folder.can_issue:
            if is_due:
                self._enrolment.renew_own()
        elif not self._ask(is_due):
            return
        if is_due or not is_old:
            self._set_problem("")

    def _tell_server(self) -> None:
        """At first too, as the files may have changed while no process ran."""
        shown, _ = self._credentials.current()
        now = shown.certificate, shown.authorities
        if self._server is None or now == self._told or time.monotonic() < self._next_telling:
            return
        try:
            reload(self._server, self._credentials)
        except LogAway as e:
            self._next_telling = time.monotonic() + RETRY_S
            log.warning("the server %s does not take its new files: %s", self._server.address, e)
        else:
            self._told = now

    def _ask(self, is_due: bool) -> bool:
        """Asks the leader. Returns whether that worked."""
        from overlay.security.certificates import key_pem, new_key, signing_request

        credentials, key = self._credentials, new_key() if is_due else None
        if self._channel is None:
            self._channel = Channel(
                self._leader.address, credentials=credentials, process_id=self._leader.id
            )
        asked = pb2.RenewRequest(
            signing_request=signing_request(key) if key else b"",
            revoked_number=credentials.trust.number,
        )
        try:
            stub = pb2_grpc.OverlayAdminStub(self._channel)
            found = stub.Renew(asked, timeout=ASK_S)
        except grpc.RpcError as e:
            if is_due:
                log.warning("the certificate could not be renewed at the leader: %s", e.details())
            return False
        try:
            credentials.accept(
                found.authorities, found.revoked, key_pem(key) if key else b"", found.certificate
            )
        except OverlayError as e:
            self._set_problem(f"what the leader says of certificates cannot be used: {e}")
            return False
        return True

    def _set_problem(self, text: str) -> None:
        """Says it once in the log, and everywhere else until it is over."""
        if text and text != self._credentials.keeping_problem:
            log.warning("%s", text)
        self._credentials.keeping_problem = text

    def _say_what_is_wrong(self) -> None:
        if problem := self._credentials.warning:
            log.warning("%s", problem)
