"""What the CUDA toolkit's programs make and say of kernels: cubins, their instructions, resources and names.

Needs nvcc to compile, and cuobjdump and nvdisasm from a CUDA toolkit or from the triton package. What the instructions
mean is read in machine_code_paths.py.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "machine_code"


class ToolError(Exception):
    """A tool is missing or has failed."""


@functools.cache
def _setup():
    spec = importlib.util.spec_from_file_location("fusedstep_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def tool(name: str) -> str:
    """The path of cuobjdump or nvdisasm."""
    folders = [os.environ.get("PATH", "")]
    if home := os.environ.get("CUDA_HOME"):
        folders.append(os.path.join(home, "bin"))
    if spec := importlib.util.find_spec("triton"):
        folders.append(os.path.join(os.path.dirname(spec.origin), "backends", "nvidia", "bin"))
    found = shutil.which(name, path=os.pathsep.join(folders))
    if not found:
        raise ToolError(
            f"{name} is neither on PATH, nor in CUDA_HOME/bin, nor in the triton package; install one of them"
        )
    return found


def _run(command: Sequence[str], **options) -> str:
    result = subprocess.run(command, capture_output=True, text=True, **options)
    if result.returncode:
        raise ToolError(f"{' '.join(command)} says:\n{result.stderr.strip()}")
    return result.stdout


@functools.cache
def nvcc() -> str:
    """The path of nvcc."""
    found = _setup().find_nvcc({**os.environ, "FUSEDSTEP_CUDA": ""})
    if found is None:
        raise ToolError("nvcc is neither in CUDA_HOME/bin, nor named by CUDACXX, nor on PATH; install the CUDA toolkit")
    return found


def nvcc_version() -> str:
    """Like "13.0.88"."""
    return _setup().nvcc_version(nvcc())


def commit() -> str:
    """Of the source tree."""
    return _run(["git", "-C", str(ROOT), "rev-parse", "HEAD"]).strip()


def compiled(source: Path, arch: int) -> Path:
    """The cubin of a source, compiled by nvcc unless the one that is there is newer than every source."""
    setup = _setup()
    target = FOLDER / f"{source.stem}.sm_{arch}.cubin"
    inputs = [source, *(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh"), ROOT / "setup.py"]
    if target.exists() and target.stat().st_mtime > max(path.stat().st_mtime for path in inputs):
        return target
    program = nvcc()
    FOLDER.mkdir(parents=True, exist_ok=True)
    flags = [flag for flag in setup.NVCC_FLAGS if flag != "-Xcompiler" and not flag.startswith("-fPIC")]
    part = target.with_suffix(f".{os.getpid()}")
    try:
        _run([program, *flags, f"-arch=sm_{arch}", "-cubin", "-o", str(part), str(source)])
    except ToolError as error:
        raise RuntimeError(f"a source does not compile, which is no lack of tools: {error}") from None
    part.replace(target)
    return target


@dataclasses.dataclass
class Code:
    """Instructions of a kernel, and where its labels are among them."""

    instructions: list[str]
    labels: dict[str, int]


def disassembled(cubin: Path) -> dict[str, Code]:
    """The code of every kernel by its mangled name, without the functions it calls."""
    kernels: dict[str, Code] = {}
    code = None
    for line in _run([tool("nvdisasm"), "-c", str(cubin)]).splitlines():
        if match := re.match(r"\s*\.section\s+\.text\.([^,\s]+?),", line):
            code = kernels.setdefault(match[1], Code([], {}))
        elif line.startswith("$"):
            code = None  # from here on functions that the kernel calls
        elif code is None:
            continue
        elif match := re.match(r"(\.L_x_\d+):", line):
            code.labels[match[1]] = len(code.instructions)
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            code.instructions.append(match[1])
    return kernels


def resources(cubin: Path) -> dict[str, dict[str, int]]:
    """Registers, bytes of local and shared memory and threads of a block, by mangled name."""
    found: dict[str, dict[str, int]] = {}
    name = None
    for line in _run([tool("cuobjdump"), "-res-usage", str(cubin)]).splitlines():
        if match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif name and "REG:" in line:
            numbers = dict(re.findall(r"([A-Z]+):(\d+)", line))
            local = int(numbers["STACK"]) + int(numbers["LOCAL"])
            found[name] = {"registers": int(numbers["REG"]), "local": local, "shared": int(numbers["SHARED"])}
    lines = _run([tool("cuobjdump"), "-elf", str(cubin)]).splitlines()
    for i, line in enumerate(lines):
        if match := re.match(r"\.nv\.info\.(\S+)", line.strip()):
            name = match[1]
        elif "EIATTR_MAX_THREADS" in line and name in found:
            x, y, z = (int(word, 16) for word in lines[i + 2].split()[1:4])
            found[name]["threads"] = x * y * z
    return found


def demangled(names: Sequence[str]) -> list[str]:
    """Names as they are written in C++; as they are where there is no c++filt."""
    if not (filt := shutil.which("c++filt")):
        return list(names)
    text = _run([filt], input="\n".join(names))
    return [re.sub(r"^void ", "", line) for line in text.splitlines()]


def extracted(binary: Path, archs: Sequence[int], folder: Path) -> list[tuple[int, Path]]:
    """The architecture and path of each cubin of an extension or an object file, written into ``folder``."""
    _run([tool("cuobjdump"), "-xelf", "all", str(binary.resolve())], cwd=folder)
    return [(arch, cubin) for arch in archs for cubin in sorted(folder.glob(f"*.sm_{arch}.cubin"))]
