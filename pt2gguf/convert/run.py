"""One call from a checkpoint to a complete work directory."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pt2gguf.convert.calibration import Calibration
from pt2gguf.convert.gradients import TOKENS_PER_HEAD
from pt2gguf.convert.groups import (
    STATISTICS_BYTES,
    Keep,
    routers,
    select_linears,
    statistics_bytes,
)
from pt2gguf.convert.machine import deterministic, usable_device
from pt2gguf.convert.outputs import (
    TOKENS_PER_BATCH,
    collect_outputs,
    has_output_statistics,
    tokens_read,
)
from pt2gguf.convert.pipeline import batch_size, ternarize_layers
from pt2gguf.convert.progress import Reporter, SilentReporter
from pt2gguf.convert.resources import (
    LayerSize,
    Needs,
    estimate,
    estimate_outputs,
    estimate_tuning,
    fits_easily,
    require_disk,
    require_memory,
    room_for_hidden_states,
)
from pt2gguf.convert.settings import make_settings
from pt2gguf.convert.stock import StockTypes, stock_size
from pt2gguf.convert.tuning import step_size, tune_grids
from pt2gguf.convert.workdir import WorkDirectory
from pt2gguf.convert.writing import write_text, written_length
from pt2gguf.errors import Pt2Error
from pt2gguf.model import Checkpoint, Skeleton
from pt2gguf.ternary import Method, output_bytes


@dataclass(frozen=True)
class Plan:
    """What becomes of the matrices of the decoder layers, by checkpoint name.

    ternary, stock: shapes (n, m) of those to ternarize and to round to a stock type with
    compensation; stock_bytes: of the latter, and of alternatives to the ternary ones; reasons: why
    others than `ternary` are not; layer: the size of the largest layer.
    """

    ternary: Mapping[str, tuple[int, int]]
    stock: Mapping[str, tuple[int, int]]
    stock_bytes: int
    reasons: Mapping[str, str]
    layer: LayerSize


def ternarize_checkpoint(
    checkpoint: Checkpoint,
    method: Method,
    calibration: Calibration,
    work_dir: str | Path,
    *,
    keep: Keep = lambda name: None,
    stock: StockTypes | None = None,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    force: bool = False,
    reporter: Reporter | None = None,
) -> WorkDirectory:
    """Ternarize the decoder layers of `checkpoint` into `work_dir`, or finish what was begun there.

    keep: matrices that are to stay in a stock type; stock: these types, as they are if None;
    threads: of PyTorch, as it is now if None; force: discard what `work_dir` holds if it was begun
    with other settings.

    Gives the complete work directory, locked until it is closed. Raises Pt2Error.
    """
    device = usable_device(device)
    threads = threads or torch.get_num_threads()
    reporter = reporter or SilentReporter()
    stock = stock or StockTypes()
    skeleton = Skeleton(checkpoint)
    plan = make_plan(skeleton, keep, stock)
    for note in describe_reasons(plan.reasons):
        reporter.note(note)
    require_readable_ids(skeleton, calibration)
    settings = make_settings(
        model=checkpoint.fingerprint(),
        layers=len(skeleton),
        method=method,
        calibration=calibration,
        kept={name: why for name, why in plan.reasons.items() if name not in plan.stock},
        stock={name: grid.name for name, grid in stock.grids(plan.stock).items()},
        alternatives=[grid.name for grid in stock.alternatives],
        device=device,
        threads=threads,
    )
    work = WorkDirectory.create(work_dir, settings, force)
    try:
        if not work.is_complete():
            needs = conversion_needs(skeleton, plan, method, calibration, device)
            require_memory(
                needs,
                device,
                "to convert the largest layer: use fewer or shorter calibration samples",
            )
            require_disk(work.path, needs.disk, "for the work directory")
            with deterministic(device, threads):
                written = _written_text(checkpoint, calibration, method, work, device, reporter)
                texts, further = split_texts(calibration.ids, written, tuned=work.tunes)
                if method.output_tokens:
                    collect_outputs(skeleton, texts, method, work, device, reporter)
                room = room_for_hidden_states(needs, device)
                full_precision = ternarize_layers(
                    skeleton, texts, further, method, work, stock, device, room, reporter
                )
                if work.tunes:
                    all_kept = tuning_needs(
                        skeleton, plan, method, calibration, device, recompute=False
                    )
                    tune_grids(
                        skeleton,
                        [*texts, *further],
                        full_precision,
                        method,
                        work,
                        stock,
                        device,
                        reporter,
                        recompute=not fits_easily(all_kept, device),
                    )
    except BaseException:
        work.close()
        raise
    return work


def _written_text(
    checkpoint: Checkpoint,
    calibration: Calibration,
    method: Method,
    work: WorkDirectory,
    device: torch.device,
    reporter: Reporter,
) -> Tensor:
    """What the model writes, or has written before an interruption; (windows, length) int64."""
    if method.written_windows == 0:
        return calibration.ids[:0]
    written = work.load_written()
    if written is None:
        written = write_text(checkpoint, method.written_windows, calibration, device, reporter)
        work.save_written(written)
    return written


def split_texts(ids: Tensor, written: Tensor, *, tuned: bool) -> tuple[list[Tensor], list[Tensor]]:
    """What the layers are calibrated on, and what the grids are tuned on beyond that.

    ids, written: (samples, length) int64. As many tokens are read as `ids` has; as many of them as
    there are, but at most half, are written ones. If the grids are `tuned`, on all of these and on
    what else was written, half of them are enough for the layers (docs/quality.md).
    """
    from_written = min(len(written), ids.numel() // 2 // written.shape[1])
    from_ids = len(ids) - from_written * written.shape[1] // ids.shape[1]
    if not tuned:
        texts, further = [ids[:from_ids], written[:from_written]], []
    else:
        half_ids, half_written = -(-from_ids // 2), -(-from_written // 2)
        texts = [ids[:half_ids], written[:half_written]]
        further = [ids[half_ids:from_ids], written[half_written:]]
    return [t for t in texts if len(t)], [t for t in further if len(t)]


def make_plan(skeleton: Skeleton, keep: Keep, stock: StockTypes | None = None) -> Plan:
    """Raises Pt2Error if nothing would be ternary."""
    stock = stock or StockTypes()
    ternary: dict[str, tuple[int, int]] = {}
    in_stock_types: dict[str, tuple[int, int]] = {}
    reasons: dict[str, str] = {}
    sizes: list[LayerSize] = []
    for index, layer in enumerate(skeleton.layers):
        stored_name = partial(skeleton.stored_name, index)
        selected = select_linears(layer, skeleton.config, stored_name, keep)
        reasons |= selected.reasons
        shapes = {}
        for linear in [*selected.ternary, *selected.asked_for]:
            name = stored_name(f"{linear}.weight")
            rows, columns = layer.get_submodule(linear).get_parameter("weight").shape
            if linear in selected.ternary:
                ternary[name] = (rows, columns)
            elif stock.grid(name) is not None:
                in_stock_types[name] = (rows, columns)
            else:
                continue
            shapes[linear] = (rows, columns)
        sizes.append(
            _layer_size(
                sum(p.numel() for p in layer.parameters()),
                shapes,
                bool(routers(layer, skeleton.config)),
            )
        )
    if not ternary:
        why = "; ".join(describe_reasons(reasons)) or "its decoder layers hold no matrices"
        raise Pt2Error(
            f"nothing in {skeleton.checkpoint.path} can be ternarized: {why}; choose another "
            "model or ask for fewer stock types"
        )
    largest = LayerSize(
        max(size.parameters for size in sizes),
        sorted({group for size in sizes for group in size.groups}),
        max(size.statistics for size in sizes),
        max(size.outputs for size in sizes),
    )
    stock_bytes = sum(
        stock_size(shape, grid) for shape in ternary.values() for grid in stock.alternatives
    ) + sum(
        stock_size(in_stock_types[name], grid) for name, grid in stock.grids(in_stock_types).items()
    )
    return Plan(ternary, in_stock_types, stock_bytes, reasons, largest)


def conversion_needs(
    skeleton: Skeleton,
    plan: Plan,
    method: Method,
    calibration: Calibration,
    device: torch.device,
) -> Needs:
    """Memory and disk that the conversion will take."""
    samples, length = calibration.ids.shape
    shapes = list(plan.ternary.values())
    on_gpu = device.type == "cuda"
    calibrated, further = _tokens(calibration, method)
    layer = plan.layer if method.output_tokens else replace(plan.layer, outputs=0)
    layers = estimate(
        layer=layer,
        body_parameters=skeleton.body_parameters(),
        ternary=shapes,
        stock_bytes=plan.stock_bytes,
        tokens=calibrated,
        further_tokens=further,
        batch_tokens=min(samples, batch_size(length, device)) * length,
        hidden_size=skeleton.config.hidden_size,
        full_precision=bool(method.gptaq or method.tuning_epochs),
        on_gpu=on_gpu,
    )
    if method.output_tokens:
        outputs = estimate_outputs(
            layer=plan.layer,
            layers=len(skeleton),
            other_parameters=_other_parameters(skeleton, plan),
            tokens=tokens_read(method.output_tokens, samples, length),
            batch_tokens=max(TOKENS_PER_BATCH, length),
            head_tokens=TOKENS_PER_HEAD,
            hidden_size=skeleton.config.hidden_size,
            vocabulary=skeleton.config.vocab_size,
            on_gpu=on_gpu,
        )
        layers = outputs.then(layers)
    if not method.tuning_epochs:
        return layers
    return layers.then(tuning_needs(skeleton, plan, method, calibration, device, recompute=True))


def tuning_needs(
    skeleton: Skeleton,
    plan: Plan,
    method: Method,
    calibration: Calibration,
    device: torch.device,
    *,
    recompute: bool,
) -> Needs:
    """Memory and disk that the tuning will take."""
    length = calibration.ids.shape[1]
    return estimate_tuning(
        layer=plan.layer,
        layers=len(skeleton),
        ternary=list(plan.ternary.values()),
        other_parameters=_other_parameters(skeleton, plan),
        tokens=sum(_tokens(calibration, method)),
        step_tokens=step_size(length) * length,
        head_tokens=TOKENS_PER_HEAD,
        hidden_size=skeleton.config.hidden_size,
        vocabulary=skeleton.config.vocab_size,
        recompute=recompute,
        on_gpu=device.type == "cuda",
    )


def _tokens(calibration: Calibration, method: Method) -> tuple[int, int]:
    """Of the texts that `split_texts` gives, before anything is written."""
    ids = calibration.ids
    written = torch.empty(method.written_windows, written_length(ids.shape[1]), device="meta")
    texts, further = split_texts(ids, written, tuned=bool(method.tuning_epochs))
    return sum(t.numel() for t in texts), sum(t.numel() for t in further)


def _other_parameters(skeleton: Skeleton, plan: Plan) -> int:
    """The number of those that stay as they are."""
    tensors = skeleton.checkpoint.tensors
    return sum(t.elements for name, t in tensors.items() if name not in plan.ternary)


def describe_reasons(reasons: Mapping[str, str]) -> list[str]:
    """One sentence for each kind of matrix that is not ternary; layers and experts folded."""
    kinds = Counter((re.sub(r"\.\d+\.", ".*.", name), reason) for name, reason in reasons.items())
    return [
        f"{name} ({count} of them) stays in a stock type: {reason}"
        for (name, reason), count in kinds.items()
    ]


def _layer_size(parameters: int, shapes: Mapping[str, tuple[int, int]], mixture: bool) -> LayerSize:
    """As if all matrices of one row length in one module read the same input."""
    groups: dict[tuple[str, int], int] = {}
    for name, (rows, columns) in shapes.items():
        key = (name.rpartition(".")[0], columns)
        groups[key] = groups.get(key, 0) + rows
    stacked = [(rows, columns) for (_, columns), rows in groups.items()]
    single = max((statistics_bytes(columns) for _, columns in stacked), default=0)
    together = sum(statistics_bytes(columns) for _, columns in stacked) if mixture else 0
    outputs = sum(
        output_bytes(rows) for (owner, _), rows in groups.items() if has_output_statistics(owner)
    )
    return LayerSize(parameters, stacked, max(single, min(together, STATISTICS_BYTES)), outputs)


def require_readable_ids(skeleton: Skeleton, calibration: Calibration) -> None:
    low, high = int(calibration.ids.min()), int(calibration.ids.max())
    vocabulary = skeleton.config.vocab_size
    if low < 0 or high >= vocabulary:
        raise Pt2Error(
            f"calibration ids go from {low} to {high}, and the model's vocabulary has "
            f"{vocabulary}: make the ids with this model's own tokenizer"
        )
    length = calibration.ids.shape[1]
    longest = getattr(skeleton.config, "max_position_embeddings", None) or length
    if length > longest:
        raise Pt2Error(
            f"calibration samples of {length} tokens are longer than the model's context of "
            f"{longest}: choose a --length of at most {longest}"
        )
