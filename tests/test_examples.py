"""Dialogues as tokens: those that a conversation with the model has, masks, and what is cut or left out."""

import json

import numpy as np
import pytest

from tests.tiny_folder import tiny_folder
from tests.tiny_tokenizers import released_tokenizer
from tests.tiny_tokenizers import tiny_model as sentencepiece_model
from tnl.data.examples import open_instructions
from tnl.data.settings import FinetuneDataSettings
from tnl.errors import DataError
from tnl.generation.load import load_tokenizer
from tnl.generation.text_stream import text_after

TURNS = [
    {"role": "user", "content": "def value in range"},
    {"role": "assistant", "content": "    return the state : 12"},
    {"role": "user", "content": "\n  print\u4e2d?"},
    {"role": "assistant", "content": "self = 345"},
]
CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """One as `tnl data prepare` makes them, and one of the released kind, which puts a space before a text."""
    folder = tmp_path_factory.mktemp("released")
    return {
        "ours": load_tokenizer(str(tiny_folder(tmp_path_factory.mktemp("ours")))),
        "released": load_tokenizer(str(released_tokenizer(folder / "tokenizer", sentencepiece_model()))),
    }


def opened(tmp_path, tokenizer, records, max_tokens=1000, **changes):
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    values = {"source": {"kind": "json", "path": str(file)}, "heldout_fraction": 0} | changes
    return open_instructions(FinetuneDataSettings(**values), tokenizer, max_tokens=max_tokens, seed=0)


@pytest.mark.parametrize("template", ["reference", CHATML], ids=["reference", "file"])
@pytest.mark.parametrize("kind", ["ours", "released"])
def test_answers_and_end_tokens_are_trained_and_nothing_else(tmp_path, tokenizers, kind, template):
    tokenizer = tokenizers[kind]
    if template == CHATML:
        (tmp_path / "x.jinja").write_text(CHATML)
        template = str(tmp_path / "x.jinja")
    data = opened(tmp_path, tokenizer, [{"messages": TURNS}], template=template)
    ids, trained = data.train[0]
    runs = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(trained)) + 1)
    texts = [(bool(trained[run[0]]), text_after(tokenizer, ids[: run[0]].tolist(), ids[run].tolist())) for run in runs]
    answers = [message["content"] + "</s>" for message in TURNS if message["role"] == "assistant"]
    assert [text for is_answer, text in texts if is_answer] == answers
    assert [bool(ids[run[-1]] == tokenizer.eos_token_id) for run in runs] == [False, True, False, True]
    # The tokens of each prompt are those with which a generation from it begins.
    for i, run in ((1, runs[1]), (3, runs[3])):
        prompt = tokenizer.apply_chat_template(
            TURNS[:i], chat_template=data.template.text, tokenize=False, add_generation_prompt=True
        )
        assert tokenizer.decode(ids[: run[0]]) == tokenizer.decode(
            tokenizer(prompt, add_special_tokens=False, split_special_tokens=False).input_ids
        )
    first = tokenizer.apply_chat_template(
        TURNS[:1], chat_template=data.template.text, tokenize=False, add_generation_prompt=True
    )
    expected = tokenizer(first, add_special_tokens=False, split_special_tokens=False).input_ids
    assert ids[: runs[1][0]].tolist() == expected


def test_a_text_does_not_hold_the_end_token(tmp_path, tokenizers):
    with pytest.raises(DataError, match=r"data\.jsonl:1: a text holds '</s>', the name of a special token"):
        opened(tmp_path, tokenizers["ours"], [{"prompt": "a</s>b", "completion": "c"}])


def test_long_examples_are_cut_or_dropped_and_those_without_an_answer_left_are_dropped(tmp_path, tokenizers):
    tokenizer = tokenizers["ours"]
    records = [
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": "self value " * 50},
        {"prompt": "self value " * 50, "completion": "b"},
    ]
    cut = opened(tmp_path, tokenizer, records, max_tokens=40)
    assert len(cut.train) == 2
    assert (cut.train.counts.truncated, cut.train.counts.dropped_without_loss) == (1, 1)
    assert cut.train.lengths.tolist()[1] == 40
    assert cut.train[1][1][-1]
    dropped = opened(tmp_path, tokenizer, records, max_tokens=40, too_long="drop")
    assert len(dropped.train) == 1
    assert dropped.train.counts.dropped_too_long == 2
    with pytest.raises(DataError, match=r"no example is left to train on: 0 held out, 0 too long, 3 without an answer"):
        opened(tmp_path, tokenizer, records, max_tokens=4)


def test_examples_and_held_out_ones_are_a_function_of_data_and_seed(tmp_path, tokenizers):
    records = [{"prompt": f"{i}", "completion": "value"} for i in range(300)]
    first, again = (opened(tmp_path, tokenizers["ours"], records, heldout_fraction=0.2) for _ in range(2))
    assert first.train.fingerprint == again.train.fingerprint
    assert first.heldout.fingerprint == again.heldout.fingerprint
    assert len(first.train) + len(first.heldout) == 300
    other = opened(tmp_path, tokenizers["ours"], [*records[:-1], {"prompt": "299", "completion": "state"}])
    assert other.train.fingerprint != opened(tmp_path, tokenizers["ours"], records).train.fingerprint


def test_a_first_token_is_not_trained_for_nothing_stands_before_it(tmp_path, tokenizers):
    plain = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
        "{% else %}{{ m.content | trim }}{% endif %}{% endfor %}"
    )
    (tmp_path / "x.jinja").write_text(plain)
    # A character that the tokenizer's normalisation drops.
    data = opened(
        tmp_path,
        tokenizers["ours"],
        [{"prompt": "\u0001", "completion": "self value"}],
        template=str(tmp_path / "x.jinja"),
    )
    assert data.train[0][1].tolist() == [False] + [True] * (data.train.lengths[0] - 1)
