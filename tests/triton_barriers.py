"""Which stores of a kernel may come before a load of the same memory by another thread, told from Triton's GPU dialect.

Loads and stores of the same memory may be shared out to threads in different ways, so that one thread stores what
another has yet to load. Two things prevent it: a barrier between load and store, or that what is stored was computed
from what was loaded, element by element. A sum or maximum over elements is no such thing: where several threads load
the same element, one that comes late adds up what is stored already.
"""

import re
from collections import defaultdict

BARRIER = re.compile(r"^(gpu|ttg|nvvm|nvgpu)\.barrier")
THROUGH = (
    "tt.splat",
    "tt.broadcast",
    "tt.expand_dims",
    "ttg.convert_layout",
    "tt.bitcast",
    "tt.int_to_ptr",
    "tt.reshape",
)


class Op:
    def __init__(self, number, name, operands, regions):
        self.number = number  # of its line
        self.name = name
        self.operands = operands
        self.regions = regions  # that it lies in, from the outside, as the operations they belong to
        self.slots = defaultdict(
            list
        )  # of one with regions: what goes round in a loop or comes out of it, by its place

    def __repr__(self):
        return f"line {self.number}: {self.name}"


class Value:
    def __init__(self, op, place=None, name=""):
        self.op, self.place, self.name = op, place, name

    def sources(self):
        """The values that it is made of."""
        if self.op is None:
            return []
        if self.place is not None and self.op.slots:
            return self.op.slots[self.place]
        return self.op.operands


def strip(line):
    """Without the locations, which are nested in parentheses."""
    while (at := line.find(" loc(")) >= 0:
        depth, end = 0, at + 4
        while end < len(line):
            depth += (line[end] == "(") - (line[end] == ")")
            end += 1
            if depth == 0:
                break
        line = line[:at] + line[end:]
    return line.strip()


def parse(text):
    """The operations of a module's function, in the order of its text."""
    ops, scopes, regions = [], [{}], []

    def find(name):
        base = name.split("#")[0]
        value = next(scope[base] for scope in reversed(scopes) if base in scope)
        return Value(value.op, int(name.split("#")[1])) if "#" in name else value

    for number, raw in enumerate(text.splitlines(), 1):
        line = strip(raw)
        if not line or line[0] == "#" or line.startswith(("module", "//")):
            continue
        if line[0] == "}":
            if len(scopes) > 1:
                scopes.pop()
            parent = regions.pop() if regions else None
            if line.endswith("{"):  # the next region of the same operation
                scopes.append({})
                regions.append(parent)
            continue
        if line[0] == "^":
            for place, name in enumerate(re.findall(r"(%[\w-]+):", line)):
                scopes[-1][name] = Value(regions[-1] if regions else None, place, name)
            continue
        if line.startswith("tt.func"):
            scopes.append({name: Value(None, name=name) for name in re.findall(r"(%[\w-]+):", line)})
            regions.append(None)
            continue
        match = re.match(r"(?:(%[\w-]+)(?::\d+)? = )?\"?([\w.]+)\"?(.*)", line)
        result, name, rest = match.groups()
        bound = re.findall(r"(%[\w-]+) = (%[\w#-]+)", rest) if name in ("scf.while", "scf.for") else []
        names = [given for _, given in bound] or re.findall(r"%[\w-]+(?:#\d+)?", rest)
        operands = [find(given) for given in names]
        op = Op(number, name, operands, tuple(region for region in regions if region is not None))
        ops.append(op)
        if name in ("scf.yield", "scf.condition") and op.regions:
            for place, value in enumerate(operands[name == "scf.condition" :]):
                op.regions[-1].slots[place].append(value)
        if result:
            several = ":" in line.split("=")[0]
            scopes[-1][result] = Value(op, None if several or name != "scf.if" else 0, result)
            if name in ("scf.while", "scf.for") and not several:
                scopes[-1][result].place = 0
        if line.endswith("{"):
            scopes.append({inner: Value(op, place, inner) for place, (inner, _) in enumerate(bound)})
            regions.append(op)
            for place, value in enumerate(operands if bound else ()):
                op.slots[place].append(value)
    return ops


def base(value):
    """What memory a pointer points into, as a text that is the same wherever it is computed again."""
    op = value.op
    if op is None or value.place is not None:
        return value.name or f"{op.name}@{op.number}#{value.place}"
    if op.name in THROUGH:
        return base(op.operands[0])
    if op.name == "tt.addptr":
        return base(op.operands[0])
    if op.name == "tt.load":
        return f"[{exact(op.operands[0])}]"
    return exact(value)


def exact(value):
    """The same with all offsets."""
    op = value.op
    if op is None or value.place is not None or not op.operands:
        return value.name
    inner = ",".join(exact(operand) for operand in op.operands)
    return inner if op.name in THROUGH else f"{op.name.split('.')[-1]}({inner})"


def reaches(value, target):
    """Whether ``value`` is computed from what the operation ``target`` gives."""
    seen, todo = set(), [value]
    while todo:
        value = todo.pop()
        if value.op is target:
            return True
        key = (id(value.op), value.place)
        if value.op is not None and key not in seen:
            seen.add(key)
            todo += value.sources()
    return False


def loops(op):
    return tuple(region for region in op.regions if region.name in ("scf.while", "scf.for"))


def pairs(text):
    """Each load and store of the same memory in one round of a loop: memory, load, store, and what comes between.

    "barrier"; "value": what is stored was computed from what was loaded, element by element; "": nothing.
    """
    ops = parse(text)
    barriers = [op for op in ops if BARRIER.match(op.name)]
    reductions = [op for op in ops if op.name in ("tt.reduce", "tt.scan")]
    loads = [(op, base(op.operands[0])) for op in ops if op.name == "tt.load"]
    found = []
    for store in (op for op in ops if op.name == "tt.store"):
        memory = base(store.operands[0])
        for load, other in loads:
            if other != memory or load.number > store.number:
                continue
            a, b = loops(load), loops(store)
            if a[: len(b)] != b and b[: len(a)] != a:  # of two loops, which go through memory one after the other
                continue
            between = [
                op
                for op in barriers
                if load.number < op.number < store.number
                and op.regions in (load.regions[: len(op.regions)], store.regions[: len(op.regions)])
            ]
            if between:
                how = "barrier"
            elif reaches(store.operands[1], load) and not any(reaches(o.operands[0], load) for o in reductions):
                how = "value"
            else:
                how = ""
            found.append((memory, load, store, how))
    return found


def unordered(text):
    """Loads and stores that nothing keeps in order, as text."""
    return [f"{memory}: {load}, {store}" for memory, load, store, how in pairs(text) if not how]


def gradient_pairs(text):
    """What comes between the loads and stores of a gradient."""
    return [how for memory, _, _, how in pairs(text) if re.match(r"\[.*%grads_ptr", memory)]
