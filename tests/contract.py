"""How an engine is held to its contract: the same training by it and by the reference, and what must be equal."""

import numpy as np
import pytest
import torch
from on_gpu import DEVICE, running

import fusedstep
from fusedstep import _C
from fusedstep.backends import BACKENDS
from fusedstep.verification import same_bits


class Engine:
    """What is under test; by ``backend`` and ``device`` an optimizer gets it."""

    def __init__(self, name, backend, device="cpu"):
        self.name, self.backend, self.device = name, backend, device
        self.quick = name != "triton interpreted"
        self.isas = _C.cpu_isas() if name == "cpu" else (_C.cpu_isa(),)


def engine_named(name, run_on_the_host):
    """The engine under test; the test ends if it cannot run.

    Args:
        run_on_the_host: lets backend="cpu" run the CUDA source.
    """
    if name in ("cuda", "triton"):
        return Engine(name, running(name), DEVICE)
    if name == "triton interpreted":
        reasons = BACKENDS["triton"].reasons(torch.device("cpu"))
        if reasons:
            pytest.skip("; ".join(reasons))
        return Engine(name, "triton")
    if name.startswith("cuda"):
        run_on_the_host()
    return Engine(name, "cpu")  # by each instruction set, if it is the CPU's own


class Fences:
    """Puts tensors into larger buffers full of sentinels, ``offset`` elements behind an aligned address."""

    def __init__(self):
        self.fenced = []

    def around(self, values, offset):
        if not values.is_contiguous():
            return values.clone(memory_format=torch.preserve_format)
        sentinel = 7.0 if values.is_floating_point() else 77
        buffer = torch.full((values.numel() + 80,), sentinel, dtype=values.dtype, device=values.device)
        start = (-buffer.data_ptr() // buffer.element_size()) % (64 // buffer.element_size()) + offset
        inside = buffer[start : start + values.numel()].view(values.shape)
        self.fenced.append((buffer, sentinel, values.numel()))
        return inside.copy_(values)

    def check(self):
        for buffer, sentinel, numel in self.fenced:
            assert int((buffer == sentinel).sum()) >= buffer.numel() - numel, "something outside was written"


def train(case, engine, values, grads, *, state_dtypes=None, before=None, **options):
    """The case's optimizer after a step with each list of ``grads``, and what each step left in them.

    Args:
        state_dtypes: what the states of each parameter are converted to after the first step.
        before: called with the optimizer and the number of a step before it.
    """
    fences, left = Fences(), []
    params = [torch.nn.Parameter(fences.around(v.to(engine.device), i % 4)) for i, v in enumerate(values)]
    make = getattr(fusedstep, case.optimizer)
    optimizer = make(params, backend=engine.backend, **{**case.options, **options})
    for number, given in enumerate(grads):
        for i, (param, grad) in enumerate(zip(params, given, strict=True)):
            param.grad_dtype = None
            param.grad = None if grad is None else fences.around(grad.to(engine.device), (i + number) % 4)
        if before:
            before(optimizer, number)
        with np.errstate(all="ignore"):  # Triton's interpreter computes with numpy, which warns
            optimizer.step()
        left.append([None if param.grad is None else param.grad.clone() for param in params])
        for i, param in enumerate(params if number == 0 else ()):
            for name, state in optimizer.state[param].items():
                if name in optimizer.state_names and state_dtypes:
                    state = state.to(state_dtypes[i])
                if name != "step":
                    optimizer.state[param][name] = fences.around(state, i % 4)
    fences.check()
    return optimizer, left


references = {}  # the last few


def beside_the_reference(statement, case, engine, values, grads, **how):
    """The optimizer of the engine; its bits, and what it left in gradients, are those of the reference."""
    options = {name: value for name, value in how.items() if name not in ("before", "state_dtypes")}
    dtypes = [[None if tensor is None else tensor.dtype for tensor in some] for some in (values, *grads)]
    key = statement, str(case), str(options), engine.device, str(dtypes)
    if key not in references:
        if len(references) == 8:
            del references[next(iter(references))]
        references[key] = train(case, Engine("reference", "reference", engine.device), values, grads, **how)
    for isa in engine.isas:
        before = _C.cpu_isa()
        _C.set_cpu_isa(isa)
        try:
            optimizer, left = train(case, engine, values, grads, **how)
        finally:
            _C.set_cpu_isa(before)
        assert_the_same(optimizer, left, *references[key], f"by {isa}, ")
    return optimizer


def assert_the_same(optimizer, left, expected, expected_left, about=""):
    for i, (a, b) in enumerate(zip(*(o.param_groups[0]["params"] for o in (optimizer, expected)), strict=True)):
        about_it = f"{about}parameter {i}: {tuple(a.shape)}, {a.dtype}, {a.stride()}"
        assert same_bits(a.detach(), b.detach()), f"{(a != b).sum().item()} numbers of {about_it}"
        mine, other = optimizer.state.get(a, {}), expected.state.get(b, {})
        assert mine.keys() == other.keys()
        for name in mine:
            assert same_bits(mine[name].to(b.device), other[name].to(b.device)), f"{name} of {about_it}"
        if optimizer.stepper.kept.copy.dtype is not None:
            assert same_bits(optimizer.copies[a], expected.copies[b]), f"copy of {about_it}"
    for number, (mine, other) in enumerate(zip(left, expected_left, strict=True)):
        for i, (a, b) in enumerate(zip(mine, other, strict=True)):
            assert (a is None and b is None) or same_bits(a, b), f"{about}what step {number} leaves in gradient {i}"


def normal(sizes, generator, dtypes=(torch.float32,)):
    return [torch.randn(n, generator=generator).to(dtypes[i % len(dtypes)]) for i, n in enumerate(sizes)]


# Sums are in another order than the reference's, in the arithmetic type: this is far above what that makes of them, and
# far below what a missing term would. A stored number may round to the neighbour.
BOUND = {torch.float32: 3e-6, torch.float64: 1e-12, torch.bfloat16: 2**-7, torch.float16: 2**-10}


class Beside:
    """An optimizer of the engine beside one of the reference, from equal parameters, in fenced memory.

    ``offsets``: how many different ones, in elements, memory has behind an aligned address.
    """

    def __init__(self, case, engine, values, offsets=4, **options):
        self.engine, self.fences, self.offsets = engine, Fences(), offsets
        make = getattr(fusedstep, case.optimizer)
        self.optimizers = []
        for backend in (engine.backend, "reference"):
            params = [
                torch.nn.Parameter(self.fences.around(v.to(engine.device), i % offsets)) for i, v in enumerate(values)
            ]
            for param in params:
                param.grad_dtype = None
            self.optimizers.append(make(params, backend=backend, **{**case.options, **options}))
        self.mine, self.expected = self.optimizers
        self.ways = [0.0] * len(values)

    def step(self, grads, **attributes):
        before = [param.detach().clone() for param in params_of(self.expected)]
        for optimizer in self.optimizers:
            for name, value in attributes.items():
                setattr(optimizer, name, torch.tensor(value, device=self.engine.device))
            for i, (param, grad) in enumerate(zip(params_of(optimizer), grads, strict=True)):
                param.grad = (
                    None if grad is None else self.fences.around(grad.to(self.engine.device), (i + 1) % self.offsets)
                )
            optimizer.step()
        for i, (old, new) in enumerate(zip(before, params_of(self.expected), strict=True)):
            self.ways[i] = self.ways[i] + (new.detach() - old).abs()

    def check(self):
        """Errors of parameters are in proportion to the way that each element has come, those of states to the largest
        of a tensor: a number near zero is what two larger ones have left."""
        self.fences.check()
        for way, a, b in zip(self.ways, *map(params_of, self.optimizers), strict=True):
            error, allowed = (a - b).abs().double(), BOUND[b.dtype] * (b.abs().double() + way)
            assert bool((error <= allowed).all()), (tuple(b.shape), b.dtype, (error / allowed).max().item())
            mine, expected = self.mine.state.get(a, {}), self.expected.state.get(b, {})
            assert mine.keys() == expected.keys()
            for name, value in expected.items():
                if isinstance(value, torch.Tensor) and value.numel() and name != "ema":  # which is the parameters'
                    bound = BOUND[value.dtype]
                    atol = 0.1 * bound * max(value.nan_to_num().abs().max().item(), 1.0)  # means of nothing are NaN
                    torch.testing.assert_close(
                        mine[name], value, rtol=bound, atol=atol, equal_nan=True, check_device=False
                    )


def params_of(optimizer):
    return optimizer.param_groups[0]["params"]
