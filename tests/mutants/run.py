"""Puts each of the seeded faults into a copy of the tree, and runs the tests that must notice it: ``make mutants``.

A fault that no test notices is an error, and so is one whose text is not found exactly once, that does not compile, or
that keeps the tests from being collected. Before the first fault the same tests must pass without one. C++ is compiled
for one instruction set and hardly optimised, and only what a fault has changed.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from faults import GROUPS, Fault

ROOT = Path(__file__).resolve().parent.parent.parent
WORK = ROOT / "build" / "mutants"
TABLE = Path(__file__).with_name("caught.md")
SECONDS = 1800  # that the tests of a fault may take


def copy_of_the_tree(to: Path) -> None:
    to.mkdir(parents=True, exist_ok=True)
    for old in to.iterdir():
        if old.name != "build":  # objects of files that have not changed since are taken again
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        source, target = ROOT / name, to / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    for name, place in (("bench", "../../bench"), ("triton_kernels", "../../triton_kernels")):
        link = to / "python" / "fusedstep" / name
        if not link.exists():
            link.symlink_to(place)


def build_extension(tree: Path) -> str:
    """Compile what has changed, without CUDA; returns what the compiler says if it fails."""
    import ninja

    spec = importlib.util.spec_from_file_location(f"setup_{tree.name}", tree / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    native = ["-march=x86-64-v3"] if setup.is_x86() else []
    setup.is_x86 = lambda machine=None: False  # one instruction set, by the compiler's flags
    setup.CXX_FLAGS = [*(flag for flag in setup.CXX_FLAGS if flag != "-O3"), "-O1", *native]
    cxx = setup.find_cxx(os.environ)
    manifest = setup.BUILD / sys.implementation.cache_tag / "build.ninja"
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(setup.ninja_file(setup.compile_steps(cxx, None, {}), [*cxx, "-shared", "-fopenmp"]))
    command = [Path(ninja.BIN_DIR) / "ninja", "-C", setup.BUILD, "-f", manifest.relative_to(setup.BUILD), "-j", "2"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode == 0:
        shutil.copy2(setup.BUILD / setup.EXTENSION, tree / "python" / "fusedstep" / "_C.so")
    return "" if done.returncode == 0 else done.stdout


def run_tests(tree: Path, tests: list[str], *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not gpu", "--tb=no"]
    environ = {**os.environ, "PYTHONPATH": str(tree / "python")}
    return subprocess.run(
        [*command, *options, *tests],
        cwd=tree,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )


def check_texts() -> None:
    for fault in (fault for group in GROUPS.values() for fault in group):
        count = (ROOT / fault.file).read_text().count(fault.old)
        if count != 1:
            sys.exit(f"{fault.file}: the text of the fault '{fault.what}' is found {count} times, expected once")


def judge(clean: Path, fault: Fault) -> tuple[bool, str]:
    """Whether a test notices the fault, and which one; or what went wrong."""
    tree = WORK / f"faulty-{threading.get_ident()}"
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(clean, tree, symlinks=True)
    try:
        place = tree / fault.file
        place.write_text(place.read_text().replace(fault.old, fault.new))
        if fault.file.startswith("csrc") and (error := build_extension(tree)):
            return False, "does not compile: " + error[-1000:]
        try:
            done = run_tests(tree, fault.tests.split())
        except subprocess.TimeoutExpired:
            return False, f"the tests took more than {SECONDS} s"
        if done.returncode == 0:
            return False, "SURVIVED"
        if done.returncode < 0:  # memory was spoilt, or the undefined-behaviour checks of the CUDA source trap
            found = re.search(r'File "[^"]*/(tests/test_\w+\.py)", line \d+ in (test_\w+)', done.stdout)
            return found is not None, f"{found[1]}::{found[2]} (it kills the process)" if found else done.stdout[-1000:]
        found = re.search(r"^FAILED (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
        if done.returncode != 1 or found is None:
            return False, f"pytest ends with {done.returncode}: {done.stdout[-1000:]}"
        return True, found[1]
    finally:
        shutil.rmtree(tree, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("-k", default="", metavar="REGEX", help="only the faults in whose name or file this is found")
    parser.add_argument("--no-baseline", action="store_true", help="believe that the tests pass without a fault")
    args = parser.parse_args()
    check_texts()
    chosen = [f for group in GROUPS.values() for f in group if re.search(args.k, f"{f.file}: {f.what}")]

    begun = time.monotonic()
    clean = WORK / "clean"
    copy_of_the_tree(clean)
    if error := build_extension(clean):
        sys.exit(error)
    tests = sorted({test for fault in chosen for test in fault.tests.split()})
    if not args.no_baseline:
        done = run_tests(clean, tests, "-n", str(args.workers))
        print(done.stdout.strip().splitlines()[-1], flush=True)
        if done.returncode != 0:
            print(done.stdout[-3000:])
            return 1
    else:
        # Builds the libraries of the CUDA source.
        some = (
            "test_cuda_host.py::test_every_element_is_dealt_out_once_beyond_32_bits",
            "test_reducing_engines.py::test_the_kernels_themselves_skip_and_count_nothing",
        )
        run_tests(clean, [f"tests/{name}" for name in some])

    def judged(fault: Fault) -> tuple[bool, str]:
        start = time.monotonic()
        caught, by = judge(clean, fault)
        seconds = time.monotonic() - start
        print(
            f"{'caught' if caught else 'NOT CAUGHT':<10} {seconds:4.0f} s  {fault.file}: {fault.what}\n    {by}",
            flush=True,
        )
        return caught, by

    noticed_by = table_rows()
    results = {}
    with ThreadPoolExecutor(args.workers) as pool:
        for fault, (caught, by) in zip(chosen, pool.map(judged, chosen), strict=True):
            results[fault] = caught, by
            noticed_by[fault.what, fault.file] = f"`{by.removeprefix('tests/')}`" if caught else "**nothing**"
            write_table(noticed_by)  # a run that is stopped keeps what it has seen
    missed = [fault for fault, (caught, _) in results.items() if not caught]
    minutes = (time.monotonic() - begun) / 60
    print(f"{len(chosen) - len(missed)} of {len(chosen)} faults are noticed ({minutes:.0f} min)")
    for fault in missed:
        print(f"NOT CAUGHT: {fault.file}: {fault.what}: {results[fault][1]}")
    return bool(missed)


def table_rows() -> dict[tuple[str, str], str]:
    """What the table says of each fault, by its name and file."""
    rows = re.findall(r"^\| (.+) \| `(.+)` \| (.+) \|$", TABLE.read_text(), re.MULTILINE)
    return {(what, file): by for what, file, by in rows}


def write_table(noticed_by: dict[tuple[str, str], str]) -> None:
    lines = [
        "# Seeded faults, and the first test that notices each",
        "",
        "Written by `make mutants`: each in its last run.",
        "",
    ]
    for title, group in GROUPS.items():
        lines += [f"## {title}", "", "| fault | in | noticed by |", "|---|---|---|"]
        lines += [f"| {f.what} | `{f.file}` | {noticed_by.get((f.what, f.file), 'not run yet')} |" for f in group]
        lines.append("")
    TABLE.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    sys.exit(main())
