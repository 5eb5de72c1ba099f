"""`tnl bench generate`: decoding speed over batch sizes and contexts, beside an equal LLaMA and the memory's floor.

The floor of a decoding step is the time in which the measured copy bandwidth moves what it must: the weights once,
and each sequence's state read and written. The setting of 512-token prompts and 1,024 new tokens is that of Figure 5
of TransNormerLLM (arXiv 2307.14995).
"""

import gc
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from tnl_kernels.limits import copy_bandwidth
from tnl_kernels.record import save
from transformers import PreTrainedModel

from tnl.errors import ConfigError
from tnl.model import TransnormerState
from tnl.model.baseline import llama_config
from tnl.model.decoding import StepGraph
from tnl.model.prefill import PREFILL_TOKENS
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
    static_cache_step,
    weight_bytes,
)
from tnl.tools.doctor import pick_device

STEPS = 30  # timed, one after the other; fewer where a static cache has no room for them
SETUP_STEPS = 4
ROUNDS = 9


def bench_generate(
    name: str,
    *,
    batches: list[int],
    prompt_tokens: int,
    new_tokens: int,
    contexts: list[int],
    positions: int,
    baseline: bool,
    device: str | None,
    json_file: Path | None,
    report: Callable[[str], None],
) -> dict:
    """Measure and print; returns, and writes to ``json_file``, the figures.

    Args:
        name: a model of configs/model; its weights are random.
        batches: numbers of sequences, in rising order; the sweep ends where memory does.
        contexts: prompt lengths at which one sequence is stepped.
        positions: tokens generated in a row by one sequence to see that memory does not grow; 0 leaves it out.
        baseline: also step a LLaMA of equal size under a static cache with room for prompt and new tokens; on a GPU
            it then generates as transformers would have it, compiled by Inductor with CUDA graphs.

    Raises:
        ConfigError: see `check_json`, `named_config` and `pick_device`; not even the first batch fits into memory.
    """
    check_json(json_file)
    config, where = named_config(name), pick_device(device)
    on_gpu = where.type == "cuda"
    bandwidth = copy_bandwidth() if on_gpu else None
    options = f"--batch {numbers(batches)} --prompt-tokens {prompt_tokens} --new-tokens {new_tokens}"
    options += f" --context {numbers(contexts)} --positions {positions}{'' if baseline else ' --no-baseline'}"
    result = described(f"tnl bench generate {name} {options}", where) | {"copy_bytes_per_s": bandwidth}
    model = random_model(config, where)
    report(f"{name} on {result['gpu'] or 'CPU'}, {result['dtype']}, weights {weight_bytes(model) / 1e9:.2f} GB")
    with torch.inference_mode():
        warm_up(model)
        result["rows"] = sweep(tnl_row, model, batches, prompt_tokens, new_tokens, bandwidth, report)
        if not result["rows"]:
            raise ConfigError(f"--batch: {batches[0]} sequences do not fit into memory; give a smaller number")
        best = max(result["rows"], key=tokens_per_s)
        result["generate"] = [
            generate_row(model, batch, prompt_tokens, new_tokens, report) for batch in sorted({1, best["batch"]})
        ]
        result["contexts"] = context_rows(model, contexts, report)
        if positions:
            result["positions"] = positions_row(model, positions, report)
    if baseline:
        del model
        gc.collect()
        start_peak(where)
        llama = random_model(llama_config(config, max_position_embeddings=prompt_tokens + new_tokens), where)
        report(f"LLaMA of equal size, static cache{' in a CUDA graph' if on_gpu else ''}")
        with torch.inference_mode():
            result["llama"] = sweep(llama_row, llama, batches, prompt_tokens, new_tokens, bandwidth, report)
            if result["llama"]:
                theirs = max(result["llama"], key=tokens_per_s)
                result["times_llama"] = tokens_per_s(best) / tokens_per_s(theirs)
                report(f"best batch against best batch: {result['times_llama']:.2f} times the LLaMA's tokens/s")
            if result["llama"] and on_gpu:
                options = dict(cache_implementation="static")
                for _ in range(2):  # the first call compiles
                    row = generate_row(llama, theirs["batch"], prompt_tokens, new_tokens, report, **options)
                result["llama_generate"] = [row]
    save(result, json_file)
    return result


def tokens_per_s(row: dict) -> float:
    """Of decoding alone."""
    return row["decode_tokens_per_s"]


def warm_up(model: PreTrainedModel) -> None:
    """Compile the kernels for every kind of call."""
    for batch, num_tokens in ((1, 33), (2, 2048)):
        model.generate(
            random_prompt(model, batch, num_tokens), max_new_tokens=3, do_sample=False, pad_token_id=0
        )  # fmt: skip


def sweep(row_of: Callable, model, batches, prompt_tokens, new_tokens, bandwidth, report) -> list[dict]:
    """A row for each batch size, until memory ends."""
    rows = []
    for batch in batches:
        start_peak(model.device)
        try:
            rows.append(row_of(model, batch, prompt_tokens, new_tokens, bandwidth))
        except torch.OutOfMemoryError:
            gc.collect()
            report(f"batch {batch:>5}: does not fit into memory")
            break
        row = rows[-1]
        floor = "" if row["floor_ms"] is None else f", {row['times_floor']:.3f} x the floor of {row['floor_ms']:.3f} ms"
        report(f"batch {batch:>5}: step {row['step_ms']:.3f} ms{floor}, {row['decode_tokens_per_s']:,.0f} tokens/s")
    return rows


def step_row(
    model, batch: int, step: Callable, moved: int, cache_bytes: int, bandwidth: float | None, count: int = STEPS
) -> dict:
    """The figures of one decoding step; ``moved`` are the bytes that it must move beside the weights."""
    step_s = seconds(step, model.device, count)
    floor_s = None if bandwidth is None else (weight_bytes(model) + moved) / bandwidth
    return {
        "batch": batch,
        "step_ms": step_s * 1e3,
        "floor_ms": None if floor_s is None else floor_s * 1e3,
        "times_floor": None if floor_s is None else step_s / floor_s,
        "decode_tokens_per_s": batch / step_s,
        "cache_gib": cache_bytes / 2**30,
        "peak_gib": peak_gib(model.device),
    }


def tnl_step(model, batch: int, prompt_tokens: int) -> tuple[Callable, int]:
    """A TNL's decoding step after a prompt, a function without arguments as `generate()` runs it; the state's bytes."""
    state, prompt = TransnormerState(), random_prompt(model, batch, prompt_tokens)
    for part in prompt.split(max(1, PREFILL_TOKENS // batch), 1):
        model(part, past_key_values=state, logits_to_keep=1)
    call, ids = StepGraph(model) if model.device.type == "cuda" else model, prompt[:, :1].clone()

    def step() -> None:
        call(input_ids=ids, past_key_values=state)

    for _ in range(2):  # set-up and capture
        step()
    return step, state.num_bytes()


def tnl_row(model, batch: int, prompt_tokens: int, new_tokens: int, bandwidth: float | None) -> dict:
    """The figures of a TNL's decoding step."""
    step, num_bytes = tnl_step(model, batch, prompt_tokens)
    return step_row(model, batch, step, 2 * num_bytes, num_bytes, bandwidth)


def context_rows(model, contexts: list[int], report: Callable) -> list[dict]:
    """Time of a step after each context, the median of rounds that take turns: a GPU's clock moves with its heat."""
    steps = [tnl_step(model, 1, context)[0] for context in contexts]
    rounds = [[seconds(step, model.device, STEPS) for step in steps] for _ in range(ROUNDS)]
    rows = [
        {"context": context, "step_ms": statistics.median(times) * 1e3}
        for context, times in zip(contexts, zip(*rounds, strict=True), strict=True)
    ]
    for row in rows:
        row["times_first"] = row["step_ms"] / rows[0]["step_ms"]
        report(f"context {row['context']:>7}: {row['times_first']:.3f} times the step of the first context")
    return rows


def llama_row(model, batch: int, prompt_tokens: int, new_tokens: int, bandwidth: float | None) -> dict:
    """A LLaMA's decoding step after a prompt."""
    step, num_bytes = static_cache_step(
        model, random_prompt(model, batch, prompt_tokens), prompt_tokens + new_tokens
    )  # fmt: skip
    count = min(STEPS, new_tokens - SETUP_STEPS)
    return step_row(model, batch, step, num_bytes, num_bytes, bandwidth, count)


def generate_row(model, batch: int, prompt_tokens: int, new_tokens: int, report: Callable, **options) -> dict:
    """The whole of a `generate()` call, prompt and all."""
    prompt = random_prompt(model, batch, prompt_tokens)
    options |= dict(attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    start_peak(model.device)
    time_s = seconds(lambda: model.generate(prompt, **options), model.device)
    row = {"batch": batch, "seconds": time_s, "tokens_per_s": batch * new_tokens / time_s}
    report(
        f"generate() {batch} x ({prompt_tokens} + {new_tokens}): {row['tokens_per_s']:,.0f} tokens/s, prompt included"
    )
    return row | {"peak_gib": peak_gib(model.device)}


def positions_row(model, positions: int, report: Callable) -> dict:
    """Memory while one sequence generates ``positions`` tokens, after 1 % of them and at the end."""
    state, ids = TransnormerState(), random_prompt(model, 1, 1)
    model(ids, past_key_values=state)
    call = StepGraph(model) if model.device.type == "cuda" else model
    allocated = []
    start_peak(model.device)
    for i in range(positions):
        ids = call(input_ids=ids, past_key_values=state).logits[:, -1].argmax(-1, keepdim=True)
        if i + 1 in (max(3, positions // 100), positions):
            allocated.append(torch.cuda.memory_allocated(model.device) if model.device.type == "cuda" else None)
    row = {"positions": positions, "state_bytes": state.num_bytes(), "allocated_bytes": allocated}
    memory = "" if allocated[0] is None else f", GPU memory after 1 % and 100 % {allocated[0]:,} and {allocated[-1]:,}"
    report(f"{positions:,} tokens in a row: state of {state.num_bytes():,} bytes{memory}")
    return row | {"peak_gib": peak_gib(model.device)}
