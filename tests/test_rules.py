"""One rule, one place per language: the names agree, and nothing generic knows an optimizer by name."""

import inspect
import re
from pathlib import Path

import pytest
from kinds import KINDS, kind_of

import fusedstep
from fusedstep import _C
from fusedstep.cases import CASES, REDUCING

ROOT = Path(__file__).resolve().parent.parent
OPTIMIZERS = sorted({case.optimizer for case in CASES})
CLASSES = [getattr(fusedstep, name) for name in OPTIMIZERS]
# Amos, whose rule is elementwise until its statistics are reduced, is among those above.
REDUCING_CLASSES = [getattr(fusedstep, name) for name in sorted({case.optimizer for case in REDUCING} - {*OPTIMIZERS})]
ALL_CLASSES = [*CLASSES, *REDUCING_CLASSES]
RULES = [*CLASSES, fusedstep.GradientAccumulator]
by_rule = pytest.mark.parametrize("cls", RULES, ids=lambda cls: cls.__name__)
by_any_rule = pytest.mark.parametrize("cls", [*RULES, *REDUCING_CLASSES], ids=lambda cls: cls.__name__)


def test_every_exported_optimizer_has_cases():
    classes = {name: getattr(fusedstep, name) for name in fusedstep.__all__}
    exported = {n for n, c in classes.items() if isinstance(c, type) and issubclass(c, fusedstep.FusedOptimizer)}
    assert exported - {"FusedOptimizer"} == {cls.__name__ for cls in ALL_CLASSES}


@by_any_rule
def test_names_are_those_of_the_compiled_rule(cls):
    hyper, states = _C.rules()[cls.rule]
    assert tuple(hyper) == cls.hyper_names
    assert tuple(states) == cls.state_names


@by_rule
def test_update_names_its_arguments_as_the_compiled_rule_does(cls):
    arguments = list(inspect.signature(cls.update).parameters)
    assert arguments == ["param", "grad", *cls.state_names, "s"]
    source = (ROOT / "csrc" / "rules.h").read_text()
    struct = source[source.index(f'kName = "{cls.rule}"') :]
    signature = re.search(r"void update\((.*?)\)", struct, re.DOTALL).group(1)
    assert [argument.split()[-1].strip("&") for argument in signature.split(",")] == arguments


@by_rule
def test_8_bit_codes_are_those_of_the_compiled_rule(cls):
    source = (ROOT / "csrc" / "rules.h").read_text()
    struct = source[source.index(f'kName = "{cls.rule}"') :]
    codes = re.search(r"kCodes(?:\[\] = )?\{(.*?)\};", struct).group(1)
    unsigned = [name for name, code in zip(cls.state_names, codes.split(","), strict=False) if "NonNegative" in code]
    assert tuple(unsigned) == getattr(cls, "non_negative", ())


@by_any_rule
def test_scalars_are_those_of_the_compiled_rule(cls):
    source = (ROOT / "csrc" / ("reducing_rules.h" if cls in REDUCING_CLASSES else "rules.h")).read_text()
    struct = source[source.index(f'kName = "{cls.rule}"') :]
    body = re.search(r"struct Scalars \{(.*?)\};", struct, re.DOTALL).group(1)
    names = [name.strip() for line in re.findall(r"(?:T|double|bool) ([^;]+);", body) for name in line.split(",")]
    assert tuple(names) == cls.Scalars._fields


@pytest.mark.parametrize("cls", REDUCING_CLASSES, ids=lambda cls: cls.__name__)
def test_update_of_a_reducing_rule_names_its_states(cls):
    assert list(inspect.signature(cls.update).parameters) == ["param", "grad", *cls.state_names, "s"]


@by_rule
def test_triton_rules_have_the_same_names(cls):
    pytest.importorskip("triton")
    from fusedstep.triton_kernels import rules

    rule = rules.RULES[cls.rule]
    assert list(inspect.signature(rule.update.fn).parameters) == ["param", "grad", *cls.state_names, "s", "PRESENT"]
    assert rule.n_named == len(cls.state_names)
    hyper = re.findall(r"(\w+) = tl.load\(hyper_ptr(?: \+ (\d+))?\)", inspect.getsource(rule.prepare.fn))
    assert [int(index or 0) for _, index in hyper] == list(range(len(cls.hyper_names)))
    for (name, _), expected in zip(hyper, cls.hyper_names, strict=True):
        assert expected.startswith(name)


@pytest.mark.parametrize("cls", REDUCING_CLASSES, ids=lambda cls: cls.__name__)
def test_reducing_triton_rules_have_the_same_names(cls):
    pytest.importorskip("triton")
    from fusedstep.triton_kernels import reducing_rules

    rule = reducing_rules.REDUCING_RULES[cls.rule]
    states = (rule.row, rule.column, rule.flat, rule.element, rule.tensor)
    assert {name for name in states if name} == set(cls.state_names)
    hyper = re.findall(r"(\w+) = tl.load\(hyper_ptr(?: \+ (\d+))?\)", inspect.getsource(rule.prepare.fn))
    assert [int(index or 0) for _, index in hyper] == list(range(len(cls.hyper_names)))
    for (name, _), expected in zip(hyper, cls.hyper_names, strict=True):
        assert expected.startswith(name)
    scalars = re.search(r"return (\w+)\(", inspect.getsource(rule.prepare.fn)).group(1)
    assert getattr(reducing_rules, scalars)._fields == cls.Scalars._fields


GENERIC = [
    *(ROOT / "csrc").rglob("*.[ch]*"),
    *(ROOT / "python").rglob("*.py"),
    *(ROOT / "triton_kernels").glob("*.py"),
]
OWN = {"rules.h", "reducing_rules.h", "rules.py", "reducing_rules.py", "cases.py", "__init__.py"}
OWN |= {f"{cls.__module__.split('.')[-1]}.py" for cls in ALL_CLASSES}
OWN |= {"recipe.py", "tuning.py"}  # of one optimizer


def test_generic_code_knows_no_optimizer_by_name():
    names = {name for cls in ALL_CLASSES for name in (cls.__name__, cls.rule, cls.rule.capitalize())}
    paths = [path for path in GENERIC if path.name not in OWN]
    assert len(paths) > 100
    found = {str(path): re.findall(rf"\b({'|'.join(names)})\b", path.read_text()) for path in paths}
    assert not {path: names for path, names in found.items() if names}


def test_every_case_is_of_a_known_kind_and_every_kind_has_its_case():
    assert {kind_of(case) for case in (*CASES, *REDUCING)} == KINDS.keys()
    assert {kind: kind_of(case) for kind, case in KINDS.items()} == {kind: kind for kind in KINDS}
