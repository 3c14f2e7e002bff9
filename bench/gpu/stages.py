"""The stages of `make gpu`: what can be found out in a few minutes on a GPU, the most valuable first.

    python bench/gpu/stages.py [--out FOLDER] [--dry] [STAGE ...]

Each stage runs under a time limit of its own and leaves its log, and its results as they come, in the folder: a stage
that is stopped loses nothing, and the next one runs. `--dry` walks through all of them without a GPU, with the CPU
engine in its place: it finds the mistakes of stages and tests, not those of kernels.

Only the standard library is used here. Without network: nothing is installed but the package itself.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv" / "bin" / "python"
LOG_BYTES = 300_000  # of a log; what is in the middle of a longer one is left out
ARCHIVE_SECONDS = 15.0  # how often the archive is renewed while a stage runs
DRY_PATIENCE = 10  # how many times its limit a stage may take where a CPU does the work

# The goal for one large tensor, as a share of a copy's speed on the same device: single kernels reach it on an H200.
GOAL_SHARE = 0.97


@dataclass(frozen=True)
class Run:
    """Where results go, and whether there is a GPU."""

    out: Path
    dry: bool
    archive: Path
    python: str  # to make the environment from
    carried: Path | None  # objects that another machine has compiled

    def result(self, name: str) -> Path:
        return self.out / name


@dataclass(frozen=True)
class Command:
    words: list[str]
    environ: dict[str, str]


@dataclass(frozen=True)
class Stage:
    """``commands`` gives what to run, one after the other; a text instead: why nothing is to be run."""

    name: str
    seconds: int
    about: str
    commands: Callable[[Run], list[Command] | str]


def _build(run: Run) -> list[Command]:
    environ = {}
    if not run.dry:
        environ["FUSEDSTEP_CUDA"] = "1"
        if not os.environ.get("FUSEDSTEP_CUDA_ARCHS"):
            environ["FUSEDSTEP_CUDA_ARCHS"] = local_architecture()
        nvcc = tool("nvcc")
        if nvcc and not shutil.which("nvcc") and not os.environ.get("CUDACXX"):
            environ["CUDACXX"] = nvcc
    # Not "make build", which asks the network for what is missing.
    build = Command(["make", f"PYTHON={run.python}", ".venv/.built-stamp"], environ)
    info = Command([str(PYTHON), "-m", "fusedstep.cli", "info"], {})
    if run.carried is None:
        return [build, info]
    return [Command([run.python, "bench/gpu/carry.py", "unpack", str(run.carried)], {}), build, info]


def local_architecture() -> str:
    """The first GPU's compute capability, like "9.0"; GPUs of several kinds need FUSEDSTEP_CUDA_ARCHS."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        told = []
    return told[0] if told else ""  # setup.py then compiles for all


def _first(run: Run) -> list[Command]:
    words = [str(PYTHON), "bench/gpu/first.py", str(run.result("first.jsonl"))]
    return [Command([*words, *(["--dry", "--seconds", "20"] if run.dry else ["--seconds", "90"])], {})]


def _tests(run: Run, name: str, marked: str) -> list[Command]:
    files = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").glob("test_*.py"))]
    files = [file for file in files if "pytest.mark.gpu" in (ROOT / file).read_text()]
    if run.dry and name == "triton":
        files = ["tests/test_accumulate.py"]  # where the CPU stands for both engines, all would run twice
    words = [
        str(PYTHON),
        "-m",
        "pytest",
        "-q",
        "--tb=short",
        "-m",
        marked,
        "-p",
        "no:benchmark",
        "-p",
        "no:cacheprovider",
    ]
    words += ["--junitxml", str(run.result(f"{name}.xml"))]
    if has_module("pytest_timeout"):
        words += ["--timeout", "60"]
    if has_module("xdist"):
        words += ["-n", str(min(15, os.cpu_count() or 1)), "--dist", "load"]
    environ = {"FUSEDSTEP_TEST_RESULTS": str(run.result(f"{name}.jsonl")), "OMP_NUM_THREADS": "1"}
    environ["FUSEDSTEP_GPU_DRY" if run.dry else "FUSEDSTEP_REQUIRE_GPU"] = "1"
    environ["PYTHONDONTWRITEBYTECODE"] = "1"
    return [Command([*words, *files], environ)]


@functools.cache
def has_module(name: str) -> bool:
    """Whether the environment of the tests has a module."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is None)"
    return subprocess.run([PYTHON, "-c", code]).returncode == 0


def tool(name: str, *folders: str) -> str | None:
    """The path of a program of the CUDA toolkit."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    if nvcc:
        homes.append(str(Path(nvcc).resolve().parents[1]))
    places = [os.path.join(home, folder) for home in filter(None, homes) for folder in ("bin", *folders)]
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *places]))


def _memcheck(run: Run) -> list[Command] | str:
    script = [str(PYTHON), "bench/gpu/kernels.py"]
    if run.dry:
        return [Command([*script, "--dry"], {}), Command([*script, "--race", "--dry"], {})]
    sanitizer = tool("compute-sanitizer", "compute-sanitizer")
    if sanitizer is None:
        return "compute-sanitizer is not installed"
    # It sees the bounds of each tensor only if each is an allocation of its own.
    environ = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    check = [sanitizer, "--error-exitcode", "1", "--print-limit", "20", "--kernel-name", "kernel_substring=fusedstep"]
    return [
        Command([*check, "--tool", "memcheck", *script, "--seconds", "70"], environ),
        Command([*check, "--tool", "racecheck", *script, "--race", "--seconds", "25"], environ),
    ]


def _bench(run: Run) -> list[Command]:
    words = [str(PYTHON), "-m", "fusedstep.cli", "bench", "--output", str(run.result("bench"))]
    words += (
        ["--device", "cpu", "--quick", "--optimizer", "SGD", "--case", "1000x16"] if run.dry else ["--device", "cuda"]
    )
    for path in sorted(run.result("bench").glob("*.json")):
        found = json.loads(path.read_text())
        if found.get("configurations_left") and found["git"]["commit"] == commit():
            return [Command([*words, "--resume", str(path)], {})]
    return [Command(words, {})]


def commit() -> str | None:
    """This tree's commit, as the benchmark writes it down."""
    try:
        told = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return told.stdout.strip() or None


def _profile(run: Run) -> list[Command] | str:
    script = [str(PYTHON), "bench/gpu/profiled.py"]
    if run.dry:
        return [Command([*script, "--dry"], {})]
    ncu = tool("ncu")
    if ncu is None:
        return "ncu is not installed"
    sections = (
        "SpeedOfLight",
        "LaunchStats",
        "Occupancy",
        "WarpStateStats",
        "SchedulerStats",
        "MemoryWorkloadAnalysis",
    )
    words = [ncu, "--profile-from-start", "off", "--clock-control", "none"]
    words += [word for section in sections for word in ("--section", section)]
    return [Command([*words, *script], {})]


STAGES = (
    Stage("build", 110, "build for the local architecture", _build),
    Stage("first", 105, "main numbers", _first),
    Stage("cuda", 90, "tests of the CUDA engine", lambda run: _tests(run, "cuda", "gpu and not triton_engine")),
    Stage("triton", 100, "tests of Triton", lambda run: _tests(run, "triton", "gpu and triton_engine")),
    Stage("memcheck", 110, "compute-sanitizer", _memcheck),
    Stage("bench", 140, "benchmark", _bench),
    Stage("profile", 60, "ncu", _profile),
)


def execute(stage: Stage, run: Run) -> dict[str, object]:
    """Run a stage; what came of it."""
    for file in (f"{stage.name}.jsonl", f"{stage.name}.xml"):
        run.result(file).unlink(missing_ok=True)
    start = time.monotonic()
    commands = stage.commands(run)
    if isinstance(commands, str):
        return {"stage": stage.name, "outcome": "not run", "why": commands, "seconds": 0.0}
    outcome, why = "passed", None
    path = run.result(f"{stage.name}.log")
    with path.open("wb") as log:
        for command in commands:
            log.write(f"$ {' '.join(command.words)}\n".encode())
            log.flush()
            limit = stage.seconds * (DRY_PATIENCE if run.dry else 1)
            status = call(command, log, start + limit, run)
            if status is None:
                outcome, why = "stopped", f"at its limit of {limit} s"
                break
            if status != 0:
                outcome, why = "failed", f"exit status {status}"
                if stage.name == "build":
                    break
    shorten(path)
    return {"stage": stage.name, "outcome": outcome, "why": why, "seconds": round(time.monotonic() - start, 1)}


def call(command: Command, log, deadline: float, run: Run) -> int | None:
    """The exit status of a command; None if it had to be stopped."""
    environ = {**os.environ, "PYTHONUNBUFFERED": "1", **command.environ}
    # In the background of a shell SIGINT is ignored, which a process would hand down to what it starts.
    process = subprocess.Popen(
        command.words, cwd=ROOT, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        renew = time.monotonic() + ARCHIVE_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            try:
                return process.wait(min(left, 1.0))
            except subprocess.TimeoutExpired:
                if time.monotonic() > renew:
                    archive(run)
                    renew = time.monotonic() + ARCHIVE_SECONDS
        return None
    finally:
        # Whatever it started goes with it, in the first moment with the chance to write its results.
        for sent, grace in ((signal.SIGINT, 3.0), (signal.SIGKILL, 5.0)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, sent)
            if process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(grace)


def shorten(path: Path) -> None:
    """Keep the beginning and the end of a long log."""
    text = path.read_bytes()
    if len(text) > LOG_BYTES:
        third = LOG_BYTES // 3
        path.write_bytes(text[:third] + b"\n... left out ...\n" + text[-2 * third :])


def archive(run: Run) -> None:
    """All results so far in one file."""
    unfinished = run.archive.with_suffix(".part")
    with tarfile.open(unfinished, "w:gz") as tar:
        for path in sorted(run.out.rglob("*")):
            if path.is_file() and path not in (run.archive, unfinished):
                tar.add(path, path.relative_to(run.out))
    unfinished.replace(run.archive)


# The report


def rows(path: Path) -> Iterator[dict]:
    """The JSON lines of a file, without one that was not finished."""
    if path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                yield json.loads(line)


def report(run: Run) -> list[str]:
    """At most 20 lines: what passed, what failed, what was not run, and the numbers beside the goals."""
    last = {row["stage"]: row for row in rows(run.result("stages.jsonl"))}
    lines = []
    for stage in STAGES:
        row = last.get(stage.name, {"outcome": "not run", "why": None, "seconds": 0.0})
        why = f" ({row['why']})" if row["why"] else ""
        lines.append(f"{stage.name:9} {row['outcome']}{why}, {row['seconds']:.0f} s{_counts(run, stage.name)}")
    tests = [row for name in ("cuda", "triton") for row in rows(run.result(f"{name}.jsonl"))]
    failed = [row["test"] for row in tests if row["outcome"] == "failed"]
    lines += [f"FAILED {test}" for test in failed[:3]]
    if len(failed) > 3:
        lines.append(f"and {len(failed) - 3} more")
    lines += _numbers(list(rows(run.result("first.jsonl"))))
    return lines[:20]


def _counts(run: Run, name: str) -> str:
    if name in ("cuda", "triton"):
        outcomes = [row["outcome"] for row in rows(run.result(f"{name}.jsonl"))]
        return "".join(f", {outcomes.count(kind)} {kind}" for kind in ("passed", "failed", "skipped"))
    if name == "bench":
        for path in run.result("bench").glob("*.json"):
            found = json.loads(path.read_text())
            return f", {len(found['rows'])} rows, {found.get('configurations_left', 0)} configurations left"
    return ""


def _numbers(found: list[dict]) -> list[str]:
    """The main numbers of the first rows: ours beside torch's, and their share of a copy's speed."""
    lines = []
    by_case: dict[str, dict[str, dict]] = {}
    for row in found:
        if "ms" in row:
            by_case.setdefault(row["case"], {})[row["contender"]] = row
    for case, contenders in by_case.items():
        parts = []
        for name, row in contenders.items():
            share = f" ({row['copy_share']:.0%})" if row.get("copy_share") else ""
            parts.append(f"{name} {row['ms']:.3g}{share}")
        goal = f", goal {GOAL_SHARE:.0%} of copy" if any(r.get("goal") for r in contenders.values()) else ""
        lines.append(f"{case}, ms: {'; '.join(parts)}{goal}")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The stages of make gpu.")
    parser.add_argument(
        "stages", nargs="*", metavar="STAGE", help=f"{', '.join(s.name for s in STAGES)} (default: all)"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder of logs and results")
    parser.add_argument("--archive", type=Path, help="one file with all of them (default: gpu.tar.gz in that folder)")
    parser.add_argument("--python", default=sys.executable, help="to make the environment from (default: this one)")
    parser.add_argument("--carried", type=Path, help="a file of bench/gpu/carry.py")
    parser.add_argument("--dry", action="store_true", help="without a GPU, with the CPU engine in its place")
    args = parser.parse_args(argv)
    unknown = [name for name in args.stages if name not in {stage.name for stage in STAGES}]
    if unknown:
        parser.error(f"there is no stage {unknown[0]!r}; there are {', '.join(stage.name for stage in STAGES)}")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    run = Run(out, args.dry, (args.archive or out / "gpu.tar.gz").resolve(), args.python, args.carried)
    failed = False
    if not args.stages:
        run.result("stages.jsonl").unlink(missing_ok=True)
    for stage in STAGES:
        if args.stages and stage.name not in args.stages:
            continue
        print(f"=== {stage.name}: {stage.about}, at most {stage.seconds} s", flush=True)
        row = execute(stage, run)
        with run.result("stages.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        failed |= row["outcome"] == "failed" or (row["outcome"] == "stopped" and stage.name != "bench")
        run.result("summary.txt").write_text("\n".join(report(run)) + "\n")
        archive(run)
        print(f"    {row['outcome']} after {row['seconds']} s", flush=True)
        if stage.name == "build" and row["outcome"] != "passed":
            print(run.result("build.log").read_text()[-3000:])
            break
    print("\n".join(report(run)))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
