"""A small corpus, a small recipe, a worker over both."""

from __future__ import annotations

import pytest
import torch

from node.train.corpus import open_corpus
from node.train.model import make_model
from node.train.recipe import DataRecipe, InnerRecipe, ModelRecipe
from node.train.worker import Worker

torch.set_num_threads(1)

SMALL = ModelRecipe(layers=2, hidden=16, heads=4, kv_heads=2, head_dim=4, intermediate=24, context=32)


@pytest.fixture(scope="session")
def text():
    return "".join(f"{n} times {n + 1} is {n * (n + 1)}.\n" for n in range(400))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "sums.txt").write_text(text)
    data = DataRecipe((folder / "sums.txt",), tokenizer="chars", validation=0.1, sequence=8)
    return open_corpus(data, folder / "cache")


@pytest.fixture
def worker(corpus):
    def make(claim=0, seed=1, **inner):
        recipe = InnerRecipe(**{"steps": 40, "batch": 4, "warmup": 2, "lr": 1e-2, "seed": seed} | inner)
        model = make_model(
            SMALL, corpus.vocab, seed=1, precision=recipe.precision, recompute=recipe.recompute
        )
        return Worker(model, corpus, recipe, claim)

    return make


@pytest.fixture(scope="session")
def shape():
    return SMALL
