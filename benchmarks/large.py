"""Time and memory of converting models of large shapes, with random weights.

    python benchmarks/large.py 7b --device cuda --gpu-memory 24  # all of LLaMA-7B's layers
    python benchmarks/large.py 65b --layers 1 --device cuda

Writes a checkpoint of the shape (random weights; 13.5 GB for all of 7b), ternarizes and tunes it on
128 x 2048 random tokens as `pt2gguf convert` does by default, and prints where the time went. With
fewer --layers than the model has, the time of all layers is extrapolated, as they are alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path

import psutil
import torch
from rich.console import Console
from safetensors.torch import save_file
from synthetic import SHAPES, VOCABULARY
from transformers import LlamaConfig

from pt2gguf.convert.calibration import Calibration
from pt2gguf.convert.machine import usable_device
from pt2gguf.convert.progress import ConsoleReporter, peak_memory
from pt2gguf.convert.run import conversion_needs, make_plan, ternarize_checkpoint
from pt2gguf.model import Checkpoint, Skeleton
from pt2gguf.ternary import METHODS


class Timed(ConsoleReporter):
    """Also keeps when what was done."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(Console(highlight=False, soft_wrap=True), device)
        self.times: dict[str, float] = {}
        self._last = time.monotonic()

    def _until_now(self, what: str) -> None:
        now = time.monotonic()
        self.times[what] = self.times.get(what, 0.0) + now - self._last
        self._last = now

    def start(self, layers: int) -> None:
        self._until_now("writing text, embedding")
        super().start(layers)

    def layer_done(self, index: int, reused: bool) -> None:
        self._until_now("layers")
        super().layer_done(index, reused)

    def tuning_started(self, steps: int) -> None:
        self._until_now("preparing the tuning")
        super().tuning_started(steps)

    def tuning_step(self, step: int, steps: int, loss: float) -> None:
        self._until_now("tuning")
        super().tuning_step(step, steps, loss)


def write_checkpoint(path: Path, shape: str, layers: int, device: torch.device) -> None:
    """float16, one shard for each layer, weights as initialised before training."""
    sizes = SHAPES[shape]
    width, inner = sizes.width, sizes.inner
    LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.key_heads,
        max_position_embeddings=2048,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(path)
    key_width = width // sizes.heads * sizes.key_heads
    matrices = {f"self_attn.{n}_proj": (width, width) for n in "qo"}
    matrices |= {f"self_attn.{n}_proj": (key_width, width) for n in "kv"}
    matrices |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width)}
    matrices |= {"mlp.down_proj": (width, inner)}
    norms = ("input_layernorm", "post_attention_layernorm")
    shards = [{"model.embed_tokens": (VOCABULARY, width), "lm_head": (VOCABULARY, width)}]
    shards += [{f"model.layers.{i}.{n}": s for n, s in matrices.items()} for i in range(layers)]
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards):
        tensors = {
            f"{name}.weight": 0.02 * torch.randn(size, device=device, dtype=torch.float16).cpu()
            for name, size in shard.items()
        }
        if number:
            prefix = f"model.layers.{number - 1}"
            tensors |= {f"{prefix}.{n}.weight": torch.ones(width).half() for n in norms}
        else:
            tensors["model.norm.weight"] = torch.ones(width).half()
        save_file(tensors, path / f"shard-{number:03d}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"shard-{number:03d}.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="default: all of the model's")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--written", type=int, help="default: half of the samples, as convert's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--gpu-memory", type=float, help="GB that may be taken; default: all")
    options = parser.parse_args()
    device = usable_device(options.device)
    whole = SHAPES[options.shape].layers
    layers = options.layers or whole
    torch.manual_seed(0)
    if options.gpu_memory is not None:
        there = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(options.gpu_memory * 1e9 / there, device)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        write_checkpoint(path / "model", options.shape, layers, device)
        torch.cuda.empty_cache()
        ids = torch.randint(3, VOCABULARY, (options.samples, options.length))
        calibration = Calibration(ids, {"seed": 0})
        written = options.samples // 2 if options.written is None else options.written
        method = dataclasses.replace(METHODS["default"], written_windows=written)
        reporter = Timed(device)
        held = psutil.Process().memory_info().rss
        begun = time.monotonic()
        checkpoint = Checkpoint(path / "model")
        with ternarize_checkpoint(
            checkpoint, method, calibration, path / "work", device=device, reporter=reporter
        ):
            seconds = time.monotonic() - begun
        reporter._until_now("saving")
        skeleton = Skeleton(checkpoint)
        plan = make_plan(skeleton, lambda name: None)
        needs = conversion_needs(skeleton, plan, method, calibration, device)
    print(f"{options.shape}, {layers} of {whole} layers, {ids.shape[0]} x {ids.shape[1]} tokens")
    for what, spent in reporter.times.items():
        print(f"  {what}: {spent:.1f} s")
    if layers < whole:
        print(f"  layers, all {whole} of them: {reporter.times['layers'] * whole / layers:.0f} s")
    print(f"  together {seconds:.1f} s")
    host = peak_memory(torch.device("cpu"))
    print(f"  peak memory: host {host / 1e9:.2f} GB, {held / 1e9:.2f} of it before", end="")
    print(f" (estimated from there on: {needs.host / 1e9:.2f})", end="")
    if device.type == "cuda":
        reserved = torch.cuda.max_memory_reserved()
        print(
            f", GPU {peak_memory(device) / 1e9:.2f} GB, {reserved / 1e9:.2f} with the allocator's"
        )
        print(f"  on {torch.cuda.get_device_name()}, estimated {needs.gpu / 1e9:.2f} GB")
    else:
        print()


if __name__ == "__main__":
    main()
