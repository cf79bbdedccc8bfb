"""llama.cpp's own tools and bindings read, run, make and move files of both ternary types."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_line import EXAMPLE_MODEL, EXAMPLE_TEXT, run_pt2gguf
from llama_tools import COLOUR, free_port, perplexity, run_tool, serving, start_tool

from pt2gguf.blocks import BLOCK_SIZE, BLOCK_TYPES
from pt2gguf.cli import main as pt2gguf
from pt2gguf.export.llama_cpp import import_llama_cpp
from pt2gguf.native.installation import Installation

TYPES = pytest.mark.parametrize("block_type", ["tq2_1", "tq1_1"])
PROMPT = "Once upon a time"
GREEDY = ["-p", PROMPT, "-n", 8, "-no-cnv", "--temp", 0, "-t", 1]


def continuation(installation: Installation, file: Path, *options: object) -> str:
    """What follows the prompt, greedily."""
    return after_prompt(run_tool(installation, "llama-completion", "-m", file, *GREEDY, *options))


def after_prompt(printed: str) -> str:
    assert printed.strip().startswith(PROMPT)
    return printed.strip().removeprefix(PROMPT).strip()


def of_text(text: Path, chunks: int) -> list[object]:
    return ["-f", text, "-c", 128, "--chunks", chunks, "-t", 1]


def read(installation: Installation, file: Path):
    return import_llama_cpp(installation).gguf.GGUFReader(file)


def contents(installation: Installation, file: Path) -> list[tuple]:
    """Everything about a file's tensors, in their order."""
    return [
        (t.name, t.tensor_type, t.shape.tolist(), t.data.tobytes())
        for t in read(installation, file).tensors
    ]


# running --------------------------------------------------------------------------------------


def test_the_environment_has_the_tools(installation) -> None:
    """Without a variable: what is typed is what was built."""
    names = "cli completion server bench perplexity quantize imatrix gguf-split gguf-hash tokenize"
    for name in [f"llama-{part}" for part in names.split()] + ["ggml-rpc-server"]:
        typed = Path(sysconfig.get_path("scripts")) / name
        assert typed.resolve() == installation.tool(name).resolve()


@TYPES
def test_completion(installation, converted, block_type) -> None:
    file = getattr(converted, block_type)
    text = continuation(installation, file, "--check-tensors")
    assert text
    assert text == continuation(installation, file)


@TYPES
def test_chat(installation, converted, block_type) -> None:
    """The tool that people type first: one turn, then it ends by itself."""
    file = getattr(converted, block_type)
    options = ["-p", PROMPT, "-n", 4, "--temp", 0, "-t", 1, "--single-turn", "--simple-io"]
    printed = run_tool(installation, "llama-cli", "-m", file, *options)
    assert f"{block_type.upper()} - " in printed
    answer = printed.partition(f"> {PROMPT}")[2].partition("[ Prompt:")[0]
    assert answer.strip()


IN_PYTHON = """
import json, sys
from llama_cpp import Llama
llama = Llama(sys.argv[1], n_ctx=64, n_threads=1, verbose=False)
text = llama(sys.argv[2], max_tokens=8, temperature=0)["choices"][0]["text"]
mapped = {line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}
print(json.dumps([text, sorted(mapped)]))
"""


@TYPES
def test_python_bindings(installation, converted, block_type) -> None:
    """Ours, unasked, and one libggml only: two would have two tables of types."""
    file = getattr(converted, block_type)
    command = [sys.executable, "-c", IN_PYTHON, str(file), PROMPT]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, env={})
    assert finished.returncode == 0, finished.stderr
    text, mapped = json.loads(finished.stdout)
    # The bindings leave flash attention off, whose rounding decides between tokens of like logits.
    assert text.strip() == continuation(installation, file, "-fa", "off")
    for library in ("libggml-base.", "libggml-cpu.", "libggml.", "libllama."):
        assert len([path for path in mapped if library in path]) == 1


@TYPES
def test_bench_names_the_type(installation, converted, block_type) -> None:
    file = getattr(converted, block_type)
    options = ["-p", 16, "-n", 4, "-r", 1, "-t", 1, "-o", "json"]
    results = json.loads(run_tool(installation, "llama-bench", "-m", file, *options))
    assert [(r["n_prompt"], r["n_gen"]) for r in results] == [(16, 0), (0, 4)]
    bits = BLOCK_TYPES[block_type].bits_per_weight
    for result in results:
        assert f"{block_type.upper()} - {bits:g} bpw" in result["model_type"]
        assert result["avg_ts"] > 0


def test_both_types_have_the_same_perplexity(installation, converted) -> None:
    """The same weights, so that only the order of floating point additions differs."""
    two, one = (
        perplexity(installation, file, *of_text(EXAMPLE_TEXT, 8))
        for file in (converted.tq2_1, converted.tq1_1)
    )
    assert math.isfinite(two)
    assert one == pytest.approx(two, rel=0.02)


def test_server(installation, converted) -> None:
    port = free_port()
    options = ["-m", converted.tq2_1, "--host", "127.0.0.1", "-t", 1, "-c", 256]
    with serving(installation, "llama-server", port, *options):
        body = {"prompt": PROMPT, "n_predict": 8, "temperature": 0}
        answer = request_when_loaded(f"http://127.0.0.1:{port}/completion", body)
    assert answer["tokens_predicted"] == 8
    assert answer["content"].strip() == continuation(installation, converted.tq2_1)


def request_when_loaded(url: str, body: dict) -> dict:
    """The server listens while it loads the model, and answers 503 until it has."""
    request = urllib.request.Request(url, json.dumps(body).encode())
    deadline = time.monotonic() + 30
    while True:
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            if error.code != 503 or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@TYPES
def test_rpc(installation, converted, block_type) -> None:
    """Another process computes: types and column orders survive the wire."""
    file = getattr(converted, block_type)
    port = free_port()
    with serving(installation, "ggml-rpc-server", port, "--host", "127.0.0.1", "--threads", 1):
        options = ["--rpc", f"127.0.0.1:{port}", "-ngl", 99, "-v"]
        finished = start_tool(installation, "llama-completion", "-m", file, *GREEDY, *options)
    assert finished.returncode == 0, finished.stderr[-2000:]
    for layer in range(4):
        assert re.search(rf"layer +{layer} assigned to device RPC0", finished.stderr)
    assert after_prompt(finished.stdout) == continuation(installation, file)


# llama.cpp's own tests --------------------------------------------------------------------------


def test_quantize_fns(installation) -> None:
    printed = run_tool(installation, "test-quantize-fns", "-v")
    for block_type in BLOCK_TYPES:
        reported = [line for line in printed.splitlines() if line.split(" ")[0] == block_type]
        assert len(reported) >= 2, printed[-2000:]  # absolute error, dot product, ...
        assert not any("FAILED" in line for line in reported)


@pytest.mark.parametrize("operation", ["MUL_MAT", "MUL_MAT_ID", "GET_ROWS"])
def test_backend_ops(installation, operation) -> None:
    options = ["test", "-b", "CPU", "-o", operation, "-p", r"type(_a)?=tq[12]_1"]
    printed = COLOUR.sub("", run_tool(installation, "test-backend-ops", *options))
    cases = re.findall(rf"^ *{operation}\((.*)\): (.+)$", printed, re.MULTILINE)
    assert cases
    assert [case for case in cases if case[1] != "OK"] == []
    assert f"{len(cases)}/{len(cases)} tests passed" in printed
    for block_type in BLOCK_TYPES:
        of_type = [case for case, _ in cases if f"={block_type}," in case]
        assert len(of_type) == len(cases) // 2
        if operation != "GET_ROWS":
            permuted = [case for case in of_type if case.startswith("type=")]
            columns = {int(re.search(r"n=(\d+)", case)[1]) for case in permuted}
            many_tiles = {130} if operation == "MUL_MAT" else set()
            assert columns == {1, 2, 3, 5, 8, 9, 17, 33, 65, 128, 512} | many_tiles


# making files -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def f16(installation, tmp_path_factory) -> Path:
    """The example model by llama.cpp's own script, as its users make files."""
    file = tmp_path_factory.mktemp("f16") / "f16.gguf"
    script = Path(installation.source) / "convert_hf_to_gguf.py"
    command = [sys.executable, script, EXAMPLE_MODEL, "--outtype", "f16", "--outfile", file]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return file


@pytest.fixture(scope="module")
def halves(tmp_path_factory) -> tuple[Path, Path]:
    """Two texts, to calibrate and to judge with."""
    directory = tmp_path_factory.mktemp("halves")
    text = EXAMPLE_TEXT.read_text()
    middle = len(text) // 2
    (directory / "first.txt").write_text(text[:middle])
    (directory / "second.txt").write_text(text[middle:])
    return directory / "first.txt", directory / "second.txt"


@pytest.fixture(scope="module")
def imatrix(installation, f16, halves) -> Path:
    file = f16.with_name("imatrix.gguf")
    options = ["-o", file, "-c", 128, "--chunks", 32, "-t", 1]
    run_tool(installation, "llama-imatrix", "-m", f16, "-f", halves[0], *options)
    return file


def quantized(installation, f16: Path, output: Path, block_type: str, *options: object) -> Path:
    run_tool(installation, "llama-quantize", *options, f16, output, block_type.upper(), 1)
    return output


@TYPES
def test_quantize(installation, f16, tmp_path, block_type) -> None:
    file = quantized(installation, f16, tmp_path / "plain.gguf", block_type)
    assert continuation(installation, file, "--check-tensors")
    reader = read(installation, file)
    assert reader.get_field("pt2.version").contents() == 1
    assert reader.get_field("general.file_type").contents() == BLOCK_TYPES[block_type].file_number
    matrices = [t for t in reader.tensors if t.name.startswith("blk.") and "norm" not in t.name]
    assert len(matrices) == 4 * 7
    assert {t.tensor_type for t in matrices} == {BLOCK_TYPES[block_type].file_number}
    # The room that each tensor has in the file, rather than what gguf-py makes of the type.
    starts = sorted([t.data_offset for t in reader.tensors] + [file.stat().st_size])
    for tensor in matrices:
        size = int(tensor.n_elements) // BLOCK_SIZE * BLOCK_TYPES[block_type].block_bytes
        room = starts[starts.index(tensor.data_offset) + 1] - tensor.data_offset
        assert room == -(-size // reader.alignment) * reader.alignment


def test_imatrix_serves_what_matters(installation, f16, imatrix, halves, tmp_path) -> None:
    """Importances lower the error that they weight, and the perplexity of a text of its own."""
    plain = quantized(installation, f16, tmp_path / "plain.gguf", "tq1_1")
    options = ["--imatrix", imatrix]
    weighted = quantized(installation, f16, tmp_path / "weighted.gguf", "tq1_1", *options)
    errors = [weighted_errors(installation, f16, imatrix, file) for file in (plain, weighted)]
    assert errors[0].keys() == errors[1].keys()
    assert len(errors[0]) == 4 * 7
    # Each block is a local optimum, so a single one may be unlucky; thousands together are not.
    for name, error in errors[0].items():
        assert errors[1][name] < error
    # Measured: 38 for F16, 266 without importances and 165 with them.
    before, after = (
        perplexity(installation, f, *of_text(halves[1], 16)) for f in (plain, weighted)
    )
    assert after < 0.9 * before


def weighted_errors(installation, f16: Path, imatrix: Path, file: Path) -> dict[str, float]:
    """Sum of importance times squared error of every ternary tensor."""
    originals = {t.name: t for t in read(installation, f16).tensors}
    importances = {t.name: t.data for t in read(installation, imatrix).tensors}
    errors = {}
    for tensor in read(installation, file).tensors:
        block_type = BLOCK_TYPES.get(tensor.tensor_type.name.lower())
        if block_type:
            importance = importances[f"{tensor.name}.in_sum2"].astype(np.float64).reshape(1, -1)
            error = block_type.dequantize(tensor.data) - originals[tensor.name].data
            errors[tensor.name] = float((importance * error.astype(np.float64) ** 2).sum())
    return errors


def test_both_types_quantize_to_the_same_values(installation, f16, tmp_path) -> None:
    files = [quantized(installation, f16, tmp_path / f"{t}.gguf", t, "--pure") for t in BLOCK_TYPES]
    values = [
        {
            t.name: BLOCK_TYPES[t.tensor_type.name.lower()].dequantize(t.data)
            for t in read(installation, file).tensors
            if t.tensor_type.name.lower() in BLOCK_TYPES
        }
        for file in files
    ]
    # With --pure the embeddings too, which GET_ROWS then reads.
    assert "token_embd.weight" in values[0]
    assert values[0].keys() == values[1].keys()
    for name, weights in values[0].items():
        np.testing.assert_array_equal(weights, values[1][name])
    for file in files:
        assert continuation(installation, file)


@TYPES
def test_quantize_copies_ternary_files(installation, converted, tmp_path, block_type) -> None:
    file = getattr(converted, block_type)
    run_tool(installation, "llama-quantize", file, tmp_path / "copy.gguf", "COPY", 1)
    # In an order of its own.
    copied = contents(installation, tmp_path / "copy.gguf")
    assert sorted(copied) == sorted(contents(installation, file))
    assert read(installation, tmp_path / "copy.gguf").get_field("pt2.version").contents() == 1


# moving files -----------------------------------------------------------------------------------


@TYPES
def test_split_and_merge(installation, converted, tmp_path, block_type) -> None:
    file = getattr(converted, block_type)
    options = ["--split", "--split-max-tensors", 9]
    run_tool(installation, "llama-gguf-split", *options, file, tmp_path / "part")
    shards = sorted(tmp_path.glob("part-*.gguf"))
    original = contents(installation, file)
    assert len(shards) == -(-len(original) // 9)
    assert continuation(installation, shards[0]) == continuation(installation, file)

    merged = tmp_path / "merged.gguf"
    run_tool(installation, "llama-gguf-split", "--merge", shards[0], merged)
    assert contents(installation, merged) == original
    assert read(installation, merged).get_field("pt2.version").contents() == 1
    assert hashes(installation, merged) == hashes(installation, file)


def hashes(installation, file: Path) -> dict[str, str]:
    """By tensor; that of the whole file under ""."""
    lines = [line.split() for line in run_tool(installation, "llama-gguf-hash", file).splitlines()]
    return {name.removeprefix(str(file)).lstrip(":"): digest for _, digest, name in lines}


def test_hashes_tell_tensors_apart(installation, converted) -> None:
    """Equal where the bytes are equal: in all tensors but the ternary ones."""
    two, one = (hashes(installation, file) for file in (converted.tq2_1, converted.tq1_1))
    assert two.keys() == one.keys()
    ternary = {
        t.name
        for t in read(installation, converted.tq2_1).tensors
        if t.tensor_type.name.lower() in BLOCK_TYPES
    }
    assert {name for name in two if two[name] != one[name]} == {*ternary, ""}


def test_repack_there_and_back(installation, converted, tmp_path) -> None:
    one, two = tmp_path / "one.gguf", tmp_path / "two.gguf"
    run_pt2gguf("repack", converted.tq2_1, one, "--type", "tq1_1")
    run_pt2gguf("repack", one, two, "--type", "tq2_1")
    assert contents(installation, one) == contents(installation, converted.tq1_1)
    assert contents(installation, two) == contents(installation, converted.tq2_1)
    assert two.read_bytes() == converted.tq2_1.read_bytes()
    assert one.read_bytes() == converted.tq1_1.read_bytes()
    assert continuation(installation, one) == continuation(installation, converted.tq1_1)


@pytest.fixture
def repack_refusal(capsys) -> Callable[..., str]:
    """What `pt2gguf repack` says when it must refuse: one sentence, with exit code 2."""

    def refusal(*arguments: object) -> str:
        capsys.readouterr()
        assert pt2gguf(["repack", *map(str, arguments), "--type", "tq1_1"]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("pt2gguf: error: ")
        return lines[0]

    return refusal


def test_repack_refuses(converted, f16, tmp_path, repack_refusal) -> None:
    output = tmp_path / "out.gguf"
    text = tmp_path / "text.gguf"
    text.write_text("This is not a model. " * 100)
    assert f"{text} is not a readable GGUF file" in repack_refusal(text, output)
    for size in (0, 3, 2_000, 500_000):
        truncated = tmp_path / f"truncated-{size}.gguf"
        truncated.write_bytes(converted.tq2_1.read_bytes()[:size])
        assert f"{truncated} is not a readable GGUF file" in repack_refusal(truncated, output)
    nowhere = tmp_path / "nowhere.gguf"
    assert f"{nowhere} is not a readable GGUF file" in repack_refusal(nowhere, output)
    assert f"{f16} holds no ternary tensors" in repack_refusal(f16, output)
    assert list(tmp_path.glob("out.gguf*")) == []


def test_repack_replaces_only_with_force(installation, converted, tmp_path, repack_refusal) -> None:
    output = tmp_path / "out.gguf"
    output.write_bytes(b"precious")
    assert f"{output} exists" in repack_refusal(converted.tq2_1, output)
    assert output.read_bytes() == b"precious"
    run_pt2gguf("repack", converted.tq2_1, output, "--type", "tq1_1", "--force")
    assert contents(installation, output) == contents(installation, converted.tq1_1)


def test_repack_refuses_places_it_cannot_write(converted, tmp_path, repack_refusal) -> None:
    output = tmp_path / "nowhere" / "out.gguf"
    assert f"{output.parent} is not a directory" in repack_refusal(converted.tq2_1, output)
    assert f"{tmp_path} is a directory" in repack_refusal(converted.tq2_1, tmp_path, "--force")
