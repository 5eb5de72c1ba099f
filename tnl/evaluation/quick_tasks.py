"""Small tasks in lm-eval's schema whose data are made here: by rules, and from the text of Python's standard library.

They need no data set and no network. All of them are drawn from fixed seeds.
"""

import random
import re
import sysconfig
from collections.abc import Callable
from pathlib import Path

import datasets

DOCUMENTS = 100
CHOICES = 4
VERSION = 1.1
NAMES = ["box", "key", "cup", "map", "hat", "pen", "bag", "jar", "net", "rod"]
COLOURS = ["red", "blue", "green", "black", "white", "grey", "pink", "brown"]
# Modules that every Python of these years has. In some of them a module of another name holds the code of one of these.
MODULES = ["argparse", "ast", "bisect", "calendar", "configparser", "copy", "csv", "difflib", "dis", "tarfile"]
MODULES += ["fnmatch", "functools", "gettext", "glob", "heapq", "inspect", "locale", "queue", "shutil", "textwrap"]
KEYWORDS = ["and", "as", "else", "for", "if", "import", "in", "is", "not", "or"]
KEYWORD = re.compile(rf" ({'|'.join(KEYWORDS)}) ")
SHOWN_LINES = 12
TEXT_CHARACTERS = 4000


def _copy(draw: random.Random) -> dict:
    """A row of words, and its beginning again: which word comes next?"""
    words = draw.sample(NAMES + COLOURS, 8)
    place = draw.randrange(3, 7)
    choices = draw.sample([word for word in words if word != words[place]], CHOICES - 1)
    answer = draw.randrange(CHOICES)
    choices.insert(answer, words[place])
    return {"text": f"{' '.join(words)}\n{' '.join(words[:place])}", "choices": choices, "answer": answer}


def _recall(draw: random.Random) -> dict:
    """Colours of four things, and a question about one of them."""
    names, colours = draw.sample(NAMES, CHOICES), draw.sample(COLOURS, CHOICES)
    answer = draw.randrange(CHOICES)
    told = "\n".join(f"{name} = {colour}" for name, colour in zip(names, colours, strict=True))
    return {"text": f"{told}\n{names[answer]} =", "choices": colours, "answer": answer}


def _arithmetic(draw: random.Random) -> dict:
    """The sum of two digits."""
    a, b = draw.randrange(1, 10), draw.randrange(1, 10)
    choices = draw.sample([n for n in range(2, 19) if n != a + b], CHOICES - 1)
    answer = draw.randrange(CHOICES)
    choices.insert(answer, a + b)
    return {"text": f"{a} + {b} =", "choices": [str(n) for n in choices], "answer": answer}


def _repeat(draw: random.Random) -> dict:
    """A line three times, the last of them to be continued."""
    words = draw.sample(NAMES, 4)
    line = " ".join(words)
    return {"text": f"{line}\n{line}\n{words[0]}", "answer": " ".join(words[1:])}


def library_file(module: str) -> Path:
    """Source of a module of the standard library."""
    return Path(sysconfig.get_path("stdlib")) / f"{module}.py"


def _place(draw: random.Random) -> tuple[list[str], int]:
    """Lines of a module that is long enough, and the number of one that has as many before it as are shown."""
    while True:
        lines = library_file(draw.choice(MODULES)).read_text(encoding="utf-8").splitlines()
        if len(lines) > SHOWN_LINES:
            return lines, draw.randrange(SHOWN_LINES, len(lines))


def _next_line(draw: random.Random) -> dict:
    """Lines of a program: which of four lines of the same indentation stands next?"""
    while True:
        lines, place = _place(draw)
        line = lines[place]
        indent = len(line) - len(line.lstrip())
        others = sorted({other for other in lines if other[:indent].isspace() and other[indent:].strip()} - {line})
        others = [other for other in others if len(other) - len(other.lstrip()) == indent and len(other) > indent + 8]
        if indent and len(line) > indent + 8 and len(others) >= CHOICES - 1:
            break
    choices = [f"{other}\n" for other in draw.sample(others, CHOICES - 1)]
    answer = draw.randrange(CHOICES)
    choices.insert(answer, f"{line}\n")
    return {"text": "\n".join(lines[place - SHOWN_LINES : place]), "choices": choices, "answer": answer}


def _keyword(draw: random.Random) -> dict:
    """Lines of a program up to a keyword inside the last: which of four keywords stands there?"""
    while True:
        lines, place = _place(draw)
        found = [match for match in KEYWORD.finditer(lines[place]) if lines[place][: match.start()].strip()]
        if found and not lines[place].lstrip().startswith("#"):
            break
    match = draw.choice(found)
    choices = draw.sample([word for word in KEYWORDS if word != match[1]], CHOICES - 1)
    answer = draw.randrange(CHOICES)
    choices.insert(answer, match[1])
    before = [*lines[place - SHOWN_LINES : place], lines[place][: match.start()]]
    return {"text": "\n".join(before), "choices": choices, "answer": answer}


def _documents(make: Callable[[random.Random], dict], seed: int) -> Callable[..., dict]:
    """What lm-eval calls for the data of a task; examples for few-shot prompts are drawn apart."""

    def data(**_) -> dict:
        return {
            split: datasets.Dataset.from_list([make(draw) for _ in range(count)])
            for split, count, draw in (
                ("test", DOCUMENTS, random.Random(seed)),
                ("validation", 16, random.Random(seed + 1000)),
            )
        }

    return data


def _text_data(**_) -> dict:
    texts = [library_file(module).read_text(encoding="utf-8")[:TEXT_CHARACTERS] for module in MODULES]
    return {"test": datasets.Dataset.from_list([{"text": text} for text in texts])}


def _metrics(*names: str) -> list[dict]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]


def _choice_task(make: Callable[[random.Random], dict], seed: int, delimiter: str = " ") -> dict:
    return {
        "custom_dataset": _documents(make, seed),
        "output_type": "multiple_choice",
        "test_split": "test",
        "validation_split": "validation",
        "fewshot_split": "validation",
        "fewshot_delimiter": "\n",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": delimiter,
        "metric_list": _metrics("acc", "acc_norm"),
        "metadata": {"version": VERSION},
    }


def _repeat_task() -> dict:
    return {
        "custom_dataset": _documents(_repeat, 5),
        "output_type": "generate_until",
        "test_split": "test",
        "validation_split": "validation",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 24, "do_sample": False},
        "filter_list": [
            {"name": "none", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]},
        ],
        "metric_list": _metrics("exact_match"),
        "metadata": {"version": VERSION},
    }


def _python_text_task() -> dict:
    return {
        "custom_dataset": _text_data,
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": name, "aggregation": aggregation, "higher_is_better": False}
            for name, aggregation in (
                ("word_perplexity", "weighted_perplexity"),
                ("byte_perplexity", "weighted_perplexity"),
                ("bits_per_byte", "bits_per_byte"),
            )
        ],
        "metadata": {"version": VERSION},
    }


# Name -> the task's configuration in lm-eval's schema.
QUICK_TASKS: dict[str, Callable[[], dict]] = {
    "tnl_copy": lambda: _choice_task(_copy, 1),
    "tnl_recall": lambda: _choice_task(_recall, 2),
    "tnl_arithmetic": lambda: _choice_task(_arithmetic, 3),
    "tnl_next_line": lambda: _choice_task(_next_line, 4, "\n"),
    "tnl_keyword": lambda: _choice_task(_keyword, 6),
    "tnl_repeat": _repeat_task,
    "tnl_python_text": _python_text_task,
}
