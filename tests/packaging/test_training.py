"""The script that makes the embedded model, on a model and a corpus small enough for a test."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

TEXTS = [f"def f{n}(x):\n    return x + {n}\n\n\nclass C{n}:\n    value = {n}\n" for n in range(40)]


@pytest.fixture
def tool(training_tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    small = training_tool.Shape(
        vocab=300, hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, intermediate=48, context_tokens=64
    )
    monkeypatch.setattr(training_tool, "Shape", lambda: small)
    monkeypatch.setattr(training_tool, "find_corpus", list)
    monkeypatch.setattr(training_tool, "read_corpus", lambda _: (TEXTS[:-10], TEXTS[-10:]))
    monkeypatch.setattr(training_tool, "fast_bf16", lambda: False)
    return training_tool


def run(tool: ModuleType, out: Path, steps: int, **flags: int) -> dict[str, Any]:
    words = [f"--{name}={value}" for name, value in {"sequence": 32, "batch-tokens": 64, **flags}.items()]
    tool.main(
        ["--out", str(out), "--work", str(out.parent / f"{out.name}.work"), "--steps", str(steps), *words]
    )
    figures: dict[str, Any] = json.loads((out / "training.json").read_text())
    return figures


def weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def test_its_model_is_the_one_transformers_calls_llama(tool: ModuleType, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    run(tool, tmp_path / "model", 2)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    ours = tool.Llama(tool.Shape())
    ours.load_state_dict(
        {k.removeprefix("model."): v for k, v in theirs.state_dict().items() if k != "lm_head.weight"}
    )
    tokens = torch.arange(50).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)


def test_it_learns(tool: ModuleType, tmp_path: Path) -> None:
    first = run(tool, tmp_path / "a", 2)["validation_loss"]
    assert run(tool, tmp_path / "b", 60, warmup=5)["validation_loss"] < first - 0.5


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tool: ModuleType, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(tool, tmp_path / name, 3, seed=seed)
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


def test_a_killed_run_goes_on_as_if_it_had_not_been(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tool, tmp_path / "whole", 6)

    class Killed(BaseException):
        pass

    original = tool.sample_batch

    def killing(data: torch.Tensor, step: int, *rest: Any) -> torch.Tensor:
        if step == 3:
            tool.save_checkpoint(*held)
            raise Killed
        return original(data, step, *rest)

    held: list[Any] = []
    make = tool.make_optimizers

    def remember(model: torch.nn.Module, recipe: Any) -> Any:
        optimizers = make(model, recipe)
        held[:] = [tmp_path / "broken.work" / "checkpoint.safetensors", model, optimizers, 3, 1.0]
        return optimizers

    monkeypatch.setattr(tool, "make_optimizers", remember)
    monkeypatch.setattr(tool, "sample_batch", killing)
    with pytest.raises(Killed):
        run(tool, tmp_path / "broken", 6)
    assert not (tmp_path / "broken").exists()
    monkeypatch.setattr(tool, "sample_batch", original)
    run(tool, tmp_path / "broken", 6)
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")


def test_a_model_that_is_too_large_is_not_put_in_place(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tool, tmp_path / "model", 2)
    before = weights(tmp_path / "model")
    monkeypatch.setattr(tool, "ARTEFACT_BYTES_MAX", 1000)
    with pytest.raises(SystemExit, match="make the shape smaller"):
        run(tool, tmp_path / "model", 4)
    assert weights(tmp_path / "model") == before


def test_the_corpus_is_the_library_without_its_tests_tables_and_guests(training_tool: ModuleType) -> None:
    paths = [path.as_posix() for path in training_tool.find_corpus()]
    assert len(paths) > 300
    assert any(path.endswith("/argparse.py") for path in paths)
    for word in ("/site-packages/", "/test/", "/idlelib/", "/pydoc_data/", "/encodings/", "_sysconfigdata"):
        assert not any(word in path for path in paths)
