"""One rule, one place per language: the names agree, and nothing generic knows an optimizer by name."""

import inspect
import re
from pathlib import Path
from typing import get_type_hints

import pytest
from kinds import KINDS, kind_of
from kinds import RULES as COMPILED

import fusedstep
from fusedstep import _C
from fusedstep.cases import CASES, REDUCING
from fusedstep.numerics import Double

ROOT = Path(__file__).resolve().parent.parent
OPTIMIZERS = sorted({case.optimizer for case in CASES})
CLASSES = [getattr(fusedstep, name) for name in OPTIMIZERS]
# Amos, whose rule is elementwise until its statistics are reduced, is among those above.
REDUCING_CLASSES = [getattr(fusedstep, name) for name in sorted({case.optimizer for case in REDUCING} - {*OPTIMIZERS})]
ALL_CLASSES = [*CLASSES, *REDUCING_CLASSES]
RULES = [*CLASSES, fusedstep.GradientAccumulator]
by_rule = pytest.mark.parametrize("cls", RULES, ids=lambda cls: cls.__name__)
by_any_rule = pytest.mark.parametrize("cls", [*RULES, *REDUCING_CLASSES], ids=lambda cls: cls.__name__)


def compiled_text(cls):
    """The C++ text of a class's rule, from its name on."""
    texts = [(ROOT / "csrc" / name).read_text() for name in ("rules.h", "reducing_rules.h", "amos.h")]
    (found,) = [after for _, name, after in (text.partition(f'kName = "{cls.rule}"') for text in texts) if name]
    return found


def test_every_exported_optimizer_has_cases():
    classes = {name: getattr(fusedstep, name) for name in fusedstep.__all__}
    exported = {n for n, c in classes.items() if isinstance(c, type) and issubclass(c, fusedstep.FusedOptimizer)}
    assert exported - {"FusedOptimizer"} == {cls.__name__ for cls in ALL_CLASSES}


def test_names_are_those_of_the_compiled_rules():
    names = {rule: (tuple(hyper), tuple(states)) for rule, (hyper, states) in _C.rules().items()}
    assert names == {rule: (cls.Hyper._fields, cls.state_names) for rule, cls in COMPILED.items()}


@by_rule
def test_update_names_its_arguments_as_the_compiled_rule_does(cls):
    arguments = list(inspect.signature(cls.update).parameters)
    assert arguments == ["param", "grad", *cls.state_names, "s", "has"]
    struct = compiled_text(cls)
    signature = re.search(r"void update\((.*?)\)", struct, re.DOTALL).group(1)
    assert [argument.split()[-1].strip("&") for argument in signature.split(",")] == arguments[:-1]


@by_rule
def test_8_bit_codes_are_those_of_the_compiled_rule(cls):
    struct = compiled_text(cls)
    codes = re.search(r"kCodes(?:\[\] = )?\{(.*?)\};", struct).group(1)
    unsigned = [name for name, code in zip(cls.state_names, codes.split(","), strict=False) if "NonNegative" in code]
    assert tuple(unsigned) == getattr(cls, "non_negative", ())


@by_any_rule
def test_scalars_are_those_of_the_compiled_rule(cls):
    struct = compiled_text(cls)
    body = re.search(r"struct Scalars \{(.*?)\};", struct, re.DOTALL).group(1)
    lines = re.findall(r"(T|double|bool) ([^;]+);", body)
    types = {"T": float, "double": Double, "bool": bool}
    expected = {name.strip(): types[kind] for kind, line in lines for name in line.split(",")}
    assert list(get_type_hints(cls.Scalars).items()) == list(expected.items())


@pytest.mark.parametrize("cls", REDUCING_CLASSES, ids=lambda cls: cls.__name__)
def test_update_of_a_reducing_rule_names_its_states(cls):
    arguments = list(inspect.signature(cls.update).parameters)
    assert arguments == ["param", "grad", "factor", *cls.names_of("element"), "s", "f", "has"]
    struct = compiled_text(cls)
    spans = re.findall(r"Span::k(\w+)", re.search(r"kSpans\[\] = \{(.*?)\};", struct).group(1))
    assert cls.spans == dict(zip(cls.state_names, map(str.lower, spans), strict=True))


GENERIC = [
    *(ROOT / "csrc").rglob("*.[ch]*"),
    *(ROOT / "python").rglob("*.py"),
    *(ROOT / "triton_kernels").glob("*.py"),
]
OWN = {"rules.h", "reducing_rules.h", "amos.h", "cases.py", "__init__.py"}
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
