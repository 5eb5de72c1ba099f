"""`tnl data inspect`: instruction data as a model is trained on it, before it is."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from tnl.data.examples import ExampleSet, InstructionData, open_instructions
from tnl.data.instruction_loader import InstructionLoader
from tnl.generation.load import load_tokenizer
from tnl.generation.text_stream import INCOMPLETE, text_after
from tnl.training.export import is_run_folder
from tnl.training.finetune_settings import FinetuneSettings
from tnl.training.run_folder import TOKENIZER

# Two shades each, so that neighbouring tokens can be told apart.
_STYLES = {True: ("bold green", "bold bright_green underline"), False: ("dim", "dim underline")}


def inspect_data(settings: FinetuneSettings, num_examples: int, console: Console | None = None) -> None:
    """Print template, counts, ``num_examples`` examples and how sequences are filled; nothing is written.

    Raises:
        DataError, ConfigError: as `tnl.data.examples.open_instructions`; the tokenizer cannot be loaded.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    base = Path(settings.init_from)
    tokenizer = load_tokenizer(str(base / TOKENIZER) if is_run_folder(base) else settings.init_from)
    length = settings.train.sequence_length
    data = open_instructions(settings.data, tokenizer, max_tokens=length, seed=settings.seed)
    console.print(Text(f"{data.template.name}:", "bold"), Text(_visible(data.template.text)), sep="\n")
    for i in range(min(num_examples, len(data.train))):
        console.print(_drawn(i, *data.train[i], tokenizer))
    console.print(Text("learned tokens are green, the others are only read\n", "italic"))
    for line in _summary(settings, data):
        console.print(Text(line))


def _drawn(i: int, ids: np.ndarray, trained: np.ndarray, tokenizer) -> Text:
    """An example: a paragraph for each run of tokens that are learned, or only read."""
    text = Text(f"\nexample {i}: {len(ids)} tokens, {trained.sum()} learned\n", "bold")
    start = 0
    for is_trained, run in groupby(trained.tolist()):
        stop = start + len(list(run))
        text.append(f"  {'learned' if is_trained else 'read':<8} {stop - start:>5}  ", "cyan")
        for j, piece in enumerate(_pieces(ids.tolist(), start, stop, tokenizer)):
            text.append(_visible(piece), _STYLES[is_trained][j % 2])
        text.append("\n")
        start = stop
    return text


def _pieces(ids: list[int], start: int, stop: int, tokenizer) -> Iterator[str]:
    """The text of each token of ``ids[start:stop]``; of tokens that are bytes of one character together."""
    for end in range(start + 1, stop + 1):
        piece = text_after(tokenizer, ids[:start], ids[start:end])
        if not piece.endswith(INCOMPLETE) or end == stop:
            yield piece
            start = end


def _visible(text: str) -> str:
    """``text`` on one line, without anything that a terminal would obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _summary(settings: FinetuneSettings, data: InstructionData) -> list[str]:
    train, source = settings.train, data.source_counts
    lines = [f"records: {source.documents:,} read, {source.bad:,} bad"]
    lines += [f"  skipped: {message}" for message in source.messages]
    lines += _split_lines("train", data.train)
    lines += _split_lines("heldout", data.heldout) if data.heldout is not None else ["heldout: none"]
    loader = InstructionLoader(
        data.train,
        train.sequence_length,
        train.global_batch_size,
        1,
        pad_id=0,
        seed=settings.seed,
        batching=settings.data.batching,
    )
    found = loader.statistics()
    lines.append(
        f"{settings.data.batching}: {found.sequences:,} sequences of {train.sequence_length:,} tokens an epoch, "
        f"{found.waste:.2%} wasted; {loader.steps_per_epoch:,.1f} steps of {train.global_batch_size}"
    )
    return lines


def _split_lines(name: str, examples: ExampleSet) -> list[str]:
    counts, tokens, learned = examples.counts, len(examples.ids), int(examples.trained.sum())
    return [
        f"{name}: {len(examples):,} examples, {tokens:,} tokens ({tokens / len(examples):.1f} each, longest "
        f"{examples.lengths.max():,}), {learned:,} learned; {counts.truncated:,} truncated, "
        f"{counts.dropped_too_long:,} dropped as too long, {counts.dropped_without_loss:,} without an answer left"
    ]
