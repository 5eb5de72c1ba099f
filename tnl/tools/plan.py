"""What a run will take, from its configuration alone: parameters, operations, memory of each GPU, time."""

import json
import re
from pathlib import Path

from tnl.errors import CannotWriteError, ConfigError
from tnl.files import write_atomically
from tnl.model.kinds import model_config, num_parameters, training_flops_per_token
from tnl.tools.tables import format_rows
from tnl.training.hardware import PEAK_BF16_TFLOPS
from tnl.training.memory import memory_plan
from tnl.training.settings import PretrainSettings

GIB = 2**30
SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
GPU = "H100"


def read_tokens(text: str) -> int:
    """The number in ``300B``, ``1.4T``, ``500M`` or ``1000000``.

    Raises:
        ConfigError: there is none.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([KMBT]?)", text.strip().upper())
    number = round(float(found[1]) * SUFFIXES[found[2]]) if found else 0
    if number < 1:
        raise ConfigError(f"--tokens: {text!r} is no number of tokens; give for example 300B or 1.5T")
    return number


def read_sizes(text: str) -> list[float]:
    """The positive numbers of a comma-separated list, in rising order.

    Raises:
        ConfigError: one is no number.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(re.fullmatch(r"[0-9]+(\.[0-9]+)?", part) and float(part) > 0 for part in parts):
        raise ConfigError(f"--gpu-memory: {text!r} is no list of GiB; give for example 24,80")
    return sorted({float(part) for part in parts})


def figures(settings: PretrainSettings, *, gpus: int, mfu: float, tokens: int | None, gpu_memory: list[float]) -> dict:
    """Everything that `plan` prints, with bytes, seconds and tokens as plain numbers.

    Raises:
        ConfigError: the batch does not divide over the GPUs.
    """
    train = settings.train
    config = model_config(settings.model, train.sequence_length)
    memory = memory_plan(settings, gpus)
    per_step = train.global_batch_size * train.sequence_length
    budget = train.steps * per_step if tokens is None else tokens
    per_token = training_flops_per_token(config, train.sequence_length)
    tflops = settings.logging.peak_tflops or PEAK_BF16_TFLOPS[GPU]
    tgs = mfu * tflops * 1e12 / per_token
    seconds = budget / (tgs * gpus)
    needed = memory.peak + memory.allowance
    return {
        "parameters": num_parameters(config),
        "flops_per_token": per_token,
        "layout": {
            "gpus": gpus,
            "precision": train.precision,
            "zero_stage": train.zero_stage,
            "micro_batch_size": train.micro_batch_size,
            "sequence_length": train.sequence_length,
            "sequence_parallel": train.sequence_parallel,
            "tensor_parallel": train.tensor_parallel,
            "activation_checkpointing": train.activation_checkpointing,
            "tokens_per_step": per_step,
        },
        "memory": {
            "peak_bytes": memory.peak,
            "allowance_bytes": memory.allowance,
            "peak_at": memory.fullest,
            "parts_bytes": memory.parts,
            "ram_bytes": memory.ram,
            "disk_bytes": memory.disk,
            "moments_bytes": {name: sum(parts.values()) for name, parts in memory.moments.items()},
            "fits": {f"{size:g} GiB": needed <= size * GIB for size in gpu_memory},
        },
        "time": {
            "tokens": budget,
            "steps": -(-budget // per_step),
            "mfu": mfu,
            "peak_tflops": tflops,
            "tokens_per_gpu_per_second": tgs,
            "seconds": seconds,
            "gpu_hours": seconds * gpus / 3600,
        },
    }


def plan(
    settings: PretrainSettings,
    *,
    gpus: int = 1,
    mfu: float = 0.5,
    tokens: str | None = None,
    gpu_memory: str = "24,40,80,141",
    json_file: Path | None = None,
    report=print,
) -> dict:
    """Print the `figures` and return them.

    Raises:
        ConfigError: an option is no number, or as `figures`.
        CannotWriteError: ``json_file`` cannot be written.
    """
    budget = None if tokens is None else read_tokens(tokens)
    found = figures(settings, gpus=gpus, mfu=mfu, tokens=budget, gpu_memory=read_sizes(gpu_memory))
    report(format_rows("model", _model_rows(found)))
    report(format_rows(f"memory of each of {gpus} GPU(s), GiB, at its peak ({_moment(found)})", _memory_rows(found)))
    if found["memory"]["ram_bytes"] or found["memory"]["disk_bytes"]:
        report(format_rows(f"offloaded by each of {gpus} process(es), GiB", _offload_rows(found)))
    report(format_rows("fits", [(size, "yes" if fits else "no") for size, fits in found["memory"]["fits"].items()]))
    report(format_rows("time", _time_rows(found)))
    if json_file is not None:
        try:
            write_atomically(json_file, json.dumps(found, indent=1) + "\n")
        except OSError as error:
            raise CannotWriteError(f"{json_file}: {error.strerror}; choose another file") from None
    return found


def _moment(found: dict) -> str:
    return found["memory"]["peak_at"]


def _model_rows(found: dict) -> list[tuple[str, str]]:
    layout = found["layout"]
    return [
        ("parameters", f"{found['parameters']:,}"),
        ("FLOPs per token", f"{found['flops_per_token']:.4g} forward and backward, recomputation not counted"),
        (
            "layout",
            f"{layout['gpus']} GPU(s), {layout['precision']}, ZeRO {layout['zero_stage']}, activation checkpointing "
            f"{layout['activation_checkpointing']}, sequence parallel {layout['sequence_parallel']}, tensor parallel "
            f"{layout['tensor_parallel']}",
        ),
        (
            "batch",
            f"{layout['tokens_per_step']:,} tokens a step, {layout['micro_batch_size']} x "
            f"{layout['sequence_length']:,} a pass and GPU",
        ),
    ]


def _memory_rows(found: dict) -> list[tuple[str, str]]:
    memory = found["memory"]
    rows = [(part, f"{size / GIB:8.2f}") for part, size in memory["parts_bytes"].items()]
    rows.append(("all tensors", f"{memory['peak_bytes'] / GIB:8.2f}"))
    rows.append(("allowance for CUDA and NCCL", f"{memory['allowance_bytes'] / GIB:8.2f}"))
    return rows


def _offload_rows(found: dict) -> list[tuple[str, str]]:
    rows = []
    for place, key in (("RAM", "ram_bytes"), ("disk", "disk_bytes")):
        parts = found["memory"][key]
        rows += [(f"{part}, {place}", f"{size / GIB:8.2f}") for part, size in parts.items()]
        if parts:
            rows.append((f"all, {place}", f"{sum(parts.values()) / GIB:8.2f}"))
    return rows


def _time_rows(found: dict) -> list[tuple[str, str]]:
    time = found["time"]
    return [
        ("tokens", f"{time['tokens']:,} in {time['steps']:,} steps"),
        (
            "rate",
            f"{time['tokens_per_gpu_per_second']:,.0f} tokens/s and GPU at {time['mfu']:.0%} MFU of "
            f"{time['peak_tflops']:g} TFLOP/s",
        ),
        ("wall clock", f"{time['seconds'] / 3600:,.1f} hours, {time['seconds'] / 86400:,.1f} days"),
        ("GPU-hours", f"{time['gpu_hours']:,.0f}"),
    ]
