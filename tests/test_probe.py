"""`tnl probe`: facts found again, losses by position, and what is written of them."""

import json
import os
import sys

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.test_report import is_png
from tests.tiny_folder import tiny_folder
from tests.tiny_model import tiny_model
from tnl.errors import EXIT_CANNOT_WRITE, EXIT_DATA, ConfigError, DataError, NonFiniteError
from tnl.evaluation import haystack, retrieval
from tnl.evaluation.harness_model import HarnessModel
from tnl.evaluation.position_loss import position_loss
from tnl.evaluation.retrieval import NEEDLE, PASSKEY, make_samples, retrieve, summary
from tnl.evaluation.state_reader import read, score_answers
from tnl.model.state import TransnormerState

LENGTHS, DEPTHS = (220, 400), (0.0, 0.5, 1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("probe"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocab_size=340)


def log_likelihood(model, context: np.ndarray, answer: np.ndarray) -> tuple[float, bool]:
    """By one forward pass over everything."""
    ids = torch.from_numpy(np.concatenate([context, answer]))
    logits = model(ids[None]).logits[0, len(context) - 1 : -1].log_softmax(-1)
    picked = logits.gather(1, ids[len(context) :, None])
    return picked.sum().item(), bool((logits.argmax(-1) == ids[len(context) :]).all())


@torch.no_grad()
def test_answers_are_scored_behind_a_state_as_behind_its_text(model):
    draw = np.random.default_rng(0)
    context = draw.integers(3, 340, 50)
    answers = [draw.integers(3, 340, n) for n in (1, 4, 3)]
    greedy = model(torch.from_numpy(context)[None]).logits[0, -1].argmax().item()
    answers.append(np.array([greedy]))
    state = TransnormerState()
    read(model, context[:-1], state, piece_tokens=7)
    before = [layer.clone() for layer in state.layers]
    scores, flags = score_answers(model, state, int(context[-1]), answers)
    expected = [log_likelihood(model, context, answer) for answer in answers]
    assert scores == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert flags.tolist() == [flag for _, flag in expected]
    assert flags[-1]
    assert all(torch.equal(a, b) for a, b in zip(before, state.layers, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("kind", [NEEDLE, PASSKEY], ids=lambda kind: kind.name)
def test_every_prompt_is_what_one_forward_pass_sees(model, tokenizer, kind):
    hay = np.random.default_rng(1).integers(3, 340, LENGTHS[-1])
    samples = make_samples(kind, tokenizer, 12, 3, seed=5)
    found = retrieve(model, tokenizer, kind, hay, samples, LENGTHS, DEPTHS, piece_tokens=64)
    intro = np.array(tokenizer(kind.intro, add_special_tokens=False).input_ids, dtype=np.int64)
    places = [(length, depth) for length in LENGTHS for depth in DEPTHS for _ in range(2)]
    for one, sample, (length, depth) in zip(found, samples, places, strict=True):
        room = length - len(intro) - len(sample.needle) - len(sample.question)
        place = round(depth * room)
        prompt = np.concatenate([intro, hay[:place], sample.needle, hay[place:room], sample.question])
        assert (one.length, one.depth, len(prompt)) == (length, depth, length)
        scores = [log_likelihood(model, prompt, answer)[0] for answer in sample.answers]
        assert one.log_likelihood == pytest.approx(scores[0], abs=1e-4)
        assert one.rank == 1 + sum(score > scores[0] for score in scores)


def test_a_model_that_looks_the_number_up_finds_it_everywhere(model, tokenizer, monkeypatch):
    """What is asked for stands in the prompt, and nowhere else but in the needle."""
    text = []

    def remember(model, ids, state, piece_tokens):
        if len(ids):
            text.append(tokenizer.decode(ids))
            state.layers = state.layers or [torch.zeros(1)]
            state.positions = torch.zeros(1, dtype=torch.int64)

    def look_up(model, state, last, answers):
        hits = [text[-1].count(tokenizer.decode(answer).strip()) for answer in answers]
        return np.array(hits, dtype=float), np.array(hits) == 1

    monkeypatch.setattr(retrieval, "read", remember)
    monkeypatch.setattr(retrieval, "score_answers", look_up)
    hay = haystack.text_ids(tokenizer, None, LENGTHS[-1])
    found = retrieve(model, tokenizer, NEEDLE, hay, make_samples(NEEDLE, tokenizer, 18, 4, 0), LENGTHS, DEPTHS)
    result = summary(found, 4)
    assert (result["exact_match"], result["most_likely"], result["mean_rank"]) == (1.0, 1.0, 1.0)
    assert [(row["length"], row["depth"]) for row in result["rows"]] == [(n, d) for n in LENGTHS for d in DEPTHS]
    assert {row["samples"] for row in result["rows"]} == {3}


def test_samples_are_a_function_of_the_seed(tokenizer):
    def answers(seed):
        return [ids.tolist() for sample in make_samples(NEEDLE, tokenizer, 3, 4, seed) for ids in sample.answers]

    assert answers(0) == answers(0)
    assert answers(0) != answers(1)
    numbers = [tokenizer.decode(ids).strip() for ids in answers(0)]
    assert len(set(numbers)) == 12
    assert all(len(number) == 7 for number in numbers)


def test_a_tokenizer_without_digits_is_refused():
    """All numbers would be equally likely, and the true one the most likely of all."""
    words = {word: i for i, word in enumerate(["[UNK]", *NEEDLE.question.split()])}
    plain = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = Whitespace()
    with pytest.raises(ConfigError, match="needle: the model's tokenizer makes one of different numbers"):
        make_samples(NEEDLE, PreTrainedTokenizerFast(tokenizer_object=plain), 1, 2, 0)


def test_a_folder_that_cannot_be_written_is_found_out_first(tnl_command, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    code, _, err = tnl_command("probe", "lengths", "no-such-model", "--output", tmp_path)
    assert "not writable; give another --output" in err
    assert code == EXIT_CANNOT_WRITE


def test_lengths_that_hold_no_question_are_refused(model, tokenizer):
    samples = make_samples(PASSKEY, tokenizer, 1, 2, 0)
    with pytest.raises(ConfigError, match="--lengths: 20 tokens do not hold the needle"):
        retrieve(model, tokenizer, PASSKEY, np.zeros(20, np.int64), samples, [20], [0.5])


@torch.no_grad()
@pytest.mark.parametrize("piece", [5, 64, 10_000])
def test_losses_by_position_are_those_of_one_forward_pass(model, piece):
    texts = np.random.default_rng(2).integers(3, 340, (3, 51))
    found = position_loss(model, texts, 7, piece_tokens=piece)
    ids = torch.from_numpy(texts)
    losses = torch.nn.functional.cross_entropy(
        model(ids[:, :-1]).logits.transpose(1, 2), ids[:, 1:], reduction="none"
    ).numpy()
    assert found.edges[[0, -1]].tolist() == [0, 50]
    expected = [losses[:, a:b].mean(1) for a, b in zip(found.edges, found.edges[1:], strict=False)]
    assert found.losses == pytest.approx(np.stack(expected, 1), abs=1e-5)
    row = found.rows()[2]
    assert row["loss_stderr"] == pytest.approx(found.losses[:, 2].std(ddof=1) / np.sqrt(3))
    assert row["perplexity"] == pytest.approx(np.exp(row["loss"]))


def test_a_loss_that_is_not_finite_is_an_error():
    broken = tiny_model()
    broken.model.embed_tokens.weight.data[7] = float("nan")
    with pytest.raises(NonFiniteError, match="positions 0 to 4: a loss is not finite"):
        position_loss(broken, np.full((1, 5), 7), 1)


def test_a_file_is_read_in_blocks_and_no_further_than_needed(tokenizer, tmp_path, monkeypatch):
    file = tmp_path / "text.txt"
    lines = [f"value {i} return self\n" for i in range(40)]
    file.write_text("".join(lines))
    monkeypatch.setattr(haystack, "BLOCK_CHARACTERS", 50)
    ids = haystack.text_ids(tokenizer, file, 200)
    assert len(ids) == 200
    text = tokenizer.decode(ids)
    assert "".join(lines).replace(" ", "").startswith(text.replace(" ", ""))
    with pytest.raises(DataError, match=r"text.txt: has [\d,]+ tokens, 9,999 are needed"):
        haystack.text_ids(tokenizer, file, 9999)
    file.write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="not UTF-8"):
        haystack.text_ids(tokenizer, file, 2)


def test_needle_and_passkey_write_figures(tnl_command, folder, tmp_path):
    common = ["--lengths", "220,400", "--depths", "3", "--samples", "2", "--candidates", "3", "--output", tmp_path]
    for kind in ("needle", "passkey"):
        code, out, err = tnl_command("probe", kind, folder, *common)
        assert code == 0, err
        assert f"{kind}, 12 prompts of 220 to 400 tokens" in out
        result = json.loads((tmp_path / f"{kind}.json").read_text())
        assert len(result["rows"]) == 6
        assert result["chance"] == pytest.approx(1 / 3)
        assert result["settings"]["seed"] == 0
        assert is_png(tmp_path / f"{kind}.png")


def test_positions_and_lengths_write_figures(tnl_command, folder, tmp_path):
    code, out, err = tnl_command(
        "probe", "positions", folder, "--length", "300", "--texts", "3", "--buckets", "4", "--trained", "64",
        "--output", tmp_path,
    )  # fmt: skip
    assert code == 0, err
    assert "positions         0 to        75" in out
    result = json.loads((tmp_path / "positions.json").read_text())
    assert (len(result["rows"]), result["settings"]["trained"]) == (4, 64)
    code, out, err = tnl_command("probe", "lengths", folder, "--lengths", "64,500", "--output", tmp_path)
    assert code == 0, err
    lengths = json.loads((tmp_path / "lengths.json").read_text())
    rows = lengths["rows"]
    assert lengths["command"] == f"tnl probe lengths {folder} --lengths 64,500"
    assert [row["tokens"] for row in rows] == [64, 500]
    assert all(row["peak_gib"] is None and row["peak_process_gib"] > 0.05 for row in rows)
    assert all(row["tokens_per_s"] == pytest.approx(row["tokens"] / row["seconds"]) for row in rows)
    assert is_png(tmp_path / "positions.png")
    assert is_png(tmp_path / "lengths.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["needle", "--lengths", "100,a"], "--lengths: '100,a' is no list of whole numbers"),
        (["positions", "--length", "5", "--buckets", "6"], "--buckets: 6 of 5 positions"),
        (["ruler", "--tasks", "ruler_vtt"], "--tasks: no task ruler_vtt of RULER, did you mean ruler_vt"),
        (["ruler", "--tasks", "ruler_vt", "--lengths", "5000"], "--lengths: 5000 is none of RULER's"),
    ],
)
def test_what_cannot_be_meant_is_one_message(tnl_command, folder, tmp_path, arguments, message):
    code, _, err = tnl_command("probe", arguments[0], folder, *arguments[1:], "--output", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err


def test_a_task_of_ruler_that_cannot_be_made_is_named_and_the_others_run(tnl_command, folder, tmp_path):
    """This tokenizer takes a token for nearly every letter: too many for the example of variable tracking."""
    arguments = ["--tasks", "ruler_vt,ruler_fwe", "--samples", "2", "--output", tmp_path]
    code, out, err = tnl_command("probe", "ruler", folder, *arguments)
    assert code == 0, err
    assert "ruler_vt, 4,096 tokens: cannot be made (its example has" in out
    tracking, frequent = json.loads((tmp_path / "ruler.json").read_text())["rows"]
    assert "score" not in tracking
    assert (frequent["samples"], frequent["truncations"], frequent["problem"]) == (2, 0, None)
    assert is_png(tmp_path / "ruler.png")


def test_empty_answers_to_ruler_are_no_score_unless_they_are_allowed(tnl_command, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(HarnessModel, "generate_until", lambda self, requests, **_: ["", "self"])
    arguments = ["probe", "ruler", folder, "--tasks", "ruler_fwe", "--samples", "2", "--output", tmp_path]
    code, out, err = tnl_command(*arguments)
    assert code == EXIT_DATA
    assert "ruler_fwe, 4,096 tokens: the answers to 1 of 2 prompts are empty" in out
    assert "ruler_fwe: answers are empty; give --allow-empty" in err
    (row,) = json.loads((tmp_path / "ruler.json").read_text())["rows"]
    assert (row["empty_answers"], "score" in row) == (1, False)
    assert tnl_command(*arguments, "--allow-empty")[0] == 0
    (row,) = json.loads((tmp_path / "ruler.json").read_text())["rows"]
    assert (row["empty_answers"], row["score"], row["problem"]) == (1, 0.0, None)


def test_ruler_without_its_packages_says_what_to_install(tnl_command, folder, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ruler.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    code, out, err = tnl_command("probe", "ruler", folder, "--tasks", "ruler_fwe", "--output", tmp_path)
    assert code == 2
    assert "it needs pip install 'lm-eval[ruler]'" in out
    assert "--tasks: none of them could run" in err
