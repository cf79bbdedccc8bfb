from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from memory import growth
from safetensors.torch import load_file, save_file
from small_models import CONFIGS, VOCABULARY, make_model, save_model

from pt2gguf.errors import Pt2Error
from pt2gguf.model import Checkpoint, Skeleton

CPU = torch.device("cpu")


def _ids(samples: int, length: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", [*CONFIGS, "qwen2_moe", "gemma2", "gpt_neox", "phi3"])
@torch.no_grad()
def test_layer_by_layer_equals_the_whole_model(tmp_path: Path, kind: str) -> None:
    """Sliding windows, experts, tied heads, tuples: all come out of the recorded calls."""
    model = make_model(kind) if kind in CONFIGS else _other_model(kind)
    model.save_pretrained(tmp_path)
    ids = _ids(5, 24)
    skeleton = Skeleton(Checkpoint(tmp_path))
    assert all(p.is_meta for p in skeleton.layers.parameters())

    hidden, calls = skeleton.embed(ids, batch=2)
    assert calls.keys() == {2, 1}
    outputs = []
    for part in hidden.split(2):
        for index in range(len(skeleton)):
            part = calls[len(part)][index](skeleton.load_layer(index, CPU), part)
        outputs.append(part)

    logits = skeleton.head(CPU)(torch.cat(outputs))

    expected = []
    decoder = model.get_decoder() if kind != "gpt_neox" else model.gpt_neox
    norm = decoder.final_layer_norm if kind == "gpt_neox" else decoder.norm
    norm.register_forward_pre_hook(lambda _, args: expected.append(args[0]))
    whole_logits = torch.cat([model(part).logits for part in ids.split(2)])
    # The same float32 sums through another attention kernel at most: a few units in the last place
    # of values of order one, added up over two layers.
    torch.testing.assert_close(torch.cat(outputs), torch.cat(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, whole_logits, rtol=1e-5, atol=1e-5)
    assert all(p.is_meta for p in skeleton.layers.parameters())


def _other_model(kind: str):
    from transformers import AutoConfig, AutoModelForCausalLM

    extra = {
        "qwen2_moe": {
            "num_experts": 4,
            "moe_intermediate_size": 128,
            "shared_expert_intermediate_size": 128,
        },
        "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 32},
        "gpt_neox": {},
        "phi3": {"pad_token_id": 0},
    }[kind]
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        **extra,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def _embedding(path: Path) -> Callable[[], object]:
    skeleton = Skeleton(Checkpoint(path))
    skeleton.embed(_ids(1, 64), batch=1)  # what is set up once
    ids = _ids(8192, 64)
    return lambda: skeleton.embed(ids, batch=64)


def test_embedding_takes_the_memory_of_its_result(tmp_path: Path) -> None:
    path = save_model(tmp_path, "llama", num_hidden_layers=1)
    assert growth(_embedding, path) < 1.5 * 8192 * 64 * 128 * 4


def test_one_layer_at_a_time(tmp_path: Path) -> None:
    skeleton = Skeleton(Checkpoint(save_model(tmp_path, "llama", num_hidden_layers=3)))
    skeleton.embed(_ids(2, 8), batch=2)
    layer = skeleton.load_layer(1, CPU)
    assert not any(p.is_meta for p in layer.parameters())
    assert all(p.is_meta for p in skeleton._model.parameters())


def test_checkpoint_of_the_body_alone(tmp_path: Path) -> None:
    """Saved without the "model." that the whole model's names begin with."""
    path = save_model(tmp_path, "llama")
    tensors = load_file(path / "model.safetensors")
    save_file(
        {n.removeprefix("model."): t for n, t in tensors.items() if n != "lm_head.weight"},
        path / "model.safetensors",
    )
    skeleton = Skeleton(Checkpoint(path))
    assert skeleton.stored_name(1, "mlp.up_proj.weight") == "layers.1.mlp.up_proj.weight"
    layer = skeleton.load_layer(1, CPU)
    assert torch.equal(
        layer.get_parameter("mlp.up_proj.weight"), tensors["model.layers.1.mlp.up_proj.weight"]
    )


def test_config_and_weights_of_different_models(tmp_path: Path) -> None:
    path = save_model(tmp_path, "llama")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(128, 128)
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(
        Pt2Error, match=r"up_proj.weight has shape \(128, 128\) where .* \(256, 128"
    ):
        Skeleton(Checkpoint(path)).load_layer(0, CPU)


def test_not_a_causal_language_model(tmp_path: Path) -> None:
    from transformers import CLIPConfig

    CLIPConfig().save_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(Pt2Error, match=r"architecture 'clip' .* is not a causal language model"):
        Skeleton(Checkpoint(tmp_path))
