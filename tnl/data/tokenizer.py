"""The tokenizer: sentencepiece BPE with byte fallback, such that ``decode(encode(text)) == text`` for every text."""

import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from tnl.errors import DataError

UNK_ID, BOS_ID, EOS_ID = 0, 1, 2

# sentencepiece writes a space as this character inside its pieces, and reads the character itself back as a space.
SPACE_MARK = "\u2581"

# A line break with the indentation after it is one piece when it is among the most frequent ones of the corpus: most
# lines of code then begin with a single token. Such a piece is a user-defined symbol, because training sees one line
# at a time.
_BREAK = re.compile(r"\n+ *")
_MAX_BREAKS = 16
_IDS_PER_BREAK = 64

# One line with the break before it; a long line in parts, since sentencepiece drops a line beyond its length limit.
_LINE = re.compile(r"(?:\n+ *)?[^\n]{1,1000}")
_MAX_LINE_BYTES = 2**16

# A longer text is encoded in parts: sentencepiece needs about 40 bytes of memory per character of one text.
_PART_CHARACTERS = 2**18
_LINE_END = re.compile(r"(?<=[^\n])\n")

# Texts that a lossy model (space stripping, a prefix, Unicode normalization, no byte fallback) does not give back.
_LOSSLESS_PROBES = (
    "  two\tspaces \n\n    end ",
    f"in{SPACE_MARK}side",
    "\uff21\u00e9e\u0301 \u4e2d\u6587 \U0001f600\U0010ffff",
)


def train_tokenizer(texts: Iterable[str], vocab_size: int, character_coverage: float = 0.9995) -> bytes:
    """Train a BPE model of ``vocab_size`` pieces on ``texts`` and return the model file's bytes, equal for equal input.

    Ids: 0 ``<unk>``, 1 ``<s>``, 2 ``</s>``, no padding piece; digits stand alone; characters outside the most frequent
    ``character_coverage`` of the text become UTF-8 bytes. ``texts`` is iterated once and held in memory. Raises
    `DataError` when ``vocab_size`` is more than the texts support, or too small for the bytes and characters.
    """
    texts = list(texts)
    breaks = Counter(found for text in texts for found in _BREAK.findall(text))
    num_breaks = max(1, min(_MAX_BREAKS, vocab_size // _IDS_PER_BREAK))
    # Sorted by count, then by the text itself: equal counts must not depend on the order of the documents.
    chosen = sorted((item for item in breaks if item != "\n"), key=lambda item: (-breaks[item], item))
    symbols = ["\n", *chosen[: num_breaks - 1]]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line.group() for text in texts for line in _LINE.finditer(text)),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=-1,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            # Code mixes letters and signs: "self." and "):" are worth a piece.
            split_by_unicode_script=False,
            user_defined_symbols=[symbol.replace(" ", SPACE_MARK) for symbol in symbols],
            character_coverage=character_coverage,
            max_sentence_length=_MAX_LINE_BYTES,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(_training_failure(str(error), vocab_size)) from error
    return model.getvalue()


def _training_failure(message: str, vocab_size: int) -> str:
    if found := re.search(r"value <= (\d+)", message):
        return (
            f"tokenizer.vocab_size: {vocab_size} is more than this corpus supports; "
            f"set it to at most {found.group(1)} or give more text"
        )
    if found := re.search(r"\d+ vs (\d+)", message):
        return (
            f"tokenizer.vocab_size: {vocab_size} does not hold all bytes and frequent characters; "
            f"set it to at least {found.group(1)}, better twice that, or lower tokenizer.character_coverage"
        )
    return f"the tokenizer cannot be trained on this corpus: {message.strip()}; give more text"


class Tokenizer:
    """A sentencepiece model that loses nothing: text to ids and back.

    Attributes: ``vocab_size``, ``sha256`` (hex, of the model file), ``bos_id``, ``eos_id``, ``unk_id``. Neither
    `encode` nor `encode_batch` adds bos or eos, and a text never yields one: ``"<s>"`` in a text is three ordinary
    characters.
    """

    def __init__(self, model: bytes, name: str = "tokenizer") -> None:
        """``model``: content of a model file, ``name``: what errors call it.

        Raises `DataError` if it loses text or is not BPE, the one type that `tokenizer_export` can write.
        """
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.vocab_size = self._processor.get_piece_size()
        except RuntimeError as error:
            raise DataError(f"{name}: not a sentencepiece model; give the tokenizer.model that belongs here") from error
        _check_type(model, name)
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.unk_id, self.bos_id, self.eos_id = (
            self._processor.unk_id(),
            self._processor.bos_id(),
            self._processor.eos_id(),
        )
        if min(self.bos_id, self.eos_id) < 0:
            raise DataError(f"{name}: has no <s> or no </s> piece; train the model with both")
        pieces = [f"<0x{byte:02X}>" for byte in SPACE_MARK.encode()]
        # No merge crosses the end of a line when no piece does: then the parts have the ids of the whole.
        self._has_line_parts = not any(_LINE_END.search(self._processor.id_to_piece(i)) for i in range(self.vocab_size))
        self._mark_ids = [self._processor.piece_to_id(piece) for piece in pieces]
        for probe in _LOSSLESS_PROBES:
            if self.decode(self.encode(probe)) != probe:
                raise DataError(
                    f"{name}: decoding does not give the text back; use a model with byte fallback, identity "
                    "normalization, add_dummy_prefix=false and remove_extra_whitespaces=false"
                )

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """The tokenizer of a model file; raises `DataError` when it cannot be read or loses text."""
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot read the tokenizer model ({error.strerror}); correct the path") from error
        return cls(model, str(path))

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``."""
        return self.encode_batch([text], 1)[0]

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        """Ids of each text, by ``num_threads`` threads; the result does not depend on their number."""
        # The mark itself goes around sentencepiece as its three bytes, so that it does not come back as a space.
        split = [[self._parts(section) for section in text.split(SPACE_MARK)] for text in texts]
        flat = [part for sections in split for section in sections for part in section]
        encoded = iter(self._processor.encode(flat, num_threads=num_threads))
        batch = []
        for sections in split:
            ids = []
            for i, section in enumerate(sections):
                ids += self._mark_ids if i else []
                for _ in section:
                    ids += next(encoded)
            batch.append(ids)
        return batch

    def num_bytes(self, i: int) -> int:
        """UTF-8 bytes of text that the id ``i`` stands for; 0 for bos, eos and the like."""
        if self._processor.is_byte(i):
            return 1
        if self._processor.is_control(i) or self._processor.is_unknown(i):
            return 0
        return len(self._processor.id_to_piece(i).replace(SPACE_MARK, " ").encode())

    def _parts(self, text: str) -> list[str]:
        """``text`` cut before ends of lines such that the ids stay the same."""
        parts, start = [], 0
        while self._has_line_parts and (found := _LINE_END.search(text, start + _PART_CHARACTERS)):
            parts.append(text[start : found.start()])
            start = found.start()
        return [*parts, text[start:]]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; bos and eos give nothing, bytes that are not UTF-8 give U+FFFD."""
        return self._processor.decode([int(i) for i in ids])


def _check_type(model: bytes, name: str) -> None:
    import sentencepiece.sentencepiece_model_pb2 as protobuf

    kind = protobuf.ModelProto.FromString(model).trainer_spec.model_type
    if kind != protobuf.TrainerSpec.BPE:
        found = protobuf.TrainerSpec.ModelType.Name(kind).lower()
        raise DataError(f"{name}: a {found} model; only BPE models can be used, as tokenizer.vocab_size trains one")
