"""The whole evaluation: what there is to measure, one model at a time, and every figure of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from pt2gguf.convert.calibration import Calibration, load_tokenizer, tokenize
from pt2gguf.convert.resources import available_memory, require_disk
from pt2gguf.convert.run import make_plan, require_readable_ids
from pt2gguf.errors import Pt2Error
from pt2gguf.evaluation.baselines import BITS_PER_WEIGHT, gptq_weights, round_to_nearest
from pt2gguf.evaluation.file_weights import (
    bits_per_weight,
    open_gguf,
    require_same_vocabulary,
)
from pt2gguf.evaluation.llama_tools import (
    IMATRIX_CONTEXT,
    LEAST_POSITIONS,
    LlamaTools,
    Windows,
    write_full_precision,
)
from pt2gguf.evaluation.perplexity import perplexity, window_length
from pt2gguf.evaluation.reference_model import load_file_model
from pt2gguf.evaluation.report import Row, TextFigures
from pt2gguf.evaluation.tasks import llama_cpp_lm, run_tasks, transformers_lm
from pt2gguf.export.llama_cpp import LlamaCpp
from pt2gguf.export.stock_types import fitting_type
from pt2gguf.model import Checkpoint, Skeleton, load_model

FULL_PRECISION = "F16"
BASELINES = ("rtn", "gptq")
ENDS_TYPE = "q6_k"  # of output and embeddings beside llama-quantize's types
QUANTIZED_SHARE = 0.6  # of the F16 file's size: more than Q8_0 takes
LOADING = 1.25  # memory while a model is loaded, of what it takes afterwards


@dataclass(frozen=True)
class Text:
    """A text to measure perplexity on. ids: (tokens,) int64."""

    name: str
    path: Path
    ids: Tensor


@dataclass(frozen=True)
class Options:
    """What is measured, and how.

    windows: of llama-perplexity; window: tokens in one of transformers, as in the papers if None;
    tasks: lm-eval's by name; limit: items of each, all if None;
    engines: of report.ENGINES; device: of transformers; threads: of llama.cpp, as it likes if None.
    """

    windows: Windows
    window: int | None
    texts: Sequence[Text]
    tasks: Mapping[str, Any]
    limit: int | None
    engines: Sequence[str]
    device: torch.device
    threads: int | None


@dataclass(frozen=True)
class _Subject:
    """A model to measure: as a file, in transformers, or both."""

    name: str
    bits_per_weight: float
    file: Path | None
    load: Callable[[], Any]


def read_texts(paths: Sequence[Path], model: Path) -> list[Text]:
    """The texts by the names of their files, tokenized with the tokenizer of the model."""
    texts: dict[str, Text] = {}
    tokenizer = load_tokenizer(model) if paths else None
    for path in paths:
        if path.stem in texts:
            raise Pt2Error(f"two texts are called {path.stem}: rename {path}, or give it once")
        try:
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise Pt2Error(
                f"text {path} cannot be read as UTF-8 ({error}): give a text file"
            ) from None
        assert tokenizer is not None
        texts[path.stem] = Text(path.stem, path, tokenize(tokenizer, content))
    return list(texts.values())


class Evaluation:
    """Measures a checkpoint, files made from it, and what they are to be compared with."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: Options,
        llama_cpp: LlamaCpp,
        tools: LlamaTools,
        note: Callable[[str], None],
    ) -> None:
        """note: told what is being done."""
        self._checkpoint = checkpoint
        self.skeleton = Skeleton(checkpoint)
        self._options = options
        self._llama_cpp = llama_cpp
        self._tools = tools
        self._note = note
        self._window = window_length(self.skeleton.config, options.window)

    def run(
        self, files: Sequence[Path], against: Sequence[str], calibration: Calibration | None
    ) -> list[Row]:
        """A row for full precision, one for each of `files`, and one for each of `against`.

        Args:
            against: "rtn", "gptq", or types of llama-quantize.
            calibration: for "gptq" and the types of llama-quantize.

        Raises:
            Pt2Error: a file that was not made from the checkpoint, a text that is too short, or too
                little memory or disk.
        """
        for file in files:
            reader = open_gguf(file, self._llama_cpp.gguf)
            require_same_vocabulary(self._checkpoint, file, reader, self._llama_cpp)
        self._require_long_enough()
        self._require_computable(against, calibration)
        self._require_memory()
        with TemporaryDirectory(prefix="pt2gguf-eval-") as directory:
            work = Path(directory)
            logits = work if files or _stock_types(against) else None
            self._require_disk(work, against, logits)
            return [
                self._measure(subject, logits)
                for subject in self._subjects(files, against, calibration, work)
            ]

    def _subjects(
        self,
        files: Sequence[Path],
        against: Sequence[str],
        calibration: Calibration | None,
        work: Path,
    ) -> Iterator[_Subject]:
        """One at a time: a file that was made for it is gone when the next one comes."""
        full = None
        if "llama.cpp" in self._options.engines or _stock_types(against):
            full = work / "full.gguf"
            self._note("writing the full-precision file")
            write_full_precision(self._checkpoint.path, full, self._llama_cpp)
        yield _Subject(FULL_PRECISION, 16, full, lambda: load_model(self._checkpoint, {}))
        for file in files:
            yield self._file_subject(file.name, file)
        for name in against:
            if name in BASELINES:
                yield self._baseline(name, calibration)
            else:
                assert full is not None
                assert calibration is not None
                quantized = self._quantize(full, name, calibration, work)
                yield self._file_subject(name, quantized)
                quantized.unlink()

    def _file_subject(self, name: str, file: Path) -> _Subject:
        bits = bits_per_weight(open_gguf(file, self._llama_cpp.gguf))
        return _Subject(
            name, bits, file, lambda: load_file_model(self._checkpoint, file, self._llama_cpp)
        )

    def _quantize(self, full: Path, name: str, calibration: Calibration, work: Path) -> Path:
        imatrix, output = work / "imatrix.gguf", work / "quantized.gguf"
        if not imatrix.exists():
            self._note("computing the importance matrix")
            text = work / "calibration.txt"
            text.write_text(_as_text(calibration, self._checkpoint.path), encoding="utf-8")
            self._tools.importance_matrix(full, text, imatrix)
        self._note(f"quantizing to {name}")
        width = self.skeleton.config.hidden_size
        ends_type = fitting_type(ENDS_TYPE, width, self._llama_cpp.gguf).name
        self._tools.quantize(full, imatrix, name, ends_type, output)
        return output

    def _baseline(self, name: str, calibration: Calibration | None) -> _Subject:
        matrices = make_plan(self.skeleton, lambda _: None).ternary
        device = self._options.device

        def load() -> Any:
            self._note(f"quantizing with {name}")
            if name == "rtn":
                weights = {
                    matrix: round_to_nearest(self._checkpoint.read(matrix)).float()
                    for matrix in matrices
                }
            else:
                assert calibration is not None
                weights = gptq_weights(self.skeleton, matrices, calibration.ids, device)
            return load_model(self._checkpoint, weights)

        sizes = {
            self.skeleton.stored_name(index, parameter): tensor.numel()
            for index, layer in enumerate(self.skeleton.layers)
            for parameter, tensor in layer.named_parameters()
            if tensor.dim() > 1
        }
        bits = sum(
            size * (BITS_PER_WEIGHT if matrix in matrices else 16) for matrix, size in sizes.items()
        )
        return _Subject(name.upper(), bits / sum(sizes.values()), None, load)

    def _measure(self, subject: _Subject, logits: Path | None) -> Row:
        """logits: where the log-probabilities that others are compared with are; None if none."""
        options = self._options
        size = None if subject.file is None else subject.file.stat().st_size
        row = Row(subject.name, size, subject.bits_per_weight)
        row.texts = {text.name: TextFigures() for text in options.texts}
        if "llama.cpp" in options.engines and subject.file is not None:
            self._measure_in_llama_cpp(row, subject.file, logits)
        if "transformers" in options.engines:
            model = subject.load().to(options.device)
            self._measure_in_transformers(row, model)
        return row

    def _measure_in_llama_cpp(self, row: Row, file: Path, logits: Path | None) -> None:
        options = self._options
        for text in options.texts:
            self._note(f"{row.name}: {text.name} in llama.cpp")
            figures = row.texts[text.name]
            base = None if logits is None else logits / f"{text.name}.logits"
            if base is None or not base.exists():  # the first file is the full-precision one
                figures.llama_cpp_perplexity = self._tools.perplexity(
                    file, text.path, options.windows, base
                )
            else:
                found = self._tools.divergence(file, base, options.windows)
                figures.llama_cpp_perplexity = found.perplexity
                figures.kl_divergence = found.kl_divergence
                figures.same_top = found.same_top
        if options.tasks:
            self._note(f"{row.name}: tasks in llama.cpp")
            model = llama_cpp_lm(file, options.threads)
            row.tasks["llama.cpp"] = run_tasks(model, options.tasks, options.limit)

    def _measure_in_transformers(self, row: Row, model: Any) -> None:
        options = self._options
        for text in options.texts:
            self._note(f"{row.name}: {text.name} in transformers")
            figures = row.texts[text.name]
            figures.transformers_perplexity = perplexity(model, text.ids, self._window)
        if options.tasks:
            self._note(f"{row.name}: tasks in transformers")
            tokenizer = load_tokenizer(self._checkpoint.path)
            lm = transformers_lm(model, tokenizer)
            row.tasks["transformers"] = run_tasks(lm, options.tasks, options.limit)

    @property
    def _parameters(self) -> int:
        return sum(math.prod(stored.shape) for stored in self._checkpoint.tensors.values())

    def _require_long_enough(self) -> None:
        windows, engines = self._options.windows, self._options.engines
        for text in self._options.texts:
            tokens = len(text.ids)
            if "transformers" in engines and tokens < self._window:
                raise Pt2Error(
                    f"text {text.path} has {tokens} tokens, and a window in transformers takes "
                    f"{self._window}: give a longer text, a smaller --window or --engine llama.cpp"
                )
            if "llama.cpp" in engines and (
                tokens < 2 * windows.context or windows.positions(tokens) < LEAST_POSITIONS
            ):
                raise Pt2Error(
                    f"text {text.path} has {tokens} tokens, and llama-perplexity needs two "
                    f"windows of {windows.context} and {LEAST_POSITIONS} positions to score: give "
                    "a longer text, more --chunks or another --context"
                )

    def _require_memory(self) -> None:
        device = self._options.device
        if "transformers" not in self._options.engines:
            return
        needed = 4 * self._parameters
        places = {"memory": (LOADING * needed, available_memory())}
        if device.type == "cuda":
            places["GPU memory"] = needed, torch.cuda.mem_get_info(device)[0]
        for place, (bytes_needed, available) in places.items():
            if bytes_needed > available:
                raise Pt2Error(
                    f"about {bytes_needed / 1e9:.1f} GB of {place} are needed for "
                    f"{self._checkpoint.path} in float32 and {available / 1e9:.1f} GB are "
                    "available: use --engine llama.cpp, or a larger machine"
                )

    def _require_disk(self, work: Path, against: Sequence[str], logits: Path | None) -> None:
        engines, stock_types = self._options.engines, _stock_types(against)
        needed = 0
        if "llama.cpp" in engines or stock_types:
            full = 2 * self._parameters
            needed += full + (int(QUANTIZED_SHARE * full) if stock_types else 0)
        if "llama.cpp" in engines and logits is not None:
            vocabulary = self.skeleton.config.vocab_size
            needed += sum(
                self._options.windows.logits_bytes(len(text.ids), vocabulary)
                for text in self._options.texts
            )
        require_disk(
            work,
            needed,
            "for the full-precision file, its log-probabilities (fewer with --chunks) and the "
            "types to compare with (TMPDIR says where)",
        )

    def _require_computable(self, against: Sequence[str], calibration: Calibration | None) -> None:
        in_transformers = [name for name in against if name in BASELINES]
        if in_transformers and "transformers" not in self._options.engines:
            raise Pt2Error(
                f"{in_transformers[0]} exists in transformers only: leave it out of --against, or "
                "--engine away"
            )
        if calibration is None:
            return
        require_readable_ids(self.skeleton, calibration)
        tokens, needed = calibration.ids.numel(), 2 * IMATRIX_CONTEXT
        if _stock_types(against) and tokens < needed:
            raise Pt2Error(
                f"{tokens} calibration tokens are too few for llama-imatrix, which needs "
                f"{needed}: ask for more --samples or a greater --length"
            )


def _stock_types(against: Sequence[str]) -> list[str]:
    return [name for name in against if name not in BASELINES]


def _as_text(calibration: Calibration, model: Path) -> str:
    """The calibration windows as text, for a tool that tokenizes by itself."""
    tokenizer = load_tokenizer(model)
    return "\n\n".join(
        tokenizer.decode(window, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for window in calibration.ids
    )
