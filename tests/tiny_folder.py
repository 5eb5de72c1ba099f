"""A model folder that `from_pretrained` loads, with random weights and a tokenizer of its own."""

from pathlib import Path

from tests.tiny_corpus import tiny_shards
from tests.tiny_model import tiny_model
from tnl.data.shards import TOKENIZER_FILE
from tnl.data.tokenizer_export import export_tokenizer

# <unk>, <s>, </s> and the 256 bytes come first.
NUM_NO_TEXT = 259


def tiny_folder(folder: Path, chat_template: str | None = None, **config) -> Path:
    """Write a `tiny_model` with ``config`` and a tokenizer of 340 pieces into ``folder``, which exists.

    What it generates is always text: no special token, and no byte of a character.
    """
    model, path = tiny_model(vocab_size=340, **config), folder / "model"
    model.generation_config.suppress_tokens = list(range(NUM_NO_TEXT))
    model.save_pretrained(path)
    export_tokenizer(tiny_shards(folder) / TOKENIZER_FILE, path, add_bos=False)
    if chat_template is not None:
        (path / "chat_template.jinja").write_text(chat_template)
    return path
