"""What is exported is read by transformers, and by this mesh's own engine, with the logits that training saw."""

import itertools
import json

import pytest
import torch
import transformers

from model_shards import ModelConfig, Tokenizer
from node.errors import ConfigProblem
from node.library import read_directory
from node.train.corpus import byte_tokenizer
from node.train.export import export
from node.train.model import make_model
from node.train.recipe import ModelRecipe

torch.set_num_threads(1)
END = 256
MORE = {
    "qwen3": {"rms_norm_eps": 1e-6},
    "gemma2": {"query_pre_attn_scalar": 8, "sliding_window": 4, "attention_bias": False},
    "gemma3_text": {
        "query_pre_attn_scalar": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {"pad_token_id": 0},
    "smollm3": {"no_rope_layers": [1, 0], "pad_token_id": 0},
}  # fmt: skip
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3")


def a_model(family="llama", tied=True, seed=3):
    recipe = ModelRecipe(
        family=family, layers=2, hidden=32, heads=4, kv_heads=2, head_dim=8, intermediate=48, context=64,
        tied=tied, more=MORE.get(family, {}),
    )  # fmt: skip
    model = make_model(recipe, 257, END, seed=seed)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.named.values():  # norms and biases too, as after training
            value.add_(torch.randn(value.shape, generator=g) * 0.1)
    return model


def exported(model, directory):
    tokenizer = byte_tokenizer().to_str()
    return export(model.named, model.values, tokenizer, directory, end_id=END)


@pytest.mark.parametrize(("family", "tied"), [*itertools.product(FAMILIES, [True]), ("llama", False)])
def test_transformers_has_the_same_logits(tmp_path, family, tied):
    model = a_model(family, tied)
    directory = exported(model, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    tokens = torch.randint(0, 257, (2, 13), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, found = model.logits(tokens), theirs(tokens).logits
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, ours, atol=2e-5, rtol=2e-5)


def test_the_tokenizer_goes_with_it(tmp_path):
    directory = exported(a_model(), tmp_path / "out")
    text = "def naïve(x):\n    return '…'\n"
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    assert theirs(text)["input_ids"] == list(text.encode())
    assert theirs.decode(list(text.encode())) == text
    assert theirs.eos_token_id == END
    assert Tokenizer.from_dir(directory).eos_ids == (END,)


def test_the_mesh_reads_it_with_the_same_bits(tmp_path):
    model = a_model("qwen3", tied=False)
    directory = exported(model, tmp_path / "out")
    config, index = read_directory(directory)
    assert config == ModelConfig.from_dir(directory)
    assert {name: tuple(t.shape) for name, t in model.named.items()} == {
        name: tuple(index.tensor(name).shape) for name in model.named
    }
    assert json.loads((directory / "config.json").read_text())["vocab_size"] == 257


def test_what_the_state_holds_besides_is_left_out(tmp_path):
    model = a_model()
    state = {**model.named, "outer.momentum.x": torch.zeros(3), "run.epoch": torch.tensor(4)}
    export(state, model.values, byte_tokenizer().to_str(), tmp_path / "out")
    read_directory(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < sum(
        t.numel() * 4 + 200 for t in model.named.values()
    )


def test_a_folder_in_use_is_left_alone(tmp_path):
    model = a_model()
    (tmp_path / "out").mkdir()
    exported(model, tmp_path / "out")  # an empty one is filled
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(ConfigProblem, match="does not exist yet"):
        exported(model, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigProblem, match="directory"):
        exported(model, tmp_path / "file")
    with pytest.raises(ConfigProblem, match="can be written"):
        exported(model, tmp_path / "file" / "under")


def test_a_state_that_lacks_a_tensor_is_named_and_nothing_is_left(tmp_path):
    model = a_model()
    state = {**model.named, "model.norm.weight": torch.ones(5)}
    with pytest.raises(ConfigProblem, match=r"model.norm.weight.*\(32,\)"):
        export(state, model.values, byte_tokenizer().to_str(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_export_that_is_cut_short_leaves_nothing(tmp_path, monkeypatch):
    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("node.train.export.os.fsync", full)
    with pytest.raises(ConfigProblem, match="No space left"):
        exported(a_model(), tmp_path / "out")
    assert not list(tmp_path.iterdir())
