"""Launches of the attention kernels: tiles, segments and strides for given tensors. No autograd here."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from tnl_kernels.attention_kernels import attention_bwd_kernel, attention_fwd_kernel, combine_kernel, order_kernel
from tnl_kernels.segments import num_segments, slots
from tnl_kernels.tiles import Tiles, attention_bwd_tiles, attention_tiles, block, properties

# tf32 has the mantissa of fp16, three tf32 dots that of fp32; bf16 tensors are multiplied as they are.
PRECISION = {torch.bfloat16: "tf32", torch.float16: "tf32", torch.float32: "tf32x3"}
MAX_HEAD_DIM = 256
# More documents than this are short ones: their order does not matter.
MAX_ORDERED = 8192
COMBINE_BLOCK = 1024


@dataclass(frozen=True)
class Sequences:
    """What is walked: ``count`` sequences (rows of the batch, or documents) of mean length ``rows``."""

    count: int
    T: int
    H: int
    rows: int
    cu_seqlens: Tensor | None
    order: Tensor | None


def sequences(x: Tensor, cu_seqlens: Tensor | None) -> Sequences:
    """The sequences in x [B, T, H, K]; the order of documents is found on the device."""
    B, T, H, _ = x.shape
    if cu_seqlens is None:
        return Sequences(B, T, H, T, None, None)
    N = len(cu_seqlens) - 1
    order = None
    if 1 < N <= MAX_ORDERED:
        order = torch.empty(N, dtype=torch.int32, device=x.device)
        with torch.cuda.device_of(x):
            order_kernel[(triton.cdiv(N, 64),)](cu_seqlens, order, N, BLOCK=64)
    return Sequences(N, T, H, -(-T // N), cu_seqlens.contiguous(), order)


def readable(x: Tensor) -> Tensor:
    """x [B, T, H, K] itself if the elements of a head lie side by side, else a copy."""
    fits = x.stride(-1) == 1 and x.stride(1) < 2**23  # offsets inside of a chunk are int32
    return x if fits else x.contiguous()


def zeros(x: Tensor) -> Tensor:
    """Zeros of the shape of x [B, T, H, K], with one head's row in memory."""
    return x.new_zeros(x.shape[-1]).expand(x.shape)


def strides(x: Tensor) -> tuple[int, int, int]:
    """Distances between batch rows, tokens and heads."""
    return x.stride(0), x.stride(1), x.stride(2)


def check_head_dims(K: int, V: int) -> None:
    """Head dims that the kernels hold on chip.

    Raises:
        ValueError: they are too large.
    """
    for name, dim in (("k", K), ("v", V)):
        if not 1 <= dim <= MAX_HEAD_DIM:
            raise ValueError(f"{name}: got head dim {dim}, expected 1 to {MAX_HEAD_DIM}")


def walk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor | None,
    slopes: Tensor,
    state: Tensor | None,
    final_state: Tensor | None,
    what: Sequences,
    tiles: Tiles,
    segments: int,
    *,
    reverse: bool = False,
    silu: bool = False,
    skip_last: bool = False,
) -> None:
    """One launch of the forward kernel; without ``o`` it makes states only. ``skip_last``: of the last segment none."""
    K, V = k.shape[-1], v.shape[-1]
    walked = segments - 1 if skip_last else segments
    programs = what.count * walked * what.H * triton.cdiv(V, tiles.columns)
    if programs == 0:
        return
    out = v if o is None else o
    with torch.cuda.device_of(k):
        attention_fwd_kernel[(programs,)](
            q, k, v, out, slopes, state, final_state, what.cu_seqlens, what.order, what.T, what.H, segments,
            1 if skip_last and reverse else 0, walked, *strides(q), *strides(k), *strides(v), *strides(out),
            K=K, V=V, BT=tiles.chunk, BK=block(K), BV=tiles.columns, REVERSE=reverse, SILU=silu,
            STORE_O=o is not None, USE_STATE=state is not None, STORE_STATE=final_state is not None,
            IS_PACKED=what.cu_seqlens is not None, IS_ORDERED=what.order is not None,
            PRECISION=PRECISION[k.dtype], STAGES=tiles.num_stages, num_warps=tiles.num_warps,
        )  # fmt: skip


def segment_states(
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    initial: Tensor | None,
    final: Tensor | None,
    what: Sequences,
    segments: int,
    *,
    reverse: bool = False,
    silu: bool = False,
) -> Tensor:
    """The state that each segment begins with (in reversed time: from its end), [N, segments, H, K, V] fp32.

    Each segment adds its own rows up, then one kernel carries the sums from segment to segment; it writes ``final``
    where it is given.
    """
    K, V = k.shape[-1], v.shape[-1]
    states = k.new_empty(what.count, segments, what.H, K, V, dtype=torch.float32)
    tiles = state_tiles(k, v, silu)
    walk(
        k, k, v, None, slopes, None, states, what, tiles, segments, reverse=reverse, silu=silu, skip_last=final is None
    )
    programs = what.count * what.H * triton.cdiv(K * V, COMBINE_BLOCK)
    if programs:
        with torch.cuda.device_of(k):
            combine_kernel[(programs,)](
                states, initial, final, slopes, what.cu_seqlens, what.T, what.H, segments, SIZE=K * V,
                BLOCK=COMBINE_BLOCK, REVERSE=reverse, USE_STATE=initial is not None, STORE_STATE=final is not None,
                IS_PACKED=what.cu_seqlens is not None, num_warps=4,
            )  # fmt: skip
    return states


def state_tiles(k: Tensor, v: Tensor, silu: bool) -> Tiles:
    """Tiles of a walk that makes states only."""
    return attention_tiles(k.shape[-1], v.shape[-1], k.dtype, silu, k.device)


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
    q, k, v = readable(q), readable(k), readable(v)
    tiles = attention_tiles(K, V, k.dtype, silu, k.device)
    walks = what.count * what.H
    segments = num_segments(
        what.rows, walks, triton.cdiv(V, tiles.columns), K, V, walks, slots(tiles, properties(k.device)[2]), 1
    )
    initial = None if initial is None else initial.contiguous()
    if segments == 1:
        walk(q, k, v, o, slopes, initial, final, what, tiles, 1, silu=silu)
    else:
        states = segment_states(k, v, slopes, initial, final, what, segments, silu=silu)
        walk(q, k, v, o, slopes, states, None, what, tiles, segments, silu=silu)


def state_forward(
    k: Tensor, v: Tensor, slopes: Tensor, initial: Tensor | None, final: Tensor, cu_seqlens: Tensor | None
) -> None:
    """Write ``final`` [N, H, K, V]."""
    K, V = k.shape[-1], v.shape[-1]
    check_head_dims(K, V)
    what = sequences(k, cu_seqlens)
    k, v = readable(k), readable(v)
    tiles = state_tiles(k, v, False)
    walks = what.count * what.H
    segments = num_segments(
        what.rows, walks, triton.cdiv(V, tiles.columns), K, V, walks, slots(tiles, properties(k.device)[2]), 1
    )
    initial = None if initial is None else initial.contiguous()
    if segments == 1:
        walk(k, k, v, None, slopes, initial, final, what, tiles, 1)
    else:
        segment_states(k, v, slopes, initial, final, what, segments)


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
    q, k, v, do = readable(q), readable(k), readable(v), readable(do)
    tiles = attention_bwd_tiles(K, V, k.dtype, silu, k.device)
    count = triton.cdiv(V, tiles.columns_v) + (1 if dq is None else 2) * triton.cdiv(K, tiles.columns_k)
    walks = what.count * what.H
    segments = num_segments(
        what.rows, walks, count, K, V, walks, slots(state_tiles(k, v, silu), properties(k.device)[2]), 2
    )
    state = None if initial is None else initial.contiguous()
    dstate = None if dfinal is None else dfinal.contiguous()
    stored = dinitial
    if segments > 1:
        if dq is not None:
            state = segment_states(k, v, slopes, state, None, what, segments, silu=silu)
        dstate = segment_states(q, do, slopes, dstate, dinitial, what, segments, reverse=True, silu=silu)
        stored = None
    programs = walks * segments * count
    if programs == 0:
        return
    like = dk if dq is None else dq
    with torch.cuda.device_of(k):
        attention_bwd_kernel[(programs,)](
            q, k, v, do, like, dk, dv, slopes, state, dstate, stored, what.cu_seqlens, what.order, what.T, what.H,
            segments, *strides(q), *strides(k), *strides(v), *strides(do), *strides(like), *strides(dk), *strides(dv),
            K=K, V=V, BK=block(K), BV=block(V), BT_K=tiles.chunk_k, BT_V=tiles.chunk_v, TILE_K=tiles.columns_k,
            TILE_V=tiles.columns_v, SILU=silu, STORE_DQ=dq is not None, USE_STATE=state is not None,
            USE_DSTATE=dstate is not None, STORE_DINITIAL=stored is not None, IS_PACKED=what.cu_seqlens is not None,
            IS_ORDERED=what.order is not None, PRECISION=PRECISION[k.dtype], STAGES=tiles.num_stages,
            num_warps=tiles.num_warps,
        )  # fmt: skip
