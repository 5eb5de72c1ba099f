"""Small data in the schemas of lm-eval's tasks, as `tnl evaluate --data-dir` takes them."""

import json
import random
from pathlib import Path

from tests.harness_requests import words

COUNT = 6


def write_rows(file: Path, rows: list[dict]) -> None:
    """A JSON Lines file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _boolq(draw: random.Random, i: int) -> dict:
    return {"question": words(draw, 4), "passage": words(draw, 12), "idx": i, "label": i % 2}


def _piqa(draw: random.Random, i: int) -> dict:
    return {"goal": words(draw, 5), "sol1": words(draw, 4), "sol2": words(draw, 3), "label": i % 2}


def _hellaswag(draw: random.Random, i: int) -> dict:
    return {
        "ind": i,
        "activity_label": words(draw, 2),
        "ctx_a": words(draw, 6),
        "ctx_b": words(draw, 2),
        "ctx": "",
        "endings": [words(draw, n) for n in (3, 4, 5, 4)],
        "label": str(i % 4),
    }


def _arc(draw: random.Random, i: int) -> dict:
    choices = {"text": [words(draw, 2) for _ in range(4)], "label": ["A", "B", "C", "D"]}
    return {"id": str(i), "question": words(draw, 7), "choices": choices, "answerKey": "ABCD"[i % 4]}


def _mmlu(draw: random.Random, i: int) -> dict:
    return {"question": words(draw, 8), "choices": [words(draw, 2) for _ in range(4)], "answer": i % 4}


def _siqa(draw: random.Random, i: int) -> dict:
    answers = {f"answer{letter}": words(draw, 2) for letter in "ABC"}
    return {"context": words(draw, 6), "question": words(draw, 4), **answers, "label": str(1 + i % 3)}


def _winogrande(draw: random.Random, i: int) -> dict:
    sentence = f"{words(draw, 4)} _ {words(draw, 3)}"
    return {"sentence": sentence, "option1": "self", "option2": "state", "answer": str(1 + i % 2)}


def _openbookqa(draw: random.Random, i: int) -> dict:
    row = _arc(draw, i)
    return {"id": row["id"], "question_stem": row["question"], "choices": row["choices"], "answerKey": row["answerKey"]}


def _chinese(question: str, answer: str):
    def row(draw: random.Random, i: int) -> dict:
        return {question: words(draw, 5), **{letter: words(draw, 2) for letter in "ABCD"}, answer: "ABCD"[i % 4]}

    return row


def _text(key: str, count: int):
    return lambda draw, i: {key: words(draw, count)}


# Folder, splits, and a row; the folders are the ways to name one: a task, a data set, the end of its name.
TASKS = {
    "boolq": (("validation",), _boolq),
    "baber/piqa": (("validation",), _piqa),
    "hellaswag": (("validation",), _hellaswag),
    "ai2_arc/ARC-Easy": (("test",), _arc),
    "mmlu_anatomy": (("test", "dev"), _mmlu),
    "wikitext": (("test",), _text("page", 40)),
    "lambada_openai": (("test",), _text("text", 20)),
}


def write_tasks(folder: Path, names: tuple[str, ...] = tuple(TASKS)) -> Path:
    """Write data of some tasks below ``folder``."""
    draw = random.Random(0)
    for name in names:
        splits, row = TASKS[name]
        for split in splits:
            write_rows(folder / name / f"{split}.jsonl", [row(draw, i) for i in range(COUNT)])
    return folder


# How the tasks of the suite paper begin, their splits, and a row of them.
PAPER = {
    "boolq": TASKS["boolq"],
    "piqa": TASKS["baber/piqa"],
    "social_iqa": (("validation",), _siqa),
    "hellaswag": TASKS["hellaswag"],
    "winogrande": (("validation",), _winogrande),
    "arc_easy": (("test",), _arc),
    "arc_challenge": (("test",), _arc),
    "openbookqa": (("test",), _openbookqa),
    "mmlu": (("test", "dev"), _mmlu),
    "cmmlu": (("test", "dev"), _chinese("Question", "Answer")),
    "ceval-valid": (("val", "dev"), _chinese("question", "answer")),
}


def write_paper(folder: Path) -> Path:
    """Write data of all tasks of the suite paper: one question each, and what stands before it."""
    from tnl.evaluation.task_data import TaskData
    from tnl.evaluation.task_library import TaskLibrary

    draw, library = random.Random(1), TaskLibrary(TaskData(None))
    for name, (splits, row) in PAPER.items():
        for leaf in library.select(name).leaves:
            for split in splits:
                count = 5 if split == "dev" else 1  # as the real ones have it
                write_rows(folder / leaf.name / f"{split}.jsonl", [row(draw, i) for i in range(count)])
    return folder
