"""What ptxas has made of the Triton kernels' main loops, measured by bench/machine_code.py."""

import base64
import importlib.util

import pytest
from test_machine_code import ROOT, load
from triton_code import code_of, updates

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

FACTORED = ("fp32", "fp32", "fp32", "fp32", "", "", "", "")
# One round of the main loop, for one thread: elements, bytes read and written by 16-byte accesses; and how many
# instructions an element may take, a tenth more than Triton 3.9 makes of it.
STEPS = {
    "fp32": (updates("adam", ("fp32",) * 4 + ("",), machine_code=True), [(8, 128, 96, 42.5)]),
    "bf16": (updates("adam", ("bf16",) * 4 + ("",), machine_code=True), [(8, 64, 48, 71.0)]),
    "bf16 states": (updates("adam", ("fp32", "fp32", "bf16", "bf16", ""), machine_code=True), [(8, 96, 64, 61.0)]),
    "8 bits": (updates("adam", ("bf16", "bf16", "i8", "u8", ""), machine_code=True), [(8, 32, 16, 96.0)]),
    "factors, fp32": (
        updates("torch_adafactor", FACTORED, machine_code=True),
        [(16, 128, 0, 12.6), (16, 64, 0, 10.4), (8, 64, 32, 13.9)],
    ),
    "factors, bf16": (
        updates("torch_adafactor", [name.replace("fp32", "bf16") for name in FACTORED], machine_code=True),
        [(16, 64, 0, 14.8), (16, 32, 0, 11.6), (8, 32, 16, 23.4)],
    ),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """For each of the steps what the tool says of its kernels."""
    machine_code = load(ROOT / "bench" / "machine_code.py")
    cubin = tmp_path_factory.mktemp("cubins") / "kernel.cubin"
    found = {}
    for name, launches in zip(STEPS, code_of([kernel for kernel, _ in STEPS.values()]), strict=True):
        found[name] = []
        for launch in launches:
            cubin.write_bytes(base64.b64decode(launch["cubin"]))
            try:
                found[name] += machine_code.kernels_of(cubin, 90)
            except machine_code.cubins.ToolError as error:
                pytest.skip(str(error))
    return found


@pytest.mark.parametrize("name", STEPS)
def test_main_loops_are_wide_and_short(measured, name):
    for kernel, (elements, read, written, limit) in zip(measured[name], STEPS[name][1], strict=True):
        assert (kernel.read, kernel.written, kernel.local_accesses) == (read, written, 0), kernel
        assert kernel.ahead == read, kernel  # all loads before the first use of any
        assert kernel.instructions / elements <= limit, kernel
