"""Outer optimizers against torch's, and the order of their roundings."""

import math

import pytest
import torch

from collectives.outer import AdamW, Nesterov, Sgd


def tensors(seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(size, generator=generator) for size in ((5, 3), (7,), (2, 2))]


def run(optimizer, steps, scale=1.0):
    params = tensors(0)
    slots = {slot: [torch.zeros_like(one) for one in params] for slot in optimizer.slots}
    for epoch in range(1, steps + 1):
        optimizer.step(params, slots, tensors(epoch, scale), epoch)
    return params


def reference(make, steps, scale=1.0, clip=None, rate=None):
    params = [one.requires_grad_() for one in tensors(0)]
    optimizer = make(params)
    for epoch in range(1, steps + 1):
        for one, grad in zip(params, tensors(epoch, scale), strict=True):
            one.grad = grad
        if clip:
            torch.nn.utils.clip_grad_norm_(params, clip)
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] if rate is None else 0.01 * rate(epoch - 1)
        optimizer.step()
    return params


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Nesterov(0.7, 0.9), lambda p: torch.optim.SGD(p, lr=0.7, momentum=0.9, nesterov=True)),
        (Sgd(0.3), lambda p: torch.optim.SGD(p, lr=0.3)),
    ],
    ids=["nesterov", "sgd"],
)
def test_a_step_is_the_one_torch_would_make(ours, theirs):
    torch.testing.assert_close(run(ours, 6), [one.detach() for one in reference(theirs, 6)])


def test_adamw_decays_matrices_alone_and_follows_its_schedule_and_clip():
    def rate(step):
        return 1 / (step + 1)

    def make(params):
        matrices, vectors = [p for p in params if p.dim() > 1], [p for p in params if p.dim() == 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.99))

    found = run(AdamW(0.01, (0.9, 0.99), 1e-8, 0.1, 1.0, rate), 6, scale=3.0)
    expected = reference(make, 6, scale=3.0, clip=1.0, rate=rate)
    torch.testing.assert_close(found, [one.detach() for one in expected], rtol=1e-4, atol=1e-6)


def test_products_and_sums_are_rounded_one_by_one():
    """1 + eps times 1 + eps is 1 + 2 eps once rounded; a fused multiply-add would keep eps squared."""
    eps = 2.0**-12
    params, slots = [torch.tensor([0.0])], {"momentum": [torch.tensor([1 + eps])]}
    Nesterov(1.0, 1 + eps).step(params, slots, [torch.tensor([-1.0 - 2 * eps])], 1)
    assert slots["momentum"][0].item() == 0.0
    assert math.isclose(params[0].item(), 1 + 2 * eps)
