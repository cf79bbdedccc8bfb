"""Attention of one token after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pt2gguf.convert.generation import _grouped_attention


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shared", [1, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_against_float64(dtype: torch.dtype, shared: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(shared)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    query, key, value = some(3, 2 * shared, 1, 32), some(3, 2, 45, 32), some(3, 2, 45, 32)
    mask = torch.rand(3, 1, 1, 48, generator=generator) < 0.5 if masked else None
    found, _ = _grouped_attention(nn.Identity(), query, key, value, mask, scaling=0.3)
    scores = query.double() @ key.double().repeat_interleave(shared, 1).mT * 0.3
    if mask is not None:
        scores = scores.masked_fill(~mask[..., :45], -torch.inf)
    wanted = scores.softmax(-1) @ value.double().repeat_interleave(shared, 1)
    # The shares and the result are rounded, sums are float32's.
    bound = (2 * torch.finfo(dtype).eps + 64 * 2**-23) * float(value.abs().max())
    assert found.shape == (3, 1, 2 * shared, 32)
    assert (found.double() - wanted.transpose(1, 2)).abs().max() <= bound
