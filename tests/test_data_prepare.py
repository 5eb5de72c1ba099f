"""Preparation: what is kept, equal bytes each time, and nothing half-done under the output's name."""

import errno
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sentencepiece
import yaml
from pydantic import ValidationError

from tests.tiny_corpus import tiny_settings, tiny_shards, tiny_texts, write_jsonl
from tnl.data.prepare import prepare
from tnl.data.settings import DataSettings, PrepareSettings
from tnl.data.shard_format import ShardIndex
from tnl.data.shards import ShardSet, verify
from tnl.data.tokenizer import Tokenizer
from tnl.errors import CannotWriteError, DataError

ROOT = Path(__file__).parent.parent


def quiet(line):
    pass


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def documents(folder, split):
    shards = ShardSet.open(folder, split)
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    bounds = [*shards.document_starts(0, shards.num_tokens), shards.num_tokens]
    return [tokenizer.decode(shards.tokens(*pair)) for pair in itertools.pairwise(bounds)]


@pytest.mark.parametrize("name", sorted(file.name for file in (ROOT / "configs" / "data").glob("*.yaml")))
def test_every_configuration_that_ships_is_valid(name):
    PrepareSettings(**yaml.safe_load((ROOT / "configs" / "data" / name).read_text()))


def test_the_example_shows_every_default():
    shown = yaml.safe_load((ROOT / "configs" / "data" / "jsonl-example.yaml").read_text())
    full = PrepareSettings(**shown).model_dump()
    assert {**full, "tokenizer": {**full["tokenizer"], **shown["tokenizer"]}} == full
    assert shown.keys() == full.keys()
    assert shown["source"] == full["source"]
    assert PrepareSettings(**{key: shown[key] for key in ("source", "tokenizer", "output")}).model_dump() == full


@pytest.mark.parametrize("tokenizer", [{}, {"model": "a", "vocab_size": 300}])
def test_the_tokenizer_is_either_given_or_trained(tmp_path, tokenizer):
    with pytest.raises(ValidationError, match="give either model"):
        tiny_settings(tmp_path, tokenizer=tokenizer)


def test_twice_with_any_number_of_threads_gives_equal_bytes(tmp_path):
    first = contents(tiny_shards(tmp_path, output="one"))
    assert len(first) > 4
    for num_workers in (2, 4):
        assert contents(tiny_shards(tmp_path, output=f"with-{num_workers}", num_workers=num_workers)) == first
    assert not list(tmp_path.glob("*.tmp-*"))


def test_duplicates_and_blank_documents_are_dropped_and_counted(tmp_path):
    texts = tiny_texts()
    lines = []
    mixed = [*texts, texts[3], "", " \n", texts[7], texts[3]]
    folder = prepare(tiny_settings(tmp_path, texts=mixed), report=lines.append)
    train, heldout = documents(folder, "train"), documents(folder, "heldout")
    assert sorted(train + heldout) == sorted(texts)
    assert 4 <= len(heldout) <= 22
    counts = ShardIndex.read(folder).counts
    size = {"files": 1, "file_bytes": (tmp_path / "corpus.jsonl").stat().st_size}
    assert counts == {"documents": 60, "empty": 2, "bad": 0, "duplicates": 3, "left_out_by_max_bytes": 0, **size}
    printed = "\n".join(lines)
    assert "60 kept, 2 empty, 0 bad, 3 exact duplicates" in printed
    assert "bytes per token" in printed


def test_the_held_out_documents_depend_on_text_and_seed_and_not_on_order(tmp_path):
    shuffled = random.Random(1).sample(tiny_texts(), 60)
    first = tiny_shards(tmp_path, output="first")
    second = tiny_shards(tmp_path, output="second", texts=shuffled)
    assert sorted(documents(first, "heldout")) == sorted(documents(second, "heldout"))
    assert contents(first)["tokenizer.model"] == contents(second)["tokenizer.model"]
    third = tiny_shards(tmp_path, output="third", seed=1)
    assert sorted(documents(third, "heldout")) != sorted(documents(first, "heldout"))


def test_max_bytes_keeps_a_part_drawn_by_content(tmp_path):
    texts = tiny_texts()
    half = sum(len(text.encode()) for text in texts) // 2
    kept = []
    for output, order in (("a", texts), ("b", texts[::-1])):
        source = {"kind": "jsonl", "path": str(tmp_path / "corpus.jsonl"), "max_bytes": half}
        folder = tiny_shards(tmp_path, output=output, texts=order, source=source, tokenizer={"vocab_size": 320})
        kept.append(sorted(documents(folder, "train") + documents(folder, "heldout")))
    assert kept[0] == kept[1]
    assert half * 0.7 < sum(len(text.encode()) for text in kept[0]) <= half
    assert kept[0] != sorted(texts[: len(kept[0])])
    source["max_bytes"] = 3
    with pytest.raises(DataError, match=r"tokenizer\.sample_bytes: 3 does not hold the first text"):
        tiny_shards(tmp_path, output="c", tokenizer={"vocab_size": 320, "sample_bytes": 3})
    with pytest.raises(DataError, match=r"source\.max_bytes: 3 does not hold the first document"):
        tiny_shards(tmp_path, output="c", source=source)


def test_bos_and_eos_are_stored_as_set_and_a_given_tokenizer_is_used(tmp_path):
    model = tiny_shards(tmp_path, output="first") / "tokenizer.model"
    folder = tiny_shards(tmp_path, tokenizer={"model": str(model)}, add_bos=False, add_eos=False)
    shards = ShardSet.open(folder)
    assert not {1, 2} & set(shards.tokens(0, shards.num_tokens).tolist())
    assert contents(folder)["tokenizer.model"] == model.read_bytes()
    with pytest.raises(DataError, match=r"tokenizer\.model: .*nothing cannot be read"):
        tiny_shards(tmp_path, output="other", tokenizer={"model": str(tmp_path / "nothing")})


def test_the_same_settings_are_used_again_and_others_are_refused(tmp_path):
    folder = tiny_shards(tmp_path)
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    lines = []
    assert prepare(tiny_settings(tmp_path, num_workers=3), report=lines.append) == folder
    assert len(lines) == 1
    assert "already prepared with these settings" in lines[0]
    with pytest.raises(DataError, match=r"other settings \(add_eos, seed\); .* --fresh"):
        tiny_shards(tmp_path, seed=1, add_eos=False)
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    prepare(tiny_settings(tmp_path, seed=1), report=quiet, fresh=True)
    assert ShardIndex.read(folder).settings["seed"] == 1
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["shards"]
    (folder / "train-00000.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"train-00000\.bin: 0 bytes"):
        tiny_shards(tmp_path, seed=1)


def test_text_that_changed_since_is_told(tmp_path):
    folder = tiny_shards(tmp_path)
    before, lines = contents(folder), []
    prepare(tiny_settings(tmp_path, texts=tiny_texts(61)), report=lines.append)
    assert contents(folder) == before
    assert "the text has changed since" in lines[1]
    assert "--fresh prepares it again" in lines[1]
    settings = tiny_settings(tmp_path, texts=tiny_texts(61))
    prepare(settings, report=quiet, fresh=True)
    prepare(settings, report=lines.append)
    assert len(lines) == 3
    (tmp_path / "corpus.jsonl").unlink()
    prepare(settings, report=lines.append)
    assert "0 of 0 now" in lines[4]


def test_a_given_tokenizer_that_a_run_could_not_export_is_refused_first(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny_texts(50)),
        model_writer=model,
        vocab_size=320,
        model_type="unigram",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["\n"],
        minloglevel=2,
    )
    (tmp_path / "unigram.model").write_bytes(model.getvalue())
    with pytest.raises(DataError, match=r"unigram\.model: a unigram model; only BPE"):
        tiny_shards(tmp_path, tokenizer={"model": str(tmp_path / "unigram.model")})
    assert not (tmp_path / "shards").exists()


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tree = {"source": {"kind": "text", "path": "~/texts"}, "tokenizer": {"model": "~/m"}, "output": "~/out"}
    settings = PrepareSettings(**tree)
    found = (settings.source.path, settings.tokenizer.model, settings.output, DataSettings(shards="~/s").shards)
    assert found == tuple(f"{tmp_path}/{name}" for name in ("texts", "m", "out", "s"))
    with pytest.raises(ValidationError, match="NUL"):
        DataSettings(shards="a\0b")


def test_names_that_no_disk_takes_are_refused(tmp_path):
    long = "x" * 300
    with pytest.raises(CannotWriteError, match=r"cannot be opened \(File name too long\)"):
        tiny_shards(tmp_path, output=long)
    for kind in ("text", "jsonl"):
        with pytest.raises(DataError, match=r"cannot be read \(File name too long\); correct source\.path"):
            tiny_shards(tmp_path, source={"kind": kind, "path": str(tmp_path / long)})


def test_when_the_new_folder_cannot_take_its_place_the_old_one_returns(tmp_path, monkeypatch):
    before = contents(tiny_shards(tmp_path))
    rename = os.rename

    def refuse(source, target):
        if Path(source).name == "content":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target)

    monkeypatch.setattr("tnl.data.scratch.os.rename", refuse)
    with pytest.raises(CannotWriteError, match="Input/output error"):
        prepare(tiny_settings(tmp_path, seed=1), report=quiet, fresh=True)
    assert contents(tmp_path / "shards") == before
    assert not list(tmp_path.glob("*.tmp-*"))


def test_a_folder_of_other_things_is_never_replaced(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "thesis.txt").write_text("mine")
    for fresh in (False, True):
        with pytest.raises(DataError, match="exists and is not a folder of shards"):
            prepare(tiny_settings(tmp_path), report=quiet, fresh=fresh)
    assert (tmp_path / "shards" / "thesis.txt").read_text() == "mine"


def test_nothing_to_train_on_or_to_hold_out_is_told(tmp_path):
    with pytest.raises(DataError, match="no document with text"):
        tiny_shards(tmp_path, texts=["", " "])
    with pytest.raises(DataError, match="heldout_fraction: every document was held out"):
        tiny_shards(tmp_path, heldout_fraction=0.999999)
    lines = []
    prepare(tiny_settings(tmp_path, heldout_fraction=1e-9), report=lines.append)
    assert any("no document was held out" in line for line in lines)


def test_a_source_that_changes_meanwhile_is_refused(tmp_path, monkeypatch):
    settings = tiny_settings(tmp_path)

    def change(line):
        write_jsonl(Path(settings.source.path), tiny_texts(61))

    with pytest.raises(DataError, match="the source changed while it was being prepared"):
        prepare(settings, report=change)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("where", ["tnl.data.shard_writer.os.fsync", "tnl.data.scratch.os.rename"])
def test_a_disk_that_does_not_take_the_result_leaves_nothing(tmp_path, monkeypatch, code, where):
    def refuse(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(where, refuse)
    with pytest.raises(CannotWriteError, match=rf"shards: cannot be written \({os.strerror(code)}\); free space"):
        tiny_shards(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_a_full_disk_at_the_flush_of_a_large_shard_leaves_nothing(tmp_path):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    settings = tiny_settings(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(CannotWriteError, match="File too large"):
            prepare(settings, report=quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


# Writes slowly, so that a kill lands at any point of the work.
SLOW = """
import json, os, sys, time
from tnl.data.prepare import prepare
from tnl.data.settings import PrepareSettings
real = os.fsync
def slow(descriptor):
    time.sleep(0.03)
    real(descriptor)
os.fsync = slow
print("ready", flush=True)
prepare(PrepareSettings(**json.loads(sys.argv[1])))
"""


def start_slowly(settings):
    command = [sys.executable, "-c", SLOW, json.dumps(settings.model_dump())]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def test_killed_anywhere_it_leaves_no_half_output_and_a_rerun_gives_the_same_bytes(tmp_path):
    settings = tiny_settings(tmp_path)
    expected = contents(tiny_shards(tmp_path, output="whole"))
    output = Path(settings.output)
    left_something = 0
    for delay in (0.0, 0.1, 0.2, 0.25, 0.3, 0.35):
        process = start_slowly(settings)
        time.sleep(delay)
        process.kill()
        process.communicate()
        left_something += len(list(tmp_path.glob("shards.tmp-*")))
        assert not output.exists() or contents(output) == expected
    assert left_something
    prepare(settings, report=quiet)
    assert contents(output) == expected
    verify(output)
    if not list(tmp_path.glob("shards.tmp-*")):
        return
    prepare(settings, report=quiet, fresh=True)
    assert not list(tmp_path.glob("shards.tmp-*"))


def test_two_at_once_end_with_one_good_folder(tmp_path):
    settings = tiny_settings(tmp_path)
    expected = contents(tiny_shards(tmp_path, output="whole"))
    processes = [start_slowly(settings) for _ in range(2)]
    printed = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert contents(Path(settings.output)) == expected
    assert not list(tmp_path.glob("shards.tmp-*"))
