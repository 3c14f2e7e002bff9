"""Rules with any number of states: the engines' own source, compiled for rules that `own_rules/rules.h` makes up.

Rules of none, two, four and five states, in every format of weights and states, must make of each state and weight what
the real rules make of theirs.
"""

import shutil
import subprocess

import pytest
from compiling import ROOT, linked
from host_plan import FLAGS

OWN = ROOT / "tests" / "own_rules"
ENGINES = {
    "cpu": ["cpu.cpp"],
    "cuda-on-host": ["cuda.cpp", "../../csrc/cuda_norm_table.cpp"],
}
# Without warnings: GCC's of its own headers, and of parameters wider than the oldest processor's registers.
COMPILER = ["g++", *(flag for flag in FLAGS if "sanitize" not in flag and flag != "-O1"), "-w"]


@pytest.fixture(autouse=True)
def compiler():
    if shutil.which("g++") is None:
        pytest.skip("needs g++")


@pytest.mark.parametrize("engine", ENGINES)
def test_rules_of_any_number_of_states_have_the_real_ones_bits(engine):
    units = [(OWN / source, COMPILER) for source in ENGINES[engine]]
    ran = subprocess.run([linked(f"own_rules_{engine}", units, ["g++"])], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
    assert ran.stdout == "0 of 880 differ\n"


def test_a_rule_with_more_states_than_a_record_has_places_for_does_not_compile():
    command = [*COMPILER, "-fsyntax-only", "-DTOO_MANY_STATES", OWN / "cpu.cpp"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "a record has places for kMaxStates states" in done.stderr
