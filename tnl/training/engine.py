"""The DeepSpeed engine of a run: process environment, DeepSpeed configuration, construction."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from tnl.errors import ConfigError, UserError, did_you_mean
from tnl.training.batch_split import passes_per_step
from tnl.training.blocks import prepare_blocks
from tnl.training.deepspeed_import import deepspeed
from tnl.training.gradient_reduction import passes_of_engine
from tnl.training.initialization import Read, partitioned_model, read_model, sliced_model
from tnl.training.memory import PREFETCH_BUCKET, REDUCE_BUCKET, overlaps
from tnl.training.optimizer import build_optimizer
from tnl.training.rendezvous import meet
from tnl.training.settings import RunSettings, TrainSettings
from tnl.training.tensor_groups import TensorGroups

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
ELSEWHERE = "another rank ended with an error; see its message"
PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among all processes of the run."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and manifests."""
        return self.rank == 0

    def all_reduce(self, values: list[float], op=dist.ReduceOp.SUM) -> list[float]:
        """Sum (or ``op``) of float64 ``values`` over all ranks."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=op)
        return tensor.tolist()

    def raise_together(self, error: UserError | None) -> None:
        """End all ranks when one has a problem: it raises its own error, the others one that points to it.

        Without this the others would wait in a collective until its timeout.
        """
        codes = {kind.exit_code: kind for kind in UserError.__subclasses__()}
        (code,) = self.all_reduce([float(error.exit_code if error else 0)], op=dist.ReduceOp.MAX)
        if error is not None:
            raise error
        if code:
            raise codes.get(int(code), UserError)(ELSEWHERE)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Run the block on every rank, and end all ranks when one has a problem in it."""
        problem = None
        try:
            yield
        except UserError as error:
            problem = error
        self.raise_together(problem)


def init_ranks() -> Ranks:
    """Join the process group that torchrun describes; without a launcher, be the only process.

    Raises:
        ConfigError: some of the launcher's variables are set and others are not, or not all processes came.
    """
    missing = [name for name in RANK_VARIABLES if name not in os.environ]
    if missing and "RANK" in os.environ:
        raise ConfigError(f"{', '.join(missing)}: not set although RANK is; start with torchrun, or unset RANK")
    if missing:
        # DeepSpeed would look for MPI. The port only has to be free.
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= dict(zip(RANK_VARIABLES, ["0", "1", "0", "127.0.0.1", str(port)], strict=True))
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ["LOCAL_RANK"])
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"LOCAL_RANK: {local_rank}, but this machine has {torch.cuda.device_count()} GPUs; start fewer "
                "processes"
            )
        torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if not dist.is_initialized():
        backend, bound = ("nccl", device) if cuda else ("gloo", None)
        store, rank, world_size = meet()
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT, device_id=bound
        )
        deepspeed.init_distributed(verbose=False)  # takes the group over
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def deepspeed_config(settings: RunSettings, world_size: int) -> dict:
    """The whole DeepSpeed configuration; nothing that training depends on is left to DeepSpeed's defaults.

    Raises:
        ConfigError: the global batch is no multiple of what all ranks take in one micro-batch, or the ranks do not
            divide.
    """
    train = settings.train
    zero = _zero_config(train, world_size // train.tensor_parallel)
    config = {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": passes_of_engine(train, passes_per_step(train, world_size)),
        # At stage 0 the optimizer that we hand over clips, see ClippedAdamW.
        "gradient_clipping": train.gradient_clipping if train.zero_stage else 0.0,
        "bf16": {"enabled": train.precision == "bf16", "check_grad_overflow": True},
        "fp16": {
            "enabled": train.precision == "fp16",
            "loss_scale": 0,  # found while training
            "initial_scale_power": train.loss_scale_power,
            "loss_scale_window": train.loss_scale_window,
            "hysteresis": 2,
            "min_loss_scale": 1,
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "checkpoint": {"tag_validation": "Fail"},
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        # It waits for the device before and after every pass; the loop measures by itself.
        "timers": {"throughput": {"enabled": False}},
        "zero_allow_untested_optimizer": True,
        # torch's fused AdamW updates what is offloaded: it is there without a compiler.
        "zero_force_ds_cpu_optimizer": False,
    }
    extra = dict(settings.deepspeed)
    zero |= extra.pop("zero_optimization", {})
    _check_device(train)
    _check_zero_keys(zero)
    return config | extra


def _zero_config(train: TrainSettings, num_divided: int) -> dict:
    """``num_divided``: ranks that ZeRO divides its states over."""
    zero = {
        "stage": train.zero_stage,
        # Of no use without communication or without streams, and it takes a second bucket.
        "overlap_comm": overlaps(num_divided),
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": REDUCE_BUCKET,
        "allgather_partitions": True,
        "allgather_bucket_size": REDUCE_BUCKET,
        "round_robin_gradients": False,
        "sub_group_size": 1_000_000_000,
        "memory_efficient_linear": True,
        "stage3_prefetch_bucket_size": PREFETCH_BUCKET,
        "stage3_param_persistence_threshold": 100_000,
        "stage3_max_live_parameters": 1_000_000_000,
        "stage3_max_reuse_distance": 1_000_000_000,
        "stage3_gather_16bit_weights_on_model_save": False,
    }
    pinned = torch.cuda.is_available()
    for key, device in (("offload_optimizer", train.offload_optimizer), ("offload_param", train.offload_parameters)):
        if device != "none":
            path = {"nvme_path": str(train.offload_path)} if device == "nvme" else {}
            zero[key] = {"device": device, "pin_memory": pinned, **path}
    return zero


def _check_device(train: TrainSettings) -> None:
    if train.precision == "fp16" and not deepspeed.accelerator.get_accelerator().is_fp16_supported():
        raise ConfigError("train.precision: fp16 is not supported on this device; set fp32 or bf16, or train on a GPU")
    if "nvme" not in (train.offload_optimizer, train.offload_parameters):
        return
    if not deepspeed.ops.op_builder.AsyncIOBuilder().is_compatible(verbose=False):
        raise ConfigError(
            "train.offload_optimizer, train.offload_parameters: nvme needs DeepSpeed's async_io operator, which cannot "
            "be built here; install libaio with its headers (libaio-dev) and a C++ compiler, or set cpu"
        )


def _check_zero_keys(zero: dict) -> None:
    known = deepspeed.runtime.zero.config.DeepSpeedZeroConfig
    try:
        parsed = known(**zero)
    except ValueError as error:
        problems = []
        for item in error.errors():
            key = ".".join(map(str, item["loc"]))
            text = item["msg"].lower()
            if item["type"] == "extra_forbidden":
                text = f"unknown key, {did_you_mean(key, known.model_fields)}"
            problems.append(f"deepspeed.zero_optimization.{key}: {text}")
        raise ConfigError("\n".join(problems)) from None
    if not parsed.compute_grad_norm:
        raise ConfigError(
            "deepspeed.zero_optimization.compute_grad_norm: the norm shows whether gradients are finite; remove the key"
        )


def build_model(
    make: Callable[[], PreTrainedModel],
    settings: RunSettings,
    ranks: Ranks,
    tensor: TensorGroups | None = None,
    read: Read | None = None,
) -> PreTrainedModel:
    """``make()``, with the weights of a checkpoint where ``read`` gives them; at ZeRO-3, or this rank's part of it
    under tensor parallelism, with the same weights, but never as a whole on one rank."""
    if tensor is not None:
        return sliced_model(make, tensor.group, read)
    dtype = PRECISION[settings.train.precision]
    if settings.train.zero_stage < 3:
        return make() if read is None else read_model(make, dtype, read)
    return partitioned_model(make, dtype, deepspeed_config(settings, ranks.world_size), read)


def _gather_whole_blocks(model: PreTrainedModel) -> None:
    """At ZeRO-3 have the weights of a block gathered before it runs, and not inside, module by module: neither can that
    be compiled, nor is it done twice alike, as selective checkpointing demands, which counts operators."""
    deepspeed.utils.set_z3_leaf_modules(model, [type(model.model.layers[0])])
    embeddings = model.get_input_embeddings()
    if not embeddings.weight.requires_grad:
        # The weights of a block whose input needs no gradient are given away at the beginning of its backward pass.
        embeddings.register_forward_hook(lambda module, args, x: x.requires_grad_(torch.is_grad_enabled()))


def build_engine(
    settings: RunSettings, model: torch.nn.Module, ranks: Ranks, tensor: TensorGroups | None = None
) -> deepspeed.DeepSpeedEngine:
    """Move the model to its device and dtype, and hand it with its optimizer to DeepSpeed."""
    model.to(device=ranks.device, dtype=PRECISION[settings.train.precision])
    prepare_blocks(model, settings.train, ranks.device)
    selects = settings.train.activation_checkpointing.startswith("selective")
    if settings.train.zero_stage == 3 and (settings.train.compile or selects):
        _gather_whole_blocks(model)
    optimizer = build_optimizer(
        model,
        settings.optimizer,
        zero_stage=settings.train.zero_stage,
        gradient_clipping=settings.train.gradient_clipping,
        tensor_group=None if tensor is None else tensor.group,
    )
    deepspeed.utils.groups.mpu = None  # or it would be that of an engine before
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=deepspeed_config(settings, ranks.world_size), mpu=tensor
    )
    if settings.train.zero_stage in (1, 2) and settings.train.offload_optimizer == "none":
        # The norm of the gradients, on which a step is skipped too, is not finite where one of them is not: the search
        # before it reads all of them twice more, and the host waits for its answer.
        engine.optimizer.check_overflow = lambda partition_gradients=True: None
    return engine
