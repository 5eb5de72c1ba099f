"""What the GPU can do, measured in the same run as the ops, and how a time on it is measured.

Times are medians of CUDA events with the L2 cache overwritten before each call. A spin keeps the GPU busy while the
host queues the calls, so that the time is the device's and not the host's.
"""

import statistics
from collections.abc import Callable

import torch

# More than the L2 cache of any GPU (50 MB on an H100).
FLUSH_BYTES = 256 * 2**20
BUDGET_MS, MOST = 300.0, 50
# Host time allowed for one queued call, and cycles of the spin in one ms; both need be right within a factor only.
HOST_MS, CYCLES_PER_MS = 0.6, 1_800_000


def median_ms(function: Callable, least: int = 7) -> float:
    """Median device time of ``function()`` in ms, over as many calls as fit `BUDGET_MS`, but ``least`` to `MOST`."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    function()
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    count = int(BUDGET_MS / max(start.elapsed_time(end), 1e-3))
    count = min(max(count, least), MOST)
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    torch.cuda._sleep(int(count * HOST_MS * CYCLES_PER_MS))
    for start, end in pairs:
        flush.zero_()
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


def graph_ms(function: Callable) -> float:
    """Median device time of ``function()`` captured in a CUDA graph, in ms."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return median_ms(graph.replay)


def copy_bandwidth(num_bytes: int = 2 * 2**30) -> float:
    """Bytes read and written in a second by a device-to-device copy of ``num_bytes``."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * num_bytes / (median_ms(lambda: target.copy_(source)) * 1e-3)


def matmul_rate(size: int = 8192) -> float:
    """FLOP a second of a dense bf16 matmul of two random ``size`` x ``size`` matrices."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / (median_ms(lambda: torch.mm(a, b, out=out)) * 1e-3)
