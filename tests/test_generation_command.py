"""`tnl generate`: streaming, stop texts, beams, and states in files that continue a prompt as the whole would."""

import pytest
import torch

from tests.tiny_folder import tiny_folder
from tests.tiny_model import random_ids
from tnl.errors import EXIT_CHECKPOINT, EXIT_USAGE, ConfigError
from tnl.generation.generate import continue_text, generate_text, prompt_ids
from tnl.generation.load import load_model
from tnl.generation.options import GenerationOptions
from tnl.generation.text_stream import TextStream, text_after
from tnl.model import TransnormerState

FIRST = "# 12\ndef value return self\n    for the state in range\n"
SECOND = "print ( value )"
GREEDY = ("--temperature", "0", "--max-new-tokens", "12")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(folder):
    """Model and tokenizer."""
    return load_model(str(folder))


@pytest.fixture(scope="module")
def continuation(loaded):
    """Greedy continuation of both texts in one."""
    tokenizer = loaded[1]
    # Otherwise a prompt behind a state would have other tokens than the whole text.
    assert prompt_ids(tokenizer, FIRST) + prompt_ids(tokenizer, SECOND) == prompt_ids(tokenizer, FIRST + SECOND)
    return generate_text(*loaded, FIRST + SECOND, temperature=0, max_new_tokens=12)


@pytest.fixture(scope="module")
def state_file(folder, tmp_path_factory):
    """The state after the first text."""
    from tnl.generation.command import generate

    file = tmp_path_factory.mktemp("state") / "first.safetensors"
    generate(str(folder), FIRST, None, echo=False, save_to=file)
    return file


def test_a_prompt_is_printed_and_continued(folder, continuation, tnl_command):
    code, out, err = tnl_command("generate", folder, "--prompt", FIRST + SECOND, *GREEDY)
    assert (code, out) == (0, f"{FIRST}{SECOND}{continuation}\n")
    # Two layers of four heads with 8 values, and 8 keys or, with LRPE, 16.
    assert "state: 0.00 MiB, which does not grow" in err


def test_a_prompt_file_is_continued_and_not_printed(folder, continuation, tnl_command, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_bytes((FIRST + SECOND).encode())
    code, out, _ = tnl_command("generate", folder, "--prompt-file", file, *GREEDY)
    assert (code, out) == (0, f"{continuation}\n")


def test_a_loaded_state_continues_as_the_whole_prompt(folder, state_file, continuation, tnl_command):
    before = state_file.read_bytes()
    for _ in range(2):
        code, out, _ = tnl_command("generate", folder, "--load-state", state_file, "--prompt", SECOND, *GREEDY)
        assert (code, out) == (0, f"{SECOND}{continuation}\n")
    assert state_file.read_bytes() == before


def test_a_loaded_state_continues_without_a_prompt(folder, state_file, loaded, tnl_command):
    code, out, _ = tnl_command("generate", folder, "--load-state", state_file, *GREEDY)
    assert (code, out) == (0, generate_text(*loaded, FIRST, temperature=0, max_new_tokens=12) + "\n")


def test_saving_in_the_middle_of_a_chain_changes_nothing(folder, state_file, continuation, tnl_command, tmp_path):
    second = tmp_path / "second.safetensors"
    options = ("--load-state", state_file, "--prompt", SECOND, "--save-state", second, *GREEDY)
    assert tnl_command("generate", folder, *options)[:2] == (0, f"{SECOND}{continuation}\n")
    assert tnl_command("generate", folder, "--load-state", second, *GREEDY)[1] == f"{continuation}\n"


def test_only_reading_prints_nothing(folder, tnl_command, tmp_path):
    file = tmp_path / "state.safetensors"
    code, out, _ = tnl_command("generate", folder, "--prompt", FIRST, "--save-state", file, "--max-new-tokens", "0")
    assert (code, out) == (0, "")
    assert file.exists()


def test_states_that_do_not_fit_end_with_77(folder, loaded, tnl_command, tmp_path):
    model, file = loaded[0], tmp_path / "state.safetensors"
    with torch.no_grad():
        model(random_ids(2, 5), use_cache=True).past_key_values.save(file, model)
    code, out, err = tnl_command("generate", folder, "--load-state", file)
    assert (code, out, err) == (EXIT_CHECKPOINT, "", f"error: {file}: holds 2 sequences; save the state of one\n")
    file.write_bytes(file.read_bytes()[:-1])
    for wrong, message in ((file, "or damaged"), (tmp_path / "none", "give a file that --save-state wrote")):
        code, _, err = tnl_command("generate", folder, "--load-state", wrong)
        assert code == EXIT_CHECKPOINT
        assert err.startswith(f"error: {wrong}: ")
        assert message in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "prompt: missing; give --prompt, --prompt-file or --load-state"),
        (["--prompt", "a", "--prompt-file", "b"], "prompt: given twice"),
        (["--prompt-file", "nowhere"], "nowhere: No such file or directory; correct --prompt-file"),
        (["--prompt-file", "."], ".: Is a directory; correct --prompt-file"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens: must be 1 or more, got 0"),
        (["--prompt", "a", "--temperature", "nan"], "temperature: must be a number of at least 0, got nan"),
        (["--prompt", "a", "--temperature", "inf"], "temperature: must be a number of at least 0, got inf"),
        (["--prompt", "a", "--seed", "-1"], "seed: must be 0 to 2^63 - 1, got -1"),
        (["--prompt", "a", "--num-beams", "0"], "num_beams: must be 1 or more, got 0"),
        (
            ["--prompt", "a", "--num-beams", "2", "--top-k", "3"],
            "num_beams: beam search does not sample; leave out top_k",
        ),
        (["--prompt", "a", "--num-beams", "2", "--stop", "b"], "num_beams: beam search does not stop at a text"),
        (["--prompt", "a", "--stop", ""], "stop: is empty"),
        (["--prompt", "a", "--stop", "\udcff"], "stop: is not UTF-8 text"),
        (["--prompt", "a", "--save-state", "nowhere/s"], "nowhere/s: nowhere is no folder; make it first"),
        (["--prompt", "a", "--save-state", "."], ".: is a folder; name a file"),
    ],
)
def test_what_cannot_be_done_is_refused_before_a_model_is_looked_for(options, message, tnl_command):
    code, out, err = tnl_command("generate", "no-model", *options)
    assert (code, out) == (EXIT_USAGE, "")
    assert err.startswith(f"error: {message}")


def test_a_prompt_file_that_is_no_text_is_refused(tnl_command, tmp_path):
    (tmp_path / "prompt.txt").write_bytes(b"caf\xe9")
    code, _, err = tnl_command("generate", "no-model", "--prompt-file", tmp_path / "prompt.txt")
    assert (code, err) == (EXIT_USAGE, f"error: {tmp_path / 'prompt.txt'}: not UTF-8 at byte 3; convert it\n")


def test_an_empty_prompt_and_a_state_of_one_token_are_refused(folder, loaded, tnl_command, tmp_path):
    assert "prompt: is empty" in tnl_command("generate", folder, "--prompt", "")[2]
    assert len(prompt_ids(loaded[1], "d")) == 1
    options = ("--prompt", "d", "--save-state", tmp_path / "s")
    assert "prompt: a state to save needs two tokens" in tnl_command("generate", folder, *options)[2]


def test_beams_give_the_text_of_beam_search(folder, loaded, tnl_command):
    model, tokenizer = loaded
    ids = tokenizer("def", return_tensors="pt").input_ids
    best = model.generate(ids, num_beams=3, max_new_tokens=8, do_sample=False)[0]
    greedy = model.generate(ids, max_new_tokens=8, do_sample=False)[0]
    assert not torch.equal(best, greedy)
    options = ("--prompt", "def", "--num-beams", "3", "--max-new-tokens", "8")
    assert tnl_command("generate", folder, *options)[1] == f"{tokenizer.decode(best)}\n"


def test_beams_behind_a_state_equal_beams_of_the_whole_and_leave_the_state(loaded):
    model, tokenizer = loaded
    options, state = GenerationOptions(8, num_beams=3), TransnormerState()
    first, second = prompt_ids(tokenizer, FIRST), prompt_ids(tokenizer, SECOND)
    whole = continue_text(model, tokenizer, first + second, state, options)
    assert state.layers is None
    with torch.no_grad():
        model(torch.tensor([first]), past_key_values=state)
    assert continue_text(model, tokenizer, second, state, options) == whole
    assert state.length == len(first)


@pytest.mark.parametrize("length", [1, 3])
def test_a_text_ends_before_its_stop(loaded, continuation, length):
    stop = continuation[5 : 5 + length]
    pieces = []
    text = generate_text(
        *loaded, FIRST + SECOND, temperature=0, max_new_tokens=12, stop=("not there", stop), on_text=pieces.append
    )
    assert text == "".join(pieces) == continuation[: continuation.index(stop)]


def test_what_looks_like_a_stop_is_given_out_in_the_end(loaded, continuation):
    options = dict(temperature=0, max_new_tokens=12, stop=(continuation[-3:] + "\x00",))
    assert generate_text(*loaded, FIRST + SECOND, **options) == continuation


def test_characters_of_several_tokens_come_whole(loaded):
    tokenizer, text, pieces = loaded[1], " a\u00e9\u4e2d \U0001f600\n\u6587", []
    ids = tokenizer("x\u4e2d" + text).input_ids
    start = len(tokenizer("x\u4e2d").input_ids)
    stream = TextStream(tokenizer, start, pieces.append)
    for end in range(start + 1, len(ids) + 1):
        stream(torch.tensor([ids[:end]]), None)
    stream.finish()
    assert "".join(pieces) == text
    assert len(pieces) > 5
    assert not any("\ufffd" in piece for piece in pieces)


def test_characters_behind_a_prompt_of_bytes_come_whole(loaded):
    # Each of these is three tokens, so that a context of eight would begin inside one.
    tokenizer, prompt, text, pieces = loaded[1], "\ud55c\uad6d\uc5b4", "\uc548\ub155", []
    context, ids = tokenizer(prompt).input_ids, tokenizer(prompt + text).input_ids
    assert len(context) == 9
    stream = TextStream(tokenizer, len(context), pieces.append)
    for end in range(len(context) + 1, len(ids) + 1):
        stream(torch.tensor([ids[:end]]), None)
    assert pieces == list(text)
    assert text_after(tokenizer, context, ids[len(context) :]) == text


def test_the_prompt_of_a_state_has_no_beginning_of_text(loaded):
    tokenizer = loaded[1]

    class WithBos:
        def __call__(self, text, add_special_tokens=True):
            found = tokenizer(text)
            found["input_ids"] = [1] * add_special_tokens + found["input_ids"]
            return found

    ids = tokenizer(SECOND).input_ids
    assert prompt_ids(WithBos(), SECOND) == [1, *ids]
    assert prompt_ids(WithBos(), SECOND, unread=[7]) == [7, *ids]
    with pytest.raises(ConfigError, match="prompt: is empty"):
        prompt_ids(WithBos(), "", unread=[])
