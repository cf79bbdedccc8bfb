"""``pt2gguf eval``: what a file or a model says, measured in llama.cpp and in transformers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pt2gguf.commands.calibration_options import (
    add_calibration_options,
    calibration_for,
    positive,
)
from pt2gguf.errors import Pt2Error

if TYPE_CHECKING:
    from types import ModuleType


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "eval",
        help="measure perplexity, KL divergence and zero-shot tasks",
        description=(
            "Prints a Markdown table of what a GGUF file, the model in full precision that it was "
            "made from, and other ways to quantize that model reach: perplexity, KL divergence "
            "from full precision, and accuracy in zero-shot tasks; in llama.cpp, and in "
            "transformers with the same weights in float32."
        ),
    )
    parser.add_argument(
        "subjects",
        metavar="FILE.gguf|MODEL",
        nargs="+",
        help="GGUF files of one model, or a checkpoint (as for convert)",
    )
    parser.add_argument(
        "--model", metavar="MODEL", help="the checkpoint that the files were made from"
    )
    parser.add_argument(
        "--against",
        metavar="NAME,...",
        type=_names,
        default=[],
        help="compare with types of llama-quantize (such as Q2_K,IQ2_XXS: made, measured and "
        "removed), and with rtn and gptq: 2 bits in groups of 128, in transformers only",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures to FILE too")

    texts = parser.add_argument_group("perplexity")
    texts.add_argument(
        "--text",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="a text to predict (repeatable)",
    )
    texts.add_argument(
        "--context",
        metavar="N",
        type=positive,
        default=512,
        help="tokens in a window of llama-perplexity (default: %(default)s)",
    )
    texts.add_argument(
        "--chunks",
        metavar="N",
        type=positive,
        help="windows of llama-perplexity (default: the whole text)",
    )
    texts.add_argument(
        "--window",
        metavar="N",
        type=positive,
        help="tokens in a window of transformers (default: 2048 as in the paper, or the model's "
        "context)",
    )

    tasks = parser.add_argument_group("zero-shot tasks")
    tasks.add_argument(
        "--tasks",
        metavar="NAME,...",
        type=_names,
        default=[],
        help="tasks of lm-eval; all: the seven of the paper",
    )
    tasks.add_argument(
        "--task-path", metavar="DIR", type=Path, help="where there are further task files"
    )
    tasks.add_argument(
        "--limit", metavar="N", type=positive, help="items of each task (default: all)"
    )

    add_calibration_options(parser.add_argument_group("calibration of what it is compared with"))

    running = parser.add_argument_group("running")
    running.add_argument(
        "--engine",
        choices=("both", "llama.cpp", "transformers"),
        default="both",
        help="where to compute (default: %(default)s)",
    )
    running.add_argument("--device", default="cpu", help="of transformers: cpu (default) or cuda")
    running.add_argument(
        "--threads", metavar="N", type=positive, help="CPU threads (default: one for each core)"
    )
    parser.set_defaults(run=run)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as a,b,c")
    return list(dict.fromkeys(names))


def run(options: argparse.Namespace) -> None:
    from rich.console import Console

    from pt2gguf.commands.convert import local_directory
    from pt2gguf.convert.machine import usable_device
    from pt2gguf.evaluation.evaluate import Evaluation, Options, read_texts
    from pt2gguf.evaluation.llama_tools import LlamaTools, Windows
    from pt2gguf.evaluation.report import ENGINES, markdown_table, write_json
    from pt2gguf.evaluation.tasks import PAPER_TASKS, load_tasks
    from pt2gguf.export.llama_cpp import import_llama_cpp
    from pt2gguf.export.output import require_writable
    from pt2gguf.export.precheck import require_known_metadata
    from pt2gguf.model import Checkpoint
    from pt2gguf.native.installation import find_installation

    progress = Console(stderr=True, highlight=False, soft_wrap=True)
    files, model = _files_and_model(options.subjects, options.model)
    if not options.text and not options.tasks:
        raise Pt2Error("there is nothing to measure: give --text FILE, --tasks NAME, or both")
    if options.json is not None:
        require_writable(options.json, force=True)
    device = usable_device(options.device)
    installation = find_installation()
    llama_cpp = import_llama_cpp(installation)
    against = [_known_method(name, llama_cpp.gguf) for name in options.against]
    tasks = {}
    if options.tasks:
        names = PAPER_TASKS if options.tasks == ["all"] else options.tasks
        tasks = load_tasks(names, options.task_path)

    checkpoint = Checkpoint(local_directory(model))
    require_known_metadata(checkpoint.path, llama_cpp)
    measured = Options(
        windows=Windows(options.context, options.chunks),
        window=options.window,
        texts=read_texts(options.text, checkpoint.path),
        tasks=tasks,
        limit=options.limit,
        engines=ENGINES if options.engine == "both" else (options.engine,),
        device=device,
        threads=options.threads,
    )
    evaluation = Evaluation(
        checkpoint,
        measured,
        llama_cpp,
        LlamaTools(installation, options.threads),
        lambda message: progress.print(message),
    )
    needs_calibration = any(name != "rtn" for name in against)
    rows = evaluation.run(
        files, against, calibration_for(evaluation.skeleton, options) if needs_calibration else None
    )
    print(markdown_table(rows, [text.name for text in measured.texts], list(tasks)))
    if options.json is not None:
        command = ["pt2gguf", *options.arguments]
        write_json(options.json, rows, command)


def _files_and_model(subjects: list[str], model: str | None) -> tuple[list[Path], str]:
    """The files to measure, if any, and the checkpoint."""
    if model is None and len(subjects) == 1 and not Path(subjects[0]).is_file():
        return [], subjects[0]
    for subject in subjects:
        if not Path(subject).is_file():
            raise Pt2Error(
                f"{subject} is not a file: give GGUF files and the --model that they were made "
                "from, or a model alone"
            )
    if model is None:
        raise Pt2Error(
            f"--model is missing: give the checkpoint that {subjects[0]} was made from, which it "
            "is compared with"
        )
    return [Path(subject) for subject in subjects], model


def _known_method(name: str, gguf: ModuleType) -> str:
    """Canonical spelling; raises :class:`Pt2Error` for what nothing can be quantized with."""
    from pt2gguf.evaluation.evaluate import BASELINES

    if name.lower() in BASELINES:
        return name.lower()
    prefix = "MOSTLY_"
    known = [t.name.removeprefix(prefix) for t in gguf.LlamaFileType if t.name.startswith(prefix)]
    if name.upper() not in known:
        raise Pt2Error(
            f"--against {name!r} is neither {' nor '.join(BASELINES)} nor a type of llama-quantize "
            f"({', '.join(known)}): check the name"
        )
    return name.upper()
