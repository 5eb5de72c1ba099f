"""Linear projection and cross-entropy together, without keeping the logits."""

import torch
import torch.nn.functional as F
from tnl_kernels import cross_entropy_
from tnl_kernels.checks import check_devices, check_dtype, check_num_dims, check_shape
from tnl_kernels.dtypes import compute_dtype
from torch import Tensor, library

IGNORE_INDEX = -100
# Logits of this many elements are held at a time: 8 MiB in fp32 stay in a CPU's cache.
CHUNK_ELEMENTS = 2**21
# On a GPU 512 MiB in bf16, 4,096 rows of 64,000 logits: half as many are slower, twice as many are not faster.
GPU_CHUNK_ELEMENTS = 2**28


def chunk_rows(num_rows: int, vocab_size: int, device: torch.device) -> int:
    """Rows whose logits are held at a time."""
    if device.type == "cpu":
        return max(64, CHUNK_ELEMENTS // vocab_size)
    num_chunks = -(-num_rows * vocab_size // GPU_CHUNK_ELEMENTS)
    # Chunks of equal size, in whole tiles of a matmul.
    return max(1, -(-num_rows // max(1, num_chunks) // 128)) * 128


def add_product_(total: Tensor, a: Tensor, b: Tensor, *, is_first: bool) -> None:
    """total += a b, where ``total`` may be wider than ``a`` and ``b``; its values before the first product are 0."""
    if total.device.type == "cpu":
        total += torch.mm(a, b)
    else:
        # cuBLAS adds to the fp32 sum while it writes the product: no rounding to bf16 between, and no further pass.
        wide = {} if a.dtype == total.dtype else {"out_dtype": total.dtype}
        torch.addmm(total, a, b, beta=0 if is_first else 1, out=total, **wide)


# An operator of its own, so that torch.compile does not look into the loop over the chunks.
@library.custom_op("tnl::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(
    hidden: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype, need_dhidden: bool, need_dweight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss sum and its gradients, made together chunk by chunk, so that the logits never exist as a whole.

    Args:
        hidden, weight, labels: as `linear_cross_entropy`.
        dtype: of the matmuls and the logits.
        need_dhidden, need_dweight: which gradients to make; an empty tensor stands for the other.

    Returns:
        The loss sum, dhidden [N, D] in the dtype of hidden, and dweight [vocabulary, D] in fp32 (fp64 for fp64).
    """
    N, vocab_size = len(hidden), len(weight)
    loss, dhidden, dweight = _empty_outputs(hidden, weight, dtype, need_dhidden, need_dweight)
    loss.zero_()
    if N == 0 or dweight.device.type == "cpu":
        dweight.zero_()
    matrix = weight.to(dtype)
    rows = chunk_rows(N, vocab_size, hidden.device)
    for start in range(0, N, rows):
        part, target = hidden[start : start + rows].to(dtype), labels[start : start + rows]
        x = F.linear(part, matrix)  # [rows, vocabulary], the logits, in whose place their gradient comes
        loss += cross_entropy_(x, target, ignore_index=IGNORE_INDEX, gradient=need_dhidden or need_dweight).sum()
        if need_dhidden and dtype == hidden.dtype:
            torch.mm(x, matrix, out=dhidden[start : start + rows])
        elif need_dhidden:
            dhidden[start : start + rows] = torch.mm(x, matrix)
        if need_dweight:
            add_product_(dweight, x.t(), part, is_first=start == 0)
        del x  # or it would still be held while the next chunk's logits are made
    return loss, dhidden, dweight


def _empty_outputs(hidden, weight, dtype, need_dhidden, need_dweight):
    loss = hidden.new_empty((), dtype=compute_dtype(dtype))
    dhidden = hidden.new_empty(hidden.shape if need_dhidden else 0)
    dweight = weight.new_empty(weight.shape if need_dweight else 0, dtype=compute_dtype(dtype))
    return loss, dhidden, dweight


@linear_cross_entropy_op.register_fake
def _(hidden, weight, labels, dtype, need_dhidden, need_dweight):
    return _empty_outputs(hidden, weight, dtype, need_dhidden, need_dweight)


def _save(ctx, inputs, output):
    hidden, weight, _, _, ctx.need_dhidden, ctx.need_dweight = inputs
    _, dhidden, dweight = output
    ctx.dtypes = hidden.dtype, weight.dtype
    ctx.mark_non_differentiable(dhidden, dweight)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dhidden, dweight)


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """In one pass. A scale of one dim and not of none takes part in promotion: rounded to bf16 it would bias every
    gradient by up to 0.4 %."""
    return torch.mul(gradient, scale.reshape(1), out=torch.empty_like(gradient, dtype=dtype))


def _backward(ctx, dloss, *_):
    if torch.is_grad_enabled():
        raise RuntimeError("linear_cross_entropy makes its gradients with the loss: it has no second derivative")
    dhidden, dweight = ctx.saved_tensors
    hidden_dtype, weight_dtype = ctx.dtypes
    return (
        _scaled(dhidden, dloss, hidden_dtype) if dloss is not None and ctx.need_dhidden else None,
        _scaled(dweight, dloss, weight_dtype) if dloss is not None and ctx.need_dweight else None,
        *(None,) * 4,
    )


linear_cross_entropy_op.register_autograd(_backward, setup_context=_save)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over the labelled rows of ``logsumexp(W h) - (W h)[label]``, in nats.

    Args:
        hidden: [N, D].
        weight: [vocabulary, D], same dtype as ``hidden``; under autocast any dtypes.
        labels: int64 [N]; `IGNORE_INDEX` (-100) marks rows without a label.

    Returns:
        The loss sum, fp32 scalar (fp64 for fp64) with gradients to `hidden` and `weight`, and the number of labelled
        rows, int64 scalar. Gradients are made only for what asks for them, once; that of the weight is summed in fp32.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    check_num_dims("hidden", hidden, "[N, D]")
    check_shape("weight", weight, (*weight.shape[:1], hidden.shape[1]), "[vocabulary, D]")
    check_shape("labels", labels, (len(hidden),), "[N]")
    check_dtype("labels", labels, (torch.int64,))
    check_devices(hidden.device, weight=weight, labels=labels)
    device_type = hidden.device.type
    # Asked about meta tensors, which have no autocast, torch raises.
    is_autocast = device_type != "meta" and torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if is_autocast else weight.dtype
    if not is_autocast:
        check_dtype("hidden", hidden, (weight.dtype,))
    is_trained = torch.is_grad_enabled()
    loss, _, _ = linear_cross_entropy_op(
        hidden, weight, labels, dtype, is_trained and hidden.requires_grad, is_trained and weight.requires_grad
    )
    return loss, (labels != IGNORE_INDEX).sum()


def cross_entropy_of_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The same loss sum and count, of logits [..., vocabulary] that exist as a whole, and labels int64 [...]."""
    wide = logits.flatten(0, -2).to(compute_dtype(logits.dtype))
    loss = F.cross_entropy(wide, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    return loss, (labels != IGNORE_INDEX).sum()
