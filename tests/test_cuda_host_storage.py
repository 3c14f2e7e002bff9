"""The CUDA kernel on the host in every form of the precision options, against the reference."""

import itertools

import pytest
import torch
from kinds import cases_of, each
from support import ADAMW, STATES, precision_modes
from test_cuda_host import inside, library, random_grads, run_on_host  # noqa: F401

import fusedstep
from fusedstep.cases import CASES
from fusedstep.kept.states import scale_name
from fusedstep.kept.weights import COMPANIONS
from fusedstep.verification import same_bits

MODES = precision_modes("own", "bf16", "8bit", "4bit")
MODES.pop("plain-own")
SIZES = [0, 1, 7, 8, 9, 255, 256, 257, 1024, 4095, 4096, 4097, 5000]
CODES = (torch.int8, torch.uint8, torch.int16)
by_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


class Pair:
    """The same case twice: one for the kernel, in sentinel-filled buffers, and one for the reference."""

    def __init__(self, case, sizes, dtype, mode, offset=0):
        generator = torch.Generator().manual_seed(1)
        values = [torch.randn(n, generator=generator).to(dtype) for n in sizes]
        make = getattr(fusedstep, case.optimizer)
        options = {**case.options, **mode}
        self.buffers = []
        placed = [self.place(v, offset) for v in values]
        self.kernel = make([torch.nn.Parameter(v) for v in placed], backend="reference", **options)
        self.reference = make([torch.nn.Parameter(v.clone()) for v in values], backend="reference", **options)
        # The first step, by the reference, makes the states.
        grads = random_grads(sizes, generator)
        for optimizer in (self.kernel, self.reference):
            self.take_reference_step(optimizer, grads)
        for state in self.kernel.state.values():
            for name in (*self.kernel.state_names, *map(scale_name, self.kernel.state_names), *COMPANIONS):
                if isinstance(state.get(name), torch.Tensor):
                    state[name] = self.place(state[name], offset)

    def place(self, values, offset):
        if values.dtype in CODES:
            buffer = torch.full((values.numel() + 64,), 77, dtype=values.dtype)
            view = buffer[offset : offset + values.numel()]
            view.copy_(values)
        else:
            buffer, view = inside(values, offset)
        self.buffers.append((buffer, view))
        return view

    @staticmethod
    def take_reference_step(optimizer, grads):
        for p, g in zip(optimizer.param_groups[0]["params"], grads, strict=True):
            p.grad_dtype = None
            p.grad = None if g is None else g.clone()
        optimizer.step()

    def step(self, loaded, grads, offset=0, **options):
        self.take_reference_step(self.reference, grads)
        grads = [None if g is None else inside(g, offset)[1] for g in grads]
        return run_on_host(loaded, self.kernel, grads, **options)

    def assert_same(self):
        pairs = zip(self.kernel.param_groups[0]["params"], self.reference.param_groups[0]["params"], strict=True)
        for a, b in pairs:
            assert same_bits(a.detach(), b.detach()), f"{(a != b).sum().item()} of {a.numel()} weights"
            for name, value in self.kernel.state.get(a, {}).items():
                assert same_bits(value, self.reference.state[b][name]), (name, a.numel())
        for buffer, view in self.buffers:
            sentinel = 77 if buffer.dtype in CODES else 7.0
            assert (buffer == sentinel).sum() >= buffer.numel() - view.numel()


def ways(pair, grads):
    """How many kernels the parameters of a step need: those of 8-bit states keep fp32 ones where they are small."""
    kinds = set()
    for param, grad in zip(pair.kernel.param_groups[0]["params"], grads, strict=True):
        if grad is not None:
            states = [pair.kernel.state[param].get(name) for name in pair.kernel.state_names]
            kinds.add(tuple(None if s is None else s.dtype for s in states))
    return len(kinds)


@by_mode
@pytest.mark.parametrize(("offset", "general"), [(0, False), (3, False), (0, True)])
def test_every_form_has_the_references_bits(library, mode, offset, general):  # noqa: F811
    dtypes = (torch.bfloat16,) if mode.get("master_weights") == "split" else (torch.bfloat16, torch.float16)
    for case, dtype in itertools.product(cases_of(mode, MODES), dtypes):
        generator = torch.Generator().manual_seed(2)
        pair = Pair(case, SIZES, dtype, mode, offset)
        for grad in (dtype, torch.float32):
            grads = [None if i == 5 else g for i, g in enumerate(random_grads(SIZES, generator, grad))]
            assert 1 <= pair.step(library, grads, offset, general=general) <= ways(pair, grads)
        pair.assert_same()


@pytest.mark.parametrize("state", ["bf16", "8bit", "4bit"])
def test_fp32_weights_with_narrow_states_have_the_references_bits(library, state):  # noqa: F811
    for case in CASES:
        generator = torch.Generator().manual_seed(3)
        pair = Pair(case, SIZES, torch.float32, STATES[state])
        for _ in range(2):
            pair.step(library, random_grads(SIZES, generator))
        pair.assert_same()


@each(
    in_reverse=[False, True], threads=[32, 96, 128], mode=["split-8bit", "split-4bit", "stochastic-8bit", "kahan-own"]
)
@pytest.mark.parametrize("case", [ADAMW, next(c for c in CASES if c.options.get("amsgrad"))], ids=str)
def test_any_order_and_number_of_threads_has_the_references_bits(library, case, mode, threads, in_reverse):  # noqa: F811
    library.set_reverse(in_reverse)
    generator = torch.Generator().manual_seed(6)
    sizes = [300, 9000, 1, 20_000]
    pair = Pair(case, sizes, torch.bfloat16, MODES[mode])
    for _ in range(2):
        pair.step(library, random_grads(sizes, generator), threads=threads)
    library.set_reverse(False)
    pair.assert_same()


@by_mode
def test_numbers_that_are_not_finite_have_the_references_bits(library, mode):  # noqa: F811
    """By the kernels of whole vectors, which plain AdamW has for gradients like its weights, and in the general way."""
    edges = [0.0, -0.0, 1e-40, -3e-39, 3.4e38, -3.39e38, float("inf"), float("nan"), 7e4, -65519.0, 6e-8]
    sizes = [5000]
    for case, dtype in itertools.product((ADAMW, CASES[10]), (torch.bfloat16, torch.float32)):
        pair = Pair(case, sizes, torch.bfloat16, mode)
        generator = torch.Generator().manual_seed(7)
        for scale in (1.0, 1e-30):
            (grad,) = random_grads(sizes, generator, dtype)
            grad[: 300 * len(edges) : 300] = torch.tensor(edges)
            pair.step(library, [grad * scale])
            pair.assert_same()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zeros_that_were_written_beside_remainders_have_the_references_bits(library, dtype):  # noqa: F811
    """With gradients for which there is no kernel of whole vectors, and with those for which there is one."""
    pair = Pair(CASES[0], [5000], torch.bfloat16, MODES["split-own"])
    for optimizer in (pair.kernel, pair.reference):
        optimizer.param_groups[0]["params"][0].data.mul_(torch.arange(5000) % 2)
    pair.step(library, random_grads([5000], torch.Generator().manual_seed(8), dtype))
    pair.assert_same()
    assert pair.kernel.param_groups[0]["params"][0].isfinite().all()
