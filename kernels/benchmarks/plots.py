"""Draws time and memory against length, the figure 4 of arXiv 2401.04658, from attention.py's JSON; needs no GPU.

python kernels/benchmarks/plots.py [RESULT.json] [FIGURE.png]
"""

import argparse
import json
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
# Name in the rows, name in the figure, colour, and a style that shows where two lines lie on each other.
LINES = [
    ("tnl", "tnl_kernels", "#0b6e4f", "o-"),
    ("lightning_attn2", "Lightning Attention-2 (reference)", "#d1495b", "s--"),
    ("sdpa_flash", "softmax, FlashAttention (torch)", "#3d5a80", "^-"),
]


def draw(result: dict, path: Path) -> None:
    """Write ``path``, a PNG of two panels from ``result["scaling"]``: forward + backward time, and peak memory.

    Raises:
        ValueError: there are no such rows.
    """
    from matplotlib.figure import Figure  # without pyplot: no display and no global state
    from matplotlib.ticker import FuncFormatter, NullLocator

    rows = result.get("scaling")
    if not rows:
        raise ValueError("the file has no rows under 'scaling': run attention.py without --quick and --shapes")
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = zip(figure.subplots(1, 2), ("ms", "gib"), ("time, ms", "peak memory, GiB"), strict=True)
    for axes, unit, label in panels:
        for name, title, color, style in LINES:
            points = [(row["T"], row[f"{name}_{unit}"]) for row in rows if row.get(f"{name}_{unit}") is not None]
            if points:
                axes.plot(*zip(*points, strict=True), style, ms=4, lw=1.8, color=color, label=title)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks([row["T"] for row in rows])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda T, _: f"{T / 1024:g}K"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set(xlabel="tokens", ylabel=label)
        axes.grid(color="#dddddd", lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"Forward + backward, {rows[0]['shape']}, bf16, {result['gpu']}", fontsize=10)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, nargs="?", default=RESULTS / "attention_h100.json")
    parser.add_argument("figure", type=Path, nargs="?", default=RESULTS / "attention_h100.png")
    arguments = parser.parse_args(argv)
    if not arguments.result.is_file():
        parser.error(f"no such file: {arguments.result}")
    try:
        draw(json.loads(arguments.result.read_text(encoding="utf-8")), arguments.figure)
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
