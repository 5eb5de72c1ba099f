"""Chat templates: the text of a dialogue, where its answers are, and templates that must be stopped."""

import threading

import pytest
import tokenizers
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from tnl.data.chat_template import REFERENCE_TEMPLATE, ChatTemplate, choose_template, render_dialogue
from tnl.data.template_process import TemplateRenderer
from tnl.errors import ConfigError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "Why? "},
    {"role": "assistant", "content": "\n Because."},
    {"role": "user", "content": "So?"},
    {"role": "assistant", "content": "So."},
]
# Written out, as the reference's script puts them together.
REFERENCE = "Be brief.\nHuman:\nWhy? \nAssistant:\n\n Because.</s>\nHuman:\nSo?\nAssistant:\nSo.</s>"
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MARKED = (
    "{{ messages | length }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}</s>|{% else %}{{ m.content }}|{% endif %}{% endfor %}"
)


def answers(template, messages):
    found = render_dialogue(template, messages, TOKENS)
    return found.text, [found.text[start:end] for start, end in found.answers]


def test_the_reference_template_is_the_text_of_the_reference():
    assert answers(REFERENCE_TEMPLATE, [SYSTEM, *TURNS]) == (REFERENCE, ["\n Because.</s>", "So.</s>"])


@pytest.mark.parametrize("messages", [TURNS, [SYSTEM, *TURNS]], ids=["turns", "system"])
def test_answers_of_a_template_without_marks_begin_behind_the_generation_prompt(messages):
    text, found = answers(CHATML, messages)
    assert found == ["Because.</s>", "So.</s>"]
    assert text.endswith("<|assistant|>\nSo.</s>")  # what follows the last end token teaches nothing


def test_marks_are_used_where_earlier_text_depends_on_later_messages():
    text, found = answers(MARKED, TURNS)
    assert text == "4Why? |\n Because.</s>|So?|So.</s>"
    assert found == ["\n Because.</s>", "So.</s>"]
    unmarked = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with pytest.raises(ValueError, match=r"depends on those after it.*enclose what the assistant writes"):
        answers(unmarked, TURNS)


UNUSABLE = {
    "no end": ("{% for m in messages %}{{ m.content }}{% endfor %}", "writes no </s> behind an answer"),
    "no answer": (
        CHATML.replace("m.content | trim", "m.content | trim if m.role == 'user'"),
        "does not write an answer as it is",
    ),
    "one mark": (MARKED.replace("m.role ==", "loop.last and m.role =="), "marks 1 answers .* in a dialogue that has 2"),
    "another prompt": (MARKED + "{% if add_generation_prompt %}ELSE{% endif %}", "its generation prompt is not what"),
    "no question": (
        MARKED.replace("{% else %}{{ m.content }}", "{% else %}"),
        "leaves out a message of the user, or changes it: 'Why",
    ),
    "no first question": (
        MARKED.replace("{% else %}{{ m.content }}", "{% elif loop.index0 > 0 %}{{ m.content }}"),
        r"leaves out a message of the user, or changes it: 'Why\?'; write message\['content'\] there, or remove",
    ),
    "no first question, no marks": (
        CHATML.replace("m.content | trim", "m.content | trim if loop.index0 or m.role == 'system' else ''"),
        "leaves out a message of the user, or changes it: 'Why",
    ),
    "no system": (
        CHATML.replace("m.content | trim", "m.content | trim if m.role != 'system' else ''"),
        "leaves out a message of the system, or changes it: 'Be brief",
    ),
    "date": (
        "{{ strftime_now('%Y') }}" + CHATML,
        r"writes the date \(strftime_now\).*; write a date out in a copy",
    ),
    "half a character": ("{{ '\\ud800' }}" + CHATML, "what it writes holds half of a surrogate pair at character 0"),
    "empty marks": (MARKED.replace("{{ m.content }}{% endgen", "{% endgen"), "does not write an answer as it is"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_template_that_cannot_be_trained_on_is_refused(name):
    template, message = UNUSABLE[name]
    with pytest.raises((ValueError, TemplateError), match=message):
        answers(template, [SYSTEM, *TURNS] if name == "no system" else TURNS)


def test_a_template_may_know_that_there_is_a_date():
    for template in (CHATML, MARKED):
        known = "{% if strftime_now is not defined %}-{% endif %}" + template
        assert answers(known, TURNS) == answers(template, TURNS)


FOR_EVER = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = {
    "loop in the prompt": (
        MARKED + "{% if add_generation_prompt %}" + FOR_EVER + "{% endif %}",
        r"does not end within",
    ),
    "loop": (FOR_EVER, r"does not end within 0\.5 s"),
    "internals": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "'__class__' of 'str' object is unsafe"),
    "memory": ("{{ 'a' * 20000000000 }}", "needs more than 1 GiB of memory"),
    "syntax": ("{% for %}", "Expected an expression"),
    "refusal": ("{{ raise_exception('no such role') }}", "no such role"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_in_one_message(name):
    text, message = HOSTILE[name]
    template = ChatTemplate(text, "template x.jinja", False, TOKENS)
    with (
        TemplateRenderer(template, timeout_s=0.5 if name.startswith("loop") else 30) as renderer,
        pytest.raises(ConfigError, match=rf"^data\.template: template x\.jinja: .*{message}.*\(at a\.json:1\)"),
    ):
        renderer.render([TURNS], ["a.json:1"])


def test_a_process_renders_as_this_one_does_and_names_the_dialogue_at_fault():
    refuses = CHATML + "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    with TemplateRenderer(ChatTemplate(refuses, "own", False, TOKENS)) as renderer:
        assert renderer.render([TURNS, TURNS[:2]], ["a:1", "a:2"]) == [
            render_dialogue(CHATML, messages, TOKENS) for messages in (TURNS, TURNS[:2])
        ]
        with pytest.raises(ConfigError, match=r"no system \(at a:4\)"):
            renderer.render([TURNS, [SYSTEM, *TURNS]], ["a:3", "a:4"])
        assert len(renderer.render([TURNS], ["a:5"])) == 1


def test_a_process_that_does_not_start_says_why():
    # A lock cannot be sent to a spawned process.
    template = ChatTemplate(CHATML, "own", False, {"eos_token": threading.Lock()})
    with pytest.raises(TypeError, match="cannot pickle"), TemplateRenderer(template) as renderer:
        renderer.render([TURNS], ["a:1"])


def tokenizer(add_bos=False, **changes):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 1, "</s>": 2, "a": 3, "?": 0}, "?"))
    if add_bos:
        backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **({"bos_token": "<s>", "eos_token": "</s>"} | changes))


def test_the_template_is_the_tokenizers_own_the_references_or_a_file(tmp_path):
    assert choose_template("auto", tokenizer(chat_template=CHATML)).text == CHATML
    assert not choose_template("auto", tokenizer(chat_template=CHATML)).is_ours
    for setting in ("auto", "reference"):
        assert choose_template(setting, tokenizer()).text == REFERENCE_TEMPLATE
    assert choose_template("reference", tokenizer(chat_template=CHATML)).text == REFERENCE_TEMPLATE
    with_bos = choose_template("auto", tokenizer(add_bos=True))
    assert render_dialogue(with_bos.text, TURNS, with_bos.special_tokens).text.startswith("<s>Human:\nWhy?")
    verbatim = choose_template("verbatim", tokenizer())
    assert answers(verbatim.text, TURNS[:2]) == ("Why? \n Because.</s>", ["\n Because.</s>"])
    file = tmp_path / "my.jinja"
    file.write_text(CHATML)
    assert choose_template(str(file), tokenizer()).text == CHATML
    file.write_bytes(b"ab\xff")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 2"):
        choose_template(str(file), tokenizer())
    with pytest.raises(ConfigError, match=r"data\.template: 'refrence' cannot be read .*one of auto, reference, verba"):
        choose_template("refrence", tokenizer())
    with pytest.raises(ConfigError, match="no eos_token"):
        choose_template("auto", tokenizer(eos_token=None))
