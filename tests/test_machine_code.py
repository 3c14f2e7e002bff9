"""What nvcc has made of the kernels in the built extension, held against the budgets of bench/machine_code.py."""

import dataclasses
import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
from compiling import remembered

from fusedstep import _C

ROOT = Path(__file__).resolve().parents[1]
ARCHS = [arch for arch in (80, 90) if _C.with_cuda and arch in _C.cuda_archs]


def load(path):
    """A script as a module."""
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # where a script finds the files beside it
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for its dataclasses
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def machine_code():
    return load(ROOT / "bench" / "machine_code.py")


@pytest.fixture(scope="module")
def rows(machine_code):
    return importlib.import_module("machine_code_budgets").ROWS


def measured(machine_code, name, files, measure):
    """The kernels that ``measure()`` finds in these files."""
    programs = (machine_code.cubins.tool(tool) for tool in ("cuobjdump", "nvdisasm"))
    inputs = [*files, *sorted((ROOT / "bench").glob("machine_code*.py")), *programs, shutil.which("c++filt")]
    found = remembered(name, inputs, lambda: [dataclasses.asdict(kernel) for kernel in measure()])
    return [machine_code.Kernel(**kernel) for kernel in found]


@pytest.fixture(scope="module")
def labs(machine_code):
    if not ARCHS:
        pytest.skip("built without CUDA code for sm_80 or sm_90")
    if not shutil.which("c++filt"):
        pytest.skip("c++filt (binutils) is not installed")
    try:
        sources = [machine_code.LAB]
        cubins = [machine_code.cubins.compiled(*sources, arch) for arch in ARCHS]
        return measured(machine_code, "machine_code_lab", cubins, lambda: machine_code.measure(sources, ARCHS))
    except machine_code.cubins.ToolError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def kernels(machine_code, labs):
    built = Path(_C.__file__)
    return measured(machine_code, "machine_code", [built], lambda: machine_code.measure_built(built, ARCHS))


def test_every_budget_is_kept(machine_code, rows, kernels, labs):
    lines, _ = machine_code.report(kernels, labs, every=False)
    found = {(line["row"], line["arch"]) for line in lines}
    assert found == {(row.name, arch) for row in rows if row.kernel for arch in ARCHS}
    assert [(line["name"], line["arch"], line["faults"]) for line in lines if line["faults"]] == []


def test_no_main_loop_uses_local_memory(machine_code, kernels):
    using = [(k.name, k.arch, k.local_accesses) for k in kernels if k.read and k.local_accesses]
    assert using == []


def test_what_a_step_has_in_registers_is_never_reached_by_an_address(kernels):
    """An access that may go to any memory is one to a number whose place was chosen while the kernel runs."""
    steps = [k for k in kernels if "step_kernel<" in k.name and "Tile<" in k.name]
    assert len(steps) > 100
    assert [(k.name, k.arch) for k in steps if any(w.split(".")[0] in ("LD", "ST") for w in k.widths)] == []


def test_every_lab_kernel_sets_a_budget(machine_code, rows, labs):
    assert {machine_code.row_of(lab.name) for lab in labs} == set(rows)
    for lab in labs:
        row = machine_code.row_of(lab.name)
        assert machine_code.faults(lab, lab, row) == []
        # A kernel that does less than all of its work in 16-byte accesses has no budget worth the name.
        assert lab.read
        assert lab.written * row.read == (lab.read - row.beside) * row.written


class TestMeasure:
    """On code written by hand, so that the tool cannot be blind."""

    ADD = """
        /*0000*/ LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/ LDG.E.128 R8, desc[UR4][R20.64] ;
        /*0020*/ @P0 BRA `(.L_x_1) ;
        /*0030*/ FADD R4, R4, R8 ;
        /*0040*/ FADD R6, R6, R10 ;
        /*0050*/ FADD R5, R5, R9 ;
.L_x_1:
        /*0060*/ STL [R1], R4 ;
        /*0070*/ STG.E.128 desc[UR4][R2.64], R4 ;
        /*0080*/ EXIT ;
.L_x_2:
        /*0090*/ BRA `(.L_x_2) ;
"""
    # The slow way has fewer instructions here, and more where it calls.
    CALL = """
        /*0000*/ S2R R0, SR_TID.X ;
        /*0010*/ LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/ @!P0 BRA `(.L_x_1) ;
        /*0030*/ CALL.REL.NOINC `($slow) ;
        /*0040*/ BRA `(.L_x_2) ;
.L_x_1:
        /*0050*/ FMUL R8, R4, R4 ;
        /*0060*/ FFMA R8, R8, R4, R4 ;
        /*0070*/ FFMA R4, R8, R4, R4 ;
.L_x_2:
        /*0080*/ STG.E.128 desc[UR4][R2.64], R4 ;
        /*0090*/ FADD R12, R4, R5 ;
        /*00a0*/ STG.E.64 desc[UR4][R20.64], R12 ;
        /*00b0*/ STG.E desc[UR4][R22.64], R12 ;
        /*00c0*/ EXIT ;
"""
    LOOP = """
        /*0000*/ S2R R0, SR_TID.X ;
.L_x_1:
        /*0010*/ LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/ FADD R12, R4, R12 ;
        /*0030*/ LDG.E.128 R8, desc[UR4][R20.64] ;
        /*0040*/ FADD R12, R8, R12 ;
        /*0050*/ @P0 BRA `(.L_x_1) ;
        /*0060*/ STG.E desc[UR4][R2.64], R12 ;
        /*0070*/ EXIT ;
"""

    @pytest.fixture
    def kernel(self, machine_code, monkeypatch, tmp_path):
        def make(text):
            monkeypatch.setattr(machine_code.cubins, "tool", lambda name: name)
            listing = f'\t.section\t.text.kernel,"ax"\n{text}'
            monkeypatch.setattr(machine_code.cubins, "_run", lambda command, **options: listing)
            used = {"kernel": {"registers": 40, "local": 0, "shared": 0, "threads": 256}}
            monkeypatch.setattr(machine_code.cubins, "resources", lambda cubin: used)
            monkeypatch.setattr(machine_code.cubins, "demangled", list)
            (found,) = machine_code.kernels_of(tmp_path, 90)
            return found

        return make

    def test_the_main_path_takes_the_shorter_branch(self, kernel):
        found = kernel(self.ADD)
        assert (found.instructions, found.read, found.written, found.ahead) == (5, 32, 16, 32)
        assert found.local_accesses == 1
        assert found.in_flight == 32 * 256 * 6

    def test_the_main_path_calls_nothing_and_ends_at_the_last_store_of_eight_bytes(self, kernel):
        found = kernel(self.CALL)
        assert (found.instructions, found.before) == (8, 1)

    def test_a_loop_may_take_all_that_a_thread_of_the_lab_executes(self, machine_code, kernel):
        row = machine_code.Row("product", "", "", 4, 4)
        straight, loop = kernel(self.CALL), kernel(self.LOOP)
        assert straight.allows(loop, row) == pytest.approx((8 + 1) / 4 * machine_code.SLACK)
        assert straight.allows(straight, row) == pytest.approx(8 / 4 * machine_code.SLACK)

    def test_a_loop_is_counted_once_round(self, kernel):
        found = kernel(self.LOOP)
        assert (found.instructions, found.read, found.written, found.ahead) == (5, 32, 0, 16)

    def test_each_fault_is_named(self, machine_code, kernel):
        row = machine_code.Row("sum", "", "", 8, 8)
        budget = kernel(self.ADD)
        loop = kernel(self.LOOP)
        messages = "; ".join(machine_code.faults(budget, budget, row) + machine_code.faults(loop, budget, row))
        assert "1 accesses to local memory" in messages
        assert "0 bytes by 16-byte stores where 32 are due" in messages
        assert "16 bytes asked for before the first use, fewer than 32" in messages
        loop.instructions = 6
        assert "1.5 instructions an element, more than 1.4" in "; ".join(machine_code.faults(loop, budget, row))
