"""The built extension, and the decisions of setup.py."""

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path
from typing import ClassVar

import pytest
from setuptools.errors import SetupError

import fusedstep
from fusedstep import _C

ROOT = Path(__file__).resolve().parents[1]


def module_at(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def setup_py():
    return module_at("fusedstep_setup", ROOT / "setup.py")


@pytest.fixture(scope="module")
def pyproject():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def fake_nvcc(folder):
    """An executable called nvcc in a new folder."""
    folder.mkdir(parents=True)
    nvcc = folder / "nvcc"
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    return str(nvcc)


def find_cuobjdump():
    """The path of cuobjdump: a CUDA toolkit has it, and so has the triton package."""
    folders = [os.environ.get("PATH", "")]
    if home := os.environ.get("CUDA_HOME"):
        folders.append(os.path.join(home, "bin"))
    if spec := importlib.util.find_spec("triton"):
        folders.append(os.path.join(os.path.dirname(spec.origin), "backends", "nvidia", "bin"))
    return shutil.which("cuobjdump", path=os.pathsep.join(folders))


class TestExtension:
    def test_links_nothing_but_the_compilers_own_libraries(self):
        if not (readelf := shutil.which("readelf")):
            pytest.skip("readelf (binutils) is not installed")
        listing = subprocess.run([readelf, "-d", _C.__file__], capture_output=True, text=True, check=True).stdout
        needed = [line.split("[")[1].rstrip("]") for line in listing.splitlines() if "(NEEDED)" in line]
        assert needed
        own = (
            "libstdc++",
            "libgcc_s",
            "libgomp",
            "libomp",
            "libc.",
            "libm.",
            "libdl.",
            "librt.",
            "libpthread.",
            "ld-linux",
        )
        assert [name for name in needed if not name.startswith(own)] == []

    def test_exports_only_its_entry_point_and_weak_templates(self):
        if not (nm := shutil.which("nm")):
            pytest.skip("nm (binutils) is not installed")
        listing = subprocess.run([nm, "-D", "--defined-only", _C.__file__], capture_output=True, text=True, check=True)
        strong = [line.split()[2] for line in listing.stdout.splitlines() if line.split()[1] in "TDBR"]
        assert strong == ["PyInit__C"]

    def test_only_the_copies_of_the_engine_for_newer_processors_use_avx(self, setup_py):
        if not setup_py.is_x86():
            pytest.skip("not an x86-64 processor")
        if not (objdump := shutil.which("objdump")):
            pytest.skip("objdump (binutils) is not installed")
        command = [objdump, "-d", "-C", "--no-show-raw-insn", _C.__file__]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            users, function = set(), ""
            for line in process.stdout:
                if line.endswith(">:\n"):
                    function = line
                elif "%ymm" in line or "%zmm" in line:
                    users.add(function)
        assert any("::v3::" in name for name in users)
        assert [name for name in users if "::v3::" not in name and "::v4::" not in name] == []

    def test_imports_where_no_gpu_can_be_seen(self):
        code = "import fusedstep._C as c; print(c.with_cuda)"
        environ = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        result = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
        assert (result.stdout.strip(), result.stderr) == (str(_C.with_cuda), "")

    def test_imports_without_torch(self):
        # A build machine has none: the module file alone must load.
        code = "import sys; sys.path.insert(0, sys.argv[1]); import _C; assert 'torch' not in sys.modules; _C.rules()"
        command = [sys.executable, "-S", "-c", code, str(Path(_C.__file__).parent)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr

    def test_holds_code_for_every_architecture(self, setup_py):
        if not _C.with_cuda:
            pytest.skip("built without CUDA")
        if not (cuobjdump := find_cuobjdump()):
            pytest.skip("cuobjdump is neither in the CUDA toolkit, nor in the triton package, nor on PATH")
        archs = os.environ.get("FUSEDSTEP_CUDA_ARCHS") or setup_py.DEFAULT_CUDA_ARCHS
        codes = [flag.rpartition("code=")[2] for flag in setup_py.gencode_flags(archs)]
        expected = {
            f"{code}.cubin" if code.startswith("sm_") else f"{code.replace('compute_', 'sm_')}.ptx" for code in codes
        }
        command = [cuobjdump, "--list-elf", "--list-ptx", _C.__file__]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = {
            ".".join(line.rsplit(".", 2)[1:]) for line in listing.splitlines() if line.endswith((".cubin", ".ptx"))
        }
        assert found == expected


class TestWhetherCudaIsBuilt:
    def test_0_leaves_it_out_even_where_nvcc_is(self, setup_py, tmp_path):
        nvcc = fake_nvcc(tmp_path / "bin")
        assert setup_py.find_nvcc({"FUSEDSTEP_CUDA": "0", "CUDA_HOME": str(tmp_path), "CUDACXX": nvcc}) is None

    def test_1_without_nvcc_is_an_error_that_says_where_it_was_sought(self, setup_py, tmp_path):
        environ = {"FUSEDSTEP_CUDA": "1", "PATH": str(tmp_path), "CUDA_HOME": str(tmp_path)}
        with pytest.raises(SetupError, match=r"nvcc is neither in CUDA_HOME/bin, nor named by CUDACXX, nor on PATH"):
            setup_py.find_nvcc(environ)

    def test_unset_it_follows_nvcc(self, setup_py, tmp_path):
        assert setup_py.find_nvcc({"PATH": str(tmp_path)}) is None
        nvcc = fake_nvcc(tmp_path / "bin")
        assert setup_py.find_nvcc({"PATH": str(tmp_path / "bin")}) == nvcc
        assert setup_py.find_nvcc({"PATH": str(tmp_path / "bin"), "FUSEDSTEP_CUDA": "1"}) == nvcc

    def test_cuda_home_comes_before_cudacxx_before_path(self, setup_py, tmp_path):
        home, cudacxx, path = (fake_nvcc(tmp_path / name / "bin") for name in ("home", "cudacxx", "path"))
        environ = {"PATH": str(Path(path).parent), "CUDACXX": cudacxx, "CUDA_HOME": str(tmp_path / "home")}
        assert setup_py.find_nvcc(environ) == home
        assert setup_py.find_nvcc({**environ, "CUDA_HOME": str(tmp_path)}) == cudacxx
        assert setup_py.find_nvcc({**environ, "CUDA_HOME": "", "CUDACXX": ""}) == path

    def test_another_value_is_an_error(self, setup_py):
        with pytest.raises(SetupError, match="FUSEDSTEP_CUDA=yes is not understood; accepted are 0, 1 and nothing"):
            setup_py.find_nvcc({"FUSEDSTEP_CUDA": "yes"})


class TestArchitectures:
    def test_machine_code_is_packed_where_nvcc_can(self, setup_py):
        assert (
            setup_py.compression_flags("13.0.88") == setup_py.compression_flags("12.8.61") == ["--compress-mode=size"]
        )
        assert setup_py.compression_flags("12.6.20") == setup_py.compression_flags("unknown") == []

    @pytest.mark.parametrize("archs", ["80;90+PTX", "80,90+PTX", "8.0 9.0+PTX", " 80 ; 9.0+ptx;"])
    def test_every_spelling_means_the_same(self, setup_py, archs):
        assert setup_py.gencode_flags(archs) == [
            "-gencode=arch=compute_80,code=sm_80",
            "-gencode=arch=compute_90,code=sm_90",
            "-gencode=arch=compute_90,code=compute_90",
        ]

    def test_those_before_sm_100_are_made_of_one_ptx(self, setup_py):
        assert setup_py.gencode_flags("80;90;100;90a") == [
            "-gencode=arch=compute_80,code=sm_80",
            "-gencode=arch=compute_80,code=sm_90",
            "-gencode=arch=compute_100,code=sm_100",
            "-gencode=arch=compute_90a,code=sm_90a",
        ]

    def test_the_extension_is_told_what_it_has_machine_code_for(self, setup_py):
        assert setup_py.arch_list(setup_py.gencode_flags("80;9.0+PTX")) == r"80\,90"
        if _C.with_cuda:
            archs = os.environ.get("FUSEDSTEP_CUDA_ARCHS") or setup_py.DEFAULT_CUDA_ARCHS
            assert setup_py.arch_list(setup_py.gencode_flags(archs)) == r"\,".join(map(str, _C.cuda_archs))

    def test_three_digits_and_architecture_specific_ones_are_understood(self, setup_py):
        supported = {"sm_90", "sm_100"}
        assert setup_py.gencode_flags("10.0", supported) == ["-gencode=arch=compute_100,code=sm_100"]
        assert setup_py.gencode_flags("90a", supported) == ["-gencode=arch=compute_90a,code=sm_90a"]

    def test_an_older_nvcc_gets_the_part_of_the_default_that_it_knows(self, setup_py):
        flags = setup_py.gencode_flags(setup_py.DEFAULT_CUDA_ARCHS, {"sm_80", "sm_90"})
        assert flags == setup_py.gencode_flags("80;90+PTX")

    @pytest.mark.parametrize("archs", ["hopper", "sm_90", "9", "90;x", "90+SASS"])
    def test_what_is_no_architecture_is_named(self, setup_py, archs):
        with pytest.raises(SetupError, match="is no CUDA architecture; write for example"):
            setup_py.gencode_flags(archs)

    def test_one_that_nvcc_lacks_is_an_error(self, setup_py):
        with pytest.raises(SetupError, match="this nvcc has no sm_70; it has sm_80, sm_90"):
            setup_py.gencode_flags("70", {"sm_80", "sm_90"})


class TestCompiler:
    def test_one_that_is_not_there_is_named(self, setup_py):
        with pytest.raises(SetupError, match="no-such-compiler cannot build fusedstep, which needs GCC"):
            setup_py.find_cxx({"CXX": "no-such-compiler"})

    def test_another_system_is_named(self, setup_py, monkeypatch):
        monkeypatch.setattr(setup_py.sys, "platform", "darwin")
        with pytest.raises(SetupError, match="fusedstep builds on Linux with GCC or clang; this is darwin"):
            setup_py.find_cxx({})

    def test_one_that_lacks_what_is_needed_says_so_itself(self, setup_py, tmp_path):
        (tmp_path / "omp.h").write_text('#error "there is no OpenMP"\n')
        with pytest.raises(
            SetupError, match=r"needs GCC 12 or clang 16 or newer, with OpenMP(.|\n)*there is no OpenMP"
        ):
            setup_py.find_cxx({"CXX": f"g++ -I{tmp_path}"})

    def test_clang_passes_the_probe_and_takes_every_flag(self, setup_py):
        """The sources where compilers differ: features of processors, vectors that are mixed, constants of rules."""
        clang = next(filter(shutil.which, ("clang++", *(f"clang++-{version}" for version in range(16, 30)))), "")
        version = clang and subprocess.run([clang, "-dumpversion"], capture_output=True, text=True).stdout
        if not clang or int(version.split(".")[0]) < 16:
            pytest.skip("clang++ 16 or newer is not installed")
        cxx = setup_py.find_cxx({"CXX": clang})
        wanted = ("dispatch.cpp", "reducing_dispatch.cpp", "tiles.cpp", "norm.cpp")
        for source, _, command in setup_py.compile_steps(cxx, None, {}):
            if source.name in wanted:
                words = command[: command.index("-MMD")]
                result = subprocess.run([*words, "-fsyntax-only", source], capture_output=True, text=True)
                assert result.returncode == 0, result.stderr

    def test_every_source_is_compiled_without_contraction(self, setup_py):
        steps = setup_py.compile_steps(["g++"], None, {})
        units = {source for source, _, _ in steps}
        included = [ROOT / "csrc" / name for unit in units for name in re.findall(r'"(\w+\.cpp)"', unit.read_text())]
        assert units | set(included) == {*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")}
        assert units.isdisjoint(included)
        assert len(set(included)) == len(included)
        assert all("-ffp-contract=off" in command for _, _, command in steps)
        assert len({name for _, name, _ in steps}) == len(steps)

    @pytest.mark.parametrize(("asked", "strict"), [("", False), ("0", False), ("1", True)])
    def test_a_warning_is_an_error_only_if_that_is_asked_for(self, setup_py, tmp_path, asked, strict):
        nvcc = fake_nvcc(tmp_path / "bin")
        steps = setup_py.compile_steps(["g++"], nvcc, {"FUSEDSTEP_WERROR": asked})
        assert {"-Werror" in command for _, _, command in steps} == {strict}
        assert {"all-warnings" in command for _, name, command in steps if name.startswith("cuda.")} == {strict}
        with pytest.raises(SetupError, match="FUSEDSTEP_WERROR=yes is not understood; accepted are 0, 1 and nothing"):
            setup_py.compile_steps(["g++"], None, {"FUSEDSTEP_WERROR": "yes"})

    def test_objects_depend_on_no_place_and_only_some_on_the_python(self, setup_py, tmp_path):
        nvcc = fake_nvcc(tmp_path / "bin")
        for source, name, command in setup_py.compile_steps(["g++"], nvcc, {"MAX_JOBS": "3"}):
            of_python = name.startswith(sys.implementation.cache_tag)
            assert of_python == (source.parent.name == "csrc")
            if not of_python:
                assert not any(word.startswith("/") or "=/" in word or word.startswith("-isystem") for word in command)
                assert not any("3" in word for word in command if "threads" in word)
            assert (ROOT / "build" / "platform" / command[command.index("-c") + 1]).resolve() == source

    def test_other_processors_get_one_plain_engine(self, setup_py, monkeypatch):
        monkeypatch.setattr(setup_py.platform, "machine", lambda: "aarch64")
        steps = setup_py.compile_steps(["g++"], None, {})
        engines = [command for source, _, command in steps if source.name == "engine.cpp"]
        assert len(engines) == 1
        assert {"-DFUSEDSTEP_ISA=base", "-DFUSEDSTEP_X86=0"} <= set(engines[0])
        assert not any(word.startswith("-march") for word in engines[0])

    def test_a_path_with_spaces_and_dollars_survives_ninja(self, setup_py, tmp_path, monkeypatch):
        ninja = pytest.importorskip("ninja")
        monkeypatch.setattr(setup_py, "BUILD", tmp_path)
        source = tmp_path / "a $b" / "x:y.cpp"
        source.parent.mkdir()
        source.write_text("int x;\n")
        text = setup_py.ninja_file([(source, "x.o", ["cp", str(source), "x.o"])], ["true"])
        (tmp_path / "build.ninja").write_text(text.replace("  deps = gcc\n", "").replace("  depfile = $out.d\n", ""))
        subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", tmp_path, "x.o"], check=True, capture_output=True)
        assert (tmp_path / "x.o").read_text() == "int x;\n"


class TestCarriedObjects:
    """bench/gpu/carry.py: what one machine has compiled is valid in a copy of the tree."""

    SOURCES: ClassVar = {
        "a.cpp": '#include "a.h"\nint a() { return A; }\n',
        "a.h": "#define A 1\n",
        "b.cpp": "int b;\n",
    }

    @pytest.fixture
    def carry(self):
        return module_at("fusedstep_carry", ROOT / "bench" / "gpu" / "carry.py")

    @pytest.fixture
    def tree(self, carry, setup_py, monkeypatch, tmp_path):
        """A function that makes a tree of sources at a place, and returns one that builds it with some flags there.

        The latter says which objects were compiled.
        """
        ninja = pytest.importorskip("ninja")
        if not shutil.which("g++"):
            pytest.skip("g++ is not installed")

        def make(place):
            root = tmp_path / place
            (root / "csrc").mkdir(parents=True)
            for name, text in self.SOURCES.items():
                (root / "csrc" / name).write_text(text)
            build = root / "build" / "platform"
            for module, name, value in ((carry, "ROOT", root), (carry, "BUILD", build), (setup_py, "BUILD", build)):
                monkeypatch.setattr(module, name, value)

            def run(*flags):
                steps = []
                for name in ("a", "b"):
                    source = root / "csrc" / f"{name}.cpp"
                    words = ["g++", *flags, "-MMD", "-MF", f"{name}.o.d", "-c", os.path.relpath(source, build)]
                    steps.append((source, f"{name}.o", [*words, "-o", f"{name}.o"]))
                text = setup_py.ninja_file(steps, ["ld", "-r"], setup_py.carried_objects(steps))
                manifest = build / sys.implementation.cache_tag / "build.ninja"
                manifest.parent.mkdir(parents=True, exist_ok=True)
                manifest.write_text(text)
                command = [Path(ninja.BIN_DIR) / "ninja", "-C", build, "-f", manifest.relative_to(build)]
                told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                assert (build / setup_py.EXTENSION).exists()
                return [name for name in ("a.o", "b.o") if f"compile {name}" in told]

            return run

        return make

    def test_only_what_changed_is_compiled_again(self, carry, tree, tmp_path):
        build = tree("first")
        assert build() == ["a.o", "b.o"]
        carry.pack(tmp_path / "objects.tar.gz")
        build = tree("second")  # whose sources are newer than the objects
        carry.unpack(tmp_path / "objects.tar.gz")
        assert build() == []
        (tmp_path / "second" / "csrc" / "a.h").write_text("#define A 2\n")
        assert build() == ["a.o"]
        assert build("-O2") == ["a.o", "b.o"]

    def test_what_was_changed_after_its_build_is_not_carried_as_built(self, carry, tree, tmp_path):
        build = tree("first")
        build()
        (tmp_path / "first" / "csrc" / "b.cpp").write_text("int b = 1;\n")
        with pytest.raises(SystemExit, match=r"b\.o is older than .*b\.cpp: run make build first"):
            carry.pack(tmp_path / "objects.tar.gz")

    def test_without_objects_there_is_nothing_to_pack(self, carry, tree, tmp_path):
        tree("first")
        with pytest.raises(SystemExit, match="run make build first"):
            carry.pack(tmp_path / "objects.tar.gz")


class TestPackage:
    def test_the_version_is_written_the_same_twice(self, pyproject):
        assert fusedstep.__version__ == pyproject["project"]["version"] == importlib.metadata.version("fusedstep")

    def test_every_folder_with_python_files_is_listed(self, pyproject):
        folders = {".".join(path.parent.relative_to(ROOT / "python").parts) for path in (ROOT / "python").rglob("*.py")}
        listed = pyproject["tool"]["setuptools"]["packages"]
        assert sorted(folders | {"fusedstep.bench", "fusedstep.triton_kernels"}) == sorted(listed)

    def test_the_folders_at_the_top_are_imported_from_anywhere(self, tmp_path):
        code = "import fusedstep.bench, fusedstep.triton_kernels"
        result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr

    @pytest.mark.slow
    def test_a_wheel_without_cuda_holds_the_package_and_imports(self, tmp_path):
        # From a copy, so that the objects of the checkout's own build stay. Those that fit are taken along: all of a
        # build without CUDA, and all engines of another.
        ignored = shutil.ignore_patterns(".*", "build", "dist", "__pycache__", "*.so", "*.egg-info", "results")
        source = tmp_path / "source"
        shutil.copytree(ROOT, source, ignore=ignored)
        objects = Path("build") / sysconfig.get_platform()
        if (ROOT / objects).exists():
            shutil.copytree(ROOT / objects, source / objects)
        pip = shlex.split("-m pip wheel -q --no-build-isolation --no-deps --wheel-dir dist ./source")
        environ = {**os.environ, "FUSEDSTEP_CUDA": "0"}
        result = subprocess.run([sys.executable, *pip], cwd=tmp_path, env=environ, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        (wheel,) = (tmp_path / "dist").glob("fusedstep-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            archive.extractall(tmp_path / "site")
        assert {"fusedstep/py.typed", "fusedstep/bench/__init__.py", "fusedstep/triton_kernels/__init__.py"} <= set(
            names
        )
        assert [name for name in names if name.endswith((".cpp", ".h", ".cu", ".json", ".png"))] == []
        code = "import fusedstep, fusedstep._C as c; print(fusedstep.__file__, c.with_cuda)"
        environ["PYTHONPATH"] = str(tmp_path / "site")
        result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True)
        assert result.stdout.split() == [str(tmp_path / "site" / "fusedstep" / "__init__.py"), "False"], result.stderr
