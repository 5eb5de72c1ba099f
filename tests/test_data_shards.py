"""Shards: reading across files, and every kind of damage named at open or by verify."""

import json
import pickle
import shutil

import numpy as np
import pytest

from tests.tiny_corpus import tiny_settings, tiny_shards, tiny_texts
from tnl.data.prepare import prepare
from tnl.data.shard_format import HEADER_BYTES, ShardEntry, ShardIndex, read_header
from tnl.data.shard_writer import ShardWriter
from tnl.data.shards import ShardSet, check_vocabulary, verify
from tnl.data.tokenizer import Tokenizer
from tnl.errors import DataError


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "shards")


def rewrite_index(folder, change, keep_fingerprint=False):
    """Apply ``change`` to the parsed index; by default as an attacker would, with a fitting fingerprint."""
    file = folder / "index.json"
    facts = json.loads(file.read_text())
    change(facts)
    if not keep_fingerprint:
        facts["fingerprint"] = fingerprint_of(facts)
    file.write_text(json.dumps(facts))


def fingerprint_of(facts):
    fields = {key: value for key, value in facts.items() if key not in ("format", "fingerprint", "splits")}
    splits = {name: [ShardEntry(**entry) for entry in entries] for name, entries in facts["splits"].items()}
    return ShardIndex(splits, **fields).fingerprint


def test_the_stream_is_the_documents_with_bos_and_eos(folder):
    train, heldout = ShardSet.open(folder), ShardSet.open(folder, "heldout")
    assert len(train.index.splits["train"]) > 2
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    texts = []
    for shards in (train, heldout):
        starts = shards.document_starts(0, shards.num_tokens)
        assert len(starts) == shards.num_documents
        stream = shards.tokens(0, shards.num_tokens)
        assert stream.dtype == np.uint16
        assert stream.max() == shards.max_token_id
        own = []
        for ids in np.split(stream, starts[1:]):
            assert (ids[0], ids[-1]) == (1, 2)
            own.append(tokenizer.decode(ids))
        assert sum(len(text.encode()) for text in own) == shards.num_bytes
        texts += own
    assert sorted(texts) == sorted(tiny_texts())


def test_any_range_across_shards_equals_the_slice_of_the_stream(folder):
    shards = ShardSet.open(folder)
    stream = shards.tokens(0, shards.num_tokens)
    starts = shards.document_starts(0, shards.num_tokens)
    draw = np.random.default_rng(0)
    ranges = np.sort(draw.integers(0, shards.num_tokens + 1, (200, 2)), axis=1).tolist()
    for start, stop in [*ranges, [0, 0], [999, 1000], [1000, 1001], [999, 2001], [shards.num_tokens] * 2]:
        np.testing.assert_array_equal(shards.tokens(start, stop), stream[start:stop])
        expected = starts[(starts >= start) & (starts < stop)]
        np.testing.assert_array_equal(shards.document_starts(start, stop), expected)


def test_many_shards_are_read_with_few_open_maps_and_by_other_processes(folder, monkeypatch):
    monkeypatch.setattr("tnl.data.shards._MAX_OPEN_MAPS", 1)
    shards = ShardSet.open(folder)
    stream = shards.tokens(0, shards.num_tokens)
    assert len(shards._maps) == 1
    copy = pickle.loads(pickle.dumps(shards))
    np.testing.assert_array_equal(copy.tokens(0, shards.num_tokens), stream)


def test_a_document_longer_than_a_shard_goes_on_in_the_next_and_large_vocabularies_take_four_bytes(tmp_path):
    writer = ShardWriter(tmp_path, "train", 10, 2**16 + 1, "ab" * 32)
    documents = [list(range(25)), [2**16], list(range(4))]
    for ids in documents:
        writer.append(ids, len(ids))
    entries = writer.close()
    assert [(entry.num_tokens, entry.num_documents, entry.num_bytes) for entry in entries] == [
        (10, 1, 25),
        (10, 0, 0),
        (10, 2, 5),
    ]
    headers = [read_header(tmp_path / entry.file) for entry in entries]
    assert [header.max_token_id for header in headers] == [9, 19, 2**16]
    assert {header.id_bytes for header in headers} == {4}


@pytest.mark.parametrize("keep", ["less one", "half", "header", "part of the header", "nothing", "one more"])
def test_a_file_of_the_wrong_length_is_named_with_both_sizes(folder, keep):
    file = folder / "train-00001.bin"
    data = file.read_bytes()
    size = len(data)
    lengths = {"less one": size - 1, "half": size // 2, "header": HEADER_BYTES, "part of the header": 40, "nothing": 0}
    file.write_bytes(data + b"\0" if keep == "one more" else data[: lengths[keep]])
    found = lengths.get(keep, size + 1)
    expected = f"expected {size} for" if found >= HEADER_BYTES else f"a shard has at least {HEADER_BYTES}"
    with pytest.raises(DataError, match=rf"train-00001\.bin: {found} bytes, {expected}.*--fresh"):
        ShardSet.open(folder)
    ShardSet.open(folder, "heldout")


def test_missing_and_swapped_shards_are_named(folder):
    other = folder / "other"
    (folder / "train-00000.bin").rename(other)
    with pytest.raises(DataError, match=r"train-00000\.bin: cannot be read \(No such file"):
        ShardSet.open(folder)
    last = sorted(folder.glob("train-*.bin"))[-1]
    shutil.move(last, folder / "train-00000.bin")
    shutil.move(other, last)
    with pytest.raises(DataError, match=r"train-00000\.bin: bytes per id, pieces, tokens, documents are"):
        ShardSet.open(folder)


HEADER_DAMAGE = {
    "magic": (0, b"X", "starts with b'XNLSHARD'"),
    "version": (8, b"\x09", "version 9, expected"),
    "bytes per id": (12, b"\x03", "make no sense"),
    "four bytes per id": (12, b"\x04", "bytes, expected"),
    "tokens": (16, b"\xff" * 7, "bytes, expected"),
    "documents": (24, b"\xff", "bytes, expected"),
    "vocabulary": (32, b"\xff\xff", "the index says"),
    "largest id": (41, b"\xff", "make no sense"),
    "tokenizer": (48, b"\0\0\0\0", "made with tokenizer 00000000"),
}


@pytest.mark.parametrize("kind", HEADER_DAMAGE)
def test_a_damaged_header_is_named_at_open(folder, kind):
    position, data, message = HEADER_DAMAGE[kind]
    file = folder / "train-00000.bin"
    content = bytearray(file.read_bytes())
    content[position : position + len(data)] = data
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"train-00000\.bin: .*{message}"):
        ShardSet.open(folder)


def test_verify_finds_one_flipped_byte_in_every_file(folder):
    total = verify(folder)
    assert total == sum(file.stat().st_size for file in folder.glob("*.bin"))
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        # The index's recorded settings and counts are for the reader; its beginning holds the facts.
        positions = (0, len(content) // 2, len(content) - 1) if file.suffix != ".json" else (0, 40, 300)
        for position in positions:
            damaged = bytearray(content)
            damaged[position] ^= 1
            file.write_bytes(damaged)
            with pytest.raises(DataError, match=file.name):
                verify(folder)
        file.write_bytes(content)
    assert verify(folder) == total
    (folder / "stray").write_bytes(b"")
    with pytest.raises(DataError, match="'stray' does not belong"):
        verify(folder)


def test_another_tokenizer_is_refused_with_both_hashes(folder, tmp_path):
    texts = tiny_texts(80, seed=5)
    (tmp_path / "b").mkdir()
    other = prepare(tiny_settings(tmp_path / "b", texts=texts), report=lambda line: None)
    shutil.copyfile(other / "tokenizer.model", folder / "tokenizer.model")
    hashes = [ShardIndex.read(path).tokenizer_sha256 for path in (other, folder)]
    with pytest.raises(DataError, match=rf"tokenizer\.model: SHA-256 {hashes[0]}, the shards .* {hashes[1]}"):
        ShardSet.open(folder)
    shutil.copyfile(other / "train-00000.bin", folder / "train-00000.bin")
    (folder / "tokenizer.model").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.model: cannot be read"):
        ShardSet.open(folder)


@pytest.mark.parametrize("name", ["../x.bin", "/etc/passwd", "..", "", "a/b", 7])
def test_an_index_that_names_files_elsewhere_is_refused(folder, name):
    rewrite_index(folder, lambda facts: facts["splits"]["train"][0].update(file=name))
    with pytest.raises(DataError, match="is not a plain file name"):
        ShardSet.open(folder)


def test_a_damaged_or_altered_index_is_refused(folder):
    file = folder / "index.json"
    original = file.read_text()
    for text in ("", "[]", "{}", "null", original[:-20], "[" * 100_000, original.replace('"add_bos"', '"bos"')):
        file.write_text(text)
        with pytest.raises(DataError, match=r"index\.json: not an index of shards"):
            ShardSet.open(folder)
    file.write_text(original.replace('"format": 1', '"format": 2'))
    with pytest.raises(DataError, match="format version 2, this program reads 1"):
        ShardSet.open(folder)
    file.write_text(original)
    rewrite_index(folder, lambda facts: facts["splits"]["train"].reverse(), keep_fingerprint=True)
    with pytest.raises(DataError, match="but its entries give"):
        ShardSet.open(folder)
    file.write_text(original)
    rewrite_index(folder, lambda facts: facts["splits"]["train"][0].update(num_bytes="1"))
    with pytest.raises(DataError, match="are not whole numbers"):
        ShardSet.open(folder)
    with pytest.raises(DataError, match=r"give a folder that `tnl data prepare` wrote"):
        ShardSet.open(folder / "nothing")


def test_unknown_and_empty_splits_are_named(tmp_path):
    folder = tiny_shards(tmp_path, heldout_fraction=0.0)
    with pytest.raises(DataError, match="no split 'test', there are train, heldout"):
        ShardSet.open(folder, "test")
    with pytest.raises(DataError, match=r"no documents in split heldout; .* larger heldout_fraction"):
        ShardSet.open(folder, "heldout")


def test_a_model_with_too_few_ids_is_refused(folder):
    shards = ShardSet.open(folder)
    check_vocabulary(shards, 340)
    check_vocabulary(shards, 512)
    with pytest.raises(DataError, match=r"has 340 pieces .* the model 339; set model\.vocab_size to at least 340"):
        check_vocabulary(shards, 339)
