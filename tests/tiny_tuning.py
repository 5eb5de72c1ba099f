"""Fine-tuning runs of seconds on sequences that need no tokenizer: the loop, the methods and their checkpoints."""

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from tests.tiny_model import VOCAB, tiny_model
from tnl import config
from tnl.training.finetune_settings import FinetuneSettings
from tnl.training.methods import apply_method, trains_all
from tnl.training.pretrain import Task, train

SIZES = dict(vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, glu_dim=48, scale_embedding=False, init_std=0.2)


def tiny_base(folder: Path, seed: int = 0, **values) -> Path:
    """A model folder with random weights and no tokenizer."""
    tiny_model(seed, **values).save_pretrained(folder)
    return folder


@dataclass
class PackedRows:
    """Rows of two examples, of which the second half is learned: counting up from a random token."""

    rows: int
    length: int = 24
    masked_step: int | None = None  # whose examples have no label
    fingerprint: str = "0" * 64

    def steps(self, start_step: int, end_step: int):
        """As `TrainLoader.steps`, with one micro-batch a step for each row."""
        for step in range(start_step, end_step):
            yield [self.micro_batch(step, row) for row in range(self.rows)]

    def micro_batch(self, step: int, row: int) -> dict:
        """One row."""
        seed = int.from_bytes(hashlib.sha256(f"{step} {row}".encode()).digest()[:4], "little")
        first = torch.randint(3, VOCAB, (2,), generator=torch.Generator().manual_seed(seed))
        half = self.length // 2
        ids = 3 + (first.unsqueeze(1) + torch.arange(half) - 3) % (VOCAB - 3)  # [2, half]
        labels = ids.clone()
        labels[:, : half if step == self.masked_step else half // 2] = -100
        cu_seqlens = torch.tensor([0, half, self.length], dtype=torch.int32)
        return {"input_ids": ids.view(1, -1), "labels": labels.view(1, -1), "cu_seqlens": cu_seqlens}


@dataclass
class PackedData:
    """`tnl.training.run_data.RunData` of `PackedRows`."""

    loader: PackedRows
    tokenizer_sha256: str = "none"
    fingerprint: str = "none"
    losses: tuple[float, ...] = ()  # held-out losses to report, by evaluation

    def resolved(self, settings):
        return settings

    def tokens_per_step(self, settings):
        return self.loader.rows * self.loader.length

    def describe(self):
        return []

    def evaluate(self, engine, settings, ranks, mesh):
        if not self.losses:
            return None
        loss, self.losses = self.losses[0], self.losses[1:]
        return {"loss": loss, "bits_per_token": loss, "bits_per_byte": None}

    def samples(self, engine, settings, ranks):
        return []

    def write_tokenizer(self, folder):
        (folder / "tokenizer.txt").write_text("none\n")


def tuning(base: Path, output: Path, method: dict, *overrides: str, **model) -> FinetuneSettings:
    """Validated settings."""
    tree = {
        "output": str(output),
        "init_from": str(base),
        "model": SIZES | model,
        "data": {"source": {"kind": "stdlib"}},
        "method": method,
        "train": {"steps": 6, "sequence_length": 24, "global_batch_size": 2, "micro_batch_size": 1},
        "optimizer": {"lr": 1e-2},
        "checkpoint": {"every": 3},
    }
    return config.validate(FinetuneSettings, config.merge(tree, config.parse_overrides(list(overrides))), "tiny")


def tune(settings: FinetuneSettings, data: PackedData | None = None, console: Console | None = None, **options) -> str:
    """Run them on `PackedData`."""
    data = data or PackedData(PackedRows(settings.train.global_batch_size))
    adapt = partial(apply_method, settings.method)
    task = Task(lambda *_: data, adapt, trains_all(settings.method))
    return train(settings, task, console=console or Console(quiet=True), **options)
