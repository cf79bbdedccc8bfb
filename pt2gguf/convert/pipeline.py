"""The loop over decoder layers: inputs, statistics, ternary weights, next inputs."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pt2gguf.convert.activations import (
    recorded_outputs,
    replayed_outputs,
    require_finite,
    stage_inputs,
)
from pt2gguf.convert.groups import (
    EXPERT,
    Group,
    Stage,
    rounded_together,
    routers,
    watched_stages,
)
from pt2gguf.convert.progress import Reporter
from pt2gguf.convert.stock import StockTypes, replace_weights, round_kept
from pt2gguf.convert.workdir import Layer, StoredOutputs, WorkDirectory, group_key
from pt2gguf.errors import Pt2Error
from pt2gguf.model import LayerCall, Skeleton
from pt2gguf.model.mlp import producers
from pt2gguf.ternary import (
    CHUNK,
    InputStatistics,
    Method,
    NonFiniteInputs,
    StockWeight,
    TernarizationReport,
    TernaryWeight,
    relative_error,
    round_to_stock,
    ternarize,
)

# Tokens in one forward pass. Part of the result, as sums over batches depend on it.
TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 16384}


Run = Callable[[nn.Module, Tensor], Tensor]
"""From a decoder layer and hidden states (batch, length, hidden_size) to the next ones."""


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of text on their way through the decoder layers.

    hidden: (samples, length, hidden_size) float32, which change from layer to layer; calls: as
    `Skeleton.embed` gives them; batch: windows that run together.
    """

    hidden: Tensor
    calls: Mapping[int, Sequence[LayerCall]]
    batch: int

    @staticmethod
    def embed(skeleton: Skeleton, ids: Tensor, device: torch.device) -> Windows:
        """Those of ids (samples, length) int64, before the first layer, to run on `device`. The
        hidden states are on the host."""
        batch = batch_size(ids.shape[1], device)
        hidden, calls = skeleton.embed(ids, batch)
        require_finite(hidden, "the embeddings")
        return Windows(hidden, calls, batch)

    def copy(self) -> Windows:
        return dataclasses.replace(self, hidden=self.hidden.clone())

    def parts(self) -> Sequence[Tensor]:
        return self.hidden.split(self.batch)

    def runner(self, index: int, device: torch.device) -> Run:
        """The function that runs decoder layer `index` on one of the parts."""
        calls = {size: of_size[index].to(device) for size, of_size in self.calls.items()}
        return lambda layer, part: calls[len(part)](layer, part.to(device))


def batch_size(length: int, device: torch.device) -> int:
    """Samples of `length` tokens that run through a decoder layer together."""
    return max(1, TOKENS_PER_BATCH[device.type] // length)


@torch.no_grad()
def ternarize_layers(
    skeleton: Skeleton,
    texts: Sequence[Tensor],
    further: Sequence[Tensor],
    method: Method,
    work: WorkDirectory,
    stock: StockTypes,
    device: torch.device,
    room: int,
    reporter: Reporter,
) -> list[Tensor]:
    """Fill `work` with the ternary weights of every decoder layer that it does not hold yet.

    texts: each (samples, length) int64, the calibration text, of which `work` holds the output
    statistics if the method wants them. Inputs come from the layers before as already ternarized,
    and with method.gptaq also from the full-precision ones. room: bytes of `device` for hidden
    states, which stay on the host beyond. Layers that `work` holds are run, not computed again, so
    an interrupted conversion ends with the same bytes.

    If `work` is to be tuned, gives for each of `texts` and of `further` (text that only the
    full-precision model reads) what its last decoder layer gives, (samples, length, hidden_size)
    float32.
    """
    finished = [work.has_layer(index) for index in range(len(skeleton))]
    # All layers run for the sake of the last one's outputs, or up to the last unfinished.
    needed = len(finished) if work.tunes else len(finished) - finished[::-1].index(False)
    ternary = [Windows.embed(skeleton, ids, device) for ids in texts]
    full = [windows.copy() for windows in ternary] if method.gptaq or work.tunes else []
    others = [Windows.embed(skeleton, ids, device) for ids in further] if work.tunes else []
    placed = _Room(device, room)
    ternary, full, others = (placed.take(windows) for windows in (ternary, full, others))

    reporter.start(len(skeleton))
    try:
        for index in range(needed):
            reporter.layer_started(index)
            layer = LayerRun(skeleton, index, ternary, full, work, stock, device)
            if finished[index]:
                layer.replace(work.load_layer(index))
            else:
                outputs = work.load_outputs(index) or {}
                work.save_layer(index, layer.ternarize(method, outputs, reporter))
            work.drop_outputs(index)
            if index + 1 < needed or work.tunes:
                layer.advance(others)
            del layer  # before the next one is loaded
            reporter.layer_done(index, reused=finished[index])
    finally:
        reporter.stop()
    return [windows.hidden for windows in [*full, *others]] if work.tunes else []


class LayerRun:
    """One decoder layer in memory, with the windows that enter it.

    With full-precision windows the layer is there twice: as it becomes ternary, and as it was.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        index: int,
        ternary: Sequence[Windows],
        full: Sequence[Windows],
        work: WorkDirectory,
        stock: StockTypes,
        device: torch.device,
    ) -> None:
        """ternary, full: the same texts, as the ternarized and the full-precision layers gave them;
        full may be empty. work: tells which matrices stay in stock types."""
        self._skeleton = skeleton
        self._index = index
        self._ternary_windows = ternary
        self._full_windows = full
        self._device = device
        self._layer = skeleton.load_layer(index, device)
        self._full = copy.deepcopy(self._layer) if full else None
        self._routers = routers(self._layer, skeleton.config)
        self._full_advanced = False
        self._kept = work.kept
        self._stock = stock
        self._grids = stock.grids(work.stock)
        self._stored_name = partial(skeleton.stored_name, index)
        round_kept(self._layer, self._stored_name, work.kept, stock)

    def ternarize(
        self, method: Method, outputs: Mapping[str, StoredOutputs], reporter: Reporter
    ) -> Layer:
        """Round every linear layer that is not kept as it is, each on what those before it give.

        outputs: by `group_key`, as `collect_outputs` stores them.
        """
        done = Layer()
        stages = self._stages()
        for stage in stages:
            begun = time.monotonic()
            collected = self._statistics(stage, method, reporter, last=stage is stages[-1])
            for group in stage.groups:
                statistics = collected.pop(group)
                for name, values, report in self._round_group(
                    group, statistics, method, outputs, done
                ):
                    if report.damping > method.damping:
                        reporter.note(
                            f"{name}: damping raised from {method.damping:g} to "
                            f"{report.damping:g}, as the calibration inputs do not span all "
                            "columns"
                        )
                    done.reports[name] = dataclasses.asdict(report) | {"tokens": statistics.tokens}
                    replace_weights(self._layer, self._stored_name, {name: values})
                    seconds, begun = time.monotonic() - begun, time.monotonic()
                    shape = (values.shape[0], values.shape[1])
                    reporter.weight_done(name, shape, report.relative_error, seconds)
        return done

    def replace(self, done: Layer) -> None:
        """Compute with what `ternarize` gave instead of the layer's own weights."""
        ternary = {name: weight.dequantize() for name, weight in done.weights.items()}
        values = ternary | self._stock.rounded(done.stock)
        replace_weights(self._layer, self._stored_name, values)

    def advance(self, others: Sequence[Windows]) -> None:
        """Replace the hidden states by the layer's outputs.

        others: further windows that run through the full-precision layers.
        """
        for windows in self._ternary_windows:
            self._advance(self._layer, windows, "the ternarized")
        for windows in [*(() if self._full_advanced else self._full_windows), *others]:
            assert self._full is not None
            self._advance(self._full, windows, "the full-precision")

    def _advance(self, layer: nn.Module, windows: Windows, which: str) -> None:
        run = windows.runner(self._index, self._device)
        for part in windows.parts():
            self._advance_part(layer, run, part, which)

    def _advance_part(self, layer: nn.Module, run: Run, part: Tensor, which: str) -> None:
        output = run(layer, part)
        require_finite(output, f"{which} decoder layer {self._index}")
        part.copy_(output)

    def _weight_name(self, module: str) -> str:
        return self._stored_name(f"{module}.weight")

    def _stages(self) -> list[Stage]:
        linears = [
            name
            for name, module in self._layer.named_modules()
            if isinstance(module, nn.Linear) and self._weight_name(name) not in self._kept
        ]
        if not linears:
            return []
        parts = self._parts(self._ternary_windows)
        passes = (partial(run, self._layer, part) for run, part in parts)
        return watched_stages(self._layer, linears, passes)

    def _parts(self, texts: Sequence[Windows]) -> list[tuple[Run, Tensor]]:
        """The parts of all texts, with the function that runs a layer on them."""
        runs = [(windows.runner(self._index, self._device), windows) for windows in texts]
        return [(run, part) for run, windows in runs for part in windows.parts()]

    def _statistics(
        self, stage: Stage, method: Method, reporter: Reporter, last: bool
    ) -> dict[Group, InputStatistics]:
        """The statistics of each group's inputs over all of the calibration tokens.

        last: whether it is the layer's last stage.
        """
        statistics = {
            group: InputStatistics(group.columns, self._device, bool(method.gptaq))
            for group in stage.groups
        }
        parts = self._parts(self._ternary_windows)
        full_parts: Sequence[Tensor | None] = [None] * len(parts)
        if method.gptaq:
            full_parts = [part for _, part in self._parts(self._full_windows)]
            # With routers the full-precision layer does not do here what it does on its own.
            self._full_advanced = last and not self._routers
        for (run, part), full_part in zip(parts, full_parts, strict=True):
            for group, x, x_full in self._paired_inputs(stage, run, part, full_part):
                try:
                    statistics[group].add(x, x_full)
                except NonFiniteInputs as error:
                    raise Pt2Error(
                        f"{error.count} inputs of {self._weight_name(group.modules[0])} are NaN, "
                        "infinite or too large to square: calibrate on other text, or check that "
                        "the checkpoint works in float32"
                    ) from error
        for group in stage.groups:
            if statistics[group].tokens == 0:
                names = ", ".join(self._weight_name(module) for module in group.modules)
                reporter.note(
                    f"{names}: no calibration token reached it, so all columns count alike; "
                    "calibrate on more text"
                )
                # Identity instead of inputs: the error of the weights themselves.
                eye = torch.eye(group.columns, device=self._device)
                statistics[group].add(eye, eye if method.gptaq else None)
        return statistics

    def _paired_inputs(
        self, stage: Stage, run: Run, part: Tensor, full_part: Tensor | None
    ) -> Iterator[tuple[Group, Tensor, Tensor | None]]:
        """A batch's inputs of each group: ternarized and, row by row beside it, full precision."""
        with recorded_outputs(self._layer, self._routers) as routed:
            inputs = stage_inputs(self._layer, stage, lambda: run(self._layer, part))
        if self._full is None or full_part is None:
            for group, x in inputs.items():
                yield group, x, None
            return
        # The full-precision experts are given the same tokens as the ternarized ones.
        full, states = self._full, full_part
        with replayed_outputs(full, routed):
            run_full: Callable[[], object] = partial(run, full, states)
            if self._full_advanced:
                run_full = partial(self._advance_part, full, run, states, "the full-precision")
            full_inputs = stage_inputs(full, stage, run_full, to_the_end=self._full_advanced)
        for group, x in inputs.items():
            yield group, x, full_inputs[group]

    def _round_group(
        self,
        group: Group,
        statistics: InputStatistics,
        method: Method,
        outputs: Mapping[str, StoredOutputs],
        done: Layer,
    ) -> Iterator[tuple[str, Tensor, TernarizationReport]]:
        """`_round` for each part of a group."""
        available = self._skeleton.checkpoint.tensors.keys() - self._kept.keys()

        def alone(module: str) -> bool:
            return not method.stack_shared_inputs or self._weight_name(module) in self._grids

        for modules in rounded_together(group.modules, alone):
            method_here = method_for(self._weight_name(modules[0]), method, available)
            yield from self._round(modules, statistics, method_here, outputs, done)

    def _round(
        self,
        modules: Sequence[str],
        statistics: InputStatistics,
        method: Method,
        outputs: Mapping[str, StoredOutputs],
        done: Layer,
    ) -> Iterator[tuple[str, Tensor, TernarizationReport]]:
        """Round the matrices of some modules as one, and put them into `done`.

        Gives of each its checkpoint name, its values (n, m), and a report.
        """
        names = [self._weight_name(module) for module in modules]
        weights = [self._layer.get_submodule(m).get_parameter("weight").float() for m in modules]
        rows = [len(weight) for weight in weights]
        stacked = torch.cat(weights)
        key = group_key(names)
        with _named(key):
            stored = outputs.get(key)
            of_rows = stored.on(self._device) if stored else None
            if key in self._grids:
                grid = self._grids[key]
                stock, report = round_to_stock(stacked, statistics, method, of_rows, grid)
                done.stock[key] = stock
                yield key, grid.values(stock.packed), report
                return
            for grid in self._stock.alternatives:
                if stacked.shape[1] % CHUNK:
                    continue
                stock, _ = round_to_stock(stacked, statistics, method, of_rows, grid)
                for name, packed in zip(names, stock.packed.split(rows), strict=True):
                    alternatives = done.alternatives.setdefault(name, {})
                    alternatives[grid.name] = StockWeight(grid.name, packed)
            ternary, report = ternarize(stacked, statistics, method, of_rows)
        H = statistics.hessian
        for name, original, alpha, mu, digits in zip(
            names,
            weights,
            ternary.alpha.split(rows),
            ternary.mu.split(rows),
            ternary.digits.split(rows),
            strict=True,
        ):
            done.weights[name] = TernaryWeight(alpha, mu, digits, ternary.perm)
            values = done.weights[name].dequantize()
            error = relative_error(original, values, H)
            yield name, values, dataclasses.replace(report, relative_error=error)


def method_for(name: str, method: Method, available: Collection[str]) -> Method:
    """The method as it applies to the weight `name`.

    A file has one column order for all experts of a projection, so theirs stays as it is unless it
    can be folded into the rows of the weights before (pt2gguf.export.folding).

    available: the checkpoint names that are ternary or not weights of matrices.
    """
    method = method.for_tensor(name)
    if EXPERT.search(name) and producers(name, available) is None:
        return dataclasses.replace(method, ssr=False)
    return method


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Name the weight in an error about it."""
    try:
        yield
    except Pt2Error as error:
        raise Pt2Error(f"{name}: {error}") from error


class _Room:
    """What is left for hidden states on the device that computes."""

    def __init__(self, device: torch.device, size: int) -> None:
        self._device = device
        self._left = size

    def take(self, texts: Sequence[Windows]) -> list[Windows]:
        """Those that fit are moved to the device."""
        return [self._moved(windows) for windows in texts]

    def _moved(self, windows: Windows) -> Windows:
        if windows.hidden.nbytes > self._left:
            return windows
        self._left -= windows.hidden.nbytes
        return dataclasses.replace(windows, hidden=windows.hidden.to(self._device))
