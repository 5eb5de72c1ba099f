"""`tnl bench train`: tokens per GPU per second by sequence length, TNL beside an equal LLaMA, and the limit of both.

The setting of Table 1 of Lightning Attention-2 (arXiv 2401.04658): equal parameters, tokens per step and optimizer.
"""

import contextlib
import gc
import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from tnl_kernels.record import save
from torch.nn.attention import SDPBackend, sdpa_kernel

from tnl import config as configuration
from tnl.data.sequence_slices import slice_windows
from tnl.errors import ConfigError
from tnl.model.kinds import model_class, model_config, num_parameters, training_flops_per_token
from tnl.model.sequence_parallel import SequenceShard
from tnl.model.settings import ModelSettings
from tnl.tools import bench_fla
from tnl.tools.bench_engines import EngineName, Place, build, default_engine, engine_version, join, sequence_group
from tnl.tools.bench_models import described, is_out_of_memory, numbers, peak_gib, seconds, start_peak
from tnl.tools.gemm_limit import GemmLimit, gemm_limit
from tnl.training.gradient_reduction import GradientReduction
from tnl.training.hardware import peak_flops
from tnl.training.segments import segment_losses
from tnl.training.settings import PretrainSettings, TrainSettings

# Kind of the table -> kind of the model, and the backend of PyTorch's attention that a GPU must take.
KINDS = {
    "tnl": ("tnl", None),
    bench_fla.KIND: ("tnl", None),
    "llama": ("llama", SDPBackend.FLASH_ATTENTION),
    "llama-cudnn": ("llama", SDPBackend.CUDNN_ATTENTION),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Sections of a run's configuration that an override may reach, and the keys that the options of the command decide.
SECTIONS = ("train", "model", "optimizer", "deepspeed")
OPTIONS = ("sequence_length", "global_batch_size", "micro_batch_size")
SEED = 0


def bench_train(
    name: str,
    *,
    lengths: list[int],
    tokens_per_step: int,
    micro_tokens: int,
    kinds: list[str],
    steps: int,
    warmup: int,
    engine: EngineName | None,
    overrides: list[str],
    json_file: Path | None,
    report: Callable[[str], None],
    plain_attention: bench_fla.Attention | None = None,
) -> dict:
    """Measure and print; returns, and after each row writes to ``json_file``, the figures. Under torchrun data
    parallel, and rank 0 alone prints and writes.

    Args:
        name: a model of configs/model, or a YAML file of model settings; its weights are random.
        lengths: of the sequences, in tokens. A length above ``micro_tokens`` is a micro-batch of one sequence, one
            above ``tokens_per_step`` also a step of one sequence per process.
        tokens_per_step: of all processes together.
        micro_tokens: of one forward pass of one process, also where processes share a sequence.
        kinds: of `KINDS`.
        steps, warmup: how many steps are timed, and how many come before.
        engine: deepspeed, the training loop's, or torch; None takes the first if it is installed.
        overrides: keys of a run's configuration, of `SECTIONS`; ``train.segment_length`` cuts each sequence,
            ``train.sequence_parallel`` lets processes share it.
        plain_attention: the kernel of the kind tnl-fla; None takes fla's.

    Raises:
        ConfigError: there is no such model, kind or key, the numbers do not divide, or fla is not there or does not
            compute what we do.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ConfigError(f"--kinds: {', '.join(unknown)}: unknown, give some of {', '.join(KINDS)}")
    engine = engine or default_engine()
    source = name if Path(name).suffix in (".yaml", ".yml") else f"model/{name}"
    model = configuration.load(ModelSettings, source).model_dump(mode="json")
    place = join(engine)
    say = report if place.rank == 0 else lambda text: None
    cases = [
        (kind, settings_of(model, kind, length, tokens_per_step, micro_tokens, place, overrides))
        for kind in kinds
        for length in lengths
    ]
    if engine == "torch" and any(_is_for_deepspeed(settings) for _, settings in cases):
        raise ConfigError(
            "train.zero_stage: 3, train.reduce_gradients and deepspeed keys are for --engine deepspeed; this engine "
            "shards nothing and reduces once a step"
        )
    options = f"--lengths {numbers(lengths)} --tokens-per-step {tokens_per_step} --micro-tokens {micro_tokens}"
    options += f" --kinds {','.join(kinds)} --steps {steps} --warmup {warmup} --engine {engine}"
    result = described(" ".join(["tnl bench train", name, *overrides, options]), place.device) | {
        "dtype": cases[0][1].train.precision,
        "engine": engine_version(engine),
        "world_size": place.world_size,
        "tokens_per_step": tokens_per_step,
        "micro_tokens": micro_tokens,
        "rows": [],
    }
    say(
        f"{name} on {place.world_size} x {result['gpu'] or 'CPU'}, {result['dtype']}, {result['engine']}, "
        f"{tokens_per_step:,} tokens a step"
    )
    plain = [settings for kind, settings in cases if kind == bench_fla.KIND]
    if plain:
        say("tnl-fla: fla's kernels are tuned and compared with ours, which may take minutes")
        dtype = DTYPES[plain[0].train.precision]
        plain_attention, result["fla"] = bench_fla.prepare(plain, plain_attention, place.device, dtype)
        gc.collect()
    limits: dict[tuple, GemmLimit] = {}
    for kind, settings in cases:
        row = measure(kind, settings, max(lengths), engine, place, steps, warmup, limits, plain_attention)
        result["rows"].append(row)
        result["table"] = wide(result["rows"])
        say(line(row))
        if place.rank == 0:
            save(result, json_file)
        if row["oom"] and place.world_size > 1:
            # Other processes may wait in a collective that this one has left.
            raise ConfigError(
                f"--micro-tokens: {kind} at {row['length']} tokens does not fit into memory of {place.world_size} "
                "processes; give less, or leave the length out"
            )
    result["spread"] = spread(result["rows"])
    say("spread of a kind over its lengths: " + ", ".join(f"{kind} {x:.1%}" for kind, x in result["spread"].items()))
    if place.rank == 0:
        save(result, json_file)
    return result


def _is_for_deepspeed(settings: PretrainSettings) -> bool:
    return bool(settings.deepspeed) or settings.train.zero_stage > 2 or settings.train.reduce_gradients != "every_pass"


def settings_of(
    model: dict, kind: str, length: int, tokens_per_step: int, micro_tokens: int, place: Place, overrides: list[str]
) -> PretrainSettings:
    """The configuration of a run that makes these steps.

    Raises:
        ConfigError: an override is wrong, or the numbers do not divide.
    """
    given = configuration.parse_overrides(overrides)
    wrong = [key for key in given if key not in SECTIONS]
    wrong += [f"train.{key}" for key in OPTIONS if key in given.get("train", {})]
    if wrong:
        raise ConfigError(
            f"{', '.join(wrong)}: not an override of a benchmark; use its options, and keys of {', '.join(SECTIONS)}"
        )
    shared = given.get("train", {}).get("sequence_parallel", 1)
    if not isinstance(shared, int) or shared < 1 or place.world_size % shared:
        raise ConfigError(f"train.sequence_parallel: {shared} does not divide {place.world_size} process(es)")
    micro_batch = max(1, micro_tokens * shared // length)
    per_pass = micro_batch * length * place.world_size // shared
    per_step = max(tokens_per_step, per_pass if micro_batch == 1 else 0)
    if (micro_batch > 1 and micro_tokens * shared % length) or per_step % per_pass:
        raise ConfigError(
            f"--tokens-per-step: {tokens_per_step} in passes of {place.world_size} x {micro_tokens} tokens do not "
            f"divide into sequences of {length}; give powers of two"
        )
    on_gpu = place.device.type == "cuda"
    tree = {
        "output": "bench",
        "model": model,
        "data": {"shards": "bench"},
        "train": {
            "steps": 1,
            "sequence_length": length,
            "global_batch_size": per_step // length,
            "micro_batch_size": micro_batch,
            "precision": "bf16" if on_gpu else "fp32",
            "zero_stage": 2 if on_gpu else 0,
        },
        "optimizer": {"lr": 1e-4},
    }
    tree = configuration.merge(configuration.merge(tree, given), {"model": {"kind": KINDS[kind][0]}})
    settings = configuration.validate(PretrainSettings, tree, "tnl bench train")
    if settings.train.precision not in DTYPES:
        raise ConfigError(f"train.precision: {settings.train.precision}: not measured; give {' or '.join(DTYPES)}")
    return settings


def measure(
    kind: str,
    settings: PretrainSettings,
    max_length: int,
    engine_name: EngineName,
    place: Place,
    steps: int,
    warmup: int,
    limits: dict,
    plain_attention: bench_fla.Attention | None,
) -> dict:
    """The row of one kind and length; of one that does not fit into memory, without figures."""
    train, device = settings.train, place.device
    config = model_config(settings.model, max_length)
    dtype = DTYPES[train.precision]
    num_tokens = train.micro_batch_size * (train.segment_length or train.sequence_length) // train.sequence_parallel
    row = {
        "kind": kind,
        "length": train.sequence_length,
        "parameters": num_parameters(config),
        "micro_batch": train.micro_batch_size,
        "passes": train.global_batch_size // train.micro_batch_size * train.sequence_parallel // place.world_size,
        "tgs": None,
        "oom": False,
    }
    make = partial(model_class(config), config)
    if kind == bench_fla.KIND:
        make = partial(bench_fla.PlainTransnormer, config, plain_attention)
    backend = KINDS[kind][1] if device.type == "cuda" else None
    engine = None
    start_peak(device)
    try:
        key = (KINDS[kind][0], num_tokens)
        if key not in limits:
            with torch.device("meta"):
                shapes = model_class(config)(config)
            limits[key] = gemm_limit(shapes, num_tokens, device, dtype)
        start_peak(device)
        torch.manual_seed(SEED)
        engine = build(engine_name, make, settings, place)
        reduction = GradientReduction(engine, train)
        batches = micro_batches(settings, config.vocab_size, row["passes"], place)
        with sdpa_kernel(backend) if backend is not None else contextlib.nullcontext():
            for _ in range(warmup):
                training_step(engine, reduction, batches, train, place)
            times = [
                seconds(lambda: training_step(engine, reduction, batches, train, place), device) for _ in range(steps)
            ]
            loss = training_step(engine, reduction, batches, train, place)
            if place.world_size > 1:
                dist.all_reduce(loss)
            loss = loss.item()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        row["oom"] = True
    else:
        if not math.isfinite(loss):
            raise ConfigError(f"optimizer.lr: the loss of {kind} became {loss}; give a lower one")
        row |= figures(settings, config, times, limits[key], place) | {"loss": loss, "peak_gib": peak_gib(device)}
    finally:
        if engine is not None:
            engine.destroy()
        engine = reduction = batches = None
        gc.collect()
    return row


def micro_batches(settings: PretrainSettings, vocab_size: int, count: int, place: Place) -> list[dict]:
    """Random tokens of one step of this process, as `TrainLoader` gives them: int64 [micro_batch, T], or a slice of
    these windows, in host memory."""
    shared = settings.train.sequence_parallel
    generator = torch.Generator().manual_seed(SEED + place.rank // shared)
    shape = (settings.train.micro_batch_size, settings.train.sequence_length)
    drawn = [torch.randint(3, vocab_size, shape, generator=generator) for _ in range(count)]
    if shared > 1:
        batches = [slice_windows(ids.numpy(), None, place.rank % shared, shared) for ids in drawn]
    else:
        batches = [{"input_ids": ids, "labels": ids, "cu_seqlens": None} for ids in drawn]
    if place.device.type == "cuda":
        batches = [{k: v if v is None else v.pin_memory() for k, v in batch.items()} for batch in batches]
    return batches


def training_step(
    engine, reduction: GradientReduction, batches: list[dict], train: TrainSettings, place: Place
) -> torch.Tensor:
    """One optimizer step as the training loop makes it; this process's part of the mean loss, on the device."""
    labelled = train.global_batch_size * (train.sequence_length - 1)
    total = torch.zeros((), device=place.device)
    with reduction.step():
        for batch in batches:
            for loss_sum in loss_sums(engine, batch, train, place):
                engine.backward(loss_sum * (place.world_size / labelled), scale_wrt_gas=False)
                reduction.end_pass()
                total += loss_sum.detach()
    engine.step()
    return total / labelled


def loss_sums(engine, batch: dict, train: TrainSettings, place: Place) -> Iterator[torch.Tensor]:
    """The loss sum of a micro-batch, or those of its segments, each to be followed by its backward pass."""
    if train.segment_length is not None:
        yield from segment_losses(engine, batch, train, place.device)
        return
    tensors = {name: value.to(place.device, non_blocking=True) for name, value in batch.items() if value is not None}
    if train.sequence_parallel > 1:
        edges = (tensors.pop("tokens_before"), tensors.pop("tokens_after"))
        tensors["sequence_shard"] = SequenceShard(sequence_group(place, train.sequence_parallel), *edges)
    yield engine(**tensors, use_cache=False).loss_sum


def figures(settings: PretrainSettings, config, times: list[float], limit: GemmLimit, place: Place) -> dict:
    """The figures of a row from the times of its steps."""
    train = settings.train
    per_process = train.global_batch_size * train.sequence_length / place.world_size
    tgs = per_process / statistics.median(times)
    modes = [train.recomputation(i) for i in range(settings.model.num_layers)]
    recomputed = sum(mode in ("full", "selective") for mode in modes) / len(modes)
    limit_tgs = limit.tgs(recomputed)
    flops, _ = peak_flops(place.device, settings.logging.peak_tflops)
    return {
        "tgs": tgs,
        "step_s": times,
        "limit_tgs": limit_tgs,
        "of_limit": tgs / limit_tgs,
        "recomputed": recomputed,
        "mfu": tgs * training_flops_per_token(config, train.sequence_length) / flops if flops else None,
    }


def wide(rows: list[dict]) -> list[dict]:
    """One row per length with a column per kind, the form of Table 1."""
    found: dict[int, dict] = {}
    for row in rows:
        entry = found.setdefault(row["length"], {"length": row["length"]})
        entry[f"{row['kind']}_tgs"] = "OOM" if row["oom"] else row["tgs"]
        entry[f"{row['kind']}_of_limit"] = row.get("of_limit")
        entry[f"{row['kind']}_peak_gib"] = row.get("peak_gib")
    for entry in found.values():
        tnl = entry.get("tnl_tgs")
        for column, kind in (("times_fla", bench_fla.KIND), ("times_llama", "llama")):
            other = entry.get(f"{kind}_tgs")
            if isinstance(tnl, float) and isinstance(other, float):
                entry[column] = tnl / other
    return list(found.values())


def spread(rows: list[dict]) -> dict[str, float]:
    """For each kind how far its slowest length is below its fastest, as a part of that."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if not row["oom"]:
            found.setdefault(row["kind"], []).append(row["tgs"])
    return {kind: 1 - min(tgs) / max(tgs) for kind, tgs in found.items()}


def line(row: dict) -> str:
    """What the terminal shows of a row."""
    start = f"{row['kind']:<11} {row['length']:>8} tokens: "
    if row["oom"]:
        return f"{start}does not fit into memory"
    memory = "" if row["peak_gib"] is None else f", {row['peak_gib']:.1f} GiB"
    mfu = "" if row["mfu"] is None else f", MFU {row['mfu']:.1%}"
    again = ", made twice in part" if row["recomputed"] else ""
    limit = f"{row['of_limit']:.1%} of the matrix products' {row['limit_tgs']:,.0f}{again}"
    return f"{start}{row['tgs']:>9,.0f} tokens/s per device, {limit}{mfu}{memory}"
