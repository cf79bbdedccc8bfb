"""Calibration token ids: from text files, data sets, or a file of ids."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pt2gguf.errors import Pt2Error, first_line

# A rough upper bound of the characters in a token, to know when enough of a stream was read.
CHARACTERS_PER_TOKEN = 8


@dataclass(frozen=True)
class Calibration:
    """Token ids and where they come from.

    ids: (samples, length) int64. provenance: JSON-serialisable, independent of where files lie:
    sources (names), samples, length, seed, sha256 of the ids as little-endian int64.
    """

    ids: Tensor
    provenance: dict[str, Any]


def load_calibration(
    sources: Sequence[str], model: str | Path, *, samples: int, length: int, seed: int
) -> Calibration:
    """`samples` windows of `length` tokens from `sources`, in equal shares.

    sources: each a text file (UTF-8) or the name of a data set (wikitext2, c4, ptb), tokenized
    whole with the tokenizer in `model` and sampled at random starts as GPTQ does; or one .npy file
    with an integer array (samples, length) of token ids, taken as it is, without `samples`,
    `length` and `seed`.

    Raises Pt2Error for a source that is neither, too few tokens, or a missing tokenizer.
    """
    if not sources:
        raise Pt2Error("no calibration text was given: name a text file or a data set")
    if samples < 1 or length < 1:
        raise Pt2Error(
            f"{samples} samples of {length} tokens are nothing to calibrate on: both must be at "
            "least 1"
        )
    id_files = [source for source in sources if source.endswith(".npy")]
    if id_files:
        if len(sources) > 1:
            raise Pt2Error(
                f"{id_files[0]} holds token ids and cannot be mixed with other calibration "
                "sources: give it alone"
            )
        return _calibration(_read_ids(Path(id_files[0])), sources, seed=None)
    if len(sources) > samples:
        raise Pt2Error(
            f"{samples} samples cannot be shared by {len(sources)} calibration sources: ask for "
            "more samples"
        )
    tokenizer = load_tokenizer(model)
    rng = random.Random(seed)
    parts: list[Tensor] = []
    for number, source in enumerate(sources):
        share = samples // len(sources) + (number < samples % len(sources))
        text = read_source(source, share * length * CHARACTERS_PER_TOKEN)
        ids = tokenize(tokenizer, text)
        parts.append(draw_samples(ids, source, samples=share, length=length, rng=rng))
    return _calibration(torch.cat(parts), sources, seed)


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer."""
    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # whatever the tokenizer's files make transformers raise
        raise Pt2Error(
            f"{model} has no tokenizer that transformers can load "
            f"({first_line(error)[:200]}): add the tokenizer's files, or calibrate "
            "on a .npy file of token ids"
        ) from error


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Ids (tokens,) int64 of the whole text, with the special tokens that the tokenizer adds.

    What looks like a special token in the text is text, as for llama-perplexity: WikiText's <unk>
    would else become a token that the model has hardly seen.
    """
    # verbose=False: a text longer than the model's context is what is wanted here.
    encoded = tokenizer(text, verbose=False, split_special_tokens=True)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def draw_samples(
    ids: Tensor, source: str, *, samples: int, length: int, rng: random.Random
) -> Tensor:
    """(samples, length) windows of ids (tokens,) at random starts; they may overlap, as in GPTQ.

    Raises Pt2Error for fewer than samples * length tokens: windows of so little text mostly repeat
    each other.
    """
    needed = samples * length
    if len(ids) < needed:
        raise Pt2Error(
            f"calibration text {source} is too short: it has {len(ids)} tokens, and {samples} "
            f"samples of {length} need {needed}; give more text, or fewer or shorter samples"
        )
    starts = [rng.randint(0, len(ids) - length) for _ in range(samples)]
    return torch.stack([ids[start : start + length] for start in starts])


def read_source(source: str, characters: int) -> str:
    """The text of a file, or of a data set (of a very large one: about `characters` of it)."""
    path = Path(source)
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise Pt2Error(
                f"calibration text {source} cannot be read as UTF-8 ({error}): give a text file"
            ) from error
    if source not in DATASETS:
        raise Pt2Error(
            f"calibration source {source!r} is neither a file nor a data set "
            f"({', '.join(DATASETS)}): give the path of a text file"
        )
    try:
        return DATASETS[source](characters)
    except Exception as error:  # the hub's client raises what its many layers raise
        raise Pt2Error(
            f"data set {source} cannot be had from the Hugging Face Hub "
            f"({type(error).__name__}): check the network, or give a text file instead"
        ) from error


def _wikitext2(characters: int) -> str:
    from datasets import load_dataset

    data = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="train")
    return "\n\n".join(data["text"])


def _c4(characters: int) -> str:
    from datasets import load_dataset

    data = load_dataset(
        "allenai/c4",
        data_files={"train": "en/c4-train.00000-of-01024.json.gz"},
        split="train",
        streaming=True,
    )
    return "\n\n".join(_until((row["text"] for row in data), characters))


def _ptb(characters: int) -> str:
    from datasets import load_dataset

    # The data set itself is a script, which `datasets` no longer runs; the Hub keeps its parquet.
    data = load_dataset(
        "ptb-text-only/ptb_text_only", split="train", revision="refs/convert/parquet"
    )
    return " ".join(data["sentence"])


DATASETS: dict[str, Callable[[int], str]] = {"wikitext2": _wikitext2, "c4": _c4, "ptb": _ptb}


def _until(texts: Iterable[str], characters: int) -> list[str]:
    """The first of `texts`, up to and with the one that brings them to `characters`."""
    pairs = accumulate(texts, lambda seen, t: (seen[0] + len(seen[1]), t), initial=(0, ""))
    return [text for _, text in takewhile(lambda pair: pair[0] < characters, pairs)][1:]


def _read_ids(path: Path) -> Tensor:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise Pt2Error(
            f"calibration ids {path} cannot be read as .npy ({error}): save them with numpy.save"
        ) from error
    if array.ndim != 2 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise Pt2Error(
            f"calibration ids {path} are {array.dtype} of shape {array.shape}: an integer array "
            "(samples, length) is needed"
        )
    return torch.from_numpy(array.astype(np.int64))


def _calibration(ids: Tensor, sources: Sequence[str], seed: int | None) -> Calibration:
    samples, length = ids.shape
    return Calibration(
        ids,
        {
            "sources": [Path(source).name for source in sources],
            "samples": samples,
            "length": length,
            "seed": seed,
            "sha256": hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest(),
        },
    )
