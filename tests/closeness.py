"""The one comparison of tensors that the tests use, and its bounds by dtype."""

import torch

# Relative RMS error that counts as equal. bf16 and fp16: twice the rounding of the output alone.
RATIO = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def assert_close(name: str, actual: torch.Tensor, expected: torch.Tensor, ratio: float | None = None) -> None:
    """Assert ``rms(actual - expected) <= ratio * rms(expected)``, equal shapes, dtype of ``actual`` kept, and finite
    values.

    ``expected`` may have a higher precision than ``actual``. ``ratio`` defaults to `RATIO` of ``actual``'s dtype.
    """
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    ratio = RATIO[actual.dtype] if ratio is None else ratio
    error = (actual.double() - expected.double()).square().mean().sqrt() if actual.numel() else torch.tensor(0.0)
    scale = expected.double().square().mean().sqrt() if expected.numel() else torch.tensor(0.0)
    assert error <= ratio * scale + 1e-30, (
        f"{name}: relative RMS error {(error / scale).item():.3e} exceeds {ratio:.1e}"
    )
