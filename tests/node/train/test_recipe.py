"""Every field of a run's file, right and wrong."""

import json
from pathlib import Path

import pytest

from node.errors import ConfigProblem
from node.train.recipe import InnerRecipe, load_recipe, read_recipe

WHOLE = """
name = "sums"
[model]
family = "qwen3"
layers = 2
hidden = 64
heads = 4
kv_heads = 2
context = 128
more = {rope_theta = 5000.0}
[data]
files = ["*.txt"]
tokenizer = "chars"
sequence = 64
[train]
steps = 500
optimizer = "muon"
betas = [0.9, 0.95]
[outer]
strategy = "streaming"
inner_steps = 50
budget_s = 30
[checkpoints]
erasure = [2, 3]
[members]
tags = ["trusted"]
[evaluation]
every_rounds = 2
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "c.csv").write_text("three")
    return tmp_path


def test_a_file_is_read_whole_and_travels_as_json(folder):
    (folder / "run.toml").write_text(WHOLE)
    recipe = load_recipe(folder / "run.toml")
    assert recipe.name == "sums"
    assert [path.name for path in recipe.data.files] == ["a.txt", "b.txt"]
    assert (recipe.model.head_dim, recipe.model.intermediate) == (16, 256)
    assert (recipe.outer.codec, recipe.outer.delay, recipe.outer.budget_s) == ("int4", 5, 30.0)
    assert recipe.checkpoints.erasure == (2, 3)
    again = read_recipe(json.loads(json.dumps(recipe.values)), Path("/nowhere"))
    assert again == recipe


def test_little_has_to_be_said(folder):
    recipe = read_recipe({"data": {"files": "a.txt"}}, folder, default_name="run")
    assert (recipe.outer.strategy, recipe.outer.codec, recipe.inner.steps) == ("diloco", "int8", 2000)
    assert recipe.members.allow == ()


@pytest.mark.parametrize(
    ("table", "field", "value", "says"),
    [
        ("data", "files", "*.rst", "data.files: got '*.rst', expected files that exist"),
        ("data", "files", "c.csv", "expected files that end in .txt"),
        ("data", "files", 3, "expected a text or a list of texts"),
        ("data", "tokenizer", "gpt2", "expected bytes, chars, or a model directory"),
        ("data", "sequence", 512, "data.sequence: got 512, expected a whole number from 1 to 256"),
        ("data", "validation", 0.9, "expected a number from 0 to 0.5"),
        ("model", "family", "mixtral", "expected one of llama, mistral"),
        ("model", "kv_heads", 3, "expected a divisor of heads = 4"),
        ("model", "hidden", 130, "expected a multiple of heads = 4"),
        ("model", "head_dim", 31, "expected an even number"),
        ("model", "checkpoint", "nowhere", "expected a Hugging Face model directory"),
        ("model", "more", 1, "expected a table"),
        ("train", "optimizer", "sgd", "train.optimizer: got 'sgd', expected one of adamw, muon"),
        ("train", "lr", "fast", "expected a number from 1e-09 to 10"),
        ("train", "lr", float("nan"), "expected a number"),
        ("train", "steps", 2.5, "expected a whole number"),
        ("train", "steps", True, "expected a whole number"),
        ("train", "recompute", 1, "expected true or false"),
        ("train", "betas", [0.9], "expected two numbers"),
        ("train", "precision", "fp8", "expected one of float32, bfloat16"),
        ("train", "warmups", 3, "no such field; 'warmup' is meant?"),
        ("outer", "strategy", "easgd", "expected one of diloco, streaming"),
        ("outer", "codec", "topk", "topk is for the strategy sparseloco"),
        ("outer", "inner_steps", 10**6, "expected at most train.steps = 2000"),
        ("outer", "budget_s", 0, "expected a number from 0.01"),
        ("outer", "delay", 100, "expected a whole number from 0 to 99"),
        ("checkpoints", "erasure", [3, 2], "pieces that suffice"),
        ("members", "minimum", 0, "expected a whole number from 1"),
        ("evaluation", "often", True, "no such field; one of every_rounds, sequences"),
    ],
)
def test_a_wrong_field_is_named_with_what_would_be_right(folder, table, field, value, says):
    values = {"data": {"files": "a.txt"}}
    values.setdefault(table, {})[field] = value
    with pytest.raises(ConfigProblem) as problem:
        read_recipe(values, folder, default_name="run")
    assert says in str(problem.value)
    assert str(problem.value).startswith(table)


def test_wrong_tables_names_and_files_are_named_too(folder):
    for values, says in [
        ({"data": {"files": "a.txt"}, "train": 3}, "train: got 3, expected a table: [train]"),
        ({"data": {"files": "a.txt"}, "trian": {}}, "no such field; 'train' is meant?"),
        ({}, "data.files"),
        ({"name": "a/b", "data": {"files": "a.txt"}}, "name: got 'a/b'"),
        (
            {"data": {"files": "a.txt"}, "outer": {"strategy": "data-parallel", "inner_steps": 2}},
            "1: data-parallel reduces every step",
        ),
    ]:
        with pytest.raises(ConfigProblem) as problem:
            read_recipe(values, folder, default_name="run")
        assert says in str(problem.value)
    (folder / "broken.toml").write_text("= 3")
    with pytest.raises(ConfigProblem, match="well-formed TOML"):
        load_recipe(folder / "broken.toml")
    with pytest.raises(ConfigProblem, match="a readable TOML file"):
        load_recipe(folder / "absent.toml")


def test_the_rate_rises_then_falls_to_its_final_share():
    recipe = InnerRecipe(steps=110, warmup=10, final=0.1)
    assert recipe.rate(0) == pytest.approx(1 / 11)
    assert recipe.rate(10) == 1.0
    assert recipe.rate(60) == pytest.approx(0.55)
    assert recipe.rate(110) == recipe.rate(500) == pytest.approx(0.1)
    assert InnerRecipe(steps=110, warmup=10, schedule="constant").rate(100) == 1.0
    assert InnerRecipe(steps=110, warmup=10, schedule="linear", final=0.0).rate(60) == pytest.approx(0.5)
