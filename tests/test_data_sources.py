"""Sources: order, policies for bad records, and what the messages say."""

import json
import random
import re

import pytest

from tnl.data.settings import DatasetSource, JsonlSource, StdlibSource, TextSource
from tnl.data.sources import SourceCounts, iterate_documents, show
from tnl.errors import DataError


def read(source):
    counts = SourceCounts()
    return list(iterate_documents(source, counts)), counts


def jsonl(file, **changes):
    return JsonlSource(kind="jsonl", path=str(file), **changes)


def text(path, **changes):
    return TextSource(kind="text", path=str(path), **changes)


def test_text_files_come_sorted_by_relative_path_with_their_bytes_kept(tmp_path):
    (tmp_path / "b").mkdir()
    contents = {
        "b/one.txt": b"\tone\r\n\r\n",
        "a.txt": b"\xef\xbb\xbfa\n",
        "b.txt": "\u4e2d".encode(),
        "c.bin": b"\xff",
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    documents, counts = read(text(tmp_path, suffixes=[".txt"]))
    assert documents == [("a.txt", "a\n"), ("b.txt", "\u4e2d"), ("b/one.txt", "\tone\r\n\r\n")]
    assert counts.documents == 3
    assert read(text(tmp_path / "a.txt"))[0] == [("a.txt", "a\n")]


@pytest.mark.parametrize("data", ["caf\u00e9".encode("latin-1"), "x".encode("utf-16"), b"ok\xed\xa0\x80"])
def test_text_not_in_utf8_names_file_byte_and_cure(tmp_path, data):
    (tmp_path / "bad.txt").write_bytes(data)
    (tmp_path / "good.txt").write_bytes(b"good")
    position = next(i for i in range(len(data)) if data[i] >= 0x80)
    with pytest.raises(
        DataError, match=rf"bad\.txt: not UTF-8 at byte {position}: .*convert it to UTF-8 or set .*skip"
    ):
        read(text(tmp_path))
    documents, counts = read(text(tmp_path, on_bad="skip", max_bad_fraction=0.5))
    assert [name for name, _ in documents] == ["good.txt"]
    assert counts.bad == 1
    assert "bad.txt" in counts.messages[0]
    with pytest.raises(DataError, match=r"1 of 2 records are bad, more than source\.max_bad_fraction"):
        read(text(tmp_path, on_bad="skip", max_bad_fraction=0.4))


def test_missing_empty_and_blank_sources_are_named(tmp_path):
    with pytest.raises(DataError, match="nothing: no such file or folder"):
        read(text(tmp_path / "nothing"))
    with pytest.raises(DataError, match=r"no file with suffix \.txt, \.md"):
        read(text(tmp_path))
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.txt").write_bytes(b" \n\t\n")
    with pytest.raises(DataError, match="no document with text \\(2 empty, 0 bad\\)"):
        read(text(tmp_path))
    (tmp_path / "c.txt").write_bytes(b"x")
    documents, counts = read(text(tmp_path))
    assert documents == [("c.txt", "x")]
    assert counts.empty == 2


def test_a_file_beyond_the_size_limit_is_not_read(tmp_path):
    (tmp_path / "large.txt").write_bytes(b"x" * 101)
    with pytest.raises(DataError, match=r"large\.txt: 101 bytes, more than source\.max_document_bytes 100"):
        read(text(tmp_path, max_document_bytes=100))


BAD_LINES = {
    "cut": (b'{"text": "ab', "Unterminated string"),
    "NaN": (b'{"text": "a", "x": NaN}', "NaN is not JSON"),
    "array": (b'["a"]', "must be an object, found list"),
    "number": (b"12", "must be an object, found int"),
    "null": (b"null", "must be an object, found NoneType"),
    "missing field": (b'{"body": "a"}', r"no field 'text', found 'body'.*correct the line or source\.text_field"),
    "wrong type": (b'{"text": 7}', "must be a string, found int"),
    "null text": (b'{"text": null}', "must be a string, found NoneType"),
    "deep": (b"[" * 100_000, "recursion"),
    "duplicate key": (b'{"text": "a", "text": "b"}', "a key stands twice"),
    "trailing comma": (b'{"text": "a",}', "property name"),
    "two records": (b'{"text": "a"} {"text": "b"}', "Extra data"),
    "long number": (b'{"text": ' + b"9" * 5000 + b"}", "digits"),
    "not UTF-8": (b'{"text": "\xff"}', "not UTF-8 at byte"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16"), "not UTF-8 at byte"),
    "half a surrogate pair": (b'{"text": "\\ud800"}', "surrogate pair at character 0"),
    "NUL": (b"\x00" * 8, "Expecting value"),
    "long": (b'{"text": "' + b"x" * 300_000 + b'"}', r"more than source\.max_document_bytes"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_malformed_jsonl_lines_are_named_and_counted(tmp_path, kind):
    line, message = BAD_LINES[kind]
    good = [json.dumps({"text": f"document {i}"}).encode() for i in range(50)]
    lines = [*good, *[line] * 10]
    random.Random(0).shuffle(lines)
    first = lines.index(line)
    offset = sum(len(item) + 1 for item in lines[:first])
    file = tmp_path / "corpus.jsonl"
    file.write_bytes(b"\n".join(lines))
    with pytest.raises(DataError, match=message) as raised:
        read(jsonl(file, max_document_bytes=200_000))
    assert f"corpus.jsonl:{first + 1}: " in str(raised.value)
    assert "skip" in str(raised.value)
    assert len(str(raised.value)) < len(str(tmp_path)) + 400
    position = int(re.search(r"byte (\d+)", str(raised.value)).group(1))
    assert offset <= position <= offset + len(line)
    documents, counts = read(jsonl(file, max_document_bytes=200_000, on_bad="skip", max_bad_fraction=0.5))
    assert counts.bad == 10
    assert sorted(document for _, document in documents) == sorted(f"document {i}" for i in range(50))


def test_jsonl_splits_at_newline_bytes_only_and_tolerates_bom_crlf_and_blank_lines(tmp_path):
    texts = ["a\u2028b\u2029c\x85d\x0be", "two\nlines\r\n", "\u4e2d\U0001f600", "last"]
    records = [json.dumps({"text": text, "id": 1}, ensure_ascii=False).encode() for text in texts]
    file = tmp_path / "corpus.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([records[0], b"", b"  ", *records[1:]]))
    documents, counts = read(jsonl(tmp_path))
    assert [document for _, document in documents] == texts
    assert [name for name, _ in documents] == [f"corpus.jsonl:{number}" for number in (1, 4, 5, 6)]
    assert (counts.empty, counts.bad) == (0, 0)


def test_foreign_data_is_shown_short_and_in_ascii():
    assert show("caf\u00e9\x1b[2J") == r"'caf\xe9\x1b[2J'"
    assert show("x" * 500) == "'" + "x" * 79 + "..."
    assert len(show("\U0001f600" * 80)) <= 83


def test_dataset_rows_come_in_order_and_errors_are_named(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"body": ["one", "", "three"], "id": [1, 2, 3]}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows)}).save_to_disk(tmp_path / "saved")

    def source(**changes):
        return DatasetSource(kind="dataset", path=str(tmp_path / "saved"), **changes)

    documents, counts = read(source(text_field="body"))
    assert documents == [("train:0", "one"), ("train:2", "three")]
    assert counts.empty == 1
    with pytest.raises(DataError, match=r"row 0 of train: no field 'text', found 'body, id'.*source\.text_field"):
        read(source())
    with pytest.raises(DataError, match="must be a string, found int"):
        read(source(text_field="id"))
    with pytest.raises(DataError, match="cannot read split 'test'"):
        read(source(split="test", text_field="body"))
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    streamed = DatasetSource(kind="dataset", path=str(tmp_path / "lines"), streaming=True)
    assert read(streamed)[0] == [("train:0", "a"), ("train:1", "b")]


def test_dataset_that_cannot_be_had_is_a_data_error(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match=r"no-such-owner/no-such-dataset: cannot read split 'train'.*give a local folder"
    ):
        read(DatasetSource(kind="dataset", path="no-such-owner/no-such-dataset"))


def test_stdlib_skips_files_not_in_utf8_and_foreign_packages(tmp_path, monkeypatch):
    for folder in ("json", "site-packages", "json/__pycache__"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "module.py").write_text(f"# {folder}\n")
    (tmp_path / "bad.py").write_bytes(b"# \xe9\n")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    documents, counts = read(StdlibSource(kind="stdlib"))
    assert documents == [("json/module.py", "# json\n")]
    assert counts.bad == 1
