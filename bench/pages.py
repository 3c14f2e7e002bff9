"""The tables and plots of README.md and docs/, each written by the command in the comment above it:

    python -m fusedstep.bench.pages [--check]

    <!-- python -m fusedstep.bench.report bench/results/FILE.json AdamW -->
    the table
    <!-- end -->

A comment with `fusedstep.bench.plot` stands above the picture that it draws. The committed results files are the only
source of figures; `--check` writes nothing and fails if a table differs from its file.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from . import gpu_report, machine_code_report, offload, plot, report

ROOT = Path(__file__).resolve().parents[1]
TABLES = {
    "report": report.text,
    "gpu_report": gpu_report.text,
    "machine_code_report": machine_code_report.text,
    "offload": offload.text,
}
COMMAND = r"<!-- python -m fusedstep\.bench\.{} (?P<arguments>[^\n]*) -->\n"
TABLE = re.compile(COMMAND.format(r"(?P<program>(?!plot\b)\w+)") + r"(?P<body>.*?)(?:<!-- (?P<end>\w+)|\Z)", re.DOTALL)
PLOT = re.compile(COMMAND.format("plot"))


def pages(root: Path) -> list[Path]:
    """README.md and the pages of docs/."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def renewed(page: str) -> str:
    """The text of a page with every table as its command prints it.

    Raises:
        ValueError: a command is none that prints a table, its results file cannot be read, or its table has no end.
    """

    def table(found: re.Match[str]) -> str:
        program = found["program"]
        if program not in TABLES:
            raise ValueError(f"no table is made by fusedstep.bench.{program}, but by {' and '.join(TABLES)}")
        if found["end"] != "end":
            raise ValueError(f"no <!-- end --> after the table of fusedstep.bench.{program} {found['arguments']}")
        start = found.start("body") - found.start()
        return f"{found[0][:start]}\n{TABLES[program](shlex.split(found['arguments']))}\n\n<!-- end"

    return TABLE.sub(table, page)


def outdated(root: Path) -> Iterator[Path]:
    """The pages with a table that differs from its results file. The working directory must be ``root``."""
    return (path for path in pages(root) if renewed(path.read_text()) != path.read_text())


def write(root: Path) -> None:
    """Write all tables and draw all plots anew. The working directory must be ``root``."""
    for path in pages(root):
        text = path.read_text()
        path.write_text(renewed(text))
        for found in PLOT.finditer(text):
            if plot.main(shlex.split(found["arguments"])) != 0:
                raise ValueError(f"{path}: {found['arguments']} draws nothing")


def main(argv: list[str]) -> int:
    """Write or check the pages; returns an exit code."""
    parser = argparse.ArgumentParser(prog="python -m fusedstep.bench.pages", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a table is out of date")
    args = parser.parse_args(argv)
    try:
        with contextlib.chdir(ROOT):
            if not args.check:
                write(ROOT)
                return 0
            found = [path.relative_to(ROOT) for path in outdated(ROOT)]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for path in found:
        print(f"{path}: a table is not that of its results file; `make figures` writes it anew", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
