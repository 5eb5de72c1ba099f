"""How fast a run is: tokens per second, of all devices and of one, and the part of the peak that this is."""

from dataclasses import dataclass

from tnl.model.kinds import training_flops_per_token
from tnl.training.settings import TrainSettings


@dataclass(frozen=True)
class Throughput:
    """Turns the time of a step into the figures of the metrics.

    Attributes:
        network: configuration of the model.
        peak: FLOP/s of one device; None where it is not known.
        tokens_per_step: of all ranks.
    """

    train: TrainSettings
    network: object
    world_size: int
    peak: float | None
    tokens_per_step: int

    def row(self, step_time_s: float) -> dict[str, float | None]:
        """``tokens_per_s``, ``tgs`` (of one device) and ``mfu`` of a step that took ``step_time_s`` seconds."""
        tokens_per_s = self.tokens_per_step / step_time_s
        tgs = tokens_per_s / self.world_size
        flops_per_token = training_flops_per_token(self.network, self.train.sequence_length)
        return {
            "tokens_per_s": tokens_per_s,
            "tgs": tgs,
            "mfu": tgs * flops_per_token / self.peak if self.peak else None,
        }
