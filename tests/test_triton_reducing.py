"""The Triton kernels of rules that reduce, beside the contract of `test_reducing_engines.py`."""

import importlib.util

import pytest
import torch
from contract import Beside, Engine, normal
from kinds import ALL, OF_EACH_REDUCING, each

from fusedstep.backends import BACKENDS
from fusedstep.cases import REDUCING
from fusedstep.verification import verify

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(autouse=True)
def _interpreted():
    reasons = BACKENDS["triton"].reasons(torch.device("cpu"))
    if reasons:
        pytest.skip("; ".join(reasons))


@each(case=OF_EACH_REDUCING, dtype=[torch.float32, torch.bfloat16])
def test_the_tiles_of_a_gpu_have_the_references_numbers(monkeypatch, case, dtype):
    monkeypatch.setattr("fusedstep.triton_kernels.reducing.is_interpreted", lambda: False)
    generator = torch.Generator().manual_seed(4)
    # Rows that can be accessed 16 bytes at a time and rows that cannot; several strips, several blocks of rows.
    shapes = [(70, 1040), (2, 9, 531)]
    both = Beside(case, Engine("triton interpreted", "triton"), normal(shapes, generator))
    for _ in range(2 if ALL else 1):
        both.step(normal(shapes, generator, (dtype,)))
    both.check()


@pytest.mark.parametrize("case", [REDUCING[1], REDUCING[4]] if ALL else [REDUCING[4]], ids=str)
def test_every_layout_and_dtype_is_close_to_float64(case):
    rows = [row for row in verify([case.optimizer], backend="triton", steps=1).rows if row.case == str(case)]
    assert len(rows) == 4
    assert all(row.ok for row in rows), rows
