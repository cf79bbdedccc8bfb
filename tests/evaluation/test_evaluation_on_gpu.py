"""The same figures on a GPU; skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from small_models import VOCABULARY, save_model

from pt2gguf.evaluation.baselines import gptq_weights
from pt2gguf.evaluation.perplexity import perplexity
from pt2gguf.model import Checkpoint, Skeleton, load_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def test_gptq_and_perplexity(tmp_path) -> None:
    checkpoint = Checkpoint(save_model(tmp_path, "qwen3_moe"))
    names = [
        name
        for name, stored in checkpoint.tensors.items()
        if name.startswith("model.layers") and len(stored.shape) > 1 and "mlp.gate.w" not in name
    ]
    ids = torch.randint(0, VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(0))
    on_cpu, on_gpu = (
        gptq_weights(Skeleton(checkpoint), names, ids, torch.device(device))
        for device in ("cpu", "cuda")
    )
    first = "model.layers.0.self_attn.q_proj.weight"
    # Later layers see other roundings; in the first one, single weights may tip over.
    assert (on_cpu[first] != on_gpu[first]).float().mean() < 0.01
    assert on_gpu.keys() == on_cpu.keys()
    assert all(torch.isfinite(weight).all() and weight.is_cpu for weight in on_gpu.values())
    model = load_model(checkpoint, on_cpu)
    expected = perplexity(model, ids.flatten(), 32)
    assert perplexity(model.to("cuda"), ids.flatten(), 32) == pytest.approx(expected, rel=1e-3)
