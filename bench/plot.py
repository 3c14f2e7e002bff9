"""The plot of speed-ups, drawn from a results file: `python -m fusedstep.bench.plot FILE.json [FILE.png]`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from . import results
from .report import TORCH, best_of_ours, blocks, case_label, others

COLOURS = dict(zip(TORCH, ("#9aa5b1", "#5b7f95", "#c8553d"), strict=True))
OTHER_COLOURS = ("#7d8f69", "#b08bbb", "#d9a441")  # of contenders outside of torch


def draw(found: dict[str, Any], path: Path, optimizers: list[str] | None = None) -> Path:
    """Draw, for every case, how many times as fast as the others fusedstep is.

    Args:
        found: the content of a results file.
        path: of the picture; its ending chooses the format.
        optimizers: which ones to draw; None: all.
    """
    from matplotlib.figure import Figure  # not pyplot, which would keep every figure and choose a display
    from matplotlib.ticker import FuncFormatter

    chosen = [
        (optimizer, [block for block in cases if best_of_ours(block) is not None])
        for optimizer, cases in blocks(found, optimizers)
    ]
    chosen = [(optimizer, cases) for optimizer, cases in chosen if cases]
    if not chosen:
        raise ValueError("there is nothing to draw: no row of fusedstep was timed")
    heights = [len(cases) + 1.5 for _, cases in chosen]
    figure = Figure(figsize=(9, 1.2 + 0.42 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(chosen), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axis, (optimizer, cases) in zip(axes, chosen, strict=True):
        names = others(cases)
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
            lengths = [ratio - 1.0 for ratio in ratios]  # bars start at 1: what is slower points to the left
            bars = axis.barh(positions, lengths, width, left=1.0, color=colour, label=f"against {name}")
            axis.bar_label(bars, [f"{ratio:.3g}x" for ratio in ratios], padding=2, fontsize=7)
        labels = [case_label(next(iter(block.values())), cases) for block in cases]
        axis.set_yticks(range(len(cases)), labels, fontsize=8)
        axis.set_ylim(len(cases) - 0.4, -0.6)
        axis.set_xscale("log")
        axis.margins(x=0.12)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        axis.set_title(optimizer, loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("their step time / step time of fusedstep; right of the line fusedstep is faster")
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(TORCH), fontsize=8)
    figure.suptitle(results.describe(found), x=0.01, ha="left", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def main(argv: list[str]) -> int:
    """Draw a results file; returns an exit code."""
    if not 1 <= len(argv) <= 2:
        print("usage: python -m fusedstep.bench.plot FILE.json [FILE.png]", file=sys.stderr)
        return 2
    source = Path(argv[0])
    target = Path(argv[1]) if len(argv) == 2 else source.with_suffix(".png")
    try:
        print(f"written: {draw(results.load(source), target)}")
    except ModuleNotFoundError as error:
        print(f"the plot needs {error.name}: pip install 'fusedstep[bench]'", file=sys.stderr)
        return 2
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
