"""Tuning the grids of the whole model on its logits, with the digits frozen.

Ternarizing goes layer by layer and knows only each layer's own error. Here alpha and mu of all
layers move together, by gradient descent, so that the model's next-token distributions come close
to the full-precision model's (their Kullback-Leibler divergence on the calibration text). Digits
stay packed. A layer's weights and activations are kept in full for its gradients, or, where memory
is short, made twice: when it runs forward, and again for its gradients (activation checkpointing).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from pt2gguf.blocks import BLOCK_SIZE
from pt2gguf.convert.gradients import TOKENS_PER_HEAD
from pt2gguf.convert.machine import RepeatableAttention, computes_bfloat16
from pt2gguf.convert.progress import Reporter
from pt2gguf.convert.stock import StockTypes, replace_weights, round_kept
from pt2gguf.convert.workdir import PackedWeight, WorkDirectory, unpack_digits
from pt2gguf.errors import Pt2Error
from pt2gguf.kernels import kernels_work
from pt2gguf.model import LayerCall, Skeleton
from pt2gguf.ternary import Method, round_to_half

# Part of the result.
TOKENS_PER_STEP = 2048
BETAS = (0.9, 0.95)
SAVE_SECONDS = 60.0


def tune_grids(
    skeleton: Skeleton,
    texts: Sequence[Tensor],
    full_precision: Sequence[Tensor],
    method: Method,
    work: WorkDirectory,
    stock: StockTypes,
    device: torch.device,
    reporter: Reporter,
    *,
    recompute: bool,
) -> None:
    """Tune alpha and mu of all ternary weights in `work`, and store them there.

    texts: each (samples, length) int64, token ids; full_precision: for each of them what the
    full-precision model's last decoder layer gives, (samples, length, hidden_size) float32;
    recompute: run each layer twice, for less memory and the same result. Goes on from the state
    that an interrupted tuning has left in `work`, and ends with the same bytes.
    """
    embedded = [skeleton.embed(ids, step_size(ids.shape[1])) for ids in texts]
    calls = [of_text for _, of_text in embedded]
    model = _TernaryModel(skeleton, calls, work, stock, device, recompute)
    optimizer = torch.optim.Adam(model.parameters(), betas=BETAS)
    batches = [batch for epoch in range(method.tuning_epochs) for batch in _shuffled(texts, epoch)]
    begin = _restore(model, optimizer, work)
    saved = time.monotonic()
    reporter.tuning_started(len(batches))
    for step, (text, chosen) in enumerate(batches[begin:], begin):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(batches), method.tuning_rate)
        optimizer.zero_grad()
        hidden, _ = embedded[text]
        loss = model.add_gradients(
            text, hidden[chosen].to(device), full_precision[text][chosen].to(device)
        )
        if not math.isfinite(loss):
            raise Pt2Error(
                f"the tuning diverged at step {step + 1} (its loss is {loss}): convert with "
                "--no-tuning, or calibrate on other text"
            )
        optimizer.step()
        reporter.tuning_step(step, len(batches), loss)
        if time.monotonic() - saved > SAVE_SECONDS:
            work.save_tuning(step + 1, dict(_state(model, optimizer)))
            saved = time.monotonic()
    for index, grids in enumerate(model.tuned()):
        work.save_tuned(index, grids)


def step_size(length: int) -> int:
    """Samples of `length` tokens in one step."""
    return max(1, TOKENS_PER_STEP // length)


def learning_rate(step: int, steps: int, initial: float) -> float:
    """From `initial` at step 0 down to 0 after the last, along half a cosine."""
    return initial * (1 + math.cos(math.pi * step / steps)) / 2


def _shuffled(texts: Sequence[Tensor], epoch: int) -> list[tuple[int, Tensor]]:
    """The steps of an epoch: the number of a text and which of its samples, in random order."""
    generator = torch.Generator().manual_seed(epoch)
    batches = [
        (number, part)
        for number, ids in enumerate(texts)
        for part in torch.randperm(len(ids), generator=generator).split(step_size(ids.shape[1]))
    ]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


class _TernaryModel(nn.Module):
    """The ternarized model with grids that can be learned.

    Nothing else can: tuning the norms too gains about 1% (docs/quality.md).
    """

    def __init__(
        self,
        skeleton: Skeleton,
        calls: Sequence[Mapping[int, Sequence[LayerCall]]],
        work: WorkDirectory,
        stock: StockTypes,
        device: torch.device,
        recompute: bool,
    ) -> None:
        """calls: for each text, as `Skeleton.embed` gives them; recompute: as in `tune_grids`."""
        super().__init__()
        self._recompute = recompute
        self.layers = nn.ModuleList(
            _TernaryLayer(
                skeleton,
                index,
                [
                    {size: of_size[index].to(device) for size, of_size in of_text.items()}
                    for of_text in calls
                ],
                work,
                stock,
                device,
            )
            for index in range(len(skeleton))
        )
        self._head = skeleton.head(device)
        self._autocast = torch.autocast(
            device.type, dtype=torch.bfloat16, enabled=computes_bfloat16(device)
        )

    def add_gradients(self, text: int, hidden: Tensor, full_precision: Tensor) -> float:
        """The mean over the tokens of the KL divergence from the full-precision model's logits.

        Its gradients are added to those of the parameters. hidden: (batch, length, hidden_size),
        what enters the decoder layers for some samples of the text of that number; full_precision:
        as large, what leaves the last one in the full-precision model.
        """
        with self._autocast, RepeatableAttention():
            for layer in self.layers:
                if self._recompute:
                    hidden = checkpoint(layer, text, hidden, use_reentrant=False)
                else:
                    hidden = layer(text, hidden)
            loss, gradient = self._divergence(hidden, full_precision)
        hidden.backward(gradient)
        return loss

    def _divergence(self, hidden: Tensor, full_precision: Tensor) -> tuple[float, Tensor]:
        """The divergence, and its gradient at what leaves the last layer; some logits at a time."""
        width, tokens = hidden.shape[-1], hidden[..., 0].numel()
        losses, gradients = [], []
        for student, teacher in zip(
            hidden.reshape(1, -1, width).split(TOKENS_PER_HEAD, dim=1),
            full_precision.reshape(1, -1, width).split(TOKENS_PER_HEAD, dim=1),
            strict=True,
        ):
            x = student.detach().requires_grad_()
            logits = self._head(x)
            with torch.no_grad():
                wanted = self._head(teacher).float().log_softmax(-1)
                found = logits.float().log_softmax(-1)
                shares = wanted.exp()
                losses.append(wanted.sub_(found).mul_(shares).sum().item())
                slope = found.exp_().sub_(shares).div_(tokens)
            gradients += torch.autograd.grad(logits, x, slope.to(logits.dtype))
        return sum(losses) / tokens, torch.cat(gradients, dim=1).view_as(hidden)

    def tuned(self) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """alpha and mu of each layer's weights by checkpoint name, as they are to be stored."""
        for layer in self.layers:
            assert isinstance(layer, _TernaryLayer)
            yield {name: grid.rounded() for name, grid in layer.grids()}


class _TernaryLayer(nn.Module):
    """A decoder layer that computes with ternary weights made from their grids when it runs."""

    def __init__(
        self,
        skeleton: Skeleton,
        index: int,
        calls: Sequence[Mapping[int, LayerCall]],
        work: WorkDirectory,
        stock: StockTypes,
        device: torch.device,
    ) -> None:
        super().__init__()
        weights, in_stock_types = work.load_packed(index)
        layer = skeleton.load_layer(index, device, without=weights.keys())
        # In lists, which nn.Module does not look into: only the grids are parameters.
        self._layer = [layer]
        self._calls = calls
        self._names: list[tuple[str, str]] = []
        self._grids = nn.ModuleList()
        stored_name = partial(skeleton.stored_name, index)
        round_kept(layer, stored_name, work.kept, stock)
        replace_weights(layer, stored_name, stock.rounded(in_stock_types))
        for module_name, module in layer.named_modules():
            name = skeleton.stored_name(index, f"{module_name}.weight")
            if isinstance(module, nn.Linear) and name in weights:
                self._names.append((name, f"{module_name}.weight"))
                self._grids.append(_Grid(weights[name], device))

    def forward(self, text: int, hidden: Tensor) -> Tensor:
        weights = {
            parameter: grid() for (_, parameter), grid in zip(self._names, self._grids, strict=True)
        }
        call = self._calls[text][len(hidden)]
        output = call(lambda *a, **k: functional_call(self._layer[0], weights, a, k), hidden)
        return output.float()

    def grids(self) -> Iterator[tuple[str, _Grid]]:
        for (name, _), grid in zip(self._names, self._grids, strict=True):
            assert isinstance(grid, _Grid)
            yield name, grid


class _Grid(nn.Module):
    """The grid of one ternary weight (n, m).

    Its parameters, (n, m / 128) float32, are the changes of alpha and mu in units of the alpha that
    the tuning starts from, so that one learning rate fits all.
    """

    def __init__(self, weight: PackedWeight, device: torch.device) -> None:
        super().__init__()
        self._alpha, self._mu = (v.to(device, torch.float32) for v in (weight.alpha, weight.mu))
        self._digits = weight.digits.to(device)
        self._order = None if weight.perm is None else _Order.of(weight.perm.to(device))
        self.alpha_change = nn.Parameter(torch.zeros_like(self._alpha))
        self.mu_change = nn.Parameter(torch.zeros_like(self._mu))

    def forward(self) -> Tensor:
        """(n, m): the weight in the original order of its columns, as products take it."""
        alpha, mu = self._values()
        kind = alpha.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else alpha.dtype
        weight: Tensor = _Dense.apply(alpha, mu, self._digits, self._order, dtype)  # type: ignore[no-untyped-call]
        return weight

    @torch.no_grad()
    def rounded(self) -> tuple[Tensor, Tensor]:
        """alpha and mu, (n, m / 128) float16."""
        alpha, mu = self._values()
        return round_to_half(alpha.clamp(min=0), "scale"), round_to_half(mu, "offset")

    def _values(self) -> tuple[Tensor, Tensor]:
        return (
            self._alpha * (1 + self.alpha_change),
            self._mu + self._alpha * self.mu_change,
        )


class _Order(NamedTuple):
    """Of a weight's columns; each (m,) int32."""

    perm: Tensor  # stored column j is original column perm[j]
    inverse: Tensor

    @classmethod
    def of(cls, perm: Tensor) -> _Order:
        return cls(perm.int(), torch.argsort(perm).int())


class _Dense(torch.autograd.Function):
    """alpha * T + mu from packed digits, without keeping T for the gradients."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        alpha: Tensor,
        mu: Tensor,
        digits: Tensor,
        order: _Order | None,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.digits, ctx.order = digits, order  # type: ignore[attr-defined]
        if alpha.is_cuda and kernels_work():
            from pt2gguf.kernels.dense import dense

            return dense(alpha, mu, digits, order and order.inverse, dtype)
        stored = torch.addcmul(mu.unsqueeze(2), _unpacked(digits), alpha.unsqueeze(2))
        stored = stored.view(len(stored), -1).to(dtype)
        return stored if order is None else stored.index_select(1, order.inverse)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        digits, order = ctx.digits, ctx.order  # type: ignore[attr-defined]
        if gradient.is_cuda and kernels_work():
            from pt2gguf.kernels.dense import grid_gradients

            of_alpha, of_mu = grid_gradients(gradient.contiguous(), digits, order and order.perm)
        else:
            if order is not None:
                gradient = gradient.index_select(1, order.perm)
            blocks = gradient.float().view(len(gradient), -1, BLOCK_SIZE)
            of_alpha, of_mu = (blocks * _unpacked(digits)).sum(2), blocks.sum(2)
        return of_alpha, of_mu, None, None, None


def _unpacked(packed: Tensor) -> Tensor:
    """(n, m / 4) uint8, as `pack_digits` makes it -> (n, m / 128, 128) float32 in {-1, 0, 1}."""
    return unpack_digits(packed).view(len(packed), -1, BLOCK_SIZE).float()


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Everything that a step changes, on the CPU."""
    for name, parameter in model.named_parameters():
        yield name, parameter.detach().cpu()
        for key, value in optimizer.state[parameter].items():
            yield f"{name}#{key}", value.cpu()


def _restore(model: nn.Module, optimizer: torch.optim.Optimizer, work: WorkDirectory) -> int:
    """The step to begin with, after putting back what `work` holds."""
    found = work.load_tuning()
    if found is None:
        return 0
    step, tensors = found
    for name, parameter in model.named_parameters():
        parameter.data.copy_(tensors.pop(name))
        for key in [key for key in tensors if key.startswith(f"{name}#")]:
            value = tensors.pop(key)
            kind = key.rpartition("#")[2]
            # Adam's own count of steps stays on the CPU.
            place = value.device if kind == "step" else parameter.device
            optimizer.state[parameter][kind] = value.to(place)
    return step
