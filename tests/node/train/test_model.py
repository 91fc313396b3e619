"""The trainable model: the numbers of `transformers` and of our own engine, gradients, and its parameters' names."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from model_shards import CheckpointIndex, ModelConfig, load_span
from node.errors import ConfigProblem
from node.train.kernels import attend, rms_norm, swiglu
from node.train.model import make_model
from node.train.recipe import FAMILIES, ModelRecipe

VOCAB = 61
MORE = {
    "llama": {"attention_bias": True, "mlp_bias": True, "rope_theta": 5000.0},
    "mistral": {"sliding_window": 5},
    "gemma2": {"sliding_window": 5, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 3.0},
    "gemma3_text": {"sliding_window": 5, "query_pre_attn_scalar": 8},
    "phi3": {"sliding_window": None},
    "smollm3": {"no_rope_layers": [1, 0]},
}


def recipe(family, **more):
    more = {"rope_parameters": None} | MORE.get(family, {}) | more
    if more["rope_parameters"] is None:
        del more["rope_parameters"]
    shape = {"layers": 2, "hidden": 24, "heads": 4, "kv_heads": 2, "head_dim": 8, "intermediate": 40}
    return ModelRecipe(None, family, **shape, context=64, tied=family.startswith("gemma"), more=more)


def shaken(model, seed=3):
    """Every parameter moved from where it starts, norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    for one in model.named.values():
        one.add_(0.1 * torch.randn(one.shape, generator=generator))
    return model


def write(model, folder):
    folder.mkdir(exist_ok=True)
    save_file({name: one.contiguous() for name, one in model.named.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.values))
    return folder


@pytest.fixture
def tokens():
    return torch.randint(0, VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_gives_equal_logits_in_transformers(family, tmp_path, tokens):
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = shaken(make_model(recipe(family), VOCAB, 3))
    folder = write(model, tmp_path / "m")
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        torch.testing.assert_close(model.logits(tokens), theirs(tokens).logits, rtol=1e-4, atol=2e-5)


def test_our_own_engine_loads_it_and_it_loads_again(tmp_path, tokens):
    model = shaken(make_model(recipe("qwen3"), VOCAB))
    folder = write(model, tmp_path / "m")
    config = ModelConfig.from_dir(folder)
    span = load_span(folder, CheckpointIndex.open(folder), config, 0, 2, dtype="float32")
    assert len(span.layers) == 2
    again = make_model(ModelRecipe(checkpoint=folder), VOCAB)
    assert all(torch.equal(one, again.named[name]) for name, one in model.named.items())
    with pytest.raises(ConfigProblem, match="at most 61"):
        make_model(ModelRecipe(checkpoint=folder), VOCAB + 1)


def test_names_are_views_of_the_parameters_and_a_seed_gives_the_same_bits():
    one, other = (make_model(recipe("llama"), VOCAB, seed=5) for _ in range(2))
    assert all(torch.equal(value, other.named[name]) for name, value in one.named.items())
    assert not torch.equal(
        make_model(recipe("llama"), VOCAB, seed=6).params["0.qkv.weight"], one.params["0.qkv.weight"]
    )
    one.named["model.layers.1.self_attn.k_proj.weight"].fill_(7.0)
    assert one.params["1.qkv.weight"][32:48].eq(7).all()
    assert sum(value.numel() for value in one.named.values()) == one.count


def test_gradients_by_name_are_those_of_the_parameters(tokens):
    model = make_model(recipe("llama"), VOCAB)
    model.loss(tokens).backward()
    names = ("model.layers.0.self_attn.v_proj.weight", "lm_head.weight", "model.embed_tokens.weight")
    found = dict(zip(names, model.gradients(names), strict=True))
    assert torch.equal(found[names[0]], model.params["0.qkv.weight"].grad[48:])
    assert found["lm_head.weight"].abs().sum() > 0
    assert found["model.embed_tokens.weight"].shape == (VOCAB, 24)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_recomputing_activations_changes_no_gradient(family, tokens):
    grads = []
    for recompute in (False, True):
        model = make_model(recipe(family), VOCAB, recompute=recompute)
        model.loss(tokens).backward()
        grads.append([one.grad for one in model.params.values()])
    torch.testing.assert_close(*grads)


def test_half_precision_products_keep_float32_masters(tokens):
    whole, half = (make_model(recipe("llama"), VOCAB, precision=one) for one in ("float32", "bfloat16"))
    losses = [model.loss(tokens) for model in (whole, half)]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.01)
    losses[1].backward()
    assert {one.grad.dtype for one in half.params.values()} == {torch.float32}


def test_the_loss_is_that_of_each_next_token(tokens):
    model = make_model(recipe("mistral"), VOCAB)
    logits = model.logits(tokens[:, :-1])
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(model.loss(tokens), expected)


@pytest.mark.parametrize("leading", [(5,), (2, 3)])
def test_gradients_that_are_written_out_are_right(leading):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    # The reciprocal root is in float32: looser than gradcheck's defaults.
    assert torch.autograd.gradcheck(swiglu, (random(*leading, 8),))
    x, weight = random(*leading, 6).detach().float(), random(6).detach().float()
    found, expected = [], []
    for function, into in ((rms_norm, found), (lambda x, w, e: F.rms_norm(x, (6,), w, e), expected)):
        given = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = function(*given, 1e-6)
        out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
        into += [out.detach(), given[0].grad, given[1].grad]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("window", [None, 3])
def test_short_attention_is_the_fused_one(window):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 9, 4, generator=generator) for heads in (4, 2, 2))
    mask = torch.ones(9, 9, dtype=torch.bool).tril().triu(-8 if window is None else 1 - window)
    expected = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    torch.testing.assert_close(attend(q, k, v, None if window is None else mask, None, None), expected)


def test_models_that_cannot_be_trained_are_refused(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    values = {
        "architectures": ["MixtralForCausalLM"],
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "vocab_size": 9,
    }
    values |= {"num_attention_heads": 2, "intermediate_size": 8, "num_local_experts": 2}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigProblem, match="got 'mixtral', expected a dense model"):
        make_model(ModelRecipe(checkpoint=folder), 9)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_loss_is_the_same_and_so_are_its_gradients(tokens):
    plain, fast = (make_model(recipe("llama"), VOCAB, compiled=compiled) for compiled in (False, True))
    losses = [model.loss(tokens) for model in (plain, fast)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for part, one in plain.params.items():
        torch.testing.assert_close(one.grad, fast.params[part].grad, rtol=1e-3, atol=1e-6)
