"""The daemon's configuration: one frozen dataclass, merged from flags, environment and a TOML file.

Flags win over environment (`SHOAL_*`) over file (`$XDG_CONFIG_HOME/shoal/config.toml`) over defaults. This is the only
reader of the environment and of TOML; everything below receives plain values. A bad value is named with its field,
the value, and what would be right.
"""

from __future__ import annotations

import os
import re
import socket
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from node.errors import ConfigProblem

DEVICES = re.compile(
    r"(cpu|mps|cuda(:\d{1,2})?|xpu(:\d{1,2})?)(,(cpu|mps|cuda(:\d{1,2})?|xpu(:\d{1,2})?)){0,63}|all"
)
TAG_PATTERN = re.compile(r"[a-z][a-z0-9-]{0,31}")
DTYPES = ("auto", "float32", "bfloat16")
QUANTS = ("none", "int8", "int4")
KV_QUANTS = ("none", "int8")
SPECULATIONS = ("lookup", "off")
TAGS_MAX = 32
LOG_LEVELS = ("debug", "info", "warning", "error")
UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
EMBEDDED = "embedded"
NAME_PATTERN = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}$")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model directory to publish (`EMBEDDED` for the built-in one) and the name it gets in the mesh."""

    directory: str
    name: str


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """Everything `shoal up` can be told. Sizes in bytes, times in seconds, spans half-open.

    `device` is one device, several separated by commas, or `all`. `tags` describe this node; `require` and
    `ends_require` are tags that hosts of the models shared here must have. `rebalance_s`: how often plans are weighed
    against better ones and copies against demand. `queue_max` requests wait here for their turn, `queue_wait_s` at
    most; `deadline_s` and `first_token_s` hold for every request (None: what its client says). A node that failed is
    first avoided for `avoid_s`; where nobody can take the place of one that a running answer lost, `mend_wait_s` pass
    before the answer ends. What stages hand on is kept for such cases, in up to `history_bytes` of memory and then in
    eight times as much on the disk. Prefill and decode go to separate chains where that saves the share `split_gain` of
    a request's time (1: never). `relay_mbps` (Mbit/s) is what this node relays with for members that cannot be reached
    otherwise, where it can be reached itself (0: it does not; nor does one with the tag `metered`), `upload_mbps` what
    it gives others of models' files with (None: no limit, 0: nothing). `disk_bytes` bounds what it fetches of them.
    `upnp`: the home's router is asked to forward a port. `mdns`: members on the same LAN are found by multicast. With
    `speculate`
    "lookup" answers are guessed from their text and checked several tokens a pass, which changes no text; "off" goes
    token by token.
    """

    data_dir: Path
    api_host: str = "127.0.0.1"
    api_port: int = 8080
    api_keys: tuple[str, ...] = ()
    listen: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0", "/ip6/::/tcp/0")
    join: str | None = None
    public: bool = False
    mdns: bool = True
    models: tuple[ModelSource, ...] = ()
    layers: tuple[int, int] | None = None
    device: str = "cpu"
    dtype: str = "auto"
    quant: str = "none"
    kv_quant: str = "none"
    serve: bool = True
    memory_bytes: int | None = None
    disk_bytes: int = 200 * 2**30
    copies: int = 1
    concurrency: int = 4
    threads: int | None = None
    name: str = field(default_factory=lambda: socket.gethostname()[:63] or "node")
    region: str = ""
    tags: tuple[str, ...] = ()
    require: tuple[str, ...] = ()
    ends_require: tuple[str, ...] = ()
    log_level: str = "warning"
    rebalance_s: float = 60.0
    queue_max: int = 256
    queue_wait_s: float = 60.0
    deadline_s: float | None = None
    first_token_s: float | None = None
    avoid_s: float = 10.0
    mend_wait_s: float = 15.0
    history_bytes: int = 64 * 2**20
    split_gain: float = 0.15
    relay_mbps: float = 20.0
    upload_mbps: float | None = None
    upnp: bool = True
    speculate: str = "off"
    rpc_silence_s: float = 3.0
    suspect_grace_s: float = 2.0
    node_ttl_s: float = 20.0
    model_ttl_s: float = 60.0


def default_data_dir(env: Mapping[str, str]) -> Path:
    """`$XDG_DATA_HOME/shoal`, the platform's own place on Windows, else `~/.local/share/shoal`."""
    if env.get("XDG_DATA_HOME"):
        return Path(env["XDG_DATA_HOME"]) / "shoal"
    if os.name == "nt" and env.get("LOCALAPPDATA"):
        return Path(env["LOCALAPPDATA"]) / "shoal"
    return Path.home() / ".local" / "share" / "shoal"


def default_config_file(env: Mapping[str, str]) -> Path:
    """`$XDG_CONFIG_HOME/shoal/config.toml`, else `~/.config/shoal/config.toml`."""
    base = Path(env["XDG_CONFIG_HOME"]) if env.get("XDG_CONFIG_HOME") else Path.home() / ".config"
    return base / "shoal" / "config.toml"


def parse_size(value: Any, name: str) -> int:
    """`6MiB`, `1.5GiB`, `800M` or a plain number of bytes, as an int of bytes."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]i?)?B?\s*", str(value), re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise ConfigProblem(name, value, "a size such as 6MiB, 1.5GiB or a number of bytes above 0")
    return int(float(match[1]) * UNITS[(match[2] or "").lower()])


def parse_api(value: Any, name: str = "api") -> tuple[str, int]:
    """`HOST:PORT` (`[::1]:8080` for IPv6; port 0 lets the system choose) as (host, port)."""
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:\s\[\]]+):(\d{1,5})", str(value))
    if match is None or int(match[2]) > 65535:
        raise ConfigProblem(name, value, "HOST:PORT, for example 127.0.0.1:8080")
    return match[1].strip("[]"), int(match[2])


def parse_layers(value: Any, name: str = "layers") -> tuple[int, int]:
    """`A:B`, half-open, as (A, B) with 0 <= A < B."""
    match = re.fullmatch(r"(\d{1,5}):(\d{1,5})", str(value))
    if match is None or int(match[1]) >= int(match[2]):
        raise ConfigProblem(name, value, "A:B with 0 <= A < B, for example 0:12")
    return int(match[1]), int(match[2])


def parse_model(value: Any, name: str = "model") -> ModelSource:
    """`DIR` or `DIR=NAME`; without a name the directory's own is taken."""
    directory, _, given = str(value).partition("=")
    own = directory.partition("@")[0] if directory.startswith("hf:") else directory
    chosen = given or (EMBEDDED if directory == EMBEDDED else Path(own).resolve().name)
    if not directory or not NAME_PATTERN.match(chosen):
        raise ConfigProblem(name, value, "DIR or DIR=NAME, the name of letters, digits and . _ : / -")
    return ModelSource(directory, chosen)


def _choice(value: Any, name: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ConfigProblem(name, value, "one of " + ", ".join(allowed))
    return str(value)


def _integer(value: Any, name: str, low: int, high: int) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = low - 1
    if isinstance(value, bool) or not low <= number <= high:
        raise ConfigProblem(name, value, f"a whole number from {low} to {high}")
    return number


def _flag(value: Any, name: str) -> bool:
    table = {
        True: True,
        False: False,
        "1": True,
        "true": True,
        "yes": True,
        "0": False,
        "false": False,
        "no": False,
    }
    key = value.lower() if isinstance(value, str) else value
    if not isinstance(key, bool | str) or key not in table:
        raise ConfigProblem(name, value, "true or false")
    return table[key]


def _strings(value: Any, name: str) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        raise ConfigProblem(name, value, "a text or a list of texts")
    return tuple(items)


def parse_tags(value: Any, name: str = "tags") -> tuple[str, ...]:
    """Tags such as `trusted`, as a sorted tuple without repeats."""
    tags = _strings(value, name)
    for tag in tags:
        if not TAG_PATTERN.fullmatch(tag):
            raise ConfigProblem(name, tag, "words of small letters, digits and -, such as trusted or metered")
    if len(set(tags)) > TAGS_MAX:
        raise ConfigProblem(name, f"{len(set(tags))} tags", f"at most {TAGS_MAX} tags")
    return tuple(sorted(set(tags)))


def _seconds(value: Any, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0.0
    if isinstance(value, bool) or not 0.1 <= number <= 86400.0:
        raise ConfigProblem(name, value, "a number of seconds from 0.1 to 86400")
    return number


def _share(value: Any, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if isinstance(value, bool) or not 0.0 <= number <= 1.0:
        raise ConfigProblem(name, value, "a number from 0 to 1")
    return number


def _megabits(value: Any, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if isinstance(value, bool) or not 0.0 <= number <= 1e6:
        raise ConfigProblem(name, value, "Mbit/s from 0 (nothing) to 1000000")
    return number


def _device(value: Any, name: str) -> str:
    if not DEVICES.fullmatch(str(value)):
        raise ConfigProblem(name, value, "cpu, cuda, cuda:N, mps or xpu, several separated by commas, or all")
    return str(value)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 4096 or any(ord(c) < 32 for c in value):
        raise ConfigProblem(name, value, "a text without control characters")
    return value


_PARSERS: dict[str, Any] = {
    "data_dir": lambda v, n: Path(_text(str(v), n)).expanduser(),
    "api": parse_api,
    "api_keys": _strings,
    "listen": _strings,
    "join": _text,
    "public": _flag,
    "mdns": _flag,
    "models": lambda v, n: tuple(parse_model(item, "model") for item in _strings(v, n)),
    "layers": parse_layers,
    "device": _device,
    "dtype": lambda v, n: _choice(v, n, DTYPES),
    "quant": lambda v, n: _choice(v, n, QUANTS),
    "kv_quant": lambda v, n: _choice(v, n, KV_QUANTS),
    "serve": _flag,
    "memory": parse_size,
    "disk": parse_size,
    "copies": lambda v, n: _integer(v, n, 1, 64),
    "concurrency": lambda v, n: _integer(v, n, 1, 4096),
    "threads": lambda v, n: _integer(v, n, 1, 1024),
    "name": lambda v, n: _text(v, n)[:63],
    "region": lambda v, n: _text(v, n)[:63],
    "tags": parse_tags,
    "require": parse_tags,
    "ends_require": parse_tags,
    "rebalance": _seconds,
    "queue": lambda v, n: _integer(v, n, 1, 100_000),
    "queue_wait": _seconds,
    "deadline": _seconds,
    "first_token": _seconds,
    "avoid": _seconds,
    "mend_wait": _seconds,
    "history": parse_size,
    "split_gain": _share,
    "relay_mbps": _megabits,
    "upload_mbps": _megabits,
    "upnp": _flag,
    "speculate": lambda v, n: _choice(v, n, SPECULATIONS),
    "log_level": lambda v, n: _choice(str(v).lower(), n, LOG_LEVELS),
}
_TARGETS = {
    "memory": "memory_bytes",
    "disk": "disk_bytes",
    "rebalance": "rebalance_s",
    "queue": "queue_max",
    "queue_wait": "queue_wait_s",
    "deadline": "deadline_s",
    "first_token": "first_token_s",
    "avoid": "avoid_s",
    "mend_wait": "mend_wait_s",
    "history": "history_bytes",
}
_LISTS = ("listen", "models", "api_keys", "tags", "require", "ends_require")


def _from_file(path: Path, required: bool) -> dict[str, Any]:
    try:
        with path.open("rb") as handle:
            document = tomllib.load(handle)
    except FileNotFoundError:
        if required:
            raise ConfigProblem("config", str(path), "an existing TOML file") from None
        return {}
    except OSError as problem:
        raise ConfigProblem("config", str(path), f"a readable TOML file ({problem.strerror})") from None
    except tomllib.TOMLDecodeError as problem:
        raise ConfigProblem("config", str(path), f"valid TOML: {problem}") from None
    unknown = sorted(set(document) - set(_PARSERS))
    if unknown:
        raise ConfigProblem(
            unknown[0], document[unknown[0]], "one of the known fields: " + ", ".join(sorted(_PARSERS))
        )
    return document


def load_config(
    flags: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> DaemonConfig:
    """Merge flags over environment over TOML file over defaults. Raises ConfigProblem.

    `flags` uses the names of `_PARSERS` (as the TOML does); None values mean "not given". Lists in the environment
    (`SHOAL_LISTEN`, `SHOAL_MODELS`, `SHOAL_TAGS` and the like) are separated by commas.
    """
    env = os.environ if env is None else env
    merged = _from_file(file or default_config_file(env), required=file is not None)
    for name in _PARSERS:
        value = env.get(f"SHOAL_{name.upper()}")
        if value:
            merged[name] = value.split(",") if name in _LISTS else value
    merged.update({name: value for name, value in (flags or {}).items() if value not in (None, [], ())})
    unknown = sorted(set(merged) - set(_PARSERS))
    if unknown:
        raise ConfigProblem(unknown[0], merged[unknown[0]], "one of " + ", ".join(sorted(_PARSERS)))
    merged.setdefault("data_dir", default_data_dir(env))
    values: dict[str, Any] = {}
    for name, value in merged.items():
        parsed = _PARSERS[name](value, name)
        if name == "api":
            values["api_host"], values["api_port"] = parsed
        else:
            values[_TARGETS.get(name, name)] = parsed
    names = [source.name for source in values.get("models", ())]
    if len(set(names)) != len(names):
        raise ConfigProblem("models", ", ".join(names), "different names for different models")
    return DaemonConfig(**values)


def describe(config: DaemonConfig) -> dict[str, Any]:
    """The configuration as JSON-able values, secrets left out: for logs and `shoal status`."""
    hidden = {"api_keys", "join"}
    return {f.name: str(getattr(config, f.name)) for f in fields(config) if f.name not in hidden}
