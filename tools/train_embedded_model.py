"""Rebuilds the embedded model from nothing: `make train-embedded`, or this script alone.

It trains a byte-level BPE tokenizer and a four-million-parameter Llama on the Python standard library's own sources,
as found beside the interpreter that runs it, and writes a Hugging Face directory (bf16 safetensors). It needs torch,
tokenizers, safetensors and nothing of Shoal's; the model is written out here in full so that the file also says what
the embedded model is. A run may be killed: it goes on from its checkpoint. With `--steps` the learning rate depends on
the step alone and a run can be repeated; with `--minutes` it depends on the clock, and machines differ.
It knows nothing of how the mesh loads or serves a model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

END_OF_TEXT = "<|endoftext|>"
ARTEFACT_BYTES_MAX = 8_000_000
CORPUS_FILE_BYTES_MAX = 400_000
# Left out: what is not the library's own prose (packages installed into it), test suites and their fixtures, and tables
# (code pages, help topics, build settings), which would teach the model little but digits.
EXCLUDED_FOLDERS = frozenset(
    {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "encodings",
        "_bundled",
    }
)
EXCLUDED_PREFIXES = ("_sysconfigdata", "config-", "test_", "_pydoc")
# A line's end and its indentation are pieces of their own, whatever stands beside them. Prompts often end after either
# of them and must then be cut as in training: GPT-2's pattern joins a line's end to the next line's indentation, and a
# model trained on that cannot go on with an indented line after a prompt that ends a line.
PIECES = r"\n|(?<=\n)[ \t]+| ?[\p{L}_]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+|\s+?(?=\n)|\s+"
Optimizers = list[torch.optim.Optimizer]
SAMPLE_PROMPT = "def read_file(path):\n"


@dataclass(frozen=True, slots=True)
class Shape:
    """The architecture, in Hugging Face's terms for a Llama."""

    vocab: int = 4096
    hidden: int = 192
    layers: int = 8
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32
    intermediate: int = 480
    context_tokens: int = 1024
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5


@dataclass(frozen=True, slots=True)
class Recipe:
    """How it is trained. Exactly one of `minutes` and `steps` bounds the run."""

    minutes: float | None
    steps: int | None
    seed: int
    threads: int
    sequence_tokens: int
    batch_tokens: int
    matrix_lr: float
    vector_lr: float
    weight_decay: float
    warmup_steps: int
    compile: bool
    # One step in so many sees whole contexts, so that positions beyond `sequence_tokens` are trained too. All along: to
    # begin with them late undid much of what the short ones had taught.
    whole_context_every: int = 4


def find_corpus() -> list[Path]:
    """The standard library's own modules, in a stable order."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if EXCLUDED_FOLDERS.intersection(relative.parts[:-1]):
            continue
        if relative.name.startswith(EXCLUDED_PREFIXES) or path.stat().st_size > CORPUS_FILE_BYTES_MAX:
            continue
        found.append(path)
    return found


def read_corpus(paths: list[Path]) -> tuple[list[str], list[str]]:
    """(training texts, validation texts); about one file in twenty-five, by the hash of its name, is held out."""
    train: list[str] = []
    held_out: list[str] = []
    root = sysconfig.get_path("stdlib")
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if not text.strip():
            continue
        held = hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()[0] < 256 // 25
        (held_out if held else train).append(text)
    return train, held_out


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    """Byte-level BPE within the pieces that PIECES cuts; token 0 is the end of a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenise(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """int64 [n]: every text followed by the end-of-text token; the first is preceded by one too."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = [end]
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        ids.extend(encoding.ids)
        ids.append(end)
    return torch.tensor(ids, dtype=torch.int64)


def rotary_table(shape: Shape) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [context, head_dim], in Llama's half-split layout."""
    inverse = 1.0 / shape.rope_theta ** (
        torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    )
    angles = torch.outer(torch.arange(shape.context_tokens, dtype=torch.float32), inverse)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [batch, heads, tokens, head_dim]."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.q_proj = nn.Linear(shape.hidden, shape.heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.head_dim, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        dim = self.shape.head_dim
        q = self.q_proj(x).view(batch, tokens, self.shape.heads, dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, tokens, self.shape.kv_heads, dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, tokens, self.shape.kv_heads, dim).transpose(1, 2)
        groups = self.shape.heads // self.shape.kv_heads
        k = rotate(k, cos, sin).repeat_interleave(groups, dim=1)
        v = v.repeat_interleave(groups, dim=1)
        # Spelt out because torch's fused backward in bf16 on a CPU takes half as long again (measured at 256 tokens).
        scores = (rotate(q, cos, sin) * dim**-0.5) @ k.transpose(-1, -2) + self.causal_mask(tokens, x.dtype)
        mixed = torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype) @ v
        out: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, tokens, -1))
        return out

    @staticmethod
    def causal_mask(tokens: int, dtype: torch.dtype) -> Tensor:
        return torch.full((tokens, tokens), float("-inf"), dtype=dtype).triu(1)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """One pre-norm block; attribute names are the checkpoint's tensor names."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        self.mlp = FeedForward(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Llama(nn.Module):
    """Tokens int64 [batch, tokens] to logits [batch, tokens, vocab]; the head is the embedding's transpose."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        cos, sin = rotary_table(shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * shape.layers) if residual else 1.0))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.bfloat16)
        length = tokens.shape[1]
        cos, sin = self.get_buffer("cos")[:length].to(x.dtype), self.get_buffer("sin")[:length].to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x), self.embed_tokens.weight)


def make_optimizers(model: Llama, recipe: Recipe) -> Optimizers:
    """Muon (Jordan 2024, in torch since 2.9) for the layers' matrices, AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and name.startswith("layers.")]
    embedding = [model.embed_tokens.weight]
    norms = [p for p in model.parameters() if p.dim() == 1]
    return [
        torch.optim.Muon(
            matrices,
            lr=recipe.matrix_lr,
            weight_decay=recipe.weight_decay,
            momentum=0.95,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            [
                {"params": embedding, "weight_decay": recipe.weight_decay},
                {"params": norms, "weight_decay": 0.0},
            ],
            lr=recipe.vector_lr,
            betas=(0.9, 0.95),
            fused=True,
        ),
    ]


def rate(step: int, progress: float, recipe: Recipe) -> float:
    """Linear warm-up by steps, then a cosine by progress in [0, 1] down to a fiftieth."""
    warm = min(1.0, (step + 1) / recipe.warmup_steps)
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def sample_batch(data: Tensor, step: int, sequence: int, recipe: Recipe) -> Tensor:
    """int64 [batch, sequence + 1], a function of (seed, step) so that a resumed run sees what it would have seen."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    starts = torch.randint(
        0, len(data) - sequence - 1, (recipe.batch_tokens // sequence,), generator=generator
    )
    return torch.stack([data[start : start + sequence + 1] for start in starts.tolist()])


def fast_bf16() -> bool:
    """Whether this processor multiplies bf16 faster than float32."""
    cpu = torch.backends.cpu.get_cpu_capability()
    flags = Path("/proc/cpuinfo")
    text = flags.read_text() if flags.exists() else ""
    return cpu == "AVX512" and ("amx_bf16" in text or "avx512_bf16" in text)


def loss_of(model: nn.Module, batch: Tensor, bf16: bool) -> Tensor:
    """Mean cross-entropy in nats a token."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(batch[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def windows(data: Tensor, sequence: int) -> Iterator[Tensor]:
    for start in range(0, len(data) - sequence - 1, sequence):
        yield data[start : start + sequence + 1].unsqueeze(0)


@torch.no_grad()
def evaluate(model: Llama, data: Tensor, bf16: bool) -> float:
    """Mean loss over windows of half a context, or of what there is."""
    sequence = min(model.shape.context_tokens // 2, len(data) - 2)
    losses = [loss_of(model, window, bf16).item() for window in windows(data, sequence)]
    return sum(losses) / len(losses)


@torch.no_grad()
def complete(model: Llama, tokenizer: Tokenizer, prompt: str, tokens_max: int = 60) -> str:
    """Greedy continuation, recomputed in full for every token: slow, and obviously right."""
    ids = tokenizer.encode(prompt).ids
    for _ in range(tokens_max):
        token = int(model(torch.tensor([ids[-model.shape.context_tokens :]]))[0, -1].argmax())
        if token == tokenizer.token_to_id(END_OF_TEXT):
            break
        ids.append(token)
    return tokenizer.decode(ids)


def save_checkpoint(path: Path, model: Llama, optimizers: Optimizers, step: int, seconds: float) -> None:
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for n, optimizer in enumerate(optimizers):
        for key, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                tensors[f"optimizer.{n}.{key}.{name}"] = torch.as_tensor(value)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"step": str(step), "seconds": str(seconds)})
    os.replace(partial, path)


def load_checkpoint(path: Path, model: Llama, optimizers: Optimizers) -> tuple[int, float]:
    """(steps done, seconds spent); loads everything in place."""
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        metadata = file.metadata()
    model.load_state_dict(
        {key[len("model.") :]: value for key, value in tensors.items() if key.startswith("model.")}
    )
    for n, optimizer in enumerate(optimizers):
        full = optimizer.state_dict()
        for key, value in tensors.items():
            parts = key.split(".")
            if parts[:2] == ["optimizer", str(n)]:
                full["state"].setdefault(int(parts[2]), {})[parts[3]] = value
        optimizer.load_state_dict(full)
    return int(metadata["step"]), float(metadata["seconds"])


def train(
    model: Llama, data: Tensor, held_out: Tensor, tokenizer: Tokenizer, recipe: Recipe, checkpoint: Path
) -> dict[str, float]:
    """Trains in place and returns the figures."""
    bf16 = fast_bf16()
    optimizers = make_optimizers(model, recipe)
    base = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    step, before = load_checkpoint(checkpoint, model, optimizers) if checkpoint.exists() else (0, 0.0)
    batch_loss = torch.compile(loss_of, dynamic=False) if recipe.compile else loss_of
    started = last_saved = time.monotonic()
    recent: list[float] = []
    while True:
        spent = before + time.monotonic() - started
        progress = step / recipe.steps if recipe.steps is not None else spent / ((recipe.minutes or 0) * 60)
        if progress >= 1:
            break
        whole = step % recipe.whole_context_every == 0
        sequence = model.shape.context_tokens if whole else recipe.sequence_tokens
        scale = rate(step, progress, recipe)
        for optimizer, rates in zip(optimizers, base, strict=True):
            for group, lr in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = lr * scale
        loss = batch_loss(model, sample_batch(data, step, sequence, recipe), bf16)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        recent = [*recent[-49:], loss.item()]
        step += 1
        if step % 25 == 0:
            report = f"step {step} progress {progress:.3f} loss {sum(recent) / len(recent):.3f}"
            print(f"{report} {step * recipe.batch_tokens / spent:.0f} tokens/s", flush=True)
        if step % 500 == 0:
            print(f"validation {evaluate(model, held_out[:20_000], bf16):.3f}", flush=True)
            print(complete(model, tokenizer, SAMPLE_PROMPT), flush=True)
        if time.monotonic() - last_saved > 60:
            last_saved = time.monotonic()
            save_checkpoint(checkpoint, model, optimizers, step, before + last_saved - started)
    save_checkpoint(checkpoint, model, optimizers, step, before + time.monotonic() - started)
    return {
        "steps": step,
        "tokens": step * recipe.batch_tokens,
        "train_loss": sum(recent) / max(1, len(recent)),
    }


def config_of(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": 0,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.context_tokens,
        "mlp_bias": False,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": shape.norm_eps,
        "rope_scaling": None,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": shape.vocab,
    }


def tokenizer_config_of(shape: Shape) -> dict[str, object]:
    # It completes code and was never taught turns, so a chat is its messages' text, one after the other.
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": shape.context_tokens,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": "{% for message in messages %}{{ message['content'] }}{{ '\\n' }}{% endfor %}",
    }


def write_model(model: Llama, tokenizer: Tokenizer, out: Path, figures: dict[str, float]) -> None:
    """Writes the whole directory beside `out` and renames it into place, so that `out` is never half a model."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {
        f"model.{k}": v.detach().to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()
    }
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    os.chmod(partial / "model.safetensors", 0o644)
    compact = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))
    (partial / "tokenizer.json").write_text(compact + "\n", encoding="utf-8")
    texts = {
        "config.json": config_of(model.shape),
        "tokenizer_config.json": tokenizer_config_of(model.shape),
        "generation_config.json": {"eos_token_id": 0, "do_sample": False},
        "training.json": figures,
    }
    for name, value in texts.items():
        (partial / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in partial.iterdir())
    if size > ARTEFACT_BYTES_MAX:
        raise SystemExit(
            f"{partial} takes {size} bytes, at most {ARTEFACT_BYTES_MAX} are allowed: make the shape smaller"
        )
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    os.replace(partial, out)
    shutil.rmtree(old, ignore_errors=True)
    print(f"wrote {out}: {size} bytes")


def parse(argv: list[str]) -> tuple[argparse.Namespace, Recipe]:
    parser = argparse.ArgumentParser(
        description="Train Shoal's embedded model on the standard library's sources."
    )
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--work", type=Path, help="where the checkpoint lives (default: OUT.work)")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, help="time budget (default: 55)")
    budget.add_argument("--steps", type=int, help="step budget instead: repeatable on one kind of machine")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--matrix-lr", type=float, default=1e-2)
    parser.add_argument("--vector-lr", type=float, default=1e-2)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--compile", action="store_true", help="torch.compile: needs a C++ compiler")
    args = parser.parse_args(argv)
    minutes = args.minutes if args.minutes is not None or args.steps is not None else 55.0
    recipe = Recipe(
        minutes=minutes,
        steps=args.steps,
        seed=args.seed,
        threads=args.threads,
        sequence_tokens=args.sequence,
        batch_tokens=args.batch_tokens,
        matrix_lr=args.matrix_lr,
        vector_lr=args.vector_lr,
        weight_decay=args.weight_decay,
        warmup_steps=args.warmup,
        compile=args.compile,
    )
    return args, recipe


def main(argv: list[str]) -> None:
    args, recipe = parse(argv)
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    work: Path = args.work or args.out.with_name(args.out.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    shape = Shape()
    train_texts, held_texts = read_corpus(find_corpus())
    tokenizer = train_tokenizer(train_texts, shape.vocab)
    data, held_out = tokenise(tokenizer, train_texts), tokenise(tokenizer, held_texts)
    model = Llama(shape)
    count = sum(p.numel() for p in model.parameters())
    print(
        f"{len(train_texts)} files, {len(data)} training tokens, {len(held_out)} held out, {count} parameters",
        flush=True,
    )
    figures = train(model, data, held_out, tokenizer, recipe, work / "checkpoint.safetensors")
    figures["validation_loss"] = evaluate(model, held_out, fast_bf16())
    figures["held_out_tokens"] = len(held_out)
    print(json.dumps(figures))
    print(complete(model, tokenizer, SAMPLE_PROMPT))
    write_model(model, tokenizer, args.out, {key: round(value, 4) for key, value in figures.items()})


if __name__ == "__main__":
    main(sys.argv[1:])
