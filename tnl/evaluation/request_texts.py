"""Generations for requests: their settings, and the texts that continue their prompts, shared beginnings read once."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from tnl.errors import DataError
from tnl.evaluation.batch_generation import GenerationSettings, depends_on_prompt, generate_batch
from tnl.evaluation.prefix_reader import PrefixReader
from tnl.evaluation.prefix_tree import Read, sort_key
from tnl.model.state import TransnormerState

DEFAULT_NEW_TOKENS = 256  # as lm-eval's own adapters have it
SAMPLING = ("temperature", "top_k", "top_p", "min_p")
DEFAULT_TOP_K = 50  # of transformers' ``generate``
# Of its other arguments, those that mean the same in every batch; it passes over some in silence.
OPTIONS = {"repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "suppress_tokens"}
OPTIONS |= {"begin_suppress_tokens", "min_new_tokens"}
# Ids from here on stand for the last token of a prompt: no two prompts share it.
UNSHARED = 2**31


def generation_settings(request: Instance, eos: str | None, name: str) -> GenerationSettings:
    """The generation arguments of a request of lm-eval.

    Args:
        eos: text of the end token.
        name: of the request, for errors.

    Raises:
        DataError: nothing to generate, or arguments that are not supported.
    """
    arguments = normalize_gen_kwargs(request.args[1], DEFAULT_NEW_TOKENS)
    until = handle_stop_sequences(arguments.pop("until"), eos)
    new_tokens, is_sampled = arguments.pop("max_gen_toks"), arguments.pop("do_sample")
    sampling = {key: arguments.pop(key, None) for key in SAMPLING}
    if new_tokens < 1:
        raise DataError(f"{name}: asks for {new_tokens} new tokens; give max_gen_toks of 1 or more")
    if is_sampled and not sampling["temperature"]:
        raise DataError(f"{name}: do_sample with a temperature of 0; give one above 0, or leave do_sample out")
    if arguments.get("num_beams") == 1:
        del arguments["num_beams"]
    unsupported = sorted(arguments.keys() - OPTIONS)
    if unsupported:
        raise DataError(
            f"{name}: its generation_kwargs have {', '.join(unsupported)}, not supported here; supported beside until, "
            f"max_gen_toks, do_sample, {', '.join(SAMPLING)}: {', '.join(sorted(OPTIONS))}"
        )
    if is_sampled and sampling["top_k"] is None:
        sampling["top_k"] = DEFAULT_TOP_K
    return GenerationSettings(new_tokens, tuple(until), sampling if is_sampled else None, arguments)


def unshared(prompt: np.ndarray, index: int) -> np.ndarray:
    """``prompt`` int64 [T] with its last token as no other prompt has it.

    That token belongs to the step that generates, whose logits are not kept with a state.
    """
    return np.append(prompt[:-1], UNSHARED + index)


class RequestTexts:
    """Continues prompts of equal settings.

    Args:
        digests: of the requests, by index, from which samples are drawn.
        names: of the requests, by index, for errors.
        finished: called after each batch with the texts and the numbers of tokens that it made, by index.
    """

    def __init__(
        self,
        model,
        tokenizer,
        settings: GenerationSettings,
        digests: Sequence[str],
        names: Sequence[str],
        finished: Callable[[dict[int, str], dict[int, int]], None],
    ) -> None:
        self._model, self._tokenizer, self._settings = model, tokenizer, settings
        self._digests, self._names, self._finished = digests, names, finished

    def compute(self, reader: PrefixReader, prompts: dict[int, np.ndarray]) -> None:
        """Continue ``prompts``, int64 [T] with at least one token each, by index.

        Raises:
            NonFiniteError: logits are not finite.
        """

        def generate(reads: list[Read], state: TransnormerState | None) -> None:
            indices = [int(read.ids[-1]) - UNSHARED for read in reads]
            if state is not None:
                state = state.continued(torch.tensor([read.source for read in reads]))
            made = generate_batch(
                self._model,
                self._tokenizer,
                [prompts[i][read.start :].tolist() for i, read in zip(indices, reads, strict=True)],
                state,
                self._settings,
                [int(self._digests[i][:15], 16) for i in indices],
                [self._names[i] for i in indices],
                reader.batch_tokens,
            )
            texts = {
                i: postprocess_generated_text(
                    self._tokenizer.decode(ids, skip_special_tokens=True), list(self._settings.until), None
                )
                for i, ids in zip(indices, made, strict=True)
            }
            self._finished(texts, dict(zip(indices, map(len, made), strict=True)))

        shares = not depends_on_prompt(self._model, self._settings)
        sequences = sorted((unshared(ids, i) for i, ids in prompts.items()), key=sort_key)
        reader.run(sequences, on_leaves=generate, shares=shares)
