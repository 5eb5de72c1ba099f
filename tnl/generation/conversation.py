"""A conversation that keeps the model's state: each turn costs its own tokens, however long the conversation is."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from tnl.data.chat_template import reference_prompt
from tnl.errors import CheckpointError, ConfigError
from tnl.generation.generate import UNREAD, continue_text, load_state
from tnl.generation.options import GenerationOptions, check_text
from tnl.generation.text_stream import text_after
from tnl.model.state import TransnormerState

# Key of a saved state's notes: the conversation, as JSON.
CHAT = "chat"
# Where a model without a chat template begins to write the user's next line.
PLAIN_STOP = "\nHuman:"


class Conversation:
    """Turns of a user and the model.

    The text of the whole conversation is rendered for each turn, by the tokenizer's chat template (in transformers'
    sandbox) or by `reference_prompt`. The model reads only what that adds to the text that its state has read. Where a
    template changes earlier turns, so that it adds to no text, the conversation is read again from the beginning, and
    ``report`` is told.

    Args:
        system: instruction that stands before the conversation.
        report: called with what the user should know, one line each.
    """

    def __init__(
        self,
        model,
        tokenizer,
        options: GenerationOptions,
        system: str | None = None,
        report: Callable[[str], None] = lambda line: None,
    ):
        if system is not None:
            check_text("system", system)
        self.model, self.tokenizer, self.report = model, tokenizer, report
        self.has_template = bool(tokenizer.chat_template)
        self.options = options
        if not self.has_template:
            self.options = dataclasses.replace(options, stop=(*options.stop, PLAIN_STOP))
        self.system = system
        self.reset()

    def reset(self) -> None:
        """Begin anew, after the same system message."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.state = TransnormerState()
        # Text that the state has read; the last generated token if that was left unread; the text with it.
        self.read, self.unread, self.read_with_unread = "", [], ""

    def ask(
        self,
        text: str,
        on_text: Callable[[str], None] = lambda text: None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> str:
        """The model's answer to ``text``; both become part of the conversation.

        Args:
            on_text: called with each piece of the answer as soon as it is complete.
            interrupted: asked after each token whether to end the answer here.

        Raises:
            ConfigError: no text, or the chat template refuses it.
        """
        check_text("message", text)
        messages = [*self.messages, {"role": "user", "content": text}]
        rendered = self._render(messages)
        ids = self._new_ids(rendered)
        if not ids:
            raise ConfigError("the tokenizer's chat template writes nothing for this message; correct the template")
        # Whatever ends the answer with an error, the state is in the middle of it: the next turn then reads all again.
        state, self.state, self.read = self.state, TransnormerState(), ""
        # Each turn draws its own numbers.
        options = dataclasses.replace(self.options, seed=(self.options.seed + len(messages)) % 2**63)
        answer = continue_text(self.model, self.tokenizer, ids, state, options, on_text, interrupted)
        self.state = state
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        # The state has read all tokens but the last.
        self.read = self.read_with_unread = rendered + answer.text
        self.unread = answer.ids[-1:]
        if answer.stopped:
            # The last token ends the stop text, and maybe more than that: the next turn writes it anew.
            self.read = self.read_with_unread = rendered + text_after(self.tokenizer, ids, answer.ids[:-1])
            self.unread = []
        elif self.unread[0] in self.tokenizer.all_special_ids:
            # The end of an answer, which a template may write or not.
            self.read_with_unread += self.tokenizer.decode(self.unread)
        return answer.text

    def save(self, file: Path) -> None:
        """Write the conversation and its state.

        Raises:
            ConfigError: nothing was said yet.
            OSError: the disk refused.
        """
        if self.state.layers is None:
            raise ConfigError(f"{file}: nothing was said yet; ask something before you save")
        chat = {"messages": self.messages, "read": self.read, "read_with_unread": self.read_with_unread}
        self.state.notes = {UNREAD: json.dumps(self.unread), CHAT: json.dumps(chat)}
        self.state.save(file, self.model)

    def load(self, file: Path) -> None:
        """Go on with what `save` wrote, its system message included; the conversation before is forgotten.

        Raises:
            CheckpointError: the file is no conversation with this model.
        """
        state, unread = load_state(file, self.model)
        if CHAT not in state.notes:
            raise CheckpointError(f"{file}: a state without a conversation; give a file that tnl chat saved")
        chat = json.loads(state.notes[CHAT])
        self.state, self.unread, self.messages = state, unread, chat["messages"]
        self.read, self.read_with_unread = chat["read"], chat["read_with_unread"]

    def _render(self, messages: list[dict[str, str]]) -> str:
        if not self.has_template:
            return reference_prompt(messages)
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # A template is a program of others, and may fail in every way that an expression can.
        except Exception as error:
            raise ConfigError(f"the tokenizer's chat template refuses this conversation: {error}") from None

    def _new_ids(self, rendered: str) -> list[int]:
        """What the model has to read for ``rendered``; the state is emptied where it does not go on from there."""
        if self.read:
            for read, unread in ((self.read_with_unread, self.unread), (self.read, [])):
                if rendered.startswith(read):
                    return unread + self._ids_behind(read, rendered)
            self.report("the chat template changes earlier turns: the whole conversation is read again")
            self.state, self.read = TransnormerState(), ""
        return self._ids(rendered, first=True)

    def _ids_behind(self, read: str, rendered: str) -> list[int]:
        """Ids of what ``rendered`` adds, as in the whole text where the tokenizer divides that at the same place."""
        before, after = self._ids(read, first=True), self._ids(rendered, first=True)
        if after[: len(before)] == before:
            return after[len(before) :]
        return self._ids(rendered[len(read) :], first=False)

    def _ids(self, text: str, first: bool) -> list[int]:
        if self.has_template:
            # A template writes special tokens, the one for the beginning of the text included.
            return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=False).input_ids)
        return list(self.tokenizer(text, add_special_tokens=first).input_ids)
