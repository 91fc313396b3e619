"""`make install`: what is asked of pip, in which order, and when nothing is."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

Pip = Callable[..., bool]


@pytest.fixture
def tool(install_tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tool, in a checkout of its own whose path has a space."""
    checkout = tmp_path / "a checkout"
    (checkout / "requirements").mkdir(parents=True)
    (checkout / "requirements" / "lock.txt").write_text(
        "# pins\nSetuptools==84.0\nlibp2p==0.8.1\ntorch==2.13.0\n\nfastecdsa==4.0.0; sys_platform != 'win32'\n"
    )
    (checkout / "requirements" / "dev.txt").write_text("wheel==0.48.0\npytest==9.2.0  # tests\n")
    (checkout / "pyproject.toml").write_text('[project]\ndependencies = ["torch>=2.6,<=2.13.0"]\n')
    monkeypatch.setattr(install_tool, "ROOT", checkout)
    monkeypatch.setattr(install_tool, "VENV", checkout / ".venv")
    monkeypatch.setattr(install_tool, "VENV_PYTHON", checkout / ".venv" / "bin" / "python")
    monkeypatch.setattr(install_tool, "STAMP", checkout / ".venv" / "shoal-installed")
    names = ("lock.txt", "dev.txt")
    monkeypatch.setattr(install_tool, "PINS", tuple(checkout / "requirements" / name for name in names))
    monkeypatch.delenv("TORCH_INDEX", raising=False)
    return install_tool


def fake_pip(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, fails: tuple[str, ...] = ()
) -> list[tuple[str, ...]]:
    """Records what pip is asked to install; a request that holds one of `fails` fails."""
    asked: list[tuple[str, ...]] = []

    def pip(what: str, *arguments: str, count: int = 1, complain: bool = True) -> bool:
        asked.append(arguments)
        return not any(word in argument for word in fails for argument in arguments)

    monkeypatch.setattr(tool, "pip", pip)
    return asked


def fake_venv(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, torch: bool = False) -> None:
    def make_venv() -> None:
        tool.VENV_PYTHON.parent.mkdir(parents=True, exist_ok=True)
        tool.VENV_PYTHON.touch()

    monkeypatch.setattr(tool, "make_venv", make_venv)
    monkeypatch.setattr(tool, "has_usable_torch", lambda: torch)


def test_the_pins_are_installed_without_resolving_and_with_the_pinned_build_tools(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_venv(tool, monkeypatch, torch=True)
    asked = fake_pip(tool, monkeypatch)
    tool.install()
    assert asked == [
        ("--no-deps", "Setuptools==84.0", "wheel==0.48.0"),
        (
            "--no-deps",
            "--no-build-isolation",
            "Setuptools==84.0",
            "libp2p==0.8.1",
            "fastecdsa==4.0.0; sys_platform != 'win32'",
            "wheel==0.48.0",
            "pytest==9.2.0",
        ),
        ("--no-deps", "--no-build-isolation", "--editable", str(tool.ROOT)),
    ]


def test_a_second_run_asks_nothing(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_venv(tool, monkeypatch)
    fake_pip(tool, monkeypatch)
    tool.install()
    asked = fake_pip(tool, monkeypatch)
    tool.install()
    assert asked == []


@pytest.mark.parametrize("changed", ["requirements/lock.txt", "requirements/dev.txt", "pyproject.toml"])
def test_a_change_of_pins_or_packaging_installs_again(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    fake_venv(tool, monkeypatch)
    fake_pip(tool, monkeypatch)
    tool.install()
    with open(tool.ROOT / changed, "a", encoding="utf-8") as file:
        file.write("# more\n")
    asked = fake_pip(tool, monkeypatch)
    tool.install()
    assert asked


def test_an_installation_that_broke_off_is_done_again(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_venv(tool, monkeypatch)
    fake_pip(tool, monkeypatch, fails=("--editable",))
    with pytest.raises(tool.InstallError, match="this checkout"):
        tool.install()
    asked = fake_pip(tool, monkeypatch)
    tool.install()
    assert asked


def test_going_back_to_the_old_pins_after_a_broken_change_installs_again(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_venv(tool, monkeypatch)
    fake_pip(tool, monkeypatch)
    tool.install()
    old = tool.PINS[0].read_text()
    tool.PINS[0].write_text(old + "more==1.0\n")
    fake_pip(tool, monkeypatch, fails=("--editable",))
    with pytest.raises(tool.InstallError):
        tool.install()
    tool.PINS[0].write_text(old)
    asked = fake_pip(tool, monkeypatch)
    tool.install()
    assert asked


@pytest.mark.parametrize("site", ["lib/python3.11/site-packages", "Lib/site-packages"])
def test_types_of_an_older_trio_do_not_hide_its_own(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, site: str
) -> None:
    fake_venv(tool, monkeypatch)
    fake_pip(tool, monkeypatch)
    for name in ("trio-stubs", "trio"):
        (tool.VENV / site / name).mkdir(parents=True)
    tool.install()
    assert [path.name for path in (tool.VENV / site).iterdir()] == ["trio"]


def test_on_linux_only_a_cpu_torch_is_taken_unasked(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(tool, "has_usable_torch", lambda: False)
    asked = fake_pip(tool, monkeypatch)
    tool.install_torch("torch==2.13.0")
    assert asked == [("--no-deps", "torch==2.13.0+cpu")]


def test_a_plain_torch_is_taken_only_when_it_asks_for_no_cuda(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(tool, "has_usable_torch", lambda: False)
    asked = fake_pip(tool, monkeypatch, fails=("+cpu", "pytorch.org"))
    monkeypatch.setattr(tool, "is_cpu_build", lambda pin: False)
    with pytest.raises(tool.InstallError, match="TORCH_INDEX"):
        tool.install_torch("torch==2.13.0")
    assert ("--no-deps", "torch==2.13.0") not in asked
    monkeypatch.setattr(tool, "is_cpu_build", lambda pin: True)
    tool.install_torch("torch==2.13.0")
    assert asked[-1] == ("--no-deps", "torch==2.13.0")


@pytest.mark.parametrize(
    ("needs", "cpu"),
    [
        ('["filelock", "sympy"]', True),
        ('["filelock", "nvidia-cublas==13.0; platform_system == \'Linux\'"]', False),
        ('["cuda-toolkit==13.0"]', False),
    ],
)
def test_a_cuda_build_is_known_by_what_it_asks_for(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, needs: str, cpu: bool
) -> None:
    report = f'{{"install": [{{"metadata": {{"requires_dist": {needs}}}}}]}}'

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert "--dry-run" in command
        return subprocess.CompletedProcess(command, 0, report, "")

    monkeypatch.setattr(subprocess, "run", run)
    assert tool.is_cpu_build("torch==2.13.0") is cpu


def test_a_torch_that_is_there_is_kept(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "has_usable_torch", lambda: True)
    asked = fake_pip(tool, monkeypatch)
    tool.install_torch("torch==2.13.0")
    assert asked == []


def test_a_named_index_wins_over_a_torch_that_is_there(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "has_usable_torch", lambda: True)
    monkeypatch.setenv("TORCH_INDEX", "https://example.org/cu130")
    asked = fake_pip(tool, monkeypatch)
    tool.install_torch("torch==2.13.0")
    assert (
        "--index-url",
        "https://example.org/cu130",
        "--no-deps",
        "--force-reinstall",
        "torch==2.13.0",
    ) in asked


def test_an_old_python_is_told_so(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "PYTHON_MIN", (99, 0))
    with pytest.raises(tool.InstallError, match="make PYTHON="):
        tool.install()


@pytest.mark.slow
def test_a_fresh_checkout_installs_itself_under_a_path_with_a_space(root: Path, tmp_path: Path) -> None:
    checkout = tmp_path / "a fresh checkout"
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True, text=True
    ).stdout.split("\0")
    for name in filter(None, files):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes((root / name).read_bytes())
    env = {**os.environ, "PYTHON": sys.executable}
    subprocess.run(["make", "install"], cwd=checkout, check=True, env=env, stdin=subprocess.DEVNULL)
    program = "import p2p, torch, shoal; print(shoal.__file__, torch.version.cuda)"
    python = str(checkout / ".venv" / "bin" / "python")
    done = subprocess.run([python, "-c", program], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout.split() == f"{checkout}/shoal/__init__.py None".split()
    again = subprocess.run(
        ["make", "install"], cwd=checkout, check=True, env=env, capture_output=True, text=True
    )
    assert again.stdout == ""
