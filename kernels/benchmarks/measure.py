"""Time and peak memory of one implementation at one shape, and how far a linear one is from the fp64 definition."""

import torch
from peers import IMPLEMENTATIONS, Problem, problem
from reference import attention_reference, relative_error
from shapes import Shape, timed_slopes
from tnl_kernels.limits import graph_ms, median_ms

# At this length the outputs and gradients of every linear implementation are compared with the definition.
CHECKED_T = 1024


def num_bytes(tensors) -> int:
    """Bytes of the elements of all tensors."""
    return sum(x.numel() * x.element_size() for x in tensors)


def error(name: str, shape: Shape, case: Problem, outputs: tuple, gradients: tuple) -> float:
    """Relative RMS error of o, dq, dk and dv, the largest, at the last row of the batch and its first and last head."""

    def part(x: torch.Tensor) -> torch.Tensor:
        x = x.detach()[-1:]
        return (x.transpose(1, 2) if IMPLEMENTATIONS[name].head_first else x)[:, :, [0, -1]]

    slopes = timed_slopes(shape.H, "cuda")[[0, -1]]
    expected = attention_reference(*map(part, case.leaves), slopes, part(case.doutputs[0]))
    actual = dict(zip(("o", "dq", "dk", "dv"), map(part, (*outputs, *gradients)), strict=True))
    return max(relative_error(x, expected[key], 2) for key, x in actual.items())


def measure(name: str, shape: Shape, *, graph: bool = False, least: int = 7) -> dict:
    """Forward and backward in ms, peak memory of both together in bytes and over that of inputs, outputs and gradients.

    Each time is a median of at least ``least`` calls. With ``graph``, forward and forward + backward are captured in
    CUDA graphs; the backward pass is their difference. ``method`` is graph, or events where that was not possible.
    """
    torch.cuda.empty_cache()
    case = problem(name, shape)
    others = torch.cuda.memory_allocated() - num_bytes([*case.leaves, *case.doutputs])
    # The first call compiles, and makes the tables that an implementation keeps.
    case.gradients(case.call(*case.leaves))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    outputs = case.call(*case.leaves)
    gradients = case.gradients(outputs)
    torch.cuda.synchronize()
    needed = num_bytes([*case.leaves, *case.doutputs, outputs[0], *gradients])
    peak = torch.cuda.max_memory_allocated() - others
    result = {"peak_bytes": peak, "memory_x": peak / needed}
    if shape.T == CHECKED_T and IMPLEMENTATIONS[name].linear and not shape.packed:
        result["error"] = error(name, shape, case, outputs, gradients)
    del outputs, gradients

    def forward():
        return case.call(*case.leaves)

    if graph:
        try:
            forward_ms = graph_ms(forward)
            both_ms = graph_ms(lambda: case.gradients(forward()))
            return result | {"forward_ms": forward_ms, "backward_ms": both_ms - forward_ms, "method": "graph"}
        except RuntimeError as reason:
            result["not_captured"] = str(reason)[:300]
    result["forward_ms"] = median_ms(forward, least)
    outputs = forward()
    result["backward_ms"] = median_ms(lambda: case.gradients(outputs, retain_graph=True), least)
    return result | {"method": "events"}
