"""The markdown table of what nvcc makes of the kernels, beside what was predicted of it and what a GPU measured:

    python -m fusedstep.bench.machine_code_report MACHINE_CODE.jsonl GPU.jsonl

The first file is what `bench/machine_code.py --json` wrote, the second one what `make gpu-first` did.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from . import gpu_report
from .machine_code_budgets import ROWS
from .report import print_text, table_head


def load(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The header and the kernels that `bench/machine_code.py --json` wrote.

    Raises:
        ValueError: the file is another one.
    """
    try:
        header, *kernels = (json.loads(line) for line in path.read_text().splitlines())
        header["commit"], header["nvcc"], [(kernel["row"], kernel["arch"]) for kernel in kernels]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a file that `bench/machine_code.py --json` wrote: {error!r}") from error
    return header, kernels


def markdown(machine_code: Path, gpu: Path) -> str:
    """The table of these files.

    Raises:
        ValueError: one of them is not what it must be.
    """
    (made, kernels), (header, cases) = load(machine_code), gpu_report.load(gpu)
    lines = {(kernel["row"], kernel["arch"]): kernel for kernel in kernels}
    archs = sorted({arch for _, arch in lines})
    rows = table_head(
        ["kernel"],
        [
            *(f"instructions an element, sm_{arch} (allowed)" for arch in archs),
            *("registers, sm_90 (lab)", "KiB asked for at once, sm_90 (lab)", "predicted", "measured"),
        ],
    )
    for row in ROWS:
        mine = [lines.get((row.name, arch)) for arch in archs]
        if not any(mine):
            continue
        cells = [f"{line['an_element']:.1f} ({line['budget']:.1f})" if line else "" for line in mine]
        line = lines.get((row.name, 90))
        cells.append(f"{line['registers']} ({line['budget_registers']})" if line else "")
        cells.append(f"{line['in_flight'] / 1024:.0f} ({line['budget_in_flight'] / 1024:.0f})" if line else "")
        cells.append(f"{row.predicted:.0%}" if row.predicted else "")
        timed = cases.get(row.case, {}).get("fusedstep cuda")
        cells.append(f"{timed['copy_share']:.0%}" if timed else "")
        rows.append(f"| {' | '.join([row.name, *cells])} |")
    note = (
        "On the path of whole vectors, without gradient scale or clipping; allowed: a tenth more than the barest "
        "kernel for the same work (`bench/machine_code_lab.cu`) takes, by the same nvcc; asked for at once: by all "
        "threads of a multiprocessor before the first waits. Predicted: the share of a copy's speed that the barest "
        f"kernel reached on an H200; measured: that of the package's. nvcc {made['nvcc']}, commit "
        f"{made['commit'][:7]}; measured at commit {header['git']['commit'][:7]} on an {header['device']['gpu']}."
    )
    return "\n".join([*rows, "", note]).lstrip("\n")


def text(argv: list[str]) -> str:
    """What `python -m fusedstep.bench.machine_code_report` prints for these arguments.

    Raises:
        ValueError: as `markdown`.
    """
    parser = argparse.ArgumentParser(prog="python -m fusedstep.bench.machine_code_report", description=__doc__)
    parser.add_argument("machine_code", metavar="MACHINE_CODE.jsonl", type=Path)
    parser.add_argument("gpu", metavar="GPU.jsonl", type=Path)
    args = parser.parse_args(argv)
    return markdown(args.machine_code, args.gpu)


def main(argv: list[str]) -> int:
    """Print the table; returns an exit code."""
    return print_text(text, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
