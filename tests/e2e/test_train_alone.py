"""A daemon that already runs trains a small model by one command, serves it, and says in one line what it cannot do."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

RECIPE = """
name = "small"
[model]
layers = 1
hidden = 32
heads = 2
context = 32
[data]
files = "text.txt"
sequence = 16
[train]
steps = 12
batch = 2
warmup = 2
[outer]
inner_steps = 3
[evaluation]
sequences = 4
"""


@pytest.fixture
def train(tools, alone, tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fish swims over the lazy shoal. " * 60)

    def order(*words, recipe=None):
        if recipe is not None:
            (tmp_path / "run.toml").write_text(recipe)
            words = (tmp_path / "run.toml", *words)
        return subprocess.run(
            tools.shoal("train", *words, "--api", alone.api), capture_output=True, text=True, timeout=90,
            env=tools.environment(tmp_path), cwd=tmp_path, check=False,
        )  # fmt: skip

    return order


def test_one_command_trains_and_the_daemon_answers_with_it(tools, alone, train):
    done = train("--serve", "small-model", "--json", recipe=RECIPE)
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert (last["state"], last["rounds"], last["rounds_whole"]) == ("done", 4, 4)
    assert last["members"][0]["loss"] > 0
    log = [json.loads(line) for line in Path(last["log"]).read_text().splitlines()]
    assert [entry["epoch"] for entry in log] == [1, 2, 3, 4]
    body = {"max_tokens": 4, "model": "small-model"}
    text = tools.until(lambda: tools.ask(alone.api, "fish", **body)[0] == 200, "the trained model")
    assert text
    assert tools.post(alone.api + "/shoal/drop", {"model": "small-model"})[0] == 200


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (RECIPE.replace("steps = 12", 'steps = "many"'), "train.steps: got 'many'"),
        (RECIPE.replace("text.txt", "absent.txt"), "data.files: got 'absent.txt'"),
        (RECIPE + "[oter]\n", "oter"),
        ("name = ", "TOML"),
    ],
)
def test_a_wrong_recipe_is_one_line_that_names_the_field(train, recipe, said):
    done = train(recipe=recipe)
    assert (done.returncode, done.stdout) == (1, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_runs_that_do_not_exist_are_said_so(train):
    for words in (
        ("--join", "nothing"),
        ("stop", "nothing"),
        ("export", "nothing", "out"),
        ("status", "nothing"),
    ):
        done = train(*words)
        assert done.returncode == 1
        assert "nothing" in done.stderr
        assert done.stderr.count("\n") == 1
