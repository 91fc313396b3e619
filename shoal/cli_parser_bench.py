"""The flags of `shoal bench`. It imports nothing that takes long."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.cli_parser_blobs import bench_blobs_command
from shoal.cli_parser_rpc import bench_rpc_command
from shoal.cli_parser_serve import bench_serve_command


@dataclass(frozen=True, slots=True)
class Tools:
    """Those of `shoal.cli_parser`."""

    add: Callable[..., Any]
    json: Callable[[Any, str], None]
    count: Callable[[str], int]
    positive: Callable[[str], float]


def share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def _decode(what: Any, tools: Tools) -> None:
    decode = tools.add(
        what,
        "decode",
        "shoal.bench_decode:decode",
        "reading prompts and writing tokens with a whole model on this machine",
        "Load a model, read prompts and decode greedily, and print tokens a second beside how fast weights were\n"
        "read and how fast this machine can read. With --config a random model of that shape is made.",
        "  shoal bench decode --model ~/models/Qwen3-8B --quant int4\n"
        "  shoal bench decode --config config.json --batch 16 --json",
    )
    source = decode.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="DIR", type=Path, help="a Hugging Face model directory")
    source.add_argument("--config", metavar="FILE", type=Path, help="a config.json: weights are random")
    decode.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="default: bfloat16"
    )
    decode.add_argument("--quant", choices=("none", "int8", "int4"), default="none", help="default: none")
    decode.add_argument("--device", metavar="D", default="cpu", help="a torch device (default: cpu)")
    decode.add_argument(
        "--batch", metavar="B", type=tools.count, default=1, help="requests at once (default: 1)"
    )
    decode.add_argument("--prompt-tokens", metavar="P", type=tools.count, default=128, help="default: 128")
    decode.add_argument("--new-tokens", metavar="N", type=tools.count, default=64, help="default: 64")
    decode.add_argument(
        "--threads", metavar="N", type=tools.count, help="of the processor (default: torch's)"
    )
    decode.add_argument(
        "--speculate",
        choices=("lookup", "draft"),
        help="one request, with guesses at several tokens a pass and without, in turn",
    )
    decode.add_argument("--draft", metavar="DIR", type=Path, help="a small model of the same vocabulary")
    tools.json(decode, "the figures")


def bench_commands(
    commands: Any,
    add: Callable[..., Any],
    json: Callable[[Any, str], None],
    count: Callable[[str], int],
    positive: Callable[[str], float],
) -> None:
    """The last four are those of `shoal.cli_parser`."""
    tools = Tools(add, json, count, positive)
    bench = add(commands, "bench", None, "measure how fast something is on this machine")
    what = bench.add_subparsers(dest="what", metavar="WHAT", required=True, title="what")
    _plan(what, tools)
    _decode(what, tools)
    bench_blobs_command(what, tools.add, tools.count, tools.positive)
    bench_rpc_command(what, add, count)
    bench_serve_command(what, add, count, positive)
    _diloco(what, tools)
    _allreduce(what, tools)


def _plan(what: Any, tools: Tools) -> None:
    plan = tools.add(
        what,
        "plan",
        "shoal.bench_plan:plan",
        "planning and routing over meshes of 40, 1,000 and 10,000 nodes",
        examples="  shoal bench plan --json\n  shoal bench plan --nodes 1000",
    )
    plan.add_argument(
        "--nodes",
        metavar="N",
        type=tools.count,
        default=10_000,
        help="leave out larger meshes (default: 10000)",
    )
    tools.json(plan, "the figures")


def _allreduce(what: Any, tools: Tools) -> None:
    allreduce = tools.add(
        what,
        "allreduce",
        "shoal.bench_allreduce:allreduce",
        "the mean of tensors over separate processes, encrypted, on loopback",
        "Start N processes on this machine that average tensors through real, encrypted links, and print how\n"
        "long a round takes (agreement and votes included), how exact it is and what it costs.",
        "  shoal bench allreduce --peers 4 --mib 64\n"
        "  shoal bench allreduce --peers 4 --codec int8 --rate-mbit 100 --json",
    )
    allreduce.add_argument("--peers", metavar="N", type=tools.count, default=2, help="processes (default: 2)")
    allreduce.add_argument(
        "--mib",
        metavar="M",
        type=tools.positive,
        default=64.0,
        help="fp32 tensors of each peer, in MiB (default: 64)",
    )
    allreduce.add_argument(
        "--codec",
        choices=("fp32", "bf16", "int8", "int4", "topk"),
        default="fp32",
        help="how the numbers travel (default: fp32)",
    )
    allreduce.add_argument(
        "--rounds", metavar="R", type=tools.count, default=7, help="rounds measured (default: 7)"
    )
    allreduce.add_argument(
        "--rate-mbit",
        "--link-mbps",
        metavar="X",
        type=tools.positive,
        help="let each peer send X Mbit/s at most (default: no limit)",
    )
    tools.json(allreduce, "the figures")


def _diloco(what: Any, tools: Tools) -> None:
    bench = tools.add(
        what,
        "diloco",
        "shoal.bench_diloco:diloco",
        "loss and bytes of training apart, against data parallel training on as many tokens",
        "Train a small model (4 layers, width 128, 64 characters) on FILE with W workers in this process, by a\n"
        "strategy that mostly trains apart and by synchronous data parallel, and print the loss on held-out text\n"
        "and the bytes that a worker sends.",
        "  shoal bench diloco --corpus shakespeare.txt --workers 4 --inner-steps 25 --steps 500 --codec int8\n"
        "  shoal bench diloco --corpus shakespeare.txt --streaming --inner-steps 60 --churn 0.33 --json",
    )
    bench.add_argument("--corpus", metavar="FILE", type=Path, required=True, help="a text")
    bench.add_argument("--workers", metavar="W", type=tools.count, default=4, help="default: 4")
    bench.add_argument("--inner-steps", metavar="H", type=tools.count, default=25, help="default: 25")
    bench.add_argument(
        "--steps", metavar="N", type=tools.count, default=500, help="of each worker (default: 500)"
    )
    bench.add_argument(
        "--codec", choices=("fp32", "bf16", "int8", "int4", "topk"), help="default: the strategy's own"
    )
    bench.add_argument("--streaming", action="store_true", help="the same as --strategy streaming")
    bench.add_argument(
        "--strategy", choices=("diloco", "streaming", "delayed", "sparseloco"), help="default: diloco"
    )
    bench.add_argument(
        "--fragments", metavar="P", type=tools.count, default=4, help="of streaming (default: 4)"
    )
    bench.add_argument(
        "--delay", metavar="TAU", type=tools.count, default=5, help="of streaming, in steps (default: 5)"
    )
    bench.add_argument("--alpha", metavar="A", type=share, default=0.5, help="of streaming (default: 0.5)")
    bench.add_argument("--outer-lr", metavar="X", type=tools.positive, help="default: the strategy's own")
    bench.add_argument("--outer-momentum", metavar="X", type=share, help="default: the strategy's own")
    bench.add_argument(
        "--lr", metavar="X", type=tools.positive, default=1e-3, help="of AdamW (default: 0.001)"
    )
    bench.add_argument(
        "--inner-lr", metavar="X", type=tools.positive, help="of those who train apart (default: --lr)"
    )
    bench.add_argument("--compile", action="store_true", help="the model's loss: worth it from 500 steps on")
    bench.add_argument(
        "--precision", choices=("float32", "bfloat16"), default="bfloat16", help="default: bfloat16"
    )
    _diloco_more(bench, tools)
    tools.json(bench, "the figures")


def _diloco_more(bench: Any, tools: Tools) -> None:
    """What is measured besides."""
    bench.add_argument("--seed", metavar="S", type=int, default=1, help="default: 1")
    bench.add_argument(
        "--threads", metavar="N", type=tools.count, default=1, help="of the processor (default: 1)"
    )
    bench.add_argument(
        "--churn", metavar="SHARE", type=share, default=0.0, help="kill and replace this share of the workers"
    )
    bench.add_argument("--alone", action="store_true", help="without the data parallel run")
    bench.add_argument(
        "--link-mbps",
        metavar="X",
        type=tools.positive,
        help="also the share of time computing over such links, 30 M parameters, from measured parts",
    )
    bench.add_argument(
        "--link-batch", metavar="B", type=tools.count, default=4, help="there: sequences (default: 4)"
    )
    bench.add_argument(
        "--step-s", metavar="S", type=tools.positive, help="there: a step's time instead of measuring it"
    )
    bench.add_argument(
        "--failure-every",
        metavar="S",
        type=tools.positive,
        action="append",
        default=[],
        help="also the share that counts if a worker dies every S seconds; may be repeated",
    )
    bench.add_argument(
        "--away-s",
        metavar="S",
        type=tools.positive,
        default=5.0,
        help="until its replacement trains (default: 5 s)",
    )
