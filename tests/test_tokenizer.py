"""The tokenizer loses nothing, trains the same each time, and exports with equal ids."""

import hashlib
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_corpus import tiny_texts
from tests.tiny_tokenizers import tiny_model
from tnl.data.tokenizer import BOS_ID, EOS_ID, UNK_ID, Tokenizer, train_tokenizer
from tnl.data.tokenizer_export import EXPORTED_FILES, export_tokenizer
from tnl.errors import DataError

# Characters and runs around which tokenizers differ.
PARTS = [" ", "  ", "\n", "\n    ", "\t", "\r\n", "=", "-", "a", "self", ".", "):", "\u2581", "\u4e2d\u6587", "\u0301"]
PARTS += [
    "\U0001f600\u200d",
    "\x00",
    "\ufeff",
    "\u2028",
    "<s>",
    "</s>",
    "<unk>",
    "<0x0A>",
    "12",
    "\u2585",
    "\U0010ffff",
]
TEXTS = st.one_of(st.text(st.characters(exclude_categories=["Cs"])), st.lists(st.sampled_from(PARTS)).map("".join))


@pytest.fixture(scope="module")
def model():
    return train_tokenizer(tiny_texts(200) + ["=" * 70 + "\n" + "-" * 70 + "\n\n\n        end\n"] * 5, 400)


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    (folder / "trained.model").write_bytes(model)
    export_tokenizer(folder / "trained.model", folder, add_bos=True, samples=tiny_texts(20, seed=1))
    return folder


@pytest.fixture(scope="module")
def fast(exported):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(exported)


def test_training_is_deterministic_and_the_ids_are_fixed(model):
    assert train_tokenizer(iter(tiny_texts(50)), 320) == train_tokenizer(tiny_texts(50), 320)
    tokenizer = Tokenizer(model)
    assert tokenizer.vocab_size == 400
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (UNK_ID, BOS_ID, EOS_ID) == (0, 1, 2)
    assert tokenizer.sha256 == hashlib.sha256(model).hexdigest()
    assert tokenizer.decode([BOS_ID, *tokenizer.encode("self"), EOS_ID]) == "self"


def test_a_line_break_with_its_indentation_is_one_token(model):
    tokenizer = Tokenizer(model)
    assert len(tokenizer.encode("\n    ")) == 1
    assert len(tokenizer.encode("\n        ")) == 1
    assert len(tokenizer.encode("12")) == 2


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_decoding_gives_every_text_back_and_the_export_has_equal_ids(model, fast, text):
    ids = Tokenizer(model).encode(text)
    assert not {UNK_ID, BOS_ID, EOS_ID} & set(ids)
    assert Tokenizer(model).decode(ids) == text
    assert fast(text)["input_ids"] == [BOS_ID, *ids]
    assert fast(text, add_special_tokens=False)["input_ids"] == ids
    assert fast.decode(ids) == text


def test_runs_of_one_character_have_equal_ids_in_the_export(model, fast):
    draw = random.Random(0)
    tokenizer = Tokenizer(model)
    for _ in range(2000):
        text = "".join(draw.choice(PARTS[:12]) * draw.choice([1, 1, 2, 3, 7, 20]) for _ in range(draw.randrange(1, 12)))
        assert fast(text)["input_ids"] == [BOS_ID, *tokenizer.encode(text)], ascii(text)


def test_batches_and_threads_do_not_change_the_ids(model):
    tokenizer = Tokenizer(model)
    texts = [*tiny_texts(40, seed=3), "", "a\u2581\u2581b", "\u2581"]
    single = [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch(texts, 1) == single
    assert tokenizer.encode_batch(texts, 3) == single
    assert tokenizer.encode_batch([]) == []


def test_a_long_text_in_parts_has_the_ids_of_the_whole(model, monkeypatch):
    draw = random.Random(2)
    texts = ["".join(draw.choices(PARTS, k=60)) for _ in range(100)]
    whole = Tokenizer(model).encode_batch(texts)
    for length in (1, 7, 50):
        monkeypatch.setattr("tnl.data.tokenizer._PART_CHARACTERS", length)
        assert Tokenizer(model).encode_batch(texts) == whole


def test_the_export_sets_its_special_tokens_and_pads_with_unk(exported, fast):
    assert {file.name for file in exported.iterdir()} == {*EXPORTED_FILES, "trained.model"}
    assert (fast.bos_token_id, fast.eos_token_id, fast.unk_token_id, fast.pad_token_id) == (1, 2, 0, 0)
    assert len(fast) == 400
    batch = fast(["self", "def self"], padding=True)
    assert {len(ids) for ids in batch["input_ids"]} == {max(map(len, batch["input_ids"]))}
    assert fast.decode([1, *fast("self")["input_ids"], 2], skip_special_tokens=True) == "self"


def test_the_export_adds_bos_only_when_asked(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "own.model").write_bytes(model)
    export_tokenizer(tmp_path / "own.model", tmp_path, add_bos=False)
    plain = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert plain("self")["input_ids"] == Tokenizer(model).encode("self")
    again = tmp_path / "again"
    plain.save_pretrained(again)
    assert transformers.AutoTokenizer.from_pretrained(again)("<s>x")["input_ids"] == Tokenizer(model).encode("<s>x")


def test_an_export_that_would_differ_is_refused_and_writes_nothing(model, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    (tmp_path / "own.model").write_bytes(model)
    monkeypatch.setattr("tnl.model.sentencepiece_bpe.find_merges", lambda scores, vocabulary: [])
    with pytest.raises(DataError, match="other ids or text than sentencepiece for"):
        export_tokenizer(tmp_path / "own.model", tmp_path, add_bos=True)
    assert [file.name for file in tmp_path.iterdir()] == ["own.model"]


def test_a_vocabulary_that_does_not_fit_the_corpus_names_one_that_does():
    with pytest.raises(
        DataError, match=r"tokenizer\.vocab_size: 50000 is more than .* set it to at most (\d+)"
    ) as raised:
        train_tokenizer(tiny_texts(20), 50000)
    largest = int(str(raised.value).partition("at most ")[2].split()[0])
    assert Tokenizer(train_tokenizer(tiny_texts(20), largest)).vocab_size == largest
    with pytest.raises(DataError, match=r"tokenizer\.vocab_size: 200 does not hold .* set it to at least \d+"):
        train_tokenizer(tiny_texts(20), 200)


@pytest.mark.parametrize(
    "options", [{}, {"remove_extra_whitespaces": True, "dummy_prefix": False}, {"normalization": "nmt_nfkc"}]
)
def test_a_model_that_loses_text_is_refused(options):
    with pytest.raises(DataError, match="decoding does not give the text back"):
        Tokenizer(tiny_model(**options))


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "x.model").write_bytes(b"no model")
    with pytest.raises(DataError, match=r"x\.model: not a sentencepiece model"):
        Tokenizer.load(tmp_path / "x.model")
    with pytest.raises(DataError, match=r"y\.model: cannot read the tokenizer model"):
        Tokenizer.load(tmp_path / "y.model")


def test_the_exported_configuration_names_no_path(exported):
    config = json.loads((exported / "tokenizer_config.json").read_text())
    assert str(exported) not in json.dumps(config)
    assert "auto_map" not in config
