"""Builds the extension fusedstep._C: the CPU engine always, the CUDA engine where nvcc is found.

Needs setuptools, pybind11, ninja and a C++17 compiler; torch is not involved. Everything else about the package is in
pyproject.toml. Environment variables:

  FUSEDSTEP_CUDA        0 leaves the CUDA engine out, 1 makes a missing nvcc an error; unset: built where nvcc is found
  FUSEDSTEP_CUDA_ARCHS  for example "90", "80;90", "9.0+PTX"; unset: sm_80, sm_90, sm_100, sm_120 and PTX of the newest
  FUSEDSTEP_WERROR      1 makes a compiler's warning an error
  CUDA_HOME, CUDACXX    where nvcc is (asked in this order, then PATH)
  CXX                   the C++ compiler (default: g++ or c++)
  MAX_JOBS              how many compilers run at a time
"""

import functools
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
# One folder for all Pythons: only what includes Python.h is compiled for each of them. Paths in it are relative, so
# that objects stay valid where the whole tree is copied to another place.
BUILD = ROOT / "build" / sysconfig.get_platform()
CARRIED = "carried"  # a folder in it
DEFAULT_CUDA_ARCHS = "80;90;100;120+PTX"

# No contraction into FMA, neither here nor in nvcc's flags: all backends give the same bits. sqrtf() is vectorised only
# without errno and traps.
CXX_FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-Wall", "-Wextra", "-Wno-psabi"),  # inside of an object, how GCC before 4.6 passed vectors does not matter
]
NVCC_FLAGS = [
    *("-std=c++17", "-O3", "-fmad=false", "--expt-relaxed-constexpr"),
    *("-Xcompiler", "-fPIC,-fvisibility=hidden"),
]
# Mostly pybind11's templates: called once a step or less, not once a tensor.
SELDOM_CALLED = ("bindings_unit", "cuda_bindings")
# The path of nvcc is no part of a command, its version is: objects depend on the latter alone.
NVCC = '"$FUSEDSTEP_NVCC"'
EXTENSION = f"{sys.implementation.cache_tag}/_C.so"
# The CPU engine is compiled once for each of these and chooses at run time. GCC 12 warns of its own header
# avx512fintrin.h, which means to leave a value undefined (GCC bug 105593); clang does not know each of its warnings.
GCC_HEADERS = ["-Wno-unknown-warning-option", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
X86_ISAS = {
    "v2": ["-march=x86-64-v2"],
    "v3": ["-march=x86-64-v3"],
    "v4": ["-march=x86-64-v4", "-mprefer-vector-width=512", *GCC_HEADERS],
}


# What not every compiler has: OpenMP, and this way to mix two vectors.
PROBE = """
#include <omp.h>
typedef int Pack __attribute__((vector_size(16)));
Pack mixed(Pack a, Pack b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
int main() { return omp_get_max_threads() == 0; }
"""


def is_x86(machine: str | None = None) -> bool:
    return (machine or platform.machine()).lower() in ("x86_64", "amd64")


def from_memory(cxx: list[str]) -> list[str]:
    """GCC's option to read a vector of equal integers from memory.

    It would rather build one in three instructions, and where a loop needs more of them than there are registers, in
    each turn anew.
    """
    option = "-mtune-ctrl=^inter_unit_moves_to_vec"
    command = [*cxx, option, "-x", "c++", "-fsyntax-only", os.devnull]
    known = is_x86() and subprocess.run(command, capture_output=True).returncode == 0
    return [option] if known else []


def switch(environ, name: str) -> str:
    """The value of an environment variable that is "0", "1" or "" for unset."""
    value = environ.get(name, "").strip()
    if value not in ("", "0", "1"):
        raise SetupError(f"{name}={value} is not understood; accepted are 0, 1 and nothing")
    return value


def find_nvcc(environ) -> str | None:
    """The nvcc to build with, or None if the CUDA engine is left out."""
    wanted = switch(environ, "FUSEDSTEP_CUDA")
    if wanted == "0":
        return None
    candidates = []
    if environ.get("CUDA_HOME"):
        candidates.append(os.path.join(environ["CUDA_HOME"], "bin", "nvcc"))
    candidates += [environ.get("CUDACXX"), "nvcc"]
    for candidate in filter(None, candidates):
        nvcc = shutil.which(candidate, path=environ.get("PATH", ""))
        if nvcc:
            return nvcc
    if wanted == "1":
        raise SetupError(
            "FUSEDSTEP_CUDA=1 asks for the CUDA engine, but nvcc is neither in CUDA_HOME/bin, nor named by CUDACXX, "
            "nor on PATH; install the CUDA toolkit, set one of these, or leave the engine out with FUSEDSTEP_CUDA=0"
        )
    return None


def gencode_flags(archs: str, supported: set[str] | None = None) -> list[str]:
    """nvcc's flags for a list such as "80;90;10.0+PTX"; of the default list only what `supported` has is taken.

    Those before sm_100 are made of the same PTX, the oldest one's: that takes most of the time, and their machine code
    does not differ for it, as later ones' does.
    """
    found = []
    entries = [entry for entry in re.split(r"[;,\s]+", archs) if entry]
    if archs == DEFAULT_CUDA_ARCHS and supported is not None:
        names = [entry.removesuffix("+PTX") for entry in entries]
        entries = [name for name in names if f"sm_{name}" in supported]
        entries[-1:] = [f"{name}+PTX" for name in entries[-1:]]
    for entry in entries:
        match = re.fullmatch(r"(\d{1,2})\.?(\d[af]?)(\+PTX)?", entry, re.IGNORECASE)
        if not match:
            raise SetupError(
                f"FUSEDSTEP_CUDA_ARCHS={archs}: '{entry}' is no CUDA architecture; "
                'write for example "90", "80;90" or "9.0+PTX"'
            )
        number = match[1] + match[2].lower()
        if supported is not None and f"sm_{number}" not in supported and number.isdigit():
            raise SetupError(
                f"FUSEDSTEP_CUDA_ARCHS={archs}: this nvcc has no sm_{number}; it has {', '.join(sorted(supported))}"
            )
        found.append((number, bool(match[3])))
    if not found:
        raise SetupError(f"FUSEDSTEP_CUDA_ARCHS={archs!r} names no architecture that this nvcc can compile for")
    sharing = [number for number, _ in found if number.isdigit() and int(number) < 100]
    flags = []
    for number, with_ptx in found:
        virtual = min(sharing, key=int) if number in sharing and not with_ptx else number
        flags.append(f"-gencode=arch=compute_{virtual},code=sm_{number}")
        if with_ptx:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def arch_list(gencodes: list[str]) -> str:
    """The architectures whose machine code these flags ask for, like "80\\,90": nvcc takes commas apart."""
    return r"\,".join(re.sub(r"\D", "", code) for code in re.findall(r"code=sm_(\w+)", " ".join(gencodes)))


def find_cxx(environ) -> list[str]:
    """The C++ compiler's command, after a look at whether it can build this package."""
    if not sys.platform.startswith("linux"):
        raise SetupError(f"fusedstep builds on Linux with GCC or clang; this is {sys.platform}")
    if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        raise SetupError("Python.h is missing: install Python's development files (python3-dev or python3-devel)")
    cxx = shlex.split(environ.get("CXX", "")) or [next(filter(shutil.which, ("g++", "c++")), "g++")]
    command = [*cxx, *CXX_FLAGS, *(X86_ISAS["v4"] if is_x86() else []), "-x", "c++", "-fsyntax-only", "-"]
    try:
        result = subprocess.run(command, input=PROBE, capture_output=True, text=True)
        error = result.stderr.strip() if result.returncode else None
    except OSError as failure:
        error = str(failure)
    if error is not None:
        raise SetupError(
            f"{shlex.join(cxx)} cannot build fusedstep, which needs GCC 12 or clang 16 or newer, with OpenMP (for "
            f"clang the package libomp-dev); name another compiler by CXX. It says:\n{error}"
        )
    return cxx


def translation_units(folder: Path) -> list[Path]:
    """The sources of a folder, without those that another one of them includes."""
    sources = sorted(folder.glob("*.cpp"))
    included = {name for source in sources for name in re.findall(r'#include "(\w+\.cpp)"', source.read_text())}
    return [source for source in sources if source.name not in included]


def compile_steps(cxx: list[str], nvcc: str | None, environ) -> list[tuple[Path, str, list[str]]]:
    """(source, object, command) of every translation unit, in the order in which they are linked."""
    import pybind11

    strict = switch(environ, "FUSEDSTEP_WERROR") == "1"
    compiler = [*cxx, *CXX_FLAGS, *(["-Werror"] if strict else [])]
    defines = [f"-DFUSEDSTEP_X86={int(is_x86())}"]
    module = [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    csrc = ROOT / "csrc"
    tag = sys.implementation.cache_tag
    units = []
    for source in translation_units(csrc):
        options = ["-O1"] if source.stem in SELDOM_CALLED else []
        # No other unit is told whether CUDA is there: their objects fit builds with and without.
        if source.stem == "cuda_bindings":
            options.append(f"-DFUSEDSTEP_WITH_CUDA={int(nvcc is not None)}")
        units.append((source, f"{tag}/{source.stem}.o", [*compiler, *options, *module]))
    generic = ("dispatch", "reducing_dispatch", "norm_dispatch")
    units += [(csrc / "cpu" / f"{name}.cpp", f"cpu.{name}.o", compiler) for name in generic]
    # The oldest instruction set comes first: of an inline function that several objects carry, the linker keeps the
    # first copy, and that one must run everywhere.
    tuning = from_memory(cxx)
    for isa, flags in (X86_ISAS if is_x86() else {"base": []}).items():
        command = [*compiler, *flags, *tuning, f"-DFUSEDSTEP_ISA={isa}"]
        units += [
            (csrc / "cpu" / f"{name}.cpp", f"cpu.{name}.{isa}.o", command)
            for name in ("engine", "tiles", "reducing", "norm")
        ]
    if nvcc:
        listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True)
        supported = set(listed.stdout.split()) or None  # before CUDA 11.5 there was no such list
        archs = gencode_flags(environ.get("FUSEDSTEP_CUDA_ARCHS", "").strip() or DEFAULT_CUDA_ARCHS, supported)
        command = [NVCC, "-ccbin", cxx[-1], *NVCC_FLAGS, *(["-Werror", "all-warnings"] if strict else []), *archs]
        version = nvcc_version(nvcc)
        command += [*compression_flags(version), f"-DFUSEDSTEP_NVCC_VERSION={version}"]
        command += [f"-DFUSEDSTEP_CUDA_ARCHS={arch_list(archs)}"]
        units += [(source, f"cuda.{source.stem}.o", command) for source in sorted((csrc / "cuda").glob("*.cu"))]
    return [
        (
            source,
            name,
            [*command, *defines, "-MMD", "-MF", f"{name}.d", "-c", os.path.relpath(source, BUILD), "-o", name],
        )
        for source, name, command in units
    ]


def nvcc_version(nvcc: str) -> str:
    """Like "13.0.88"."""
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    match = re.search(r"V(\d+(?:\.\d+)*)", told)
    return match[1] if match else "unknown"


def compression_flags(version: str) -> list[str]:
    """What makes machine code smallest in the file, from nvcc 12.8 on."""
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    return ["--compress-mode=size"] if numbers >= (12, 8) else []


def quote(words: list[str]) -> str:
    """A command for the shell."""
    return " ".join(word if word == NVCC else shlex.quote(word) for word in words)


def carried_objects(steps: list[tuple[Path, str, list[str]]]) -> dict[str, str]:
    """Objects that another machine has compiled (bench/gpu/carry.py), instead of what the same command would make.

    Valid are those whose source, and all that it includes, is what was compiled there.
    """
    try:
        known = json.loads((BUILD / CARRIED / "objects.json").read_text())
    except OSError:
        return {}
    digest = functools.cache(lambda path: hashlib.sha256((BUILD / path).read_bytes()).hexdigest())
    found = {}
    for _, name, command in steps:
        made = known.get(name, {"command": None})
        if made["command"] == quote(command) and all(
            (BUILD / path).is_file() and digest(path) == expected for path, expected in made["inputs"].items()
        ):
            found[name] = f"{CARRIED}/{name}"
    return found


def ninja_file(steps: list[tuple[Path, str, list[str]]], link: list[str], carried: dict[str, str] | None = None) -> str:
    """The text of build.ninja, which makes _C.so from the steps' objects, or those carried in place of some."""
    carried = carried or {}

    def path(source: Path) -> str:
        return re.sub(r"([$: ])", r"$\1", os.path.relpath(source, BUILD))

    lines = [
        *("rule compile", "  command = $words", "  deps = gcc", "  depfile = $out.d", "  description = compile $out"),
        *("rule link", "  command = $words", "  description = link $out"),
    ]
    for source, name, command in steps:
        if name not in carried:
            words = quote(command).replace("$", "$$")
            lines += [f"build {name}: compile {path(source)}", f"  words = {words}"]
    objects = [carried.get(name, name) for _, name, _ in steps]
    words = quote([*link, *objects, "-o", EXTENSION]).replace("$", "$$")
    lines += [f"build {EXTENSION}: link {' '.join(objects)}", f"  words = {words}"]
    return "\n".join(lines) + "\n"


class NinjaBuildExt(build_ext):
    """Compiles with ninja, in a folder that stays, so that a second build compiles only what changed."""

    def finalize_options(self):
        super().finalize_options()
        # An editable install would give a new temporary folder each time.
        self.build_temp = str(BUILD)

    def build_extension(self, ext):
        import ninja

        cxx, nvcc = find_cxx(os.environ), find_nvcc(os.environ)
        steps = compile_steps(cxx, nvcc, os.environ)
        environ = dict(os.environ)
        if nvcc:  # it knows where its static libcudart is
            link = [NVCC, "-ccbin", cxx[-1], "-shared", "-cudart=static", "-nodlink", "-Xcompiler", "-fopenmp"]
            # How many compilers run at a time is no part of a command either.
            threads = f"--threads={environ.get('MAX_JOBS') or 0}"
            flags = environ.get("NVCC_APPEND_FLAGS", "")
            environ |= {"FUSEDSTEP_NVCC": nvcc, "NVCC_APPEND_FLAGS": f"{flags} {threads}".strip()}
        else:
            link = [*cxx, "-shared", "-fopenmp"]
        manifest = BUILD / sys.implementation.cache_tag / "build.ninja"
        manifest.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_text(ninja_file(steps, link, carried_objects(steps)))
        print(f"fusedstep: C++ by {shlex.join(cxx)}, CUDA {f'by {nvcc}' if nvcc else 'left out'}", flush=True)
        jobs = ["-j", environ["MAX_JOBS"]] if environ.get("MAX_JOBS") else []
        command = [Path(ninja.BIN_DIR) / "ninja", "-C", BUILD, "-f", manifest.relative_to(BUILD), *jobs]
        if subprocess.run(command, env=environ).returncode:
            raise SetupError("the compiler's messages above say why fusedstep._C was not built")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(BUILD / EXTENSION), str(target))


if __name__ == "__main__":
    setup(ext_modules=[Extension("fusedstep._C", sources=[])], cmdclass={"build_ext": NinjaBuildExt})
