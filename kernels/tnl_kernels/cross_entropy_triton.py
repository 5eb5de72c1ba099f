"""The Triton form of cross-entropy on a chunk of logits: one program a row, which it reads twice and writes once.

The second reading finds the row in the L2 cache, so the memory sees each logit read once and written once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnl_kernels.operators import in_place_operator

# Logits of a row that a program holds at a time. Two such programs of 16 warps fill a multiprocessor; more rows in
# flight (of 64,000 bf16 logits each) would outgrow the L2 cache between their two readings.
TILE_ELEMENTS = 16384
LOGITS_PER_WARP = 1024
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def cross_entropy_kernel(
    p_logits,
    p_labels,
    p_losses,
    V,
    stride_n,
    stride_v,
    stride_labels,
    ignore_index,
    BV: tl.constexpr,
    STORE_GRADIENT: tl.constexpr,
):
    """The loss of one row, and the gradient of that loss in place of its logits."""
    i_n = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_n * stride_n
    o_v = tl.arange(0, BV)
    label = tl.load(p_labels + i_n * stride_labels)
    if label == ignore_index:
        tl.store(p_losses + i_n, 0.0)
        if STORE_GRADIENT:
            b_zero = tl.zeros([BV], dtype=p_logits.dtype.element_ty)
            for start in range(0, V, BV):
                tl.store(p_row + (start + o_v).to(tl.int64) * stride_v, b_zero, mask=start + o_v < V)
    else:
        # The labels are not checked on the host: a wrong one reads nothing, and its NaN is seen.
        is_class = (label >= 0) & (label < V)
        picked = tl.load(p_row + label * stride_v, mask=is_class, other=float("nan")).to(tl.float32)
        # From a finite maximum on: a first tile of -inf alone must not make inf - inf.
        maximum = tl.full([], LOWEST, tl.float32)
        total = tl.zeros([], tl.float32)
        for start in range(0, V, BV):
            b_x = tl.load(p_row + (start + o_v).to(tl.int64) * stride_v, mask=start + o_v < V, other=float("-inf")).to(
                tl.float32
            )
            larger = tl.maximum(maximum, tl.max(b_x, 0))
            total = total * tl.exp(maximum - larger) + tl.sum(tl.exp(b_x - larger), 0)
            maximum = larger
        lse = maximum + tl.log(total)
        tl.store(p_losses + i_n, lse - picked)
        if STORE_GRADIENT:
            for start in range(0, V, BV):
                p_x = p_row + (start + o_v).to(tl.int64) * stride_v
                m_x = start + o_v < V
                b_dx = tl.exp(tl.load(p_x, mask=m_x, other=float("-inf")).to(tl.float32) - lse)
                b_dx = tl.where(start + o_v == label.to(tl.int32), b_dx - 1.0, b_dx)
                tl.store(p_x, b_dx.to(p_logits.dtype.element_ty), mask=m_x)


def launch_cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int, gradient: bool, BV: int, num_warps: int
) -> Tensor:
    """Launch the kernel with the given tiles: the losses [N]; arguments as `triton_cross_entropy_`."""
    N, V = logits.shape
    losses = logits.new_empty(N, dtype=torch.float32)
    if N == 0:
        return losses
    with torch.cuda.device_of(logits):
        cross_entropy_kernel[(N,)](
            logits,
            labels,
            losses,
            V,
            *logits.stride(),
            labels.stride(0),
            ignore_index,
            BV=BV,
            STORE_GRADIENT=gradient,
            num_warps=num_warps,
        )
    return losses


@in_place_operator("tnl_kernels::cross_entropy_", mutates_args={"logits"})
def cross_entropy_op(logits: Tensor, labels: Tensor, ignore_index: int, gradient: bool) -> Tensor:
    """The kernel as an operator of torch."""
    BV = min(TILE_ELEMENTS, triton.next_power_of_2(logits.shape[1]))
    return launch_cross_entropy(logits, labels, ignore_index, gradient, BV, max(1, BV // LOGITS_PER_WARP))


@cross_entropy_op.register_fake
def _(logits, labels, ignore_index, gradient):
    return logits.new_empty(len(logits), dtype=torch.float32)


@torch.no_grad()
def triton_cross_entropy_(logits: Tensor, labels: Tensor, *, ignore_index: int = -100, gradient: bool = True) -> Tensor:
    """The Triton form of `tnl_kernels.cross_entropy_`: fp32, bf16 or fp16 logits."""
    return cross_entropy_op(logits, labels, ignore_index, gradient)
