"""Requests of random token ids in the shapes of benchmarks, to measure adapters with."""

from dataclasses import dataclass

import numpy as np

# As lm-eval hands ids to an adapter: (context, continuation) as text, ids of the context, ids of the continuation.
IdRequest = tuple[tuple[str, str], list[int], list[int]]
FIRST_ID = 3  # behind the special ones


@dataclass(frozen=True)
class ChoiceShape:
    """Questions with choices, in groups that share what stands before the questions; sizes in tokens.

    Attributes:
        groups: subjects of MMLU; each with a few-shot prefix of its own.
        questions: of a group.
        choice: length of each choice.
    """

    groups: int
    questions: int
    prefix: int
    question: int
    choices: int
    choice: int

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that is read."""
        return self.prefix + self.question + self.choice - 1

    def requests(self, vocab_size: int, seed: int = 0) -> list[IdRequest]:
        """All choices of all questions of all groups, in this order; the choices of a question differ in every token,
        unless the vocabulary is too small for that."""
        draw = np.random.default_rng(seed)

        def ids(*shape: int) -> np.ndarray:
            return draw.integers(FIRST_ID, vocab_size, shape)

        found = []
        for _ in range(self.groups):
            prefix = ids(self.prefix).tolist()
            for _ in range(self.questions):
                context = prefix + ids(self.question).tolist()
                firsts = draw.choice(np.arange(FIRST_ID, vocab_size), self.choices, replace=False)
                for first in firsts.tolist():
                    found.append((("", ""), context, [first, *ids(self.choice - 1).tolist()]))
        return found


def document_request(num_tokens: int, vocab_size: int, seed: int = 0) -> IdRequest:
    """One text of ``num_tokens`` tokens, all of which are scored, behind a token that begins it."""
    ids = np.random.default_rng(seed).integers(FIRST_ID, vocab_size, num_tokens).tolist()
    return ("", ""), [FIRST_ID - 2], ids
