"""Into how many segments a sequence is cut when its heads alone do not fill the GPU.

Segments cost a pass over k and v (in the backward pass also over q and do) and states in memory, and bring programs.
The rule counts rounds of programs and compares; its constants are ratios measured on one H100 80GB.
"""

import functools

# Time of a row where only states are made, relative to a row of the main pass.
STATE_PASS = 0.42
# Carrying states from segment to segment, in rows of the main pass: for each, and for 2^18 elements in all heads.
COMBINE_ROWS, COMBINE_SIZE = 24, 2**18
# Two more launches, in rows of the main pass: the host's time for them, which short sequences do not hide.
LAUNCH_ROWS = 1000
MIN_ROWS = 256
COUNTS = (1, 2, 4, 8, 16, 32, 64)
# States may take this much memory, or this share of inputs, outputs and gradients.
FREE_BYTES = 2**25
MEMORY_SHARE = 0.035


@functools.lru_cache(maxsize=4096)
def num_segments(rows: int, walks: int, tiles: int, K: int, V: int, num_multiprocessors: int, kinds: int) -> int:
    """The number of segments with the least estimated time.

    Args:
        rows: length of a sequence; the mean, for documents.
        walks: sequences times heads.
        tiles: programs of each walk of the main pass.
        K, V: size of a state.
        num_multiprocessors: of the GPU; one program on each uses the memory fully, also where more would fit.
        kinds: kinds of states that segments begin with, 1 in the forward pass, 2 in the backward pass.
    """

    def cost(count: int) -> float:
        length = -(-rows // count)
        main = -(-walks * tiles * count // num_multiprocessors) * length
        if count == 1:
            return main
        states = -(-walks * kinds * (count - 1) // num_multiprocessors) * length * STATE_PASS
        combine = COMBINE_ROWS * kinds * count * walks * K * V / COMBINE_SIZE
        return main + states + combine + LAUNCH_ROWS

    tensors = 16 * rows * walks * (K + V)  # bytes: q, k, v, o and their gradients in bf16
    room = max(FREE_BYTES, MEMORY_SHARE * tensors) // (4 * K * V * walks * kinds) if walks else 1
    most = min(rows // MIN_ROWS, int(room))
    return min((count for count in COUNTS if count <= max(1, most)), key=cost)
