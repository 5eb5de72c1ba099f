"""The Triton kernels of attention over a sequence: what each program walks, where it begins and what it leaves.

One program walks one segment of one sequence (a row of the batch, or a document) for one head and one tile of columns.
The backward pass is three walks of the same scan on other arguments (roles), with S the state and dS its gradient:

    dq: forward in time, (q, k, v) := (do, v, k), state S^T
    dk: in reversed time, (q, k, v) := (v, do, q), state dS^T
    dv: in reversed time, (q, k, v) := (k, q, do), state dS

Programs of the same walk stand side by side, so that what several read comes from the L2 cache.
"""

import triton
import triton.language as tl

from tnl_kernels.scan_triton import LOG2_E, scan

# Segments begin at multiples of this, whatever the chunk of the kernel that walks them.
SEGMENT_ROWS = tl.constexpr(128)
# What changes from call to call must not compile anew. Nor must a state that is there or not: its pointer is then any,
# and its flag (int, 0 or 1) masks it.
VARIABLE = [
    "T", "H", "N", "num_segments", "num_walked", "num_walked_d", "use_state", "use_dstate",
    "store_state", "store_dstate",
]  # fmt: skip


@triton.jit
def sequence(i_n, cu_seqlens, T, IS_PACKED: tl.constexpr):
    """Sequence ``i_n``: its row of the batch, its first token there, its length."""
    if IS_PACKED:
        # The host does not look at offsets on a GPU: wrong ones must not lead out of the tensors.
        o_first = tl.minimum(tl.maximum(tl.load(cu_seqlens + i_n), 0), T)
        o_end = tl.minimum(tl.load(cu_seqlens + i_n + 1), T)
        return 0, o_first, tl.maximum(o_end - o_first, 0)
    return i_n, 0, T


@triton.jit
def segment_rows(length, num_segments):
    """Rows of every segment but the last ones of a sequence of ``length`` rows."""
    return tl.cdiv(tl.cdiv(length, SEGMENT_ROWS), num_segments) * SEGMENT_ROWS


@triton.jit
def segment(i_s, length, num_segments):
    """First row and number of rows of segment ``i_s`` of a sequence of ``length`` rows."""
    rows = segment_rows(length, num_segments)
    o_first = tl.minimum(i_s * rows, length)
    return o_first, tl.minimum(rows, length - o_first)


@triton.jit
def place(
    pid, cu_seqlens, order, T, H, num_segments, num_walked, TILES: tl.constexpr, REVERSE: tl.constexpr,
    IS_PACKED: tl.constexpr,
):  # fmt: skip
    """Where program ``pid`` works: its tile, head, row of the batch, first token, number of rows, number of the state.

    Programs walk the first ``num_walked`` segments of each sequence, in reversed time the last ones.
    """
    i_tile = pid % TILES
    i_h = (pid // TILES) % H
    i_s = (pid // TILES // H) % num_walked
    i_n = pid // TILES // H // num_walked
    if REVERSE:
        i_s += num_segments - num_walked
    if IS_PACKED:
        i_n = tl.load(order + i_n)
    i_b, o_sequence, length = sequence(i_n, cu_seqlens, T, IS_PACKED)
    o_segment, length = segment(i_s, length, num_segments)
    i_state = (i_n * num_segments + i_s) * H + i_h
    return i_tile, i_h, tl.cast(i_b, tl.int64), tl.cast(o_sequence + o_segment, tl.int64), length, i_state


@triton.jit
def load_state(
    state, i_state, o_row, o_col, stride_row, stride_col, ROWS: tl.constexpr, COLS: tl.constexpr, is_present
):
    """[rows, cols] of state number ``i_state``; zero where there is none, ``state`` is then not read."""
    p_s = state + i_state.to(tl.int64) * (ROWS * COLS) + o_row[:, None] * stride_row + o_col[None, :] * stride_col
    mask = (o_row < ROWS)[:, None] & (o_col < COLS)[None, :] & (is_present != 0)
    return tl.load(p_s, mask=mask, other=0.0)


@triton.jit
def write_state(
    state, i_state, b_s, o_row, o_col, stride_row, stride_col, ROWS: tl.constexpr, COLS: tl.constexpr, is_wanted
):
    """Write [rows, cols] of state number ``i_state``, if it is wanted."""
    p_s = state + i_state.to(tl.int64) * (ROWS * COLS) + o_row[:, None] * stride_row + o_col[None, :] * stride_col
    tl.store(p_s, b_s, mask=(o_row < ROWS)[:, None] & (o_col < COLS)[None, :] & (is_wanted != 0))


@triton.jit(do_not_specialize=VARIABLE)
def attention_fwd_kernel(
    q, k, v, o, slopes, state, final_state, cu_seqlens, order, T, H, num_segments, use_state, store_state,
    stride_qb: tl.int64, stride_qt, stride_qh: tl.int64,
    stride_kb: tl.int64, stride_kt, stride_kh: tl.int64,
    stride_vb: tl.int64, stride_vt, stride_vh: tl.int64,
    stride_ob: tl.int64, stride_ot, stride_oh: tl.int64,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    SILU: tl.constexpr, IS_PACKED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """o and the state after each segment.

    State number (n, segment, h) is [K, V] fp32. Grid: sequences * segments * H * tiles of V.
    """
    tiles: tl.constexpr = (V + BV - 1) // BV
    i_v, i_h, i_b, i_t, length, i_state = place(
        tl.program_id(0), cu_seqlens, order, T, H, num_segments, num_segments, tiles, False, IS_PACKED
    )
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    b_s = load_state(state, i_state, o_v, o_k, 1, V, V, K, use_state)
    p_q = q + i_b * stride_qb + i_t * stride_qt + i_h * stride_qh
    b_s = scan(
        b_s,
        p_q,
        k + i_b * stride_kb + i_t * stride_kt + i_h * stride_kh,
        v + i_b * stride_vb + i_t * stride_vt + i_h * stride_vh,
        p_q,
        o + i_b * stride_ob + i_t * stride_ot + i_h * stride_oh,
        stride_qt, stride_kt, stride_vt, stride_qt, stride_ot, length, tl.load(slopes + i_h), i_v,
        K, V, BT, BK, BV, False, SILU, SILU, False, False, True, PRECISION, STAGES,
    )  # fmt: skip
    write_state(final_state, i_state, b_s, o_v, o_k, 1, V, V, K, store_state)


@triton.jit(do_not_specialize=VARIABLE)
def attention_bwd_kernel(
    q, k, v, do, dq, dk, dv, slopes, state, dstate, dinitial, cu_seqlens, order, T, H, num_segments,
    use_state, use_dstate, store_state,
    stride_qb: tl.int64, stride_qt, stride_qh: tl.int64,
    stride_kb: tl.int64, stride_kt, stride_kh: tl.int64,
    stride_vb: tl.int64, stride_vt, stride_vh: tl.int64,
    stride_dob: tl.int64, stride_dot, stride_doh: tl.int64,
    stride_dqb: tl.int64, stride_dqt, stride_dqh: tl.int64,
    stride_dkb: tl.int64, stride_dkt, stride_dkh: tl.int64,
    stride_dvb: tl.int64, stride_dvt, stride_dvh: tl.int64,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BT_K: tl.constexpr, BT_V: tl.constexpr, TILE_K: tl.constexpr, TILE_V: tl.constexpr,
    SILU: tl.constexpr, STORE_DQ: tl.constexpr, HAS_STATES: tl.constexpr, IS_PACKED: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv as three roles of one scan; the program's number selects the role and its tile of columns.

    ``state`` holds the state before each segment, ``dstate`` the gradient of that after it, both [K, V] fp32; the dv
    role leaves the gradient of the state before the segment in ``dinitial``. TILE_K and BT_K are the tile and chunk of
    the roles that make columns of K (dq and dk), TILE_V and BT_V those of dv. Grid: sequences * segments * H * tiles.

    Without HAS_STATES there are none at either end. That is compiled in: with them the loop takes a tenth longer.
    """
    tiles_k: tl.constexpr = (K + TILE_K - 1) // TILE_K
    tiles_v: tl.constexpr = (V + TILE_V - 1) // TILE_V
    tiles: tl.constexpr = tiles_v + (2 if STORE_DQ else 1) * tiles_k
    i_tile, i_h, i_b, i_t, length, i_state = place(
        tl.program_id(0), cu_seqlens, order, T, H, num_segments, num_segments, tiles, False, IS_PACKED
    )
    slope = tl.load(slopes + i_h)
    p_q = q + i_b * stride_qb + i_t * stride_qt + i_h * stride_qh
    p_k = k + i_b * stride_kb + i_t * stride_kt + i_h * stride_kh
    p_v = v + i_b * stride_vb + i_t * stride_vt + i_h * stride_vh
    p_do = do + i_b * stride_dob + i_t * stride_dot + i_h * stride_doh
    o_k = tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    if i_tile < tiles_v:
        o_dv = i_tile * TILE_V + tl.arange(0, TILE_V)
        b_ds = tl.zeros([TILE_V, BK], dtype=tl.float32)
        if HAS_STATES:
            b_ds = load_state(dstate, i_state, o_dv, o_k, 1, V, V, K, use_dstate)
        b_ds = scan(
            b_ds, p_k, p_q, p_do, p_k, dv + i_b * stride_dvb + i_t * stride_dvt + i_h * stride_dvh,
            stride_kt, stride_qt, stride_dot, stride_kt, stride_dvt, length, slope, i_tile,
            K, V, BT_V, BK, TILE_V, True, SILU, SILU, False, False, True, PRECISION, STAGES,
        )  # fmt: skip
        if HAS_STATES:
            write_state(dinitial, i_state, b_ds, o_dv, o_k, 1, V, V, K, store_state)
    elif i_tile < tiles_v + tiles_k:
        i_dk = i_tile - tiles_v
        o_dk = i_dk * TILE_K + tl.arange(0, TILE_K)
        b_dst = tl.zeros([TILE_K, BV], dtype=tl.float32)
        if HAS_STATES:
            b_dst = load_state(dstate, i_state, o_dk, o_v, V, 1, K, V, use_dstate)
        scan(
            b_dst, p_v, p_do, p_q, p_k, dk + i_b * stride_dkb + i_t * stride_dkt + i_h * stride_dkh,
            stride_vt, stride_dot, stride_qt, stride_kt, stride_dkt, length, slope, i_dk,
            V, K, BT_K, BV, TILE_K, True, False, False, SILU, SILU, True, PRECISION, STAGES,
        )  # fmt: skip
    elif STORE_DQ:
        i_dq = i_tile - tiles_v - tiles_k
        o_dq = i_dq * TILE_K + tl.arange(0, TILE_K)
        b_st = tl.zeros([TILE_K, BV], dtype=tl.float32)
        if HAS_STATES:
            b_st = load_state(state, i_state, o_dq, o_v, V, 1, K, V, use_state)
        scan(
            b_st, p_do, p_v, p_k, p_q, dq + i_b * stride_dqb + i_t * stride_dqt + i_h * stride_dqh,
            stride_dot, stride_vt, stride_kt, stride_qt, stride_dqt, length, slope, i_dq,
            V, K, BT_K, BV, TILE_K, False, False, False, SILU, SILU, True, PRECISION, STAGES,
        )  # fmt: skip


@triton.jit
def added_state(
    pid, k, v, states, slopes, cu_seqlens, order, T, H, num_segments, num_walked,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    REVERSE: tl.constexpr, SILU: tl.constexpr, IS_PACKED: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What one segment alone adds to the state at its end (in reversed time: at its beginning)."""
    tiles: tl.constexpr = (V + BV - 1) // BV
    i_v, i_h, i_b, i_t, length, i_state = place(
        pid, cu_seqlens, order, T, H, num_segments, num_walked, tiles, REVERSE, IS_PACKED
    )
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    p_k = k + i_b * stride_kb + i_t * stride_kt + i_h * stride_kh
    b_s = scan(
        tl.zeros([BV, BK], dtype=tl.float32), p_k, p_k, v + i_b * stride_vb + i_t * stride_vt + i_h * stride_vh, p_k,
        p_k, stride_kt, stride_kt, stride_vt, stride_kt, stride_kt, length, tl.load(slopes + i_h), i_v,
        K, V, BT, BK, BV, REVERSE, SILU, SILU, False, False, False, PRECISION, STAGES,
    )  # fmt: skip
    write_state(states, i_state, b_s, o_v, o_k, 1, V, V, K, 1)


@triton.jit(do_not_specialize=VARIABLE)
def states_kernel(
    q, k, v, do, states, dstates, slopes, cu_seqlens, order, N, T, H, num_segments, num_walked, num_walked_d,
    stride_qb: tl.int64, stride_qt, stride_qh: tl.int64,
    stride_kb: tl.int64, stride_kt, stride_kh: tl.int64,
    stride_vb: tl.int64, stride_vt, stride_vh: tl.int64,
    stride_dob: tl.int64, stride_dot, stride_doh: tl.int64,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    FORWARD: tl.constexpr, BACKWARD: tl.constexpr, SILU: tl.constexpr, IS_PACKED: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """States [N, segments, H, K, V] that segments add: of (k, v), and in reversed time of (q, do).

    Of each kind the first ``num_walked`` segments in the order of the walk: the last one adds to no other. Grid:
    kinds * sequences * num_walked segments * H * tiles of V.
    """
    pid = tl.program_id(0)
    num_forward = N * num_walked * H * ((V + BV - 1) // BV) if FORWARD else 0
    if FORWARD and (not BACKWARD or pid < num_forward):
        added_state(
            pid, k, v, states, slopes, cu_seqlens, order, T, H, num_segments, num_walked,
            stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
            K, V, BT, BK, BV, False, SILU, IS_PACKED, PRECISION, STAGES,
        )  # fmt: skip
    elif BACKWARD:
        added_state(
            pid - num_forward, q, do, dstates, slopes, cu_seqlens, order, T, H, num_segments, num_walked_d,
            stride_qb, stride_qt, stride_qh, stride_dob, stride_dot, stride_doh,
            K, V, BT, BK, BV, True, SILU, IS_PACKED, PRECISION, STAGES,
        )  # fmt: skip


@triton.jit
def combine(
    pid, states, initial, final, slopes, cu_seqlens, T, H, num_segments, use_initial, store_final,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, REVERSE: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """states [N, segments, H, SIZE]: what each segment adds becomes, in place, the state that each begins with.

    In reversed time the last segment begins. ``initial`` and ``final`` [N, H, SIZE] are the states at the two ends.
    GROUP segments are read at once: one after the other, each would wait for memory.
    """
    blocks: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    o_x = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    m_x = (o_x < SIZE)[None, :]
    i_h = (pid // blocks) % H
    i_n = pid // blocks // H
    rate = tl.load(slopes + i_h) * LOG2_E
    _, _, length = sequence(i_n, cu_seqlens, T, IS_PACKED)
    o_ends = (i_n * H + i_h).to(tl.int64) * SIZE
    b_s = tl.load(initial + o_ends + o_x, mask=(o_x < SIZE) & (use_initial != 0), other=0.0)
    # What the last one adds begins no segment: it was only made where the state at the end is asked for.
    num_added = num_segments - 1 + store_final
    rows = segment_rows(length, num_segments)
    o_g = tl.arange(0, GROUP)
    for i_first in range(0, num_segments, GROUP):
        i = i_first + o_g  # in the order of the walk
        i_s = num_segments - 1 - i if REVERSE else i
        if REVERSE:
            walked = length - tl.minimum((i_s + 1) * rows, length)  # rows before segment i
            after = length - tl.minimum(tl.maximum(i_s, 0) * rows, length)
        else:
            walked = tl.minimum(i * rows, length)
            after = tl.minimum((i + 1) * rows, length)
        begin = tl.min(walked, axis=0)
        end = tl.max(after, axis=0)
        p_x = states + ((i_n * num_segments + i_s) * H + i_h).to(tl.int64)[:, None] * SIZE + o_x[None, :]
        b_added = tl.load(p_x, mask=(i < num_added)[:, None] & m_x, other=0.0)  # [GROUP, BLOCK]
        distance = tl.maximum(walked[:, None] - after[None, :], 0)
        decay = tl.where(o_g[:, None] > o_g[None, :], tl.exp2(-rate * distance), 0.0)  # [to, from]
        b_begin = tl.sum(decay[:, :, None] * b_added[None, :, :], axis=1)
        b_begin += tl.exp2(-rate * (walked - begin))[:, None] * b_s[None, :]
        tl.store(p_x, b_begin, mask=(i < num_segments)[:, None] & m_x)
        b_s = b_s * tl.exp2(-rate * (end - begin)) + tl.sum(tl.exp2(-rate * (end - after))[:, None] * b_added, axis=0)
    tl.store(final + o_ends + o_x, b_s, mask=(o_x < SIZE) & (store_final != 0))


@triton.jit(do_not_specialize=VARIABLE)
def combine_kernel(
    states, dstates, initial, final, dfinal, dinitial, slopes, cu_seqlens, N, T, H, num_segments,
    use_state, store_state, use_dstate, store_dstate,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, FORWARD: tl.constexpr, BACKWARD: tl.constexpr,
    IS_PACKED: tl.constexpr,
):  # fmt: skip
    """From what segments add to what they begin with, for both kinds. Grid: kinds * N * H * blocks of SIZE."""
    pid = tl.program_id(0)
    num_forward = N * H * ((SIZE + BLOCK - 1) // BLOCK)
    if FORWARD and (not BACKWARD or pid < num_forward):
        combine(
            pid, states, initial, final, slopes, cu_seqlens, T, H, num_segments, use_state, store_state,
            SIZE, BLOCK, GROUP, False, IS_PACKED,
        )  # fmt: skip
    elif BACKWARD:
        combine(
            pid - num_forward if FORWARD else pid, dstates, dfinal, dinitial, slopes, cu_seqlens, T, H, num_segments,
            use_dstate, store_dstate, SIZE, BLOCK, GROUP, True, IS_PACKED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def order_kernel(cu_seqlens, order, N, BLOCK: tl.constexpr):
    """order [N]: the documents, the longest first, so that no long one is left when the others are done."""
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < N
    b_length = tl.load(cu_seqlens + o_n + 1, mask=m_n, other=0) - tl.load(cu_seqlens + o_n, mask=m_n, other=0)
    b_rank = tl.zeros([BLOCK], dtype=tl.int32)
    for o_first in range(0, N, BLOCK):
        o_m = o_first + tl.arange(0, BLOCK)
        m_m = o_m < N
        b_other = tl.load(cu_seqlens + o_m + 1, mask=m_m, other=0) - tl.load(cu_seqlens + o_m, mask=m_m, other=0)
        longer = (b_other[None, :] > b_length[:, None]) | (
            (b_other[None, :] == b_length[:, None]) & (o_m[None, :] < o_n[:, None])
        )
        b_rank += tl.sum((longer & m_m[None, :]).to(tl.int32), axis=1)
    tl.store(order + b_rank, o_n, mask=m_n)
