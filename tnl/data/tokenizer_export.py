"""Write a tokenizer so that `transformers.AutoTokenizer` loads it and gives the same ids."""

import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tnl.data.tokenizer import SPACE_MARK, Tokenizer
from tnl.errors import DataError

EXPORTED_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")

# What must give equal ids before anything is written: breaks, runs that can merge in several ways, bytes, names of
# specials.
_SAMPLES = (
    "",
    "def main(argv):\n    if not argv:\n        return None\n\n\n\tprint('x = %d' % 10**9)\r\n",
    "  leading, inner    and trailing spaces   ",
    "\n\n\n         \n \n",
    "\u4eca\u5929\u5929\u6c14\u5f88\u597d\uff0c\u6211\u4eec\u53bb\u516c\u56ed\u3002",
    "\U0001f600 \U0001f468\u200d\U0001f469",
    "<s></s><unk><0x0A>" + SPACE_MARK + " " + SPACE_MARK * 2,
    "\x00\x07\ufeff\u2028\ud7ff\ue000\U0010ffff",
    *(character * length for character in " =-#*._/\n" for length in range(1, 80, 3)),
)


def export_tokenizer(model_path: str | Path, folder: str | Path, add_bos: bool, samples: Iterable[str] = ()) -> None:
    """Write `EXPORTED_FILES` into ``folder``, which exists, for the sentencepiece model at ``model_path``.

    `AutoTokenizer.from_pretrained(folder)` then gives `Tokenizer`'s ids, with bos in front if ``add_bos``, and pads
    with ``<unk>``. Names of special tokens inside a text are text (``split_special_tokens``), as they are for
    sentencepiece. This is verified on fixed texts and on ``samples``; raises `DataError` when the two differ, and then
    writes nothing.
    """
    import sentencepiece.sentencepiece_model_pb2 as protobuf
    import tokenizers
    import transformers

    tokenizer = Tokenizer.load(model_path)
    proto = protobuf.ModelProto.FromString(Path(model_path).read_bytes())
    kinds = protobuf.ModelProto.SentencePiece
    # Pieces hold a plain space instead of the mark. The mark in a text is then unknown and becomes bytes, as in
    # `Tokenizer`.
    names = [piece.piece.replace(SPACE_MARK, " ") for piece in proto.pieces]
    vocabulary = {name: i for i, name in enumerate(names)}
    mergeable = {names[i] for i, piece in enumerate(proto.pieces) if piece.type == kinds.NORMAL}
    fast = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab=vocabulary,
            merges=_merges(mergeable, vocabulary, [piece.score for piece in proto.pieces]),
            unk_token=names[tokenizer.unk_id],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    fast.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    unk, bos, eos = (names[i] for i in (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id))
    fast.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in (unk, bos, eos)])
    symbols = [names[i] for i, piece in enumerate(proto.pieces) if piece.type == kinds.USER_DEFINED]
    fast.add_tokens([tokenizers.AddedToken(symbol, normalized=False) for symbol in symbols])
    if add_bos:
        fast.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_id)]
        )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": unk,
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": unk,
        "add_bos_token": add_bos,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copyfile(model_path, Path(scratch, "tokenizer.model"))
        fast.save(str(Path(scratch, "tokenizer.json")))
        Path(scratch, "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        loaded = transformers.AutoTokenizer.from_pretrained(scratch, trust_remote_code=False)
        prefix = [tokenizer.bos_id] if add_bos else []
        for text in (*_SAMPLES, *samples):
            expected = prefix + tokenizer.encode(text)
            actual = loaded(text)["input_ids"]
            if actual != expected or loaded.decode(actual, skip_special_tokens=True) != text:
                raise DataError(
                    f"{model_path}: the exported tokenizer would give other ids or text than sentencepiece for "
                    f"{text[:40]!a}; use a BPE model with byte fallback that `tnl data prepare` trained"
                )
        for name in EXPORTED_FILES:
            shutil.copyfile(Path(scratch, name), Path(folder, name))


def _merges(mergeable: set[str], vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every pair of pieces whose concatenation is a piece, best piece first: sentencepiece merges any such pair."""
    merges = []
    for piece in sorted(mergeable, key=lambda name: (-scores[vocabulary[name]], vocabulary[name])):
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        found = [(left, right) for left, right in splits if left in mergeable and right in mergeable]
        merges += sorted(found, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    return merges
