"""The plot of speed-ups, drawn from a results file: `python -m fusedstep.bench.plot FILE.json [FILE.png]`.

It has no background, and its texts are in a grey that can be read on white and on black. An SVG keeps its texts as
texts, and has the same bytes whenever it is drawn from the same file with the same matplotlib.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from . import results
from .report import TORCH, Block, best_of_ours, blocks, case_label, others, ratio

COLOURS = dict(zip(TORCH, ("#9aa5b1", "#5b7f95", "#c8553d"), strict=True))
GREY = "#727d89"
OTHER_COLOURS = ("#7d8f69", "#b08bbb", "#d9a441")  # of contenders outside of torch


def draw(
    found: dict[str, Any], path: Path, optimizers: list[str] | None = None, against: list[str] | None = None
) -> Path:
    """Draw, for every case, how many times as fast as the others fusedstep is.

    Args:
        found: the content of a results file.
        path: of the picture; its ending chooses the format.
        optimizers: which ones to draw; None: all.
        against: the contenders to compare with; None: all that were timed.

    Raises:
        ValueError: there is nothing to draw.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot, which would keep every figure and choose a display
    from matplotlib.ticker import FuncFormatter

    def compared(cases: list[Block]) -> list[str]:
        return [name for name in others(cases) if against is None or name in against]

    chosen = [
        (optimizer, [block for block in cases if best_of_ours(block) is not None])
        for optimizer, cases in blocks(found, optimizers)
    ]
    chosen = [(optimizer, cases) for optimizer, cases in chosen if compared(cases)]
    if not chosen:
        raise ValueError("there is nothing to draw: no row of fusedstep, or of those to compare with, was timed")
    heights = [len(cases) * (0.12 + 0.1 * len(compared(cases))) + 0.6 for _, cases in chosen]  # inches
    figure = Figure(figsize=(9, 1.2 + sum(heights)), layout="constrained")
    axes = figure.subplots(len(chosen), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axis, (optimizer, cases) in zip(axes, chosen, strict=True):
        names = compared(cases)
        colours = iter(OTHER_COLOURS * len(names))
        width = 0.8 / max(len(names), 1)
        for place, name in enumerate(names):
            colour = COLOURS.get(name) or next(colours)
            positions, ratios = [], []
            for index, block in enumerate(cases):
                if name in block and block[name]["step_ms"]:
                    ours = best_of_ours(block)["step_ms"]["median"]
                    positions.append(index - 0.4 + (place + 0.5) * width)
                    ratios.append(block[name]["step_ms"]["median"] / ours)
            lengths = [value - 1.0 for value in ratios]  # bars start at 1: what is slower points to the left
            bars = axis.barh(positions, lengths, width, left=1.0, color=colour, label=f"against {name}")
            axis.bar_label(bars, [ratio(value) for value in ratios], padding=2, fontsize=7, color=GREY)
        labels = [case_label(next(iter(block.values())), cases) for block in cases]
        axis.set_yticks(range(len(cases)), labels)
        axis.set_ylim(len(cases) - 0.4, -0.6)
        axis.set_xscale("log")
        axis.margins(x=0.12)
        axis.axvline(1.0, color=GREY, linewidth=0.8)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        axis.set_title(optimizer, loc="left", fontsize=10, color=GREY)
        axis.tick_params(which="both", color=GREY, labelcolor=GREY, labelsize=8)
        axis.spines[:].set_color(GREY)
        axis.spines[["top", "right"]].set_visible(False)
    label = "their step time / step time of fusedstep; right of the line fusedstep is faster"
    axes[-1].set_xlabel(label, fontsize=8, color=GREY)
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    frame = {"fontsize": 8, "labelcolor": GREY, "framealpha": 0, "edgecolor": GREY}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(TORCH), **frame)
    figure.suptitle(results.describe(found), x=0.01, ha="left", fontsize=8, color=GREY)
    path.parent.mkdir(parents=True, exist_ok=True)
    same_bytes = {"metadata": {"Date": None}} if path.suffix == ".svg" else {}
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fusedstep"}):
        figure.savefig(path, dpi=150, transparent=True, **same_bytes)
    return path


def main(argv: list[str]) -> int:
    """Draw a results file; returns an exit code."""
    parser = argparse.ArgumentParser(prog="python -m fusedstep.bench.plot", description=__doc__)
    parser.add_argument("file", metavar="FILE.json", type=Path)
    parser.add_argument("picture", metavar="FILE.png", type=Path, nargs="?", help="its ending chooses the format")
    parser.add_argument("--optimizer", action="append", help="may be repeated (default: all)")
    parser.add_argument("--against", action="append", metavar="CONTENDER", help="may be repeated (default: all)")
    args = parser.parse_args(argv)
    target = args.picture or args.file.with_suffix(".png")
    try:
        print(f"written: {draw(results.load(args.file), target, args.optimizer, args.against)}")
    except ModuleNotFoundError as error:
        print(f"the plot needs {error.name}: pip install 'fusedstep[bench]'", file=sys.stderr)
        return 2
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
