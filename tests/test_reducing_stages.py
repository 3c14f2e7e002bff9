"""A step of a rule that reduces on parts of tensors, in stages: the CUDA source on the host beside the CPU engine.

What a stage does is in `csrc/cpu/reducing.h`. An engine adds up in an order of its own: sums of parts are equal to
rounding, or to the bit where they are exact. From equal sums all that is written has the same bits. On the host the
CUDA source proves its logic, nothing of a GPU.
"""

import torch
from contract import Engine, assert_the_same, normal, train
from host_plan import HostPartsBackend, reducing_library, run_reducing_on_the_host, run_stages_on_the_host
from hypothesis import given
from hypothesis import strategies as st
from kinds import each, examples

import fusedstep
from fusedstep import planning
from fusedstep.backends import BACKENDS
from fusedstep.backends.parts import (
    CPU_PARTS,
    CUDA_PARTS,
    PARTS,
    CudaPartsBackend,
    backend_of_parts,
    has_parts,
)
from fusedstep.cases import REDUCING
from fusedstep.lines import Lines
from fusedstep.verification import same_bits

HOST = Engine("cuda on the host", "cpu")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = [
    *((), (300,), (0, 3), (3, 0), (1, 1), (50, 3, 3), (2, 20, 31), (2, 9, 170)),
    *((70, 136), (65, 517), (3, 2100), (2, 66, 36), (2100, 3)),
]
OPTIONS = {
    "alone": {},
    "followed": {"ema_decay": 0.75, "weights_copy": torch.float16},
    "zeroed": {"zero_grads": True, "max_grad_norm": 0.7, "norm_type": float("inf"), "skip_nonfinite": True},
    "written": {"write_grads": True, "max_grad_norm": 0.7, "norm_type": float("inf"), "ema_decay": 0.75},
}


@each(case=REDUCING, dtype=FLOATS, option=OPTIONS)
def test_one_process_has_the_bits_of_a_step_at_once(case, dtype, option, monkeypatch):
    """The second step is skipped where an infinity does that."""
    generator = torch.Generator().manual_seed(1)
    values, *grads = (normal(SHAPES, generator, (dtype,)) for _ in range(4))
    if "skip_nonfinite" in option:
        grads[1][8][7] = torch.inf
    assert_the_same_in_stages(monkeypatch, case, values, grads, **option)


def test_more_blocks_of_rows_than_one_block_adds_up(monkeypatch):
    generator = torch.Generator().manual_seed(2)
    values, grads = (normal([(530, 1024)], generator) for _ in range(2))
    assert_the_same_in_stages(monkeypatch, REDUCING[3], values, [grads])


def assert_the_same_in_stages(monkeypatch, case, values, grads, **option):
    found = []
    for run in (run_reducing_on_the_host, run_stages_on_the_host):
        run(monkeypatch)
        found.append(train(case, HOST, values, grads, **option))
    (expected, left), (staged, left_staged) = found
    assert_the_same(staged, left_staged, expected, left)


# Anything with rows and columns of any number, of which a process may have none.
sizes = st.one_of(st.integers(0, 5), st.integers(1, 80))
shapes = st.one_of(
    st.tuples(sizes, sizes),
    st.tuples(st.integers(1, 4), sizes, st.integers(0, 40)),
    st.tuples(st.integers(0, 700)),
    st.sampled_from([(), (1, 1500), (1500, 1), (3, 2100), (600, 3), (30, 3, 3), (0, 600), (600, 0)]),
)


class Staged:
    """The plans of an optimizer whose parameters are parts, and its sums in a step."""

    def __init__(self, backend, case, values, dtypes, **options):
        self.params = [torch.nn.Parameter(value.clone()) for value in values]
        for param in self.params:
            param.grad_dtype = None
        self.optimizer = getattr(fusedstep, case.optimizer)(self.params, **{**case.options, **options})
        (members,) = planning.entries(self.optimizer)
        row = []
        for entry in members:
            variant = self.optimizer.variant_of(entry.group, entry.name, entry.param)
            row.append((entry, backend if self.optimizer.rule_of(variant)[1] else BACKENDS["cpu"], variant))
            entry.param.grad = torch.zeros_like(entry.param)  # so that there are states
        self.plans = [plan for plan in planning.build(self.optimizer, [row]) if has_parts(plan)]
        for param, dtype in zip(self.params, dtypes, strict=True):
            for name, state in self.optimizer.state[param].items():
                if name in self.optimizer.state_names:
                    self.optimizer.state[param][name] = state.to(dtype)
        self.plans = [plan for plan in planning.build(self.optimizer, [row]) if has_parts(plan)]

    def begin(self, grads, times, **given):
        """Gives gradients; the whole tensors have so many times the rows and the columns of the parts."""
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = None if grad is None else grad.clone()
        self.steps, sums = [], []
        group = self.optimizer.param_groups[0]
        for plan in self.plans:
            assert plan.gather()
            step = plan.step_with(self.optimizer.hyper(group, plan.variant))._replace(**given)
            lines = {i: lines_of(self.optimizer, record.owner, times) for i, record in enumerate(plan.records)}
            self.steps.append((plan, step))
            sums.append(plan.begin(step, lines))
        return sums

    def advance(self, found_inf=None):
        return [plan.advance(found_inf) for plan in self.plans]

    def write(self, **given):
        for plan, step in self.steps:
            if "found_inf" not in given:
                plan.write()
            plan.step(step._replace(**given))

    def numbers(self):
        states = [value for p in self.params for value in self.optimizer.state[p].values()]
        copies = [self.optimizer.copies[p] for p in self.params] if self.optimizer.stepper.kept.copy.dtype else []
        return [*map(torch.detach, self.params), *states, *copies, *(p.grad for p in self.params if p.grad is not None)]


def lines_of(optimizer, param, times):
    rows, columns = times
    whole = Lines.of_part(optimizer, optimizer.param_groups[0], None, param)
    tensor = whole.tensor._replace(count=whole.tensor.count * rows * columns)
    if whole.is_flat:
        return Lines(tensor)
    row, column, matrix = (
        each._replace(count=each.count * n) for each, n in zip(whole[1:], (columns, rows, rows), strict=True)
    )
    return Lines(tensor, row, column, matrix)


@examples(200)
@given(data=st.data())
def test_from_equal_sums_all_that_is_written_has_the_bits_of_the_cpu_engine(data):
    case = data.draw(st.sampled_from(REDUCING))
    some = data.draw(st.lists(shapes, min_size=1, max_size=5))
    params, gradients, states = (data.draw(st.tuples(*[st.sampled_from(FLOATS)] * len(some))) for _ in range(3))
    exact = data.draw(st.booleans()) and "clip_value" not in case.options
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))

    def tensors(dtypes):
        draw = torch.randn if not exact else lambda shape, generator: torch.randint(-4, 5, shape, generator=generator)
        return [draw(shape, generator=generator).to(dtype) for shape, dtype in zip(some, dtypes, strict=True)]

    followed = {"ema_decay": 0.5, "weights_copy": torch.bfloat16}
    options = data.draw(st.sampled_from([{}, followed, {"zero_grads": True}, {"write_grads": True}]))
    scaled = {"maximize": data.draw(st.booleans())}
    if data.draw(st.booleans()):
        scaled["grad_scale"] = torch.tensor(data.draw(st.sampled_from([2.0, 0.25] if exact else [2.0, 3.0])))
    if data.draw(st.booleans()):
        scaled["coefficient"] = torch.tensor(0.5, dtype=torch.float64)
    times = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    values = tensors(params)
    mine, expected = (Staged(b, case, values, states, **options) for b in (HostPartsBackend(), CPU_PARTS))
    reducing_library().set_reverse(data.draw(st.booleans()))
    for number in range(2):
        grads = tensors(gradients)
        if number == 0 and len(grads) > 1:
            grads[-1] = None
        if data.draw(st.booleans()):
            skipped_step(mine, grads, times, scaled)
        sums = [staged.begin(grads, times, **scaled) for staged in (mine, expected)]
        for stage in range(3):
            if stage > 0:
                sums = [staged.advance() for staged in (mine, expected)]
            for asked, others in zip(*sums, strict=True):
                assert asked.keys() == others.keys()
                for index, own in asked.items():
                    for a, b in zip(own, others[index], strict=True):
                        assert a.shape == b.shape
                        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-30, equal_nan=True)
                        assert not (exact and number == stage == 0) or same_bits(a, b)
                        b.mul_(times[0] * times[1] - 0.25)  # those of the whole
                        a.copy_(b)
        for staged in (mine, expected):
            staged.write()
        for a, b in zip(mine.numbers(), expected.numbers(), strict=True):
            assert same_bits(a, b)


def skipped_step(staged, grads, times, given):
    """What is on the device decides; nothing is written but zeros into gradients, if asked to."""
    staged.begin(grads, times, **given)
    flag = torch.tensor(1.0)
    before = [t.clone() for t in staged.numbers()]
    for _ in range(2):
        staged.advance(flag)
    zeroed = staged.plans and staged.plans[0].zero_grads
    left = sum(param.grad is not None for param in staged.params) if zeroed else 0
    staged.write(found_inf=flag)
    after = staged.numbers()
    assert all(map(same_bits, before[: len(before) - left], after))
    reduced = {record.index for plan in staged.plans for record in plan.records}
    for i, param in enumerate(staged.params):
        assert not (left and i in reduced and param.grad is not None and param.grad.any())


def test_triton_takes_the_stages_of_the_cuda_engine_where_that_can_run(monkeypatch):
    param = torch.ones(3, 4)
    assert backend_of_parts(BACKENDS["triton"], param) is PARTS
    monkeypatch.setattr(CudaPartsBackend, "reasons", lambda *_: [])
    for name in ("cuda", "triton"):
        assert backend_of_parts(BACKENDS[name], param) is CUDA_PARTS
        assert backend_of_parts(BACKENDS[name], param.t()) is PARTS  # no matrix of rows in memory
    assert backend_of_parts(BACKENDS["reference"], param) is PARTS
