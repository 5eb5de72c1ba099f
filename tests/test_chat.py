"""`tnl chat`: every turn reads its own tokens only, and answers as if the whole conversation were read again."""

import io
import os
import signal
import sys

import pytest
import tokenizers
import torch
from transformers import PreTrainedTokenizerFast

from tests.tiny_folder import tiny_folder
from tnl.data.chat_template import reference_prompt
from tnl.errors import EXIT_CHECKPOINT, EXIT_USAGE, CheckpointError, ConfigError
from tnl.generation import chat
from tnl.generation.conversation import Conversation
from tnl.generation.generate import continue_text
from tnl.generation.load import load_model
from tnl.generation.options import GenerationOptions
from tnl.generation.text_stream import TextStream
from tnl.model import TransnormerState

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
TEMPLATES = {"plain": None, "template": TEMPLATE}
TURNS = ("def value in range", "print", "return the state : 12")
OPTIONS = GenerationOptions(max_new_tokens=7, temperature=0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model folders without and with a chat template."""
    return {name: tiny_folder(tmp_path_factory.mktemp(name), template) for name, template in TEMPLATES.items()}


@pytest.fixture(scope="module")
def loaded(folders):
    """Models and tokenizers by kind."""
    return {name: load_model(str(folder)) for name, folder in folders.items()}


@pytest.fixture
def reads(loaded):
    """Ids that went through the models, one list for each forward pass."""
    seen = []
    hooks = [
        model.register_forward_pre_hook(
            lambda m, a, named: seen.append(named["input_ids"][0].tolist()), with_kwargs=True
        )
        for model, _ in loaded.values()
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def flat(lists):
    return [i for part in lists for i in part]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_turn_reads_its_own_tokens_and_answers_as_to_the_whole_conversation(kind, loaded, reads):
    model, tokenizer = loaded[kind]
    notes = []
    conversation = Conversation(model, tokenizer, OPTIONS, "for the state", report=notes.append)
    answers, read, rendered = [], [], ""
    for text in TURNS:
        del reads[:]
        before = list(conversation.messages)
        answers.append(conversation.ask(text))
        turn = flat(reads)
        assert len(turn) == conversation.state.length - len(read)
        # The prompt comes first, then each generated token but the last alone.
        assert [len(part) for part in reads[1:]] == [1] * (OPTIONS.max_new_tokens - 1)
        if rendered:
            # The last token of the answer before, and what the new turn adds to the text.
            added = conversation._render([*before, {"role": "user", "content": text}]).removeprefix(rendered)
            assert tokenizer.decode(reads[0][1:]) == added
        whole = continue_text(model, tokenizer, read + reads[0], TransnormerState(), OPTIONS)
        assert whole.text == answers[-1]
        read += turn
        rendered = conversation.read
        # What was read, and the token that was not, is the conversation as it is rendered.
        assert tokenizer.decode(read + conversation.unread) == conversation.read
    assert len(set(answers)) > 1
    assert notes == []


def test_the_plain_form():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Because."},
        {"role": "user", "content": "So?"},
    ]
    assert reference_prompt(messages) == "Be brief.\nHuman:\nWhy?\nAssistant:\nBecause.\nHuman:\nSo?\nAssistant:\n"


@pytest.mark.parametrize("kind", TEMPLATES)
def test_an_end_of_text_ends_an_answer_and_is_read_where_the_template_has_it(kind, loaded, reads):
    model, tokenizer = loaded[kind]
    notes = []
    conversation = Conversation(model, tokenizer, OPTIONS, report=notes.append)
    suppressed = model.generation_config.suppress_tokens
    model.generation_config.suppress_tokens, model.generation_config.forced_eos_token_id = None, 2
    try:
        first = conversation.ask(TURNS[0])
        read = flat(reads)
        conversation.ask(TURNS[1])
    finally:
        model.generation_config.suppress_tokens, model.generation_config.forced_eos_token_id = suppressed, None
    assert "</s>" not in first
    following = flat(reads)[len(read) :]
    assert (following[0] == 2) == (kind == "template")
    expected = {"plain": f"\nHuman:\n{TURNS[1]}", "template": f"</s>\n<s>user\n{TURNS[1]}"}[kind]
    assert tokenizer.decode(following).startswith(expected)
    assert notes == []


def test_an_answer_in_the_plain_form_ends_where_the_user_speaks(loaded):
    model, tokenizer = loaded["plain"]
    notes = []
    free = Conversation(model, tokenizer, OPTIONS).ask(TURNS[0])
    # In place of the next "Human:", which random weights do not write.
    stop = free[len(free) // 2 :][:4]
    conversation = Conversation(model, tokenizer, GenerationOptions(7, 0, stop=(stop,)), report=notes.append)
    assert conversation.ask(TURNS[0]) == free[: free.index(stop)]
    assert conversation.unread == []
    # The state may have read a part of the stop text, no more.
    assert (reference_prompt(conversation.messages[:1]) + free).startswith(conversation.read)


def test_a_template_that_changes_earlier_turns_is_read_again_openly(loaded, reads):
    model, tokenizer = loaded["template"]
    notes = []
    conversation = Conversation(model, tokenizer, OPTIONS, report=notes.append)
    conversation.ask(TURNS[0])
    conversation.messages[0]["content"] = "def"
    answer = conversation.ask(TURNS[1])
    assert notes == ["the chat template changes earlier turns: the whole conversation is read again"]
    expected = continue_text(
        model,
        tokenizer,
        tokenizer(conversation._render(conversation.messages[:-1]), split_special_tokens=False).input_ids,
        TransnormerState(),
        OPTIONS,
    )
    assert answer == expected.text


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no more turns') }}", "chat template refuses this conversation: no more turns"),
        ("{{ messages[0]['content'] + 1 }}", "chat template refuses this conversation: can only concatenate"),
        ({"a": TEMPLATE, "b": TEMPLATE}, "chat template refuses this conversation: This model has multiple"),
    ],
    ids=["refusal", "mistake", "several"],
)
def test_a_template_that_refuses_is_an_error_and_leaves_the_conversation(template, message, loaded):
    model, tokenizer = loaded["template"]
    conversation = Conversation(model, tokenizer, OPTIONS)
    conversation.ask(TURNS[0])
    messages, length = list(conversation.messages), conversation.state.length
    tokenizer.chat_template = template
    try:
        with pytest.raises(ConfigError, match=message):
            conversation.ask(TURNS[1])
    finally:
        tokenizer.chat_template = TEMPLATE
    assert (conversation.messages, conversation.state.length) == (messages, length)


def test_a_template_that_writes_nothing_is_refused(loaded):
    model, tokenizer = loaded["template"]
    tokenizer.chat_template = "{% if false %}a{% endif %}"
    try:
        with pytest.raises(ConfigError, match="chat template writes nothing for this message"):
            Conversation(model, tokenizer, OPTIONS).ask(TURNS[0])
    finally:
        tokenizer.chat_template = TEMPLATE


def test_after_an_error_in_an_answer_the_conversation_before_is_read_again(loaded):
    def fail(text):
        raise OSError("no space left")

    conversation, undisturbed = (Conversation(*loaded["plain"], OPTIONS) for _ in range(2))
    for each in (conversation, undisturbed):
        each.ask(TURNS[0])
    with pytest.raises(OSError, match="no space left"):
        conversation.ask(TURNS[1], fail)
    assert conversation.ask(TURNS[2]) == undisturbed.ask(TURNS[2])


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_saved_conversation_goes_on_as_the_original(kind, loaded, tmp_path):
    file = tmp_path / "chat.safetensors"
    original, other = (Conversation(*loaded[kind], OPTIONS, "for") for _ in range(2))
    original.ask(TURNS[0])
    original.save(file)
    other.ask(TURNS[2])
    other.load(file)
    for text in TURNS[1:]:
        assert other.ask(text) == original.ask(text)
    assert other.messages == original.messages
    for a, b in zip(other.state.layers, original.state.layers, strict=True):
        assert torch.equal(a, b)


def test_a_reset_conversation_starts_like_a_new_one(loaded):
    conversation = Conversation(*loaded["plain"], OPTIONS, "for")
    first = conversation.ask(TURNS[0])
    conversation.ask(TURNS[1])
    conversation.reset()
    assert conversation.ask(TURNS[0]) == first


def test_files_without_a_conversation_are_refused_and_the_old_one_goes_on(loaded, tmp_path):
    model, _ = loaded["plain"]
    conversation = Conversation(*loaded["plain"], OPTIONS)
    with pytest.raises(ConfigError, match="nothing was said yet"):
        conversation.save(tmp_path / "chat")
    conversation.ask(TURNS[0])
    messages = list(conversation.messages)
    conversation.state.fork().save(tmp_path / "state", model)
    with pytest.raises(CheckpointError, match="a state without a conversation"):
        conversation.load(tmp_path / "state")
    assert conversation.messages == messages


def test_turns_of_one_seed_draw_their_own_numbers_and_do_so_again(loaded):
    def answers(template, turns):
        tokenizer.chat_template = template
        conversation = Conversation(model, tokenizer, GenerationOptions(7, temperature=1.0, seed=2**63 - 1))
        return [conversation.ask(text) for text in turns]

    model, tokenizer = loaded["template"]
    try:
        assert len(set(answers(TEMPLATE, TURNS))) == 3
        assert answers(TEMPLATE, TURNS) == answers(TEMPLATE, TURNS)
        # Everything is read anew each time and is the same text, so that only the numbers differ.
        assert len(set(answers("def value", TURNS))) == 3
    finally:
        tokenizer.chat_template = TEMPLATE


def test_the_interrupt_key_stops_an_answer_and_the_conversation_goes_on(loaded):
    conversation = Conversation(*loaded["plain"], GenerationOptions(200, temperature=0))
    with chat._interrupt_key() as interrupted:
        answer = conversation.ask(
            TURNS[0], lambda text: interrupted() or os.kill(os.getpid(), signal.SIGINT), interrupted
        )
    tokens = conversation.state.length
    assert 0 < len(answer) < 100
    conversation.options = OPTIONS
    conversation.ask(TURNS[1])
    assert conversation.state.length > tokens


def test_the_interrupt_key_pressed_twice_ends_the_program():
    before = signal.getsignal(signal.SIGINT)

    def press_twice():
        with chat._interrupt_key() as interrupted:
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupted()
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        press_twice()
    assert signal.getsignal(signal.SIGINT) is before


SPACE = "\u2581"


@pytest.fixture(scope="module")
def prefixing():
    """A tokenizer that puts a space before every text and takes one from every decoded text."""
    names = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        SPACE,
        *map(chr, range(33, 127)),
        SPACE + "a",
        SPACE + "b",
    ]
    merges = [(SPACE, "a"), (SPACE, "b")]
    vocabulary = {name: i for i, name in enumerate(names)}
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend(SPACE), tokenizers.normalizers.Replace(" ", SPACE)]
    )
    decoders = tokenizers.decoders
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def test_a_space_before_every_text_is_put_before_no_turn(prefixing):
    conversation = Conversation(None, prefixing, OPTIONS)
    assert prefixing.convert_ids_to_tokens(prefixing("b\nU").input_ids)[0] == SPACE + "b"
    ids = conversation._ids_behind("a b", "a b\nU: b")
    assert prefixing.convert_ids_to_tokens(ids) == ["<0x0A>", "U", ":", SPACE + "b"]


def test_spaces_between_words_are_in_the_stream(prefixing):
    prompt, whole = (prefixing(text).input_ids for text in ("a b", "a b a b\n b"))
    pieces = []
    stream = TextStream(prefixing, len(prompt), pieces.append)
    for end in range(len(prompt) + 1, len(whole) + 1):
        stream(torch.tensor([whole[:end]]), None)
    stream.finish()
    assert pieces == [" a", " b", "\n", " b"]


# The command


class Terminal(io.StringIO):
    """An input that says it is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def say(folders, tnl_command, monkeypatch):
    """Run ``tnl chat`` on lines: (exit code, standard output, standard error)."""

    def run(*lines, kind="plain", source=io.StringIO, options=("--temperature", "0", "--max-new-tokens", "7")):
        monkeypatch.setattr(sys, "stdin", source("".join(f"{line}\n" for line in lines)))
        return tnl_command("chat", folders[kind], *options)

    return run


@pytest.mark.parametrize("kind", TEMPLATES)
def test_lines_of_a_file_are_answered(kind, loaded, say):
    conversation = Conversation(*loaded[kind], OPTIONS)
    expected = "".join(conversation.ask(text) + "\n" for text in TURNS)
    code, out, err = say(TURNS[0], "", *TURNS[1:], kind=kind)
    assert (code, out) == (0, expected)
    form = {"plain": "a plain form", "template": "its own chat template"}[kind]
    assert f"state: 0.00 MiB, which does not grow; {form}" in err


def test_commands(loaded, say, tmp_path):
    file = tmp_path / "chat.safetensors"
    first = say(TURNS[0], TURNS[1])[1]
    assert say(TURNS[0], f"/save {file}", "/exit", "not read")[1] == first.splitlines(keepends=True)[0]
    assert say(TURNS[2], f"/load {file}", TURNS[1])[1].endswith(first.split("\n", 1)[1])
    _, out, err = say(TURNS[0], "/reset", "/help", TURNS[0])
    half = len(out) // 2
    assert out[:half] == out[half:]
    assert "/save FILE   write the conversation and its state\n" in err


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("/nope", EXIT_USAGE, "/nope: no such command; known: /reset, /save FILE, "),
        ("/save", EXIT_USAGE, "/save: no such command"),
        ("/reset now", EXIT_USAGE, "/reset now: no such command"),
        ("/save nowhere/chat", EXIT_USAGE, "nowhere/chat: nowhere is no folder; make it first"),
        ("/save .", EXIT_USAGE, ".: is a folder; name a file"),
        ("/save ~nobody-known/chat", EXIT_USAGE, "~nobody-known/chat: there is no such user"),
        ("/save chat", EXIT_USAGE, "chat: nothing was said yet"),
        ("/load nowhere", EXIT_CHECKPOINT, "nowhere: "),
        ("a\udcff", EXIT_USAGE, "message: is not UTF-8 text at character 1"),
    ],
)
def test_a_mistake_ends_a_script_and_not_a_session(line, code, message, say, loaded):
    got, out, err = say(line, TURNS[0])
    assert (got, out) == (code, "")
    assert f"error: {message}" in err
    got, out, err = say(line, TURNS[0], source=Terminal)
    assert got == 0
    assert f"error: {message}" in err
    assert out == f"> > {Conversation(*loaded['plain'], OPTIONS).ask(TURNS[0])}\n> \n"


def test_input_that_is_no_text_is_refused(folders, tnl_command, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff\n"), encoding="utf-8"))
    code, out, err = tnl_command("chat", folders["plain"])
    assert (code, out) == (EXIT_USAGE, "")
    assert "error: standard input: not UTF-8 at byte 1" in err


def test_the_interrupt_key_at_the_prompt_ends_with_130(folders, tnl_command, monkeypatch):
    class Interrupted(Terminal):
        def readline(self, *_):
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", Interrupted())
    code, _, err = tnl_command("chat", folders["plain"])
    assert code == 130
    assert "Traceback" not in err


def test_options_are_checked_before_a_model_is_looked_for(tnl_command):
    code, _, err = tnl_command("chat", "no-model", "--max-new-tokens", "0")
    assert (code, err) == (EXIT_USAGE, "error: max_new_tokens: must be 1 or more, got 0\n")


@pytest.fixture
def interrupts():
    """The interrupt key raises; a shell starts what runs behind it with the key ignored."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("source", [io.StringIO, Terminal])
def test_the_interrupt_key_during_an_answer(source, loaded, say, monkeypatch):
    model, passes = loaded["plain"][0], []

    def press(module, arguments):
        passes.append(module)
        if len(passes) == 4:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("tnl.generation.chat.load_model", lambda folder: loaded["plain"])
    hook = model.model.layers[1].register_forward_pre_hook(press)
    code, out, _ = say(TURNS[0], TURNS[1], source=source, options=("--temperature", "0", "--max-new-tokens", "9"))
    hook.remove()
    if source is Terminal:
        # The first answer has the token of this pass and no more; the second is whole.
        assert (code, len(passes)) == (0, 4 + 9)
        assert out.count("> ") == 3
    else:
        assert (code, len(passes)) == (130, 4)
