"""On a GPU: the kernels of rules that reduce beside the parents, and what only a GPU can show."""

import pytest
import torch
from fusedstep.bench.timing import kernel_launches
from host_plan import launches_of
from on_gpu import DEVICE, captured, needs_cuda, warmed_up

import fusedstep
from fusedstep.cases import REDUCING
from fusedstep.verification import same_bits

pytestmark = pytest.mark.gpu
SHAPES = [
    (),
    (700,),
    (0, 3),
    (640, 3, 3),
    (40, 5, 7),
    (1030, 3),
    (3, 2100),
    (768, 768),
    (65, 517),
    (5000, 512),
    (1, 70_000),
]

by_kind = pytest.mark.parametrize("case", [REDUCING[3], REDUCING[4]], ids=str)


def random(generator, dtypes=(torch.float32,)):
    values = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [value.to(DEVICE, dtypes[i % len(dtypes)]) for i, value in enumerate(values)]


def make(case, values, backend, **options):
    params = [torch.nn.Parameter(value.clone()) for value in values]
    return getattr(fusedstep, case.optimizer)(params, backend=backend, **{**case.options, **options})


def params_of(optimizer):
    return [param.detach() for param in optimizer.param_groups[0]["params"]]


def tensors(optimizer):
    states = (optimizer.state.get(param, {}) for param in optimizer.param_groups[0]["params"])
    return params_of(optimizer) + [t for state in states for t in state.values() if isinstance(t, torch.Tensor)]


def give(optimizer, grads):
    for param, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
        param.grad = grad.clone()


def test_training_is_that_of_the_parents(kernel):
    from transformers import Adafactor

    options = [{}, {"lr": 0.01, "relative_step": False, "scale_parameter": False, "beta1": 0.9, "weight_decay": 0.1}]
    pairs = [(fusedstep.Adafactor, Adafactor, some) for some in options]
    pairs.append((fusedstep.TorchAdafactor, torch.optim.Adafactor, {"lr": 0.01, "weight_decay": 0.1}))
    for ours, theirs, some in pairs:
        generator = torch.Generator().manual_seed(2)
        values = [value for value in random(generator) if value.numel()]
        mine = ours([torch.nn.Parameter(v.clone()) for v in values], backend=kernel, **some)
        parent = theirs([torch.nn.Parameter(v.clone()) for v in values], **some)
        for _ in range(10):
            grads = [grad for grad in random(generator) if grad.numel()]
            for optimizer in (mine, parent):
                give(optimizer, grads)
                optimizer.step()
        for a, b in zip(params_of(mine), params_of(parent), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@by_kind
def test_a_group_of_mixed_dtypes_has_the_same_bits_from_run_to_run(kernel, case):
    results = []
    for _ in range(5):
        generator = torch.Generator().manual_seed(3)
        dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.bfloat16)
        optimizer = make(case, random(generator, dtypes), kernel)
        for _ in range(3):
            give(optimizer, random(generator, dtypes))
            optimizer.step()
        results.append(tensors(optimizer))
        if kernel == "cuda":
            assert optimizer.kernel_calls == 9  # tiles of two dtypes, and what is no tile
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@needs_cuda
@by_kind
def test_a_captured_graph_has_the_bits_of_eager_steps(kernel, case):
    generator = torch.Generator().manual_seed(4)
    values, grads = random(generator), [torch.zeros(shape, device=DEVICE) for shape in SHAPES]
    lrs = [torch.tensor(0.05, device=DEVICE) for _ in range(2)]
    replayed, eager = (make(case, values, kernel, lr=lr) for lr in lrs)
    skip = torch.tensor(0.0, device=DEVICE)
    for optimizer in (replayed, eager):
        optimizer.found_inf = skip
        for param, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
            param.grad = grad

    def both(replay):
        for grad, new in zip(grads, random(generator), strict=True):
            grad.copy_(new)
        replay()
        eager.step()

    warmed_up(lambda: both(replayed.step))
    graph = captured(replayed.step)
    for number in range(20):
        for lr in lrs:
            lr.fill_(0.05 / (1 + number))
        skip.fill_(float(number % 7 == 3))
        both(graph.replay)
    for a, b in zip(*map(tensors, (replayed, eager)), strict=True):
        assert same_bits(a, b)


@needs_cuda
def test_a_step_is_a_few_launches_in_the_profiler_and_allocates_nothing(kernel):
    generator = torch.Generator().manual_seed(5)
    optimizer = make(REDUCING[4], random(generator), kernel)
    give(optimizer, random(generator))
    for _ in range(2):
        optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    optimizer.step()
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert kernel_launches(optimizer.step) == (launches_of(REDUCING[4]) if kernel == "cuda" else 3)
