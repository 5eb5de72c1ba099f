"""``tnl generate``: a prompt from the command line or a file, behind a saved state or not."""

import json
import sys
from pathlib import Path

from tnl.errors import ConfigError
from tnl.generation.generate import UNREAD, continue_text, empty_state, load_state, prompt_ids, read_ids
from tnl.generation.load import load_model
from tnl.generation.options import GenerationOptions, check_text
from tnl.model.state import state_bytes


def read_prompt(prompt: str | None, prompt_file: Path | None, continues: bool) -> str:
    """The text to continue.

    Args:
        continues: whether it continues a state, behind which nothing is a prompt, too.

    Raises:
        ConfigError: none or two were given, or a file that is no text.
    """
    if prompt is not None and prompt_file is not None:
        raise ConfigError("prompt: given twice, as --prompt and as --prompt-file; leave one out")
    if prompt_file is not None:
        try:
            return prompt_file.expanduser().read_bytes().decode("utf-8")
        except OSError as error:
            raise ConfigError(f"{prompt_file}: {error.strerror}; correct --prompt-file") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{prompt_file}: not UTF-8 at byte {error.start}; convert it") from None
    if prompt is None and not continues:
        raise ConfigError("prompt: missing; give --prompt, --prompt-file or --load-state")
    check_text("prompt", prompt or "")
    return prompt or ""


def check_folder_of(file: Path | None) -> None:
    """Raise `ConfigError` if ``file`` has no folder to be written in, or is one itself."""
    if file is not None and file.expanduser().is_dir():
        raise ConfigError(f"{file}: is a folder; name a file")
    if file is not None and not file.expanduser().parent.is_dir():
        raise ConfigError(f"{file}: {file.parent} is no folder; make it first")


def size_of_state(model) -> str:
    """What a user reads about the memory of one sequence's state."""
    return f"state: {state_bytes(model.config) / 2**20:.2f} MiB, which does not grow"


def generate(
    folder: str,
    text: str,
    options: GenerationOptions | None,
    *,
    echo: bool,
    load_from: Path | None = None,
    save_to: Path | None = None,
) -> None:
    """Print the continuation of ``text`` as it comes.

    Args:
        folder: model folder or hub name, of a LLaMA baseline, too, which has no state to load or to save.
        options: None reads the prompt and generates nothing.
        echo: print ``text`` before its continuation.
        load_from: the state of the text before.
        save_to: where to write the state after ``text`` and before its continuation.

    Raises:
        ConfigError, CheckpointError: the model, the prompt or the state cannot be read.
    """
    from transformers import LlamaForCausalLM

    model, tokenizer = load_model(folder, llama=LlamaForCausalLM)
    state, unread = empty_state(model), None
    if state is None and (load_from is not None or save_to is not None):
        raise ConfigError(f"{folder}: a LLaMA has no state of constant size; leave out --save-state and --load-state")
    if load_from is not None:
        state, unread = load_state(load_from.expanduser(), model)
    ids = prompt_ids(tokenizer, text, unread)
    behind = f" behind the {state.length:,} of the state" if state is not None and state.length else ""
    memory = "a LLaMA, whose cache grows" if state is None else size_of_state(model)
    print(f"prompt: {len(ids):,} tokens{behind}; {memory}", file=sys.stderr)
    if save_to is not None:
        # The last token stays unread: with it, an empty prompt continues the state, too.
        read_ids(model, ids[:-1], state)
        if state.layers is None:
            raise ConfigError("prompt: a state to save needs two tokens or more; give more text")
        ids = ids[-1:]
        state.notes = {UNREAD: json.dumps(ids)}
        state.save(save_to.expanduser(), model)
    if options is None:
        return
    print(text if echo else "", end="", flush=True)
    continue_text(model, tokenizer, ids, state, options, lambda piece: print(piece, end="", flush=True))
    print()
