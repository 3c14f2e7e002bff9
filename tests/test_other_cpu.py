"""The CPU engine alone, without Python and torch: the same bits by every instruction set, and on another processor.

`other_cpu/steps.cpp` prints a hash of what each rule makes of each format. For aarch64 it is cross-compiled with the
engine and run by qemu, where both are installed (Debian: g++-aarch64-linux-gnu and qemu-user-static).
"""

import importlib.util
import shutil
import subprocess

import pytest
from compiling import ROOT, linked

from fusedstep import _C

STEPS = ROOT / "tests" / "other_cpu" / "steps.cpp"
CROSS, QEMU = "aarch64-linux-gnu-g++", shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")


@pytest.fixture(scope="module")
def setup_py():
    spec = importlib.util.spec_from_file_location("setup_of_other_cpu", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def here(setup_py, tmp_path_factory):
    """The program with the engine as it is installed."""
    if not setup_py.is_x86():
        pytest.skip("the engine has several instruction sets on x86-64 only")
    objects = sorted(setup_py.BUILD.glob("cpu.*.o"))
    assert objects, "make build leaves the engine's objects there"
    program = tmp_path_factory.mktemp("here") / "steps"
    flags = [flag for flag in setup_py.CXX_FLAGS if flag != "-O3"]
    subprocess.run(["g++", *flags, "-DFUSEDSTEP_X86=1", STEPS, *objects, "-o", program], check=True)
    return program


def output(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


@pytest.fixture(scope="module")
def expected(here):
    """By the oldest instruction set."""
    lines = output(here, _C.cpu_isas()[0])
    assert len(lines) == len(set(lines)) > 200
    return lines


@pytest.mark.parametrize("isa", _C.cpu_isas()[1:])
def test_every_instruction_set_makes_the_same_of_every_format(here, expected, isa):
    assert output(here, isa) == expected


@pytest.mark.parametrize("isa", _C.cpu_isas())
def test_sums_have_the_bits_of_plain_loops(setup_py, isa, tmp_path):
    flags = [*setup_py.CXX_FLAGS, *setup_py.X86_ISAS.get(isa, []), f"-DFUSEDSTEP_ISA={isa}"]
    subprocess.run(["g++", *flags, STEPS.with_name("sums.cpp"), "-o", tmp_path / "sums"], check=True)
    assert output(tmp_path / "sums") == ["0 differ"]


@pytest.mark.skipif(not (shutil.which(CROSS) and QEMU), reason=f"needs {CROSS} and qemu-aarch64")
def test_aarch64_makes_the_same_of_every_format(setup_py, expected):
    compiler = [CROSS, *setup_py.CXX_FLAGS, "-Werror", "-DFUSEDSTEP_X86=0", "-DFUSEDSTEP_ISA=base"]
    units = [(path, compiler) for path in [STEPS, *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]]
    assert output(QEMU, linked("steps_on_aarch64", units, [CROSS, "-fopenmp", "-static"])) == expected
