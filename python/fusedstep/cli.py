"""The command `fusedstep`: what can run here, whether it is right, how fast it is, and what schedules look like."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from . import backends

NEEDS_RICH = "fusedstep {command} needs {packages}: pip install 'fusedstep[bench]'"


def info() -> dict[str, Any]:
    """Versions, the compiled extension, devices, and which backends can run on them.

    ``backends`` maps a kind of device to its backends, and each of those to the reasons why it cannot run there; it can
    if there are none. ``default`` is the name of the backend that ``backend=None`` takes for fp32 parameters.
    """
    from .bench import results

    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda", torch.cuda.current_device()))
    return {
        "versions": results.versions(),
        "cpu": {"model": results.cpu_model(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count() if len(devices) > 1 else 0)],
        "extension": extension(),
        "backends": {
            device.type: {name: backend.reasons(device) for name, backend in backends.BACKENDS.items()}
            for device in devices
        },
        "choice": _or_error(lambda: backends.check_choice(None)),
        "default": {device.type: _or_error(lambda device=device: _default(device)) for device in devices},
    }


def extension() -> dict[str, Any]:
    """What the compiled extension was built with, and the instruction set that the CPU engine uses."""
    try:
        from . import _C
    except ImportError as error:
        return {"imported": False, "error": str(error)}
    archs = getattr(_C, "cuda_archs", ())
    return {
        "imported": True,
        "cpu_isa": _C.cpu_isa(),
        "cpu_isas": list(_C.cpu_isas()),
        "with_cuda": bool(_C.with_cuda),
        "cuda_archs": list(archs) if _C.with_cuda else [],
    }


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "index": index,
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
    }


def _default(device: torch.device) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that only the reference can run is shown beside it anyway
        return backends.select(backends.check_choice(None), device, torch.float32).name


def _or_error(look_up: Any) -> str:
    """The result of ``look_up``, or why there is none: a bad FUSEDSTEP_BACKEND is a finding, not the end of `info`."""
    try:
        return look_up()
    except (RuntimeError, ValueError) as error:
        return f"none: {error}"


def info_text(found: dict[str, Any]) -> str:
    """The result of `info` for people; plain text, so that it can go into a bug report as it is."""
    cpu, built = found["cpu"], found["extension"]
    lines = [f"{name:<13}{version or 'not installed'}" for name, version in found["versions"].items() if name != "cuda"]
    lines += [
        f"{'torch CUDA':<13}{found['versions']['cuda'] or 'no: torch was built for the CPU alone'}",
        "",
        f"{'CPU':<13}{cpu['model']}, {cpu['cores']} cores, {cpu['threads']} threads",
    ]
    lines += [
        f"{'GPU ' + str(gpu['index']):<13}{gpu['name']}, compute capability {gpu['compute_capability']}, "
        f"{gpu['memory_bytes'] / 2**30:.0f} GiB"
        for gpu in found["gpus"]
    ] or [f"{'GPU':<13}none that torch can use"]
    lines.append("")
    if built["imported"]:
        others = ", ".join(built["cpu_isas"])
        lines.append(
            f"{'CPU engine':<13}compiled; uses instruction set {built['cpu_isa']} (this processor has {others})"
        )
        archs = ", ".join(f"sm_{arch}" for arch in built["cuda_archs"])
        what = f"compiled for {archs or 'unknown GPUs'}" if built["with_cuda"] else "not compiled: there was no nvcc"
        lines.append(f"{'CUDA engine':<13}{what}")
    else:
        lines.append(f"{'extension':<13}cannot be imported: {built['error']}")
    for kind, rows in found["backends"].items():
        lines += ["", f"backends for {kind.upper()} tensors"]
        width = max(map(len, rows))
        for name, reasons in rows.items():
            default = " (default)" if name == found["default"][kind] else ""
            verdict = f"no: {'; '.join(reasons)}" if reasons else f"can run{default}"
            lines.append(f"  {name:<{width}}  {verdict}")
        if found["default"][kind] not in rows:
            lines.append(f"  default: {found['default'][kind]}")
    lines += ["", f"{'choice':<13}{found['choice']} (FUSEDSTEP_BACKEND, fusedstep.use_backend or backend= change it)"]
    return "\n".join(lines)


def kernels() -> list[dict[str, Any]]:
    """The formats that have kernels of their own in the CUDA engine, and the rules that have them.

    ``rules`` and ``with_averages_and_copies`` are lists of strings such as "adam (exp_avg, exp_avg_sq)". Parameters that
    are stored in another way, or whose rule is not in the list, take one general kernel, which is slower.

    Raises:
        ImportError: the extension is not compiled.
    """
    from . import _C

    def described(rules: list[tuple[str, list[str]]]) -> list[str]:
        return [f"{name} ({', '.join(states)})" if states else name for name, states in rules]

    return [
        {"format": name, "rules": described(rules), "with_averages_and_copies": described(followed)}
        for name, rules, followed in _C.cuda_formats()
    ]


def kernels_text(found: list[dict[str, Any]]) -> str:
    """The result of `kernels` for people: weights, gradients and states of one dtype where nothing else is said."""
    every = max((row["rules"] for row in found), key=len)
    width = max(len(row["format"]) for row in found)
    lines = ["Kernels of the CUDA engine; everything else takes a general one, which is slower.", ""]
    for row in found:
        listed = "every rule" if row["rules"] == every else "; ".join(row["rules"])
        lines.append(f"{row['format']:<{width}}  {listed}")
        averaged = row["with_averages_and_copies"]
        if averaged != row["rules"]:
            lines.append(f"{'':<{width}}    with averages and copies: {'; '.join(averaged) or 'the general one'}")
    return "\n".join(lines)


def _info(args: argparse.Namespace) -> int:
    if args.kernels:
        try:
            listed = kernels()
        except ImportError as error:
            print(f"fusedstep info --kernels needs the compiled extension: {error}", file=sys.stderr)
            return 2
        print(json.dumps(listed, indent=1) if args.json else kernels_text(listed))
        return 0
    found = info()
    print(json.dumps(found, indent=1) if args.json else info_text(found))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from . import verification

    return _missing("verify", [] if args.json else ["rich"]) or verification.run(args)


def _bench(args: argparse.Namespace) -> int:
    from .bench import suite

    return _missing("bench", suite.missing_packages(args)) or suite.run(args)


def _schedule(args: argparse.Namespace) -> int:
    from .schedules import picture

    return _missing("schedule", ["matplotlib"] if args.plot else []) or picture.run(args)


def _missing(command: str, packages: Sequence[str]) -> int:
    """2 after a line on standard error if a package is not installed, else 0."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        print(NEEDS_RICH.format(command=command, packages=" and ".join(missing)), file=sys.stderr)
    return 2 if missing else 0


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    from . import __version__, verification
    from .bench import suite
    from .schedules import picture

    parser = argparse.ArgumentParser(prog="fusedstep", description="Fused optimizer steps for PyTorch.")
    parser.add_argument("--version", action="version", version=f"fusedstep {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, about: str, run: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=about, description=about)
        command.set_defaults(run=run)
        return command

    about = "Versions, devices, which backends can run here, and why the others cannot."
    parser_of_info = add("info", about, _info)
    parser_of_info.add_argument("--json", action="store_true", help="print as JSON")
    parser_of_info.add_argument(
        "--kernels",
        action="store_true",
        help="list instead the ways to store parameters that have CUDA kernels of their own, and for which rules",
    )
    about = "Check every optimizer, option, dtype, layout and backend against float64; exit code 1 if one is wrong."
    verification.add_arguments(add("verify", about, _verify))
    about = "Measure the time of a step against torch.optim and installed peers."
    suite.add_arguments(add("bench", about, _bench))
    about = "Print or draw a learning-rate schedule."
    picture.add_arguments(add("schedule", about, _schedule))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the words after the command's name; those of the process if None.

    Returns:
        An exit code: 0, or 1 if something is wrong, or 2 if the command is impossible as given.
    """
    try:
        args = make_parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed its help, or what is wrong
        return stop.code if isinstance(stop.code, int) else 2
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
