"""Round-to-nearest and GPTQ: the plain 2-bit methods that the papers compare with.

Both round every linear layer of the decoder, but routers, to four values for each row and group of
128 columns, {scale * (q - zero)}, q = 0 to 3, with the scale in float16 and the zero point one of
the four. They exist in transformers only: no GGUF type is of this kind.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pt2gguf.blocks import BLOCK_SIZE
from pt2gguf.convert.activations import stage_inputs
from pt2gguf.convert.groups import Group, InputGroups, Stage
from pt2gguf.convert.pipeline import batch_size
from pt2gguf.model import Skeleton
from pt2gguf.ternary import InputStatistics
from pt2gguf.ternary.compensation import damped_inverse, exact_update, split_block

BITS = 2
BITS_PER_WEIGHT = BITS + (16 + BITS) / BLOCK_SIZE  # with the group's scale and zero point
DAMPING = 0.01


@dataclass(frozen=True)
class UniformGrid:
    """scale * (q - zero), q = 0 to 3, for each row: scale and zero are (n, 1) float64."""

    scale: Tensor
    zero: Tensor

    @staticmethod
    def spanning(W: Tensor) -> UniformGrid:
        """From the least to the greatest of each row of W (n, b) and 0, as GPTQ has it."""
        low = W.amin(1, keepdim=True).clamp(max=0)
        high = W.amax(1, keepdim=True).clamp(min=0)
        flat = low == high
        step = torch.where(flat, 1.0, high - low) / (2**BITS - 1)
        scale = step.half().clamp(min=2**-24).to(W.dtype)
        return UniformGrid(scale, (-low / scale).round().clamp(0, 2**BITS - 1))

    def nearest(self, W: Tensor) -> Tensor:
        """(n, b): the grid value nearest to each weight."""
        q = (W / self.scale + self.zero).round().clamp(0, 2**BITS - 1)
        return self.scale * (q - self.zero)


def round_to_nearest(W: Tensor) -> Tensor:
    """RTN of W (n, m), m a multiple of 128; float64."""
    blocks = W.double().split(BLOCK_SIZE, dim=1)
    return torch.cat([UniformGrid.spanning(block).nearest(block) for block in blocks], dim=1)


def gptq(W: Tensor, H: Tensor) -> Tensor:
    """GPTQ (Frantar et al. 2022) of W (n, m) for the Hessian H (m, m) float64, columns in order.

    A group's grid is that of the group's weights as the columns before have left them. Returns
    (n, m) float64.
    """
    P, _ = damped_inverse(H, DAMPING)
    W = W.double()
    done: list[Tensor] = []
    while W.shape[1]:
        columns = torch.arange(W.shape[1], device=W.device)
        factors, P = split_block(P, columns[:BLOCK_SIZE], columns[BLOCK_SIZE:])
        block, rest = W[:, :BLOCK_SIZE], W[:, BLOCK_SIZE:]
        done.append(_with_feedback(block, UniformGrid.spanning(block), factors.L))
        W = rest + exact_update(block - done[-1], factors)
    return torch.cat(done, dim=1)


def _with_feedback(W: Tensor, grid: UniformGrid, L: Tensor) -> Tensor:
    """Rounds the columns of W (n, b) one by one, each error moving the later columns.

    L: (b, b), see `pt2gguf.ternary.compensation`.
    """
    W, Q = W.clone(), torch.empty_like(W)
    steps = L / L.diagonal()
    for j in range(W.shape[1]):
        Q[:, j : j + 1] = grid.nearest(W[:, j : j + 1])
        W[:, j + 1 :].addr_(W[:, j] - Q[:, j], steps[j + 1 :, j], alpha=-1)
    return Q


@torch.no_grad()
def gptq_weights(
    skeleton: Skeleton, names: Collection[str], ids: Tensor, device: torch.device
) -> dict[str, Tensor]:
    """GPTQ of the matrices `names`, float32 on the CPU, by checkpoint name.

    Layer by layer and, within one, stage by stage, each on the inputs that the weights before it
    give once they are quantized.

    ids: (samples, length) int64, the calibration tokens.
    """
    batch = batch_size(ids.shape[1], device)
    hidden, calls = skeleton.embed(ids, batch)
    done: dict[str, Tensor] = {}
    for index in range(len(skeleton)):
        layer = skeleton.load_layer(index, device)
        layer_calls = {size: of_size[index].to(device) for size, of_size in calls.items()}
        parts = [
            partial(layer_calls[len(part)], layer, part.to(device)) for part in hidden.split(batch)
        ]
        linears = {
            module: name
            for module, _ in layer.named_modules()
            if (name := skeleton.stored_name(index, f"{module}.weight")) in names
        }
        for stage in _stages(layer, list(linears), parts):
            for group, statistics in _statistics(layer, stage, parts, device).items():
                for module in group.modules:
                    weight = layer.get_submodule(module).get_parameter("weight")
                    weight.copy_(gptq(weight, statistics.hessian))
                    done[linears[module]] = weight.cpu().clone()
        for part, run in zip(hidden.split(batch), parts, strict=True):
            part.copy_(run())
    return done


Parts = Sequence[Callable[[], Tensor]]
"""Passes of a layer over batches of the calibration tokens."""


def _stages(layer: nn.Module, linears: list[str], parts: Parts) -> list[Stage]:
    groups = InputGroups(layer, linears)
    for run in parts:
        with groups.watch():
            run()
        if groups.all_seen():
            break
    return groups.stages()


def _statistics(
    layer: nn.Module, stage: Stage, parts: Parts, device: torch.device
) -> dict[Group, InputStatistics]:
    statistics = {
        group: InputStatistics(group.columns, device, with_full_precision=False)
        for group in stage.groups
    }
    for run in parts:
        for group, inputs in stage_inputs(layer, stage, run).items():
            statistics[group].add(inputs)
    return statistics
