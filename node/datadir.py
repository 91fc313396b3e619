"""The data directory: who holds it, which mesh it belongs to, and where the running daemon can be reached.

`identity.key` is p2p's; `meshes/` holds by mesh the founding key (where this node founded it), who is a member and
what is dropped;
`mesh.json` (mesh id, swarm key, addresses to try first) is written here with mode 0600;
`daemon.json` exists only while a daemon runs and is what the command line reads. A lock keeps two daemons apart, also
when one died without cleaning up. It knows nothing of what the files mean to the network.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from node.errors import DataDirProblem
from p2p import Identity, PeerId, mesh_id_of

MESHES_MAX = 16
NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9-]")


@dataclass(frozen=True, slots=True)
class Membership:
    """Which mesh this node belongs to. `swarm_key` is None for a public mesh; `addrs` are tried first.

    `founder` is the founding key's peer id (None in a mesh of an earlier version, whose members have no
    certificates), `ticket` what an invite gave, `founding` the founding key itself where this node made it.
    """

    mesh_id: str
    swarm_key: bytes | None
    addrs: tuple[str, ...] = ()
    founder: PeerId | None = None
    ticket: bytes = b""
    founding: Identity | None = field(default=None, compare=False, repr=False)

    @classmethod
    def found(cls, *, public: bool) -> Membership:
        """A new mesh of one."""
        founding = Identity.generate()
        key = None if public else secrets.token_bytes(32)
        return cls(mesh_id_of(founding.peer_id), key, founder=founding.peer_id, founding=founding)


def write_atomic(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace `path` by `data` so that a reader or a crash sees the old or the new file, never a part."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(name, mode)
        os.replace(name, path)
    except BaseException:  # whatever ended it, also a cancellation, leaves no debris
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _lock(handle: IO[bytes]) -> bool:
    """An exclusive lock that the system drops when the process ends, however it ends."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(handle.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


class DataDir:
    """An opened, locked data directory. Raises DataDirProblem, with one clear line, for whatever cannot be used."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    @contextlib.contextmanager
    def open(cls, root: Path) -> Iterator[DataDir]:
        """Create, probe and lock `root`; removes `daemon.json` on the way out."""
        try:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = (root / "lock").open("ab")
            write_atomic(root / ".probe", b"x")
            (root / ".probe").unlink()
        except OSError as problem:
            raise DataDirProblem(root, f"cannot be written: {problem.strerror or problem}") from None
        with lock:
            if not _lock(lock):
                running = read_daemon(root)
                by = f"process {running['pid']}" if running else "another process"
                raise DataDirProblem(root, f"is in use by {by}; stop it first or give another --data-dir")
            try:
                yield cls(root)
            finally:
                with contextlib.suppress(OSError):
                    (root / "daemon.json").unlink(missing_ok=True)

    @property
    def identity_path(self) -> Path:
        return self.root / "identity.key"

    @property
    def blobs_path(self) -> Path:
        return self.root / "blobs"

    def scratch_path(self) -> Path:
        """Where the engines keep what can be made again, made if need be."""
        path = self.root / "scratch"
        path.mkdir(exist_ok=True, mode=0o700)
        return path

    @property
    def training_path(self) -> Path:
        """Runs that this node takes part in: checkpoints, journals, data."""
        return self.root / "train"

    @property
    def peers_path(self) -> Path:
        return self.root / "peers.json"

    def membership(self) -> Membership | None:
        """The mesh this node belonged to when it last ran, or None."""
        path = self.root / "mesh.json"
        try:
            document = json.loads(path.read_bytes())
            key = document["swarm_key"]
            addrs = tuple(str(a) for a in document.get("addrs", ()))
            mesh_id, founder = str(document["mesh_id"]), document.get("founder")
            return Membership(
                mesh_id,
                None if key is None else bytes.fromhex(key),
                addrs,
                None if founder is None else PeerId(str(founder)),
                bytes.fromhex(document.get("ticket", "")),
                self.founding_key(mesh_id),
            )
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise DataDirProblem(
                path, f"cannot be read as a mesh description ({problem}); mend or remove it"
            ) from None

    def remember(self, membership: Membership) -> None:
        """Keep the membership for the next start."""
        key = None if membership.swarm_key is None else membership.swarm_key.hex()
        document = {
            "version": 1,
            "mesh_id": membership.mesh_id,
            "swarm_key": key,
            "addrs": list(membership.addrs),
        }
        if membership.founder is not None:
            document |= {"founder": membership.founder, "ticket": membership.ticket.hex()}
        if membership.founding is not None and self.founding_key(membership.mesh_id) is None:
            membership.founding.save(self._of_mesh(membership.mesh_id, "key"))
        self._write("mesh.json", document)

    def port(self) -> int:
        """The TCP port on which peers reached this node last, 0 where none is known."""
        try:
            port = json.loads((self.root / "port.json").read_bytes())["port"]
        except (OSError, ValueError, KeyError, TypeError):
            return 0
        return port if type(port) is int and 0 < port < 1 << 16 else 0

    def remember_port(self, port: int) -> None:
        """Keep the port: peers that remember this node look for it there."""
        if port and port != self.port():
            self._write("port.json", {"port": port})

    def founding_key(self, mesh_id: str) -> Identity | None:
        """The founding key of a mesh that this node founded, unless its owner took it away to keep it elsewhere."""
        path = self._of_mesh(mesh_id, "key")
        return Identity.load_or_create(path) if path.is_file() else None

    def _of_mesh(self, mesh_id: str, kind: str) -> Path:
        """A file that belongs to one mesh; the mesh's id comes from outside and names nothing else."""
        name = NOT_IN_NAMES.sub("_", mesh_id)[:64]
        return self.root / "meshes" / f"{name}.{kind}"

    def roster(self, mesh_id: str) -> bytes | None:
        """What was kept of a mesh's members; None where nothing was. Raises DataDirProblem."""
        path = self._of_mesh(mesh_id, "roster")
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as problem:
            raise DataDirProblem(path, f"cannot be read: {problem.strerror or problem}") from None

    def remember_roster(self, mesh_id: str, state: bytes) -> None:
        """Keep what is known of a mesh's members: who was expelled stays so after a restart."""
        self._write_of_mesh(mesh_id, "roster", state)

    def _write_of_mesh(self, mesh_id: str, kind: str, data: bytes) -> None:
        path = self._of_mesh(mesh_id, kind)
        try:
            path.parent.mkdir(exist_ok=True, mode=0o700)
            write_atomic(path, data)
        except OSError as problem:
            raise DataDirProblem(path, f"cannot be written: {problem.strerror or problem}") from None

    def drops(self, mesh_id: str) -> bytes:
        """What was kept of the models dropped from a mesh; nothing where that cannot be read."""
        try:
            return self._of_mesh(mesh_id, "drops").read_bytes()
        except OSError:
            return b""

    def remember_drops(self, mesh_id: str, orders: bytes) -> None:
        """Keep which models are dropped: none comes back by a restart."""
        self._write_of_mesh(mesh_id, "drops", orders)

    def offers(self, mesh_id: str) -> list[bytes]:
        """The model adverts this node last made in a mesh; a file that cannot be read offers nothing."""
        try:
            return [base64.b64decode(item) for item in self._offers()[mesh_id]]
        except (ValueError, KeyError, TypeError):
            return []

    def remember_offers(self, mesh_id: str, offers: Iterable[bytes]) -> None:
        """Keep the model adverts for the next time in this mesh: what is shared with one is not told to another."""
        meshes = {name: items for name, items in self._offers().items() if name != mesh_id}
        meshes[mesh_id] = [base64.b64encode(offer).decode() for offer in offers]
        kept = list(meshes)[-MESHES_MAX:]
        self._write("models.json", {"version": 1, "offers": {name: meshes[name] for name in kept}})

    def _offers(self) -> dict[str, list[str]]:
        try:
            return dict(json.loads((self.root / "models.json").read_bytes())["offers"])
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def fences(self, mesh_id: str) -> dict[str, tuple[int, str]]:
        """By model the epoch and planner of the newest plan that this node held to in a mesh; none where the file
        cannot be read."""
        try:
            document = json.loads((self.root / "plans.json").read_bytes())["fences"][mesh_id]
            return {str(model): (int(epoch), str(planner)) for model, (epoch, planner) in document.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def planned(self, mesh_id: str) -> dict[str, list[tuple[str, int, int]]]:
        """By model the (host, start, end) of that plan; none where the file cannot be read."""
        try:
            document = json.loads((self.root / "plans.json").read_bytes())["spans"][mesh_id]
            return {
                str(model): [(str(host), int(start), int(end)) for host, start, end in spans]
                for model, spans in document.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def remember_plans(
        self,
        mesh_id: str,
        fences: Mapping[str, tuple[int, str]],
        spans: Mapping[str, Iterable[tuple[str, int, int]]],
    ) -> None:
        """Keep both for the next start; those of other meshes are not kept."""
        kept = {model: list(planned) for model, planned in spans.items()}
        self._write("plans.json", {"version": 1, "fences": {mesh_id: dict(fences)}, "spans": {mesh_id: kept}})

    def announce(self, api: str, peer: str) -> None:
        """Tell the command line where the running daemon is."""
        self._write("daemon.json", {"pid": os.getpid(), "api": api, "peer": peer})

    def _write(self, name: str, document: dict[str, Any]) -> None:
        try:
            write_atomic(self.root / name, json.dumps(document, indent=1).encode())
        except OSError as problem:
            raise DataDirProblem(
                self.root / name, f"cannot be written: {problem.strerror or problem}"
            ) from None


def read_daemon(root: Path) -> dict[str, Any] | None:
    """`{"pid", "api", "peer"}` as the running daemon left it, or None."""
    try:
        document = json.loads((root / "daemon.json").read_bytes())
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) and {"pid", "api", "peer"} <= set(document) else None
