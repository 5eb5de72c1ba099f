"""`TransnormerTokenizer`: the BaiChuan tokenizer of the released models, from their `tokenizer.model`."""

import json
import shutil
from pathlib import Path

import tokenizers
from tokenizers import AddedToken
from transformers import BatchEncoding, PreTrainedConfig, PreTrainedTokenizerFast

MODEL_FILE, TOKENIZER_FILE = "tokenizer.model", "tokenizer.json"
_NO_FILE = (
    "has no tokenizer.model and no tokenizer.json; put the model's own tokenizer.model there. A tiktoken vocabulary "
    "(TransNormerLLM3-15B) cannot be read: make a tokenizer.json of it once with "
    "transformers.integrations.tiktoken.convert_tiktoken_to_fast"
)


class TransnormerTokenizer(PreTrainedTokenizerFast):
    """A fast tokenizer whose ids and decoded text are sentencepiece's own, for any BPE `tokenizer.model`.

    ``AutoTokenizer.from_pretrained(folder)`` gives one for a released model without running the code beside it. A
    `tokenizer.json` in the folder is used as it is; otherwise the tokenizer is built from `tokenizer.model`, and held
    against sentencepiece on a few texts.

    - Nothing is added at the ends unless ``add_bos_token`` or ``add_eos_token`` is True.
    - Padding: the models have no pad token of their own, ``<unk>`` (id 0) pads. With byte fallback no text gives it.
    - Names of special tokens inside a text are text, as they are for sentencepiece; with
      ``split_special_tokens=False``, here or in a call, they are the tokens (a chat template may want that).
    - ``decode`` shows special tokens unless ``skip_special_tokens``; bytes that are not UTF-8 give one U+FFFD each.
    - Where a model has a replacement table, or symbols and a prefix, texts go through sentencepiece's normalization
      first: there are no offsets then, and `save_pretrained` writes `tokenizer.model` without a `tokenizer.json`.

    Raises:
        ValueError: no file, a file that is no sentencepiece BPE model, or more pieces than the config.json beside it
            has ids.
    """

    vocab_files_names = {"vocab_file": MODEL_FILE, "tokenizer_file": TOKENIZER_FILE}  # noqa: RUF012

    def __init__(self, vocab_file: str | None = None, tokenizer_file: str | None = None, **kwargs) -> None:
        self._processor = None
        kwargs.pop("auto_map", None)  # names remote code; the folder that is saved must not
        if sampling := kwargs.pop("sp_model_kwargs", None):
            raise ValueError(f"tokenizer_config.json: sp_model_kwargs {sampling!r} is not supported; remove it")
        kwargs.setdefault("split_special_tokens", True)
        if tokenizer_file is not None:
            self._tokenizer = _read_tokenizer(tokenizer_file)
        elif vocab_file is not None:
            self._build(vocab_file, kwargs)
        elif "tokenizer_object" not in kwargs:
            raise ValueError(f"{kwargs.get('name_or_path') or 'the tokenizer'}: {_NO_FILE}")
        if kwargs.get("pad_token") is None:
            kwargs["pad_token"] = kwargs.get("unk_token")
        super().__init__(vocab_file=vocab_file, **kwargs)

    @classmethod
    def convert_to_native_format(cls, **kwargs) -> dict:
        """The arguments as they are: `__init__` reads the files."""
        return kwargs

    def _build(self, vocab_file: str, kwargs: dict) -> None:
        """Make the backend from `tokenizer.model`; fill in the special tokens that ``kwargs`` leaves open."""
        # Here, so that models load where sentencepiece is not installed.
        from tnl.model.sentencepiece_bpe import (
            PROBES,
            build_tokenizer,
            first_difference,
            load_model,
            needs_sentencepiece,
        )

        processor, proto = load_model(Path(vocab_file).read_bytes(), vocab_file)
        _check_size(len(proto.pieces), Path(vocab_file))
        self._tokenizer = build_tokenizer(proto)
        outside = needs_sentencepiece(proto)
        if (text := first_difference(self._tokenizer, processor, PROBES, outside)) is not None:
            raise ValueError(
                f"{vocab_file}: the tokenizer built from it would give other ids or text than sentencepiece for "
                f"{text[:40]!a}; give a tokenizer.json instead"
            )
        if outside:
            self._processor = processor
        vocabulary = self._tokenizer.get_vocab()
        for key, i in (("unk", processor.unk_id()), ("bos", processor.bos_id()), ("eos", processor.eos_id())):
            if kwargs.get(f"{key}_token") is None and i >= 0:
                kwargs[f"{key}_token"] = processor.id_to_piece(i)
        # Flags of the files (normalized, lstrip) are of the slow class and would change what is found in a text.
        for key in self.SPECIAL_TOKENS_ATTRIBUTES:
            if str(kwargs.get(key)) in vocabulary:
                kwargs[key] = AddedToken(str(kwargs[key]), normalized=False, special=True)
        added = kwargs.get("added_tokens_decoder") or {}
        kwargs["added_tokens_decoder"] = {i: token for i, token in added.items() if str(token) not in vocabulary}

    def add_tokens(self, new_tokens, special_tokens: bool = False) -> int:
        """As transformers' own; a plain string is looked for in the text as it is given, not with a prefix."""
        tokens = new_tokens if isinstance(new_tokens, list | tuple) else [new_tokens]
        plain = [AddedToken(token, normalized=False) if isinstance(token, str) else token for token in tokens]
        return super().add_tokens(plain, special_tokens=special_tokens)

    def _encode_plus(self, text, text_pair=None, *, return_offsets_mapping: bool = False, **kwargs) -> BatchEncoding:
        if self._processor is not None:
            if return_offsets_mapping:
                raise ValueError(
                    "return_offsets_mapping: this tokenizer.model replaces characters, so that its tokens have no "
                    "offsets in the text; leave it out"
                )
            text, text_pair = self._normalize(text), self._normalize(text_pair)
        return super()._encode_plus(text, text_pair, return_offsets_mapping=return_offsets_mapping, **kwargs)

    def _normalize(self, text):
        """sentencepiece's normalization of a text, or of every text in nested lists."""
        if isinstance(text, list | tuple):
            return type(text)(self._normalize(part) for part in text)
        return text if text is None else self._processor.normalize(text)

    def _decode(self, token_ids, skip_special_tokens: bool = False, **kwargs) -> str:
        text = super()._decode(token_ids, skip_special_tokens=skip_special_tokens, **kwargs)
        if "\ufffd" not in text:
            return text
        # The backend gives up on all bytes that stand together when one of them is wrong, as at the end of a
        # generation that stops inside a character; sentencepiece keeps the good ones.
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        tokens = self.convert_ids_to_tokens(ids, skip_special_tokens=skip_special_tokens)
        return self.backend_tokenizer.decoder.decode(_mend_bytes(tokens))

    def _save_pretrained(self, save_directory, file_names, legacy_format=None, filename_prefix=None):
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        folder = Path(save_directory)
        if self._processor is None:
            files = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
            source = getattr(self, "vocab_file", None)
            if source is None or not Path(source).is_file():
                return files
            if Path(source).resolve() != (folder / f"{prefix}{MODEL_FILE}").resolve():
                shutil.copyfile(source, folder / f"{prefix}{MODEL_FILE}")
            return (*files, str(folder / f"{prefix}{MODEL_FILE}"))
        # No tokenizer.json: read by itself, without sentencepiece's normalization, it would give other ids. What it
        # would hold beside the pieces goes into the configuration, from which transformers left it out.
        config_file = folder / f"{prefix}tokenizer_config.json"
        config = json.loads(config_file.read_text(encoding="utf-8"))
        config.update(add_bos_token=self.add_bos_token, add_eos_token=self.add_eos_token)
        config["added_tokens_decoder"] = {
            i: token.__getstate__() for i, token in self.added_tokens_decoder.items() if i >= self.vocab_size
        }
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")
        (folder / f"{prefix}{MODEL_FILE}").write_bytes(self._processor.serialized_model_proto())
        return (*file_names, str(folder / f"{prefix}{MODEL_FILE}"))


class BaiChuanTokenizer(TransnormerTokenizer):
    """The name under which the released tokenizer_config.json files ask for `TransnormerTokenizer`."""


class NamedTokenizerConfig(PreTrainedConfig):
    """Stands in for a model's configuration where `AutoTokenizer.register` asks for one.

    With a tokenizer registered for the model's own configuration, ``trust_remote_code=True`` would prefer the code of
    the folder; with only the names of its classes registered, what stands here is used in any case.
    """


def _read_tokenizer(file: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(file)
    except Exception as error:  # tokenizers raises no narrower type
        raise ValueError(
            f"{file}: not a tokenizer of the tokenizers library ({error}); remove or replace it"
        ) from error


def _check_size(num_pieces: int, model_file: Path) -> None:
    """Refuse ids beyond the embeddings of the model whose config.json lies beside ``model_file``."""
    config_file = model_file.with_name("config.json")
    if config_file.is_file():
        size = json.loads(config_file.read_text(encoding="utf-8")).get("vocab_size")
        if isinstance(size, int) and num_pieces > size:
            raise ValueError(
                f"{model_file}: {num_pieces} pieces, but {config_file} has vocab_size {size}; the two files belong to "
                "different models"
            )


def _mend_bytes(tokens: list[str]) -> list[str]:
    """``tokens`` with bytes that stand together replaced by their characters, U+FFFD for each wrong byte."""
    mended, run = [], bytearray()
    for token in [*tokens, ""]:
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            run.append(int(token[3:5], 16))
            continue
        while run:
            for length in range(1, 5):
                try:
                    character = run[:length].decode("utf-8")
                except UnicodeDecodeError:
                    continue
                break
            else:
                character, length = "\ufffd", 1
            mended.append(character)
            del run[:length]
        mended.append(token)
    return mended
