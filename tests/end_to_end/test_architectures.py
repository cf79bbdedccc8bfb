"""What llama.cpp computes from the file is what the ternary weights mean, for each architecture.

Small random models go through the command line; llama.cpp's logits of the file are compared with
those of transformers on the dequantized weights. A row or column in the wrong place would make
them independent of each other. The weights are the file's, traced back through llama.cpp's
converter; they are also compared with those that were written.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import EXAMPLE_TEXT, VOCABULARY
from small_models import CONFIGS, MORE_CONFIGS, save_model_with_tokenizer

from pt2gguf.cli import main as pt2gguf
from pt2gguf.convert.workdir import WorkDirectory
from pt2gguf.evaluation.file_weights import open_gguf, read_file_weights
from pt2gguf.export.llama_cpp import import_llama_cpp
from pt2gguf.export.work_source import WorkSource
from pt2gguf.model import Checkpoint, load_model

LENGTH = 48
IN_FLOAT32 = re.compile(r"(gate|router|conv)\.weight")  # of matrices: routers and convolutions
OF_IMAGES = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector|visual)\.")
AS_LLAMA_CPP: dict[str, dict[str, Any]] = {
    # It does not slide the windows of these architectures, and always normalises these weights.
    "qwen2": {"sliding_window": 4096},
    "mistral": {"sliding_window": 4096},
    "qwen3_moe": {"norm_topk_prob": True},
}


@pytest.mark.parametrize(
    ("kind", "block_type"),
    [(kind, block_type) for kind in CONFIGS for block_type in ("tq2_1", "tq1_1")]
    + [(kind, "tq1_1") for kind in MORE_CONFIGS],
)
def test_logits_are_those_of_the_dequantized_weights(
    tmp_path: Path, monkeypatch, installation, kind: str, block_type: str
) -> None:
    # llama.cpp knows no hash of the example's tokenizer where it wants a BPE one.
    conversion = import_llama_cpp(installation).conversion
    monkeypatch.setattr(conversion.TextModel, "get_vocab_base_pre", lambda *_: "qwen2")
    model = save_model_with_tokenizer(tmp_path / "model", kind, **AS_LLAMA_CPP.get(kind, {}))
    file, work_directory = tmp_path / "model.gguf", tmp_path / "work"
    # f16 ends: llama.cpp's own quantization of these is not what is tested.
    options = ["--type", block_type, "--calibration", EXAMPLE_TEXT]
    options += ["--samples", 8, "--length", LENGTH, "--work", work_directory, "--keep-work"]
    options += ["--output-type", "f16", "--embedding-type", "f16"]
    assert pt2gguf(list(map(str, ["convert", model, file, *options]))) == 0
    tokens = torch.randint(3, VOCABULARY, (LENGTH,)).tolist()
    weights = _file_weights(Checkpoint(model), file, installation)
    _require_converted(weights, Checkpoint(model), work_directory)
    expected = _transformers_logits(Checkpoint(model), weights, tokens)
    actual = _llama_cpp_logits(file, tokens)
    # Activations are rounded to int8 in blocks of 128 (a relative error of about 0.6%) in each of
    # a few matrices in a row, and the router of a mixture may tip over for single tokens.
    correlations = [np.corrcoef(a, e)[0, 1] for a, e in zip(actual, expected, strict=True)]
    assert np.median(correlations) > 0.999
    assert np.mean(np.array(correlations) > 0.99) > 0.9


def _file_weights(checkpoint, file, installation) -> dict[str, torch.Tensor]:
    llama_cpp = import_llama_cpp(installation)
    reader = open_gguf(file, llama_cpp.gguf)
    return read_file_weights(checkpoint, file, reader, llama_cpp)


def _require_converted(weights, checkpoint, work_directory) -> None:
    """Traced back from the file, exactly what was ternarized, and otherwise the checkpoint's."""
    assert weights.keys() == {name for name in checkpoint.tensors if not OF_IMAGES.match(name)}
    with WorkDirectory.open_existing(work_directory) as work:
        source = WorkSource(work, checkpoint.tensors)
        for name in source.shapes():
            assert torch.equal(weights[name], source.weight(name).dequantize()), name
    for name in weights.keys() - source.shapes().keys():
        stored = checkpoint.read(name)
        half = stored.dim() > 1 and not IN_FLOAT32.search(name)
        assert torch.equal(weights[name], stored.half().float() if half else stored), name


def _transformers_logits(checkpoint, weights, tokens) -> np.ndarray:
    with torch.inference_mode():
        model = load_model(checkpoint, weights)
        return model(torch.tensor([tokens])).logits[0].numpy()


def _llama_cpp_logits(file: Path, tokens: list[int]) -> np.ndarray:
    from llama_cpp import Llama

    llama = Llama(str(file), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    llama.eval(tokens)
    return np.array(llama.scores[: len(tokens)])
