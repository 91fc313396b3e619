"""One process of `shoal bench blobs`: a source, the fetcher, or an end of the plain TLS socket.

A source publishes the directory that the parent filled and serves until its stdin ends. The fetcher fetches once, into
a store of its own, and says how it went.
"""

from __future__ import annotations

import datetime
import gc
import json
import secrets
import shutil
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from p2p import (
    BlobExchange,
    BlobStore,
    Host,
    HostConfig,
    Identity,
    Links,
    Manifest,
    P2pError,
    Rpc,
    RpcConfig,
    build_manifest,
    open_host,
)
from shoal.bench_peers import MIB, Memory, first_of, hear, say

MESH = "bench"
KEY = bytes(range(32))
PUBLISHER = Identity(bytes(range(32, 64)))
QUOTA_BYTES = 1 << 50
PIECE_BYTES = 256 << 10
HOSTNAME = "shoal.bench"


@asynccontextmanager
async def node(root: Path) -> AsyncIterator[tuple[Host, BlobExchange]]:
    """A host on loopback with an exchange over a store in `root`."""
    identity = Identity.generate()
    async with open_host(identity, MESH, KEY, HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))) as host:
        rpc = Rpc(host, RpcConfig(silence_s=60.0))
        links = Links(host, rpc, identity)
        exchange = BlobExchange(rpc, BlobStore(root, quota_bytes=QUOTA_BYTES), links=links)
        async with trio.open_nursery() as nursery:
            await nursery.start(rpc.run)
            await nursery.start(links.run)
            gc.freeze()  # as the daemon does
            yield host, exchange
            nursery.cancel_scope.cancel()


def _manifest(root: Path) -> Manifest:
    """Of the source's directory, by a key that all processes know: each makes the very same one."""
    return build_manifest(root / "source", "span", PUBLISHER)


async def give(settings: dict[str, Any]) -> None:
    """Serve until stdin ends."""
    root = Path(settings["root"])
    async with node(root / f"source-{settings['index']}") as (host, exchange):
        manifest = await trio.to_thread.run_sync(_manifest, root)
        exchange.store.publish(manifest, root / "source")
        if settings["mbps"] is not None:
            exchange.budget.set_rate(settings["mbps"] * 1e6 / 8)
        if settings["index"] == 0:
            (root / ".manifest").write_bytes(manifest.encode())
            (root / ".manifest").replace(root / "manifest")
        await say(addrs=host.addrs())
        while await hear() is not None:
            pass


async def fetch(settings: dict[str, Any]) -> None:
    """Fetch everything once."""
    root = Path(settings["root"])
    place = root / f"fetched-{settings['round']}"
    manifest = Manifest.decode((root / "manifest").read_bytes())
    async with node(place) as (host, exchange):
        peers = [await host.connect(addrs) for addrs in settings["addrs"]]
        done_s = 0.0

        def progress(done: int, total: int) -> None:
            nonlocal done_s
            if done == total:
                done_s = time.perf_counter()

        await trio.sleep(0.3)  # what connecting set in motion is no part of it
        memory = Memory()
        memory.start()
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        whole = {entry.name: [(0, entry.size)] for entry in manifest.files}
        state = await exchange.fetch(manifest, whole, lambda: peers, progress=progress)
        ended_s, cpu_s = time.perf_counter(), time.process_time() - began_cpu_s
        await say(
            seconds=done_s - began_s,
            mb_per_s=manifest.size_bytes / 1e6 / (done_s - began_s),
            flush_s=ended_s - done_s,
            cpu_s=cpu_s,
            peak_memory_mib=memory.beyond() / MIB,
            process_mib=memory.peak() / MIB,
            sources_used=sum(count > 0 for count in state.sources.values()),
            fetched_bytes=sum(state.sources.values()),
            dropped=[one.peer for one in exchange.dropped()],
            least_share=min(state.sources.values()) / manifest.size_bytes,
            paths=sorted(set(state.paths.values())),
        )
    shutil.rmtree(place)


# ---- one plain TLS socket


def certificate(root: Path) -> Path:
    """A new key and a certificate signed by it, in one file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, HOSTNAME)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOSTNAME)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = root / f"tls-{secrets.token_hex(4)}.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return path


def tls_receive(settings: dict[str, Any]) -> None:
    """Take the bytes of one TLS socket into one buffer."""
    path = certificate(Path(settings["root"]))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(path)
    with socket.create_server(("127.0.0.1", 0)) as door:
        print(json.dumps({"port": [door.getsockname()[1], str(path)]}), flush=True)
        sys.stdin.readline()
        plain, _ = door.accept()
        with plain, context.wrap_socket(plain, server_side=True) as sock:
            total, got = settings["mib"] * MIB, 0
            buffer = memoryview(bytearray(PIECE_BYTES))
            began_s = time.perf_counter()
            while got < total:
                count = sock.recv_into(buffer)
                if not count:
                    raise ConnectionError("the TLS socket ended early")
                got += count
            took_s = time.perf_counter() - began_s
            sock.sendall(b"!")
    print(json.dumps({"mb_per_s": total / 1e6 / took_s}), flush=True)


def tls_send(settings: dict[str, Any]) -> None:
    """Give as many bytes, from memory."""
    port, path = json.loads(sys.stdin.readline())["port"]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(path)
    with (
        socket.create_connection(("127.0.0.1", port)) as plain,
        context.wrap_socket(plain, server_hostname=HOSTNAME) as sock,
    ):
        piece = secrets.token_bytes(PIECE_BYTES)
        for _ in range(settings["mib"] * MIB // PIECE_BYTES):
            sock.sendall(piece)
        sock.recv(1)
    print(json.dumps({"sent": True}), flush=True)


def main() -> None:
    """`python -m shoal.bench_blobs_peer SETTINGS`."""
    settings = json.loads(sys.argv[1])
    try:
        if settings["role"] == "source":
            trio.run(give, settings)
        elif settings["role"] == "fetcher":
            trio.run(fetch, settings)
        else:
            (tls_receive if settings["role"] == "tls-receive" else tls_send)(settings)
    except* (KeyboardInterrupt, BrokenPipeError):
        sys.exit(1)
    except* (P2pError, OSError) as problems:
        print(json.dumps({"failed": str(first_of(problems))}), flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
