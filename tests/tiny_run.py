"""A training run of seconds, and how the tests look at what it left."""

import json
from pathlib import Path

from tnl import config
from tnl.training.settings import PretrainSettings

VOCAB_SIZE = 340


def tiny_tree(shards: Path, output: Path) -> dict:
    """The configuration as it would stand in a YAML file."""
    return {
        "output": str(output),
        "seed": 3,
        "model": {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "glu_dim": 48},
        "data": {"shards": str(shards)},
        "train": {"steps": 12, "sequence_length": 32, "global_batch_size": 4, "micro_batch_size": 2},
        "optimizer": {"lr": 3e-3},
        "schedule": {"warmup_steps": 2},
        "checkpoint": {"every": 5},
    }


def tiny_run(shards: Path, output: Path, *overrides: str) -> PretrainSettings:
    """Validated settings of a tiny run."""
    tree = config.merge(tiny_tree(shards, output), config.parse_overrides(list(overrides)))
    return config.validate(PretrainSettings, tree, "tiny")


def rows(output: Path, kind: str = "train") -> list[dict]:
    """The rows of one kind in a run's metrics."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def trajectory(output: Path) -> list[tuple]:
    """What must be identical, bit for bit, however often a run was interrupted."""
    return [(row["step"], float(row["loss"]).hex(), float(row["grad_norm"]).hex(), row["lr"]) for row in rows(output)]
