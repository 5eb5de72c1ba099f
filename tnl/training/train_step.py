"""One optimizer step: forward and backward passes of its micro-batches, and the update."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from tnl.data.loader import num_labelled
from tnl.training.engine import Ranks
from tnl.training.faults import fault_point
from tnl.training.gradient_reduction import GradientReduction
from tnl.training.layer_norms import gradient_norms
from tnl.training.mesh import Mesh
from tnl.training.segments import segment_losses
from tnl.training.settings import TrainSettings
from tnl.training.stop import StopRequest
from tnl.training.timing import StepTimer
from tnl.training.transfer import to_device

INPUTS = ("input_ids", "labels", "shift_labels", "cu_seqlens")


@dataclass(frozen=True)
class StepResult:
    """What a step found, the same on all ranks."""

    loss: float  # mean over the labelled tokens of the global batch, in nats
    is_stopping: bool  # whether some rank was asked to stop
    norms: list[float] | None  # of the blocks' gradients, where they are wanted


class TrainStep:
    """Runs the optimizer steps of a run.

    Every token of the global batch weighs the same: the sums of the micro-batches are divided by the number of
    labelled tokens on all ranks, and multiplied by the world size because the engine averages gradients over ranks.
    Where ranks share the weights they have the same tokens, which all of these count as often.

    Args:
        engine: a DeepSpeed engine.
        stop: what this rank is asked.
        timer: told the phases up to the end of the step.
    """

    def __init__(self, engine, train: TrainSettings, ranks: Ranks, mesh: Mesh, stop: StopRequest, timer: StepTimer):
        self._engine, self._train, self._ranks, self._mesh = engine, train, ranks, mesh
        self._stop, self._timer = stop, timer
        self._reduction = GradientReduction(engine, train)

    def run(self, micro_batches: list[dict], *, step: int, lr: float, with_norms: bool) -> StepResult:
        """Make step ``step``, counted from 0, from ``micro_batches`` of `TrainLoader`."""
        engine, timer, world_size = self._engine, self._timer, self._ranks.world_size
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        timer.mark("reduce")
        labelled = sum(num_labelled(batch) for batch in micro_batches)
        labelled, stopping = self._ranks.all_reduce([float(labelled), float(self._stop.requested())])
        # Kept on the device, and in double precision: the host reads it once.
        loss_sum, norms = torch.zeros((), dtype=torch.float64, device=self._ranks.device), None
        timer.mark("forward")
        with self._reduction.step():
            for pass_loss_sum in self._forward_passes(micro_batches):
                loss = pass_loss_sum * (world_size / max(1.0, labelled))
                if fault_point("loss", step=step) == "nan":
                    loss = loss * float("nan")
                timer.mark("backward")
                engine.backward(loss, scale_wrt_gas=False)
                self._reduction.end_pass()
                timer.mark("forward")
                loss_sum += pass_loss_sum.detach()
            timer.mark("reduce")
        timer.mark("optimizer")
        if with_norms:
            loss_scale = engine.optimizer.loss_scale if self._train.precision == "fp16" else 1.0
            norms = gradient_norms(engine.module, self._mesh.tensor, loss_scale=loss_scale)
        engine.step()
        timer.mark("reduce")
        if world_size > 1:
            dist.all_reduce(loss_sum)
        timer.end()
        return StepResult(loss_sum.item() / max(1.0, labelled), stopping > 0, norms)

    def _forward_passes(self, micro_batches: list[dict]) -> Iterator[torch.Tensor]:
        """Loss sums of the forward passes; each needs its backward pass before the next is asked for."""
        engine, device = self._engine, self._ranks.device
        for batch in micro_batches:
            if self._train.segment_length is not None:
                yield from segment_losses(engine, batch, self._train, device)
                continue
            tensors = {name: to_device(batch[name], device) for name in INPUTS if batch.get(name) is not None}
            yield engine(**tensors, **self._mesh.arguments(batch, device), use_cache=False).loss_sum
