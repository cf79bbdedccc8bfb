"""Perplexity in transformers, against its definition."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from small_models import VOCABULARY, make_model

from pt2gguf.errors import Pt2Error
from pt2gguf.evaluation.perplexity import perplexity, window_length


def test_all_positions_of_whole_windows_count() -> None:
    model = make_model("llama").double()
    ids = torch.randint(0, VOCABULARY, (3 * 16 + 5,), generator=torch.Generator().manual_seed(0))
    losses = []
    for start in (0, 16, 32):
        for position in range(1, 16):
            with torch.inference_mode():
                logits = model(ids[None, start : start + position]).logits[0, -1].double()
            losses.append(-torch.log_softmax(logits, 0)[ids[start + position]])
    expected = torch.stack(losses).mean().exp().item()
    assert perplexity(model, ids, 16) == pytest.approx(expected, rel=1e-6)  # logits in float32


def test_a_model_that_knows_nothing() -> None:
    model = make_model("llama")
    model.lm_head.weight.data.zero_()
    ids = torch.randint(0, VOCABULARY, (64,))
    assert perplexity(model, ids, 32) == pytest.approx(VOCABULARY, rel=1e-6)


def test_window_length() -> None:
    assert window_length(SimpleNamespace(max_position_embeddings=4096), None) == 2048
    assert window_length(SimpleNamespace(max_position_embeddings=512), None) == 512
    assert window_length(SimpleNamespace(max_position_embeddings=512), 128) == 128
    assert window_length(SimpleNamespace(), None) == 2048
    with pytest.raises(Pt2Error, match="context of 512"):
        window_length(SimpleNamespace(max_position_embeddings=512), 513)
