"""On a GPU: the CUDA and Triton kernels against the reference, bit for bit, and what only a GPU can show."""

import pytest
import torch
from fusedstep.bench.timing import kernel_launches
from on_gpu import DEVICE, captured, needs_cuda, warmed_up

import fusedstep
from fusedstep import schedules
from fusedstep.backends import BACKENDS
from fusedstep.cases import CASES, select_cases
from fusedstep.schedules import on_device
from fusedstep.verification import DTYPES, same_bits, verify

pytestmark = pytest.mark.gpu
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

by_case = pytest.mark.parametrize("case", CASES, ids=str)
adamw = next(case for case in CASES if case.optimizer == "AdamW")
adamw_states = ("step", "exp_avg", "exp_avg_sq")


def make(case, values, backend):
    return getattr(fusedstep, case.optimizer)(
        [torch.nn.Parameter(v.clone()) for v in values], backend=backend, **case.options
    )


def params_of(optimizer):
    return optimizer.param_groups[0]["params"]


def random(sizes, generator, dtypes=(torch.float32,)):
    values = [torch.randn(n, generator=generator) for n in sizes]
    return [v.to(DEVICE, dtypes[i % len(dtypes)]) for i, v in enumerate(values)]


def step(optimizers, grads, **attributes):
    for optimizer in optimizers:
        for name, value in attributes.items():
            setattr(optimizer, name, value)
        for param, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
            param.grad = None if grad is None else grad.clone()
        optimizer.step()


def assert_same(optimizers):
    for a, b in zip(*[o.param_groups[0]["params"] for o in optimizers], strict=True):
        assert same_bits(a.detach(), b.detach())
        states = [o.state.get(p, {}) for o, p in zip(optimizers, (a, b), strict=True)]
        for name in states[0]:
            assert same_bits(states[0][name].to(DEVICE), states[1][name].to(DEVICE)), name


@by_case
def test_gradients_of_every_magnitude_have_the_references_bits(kernel, case):
    # In order, so that neighbours are alike: kernels treat very small and very large ones in another way.
    n = 1 << 18
    generator = torch.Generator().manual_seed(3)
    exponents = torch.linspace(-145, 40, n).to(torch.int32)
    optimizers = [make(case, random([n], generator), kernel)]
    optimizers.append(make(case, optimizers[0].param_groups[0]["params"], "reference"))
    for _ in range(3):
        mantissas = 1 + torch.rand(n, generator=generator)
        signs = torch.randint(0, 2, (n,), generator=generator) * 2 - 1
        step(optimizers, [torch.ldexp(mantissas * signs, exponents).to(DEVICE)])
        assert_same(optimizers)


@pytest.mark.parametrize("optimizer", sorted({case.optimizer for case in select_cases()}))
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layout_and_dtype_has_the_references_bits(kernel, optimizer, dtype):
    report = verify([optimizer], backend=kernel, device=DEVICE, dtypes=[dtype], steps=3)
    assert report.ok, [row for row in report.rows if not row.ok]


@needs_cuda
@pytest.mark.parametrize("n", [65, 513, 4001, 9000])
def test_many_tensors_take_few_launches(n):
    """Beside the CPU engine, whose bits are the reference's and which takes them at once."""
    generator = torch.Generator().manual_seed(4)
    values, grads = (torch.randn(n, generator=generator) for _ in range(2))
    optimizers = []
    for device, backend in ((DEVICE, "cuda"), ("cpu", "cpu")):
        params = [torch.nn.Parameter(v) for v in values.to(device).unbind()]
        for param, grad in zip(params, grads.to(device).unbind(), strict=True):
            param.grad = grad
        optimizers.append(fusedstep.AdamW(params, backend=backend, **adamw.options))
        optimizers[-1].step()
    assert optimizers[0].kernel_calls == -(-n // 4000)
    for name in (None, *adamw_states):
        both = ((p.detach() if name is None else o.state[p][name] for p in params_of(o)) for o in optimizers)
        assert same_bits(*(torch.stack(list(tensors)).cpu() for tensors in both)), name


@needs_cuda
def test_a_step_is_one_launch_in_the_profiler(kernel):
    generator = torch.Generator().manual_seed(5)
    values = random([1000, 10, 70_000], generator)
    optimizer = make(adamw, values, kernel)
    step([optimizer], values)
    step([optimizer], values)
    assert kernel_launches(optimizer.step) == 1


@needs_cuda
def test_more_than_2_31_elements(kernel):
    n = 2**31 + 1000
    param = torch.nn.Parameter(torch.zeros(n, dtype=torch.bfloat16, device=DEVICE))
    param.grad = torch.zeros(n, dtype=torch.bfloat16, device=DEVICE)
    places = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**31 + 7, n - 1], device=DEVICE)
    param.grad[places] = 1.0
    fusedstep.SGD([param], lr=1.0, backend=kernel).step()
    assert torch.equal(param.detach()[places].float(), -torch.ones(len(places), device=DEVICE))
    assert torch.count_nonzero(param.detach()).item() == len(places)


@needs_cuda
def test_a_captured_graph_follows_lr_scale_and_skips(kernel):
    generator = torch.Generator().manual_seed(6)
    sizes = [1000, 3, 70_001]
    values = random(sizes, generator)
    lrs = [torch.tensor(0.01, device=DEVICE) for _ in range(2)]
    optimizers = [make(adamw, values, name) for name in (kernel, "reference")]
    for optimizer, lr in zip(optimizers, lrs, strict=True):
        optimizer.param_groups[0]["lr"] = lr
    scale, skip = torch.tensor(2.0, device=DEVICE), torch.tensor(0.0, device=DEVICE)
    grads = [torch.zeros_like(v) for v in values]
    replayed, eager = optimizers
    replayed.grad_scale, replayed.found_inf = scale, skip
    for param, grad in zip(replayed.param_groups[0]["params"], grads, strict=True):
        param.grad = grad

    def both(replay):
        for grad, new in zip(grads, random(sizes, generator), strict=True):
            grad.copy_(new)
        replay()
        step([eager], grads, grad_scale=scale, found_inf=skip)

    warmed_up(lambda: both(replayed.step))
    graph = captured(replayed.step)
    for number in range(30):
        for lr in lrs:
            lr.fill_(0.01 / (1 + number))
        scale.fill_(float(2 ** (number % 5)))
        skip.fill_(float(number % 7 == 3))
        both(graph.replay)
    assert_same(optimizers)


@needs_cuda
def test_a_captured_graph_goes_on_after_other_gradients_and_a_new_group(kernel):
    """What it was captured with stays where it is, though the optimizer has gone on with other tables."""
    generator = torch.Generator().manual_seed(16)
    sizes = [1000, 3, 70_001]
    values, static = random(sizes, generator), random(sizes, generator)
    optimizers = replayed, eager = [make(adamw, values, name) for name in (kernel, "reference")]
    for optimizer in optimizers:
        for param, grad in zip(params_of(optimizer), static, strict=True):
            param.grad = grad
    replayed.step()
    eager.step()
    graph = captured(replayed.step)
    for number in range(10):
        if number == 5:
            more = random([50], generator)
            for optimizer in optimizers:
                optimizer.add_param_group({"params": [torch.nn.Parameter(more[0].clone())]})
        step(optimizers, random(sizes, generator))
        garbage = [torch.full((n,), torch.nan, device=DEVICE) for n in (8, 64, 512, 4096) * 20]
        del garbage
        for grad, new in zip(static, random(sizes, generator), strict=True):
            grad.copy_(new)
        graph.replay()
        step([eager], static)
    assert_same(optimizers)


@needs_cuda
def test_a_captured_graph_follows_a_schedule_by_itself(kernel):
    """Skipped steps left out; and it goes on from where a state was loaded."""
    generator = torch.Generator().manual_seed(7)
    sizes = [1000, 3]
    values = random(sizes, generator)
    schedule = schedules.CosineScheduler(30, 0.05, 0.001, warmup_steps=6)
    replayed, eager = optimizers = [
        fusedstep.AdamW([torch.nn.Parameter(v.clone()) for v in values], lr=schedule, backend=name)
        for name in (kernel, "reference")
    ]
    skip = torch.tensor(0.0, device=DEVICE)
    grads = random(sizes, generator)
    replayed.found_inf = skip
    for param, grad in zip(replayed.param_groups[0]["params"], grads, strict=True):
        param.grad = grad
    warmed_up(replayed.step)
    step([eager], grads)
    graph = captured(replayed.step)
    done = 1
    for number in range(40):
        skip.fill_(float(number % 5 == 2))
        graph.replay()
        step([eager], grads, found_inf=skip)
        done += number % 5 != 2
        assert replayed.get_last_lr() == eager.get_last_lr() == [schedule(done)]
    assert_same(optimizers)
    replayed.schedule_step = eager.schedule_step = 9
    skip.fill_(0.0)
    for number in range(5):
        graph.replay()
        step([eager], grads, found_inf=skip)
        assert replayed.get_last_lr() == [schedule(10 + number)]
    assert_same(optimizers)


def test_schedules_have_the_bits_of_the_python_functions(kernel):
    made = [
        schedules.CosineScheduler(30, 0.05, 0.001, warmup_steps=6),
        schedules.SquareRootScheduler(0.7),
        schedules.FactorScheduler(0.93, 1e-3, 0.4),
        schedules.MultiFactorScheduler([2, 5, 11], 0.3, 0.2),
        schedules.WarmUp(schedules.PolyScheduler(30, 0.1, 2.5), 5, 0.5),
        schedules.get_schedule("cosine_with_restarts", 0.1, 3, 30, {"num_cycles": 4}),
    ] * 50
    part = on_device.DeviceSchedules(made, 0, torch.device(DEVICE, 0), BACKENDS[kernel])
    for count in range(1, 60):
        part.backend.advance_schedules(part, torch.tensor(0.0, device=DEVICE))
        assert part.values.tolist() == [[count] * len(made), [schedule(count) for schedule in made]]
    part.backend.advance_schedules(part, torch.tensor(1.0, device=DEVICE))
    assert part.count == 59


@needs_cuda
def test_learning_rates_move_to_the_gpu_with_the_parameters(kernel):
    model = torch.nn.Linear(3, 2)
    schedule = schedules.LinearScheduler(10, 0.1)
    optimizer = fusedstep.AdamW(model.parameters(), lr=schedule)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    assert not optimizer.param_groups[0]["lr"].is_cuda
    model.to(DEVICE)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"].is_cuda
    assert optimizer.get_last_lr() == [schedule(2)]


@needs_cuda
def test_capturing_the_first_step_says_what_to_do_and_creates_nothing(kernel):
    param = torch.nn.Parameter(torch.ones(10, device=DEVICE))
    param.grad = torch.ones_like(param)
    optimizer = fusedstep.AdamW([param], lr=0.1, backend=kernel)

    def first():
        torch.ones(1, device=DEVICE)  # torch warns of an empty graph
        with pytest.raises(RuntimeError, match=r"step\(\) met new or changed tensors .* before capturing"):
            optimizer.step()

    captured(first)
    assert not optimizer.state
    optimizer.step()
    captured(optimizer.step).replay()
    assert optimizer.state[param]["step"] == 2


def test_a_grad_scaler_steps_and_skips_as_with_torchs(kernel):
    """Both take the gradients of one training, for a last bit may flip the next rounding to fp16."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8)).to(DEVICE)
    theirs = list(model.parameters())
    mine = [torch.nn.Parameter(p.detach().clone()) for p in theirs]
    optimizers = torch.optim.AdamW(theirs, fused=True), fusedstep.AdamW(mine, backend=kernel)
    scalers = [torch.amp.GradScaler(DEVICE, init_scale=2.0**24) for _ in optimizers]  # overflows at first
    skipped = 0
    for _ in range(20):
        with torch.autocast(DEVICE, torch.float16):
            loss = model(torch.randn(32, 64, device=DEVICE)).square().mean()
        for scaler in scalers:
            scaled = scaler.scale(loss)
        scaled.backward()
        for a, b in zip(theirs, mine, strict=True):
            b.grad = a.grad.clone()
        skipped += not all(p.grad.isfinite().all() for p in mine)
        for scaler, optimizer in zip(scalers, optimizers, strict=True):
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert scalers[0].get_scale() == scalers[1].get_scale()
    assert 0 < skipped < 15
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert all(optimizers[1].state[p]["step"] == 20 - skipped for p in mine)


@needs_cuda
def test_memory_does_not_grow_with_steps(kernel):
    values = random([100_000] * 10, torch.Generator().manual_seed(7))
    optimizer = make(adamw, values, kernel)
    step([optimizer], values)
    step([optimizer], values)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(50):
        step([optimizer], values)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@needs_cuda
def test_a_step_on_another_stream_uses_that_stream(kernel):
    values = random([1_000_000], torch.Generator().manual_seed(8))
    optimizers = [make(adamw, values, name) for name in (kernel, "reference")]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for number in range(5):
            step(optimizers, [values[0] * (number + 1)])
    torch.cuda.current_stream().wait_stream(stream)
    assert_same(optimizers)


@needs_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_one_optimizer_on_several_devices(kernel):
    params = [torch.nn.Parameter(torch.ones(100, device=f"cuda:{i % 2}")) for i in range(4)]
    optimizer = fusedstep.AdamW([*params, torch.nn.Parameter(torch.ones(100))], lr=0.1)
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.full_like(param, 0.5)
    optimizer.step()
    assert all(torch.equal(p.detach().cpu(), params[0].detach().cpu()) for p in optimizer.param_groups[0]["params"])
    assert torch.cuda.current_device() == 0
