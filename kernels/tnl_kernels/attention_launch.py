"""Launches of the attention kernels: tiles, segments and strides for given tensors. No autograd here."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from tnl_kernels.attention_kernels import (
    attention_bwd_kernel,
    attention_fwd_kernel,
    combine_kernel,
    order_kernel,
    states_kernel,
)
from tnl_kernels.segments import num_segments
from tnl_kernels.tiles import attention_bwd_tiles, attention_tiles, block, properties, state_tiles

# tf32 has the mantissa of fp16, three tf32 dots that of fp32; bf16 tensors are multiplied as they are.
PRECISION = {torch.bfloat16: "tf32", torch.float16: "tf32", torch.float32: "tf32x3"}
MAX_HEAD_DIM = 256
# More documents than this are short ones: their order does not matter.
MAX_ORDERED = 8192
COMBINE_BLOCK, COMBINE_GROUP = 512, 4


@dataclass(frozen=True)
class Sequences:
    """What is walked: ``count`` sequences (rows of the batch, or documents) of mean length ``rows``."""

    count: int
    T: int
    H: int
    rows: int
    cu_seqlens: Tensor | None
    order: Tensor | None

    def segments(self, tiles: int, K: int, V: int, device: torch.device, kinds: int) -> int:
        """Into how many segments each is cut, for walks of ``tiles`` programs and ``kinds`` of states [K, V]."""
        return num_segments(self.rows, self.count * self.H, tiles, K, V, properties(device)[2], kinds)


def sequences(x: Tensor, cu_seqlens: Tensor | None) -> Sequences:
    """The sequences in x [B, T, H, K]; the order of documents is found on the device."""
    B, T, H, _ = x.shape
    if cu_seqlens is None:
        return Sequences(B, T, H, T, None, None)
    N = len(cu_seqlens) - 1
    cu_seqlens = cu_seqlens.contiguous()
    if N > MAX_ORDERED:
        order = torch.arange(N, dtype=torch.int32, device=x.device)
    else:
        order = torch.empty(N, dtype=torch.int32, device=x.device)
        with torch.cuda.device_of(x):
            order_kernel[(triton.cdiv(N, 64),)](cu_seqlens, order, N, BLOCK=64)
    return Sequences(N, T, H, -(-T // N), cu_seqlens, order)


def readable(x: Tensor) -> Tensor:
    """x [B, T, H, K] itself if the elements of a head lie side by side, else a copy."""
    fits = x.stride(-1) == 1 and x.stride(1) < 2**23  # offsets inside of a chunk are int32
    return x if fits else x.contiguous()


def zeros(x: Tensor) -> Tensor:
    """Zeros of the shape of x [B, T, H, K], with one head's row in memory."""
    return x.new_zeros(x.shape[-1]).expand(x.shape)


def strides(x: Tensor | None) -> tuple[int, int, int]:
    """Distances between batch rows, tokens and heads."""
    return (0, 0, 0) if x is None else (x.stride(0), x.stride(1), x.stride(2))


def present(*tensors: Tensor | None) -> list[int]:
    """Flags: which of the tensors are there."""
    return [int(tensor is not None) for tensor in tensors]


def or_any(other: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """The tensors, ``other`` for those that are not there: a kernel needs a pointer of the same kind."""
    return [other if tensor is None else tensor for tensor in tensors]


def check_head_dims(K: int, V: int) -> None:
    """Head dims that the kernels hold on chip.

    Raises:
        ValueError: they are too large.
    """
    for name, dim in (("k", K), ("v", V)):
        if not 1 <= dim <= MAX_HEAD_DIM:
            raise ValueError(f"{name}: got head dim {dim}, expected 1 to {MAX_HEAD_DIM}")


def segment_states(
    what: Sequences,
    segments: int,
    slopes: Tensor,
    silu: bool,
    of: tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None,
    of_gradients: tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None,
) -> tuple[Tensor | None, Tensor | None]:
    """The state that each segment begins with, and the gradient of the one that it ends with, [N, segments, H, K, V].

    ``of`` is k, v, the initial state and where to write the final one; ``of_gradients`` is q, do, the gradient of the
    final state and where to write that of the initial one. One kernel adds up each segment's own rows, a second one
    carries the sums from segment to segment.
    """
    k, v, initial, final = of or (None,) * 4
    q, do, dfinal, dinitial = of_gradients or (None,) * 4
    like, other = (k, v) if of else (q, do)
    K, V = like.shape[-1], other.shape[-1]
    tiles = state_tiles(K, V, like.dtype, silu, like.device)
    shape = (what.count, segments, what.H, K, V)
    states = like.new_empty(shape, dtype=torch.float32) if of else None
    dstates = like.new_empty(shape, dtype=torch.float32) if of_gradients else None
    walks = what.count * what.H
    per_segment = walks * triton.cdiv(V, tiles.columns)
    walked = segments - (final is None) if of else 0
    walked_d = segments - (dinitial is None) if of_gradients else 0
    programs = per_segment * (walked + walked_d)
    sides = dict(FORWARD=of is not None, BACKWARD=of_gradients is not None)
    packed = dict(IS_PACKED=what.cu_seqlens is not None)
    with torch.cuda.device_of(like):
        if programs:
            states_kernel[(programs,)](
                q, k, v, do, states, dstates, slopes, what.cu_seqlens, what.order, what.count, what.T, what.H, segments,
                walked, walked_d, *strides(q), *strides(k), *strides(v), *strides(do), K=K, V=V, BT=tiles.chunk,
                BK=block(K), BV=tiles.columns, **sides, SILU=silu, **packed, PRECISION=PRECISION[like.dtype],
                STAGES=tiles.num_stages, num_warps=tiles.num_warps,
            )  # fmt: skip
        if walks:
            blocks = walks * triton.cdiv(K * V, COMBINE_BLOCK)
            combine_kernel[(blocks * sum(sides.values()),)](
                states, dstates, *or_any(slopes, initial, final, dfinal, dinitial), slopes, what.cu_seqlens, what.count,
                what.T, what.H, segments, *present(initial, final, dfinal, dinitial), SIZE=K * V, BLOCK=COMBINE_BLOCK,
                GROUP=COMBINE_GROUP, **sides, **packed, num_warps=4,
            )  # fmt: skip
    return states, dstates


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    slopes: Tensor,
    initial: Tensor | None,
    final: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> None:
    """Write ``o`` [B, T, H, V] and, where it is given, ``final`` [N, H, K, V]."""
    K, V = k.shape[-1], v.shape[-1]
    check_head_dims(K, V)
    what = sequences(k, cu_seqlens)
    slopes = slopes.float().contiguous()
    q, k, v = readable(q), readable(k), readable(v)
    tiles = attention_tiles(K, V, k.dtype, silu, k.device)
    count = triton.cdiv(V, tiles.columns)
    segments = what.segments(count, K, V, k.device, 1)
    state = None if initial is None else initial.contiguous()
    stored = final
    if segments > 1:
        state, _ = segment_states(what, segments, slopes, silu, (k, v, state, final), None)
        stored = None
    programs = what.count * segments * what.H * count
    if programs == 0:
        return
    with torch.cuda.device_of(k):
        attention_fwd_kernel[(programs,)](
            q, k, v, o, slopes, *or_any(slopes, state, stored), what.cu_seqlens, what.order, what.T, what.H, segments,
            *present(state, stored), *strides(q), *strides(k), *strides(v), *strides(o), K=K, V=V, BT=tiles.chunk,
            BK=block(K), BV=tiles.columns, SILU=silu, IS_PACKED=what.cu_seqlens is not None,
            PRECISION=PRECISION[k.dtype], STAGES=tiles.num_stages, num_warps=tiles.num_warps,
        )  # fmt: skip


def state_forward(
    k: Tensor, v: Tensor, slopes: Tensor, initial: Tensor | None, final: Tensor, cu_seqlens: Tensor | None
) -> None:
    """Write ``final`` [N, H, K, V]."""
    K, V = k.shape[-1], v.shape[-1]
    check_head_dims(K, V)
    what = sequences(k, cu_seqlens)
    slopes = slopes.float().contiguous()
    tiles = state_tiles(K, V, k.dtype, False, k.device)
    count = triton.cdiv(V, tiles.columns)
    segments = what.segments(count, K, V, k.device, 1)
    initial = None if initial is None else initial.contiguous()
    segment_states(what, segments, slopes, False, (readable(k), readable(v), initial, final), None)


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    dq: Tensor | None,
    dk: Tensor,
    dv: Tensor,
    slopes: Tensor,
    initial: Tensor | None,
    dfinal: Tensor | None,
    dinitial: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> None:
    """Write dk, dv and, where they are given, dq and ``dinitial``; shapes as in the forward pass."""
    K, V = k.shape[-1], v.shape[-1]
    what = sequences(k, cu_seqlens)
    slopes = slopes.float().contiguous()
    q, k, v, do = readable(q), readable(k), readable(v), readable(do)
    tiles = attention_bwd_tiles(K, V, k.dtype, silu, k.device)
    count = triton.cdiv(V, tiles.columns_v) + (1 if dq is None else 2) * triton.cdiv(K, tiles.columns_k)
    segments = what.segments(count, K, V, k.device, 2)
    state = None if initial is None else initial.contiguous()
    dstate = None if dfinal is None else dfinal.contiguous()
    stored = dinitial
    if segments > 1:
        of = None if dq is None else (k, v, state, None)
        state, dstate = segment_states(what, segments, slopes, silu, of, (q, do, dstate, dinitial))
        stored = None
    programs = what.count * what.H * segments * count
    if programs == 0:
        return
    like = dk if dq is None else dq
    with torch.cuda.device_of(k):
        attention_bwd_kernel[(programs,)](
            q, k, v, do, like, dk, dv, slopes, *or_any(slopes, state, dstate, stored), what.cu_seqlens, what.order,
            what.T, what.H, segments, *present(state, dstate, stored), *strides(q), *strides(k), *strides(v),
            *strides(do), *strides(like), *strides(dk), *strides(dv),
            K=K, V=V, BK=block(K), BV=block(V), BT_K=tiles.chunk_k, BT_V=tiles.chunk_v, TILE_K=tiles.columns_k,
            TILE_V=tiles.columns_v, SILU=silu, STORE_DQ=dq is not None,
            HAS_STATES=any(present(state, dstate, stored)), IS_PACKED=what.cu_seqlens is not None,
            PRECISION=PRECISION[k.dtype], STAGES=tiles.num_stages, num_warps=tiles.num_warps,
        )  # fmt: skip
