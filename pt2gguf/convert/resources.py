"""What a conversion will need, checked before hours of work."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from pt2gguf.blocks import BLOCK_SIZE
from pt2gguf.errors import Pt2Error
from pt2gguf.ternary import output_bytes

FLOAT16, FLOAT32, FLOAT64 = 2, 4, 8
# Square matrices (m, m) and weight-shaped ones (n, m), float64, alive at once in `ternarize`.
SQUARES, WEIGHTS = 10, 6
# Of a group's output statistics, besides themselves: in float64, with inverses and factors.
OUTPUT_COPIES = 6
# Tensors (tokens, widest) alive at once in a forward pass, and in one whose gradients are wanted.
ACTIVATIONS, KEPT_ACTIVATIONS = 8, 24
# Numbers for each block of 128 weights while grids are tuned: alpha and mu, and for each of them a
# change, its gradient and Adam's two moments. Of these are saved: the changes and the moments.
GRID_NUMBERS, SAVED_NUMBERS = 10, 6
# Bytes for each element of a tensor while it is read: as stored, as float32, and, where some are
# not finite, which.
READING = FLOAT16 + FLOAT32 + 1
# Tensors (tokens, vocabulary) alive at once where logits are compared or tokens drawn; integers
# count twice.
LOGITS = 8
# Bytes of the host for PyTorch's CUDA libraries, loaded as they are used (2 to 3 GB were seen).
CUDA_LIBRARIES = 3 * 10**9
# Bytes for a row that folded statistics take beyond half of what they were: the diagonal, and one
# entry more in an odd number of rows.
FOLDED = 8
DESCRIPTION = 1024  # bytes about one weight in its layer's file, with names and report
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class LayerSize:
    """The largest decoder layer. parameters: their number; groups: (rows, columns) of each stacked
    group of matrices; statistics: bytes of the input statistics that are collected together;
    outputs: bytes of its output statistics, 0 if there are to be none."""

    parameters: int
    groups: Sequence[tuple[int, int]]
    statistics: int
    outputs: int


@dataclass(frozen=True)
class Needs:
    """Peak bytes beyond what the process holds already.

    gpu: without hidden states, which find place there or stay on the host.
    """

    host: int
    gpu: int
    disk: int

    def then(self, later: Needs) -> Needs:
        """Of two works, one after the other, that both leave files."""
        return Needs(max(self.host, later.host), max(self.gpu, later.gpu), self.disk + later.disk)


def estimate(
    *,
    layer: LayerSize,
    body_parameters: int,
    ternary: Sequence[tuple[int, int]],
    stock_bytes: int,
    tokens: int,
    further_tokens: int,
    batch_tokens: int,
    hidden_size: int,
    full_precision: bool,
    on_gpu: bool,
) -> Needs:
    """An estimate from above.

    body_parameters: those outside of decoder layers, without the head; ternary: the shapes
    (n, m) of all matrices to ternarize; stock_bytes: of all that is rounded to stock types,
    alternatives included; tokens: that the layers are calibrated on; further_tokens: that only the
    full-precision model reads; batch_tokens: that run through a layer together; full_precision:
    whether the full-precision model runs beside the ternary one.
    """
    copies = 2 if full_precision else 1
    hidden = (copies * tokens + further_tokens) * hidden_size * FLOAT32
    body = body_parameters * READING
    widest = max((max(group) for group in layer.groups), default=hidden_size)
    forward = ACTIVATIONS * batch_tokens * widest * FLOAT32
    work = max((SQUARES * m * m + WEIGHTS * n * m for n, m in layer.groups), default=0) * FLOAT64
    if layer.outputs:
        work += OUTPUT_COPIES * max(output_bytes(n) for n, _ in layer.groups)
    statistics = layer.statistics + layer.outputs
    compute = copies * layer.parameters * FLOAT32 + statistics + max(forward, work)
    # Two bits a weight, alpha and mu for 128 of them, the permutation, and the description.
    disk = sum(n * m // 4 + n * m // 32 + 4 * m + DESCRIPTION for n, m in ternary) + stock_bytes
    if on_gpu:
        # Weights pass through the host one by one, as if all of a layer were one.
        host = CUDA_LIBRARIES + hidden + max(body, layer.parameters * READING, layer.outputs)
        return Needs(host=host, gpu=compute, disk=disk)
    return Needs(host=hidden + max(body, compute), gpu=0, disk=disk)


def estimate_outputs(
    *,
    layer: LayerSize,
    layers: int,
    other_parameters: int,
    tokens: int,
    batch_tokens: int,
    head_tokens: int,
    hidden_size: int,
    vocabulary: int,
    on_gpu: bool,
) -> Needs:
    """An estimate from above of what the output statistics take.

    layers: decoder layers; other_parameters: of the model outside of them; tokens: that are read;
    batch_tokens, head_tokens: that run through the layers and through the head together.
    """
    widest = max((max(group) for group in layer.groups), default=hidden_size)
    running = KEPT_ACTIVATIONS * batch_tokens * widest * FLOAT32
    at_layer = 2 * layer.parameters * FLOAT32 + layer.outputs + running
    at_head = other_parameters * FLOAT32 + LOGITS * head_tokens * vocabulary * FLOAT32
    compute = max(at_layer, at_head)
    hidden = 4 * tokens * hidden_size * FLOAT32
    inputs = layers * tokens * hidden_size * FLOAT16
    stored = layer.outputs // 2 + sum(FOLDED * rows for rows, _ in layer.groups)
    disk = inputs + layers * (stored + DESCRIPTION * len(layer.groups))
    if on_gpu:
        host = CUDA_LIBRARIES + hidden + max(other_parameters, layer.parameters) * READING
        return Needs(host=host, gpu=compute, disk=disk)
    return Needs(host=hidden + compute, gpu=0, disk=disk)


def estimate_tuning(
    *,
    layer: LayerSize,
    layers: int,
    ternary: Sequence[tuple[int, int]],
    other_parameters: int,
    tokens: int,
    step_tokens: int,
    head_tokens: int,
    hidden_size: int,
    vocabulary: int,
    recompute: bool,
    on_gpu: bool,
) -> Needs:
    """An estimate from above of what tuning the grids takes.

    layers: decoder layers; ternary: the shapes (n, m) of all ternary matrices; other_parameters:
    all others of the model; tokens: of the texts; step_tokens, head_tokens: that run through the
    layers and through the head together; recompute: whether layers run twice instead of being kept.
    """
    weights = sum(n * m for n, m in ternary)
    blocks = weights // BLOCK_SIZE
    model = weights // 4 + blocks * GRID_NUMBERS * FLOAT32 + other_parameters * FLOAT32
    dense = 3 * layer.parameters * FLOAT32  # as it is made, or with its gradients
    widest = max((max(group) for group in layer.groups), default=hidden_size)
    activations = step_tokens * KEPT_ACTIVATIONS * widest * FLOAT32
    kept = (
        step_tokens * hidden_size * FLOAT32
        if recompute
        else layer.parameters * FLOAT32 + activations
    )
    head = LOGITS * head_tokens * vocabulary * FLOAT32
    compute = model + dense + activations + layers * kept + head
    hidden = 2 * tokens * hidden_size * FLOAT32  # what enters the layers, and what should leave
    saved = blocks * SAVED_NUMBERS * FLOAT32
    # The next state is written beside the last one, or what is tuned, which is smaller.
    disk = 2 * (saved + DESCRIPTION * len(ternary))
    if on_gpu:
        host = CUDA_LIBRARIES + hidden + max(other_parameters * READING, saved)
        return Needs(host=host, gpu=compute, disk=disk)
    return Needs(host=hidden + compute, gpu=0, disk=disk)


def room_for_hidden_states(needs: Needs, device: torch.device) -> int:
    """Bytes of a GPU that `needs` leaves free; none of another device."""
    return free_gpu_memory(device) - needs.gpu if device.type == "cuda" else 0


def fits_easily(needs: Needs, device: torch.device) -> bool:
    """Whether half of the memory that is free is enough for `needs`."""
    fits = 2 * needs.host <= available_memory()
    return fits and (device.type != "cuda" or 2 * needs.gpu <= free_gpu_memory(device))


def require_memory(needs: Needs, device: torch.device, purpose: str) -> None:
    """Raises Pt2Error, with the figures, if the machine has less memory than `needs`.

    purpose: what it is for, and after a colon what else to do.
    """
    available = available_memory()
    if needs.host > available:
        raise Pt2Error(
            f"about {_gb(needs.host)} of memory are needed and {_gb(available)} are available "
            f"{purpose}, close other programs, or use a larger machine"
        )
    if device.type == "cuda":
        free = free_gpu_memory(device)
        if needs.gpu > free:
            raise Pt2Error(
                f"about {_gb(needs.gpu)} of GPU memory are needed and {_gb(free)} are free on "
                f"{device} {purpose}, --device cpu, or a larger GPU"
            )


def require_disk(path: Path, needed: int, purpose: str) -> None:
    """Raises Pt2Error, with the figures, unless `needed` bytes are free where `path` will be.

    purpose: what they are for, as in "for the work directory".
    """
    place = path.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise Pt2Error(
            f"{_gb(needed)} of disk are needed {purpose} and {_gb(free)} are free at {place}: free "
            "space, or choose a place on another disk"
        )


def available_memory() -> int:
    """Bytes that this process can still take: of the machine, or of its container if less."""
    return min([psutil.virtual_memory().available, *_container_limits()])


def free_gpu_memory(device: torch.device) -> int:
    """Bytes that this process can still take of a GPU, those that PyTorch keeps unused included."""
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_allocated(device)
    unused = torch.cuda.memory_reserved(device) - held
    share = torch.cuda.get_per_process_memory_fraction(device)
    return min(free + unused, int(share * total) - held)


def _container_limits() -> Iterable[int]:
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        cache = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    if limit == "max":
        return []
    return [int(limit) - used + int(cache.get("file", 0))]


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
