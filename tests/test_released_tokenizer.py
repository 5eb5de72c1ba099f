"""The tokenizer of the released checkpoints: loaded without their code, with sentencepiece's own ids."""

import builtins
import itertools
import json
import pickle
import random
import shutil
from functools import cache

import pytest
import sentencepiece
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import tnl.model
from tests.tiny_tokenizers import PARTS, SYMBOLS, released_tokenizer, tiny_model

KINDS = {
    f"{normalization}{'-prefix' * prefix}{'-strip' * strip}": {
        "dummy_prefix": prefix,
        "remove_extra_whitespaces": strip,
        "normalization": normalization,
        "split_digits": prefix != strip,
    }
    for normalization, prefix, strip in itertools.product(("identity", "nmt_nfkc"), (True, False), (True, False))
}
KINDS["symbols"] = {"dummy_prefix": False, "symbols": SYMBOLS}
KINDS["symbols-prefix"] = {"symbols": SYMBOLS}
KINDS["symbols-nmt_nfkc-strip"] = {
    "symbols": SYMBOLS,
    "normalization": "nmt_nfkc",
    "dummy_prefix": False,
    "remove_extra_whitespaces": True,
}
# With a table of replacements, or a prefix before symbols, sentencepiece itself normalizes the text.
OUTSIDE = {kind for kind in KINDS if "nmt_nfkc" in kind or kind == "symbols-prefix"}

NUM_TEXTS = 10_000
CHARACTERS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
RUNS = st.lists(st.tuples(st.sampled_from(PARTS), st.integers(1, 5)), max_size=6).map(
    lambda runs: "".join(part * count for part, count in runs)
)


@cache
def processor(kind: str) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=tiny_model(**KINDS[kind]))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("released")
    return {kind: released_tokenizer(root / kind, tiny_model(**options)) for kind, options in KINDS.items()}


@pytest.fixture(scope="module")
def loaded(folders):
    return {kind: AutoTokenizer.from_pretrained(folder) for kind, folder in folders.items()}


# Which class, without which code


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": None}, {"trust_remote_code": False}])
def test_a_released_folder_loads_without_its_code_and_without_a_question(folders, trust, monkeypatch):
    monkeypatch.setattr(builtins, "input", lambda prompt="": pytest.fail(f"asked: {prompt}"))
    tokenizer = AutoTokenizer.from_pretrained(folders["identity-prefix"], **trust)
    assert type(tokenizer) is tnl.model.TransnormerTokenizer
    assert tokenizer.is_fast


def test_the_code_of_the_folder_is_not_run_even_when_it_is_trusted(folders):
    tokenizer = AutoTokenizer.from_pretrained(folders["identity-prefix"], trust_remote_code=True)
    assert type(tokenizer) is tnl.model.TransnormerTokenizer


def test_a_folder_without_a_tokenizer_config_loads_by_its_model_type(folders, tmp_path):
    folder = shutil.copytree(folders["identity-prefix"], tmp_path / "bare")
    (folder / "tokenizer_config.json").unlink()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(tokenizer) is tnl.model.TransnormerTokenizer
    assert (tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token_id) == (
        "<unk>",
        "<s>",
        "</s>",
        0,
    )


def test_a_hub_name_loads_from_the_cache(folders, tmp_path):
    repository, commit = tmp_path / "models--OpenNLPLab--Tiny", "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(folders["identity-prefix"], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    tokenizer = AutoTokenizer.from_pretrained("OpenNLPLab/Tiny", cache_dir=tmp_path)
    assert type(tokenizer) is tnl.model.TransnormerTokenizer
    assert tokenizer("a  b").input_ids == processor("identity-prefix").encode("a  b")


# The ids


@pytest.fixture(scope="module")
def texts():
    """Different texts: random characters, runs of `PARTS`, and the two together.

    Two texts an example, compared later: hypothesis repeats itself inside lists, and a batch is much faster.
    """
    found = set()

    @settings(max_examples=4600, deadline=None, phases=[Phase.generate], database=None)
    @given(characters=CHARACTERS, runs=RUNS)
    def collect(characters, runs):
        found.update((characters, runs, characters + runs, runs + characters))

    collect()
    assert len(found) >= NUM_TEXTS
    return sorted(found)


@pytest.mark.parametrize("kind", KINDS)
def test_the_ids_and_the_decoded_text_are_sentencepieces_own(loaded, texts, kind):
    expected = processor(kind).encode(texts)
    actual = loaded[kind](texts, return_attention_mask=False).input_ids
    decoded = loaded[kind].decode(expected)
    for text, ids, wanted, back in zip(texts, actual, expected, decoded, strict=True):
        assert ids == wanted, ascii(text)
        assert back == processor(kind).decode(wanted), ascii(text)


def test_any_ids_decode_as_by_sentencepiece(loaded):
    draw = random.Random(0)
    for kind, tokenizer in loaded.items():
        pieces = range(3, tokenizer.vocab_size)  # also bytes that are no characters, and spaces in any place
        batch = [draw.choices(pieces, k=draw.randrange(1, 12)) for _ in range(300)]
        batch += [[3 + byte for byte in "\u4e2d\u6587".encode()][:n] for n in range(1, 7)]
        for ids in batch:
            assert tokenizer.decode(ids) == processor(kind).decode(ids), f"{kind}: {ids}"


@pytest.mark.parametrize("kind", KINDS)
def test_long_texts_of_code_and_chinese_have_equal_ids(loaded, kind):
    text = "def f(x):\n    return x * 1024  # \u4eca\u5929\u5929\u6c14\u5f88\u597d\uff0c \U0001f600\t\r\n" * 200
    assert loaded[kind](text).input_ids == processor(kind).encode(text)


def test_merges_of_one_result_are_chosen_as_by_sentencepiece():
    # Few characters and long pieces: a piece arises in several ways, and the same way overlaps itself.
    from tnl.model.sentencepiece_bpe import build_tokenizer, load_model

    texts = ["".join(letters) for n in range(1, 11) for letters in itertools.product("a=", repeat=n)]
    reference, proto = load_model(tiny_model(dummy_prefix=False), "tiny")
    assert [e.ids for e in build_tokenizer(proto).encode_batch(texts)] == reference.encode(texts)


# Ends, padding, special tokens


def test_nothing_is_added_at_the_ends_unless_asked(folders):
    ids = processor("identity-prefix").encode("self")
    for bos, eos in itertools.product((False, True), repeat=2):
        tokenizer = AutoTokenizer.from_pretrained(folders["identity-prefix"], add_bos_token=bos, add_eos_token=eos)
        assert tokenizer("self").input_ids == [1] * bos + ids + [2] * eos


def test_the_configuration_of_the_folder_decides_about_the_ends(tmp_path):
    folder = released_tokenizer(tmp_path, tiny_model(), add_bos_token=True)
    assert AutoTokenizer.from_pretrained(folder)("self").input_ids[0] == 1


def test_unk_pads_on_either_side(loaded):
    tokenizer = loaded["identity-prefix"]
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<unk>", 0)
    short, long = tokenizer("a").input_ids, tokenizer("a b c").input_ids
    gap = [0] * (len(long) - len(short))
    batch = tokenizer(["a", "a b c"], padding=True, padding_side="left")
    assert batch.input_ids == [gap + short, long]
    assert batch.attention_mask[0] == [0] * len(gap) + [1] * len(short)
    assert tokenizer(["a", "a b c"], padding=True, padding_side="right").input_ids == [short + gap, long]


def test_truncation_and_offsets(loaded):
    tokenizer = loaded["identity-prefix"]
    text = "def \u4e2d\u6587 \U0001f600 12"
    whole = tokenizer(text, return_offsets_mapping=True)
    assert tokenizer(text, truncation=True, max_length=3).input_ids == whole.input_ids[:3]
    covered = [set(range(start, end)) for start, end in whole.offset_mapping]
    assert set().union(*covered) == set(range(len(text)))
    tokens = tokenizer.convert_ids_to_tokens(whole.input_ids)
    start, end = whole.offset_mapping[tokens.index("\u2581def")]
    assert text[start:end] == "def"


@pytest.mark.parametrize("kind", sorted(OUTSIDE))
def test_offsets_are_refused_where_the_text_is_replaced(loaded, kind):
    with pytest.raises(ValueError, match=r"return_offsets_mapping: .* leave it out"):
        loaded[kind]("a", return_offsets_mapping=True)


def test_names_of_special_tokens_are_tokens_only_when_asked(loaded):
    tokenizer = loaded["identity-prefix"]
    assert tokenizer("a</s>").input_ids == processor("identity-prefix").encode("a</s>")
    assert tokenizer("a</s>", split_special_tokens=False).input_ids == [*processor("identity-prefix").encode("a"), 2]
    assert tokenizer.decode([1, *tokenizer("a b").input_ids, 2], skip_special_tokens=True) == "a b"


def test_a_chat_template_writes_special_tokens(loaded):
    template = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
    messages = [{"role": "user", "content": "self"}]
    options = {"chat_template": template, "tokenizer_kwargs": {"split_special_tokens": False}}
    chat = loaded["identity-prefix"].apply_chat_template(messages, return_dict=False, **options)
    assert chat == [*processor("identity-prefix").encode("self"), 2]


# Saving


@pytest.mark.parametrize("kind", ["identity-prefix", "nmt_nfkc-prefix-strip", "symbols", "symbols-prefix"])
def test_saving_and_loading_keeps_the_ids(folders, tmp_path, kind):
    first = AutoTokenizer.from_pretrained(folders[kind], add_bos_token=True)
    first.add_tokens(["zz"])
    first.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is tnl.model.TransnormerTokenizer
    text = "  <s>" + "".join(PARTS) + " zz\n"
    assert again(text).input_ids == first(text).input_ids
    assert first(text).input_ids[0] == 1
    assert first.vocab_size in first(text).input_ids
    assert "auto_map" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (tmp_path / "tokenizer.model").read_bytes() == tiny_model(**KINDS[kind])
    # Without sentencepiece's normalization a tokenizer.json would give other ids to whoever reads it.
    assert (tmp_path / "tokenizer.json").exists() == (kind not in OUTSIDE)


def test_a_tokenizer_json_is_used_without_the_model(loaded, tmp_path):
    loaded["identity-prefix"].save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not looked at")
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("a  b").input_ids == processor("identity-prefix").encode("a  b")


@pytest.mark.parametrize("kind", ["identity-prefix", "nmt_nfkc-prefix-strip"])
def test_pickling_keeps_the_ids(loaded, kind):
    text = "".join(PARTS)
    assert pickle.loads(pickle.dumps(loaded[kind]))(text).input_ids == loaded[kind](text).input_ids


# What is refused


@pytest.mark.parametrize("content", [b"", b"no model", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_broken_model_is_refused_by_name(tmp_path, content):
    folder = released_tokenizer(tmp_path, content)
    with pytest.raises(ValueError, match=r"tokenizer\.model: not a sentencepiece model"):
        AutoTokenizer.from_pretrained(folder)


def test_a_model_that_is_cut_off_is_refused_by_name(tmp_path):
    folder = released_tokenizer(tmp_path, tiny_model()[:-500])
    with pytest.raises(ValueError, match=r"tokenizer\.model: "):
        AutoTokenizer.from_pretrained(folder)


def test_a_missing_model_is_refused_by_folder(tmp_path):
    folder = released_tokenizer(tmp_path, b"")
    (folder / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer\.model and no tokenizer\.json; .* tiktoken") as raised:
        AutoTokenizer.from_pretrained(folder)
    assert str(folder) in str(raised.value)


def test_a_unigram_model_is_refused(tmp_path):
    folder = released_tokenizer(tmp_path, tiny_model(model_type="unigram", vocab_size=330))
    with pytest.raises(ValueError, match=r"tokenizer\.model: a unigram model"):
        AutoTokenizer.from_pretrained(folder)


def test_more_pieces_than_the_model_has_ids_are_refused(tmp_path):
    folder = released_tokenizer(tmp_path, tiny_model())
    (folder / "config.json").write_text(json.dumps({"model_type": "transnormer", "vocab_size": 300}))
    with pytest.raises(ValueError, match=r"tokenizer\.model: 400 pieces, but .*config\.json has vocab_size 300"):
        AutoTokenizer.from_pretrained(folder)


def test_a_broken_tokenizer_json_is_refused_by_name(tmp_path):
    folder = released_tokenizer(tmp_path, tiny_model())
    (folder / "tokenizer.json").write_text('{"added_tokens": []}')
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
        AutoTokenizer.from_pretrained(folder)


def test_a_tokenizer_that_would_differ_is_refused(folders, monkeypatch):
    monkeypatch.setattr("tnl.model.sentencepiece_bpe.find_merges", lambda scores, vocabulary: [])
    with pytest.raises(ValueError, match=r"tokenizer\.model: .* other ids or text than sentencepiece for"):
        AutoTokenizer.from_pretrained(folders["identity-prefix"])
