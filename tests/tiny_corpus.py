"""A small corpus with known content, and the folder of shards made from it."""

import json
import random
from pathlib import Path

from tnl.data.prepare import prepare
from tnl.data.settings import PrepareSettings

_TEXT = "def return self value for in range print the of a state decay 12 345 \u4e2d\u6587 \U0001f600 ( ) : = +"
WORDS = _TEXT.split()


def tiny_texts(num_documents: int = 60, seed: int = 0) -> list[str]:
    """Different documents of a few lines that look like code."""
    draw = random.Random(seed)
    texts = []
    for i in range(num_documents):
        lines = [
            " " * 4 * draw.randrange(3) + " ".join(draw.choices(WORDS, k=draw.randrange(1, 9)))
            for _ in range(draw.randrange(1, 12))
        ]
        texts.append("\n".join([f"# {i}", *lines, ""]))
    return texts


def write_jsonl(file: Path, texts: list[str]) -> Path:
    """One record per text."""
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return file


def tiny_settings(folder: Path, output: str = "shards", texts: list[str] | None = None, **changes) -> PrepareSettings:
    """Settings that prepare ``folder/output`` from ``texts``."""
    corpus = write_jsonl(folder / "corpus.jsonl", tiny_texts() if texts is None else texts)
    values = {
        "source": {"kind": "jsonl", "path": str(corpus)},
        "tokenizer": {"vocab_size": 340},
        "output": str(folder / output),
        "shard_tokens": 1000,
        "heldout_fraction": 0.2,
        "num_workers": 1,
    }
    return PrepareSettings(**{**values, **changes})


def tiny_shards(folder: Path, **changes) -> Path:
    """A prepared folder of a few shards."""
    return prepare(tiny_settings(folder, **changes), report=lambda line: None)
