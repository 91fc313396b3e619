"""The flags of `shoal bench serve`. It imports nothing that takes long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def bench_serve_command(
    commands: Any,
    add: Callable[..., Any],
    count: Callable[[str], int],
    above_zero: Callable[[str], float],
) -> None:
    """`add`, `count` and `above_zero` are those of `shoal.cli_parser`."""
    serve = add(
        commands,
        "serve",
        "shoal.bench_serve:serve",
        "many clients at once, at a node that runs",
        "Send requests to a running node, and print the time to the first token (TTFT), the time for each one after\n"
        "it (TPOT), tokens a second of all together, and failures. Exit status 1 if any failed.",
        "  shoal bench serve --requests 64 --concurrency 16\n"
        "  shoal bench serve --api http://127.0.0.1:8080 --model qwen --trace azure_llm_conv_2023.csv --json",
    )
    serve.add_argument("--api", metavar="URL", help="the node to ask (default: the one on this computer)")
    serve.add_argument("--model", metavar="M", help="which model (default: the first that is ready)")
    serve.add_argument("--requests", metavar="N", type=count, default=32, help="how many (default: 32)")
    serve.add_argument("--concurrency", metavar="C", type=count, default=8, help="at once (default: 8)")
    serve.add_argument("--prompt-tokens", metavar="P", type=count, default=128, help="of each (default: 128)")
    serve.add_argument(
        "--max-tokens", metavar="T", type=count, default=64, help="of each answer (default: 64)"
    )
    serve.add_argument(
        "--trace", metavar="FILE", help="sizes and times from a trace: Azure's CSV, Mooncake's JSON lines"
    )
    serve.add_argument(
        "--speed", metavar="X", type=above_zero, default=1.0, help="play the trace X times as fast"
    )
    serve.add_argument(
        "--seed", metavar="S", type=count, default=1, help="another one, other prompts (default: 1)"
    )
    serve.add_argument("--json", action="store_true", help="print the figures as JSON")
