"""Generation for a batch of prompts that end at texts of their own, with samples that do not depend on the batch."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tnl.errors import NonFiniteError
from tnl.generation.text_stream import INCOMPLETE
from tnl.model.state import TransnormerState

# Tokens beyond the bytes of a stop text in which it is looked for: those without any text lie between, too.
SPARE_TOKENS = 8


@dataclass(frozen=True)
class GenerationSettings:
    """How the requests of a batch are continued.

    Attributes:
        until: texts that end a generation; neither they nor what follows are part of it.
        sampling: temperature, top_k, top_p and min_p; None takes the most likely token.
        options: further arguments of transformers' ``generate``.
    """

    max_new_tokens: int
    until: tuple[str, ...] = ()
    sampling: dict[str, float] | None = None
    options: dict = field(default_factory=dict)


class StopTexts(StoppingCriteria):
    """Sees every token of a batch and ends each row at its own end token or stop text.

    A stop text that is not noticed costs tokens and changes no text, which is cut at it in any case.

    Attributes:
        ids: the tokens of each row so far, up to its end and without its end token.
    """

    def __init__(self, tokenizer, num_rows: int, until: Sequence[str], eos_ids: frozenset[int]):
        self._tokenizer, self._eos_ids = tokenizer, eos_ids
        # An end token is known by its id; its name as text hardly ever comes, and its letters always do.
        names = {tokenizer.decode([i]) for i in eos_ids}
        self._until = [text for text in until if text and text not in names]
        self._window = max((len(text.encode()) for text in self._until), default=0) + SPARE_TOKENS
        self._can_end: dict[int, bool] = {}
        self._ended = [False] * num_rows
        self.ids: list[list[int]] = [[] for _ in range(num_rows)]

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        """input_ids int64 [N, T] with one new token at the end -> bool [N], which rows have ended."""
        for i, token in enumerate(input_ids[:, -1].tolist()):
            if self._ended[i]:
                continue
            if token in self._eos_ids:
                self._ended[i] = True
                continue
            self.ids[i].append(token)
            # Tokens decode together: what the last ones seem to hold counts if the whole holds it.
            self._ended[i] = (
                self._can_end_text(token) and self._stops(self.ids[i][-self._window :]) and self._stops(self.ids[i])
            )
        return torch.tensor(self._ended, device=input_ids.device)

    def _can_end_text(self, token: int) -> bool:
        """Whether the last character of a stop text may come from this token: decoding for every row would take as long
        as the step."""
        if token not in self._can_end:
            text = self._tokenizer.decode([token])
            # A part of a character, or a space that is not shown at the beginning.
            is_open = not text or INCOMPLETE in text
            self._can_end[token] = any(is_open or stop[-1] in text or stop[-1].isspace() for stop in self._until)
        return self._can_end[token]

    def _stops(self, ids: list[int]) -> bool:
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        return any(stop in text for stop in self._until)


class FiniteLogits(LogitsProcessor):
    """Notices rows without a highest logit, whose argmax would be a token all the same; waits for nothing.

    Attributes:
        is_wrong: bool [N], by row.
    """

    def __init__(self, num_rows: int, device: torch.device):
        self.is_wrong = torch.zeros(num_rows, dtype=torch.bool, device=device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """scores [N, vocabulary], unchanged; a token that must not come has -inf there."""
        self.is_wrong |= ~scores.amax(1).isfinite()
        return scores


class RowNoise(LogitsProcessor):
    """Gumbel noise, whose argmax is a sample of the softmax; each row draws from a generator of its own."""

    def __init__(self, seeds: Sequence[int], device: torch.device):
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """scores [N, vocabulary] -> the same with noise."""
        rows = [
            torch.empty(scores.shape[1], device=scores.device).exponential_(generator=generator)
            for generator in self._generators
        ]
        return scores - torch.stack(rows).log()


def end_tokens(model, tokenizer) -> frozenset[int]:
    """Ids that end a text: the tokenizer's, and those of the model's generation configuration."""
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in (*configured, tokenizer.eos_token_id) if i is not None)


def depends_on_prompt(model, settings: GenerationSettings) -> bool:
    """Whether a choice of tokens looks at those of the prompt, all of which must then be given."""
    config = model.generation_config
    return bool(
        settings.options
        or config.repetition_penalty not in (None, 1.0)
        or config.no_repeat_ngram_size
        or config.bad_words_ids
        or config.sequence_bias
        or config.min_length
    )


def generate_batch(
    model,
    tokenizer,
    prompts: Sequence[list[int]],
    state: TransnormerState | None,
    settings: GenerationSettings,
    seeds: Sequence[int],
    names: Sequence[str],
    batch_tokens: int,
) -> list[list[int]]:
    """Token ids that continue each prompt, up to its end and without an end token.

    Args:
        prompts: what is read behind ``state``, at least one token each.
        state: of as many sequences, and used up; None begins with the prompts.
        seeds: of each row's samples.
        names: of each row's request, for errors.
        batch_tokens: that a forward pass reads at most.

    Raises:
        NonFiniteError: logits are not finite.
    """
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    state = TransnormerState() if state is None else state
    state.length = 0  # the columns of packed sequences are not those of this batch
    eos_ids = end_tokens(model, tokenizer)
    stop = StopTexts(tokenizer, len(prompts), settings.until, eos_ids)
    finite = FiniteLogits(len(prompts), model.device)
    model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        past_key_values=state,
        max_new_tokens=settings.max_new_tokens,
        num_beams=1,
        do_sample=False,  # the samples are the argmax of the noisy logits
        logits_processor=LogitsProcessorList([finite, *_sampler(settings.sampling, seeds, model.device)]),
        stopping_criteria=StoppingCriteriaList([stop]),
        pad_token_id=tokenizer.pad_token_id or 0,
        prefill_chunk_size=max(1, batch_tokens // len(prompts)),
        **({"eos_token_id": sorted(eos_ids)} if eos_ids else {}),
        **settings.options,
    )
    wrong = finite.is_wrong.nonzero().flatten().tolist()
    if wrong:
        raise NonFiniteError(
            f"{names[wrong[0]]}: its logits are not finite; the weights are not finite or the dtype is too narrow for "
            "them: evaluate in float32, or another checkpoint"
        )
    return stop.ids


def _sampler(sampling: dict[str, float] | None, seeds: Sequence[int], device: torch.device) -> list[LogitsProcessor]:
    if sampling is None:
        return []
    kinds = {
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    warpers = [kind(sampling[name]) for name, kind in kinds.items() if sampling.get(name)]
    return [*warpers, RowNoise(seeds, device)]
