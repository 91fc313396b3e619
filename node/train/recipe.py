"""A run's TOML file: what is trained, on what, how, with whom. Read once, checked field by field, then frozen.

`load_recipe` reads a file, `read_recipe` a parsed one, which is also what travels to those who join (`Recipe.values`).
A wrong or unknown field is a ConfigProblem that names it and says what would be right. It opens no data and makes no
model; paths are resolved against the file's folder.
"""

from __future__ import annotations

import difflib
import glob
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from node.errors import ConfigProblem

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3")
STRATEGY_NAMES = ("diloco", "streaming", "delayed", "sparseloco", "data-parallel")
CODECS = ("fp32", "bf16", "int8", "int4", "topk")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,47}")
FILES_MAX = 100_000
KINDS = (".txt", ".text", ".md", ".py", ".jsonl", ".ndjson", ".parquet")
_NONE: Any = object()


@dataclass(frozen=True, slots=True)
class ModelRecipe:
    """A `checkpoint` (Hugging Face directory) to go on from, or the shape of a `family` from scratch. Widths in
    elements, `context` in tokens; `more` are further fields of its config.json."""

    checkpoint: Path | None = None
    family: str = "llama"
    layers: int = 4
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 32
    intermediate: int = 512
    context: int = 256
    tied: bool = True
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DataRecipe:
    """`files` of text, jsonl or parquet (their `column`); `tokenizer` "bytes", "chars" (those of the files) or a model
    directory. The share `validation` of the tokens, at the end, is never trained on. `sequence` in tokens."""

    files: tuple[Path, ...]
    column: str = "text"
    tokenizer: str = "bytes"
    validation: float = 0.05
    sequence: int = 256


@dataclass(frozen=True, slots=True)
class InnerRecipe:
    """`steps` nominal inner steps of each worker in all, of `accumulate` times `batch` sequences. The rate rises over
    `warmup` steps and falls to `final` times `lr` by `schedule`; Muon trains the layers' matrices with `matrix_lr`.
    `clip`: the gradient's norm at most (0: any). `precision` is that of products; masters are float32."""

    steps: int = 2000
    batch: int = 12
    accumulate: int = 1
    optimizer: str = "adamw"
    lr: float = 1e-3
    matrix_lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    clip: float = 1.0
    schedule: str = "cosine"
    warmup: int = 100
    final: float = 0.1
    precision: str = "float32"
    recompute: bool = False
    compile: bool = False
    seed: int = 1

    def rate(self, step: float) -> float:
        """The share of the learning rate at a nominal inner step, which counts from 0."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.schedule == "constant":
            return 1.0
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        left = 1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return self.final + (1 - self.final) * left


@dataclass(frozen=True, slots=True)
class OuterRecipe:
    """`inner_steps` is H. With `budget_s` a round's training lasts that long instead, for fast and slow workers alike,
    and counts as H nominal steps. `lr`, `momentum` None: what the strategy has."""

    strategy: str = "diloco"
    inner_steps: int = 100
    budget_s: float | None = None
    lr: float | None = None
    momentum: float | None = None
    codec: str = "int8"
    fragments: int = 4
    delay: int = 5
    alpha: float = 0.5


@dataclass(frozen=True, slots=True)
class CheckpointRecipe:
    """Every so many rounds; the last `keep` stay. `erasure`: (pieces that suffice, pieces in all) kept by peers."""

    every_rounds: int = 10
    keep: int = 3
    erasure: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class MemberRecipe:
    """Who may join: everybody in the mesh, or these peer ids or names, or those with all of `tags`. A run begins once
    `minimum` are there."""

    allow: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    minimum: int = 1


@dataclass(frozen=True, slots=True)
class EvaluationRecipe:
    """Loss on at most `sequences` of the validation share, every so many rounds (0: at the end only)."""

    every_rounds: int = 10
    sequences: int = 256


@dataclass(frozen=True, slots=True)
class Recipe:
    """One run. `values` is the whole file as JSON has it, with absolute paths."""

    name: str
    model: ModelRecipe
    data: DataRecipe
    inner: InnerRecipe
    outer: OuterRecipe
    checkpoints: CheckpointRecipe
    members: MemberRecipe
    evaluation: EvaluationRecipe
    values: Mapping[str, Any]


class Table:
    """One TOML table being read: every reader checks and remembers the name, `done` refuses what nobody asked for."""

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        self._values, self._where, self._known = values, where, set[str]()

    def name(self, field_name: str) -> str:
        return f"{self._where}.{field_name}" if self._where else field_name

    def bad(self, field_name: str, expected: str) -> ConfigProblem:
        return ConfigProblem(self.name(field_name), self._values.get(field_name), expected)

    def has(self, field_name: str) -> bool:
        self._known.add(field_name)
        return field_name in self._values

    def raw(self, field_name: str, default: Any, expected: str) -> Any:
        self._known.add(field_name)
        if field_name in self._values:
            return self._values[field_name]
        if default is _NONE:
            raise ConfigProblem(self.name(field_name), None, expected)
        return default

    def integer(self, field_name: str, low: int, high: int, default: int = _NONE) -> int:
        expected = f"a whole number from {low} to {high}"
        value = self.raw(field_name, default, expected)
        if type(value) is not int or not low <= value <= high:
            raise self.bad(field_name, expected)
        return value

    def number(self, field_name: str, low: float, high: float, default: float = _NONE) -> float:
        expected = f"a number from {low:g} to {high:g}"
        value = self.raw(field_name, default, expected)
        if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
            raise self.bad(field_name, expected)
        return float(value)

    def flag(self, field_name: str, default: bool) -> bool:
        value = self.raw(field_name, default, "")
        if type(value) is not bool:
            raise self.bad(field_name, "true or false")
        return value

    def text(self, field_name: str, default: str = _NONE, expected: str = "a text") -> str:
        value = self.raw(field_name, default, expected)
        if type(value) is not str or not value:
            raise self.bad(field_name, expected)
        return value

    def choice(self, field_name: str, allowed: Sequence[str], default: str) -> str:
        expected = "one of " + ", ".join(allowed)
        value = self.text(field_name, default, expected)
        if value not in allowed:
            raise self.bad(field_name, expected)
        return value

    def texts(self, field_name: str, default: tuple[str, ...] = _NONE) -> tuple[str, ...]:
        expected = "a text or a list of texts"
        value = self.raw(field_name, default, expected)
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or any(type(item) is not str or not item for item in items):
            raise self.bad(field_name, expected)
        return tuple(items)

    def pair(
        self, field_name: str, low: float, high: float, default: tuple[float, float]
    ) -> tuple[float, float]:
        value = self.raw(field_name, list(default), "")
        if (
            not isinstance(value, list)
            or len(value) != 2
            or any(type(one) not in (int, float) or not low <= one <= high for one in value)
        ):
            raise self.bad(field_name, f"two numbers from {low:g} to {high:g}")
        return value[0], value[1]

    def table(self, field_name: str) -> Table:
        value = self.raw(field_name, {}, "")
        if not isinstance(value, Mapping):
            raise self.bad(field_name, f"a table: [{self.name(field_name)}]")
        return Table(value, self.name(field_name))

    def mapping(self, field_name: str) -> Mapping[str, Any]:
        value = self.raw(field_name, {}, "")
        if not isinstance(value, Mapping):
            raise self.bad(field_name, f"a table: [{self.name(field_name)}]")
        return value

    def done(self) -> None:
        for found in self._values:
            if found not in self._known:
                near = difflib.get_close_matches(found, self._known, 1)
                hint = f"{near[0]!r} is meant?" if near else "one of " + ", ".join(sorted(self._known))
                raise ConfigProblem(self.name(found), self._values[found], f"no such field; {hint}")


def load_recipe(path: Path) -> Recipe:
    """Reads a run's file. Raises ConfigProblem."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigProblem(str(path), error.strerror or str(error), "a readable TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigProblem(str(path), str(error), "a well-formed TOML file") from None
    return read_recipe(values, path.parent, default_name=path.stem)


def read_recipe(values: Mapping[str, Any], folder: Path, default_name: str = _NONE) -> Recipe:
    """The run that parsed TOML or JSON describes; paths are relative to `folder`. Raises ConfigProblem."""
    top = Table(values)
    name = top.text("name", default_name)
    if not NAME.fullmatch(name):
        raise ConfigProblem("name", name, "at most 48 letters, digits and . _ -, such as tiny-stories")
    inner = _inner(top.table("train"))
    model = _model(top.table("model"), folder)
    data = _data(top.table("data"), folder, model)
    outer = _outer(top.table("outer"))
    if outer.inner_steps > inner.steps:
        raise ConfigProblem("outer.inner_steps", outer.inner_steps, f"at most train.steps = {inner.steps}")
    recipe = Recipe(
        name,
        model,
        data,
        inner,
        outer,
        _checkpoints(top.table("checkpoints")),
        _members(top.table("members")),
        _evaluation(top.table("evaluation")),
        _absolute(values, name, model, data),
    )
    top.done()
    return recipe


def _absolute(values: Mapping[str, Any], name: str, model: ModelRecipe, data: DataRecipe) -> dict[str, Any]:
    found = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    found["name"] = name
    found["data"] |= {"files": [str(path) for path in data.files], "tokenizer": data.tokenizer}
    if model.checkpoint is not None:
        found["model"]["checkpoint"] = str(model.checkpoint)
    return found


def _model(table: Table, folder: Path) -> ModelRecipe:
    if table.has("checkpoint"):
        path = folder / Path(table.text("checkpoint")).expanduser()
        if not (path / "config.json").is_file():
            raise table.bad("checkpoint", "a Hugging Face model directory (it has a config.json)")
        table.done()
        return ModelRecipe(checkpoint=path.absolute())
    family = table.choice("family", FAMILIES, "llama")
    hidden = table.integer("hidden", 8, 1 << 16, 128)
    heads = table.integer("heads", 1, 1 << 10, 4)
    kv_heads = table.integer("kv_heads", 1, heads, heads)
    if heads % kv_heads:
        raise table.bad("kv_heads", f"a divisor of heads = {heads}")
    if not table.has("head_dim") and hidden % heads:
        raise table.bad("hidden", f"a multiple of heads = {heads}, or head_dim beside it")
    head_dim = table.integer("head_dim", 2, 4096, hidden // heads)
    if head_dim % 2:
        raise table.bad("head_dim", "an even number: halves of a head are rotated")
    found = ModelRecipe(
        None,
        family,
        table.integer("layers", 1, 4096, 4),
        hidden,
        heads,
        kv_heads,
        head_dim,
        table.integer("intermediate", 1, 1 << 20, 4 * hidden),
        table.integer("context", 2, 1 << 24, 256),
        table.flag("tied", True),
        dict(table.mapping("more")),
    )
    table.done()
    return found


def _data(table: Table, folder: Path, model: ModelRecipe) -> DataRecipe:
    files: list[Path] = []
    for pattern in table.texts("files"):
        matches = sorted(glob.glob(str(folder / Path(pattern).expanduser()), recursive=True))
        if not matches:
            raise ConfigProblem(
                table.name("files"), pattern, "files that exist, or a pattern such as texts/*.jsonl"
            )
        files += [Path(found).absolute() for found in matches if Path(found).is_file()]
    if not 1 <= len(files) <= FILES_MAX:
        raise ConfigProblem(table.name("files"), f"{len(files)} files", f"from 1 to {FILES_MAX} files")
    for path in files:
        if path.suffix.lower() not in KINDS:
            raise ConfigProblem(table.name("files"), str(path), f"files that end in {', '.join(KINDS)}")
    tokenizer = table.text("tokenizer", "bytes" if model.checkpoint is None else str(model.checkpoint))
    if tokenizer not in ("bytes", "chars"):
        path = (folder / Path(tokenizer).expanduser()).absolute()
        if not (path / "tokenizer.json").is_file():
            raise table.bad("tokenizer", "bytes, chars, or a model directory with a tokenizer.json")
        tokenizer = str(path)
    longest = model.context if model.checkpoint is None else 1 << 24
    found = DataRecipe(
        tuple(files),
        table.text("column", "text"),
        tokenizer,
        table.number("validation", 0.0, 0.5, 0.05),
        table.integer("sequence", 1, longest, min(256, longest)),
    )
    table.done()
    return found


def _inner(table: Table) -> InnerRecipe:
    first, second = table.pair("betas", 0.0, 0.99999, (0.9, 0.99))
    steps = table.integer("steps", 1, 1 << 40, 2000)
    found = InnerRecipe(
        steps,
        table.integer("batch", 1, 1 << 16, 12),
        table.integer("accumulate", 1, 1 << 16, 1),
        table.choice("optimizer", ("adamw", "muon"), "adamw"),
        table.number("lr", 1e-9, 10.0, 1e-3),
        table.number("matrix_lr", 1e-9, 10.0, 1e-2),
        (first, second),
        table.number("weight_decay", 0.0, 10.0, 0.1),
        table.number("clip", 0.0, 1e6, 1.0),
        table.choice("schedule", ("cosine", "linear", "constant"), "cosine"),
        table.integer("warmup", 0, 1 << 40, min(100, steps // 10)),
        table.number("final", 0.0, 1.0, 0.1),
        table.choice("precision", ("float32", "bfloat16"), "float32"),
        table.flag("recompute", False),
        table.flag("compile", False),
        table.integer("seed", 0, (1 << 63) - 1, 1),
    )
    table.done()
    return found


def _outer(table: Table) -> OuterRecipe:
    strategy = table.choice("strategy", STRATEGY_NAMES, "diloco")
    default = {"streaming": "int4", "sparseloco": "topk", "data-parallel": "fp32"}.get(strategy, "int8")
    codec = table.choice("codec", CODECS, default)
    if codec == "topk" and strategy != "sparseloco":
        raise table.bad("codec", "fp32, bf16, int8 or int4: topk is for the strategy sparseloco")
    steps = table.integer("inner_steps", 1, 1 << 30, 1 if strategy == "data-parallel" else 100)
    if strategy == "data-parallel" and steps != 1:
        raise table.bad("inner_steps", "1: data-parallel reduces every step")
    found = OuterRecipe(
        strategy,
        steps,
        table.number("budget_s", 0.01, 86400.0) if table.has("budget_s") else None,
        table.number("lr", 1e-9, 100.0) if table.has("lr") else None,
        table.number("momentum", 0.0, 0.9999) if table.has("momentum") else None,
        codec,
        table.integer("fragments", 1, 64, 4),
        table.integer("delay", 0, max(0, steps - 1), min(5, max(0, steps - 1))),
        table.number("alpha", 0.0, 1.0, 0.5),
    )
    if found.budget_s is not None and strategy == "data-parallel":
        raise table.bad("budget_s", "nothing: data-parallel reduces every step")
    table.done()
    return found


def _checkpoints(table: Table) -> CheckpointRecipe:
    erasure = None
    if table.has("erasure"):
        enough, every = table.pair("erasure", 1, 255, (2, 3))
        if type(enough) is not int or type(every) is not int or enough > every:
            raise table.bad("erasure", "[pieces that suffice, pieces in all], such as [2, 3]")
        erasure = (enough, every)
    every_rounds = table.integer("every_rounds", 1, 1 << 30, 10)
    found = CheckpointRecipe(every_rounds, table.integer("keep", 1, 1000, 3), erasure)
    table.done()
    return found


def _members(table: Table) -> MemberRecipe:
    found = MemberRecipe(
        table.texts("allow", ()), table.texts("tags", ()), table.integer("minimum", 1, 10_000, 1)
    )
    table.done()
    return found


def _evaluation(table: Table) -> EvaluationRecipe:
    found = EvaluationRecipe(
        table.integer("every_rounds", 0, 1 << 30, 10), table.integer("sequences", 1, 1 << 20, 256)
    )
    table.done()
    return found
