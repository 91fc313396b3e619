"""The API's limits and secrets: one frozen dataclass, filled in by the daemon's configuration."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ApiConfig:
    """Every limit of the HTTP side. Sizes in bytes or characters, times in seconds.

    With `api_keys` every client must present one of them (`Authorization: Bearer KEY`); without, only
    clients on this computer are answered. `hosts` are further names that a Host header may carry. Requests that would
    not be done within `request_deadline_s`, or not begin within `first_token_s`, are refused, or cut off; an answer
    whose length the client leaves open is expected to take `likely_tokens`.
    """

    api_keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    body_bytes_max: int = 8 << 20
    body_deadline_s: float = 30.0
    json_depth_max: int = 32
    messages_max: int = 4096
    choices_max: int = 8
    inputs_max: int = 2048
    prompts_max: int = 16
    stops_max: int = 16
    stop_chars_max: int = 1024
    inline_chars_max: int = 16384
    first_byte_s: float = 1.0
    keepalive_s: float = 5.0
    request_deadline_s: float | None = None
    first_token_s: float | None = None
    likely_tokens: int = 256


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Limits of the listening side."""

    connections_max: int = 256
    idle_s: float = 75.0
    send_stall_s: float = 30.0
    stop_grace_s: float = 0.5
    header_bytes_max: int = 32 << 10
