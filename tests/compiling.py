"""What tests make of files, for all processes of a run and for later runs: made again only where a file has changed."""

import contextlib
import fcntl
import hashlib
import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def locked(name):
    """A folder in ``build``, which one process at a time may change."""
    folder = ROOT / "build" / "tests" / name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def remembered(name, inputs, make):
    """What ``make()`` returns, made again where the contents of ``inputs`` are not those it was last made of.

    Args:
        name: of the folder in ``build``.
        inputs: paths of all files that the result depends on.
        make: returns what JSON can hold.
    """
    with locked(name) as folder:
        digest = hashlib.sha256()
        for path in inputs:
            digest.update(hashlib.sha256(Path(path).read_bytes()).digest())
        kept = folder / f"{digest.hexdigest()}.json"
        if not kept.exists():
            part = folder / "part"
            part.write_text(json.dumps(make()))
            for old in folder.glob("*.json"):
                old.unlink()
            part.replace(kept)
        return json.loads(kept.read_text())


def linked(name, units, link):
    """The file that some translation units make.

    Args:
        name: of the folder in ``build``, and of the file.
        units: (source, command that compiles it) each.
        link: command that makes the file of the objects.
    """
    ninja = pytest.importorskip("ninja")
    lines = ["rule compile", "  command = $compiler -MMD -MF $out.d -c $in -o $out", "  deps = gcc"]
    # Another run may have loaded the old file.
    lines += ["  depfile = $out.d", "rule link", "  command = $linker $in -o $out.new && mv $out.new $out"]
    with locked(name) as folder:
        objects = []
        for source, compiler in units:
            objects.append(f"{Path(source).stem}.o")
            lines.append(f"build {objects[-1]}: compile {os.path.relpath(source, folder)}")
            lines.append(f"  compiler = {' '.join(map(str, compiler))}")
        lines += [f"build {name}: link {' '.join(objects)}", f"  linker = {' '.join(map(str, link))}"]
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        command = [Path(ninja.BIN_DIR) / "ninja", "-C", folder]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout
        return folder / name
