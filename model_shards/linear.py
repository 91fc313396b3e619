"""Linear maps and norms over rows of several sessions at once.

Norms and linear maps see all rows [N, hidden] together. Plain objects instead of torch modules: a decode step
of a small model is mostly call overhead. Knows nothing of sessions, caches or files.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from model_shards.config import ModelConfig
from model_shards.errors import LocalFault
from model_shards.integers import PackedInt8
from model_shards.lowrank import Tuned
from model_shards.packed import PackedStack, PackedWeight
from model_shards.quant import QuantWeight
from model_shards.weights import Part


class Linear:
    """y = x @ weight.T + bias; weight [out, in], x [N, in]."""

    __slots__ = ("bias", "weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def bytes(self) -> int:
        return int(self.weight.nbytes) + (self.bias.nbytes if self.bias is not None else 0)


class QuantLinear:
    """A Linear over a quantised weight; the bias stays as it was."""

    __slots__ = ("bias", "weight")

    def __init__(self, weight: QuantWeight, bias: torch.Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = self.weight.matmul(x)
        return y if self.bias is None else y + self.bias

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape

    @property
    def bytes(self) -> int:
        return int(self.weight.nbytes) + (self.bias.nbytes if self.bias is not None else 0)


class PackedLinear:
    """A Linear over a packed weight."""

    __slots__ = ("bias", "weight")

    def __init__(self, weight: PackedWeight | PackedInt8, bias: torch.Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight.matmul(x, self.bias)

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape

    @property
    def bytes(self) -> int:
        return self.weight.nbytes + (self.bias.nbytes if self.bias is not None else 0)


AnyLinear = Linear | QuantLinear | PackedLinear


def linear_over(weight: Part, bias: Part | None = None) -> AnyLinear:
    """The Linear of a loaded part, quantised, packed or as it came."""
    if bias is not None and not isinstance(bias, torch.Tensor):
        raise LocalFault("a bias is never quantised")
    if isinstance(weight, PackedStack):
        raise LocalFault("experts' matrices are no one matrix")
    if isinstance(weight, PackedWeight | PackedInt8):
        return PackedLinear(weight, bias)
    return Linear(weight, bias) if isinstance(weight, torch.Tensor) else QuantLinear(weight, bias)


class RmsNorm:
    """Root-mean-square norm over the last dimension (arXiv 1910.07467), reduced in float32.

    ``weight`` is float32. With an ``offset`` (Gemma's 1 + weight) or ``wide`` the whole norm is computed in
    float32; otherwise the weight multiplies in the compute dtype, each as its reference does.
    """

    __slots__ = ("eps", "shape", "weight", "wide")

    def __init__(
        self,
        weight: torch.Tensor,
        eps: float,
        dtype: torch.dtype,
        offset: float = 0.0,
        *,
        wide: bool = False,
    ) -> None:
        self.wide = (offset != 0.0 or wide) and dtype != torch.float32
        self.weight = weight + offset if offset or wide else weight.to(dtype)
        self.eps = eps
        self.shape = tuple(weight.shape[-1:])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.wide:
            return F.rms_norm(x.float(), self.shape, self.weight, self.eps).to(x.dtype)
        return F.rms_norm(x, self.shape, self.weight, self.eps)


class HeadNorms:
    """RMS norms of query and key heads in one go; ``weight`` [heads + kv_heads, head_dim], offset as in
    RmsNorm."""

    __slots__ = ("eps", "weight", "wide")

    def __init__(
        self, config: ModelConfig, q_norm: torch.Tensor, k_norm: torch.Tensor, dtype: torch.dtype
    ) -> None:
        weight = torch.cat((q_norm.expand(config.heads, -1), k_norm.expand(config.kv_heads, -1)))
        self.wide = config.norm_offset != 0.0
        self.weight = weight + config.norm_offset if self.wide else weight.to(dtype)
        self.eps = config.norm_eps

    def __call__(self, qk: torch.Tensor) -> torch.Tensor:
        """[N, heads + kv_heads, head_dim], unchanged in shape and dtype."""
        if self.wide:
            return (F.rms_norm(qk.float(), qk.shape[-1:], None, self.eps) * self.weight).to(qk.dtype)
        return F.rms_norm(qk, qk.shape[-1:], None, self.eps) * self.weight


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


class Mlp:
    """Gated feed-forward (SwiGLU, arXiv 2002.05202); gate and up are one matrix [2 * intermediate,
    hidden]."""

    def __init__(self, gate_up: AnyLinear, down: AnyLinear, activation: str) -> None:
        self.gate_up = gate_up
        self.down = down
        self.width = gate_up.shape[0] // 2
        self.activation = ACTIVATIONS[activation]

    def __call__(self, x: torch.Tensor, tuned: Tuned | None = None) -> torch.Tensor:
        both = self.gate_up(x)
        if tuned is not None:
            tuned.add("gate_up", x, both)
        inner = self.activation(both[:, : self.width]).mul_(both[:, self.width :])
        given = self.down(inner)
        if tuned is not None:
            tuned.add("down", inner, given)
        return given

    def linears(self) -> tuple[AnyLinear, ...]:
        return self.gate_up, self.down


class ClampedMlp:
    """GPT-OSS's feed-forward: ``gate_up`` holds gate and up in turn, both clamped; down((up + 1) * gate *
    sigmoid(alpha * gate)). Its matrices are stored in one tensor for all experts, which no adapter is for."""

    def __init__(self, gate_up: AnyLinear, down: AnyLinear, limit: float, alpha: float) -> None:
        self.gate_up = gate_up
        self.down = down
        self.limit = limit
        self.alpha = alpha

    def __call__(self, x: torch.Tensor, tuned: Tuned | None = None) -> torch.Tensor:
        both = self.gate_up(x)
        gate = both[:, 0::2].clamp(max=self.limit)
        up = both[:, 1::2].clamp(-self.limit, self.limit)
        return self.down((up + 1) * (gate * torch.sigmoid(gate * self.alpha)))

    def linears(self) -> tuple[AnyLinear, ...]:
        return self.gate_up, self.down
