"""What tests compile, for all processes of a run and for later runs: only what has changed is compiled again."""

import fcntl
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def linked(name, units, link):
    """The file that some translation units make.

    Args:
        name: of the folder in ``build``, and of the file.
        units: (source, command that compiles it) each.
        link: command that makes the file of the objects.
    """
    ninja = pytest.importorskip("ninja")
    folder = ROOT / "build" / "tests" / name
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["rule compile", "  command = $compiler -MMD -MF $out.d -c $in -o $out", "  deps = gcc"]
    # Another run may have loaded the old file.
    lines += ["  depfile = $out.d", "rule link", "  command = $linker $in -o $out.new && mv $out.new $out"]
    objects = []
    for source, compiler in units:
        objects.append(f"{Path(source).stem}.o")
        lines.append(f"build {objects[-1]}: compile {os.path.relpath(source, folder)}")
        lines.append(f"  compiler = {' '.join(map(str, compiler))}")
    lines += [f"build {name}: link {' '.join(objects)}", f"  linker = {' '.join(map(str, link))}"]
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        command = [Path(ninja.BIN_DIR) / "ninja", "-C", folder]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout
    return folder / name
