"""The shapes at which attention is timed, their inputs, the bytes that must be moved, and the targets."""

from dataclasses import dataclass

import torch
from torch import Tensor

LINEAR_PEERS = ("fla_chunk", "fla_fused_chunk", "lightning_attn2")
SOFTMAX_PEERS = ("sdpa_flash", "sdpa_cudnn")
BYTES = 2  # of a bf16 element


@dataclass(frozen=True)
class Shape:
    """One timed shape. ``targets`` are time over floor, forward and backward; ``peers`` is who is timed beside ours."""

    B: int
    T: int
    H: int
    K: int
    V: int
    documents: int = 0
    packed: bool = False
    targets: tuple[float, float] | None = None
    peers: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The shape without its length."""
        dims = f"D{self.K}" if self.K == self.V else f"K{self.K} V{self.V}"
        kind = f", {self.documents} documents" if self.documents else ", packed qkvu" if self.packed else ""
        return f"B{self.B} H{self.H} {dims}{kind}"

    @property
    def label(self) -> str:
        """The shape with its length."""
        return f"{self.name} T{self.T}"

    def floor_bytes(self, direction: str) -> int:
        """Bytes of q, k, v, o (forward) or q, k, v, do, dq, dk, dv (backward); packed, du is also read and written."""
        rows = self.B * self.T * self.H * BYTES
        if direction == "forward":
            return rows * (2 * self.K + 2 * self.V)
        return rows * (4 * self.K + 3 * self.V + (2 * self.K if self.packed else 0))


def wide(T: int, targets: tuple[float, float], peers: tuple[str, ...]) -> Shape:
    """B4 H32 D128, the shape of a training batch."""
    return Shape(4, T, 32, 128, 128, targets=targets, peers=peers)


NO_CUDNN = ("fla_chunk", "lightning_attn2", "sdpa_flash")
# fla tunes about 170 kernels anew for each pair of head dims, minutes of compiling: it stands beside D128 only.
TIMED = [
    wide(1024, (1.4, 2.0), LINEAR_PEERS + SOFTMAX_PEERS),
    wide(2048, (1.4, 2.0), ("fla_chunk", *SOFTMAX_PEERS)),
    wide(4096, (1.12, 1.55), LINEAR_PEERS + SOFTMAX_PEERS),
    wide(8192, (1.12, 1.55), ("fla_chunk", *SOFTMAX_PEERS)),
    wide(16384, (1.12, 1.55), LINEAR_PEERS + SOFTMAX_PEERS),
    wide(32768, (1.12, 1.55), ("fla_chunk", "lightning_attn2", *SOFTMAX_PEERS)),
    wide(65536, (1.12, 1.55), ("fla_chunk",)),
    Shape(1, 16384, 16, 128, 128, targets=(1.7, 2.4), peers=NO_CUDNN),
    Shape(1, 131072, 16, 128, 128, targets=(1.7, 2.4), peers=("fla_chunk", "lightning_attn2")),
    Shape(4, 16384, 32, 64, 64, targets=(1.3, 1.8), peers=("lightning_attn2", "sdpa_flash", "sdpa_cudnn")),
    Shape(2, 16384, 16, 256, 128, targets=(1.6, 2.2)),
    Shape(1, 131072, 16, 128, 128, documents=64, targets=(1.3, 1.9), peers=("fla_chunk",)),
    Shape(8, 2048, 16, 128, 128, packed=True, peers=("silu_outside",)),
    Shape(8, 8192, 16, 128, 128, packed=True, peers=("silu_outside",)),
]
QUICK = [shape for shape in TIMED if shape.T in (1024, 4096, 131072) or shape.K == 256]
SCALING = [Shape(1, 2**n, 16, 128, 128, peers=("lightning_attn2", "sdpa_flash")) for n in range(10, 18)]


def select(shapes: list[Shape], wanted: str | None) -> list[Shape]:
    """The shapes whose label has one of the comma-separated texts of ``wanted``; all of them for None.

    Raises:
        ValueError: a text is in no label.
    """
    if wanted is None:
        return shapes
    texts = [text.strip() for text in wanted.split(",")]
    for text in texts:
        if not any(text in shape.label for shape in shapes):
            raise ValueError(f"no shape has {text!r}; there are: {'; '.join(shape.label for shape in shapes)}")
    return [shape for shape in shapes if any(text in shape.label for text in texts)]


def timed_slopes(H: int, device: str) -> Tensor:
    """ALiBi slopes [H] of a middle layer, fp32."""
    return torch.tensor([0.5 * 2.0 ** (-8 * (i_h + 1) / H) for i_h in range(H)], device=device)


def document_offsets(documents: int, T: int, device: str) -> Tensor | None:
    """cu_seqlens [documents + 1] int32 of documents of random length; None for no documents."""
    if not documents:
        return None
    cuts = torch.randint(1, T, (documents - 1,), generator=torch.Generator().manual_seed(documents)).sort().values
    return torch.cat([torch.tensor([0]), cuts, torch.tensor([T])]).to(device=device, dtype=torch.int32)


def normal(*size: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Standard normal values made on the device."""
    return torch.randn(*size, device=device, dtype=dtype)
