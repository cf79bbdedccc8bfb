"""Small randomly initialised models of several architectures, saved as checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from command_line import EXAMPLE_MODEL
from command_line import VOCABULARY as EXAMPLE_VOCABULARY
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OlmoeConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCABULARY = 97

_DENSE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}

CONFIGS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "qwen2": (
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3Config, {"tie_word_embeddings": True}),
    "mistral": (MistralConfig, {"sliding_window": 8}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128},
    ),
    "olmo2": (Olmo2Config, {}),
    # Calls experts that no token chose, too. llama.cpp knows it with as many keys as queries.
    "olmoe": (
        OlmoeConfig,
        {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "intermediate_size": 128,
            "num_key_value_heads": 4,
        },
    ),
    "mixtral": (MixtralConfig, {"num_local_experts": 3, "num_experts_per_tok": 2}),
}


def make_model(kind: str, **changes: Any) -> PreTrainedModel:
    """A float32 model of an architecture of `CONFIGS`; the same one every time."""
    config_class, values = CONFIGS[kind]
    torch.manual_seed(0)
    config = config_class(**{**_DENSE, **values, **changes})
    return AutoModelForCausalLM.from_config(config).eval()


def save_model(
    path: Path, kind: str, *, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """Save such a model at `path` and return it."""
    make_model(kind, **changes).to(dtype).save_pretrained(path)
    return path


def save_model_with_tokenizer(path: Path, kind: str, **changes: Any) -> Path:
    """Save such a model at `path`, with the tokenizer of the repository's example; return it."""
    model = save_model(path, kind, vocab_size=EXAMPLE_VOCABULARY, **changes)
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE_MODEL / name, model)
    return model


def save_shape(path: Path, config: PretrainedConfig) -> Path:
    """A float16 checkpoint of zeros at `path`, of any size: its file is all hole."""
    config.save_pretrained(path)
    with init_empty_weights():
        shapes = {
            n: t.shape for n, t in AutoModelForCausalLM.from_config(config).state_dict().items()
        }
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * shape.numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    return path
