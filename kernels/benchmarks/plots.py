"""Draws figures from the benchmarks' JSON; needs no GPU.

python kernels/benchmarks/plots.py [RESULT.json] [FIGURE.png]

Of attention.py: time and memory against length, the figure 4 of arXiv 2401.04658. Of `tnl bench train`: tokens per GPU
and second against length.
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


# The same for the kinds of `tnl bench train`.
KINDS = [
    ("tnl", "TNL", "#0b6e4f", "o-"),
    ("tnl-fla", "TNL, fla's kernel in plain PyTorch", "#d1495b", "s--"),
    ("llama", "LLaMA, FlashAttention (torch)", "#3d5a80", "^-"),
    ("llama-cudnn", "LLaMA, cuDNN attention", "#8d99ae", "v--"),
]


def draw_training(result: dict, path: Path) -> None:
    """Write ``path``, a PNG of ``result["rows"]``: training speed of each kind and, dotted, the limit of its matrix
    products.

    Raises:
        ValueError: no row has a figure.
    """
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if not row["oom"]]
    if not rows:
        raise ValueError("no row fitted into memory: measure with a smaller --micro-tokens")
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for kind, title, color, style in KINDS:
        found = sorted((row for row in rows if row["kind"] == kind), key=lambda row: row["length"])
        if found:
            lengths = [row["length"] for row in found]
            axes.plot(lengths, [row["tgs"] for row in found], style, ms=4, lw=1.8, color=color, label=title)
            if kind != "tnl-fla":  # whose limit is TNL's
                axes.plot(lengths, [row["limit_tgs"] for row in found], ":", lw=1, color=color)
    scale_lengths(axes, sorted({row["length"] for row in result["rows"]}))
    axes.set_ylim(bottom=0)
    axes.set(xlabel="sequence length, tokens", ylabel="tokens per GPU and second")
    axes.legend(frameon=False, fontsize=8)
    where = f"{result['world_size']} x {result['gpu'] or 'CPU'}"
    axes.set_title(f"Training, {result['dtype']}, {where}; dotted: matrix products alone", fontsize=9)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def scale_lengths(axes, lengths: list[int]) -> None:
    """A logarithmic axis with a tick at each length, and the plain look of these figures."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda T, _: f"{T / 1024:g}K"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(color="#dddddd", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def draw(result: dict, path: Path) -> None:
    """Write ``path``, a PNG of two panels from ``result["scaling"]``: forward + backward time, and peak memory.

    Raises:
        ValueError: there are no such rows.
    """
    from matplotlib.figure import Figure  # without pyplot: no display and no global state

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
        axes.set_yscale("log")
        scale_lengths(axes, [row["T"] for row in rows])
        axes.set(xlabel="tokens", ylabel=label)
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
        result = json.loads(arguments.result.read_text(encoding="utf-8"))
        (draw_training if "tokens_per_step" in result else draw)(result, arguments.figure)
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
