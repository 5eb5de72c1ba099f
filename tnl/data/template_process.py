"""Rendering of other people's templates: in a process of its own, which is ended when it takes too long.

transformers' sandbox keeps a template from Python's internals, but not from computing for ever or filling the memory.
"""

import json
import multiprocessing
import resource
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import tnl
from tnl.data.chat_template import ChatTemplate, RenderedDialogue, render_dialogue
from tnl.errors import ConfigError

# Seconds for one request, of some dialogues; a template takes less than a millisecond for each.
TIMEOUT_S = 20.0
# Until the process has imported transformers, on a busy machine.
_START_TIMEOUT_S = 300.0
_MAX_MEMORY_BYTES = 2**30
_SHOWN_CHARACTERS = 300


class TemplateRenderer:
    """Renders dialogues by one template; to be closed, as by ``with``.

    A template of ours is rendered in this process, any other in one that has ``timeout_s`` for each call of `render`
    and 1 GiB of memory beyond what it begins with.
    """

    def __init__(self, template: ChatTemplate, timeout_s: float = TIMEOUT_S) -> None:
        self._template, self._timeout_s = template, timeout_s
        self._process: multiprocessing.Process | None = None

    def __enter__(self) -> "TemplateRenderer":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None

    def render(self, dialogues: list[list[dict[str, str]]], places: list[str]) -> list[RenderedDialogue]:
        """The text of each of ``dialogues``, lists of messages; ``places`` say where they come from.

        Raises:
            ConfigError: the template fails, takes too long, or does not let itself be trained on.
        """
        if self._template.is_ours:
            return [
                render_dialogue(self._template.text, messages, self._template.special_tokens) for messages in dialogues
            ]
        if self._process is None:
            self._start()
        self._connection.send_bytes(json.dumps(dialogues).encode())
        answer = self._receive(self._timeout_s, places[0])
        if "error" in answer:
            raise self._refusal(answer["error"], places[answer["index"]])
        return [RenderedDialogue(text, [tuple(span) for span in spans]) for text, spans in answer["rendered"]]

    def _start(self) -> None:
        # Spawned, not forked: threads and a GPU that this process may have do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        process = context.Process(
            target=_serve, args=(theirs, self._template.text, self._template.special_tokens), daemon=True
        )
        with theirs:
            process.start()
        self._process = process  # one that did not start could not be ended
        self._receive(_START_TIMEOUT_S, "the start")

    def _receive(self, timeout_s: float, place: str) -> dict:
        try:
            if not self._connection.poll(timeout_s):
                self.close()
                raise self._refusal(f"does not end within {timeout_s:g} s; look for a loop in it", place)
            return json.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionError):
            self.close()
            raise self._refusal("ended the process that renders it; look for what it multiplies", place) from None

    def _refusal(self, what: str, place: str) -> ConfigError:
        return ConfigError(
            f"data.template: {self._template.name}: {what} (at {place}); correct or replace the template"
        )


def _serve(connection: Connection, template: str, tokens: dict[str, str]) -> None:
    """Answer requests until the other side hangs up."""
    # Our model classes are not needed here: to register them with transformers would import torch, which takes seconds.
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, tnl.TransformersFinder)]
    # What takes long is done before the clock runs and before memory is bounded.
    import transformers.utils.chat_template_utils  # noqa: F401

    statm = Path("/proc/self/statm")
    if statm.exists():  # Linux
        size = int(statm.read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = size + _MAX_MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    connection.send_bytes(b"{}")
    while True:
        try:
            dialogues = json.loads(connection.recv_bytes())
        except EOFError:
            return
        rendered, answer = [], None
        for i, messages in enumerate(dialogues):
            # A template is a program of others, and may fail in every way that an expression can.
            try:
                done = render_dialogue(template, messages, tokens)
            except Exception as error:
                what = str(error) or type(error).__name__
                if isinstance(error, MemoryError):
                    what = "needs more than 1 GiB of memory"
                answer = {"error": what[:_SHOWN_CHARACTERS], "index": i}
                break
            rendered.append((done.text, done.answers))
        connection.send_bytes(json.dumps(answer or {"rendered": rendered}).encode())
