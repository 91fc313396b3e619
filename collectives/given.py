"""What a caller gives to a reduction, checked. It knows nothing of what becomes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from collectives.errors import LocalFault
from collectives.reduce import Layout
from collectives.reduce.feedback import Feedback


@dataclass(frozen=True, slots=True)
class Input:
    """What the caller gave for one attempt."""

    nonce: int
    tensors: Sequence[torch.Tensor]
    weight: float
    layout: Layout
    out: Sequence[torch.Tensor] | None = None
    feedback: Feedback | None = None


def storages(tensors: Sequence[torch.Tensor]) -> set[int]:
    """Where their memory begins."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


def input_of(
    nonce: int,
    tensors: Sequence[torch.Tensor],
    weight: float,
    out: Sequence[torch.Tensor] | None,
    feedback: Feedback | None,
) -> Input:
    """Checked. Raises LocalFault for what cannot be averaged, or written to."""
    if not (math.isfinite(weight) and weight >= 0):
        raise LocalFault(f"a weight must be finite and not negative, got {weight!r}")
    layout = Layout.of(tensors)
    if layout.elements == 0:
        raise LocalFault("there is nothing to reduce: the tensors have no elements")
    if out is not None:
        if Layout.of(out).digest != layout.digest or not all(tensor.is_contiguous() for tensor in out):
            raise LocalFault("out must be contiguous tensors of the shapes and dtypes that are reduced")
        if not storages(out).isdisjoint(storages(tensors)):
            raise LocalFault("out must not share memory with the tensors that are reduced")
    return Input(nonce, tensors, weight, layout, out, feedback)
