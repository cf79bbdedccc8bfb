"""What makes results repeatable."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pt2gguf.convert.machine import RepeatableAttention


@pytest.mark.parametrize("before", [(False, False), (True, True)])
def test_the_gradients_of_attention_must_repeat(before: tuple[bool, bool]) -> None:
    def mode() -> tuple[bool, bool]:
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )

    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    try:
        x = torch.randn(1, 2, 8, 16, requires_grad=True)
        with RepeatableAttention():
            y = nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        seen = []
        assert y.grad_fn is not None
        y.grad_fn.register_prehook(lambda *_: seen.append(mode()))
        y.sum().backward()
        assert seen == [(True, False)]
        assert mode() == before
        with RepeatableAttention(), torch.no_grad():
            nn.functional.scaled_dot_product_attention(x, x, x)
        assert mode() == before
    finally:
        torch.use_deterministic_algorithms(False)
