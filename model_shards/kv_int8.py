"""Keys and values in eight bits: a row of a head is ``q * scale``, with the scale (bfloat16) behind its numbers.

Each position has a scale of its own: one for a whole block would change while the block fills, and with it rows that
are there already, shared or told to another machine. A number is off by at most half its scale, which is the row's
largest over 127 (and half a part in 128 for the scale's own rounding). Knows rows, and nothing of pools.
"""

from __future__ import annotations

import torch

KV_QUANTS = ("none", "int8")
SCALE_BYTES = 2
_MOST = 127


def encode(rows: torch.Tensor) -> torch.Tensor:
    """[.., width] of any float dtype -> uint8 [.., width + SCALE_BYTES]."""
    wide = rows.float()
    scale = (wide.abs().amax(-1, keepdim=True) / _MOST).bfloat16()
    # A row of nothing but zeros has no scale to divide by, and stays zeros.
    whole = (wide / torch.where(scale == 0, 1, scale).float()).round().clamp(-_MOST, _MOST).to(torch.int8)
    return torch.cat((whole.view(torch.uint8), scale.view(torch.uint8)), -1)


def decode(stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `encode` made, as [.., width] of ``dtype``."""
    whole = stored[..., :-SCALE_BYTES].view(torch.int8)
    return whole.to(dtype).mul_(scales(stored).to(dtype))


def scales(stored: torch.Tensor) -> torch.Tensor:
    """The scales [.., 1] bfloat16 of stored rows."""
    return stored[..., -SCALE_BYTES:].contiguous().view(torch.bfloat16)
