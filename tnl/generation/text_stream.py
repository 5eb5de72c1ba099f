"""Tokens to text while they come: complete characters only, and nothing of a text to stop at."""

from collections.abc import Callable

import torch
from transformers import StoppingCriteria

# Tokens before a new one that its text can depend on: a leading space, the first bytes of a character.
CONTEXT_TOKENS = 8
INCOMPLETE = "\ufffd"


def context_of(tokenizer, ids: list[int]) -> list[int]:
    """The last tokens of ``ids`` that the text of a next one can depend on, from the beginning of a character.

    One byte too many before it would make the bytes of all characters up to the next other token invalid.
    """
    tails = (ids[start:] for start in range(max(0, len(ids) - CONTEXT_TOKENS), len(ids)))
    return next((tail for tail in tails if not tokenizer.decode(tail).startswith(INCOMPLETE)), ids[-CONTEXT_TOKENS:])


def text_after(tokenizer, context: list[int], ids: list[int]) -> str:
    """Text that ``ids`` add behind ``context``, special tokens written out."""
    context = context_of(tokenizer, context)
    return tokenizer.decode(context + ids)[len(tokenizer.decode(context)) :]


class TextStream(StoppingCriteria):
    """Sees every token of ``generate`` for one sequence, gives out its text, and ends it at a stop text.

    A stopping criterion and no streamer, because it must also say when to stop.

    Args:
        num_prompt: number of tokens of the prompt.
        on_text: called with each piece of text, which join to the whole; special tokens are left out.
        stop: texts to stop at; neither they nor what follows is given out.
        interrupted: asked after each token whether to stop here.
    """

    def __init__(
        self,
        tokenizer,
        num_prompt: int,
        on_text: Callable[[str], None],
        stop: tuple[str, ...] = (),
        interrupted: Callable[[], bool] = lambda: False,
    ):
        self.tokenizer, self.num_prompt, self.on_text = tokenizer, num_prompt, on_text
        self.stop, self.interrupted = stop, interrupted
        self.ids: list[int] | None = None
        # Text of ids[begin:end] was given out, and is decoded again before what follows.
        self.begin = self.end = 0
        self.held = ""
        self.stopped = False

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        """input_ids int64 [1, T] with one new token at the end -> bool [1], whether to stop."""
        if self.ids is None:
            self.ids = context_of(self.tokenizer, input_ids[0, : self.num_prompt][-CONTEXT_TOKENS:].tolist())
            self.end = len(self.ids)
        self.ids.append(input_ids[0, -1].item())
        text = self._new_text()
        if text and not text.endswith(INCOMPLETE):
            self.begin, self.end = self.end, len(self.ids)
            self._give_out(text)
        stop = self.stopped or self.interrupted()
        return torch.full((len(input_ids),), stop, device=input_ids.device)

    def finish(self) -> None:
        """Give out what was held back."""
        if self.ids is not None and not self.stopped:
            self.held += self._new_text()
            self._give_out("", last=True)

    def _new_text(self) -> str:
        """Text of the tokens whose text was not given out."""
        old = self.tokenizer.decode(self.ids[self.begin : self.end], skip_special_tokens=True)
        return self.tokenizer.decode(self.ids[self.begin :], skip_special_tokens=True)[len(old) :]

    def _give_out(self, text: str, last: bool = False) -> None:
        self.held += text
        found = [place for place in map(self.held.find, self.stop) if place >= 0]
        if found:
            self.stopped = True
            text, self.held = self.held[: min(found)], ""
        else:
            keep = 0 if last else max(map(self._begun, self.stop), default=0)
            text, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        if text:
            self.on_text(text)

    def _begun(self, stop: str) -> int:
        """How many characters at the end may be the beginning of ``stop``."""
        return next(n for n in range(min(len(stop) - 1, len(self.held)), -1, -1) if self.held.endswith(stop[:n]))
