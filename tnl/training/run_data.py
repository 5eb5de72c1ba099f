"""The data of a run as the loop sees it, and that of pretraining: shards, held-out split, micro-batches of a rank."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from tnl.data.loader import TrainLoader
from tnl.data.shards import TOKENIZER_FILE, ShardSet, check_vocabulary
from tnl.data.source_names import SOURCE_LOSS
from tnl.data.tokenizer_export import export_tokenizer
from tnl.errors import DataError
from tnl.evaluation.heldout import heldout_loss
from tnl.evaluation.source_loss import source_losses
from tnl.files import sha256_of
from tnl.training.engine import Ranks
from tnl.training.mesh import Mesh
from tnl.training.metrics import finite_or_none
from tnl.training.settings import PretrainSettings, RunSettings


class Loader(Protocol):
    """Micro-batches as a pure function of the step."""

    fingerprint: str

    def steps(self, start_step: int, end_step: int) -> Iterator[list[dict]]:
        """The micro-batches of this rank for each step in ``[start_step, end_step)``, dicts as of `TrainLoader`."""


class RunData(Protocol):
    """What a rank reads and is judged by."""

    loader: Loader
    tokenizer_sha256: str
    fingerprint: str  # of all that ranks must have alike, what is held out, too

    def resolved(self, settings: RunSettings) -> RunSettings:
        """``settings`` with what only the data tell."""

    def tokens_per_step(self, settings: RunSettings) -> int:
        """Of all ranks."""

    def describe(self) -> list[str]:
        """What to say of it before the first step."""

    def evaluate(self, engine, settings: RunSettings, ranks: Ranks, mesh: Mesh) -> dict | None:
        """Held-out figures, ``loss`` in nats among them, equal on all ranks; None where nothing is held out."""

    def samples(self, engine, settings: RunSettings, ranks: Ranks) -> list[dict]:
        """What the model writes to fixed prompts; on all ranks together."""

    def write_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer that exports carry into an empty folder."""


@dataclass(frozen=True)
class PretrainData:
    """`RunData` of pretraining."""

    shards: ShardSet
    heldout: ShardSet | None  # None: the shards have no held-out split
    loader: TrainLoader

    @property
    def tokenizer_sha256(self) -> str:
        """Of the sentencepiece file beside the shards."""
        return self.shards.index.tokenizer_sha256

    @property
    def fingerprint(self) -> str:
        """Of the shards, held-out ones too, and their tokenizer."""
        return f"{self.loader.fingerprint} {self.tokenizer_sha256}"

    def resolved(self, settings: PretrainSettings) -> PretrainSettings:
        """``settings`` as they are."""
        return settings

    def tokens_per_step(self, settings: PretrainSettings) -> int:
        """All windows are full."""
        return settings.train.global_batch_size * settings.train.sequence_length

    def describe(self) -> list[str]:
        """Nothing more than the announcement."""
        return []

    def evaluate(self, engine, settings: PretrainSettings, ranks: Ranks, mesh: Mesh) -> dict | None:
        """See `tnl.evaluation.heldout`."""
        if self.heldout is None:
            return None
        train = settings.train
        length = train.segment_length or train.sequence_length * max(1, 4096 // train.sequence_length)
        if train.sequence_parallel > 1:
            length = train.sequence_length // train.sequence_parallel  # no more memory than training takes
        options = dict(
            device=ranks.device,
            max_tokens=settings.evaluation.max_tokens,
            length=length,
            window=train.sequence_length,
            rank=mesh.token_rank,
            world_size=mesh.token_size,
            all_reduce=partial(mesh.token_sums, ranks=ranks),
        )
        row = heldout_loss(engine, self.heldout, **options).row()
        if settings.evaluation.by_source:
            found = source_losses(engine, self.heldout, **options)
            row |= {f"{SOURCE_LOSS}{name}": finite_or_none(loss.loss) for name, loss in found.items()}
        return row

    def samples(self, engine, settings: PretrainSettings, ranks: Ranks) -> list[dict]:
        """None."""
        return []

    def write_tokenizer(self, folder: Path) -> None:
        """That of the shards."""
        export_tokenizer(self.shards.folder / TOKENIZER_FILE, folder, add_bos=self.shards.index.add_bos)


def open_data(settings: PretrainSettings, mesh: Mesh, base: Path | None = None) -> PretrainData:
    """Open the shards of ``data.shards``; nothing is written.

    Args:
        base: folder with the tokenizer of the checkpoint that the run begins from.

    Raises:
        DataError: they cannot be read, or do not fill a window, or have another tokenizer than the checkpoint.
        ConfigError: the model's vocabulary is too small for them.
    """
    folder = Path(settings.data.shards)
    shards = ShardSet.open(folder, "train")
    check_vocabulary(shards, settings.model.vocab_size)
    if settings.init_from is not None and (base / TOKENIZER_FILE).is_file():
        _check_tokenizer(shards, base / TOKENIZER_FILE)
    heldout = ShardSet.open(folder, "heldout") if shards.index.splits["heldout"] else None
    loader = TrainLoader(
        shards,
        seq_len=settings.train.sequence_length,
        global_batch=settings.train.global_batch_size,
        micro_batch=settings.train.micro_batch_size,
        seed=settings.seed,
        rank=mesh.data_rank,
        world_size=mesh.data_size,
        sequence_rank=mesh.sequence_rank,
        sequence_size=mesh.sequence_size,
        packing=settings.data.packing,
        num_workers=settings.data.num_workers,
    )
    return PretrainData(shards, heldout, loader)


def _check_tokenizer(shards: ShardSet, file: Path) -> None:
    """Refuse shards whose ids mean something else to the checkpoint than to them.

    A vocabulary that was extended has the pieces of the old one at their places.
    """
    if shards.index.tokenizer_sha256 == sha256_of(file):
        return
    from sentencepiece import SentencePieceProcessor

    old, new = (SentencePieceProcessor(model_file=str(f)) for f in (file, shards.folder / TOKENIZER_FILE))
    if old.vocab_size() > new.vocab_size() or any(
        old.id_to_piece(i) != new.id_to_piece(i) for i in range(old.vocab_size())
    ):
        raise DataError(
            f"{shards.folder}: tokenized by another tokenizer than that of init_from; prepare the text again with "
            f"tokenizer.model={file}, or with one that adds pieces behind its own"
        )
