"""Continuing a prompt: prefill once, then one recurrent step per token."""

from collections.abc import Callable

import torch

from tnl.errors import ConfigError


def check_request(prompt: str, *, max_new_tokens: int, temperature: float, top_k: int, top_p: float) -> None:
    """Refuse what `generate_text` cannot do, before a model is loaded for it.

    Raises:
        ConfigError: a value out of range, or a prompt that is no text.
    """
    for name, value, ok, allowed in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "1 or more"),
        ("temperature", temperature, temperature >= 0, "0 or more"),
        ("top_k", top_k, top_k >= 0, "0 or more"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
    ):
        if not ok:
            raise ConfigError(f"{name}: must be {allowed}, got {value}")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        # Bytes of the command line that are not UTF-8 arrive as lone surrogates.
        raise ConfigError(f"prompt: is not UTF-8 text at character {error.start}; give it in UTF-8") from None


def generate_text(
    model,
    tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The continuation of ``prompt``, without it.

    Args:
        temperature: 0 takes the most likely token at each step.
        top_k: sample among so many most likely tokens; 0 for all.
        top_p: sample among the most likely tokens that hold this probability together.
        on_text: called with each piece of text as soon as it is complete.

    Raises:
        ConfigError: see `check_request`; or a prompt without tokens.
    """
    from transformers import TextStreamer

    check_request(prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    if ids.shape[1] == 0:
        raise ConfigError("prompt: is empty, and this tokenizer adds no beginning-of-text token; give some text")

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False):
            if on_text:
                on_text(text)

    sampling = dict(do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p) if temperature else {}
    # A generation does not disturb, or depend on, the random state of its caller.
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=sampling.pop("do_sample", False),
            pad_token_id=tokenizer.pad_token_id,
            streamer=Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **sampling,
        )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
