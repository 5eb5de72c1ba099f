"""Into how many segments a sequence is cut when its heads alone do not fill the GPU.

Segments cost a pass over k and v (in the backward pass also over q and do) and states in memory, and bring programs. The
rule counts rounds of programs and compares; its constants are ratios measured on one H100 80GB.
"""

import functools

from tnl_kernels.tiles import Tiles

# Time of a row in the pass that only makes states, relative to one that also makes outputs.
STATE_PASS = 0.6
# What three launches instead of one cost, in rows of one program's walk.
OVERHEAD_ROWS = 256
MIN_ROWS = 256
MAX_SEGMENTS = 64
# States may take this much memory, or this share of inputs, outputs and gradients.
FREE_BYTES = 2**25
MEMORY_SHARE = 0.03


def slots(tiles: Tiles, num_multiprocessors: int) -> int:
    """Programs that run at once: registers for eight warps' tiles are there once on a multiprocessor."""
    return num_multiprocessors * max(1, 8 // tiles.num_warps)


@functools.lru_cache(maxsize=4096)
def num_segments(
    rows: int, walks: int, tiles: int, K: int, V: int, num_sequences_heads: int, num_slots: int, state_passes: int
) -> int:
    """The number of segments with the least estimated time.

    Args:
        rows: length of a sequence; the mean, for documents.
        walks: sequences times heads.
        tiles: programs of each walk.
        K, V: size of a state.
        num_sequences_heads: how many states of each segment are kept.
        num_slots: programs that run at once.
        state_passes: 1 in the forward pass, 2 in the backward pass.
    """

    def cost(count: int) -> float:
        length = -(-rows // count)
        main = -(-walks * tiles * count // num_slots) * length
        if count == 1:
            return main
        state = -(-walks * max(1, tiles // 3 if state_passes == 2 else tiles) * (count - 1) // num_slots) * length
        return main + STATE_PASS * state_passes * state + OVERHEAD_ROWS

    tensors = 16 * rows * (K + V) * num_sequences_heads  # bytes: q, k, v, o and their gradients in bf16
    room = max(FREE_BYTES, MEMORY_SHARE * tensors) // (4 * K * V * num_sequences_heads * state_passes)
    most = min(MAX_SEGMENTS, rows // MIN_ROWS, int(room))
    return min(range(1, max(1, most) + 1), key=cost)
