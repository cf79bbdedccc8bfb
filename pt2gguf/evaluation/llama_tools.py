"""What llama.cpp's own tools make and measure."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from pt2gguf.errors import Pt2Error
from pt2gguf.export.llama_cpp import LlamaCpp
from pt2gguf.native.installation import Installation

BATCH = 2048  # tokens that llama-perplexity computes together
IMATRIX_CONTEXT = 512
LEAST_POSITIONS = 100  # below, llama-perplexity gives no statistics of the divergence


@dataclass(frozen=True)
class Windows:
    """How llama-perplexity reads a text: `chunks` windows of `context` tokens (all if None).

    The second half of each window is scored, and the first token is replaced by the beginning of
    text where the model wants one.
    """

    context: int
    chunks: int | None

    def count(self, tokens: int) -> int:
        """The windows of a text of so many tokens."""
        there = tokens // self.context
        return there if self.chunks is None else min(self.chunks, there)

    def positions(self, tokens: int) -> int:
        """The positions that are scored."""
        return self.count(tokens) * (self.context - 1 - self.context // 2)

    def logits_bytes(self, tokens: int, vocabulary: int) -> int:
        """The size of the file of log-probabilities: 16 bits each, and two numbers."""
        return self.positions(tokens) * 2 * (2 * ((vocabulary + 1) // 2) + 4)


@dataclass(frozen=True)
class Divergence:
    """A file against the full-precision one: its perplexity, the mean Kullback-Leibler divergence
    in nats, and the share of positions (0 to 1) where both have the same likeliest token."""

    perplexity: float
    kl_divergence: float
    same_top: float


class LlamaTools:
    """Runs the tools of one installation."""

    def __init__(self, installation: Installation, threads: int | None) -> None:
        """threads: as the tools choose if None."""
        self._installation = installation
        self._threads = [] if threads is None else ["-t", str(threads)]

    def perplexity(
        self, file: Path, text: Path, windows: Windows, logits: Path | None = None
    ) -> float:
        """The perplexity of `text`; writes the log-probabilities to `logits` if given."""
        options = [] if logits is None else ["--kl-divergence-base", logits]
        output = self._run("llama-perplexity", "-m", file, "-f", text, *_read(windows), *options)
        return _figure(output, r"Final estimate: PPL = ([\d.]+)", text)

    def divergence(self, file: Path, logits: Path, windows: Windows) -> Divergence:
        """`file` against what `perplexity` wrote for the full-precision model."""
        base = ["--kl-divergence", "--kl-divergence-base", logits]
        output = self._run("llama-perplexity", "-m", file, *_read(windows), *base)
        return Divergence(
            perplexity=_figure(output, r"Mean PPL\(Q\)\s*:\s*([\d.]+)", file),
            kl_divergence=_figure(output, r"Mean\s+KLD:\s*(-?[\d.]+)", file),
            same_top=_figure(output, r"Same top p:\s*([\d.]+)", file) / 100,
        )

    def importance_matrix(self, file: Path, text: Path, output: Path) -> None:
        """Writes the importance matrix of `text`, which needs two windows of 512 tokens."""
        context = ["-c", str(IMATRIX_CONTEXT)]
        self._run("llama-imatrix", "-m", file, "-f", text, *context, "-o", output)

    def quantize(
        self, full: Path, imatrix: Path, stock_type: str, ends_type: str, output: Path
    ) -> None:
        """`full` in one of llama-quantize's types, with output and embeddings in another."""
        ends = ["--output-tensor-type", ends_type, "--token-embedding-type", ends_type]
        command = ["--imatrix", imatrix, *ends, full, output, stock_type]
        self._run("llama-quantize", *command, *self._threads[1:], threads=False)

    def _run(self, tool: str, *arguments: object, threads: bool = True) -> str:
        command = [self._installation.tool(tool), *arguments]
        finished = subprocess.run(
            [str(part) for part in command + (self._threads if threads else [])],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            # Nothing of the user's environment is to change what is measured, and the last line of
            # a tool that aborts is to be the reason.
            env={k: v for k, v in os.environ.items() if not k.startswith("LLAMA_ARG_")}
            | {"GGML_NO_BACKTRACE": "1"},
        )
        if finished.returncode != 0:
            raise Pt2Error(
                f"{tool} ended with code {finished.returncode} ({_reason(finished.stdout)}): mend "
                "what it names, or run 'pt2gguf build' again if it names nothing"
            )
        return finished.stdout


def write_full_precision(checkpoint: Path, output: Path, llama_cpp: LlamaCpp) -> None:
    """The checkpoint as a GGUF file in F16, by llama.cpp's converter."""
    model_class, gguf = llama_cpp.model_class(checkpoint), llama_cpp.gguf
    with torch.inference_mode():
        converter = model_class(checkpoint, gguf.LlamaFileType.MOSTLY_F16, output)
        converter.prepare_tensors()
        converter.prepare_metadata(vocab_only=False)
        converter.gguf_writer.write_header_to_file(path=output)
        converter.gguf_writer.write_kv_data_to_file()
        converter.gguf_writer.write_tensors_to_file(progress=False)
        converter.gguf_writer.close()


def _read(windows: Windows) -> list[str]:
    # The tool wants a batch of whole windows, or windows of whole batches.
    batch = BATCH if windows.context > BATCH else BATCH // windows.context * windows.context
    options = ["-c", str(windows.context), "-b", str(batch)]
    return options if windows.chunks is None else [*options, "--chunks", str(windows.chunks)]


def _figure(output: str, pattern: str, subject: Path) -> float:
    match = re.search(pattern, output)
    if match is None:
        raise Pt2Error(
            f"llama-perplexity measured nothing for {subject} ({_reason(output)}): give a "
            "longer text or a smaller --context"
        )
    return float(match[1])


def _reason(output: str) -> str:
    """The errors that a tool has printed, or its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [match[1] for line in lines if (match := re.match(r"[\d.]+ E (.*)", line))]
    return "; ".join(errors or lines[-1:] or ["without a word"])[:500]
