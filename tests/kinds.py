"""What a test goes through: of the cases one of each kind of rule, of other lists each value once; or, if
FUSEDSTEP_TEST_ALL=1 asks for it (``make test-all``), every case and the whole product.

What surrounds a rule, a feature, sees of it no more than its kind. So a feature is tested with one case of each kind,
and every case once on each engine. `test_rules.py` checks that a new case has a kind that is known here.
"""

import itertools
import os

import hypothesis
import pytest
import torch

import fusedstep
from fusedstep import _C
from fusedstep.cases import CASES, REDUCING, Case, reduces
from fusedstep.rule import Rule

ALL = os.environ.get("FUSEDSTEP_TEST_ALL") == "1"


def case_of(optimizer: str, *options: str) -> Case:
    """The first case of an optimizer that has these options."""
    return next(
        case for case in (*CASES, *REDUCING) if case.optimizer == optimizer and case.options.keys() >= {*options}
    )


def kind_of(case: Case) -> str:
    """What generic code sees of a rule: how many states there are and from when on, and what the step is saved as."""
    param = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = getattr(fusedstep, case.optimizer)([("weight", param)], **case.options)
    if reduces(case):
        return "reducing"
    if optimizer.state_at_construction:
        return "states at construction"
    if optimizer.step_form == "int":
        return "a step that is a number"
    states = len(optimizer.states_of(optimizer.param_groups[0]))
    if optimizer.step_form == "absent":
        return "no step" if states else "no state"
    return "three states" if states == 3 else "two states"


KINDS = {
    "no state": case_of("SGD", "weight_decay", "maximize"),
    "no step": case_of("SGD", "dampening"),
    "two states": case_of("AdamW", "weight_decay"),
    "three states": case_of("AdamW", "amsgrad"),
    "states at construction": case_of("Adagrad", "initial_accumulator_value"),
    "a step that is a number": case_of("AdaBelief", "amsgrad"),
    "reducing": case_of("Adafactor", "beta1", "weight_decay"),
}
CLASSES = [
    cls for cls in vars(fusedstep).values() if isinstance(cls, type) and issubclass(cls, Rule) and "rule" in dir(cls)
]
# Every compiled rule, with the class that has its functions in Python.
RULES = {name: next(f for cls in CLASSES if (f := cls.rule_named(name)).rule == name) for name in _C.rules()}
# What surrounds a rule does with two states what it does with three.
ELEMENTWISE = list(CASES) if ALL else [case for kind, case in KINDS.items() if kind not in ("reducing", "two states")]
# Of each class the case with the most options; where any rule will do, one of each kind.
LAST = list({case.optimizer: case for case in (*REDUCING, *CASES)}.values())
OF_EACH_KIND = LAST if ALL else list({kind_of(case): case for case in LAST}.values())


def states_of(case: Case) -> tuple[str, ...]:
    optimizer = getattr(fusedstep, case.optimizer)([("weight", torch.nn.Parameter(torch.zeros(2, 2)))], **case.options)
    return tuple(optimizer.states_of(optimizer.param_groups[0]))


# Of each class a case with each set of states that its options can ask for.
OF_EACH_STATE = list(CASES) if ALL else list({(case.optimizer, states_of(case)): case for case in CASES}.values())
# One of each rule that reduces, of Amos for rows and for columns.
OF_EACH_REDUCING = [REDUCING[3], REDUCING[4], REDUCING[6], REDUCING[7]]
# Those that differ in what an engine does; the others differ in what is kept, and how.
IN_ENGINES = [KINDS[kind] for kind in ("no state", "no step", "two states", "three states")]
BY_KIND = list(CASES) if ALL else IN_ENGINES
# Elements of one tensor take different sides: eps or the average of the squares, a limit or the gradient, zero or a
# variance that rounding has made negative.
CHOOSING = (
    Case("Amos", {"lr": 0.02, "eps": 1e-4}),
    Case("Amos", {"lr": 0.02, "momentum": 0.7, "clip_value": 0.01, "eps": 1e-6}),
    Case("RMSprop", {"lr": 0.01, "alpha": 0.1, "centered": True}),
    Case("RMSprop", {"lr": 0.01, "alpha": 0.9, "centered": True, "momentum": 0.8, "eps": 1e-3}),
)


def choosing_grads(sizes, generator):
    """Gradients of many magnitudes, some of which stay as they are."""
    grads = [torch.randn(n, generator=generator) for n in sizes]
    for grad in grads:
        grad.mul_(10.0 ** torch.empty_like(grad).uniform_(-8, 1, generator=generator))
        grad[::4] = torch.linspace(0.1, 0.9, len(grad[::4]))
    return grads


def parametrize_cases(few, every):
    return pytest.mark.parametrize("case", every if ALL else few, ids=str)


by_case = pytest.mark.parametrize("case", CASES, ids=str)  # for what each rule does by itself
by_kind = pytest.mark.parametrize("case", IN_ENGINES, ids=str)  # for what a kind shows as well as every case
by_one_kind = parametrize_cases(IN_ENGINES[2:3], IN_ENGINES)  # for what does not come near states and numbers
by_kind_in_engines = pytest.mark.parametrize("case", BY_KIND, ids=str)
by_kind_of_state = pytest.mark.parametrize("case", ELEMENTWISE, ids=str)


def few(every: dict, *names):
    """Of values with names those that stand for all, which differ in nothing that the test is about."""
    return every if ALL else {name: every[name] for name in names}


def one_of_each(rows, what):
    """Of rows of a table the first for each ``what(*row)``, such as each message of a table of errors."""
    return list(rows) if ALL else list({what(*row): row for row in reversed(rows)}.values())[::-1]


def each(**values):
    """Parametrises by several lists so that each value of each list occurs, beside others every time."""
    names = list(values)
    lists = [list(some.values()) if isinstance(some, dict) else list(some) for some in values.values()]
    ids = [[*some] if isinstance(some, dict) else [None] * len(some) for some in values.values()]
    longest = max(map(len, lists))
    if ALL:
        rows = list(itertools.product(*(range(len(some)) for some in lists)))
    else:
        # With each round of a list it is shifted against those before it, so that values do not stay together.
        rows = [
            [(n + k * (n // len(some) + (len(some) == longest))) % len(some) for k, some in enumerate(lists)]
            for n in range(longest)
        ]
    made = []
    for row in rows:
        parts = [named[i] or _short(some[i]) for named, some, i in zip(ids, lists, row, strict=True)]
        made.append(pytest.param(*(some[i] for some, i in zip(lists, row, strict=True)), id="-".join(parts)))
    return pytest.mark.parametrize(names, made)


def _short(value):
    return getattr(value, "__name__", None) or str(value)


def examples(number: int):
    """How many examples hypothesis tries; a fifth of them unless all is asked for."""
    return hypothesis.settings(max_examples=number if ALL else max(number // 5, 20), deadline=None)


def cases_of(mode, modes: dict) -> list[Case]:
    """For one of several ways to store weights and states: one of each kind, and every case in one of these ways."""
    rest = [case for case in CASES if case not in IN_ENGINES]
    place = list(modes.values()).index(mode)
    return CASES if ALL else [*IN_ENGINES, *rest[place :: len(modes)]]
