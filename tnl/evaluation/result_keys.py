"""Under which key a result is kept: a hash of all that it depends on."""

import hashlib
import json

import numpy as np

from tnl.model.fingerprint import architecture, contents_digest

# Another number for results that are made in another way.
VERSION = 1


def model_digest(model, tokenizer) -> str:
    """SHA-256 of what every result depends on: the weights, how they are used, and the tokenizer."""
    vocabulary = json.dumps([sorted(tokenizer.get_vocab().items()), str(tokenizer.special_tokens_map)])
    parts = [
        str(VERSION),
        json.dumps(architecture(model.config)),
        contents_digest(model),
        str(model.dtype),
        model.generation_config.to_json_string(),
        hashlib.sha256(vocabulary.encode()).hexdigest(),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def request_digest(kind: str, settings: str, *ids: np.ndarray) -> str:
    """SHA-256 of one request: its type, how it is answered, and its tokens."""
    digest = hashlib.sha256()
    for part in (kind.encode(), settings.encode(), *(array.astype("<i8").tobytes() for array in ids)):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def result_key(model: str, request: str) -> str:
    """128 bits of each digest, side by side."""
    return model[:32] + request[:32]
