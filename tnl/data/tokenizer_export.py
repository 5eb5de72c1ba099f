"""Write a tokenizer so that `transformers.AutoTokenizer` loads it and gives the same ids."""

import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tnl.data.tokenizer import Tokenizer
from tnl.errors import DataError

EXPORTED_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")


def export_tokenizer(model_path: str | Path, folder: str | Path, add_bos: bool, samples: Iterable[str] = ()) -> None:
    """Write `EXPORTED_FILES` into ``folder``, which exists, for the sentencepiece model at ``model_path``.

    `AutoTokenizer.from_pretrained(folder)` then gives `Tokenizer`'s ids, with bos in front if ``add_bos``, and pads
    with ``<unk>``. Names of special tokens inside a text are text (``split_special_tokens``), as they are for
    sentencepiece. This is verified on fixed texts and on ``samples``; raises `DataError` when the two differ, and then
    writes nothing.
    """
    import tokenizers
    import transformers

    from tnl.model.sentencepiece_bpe import PROBES, build_tokenizer, load_model

    tokenizer = Tokenizer.load(model_path)
    try:
        processor, proto = load_model(Path(model_path).read_bytes(), str(model_path))
    except ValueError as error:
        raise DataError(str(error)) from error
    fast = build_tokenizer(proto, mark_is_text=True)
    unk, bos, eos = (processor.id_to_piece(i) for i in (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id))
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
        for text in (*PROBES, *samples):
            expected = prefix + tokenizer.encode(text)
            actual = loaded(text)["input_ids"]
            if actual != expected or loaded.decode(actual, skip_special_tokens=True) != text:
                raise DataError(
                    f"{model_path}: the exported tokenizer would give other ids or text than sentencepiece for "
                    f"{text[:40]!a}; use a BPE model with byte fallback that `tnl data prepare` trained"
                )
        for name in EXPORTED_FILES:
            shutil.copyfile(Path(scratch, name), Path(folder, name))
