"""The reading of SASS: basic blocks, loops, and from them a kernel's main path; what it asks for ahead, how wide.

A kernel's main path is the way through its control flow, from the first 16-byte load to the last store of 8 bytes or
more (to the first barrier behind the loads where it only reads), or once round the loop they are in, that moves the
most bytes with the fewest instructions: not through the slow branches of division and root, the one thread that
prepares scalars, tails, gradient scale and clipping. No program is run here, and nothing is judged.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from machine_code_budgets import Row
from machine_code_cubins import Code

CALLED = 1000  # instructions that a call counts for where paths are compared: what it goes to is not seen

# Opcodes with their modifiers, whatever predicate goes before them.
_OPCODE = re.compile(r"(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*)")


@functools.cache
def opcode_of(instruction: str) -> tuple[str, str]:
    match = _OPCODE.match(instruction)
    return (match[1], match[2]) if match else (instruction, "")


def is_wide(opcode: str, kind: str) -> bool:
    return opcode.startswith(kind) and ".128" in opcode


# Basic blocks by where they begin: where they end, and the beginnings of those that may follow.
Blocks = dict[int, tuple[int, list[int]]]


def _blocks(code: Code) -> list[tuple[int, int, list[int]]]:
    """Basic blocks (begin, end, beginnings of those that may follow)."""
    starts = {0, *code.labels.values()}
    for i, instruction in enumerate(code.instructions):
        if opcode_of(instruction)[0].split(".")[0] in ("BRA", "EXIT", "RET", "BRX", "JMP"):
            starts.add(i + 1)
    ordered = sorted(start for start in starts if start < len(code.instructions))
    blocks = []
    for begin, end in zip(ordered, [*ordered[1:], len(code.instructions)], strict=True):
        last = code.instructions[end - 1]
        opcode = opcode_of(last)[0].split(".")[0]
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
        opcodes = [opcode_of(i)[0] for i in code.instructions[first:stop]]
        read = 16 * sum(is_wide(o, "LDG") for o in opcodes)
        written = 16 * sum(is_wide(o, "STG") for o in opcodes)
        calls = sum(opcode_of(i)[0].startswith("CALL") for i in code.instructions[first:stop] if not i.startswith("@"))
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


def main_path(code: Code, row: Row | None) -> tuple[list[str], int | None]:
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
    opcodes = [opcode_of(i)[0] for i in path]
    loads = [i for i, opcode in enumerate(opcodes) if is_wide(opcode, "LDG")]
    stores = [i for i, opcode in enumerate(opcodes) if is_wide(opcode, "STG")]
    if not loads:
        return [], 0
    barriers = [i for i, opcode in enumerate(opcodes) if opcode.startswith("BAR") and i > loads[-1]]
    if stores:  # codes of 8 bits are computed and stored last, by 8 bytes
        stores = [i for i, o in enumerate(opcodes) if o.startswith("STG") and re.search(r"\.(128|64)", o)]
    last = stores[-1] if stores else barriers[0] if barriers else len(path) - 1
    return path[loads[0] : last + 1], loads[0]


def bytes_ahead(path: Sequence[str]) -> int:
    """Bytes asked for by 16-byte loads before a number from one of them is used."""
    pending: set[int] = set()
    for instruction in path:
        opcode, operands = opcode_of(instruction)
        is_load = is_wide(opcode, "LDG")
        sources = operands if opcode.startswith(("ST", "RED", "ATOM", "BRA")) else operands.partition(",")[2]
        if pending & {int(r) for r in re.findall(r"\bR(\d+)\b", sources)}:
            break
        if is_load and (match := re.match(r"R(\d+)", operands)):
            pending |= {int(match[1]) + k for k in range(4)}
    return 4 * len(pending)


def widths_of(code: Code) -> dict[str, int]:
    counts: dict[str, int] = {}
    for instruction in code.instructions:
        opcode = opcode_of(instruction)[0]
        kind = opcode.split(".")[0]
        if kind in ("LDG", "STG", "LD", "ST"):
            width = next((w for w in ("128", "64", "U16", "S16", "U8", "S8") if f".{w}" in opcode), "32")
            counts[f"{kind}.{width}"] = counts.get(f"{kind}.{width}", 0) + 1
        elif kind in ("LDL", "STL"):
            counts[kind] = counts.get(kind, 0) + 1
    return counts
