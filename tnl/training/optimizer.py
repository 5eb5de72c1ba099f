"""AdamW over two parameter groups."""

import torch
import torch.distributed as dist

from tnl.training.settings import OptimizerSettings
from tnl.training.tensor_groups import squared_norm


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay; 1-d parameters and LRPE theta, a set of frequencies, do not."""
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves a partitioned one without
            (kept if len(shape) < 2 or name.endswith("lrpe.theta") else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class ClippedAdamW(torch.optim.AdamW):
    """AdamW that clips by the global norm and leaves out a step whose norm is not finite.

    ZeRO's optimizers do this themselves; at stage 0 DeepSpeed runs the plain optimizer, and reads the two attributes
    from it.

    Attributes:
        overflow: whether the last step was left out.
        _global_grad_norm: gradient norm of the last step before clipping.
    """

    def __init__(self, groups: list[dict], max_norm: float, tensor_group: dist.ProcessGroup | None = None, **kwargs):
        super().__init__(groups, **kwargs)
        self.max_norm, self.tensor_group = max_norm, tensor_group
        self.overflow = False
        self._global_grad_norm = 0.0

    @torch.no_grad()
    def step(self, closure=None):
        """One update, or none."""
        assert closure is None
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self.tensor_group is None:
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        else:
            norm = squared_norm([(p, p.grad) for p in parameters], self.tensor_group).sqrt().float()
        self._global_grad_norm = norm.item()
        self.overflow = not torch.isfinite(norm).item()
        if self.overflow:
            return None
        if self.max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_norm, norm)
        return super().step()


def build_optimizer(
    model: torch.nn.Module,
    settings: OptimizerSettings,
    *,
    zero_stage: int,
    gradient_clipping: float,
    tensor_group: dist.ProcessGroup | None = None,
) -> torch.optim.AdamW:
    """The optimizer that the DeepSpeed engine is given; its learning rate is set before every step.

    ``tensor_group``: the ranks that share the blocks' weights.
    """
    groups = parameter_groups(model, settings.weight_decay)
    fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    kwargs = dict(lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=fused)
    if zero_stage == 0:
        return ClippedAdamW(groups, gradient_clipping, tensor_group, **kwargs)
    return torch.optim.AdamW(groups, **kwargs)
