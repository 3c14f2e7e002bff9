"""Gradients of several parameters that share memory, in steps that write into gradients: as if each had its own."""

import copy

import pytest
import torch
from kinds import OF_EACH_KIND, each
from support import ours

import fusedstep
from fusedstep.cases import CASES
from fusedstep.verification import same_bits

pytestmark = [
    pytest.mark.plans,
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
]


def same():
    grad = torch.randn(4, 6)
    return grad, grad


def views_of_one():
    grad = torch.randn(4, 6)
    return grad.view(4, 6), grad.view(4, 6)


def overlapping():
    memory = torch.randn(36)
    return memory[:24].view(4, 6), memory[12:].view(4, 6)


def interleaved():
    memory = torch.randn(4, 12)
    return memory[:, ::2], memory[:, 1::2]


def one_transposed():
    memory = torch.randn(24)
    return memory.view(4, 6), memory.view(6, 4).t()


def one_expanded():
    memory = torch.randn(4, 6)
    return memory, memory[:, :1].expand(4, 6)


def inside_another():
    memory = torch.randn(100)
    return torch.as_strided(memory, (4, 6), (18, 3)), memory[20:44].view(4, 6)


def of_two_dtypes():
    memory = torch.randn(4, 6)
    return memory, memory.view(torch.bfloat16)[:, ::2].detach()


def negated():
    memory = torch.randn(4, 6)
    return memory, torch._neg_view(memory)


def both_sparse():
    grad = torch.sparse_coo_tensor([[0, 2]], torch.randn(2, 6), (4, 6), is_coalesced=True, check_invariants=True)
    return grad, grad


def one_sparse():
    memory = torch.randn(4, 6)
    return memory, torch.sparse_coo_tensor([[0, 2]], memory[1:3], (4, 6), is_coalesced=True, check_invariants=True)


DENSE = [same, views_of_one, overlapping, interleaved, one_transposed, one_expanded, inside_another, negated]
FORMS = [*DENSE, of_two_dtypes, both_sparse, one_sparse]
# What is written is the same number for each parameter that has a part in a piece of memory.
OPTIONS = {
    "zeroed": {"zero_grads": True},
    "zeroed and clipped": {"zero_grads": True, "max_grad_norm": 0.3, "norm_type": float("inf")},
    "written": {"write_grads": True, "max_grad_norm": 0.5, "norm_type": float("inf")},
    "neither": {"max_grad_norm": 0.5, "norm_type": float("inf")},
}
by_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def separate(grads):
    """Copies that share nothing, laid out alike."""
    return [
        grad.clone() if grad.is_sparse else torch.empty_like(grad, memory_format=torch.preserve_format).copy_(grad)
        for grad in grads
    ]


def check(case, backend, forms, options, two_groups=False):
    """The bits of the step on gradients that share nothing, and in each gradient what was left in its copy."""
    values = [torch.randn(4, 6) for _ in range(2 * len(forms) + 1)]
    both = [[torch.nn.Parameter(value.clone()) for value in values] for _ in range(2)]
    optimizers = [
        ours(case, [{"params": params[::2]}, {"params": params[1::2]}] if two_groups else params, backend, **options)
        for params in both
    ]
    for _ in range(2):
        grads = [*(grad for form in forms for grad in form()), torch.randn(4, 6)]
        for optimizer, params, given in zip(optimizers, both, (grads, separate(grads)), strict=True):
            for param, grad in zip(params, given, strict=True):
                param.grad_dtype = None
                param.grad = grad
            optimizer.step()
        for index, (mine, expected) in enumerate(zip(*both, strict=True)):
            assert same_bits(mine.detach(), expected.detach())
            for name, state in optimizers[1].state.get(expected, {}).items():
                assert same_bits(optimizers[0].state[mine][name], state), name
            # What is written as one dtype is something else as another, and torch puts sparse values elsewhere.
            form = [*forms, same][index // 2]
            if form not in (one_sparse, of_two_dtypes) or "write_grads" not in options:
                assert torch.equal(mine.grad.to_dense(), expected.grad.to_dense()), form


@by_option
def test_a_step_is_the_one_on_gradients_that_share_nothing(engine, options):
    forms = [same, overlapping, one_transposed, both_sparse] if engine == "triton" else FORMS
    check(CASES[0], engine, forms, options)  # by Triton's interpreter, which takes its time, some of them


@each(case=OF_EACH_KIND, options=OPTIONS)
def test_every_kind_of_rule_and_two_groups(backend, case, options):
    if case.optimizer == "AdamWeightDecay":
        case = type(case)(case.optimizer, {})  # its own clipping excludes these options
    check(case, backend, [same, overlapping, one_transposed], options, two_groups=True)


def test_parameters_on_two_backends_share_gradients():
    memory = torch.randn(8)
    first, second = (torch.nn.Parameter(torch.zeros(4, dtype=dtype)) for dtype in (torch.float32, torch.complex64))
    third = torch.nn.Parameter(torch.zeros(4))
    with pytest.warns(UserWarning, match="reference"):
        optimizer = fusedstep.SGD([second, first, third], lr=1.0, zero_grads=True)
    second.grad, first.grad, third.grad = torch.view_as_complex(memory.view(4, 2)), memory[:4], memory[4:]
    expected = memory.clone()
    optimizer.step()
    assert torch.equal(first.detach(), -expected[:4])
    assert torch.equal(third.detach(), -expected[4:])
    assert torch.equal(torch.view_as_real(second.detach()).reshape(-1), -expected)
    assert not memory.any()


def test_a_parameter_listed_twice_beside_one_that_shares_its_gradient(engine):
    first, second = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = fusedstep.SGD([first, second, second], lr=0.25, zero_grads=True, backend=engine)
    first.grad = second.grad = torch.ones(3)
    optimizer.step()
    assert (first.tolist(), second.tolist(), first.grad.tolist()) == ([0.75] * 3, [0.5] * 3, [0.0] * 3)


def test_gradients_that_part_and_meet_again_and_move(engine):
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(5)]
    optimizer = fusedstep.SGD(params, lr=1.0, zero_grads=True, backend=engine)
    memory = torch.empty(40)
    expected = torch.zeros(5, 3)
    for starts in (
        [0, 3, 6, 9, 12],
        [0, 3, 6, 9, 12],
        [12, 9, 6, 3, 0],
        [0, 2, 4, 6, 8],
        [20, 20, 5, 20, 6],
        [1, 4, 7, 10, 13],
    ):
        memory.copy_(torch.randn(40))
        for row, param, start in zip(expected, params, starts, strict=True):
            param.grad = memory[start : start + 3]
            row -= param.grad
        optimizer.step()
        assert torch.equal(torch.stack([param.detach() for param in params]), expected)
        assert not any(param.grad.any() for param in params)


def test_a_gradient_that_is_missing_for_a_while_counts_when_it_is_back(engine):
    first, second = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    optimizer = fusedstep.SGD([first, second], lr=1.0, zero_grads=True, backend=engine)
    grad = torch.zeros(3)
    for number in range(4):
        grad.fill_(1.0)
        first.grad, second.grad = grad, None if number % 2 else grad
        optimizer.step()
        assert not grad.any()
    assert (first.tolist(), second.tolist()) == ([-4.0] * 3, [-2.0] * 3)


@pytest.mark.parametrize("set_to_none", [False, True])
def test_an_accumulator_adds_what_each_gradient_was(engine, set_to_none):
    forms = [*DENSE, of_two_dtypes]
    params = [torch.nn.Parameter(torch.zeros(4, 6)) for _ in range(2 * len(forms))]
    accumulator = fusedstep.GradientAccumulator(params, set_to_none=set_to_none, backend=engine)
    expected = [torch.zeros(4, 6) for _ in params]
    for _ in range(2):
        grads = [grad for form in forms for grad in form()]
        for param, grad, total in zip(params, grads, expected, strict=True):
            param.grad_dtype = None
            param.grad = grad
            total += grad
        accumulator()
        for param, grad in zip(params, grads, strict=True):
            assert param.grad is (None if set_to_none else grad)
            assert set_to_none or not grad.any()
    assert all(map(torch.equal, accumulator.gradients, expected))
    assert copy.deepcopy(accumulator).step == 2


@pytest.mark.parametrize("threads", [1, 3])
def test_clip_grad_norm_scales_what_is_shared_as_often_as_torch(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        memory = torch.randn(300_000)
        both = [[torch.nn.Parameter(torch.zeros(200_000)) for _ in range(3)] for _ in range(2)]
        memories = [memory.clone(), memory.clone()]
        for params, grads in zip(both, memories, strict=True):
            params[0].grad = params[1].grad = grads[:200_000]
            params[2].grad = grads[100_000:]
        norms = [fusedstep.clip_grad_norm_(both[0], 0.3), torch.nn.utils.clip_grad_norm_(both[1], 0.3)]
        torch.testing.assert_close(*norms)
        torch.testing.assert_close(*memories)
    finally:
        torch.set_num_threads(before)
