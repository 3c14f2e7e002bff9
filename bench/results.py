"""Results files: what is in them, where they lie, and facts about the machine that wrote them."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import fusedstep

from .timing import cache_bytes

SCHEMA = 1
DEFAULT_FOLDER = Path("bench", "results")


def device_facts(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on: model, cores, caches, memory (bytes)."""
    from fusedstep import _C  # the command line can say what is wrong with the extension only if it starts without

    facts: dict[str, Any] = {
        "type": device.type,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),  # torch's
        "cpu_isa": _C.cpu_isa(),
        "cache_bytes": cache_bytes(device),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "compute_capability": f"{properties.major}.{properties.minor}",
        }
    elif hasattr(os, "sysconf"):
        facts["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return facts


def cpu_model() -> str:
    """The processor's name as the system gives it; where a virtual machine hides which one, with family and model."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    fields = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+?)\s*$", text, re.MULTILINE))
    name = fields.get("model name") or platform.processor() or platform.machine()
    if re.search(r"\d", name.partition("@")[0]) or "model" not in fields:
        return name
    return f"{name} (family {fields['cpu family']}, model {fields['model']})"


def versions() -> dict[str, str | None]:
    """Of everything that takes part; None for what is not installed."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "fusedstep": fusedstep.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    for name in ("numpy", "triton"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def git_state() -> dict[str, Any]:
    """The commit of the source tree that this file belongs to, and whether the tree differs from it.

    Both are None where this file is not under version control, as in an installed package.
    """

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
        try:
            result = subprocess.run(command, capture_output=True, text=True)
        except OSError:
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return {"commit": None, "dirty": None}
    # Results that lie in the tree but are not committed yet do not change what was measured.
    changes = git("status", "--porcelain", "--", ":/", ":(exclude)results")
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changes)}


def header(device: torch.device, command: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Everything in a results file but its rows."""
    return {
        "schema": SCHEMA,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "settings": settings,
        "device": device_facts(device),
        "versions": versions(),
        "git": git_state(),
    }


def file_name(results: dict[str, Any]) -> str:
    """Like ``cpu-amd-epyc-all-2026-01-31.json``: device, model, optimizers, day (UTC)."""
    device, settings = results["device"], results["settings"]
    model = device.get("gpu", device["cpu"]).lower()
    model = re.sub(r"\(r\)|\(tm\)|@\s*\S+|\b\d+-core\b|\bprocessor\b|\bcpu\b", " ", model)
    optimizers = "all" if settings["all_optimizers"] else "-".join(settings["optimizers"])
    if settings["precision"]:
        optimizers = "precision"
    parts = (device["type"], model, optimizers, "quick" if settings["quick"] else "", results["created"][:10])
    return "-".join(filter(None, (re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in parts))) + ".json"


def save(results: dict[str, Any], folder: Path) -> Path:
    """Write a results file into ``folder``, which is created; an older one of the same name is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(results)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    unfinished.replace(path)
    return path


def resume(results: dict[str, Any], path: Path) -> None:
    """Take over the rows, and the time of the beginning, of a run that was stopped.

    Raises:
        ValueError: the file is no results file, or is that of another run.
    """
    before = load(path)
    for key in ("command", "device", "versions", "git"):
        if before[key] != results[key]:
            raise ValueError(
                f"{path} cannot be resumed: its {key} is {before[key]}, that of this run is {results[key]}"
            )
    results |= {"rows": before["rows"], "created": before["created"]}


def load(path: Path) -> dict[str, Any]:
    """Read a results file.

    Raises:
        ValueError: it is not one, or of another schema.
    """
    try:
        results = json.loads(path.read_text())
        schema = results["schema"]
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"{path} is not a results file of `fusedstep bench`: {error}") from error
    if schema != SCHEMA:
        raise ValueError(f"{path} has schema {schema}, this version reads {SCHEMA}")
    return results


def describe(results: dict[str, Any]) -> str:
    """One line: what was measured on, with which versions."""
    device, version = results["device"], results["versions"]
    code = f", {device['instruction_set']}" if device.get("instruction_set") else ""
    name = device.get("gpu") or f"{device['cpu']} ({device['threads']} of {device['cores']} cores{code})"
    commit = results["git"]["commit"]
    parts = [name, f"torch {version['torch']}", f"fusedstep {version['fusedstep']}"]
    if commit:
        parts.append(f"commit {commit[:10]}{' with changes' if results['git']['dirty'] else ''}")
    return ", ".join([*parts, results["created"][:10]])
