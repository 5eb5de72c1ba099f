"""From a source to a finished folder of shards: deduplicate, hold out, tokenize, write, all or nothing."""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tnl.data.corpus import Corpus, Document
from tnl.data.scratch import scratch_folder
from tnl.data.settings import PrepareSettings
from tnl.data.shard_format import INDEX_FILE, SPLITS, TOKENIZER_FILE, ShardIndex
from tnl.data.shard_writer import ShardWriter
from tnl.data.shards import ShardSet
from tnl.data.source_names import runs_of
from tnl.data.sources import local_size
from tnl.data.tokenizer import Tokenizer, train_tokenizer
from tnl.errors import CannotWriteError, DataError

# Text that is tokenized at once: enough to keep the threads busy, little to hold.
_BATCH_CHARACTERS = 2**22


def prepare(settings: PrepareSettings, report: Callable[[str], None] = print, fresh: bool = False) -> Path:
    """Prepare the folder ``settings.output`` and return it; ``report`` gets lines for the user.

    The folder appears complete or not at all. One that is there is used again when it was made with the same settings
    (``output`` and ``num_workers`` aside), replaced if ``fresh``. The bytes are a function of the settings and the
    source. Raises `DataError` for bad input or a folder of other settings, `CannotWriteError` when the disk does not
    take the result.
    """
    output = Path(settings.output)
    model = _given_model(settings)
    recorded = settings.model_dump(exclude={"output", "num_workers"})
    if model is not None:
        recorded["tokenizer"]["model"] = hashlib.sha256(model).hexdigest()
    if _is_prepared(output, fresh) and _reusable(output, recorded, report):
        _warn_of_changes(settings, output, report)
        return output
    began = time.monotonic()
    try:
        with scratch_folder(output) as scratch:
            _write(settings, recorded, model, scratch.content, report)
            if not scratch.publish(replace=fresh):
                report(f"{output}: meanwhile prepared by another process")
                _reusable(output, recorded, report)
    except OSError as error:
        raise CannotWriteError(
            f"{output}: cannot be written ({error.strerror or error}); free space there or set output to another folder"
        ) from error
    report(f"{output}: done in {time.monotonic() - began:.1f} s")
    return output


def _is_prepared(output: Path, fresh: bool) -> bool:
    """Whether ``output`` holds shards to use again; raises for a folder that is neither that nor empty."""
    try:
        if not output.exists() or (output.is_dir() and not any(output.iterdir())):
            return False
    except OSError as error:
        raise CannotWriteError(
            f"{output}: cannot be opened ({error.strerror}); set output to another folder"
        ) from error
    if not (output / INDEX_FILE).is_file():
        raise DataError(f"{output}: exists and is not a folder of shards; set output to another folder")
    return not fresh


def _reusable(output: Path, recorded: dict, report: Callable[[str], None]) -> bool:
    """True when ``output`` was made with the settings ``recorded`` and its shards open; raises otherwise."""
    index = ShardIndex.read(output)
    if index.settings != recorded:
        both = recorded.keys() | index.settings.keys()
        differing = sorted(key for key in both if index.settings.get(key) != recorded.get(key))
        raise DataError(
            f"{output}: was prepared with other settings ({', '.join(differing)}); "
            "set output to another folder or replace it with --fresh"
        )
    for split in SPLITS:
        if index.splits[split]:
            ShardSet.open(output, split)
    report(f"{output}: already prepared with these settings, used as it is (--fresh prepares it again)")
    return True


def _warn_of_changes(settings: PrepareSettings, output: Path, report: Callable[[str], None]) -> None:
    """Tell when the files of the source are not those that ``output`` was made from, as far as their sizes show it."""
    counts = ShardIndex.read(output).counts
    size = local_size(settings.source)
    if size is not None and "files" in counts and size != (counts["files"], counts["file_bytes"]):
        report(
            f"warning: {output}: the text has changed since ({counts['files']:,} files of {counts['file_bytes']:,} "
            f"bytes then, {size[0]:,} of {size[1]:,} now); --fresh prepares it again"
        )


def _write(
    settings: PrepareSettings, recorded: dict, model: bytes | None, folder: Path, report: Callable[[str], None]
) -> None:
    """Fill ``folder`` with shards, tokenizer and index."""
    size = local_size(settings.source)
    corpus = Corpus(settings)
    if settings.source.max_bytes is not None:
        corpus.limit(settings.source.max_bytes)
    if model is None:
        model = _trained_model(settings, corpus, report)
    tokenizer = Tokenizer(model, settings.tokenizer.model or TOKENIZER_FILE)
    _write_durably(folder / TOKENIZER_FILE, model)
    layout = (settings.shard_tokens, tokenizer.vocab_size, tokenizer.sha256)
    writers = {split: ShardWriter(folder, split, *layout) for split in SPLITS}
    names: list[str] = []
    try:
        for document, ids in _encoded(settings, corpus, tokenizer):
            writers["heldout" if document.held_out else "train"].append(ids, document.num_bytes)
            if document.held_out:
                names.append(document.source)
        entries = {split: writer.close() for split, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.abandon()
    if not entries["train"]:
        raise DataError("heldout_fraction: every document was held out; lower it or give more documents")
    index = ShardIndex(
        entries,
        tokenizer.sha256,
        tokenizer.vocab_size,
        settings.add_bos,
        settings.add_eos,
        settings=recorded,
        counts=corpus.counts | ({} if size is None else {"files": size[0], "file_bytes": size[1]}),
        heldout_sources=runs_of(names),
    )
    _write_durably(folder / INDEX_FILE, index.dump().encode())
    _report_counts(index, corpus.messages, settings.heldout_fraction, report)


def _given_model(settings: PrepareSettings) -> bytes | None:
    """Content of the tokenizer model that the settings name, if they name one."""
    path = settings.tokenizer.model
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"tokenizer.model: {path} cannot be read ({error.strerror}); correct the path") from error


def _trained_model(settings: PrepareSettings, corpus: Corpus, report: Callable[[str], None]) -> bytes:
    """Content of a tokenizer model trained on a sample of the train split."""
    wanted = settings.tokenizer
    sample = corpus.sample(wanted.sample_bytes)
    began = time.monotonic()
    model = train_tokenizer(sample, wanted.vocab_size, wanted.character_coverage)
    size = sum(map(len, sample))
    report(f"tokenizer: {wanted.vocab_size} pieces from {size:,} characters in {time.monotonic() - began:.1f} s")
    return model


def _encoded(settings: PrepareSettings, corpus: Corpus, tokenizer: Tokenizer) -> Iterator[tuple[Document, list[int]]]:
    """Every document with its ids, bos and eos as set."""
    num_threads = settings.num_workers or len(os.sched_getaffinity(0))
    prefix = [tokenizer.bos_id] if settings.add_bos else []
    suffix = [tokenizer.eos_id] if settings.add_eos else []

    def encode(batch: list[Document]) -> Iterator[tuple[Document, list[int]]]:
        encoded = tokenizer.encode_batch([document.text for document in batch], num_threads)
        for document, ids in zip(batch, encoded, strict=True):
            yield document, prefix + ids + suffix

    batch, size = [], 0
    for document in corpus.documents():
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS:
            yield from encode(batch)
            batch, size = [], 0
    yield from encode(batch)


def _report_counts(index: ShardIndex, messages: list[str], fraction: float, report: Callable[[str], None]) -> None:
    counts = index.counts
    report(
        f"documents: {counts['documents']:,} kept, {counts['empty']:,} empty, {counts['bad']:,} bad, "
        f"{counts['duplicates']:,} exact duplicates, {counts['left_out_by_max_bytes']:,} beyond max_bytes"
    )
    for message in messages:
        report(f"  skipped: {message}")
    for split, entries in index.splits.items():
        tokens, size = sum(entry.num_tokens for entry in entries), sum(entry.num_bytes for entry in entries)
        documents = sum(entry.num_documents for entry in entries)
        ratio = f", {size / tokens:.3f} bytes per token" if tokens else ""
        report(f"{split}: {documents:,} documents, {tokens:,} tokens{ratio}, {len(entries)} shards")
    if fraction and not index.splits["heldout"]:
        report("warning: no document was held out, so there is nothing to evaluate on; raise heldout_fraction")


def _write_durably(file: Path, data: bytes) -> None:
    with file.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
