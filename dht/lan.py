"""Members of the mesh on the same LAN, found by multicast DNS (RFC 6762, by the zeroconf library).

A node announces itself under `_shoal._tcp.local.` with the addresses at which it listens and a digest of its mesh's id,
which tells other members that it is one of theirs and strangers nothing. What comes from the LAN is only a hint of whom
to dial: proof of membership is the host's. Only addresses that cannot lead out of the LAN are believed.
"""

from __future__ import annotations

import hashlib
import ipaddress
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import trio
from zeroconf import IPVersion, ServiceBrowser, ServiceInfo, ServiceStateChange, Zeroconf

from dht.adverts import own_addrs
from p2p import PeerId

log = logging.getLogger("shoal.lan")
SERVICE = "_shoal._tcp.local."
LOOK_UP_S = 3.0
ADDRS_TOLD_MAX = 6
TXT_BYTES_MAX = 255


@dataclass(frozen=True, slots=True)
class Notice:
    """What a node tells its LAN: TXT strings of at most 255 bytes each."""

    peer: PeerId
    addrs: tuple[str, ...]
    mesh_tag: str

    def properties(self) -> dict[str, str]:
        """As TXT strings."""
        bare = [addr.rpartition("/p2p/")[0] for addr in self.addrs]
        kept = [addr for addr in bare if on_lan(addr) and len(addr) < TXT_BYTES_MAX - 8][:ADDRS_TOLD_MAX]
        return {"v": "1", "m": self.mesh_tag, "p": self.peer} | {f"a{at}": one for at, one in enumerate(kept)}

    @classmethod
    def read(cls, properties: Mapping[bytes, bytes | None]) -> Notice | None:
        """None where it is not one of ours, or says nothing that can be used."""
        try:
            told = {name.decode(): (value or b"").decode() for name, value in properties.items()}
        except UnicodeDecodeError:
            return None
        peer, tag = told.get("p", ""), told.get("m", "")
        if told.get("v") != "1" or not peer or not tag:
            return None
        bare = [told[f"a{at}"] for at in range(ADDRS_TOLD_MAX) if f"a{at}" in told]
        addrs = own_addrs(PeerId(peer), (f"{addr}/p2p/{peer}" for addr in bare if on_lan(addr)))
        return cls(PeerId(peer), addrs, tag) if addrs else None


def mesh_tag(mesh_id: str) -> str:
    """What members of a mesh know one another by; nobody else can tell the mesh from it."""
    return hashlib.blake2b(mesh_id.encode(), digest_size=10, person=b"shoal-lan").hexdigest()


def on_lan(addr: str) -> bool:
    """Whether a bare /ip4|ip6/A/tcp/P is of a private network, and not of this machine alone."""
    parts = addr.split("/")
    if len(parts) != 5 or parts[1] not in ("ip4", "ip6") or parts[3] != "tcp" or not parts[4].isdecimal():
        return False
    try:
        ip = ipaddress.ip_address(parts[2])
    except ValueError:
        return False
    return (ip.is_private or ip.is_link_local) and not (
        ip.is_loopback or ip.is_unspecified or ip.is_multicast
    )


class Lan:
    """Announces this node and gives `found` what the LAN says of members.

    `addrs` are asked for now and then, because they change; while there is none to tell, nothing is announced.
    """

    def __init__(
        self,
        me: PeerId,
        mesh_id: str,
        addrs: Callable[[], Iterable[str]],
        found: Callable[[Sequence[str]], None],
        *,
        refresh_s: float = 30.0,
    ) -> None:
        self._me, self._tag = me, mesh_tag(mesh_id)
        self._addrs, self._found, self._refresh_s = addrs, found, refresh_s
        self._token: trio.lowlevel.TrioToken | None = None

    async def run(self) -> None:
        """Until cancelled. A machine without multicast is told once, and goes on without."""
        self._token = trio.lowlevel.current_trio_token()
        notice = self._notice()
        while not notice.addrs:
            await trio.sleep(self._refresh_s)
            notice = self._notice()
        try:
            zeroconf = await trio.to_thread.run_sync(self._open, notice)
        except OSError as problem:
            log.info("nodes on this LAN are not looked for: %s", problem)
            return
        try:
            await self._announce(zeroconf, notice)
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1.0):
                await trio.to_thread.run_sync(zeroconf.close, abandon_on_cancel=True)

    def _open(self, notice: Notice) -> Zeroconf:
        ips = sorted({addr.split("/")[2] for addr in notice.addrs})
        try:
            zeroconf = Zeroconf(interfaces=ips)
        except OSError:
            fours = [ip for ip in ips if ":" not in ip]
            zeroconf = Zeroconf(interfaces=fours, ip_version=IPVersion.V4Only)
        ServiceBrowser(zeroconf, SERVICE, handlers=[self._changed])
        return zeroconf

    async def _announce(self, zeroconf: Zeroconf, notice: Notice) -> None:
        info = self._info(notice)
        await trio.to_thread.run_sync(lambda: zeroconf.register_service(info, allow_name_change=True))
        while True:
            await trio.sleep(self._refresh_s)
            now = self._notice()
            if now != notice and now.addrs:
                notice, before = now, info
                info = self._info(notice)
                info.name = before.name
                await trio.to_thread.run_sync(zeroconf.update_service, info)

    def _notice(self) -> Notice:
        addrs = tuple(addr for addr in self._addrs() if on_lan(addr.rpartition("/p2p/")[0]))
        return Notice(self._me, addrs, self._tag)

    def _info(self, notice: Notice) -> ServiceInfo:
        first = notice.addrs[0].split("/")
        ips = {addr.split("/")[2] for addr in notice.addrs}
        return ServiceInfo(
            SERVICE,
            f"{self._me[-24:]}.{SERVICE}",
            port=int(first[4]),
            properties=notice.properties(),
            server=f"shoal-{self._me[-24:]}.local.",
            parsed_addresses=sorted(ips),
        )

    def _changed(
        self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        """Called by a thread of the library. Whether a member is gone its connections tell."""
        if state_change is ServiceStateChange.Removed:
            return
        info = zeroconf.get_service_info(service_type, name, timeout=int(LOOK_UP_S * 1000))
        notice = Notice.read(info.properties) if info is not None else None
        if notice is None or notice.mesh_tag != self._tag or notice.peer == self._me or self._token is None:
            return
        try:
            trio.from_thread.run_sync(self._found, notice.addrs, trio_token=self._token)
        except (trio.RunFinishedError, trio.Cancelled):
            log.debug("a member was found on the LAN while this node stopped")


__all__ = ["Lan", "Notice", "mesh_tag", "on_lan"]
