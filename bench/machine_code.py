"""What nvcc makes of the CUDA kernels, measured without a GPU and held against a budget.

    python bench/machine_code.py                    every kernel of csrc/cuda with a budget, on sm_80, sm_90, sm_100
    python bench/machine_code.py --all --archs 90   every kernel at all
    python bench/machine_code.py csrc/cuda/norm.cu  of these sources only
    python bench/machine_code.py --built FILE       of an extension or object file that is already built

Each source, and `machine_code_lab.cu` beside this file, is compiled to a cubin and disassembled. The lab has the barest
kernel for each storage: what it needs of instructions and registers is the budget of the kernels that do the same work.
Needs nvcc, and cuobjdump and nvdisasm from a CUDA toolkit or from the triton package. Standard library only.

A kernel's main path is the way through its control flow, from the first 16-byte load to the last store of 8 bytes or
more (to the first barrier behind the loads where it only reads), or once round the loop they are in, that moves the
most bytes with the fewest instructions: not through the slow branches of division and root, the one thread that
prepares scalars, tails, gradient scale and clipping. A loop finds its addresses on each round, so that its budget is
all that a thread of the lab's kernel executes.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAB = ROOT / "bench" / "machine_code_lab.cu"
FOLDER = ROOT / "build" / "machine_code"
ARCHS = (80, 90, 100)
SLACK = 1.10  # instructions an element that a kernel may take more than its budget
CALLED = 1000  # instructions that a call counts for where paths are compared: what it goes to is not seen
REGISTERS, THREADS, BLOCKS = 65536, 2048, 32  # of a multiprocessor, from sm_80 on


@dataclasses.dataclass(frozen=True)
class Row:
    """Kernels that do the same work: those whose demangled names match, and the lab's kernel that sets their budget."""

    name: str
    kernel: str  # a regular expression, or "" while the package has none
    lab: str  # another
    read: int  # bytes an element by 16-byte loads
    written: int = 0  # and stores
    beside: int = 0  # bytes a thread by 16-byte loads of what belongs to columns, not to elements
    elements: int = 0  # of a thread on the main path, where that is fixed
    slack: tuple[tuple[int, float], ...] = ()  # (architecture, instead of SLACK there)


def reducing(name: str, stored: str, beside: str) -> str:
    """The name of a kernel of Adafactor."""
    return rf"\b{name}_kernel<\S*Adafactor<false>, \S*Packed<\S*\b{stored}, float>, \S*\b{beside}>"


def step(kind: int, followed: str = "false") -> str:
    """The name of AdamW's kernel for the format of that index in csrc/cuda/formats.h."""
    return rf"\bstep_kernel<\S*Tile<\S*\bAdam<false>, {kind}, {followed}>, 4000>"


ROWS: tuple[Row, ...] = (
    # On sm_80 alone nvcc makes two kernels of one of the lab's that has 4 numbers a thread, one for each kind of weight
    # decay, of which the shorter one is the budget. With followers the package's also asks which ones there are.
    Row("fp32", step(0), r"lab::adamw<float, float, float>", 16, 12, elements=4, slack=((80, 1.13),)),
    Row("bf16", step(5), r"lab::adamw<lab::BF16, lab::BF16, lab::BF16>", 8, 6, elements=8),
    Row("fp32, bf16 states", step(2), r"lab::adamw<float, float, lab::BF16>", 12, 8, elements=8),
    Row("fp32, bf16 gradient", step(1), r"lab::adamw<float, lab::BF16, float>", 14, 12, elements=8),
    Row("split, fp32 states", step(10), r"lab::adamw<lab::Split, lab::BF16, float>", 14, 12, elements=8),
    Row("split, bf16 states", step(11), r"lab::adamw<lab::Split, lab::BF16, lab::BF16>", 10, 8, elements=8),
    Row("bf16, 8-bit states", step(7), r"lab::adamw_8bit<lab::BF16, lab::BF16>", 4, 2, elements=8),
    Row("split, 8-bit states", step(12), r"lab::adamw_8bit<lab::Split, lab::BF16>", 6, 4, elements=8),
    Row("fp32, 8-bit states", step(3), r"lab::adamw_8bit<float, float>", 8, 4, elements=8),
    Row("fp32, average", step(0, "true"), r"lab::adamw_average<false>", 20, 16, elements=4, slack=((80, 1.14),)),
    Row("fp32, average, zeros", "", r"lab::adamw_average<true>", 20, 20, elements=4),
    Row("norm, fp32", r"norm_kernel<448, false>", r"lab::norm<float>", 4),
    Row("sums, fp32", reducing("sums", "float", "Unchanged"), r"lab::sums<float>", 8),
    Row("sums, bf16", reducing("sums", "BF16", "Unchanged"), r"lab::sums<lab::BF16>", 4),
    Row("squares, fp32", reducing("update", "float", "Unchanged"), r"lab::squares<float>", 4, beside=16),
    Row("squares, bf16", reducing("update", "BF16", "Unchanged"), r"lab::squares<lab::BF16>", 2, beside=32),
    Row("apply, fp32", reducing("apply", "float", "NothingBeside"), r"lab::apply<float>", 8, 4, beside=16),
    Row("apply, bf16", reducing("apply", "BF16", "NothingBeside"), r"lab::apply<lab::BF16>", 4, 2, beside=32),
)


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


class ToolError(Exception):
    """A tool is missing or has failed."""


@functools.cache
def _setup():
    spec = importlib.util.spec_from_file_location("fusedstep_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def tool(name: str) -> str:
    """The path of cuobjdump or nvdisasm."""
    folders = [os.environ.get("PATH", "")]
    if home := os.environ.get("CUDA_HOME"):
        folders.append(os.path.join(home, "bin"))
    if spec := importlib.util.find_spec("triton"):
        folders.append(os.path.join(os.path.dirname(spec.origin), "backends", "nvidia", "bin"))
    found = shutil.which(name, path=os.pathsep.join(folders))
    if not found:
        raise ToolError(
            f"{name} is neither on PATH, nor in CUDA_HOME/bin, nor in the triton package; install one of them"
        )
    return found


def _run(command: Sequence[str], **options) -> str:
    result = subprocess.run(command, capture_output=True, text=True, **options)
    if result.returncode:
        raise ToolError(f"{' '.join(command)} says:\n{result.stderr.strip()}")
    return result.stdout


def compiled(source: Path, arch: int) -> Path:
    """The cubin of a source, compiled by nvcc unless the one that is there is newer than every source."""
    setup = _setup()
    target = FOLDER / f"{source.stem}.sm_{arch}.cubin"
    inputs = [source, *(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh"), ROOT / "setup.py"]
    if target.exists() and target.stat().st_mtime > max(path.stat().st_mtime for path in inputs):
        return target
    nvcc = setup.find_nvcc({**os.environ, "FUSEDSTEP_CUDA": ""})
    if nvcc is None:
        raise ToolError("nvcc is neither in CUDA_HOME/bin, nor named by CUDACXX, nor on PATH; install the CUDA toolkit")
    FOLDER.mkdir(parents=True, exist_ok=True)
    flags = [flag for flag in setup.NVCC_FLAGS if flag != "-Xcompiler" and not flag.startswith("-fPIC")]
    part = target.with_suffix(f".{os.getpid()}")
    _run([nvcc, *flags, "-DFUSEDSTEP_WITH_CUDA=1", f"-arch=sm_{arch}", "-cubin", "-o", str(part), str(source)])
    part.replace(target)
    return target


@dataclasses.dataclass
class Code:
    """Instructions of a kernel, and where its labels are among them."""

    instructions: list[str]
    labels: dict[str, int]


def disassembled(cubin: Path) -> dict[str, Code]:
    """The code of every kernel by its mangled name, without the functions it calls."""
    kernels: dict[str, Code] = {}
    code = None
    for line in _run([tool("nvdisasm"), "-c", str(cubin)]).splitlines():
        if match := re.match(r"\s*\.section\s+\.text\.([^,\s]+?),", line):
            code = kernels.setdefault(match[1], Code([], {}))
        elif line.startswith("$"):
            code = None  # from here on functions that the kernel calls
        elif code is None:
            continue
        elif match := re.match(r"(\.L_x_\d+):", line):
            code.labels[match[1]] = len(code.instructions)
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            code.instructions.append(match[1])
    return kernels


def resources(cubin: Path) -> dict[str, dict[str, int]]:
    """Registers, bytes of local and shared memory and threads of a block, by mangled name."""
    found: dict[str, dict[str, int]] = {}
    name = None
    for line in _run([tool("cuobjdump"), "-res-usage", str(cubin)]).splitlines():
        if match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif name and "REG:" in line:
            numbers = dict(re.findall(r"([A-Z]+):(\d+)", line))
            local = int(numbers["STACK"]) + int(numbers["LOCAL"])
            found[name] = {"registers": int(numbers["REG"]), "local": local, "shared": int(numbers["SHARED"])}
    lines = _run([tool("cuobjdump"), "-elf", str(cubin)]).splitlines()
    for i, line in enumerate(lines):
        if match := re.match(r"\.nv\.info\.(\S+)", line.strip()):
            name = match[1]
        elif "EIATTR_MAX_THREADS" in line and name in found:
            x, y, z = (int(word, 16) for word in lines[i + 2].split()[1:4])
            found[name]["threads"] = x * y * z
    return found


def demangled(names: Sequence[str]) -> list[str]:
    """Names as they are written in C++; as they are where there is no c++filt."""
    if not (filt := shutil.which("c++filt")):
        return list(names)
    text = _run([filt], input="\n".join(names))
    return [re.sub(r"^void ", "", line) for line in text.splitlines()]


# Opcodes with their modifiers, whatever predicate goes before them.
_OPCODE = re.compile(r"(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*)")


def _opcode(instruction: str) -> tuple[str, str]:
    match = _OPCODE.match(instruction)
    return (match[1], match[2]) if match else (instruction, "")


def _is_wide(opcode: str, kind: str) -> bool:
    return opcode.startswith(kind) and ".128" in opcode


# Basic blocks by where they begin: where they end, and the beginnings of those that may follow.
Blocks = dict[int, tuple[int, list[int]]]


def _blocks(code: Code) -> list[tuple[int, int, list[int]]]:
    """Basic blocks (begin, end, beginnings of those that may follow)."""
    starts = {0, *code.labels.values()}
    for i, instruction in enumerate(code.instructions):
        if _opcode(instruction)[0].split(".")[0] in ("BRA", "EXIT", "RET", "BRX", "JMP"):
            starts.add(i + 1)
    ordered = sorted(start for start in starts if start < len(code.instructions))
    blocks = []
    for begin, end in zip(ordered, [*ordered[1:], len(code.instructions)], strict=True):
        last = code.instructions[end - 1]
        opcode = _opcode(last)[0].split(".")[0]
        follows = []
        if opcode in ("BRA", "JMP") and (match := re.search(r"`\((\.L_x_\d+)\)", last)):
            follows.append(code.labels.get(match[1], end))
        # A predicate before or behind; or lanes that have parted, which those of the main path have not.
        conditional = last.startswith("@") or (opcode == "BRA" and re.search(r"BRA(\.DIV|\S*\s+!?U?P\d)", last))
        if opcode not in ("BRA", "EXIT", "RET", "BRX", "JMP") or conditional:
            follows.append(end)
        blocks.append((begin, end, [f for f in follows if f < len(code.instructions)]))
    return blocks


def _loops(blocks: Blocks, order: dict[int, int]) -> list[dict[int, int]]:
    """The loops, each as its blocks (begin: end) with the one that it begins with first."""
    before: dict[int, list[int]] = {}
    for begin, (_, follows) in blocks.items():
        for f in follows:
            before.setdefault(f, []).append(begin)
    loops = []
    for begin, (end, follows) in blocks.items():
        for head in follows:
            if begin not in order or order[head] > order[begin] or end - head == 1:
                continue  # not back to the head; or the trap behind a kernel's end
            body, ahead = {head}, [begin]
            while ahead:
                block = ahead.pop()
                if block not in body:
                    body.add(block)
                    ahead += before.get(block, [])
            loops.append({block: blocks[block][0] for block in sorted(body & order.keys(), key=order.__getitem__)})
    return loops


def _order(blocks: Blocks) -> dict[int, int]:
    """Places of the blocks that can be reached, each behind all that may come before it but by a loop."""
    ended: list[int] = []
    seen, stack = {0}, [(0, iter(blocks[0][1]))]
    while stack:
        begin, follows = stack[-1]
        for f in follows:
            if f not in seen:
                seen.add(f)
                stack.append((f, iter(blocks[f][1])))
                break
        else:
            ended.append(begin)
            stack.pop()
    return {begin: place for place, begin in enumerate(reversed(ended))}


def _paths(
    code: Code, blocks: Blocks, order: dict[int, int], within: dict[int, int]
) -> dict[tuple[int, int], list[int]]:
    """For each (bytes read, written) by 16-byte accesses the shortest way through these blocks, once round a loop."""
    head = next(iter(within))
    # For the beginning of a block: bytes moved on the way there -> (instructions, the block before and its bytes).
    reached: dict[int, dict[tuple[int, int], tuple[int, tuple | None]]] = {head: {(0, 0): (0, None)}}
    finished: dict[tuple[int, int], tuple[int, tuple]] = {}
    for first, stop in within.items():
        opcodes = [_opcode(i)[0] for i in code.instructions[first:stop]]
        read = 16 * sum(_is_wide(o, "LDG") for o in opcodes)
        written = 16 * sum(_is_wide(o, "STG") for o in opcodes)
        calls = sum(_opcode(i)[0].startswith("CALL") for i in code.instructions[first:stop] if not i.startswith("@"))
        follows = blocks[first][1]
        for moved, (length, _) in reached.get(first, {}).items():
            now = (moved[0] + read, moved[1] + written)
            step = (length + stop - first + CALLED * calls, (first, stop, moved))
            forward = [f for f in follows if f in within and order[f] > order[first]]
            for f in forward:
                best = reached.setdefault(f, {})
                if now not in best or step[0] < best[now][0]:
                    best[now] = step
            if (head in follows or not forward) and (now not in finished or step[0] < finished[now][0]):
                finished[now] = step
    ways = {}
    for moved, (_, last) in finished.items():
        way: list[int] = []
        while last is not None:
            first, stop, before = last
            way = [*range(first, stop), *way]
            last = reached[first][before][1]
        ways[moved] = way
    return ways


def _main_path(code: Code, row: Row | None) -> tuple[list[str], int | None]:
    """The instructions of the main path, and how many come before it (None: it is once round a loop)."""
    blocks = {begin: (end, follows) for begin, end, follows in _blocks(code)}
    order = _order(blocks)

    def best(within: dict[int, int]) -> tuple[int, list[int]]:
        ways = _paths(code, blocks, order, within)
        if row is not None:
            due = {moved: (moved[0] - row.beside) // row.read * row.written for moved in ways}
            ways = {moved: way for moved, way in ways.items() if moved[1] == due[moved]} or ways
            # Not what is loaded again for the sake of a few numbers.
            exact = row.elements * row.read + row.beside, row.elements * row.written
            ways = {exact: ways[exact]} if row.elements and exact in ways else ways
        if not ways:
            return 0, []
        moved = max(ways)
        return moved[0], ways[moved]

    whole_read, whole = best({begin: blocks[begin][0] for begin in sorted(order, key=order.__getitem__)})
    loops = _loops(blocks, order)
    loops.sort(key=lambda loop: sum(end - begin for begin, end in loop.items()))
    for loop in loops:  # the innermost ones first
        read, way = best(loop)
        if whole_read and read * 2 >= whole_read:
            return [code.instructions[i] for i in way], None
    path = [code.instructions[i] for i in whole]
    opcodes = [_opcode(i)[0] for i in path]
    loads = [i for i, opcode in enumerate(opcodes) if _is_wide(opcode, "LDG")]
    stores = [i for i, opcode in enumerate(opcodes) if _is_wide(opcode, "STG")]
    if not loads:
        return [], 0
    barriers = [i for i, opcode in enumerate(opcodes) if opcode.startswith("BAR") and i > loads[-1]]
    if stores:  # codes of 8 bits are computed and stored last, by 8 bytes
        stores = [i for i, o in enumerate(opcodes) if o.startswith("STG") and re.search(r"\.(128|64)", o)]
    last = stores[-1] if stores else barriers[0] if barriers else len(path) - 1
    return path[loads[0] : last + 1], loads[0]


def _ahead(path: Sequence[str]) -> int:
    """Bytes asked for by 16-byte loads before a number from one of them is used."""
    pending: set[int] = set()
    for instruction in path:
        opcode, operands = _opcode(instruction)
        is_load = _is_wide(opcode, "LDG")
        sources = operands if opcode.startswith(("ST", "RED", "ATOM", "BRA")) else operands.partition(",")[2]
        if pending & {int(r) for r in re.findall(r"\bR(\d+)\b", sources)}:
            break
        if is_load and (match := re.match(r"R(\d+)", operands)):
            pending |= {int(match[1]) + k for k in range(4)}
    return 4 * len(pending)


def _widths(code: Code) -> dict[str, int]:
    counts: dict[str, int] = {}
    for instruction in code.instructions:
        opcode = _opcode(instruction)[0]
        kind = opcode.split(".")[0]
        if kind in ("LDG", "STG", "LD", "ST"):
            width = next((w for w in ("128", "64", "U16", "S16", "U8", "S8") if f".{w}" in opcode), "32")
            counts[f"{kind}.{width}"] = counts.get(f"{kind}.{width}", 0) + 1
        elif kind in ("LDL", "STL"):
            counts[kind] = counts.get(kind, 0) + 1
    return counts


def row_of(name: str, rows: Sequence[Row] = ROWS) -> Row | None:
    """The row of a kernel of the package or of the lab."""
    matches = [row for row in rows if (row.kernel and re.search(row.kernel, name)) or re.search(row.lab, name)]
    return matches[0] if matches else None


def kernels_of(cubin: Path, arch: int) -> Iterator[Kernel]:
    """What each kernel of a cubin is made of."""
    codes, used = disassembled(cubin), resources(cubin)
    names = sorted(set(codes) & set(used))
    for mangled, name in zip(names, demangled(names), strict=True):
        code, use = codes[mangled], used[mangled]
        path, before = _main_path(code, row_of(name))
        opcodes = [_opcode(i)[0] for i in path]
        yield Kernel(
            name=name,
            arch=arch,
            registers=use["registers"],
            local_bytes=use["local"],
            shared_bytes=use["shared"],
            threads=use.get("threads", 1024),
            before=before,
            instructions=sum(not opcode.startswith("NOP") for opcode in opcodes),
            read=16 * sum(_is_wide(opcode, "LDG") for opcode in opcodes),
            written=16 * sum(_is_wide(opcode, "STG") for opcode in opcodes),
            ahead=_ahead(path),
            local_accesses=sum(opcode.startswith(("LDL", "STL")) for opcode in opcodes),
            widths=_widths(code),
        )


def measure_built(binary: Path, archs: Sequence[int]) -> list[Kernel]:
    """Every kernel of these architectures in an extension or an object file."""
    with tempfile.TemporaryDirectory() as folder:
        _run([tool("cuobjdump"), "-xelf", "all", str(binary.resolve())], cwd=folder)
        found = [(arch, cubin) for arch in archs for cubin in sorted(Path(folder).glob(f"*.sm_{arch}.cubin"))]
        return [kernel for arch, cubin in found for kernel in kernels_of(cubin, arch)]


def measure(sources: Sequence[Path], archs: Sequence[int], jobs: int | None = None) -> list[Kernel]:
    """Every kernel of these sources, compiled for these architectures."""
    pairs = [(source, arch) for arch in archs for source in sources]
    with concurrent.futures.ThreadPoolExecutor(jobs or int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        cubins = list(pool.map(lambda pair: compiled(*pair), pairs))
    return [kernel for (_, arch), cubin in zip(pairs, cubins, strict=True) for kernel in kernels_of(cubin, arch)]


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
    parser.add_argument("--json", type=Path, help="also write every line to this file")
    arguments = parser.parse_args(argv)
    archs = [int(arch) for arch in arguments.archs.split(",")]
    sources = [source.resolve() for source in arguments.sources] or sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    try:
        labs = measure([LAB], archs)
        if arguments.built:
            kernels = measure_built(arguments.built, archs)
        else:
            kernels = labs if arguments.lab else measure(sources, archs)
    except ToolError as error:
        print(error, file=sys.stderr)
        return 2
    lines, wrong = report(kernels, labs, arguments.all)
    _print(lines)
    if arguments.json:
        arguments.json.write_text(json.dumps(lines, indent=1) + "\n")
    print(f"{wrong} of {sum('row' in line for line in lines)} kernels with a budget are at fault")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
