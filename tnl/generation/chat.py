"""``tnl chat``: a conversation at the terminal, or of the lines of a file."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from tnl.errors import ConfigError, UserError
from tnl.generation.command import check_folder_of, size_of_state
from tnl.generation.conversation import Conversation
from tnl.generation.load import load_model
from tnl.generation.options import GenerationOptions

COMMANDS = {
    "/reset": "forget the conversation",
    "/save FILE": "write the conversation and its state",
    "/load FILE": "go on with a saved conversation",
    "/help": "this list",
    "/exit": "end, as does the end of the input",
}


def chat(folder: str, options: GenerationOptions, system: str | None = None) -> None:
    """Answer each line of the standard input on the standard output, until it ends.

    At a terminal a mistake is reported and the conversation goes on, and the interrupt key stops an answer; otherwise
    both end the program.

    Args:
        folder: model folder or hub name.

    Raises:
        UserError: the model cannot be loaded; not at a terminal, also a command that fails.
    """
    model, tokenizer = load_model(folder)
    conversation = Conversation(model, tokenizer, options, system, report=_note)
    form = "its own chat template" if conversation.has_template else "a plain form, the tokenizer has no chat template"
    _note(f"{folder}: {size_of_state(model)}; {form}; /help lists commands")
    interactive = sys.stdin.isatty()
    for line in _lines("> " if interactive else ""):
        try:
            if line.startswith("/"):
                if not run_command(conversation, line):
                    return
            elif line.strip():
                with _interrupt_key() if interactive else nullcontext(lambda: False) as interrupted:
                    conversation.ask(line, lambda text: print(text, end="", flush=True), interrupted)
                print()
        except (UserError, OSError) as error:
            if not interactive:
                raise
            _note(f"error: {error}")


def run_command(conversation: Conversation, line: str) -> bool:
    """Do what a line that begins with a slash asks for; False ends the conversation.

    Raises:
        UserError: there is no such command, or it fails.
    """
    name, _, rest = line.strip().partition(" ")
    usage = next((usage for usage in COMMANDS if usage.split()[0] == name), None)
    if usage is None or bool(rest.strip()) != usage.endswith(" FILE"):
        raise ConfigError(f"{line.strip()}: no such command; known: {', '.join(COMMANDS)}")
    try:
        file = Path(rest.strip()).expanduser()
    except RuntimeError:
        raise ConfigError(f"{rest.strip()}: there is no such user; give another path") from None
    if name == "/exit":
        return False
    if name == "/help":
        for known, what in COMMANDS.items():
            _note(f"{known:12} {what}")
    elif name == "/reset":
        conversation.reset()
        _note("the conversation is forgotten")
    elif name == "/save":
        check_folder_of(file)
        conversation.save(file)
        _note(f"{file}: saved after {conversation.state.length:,} tokens")
    elif name == "/load":
        conversation.load(file)
        _note(f"{file}: loaded, after {conversation.state.length:,} tokens")
    return True


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _lines(prompt: str) -> Iterator[str]:
    """Lines of the standard input until it ends."""
    while True:
        try:
            line = input(prompt)
        except EOFError:
            if prompt:
                print()
            return
        except UnicodeDecodeError as error:
            raise ConfigError(f"standard input: not UTF-8 at byte {error.start} of what was read") from None
        yield line


@contextmanager
def _interrupt_key() -> Iterator[Callable[[], bool]]:
    """Whether the interrupt key was pressed, instead of ending the program between two layers of a state; a second
    time does."""
    pressed = []

    def handle(number, frame):
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, previous)
