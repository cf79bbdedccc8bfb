"""The loader refuses what it cannot run, in words, and never crashes or reads out of bounds.

`load-files` is libllama built with AddressSanitizer and UBSan: a single bad access ends it.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from pt2gguf.blocks import BLOCK_TYPES, TQ2_1
from pt2gguf.export.llama_cpp import import_llama_cpp
from pt2gguf.native.installation import find_installation

REPOSITORY = Path(__file__).resolve().parents[2]
LOADER = REPOSITORY / "build" / "asan" / "bin" / "load-files"

HIDDEN, FEED_FORWARD, VOCABULARY, LAYERS = 128, 256, 32, 2


@pytest.fixture(scope="session")
def gguf():
    return import_llama_cpp(find_installation()).gguf


class SmallFile:
    """A LLaMA of two layers without a tokenizer, to be spoilt before it is written."""

    def __init__(self, gguf, block_type=TQ2_1) -> None:
        self.gguf = gguf
        self.version = 1
        self.reordered: list[str] | list[int] = []
        rng = np.random.default_rng(0)
        self.tensors: dict[str, tuple[np.ndarray, str | None]] = {}

        def stock(name: str, *shape: int) -> None:
            self.tensors[name] = rng.standard_normal(shape).astype(np.float32), None

        def ternary(name: str, rows: int, columns: int) -> None:
            blocks = (rows, columns // 128)
            alpha = rng.uniform(0.01, 0.1, blocks).astype(np.float16)
            mu = rng.normal(0, 0.01, blocks).astype(np.float16)
            digits = rng.integers(-1, 2, (rows, columns), dtype=np.int8)
            self.tensors[name] = block_type.pack(alpha, mu, digits), block_type.name

        stock("token_embd.weight", VOCABULARY, HIDDEN)
        stock("output_norm.weight", HIDDEN)
        for layer in range(LAYERS):
            block = f"blk.{layer}."
            stock(block + "attn_norm.weight", HIDDEN)
            stock(block + "ffn_norm.weight", HIDDEN)
            for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
                ternary(f"{block}{name}.weight", HIDDEN, HIDDEN)
            for name in ("ffn_gate", "ffn_up"):
                ternary(f"{block}{name}.weight", FEED_FORWARD, HIDDEN)
            ternary(block + "ffn_down.weight", HIDDEN, FEED_FORWARD)
            self.tensors[block + "ffn_up.perm"] = rng.permutation(HIDDEN).astype(np.int32), None
            self.tensors[block + "ffn_down.perm"] = (
                rng.permutation(FEED_FORWARD).astype(np.int32),
                None,
            )

    def write(self, path: Path) -> Path:
        gguf = self.gguf
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_vocab_size(VOCABULARY)
        writer.add_context_length(64)
        writer.add_embedding_length(HIDDEN)
        writer.add_block_count(LAYERS)
        writer.add_feed_forward_length(FEED_FORWARD)
        writer.add_head_count(4)
        writer.add_rope_dimension_count(32)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model("no_vocab")
        if isinstance(self.version, int):
            writer.add_uint32("pt2.version", self.version)
        else:
            writer.add_string("pt2.version", self.version)
        if self.reordered:
            writer.add_array("pt2.reordered", self.reordered)
        for name, (data, type_name) in self.tensors.items():
            qtype = gguf.GGMLQuantizationType[type_name.upper()] if type_name else None
            writer.add_tensor(name, data, raw_dtype=qtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def load(*files: Path) -> list[str]:
    """What load-files says of each file; fails if it crashed."""
    assert LOADER.is_file(), f"{LOADER} is missing: 'make test' builds it"
    finished = subprocess.run([LOADER, *files], capture_output=True, timeout=600)
    *said, rest = finished.stdout.decode(errors="replace").split("\0")
    last = said[-1] if said else "nothing"
    errors = finished.stderr.decode(errors="replace")
    assert finished.returncode == 0, f"crashed after: {last}\n{errors[-3000:]}"
    assert not rest
    assert len(said) == len(files)
    return [words.partition(": ")[2] for words in said]


@pytest.mark.parametrize("block_type", BLOCK_TYPES.values(), ids=lambda t: t.name)
def test_a_sound_file_loads_and_decodes(tmp_path, gguf, block_type):
    file = SmallFile(gguf, block_type).write(tmp_path / "sound.gguf")
    assert load(file) == ["loads and decodes"]


def test_unknown_version(tmp_path, gguf):
    file = SmallFile(gguf)
    file.version = 2
    (said,) = load(file.write(tmp_path / "future.gguf"))
    assert "pt2.version is 2 and this build reads version 1: get a pt2gguf that reads" in said
    file.version = "1"
    (said,) = load(file.write(tmp_path / "text.gguf"))
    assert "pt2.version has type str instead of u32" in said


def test_names_that_are_numbers(tmp_path, gguf):
    file = SmallFile(gguf)
    file.reordered = ["blk.0.ffn_up.weight", "of no tensor"]
    (said,) = load(file.write(tmp_path / "names.gguf"))
    assert said == "loads and decodes"
    file.reordered = [0, 1]
    (said,) = load(file.write(tmp_path / "numbers.gguf"))
    assert "pt2.reordered is not an array of strings" in said


def spoilt_perms():
    """(what is wrong, the tensor's new data, what the loader says of it)."""
    good = np.random.default_rng(1).permutation(HIDDEN).astype(np.int32)
    negative, large, twice = good.copy(), good.copy(), good.copy()
    negative[5], large[7] = -1, HIDDEN
    twice[9] = twice[3]
    name = "tensor 'blk.1.ffn_up.perm' is not a permutation"
    return [
        ("negative", negative, f"{name} of 128 columns: element 5 is -1, out of range"),
        ("large", large, f"{name} of 128 columns: element 7 is 128, out of range"),
        ("twice", twice, f"{name} of 128 columns: element 9 is {twice[3]}, which occurs twice"),
        ("short", good[:64], f"{name}: it has 64 elements of type i32, and 'blk.1.ffn_up.weight'"),
        ("long", np.concatenate([good, good]), f"{name}: it has 256 elements of type i32"),
        ("floats", good.astype(np.float32), f"{name}: it has 128 elements of type f32"),
        ("two rows", good.reshape(2, 64), f"{name}: it has 128 elements of type i32"),
    ]


@pytest.mark.parametrize(("wrong", "perm", "message"), spoilt_perms(), ids=lambda v: str(v)[:12])
def test_perms_that_are_none(tmp_path, gguf, wrong, perm, message):
    file = SmallFile(gguf)
    file.tensors["blk.1.ffn_up.perm"] = perm, None
    (said,) = load(file.write(tmp_path / "perm.gguf"))
    assert message in said


def test_perm_of_a_stock_tensor(tmp_path, gguf):
    file = SmallFile(gguf)
    weight = np.zeros((HIDDEN, HIDDEN), dtype=np.float16)
    file.tensors["blk.0.attn_q.weight"] = weight, None
    file.tensors["blk.0.attn_q.perm"] = np.arange(HIDDEN, dtype=np.int32), None
    (said,) = load(file.write(tmp_path / "stock.gguf"))
    assert "'blk.0.attn_q.perm' permutes 'blk.0.attn_q.weight', which is of type f16" in said


@pytest.mark.parametrize("name", ["nothing", "no\nth\x1cing"])
def test_perm_without_a_weight(tmp_path, gguf, name):
    file = SmallFile(gguf)
    file.tensors[f"blk.0.{name}.perm"] = np.arange(HIDDEN, dtype=np.int32), None
    (said,) = load(file.write(tmp_path / "orphan.gguf"))
    assert f"tensor 'blk.0.{name}.perm' permutes 'blk.0.{name}.weight', which the model" in said


def find_tensor_info(data: bytes, name: str) -> int:
    """The offset behind a tensor's name in the file: n_dims, dims, type, offset follow."""
    position = data.index(len(name).to_bytes(8, "little") + name.encode())
    return position + 8 + len(name)


def test_rows_that_are_not_a_multiple_of_128(tmp_path, gguf):
    data = bytearray(SmallFile(gguf).write(tmp_path / "sound.gguf").read_bytes())
    info = find_tensor_info(data, "blk.0.ffn_down.weight")
    data[info + 4 : info + 12] = (192).to_bytes(8, "little")
    (tmp_path / "rows.gguf").write_bytes(data)
    (said,) = load(tmp_path / "rows.gguf")
    assert "tensor 'blk.0.ffn_down.weight' of type" in said
    assert "has 192 elements per row, not a multiple of block size (128)" in said


@pytest.mark.parametrize("slot", [43, 44, 45])
def test_the_slots_in_memory_are_not_types_of_files(tmp_path, gguf, slot):
    data = bytearray(SmallFile(gguf).write(tmp_path / "sound.gguf").read_bytes())
    info = find_tensor_info(data, "blk.0.ffn_down.weight")
    assert data[info + 20 : info + 24] == TQ2_1.file_number.to_bytes(4, "little")
    data[info + 20 : info + 24] = slot.to_bytes(4, "little")
    (tmp_path / "slot.gguf").write_bytes(data)
    (said,) = load(tmp_path / "slot.gguf")
    assert "tensor 'blk.0.ffn_down.weight' has invalid ggml type" in said


def test_truncated_data(tmp_path, gguf):
    data = SmallFile(gguf).write(tmp_path / "sound.gguf").read_bytes()
    rng = np.random.default_rng()
    lengths = rng.integers(0, len(data) - 32, 100)
    files = []
    for length in lengths:
        files.append(tmp_path / f"{length}.gguf")
        files[-1].write_bytes(data[:length])
    assert all(said.startswith("refused") for said in load(*files))
    # Cut within the data: the tensor is named.
    (tmp_path / "cut.gguf").write_bytes(data[:-2000])
    (said,) = load(tmp_path / "cut.gguf")
    assert "data is not within the file bounds, model is corrupted or incomplete" in said
    assert "tensor 'blk." in said


@pytest.mark.parametrize("block_type", BLOCK_TYPES.values(), ids=lambda t: t.name)
def test_flipped_bytes(tmp_path, gguf, block_type):
    """Half the files are damaged in tensor names, shapes, types and offsets, half in the data."""
    data = SmallFile(gguf, block_type).write(tmp_path / "sound.gguf").read_bytes()
    infos = data.index(b"token_embd.weight") - 8
    last = "blk.1.ffn_down.perm"
    start = find_tensor_info(data, last) + 24
    rng = np.random.default_rng()
    files = []
    for number in range(150):
        low, high = (infos, start) if number % 2 else (start, len(data))
        damaged = bytearray(data)
        for position in rng.integers(low, high, 1 + number % 5):
            damaged[position] = rng.integers(256)
        files.append(tmp_path / f"flipped-{number}.gguf")
        files[-1].write_bytes(damaged)
    said = load(*files)
    assert {line.split(":")[0] for line in said} <= {
        "loads and decodes",
        "loads and does not decode",
        "refused",
    }
    assert any(line.startswith("refused") for line in said)
