"""Memory: nothing outside of the tensors is written, wherever they begin, and offsets above 2^31 are right."""

import os

import pytest
import torch
from kinds import IN_ENGINES, each, parametrize_cases
from support import ours

from fusedstep import _C
from fusedstep.cases import CASES
from fusedstep.record import Record, Step
from fusedstep.verification import same_bits

SIZES = [*range(40), 255, 256, 257, 1023, 1024, 1025, 65_537]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SENTINEL = -7.0
MARGIN = 70  # elements around each tensor: more than the widest pack


class Fenced:
    """Tensors of all sizes inside one buffer of sentinels, each at ``offset`` elements from an aligned address."""

    def __init__(self, dtype, offset, sizes):
        self.buffer = torch.full((sum(sizes) + (2 * MARGIN + 64) * (len(sizes) + 1),), SENTINEL, dtype=dtype)
        self.inside = torch.zeros(self.buffer.shape, dtype=torch.bool)
        self.tensors = []
        start = MARGIN
        for size in sizes:
            start += (-start) % 64 + offset
            self.tensors.append(self.buffer[start : start + size])
            self.inside[start : start + size] = True
            start += size + MARGIN

    def check(self):
        outside = self.buffer[~self.inside]
        assert bool((outside == SENTINEL).all()), f"{(outside != SENTINEL).sum().item()} written outside"

    def fill(self, values):
        for tensor, value in zip(self.tensors, values, strict=True):
            tensor.copy_(value)


def normals(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator).to(dtype) for size in SIZES]


@pytest.fixture(params=_C.cpu_isas())
def isa(request):
    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(before)


def fenced_training(case, dtype, offset, grad_dtype, state_dtype):
    """Parameters, gradients and states all lie between sentinels; compared with the reference on plain tensors."""
    params, grads = Fenced(dtype, offset, SIZES), Fenced(grad_dtype, offset, SIZES)
    values = normals(dtype, 1)
    params.fill(values)
    mine = ours(case, [torch.nn.Parameter(t) for t in params.tensors], "cpu")
    expected = ours(case, [torch.nn.Parameter(v.clone()) for v in values], "reference")
    names = mine.states_of(mine.param_groups[0])
    states = [Fenced(state_dtype, offset, SIZES) for _ in names]
    for name, fenced in zip(names, states, strict=True):
        fenced.fill([torch.zeros(size) for size in SIZES])
        for index, size in enumerate(SIZES):
            mine.state[mine.param_groups[0]["params"][index]][name] = fenced.tensors[index]
            expected.state[expected.param_groups[0]["params"][index]][name] = torch.zeros(size, dtype=state_dtype)
    for seed in (2, 3):
        grads.fill(normals(grad_dtype, seed))
        kept = grads.buffer.clone()
        for optimizer in (mine, expected):
            for param, grad in zip(optimizer.param_groups[0]["params"], grads.tensors, strict=True):
                param.grad_dtype = None
                param.grad = grad
        mine.step()
        expected.step()
        assert torch.equal(grads.buffer, kept)
        for fenced in (params, *states):
            fenced.check()
    for a, b in zip(*(o.param_groups[0]["params"] for o in (mine, expected)), strict=True):
        assert same_bits(a.detach(), b.detach())
        for name in names:
            assert same_bits(mine.state[a][name], expected.state[b][name])
    for index, param in enumerate(mine.param_groups[0]["params"]):
        assert param.data_ptr() == params.tensors[index].data_ptr()


@each(case=IN_ENGINES, dtype=DTYPES, offset=[0, 1, 3])
def test_nothing_outside_is_written(case, dtype, offset):
    fenced_training(case, dtype, offset, dtype, dtype)


@parametrize_cases(IN_ENGINES[3:], CASES)
def test_nothing_outside_is_written_by_any_instruction_set(case, isa):
    fenced_training(case, torch.float32, 3, torch.float32, torch.float32)


@each(case=IN_ENGINES, dtypes={"a": DTYPES, "b": DTYPES[1:] + DTYPES[:1], "c": DTYPES[::-1]})
def test_nothing_outside_is_written_with_mixed_dtypes(case, dtypes):
    fenced_training(case, dtypes[0], 1, dtypes[1], dtypes[2])


def test_more_than_2_to_the_31_elements(tmp_path):
    """In sparse files, so that only the pages that are touched need memory: bf16, SGD, the ends of the numbers."""
    numel = (1 << 31) + (1 << 20) + 5
    names = [str(tmp_path / name) for name in ("param", "grad")]
    try:
        for name in names:
            with open(name, "wb") as file:
                file.truncate(2 * numel)
        if sum(os.stat(name).st_blocks for name in names) * 512 > 1 << 20:
            pytest.skip("the filesystem of tmp_path keeps no sparse files")
        param, grad = (torch.from_file(n, shared=True, size=numel, dtype=torch.bfloat16) for n in names)
    except (OSError, RuntimeError) as error:
        pytest.skip(f"no sparse file of 4 GiB under tmp_path: {error}")
    edges = [0, 1 << 30, (1 << 31) - 30, (1 << 31) + 4097, numel - 200]
    for number, edge in enumerate(edges):
        grad[edge : edge + 150] = number + 1.0
    ahead = torch.nn.Parameter(
        torch.zeros(17, dtype=torch.bfloat16)
    )  # offsets within the call differ from the tensor's
    param = torch.nn.Parameter(param)
    records = [Record(i, None, tensor, tensor, step=torch.zeros(())) for i, tensor in enumerate((ahead, param))]
    plan = _C.Plan("sgd", [], records)
    ahead.grad, param.grad = torch.ones(17, dtype=torch.bfloat16), grad
    assert plan.gather(False)
    step = Step((1.0, 0.0, 0.0, 0.0, 0.0))
    for edge in edges:
        _C.cpu_run_range(plan, step, 17 + edge + 10, 17 + edge + 60)
    values = param.detach()
    for number, edge in enumerate(edges):
        around = values[edge : edge + 150].float()
        expected = torch.zeros(150)
        expected[10:60] = -(number + 1.0)
        assert torch.equal(around, expected), edge
    assert not values[(1 << 31) + 8192 : (1 << 31) + 9000].any()
    assert not ahead.any()
    with pytest.raises(ValueError, match="range"):
        _C.cpu_run_range(plan, step, 0, numel + 18)
    plan.release_grads()
