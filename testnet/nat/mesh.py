"""Members without models in a laboratory: started, asked, killed; and the table of what each pair of homes comes to.

Behind `shoal testnet nat`. It knows the orders of `testnet.nat.peer`; whole daemons in a laboratory are the tests' own.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from testnet.errors import LaunchFailed
from testnet.nat.lab import NatLab
from testnet.nat.network import HostSpec, LinkSpec, RouterSpec
from testnet.processes import child_environment

READY_S = 60.0
ANSWER_S = 70.0
POLL_S = 0.05

HomeKind = str
"""A RouterKind, or `double`: a cone behind the provider's cone."""
HOMES: tuple[HomeKind, ...] = ("open", "full-cone", "cone", "shifting", "firewall", "double", "symmetric")


def plan(homes: Sequence[HomeKind], publics: int, link: LinkSpec) -> tuple[list[RouterSpec], list[HostSpec]]:
    """Routers and hosts: `p0`, `p1`, ... in public, `h1`, `h2`, ... each behind a router of its own."""
    routers: list[RouterSpec] = []
    hosts = [HostSpec(f"p{k}", f"45.0.0.{10 + k}", None, link) for k in range(publics)]
    for k, kind in enumerate(homes, 1):
        name, wan, ip = f"r{k}", f"45.0.{k}.1", f"10.{k}.0.2"
        match kind:
            case "double":
                routers += [
                    RouterSpec(f"isp{k}", "cone", wan),
                    RouterSpec(name, "cone", f"100.64.{k}.2", f"isp{k}"),
                ]
            case "firewall" | "open":
                ip = f"46.0.{k}.2"
                routers.append(RouterSpec(name, kind, wan))
            case "cone" | "shifting" | "full-cone" | "symmetric":
                routers.append(RouterSpec(name, kind, wan))
            case other:
                raise ValueError(f"home {other!r}: it must be one of {', '.join(HOMES)}")
        hosts.append(HostSpec(f"h{k}", ip, name, link))
    return routers, hosts


class Peer:
    """The process of one member."""

    def __init__(self, lab: NatLab, host: str, directory: Path) -> None:
        self.host = host
        self.peer = ""
        self._lab = lab
        self._directory = directory / host
        self._directory.mkdir(exist_ok=True)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *words: str) -> Peer:
        """Start it (again, with the same identity); `ready` waits."""
        command = [sys.executable, "-P", "-m", "testnet.nat.peer", str(self._directory), *words]
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._lab.command(self.host, *command),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=child_environment(os.environ),
            )  # fmt: skip
        return self

    def ready(self) -> Peer:
        """Wait until it lives. Raises LaunchFailed."""
        self.peer = str(self._answer(READY_S)["ready"])
        return self

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        """The answer to an order. Raises LaunchFailed where there is none, or an error."""
        process = self._running()
        if process.stdin is None:
            raise LaunchFailed(f"{self.host} takes no orders")
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps({"do": do, **more}).encode() + b"\n")
            process.stdin.flush()
        answer = self._answer(ANSWER_S)
        if "error" in answer:
            raise LaunchFailed(f"{self.host}: {answer['error']}")
        return answer

    def signal(self, number: int) -> None:
        """To the member itself."""
        self._running().send_signal(number)

    def leave(self) -> None:
        """Have it end by itself, cleanly."""
        process = self._running()
        if process.stdin is not None:
            process.stdin.close()
        process.wait(READY_S)

    def end(self) -> None:
        """At once, as by a power cut."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()

    def log(self) -> str:
        return (self._directory / "log").read_text(errors="replace")

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise LaunchFailed(f"{self.host} does not run")
        return self._process

    def _answer(self, within_s: float) -> dict[str, Any]:
        process = self._running()
        if process.stdout is None or not select.select([process.stdout], [], [], within_s)[0]:
            raise LaunchFailed(f"{self.host} does not answer: {self.log()[-500:]}")
        line = process.stdout.readline()
        if not line:
            raise LaunchFailed(f"{self.host} has ended: {self.log()[-500:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


class NatMesh:
    """A laboratory with one member a host, the first of which founded the mesh; those `later` are left to be started,
    and the `others` are computers without one. Ends what it began."""

    def __init__(
        self,
        homes: Sequence[HomeKind],
        publics: int = 1,
        link: LinkSpec | None = None,
        *,
        flags: Sequence[str] = (),
        later: Sequence[str] = (),
        others: Sequence[HostSpec] = (),
    ) -> None:
        routers, hosts = plan(homes, publics, link or LinkSpec(delay_s=0.01))
        self.lab = NatLab(routers, [*hosts, *others])
        self.peers: dict[str, Peer] = {}
        self._flags = tuple(flags)
        self._later = tuple(later)
        self._others = {spec.name for spec in others}
        self._directory = tempfile.TemporaryDirectory(prefix="shoal-nat-")

    def __enter__(self) -> NatMesh:
        self.lab.__enter__()
        done = False
        try:
            base = Path(self._directory.name)
            self.peers = {
                host: Peer(self.lab, host, base) for host in self.lab.hosts if host not in self._others
            }
            first, *others = self.peers.values()
            first.start(*self._flags).ready()
            invite = str(first.ask("invite")["invite"])
            now = [peer for peer in others if peer.host not in self._later]
            for peer in now:
                peer.start(invite, *self._flags)
            for peer in now:
                peer.ready()
            done = True
        finally:
            if not done:
                self.close()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove everything."""
        for peer in self.peers.values():
            peer.end()
        self.lab.close()
        self._directory.cleanup()

    def status(self, host: str) -> dict[str, Any]:
        return self.peers[host].ask("status")

    def path(self, one: str, other: str) -> str:
        """How `one` is connected to `other`: direct, hole-punched, relayed or none."""
        paths: dict[str, str] = self.status(one)["paths"]
        return paths.get(self.peers[other].peer, "none")

    def until(self, condition: Callable[[], Any], what: str, within_s: float = 60.0) -> Any:
        """Poll until `condition()` is true, and return it. Raises LaunchFailed."""
        end_s = time.monotonic() + within_s
        while not (found := condition()):
            if time.monotonic() > end_s:
                raise LaunchFailed(f"not within {within_s:g} s: {what}")
            time.sleep(POLL_S)
        return found


@dataclass(frozen=True, slots=True)
class Pair:
    """What two homes came to: the path when nothing changed any more, seconds from the start of the second until they
    were connected at all, and until the path was that one; the kinds as the members concluded."""

    homes: tuple[HomeKind, HomeKind]
    kinds: tuple[str, str]
    path: str
    connected_s: float
    settled_s: float


def measure(one: HomeKind, other: HomeKind, link: LinkSpec, settle_s: float = 8.0) -> Pair:
    """Two homes and two public members; the second home comes when the first is settled."""
    with NatMesh([one, other], 2, link, later=("h2",)) as mesh:
        first, second = mesh.peers["h1"], mesh.peers["h2"]
        mesh.until(lambda: _settled(first.ask("status")["reach"]), f"{one} settled")
        began_s = time.monotonic()
        second.start(str(mesh.peers["p0"].ask("invite")["invite"])).ready()
        connected_s = settled_s = took_s = 0.0
        path = "none"
        while took_s < 60.0 and (not connected_s or took_s - settled_s < settle_s):
            seen = mesh.path("h2", "h1")
            took_s = time.monotonic() - began_s
            if seen != path:
                path, settled_s = seen, took_s
                connected_s = connected_s or took_s
            time.sleep(POLL_S)
        kinds = (mesh.status("h1")["reach"]["nat"], mesh.status("h2")["reach"]["nat"])
        return Pair((one, other), kinds, path, connected_s, settled_s)


def _settled(reach: dict[str, Any]) -> bool:
    known = reach["nat"] != "unknown"
    return known and (
        reach["verdict"] == "public" or (reach["verdict"] == "private" and len(reach["relays"]) == 2)
    )
