"""`tnl bench finetune`: real tokens per second of packed and of padded examples, and the memory that LoRA takes.

Steps are those of `tnl finetune`, in its engine, with its loader and its step; weights and examples are made.
"""

import contextlib
import gc
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from tnl_kernels.record import save

from tnl import config as configuration
from tnl.data.examples import ExampleCounts, ExampleSet
from tnl.data.instruction_loader import InstructionLoader
from tnl.errors import ConfigError
from tnl.model import TransnormerConfig, TransnormerForCausalLM
from tnl.model.settings import ModelSettings
from tnl.tools.bench_engines import engine_version
from tnl.tools.bench_models import check_json, described, is_out_of_memory, numbers, peak_gib, seconds, start_peak
from tnl.training.engine import PRECISION, Ranks, build_engine, build_model, init_ranks
from tnl.training.finetune_settings import FinetuneSettings
from tnl.training.initialization import Read
from tnl.training.mesh import build_mesh
from tnl.training.methods import apply_method, check_method
from tnl.training.timing import StepTimer
from tnl.training.train_step import TrainStep

PARTS = ("packing", "lora")
# The last is what packing is compared with.
BATCHINGS = ("packed", "grouped", "padded")
SECTIONS = ("train", "model", "optimizer", "method", "deepspeed")
OPTIONS = ("sequence_length", "global_batch_size", "micro_batch_size")
# Alpaca's lengths are close to log-normal: of its 52,002 examples 82 % have at most 144 tokens, 97.6 % at most 269 and
# 99.9 % at most 518, where LLaMA's tokenizer counts and the template takes 8.
MEDIAN_TOKENS, SIGMA = 84, 0.6
PROMPT_PART = 0.3  # of the tokens of an example, which are only read
PAD_ID, FIRST_ID = 0, 3
SEED = 0


def made_examples(count: int, max_tokens: int, vocab_size: int) -> ExampleSet:
    """Examples of random tokens, none of them `PAD_ID`, with lengths as Alpaca has them."""
    draw = np.random.RandomState(SEED)
    lengths = np.clip(np.rint(draw.lognormal(math.log(MEDIAN_TOKENS), SIGMA, count)), 2, max_tokens).astype(int)
    ids = draw.randint(FIRST_ID, vocab_size, lengths.sum()).astype(np.int32)
    parts = np.split(ids, np.cumsum(lengths)[:-1])
    return ExampleSet([(own, np.arange(len(own)) >= PROMPT_PART * len(own)) for own in parts], ExampleCounts())


def bench_finetune(
    name: str,
    *,
    lora_name: str,
    parts: list[str],
    pass_tokens: int,
    passes: int,
    lora_tokens: int,
    base_bits: list[int],
    num_examples: int,
    steps: int,
    overrides: list[str],
    json_file: Path | None,
    report: Callable[[str], None],
) -> dict:
    """Measure and print; returns, and after each measurement writes to ``json_file``, the figures.

    What does not fit into memory, or needs a package that is not there, becomes a row that says so.

    Args:
        name, lora_name: models of configs/model, or YAML files of model settings, for the two parts.
        parts: of `PARTS`.
        pass_tokens: positions of a forward pass that batches are made for, padding included.
        passes: forward passes of an optimizer step.
        lora_tokens: tokens of a forward pass of LoRA.
        base_bits: of LoRA's frozen weights, 16 and 4.
        num_examples: made examples; an epoch.
        steps: how many are timed; packed, grouped and padded ones take turns.
        overrides: keys of a run's configuration, of `SECTIONS`, for both parts.

    Raises:
        ConfigError: there is no such model or key, or there is more than one process.
    """
    check_json(json_file)
    full = _settings(name, {"kind": "full"}, pass_tokens, passes, overrides)
    lora = [_settings(lora_name, _lora(bits), lora_tokens, passes, overrides) for bits in base_bits]
    ranks = init_ranks()
    if ranks.world_size > 1:
        raise ConfigError("tnl bench finetune measures one GPU; start it without torchrun")
    options = f"--lora-model {lora_name} --pass-tokens {pass_tokens} --passes {passes} --lora-tokens {lora_tokens} "
    options += f"--bits {numbers(base_bits)} --examples {num_examples} --steps {steps}"
    options += f" --only {parts[0]}" if len(parts) == 1 else ""
    result = described(" ".join(["tnl bench finetune", name, *overrides, options]), ranks.device)
    result |= {"dtype": full.train.precision, "engine": engine_version("deepspeed")}
    report(f"{result['gpu'] or 'CPU'}, {result['dtype']}, {result['engine']}")

    def note(part: str, rows: list[dict]) -> None:
        result.setdefault(part, []).extend(rows)
        for row in rows:
            report(line(row))
        save(result, json_file)

    if "packing" in parts:
        examples = made_examples(num_examples, min(2048, pass_tokens), full.model.vocab_size)
        result["examples"] = {"count": len(examples), "mean": len(examples.ids) / len(examples)}
        result["examples"] |= {"longest": int(examples.lengths.max()), "median_of_law": MEDIAN_TOKENS, "sigma": SIGMA}
        note("packing", measure_packing(name, full, examples, ranks, steps))
    if "lora" in parts:
        for settings in lora:
            examples = made_examples(num_examples, lora_tokens, settings.model.vocab_size)
            note("lora", [measure_lora(lora_name, settings, examples, ranks, steps)])
    return result


def _lora(bits: int) -> dict:
    return {"kind": "lora", "rank": 16, "alpha": 32, "dropout": 0.05, "base_bits": bits}


def _settings(name: str, method: dict, tokens: int, passes: int, overrides: list[str]) -> FinetuneSettings:
    """The configuration of a run that makes these steps; LoRA with every block computed again.

    Raises:
        ConfigError: there is no such model, or an override is wrong.
    """
    given = configuration.parse_overrides(overrides)
    wrong = [key for key in given if key not in SECTIONS]
    wrong += [f"train.{key}" for key in OPTIONS if key in given.get("train", {})]
    if wrong:
        raise ConfigError(
            f"{', '.join(wrong)}: not an override of a benchmark; use its options, and keys of {', '.join(SECTIONS)}"
        )
    source = name if Path(name).suffix in (".yaml", ".yml") else f"model/{name}"
    on_gpu = torch.cuda.is_available()
    tree = {
        "output": "bench",
        "init_from": "bench",
        "model": configuration.load(ModelSettings, source).model_dump(mode="json"),
        "method": method,
        "data": {"source": {"kind": "stdlib"}},
        "train": {
            "steps": 1,
            "sequence_length": tokens,
            "global_batch_size": passes,
            "micro_batch_size": 1,
            "precision": "bf16" if on_gpu else "fp32",
            "zero_stage": 2 if on_gpu else 0,
            "activation_checkpointing": "none" if method["kind"] == "full" else "full",
        },
        "optimizer": {"lr": 1e-5},
    }
    return configuration.validate(FinetuneSettings, configuration.merge(tree, given), "tnl bench finetune")


def measure_packing(
    name: str, settings: FinetuneSettings, examples: ExampleSet, ranks: Ranks, steps: int
) -> list[dict]:
    """A row for each of `BATCHINGS`, of the same model in one engine."""
    device, train = ranks.device, settings.train
    rows, batches = {}, {}
    for batching in BATCHINGS:
        loader = InstructionLoader(
            examples,
            train.sequence_length,
            train.global_batch_size,
            train.micro_batch_size,
            pad_id=PAD_ID,
            seed=SEED,
            batching=batching,
        )
        rows[batching] = {"model": name, "batching": batching, "waste": loader.statistics().waste, "problem": None}
        batches[batching] = list(loader.steps(0, steps))
    with _problems_noted(rows.values()), _stepping(settings, ranks) as run:
        for batching, row in rows.items():
            # A shape takes longer when it is new.
            start_peak(device)
            for own in batches[batching]:
                run(own)
            row["peak_gib"] = peak_gib(device)
        for i in range(steps):
            for batching, row in rows.items():
                _time_step(row, run, batches[batching][i], device)
        for row in rows.values():
            _add_speed(row)
        for row in rows.values():
            row["times_padded"] = row["tokens_per_s"] / rows["padded"]["tokens_per_s"]
    return list(rows.values())


def measure_lora(name: str, settings: FinetuneSettings, examples: ExampleSet, ranks: Ranks, steps: int) -> dict:
    """The row of one kind of base; its peak memory is that of everything, from the first weight to the last step."""
    device, train = ranks.device, settings.train
    row = {"model": name, "base_bits": settings.method.base_bits, "length": train.sequence_length, "problem": None}
    loader = InstructionLoader(
        examples, train.sequence_length, train.global_batch_size, train.micro_batch_size, pad_id=PAD_ID, seed=SEED
    )
    batches = list(loader.steps(0, steps))
    with _problems_noted([row]), _stepping(settings, ranks) as run:
        row["load_gib"] = peak_gib(device)
        run(batches[0])
        for own in batches:
            _time_step(row, run, own, device)
        row["peak_gib"] = peak_gib(device)
        _add_speed(row)
    return row


def _time_step(row: dict, run: Callable[[list[dict]], float], micro_batches: list[dict], device: torch.device) -> None:
    """Make a step; its time, its tokens and its loss go into the row."""
    row.setdefault("step_s", []).append(seconds(lambda: row.update(loss=run(micro_batches)), device))
    row.setdefault("step_tokens", []).append(sum((m["input_ids"] != PAD_ID).sum().item() for m in micro_batches))


def _add_speed(row: dict) -> None:
    row["tokens_per_s"] = statistics.median(n / s for n, s in zip(row["step_tokens"], row["step_s"], strict=True))


class _NeverStopped:
    """Stands for `tnl.training.stop.StopRequest`: the interrupt key ends a benchmark at once."""

    def requested(self) -> bool:
        return False


@contextlib.contextmanager
def _stepping(settings: FinetuneSettings, ranks: Ranks) -> Iterator[Callable[[list[dict]], float]]:
    """A function that makes an optimizer step from its micro-batches, and returns the loss in nats.

    Memory of the block before is given back first, and the peak forgotten.
    """
    gc.collect()
    start_peak(ranks.device)
    network = settings.model.to_config()
    check_method(settings.method, network)
    read = random_weights(network, PRECISION[settings.train.precision], ranks.device)
    model = build_model(lambda: TransnormerForCausalLM(network), settings, ranks, read=read)
    apply_method(settings.method, model, ranks.device)
    engine = build_engine(settings, model, ranks)
    try:
        engine.train()
        mesh = build_mesh(settings.train, ranks)
        timer = StepTimer(ranks.device)
        step = TrainStep(engine, settings.train, ranks, mesh, _NeverStopped(), timer)

        def run(micro_batches: list[dict]) -> float:
            timer.begin()
            return step.run(micro_batches, step=0, lr=settings.optimizer.lr, with_norms=False).loss

        yield run
    finally:
        engine.destroy()


def random_weights(config: TransnormerConfig, dtype: torch.dtype, device: torch.device) -> Read:
    """Normal weights, drawn on ``device`` and given in host memory, as those of a file are."""
    with torch.device("meta"):
        model = TransnormerForCausalLM(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    generator = torch.Generator(device).manual_seed(SEED)

    def read(name: str) -> torch.Tensor:
        drawn = torch.empty(shapes[name], dtype=dtype, device=device)
        return drawn.normal_(std=config.init_std, generator=generator).cpu()

    return read


@contextlib.contextmanager
def _problems_noted(rows: Iterable[dict]) -> Iterator[None]:
    """Out of memory, and a package that is not there, go into the rows."""
    try:
        yield
    except (ConfigError, RuntimeError) as error:
        if not isinstance(error, ConfigError) and not is_out_of_memory(error):
            raise
        for row in rows:
            row["problem"] = str(error) if isinstance(error, ConfigError) else "does not fit into memory"


def line(row: dict) -> str:
    """What the terminal shows of a row."""
    if "batching" in row:
        start = f"{row['model']}, {row['batching']:<8}{row['waste']:>6.1%} padding: "
    else:
        start = f"{row['model']}, LoRA on {row['base_bits']} bits, {row['length']} tokens: "
    if row["problem"] is not None:
        return start + row["problem"]
    memory = "" if row["peak_gib"] is None else f", {row['peak_gib']:.2f} GiB"
    ratio = f", {row['times_padded']:.2f} times padded" if "batching" in row else ""
    return f"{start}{row['tokens_per_s']:>9,.0f} real tokens/s{ratio}{memory}"
