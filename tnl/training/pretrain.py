"""The pretraining run, top to bottom."""

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from tnl_kernels.dispatch import form_of

from tnl import config
from tnl.data.loader import TrainLoader, num_labelled
from tnl.data.shards import TOKENIZER_FILE, ShardSet, check_vocabulary
from tnl.data.tokenizer_export import export_tokenizer
from tnl.errors import EXIT_INTERNAL, EXIT_PREEMPTED, CheckpointError, DataError, NonFiniteError, UserError
from tnl.evaluation.heldout import heldout_loss
from tnl.files import write_atomically
from tnl.model.kinds import model_class, model_config, num_parameters, training_flops_per_token
from tnl.model.sequence_parallel import exchanged_bytes
from tnl.training.checkpoint import RunState, choose_checkpoint, load_checkpoint, save_checkpoint
from tnl.training.commit import CheckpointStore
from tnl.training.engine import Ranks, build_engine, build_model, deepspeed_config, init_ranks
from tnl.training.faults import fault_point
from tnl.training.hardware import peak_flops
from tnl.training.layer_norms import gradient_norms
from tnl.training.lock import RunLock
from tnl.training.mesh import Mesh, build_mesh
from tnl.training.metrics import MetricsWriter, finite_or_none
from tnl.training.out_of_memory import out_of_memory_advice
from tnl.training.profiling import StepProfiler
from tnl.training.run_folder import CHECKPOINTS, CONFIG, TOKENIZER, check_run_folder, config_hash, move_aside, versions
from tnl.training.same_start import check_same_start
from tnl.training.schedule import learning_rate
from tnl.training.segments import segment_losses
from tnl.training.settings import PretrainSettings, TrainSettings
from tnl.training.status import read_status, write_status
from tnl.training.stop import StopRequest
from tnl.training.timing import StepTimer, peak_memory


def pretrain(
    settings: PretrainSettings, *, resume: str = "auto", fresh: bool = False, console: Console | None = None
) -> str:
    """Train until the last step, or until asked to stop.

    Args:
        resume: ``auto`` goes on from the newest valid checkpoint of the run folder, a step number from that one.
        fresh: begin anew; an existing run folder is moved aside.
        console: where rank 0 reports; default the standard output.

    Returns:
        ``finished`` or ``preempted`` (stopped on request, checkpoint saved: the same command goes on).

    Raises:
        UserError: see `tnl.errors`; each class has its exit code. On every rank of the run.
    """
    ranks = init_ranks()
    check_same_start(settings, ranks)
    console = console or Console()
    # What can be refused is refused before the run folder is touched.
    deepspeed_config(settings, ranks.world_size)
    mesh = build_mesh(settings.train, ranks)
    data = _open_data(settings, mesh)
    with contextlib.ExitStack() as stack:
        problem = None
        if ranks.is_main:
            try:
                if fresh:
                    move_aside(settings.output)
                check_run_folder(settings)
                stack.callback(RunLock(settings.output).close)
                check_run_folder(settings)
            except UserError as error:
                problem = error
        ranks.raise_together(problem)
        try:
            with out_of_memory_advice(settings, ranks.rank, ranks.world_size):
                return _run(settings, data, resume, ranks, mesh, console, stack)
        except BaseException as error:
            if ranks.is_main:
                code = error.exit_code if isinstance(error, UserError) else EXIT_INTERNAL
                step = read_status(settings.output).get("step", 0)
                with contextlib.suppress(OSError):  # on a full disk the first error is the one to report
                    write_status(
                        settings.output, "failed", step, settings.train.steps, exit_code=code, error=str(error)
                    )
            raise


def _run(settings: PretrainSettings, data, resume: str, ranks: Ranks, mesh: Mesh, console: Console, stack) -> str:
    train, folder = settings.train, settings.output
    shards, heldout, loader = data
    stop = StopRequest(folder)
    stack.callback(stop.close)

    def warn(text: str) -> None:
        console.print(f"warning: {text}", style="yellow", highlight=False, soft_wrap=True)

    store, state = CheckpointStore(folder / CHECKPOINTS), RunState()
    step = choose_checkpoint(store, resume, ranks, warn)
    if step == train.steps:
        if ranks.is_main:
            console.print(f"{folder}: all {train.steps} steps are done, nothing to train", highlight=False)
            write_status(folder, "finished", step, train.steps, exit_code=0)
        return "finished"

    torch.manual_seed(settings.seed)
    network = model_config(settings.model, train.sequence_length)
    model = build_model(lambda: model_class(network)(network), settings, ranks)
    engine = build_engine(settings, model, ranks)
    if step is not None:
        state, manifest = load_checkpoint(engine, store, step, ranks)
        _check_same_run(manifest, settings, loader, shards, store.path(step))
    problem = None
    if ranks.is_main:
        try:
            _write_run_folder(settings, shards)
            for newer in store.set_aside_after(step) if step is not None else []:
                warn(f"{newer}: not used any more, remove it when you like")
        except (UserError, OSError) as error:
            problem = error if isinstance(error, UserError) else store.cannot_write(folder, error)
    ranks.raise_together(problem)
    fields = {
        "config_sha256": config_hash(settings),
        "data_fingerprint": loader.fingerprint,
        "tokenizer_sha256": shards.index.tokenizer_sha256,
        "zero_stage": train.zero_stage,
        "versions": versions(),
    }

    metrics, flops_per_second = None, None
    if ranks.is_main:
        flops_per_second, source = peak_flops(ranks.device, settings.logging.peak_tflops)
        console.print(
            f"{folder}: {num_parameters(network):,} parameters, {train.steps} steps of "
            f"{train.global_batch_size} x {train.sequence_length} tokens, {ranks.world_size} process(es) on "
            f"{ranks.device.type}, {train.precision}, ZeRO {train.zero_stage}"
            + (f", resumed at step {state.step}" if state.step else ""),
            highlight=False,
            soft_wrap=True,
        )
        peak = "unknown" if flops_per_second is None else f"{flops_per_second / 1e12:.2f} TFLOP/s"
        console.print(
            f"operators: {form_of(ranks.device)} form; peak of one device: {peak} ({source})",
            highlight=False,
            soft_wrap=True,
        )
        if mesh.sequence_size > 1:
            received = exchanged_bytes(network, train.micro_batch_size, mesh.sequence_size)
            console.print(
                f"sequence parallel: {mesh.sequence_size} ranks share a window, "
                f"{train.sequence_length // mesh.sequence_size} tokens each; a layer receives "
                f"{max(received) / 2**20:.3f} MiB at most, a forward pass {sum(received) / 2**20:.3f} MiB and a "
                "backward pass the same, however long the window",
                highlight=False,
                soft_wrap=True,
            )
        metrics = MetricsWriter(
            folder, settings.logging, train.steps, state.step, settings.model_dump(mode="json"), console
        )
        stack.callback(metrics.close)
        write_status(folder, "running", state.step, train.steps)
    flops_per_token = training_flops_per_token(network, train.sequence_length)
    tokens_per_step = train.global_batch_size * train.sequence_length

    engine.train()
    timer = StepTimer(ranks.device)
    profiler = StepProfiler(folder, settings.logging.profile_steps, ranks.rank)
    norms_every = settings.logging.layer_norms_every
    started = time.perf_counter()
    timer.mark("data")
    for micro_batches in loader.steps(state.step, train.steps):
        fault_point("step", step=state.step)
        lr = learning_rate(settings.schedule, settings.optimizer.lr, state.step, train.steps)
        profiler.begin(state.step + 1)
        with_norms = norms_every and (state.step + 1) % norms_every == 0
        loss, stopping, norms = _train_step(
            engine, micro_batches, train, lr, ranks, mesh, stop, state.step, timer, with_norms
        )
        applied = engine.was_step_applied()
        state.step += 1
        state.tokens += tokens_per_step
        state.skipped_steps += not applied
        state.consecutive_skipped = 0 if applied else state.consecutive_skipped + 1
        if metrics:
            elapsed = time.perf_counter() - started
            rate = tokens_per_step / elapsed
            tgs = rate / ranks.world_size
            metrics.train(
                {
                    "step": state.step,
                    "tokens": state.tokens,
                    "loss": finite_or_none(loss),
                    "loss_bits": finite_or_none(loss / math.log(2)),
                    "grad_norm": finite_or_none(float(engine.get_global_grad_norm())),
                    "lr": lr,
                    "tokens_per_s": rate,
                    "tgs": tgs,
                    "mfu": tgs * flops_per_token / flops_per_second if flops_per_second else None,
                    "step_time_s": elapsed,
                    "skipped": not applied,
                    **timer.split(),
                    "peak_memory_bytes": peak_memory(ranks.device),
                }
            )
            if norms:
                metrics.layers({"step": state.step, "grad_norms": [finite_or_none(norm) for norm in norms]})
        trace = profiler.end(state.step)
        if metrics and trace:
            metrics.message(f"step {state.step}: wrote {trace}")
        if state.consecutive_skipped > train.max_skipped_steps:
            raise NonFiniteError(
                f"{folder}: loss or gradients were not finite in {state.consecutive_skipped} steps in a row; begin a "
                "new run in another output folder with a lower optimizer.lr or a longer schedule.warmup_steps"
            )

        last = state.step == train.steps
        if last or (settings.evaluation.every and state.step % settings.evaluation.every == 0):
            _evaluate(settings, engine, heldout, state, ranks, metrics)
        if last or stopping or state.step % settings.checkpoint.every == 0:
            path = save_checkpoint(engine, store, state, ranks, fields, settings.checkpoint.keep, warn)
            if metrics:
                metrics.message(f"step {state.step}: saved {path}")
                write_status(folder, "running", state.step, train.steps)
        if stopping and not last:
            if metrics:
                stop.consume()
                metrics.message(f"stopped on request ({stop.reason or 'another rank'}); the same command goes on")
                write_status(folder, "preempted", state.step, train.steps, exit_code=EXIT_PREEMPTED)
            return "preempted"
        started = time.perf_counter()
        timer.split()
        timer.mark("data")
    if metrics:
        write_status(folder, "finished", state.step, train.steps, exit_code=0)
    return "finished"


def _train_step(
    engine,
    micro_batches,
    train: TrainSettings,
    lr: float,
    ranks: Ranks,
    mesh: Mesh,
    stop: StopRequest,
    step: int,
    timer: StepTimer,
    with_norms: bool,
) -> tuple[float, bool, list[float] | None]:
    """One optimizer step.

    Returns the mean loss of the global batch in nats, whether any rank was asked to stop, and the norms of the blocks'
    gradients if they are wanted.

    Every token of the global batch weighs the same: the sums of the micro-batches are divided by the number of
    labelled tokens on all ranks, and multiplied by the world size because the engine averages gradients over ranks.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    timer.mark("reduce")
    labelled = sum(num_labelled(batch) for batch in micro_batches)
    labelled, stopping = ranks.all_reduce([float(labelled), float(stop.requested())])
    loss_sum, norms = torch.zeros((), device=ranks.device), None
    timer.mark("forward")
    for pass_loss_sum in _forward_passes(engine, micro_batches, train, mesh, ranks.device):
        loss = pass_loss_sum * (ranks.world_size / max(1.0, labelled))
        if fault_point("loss", step=step) == "nan":
            loss = loss * float("nan")
        timer.mark("backward")
        engine.backward(loss, scale_wrt_gas=False)
        timer.mark("optimizer")
        if with_norms and engine.is_gradient_accumulation_boundary():
            norms = gradient_norms(engine.module)
        engine.step()  # updates after the last pass only
        timer.mark("forward")
        loss_sum += pass_loss_sum.detach()
    timer.mark("reduce")
    (total,) = ranks.all_reduce([loss_sum.item()])
    return total / max(1.0, labelled), stopping > 0, norms


def _forward_passes(
    engine, micro_batches, train: TrainSettings, mesh: Mesh, device: torch.device
) -> Iterator[torch.Tensor]:
    """Loss sums of a step's forward passes; each needs its backward pass before the next is asked for."""
    for batch in micro_batches:
        if train.segment_length is not None:
            yield from segment_losses(engine, batch, train, device)
            continue
        tensors = {
            name: value.to(device, non_blocking=True)
            for name, value in batch.items()
            if name in ("input_ids", "labels", "shift_labels", "cu_seqlens") and value is not None
        }
        yield engine(**tensors, **mesh.arguments(batch, device), use_cache=False).loss_sum


def _open_data(settings: PretrainSettings, mesh: Mesh) -> tuple[ShardSet, ShardSet | None, TrainLoader]:
    shards = ShardSet.open(Path(settings.data.shards), "train")
    check_vocabulary(shards, settings.model.vocab_size)
    heldout = ShardSet.open(Path(settings.data.shards), "heldout") if shards.index.splits["heldout"] else None
    loader = TrainLoader(
        shards,
        seq_len=settings.train.sequence_length,
        global_batch=settings.train.global_batch_size,
        micro_batch=settings.train.micro_batch_size,
        seed=settings.seed,
        rank=mesh.data_rank,
        world_size=mesh.data_size,
        sequence_rank=mesh.sequence_rank,
        sequence_size=mesh.sequence_size,
        packing=settings.data.packing,
        num_workers=settings.data.num_workers,
    )
    return shards, heldout, loader


def _write_run_folder(settings: PretrainSettings, shards: ShardSet) -> None:
    """The effective configuration, and the tokenizer that exports of this run will carry."""
    folder = settings.output
    (folder / TOKENIZER).mkdir(exist_ok=True)
    export_tokenizer(shards.folder / TOKENIZER_FILE, folder / TOKENIZER, add_bos=shards.index.add_bos)
    write_atomically(folder / CONFIG, config.dump(settings))


def _check_same_run(manifest: dict, settings, loader: TrainLoader, shards: ShardSet, checkpoint: Path) -> None:
    """The checkpoint belongs to this data and configuration, whatever the files beside it say."""
    if manifest["tokenizer_sha256"] != shards.index.tokenizer_sha256:
        raise DataError(
            f"{checkpoint}: trained with the tokenizer {manifest['tokenizer_sha256'][:12]}, data.shards has "
            f"{shards.index.tokenizer_sha256[:12]}; point data.shards to the shards that this run began with"
        )
    if manifest["data_fingerprint"] != loader.fingerprint:
        raise CheckpointError(
            f"{checkpoint}: trained on the data {manifest['data_fingerprint'][:12]}, data.shards has "
            f"{loader.fingerprint[:12]}; point data.shards to the shards that this run began with, or begin a new "
            "run in another output folder"
        )
    if manifest["config_sha256"] != config_hash(settings):
        raise CheckpointError(
            f"{checkpoint}: saved with another configuration than this one; undo the change, or begin a new run in "
            "another output folder"
        )


def _evaluate(settings, engine, heldout: ShardSet | None, state: RunState, ranks: Ranks, metrics) -> None:
    if heldout is None:
        return
    window = settings.train.sequence_length
    length = settings.train.segment_length or window * max(1, 4096 // window)
    if settings.train.sequence_parallel > 1:
        length = window // settings.train.sequence_parallel  # no more memory than training takes
    result = heldout_loss(
        engine,
        heldout,
        device=ranks.device,
        max_tokens=settings.evaluation.max_tokens,
        length=length,
        window=window,
        rank=ranks.rank,
        world_size=ranks.world_size,
        all_reduce=ranks.all_reduce,
    )
    if metrics:
        metrics.evaluation({"step": state.step, "tokens": state.tokens, **result.row()})
