"""Continuing a prompt: prefill once, then one recurrent step per token."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import StoppingCriteriaList

from tnl.errors import CheckpointError, ConfigError
from tnl.generation.options import GenerationOptions, check_text
from tnl.generation.text_stream import TextStream
from tnl.model.state import TransnormerState

# Key of a saved state's notes: ids, as JSON, that belong to its text and that the model has not read.
UNREAD = "unread"


@dataclass(frozen=True)
class Continuation:
    """Tokens that were generated, and their text without special tokens.

    Attributes:
        stopped: whether a text to stop at ended it; that one is in ``ids`` and not in ``text``.
    """

    ids: list[int]
    text: str
    stopped: bool


def prompt_ids(tokenizer, prompt: str, unread: list[int] | None = None) -> list[int]:
    """Ids of a prompt; of one that continues a state, behind the ids which that has not read.

    Raises:
        ConfigError: no text, or no tokens.
    """
    check_text("prompt", prompt)
    ids = list(tokenizer(prompt).input_ids if unread is None else tokenizer(prompt, add_special_tokens=False).input_ids)
    ids = (unread or []) + ids
    if not ids:
        raise ConfigError("prompt: is empty, and this tokenizer adds no beginning-of-text token; give some text")
    return ids


def empty_state(model) -> TransnormerState | None:
    """The state of a model that has read nothing; None for a LLaMA, whose cache is made and dropped by `generate()`."""
    return TransnormerState() if model.config.model_type == "transnormer" else None


def read_ids(model, ids: list[int], state: TransnormerState) -> None:
    """Let ``state`` read ``ids``, in constant memory."""
    if ids:
        # The token that this makes is not read.
        _generate(model, ids, state, max_new_tokens=1, do_sample=False)


def continue_text(
    model,
    tokenizer,
    ids: list[int],
    state: TransnormerState | None,
    options: GenerationOptions,
    on_text: Callable[[str], None] = lambda text: None,
    interrupted: Callable[[], bool] = lambda: False,
) -> Continuation:
    """Read ``ids`` behind what ``state`` has read, and generate.

    Args:
        state: of one sequence. Afterwards it has read ``ids`` and all generated tokens but the last; with beams it
            stays as it was. None as in `empty_state`.
        on_text: called with each piece of text as soon as it is complete.
        interrupted: asked after each token whether to stop.
    """
    pieces: list[str] = []

    def give_out(text: str) -> None:
        pieces.append(text)
        on_text(text)

    stream = TextStream(tokenizer, len(ids), give_out, options.stop, interrupted)
    if options.num_beams > 1 and state is not None:
        state = state.fork()
        state.batch_repeat_interleave(options.num_beams)
    # A generation does not disturb, or depend on, the random state of its caller.
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(options.seed)
        new = _generate(
            model,
            ids,
            state,
            pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=StoppingCriteriaList([stream] if options.num_beams == 1 else []),
            **options.arguments(),
        )
    if options.num_beams > 1:
        for i in range(len(ids), len(ids) + len(new)):
            stream(torch.tensor([(ids + new)[: i + 1]]), None)
    stream.finish()
    return Continuation(new, "".join(pieces), stream.stopped)


def _generate(model, ids: list[int], state: TransnormerState | None, **arguments) -> list[int]:
    """Ids that ``model.generate`` puts behind ``ids``."""
    inputs = torch.tensor([ids], device=model.device)
    num_read = 0 if state is None else state.length
    mask = torch.ones(1, num_read + len(ids), dtype=torch.int64, device=model.device)
    output = model.generate(inputs, attention_mask=mask, past_key_values=state, **arguments)
    return output[0, len(ids) :].tolist()


def generate_text(
    model, tokenizer, prompt: str, *, on_text: Callable[[str], None] = lambda text: None, **options
) -> str:
    """The continuation of ``prompt``, without it.

    Args:
        on_text: called with each piece of text as soon as it is complete.
        options: see `GenerationOptions`.

    Raises:
        ConfigError: see `GenerationOptions` and `prompt_ids`.
    """
    chosen = GenerationOptions(**options)
    return continue_text(model, tokenizer, prompt_ids(tokenizer, prompt), empty_state(model), chosen, on_text).text


def load_state(file: str | Path, model) -> tuple[TransnormerState, list[int]]:
    """A saved state of one sequence, and the ids that belong to its text and that it has not read.

    Raises:
        CheckpointError: the file cannot be read as one of this model.
    """
    try:
        state = TransnormerState.load(file, model)
        unread = json.loads(state.notes.get(UNREAD, "[]"))
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror or error}; give a file that --save-state wrote") from None
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if len(state.positions) != 1:
        raise CheckpointError(f"{file}: holds {len(state.positions)} sequences; save the state of one")
    return state, unread
