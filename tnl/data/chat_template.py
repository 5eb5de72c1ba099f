"""Chat templates: which one a run uses, and the text of a dialogue with the places that the assistant wrote."""

import re
from dataclasses import dataclass
from pathlib import Path

from tnl.data.records import encodable, show
from tnl.errors import ConfigError

# The text on which the reference tuned its models: a line "Human:", what the user says, a line "Assistant:", the answer
# and the end token; the system's words stand before.
REFERENCE_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{- message['content'] + '\\n' -}}"
    "{%- elif message['role'] == 'user' -%}{{- 'Human:\\n' + message['content'] + '\\n' -}}"
    "{%- else -%}{{- 'Assistant:\\n' + message['content'] + eos_token + '\\n' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Assistant:\\n' -}}{%- endif -%}"
)
# Nothing but the texts, for prompts that say themselves what is to follow.
VERBATIM_TEMPLATE = (
    "{%- for message in messages -%}{{- message['content'] -}}"
    "{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}{%- endfor -%}"
)
_OWN = {"reference": REFERENCE_TEMPLATE, "verbatim": VERBATIM_TEMPLATE}
_BEGIN = "{{- bos_token -}}"
# As runs save it; known, it is rendered without a process of its own.
SAVED_REFERENCE = (REFERENCE_TEMPLATE, _BEGIN + REFERENCE_TEMPLATE)
# Stands before a template that may write the date, and hides what transformers offers for that. The line break belongs
# to the tag and is not written.
_WITHOUT_DATE = (
    "{% macro strftime_now(format) %}{{ raise_exception('it writes the date (strftime_now), so that the data "
    "change every day and no run could go on; write a date out in a copy of it') }}{% endmacro %}\n"
)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for it
_MAX_FILE_BYTES = 2**20


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template, and the special tokens by name that it may write."""

    text: str  # to be saved with the model
    name: str  # how messages call it
    is_ours: bool  # whether it needs no bounds of time and memory
    special_tokens: dict[str, str]


@dataclass(frozen=True)
class RenderedDialogue:
    """The text of a dialogue up to its last answer, and ``[start, end)`` of each answer in it, end token included."""

    text: str
    answers: list[tuple[int, int]]


def choose_template(setting: str, tokenizer) -> ChatTemplate:
    """The template that ``data.template`` names, for a `transformers` tokenizer.

    Raises:
        ConfigError: there is no such file, it is no text, or the tokenizer has no end token.
    """
    if tokenizer.eos_token is None:
        raise ConfigError("the tokenizer has no eos_token, so that no answer could end; set it in its tokenizer_config")
    tokens = {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    if setting == "auto" and tokenizer.chat_template:
        if not isinstance(tokenizer.chat_template, str):
            raise ConfigError("data.template: the tokenizer has several chat templates; name a Jinja file")
        return ChatTemplate(tokenizer.chat_template, "the tokenizer's own template", False, tokens)
    name = "reference" if setting == "auto" else setting
    if name in _OWN:
        # Where the base model's texts began with this token, so does a dialogue.
        begins = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
        return ChatTemplate((_BEGIN if begins else "") + _OWN[name], f"template {name}", True, tokens)
    try:
        with open(setting, "rb") as stream:
            data = stream.read(_MAX_FILE_BYTES + 1)
        text = data.decode("utf-8")
    except OSError as error:
        known = ", ".join(("auto", *_OWN))
        raise ConfigError(
            f"data.template: {show(setting)} cannot be read ({error.strerror}); name a Jinja file, or one of {known}"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"data.template: {setting} is not UTF-8 at byte {error.start}; convert it") from error
    if len(data) > _MAX_FILE_BYTES:
        raise ConfigError(f"data.template: {setting} is larger than {_MAX_FILE_BYTES} bytes; name a Jinja file")
    return ChatTemplate(text, f"template {Path(setting).name}", False, tokens)


def render_dialogue(template: str, messages: list[dict[str, str]], tokens: dict[str, str]) -> RenderedDialogue:
    """The text of ``messages``, rendered in transformers' sandbox, and where its answers are.

    With ``{% generation %}`` marks in the template the answers are what these enclose. Otherwise answer i is what the
    template adds, behind the generation prompt, to the text of the messages before; that text must stay as it was. An
    answer ends with the end token.

    Args:
        template: Jinja.
        tokens: special tokens by name, ``eos_token`` among them.

    Raises:
        ValueError: the template changes earlier turns, leaves out a message, writes no end token behind an answer, or
            writes the date.
        Exception: whatever an expression of the template can raise.
    """
    is_marked = _GENERATION.search(template) is not None
    text, marks = _render(template, messages, tokens, marked=is_marked)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not is_marked:
        marks = [_added_text(template, messages, i, tokens, text) for i in turns]
    elif len(marks) != len(turns):
        raise ValueError(f"it marks {len(marks)} answers with {{% generation %}} in a dialogue that has {len(turns)}")
    asked, start = messages[: turns[-1]], marks[-1][0]
    _check_complete(asked, text[:start])
    if is_marked:
        _check_prompt(template, asked, tokens, text, start)
    eos, answers = tokens["eos_token"], []
    for i, (start, end) in zip(turns, marks, strict=True):
        if messages[i]["content"].strip() not in text[start:end]:
            raise ValueError("it does not write an answer as it is; write message['content'] there")
        # Behind the end token nothing is generated, so nothing is to be learned.
        last = text.rfind(eos, start, end + len(eos))
        if last < start or text[end:last].strip():
            raise ValueError(
                f"it writes no {eos} behind an answer, which then would never end; add {{{{ eos_token }}}}"
            )
        answers.append((start, last + len(eos)))
    return RenderedDialogue(text[: answers[-1][1]], answers)


def reference_prompt(messages: list[dict[str, str]]) -> str:
    """The text of ``messages`` up to where the assistant answers, for a model without a template: the reference's form,
    without the end tokens that only a tuned model knows as ends of answers."""
    return _render(REFERENCE_TEMPLATE, messages, {"eos_token": ""}, prompt=True)[0]


def _render(
    template: str, messages: list[dict[str, str]], tokens: dict[str, str], *, marked: bool = False, prompt: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, marks = render_jinja_template(
        conversations=[messages],
        chat_template=_WITHOUT_DATE + template if "strftime_now" in template else template,
        return_assistant_tokens_mask=marked,
        add_generation_prompt=prompt,
        **tokens,
    )
    return encodable("what it writes", texts[0]), [tuple(mark) for mark in marks[0]] if marked else []


def _check_complete(messages: list[dict[str, str]], text: str) -> None:
    """Refuse a template that asks something else than ``messages`` do, in the ``text`` up to the last answer."""
    for message in messages:
        role, content = message["role"], message["content"].strip()
        if role != "assistant" and content not in text:
            raise ValueError(
                f"it leaves out a message of the {role}, or changes it: {show(content)}; write message['content'] "
                f"there, or remove the {role}'s message from the data"
            )


def _check_prompt(template: str, messages: list[dict[str, str]], tokens: dict[str, str], text: str, start: int) -> None:
    """Refuse a template with marks whose generation prompt is not what it wrote behind ``messages``, around where the
    answer begins at ``start`` in ``text``; what stands before may depend on later messages."""
    without, before = (_render(template, messages, tokens, prompt=prompt)[0] for prompt in (False, True))
    added = before.removeprefix(without)
    if added not in text[max(0, start - len(added)) : start + len(added)]:
        raise ValueError("its generation prompt is not what it writes before an answer; write the same in both places")


def _added_text(
    template: str, messages: list[dict[str, str]], i: int, tokens: dict[str, str], text: str
) -> tuple[int, int]:
    """``[start, end)`` in ``text`` of what message ``i`` adds to the ones before it."""
    before, _ = _render(template, messages[:i], tokens, prompt=True)
    after = text if i == len(messages) - 1 else _render(template, messages[: i + 1], tokens)[0]
    if not text.startswith(before) or not text.startswith(after) or len(after) < len(before):
        raise ValueError(
            "what it writes for a message depends on those after it, so that the model would be trained on other text "
            "than it generates from; enclose what the assistant writes in {% generation %} and {% endgeneration %}"
        )
    return len(before), len(after)
