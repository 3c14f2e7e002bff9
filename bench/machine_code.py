"""What nvcc makes of the CUDA kernels, measured without a GPU and held against a budget.

    python bench/machine_code.py                    every kernel of csrc/cuda with a budget, on sm_80, sm_90, sm_100
    python bench/machine_code.py --all --archs 90   every kernel at all
    python bench/machine_code.py csrc/cuda/norm.cu  of these sources only
    python bench/machine_code.py --built FILE       of an extension or object file that is already built

Each source, and `machine_code_lab.cu` beside this file, is compiled to a cubin and disassembled. The lab has the barest
kernel for each storage: what it needs of instructions and registers is the budget of the kernels that do the same work.
Needs nvcc, and cuobjdump and nvdisasm from a CUDA toolkit or from the triton package. Standard library only.

Here kernels are measured, judged and printed. Which have a budget is in machine_code_budgets.py, what calls the
toolkit's programs in machine_code_cubins.py, what finds a kernel's main path, to which the budget applies, in
machine_code_paths.py. A loop finds its addresses on each round, so that its budget is all that a thread of the lab's
kernel executes.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import machine_code_cubins as cubins
from machine_code_budgets import SLACK, Row, row_of
from machine_code_cubins import ROOT
from machine_code_paths import bytes_ahead, is_wide, main_path, opcode_of, widths_of

LAB = ROOT / "bench" / "machine_code_lab.cu"
ARCHS = (80, 90, 100)
REGISTERS, THREADS, BLOCKS = 65536, 2048, 32  # of a multiprocessor, from sm_80 on


@dataclasses.dataclass
class Kernel:
    """A kernel as it was compiled; numbers of the main path for one thread."""

    name: str  # demangled
    arch: int
    registers: int
    local_bytes: int
    shared_bytes: int
    threads: int  # of a block, the most that it may have
    instructions: int  # of the main path
    before: int | None  # instructions on the way to it; None where it is once round a loop, which has them in it
    read: int  # bytes by 16-byte loads
    written: int  # bytes by 16-byte stores
    ahead: int  # bytes by 16-byte loads before the first of them is used
    local_accesses: int
    widths: dict[str, int]  # of the whole kernel: how many instructions of each kind and width

    @property
    def in_flight(self) -> int:
        """Bytes that a multiprocessor has asked for when all its threads wait for their first load."""
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * self.threads) if self.registers else BLOCKS
        blocks = min(BLOCKS, THREADS // self.threads, by_registers)
        return self.ahead * self.threads * blocks

    def an_element(self, row: Row, with_before: bool = False) -> float:
        """Instructions of the main path for an element."""
        elements = (self.read - row.beside) / row.read
        before = self.before or 0 if with_before else 0
        return (self.instructions + before) / elements if elements > 0 else float("nan")

    def allows(self, other: Kernel, row: Row) -> float:
        """As the budget: how many instructions an element may take. Finding addresses is part of a loop."""
        return self.an_element(row, with_before=other.before is None) * dict(row.slack).get(self.arch, SLACK)


def kernels_of(cubin: Path, arch: int) -> Iterator[Kernel]:
    """What each kernel of a cubin is made of."""
    codes, used = cubins.disassembled(cubin), cubins.resources(cubin)
    names = sorted(set(codes) & set(used))
    for mangled, name in zip(names, cubins.demangled(names), strict=True):
        code, use = codes[mangled], used[mangled]
        path, before = main_path(code, row_of(name))
        opcodes = [opcode_of(i)[0] for i in path]
        yield Kernel(
            name=name,
            arch=arch,
            registers=use["registers"],
            local_bytes=use["local"],
            shared_bytes=use["shared"],
            threads=use.get("threads", 1024),
            before=before,
            instructions=sum(not opcode.startswith("NOP") for opcode in opcodes),
            read=16 * sum(is_wide(opcode, "LDG") for opcode in opcodes),
            written=16 * sum(is_wide(opcode, "STG") for opcode in opcodes),
            ahead=bytes_ahead(path),
            local_accesses=sum(opcode.startswith(("LDL", "STL")) for opcode in opcodes),
            widths=widths_of(code),
        )


def measure_built(binary: Path, archs: Sequence[int]) -> list[Kernel]:
    """Every kernel of these architectures in an extension or an object file."""
    with tempfile.TemporaryDirectory() as folder:
        found = cubins.extracted(binary, archs, Path(folder))
        return [kernel for arch, cubin in found for kernel in kernels_of(cubin, arch)]


def measure(sources: Sequence[Path], archs: Sequence[int], jobs: int | None = None) -> list[Kernel]:
    """Every kernel of these sources, compiled for these architectures."""
    pairs = [(source, arch) for arch in archs for source in sources]
    with concurrent.futures.ThreadPoolExecutor(jobs or int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        made = list(pool.map(lambda pair: cubins.compiled(*pair), pairs))
    return [kernel for (_, arch), cubin in zip(pairs, made, strict=True) for kernel in kernels_of(cubin, arch)]


def faults(kernel: Kernel, budget: Kernel, row: Row) -> list[str]:
    """What is wrong with a kernel, against the lab's."""
    found = []
    if kernel.local_accesses and kernel.arch in (80, 90):
        found.append(f"{kernel.local_accesses} accesses to local memory")
    if not kernel.read:
        return [*found, "no 16-byte loads"]
    due = (kernel.read - row.beside) // row.read * row.written
    if kernel.written < due:
        found.append(f"{kernel.written} bytes by 16-byte stores where {due} are due")
    mine, allowed = kernel.an_element(row), budget.allows(kernel, row)
    if mine > allowed:
        found.append(f"{mine:.1f} instructions an element, more than {allowed:.1f}")
    # All that one round of the path needs of every array; the lab's kernels have one round.
    ahead = min(budget.ahead, kernel.read - row.beside)
    if kernel.ahead < ahead:
        found.append(f"{kernel.ahead} bytes asked for before the first use, fewer than {ahead}")
    return found


def report(kernels: Sequence[Kernel], labs: Sequence[Kernel], every: bool) -> tuple[list[dict], int]:
    """A line for each kernel with a budget (for each at all), as dicts; and how many are at fault."""
    budgets = {(row_of(lab.name), lab.arch): lab for lab in labs}
    lines, wrong = [], 0
    for kernel in kernels:
        row = row_of(kernel.name)
        if row is None and not every:
            continue
        line = dataclasses.asdict(kernel) | {"in_flight": kernel.in_flight}
        if row is not None:
            budget = budgets[row, kernel.arch]
            line |= {
                "row": row.name,
                "an_element": round(kernel.an_element(row), 1),
                "budget": round(budget.allows(kernel, row), 1),
                "budget_registers": budget.registers,
                "budget_in_flight": budget.in_flight,
                "faults": faults(kernel, budget, row),
            }
            wrong += bool(line["faults"])
        lines.append(line)
    return lines, wrong


def _short(name: str) -> str:
    name = re.sub(r"fusedstep::(cuda::|base::)*", "", name).replace("(anonymous namespace)::", "")
    return re.sub(r"\(.*", "", name)


def _print(lines: Sequence[dict]) -> None:
    print(
        f"{'':22} {'sm':>3} {'regs':>9} {'local':>5} {'KiB in flight':>13} {'instr/element':>13} {'16 B':>6} "
        f"{'8 B':>5} {'less':>5}  kernel"
    )
    for line in lines:
        widths = line["widths"]
        wide = sum(n for key, n in widths.items() if key.endswith(".128"))
        half = sum(n for key, n in widths.items() if key.endswith(".64"))
        less = sum(n for key, n in widths.items() if key[:2] in ("LD", "ST") and "." in key) - wide - half
        budget = "row" in line
        registers = f"{line['registers']}/{line['budget_registers']}" if budget else str(line["registers"])
        flight = f"{line['in_flight'] / 1024:.0f}" + (f"/{line['budget_in_flight'] / 1024:.0f}" if budget else "")
        element = f"{line['an_element']:.1f}/{line['budget']:.1f}" if budget else "-"
        print(
            f"{line.get('row', '-'):22} {line['arch']:>3} {registers:>9} {line['local_bytes']:>5} {flight:>13} "
            f"{element:>13} {wide:>6} {half:>5} {less:>5}  {_short(line['name'])}"
        )
        for fault in line.get("faults", ()):
            print(f"{'':26} {fault}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sources", nargs="*", type=Path, help="default: every .cu file of csrc/cuda")
    parser.add_argument("--built", type=Path, help="measure this instead of compiling")
    parser.add_argument("--archs", default=",".join(map(str, ARCHS)), help="default: %(default)s")
    parser.add_argument("--all", action="store_true", help="kernels without a budget too")
    parser.add_argument("--lab", action="store_true", help="the budgets themselves")
    parser.add_argument("--json", type=Path, help="also write every line to this file, after one with versions")
    arguments = parser.parse_args(argv)
    archs = [int(arch) for arch in arguments.archs.split(",")]
    sources = [source.resolve() for source in arguments.sources] or sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    try:
        labs = measure([LAB], archs)
        if arguments.built:
            kernels = measure_built(arguments.built, archs)
        else:
            kernels = labs if arguments.lab else measure(sources, archs)
    except cubins.ToolError as error:
        print(error, file=sys.stderr)
        return 2
    lines, wrong = report(kernels, labs, arguments.all)
    _print(lines)
    if arguments.json:
        header = {"commit": cubins.commit(), "nvcc": cubins.nvcc_version()}
        arguments.json.write_text("".join(json.dumps(line) + "\n" for line in (header, *lines)))
    print(f"{wrong} of {sum('row' in line for line in lines)} kernels with a budget are at fault")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
