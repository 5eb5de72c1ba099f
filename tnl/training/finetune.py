"""Fine-tuning: instruction data and a method, given to the loop that pretrains."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from tnl.data.chat_template import SAVED_REFERENCE, ChatTemplate
from tnl.data.examples import InstructionData, open_instructions
from tnl.data.instruction_loader import InstructionLoader, heldout_batches
from tnl.data.shards import TOKENIZER_FILE
from tnl.data.template_process import TemplateRenderer
from tnl.errors import ConfigError
from tnl.evaluation.answer_loss import answer_loss
from tnl.generation.load import load_tokenizer
from tnl.training.engine import Ranks
from tnl.training.finetune_settings import FinetuneSettings
from tnl.training.mesh import Mesh
from tnl.training.methods import apply_method, check_method, trains_all
from tnl.training.pretrain import Task, train
from tnl.training.samples import answers


@dataclass(frozen=True)
class FinetuneData:
    """`tnl.training.run_data.RunData` of fine-tuning."""

    instructions: InstructionData
    loader: InstructionLoader
    tokenizer: object  # of transformers, with the template of the run
    folder: Path  # where it came from
    pad_id: int
    prompts: list[tuple[str, list[int]]]  # to answer, and the tokens that stand before an answer

    @property
    def tokenizer_sha256(self) -> str:
        """Of its pieces and its template."""
        pieces = json.dumps(sorted(self.tokenizer.get_vocab().items())) + self.instructions.template.text
        return hashlib.sha256(pieces.encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """Of the examples, held-out ones too, and the tokenizer."""
        heldout = self.instructions.heldout
        return f"{self.loader.fingerprint} {heldout and heldout.fingerprint} {self.tokenizer_sha256}"

    def resolved(self, settings: FinetuneSettings) -> FinetuneSettings:
        """See `FinetuneSettings.resolved`."""
        return settings.resolved(self.loader.steps_per_epoch)

    def tokens_per_step(self, settings: FinetuneSettings) -> int:
        """Tokens of examples, on average; not what fills sequences up."""
        found = self.loader.statistics()
        return round(found.tokens / found.sequences * settings.train.global_batch_size)

    def describe(self) -> list[str]:
        """How many examples there are, what became of the others, and how full the sequences are."""
        data, found = self.instructions, self.loader.statistics()
        held_out = 0 if data.heldout is None else len(data.heldout)
        counts = data.train.counts
        return [
            f"data: {len(data.train):,} examples of {found.tokens / len(data.train):.0f} tokens, {held_out:,} held "
            "out; "
            f"{counts.truncated:,} truncated, {counts.dropped_too_long:,} too long, {counts.dropped_without_loss:,} "
            f"without an answer, {data.source_counts.bad:,} bad records; {data.template.name}",
            f"an epoch: {found.sequences:,} sequences, {found.trained_tokens:,} trained tokens, {found.waste:.1%} "
            "padding",
        ]

    def evaluate(self, engine, settings: FinetuneSettings, ranks: Ranks, mesh: Mesh) -> dict | None:
        """Loss over the held-out answers; see `tnl.evaluation.answer_loss`."""
        if self.instructions.heldout is None:
            return None
        batches = heldout_batches(
            self.instructions.heldout,
            settings.train.sequence_length,
            pad_id=self.pad_id,
            max_tokens=settings.evaluation.max_tokens,
            rank=mesh.data_rank,
            world_size=mesh.data_size,
        )
        found = answer_loss(engine, batches, device=ranks.device, sums=partial(mesh.token_sums, ranks=ranks))
        return found.row()

    def samples(self, engine, settings: FinetuneSettings, ranks: Ranks) -> list[dict]:
        """Answers to ``evaluation.prompts``."""
        wanted = settings.evaluation
        return answers(engine, self.tokenizer, self.prompts, wanted.max_new_tokens, ranks.device)

    def write_tokenizer(self, folder: Path) -> None:
        """That of the base, with the template of the run."""
        self.tokenizer.save_pretrained(folder)
        if (self.folder / TOKENIZER_FILE).is_file() and not (folder / TOKENIZER_FILE).exists():
            shutil.copyfile(self.folder / TOKENIZER_FILE, folder / TOKENIZER_FILE)


def open_data(settings: FinetuneSettings, mesh: Mesh, folder: Path) -> FinetuneData:
    """Read and tokenize the examples of the data section; nothing is written.

    Args:
        folder: with the tokenizer.

    Raises:
        DataError, ConfigError: see `tnl.data.examples.open_instructions`; the tokenizer cannot be loaded, or has more
            pieces than the model.
    """
    train = settings.train
    tokenizer = load_tokenizer(str(folder))
    if len(tokenizer) > settings.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size: {settings.model.vocab_size}, but the tokenizer of {folder} has {len(tokenizer)} "
            f"pieces; set it to at least {len(tokenizer)}, which extends the vocabulary"
        )
    if tokenizer.chat_template in SAVED_REFERENCE:
        # What a run that resumes finds in its own folder; known, it is rendered without a process of its own.
        tokenizer.chat_template = None
    data = open_instructions(settings.data, tokenizer, max_tokens=train.sequence_length, seed=settings.seed)
    tokenizer.chat_template = data.template.text
    # Saved with it: an end token that the template writes behind an earlier answer is one token wherever it is applied.
    tokenizer.split_special_tokens = False
    pad_id = tokenizer.pad_token_id or 0
    loader = InstructionLoader(
        data.train,
        train.sequence_length,
        train.global_batch_size,
        train.micro_batch_size,
        pad_id=pad_id,
        seed=settings.seed,
        rank=mesh.data_rank,
        world_size=mesh.data_size,
        batching=settings.data.batching,
        num_workers=settings.data.num_workers,
    )
    return FinetuneData(data, loader, tokenizer, folder, pad_id, _prompt_tokens(settings, data.template, tokenizer))


def _prompt_tokens(settings: FinetuneSettings, template: ChatTemplate, tokenizer) -> list[tuple[str, list[int]]]:
    """``evaluation.prompts`` and what the template writes before their answers, rendered within its bounds.

    Raises:
        ConfigError: the template fails on one, or writes nothing.
    """
    prompts = settings.evaluation.prompts
    if not prompts:
        return []
    system = [{"role": "system", "content": settings.data.system}] if settings.data.system else []
    dialogues = [
        [*system, {"role": "user", "content": prompt}, {"role": "assistant", "content": "."}] for prompt in prompts
    ]
    with TemplateRenderer(template) as renderer:
        rendered = renderer.render(dialogues, [f"evaluation.prompts {i}" for i in range(len(prompts))])
    found = []
    for i, (prompt, dialogue) in enumerate(zip(prompts, rendered, strict=True)):
        text = dialogue.text[: dialogue.answers[0][0]]
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=False).input_ids
        if not ids:
            raise ConfigError(f"evaluation.prompts: number {i} becomes no token by {template.name}; write something")
        found.append((prompt, ids))
    return found


def finetune(
    settings: FinetuneSettings,
    *,
    resume: str = "auto",
    fresh: bool = False,
    console: Console | None = None,
    start: Path | None = None,
) -> str:
    """Tune a checkpoint; see `tnl.training.pretrain.train`.

    Raises:
        UserError: also for names in the method section that the model has not.
    """
    check_method(settings.method, settings.model.to_config())
    task = Task(open_data, partial(apply_method, settings.method), trains_all(settings.method))
    return train(settings, task, resume=resume, fresh=fresh, console=console, start=start)
