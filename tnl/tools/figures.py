"""How figures look, and how they are saved."""

import io
import math
from pathlib import Path
from typing import Any

# Okabe & Ito's palette: told apart with every common kind of colour blindness, and in grey.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
DPI = 120


def short(number: float, digits: int = 3) -> str:
    """A few digits and a unit: 12.6M, 3.07B."""
    if math.isnan(number):
        return "not known"
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:.{digits}g}{unit}"
    return f"{number:.{digits}g}"


def save_figure(figure: Any, path: Path) -> None:
    """Write a PNG of 128 colours: a third of the bytes, and no difference to the eye for lines on white.

    The colours are chosen to cover all that occur: a choice by area would give a few small markers the colour of the
    lines.
    """
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    Image.open(drawn).convert("RGB").quantize(128, method=Image.Quantize.MAXCOVERAGE).save(path, optimize=True)


def number_formatter() -> Any:
    """Numbers of an axis with a unit: 10M."""
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, position: short(value, digits=4))
