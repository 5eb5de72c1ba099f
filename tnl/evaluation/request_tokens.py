"""Texts of requests to token ids as lm-eval's ``hf`` adapter makes them, but each text once and many at a time."""

from collections.abc import Iterable, Sequence

import numpy as np
from lm_eval.models.utils import has_bos_prefix

from tnl.errors import ConfigError, DataError

# Texts that are tokenized at a time: enough for all cores, few enough that their lists stay small beside the arrays.
BATCH = 2048


class RequestTokens:
    """Tokenizes the texts of requests.

    Args:
        tokenizer: of transformers.
        add_bos_token: whether special tokens are added to a text; None leaves that to the tokenizer. Never to one that
            begins with that token already.
        split_special_tokens: whether names of special tokens inside a text are text; None leaves that to the tokenizer.
            A chat template writes special tokens: give False with one.
    """

    def __init__(self, tokenizer, add_bos_token: bool | None = None, split_special_tokens: bool | None = None):
        self.tokenizer, self._add_bos_token = tokenizer, add_bos_token
        # A text beyond the tokenizer's own limit is no problem, and not worth a warning.
        self._options = {"return_attention_mask": False, "verbose": False}
        if split_special_tokens is not None:
            self._options["split_special_tokens"] = split_special_tokens

    @property
    def prefix_id(self) -> int:
        """The token before a text that nothing stands before.

        Raises:
            ConfigError: the tokenizer has none that could.
        """
        tokenizer = self.tokenizer
        found = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if found is None:
            raise ConfigError(
                "the tokenizer has neither bos_token nor eos_token, one of which must stand before the first token "
                "that is scored; set one in its tokenizer_config.json"
            )
        return found

    def encode(self, texts: Iterable[str], add_special_tokens: bool | None = None) -> dict[str, np.ndarray]:
        """Ids int64 [T] of each different text; ``add_special_tokens`` None as described above."""
        return self._encode(texts, add_special_tokens, self.tokenizer.decode(self.prefix_id))

    def encode_prompts(self, texts: Iterable[str]) -> dict[str, np.ndarray]:
        """Ids int64 [T] of each different text to be continued."""
        return self._encode(texts, None, self.tokenizer.bos_token)

    def _encode(self, texts: Iterable[str], add_special_tokens: bool | None, bos: str | None) -> dict[str, np.ndarray]:
        groups: dict[bool | None, list[str]] = {}
        for text in dict.fromkeys(texts):
            add = self._add_bos_token if add_special_tokens is None else add_special_tokens
            if add_special_tokens is None and has_bos_prefix(text, bos):
                add = False
            groups.setdefault(add, []).append(text)
        found = {}
        for add, group in groups.items():
            options = self._options if add is None else self._options | {"add_special_tokens": add}
            for start in range(0, len(group), BATCH):
                part = group[start : start + BATCH]
                encoded = self.tokenizer(part, **options)["input_ids"]
                found.update((text, np.array(ids, dtype=np.int64)) for text, ids in zip(part, encoded, strict=True))
        return found

    def encode_pairs(
        self, pairs: Sequence[tuple[str, str]], names: Sequence[str]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids of (context, continuation) pairs, int64 [C] and [T].

        Whitespace at the end of a context belongs to the continuation, whose ids are those of the whole text behind as
        many as the context alone has. Where nothing stands before the continuation, `prefix_id` does.

        Args:
            names: of the requests, for errors.

        Raises:
            DataError: a continuation without tokens.
        """
        moved = []
        for context, continuation in pairs:
            kept = context.rstrip()
            moved.append((kept, context[len(kept) :] + continuation))
        contexts = self.encode(context for (given, _), (context, _) in zip(pairs, moved, strict=True) if given)
        alone = self.encode(
            (text for (context, _), (_, text) in zip(pairs, moved, strict=True) if not context),
            add_special_tokens=False,
        )
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for start in range(0, len(pairs), BATCH):
            part = range(start, min(start + BATCH, len(pairs)))
            wholes = self.encode("".join(moved[i]) for i in part if pairs[i][0])
            for i in part:
                context, continuation = moved[i]
                if not pairs[i][0]:
                    ids, before = alone[continuation], np.array([self.prefix_id])
                    if len(ids) and ids[0] == self.prefix_id:
                        before, ids = ids[:1], ids[1:]
                else:
                    before = contexts[context]
                    ids = wholes[context + continuation][len(before) :].copy()
                    before = before if len(before) else np.array([self.prefix_id])
                if not len(ids):
                    raise DataError(
                        f"{names[i]}: the continuation {continuation[:40]!r} has no tokens of its own behind the "
                        "context, so that there is nothing to score; correct the task's data"
                    )
                found.append((before, ids))
        return found
