"""How the elementwise Triton kernels see a tensor: rows of D elements at one distance from each other, cut to tiles."""

import triton
from torch import Tensor

# Each thread has 32 to 128 bytes of every input in flight: with the programs that fit on a multiprocessor, more than
# its share of the memory bandwidth needs. Loads are of 16 bytes, 8 elements of a 2-byte dtype.
ELEMENTS_PER_THREAD = 16
THREADS_PER_WARP = 32
# A power of two that 16 elements a thread still hold in one program of 32 warps, twice.
MAX_ROW = 32768


def as_rows(x: Tensor) -> Tensor:
    """x [..., D] as [rows, D] with elements side by side: a view where one distance between rows tells it, else a copy.

    The last quarter of a packed projection is such a view, so is a gradient that was expanded over the rows.
    """
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def row_tile(D: int) -> dict[str, int]:
    """Launch options for programs that hold whole rows: one long row, or several short ones.

    Raises:
        ValueError: a row is too long for one program.
    """
    if D > MAX_ROW:
        raise ValueError(f"last dimension: got {D}, the Triton norms hold a row on chip and take at most {MAX_ROW}")
    BLOCK_D = triton.next_power_of_2(D)
    ROWS = max(1, 4 * THREADS_PER_WARP * ELEMENTS_PER_THREAD // BLOCK_D)
    num_warps = min(32, ROWS * BLOCK_D // (THREADS_PER_WARP * ELEMENTS_PER_THREAD))
    return {"BLOCK_D": BLOCK_D, "ROWS": ROWS, "num_warps": num_warps}


def column_tile(D: int, widest: int = 2048) -> int:
    """Columns of a tile where rows may be cut: the power of two that pads D least, the widest of equals."""
    widths = {min(width, triton.next_power_of_2(D)) for width in (128, 256, 512, 1024, 2048) if width <= widest}
    return min(widths, key=lambda width: (-(-D // width) * width, -width))
