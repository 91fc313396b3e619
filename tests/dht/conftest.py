"""Cheap identities and records for dht's tests. Everything is seeded; nothing here reads a clock."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest

from dht import Record, sign_record
from p2p import Identity


@pytest.fixture(scope="session")
def identity() -> Callable[[int], Identity]:
    """The n-th identity, always the same."""
    made: dict[int, Identity] = {}

    def make(n: int) -> Identity:
        if n not in made:
            made[n] = Identity(hashlib.sha256(f"identity {n}".encode()).digest())
        return made[n]

    return make


@pytest.fixture
def record(identity: Callable[[int], Identity]) -> Callable[..., Record]:
    """A record by the n-th identity with sensible defaults, issued at second 1000."""

    def make(
        n: int = 0,
        *,
        kind: str = "node",
        name: str = "self",
        seq: int = 1,
        value: bytes = b"v",
        now_s: float = 1000.0,
        ttl_s: float = 20.0,
    ) -> Record:
        return sign_record(identity(n), kind, name, seq, value, now_s, ttl_s)

    return make
