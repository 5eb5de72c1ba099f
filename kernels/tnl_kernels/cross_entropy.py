"""Cross-entropy of a chunk of logits and its gradient, which takes the place of the logits."""

import torch
from torch import Tensor

from tnl_kernels.checks import check_devices, check_dtype, check_num_dims, check_shape
from tnl_kernels.dispatch import HAS_TRITON, dispatch
from tnl_kernels.dtypes import FLOATS, compute_dtype

if HAS_TRITON:
    from tnl_kernels.cross_entropy_triton import triton_cross_entropy_
else:
    triton_cross_entropy_ = None


@torch.no_grad()
def torch_cross_entropy_(logits: Tensor, labels: Tensor, *, ignore_index: int = -100, gradient: bool = True) -> Tensor:
    """The torch form of `tnl_kernels.cross_entropy_`."""
    wide = logits.to(compute_dtype(logits.dtype))  # logits itself where that is its dtype
    keep = labels != ignore_index
    index = torch.where(keep, labels, 0).unsqueeze(1)
    picked = wide.gather(1, index).squeeze(1)
    lse = torch.logsumexp(wide, 1)
    if gradient:
        wide.sub_(lse.unsqueeze(1)).exp_()
        wide.scatter_add_(1, index, wide.new_full(index.shape, -1.0))
        wide.mul_(keep.unsqueeze(1))
        if wide is not logits:
            logits.copy_(wide)
    return torch.where(keep, lse - picked, 0.0)


def cross_entropy_(logits: Tensor, labels: Tensor, *, ignore_index: int = -100, gradient: bool = True) -> Tensor:
    """loss_n = logsumexp(x_n) - x_n[label_n], and in place of x_n its gradient softmax(x_n) - onehot(label_n).

    Gives no gradients to autograd: it is the inner part of a loss that makes its gradients itself.

    Args:
        logits: [N, vocabulary], fp32, bf16, fp16 or fp64; overwritten by the gradient of the sum of the losses.
        labels: int64 [N].
        ignore_index: the label of rows without one: their loss is 0, and so is their gradient.
        gradient: False leaves the logits as they are.

    Returns:
        The losses in nats [N], fp32 (fp64 for fp64). On a GPU, where no value is checked, a label that is neither
        a class nor ``ignore_index`` gives NaN.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    check_num_dims("logits", logits, "[N, vocabulary]")
    check_dtype("logits", logits, FLOATS)
    check_devices(logits.device, labels=labels)
    check_shape("labels", labels, (len(logits),), "[N]")
    check_dtype("labels", labels, (torch.int64,))
    form = dispatch(logits, torch=torch_cross_entropy_, triton=triton_cross_entropy_)
    return form(logits, labels, ignore_index=ignore_index, gradient=gradient)
