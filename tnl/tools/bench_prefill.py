"""`tnl bench prefill`: the time to the first token of long prompts, beside an equal LLaMA on each attention backend."""

import gc
from collections.abc import Callable
from pathlib import Path

import torch
from tnl_kernels.record import save
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from tnl.model.baseline import llama_config
from tnl.tools.bench_models import (
    check_json,
    described,
    named_config,
    numbers,
    peak_gib,
    random_model,
    random_prompt,
    seconds,
    start_peak,
)
from tnl.tools.doctor import pick_device

# The CPU has one backend that is worth the name.
BACKENDS = {
    "cuda": {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION},
    "cpu": {"flash": SDPBackend.FLASH_ATTENTION},
}


def bench_prefill(
    name: str,
    *,
    lengths: list[int],
    device: str | None,
    json_file: Path | None,
    report: Callable[[str], None],
) -> dict:
    """Measure and print; returns, and writes to ``json_file``, the figures.

    Args:
        name: a model of configs/model; its weights are random.
        lengths: prompt lengths in tokens; one sequence.

    Raises:
        ConfigError: see `check_json`, `named_config` and `pick_device`.
    """
    check_json(json_file)
    config, where = named_config(name), pick_device(device)
    result = described(f"tnl bench prefill {name} --tokens {numbers(lengths)}", where)
    result |= {"rows": [{"tokens": T} for T in lengths], "missing": {}}
    model = random_model(config, where)
    for row in result["rows"]:
        row["tnl_ms"] = first_token_ms(model, row["tokens"])
        row["tnl_peak_gib"] = peak_gib(where)
        report(f"{row['tokens']:>7} tokens, TNL: {row['tnl_ms']:.1f} ms")
    del model
    gc.collect()
    llama = random_model(llama_config(config, max_position_embeddings=max(lengths) + 1), where)
    for row in result["rows"]:
        for backend, kernel in BACKENDS[where.type].items():
            label = f"{row['tokens']:>7} tokens, LLaMA on {backend}"
            row[f"llama_{backend}_ms"] = row[f"llama_{backend}_times_tnl"] = None
            try:
                with sdpa_kernel(kernel):
                    row[f"llama_{backend}_ms"] = first_token_ms(llama, row["tokens"])
            except RuntimeError as error:  # no room, or no kernel of this backend for this GPU
                result["missing"][label.strip()] = f"{type(error).__name__}: {str(error)[:200]}"
                report(f"{label}: {result['missing'][label.strip()]}")
                continue
            row[f"llama_{backend}_times_tnl"] = row[f"llama_{backend}_ms"] / row["tnl_ms"]
            row["llama_peak_gib"] = peak_gib(where)
            report(f"{label}: {row[f'llama_{backend}_times_tnl']:.2f} times as long")
    save(result, json_file)
    return result


def first_token_ms(model: PreTrainedModel, num_tokens: int) -> float:
    """Time of the second of two `generate()` calls for one new token."""
    prompt = random_prompt(model, 1, num_tokens)
    options = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=1, do_sample=False, pad_token_id=0)
    start_peak(model.device)
    model.generate(prompt, **options)
    return seconds(lambda: model.generate(prompt, **options), model.device) * 1e3
