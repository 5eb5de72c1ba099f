"""A `tokenizers` tokenizer built from a sentencepiece BPE model, with sentencepiece's own ids."""

from collections.abc import Sequence

import sentencepiece
import sentencepiece.sentencepiece_model_pb2 as protobuf
import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers

# sentencepiece writes a space as this character inside its pieces, and reads the character itself as a space.
SPACE_MARK = "\u2581"

# Texts on which a tokenizer that was built is held against sentencepiece: breaks, runs that can merge in several ways,
# bytes, names of special tokens, the mark itself, characters that a normalization would change.
PROBES = (
    "",
    "def main(argv):\n    if not argv:\n        return None\n\n\n\tprint('x = %d' % 10**9)\r\n",
    "  leading, inner    and trailing spaces   ",
    "\n\n\n         \n \n",
    "\u4eca\u5929\u5929\u6c14\u5f88\u597d\uff0c\u6211\u4eec\u53bb\u516c\u56ed\u3002",
    "\uff21\u00e9e\u0301 \u1100\u1161\u11a8 \ufb01\u2460\u0301",
    "\U0001f600 \U0001f468\u200d\U0001f469",
    "<s></s><unk><0x0A>" + SPACE_MARK + " " + SPACE_MARK * 2,
    "\x00\x07\ufeff\u2028\ud7ff\ue000\U0010ffff",
    *(character * length for character in " =-#*._/\n" for length in range(1, 80, 3)),
)


def load_model(content: bytes, name: str) -> tuple[sentencepiece.SentencePieceProcessor, protobuf.ModelProto]:
    """The model of a file's ``content``, for sentencepiece and as its fields.

    Raises ValueError, which calls the file ``name``, for a file that is no sentencepiece model and for a model whose
    ids `build_tokenizer` cannot reproduce.
    """
    try:
        if not content:  # sentencepiece takes it for no argument
            raise RuntimeError("an empty file")
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise ValueError(
            f"{name}: not a sentencepiece model ({len(content)} bytes); download the file again, it may be cut off or "
            "a pointer of git-lfs"
        ) from error
    proto = protobuf.ModelProto.FromString(content)
    if reason := _unsupported(proto):
        raise ValueError(f"{name}: {reason}; give the model's own tokenizer.model, or a tokenizer.json instead")
    return processor, proto


def _unsupported(proto: protobuf.ModelProto) -> str | None:
    """Why the ids of sentencepiece cannot be reproduced."""
    kinds = protobuf.ModelProto.SentencePiece
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != protobuf.TrainerSpec.BPE:
        found = protobuf.TrainerSpec.ModelType.Name(trainer.model_type).lower()
        return f"a {found} model, only BPE models can be loaded"
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        return "a model that puts spaces at the ends of words or keeps them in its pieces"
    if proto.denormalizer_spec.precompiled_charsmap:
        return "a model that changes the text that it decodes"
    characters = {piece.piece for piece in proto.pieces if piece.type in (kinds.NORMAL, kinds.USER_DEFINED)}
    for piece in proto.pieces:
        if piece.type == kinds.UNUSED:
            return f"has the disabled piece {piece.piece!a}"
        if piece.type not in (kinds.NORMAL, kinds.USER_DEFINED) and len(piece.piece) == 1:
            return f"has a special token of one character, {piece.piece!a}"
        if piece.type == kinds.NORMAL and not characters.issuperset(piece.piece):
            return f"the piece {piece.piece!a} has a character that is no piece"
    return None


def needs_sentencepiece(proto: protobuf.ModelProto) -> bool:
    """Whether the text must go through sentencepiece's normalization before the tokenizer of `build_tokenizer`.

    `tokenizers` cannot reproduce the replacement table of a model (its own form of it differs for characters with
    combining marks), nor a prefix in front of a user-defined symbol.
    """
    spec = proto.normalizer_spec
    symbols = any(piece.type == protobuf.ModelProto.SentencePiece.USER_DEFINED for piece in proto.pieces)
    return bool(spec.precompiled_charsmap) or (symbols and (spec.add_dummy_prefix or spec.remove_extra_whitespaces))


def build_tokenizer(proto: protobuf.ModelProto, mark_is_text: bool = False) -> tokenizers.Tokenizer:
    """The tokenizer of a model that `load_model` accepts; it adds nothing at the ends.

    Its ids are those of sentencepiece for every text, or, with `needs_sentencepiece`, for every text that
    sentencepiece normalized. ``mark_is_text`` makes it lossless: `SPACE_MARK` inside a text becomes its UTF-8 bytes
    instead of a space; the model must then have identity normalization, no prefix and no space stripping.
    """
    kinds = protobuf.ModelProto.SentencePiece
    spec = proto.normalizer_spec
    assert not (mark_is_text and (needs_sentencepiece(proto) or spec.add_dummy_prefix or spec.remove_extra_whitespaces))
    # With a plain space in the pieces the mark is a character like any other, and unknown to the model.
    names = [piece.piece.replace(SPACE_MARK, " ") if mark_is_text else piece.piece for piece in proto.pieces]
    unk = next(names[i] for i, piece in enumerate(proto.pieces) if piece.type == kinds.UNKNOWN)
    vocabulary = {name: i for i, name in enumerate(names)}
    mergeable = {names[i]: piece.score for i, piece in enumerate(proto.pieces) if piece.type == kinds.NORMAL}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab=vocabulary,
            merges=find_merges(mergeable, vocabulary),
            unk_token=unk,
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    if not mark_is_text and not needs_sentencepiece(proto):
        tokenizer.normalizer = _normalizer(spec)
    tokenizer.decoder = _decoder(spec, mark_is_text)
    specials = [names[i] for i, piece in enumerate(proto.pieces) if piece.type in (kinds.UNKNOWN, kinds.CONTROL)]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in specials])
    symbols = [names[i] for i, piece in enumerate(proto.pieces) if piece.type == kinds.USER_DEFINED]
    # Symbols are found in the normalized text: a space in one may be a space or the mark in the text.
    tokenizer.add_tokens([AddedToken(symbol, normalized=not mark_is_text) for symbol in symbols])
    return tokenizer


def _normalizer(spec: protobuf.NormalizerSpec) -> normalizers.Normalizer:
    """What sentencepiece does to a text without a replacement table, step by step."""
    steps = [normalizers.Replace(" ", SPACE_MARK)]
    if spec.remove_extra_whitespaces:
        steps = [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " "), *steps]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE_MARK))
    if spec.remove_extra_whitespaces:
        # At the end the mark itself goes as well, as it does in sentencepiece.
        steps.append(normalizers.Replace(Regex(rf"{SPACE_MARK}+\z"), ""))
    return normalizers.Sequence(steps)


def _decoder(spec: protobuf.NormalizerSpec, mark_is_text: bool) -> decoders.Decoder:
    steps = [decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        # A space at the start of a piece goes while there is no text yet: of the first piece, or of all such pieces
        # where spaces are stripped. Spaces inside pieces stay, and are written before the pieces are joined.
        leading = rf"\A{SPACE_MARK}" + ("+" if spec.remove_extra_whitespaces else "")
        inner = decoders.Replace(Regex(rf"(?!\A){SPACE_MARK}"), " ")
        return decoders.Sequence(
            [inner, *steps, decoders.Replace(Regex(leading), ""), decoders.Replace(SPACE_MARK, " ")]
        )
    return decoders.Sequence(steps if mark_is_text else [decoders.Replace(SPACE_MARK, " "), *steps])


def find_merges(scores: dict[str, float], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of pieces whose concatenation is a piece, best piece first: sentencepiece merges any such pair.

    ``scores`` holds the pieces that can be merged. The time is linear in their summed lengths.
    """
    merges = []
    for piece in sorted(scores, key=lambda name: (-scores[name], vocabulary[name])):
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        found = [(left, right) for left, right in splits if left in scores and right in scores]
        merges += sorted(found, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    return merges


def first_difference(
    tokenizer: tokenizers.Tokenizer,
    processor: sentencepiece.SentencePieceProcessor,
    texts: Sequence[str],
    outside: bool,
) -> str | None:
    """The first of ``texts`` whose ids or decoded text differ from sentencepiece's; None if there is none.

    ``outside``: whether the text goes through sentencepiece's normalization first.
    """
    tokenizer.encode_special_tokens = True
    given = [processor.normalize(text) for text in texts] if outside else texts
    encodings = tokenizer.encode_batch(given, add_special_tokens=False)
    for text, encoding, expected in zip(texts, encodings, processor.encode(list(texts)), strict=True):
        if encoding.ids != expected:
            return text
        if processor.unk_id() not in expected and tokenizer.decode(encoding.ids) != processor.decode(expected):
            return text
    return None
