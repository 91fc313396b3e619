"""Network namespaces as computers behind routers of every kind, for tests of what happens between homes.

`NatLab` makes the namespaces and starts the wire between them; leaving its block removes everything, and whatever a
killed lab left behind goes when the next one begins. Nothing in it can reach this machine's own network. Linux and
root only: `why_not` says what is missing elsewhere.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from testnet.errors import LaunchFailed
from testnet.nat.network import HostSpec, LinkSpec, RouterSpec
from testnet.nat.packets import TCP
from testnet.nat.wire import enter
from testnet.processes import child_environment

_OURS = re.compile(r"shoal-nat-(\d+)-")


def why_not() -> str:
    """What stands against a laboratory on this machine; "" where nothing does."""
    if not sys.platform.startswith("linux"):
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "the program ip (iproute2) is missing"
    if not Path("/dev/net/tun").exists():
        return "the device /dev/net/tun is missing"
    name = f"shoal-nat-{os.getpid()}-try"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"namespaces are not permitted: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return ""


def sweep() -> list[str]:
    """Remove the namespaces of laboratories whose process is gone; their names."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    names = [line.split()[0] for line in listed.stdout.splitlines() if line.strip()]
    stale = [name for name in names if (m := _OURS.match(name)) and not Path(f"/proc/{m[1]}").exists()]
    for name in stale:
        _remove(name)
    return stale


def _remove(namespace: str) -> None:
    """End what still runs in a namespace of ours, then the namespace itself."""
    listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
    for pid in listed.stdout.split():
        with suppress(ProcessLookupError, ValueError):
            os.kill(int(pid), 9)
    subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)


class NatLab:
    """A laboratory for as long as its block runs. Host names are short: letters, digits, dashes."""

    def __init__(self, routers: Sequence[RouterSpec], hosts: Sequence[HostSpec], *, seed: int = 0) -> None:
        self.routers = {spec.name: spec for spec in routers}
        self.hosts = {spec.name: spec for spec in hosts}
        self.prefix = f"shoal-nat-{os.getpid()}-"
        self._seed = seed
        self._wire: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> NatLab:
        sweep()
        done = False
        try:
            for name in self.hosts:
                subprocess.run(
                    ["ip", "netns", "add", self.namespace(name)], check=True, capture_output=True, text=True
                )
            self._start_wire()
            done = True
        except subprocess.CalledProcessError as problem:
            raise LaunchFailed(f"a namespace could not be made: {problem.stderr.strip()}") from None
        finally:
            if not done:
                self.close()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def namespace(self, host: str) -> str:
        return self.prefix + host

    def command(self, host: str, *words: str) -> list[str]:
        """What to run so that `words` run on `host`."""
        return ["ip", "netns", "exec", self.namespace(host), *words]

    @contextmanager
    def inside(self, host: str) -> Iterator[None]:
        """This thread is on `host`: sockets that it makes are that computer's."""
        with open(f"/proc/{os.getpid()}/task/{threading.get_native_id()}/ns/net", "rb") as home:
            enter(self.namespace(host))
            try:
                yield
            finally:
                _return(home.fileno())

    def move(self, host: str, ip: str, behind: str | None, link: LinkSpec | None = None) -> None:
        """The computer goes to another network: its old address is gone at once."""
        spec = replace(self.hosts[host], ip=ip, behind=behind, link=link or self.hosts[host].link)
        self.order("attach", **asdict(spec))
        self.hosts[host] = spec

    def unplug(self, host: str) -> None:
        """Nothing comes from or to the computer; it keeps its address."""
        self.order("detach", name=host)

    def plug(self, host: str) -> None:
        """After `unplug`, all is as before."""
        self.order("attach", **asdict(self.hosts[host]))

    def restart(self, router: str) -> None:
        """The router forgets who wrote to whom."""
        self.order("restart", router=router)

    def forward(self, router: str, port: int, ip: str, inner_port: int) -> None:
        """A TCP port of the router's outer address leads to a computer behind it."""
        self.order("forward", router=router, protocol=TCP, port=port, ip=ip, inner_port=inner_port)

    def unforward(self, router: str, port: int) -> None:
        """That port leads nowhere again."""
        self.order("unforward", router=router, protocol=TCP, port=port)

    def order(self, do: str, **arguments: Any) -> dict[str, Any]:
        """One order to the wire. Raises LaunchFailed where it refuses, or has ended."""
        wire = self._wire
        if wire is None or wire.stdin is None or wire.stdout is None:
            raise LaunchFailed("the laboratory is not open")
        try:
            wire.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            wire.stdin.flush()
        except OSError:
            raise LaunchFailed(f"the wire has ended{self._last_words()}") from None
        line = wire.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": f"it has ended{self._last_words()}"}
        if "error" in answer:
            raise LaunchFailed(f"the wire refused {do}: {answer['error']}")
        return answer

    def close(self) -> None:
        """Remove everything."""
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.kill()
            wire.wait()
            for pipe in (wire.stdin, wire.stdout, wire.stderr):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()
        for name in self.hosts:
            _remove(self.namespace(name))

    def _start_wire(self) -> None:
        self._wire = subprocess.Popen(
            [sys.executable, "-P", "-m", "testnet.nat.wire"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=child_environment(os.environ),
        )  # fmt: skip
        document = {
            "prefix": self.prefix,
            "seed": self._seed,
            "routers": [asdict(spec) for spec in self.routers.values()],
            "hosts": [asdict(spec) for spec in self.hosts.values()],
        }
        stdin, stdout = self._wire.stdin, self._wire.stdout
        if stdin is None or stdout is None:
            raise LaunchFailed("the wire has no pipes")
        stdin.write(json.dumps(document).encode() + b"\n")
        stdin.flush()
        if stdout.readline() != b"ready\n":
            raise LaunchFailed(f"the wire did not start{self._last_words()}")

    def _last_words(self) -> str:
        wire = self._wire
        if wire is None or wire.stderr is None or wire.poll() is None:
            return ""
        said = wire.stderr.read().decode(errors="replace").strip().splitlines()
        return f": {said[-1]}" if said else ""


def _return(fileno: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(fileno, 0):
        os._exit(70)  # a test that went on in the wrong namespace would tell lies
