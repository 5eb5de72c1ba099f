"""The implementations that attention is timed against, and ours, behind one call; compiles peers ahead of the timing.

    python kernels/benchmarks/peers.py PEER PART/PARTS

runs the peer at every PARTS-th of its shapes, so that its kernels are in Triton's cache when they are timed. With
fla's autotuned kernels, each part compiles a share of the configurations instead.
"""

import argparse
import importlib
import importlib.metadata
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from shapes import SCALING, TIMED, Shape, document_offsets, normal, timed_slopes
from tnl_kernels import lightning_attention, lightning_attention_packed
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

FLA_KERNELS = ("fla.ops.common.chunk_h", "fla.ops.common.chunk_o", "fla.ops.common.fused_chunk")


@dataclass(frozen=True)
class Problem:
    """One shape for one implementation: ``call(*leaves)`` are the outputs, ``doutputs`` their gradients."""

    call: Callable[..., tuple[Tensor, ...]]
    leaves: list[Tensor]
    doutputs: list[Tensor]

    def gradients(self, outputs: tuple[Tensor, ...], retain_graph: bool = False) -> tuple[Tensor, ...]:
        """The gradients of the leaves."""
        return torch.autograd.grad(outputs, self.leaves, self.doutputs, retain_graph=retain_graph)


# Each maker takes the slopes and cu_seqlens, and returns (q, k, v) -> o.


def make_tnl(slopes: Tensor, cu_seqlens: Tensor | None) -> Callable:
    """Our op."""
    return lambda q, k, v: lightning_attention(q, k, v, slopes, cu_seqlens=cu_seqlens)[0]


def make_fla(name: str) -> Callable:
    """The maker of one of flash-linear-attention's forms: log decay -slopes and no scale make it the same op."""

    def make(slopes: Tensor, cu_seqlens: Tensor | None) -> Callable:
        op = getattr(importlib.import_module("fla.ops.simple_gla"), name)
        options = {"g_gamma": -slopes, "scale": 1.0}
        if cu_seqlens is not None:
            options["cu_seqlens"] = cu_seqlens.long()
        return lambda q, k, v: op(q, k, v, **options)[0]

    return make


def make_lightning_attn2(slopes: Tensor, cu_seqlens: None) -> Callable:
    """OpenNLPLab's kernel, the paper's."""
    op = importlib.import_module("lightning_attn.ops").lightning_attn2
    slopes = slopes[:, None, None].contiguous()  # [H, 1, 1]
    return lambda q, k, v: op(q, k, v, slopes)


def make_sdpa(backend: SDPBackend) -> Callable:
    """The maker of causal softmax attention with one of torch's backends."""

    def make(slopes: Tensor, cu_seqlens: None) -> Callable:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return attend

    return make


def silu_outside(qkvu: Tensor, slopes: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """What the packed op does inside of its kernels, by torch's SiLU before ours: the comparison that decides."""
    q, k, v, u = qkvu.unflatten(-1, (4, num_heads, -1)).unbind(2)
    return lightning_attention(F.silu(q), F.silu(k), v, slopes)[0], u.flatten(2)


@dataclass(frozen=True)
class Implementation:
    """``make(slopes, cu_seqlens)`` returns (q, k, v) -> o; heads stand before tokens when ``head_first``."""

    make: Callable
    distribution: str
    head_first: bool = False
    linear: bool = True


IMPLEMENTATIONS = {
    "tnl": Implementation(make_tnl, "torch"),
    "fla_chunk": Implementation(make_fla("chunk_simple_gla"), "fla-core"),
    "fla_fused_chunk": Implementation(make_fla("fused_chunk_simple_gla"), "fla-core"),
    "lightning_attn2": Implementation(make_lightning_attn2, "lightning-attn", head_first=True),
    "sdpa_flash": Implementation(make_sdpa(SDPBackend.FLASH_ATTENTION), "torch", head_first=True, linear=False),
    "sdpa_cudnn": Implementation(make_sdpa(SDPBackend.CUDNN_ATTENTION), "torch", head_first=True, linear=False),
    "silu_outside": Implementation(make_tnl, "torch"),
}


def versions() -> dict[str, str | None]:
    """The version of each peer's distribution, None where it is not installed."""
    found = {}
    for distribution in sorted({implementation.distribution for implementation in IMPLEMENTATIONS.values()}):
        try:
            found[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[distribution] = None
    return found


def problem(name: str, shape: Shape, device: str = "cuda") -> Problem:
    """``shape`` with random bf16 inputs in the layout of the implementation ``name``."""
    implementation = IMPLEMENTATIONS[name]
    slopes = timed_slopes(shape.H, device)
    if shape.packed:
        leaf = normal(shape.B, shape.T, 4 * shape.H * shape.K, device=device).requires_grad_()
        do = normal(shape.B, shape.T, shape.H, shape.K, device=device)
        du = normal(shape.B, shape.T, shape.H * shape.K, device=device)
        op = silu_outside if name == "silu_outside" else lightning_attention_packed
        return Problem(lambda x: op(x, slopes, num_heads=shape.H)[:2], [leaf], [do, du])
    tokens = (shape.H, shape.T) if implementation.head_first else (shape.T, shape.H)
    q, k, v, do = (normal(shape.B, *tokens, dim, device=device) for dim in (shape.K, shape.K, shape.V, shape.V))
    attend = implementation.make(slopes, document_offsets(shape.documents, shape.T, device))
    return Problem(lambda *leaves: (attend(*leaves),), [x.requires_grad_() for x in (q, k, v)], [do])


def keep_share_of_configurations(part: int, parts: int) -> None:
    """Leave every ``parts``-th configuration to fla's autotuners: the compiled kernels are what later runs find."""
    from triton.runtime.autotuner import Autotuner

    for module in map(importlib.import_module, FLA_KERNELS):
        for kernel in vars(module).values():
            while hasattr(kernel, "fn"):
                if isinstance(kernel, Autotuner):
                    kernel.configs = kernel.configs[part::parts] or kernel.configs[:1]
                kernel = kernel.fn


def compile_ahead(name: str, part: int, parts: int) -> None:
    """Run a share of ``name``'s shapes, or of its configurations, forward and backward."""
    shapes = [shape for shape in TIMED + SCALING if name == "tnl" or name in shape.peers]
    if name.startswith("fla"):
        # Its kernels are compiled for head dims and number of heads, not for lengths.
        first = {}
        for shape in shapes:
            first.setdefault((shape.H, shape.K, shape.V), shape)
        shapes = list(first.values())
        keep_share_of_configurations(part, parts)
    else:
        shapes = shapes[part::parts]
    for shape in shapes:
        case = problem(name, shape)
        case.gradients(case.call(*case.leaves))
        torch.cuda.synchronize()
        print(name, shape.label, flush=True)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", choices=IMPLEMENTATIONS)
    parser.add_argument("part", metavar="PART/PARTS")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    compile_ahead(arguments.peer, *map(int, arguments.part.split("/")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
