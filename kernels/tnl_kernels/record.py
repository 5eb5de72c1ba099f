"""How figures are kept: what they were measured on, and the file."""

import json
from pathlib import Path

import torch


def environment() -> dict[str, str | None]:
    """The GPU's name and the versions of torch and triton."""
    try:
        import triton
    except ModuleNotFoundError:
        triton = None
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "triton": triton and triton.__version__,
    }


def save(result: dict | list, path: Path | None) -> None:
    """Write figures as JSON, where a place is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
