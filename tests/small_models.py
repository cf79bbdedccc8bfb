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
    AutoModelForImageTextToText,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    LlavaConfig,
    Mistral3Config,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OlmoeConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3VLConfig,
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

_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

_QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 64,
    "out_hidden_size": 128,
}

# More that only whole conversions are tested with: llama.cpp's converter, transformers or both do
# something of their own with them.
MORE_CONFIGS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "gemma2": (Gemma2Config, {"sliding_window": 4096, "tie_word_embeddings": True}),
    "granite": (GraniteConfig, {}),
    # q, k and v are one matrix, in GPT-NeoX one head's after the other's.
    "gpt_neox": (GPTNeoXConfig, {}),
    "phi3": (Phi3Config, {"pad_token_id": 0, "original_max_position_embeddings": 64}),
    # The bias of its routers is renamed.
    "deepseek_v3": (
        DeepseekV3Config,
        {
            "num_key_value_heads": 4,
            "kv_lora_rank": 128,
            "q_lora_rank": 128,
            "qk_rope_head_dim": 32,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 128,
            "first_k_dense_replace": 1,
        },
    ),
    # The converter reads all tensors twice.
    "gpt_oss": (GptOssConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    # Has a cache of its own.
    "lfm2": (
        Lfm2Config,
        {"layer_types": ["conv", "full_attention"], "tie_word_embeddings": True},
    ),
    # Parts of models that read images.
    "gemma3": (
        Gemma3Config,
        {
            "vision_config": _VISION,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 32,
            "tie_word_embeddings": True,
        },
    ),
    # Says at the top that the head is the embeddings, which is not so.
    "llava": (
        LlavaConfig,
        {
            "vision_config": {**_VISION, "model_type": "clip_vision_model"},
            "model_type": "llama",
        },
    ),
    "mistral3": (
        Mistral3Config,
        {
            "vision_config": {**_VISION, "model_type": "pixtral", "head_dim": 16},
            "model_type": "mistral",
            "sliding_window": None,
        },
    ),
    "qwen2_5_vl": (
        Qwen2_5_VLConfig,
        {
            "vision_config": _QWEN_VISION,
            "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        },
    ),
    "qwen3_vl": (
        Qwen3VLConfig,
        {
            "vision_config": {**_QWEN_VISION, "deepstack_visual_indexes": [0]},
            "rope_scaling": {"rope_type": "default", "mrope_section": [4, 6, 6]},
            "tie_word_embeddings": True,
        },
    ),
}


def make_model(kind: str, **changes: Any) -> PreTrainedModel:
    """A float32 model of one of these architectures; the same one every time."""
    config_class, values = (CONFIGS | MORE_CONFIGS)[kind]
    torch.manual_seed(0)
    values = {**_DENSE, **values, **changes}
    vision = values.pop("vision_config", None)
    if vision is None:
        return AutoModelForCausalLM.from_config(config_class(**values)).eval()
    config = config_class(text_config=values, vision_config=vision)
    return AutoModelForImageTextToText.from_config(config).eval()


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
