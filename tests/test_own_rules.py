"""Rules with any number of states: the engines' own source, compiled for rules that `own_rules/rules.h` makes up.

Rules of none, two, four and five states, in every format of weights and states, must make of each state and weight what
the real rules make of theirs.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
from host_plan import FLAGS

ROOT = Path(__file__).resolve().parent.parent
OWN = ROOT / "tests" / "own_rules"
ENGINES = {
    "cpu": ["cpu.cpp"],
    "cuda-on-host": ["cuda.cpp", "../../csrc/cuda_norm_table.cpp"],
}


@pytest.fixture(autouse=True)
def compiler():
    if shutil.which("g++") is None:
        pytest.skip("needs g++")


def compiled(*arguments):
    # Without warnings: GCC's of its own headers, and of parameters wider than the oldest processor's registers.
    flags = [flag for flag in FLAGS if "sanitize" not in flag]
    return subprocess.run(["g++", *flags, "-w", *arguments], cwd=OWN, capture_output=True, text=True)


@pytest.mark.parametrize("sources", ENGINES.values(), ids=ENGINES)
def test_rules_of_any_number_of_states_have_the_real_ones_bits(sources, tmp_path):
    done = compiled(*sources, "-o", tmp_path / "program")
    assert done.returncode == 0, done.stderr
    ran = subprocess.run([tmp_path / "program"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
    assert ran.stdout == "0 of 880 differ\n"


def test_a_rule_with_more_states_than_a_record_has_places_for_does_not_compile():
    done = compiled("-fsyntax-only", "-DTOO_MANY_STATES", "cpu.cpp")
    assert done.returncode != 0
    assert "a record has places for kMaxStates states" in done.stderr
