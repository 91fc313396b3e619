"""The words of the command line: every command, flag, help text and example.

It imports nothing but argparse, and names each command's function as `module:function`, so that parsing
costs no more than a few milliseconds. What a flag's value means to the daemon is checked by `node.config`.
"""

from __future__ import annotations

import argparse
import re
from typing import Any, NoReturn

from shoal import __version__
from shoal.cli_parser_bench import bench_commands
from shoal.cli_parser_drop import drop_command
from shoal.cli_parser_member import member_commands
from shoal.cli_parser_testnet import testnet_commands
from shoal.cli_parser_train import train_command

TTL_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}

OVERVIEW = """\
Pool your own computers into one machine that serves language models.

  shoal up                          start this computer's node, and an OpenAI endpoint on it
  shoal invite                      print an invite; on another computer: shoal join INVITE
  shoal add DIR --name NAME         share a Hugging Face model directory with the mesh
  shoal run NAME "prompt"           ask it
"""


PLAN = """\
Say where a model would go, before anything is loaded, and what is missing where it does not fit.

With MODEL, a name in the mesh or a Hugging Face model directory, the mesh is planned as it is now.
With --input, machines that need not exist are; nothing is then asked over a network. The file is a JSON object:
  model   layers, layer_bytes, embed_bytes, head_bytes, layer_flops_per_token, hidden_bytes,
          kv_bytes_per_token_per_layer; optional tied
  nodes   a list of id, tflops, memory_gib, bandwidth_gbps; optional link_mbps
and, each optional: hop_ms, hop_ms_between, context_tokens, batch, weight_fraction, prefer"""


class Parser(argparse.ArgumentParser):
    """argparse with one plain line for wrong usage, and help texts that keep their line breaks."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        unknown = re.match(
            r"argument (COMMAND|ACTION): invalid choice: ('[^']*') \(choose from (.*)\)", message
        )
        if unknown:
            message = f"there is no {unknown[1].lower()} {unknown[2]}, only {unknown[3].replace(chr(39), '')}"
        self.exit(2, f"shoal: {message}; see: {self.prog} --help\n")


def ttl(text: str) -> float:
    """`24h`, `30m`, `7d` or `90s` as seconds."""
    match = re.fullmatch(r"(\d{1,6})([smhd])", text.strip().lower())
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a time such as 30m, 24h or 7d")
    return float(int(match[1]) * TTL_UNITS_S[match[2]])


def count(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return int(text)


def positive(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number above 0")
    return value


def share(text: str) -> float:
    """A number from 0 up; 0.2 is a fifth."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1000:
        raise argparse.ArgumentTypeError(f"'{text}' is not a share such as 0.2")
    return value


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(
        prog="shoal",
        description=OVERVIEW,
        usage="shoal COMMAND [options]",
        epilog="Each command explains itself: shoal COMMAND --help",
    )
    parser.add_argument("--version", action="version", version=f"shoal {__version__}")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, title="commands", prog="shoal"
    )
    _node_commands(commands)
    _mesh_commands(commands)
    member_commands(commands, _add, _where, ttl)
    _model_commands(commands)
    drop_command(commands, _add, _where)
    train_command(commands, _add, _where)
    _plan_command(commands)
    _sim_command(commands)
    bench_commands(commands, _add, _json, count, positive)
    testnet_commands(commands, _add, count, positive)
    _demo_command(commands)
    return parser


def _add(commands: Any, name: str, run: str | None, short: str, text: str = "", examples: str = "") -> Parser:
    epilog = f"examples:\n{examples}" if examples else None
    child: Parser = commands.add_parser(
        name, help=short, description=text or short[0].upper() + short[1:] + ".", epilog=epilog
    )
    if run is not None:
        child.set_defaults(run=run)
    return child


def _where(parser: Parser) -> None:
    group = parser.add_argument_group("which daemon")
    group.add_argument(
        "--data-dir", metavar="DIR", help="data directory of the daemon (default: the user's own)"
    )
    group.add_argument("--api", metavar="URL", help="address of a daemon's API, instead of a data directory")


def _json(parser: Parser, what: str) -> None:
    parser.add_argument("--json", action="store_true", help=f"print {what} as JSON")


def _node_commands(commands: Any) -> None:
    up = _add(
        commands,
        "up",
        "shoal.cli_up:up",
        "start this computer's node and serve its API",
        "Start this computer's node in the foreground: found a mesh, or go on with the one it belongs to.\n"
        "When it serves, stdout gets one line: ready api=URL peer=ID. Ctrl-C stops it cleanly.",
        "  shoal up                              a node, http://127.0.0.1:8080/v1, the built-in model\n"
        "  shoal up --model ~/models/qwen=qwen --memory 12GiB\n"
        "  shoal up --data-dir /tmp/second --api 127.0.0.1:8081",
    )
    _daemon_flags(up)
    up.add_argument("--join", metavar="INVITE", help="join the mesh of this invite first")

    join = _add(
        commands,
        "join",
        "shoal.cli_up:join",
        "join a mesh by its invite",
        "Join the mesh of an invite. A daemon that already runs changes over to it; otherwise one is\n"
        "started in the foreground, with the same options as `shoal up`.",
        "  shoal join shoal1-abc...\n  shoal join shoal1-abc... --memory 12GiB",
    )
    join.add_argument("invite", metavar="INVITE", help="the text that `shoal invite` printed")
    _daemon_flags(join)


def _daemon_flags(parser: Parser) -> None:
    """The flags of `shoal up`; their names and values are node.config's, which also checks them."""
    place = parser.add_argument_group("this node")
    place.add_argument(
        "--data-dir", metavar="DIR", help="where the key, the mesh and the models' pieces are kept"
    )
    place.add_argument("--name", metavar="NAME", help="what others see (default: the host's name)")
    place.add_argument("--config", metavar="FILE", help="a TOML file with the same settings")
    place.add_argument("-v", "--verbose", action="count", default=0, help="log what happens; -vv logs more")
    place.add_argument("--log-level", metavar="LEVEL", help="debug, info, warning (default) or error")
    net = parser.add_argument_group("network")
    net.add_argument("--relay-mbps", metavar="N", help="Mbit/s to relay with for others (default: 20)")
    net.add_argument("--upload-mbps", metavar="N", help="of models' files for others (default: no limit)")
    net.add_argument("--api", metavar="HOST:PORT", help="of the HTTP API (default: 127.0.0.1:8080)")
    net.add_argument(
        "--listen", metavar="MULTIADDR", action="append", help="where peers connect; may be repeated"
    )
    net.add_argument(
        "--no-mdns", action="store_true", help="neither be seen on the LAN nor look for others there"
    )
    net.add_argument("--public", action="store_true", help="found a mesh that anyone may join")
    lend = parser.add_argument_group("what it lends")
    lend.add_argument(
        "--model",
        metavar="DIR[=NAME]",
        action="append",
        dest="models",
        help="share this Hugging Face directory; may be repeated (default where a mesh is founded: 'embedded',"
        " the built-in model; 'none' shares nothing)",
    )
    lend.add_argument("--memory", metavar="SIZE", help="memory for models, for example 6MiB or 12GiB")
    lend.add_argument(
        "--copies", metavar="K", type=count, help="copies of each layer of the models shared here"
    )
    lend.add_argument("--layers", metavar="A:B", help="hold exactly layers A to B-1 instead of planned ones")
    lend.add_argument(
        "--device",
        metavar="DEVICE",
        help="cpu, cuda, cuda:N, mps or xpu; several with commas between, or all",
    )
    lend.add_argument("--dtype", metavar="TYPE", help="auto, float32 or bfloat16")
    lend.add_argument("--quant", metavar="HOW", help="none, int8 or int4")
    lend.add_argument("--kv-quant", metavar="HOW", help="of the cache: none, or int8 (half the bytes)")
    lend.add_argument("--threads", metavar="N", type=count, help="processor threads for computing")
    lend.add_argument("--disk", metavar="SIZE", help="disk for models' pieces (default: 200GiB)")
    lend.add_argument("--concurrency", metavar="N", type=count, help="requests at once that room is kept for")
    lend.add_argument(
        "--tag",
        metavar="TAG",
        action="append",
        dest="tags",
        help="say of this node that it is trusted, metered, owner-active or anything else; may be repeated",
    )
    lend.add_argument("--region", metavar="NAME", help="where it stands, to guess links that nobody measured")
    lend.add_argument(
        "--require",
        metavar="TAG",
        action="append",
        help="only nodes with this tag may host the models shared here; may be repeated",
    )
    lend.add_argument(
        "--ends-require",
        metavar="TAG",
        action="append",
        help="as --require, for the first and last layer, whose hosts see the text",
    )
    lend.add_argument("--no-serve", action="store_true", help="hold no layers: only use the mesh")


def _mesh_commands(commands: Any) -> None:
    invite = _add(
        commands,
        "invite",
        "shoal.cli_mesh:invite",
        "print an invite to this node's mesh",
        "Print an invite: a text, and in a terminal also a QR code. Whoever has it can join the mesh\n"
        "until it expires, so send it as you would send a password.",
        "  shoal invite\n  shoal invite --ttl 30m --once\n  ssh other shoal join $(shoal invite)",
    )
    invite.add_argument(
        "--ttl", metavar="TIME", type=ttl, default="24h", help="how long it is good for (default: 24h)"
    )
    invite.add_argument("--once", action="store_true", help="good for one computer only")
    invite.add_argument("--no-qr", action="store_true", help="print no QR code")
    _json(invite, "the invite")
    _where(invite)

    status = _add(
        commands,
        "status",
        "shoal.cli_mesh:status",
        "show the mesh: nodes, layers, memory, models",
        examples="  shoal status\n  shoal status --watch\n  shoal status --json | jq .models",
    )
    status.add_argument("--watch", action="store_true", help="keep the picture up to date until Ctrl-C")
    _json(status, "the daemon's view of the mesh")
    _where(status)


def _model_commands(commands: Any) -> None:
    add = _add(
        commands,
        "add",
        "shoal.cli_mesh:add",
        "share a model directory with the mesh",
        "Publish a Hugging Face model directory (config.json, *.safetensors, tokenizer.json), or that of a\n"
        "LoRA adapter (adapter_config.json), and wait until the mesh serves it. The files stay where they\n"
        "are; others fetch only their layers. hf:ORG/REPO comes from the Hugging Face hub first.",
        "  shoal add ~/models/Qwen3-4B --name qwen3-4b\n  shoal add hf:Qwen/Qwen3-4B\n"
        "  shoal add ~/pirate-lora --base qwen3-4b",
    )
    add.add_argument(
        "directory",
        metavar="DIR",
        help="the model's directory, or hf:ORG/REPO[@REVISION]; 'embedded' is built in",
    )
    add.add_argument("--name", metavar="NAME", help="its name in the mesh (default: the directory's)")
    add.add_argument(
        "--base", metavar="MODEL", help="an adapter's base (default: what its configuration names)"
    )
    add.add_argument(
        "--copies", metavar="K", type=count, default=1, help="copies of each layer wanted (default: 1)"
    )
    add.add_argument(
        "--require",
        metavar="TAG",
        action="append",
        default=[],
        help="only nodes with this tag may host it; may be repeated",
    )
    add.add_argument(
        "--ends-require",
        metavar="TAG",
        action="append",
        default=[],
        help="as --require, for its first and last layer, whose hosts see the text",
    )
    add.add_argument("--no-wait", action="store_true", help="return once it is published")
    add.add_argument(
        "--timeout", metavar="SECONDS", type=positive, default=900.0, help="how long to wait (default: 900)"
    )
    _json(add, "where the layers went")
    _where(add)

    _serving_commands(commands)


def _serving_commands(commands: Any) -> None:
    models = _add(commands, "models", "shoal.cli_mesh:models", "list the models of the mesh")
    _json(models, "the models")
    _where(models)

    run = _add(
        commands,
        "run",
        "shoal.cli_run:run",
        "ask a model and print its answer as it comes",
        "Send a prompt to a model of the mesh and print the text as it comes.",
        '  shoal run embedded "def fibonacci(n):"\n'
        '  shoal run qwen3-4b --chat "Why is the sea salt?"\n'
        "  git diff | shoal run qwen3-4b --chat - --max-tokens 400",
    )
    run.add_argument("model", metavar="NAME", help="a model as `shoal models` lists it")
    run.add_argument("prompt", metavar="PROMPT", help="the text, or - to read it from stdin")
    run.add_argument("--chat", action="store_true", help="ask through the model's chat template")
    run.add_argument(
        "--max-tokens", metavar="N", type=count, default=128, help="at most N tokens (default: 128)"
    )
    run.add_argument("--temperature", metavar="T", type=float, help="0 is greedy (default: the daemon's)")
    run.add_argument("--top-p", metavar="P", type=float, help="keep the likeliest tokens up to P")
    run.add_argument("--seed", metavar="N", type=int, help="the same seed gives the same text")
    run.add_argument(
        "--stats", action="store_true", help="print the speed to stderr (in a terminal it always is)"
    )
    _json(run, "the text and its figures")
    _where(run)


def _plan_command(commands: Any) -> None:
    plan = _add(
        commands,
        "plan",
        "shoal.cli_plan:plan",
        "show how a model would be placed over the mesh, or over machines that a file describes",
        PLAN,
        "  shoal plan ~/models/Qwen3-4B\n  shoal plan qwen3-4b --copies 2\n"
        "  shoal plan --input lab.json --prefer throughput --json",
    )
    plan.add_argument("model", metavar="MODEL", nargs="?", help="a model of the mesh, or a directory")
    plan.add_argument("--copies", metavar="K", type=count, help="copies of each layer wanted")
    plan.add_argument("--input", metavar="FILE", help="the description of machines, or - for stdin")
    plan.add_argument(
        "--prefer",
        choices=("balanced", "latency", "throughput"),
        help="quick answers, many at once, or both in measure (default: the file's, else balanced)",
    )
    _json(plan, "the plan")
    _where(plan)


def _sim_command(commands: Any) -> None:
    sim = _add(
        commands,
        "sim",
        "shoal.cli_sim:sim",
        "simulate a mesh whose nodes come and go",
        "Play a trace of requests on a simulated mesh of home machines and print what a scheduler made of it:\n"
        "times, targets kept, requests lost, bytes fetched, messages. Nothing is started and nothing is sent.",
        "  shoal sim --nodes 40 --hours 0.1\n"
        "  shoal sim --trace azure_llm_conv_2023.csv --policy all --plot pictures",
    )
    sim.add_argument("--nodes", metavar="N", type=count, default=30, help="how many nodes (default: 30)")
    sim.add_argument(
        "--layers", metavar="N", type=count, default=64, help="layers of the model, 0.5 GB each (default: 64)"
    )
    sim.add_argument(
        "--trace",
        metavar="FILE",
        help="requests to play: Azure's CSV or Mooncake's JSONL (default: a synthetic load)",
    )
    sim.add_argument(
        "--rate", metavar="R", type=positive, default=5.5, help="synthetic requests a second (default: 5.5)"
    )
    sim.add_argument(
        "--speed", metavar="X", type=positive, default=1.0, help="play the load X times as fast (default: 1)"
    )
    sim.add_argument(
        "--policy",
        choices=("shoal", "petals", "petals-fresh", "parallax", "parallax-mending", "random", "all"),
        default="shoal",
        help="whose scheduler; all of them run on the same mesh and load (default: shoal)",
    )
    sim.add_argument(
        "--hours", metavar="H", type=positive, default=1.0, help="hours to simulate (default: 1)"
    )
    sim.add_argument(
        "--churn-per-hour",
        metavar="SHARE",
        type=share,
        default=0.2,
        help="share of the nodes that leave, and come, each hour (default: 0.2)",
    )
    sim.add_argument("--seed", metavar="N", type=int, default=1, help="the same seed gives the same figures")
    _sim_mesh_flags(sim)
    sim.add_argument(
        "--capacity",
        action="store_true",
        help="find for each policy the highest load at which nine of ten requests keep their targets (many runs)",
    )
    sim.add_argument("--plot", metavar="DIR", help="write pictures (SVG) there")
    _json(sim, "the figures")


def _sim_mesh_flags(sim: argparse.ArgumentParser) -> None:
    """What the simulated mesh is like: who leaves how, what gateways see, how far apart regions are, what counts."""
    sim.add_argument(
        "--crash-share",
        metavar="SHARE",
        type=share,
        default=1.0,
        help="share of the leaving nodes that vanish without a word (default: 1)",
    )
    sim.add_argument(
        "--return-share",
        metavar="SHARE",
        type=share,
        default=0.5,
        help="share of the coming nodes that were there before, weights on disk (default: 0.5)",
    )
    sim.add_argument(
        "--diurnal",
        metavar="SHARE",
        type=share,
        default=0.3,
        help="how far the rates of leaving and coming swing over a day (default: 0.3)",
    )
    sim.add_argument(
        "--gateways", metavar="N", type=count, default=32, help="who sends requests (default: 32)"
    )
    sim.add_argument(
        "--view-age",
        metavar="S",
        type=positive,
        default=2.0,
        help="age of the loads gateways see (default: 2)",
    )
    sim.add_argument("--regions", metavar="N", type=count, default=4, help="regions on a ring (default: 4)")
    sim.add_argument(
        "--latencies",
        metavar="FILE",
        help="one-way milliseconds between regions: JSON, a list of as many rows, in place of the ring",
    )
    sim.add_argument(
        "--copies", metavar="N", type=count, help="copies of the model to host (default: as many as fit)"
    )
    sim.add_argument(
        "--ttft", metavar="S", type=positive, default=5.0, help="target for the first token (default: 5 s)"
    )
    sim.add_argument(
        "--tpot",
        metavar="S",
        type=positive,
        default=0.25,
        help="target for each further token (default: 0.25 s)",
    )


def _demo_command(commands: Any) -> None:
    demo = _add(
        commands,
        "demo",
        "shoal.demo:demo",
        "four nodes, one model that none of them can hold alone",
        "Start four nodes on this machine, each too small for the model; watch it spread over them; ask it\n"
        "something; stop them. Takes less than a minute and leaves nothing behind.",
    )
    demo.add_argument("--prompt", metavar="TEXT", help="what to ask the model")
    demo.add_argument("--keep", action="store_true", help="leave the four nodes running")
    demo.add_argument(
        "--plain", action="store_true", help="print plain lines, as when the output is no terminal"
    )
