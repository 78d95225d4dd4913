"""Joining an overlay by the line of an invitation, from the joiner's side.

The process that the line names is known by the hash of its certificate before anything is sent to
it, and it knows the joiner by the key that both derive from the line.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import PurePath
from typing import cast

import grpc

from overlay.client.results import error_from_rpc
from overlay.model import clocks
from overlay.model.addresses import join_address
from overlay.model.errors import InvalidCall, NotReached, OverlayError
from overlay.model.identity import CALLER, OPERATOR, Identity, check_name
from overlay.model.limits import Limits
from overlay.model.program import CLIENT
from overlay.security.certificates import (
    Trust,
    fingerprint,
    identity_of,
    key_pem,
    new_key,
    read_certificate,
    signing_request,
)
from overlay.security.credentials import Shown
from overlay.security.invitation import Invitation
from overlay.security.tls_folder import TlsFolder, joining
from overlay.transport.channels import split
from overlay.transport.codec import pb2, pb2_grpc
from overlay.transport.endpoints import channel_options, open_channel
from overlay.transport.resolver import look_up
from overlay.transport.tls_check import peer_certificate

MAX_PROCESSES = 1000  # of one machine


@dataclass(frozen=True)
class Offer:
    """What an invitation is for, as its host says, checked for its form.

    configuration: a file name and its content. servers: the names of those that keep jobs.
    """

    name: str
    kind: str
    processes: tuple[str, ...]
    configuration_name: str
    configuration: bytes
    servers: tuple[str, ...] = ()


class Joining:
    """One invitation and the process that made it. Raises OverlayError, with what would do."""

    def __init__(self, line: str, within_s: float = 10.0) -> None:
        """Finds the process and makes sure that it is the one that the line is about.

        Until `close`, cluster is the name of its overlay.
        """
        try:
            self.invitation = Invitation.parse(line)
        except ValueError as e:
            raise InvalidCall(str(e)) from None
        self._within_s = within_s
        host, port = self.invitation.host, self.invitation.port
        found = look_up(host)
        self.shown = found.shown(join_address(host, port))
        if not found.addresses:
            raise NotReached(found.why)
        pem = self._certificate(found.addresses)
        identity = self._server_of(pem)
        self._server_name, self.cluster = identity.dns_name, identity.cluster
        key, certificate = self.invitation.credentials()
        self._shown = Shown(key, certificate, pem)
        self._channel = open_channel(found.addresses, port, channel_options(), self)

    def current(self) -> tuple[Shown, object]:
        return self._shown, None

    def server_name(self, process_id: str = "") -> str:
        return self._server_name

    def look(self) -> Offer:
        """What the invitation is for; it stays open."""
        return _checked(self._ask(pb2.JoinRequest()))

    def join(self, offer: Offer, folder: TlsFolder) -> None:
        """Ends the invitation and fills the folder of certificates."""
        wanted = self._holders(self.cluster, offer)
        keys = {name: new_key() for name in wanted}
        requests = {name: signing_request(key) for name, key in keys.items()}
        answer = self._ask(pb2.JoinRequest(signing_requests=requests))
        if _checked(answer) != offer or set(answer.certificates) != set(keys):
            raise NotReached(f"{self.shown} answers otherwise than a moment ago; join again")
        try:
            trust = Trust(answer.authorities, answer.revoked)
            holders = self._holders(trust.cluster, offer)
            for name, pem in answer.certificates.items():
                if trust.identify(pem) != holders[name]:
                    raise ValueError("a certificate is not for whom it was asked for")
        except (ValueError, OverlayError) as e:
            raise NotReached(f"what {self.shown} sent cannot be used: {e}") from None
        folder.write("ca.pem", answer.authorities)
        folder.write("revoked.pem", answer.revoked)
        for name, holder in holders.items():
            stem = TlsFolder.stem_of(holder)
            folder.write_holder(stem, key_pem(keys[name]), answer.certificates[name])
        folder.write_about(offer.configuration_name, trust.cluster, answer.leader)

    def close(self) -> None:
        self._channel.close()

    @staticmethod
    def _holders(cluster: str, offer: Offer) -> dict[str, Identity]:
        return joining(cluster, offer.kind, offer.name, offer.processes, offer.servers)

    def _server_of(self, pem: bytes) -> Identity:
        """Judged by its hash first: until then anybody may have written it."""
        if fingerprint(pem) != self.invitation.server:
            raise NotReached(
                f"what serves at {self.shown} is not the process that made this line: its "
                f"certificate is another; ask for a new line"
            )
        try:
            return identity_of(read_certificate(pem))
        except ValueError as e:
            raise NotReached(f"the certificate of {self.shown} cannot be used: {e}") from None

    def _certificate(self, addresses: tuple[str, ...]) -> bytes:
        port = self.invitation.port
        try:
            return peer_certificate(addresses, port, self._within_s)
        except ConnectionRefusedError:
            why = "nothing serves there: start the leader, and join then"
        except ssl.SSLError:
            why = (
                f"it serves without TLS: it was started before '{CLIENT} secure'; restart it, and "
                "join then"
            )
        except TimeoutError:
            why = "nothing comes back: wrong address, machine off, or a firewall"
        except OSError as e:
            why = e.strerror or str(e)
        raise NotReached(f"{self.shown}: {why}")

    def _ask(self, request: pb2.JoinRequest) -> pb2.JoinResponse:
        try:
            stub = pb2_grpc.OverlayAdminStub(self._channel)
            return cast(pb2.JoinResponse, stub.Join(request, timeout=self._within_s))
        except grpc.RpcError as e:
            if e.code() is grpc.StatusCode.UNAVAILABLE:
                raise NotReached(
                    f"{self.shown} does not accept this line: it was used, or is older than 15 "
                    f"minutes, or one of the two clocks is wrong by more than a day (this one: "
                    f"{clocks.strftime('%Y-%m-%d %H:%M', clocks.localtime(clocks.time()))}); ask "
                    f"for another line"
                ) from None
            raise error_from_rpc(e, self.shown, self._within_s) from None


def _checked(said: pb2.JoinResponse) -> Offer:
    """Raises NotReached for what no process of ours says."""
    name = said.configuration_name
    is_right = (
        said.kind in (CALLER, OPERATOR)
        and PurePath(name).name == name
        and name.endswith(".json")
        and not set(name) & set('\\/:*?"<>|')
        and name.isprintable()
        and not name.startswith(".")
        and len(said.configuration) <= Limits.min_message_limit
        and len(said.processes) + len(said.servers) <= MAX_PROCESSES
    )
    try:
        split(said.leader)
        for one in (said.name, *said.processes, *said.servers):
            check_name(one)
    except ValueError:
        is_right = False
    if not is_right:
        raise NotReached("what answers there does not speak as a process of an overlay does")
    processes, servers = tuple(said.processes), tuple(said.servers)
    return Offer(said.name, said.kind, processes, name, said.configuration, servers)
