"""The SDK: a mesh from a program, by `Client` (blocking) or `AsyncClient` (trio and asyncio).

- `answers.py`: what comes back (Answer, Piece, Model)
- `asking.py`: the requests' bodies, sans I/O
- `exchange.py`: one answer over several gateways (tries, resumption, deadlines), a pure core
- `gateways.py`: which gateway is asked next, a pure core
- `reading.py`, `wire.py`: server-sent events and one HTTP/1.1 request (h11), sans I/O
- `blocking.py`: Client, over sockets
- `nonblocking.py`: AsyncClient, on anyio
- `light.py`: a node of the program's own that hosts nothing, started from an invite
"""

from __future__ import annotations

from shoal.client.answers import Answer, Model, Piece
from shoal.client.blocking import Client, Stream
from shoal.client.nonblocking import AsyncClient, AsyncStream

__all__ = ["Answer", "AsyncClient", "AsyncStream", "Client", "Model", "Piece", "Stream"]
