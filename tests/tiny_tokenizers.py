"""Small sentencepiece models of every kind, and folders that hold them as the released checkpoints do."""

import io
import json
from functools import cache
from pathlib import Path

import sentencepiece

from tests.tiny_corpus import tiny_texts

SYMBOLS = ("\n", "\n\u2581\u2581\u2581\u2581", "<x>", "ab\u2581", "ab")

# Parts of texts around which tokenizers differ: spaces, breaks, controls, marks, runs, bytes, names of special tokens.
PARTS = [
    " ",
    "  ",
    "   ",
    "\n",
    "\n    ",
    "\t",
    "\r\n",
    "=",
    "-",
    "a",
    "b",
    ".",
    "):",
    "self",
    "return",
    "def ",
    "\x00",
]
PARTS += [
    "\u2581",
    "\u2581\u2581",
    "\u4e2d\u6587",
    "\u4eca\u5929",
    "\u597d",
    "\uff0c",
    "\u3002",
    "12",
    "3",
    "1000",
    "\x85",
]
PARTS += ["\u0301", "e\u0301", "\u00e9", "\uff21", "\ufb01", "\u2460", "\u1100\u1161\u11a8", "\u3000", "\u00a0", "\x1f"]
PARTS += ["\U0001f600", "\u200d", "\ufeff", "\u2028", "\ud7ff", "\U0010ffff", "<s>", "</s>", "<unk>", "<0x0A>", "<x>"]


def _texts() -> list[str]:
    chinese = "\u4eca\u5929\u5929\u6c14 \u5f88\u597d\uff0c\u6211\u4eec\u53bb\u516c\u56ed\u3002"
    return [*tiny_texts(100), *[chinese] * 9, *["====== ------ aaaa aaaaaaa  aaaa 1000", "ab  ab <x> e\u0301"] * 5]


@cache
def tiny_model(
    dummy_prefix: bool = True,
    remove_extra_whitespaces: bool = False,
    normalization: str = "identity",
    split_digits: bool = True,
    symbols: tuple[str, ...] = (),
    model_type: str = "bpe",
    vocab_size: int = 400,
) -> bytes:
    """Content of a `tokenizer.model` trained on a few texts, by default of the kind of LLaMA's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_texts()),
        model_writer=model,
        model_type=model_type,
        vocab_size=vocab_size,
        byte_fallback=True,
        hard_vocab_limit=False,
        add_dummy_prefix=dummy_prefix,
        remove_extra_whitespaces=remove_extra_whitespaces,
        allow_whitespace_only_pieces=not remove_extra_whitespaces,
        normalization_rule_name=normalization,
        split_digits=split_digits,
        user_defined_symbols=list(symbols),
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def released_tokenizer(folder: Path, model: bytes, **changes) -> Path:
    """Write the tokenizer files of a released checkpoint, remote code that raises included, into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    plain = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": True}
    config = {
        "tokenizer_class": "BaiChuanTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaiChuanTokenizer", None]},
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": {**plain, "content": "<s>"},
        "eos_token": {**plain, "content": "</s>"},
        "unk_token": {**plain, "content": "<unk>"},
        "pad_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "sp_model_kwargs": {},
        **changes,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    code = "raise SystemExit('remote code was run')\n"
    for name in ("tokenization_baichuan", "configuration_transnormer", "modeling_transnormer"):
        (folder / f"{name}.py").write_text(code, encoding="utf-8")
    auto_map = {"AutoConfig": "configuration_transnormer.TransnormerConfig"}
    auto_map["AutoModelForCausalLM"] = "modeling_transnormer.TransnormerForCausalLM"
    (folder / "config.json").write_text(
        json.dumps({"model_type": "transnormer", "vocab_size": 400, "auto_map": auto_map}), encoding="utf-8"
    )
    return folder
