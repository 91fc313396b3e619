"""What the command line says when it is asked for help or used wrongly, and how little it loads to say it."""

from __future__ import annotations

import subprocess
import sys

import pytest

import shoal as package
from shoal import errors
from shoal.cli_parser import count, positive, ttl

COMMANDS = [
    "up",
    "join",
    "invite",
    "status",
    "add",
    "models",
    "run",
    "plan",
    "tags",
    "sim",
    "testnet",
    "demo",
]


def test_public_face():
    assert {"Client", "AsyncClient", "ShoalError", "__version__"} <= set(package.__all__)
    assert all(hasattr(package, name) for name in package.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Server'"):
        _ = package.Server


def test_error_tree_in_the_docstring_names_every_error():
    defined = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert all(name in (errors.__doc__ or "") for name in defined)
    assert {"RemoteFault", "ResourceLimit", "LocalFault"} <= defined


def test_help_lists_every_command(shoal):
    outcome = shoal("--help")
    assert outcome.status == 0
    assert all(f"\n    {command} " in outcome.out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(shoal, command):
    outcome = shoal(command, "--help")
    assert outcome.status == 0
    assert f"usage: shoal {command}" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ([], "COMMAND"),
        (["frob"], "no command 'frob'"),
        (["testnet"], "ACTION"),
        (["testnet", "sideways"], "no action 'sideways'"),
        (["run", "model"], "PROMPT"),
        (["invite", "--ttl", "soon"], "--ttl"),
        (["add", "dir", "--copies", "0"], "--copies"),
        (["testnet", "up", "-n", "-3"], "--nodes"),
        (["testnet", "up", "--node-memory", "lots"], "--node-memory"),
        (["run", "m", "p", "--temp", "1"], "--temp"),
        (["run", "m", ""], "prompt is empty"),
        (["status", "--api", "ftp://x"], "ftp://x"),
        (["status", "--api", "localhost"], None),
        (["up", "--layers", "5:2"], "layers"),
        (["up", "--api", "nowhere"], "api"),
        (["up", "--memory", "-1"], "memory"),
        (["up", "--model", "=x"], "model"),
        (["up", "--dtype", "float8"], "dtype"),
        (["plan"], "--input"),
        (["plan", "--input", "x", "--prefer", "luck"], "--prefer"),
    ],
)
def test_wrong_usage_is_status_2_and_one_line(shoal, arguments, names):
    outcome = shoal(*arguments)
    if names is None:  # a host without a port is port 80, where nothing listens
        assert outcome.status == 1
    else:
        assert (outcome.status, outcome.out) == (2, "")
        assert names in outcome.err
    assert outcome.err.startswith("shoal: ")
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("24h", 86400), ("7D", 604800)])
def test_times(text, seconds):
    assert ttl(text) == seconds


@pytest.mark.parametrize(
    ("parse", "text"), [(ttl, "0h"), (ttl, "24"), (count, "1.5"), (positive, "inf"), (positive, "nan")]
)
def test_values_that_are_refused(parse, text):
    with pytest.raises(Exception, match="is not a"):
        parse(text)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["status"], ["run", "m", "p"], ["invite"], ["plan", "--input", "x"]]
)
def test_commands_load_neither_the_daemon_nor_its_libraries(arguments, home):
    """Time is not measured here: what makes a command slow is what it imports."""
    code = (
        "import sys, shoal.cli\n"
        f"shoal.cli.main({arguments!r})\n"
        "heavy = {'torch', 'libp2p', 'trio', 'node', 'numpy', 'rich', 'httpx'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
