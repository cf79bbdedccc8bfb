"""Zero-shot tasks, by lm-eval, on a transformers model or on a GGUF file through llama.cpp."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pt2gguf.errors import Pt2Error, first_line

PAPER_TASKS = (
    "arc_challenge",
    "arc_easy",
    "boolq",
    "hellaswag",
    "openbookqa",
    "piqa",
    "winogrande",
)
HF_BATCH = 8  # requests that transformers computes together
LONGEST = 2048  # tokens that are read; no item of these tasks is longer


def load_tasks(names: Sequence[str], directory: Path | None) -> dict[str, Any]:
    """lm-eval's tasks by name, with their data.

    directory: of further task files, before lm-eval's own.

    Raises Pt2Error if lm-eval is not installed, has no such task, or cannot get its data.
    """
    try:
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        raise Pt2Error(
            f"tasks need lm-eval, which cannot be imported ({error}): pip install 'pt2gguf[eval]'"
        ) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if directory is not None and not directory.is_dir():
        raise Pt2Error(f"--task-path {directory} is not a directory: give that of the task files")
    for manager in _managers(directory):
        if all(name in manager.all_subtasks for name in names):
            return {name: _load_task(manager, name) for name in names}
    unknown = next(name for name in names if name not in manager.all_subtasks)
    raise Pt2Error(
        f"lm-eval has no task {unknown!r}: choose from {', '.join(PAPER_TASKS)}, any other task of "
        "lm-eval, or one of your own with --task-path"
    )


def _managers(directory: Path | None) -> Iterator[Any]:
    """First of the files in `directory` alone: lm-eval takes seconds to find its own."""
    from lm_eval.tasks import TaskManager

    if directory is not None:
        yield TaskManager(include_path=str(directory), include_defaults=False)
    yield TaskManager(include_path=None if directory is None else str(directory))


def _load_task(manager: Any, name: str) -> Any:
    try:
        with _progress_for_terminals():
            task = manager.load([name])["tasks"][name]
    except Exception as error:  # the hub's client raises what its many layers raise
        reason = first_line(error)[:200]
        raise Pt2Error(
            f"the data of task {name} cannot be had ({type(error).__name__}: {reason}): check the "
            "network, or give --task-path with task files that read local data"
        ) from error
    if task.OUTPUT_TYPE != "multiple_choice" or "acc" not in task.aggregation():
        raise Pt2Error(
            f"task {name} is of type {task.OUTPUT_TYPE} and measures "
            f"{', '.join(task.aggregation())}: only multiple choice tasks with an acc can be "
            "evaluated"
        )
    task.set_config("num_fewshot", 0)
    return task


def run_tasks(
    model: Any, tasks: Mapping[str, Any], limit: int | None
) -> dict[str, dict[str, float]]:
    """The metrics of each task without examples in the prompt, such as acc and acc_norm, 0 to 1.

    model: a language model of lm-eval; limit: items of each task, all if None.
    """
    from lm_eval import evaluate

    with _progress_for_terminals():
        results = evaluate(model, dict(tasks), limit=limit, bootstrap_iters=0, log_samples=False)
    return {
        name: {
            key.removesuffix(",none"): float(value)
            for key, value in results["results"][name].items()
            if key.endswith(",none") and "stderr" not in key
        }
        for name in tasks
    }


def main_metric(figures: Mapping[str, float]) -> float:
    """acc_norm where a task has it, else acc: as the quantization papers report them."""
    return figures["acc_norm"] if "acc_norm" in figures else figures["acc"]


def transformers_lm(model: Any, tokenizer: Any) -> Any:
    """lm-eval's view of a transformers model."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=HF_BATCH, max_length=LONGEST)


def llama_cpp_lm(file: Path, threads: int | None) -> Any:
    """lm-eval's view of a GGUF file, tokenized and computed by llama.cpp."""
    from llama_cpp import Llama
    from lm_eval.api.model import TemplateLM

    class LlamaCppLM(TemplateLM):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._llama = Llama(
                str(file),
                n_ctx=LONGEST,
                logits_all=True,
                n_threads=threads,
                n_threads_batch=threads,
                verbose=False,
            )

        @property
        def eot_token_id(self) -> int:
            return self._llama.token_eos()

        @property
        def prefix_token_id(self) -> int:
            bos = self._llama.token_bos()
            return bos if bos >= 0 else self.eot_token_id

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
        ) -> list[int]:
            """With the beginning of text if the file asks for it, unless told otherwise."""
            return self._llama.tokenize(
                string.encode(), add_bos=add_special_tokens is not False, special=True
            )

        def _loglikelihood_tokens(
            self,
            requests: list[tuple[tuple[str, str], list[int], list[int]]],
            disable_tqdm: bool = False,
            **kwargs: Any,
        ) -> list[tuple[float, bool]]:
            sequences = [(context + end, len(end)) for _, context, end in requests]
            # Neighbours in this order begin alike, and that part is computed once.
            order = sorted(range(len(sequences)), key=lambda number: sequences[number][0])
            scored = {number: score_end(self._llama, *sequences[number]) for number in order}
            return [scored[number] for number in range(len(sequences))]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            raise NotImplementedError("load_tasks admits multiple choice only")

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            raise NotImplementedError("load_tasks admits multiple choice only")

    return LlamaCppLM()


def score_end(llama: Any, tokens: Sequence[int], scored: int) -> tuple[float, bool]:
    """The log-likelihood of the last `scored` tokens, and whether each of them is the likeliest.

    llama: a model with logits_all, which keeps what it has read; what `tokens` have in common with
    that is not computed again. A sequence that is too long loses its beginning.
    """
    tokens = tokens[-(LONGEST + 1) :]
    read, targets = tokens[:-1], tokens[-scored:]
    _forget_after(llama, _common_length(read, llama.input_ids[: llama.n_tokens]))
    llama.eval(read[llama.n_tokens :])
    logits = llama.scores[len(read) - scored : len(read)].astype(np.float64)
    highest = logits.max(axis=1, keepdims=True)
    log_sums = np.log(np.exp(logits - highest).sum(axis=1)) + highest[:, 0]
    likelihood = (logits[np.arange(scored), targets] - log_sums).sum()
    return float(likelihood), bool((logits.argmax(axis=1) == targets).all())


def _forget_after(llama: Any, length: int) -> None:
    """Keeps the first `length` tokens, or none where the model's memory cannot be cut there."""
    import llama_cpp

    memory = llama_cpp.llama_get_memory(llama.ctx)
    llama.n_tokens = length if llama_cpp.llama_memory_seq_rm(memory, 0, length, -1) else 0


def _common_length(a: Sequence[int], b: NDArray[np.intc]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    shorter = min(len(a), len(b))
    different = np.flatnonzero(np.asarray(a[:shorter]) != b[:shorter])
    return int(different[0]) if len(different) else shorter


@contextmanager
def _progress_for_terminals() -> Iterator[None]:
    """Within this context, progress bars go to terminals only."""
    if sys.stderr.isatty():
        yield
        return
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
        yield
