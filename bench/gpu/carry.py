"""Objects that one machine has compiled, for another one without the time: only what differs is compiled there.

    python bench/gpu/carry.py pack FILE.tar.gz      after a build; the file goes along with the sources
    python bench/gpu/carry.py unpack FILE.tar.gz    before a build, in a copy of the tree at any place, for any Python

setup.py takes such an object if its command and the contents of all that went into it are the same: times do not count.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / sysconfig.get_platform()  # as in setup.py, and so are these names
CARRIED, LIST = "carried", "objects.json"


def inputs(manifest: Path) -> dict[str, list[str]]:
    """The files of this tree, from `BUILD`, that went into each object; a toolkit's own say its version."""
    import ninja

    command = [Path(ninja.BIN_DIR) / "ninja", "-C", BUILD, "-f", manifest.relative_to(BUILD), "-t", "deps"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, list[str]] = {}
    listed: list[str] | None = None  # None: of an object that has changed since
    for line in told.splitlines():
        if line.startswith("    "):
            if listed is not None and not os.path.isabs(line.strip()):
                listed.append(line.strip())
        elif line:
            name, _, state = line.partition(": ")
            listed = found.setdefault(name, []) if state.endswith("(VALID)") else None
    return found


def pack(file: Path) -> None:
    manifests = sorted(BUILD.glob("*/build.ninja"), key=lambda path: path.stat().st_mtime)
    if not manifests:
        raise SystemExit(f"there are no objects in {BUILD}: run make build first")
    text = manifests[-1].read_text()
    commands = dict(re.findall(r"^build (\S+): compile .*\n  words = (.*)$", text, re.MULTILINE))
    listed = {}
    for name, paths in inputs(manifests[-1]).items():
        if name in commands and "/" not in name:  # others are of one Python
            for path in paths:
                if (BUILD / path).stat().st_mtime_ns > (BUILD / name).stat().st_mtime_ns:
                    raise SystemExit(f"{name} is older than {path}: run make build first")
            digests = {path: hashlib.sha256((BUILD / path).read_bytes()).hexdigest() for path in paths}
            listed[name] = {"command": commands[name].replace("$$", "$"), "inputs": digests}
    with tarfile.open(file, "w:gz") as tar:
        content = json.dumps(listed).encode()
        about = tarfile.TarInfo(LIST)
        about.size = len(content)
        tar.addfile(about, io.BytesIO(content))
        for name in sorted(listed):
            tar.add(BUILD / name, name)
    print(f"{len(listed)} objects, {file.stat().st_size / 2**20:.1f} MiB")


def unpack(file: Path) -> None:
    folder = BUILD / CARRIED
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file) as tar:
        tar.extractall(folder, filter="data")
    print(f"{len(list(folder.glob('*.o')))} objects")


def main() -> int:
    parser = argparse.ArgumentParser(description="Take compiled objects to another machine.")
    parser.add_argument("action", choices=("pack", "unpack"))
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    (pack if args.action == "pack" else unpack)(args.file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
