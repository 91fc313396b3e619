"""On what terms a request is served: for which client it counts, how urgent it is, and how long it may take.

Read from the request's headers and two body fields of OpenAI's. A key tells clients apart where keys are set (a holder
cannot become many by naming users); else the `user` field does, else the address. It knows nothing of queues.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

from starlette.datastructures import Headers

from node.api.config import ApiConfig
from node.api.problems import invalid
from node.api.requests import Options

Priority = Literal["high", "normal", "background"]
PRIORITIES: dict[str, Priority] = {"high": "high", "normal": "normal", "background": "background"}
TIERS: dict[str, Priority] = {
    "auto": "normal",
    "default": "normal",
    "scale": "normal",
    "priority": "high",
    "flex": "background",
}
TIER_OF: dict[Priority, str] = {"high": "priority", "normal": "default", "background": "flex"}
SECONDS_MAX = 86_400.0
PRIORITY_HEADER, DEADLINE_HEADER, FIRST_TOKEN_HEADER = (
    "x-shoal-priority",
    "x-shoal-deadline",
    "x-shoal-first-token",
)


@dataclass(frozen=True, slots=True)
class Terms:
    """`deadline_s` for the whole answer and `first_token_s` for its beginning count from the arrival; None: no limit.

    `tier` is what is said back to a client that named a service tier.
    """

    client: str
    priority: Priority = "normal"
    deadline_s: float | None = None
    first_token_s: float | None = None
    tier: str | None = None


def terms_of(headers: Headers, address: str, options: Options, config: ApiConfig) -> Terms:
    """Read them. Raises ApiProblem (400)."""
    priority = TIERS[options.service_tier] if options.service_tier else "normal"
    asked = headers.get(PRIORITY_HEADER)
    if asked is not None:
        if asked.strip().lower() not in PRIORITIES:
            raise invalid(PRIORITY_HEADER, asked, "one of " + ", ".join(PRIORITIES))
        priority = PRIORITIES[asked.strip().lower()]
    return Terms(
        client=_client(headers, address, options.user, config),
        priority=priority,
        deadline_s=_least(_seconds(headers, DEADLINE_HEADER), config.request_deadline_s),
        first_token_s=_least(_seconds(headers, FIRST_TOKEN_HEADER), config.first_token_s),
        tier=TIER_OF[priority] if options.service_tier else None,
    )


def _client(headers: Headers, address: str, user: str | None, config: ApiConfig) -> str:
    if config.api_keys:
        kind, value = "key", headers.get("authorization", "").partition(" ")[2].strip()
    else:
        kind, value = ("user", user) if user else ("address", address)
    return f"{kind}:{hashlib.blake2b(value.encode(), digest_size=8).hexdigest()}"


def _seconds(headers: Headers, name: str) -> float | None:
    text = headers.get(name)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0.0 < seconds <= SECONDS_MAX:
        raise invalid(name, text, f"seconds, above 0 and up to {SECONDS_MAX:g}")
    return seconds


def _least(a: float | None, b: float | None) -> float | None:
    return b if a is None else a if b is None else min(a, b)
