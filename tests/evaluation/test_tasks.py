"""lm-eval's own code on the paper's seven task shapes, in transformers and in llama.cpp."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from task_set import write_task_set

from pt2gguf.convert.calibration import load_tokenizer
from pt2gguf.errors import Pt2Error
from pt2gguf.evaluation import tasks as tasks_module
from pt2gguf.evaluation.llama_tools import write_full_precision
from pt2gguf.evaluation.tasks import (
    PAPER_TASKS,
    llama_cpp_lm,
    load_tasks,
    main_metric,
    run_tasks,
    transformers_lm,
)
from pt2gguf.model import load_model

CONTEXT = "Question: What falls from clouds?\nAnswer:"
ENDS = (" rain", " a long red carpet", " a long red scarf", " a")


@pytest.fixture(scope="module")
def task_directory(tmp_path_factory):
    return write_task_set(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def tasks(task_directory) -> dict[str, Any]:
    return load_tasks(PAPER_TASKS, task_directory)


@pytest.fixture(scope="module")
def in_transformers(checkpoint) -> Any:
    return transformers_lm(load_model(checkpoint, {}), load_tokenizer(checkpoint.path))


@pytest.fixture(scope="module")
def in_llama_cpp(checkpoint, llama_cpp, tmp_path_factory) -> Any:
    file = tmp_path_factory.mktemp("full") / "full.gguf"
    write_full_precision(checkpoint.path, file, llama_cpp)
    return llama_cpp_lm(file, threads=1)


def requests(*pairs: tuple[str, str]) -> list[Any]:
    return [SimpleNamespace(args=pair) for pair in pairs]


def test_both_engines_read_the_same_tokens(in_transformers, in_llama_cpp) -> None:
    for text in (CONTEXT, "a", "Zoë's  two  spaces\n\nand lines", "12,345.6 é"):
        assert in_llama_cpp.tok_encode(text) == in_transformers.tok_encode(text)
    assert in_llama_cpp.tok_encode("word", add_special_tokens=False) == (
        in_transformers.tok_encode("word", add_special_tokens=False)
    )
    assert in_llama_cpp.prefix_token_id == in_transformers.prefix_token_id


def test_both_engines_give_the_same_likelihoods(in_transformers, in_llama_cpp) -> None:
    pairs = [(CONTEXT, end) for end in ENDS] + [("", "Once upon a time"), ("The", " end")]
    expected = in_transformers.loglikelihood(requests(*pairs), disable_tqdm=True)
    actual = in_llama_cpp.loglikelihood(requests(*pairs), disable_tqdm=True)
    for (a, a_greedy), (e, e_greedy) in zip(actual, expected, strict=True):
        # llama.cpp rounds activations to float16 (2^-11 of each) before it multiplies.
        assert a == pytest.approx(e, rel=2e-3, abs=0.02)
        assert a_greedy == e_greedy


def test_a_greedy_continuation_is_recognised(in_transformers, in_llama_cpp) -> None:
    tokenizer = in_transformers.tokenizer
    ids = torch.tensor([tokenizer.encode("The history of the")])
    grown = in_transformers.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=0
    )[0].tolist()
    context, end = grown[: ids.shape[1]], grown[ids.shape[1] :]
    pairs = [(("", ""), context, end), (("", ""), context, [end[0], end[1], (end[2] + 1) % 4096])]
    for engine in (in_transformers, in_llama_cpp):
        found = engine._loglikelihood_tokens(pairs, disable_tqdm=True)
        assert [greedy for _, greedy in found] == [True, False]


def test_what_was_computed_before_does_not_matter(in_llama_cpp) -> None:
    """The scorer keeps what sequences have in common, in any order of them."""
    pairs = [(CONTEXT, end) for end in ENDS] + [(CONTEXT + ENDS[1], " again"), ("Other", " text")]
    together = in_llama_cpp.loglikelihood(requests(*pairs), disable_tqdm=True)
    alone = []
    for pair in reversed(pairs):
        in_llama_cpp._llama.n_tokens = 0
        alone += in_llama_cpp.loglikelihood(requests(pair), disable_tqdm=True)
    for (a, _), (b, _) in zip(together, reversed(alone), strict=True):
        assert a == pytest.approx(b, rel=2e-3, abs=0.02)  # batches differ, and so do roundings


def test_too_long_sequences_lose_their_beginning(in_llama_cpp, monkeypatch) -> None:
    monkeypatch.setattr(tasks_module, "LONGEST", 8)
    tokens = in_llama_cpp.tok_encode(CONTEXT)[:14]
    long = in_llama_cpp._loglikelihood_tokens([(("", ""), tokens[:-2], tokens[-2:])])
    short = in_llama_cpp._loglikelihood_tokens([(("", ""), tokens[-9:-2], tokens[-2:])])
    assert long == short


def test_the_seven_tasks_agree_between_engines(tasks, in_transformers, in_llama_cpp) -> None:
    expected = run_tasks(in_transformers, tasks, limit=None)
    actual = run_tasks(in_llama_cpp, tasks, limit=None)
    assert expected.keys() == actual.keys() == set(PAPER_TASKS)
    normalised = {name for name in PAPER_TASKS if "acc_norm" in expected[name]}
    assert normalised == set(PAPER_TASKS) - {"boolq", "winogrande"}
    for name in PAPER_TASKS:
        # At most one of the twelve items may hang on roundings.
        assert actual[name]["acc"] == pytest.approx(expected[name]["acc"], abs=1 / 12 + 1e-9)
        assert 0 < expected[name]["acc"] < 1  # the items can tell models apart


def test_a_task_is_scored_as_it_is_defined(tasks, task_directory, in_transformers) -> None:
    """Winogrande's partial scoring: how likely the end is after each option."""
    items = [json.loads(line) for line in (task_directory / "winogrande.json").open()]
    model, tokenizer = in_transformers.model, in_transformers.tokenizer
    right = []
    for item in items:
        before, end = item["sentence"].split("_")
        scores = []
        for option in (item["option1"], item["option2"]):
            ids = tokenizer(before + option + " " + end.strip(), return_tensors="pt")["input_ids"]
            start = len(tokenizer(before + option)["input_ids"])
            with torch.inference_mode():
                logs = model(ids).logits[0].log_softmax(-1)
            scores.append(sum(logs[i - 1, ids[0, i]].item() for i in range(start, ids.shape[1])))
        right.append(int(np.argmax(scores)) + 1 == int(item["answer"]))
    figures = run_tasks(in_transformers, {"winogrande": tasks["winogrande"]}, limit=None)
    assert figures["winogrande"]["acc"] == pytest.approx(np.mean(right))
    limited = run_tasks(in_transformers, {"winogrande": tasks["winogrande"]}, limit=3)
    assert limited["winogrande"]["acc"] == pytest.approx(np.mean(right[:3]))


def test_main_metric() -> None:
    assert main_metric({"acc": 0.25, "acc_norm": 0.5}) == 0.5
    assert main_metric({"acc": 0.25}) == 0.25


def test_what_cannot_be_had_is_one_sentence(tmp_path, monkeypatch) -> None:
    lines = ["task: absent", "dataset_path: json", "output_type: multiple_choice"]
    lines += [f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'none.json'}}}}}"]
    lines += ["test_split: test", "doc_to_text: a", "doc_to_choice: b", "doc_to_target: c"]
    (tmp_path / "absent.yaml").write_text("\n".join(lines) + "\n")
    with pytest.raises(Pt2Error, match="the data of task absent cannot be had"):
        load_tasks(["absent"], tmp_path)
    with pytest.raises(Pt2Error, match="no task 'nonsense'"):
        load_tasks(["nonsense"], tmp_path)
    with pytest.raises(Pt2Error, match="not a directory"):
        load_tasks(["absent"], tmp_path / "nowhere")
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(Pt2Error, match=r"pip install 'pt2gguf\[eval\]'"):
        load_tasks(["piqa"], None)
