"""The DeepSpeed engine of a run: process environment, DeepSpeed configuration, construction."""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from tnl.errors import ConfigError, UserError, did_you_mean
from tnl.training.deepspeed_import import deepspeed
from tnl.training.optimizer import build_optimizer
from tnl.training.settings import PretrainSettings

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
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
            raise codes.get(int(code), UserError)("another rank ended with an error; see its message")


def init_ranks() -> Ranks:
    """Join the process group that torchrun describes; without a launcher, be the only process.

    Raises:
        ConfigError: some of the launcher's variables are set and others are not.
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
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT, device_id=bound)
        deepspeed.init_distributed(verbose=False)  # takes the group over
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def deepspeed_config(settings: PretrainSettings, world_size: int) -> dict:
    """The whole DeepSpeed configuration; nothing that training depends on is left to DeepSpeed's defaults.

    Raises:
        ConfigError: the global batch is no multiple of what all ranks take in one micro-batch.
    """
    train = settings.train
    per_pass = train.micro_batch_size * world_size
    if train.global_batch_size % per_pass:
        raise ConfigError(
            f"train.global_batch_size: {train.global_batch_size} is no multiple of train.micro_batch_size "
            f"{train.micro_batch_size} x {world_size} processes = {per_pass}"
        )
    zero = {"stage": train.zero_stage, "overlap_comm": False, "contiguous_gradients": True}
    config = {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.global_batch_size // per_pass,
        # At stage 0 the optimizer that we hand over clips, see ClippedAdamW.
        "gradient_clipping": train.gradient_clipping if train.zero_stage else 0.0,
        "bf16": {"enabled": train.precision == "bf16", "check_grad_overflow": True},
        "fp16": {"enabled": train.precision == "fp16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "checkpoint": {"tag_validation": "Fail"},
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
    }
    extra = dict(settings.deepspeed)
    zero |= extra.pop("zero_optimization", {})
    _check_zero_keys(zero)
    return config | extra


def _check_zero_keys(zero: dict) -> None:
    known = deepspeed.runtime.zero.config.DeepSpeedZeroConfig
    try:
        known(**zero)
    except ValueError as error:
        problems = []
        for item in error.errors():
            key = ".".join(map(str, item["loc"]))
            text = item["msg"].lower()
            if item["type"] == "extra_forbidden":
                text = f"unknown key, {did_you_mean(key, known.model_fields)}"
            problems.append(f"deepspeed.zero_optimization.{key}: {text}")
        raise ConfigError("\n".join(problems)) from None


def build_engine(settings: PretrainSettings, model: torch.nn.Module, ranks: Ranks) -> deepspeed.DeepSpeedEngine:
    """Move the model to its device and dtype, and hand it with its optimizer to DeepSpeed."""
    model.to(device=ranks.device, dtype=PRECISION[settings.train.precision])
    if settings.train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = build_optimizer(
        model,
        settings.optimizer,
        zero_stage=settings.train.zero_stage,
        gradient_clipping=settings.train.gradient_clipping,
    )
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=deepspeed_config(settings, ranks.world_size)
    )
    return engine
