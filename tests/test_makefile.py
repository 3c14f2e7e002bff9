"""What `make` builds when, with a stand-in for the Python that would do it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
INSTALL = "-m pip --disable-pip-version-check --no-input install -q --no-build-isolation --no-deps -e ."


@pytest.fixture
def make(tmp_path):
    """A function that runs make with some targets and variables; returns how the package was installed, if it was."""
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "csrc").mkdir()
    for name in ("setup.py", "pyproject.toml", "csrc/a.cpp"):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (1, 1))
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "cuda=$FUSEDSTEP_CUDA archs=$FUSEDSTEP_CUDA_ARCHS $*" >> {tmp_path}/log\n')
    python.chmod(0o755)
    for stamp in ("env", "deps"):
        (tmp_path / ".venv" / f".{stamp}-stamp").touch()
    (tmp_path / "bin").mkdir()
    nvidia_smi(tmp_path, "exit 9")

    def run(*targets, **variables):
        (tmp_path / "log").write_text("")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("FUSEDSTEP", "MAKE", "MFLAGS"))}
        environ = {**kept, "PATH": f"{tmp_path}/bin:/usr/bin:/bin", **variables}
        subprocess.run(["make", *targets], cwd=tmp_path, env=environ, check=True, capture_output=True)
        lines = (tmp_path / "log").read_text().splitlines()
        return [line.removesuffix(INSTALL).strip() for line in lines if line.endswith(INSTALL)]

    return run


def nvidia_smi(tmp_path, does):
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{does}\n")
    tool.chmod(0o755)


@pytest.fixture
def gpu(tmp_path, make):
    nvidia_smi(tmp_path, "echo GPU 0")


def test_without_a_gpu_the_demo_builds_without_cuda_and_the_tests_with_it(make):
    assert make("demo") == ["cuda=0 archs="]
    assert make("demo") == make("lenet") == []
    assert make("test") == ["cuda= archs="]
    assert make("demo") == make("test") == []


def test_the_documentation_needs_no_build_and_its_figures_do(make):
    assert make("docs") == []
    assert make("figures") == ["cuda= archs="]


def test_with_a_gpu_the_demo_builds_as_the_tests_do(make, gpu):
    assert make("demo") == ["cuda= archs="]
    assert make("test") == []


def test_what_is_asked_for_holds_for_the_demo_too(make):
    assert make("demo", FUSEDSTEP_CUDA="1") == ["cuda=1 archs="]
    assert make("demo") == []


@pytest.mark.parametrize(
    "variable", ["FUSEDSTEP_CUDA", "FUSEDSTEP_CUDA_ARCHS", "FUSEDSTEP_WERROR", "CXX", "CUDACXX", "CUDA_HOME"]
)
def test_other_options_are_another_build(make, variable):
    assert len(make("test")) == 1
    assert len(make("test", **{variable: "1"})) == 1
    assert make("test", **{variable: "1"}) == []
    assert len(make("test")) == 1


def test_a_changed_source_is_built(make, tmp_path):
    make("test")
    later = (tmp_path / ".venv" / ".built-stamp").stat().st_mtime + 10
    os.utime(tmp_path / "csrc" / "a.cpp", (later, later))
    assert make("test") == ["cuda= archs="]
