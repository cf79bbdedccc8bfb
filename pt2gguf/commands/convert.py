"""``pt2gguf convert``: from a Hugging Face checkpoint to a ternary GGUF file."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pt2gguf.commands.calibration_options import (
    add_calibration_options,
    calibration_for,
    positive,
    whole,
)
from pt2gguf.errors import Pt2Error, first_line
from pt2gguf.export.output import require_writable
from pt2gguf.export.stock_types import (
    STOCK_TYPES,
    bits_per_weight,
    parse_stock_type,
)

if TYPE_CHECKING:
    from pt2gguf.export.llama_cpp import LlamaCpp
    from pt2gguf.export.stock_grids import GgmlGrid
    from pt2gguf.model import Skeleton
    from pt2gguf.ternary import Method

BUDGET_TYPES = ("q2_k", "q3_k", "q4_k")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        help="ternarize a checkpoint and write it as GGUF",
        description=(
            "Ternarizes the decoder layers of a Hugging Face checkpoint and writes a GGUF file. "
            "Interrupted at any point, the same command goes on where it stopped."
        ),
        epilog=f"TYPE is one of {', '.join(STOCK_TYPES)}.",
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint directory, or a name on the hub")
    parser.add_argument("output", metavar="OUT.gguf", type=Path, help="the file to write")
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace OUT.gguf, and drop a work directory that was begun with other settings",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="a line for each tensor")

    file = parser.add_argument_group("the file")
    file.add_argument(
        "--type",
        choices=("tq2_1", "tq1_1"),
        default="tq2_1",
        help="tq2_1 (default): 2.25 bits per weight, fastest; tq1_1: 1.875 bits, smallest; "
        "the same values in both",
    )
    file.add_argument(
        "--output-type",
        metavar="TYPE",
        default="q6_k",
        help="of the output head (default: %(default)s)",
    )
    file.add_argument(
        "--embedding-type",
        metavar="TYPE",
        help="of the embeddings (default: q4_k; where they are the output head too, its type)",
    )
    file.add_argument(
        "--budget",
        metavar="BPW",
        type=float,
        help="bits per weight, on the average over the decoder's matrices, to spend on stock types "
        f"({', '.join(BUDGET_TYPES)}) for the tensors where the model gains most; converts twice",
    )
    file.add_argument(
        "--tensor-type",
        metavar="REGEX=TYPE",
        action="append",
        default=[],
        help="keep tensors whose checkpoint or GGUF name matches in a stock type (repeatable)",
    )

    add_calibration_options(parser.add_argument_group("calibration"))

    method = parser.add_argument_group("method")
    method.add_argument(
        "--method",
        choices=("default", "paper"),
        default="default",
        help="default: the best we measured; paper: PT2-LLM as published",
    )
    for switch, meaning in (
        ("itf", "iterative ternary fitting"),
        ("aga", "activation-aware grid alignment"),
        ("ssr", "structural similarity reordering"),
        ("gptq", "GPTQ's compensation between blocks"),
    ):
        method.add_argument(f"--no-{switch}", action="store_true", help=f"without {meaning}")
    method.add_argument(
        "--reorder-by",
        choices=("similarity", "hessian", "random"),
        default="similarity",
        help="how columns are reordered; similarity (default) is SSR, the others are there to "
        "compare with",
    )
    method.add_argument(
        "--no-tuning",
        action="store_true",
        help="without tuning the scales and offsets of the whole model on its logits",
    )
    method.add_argument(
        "--written",
        metavar="N",
        type=whole,
        help="windows of text that the model itself writes, to be calibrated and tuned on; up to "
        "half of the calibration text is left out for them (default: half as many as --samples; "
        "1024 for the best quality)",
    )
    method.add_argument(
        "--gptaq",
        metavar="WEIGHT",
        type=float,
        help="weight of GPTAQ's term (default: the method's)",
    )

    running = parser.add_argument_group("running")
    running.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    running.add_argument(
        "--threads", metavar="N", type=positive, help="CPU threads (default: one for each core)"
    )
    running.add_argument(
        "--work", metavar="DIR", type=Path, help="work directory (default: OUT.gguf.work)"
    )
    running.add_argument("--keep-work", action="store_true", help="keep it after success")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    # PyTorch and transformers take seconds to import: not for --help or a mistyped option.
    from rich.console import Console

    from pt2gguf.blocks import BLOCK_TYPES
    from pt2gguf.convert.budget import TERNARY, spend_budget
    from pt2gguf.convert.machine import usable_device
    from pt2gguf.convert.progress import ConsoleReporter
    from pt2gguf.convert.run import make_plan, ternarize_checkpoint
    from pt2gguf.convert.workdir import WorkDirectory
    from pt2gguf.export.gguf_file import ExportOptions, write_gguf
    from pt2gguf.export.llama_cpp import import_llama_cpp
    from pt2gguf.export.precheck import require_known_metadata
    from pt2gguf.export.type_choice import TypeChoice
    from pt2gguf.export.work_source import WorkSource
    from pt2gguf.model import Checkpoint, Skeleton
    from pt2gguf.native.installation import find_installation

    started = time.monotonic()
    console = Console(highlight=False, soft_wrap=True)
    require_writable(options.output, options.force)
    rules = _parse_tensor_types(options.tensor_type)
    output_type = parse_stock_type(options.output_type)
    embedding_type = options.embedding_type and parse_stock_type(options.embedding_type)
    block_type = BLOCK_TYPES[options.type]
    method = _method(options)
    device = usable_device(options.device)

    llama_cpp = import_llama_cpp(find_installation())
    bits = {TERNARY: block_type.bits_per_weight}
    bits |= {kind: bits_per_weight(kind, llama_cpp.gguf) for kind in BUDGET_TYPES}
    if options.budget is not None:
        _require_possible(options.budget, options.type, bits)
    checkpoint = Checkpoint(local_directory(options.model))
    require_known_metadata(checkpoint.path, llama_cpp)
    skeleton = Skeleton(checkpoint)
    gguf_name = gguf_namer(llama_cpp, skeleton)
    has_head = "output.weight" in map(gguf_name, checkpoint.tensors)
    types = TypeChoice(rules, checkpoint, gguf_name, llama_cpp)
    calibration = calibration_for(skeleton, options)
    plan = make_plan(skeleton, types.reason, types.stock_types())
    types.find_unexportable(plan.ternary, plan.stock)
    if options.budget is not None:
        left = {n: shape for n, shape in plan.ternary.items() if types.reason(n) is None}
        if note := _unspendable(left):
            console.print(f"note: {note}")

    def ternarize(
        with_method: Method, work_directory: Path, alternatives: Sequence[GgmlGrid] = ()
    ) -> WorkDirectory:
        return ternarize_checkpoint(
            checkpoint,
            with_method,
            calibration,
            work_directory,
            keep=types.reason,
            stock=types.stock_types(alternatives),
            device=device,
            threads=options.threads,
            force=options.force,
            reporter=ConsoleReporter(console, device, verbose=options.verbose),
        )

    work_directory = options.work or options.output.with_name(options.output.name + ".work")
    if options.budget is not None:
        console.print("first all of it ternary, to learn where bits are needed most")
        untuned = dataclasses.replace(method, tuning_epochs=0, written_windows=0)
        candidates = [types.grid_of(kind) for kind in BUDGET_TYPES]
        first_directory = work_directory.with_name(work_directory.name + ".first")
        with ternarize(untuned, first_directory, candidates) as first:
            console.print("measuring what each weight costs the model")
            types.by_budget |= spend_budget(
                skeleton,
                calibration.ids,
                first,
                tensor_of=lambda name: gguf_name(name) or name,
                grids=candidates,
                bits=bits,
                budget=options.budget,
                device=device,
            )
    with ternarize(method, work_directory) as work:
        console.print(f"writing {options.output}")
        write_gguf(
            checkpoint.path,
            options.output,
            WorkSource(work, checkpoint.tensors),
            ExportOptions(
                block_type=block_type,
                output_type=output_type,
                embedding_type=embedding_type or ("q4_k" if has_head else output_type),
                tensor_type=types.tensor_type,
                metadata=_metadata(method, calibration.provenance),
            ),
            llama_cpp,
        )
        if not options.keep_work:
            work.remove()
    if options.budget is not None and not options.keep_work:
        with WorkDirectory.open_existing(first.path) as first:
            first.remove()
    size = options.output.stat().st_size
    seconds = time.monotonic() - started
    console.print(f"{options.output}: {size / 1e6:.2f} MB ({options.type}) in {seconds:.0f} s")


def _require_possible(budget: float, ternary: str, bits: Mapping[str, float]) -> None:
    """Raises Pt2Error for a budget that is not between the bits per weight of these types, of which
    the first is the ternary one."""
    least = next(iter(bits.values()))
    largest = max(bits, key=bits.__getitem__)
    if budget < least:
        raise Pt2Error(
            f"--budget {budget:g} is less than the {least:g} bits per weight of {ternary}: ask for "
            "more, or for --type tq1_1"
        )
    if budget >= bits[largest]:
        raise Pt2Error(
            f"--budget {budget:g} would leave nothing ternary: ask for less than the "
            f"{bits[largest]:g} bits per weight of {largest}, the largest type that it spends on"
        )


def _unspendable(shapes: Mapping[str, tuple[int, int]]) -> str:
    """On what a budget cannot be spent; raises Pt2Error if that is everything.

    shapes: (n, m) of the weights that will be ternary, by checkpoint name.
    """
    from pt2gguf.ternary import CHUNK

    fixed = [name for name, (_, columns) in shapes.items() if columns % CHUNK]
    if not fixed:
        return ""
    types = ", ".join(BUDGET_TYPES)
    if len(fixed) == len(shapes):
        raise Pt2Error(
            f"--budget has nothing to spend bits on: {types} need rows of a multiple of {CHUNK} "
            f"weights, and {fixed[0]} has {shapes[fixed[0]][1]}: leave --budget out"
        )
    return (
        f"{len(fixed)} of {len(shapes)} matrices, such as {fixed[0]}, stay ternary whatever the "
        f"budget, as {types} need rows of a multiple of {CHUNK} weights"
    )


def _parse_tensor_types(rules: list[str]) -> list[tuple[re.Pattern[str], str]]:
    parsed = []
    for rule in rules:
        pattern, equals, name = rule.rpartition("=")
        if not equals or not pattern:
            raise Pt2Error(f"--tensor-type {rule!r} is not REGEX=TYPE, such as 'attn_v=q4_k'")
        try:
            parsed.append((re.compile(pattern), parse_stock_type(name)))
        except re.error as error:
            raise Pt2Error(
                f"--tensor-type {pattern!r} is not a regular expression: {error}"
            ) from None
    return parsed


def _method(options: argparse.Namespace) -> Method:
    from pt2gguf.ternary import METHODS

    switches = ("itf", "aga", "ssr", "gptq")
    changes: dict[str, Any] = {s: False for s in switches if getattr(options, f"no_{s}")}
    changes["reorder_by"] = options.reorder_by
    if options.no_tuning:
        changes["tuning_epochs"] = 0
    if options.written is not None:
        changes["written_windows"] = options.written
    elif METHODS[options.method].written_windows:
        changes["written_windows"] = options.samples // 2
    if options.gptaq is not None:
        changes["gptaq"] = options.gptaq
    return dataclasses.replace(METHODS[options.method], **changes)


def local_directory(model: str) -> Path:
    """The directory of a checkpoint: `model` itself, or what the hub has under that name."""
    if Path(model).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise Pt2Error(
            f"{model} is neither a directory nor to be had from the Hugging Face hub "
            f"({first_line(error)}): check the name, or download the checkpoint and give its "
            "directory"
        ) from None


def gguf_namer(llama_cpp: LlamaCpp, skeleton: Skeleton) -> Callable[[str], str | None]:
    """The GGUF name of a checkpoint tensor, which all experts share; None if it has none."""
    from pt2gguf.export.llama_cpp import converter_name

    converter = llama_cpp.model_class(skeleton.checkpoint.path)
    names = llama_cpp.gguf.get_tensor_name_map(converter.model_arch, len(skeleton))

    def gguf_name(name: str) -> str | None:
        joined = re.sub(r"\bexperts\.\d+\.", "experts.", converter_name(converter, name) or name)
        return names.get_name(joined, try_suffixes=(".weight", ".bias"))

    return gguf_name


def _metadata(method: Method, provenance: dict[str, Any]) -> dict[str, str | int | float]:
    """How the model was made, as pt2.* keys."""
    from pt2gguf import __version__

    switches = dataclasses.asdict(method)
    values: dict[str, str | int | float] = {
        "tool_version": __version__,
        "method": switches.pop("name"),
        "method.switches": json.dumps(switches, sort_keys=True),
    }
    for key, value in provenance.items():
        if value is not None:
            plain = value if isinstance(value, (str, int)) else ", ".join(map(str, value))
            values[f"calibration.{key}"] = plain
    return values
