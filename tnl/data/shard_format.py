"""The shard format: what stands in a shard file and in the index of a folder.

A shard file is a 128-byte little-endian header, the token ids (uint16 or uint32), zeros up to a multiple of 8 bytes,
and the positions at which documents start in this shard (uint64). A document longer than what is left of a shard goes
on in the next. A folder holds ``index.json``, ``tokenizer.model`` and the shards of the splits ``train`` and
``heldout``.
"""

import hashlib
import json
import struct
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from tnl.errors import DataError
from tnl.files import sha256_of

FORMAT_VERSION = 1
MAGIC = b"TNLSHARD"
HEADER_BYTES = 128
INDEX_FILE = "index.json"
TOKENIZER_FILE = "tokenizer.model"
SPLITS = ("train", "heldout")
REBUILD = "copy the folder again or prepare it anew with --fresh"

# magic, format version, bytes per id, tokens, documents, vocabulary, largest id, SHA-256 of the tokenizer model
_HEADER = struct.Struct("<8sIIQQQQ32s")
_DTYPES = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


@dataclass(frozen=True)
class ShardHeader:
    """The facts in front of a shard file; ``tokenizer_sha256`` is hex, ``id_bytes`` 2 or 4."""

    id_bytes: int
    num_tokens: int
    num_documents: int
    vocab_size: int
    max_token_id: int
    tokenizer_sha256: str

    def pack(self) -> bytes:
        """The `HEADER_BYTES` bytes of this header."""
        numbers = (self.id_bytes, self.num_tokens, self.num_documents, self.vocab_size, self.max_token_id)
        return _HEADER.pack(MAGIC, FORMAT_VERSION, *numbers, bytes.fromhex(self.tokenizer_sha256)).ljust(
            HEADER_BYTES, b"\0"
        )

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the token ids."""
        return _DTYPES[self.id_bytes]

    @property
    def starts_offset(self) -> int:
        """Byte offset of the document starts."""
        return HEADER_BYTES + -(-self.num_tokens * self.id_bytes // 8) * 8

    @property
    def file_bytes(self) -> int:
        """Size of the whole file in bytes."""
        return self.starts_offset + 8 * self.num_documents


def read_header(file: Path) -> ShardHeader:
    """Header of a shard file, checked against the file's size; raises `DataError` naming the file and both sizes."""
    try:
        with file.open("rb") as stream:
            raw = stream.read(HEADER_BYTES)
        size = file.stat().st_size
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); {REBUILD}") from error
    if len(raw) < HEADER_BYTES:
        raise DataError(f"{file}: {size} bytes, a shard has at least {HEADER_BYTES}; {REBUILD}")
    magic, version, id_bytes, tokens, documents, vocab_size, max_id, sha256 = _HEADER.unpack_from(raw)
    if magic != MAGIC or version != FORMAT_VERSION:
        raise DataError(
            f"{file}: starts with {magic!r} version {version}, expected {MAGIC!r} version {FORMAT_VERSION}; {REBUILD}"
        )
    if id_bytes not in _DTYPES or max_id >= max(vocab_size, 1):
        raise DataError(
            f"{file}: {id_bytes} bytes per id and largest id {max_id} with {vocab_size} pieces make no sense; {REBUILD}"
        )
    header = ShardHeader(id_bytes, tokens, documents, vocab_size, max_id, sha256.hex())
    if size != header.file_bytes:
        raise DataError(
            f"{file}: {size} bytes, expected {header.file_bytes} for {tokens} tokens and {documents} documents; "
            f"{REBUILD}"
        )
    return header


@dataclass(frozen=True)
class ShardEntry:
    """What the index says about one shard; ``num_bytes`` is the UTF-8 size of the documents that start in it."""

    file: str
    num_tokens: int
    num_documents: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardIndex:
    """The content of ``index.json``; ``settings`` and ``counts`` are for the reader and not part of the fingerprint.

    ``heldout_sources`` says where the held-out documents are from: a name and a number of documents, again and again,
    in the order of the split. Empty where all are from one source, and in folders that were prepared without it; not
    part of the fingerprint, either.
    """

    splits: dict[str, list[ShardEntry]]
    tokenizer_sha256: str
    vocab_size: int
    add_bos: bool
    add_eos: bool
    settings: dict
    counts: dict
    heldout_sources: list[tuple[str, int]] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 over everything that determines the tokens: content hashes, order, tokenizer."""
        facts = [FORMAT_VERSION, self.tokenizer_sha256, self.vocab_size, self.add_bos, self.add_eos]
        splits = {split: [asdict(entry) for entry in entries] for split, entries in self.splits.items()}
        return hashlib.sha256(json.dumps([facts, splits], sort_keys=True).encode()).hexdigest()

    def dump(self) -> str:
        """The text of ``index.json``."""
        return json.dumps({"format": FORMAT_VERSION, "fingerprint": self.fingerprint, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def read(cls, folder: str | Path) -> "ShardIndex":
        """Index of a folder; raises `DataError` when it is missing, damaged, altered, or names files elsewhere."""
        file = Path(folder) / INDEX_FILE
        try:
            raw = file.read_bytes()
        except OSError as error:
            raise DataError(
                f"{file}: cannot be read ({error.strerror}); give a folder that `tnl data prepare` wrote"
            ) from error
        try:
            facts = json.loads(raw)
            version, fingerprint = facts.pop("format"), facts.pop("fingerprint")
            splits = facts.pop("splits")
            index = cls({name: [ShardEntry(**entry) for entry in splits[name]] for name in SPLITS}, **facts)
            actual = index.fingerprint
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DataError(f"{file}: not an index of shards ({type(error).__name__}: {error}); {REBUILD}") from error
        if version != FORMAT_VERSION:
            raise DataError(f"{file}: format version {version!r}, this program reads {FORMAT_VERSION}; prepare it anew")
        for entry in (entry for entries in index.splits.values() for entry in entries):
            if not isinstance(entry.file, str) or Path(entry.file).name != entry.file or entry.file in ("", ".."):
                raise DataError(f"{file}: shard file {entry.file!r} is not a plain file name; {REBUILD}")
            counts = (entry.num_tokens, entry.num_documents, entry.num_bytes)
            if not all(type(count) is int and count >= 0 for count in counts):
                raise DataError(f"{file}: counts {counts} of {entry.file!r} are not whole numbers; {REBUILD}")
        held_out = sum(entry.num_documents for entry in index.splits["heldout"])
        if index.heldout_sources and not _counts_to(index.heldout_sources, held_out):
            raise DataError(f"{file}: heldout_sources does not name its {held_out} held-out documents; {REBUILD}")
        if actual != fingerprint:
            raise DataError(f"{file}: fingerprint {fingerprint!r}, but its entries give {actual}; {REBUILD}")
        return index


def _counts_to(runs: object, num_documents: int) -> bool:
    """Whether ``runs`` are names with numbers of documents that add up to ``num_documents``."""
    return (
        isinstance(runs, list)
        and all(isinstance(run, list) and list(map(type, run)) == [str, int] and run[1] > 0 for run in runs)
        and sum(run[1] for run in runs) == num_documents
    )


def id_bytes_of(vocab_size: int) -> int:
    """Bytes of one stored id: 2 where ``vocab_size`` ids fit, else 4."""
    return 2 if vocab_size <= 2**16 else 4


def file_sha256(file: Path) -> str:
    """Hex SHA-256 of a file; raises `DataError` when it cannot be read."""
    try:
        return sha256_of(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); {REBUILD}") from error
