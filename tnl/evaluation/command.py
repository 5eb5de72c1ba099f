"""`tnl evaluate`: held-out loss of a saved model on a folder of shards."""

import json
import time
from pathlib import Path

import torch

from tnl.data.shard_format import SPLITS, TOKENIZER_FILE, file_sha256
from tnl.data.shards import ShardSet, check_vocabulary
from tnl.errors import CannotWriteError, ConfigError, DataError
from tnl.evaluation.heldout import HeldoutLoss, heldout_loss
from tnl.generation.load import load_model
from tnl.model.baseline_training import LlamaBaseline


def evaluate_shards(
    model_name: str,
    data: Path,
    split: str = "heldout",
    max_tokens: int | None = None,
    window: int | None = None,
    json_file: Path | None = None,
    report=print,
) -> HeldoutLoss:
    """Evaluate a model folder or hub name, print the figures, and write them to ``json_file`` if given.

    Args:
        window: restart the context every so many tokens; None gives every document its full context, and a LLaMA,
            which has no state to carry through a document, windows of its ``max_position_embeddings``.

    Raises:
        DataError: the shards are damaged, or tokenized by another tokenizer than the model's.
        ConfigError: there is no such split, or the model cannot be loaded.
        CannotWriteError: ``json_file`` cannot be written; found out before the evaluation.
    """
    if split not in SPLITS:
        raise ConfigError(f"split: no split {split!r}, give one of {', '.join(SPLITS)}")
    data = data.expanduser()
    if json_file is not None:
        json_file = json_file.expanduser()
        _check_writable(json_file)
    shards = ShardSet.open(data, split)
    dtype = torch.float32 if not torch.cuda.is_available() else None
    model, _ = load_model(model_name, dtype=dtype, llama=LlamaBaseline)
    if isinstance(model, LlamaBaseline):
        window = window or model.config.max_position_embeddings
    _check_tokenizer(model_name, shards)
    check_vocabulary(shards, model.config.vocab_size)
    length = 4096 if window is None else window * max(1, 4096 // window)
    started = time.perf_counter()
    result = heldout_loss(model, shards, device=model.device, max_tokens=max_tokens, length=length, window=window)
    seconds = time.perf_counter() - started
    per_byte = "" if result.bits_per_byte is None else f", {result.bits_per_byte:.4f} bits/byte"
    context = "whole documents" if window is None else f"windows of {window} tokens"
    report(
        f"{model_name} on {data} ({split}, {context}): {result.loss:.4f} nats, {result.bits_per_token:.4f} "
        f"bits/token{per_byte}; "
        f"{result.num_predicted:,} tokens predicted in {seconds:.1f} s"
    )
    if json_file is not None:
        row = {"model": model_name, "data": str(data), "split": split, "window": window, **result.row()}
        row |= {"data_fingerprint": shards.fingerprint, "tokenizer_sha256": shards.index.tokenizer_sha256}
        try:
            json_file.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise CannotWriteError(f"{json_file}: {error.strerror}; choose another file") from None
    return result


def _check_writable(file: Path) -> None:
    """Open ``file`` for writing without changing it, or leaving it when it is not there."""
    try:
        is_new = not file.exists()
        file.open("a").close()
        if is_new:
            file.unlink()
    except OSError as error:
        raise CannotWriteError(f"{file}: {error.strerror}; choose another file") from None


def _check_tokenizer(model_name: str, shards: ShardSet) -> None:
    from transformers.utils import cached_file

    found = cached_file(model_name, TOKENIZER_FILE, _raise_exceptions_for_missing_entries=False)
    if found is None:
        raise DataError(f"{model_name}: has no {TOKENIZER_FILE}, so whether {shards.folder} fits it cannot be told")
    model_hash = file_sha256(Path(found))
    if model_hash != shards.index.tokenizer_sha256:
        raise DataError(
            f"{shards.folder}: tokenized by {shards.index.tokenizer_sha256[:12]}, the tokenizer of {model_name} is "
            f"{model_hash[:12]}; "
            "prepare the text again with tokenizer.model set to the model's"
        )
