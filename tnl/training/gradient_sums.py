"""Sums in fp32 of the gradients of several backward passes, beside weights that are narrower."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tnl.model.loss import add_product_


class GradientSum:
    """The sum for one parameter; its memory stays from step to step."""

    def __init__(self, p: nn.Parameter):
        self._total = torch.empty_like(p, dtype=torch.float32)
        self._is_empty = True

    def add_gradient(self, p: nn.Parameter) -> None:
        """Add ``p.grad``, and let it go; None, which autograd calls this with too, where `add_product` was called."""
        if p.grad is None:
            return
        if self._is_empty:
            self._total.copy_(p.grad)
        else:
            self._total.add_(p.grad)
        self._is_empty, p.grad = False, None

    def add_product(self, a: Tensor, b: Tensor) -> None:
        """Add the matrix product a b, which is not rounded before."""
        if self._is_empty and a.device.type == "cpu":
            self._total.zero_()
        add_product_(self._total, a, b, is_first=self._is_empty)
        self._is_empty = False

    def take(self, dtype: torch.dtype) -> Tensor | None:
        """The sum in ``dtype``, None if nothing was added; the next one begins."""
        total = None if self._is_empty else self._total.to(dtype)
        self._is_empty = True
        return total


class _SummedLinear(torch.autograd.Function):
    """x W^T, whose backward pass adds the gradient of W to its sum while it makes it."""

    @staticmethod
    def forward(ctx, x, weight, total):
        ctx.save_for_backward(x, weight)
        ctx.total = total
        return F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        ctx.total.add_product(dy.flatten(0, -2).t(), x.flatten(0, -2))
        return (dy @ weight if ctx.needs_input_grad[0] else None), None, None


def _summed_linear(layer: nn.Linear, total: GradientSum, x: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        return _SummedLinear.apply(x, layer.weight, total)
    return F.linear(x, layer.weight)


def sum_gradients(model: nn.Module, *, fused: bool) -> list[tuple[nn.Parameter, GradientSum]]:
    """Collect the gradients of all parameters narrower than fp32 in sums; ``p.grad`` stays None after a backward pass.

    Args:
        fused: let plain linear layers add to the sum as they make the product; not for torch.compile.
    """
    assert not getattr(model, "sums_gradients", False), "a second hook would find no gradient"
    model.sums_gradients = True
    sums = {p: GradientSum(p) for p in model.parameters() if p.requires_grad and p.dtype.itemsize < 4}
    for p, total in sums.items():
        # Closures without the model: a cycle through the hook would keep its memory.
        p.register_post_accumulate_grad_hook(total.add_gradient)
    layers = [m for m in model.model.layers.modules() if type(m) is nn.Linear and m.bias is None]
    for layer in layers if fused else []:
        if layer.weight in sums and "forward" not in vars(layer):
            layer.forward = partial(_summed_linear, layer, sums[layer.weight])
    return list(sums.items())
