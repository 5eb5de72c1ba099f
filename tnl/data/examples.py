"""Dialogues as tokens: what the model reads, and which tokens it is trained on."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice, pairwise

import numpy as np

from tnl.data.chat_template import ChatTemplate, RenderedDialogue, choose_template
from tnl.data.instructions import iterate_dialogues
from tnl.data.records import SourceCounts
from tnl.data.settings import FinetuneDataSettings
from tnl.data.template_process import TemplateRenderer
from tnl.errors import DataError

# Dialogues that are rendered and tokenized at once.
_BATCH = 256


@dataclass
class ExampleCounts:
    """What became of the dialogues of one split."""

    truncated: int = 0
    dropped_too_long: int = 0
    dropped_without_loss: int = 0


class ExampleSet:
    """Tokenized dialogues, in memory: 5 bytes a token.

    Attributes: ``ids`` int32 [num_tokens], ``trained`` bool [num_tokens], whether a token is predicted; ``bounds``
    int64 [len + 1], where examples begin; ``counts``; ``fingerprint`` (hex, of ids and trained tokens).
    """

    def __init__(self, examples: Iterable[tuple[np.ndarray, np.ndarray]], counts: ExampleCounts) -> None:
        """``examples``: ids and trained tokens of each."""
        pairs = list(examples)
        self.bounds = np.cumsum([0, *(len(ids) for ids, _ in pairs)], dtype=np.int64)
        self.ids = np.concatenate([np.empty(0, np.int32), *(ids for ids, _ in pairs)])
        self.trained = np.concatenate([np.empty(0, bool), *(trained for _, trained in pairs)])
        self.counts = counts
        digest = hashlib.sha256(self.bounds.tobytes())
        digest.update(self.ids.tobytes())
        digest.update(self.trained.tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """ids int32 [n] and trained tokens bool [n] of example ``i``."""
        part = slice(self.bounds[i], self.bounds[i + 1])
        return self.ids[part], self.trained[part]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64 [len]."""
        return np.diff(self.bounds)


@dataclass
class InstructionData:
    """The examples of a fine-tuning run."""

    train: ExampleSet
    heldout: ExampleSet | None  # None: nothing was held out
    template: ChatTemplate  # its text is to be saved with the model
    source_counts: SourceCounts = field(default_factory=SourceCounts)


def open_instructions(settings: FinetuneDataSettings, tokenizer, *, max_tokens: int, seed: int) -> InstructionData:
    """Read, render and tokenize all of ``settings.source``; the result is a function of the arguments and the data.

    Args:
        tokenizer: of `transformers`, that of the model.
        max_tokens: of an example, train.sequence_length.
        seed: decides what is held out.

    Raises:
        DataError: see `tnl.data.instructions.iterate_dialogues`; no example is left to train on.
        ConfigError: see `tnl.data.chat_template.choose_template` and `TemplateRenderer.render`.
    """
    template = choose_template(settings.template, tokenizer)
    source_counts = SourceCounts()
    splits: dict[bool, list] = {False: [], True: []}
    counts = {False: ExampleCounts(), True: ExampleCounts()}
    dialogues = iterate_dialogues(settings, source_counts, special_names(tokenizer))
    with TemplateRenderer(template) as renderer:
        while batch := list(islice(dialogues, _BATCH)):
            rendered = renderer.render([dialogue.messages for dialogue in batch], [d.where for d in batch])
            for dialogue, example in zip(batch, tokenize(rendered, tokenizer), strict=True):
                is_held_out = dialogue.is_held_out(seed, settings.heldout_fraction)
                if kept := _fitted(*example, max_tokens, settings.too_long, counts[is_held_out]):
                    splits[is_held_out].append(kept)
    if not splits[False]:
        found = counts[False]
        raise DataError(
            f"data: no example is left to train on: {len(splits[True])} held out, {found.dropped_too_long} too long, "
            f"{found.dropped_without_loss} without an answer in the first {max_tokens} tokens; raise "
            "train.sequence_length, lower data.heldout_fraction or give more data"
        )
    heldout = ExampleSet(splits[True], counts[True]) if splits[True] else None
    return InstructionData(ExampleSet(splits[False], counts[False]), heldout, template, source_counts)


def special_names(tokenizer) -> frozenset[str]:
    """The texts that a tokenizer reads as special tokens where a template may write them."""
    added = tokenizer.added_tokens_decoder.values()
    return frozenset(tokenizer.all_special_tokens) | {str(token) for token in added if token.special}


def tokenize(rendered: list[RenderedDialogue], tokenizer) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """ids int32 [n] and trained tokens bool [n] of each dialogue.

    Prompts and answers are tokenized apart, so that the model is trained on the tokens that it generates: it never
    generates one that begins in the prompt.
    """
    parts = [_parts(dialogue) for dialogue in rendered]
    firsts = _encode(tokenizer, [own[0][0] for own in parts])
    others = iter(
        _encode_behind(tokenizer, [(before, text) for own in parts for (before, _), (text, _) in pairwise(own)])
    )
    for first, own in zip(firsts, parts, strict=True):
        pieces = [first, *(next(others) for _ in own[1:])]
        lengths = [len(piece) for piece in pieces]
        trained = np.repeat([is_answer for _, is_answer in own], lengths)
        yield np.concatenate([np.asarray(piece, np.int32) for piece in pieces]), trained


def _parts(dialogue: RenderedDialogue) -> list[tuple[str, bool]]:
    """The text cut at the bounds of its answers, each part with whether it is one."""
    parts, position = [], 0
    for start, end in dialogue.answers:
        parts += [(dialogue.text[position:start], False), (dialogue.text[start:end], True)]
        position = end
    return parts


def _encode(tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of each text; names of special tokens in it are the tokens, for the template wrote them."""
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=False, verbose=False).input_ids


def _encode_behind(tokenizer, pairs: list[tuple[str, str]]) -> list[list[int]]:
    """Ids of the second text of each pair as they are behind the first: without a space before its first word.

    Where a token of the two together reaches over the border, as they are behind a line break; where that is so there,
    too, as they are alone.
    """
    found: list[list[int] | None] = [None] * len(pairs)
    for context in (None, "\n", ""):
        rest = [i for i, ids in enumerate(found) if ids is None]
        befores = [pairs[i][0] if context is None else context for i in rest]
        both = _encode(tokenizer, [before + pairs[i][1] for i, before in zip(rest, befores, strict=True)])
        for i, first, ids in zip(rest, _encode(tokenizer, befores), both, strict=True):
            if ids[: len(first)] == first:
                found[i] = ids[len(first) :]
    return found


def _fitted(
    ids: np.ndarray, trained: np.ndarray, max_tokens: int, too_long: str, counts: ExampleCounts
) -> tuple[np.ndarray, np.ndarray] | None:
    """The example as it is trained on, or None; counted."""
    is_too_long = len(ids) > max_tokens
    if is_too_long and too_long == "drop":
        counts.dropped_too_long += 1
        return None
    ids, trained = ids[:max_tokens], trained[:max_tokens]
    # Nothing stands before the first token from which it could be predicted.
    trained[:1] = False
    if not trained.any():
        counts.dropped_without_loss += 1
        return None
    counts.truncated += is_too_long
    # What stands behind the last trained token teaches nothing.
    stop = np.flatnonzero(trained)[-1] + 1
    return ids[:stop], trained[:stop]
