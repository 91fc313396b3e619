"""Which of several gateways is asked next. Pure: addresses and times in, an address out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from urllib.parse import urlsplit

from shoal.daemon_client import data_dir, read_address
from shoal.errors import DaemonAbsent, UsageProblem

DEFAULT = "http://127.0.0.1:8080"
REST_S = 10.0


class Gateways:
    """Addresses in order of preference; one that failed rests, and is asked again when all rest.

    The first stays in use while it works: a conversation's cache lies where it was before.
    """

    def __init__(self, addresses: Sequence[str]) -> None:
        self.addresses = tuple(dict.fromkeys(map(base_of, addresses)))
        if not self.addresses:
            raise UsageProblem("no gateway was given: an address such as http://127.0.0.1:8080 is needed")
        self._rests_until_s = dict.fromkeys(self.addresses, 0.0)

    def choose(self, now_s: float, without: frozenset[str] = frozenset()) -> str:
        """The one to ask: not among `without` where any other is left, awake, in order; else who wakes first."""
        allowed = [address for address in self.addresses if address not in without] or list(self.addresses)
        return min(allowed, key=lambda address: max(0.0, self._rests_until_s[address] - now_s))

    def failed(self, address: str, now_s: float) -> None:
        """It did not answer, or broke off."""
        self._rests_until_s[address] = now_s + REST_S

    def worked(self, address: str) -> None:
        """It answered."""
        self._rests_until_s[address] = 0.0


def base_of(address: str) -> str:
    """`HOST:PORT` or a URL, with or without `/v1`, as `http://HOST:PORT`. Raises UsageProblem."""
    parts = urlsplit(address if "://" in address else f"http://{address}")
    try:
        port = parts.port
    except ValueError:
        port = -1
    wrong = parts.scheme not in ("http", "https") or not parts.hostname or port == -1
    if wrong or parts.path.rstrip("/") not in ("", "/v1"):
        raise UsageProblem(
            f"the gateway is '{address}', which is not HOST:PORT or a URL such as http://127.0.0.1:8080"
        )
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(str(parts.hostname), str(parts.hostname))
    shown = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{shown}:{port}" if port else f"{parts.scheme}://{shown}"


def found(addresses: Sequence[str]) -> Gateways:
    """The given ones; without any those in `SHOAL_GATEWAYS` (by commas), else the daemon of this computer's data
    directory, else the default port. Raises UsageProblem."""
    if not addresses and os.environ.get("SHOAL_GATEWAYS"):
        addresses = [one.strip() for one in os.environ["SHOAL_GATEWAYS"].split(",") if one.strip()]
    if not addresses:
        running = read_address(data_dir(None))
        addresses = [running.api if running else DEFAULT]
    return Gateways(addresses)


def nobody(gateways: Gateways, reason: str) -> DaemonAbsent:
    """The error when no gateway could be reached at all."""
    where = " or ".join(gateways.addresses)
    return DaemonAbsent(f"no node answers at {where} ({reason}); is one running? start one with: shoal up")
