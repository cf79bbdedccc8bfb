"""The paper's seven tasks as lm-eval defines them, on a few made-up items in local files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval.tasks

# Where lm-eval keeps a task's definition: prompt, choices, target and metrics are taken from there.
DEFINITIONS = {
    "arc_challenge": "arc/arc_challenge.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
}

_FACTS = [
    ("What falls from clouds?", ["rain", "stones", "a long red carpet", "bread"], 0),
    ("Where do fish live?", ["in trees", "in the water", "on the moon", "inside books"], 1),
    ("What does a clock show?", ["the weather", "the price", "the time of day", "a name"], 2),
    ("What is ice made of?", ["sand", "iron", "wood", "frozen water"], 3),
    ("What do bees make?", ["honey", "paper money", "glass", "salt"], 0),
    ("When is it dark outside?", ["at noon", "at night", "in summer", "on Sundays"], 1),
    ("What do we read?", ["soup", "shoes", "a book", "a river of grey water"], 2),
    ("What pulls a train?", ["a kite", "a bird", "the wind", "an engine"], 3),
    ("What keeps us dry?", ["an umbrella", "a spoon", "a lake", "a song"], 0),
    ("What is the sun?", ["a fruit", "a star", "a lamp in the street", "a king"], 1),
    ("Who heals the sick?", ["a thief", "a painter", "a doctor", "a horse"], 2),
    ("What has four legs?", ["a snake", "a worm", "a wheel", "a table"], 3),
]


def write_task_set(directory: Path) -> Path:
    """Writes definitions and items to `directory`, which is what --task-path wants."""
    directory.mkdir(parents=True, exist_ok=True)
    own = Path(lm_eval.tasks.__file__).parent
    for name, definition in DEFINITIONS.items():
        items = directory / f"{name}.json"
        items.write_text("\n".join(json.dumps(_item(name, *fact)) for fact in _FACTS) + "\n")
        lines = [
            f"include: {own / definition}",
            "dataset_path: json",
            "dataset_name: null",
            f"dataset_kwargs: {{data_files: {{validation: {items}}}}}",
            "training_split: null",
            "validation_split: validation",
            "test_split: null",
            f"task: {name}",
        ]
        (directory / f"{name}.yaml").write_text("\n".join(lines) + "\n")
    return directory


def _item(task: str, question: str, answers: list[str], right: int) -> dict[str, Any]:
    """An item with the fields of the task's real data set."""
    wrong = answers[right - 1]
    if task in ("arc_easy", "arc_challenge"):
        choices = {"text": answers, "label": list("ABCD")}
        return {"question": question, "choices": choices, "answerKey": "ABCD"[right]}
    if task == "openbookqa":
        choices = {"text": answers, "label": list("ABCD")}
        return {"question_stem": question, "choices": choices, "answerKey": "ABCD"[right]}
    if task == "piqa":
        pair = [answers[right], wrong] if right % 2 else [wrong, answers[right]]
        return {"goal": question, "sol1": pair[0], "sol2": pair[1], "label": 1 - right % 2}
    if task == "boolq":
        passage = f"{question} The answer is {answers[right]}."
        label = right % 2
        return {
            "passage": passage,
            "question": f"is it {[wrong, answers[right]][label]}",
            "label": label,
        }
    if task == "hellaswag":
        return {
            "ind": 1,
            "activity_label": "Talking",
            "ctx_a": question,
            "ctx_b": "he says that it is",
            "ctx": f"{question} He says that it is",
            "endings": answers,
            "label": str(right),
        }
    sentence = f"{question} Not {wrong} but {answers[right]}, so _ is the right answer."
    return {
        "sentence": sentence,
        "option1": answers[right],
        "option2": wrong,
        "answer": "1",
    }
