"""testnet/compose.yaml and the Dockerfile, as far as they can be judged without a Docker engine."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

NODES = ("bootstrap", "peer1", "peer2", "peer3")


@pytest.fixture(scope="module")
def compose(root: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((root / "testnet" / "compose.yaml").read_text())
    return loaded


@pytest.fixture(scope="module")
def dockerfile(root: Path) -> str:
    text = (root / "testnet" / "Dockerfile").read_text().replace("\\\n", "")
    return "\n".join(line for line in text.splitlines() if not line.startswith("#"))


def words(value: str | list[str]) -> str:
    return value if isinstance(value, str) else " ".join(value)


def test_one_bootstrap_node_and_three_peers(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == {*NODES, "invite"}


def test_only_the_api_of_the_bootstrap_node_is_published_and_only_on_loopback(
    compose: dict[str, Any],
) -> None:
    published = {name: s["ports"] for name, s in compose["services"].items() if "ports" in s}
    assert list(published) == ["bootstrap"]
    (port,) = published["bootstrap"]
    assert re.fullmatch(r"127\.0\.0\.1:\$\{SHOAL_PORT:-8080\}:8080", port)


def test_an_api_that_listens_beyond_loopback_wants_a_key(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        if "--api=0.0.0.0" in words(service.get("command", [])):
            assert service["environment"]["SHOAL_API_KEYS"] == service["environment"]["SHOAL_API_KEY"] != ""


def test_peers_share_a_network_without_a_way_out(compose: dict[str, Any]) -> None:
    assert compose["networks"]["mesh"]["internal"] is True
    assert all(compose["services"][f"peer{n}"]["networks"] == ["mesh"] for n in (1, 2, 3))
    # Nothing is published from an internal network, so the bootstrap node needs another beside it.
    assert set(compose["services"]["bootstrap"]["networks"]) == {"mesh", "edge"}


@pytest.mark.parametrize("name", NODES)
def test_every_node_is_checked_on_health_and_keeps_its_key_on_its_own_volume(
    compose: dict[str, Any], name: str
) -> None:
    service = compose["services"][name]
    assert "/health" in words(service["healthcheck"]["test"])
    assert f"{name}-data:/data" in service["volumes"]
    assert f"{name}-data" in compose["volumes"]


@pytest.mark.parametrize("name", [*NODES, "invite"])
def test_every_container_runs_with_no_more_rights_than_it_needs(compose: dict[str, Any], name: str) -> None:
    service = compose["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]


def test_the_invite_waits_for_the_bootstrap_node_and_the_peers_for_the_invite(
    compose: dict[str, Any],
) -> None:
    services = compose["services"]
    assert services["invite"]["depends_on"] == {"bootstrap": {"condition": "service_healthy"}}
    assert services["invite"]["network_mode"] == "service:bootstrap"
    assert services["invite"]["restart"] == "no"
    for name in NODES[1:]:
        assert services[name]["depends_on"] == {"invite": {"condition": "service_completed_successfully"}}
        assert "invite:/invite:ro" in services[name]["volumes"]


def test_the_invite_is_written_where_the_peers_read_it(compose: dict[str, Any]) -> None:
    assert "> /invite/new; mv /invite/new /invite/invite" in words(
        compose["services"]["invite"]["entrypoint"]
    )
    for name in NODES[1:]:
        assert '--join "$$(cat /invite/invite)"' in words(compose["services"][name]["entrypoint"])


def test_named_volumes_and_networks_are_declared_and_used(compose: dict[str, Any]) -> None:
    used = {v.split(":")[0] for s in compose["services"].values() for v in s.get("volumes", [])}
    assert used == set(compose["volumes"])
    assert {n for s in compose["services"].values() for n in s.get("networks", [])} == set(
        compose["networks"]
    )


def test_every_flag_is_one_that_the_command_line_knows(compose: dict[str, Any]) -> None:
    from shoal.cli_parser import build_parser

    up = ["up", "--join", "shoal1-x"]
    for name in NODES:
        command = [word for word in compose["services"][name]["command"] if word != "up"]
        known, unknown = build_parser().parse_known_args(
            up + [re.sub(r"\$\{\w+:-(.*?)\}", r"\1", w) for w in command]
        )
        assert unknown == []
        assert known.memory == "6MiB"
    entry = words(compose["services"]["invite"]["entrypoint"])
    flags = re.search(r"shoal (invite .*?) >", entry)
    assert flags is not None
    assert build_parser().parse_args(flags[1].split()).ttl > 24 * 3600


def test_the_image_is_built_in_stages_and_its_last_is_slim_and_not_root(dockerfile: str) -> None:
    stages = re.split(r"(?m)^FROM ", dockerfile)[1:]
    assert len(stages) >= 2
    assert stages[-1].startswith("python:3.11-slim")
    user = re.findall(r"(?m)^USER (\S+)", stages[-1])
    assert user
    assert user[-1].split(":")[0] not in ("root", "0")
    assert "COPY . " not in stages[-1]


def test_the_image_installs_the_lock_without_resolving_and_torch_from_the_index_given(
    dockerfile: str,
) -> None:
    installs = re.findall(r"install [^&\n]*", dockerfile)
    pips = [line for line in installs if "--no-deps" in line]
    assert len(pips) == dockerfile.count("pip --python")
    assert "ARG TORCH_INDEX=" in dockerfile
    assert "requirements/lock.txt" in dockerfile


def test_the_build_context_holds_what_the_wheel_is_built_from(root: Path, project: dict[str, Any]) -> None:
    allowed = (root / "testnet" / "Dockerfile.dockerignore").read_text().splitlines()
    for name in project["tool"]["setuptools"]["packages"]:
        assert f"!{name.split('.')[0]}" in allowed
    for name in (
        "pyproject.toml",
        "LICENSE",
        "requirements/lock.txt",
        "tools/build",
        project["project"]["readme"],
    ):
        assert f"!{name}" in allowed
        assert (root / name).exists()
