"""Train the Qwen3-shaped model of the benchmarks: QK-norm, tied embeddings, 23 million parameters.

    python benchmarks/train_qwen3.py TEACHER OUT [--windows N] [--epochs N] [--device cuda]

No data set is needed and no test text is touched: TEACHER (llama-30m) samples the text, and the
new model learns the teacher's whole distribution of each next token (forward KL divergence). It
takes a few minutes of an H100. OUT becomes a checkpoint with the teacher's tokenizer.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

LENGTH = 512  # tokens in a window
SAMPLED_AT_ONCE = 4096  # windows
BATCH = 64  # windows
PEAK_RATE = 2e-3
WARMUP = 0.03  # share of the steps
ROPE_THETA = 10000.0


def sample_text(teacher: LlamaForCausalLM, windows: int) -> Tensor:
    """(windows, LENGTH) int64: what the teacher says at temperature 1 after its start token."""
    start = torch.tensor([[teacher.config.bos_token_id]], device=teacher.device)
    parts: list[Tensor] = []
    for first in range(0, windows, SAMPLED_AT_ONCE):
        sampled = teacher.generate(
            start.expand(min(windows - first, SAMPLED_AT_ONCE), 1),
            do_sample=True,
            top_k=0,
            min_new_tokens=LENGTH - 1,  # no end of text before the window is full
            max_new_tokens=LENGTH - 1,
        )
        assert isinstance(sampled, Tensor)
        parts.append(sampled.cpu())
        print(f"sampled {sum(len(part) for part in parts)} of {windows} windows", flush=True)
    return torch.cat(parts)


def new_model(teacher: LlamaForCausalLM) -> Qwen3ForCausalLM:
    """A Qwen3 model with fresh weights; only its embeddings start from the teacher's head."""
    config = Qwen3Config(
        vocab_size=teacher.config.vocab_size,
        hidden_size=512,
        intermediate_size=1536,  # rows are multiples of 256, which llama.cpp's K-quants need
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=teacher.config.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        bos_token_id=teacher.config.bos_token_id,
        eos_token_id=teacher.config.eos_token_id,
    )
    model = Qwen3ForCausalLM(config)
    # The head's principal components know which tokens are alike, the rare ones too.
    head = teacher.get_output_embeddings().weight.detach().float()
    _, _, directions = torch.linalg.svd(head, full_matrices=False)
    projected = head @ directions[: config.hidden_size].T
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(projected / projected.std() * 0.02)
    return model


def divergence(model: Qwen3ForCausalLM, teacher: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Mean forward KL divergence, in nats per token, of `model` from `teacher` on ids (B, T)."""
    with torch.no_grad():
        target = teacher(ids).logits.float().log_softmax(-1)
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = model(ids).logits
    return (target.exp() * (target - logits.float().log_softmax(-1))).sum(-1).mean()


def train(model: Qwen3ForCausalLM, teacher: LlamaForCausalLM, text: Tensor, epochs: int) -> None:
    """AdamW with warmup and a cosine to zero; prints the divergence on the way."""
    steps = epochs * (len(text) // BATCH)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / (WARMUP * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))
        ),
    )
    step = 0
    for _ in range(epochs):
        for batch in torch.randperm(len(text))[: len(text) // BATCH * BATCH].split(BATCH):
            loss = divergence(model, teacher, text[batch].to(teacher.device))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            if step % 100 == 0 or step == steps:
                print(f"step {step} of {steps}: KL divergence {loss.item():.4f}", flush=True)


def save(model: Qwen3ForCausalLM, teacher: Path, out: Path) -> None:
    """float16 weights, the teacher's tokenizer, and a config that transformers 4 reads as well."""
    model.half().save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "rope_theta": ROPE_THETA}, indent=2))
    for file in teacher.glob("tokenizer*"):
        shutil.copyfile(file, out / file.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("teacher", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--windows", type=int, default=20480, help="of 512 tokens, to learn from")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    started = time.time()
    teacher = LlamaForCausalLM.from_pretrained(arguments.teacher, dtype=torch.bfloat16)
    teacher = teacher.to(arguments.device).eval()
    model = new_model(teacher).to(arguments.device)
    text = sample_text(teacher, arguments.windows)
    print(f"{text.numel()} tokens sampled after {time.time() - started:.0f} s", flush=True)
    train(model, teacher, text, arguments.epochs)
    save(model, arguments.teacher, arguments.out)
    print(f"{model.num_parameters()} parameters trained in {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
