"""The fixed decay of every head: slopes as Python floats, and as an fp32 tensor where they are used.

Slopes never live in a parameter, a buffer or a tensor attribute: meta-device construction,
``from_pretrained(dtype=...)``, ``zero.Init`` and bf16 engines would each leave them uninitialised or rounded (bf16
slopes destroy the decay of the slow heads).
"""

import math
from functools import lru_cache

import torch

DECAYS = ("released", "paper", "none")


def alibi_slopes(num_heads: int) -> list[float]:
    """ALiBi slopes (arXiv 2108.12409): ``2^(-8(h+1)/H)``; for H not a power of two, the slopes of the power of two
    below, then every other slope of the power of two above."""
    if num_heads & (num_heads - 1) == 0:
        return [2.0 ** (-8.0 * (h + 1) / num_heads) for h in range(num_heads)]
    below = 2 ** int(math.log2(num_heads))
    return alibi_slopes(below) + alibi_slopes(2 * below)[0::2][: num_heads - below]


def decay_slopes(decay: str, num_heads: int, layer: int, num_layers: int) -> tuple[float, ...]:
    """Slopes [H] of one layer; head h keeps ``lambda = exp(-slope)`` of its state per token.

    ``released``: ALiBi slope times ``1 - l/(L-1) + 1e-5`` (1 for a single layer), as the released checkpoints
        compute it.
    ``paper``: ``(8h/H)(1 - l/L)``, arXiv 2307.14995 Eq. (10). ``none``: zeros.

    Raises:
        ValueError: ``decay`` is none of `DECAYS`.
    """
    if decay == "released":
        factor = 1.0 if num_layers == 1 else 1.0 - layer / (num_layers - 1) + 1e-5
        return tuple(slope * factor for slope in alibi_slopes(num_heads))
    if decay == "paper":
        return tuple(8.0 * h / num_heads * (1.0 - layer / num_layers) for h in range(num_heads))
    if decay == "none":
        return (0.0,) * num_heads
    raise ValueError(f"decay: {decay!r} is unknown, use one of {', '.join(DECAYS)}")


@lru_cache(maxsize=1024)
def slopes_tensor(slopes: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """The slopes as an fp32 tensor [H] on ``device``, made once for each device."""
    # A tensor made under inference_mode could not be saved for a later backward pass.
    with torch.inference_mode(False):
        return torch.tensor(slopes, dtype=torch.float32, device=device)
