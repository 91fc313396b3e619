"""The model in the repository: small enough, whole, and a model of Python code."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from node import embedded

TOTAL_BYTES_MAX = 8_000_000
# None of these lines stands in the corpus.
CODE = '''
def read_lines(path, encoding="utf-8"):
    """Return the lines of a file as a list of strings."""
    with open(path, encoding=encoding) as file:
        return [line.rstrip("\\n") for line in file]


class Basket:
    def __init__(self, name, items=None):
        self.name = name
        self.items = items or []

    def __len__(self):
        return len(self.items)
'''


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((embedded.path() / "config.json").read_text())
    return loaded


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(embedded.path() / "tokenizer.json"))


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    return LlamaForCausalLM.from_pretrained(embedded.path(), dtype=torch.float32).eval()


def test_it_fits_in_eight_megabytes() -> None:
    files = [path for path in embedded.path().iterdir() if path.is_file()]
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} < {
        p.name for p in files
    }
    assert sum(path.stat().st_size for path in files) <= TOTAL_BYTES_MAX


def test_its_path_is_that_of_the_installed_package() -> None:
    assert embedded.path() == Path(embedded.__file__).parent / "model"


def test_its_tensors_are_bf16_and_those_of_its_config(config: dict[str, Any]) -> None:
    with safe_open(embedded.path() / "model.safetensors", framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        assert {file.get_slice(name).get_dtype() for name in shapes} == {"BF16"}
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    assert shapes["model.embed_tokens.weight"] == (config["vocab_size"], hidden)
    assert "lm_head.weight" not in shapes
    assert config["tie_word_embeddings"]
    for layer in range(config["num_hidden_layers"]):
        assert shapes[f"model.layers.{layer}.mlp.down_proj.weight"] == (hidden, wide)
    assert len(shapes) == 2 + 9 * config["num_hidden_layers"]


@pytest.mark.parametrize("text", ["def f(x):\n    return x\n", "\tnaïve — 日本語 🙂\r\n", "", "x" * 300])
def test_its_tokenizer_gives_back_every_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_its_vocabulary_is_full_and_token_zero_ends_a_text(
    tokenizer: Tokenizer, config: dict[str, Any]
) -> None:
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    assert tokenizer.id_to_token(config["eos_token_id"]) == "<|endoftext|>"


def test_a_chat_is_its_messages_text(config: dict[str, Any]) -> None:
    from transformers import AutoTokenizer

    hugging_face = AutoTokenizer.from_pretrained(embedded.path())
    messages = [{"role": "system", "content": "import os"}, {"role": "user", "content": "def f():"}]
    assert hugging_face.apply_chat_template(messages, tokenize=False) == "import os\ndef f():\n"
    assert hugging_face.eos_token_id == config["eos_token_id"]


def test_it_has_learnt_python(model: Any, tokenizer: Tokenizer) -> None:
    """Chance is log(4096) = 8.3 nats a token."""
    ids = torch.tensor([tokenizer.encode(CODE).ids])
    with torch.no_grad():
        assert model(ids, labels=ids).loss.item() < 3.5


def test_it_writes_an_indented_body(model: Any, tokenizer: Tokenizer) -> None:
    ids = torch.tensor([tokenizer.encode("def read_file(path):\n").ids])
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    text = tokenizer.decode(out.tolist())
    assert text.startswith("    ")
    assert len(set(text.split())) > 4


def test_it_is_finite_up_to_its_last_position(
    model: Any, config: dict[str, Any], tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode(CODE).ids
    context = config["max_position_embeddings"]
    window = torch.tensor([(ids * (context // len(ids) + 1))[:context]])
    with torch.no_grad():
        logits = model(window).logits[0]
    assert torch.isfinite(logits).all()
    repeated = torch.nn.functional.cross_entropy(logits[-129:-1], window[0, -128:])
    assert repeated.item() < 3.5
