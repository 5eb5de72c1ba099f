"""The unique documents of a source, which of them count, and which are held out."""

import hashlib
import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

from tnl.data.settings import PrepareSettings
from tnl.data.source_names import source_name
from tnl.data.sources import SourceCounts, iterate_documents
from tnl.errors import DataError

# A long document enters the tokenizer's sample in parts of this many characters, so that one book is not the whole
# sample.
_SAMPLE_PART = 2**16


@dataclass(frozen=True)
class Document:
    """One unique document."""

    text: str
    num_bytes: int  # of UTF-8
    rank: bytes  # random order of the documents, a function of seed and text
    held_out: bool
    source: str  # see `tnl.data.source_names`


@dataclass
class Corpus:
    """The unique documents of a source; read once per pass, so that memory does not grow with the text.

    A pass remembers 16 bytes per document (about 100 bytes of memory) to find exact duplicates.
    """

    settings: PrepareSettings
    counts: dict[str, int] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    _bound: bytes | None = None  # documents of this rank and above are left out
    _passes: set[bytes] = field(default_factory=set)

    def documents(self) -> Iterator[Document]:
        """One pass, setting ``counts`` and ``messages`` at its end; `DataError` when it differs from the one before."""
        source_counts = SourceCounts()
        seen: set[bytes] = set()
        content = hashlib.sha256()
        duplicates = left_out = 0
        seed = str(self.settings.seed).encode()
        for name, text in iterate_documents(self.settings.source, source_counts):
            data = text.encode()
            digest = hashlib.sha256(data).digest()
            content.update(digest)
            if digest[:16] in seen:
                duplicates += 1
                continue
            seen.add(digest[:16])
            draw = hashlib.sha256(seed + b":" + digest).digest()
            if self._bound is not None and draw[8:] >= self._bound:
                left_out += 1
                continue
            held_out = int.from_bytes(draw[:8], "big") < self.settings.heldout_fraction * 2**64
            yield Document(text, len(data), draw[8:], held_out, source_name(self.settings.source, name))
        self.counts = {
            "documents": len(seen) - left_out,
            "empty": source_counts.empty,
            "bad": source_counts.bad,
            "duplicates": duplicates,
            "left_out_by_max_bytes": left_out,
        }
        self.messages = source_counts.messages
        self._passes.add(content.digest())
        if len(self._passes) > 1:
            raise DataError("the source changed while it was being prepared; start again when it is at rest")

    def limit(self, max_bytes: int) -> None:
        """Keep the documents of lowest rank that together have at most ``max_bytes`` bytes."""
        lowest = _Lowest(max_bytes)
        for document in self.documents():
            lowest.add(document.rank, document.num_bytes, None)
        if not lowest.items():
            raise DataError(f"source.max_bytes: {max_bytes} does not hold the first document drawn; raise it")
        self._bound = lowest.bound

    def sample(self, sample_bytes: int) -> list[str]:
        """Parts of train documents, at most ``sample_bytes`` bytes, the same whatever the order of the source."""
        lowest = _Lowest(sample_bytes)
        for document in self.documents():
            if document.held_out:
                continue
            for start in range(0, len(document.text), _SAMPLE_PART):
                part = document.text[start : start + _SAMPLE_PART]
                rank = hashlib.sha256(document.rank + start.to_bytes(8, "big")).digest()
                lowest.add(rank, len(part.encode()), part)
        if not lowest.items():
            if lowest.bound is None:
                raise DataError("heldout_fraction: every document was held out; lower it or give more documents")
            raise DataError(f"tokenizer.sample_bytes: {sample_bytes} does not hold the first text drawn; raise it")
        return lowest.items()


class _Lowest:
    """Items in the order of their ranks, up to the first that exceeds ``capacity``, whatever their order of arrival.

    ``bound`` is the rank of the first item that did not fit, None while all fit.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity, self._total = capacity, 0
        self._heap: list[tuple[bytes, int, str | None]] = []  # reversed rank, weight, item: the highest rank is on top
        self.bound: bytes | None = None

    def add(self, rank: bytes, weight: int, item: str | None) -> None:
        """Take in one item; ranks are different."""
        if self.bound is not None and rank >= self.bound:
            return
        heapq.heappush(self._heap, (_reversed(rank), weight, item))
        self._total += weight
        while self._total > self._capacity:
            dropped, weight, _ = heapq.heappop(self._heap)
            self._total -= weight
            self.bound = _reversed(dropped)

    def items(self) -> list[str | None]:
        """The items that fit, lowest rank first."""
        return [item for _, _, item in sorted(self._heap, reverse=True)]


def _reversed(rank: bytes) -> bytes:
    """Order-reversing map, for a heap with the largest on top."""
    return bytes(255 - byte for byte in rank)
