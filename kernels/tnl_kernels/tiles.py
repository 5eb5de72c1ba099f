"""Which tiles the attention kernels take on which GPU: a small table, and never a measurement at run time.

Timing would let ranks and restarts choose differently, and sums of other tiles round differently: a run would not
resume bit for bit.
"""

import functools
from typing import NamedTuple

import torch

# Of a card about which nothing can be asked (a CPU under Triton's interpreter, the meta device).
DEFAULT_SHARED_MEMORY = 232448
DEFAULT_MULTIPROCESSORS = 132


class Tiles(NamedTuple):
    """chunk: rows walked at a time. columns: of the output, in one program. The rest are Triton's launch options."""

    chunk: int
    columns: int
    num_warps: int
    num_stages: int


class BackwardTiles(NamedTuple):
    """Of the dq and dk roles (``_k``: columns of K) and of the dv role (``_v``: columns of V), in one launch."""

    chunk_k: int
    columns_k: int
    chunk_v: int
    columns_v: int
    num_warps: int
    num_stages: int


# (architecture, widest head dim) -> chunk, columns, num_warps, num_stages for bf16; measured on one H100 80GB.
HOPPER = {64: Tiles(32, 64, 4, 5), 128: Tiles(32, 128, 8, 4), 256: Tiles(16, 128, 8, 4)}
# The same for walks that make states only.
HOPPER_STATES = {64: Tiles(64, 64, 4, 3), 128: Tiles(64, 64, 4, 3), 256: Tiles(32, 64, 4, 3)}
# Not measured: fewer stages and columns fit the shared memory and registers of every card from Ampere on.
OTHER = {64: Tiles(32, 64, 4, 3), 128: Tiles(32, 64, 4, 3), 256: Tiles(16, 64, 4, 2)}
# fp32 dots (of fp16 and fp32 tensors) need twice the room.
WIDE = {64: Tiles(16, 64, 4, 2), 128: Tiles(16, 64, 4, 2), 256: Tiles(16, 32, 4, 2)}


@functools.cache
def properties(device: torch.device) -> tuple[int, int, int]:
    """Major compute capability, shared memory in bytes that one program can have, number of multiprocessors."""
    if device.type != "cuda":
        return 9, DEFAULT_SHARED_MEMORY, DEFAULT_MULTIPROCESSORS
    card = torch.cuda.get_device_properties(device)
    return card.major, card.shared_memory_per_block_optin, card.multi_processor_count


def block(dim: int) -> int:
    """The power of two, 16 at least, that holds a head dim."""
    return max(16, 1 << (dim - 1).bit_length())


def shared_memory(tiles: Tiles, inner: int, dtype: torch.dtype, silu: bool) -> int:
    """Bytes of shared memory of a program, from above: tiles in flight and copies made on chip in the loop, or the fp32
    state on its way to and from memory, whichever is more."""
    size = 2 if dtype == torch.bfloat16 else 4
    rows = (tiles.num_stages - 1) * (2 * inner + tiles.columns) + tiles.columns + (4 * inner if silu else 0)
    if dtype != torch.bfloat16:
        rows += 3 * inner + tiles.columns
    return max(tiles.chunk * size * rows, 4 * tiles.columns * inner + 16 * 1024)


def fitting(
    table: dict[int, Tiles], inner: int, outer: int, dtype: torch.dtype, silu: bool, device: torch.device
) -> Tiles:
    """The tiles of ``table`` for head dims ``inner`` and ``outer``, or smaller ones that the card can hold."""
    available = properties(device)[1]
    inner = block(inner)
    chosen = table[max(64, inner)]
    if block(outer) < chosen.columns:
        chosen = chosen._replace(columns=block(outer), num_warps=4)
    smaller = [chosen._replace(num_stages=stages) for stages in range(chosen.num_stages, 1, -1)]
    smaller += [Tiles(16, min(chosen.columns, columns), 4, 2) for columns in (64, 32)]
    for tiles in smaller:
        if shared_memory(tiles, inner, dtype, silu) <= available:
            return tiles
    raise ValueError(
        f"a head dim of {inner} needs {shared_memory(smaller[-1], inner, dtype, silu)} bytes of shared memory for each "
        f"program, {device} has {available}: use a smaller head dim or another GPU"
    )


@functools.cache
def attention_tiles(inner: int, outer: int, dtype: torch.dtype, silu: bool, device: torch.device) -> Tiles:
    """Tiles of a walk whose queries and keys have ``inner`` columns and whose outputs have ``outer``.

    Raises:
        ValueError: the card's shared memory holds not even the smallest tiles.
    """
    hopper = HOPPER if properties(device)[0] == 9 else OTHER
    return fitting(hopper if dtype == torch.bfloat16 else WIDE, inner, outer, dtype, silu, device)


@functools.cache
def state_tiles(K: int, V: int, dtype: torch.dtype, silu: bool, device: torch.device) -> Tiles:
    """Tiles of a walk that makes states [K, V] only.

    Raises:
        ValueError: as `attention_tiles`.
    """
    hopper = HOPPER_STATES if properties(device)[0] == 9 else OTHER
    return fitting(hopper if dtype == torch.bfloat16 else WIDE, K, V, dtype, silu, device)


@functools.cache
def attention_bwd_tiles(K: int, V: int, dtype: torch.dtype, silu: bool, device: torch.device) -> BackwardTiles:
    """Tiles of the backward pass: its roles share the launch options of the one that needs most."""
    of_k = attention_tiles(V, K, dtype, silu, device)
    of_v = attention_tiles(K, V, dtype, silu, device)
    num_warps = max(of_k.num_warps, of_v.num_warps)
    # Measured: more stages than these spill or run fewer programs at once, unlike in the forward pass.
    num_stages = min(of_k.num_stages, of_v.num_stages, 4 if block(max(K, V)) == 128 else 3)
    return BackwardTiles(of_k.chunk, of_k.columns, of_v.chunk, of_v.columns, num_warps, num_stages)
