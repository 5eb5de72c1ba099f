"""Where held-out documents are from: told by the shards, and a loss for each source."""

import json

import numpy as np
import pytest
import torch

from tests.tiny_corpus import tiny_settings, tiny_shards, tiny_texts, write_jsonl
from tests.tiny_model import tiny_model
from tests.tiny_run import rows, tiny_run
from tnl.data.prepare import prepare
from tnl.data.settings import JsonlSource, StdlibSource, TextSource
from tnl.data.shard_format import ShardIndex
from tnl.data.shards import ShardSet
from tnl.data.source_names import MAX_NAMES, runs_of, source_name
from tnl.errors import DataError
from tnl.evaluation.heldout import heldout_loss
from tnl.evaluation.source_loss import SourceDocuments, documents_by_source, source_losses
from tnl.training.pretrain import pretrain

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Of two files of JSON Lines."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "texts").mkdir()
    write_jsonl(folder / "texts" / "books.jsonl", tiny_texts(30, seed=1))
    write_jsonl(folder / "texts" / "code.jsonl", tiny_texts(60, seed=2))
    settings = tiny_settings(folder).model_copy(
        update={"source": JsonlSource(kind="jsonl", path=str(folder / "texts"))}
    )  # fmt: skip
    return prepare(settings, report=lambda line: None)


@pytest.mark.parametrize(
    ("source", "document", "name"),
    [
        (TextSource(kind="text", path="x"), "books/old/a.txt", "books"),
        (TextSource(kind="text", path="x"), "a.txt", "files"),
        (JsonlSource(kind="jsonl", path="x"), "web.en.jsonl:12", "web.en"),
        (JsonlSource(kind="jsonl", path="x"), "web/en.jsonl:12", "web"),
        (StdlibSource(kind="stdlib"), "json/decoder.py", "stdlib"),
    ],
)
def test_a_document_has_a_source(source, document, name):
    assert source_name(source, document) == name


def test_names_are_kept_in_runs():
    assert runs_of(["a", "a", "b", "a"]) == [("a", 2), ("b", 1), ("a", 1)]
    assert runs_of(["a", "a"]) == []
    assert runs_of(map(str, range(MAX_NAMES + 1))) == []


def test_shards_say_where_their_held_out_documents_are_from(shards):
    heldout = ShardSet.open(shards, "heldout")
    found = {name: count for name, count in heldout.index.heldout_sources}
    assert found.keys() == {"books", "code"}
    assert sum(found.values()) == heldout.num_documents
    books, code = documents_by_source(heldout).values()
    assert books.num_tokens + code.num_tokens == heldout.num_tokens
    assert len(books.document_starts(0, books.num_tokens)) == found["books"]
    assert books.document_starts(0, 1).tolist() == code.document_starts(0, 1).tolist() == [0]
    everything = np.concatenate([part.tokens(0, part.num_tokens) for part in (books, code)])
    assert np.array_equal(everything, heldout.tokens(0, heldout.num_tokens))


def test_documents_of_a_source_stand_one_behind_the_other(shards):
    heldout = ShardSet.open(shards, "heldout")
    starts = [*heldout.document_starts(0, heldout.num_tokens).tolist(), heldout.num_tokens]
    documents = SourceDocuments(heldout)
    chosen = [(0, 1), (2, 4), (4, 5)]
    for first, last in chosen:
        documents.add(starts[first], starts[last])
    expected = np.concatenate([heldout.tokens(starts[first], starts[last]) for first, last in chosen])
    lengths = [starts[i + 1] - starts[i] for i in (0, 2, 3, 4)]
    bounds = np.cumsum([0, *lengths])
    assert documents.num_tokens == bounds[-1]
    rng = np.random.default_rng(0)
    for start, stop in [(0, bounds[-1]), (bounds[-1], bounds[-1]), *np.sort(rng.integers(0, bounds[-1] + 1, (50, 2)))]:
        assert np.array_equal(documents.tokens(start, stop), expected[start:stop])
        found = documents.document_starts(start, stop)
        assert found.tolist() == [bound for bound in bounds[:-1] if start <= bound < stop]


def test_one_source_is_none(tmp_path):
    shards = tiny_shards(tmp_path)
    assert ShardIndex.read(shards).heldout_sources == []
    assert source_losses(tiny_model(vocab_size=340), ShardSet.open(shards, "heldout"), 100, device=CPU) == {}


def test_an_index_of_before_is_read_and_has_the_same_fingerprint(shards, tmp_path):
    facts = json.loads((shards / "index.json").read_text())
    runs = facts.pop("heldout_sources")
    (tmp_path / "index.json").write_text(json.dumps(facts))
    old = ShardIndex.read(tmp_path)
    assert old.heldout_sources == []
    assert old.fingerprint == ShardIndex.read(shards).fingerprint
    for wrong in (runs[:-1], [["books", 0], *runs], "books", [["books"]]):
        (tmp_path / "index.json").write_text(json.dumps(facts | {"heldout_sources": wrong}))
        with pytest.raises(DataError, match="heldout_sources does not name its"):
            ShardIndex.read(tmp_path)


@pytest.mark.parametrize("window", [None, 16])
def test_losses_of_the_sources_make_up_the_whole(shards, window):
    model, heldout = tiny_model(vocab_size=340), ShardSet.open(shards, "heldout")
    options = {"device": CPU, "length": 64, "window": None}
    whole = heldout_loss(model, heldout, **options)
    found = source_losses(model, heldout, 2 * heldout.num_tokens, **options)
    assert sum(loss.loss_sum for loss in found.values()) == pytest.approx(whole.loss_sum, rel=1e-5)
    assert sum(loss.num_predicted for loss in found.values()) == whole.num_predicted
    some = source_losses(model, heldout, 100, **options | {"window": window})
    assert {loss.num_tokens for loss in some.values()} == {50}


def test_a_run_records_the_loss_of_each_source(shards, tmp_path):
    pretrain(tiny_run(shards, tmp_path / "run", "train.steps=3"))
    (row,) = rows(tmp_path / "run", "evaluation")
    assert {"loss/books", "loss/code"} < row.keys()
    counted = source_losses(tiny_model(vocab_size=340), ShardSet.open(shards, "heldout"), 262_144, device=CPU)
    parts = [(row[f"loss/{name}"], loss.num_predicted) for name, loss in counted.items()]
    # The run reads windows of 32 tokens that begin anew with each source, and anywhere in the whole.
    assert np.average([p[0] for p in parts], weights=[p[1] for p in parts]) == pytest.approx(row["loss"], abs=0.02)
    pretrain(tiny_run(shards, tmp_path / "off", "train.steps=3", "evaluation.by_source=false"))
    (row,) = rows(tmp_path / "off", "evaluation")
    assert "loss/books" not in row
