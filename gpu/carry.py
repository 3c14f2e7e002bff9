"""Objects that one machine has compiled, for another one without the time: only what differs is compiled there.

    python gpu/carry.py pack FILE.tar.gz      after a build; the file goes along with the sources
    python gpu/carry.py unpack FILE.tar.gz    before a build, in a copy of the tree at any place

Whether an object is still valid is ninja's decision, by times and commands. A copied source has a time of its own: it
gets back the time that it had if its content is what was compiled.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import sys
import sysconfig
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / sysconfig.get_platform()  # as in setup.py
MANIFEST = "sources.json"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pack(file: Path) -> None:
    objects = [path for path in BUILD.iterdir() if path.suffix == ".o" or path.name in (".ninja_log", ".ninja_deps")]
    if not any(path.suffix == ".o" for path in objects):
        raise SystemExit(f"there are no objects in {BUILD}: run make build first")
    sources = {
        str(path.relative_to(ROOT)): (digest(path), path.stat().st_mtime_ns)
        for path in sorted((ROOT / "csrc").rglob("*"))
        if path.is_file()
    }
    times = {path.name: path.stat().st_mtime_ns for path in objects}
    text = json.dumps({"sources": sources, "objects": times}).encode()
    with tarfile.open(file, "w:gz") as tar:
        about = tarfile.TarInfo(MANIFEST)
        about.size = len(text)
        tar.addfile(about, io.BytesIO(text))
        for path in sorted(objects):
            tar.add(path, path.name)
    print(f"{len(objects)} files, {file.stat().st_size / 2**20:.1f} MiB")


def unpack(file: Path) -> None:
    BUILD.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file) as tar:
        manifest = json.loads(tar.extractfile(MANIFEST).read())
        for name, time in manifest["objects"].items():
            (BUILD / name).write_bytes(tar.extractfile(name).read())
            os.utime(BUILD / name, ns=(time, time))
    same = 0
    for name, (expected, time) in manifest["sources"].items():
        path = ROOT / name
        if path.is_file() and digest(path) == expected:
            os.utime(path, ns=(time, time))
            same += 1
    print(f"{len(manifest['objects'])} files; {same} of {len(manifest['sources'])} sources are as they were compiled")


def main() -> int:
    parser = argparse.ArgumentParser(description="Take compiled objects to another machine.")
    parser.add_argument("action", choices=("pack", "unpack"))
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    (pack if args.action == "pack" else unpack)(args.file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
