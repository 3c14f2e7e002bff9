"""Threads and processes: the team of the CPU engine, fork, spawn, several Python threads at once."""

import io
import math
import multiprocessing
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from support import (
    ADAMW,
    IN_ENGINES,
    MOMENTUM,
    by_kind,
    by_kind_in_engines,
    copies,
    each,
    ours,
    parameters,
    parameters_of,
    step,
)

import fusedstep

# Several threads' worth together, and each too small for torch to use threads of its own, which hang in a forked child.
LARGE = ((20_001,),) * 20 + ((5,),)
SECONDS = 60


def large(case, backend="cpu"):
    return ours(case, parameters(LARGE, torch.float32), backend)


def set_grads(optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in parameters_of(optimizer):
        param.grad = torch.randn(param.shape, generator=generator)


def train(optimizer, seeds):
    for seed in seeds:
        set_grads(optimizer, seed)
        optimizer.step()
    return [param.detach().clone() for param in parameters_of(optimizer)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def team_size(number):
    """How many threads a fresh process has after a large step, more than it had before."""
    code = f"""
import os, torch, fusedstep
torch.set_num_threads({number})
params = [torch.nn.Parameter(torch.zeros(10_000)) for _ in range(100)]  # too small for threads of torch's own
optimizer = fusedstep.AdamW(params, backend="cpu")
for param in params:
    param.grad = torch.zeros(10_000)
before = len(os.listdir("/proc/self/task"))
optimizer.step()
optimizer.step()
print(len(os.listdir("/proc/self/task")) - before)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=SECONDS, check=True)
    return int(result.stdout)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc")
@pytest.mark.parametrize("number", [1, 2, 4])
def test_torchs_number_of_threads_is_used(number):
    assert team_size(number) == number - 1


@by_kind
def test_the_number_of_threads_may_change_between_steps(case, threads):
    expected = large(case)
    mine = ours(case, copies(parameters_of(expected)), "cpu")
    results = train(expected, range(6))
    for seed, number in enumerate((1, 3, 2, 7, 1, 2)):
        threads(number)
        got = train(mine, [seed])
    assert same(got, results)


FEWER = """
import torch, fusedstep
torch.set_num_threads(4)
params = [torch.nn.Parameter(torch.ones(n)) for n in (300_000, 5, 100_000)]
optimizer = fusedstep.SGD(params, lr=1.0, max_grad_norm=1e9, backend="cpu")
for param in params:
    param.grad = torch.ones_like(param)
optimizer.step()
print(sum(param.count_nonzero().item() for param in params), optimizer.grad_norm.item() ** 2)
"""


def test_where_fewer_threads_come_than_were_asked_for_all_is_done():
    environment = {**os.environ, "OMP_THREAD_LIMIT": "2"}
    result = subprocess.run(
        [sys.executable, "-c", FEWER], capture_output=True, text=True, timeout=SECONDS, check=True, env=environment
    )
    left, square = map(float, result.stdout.split())
    assert left == 0
    assert square == pytest.approx(400_005)


# How a thread treats numbers so small that torch.set_flush_denormal makes them 0; it sets the caller's mode alone.

SIZE = 200_000  # several threads' worth
# Made here: in that mode, to make such a number of a Python one gives 0.
NUMBERS = {value: torch.full((SIZE,), value) for value in (0.0, 1e-39, 3e-39)}


def tiny(value=3e-39):
    return NUMBERS[value].clone()


def after_step(optimizer):
    for param in parameters_of(optimizer):
        param.grad = tiny()
    optimizer.step()
    states = [state for param in parameters_of(optimizer) for state in optimizer.state[param].values()]
    return [
        *(param.detach() for param in parameters_of(optimizer)),
        *states,
        *([] if optimizer.grad_norm is None else [optimizer.grad_norm]),
    ]


def after_accumulating():
    params = [torch.nn.Parameter(tiny())]
    accumulator = fusedstep.GradientAccumulator(params, backend="cpu")
    for _ in range(2):
        params[0].grad = tiny()
        accumulator(weight=0.5)
    return accumulator.gradients


def after_scaling():
    param = torch.nn.Parameter(tiny())
    param.grad = tiny()
    param.grad[0] = 8.0
    return [fusedstep.clip_grad_norm_([param], 1.0), param.grad]


COMPUTED = {
    "a step": lambda: after_step(fusedstep.SGD([torch.nn.Parameter(tiny(1e-39))], lr=0.1, backend="cpu")),
    "a step with states": lambda: after_step(
        fusedstep.SGD([torch.nn.Parameter(tiny(1e-39))], lr=0.1, momentum=0.9, weight_decay=0.1, backend="cpu")
    ),
    "a rule that reduces": lambda: after_step(
        fusedstep.TorchAdafactor([torch.nn.Parameter(tiny(1e-39))], lr=0.1, backend="cpu")
    ),
    "a clipped step": lambda: after_step(
        fusedstep.SGD([torch.nn.Parameter(tiny(0.0))], lr=1.0, max_grad_norm=1e-39, norm_type=math.inf, backend="cpu")
    ),
    "an average": lambda: after_step(
        fusedstep.SGD([torch.nn.Parameter(tiny(1e-39))], lr=0.1, ema_decay=0.5, backend="cpu")
    ),
    "an accumulator": after_accumulating,
    "scaled gradients": after_scaling,
}


@each(compute=COMPUTED, number=[2, 3])
def test_the_callers_floating_point_mode_holds_in_every_thread(compute, number, threads):
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    results = []
    try:
        for flush in (False, True, False):  # threads that begin in another mode than the second
            for team in (1, number):
                torch.set_flush_denormal(flush)
                threads(team)
                computed = compute()
                torch.set_flush_denormal(False)  # in which even to compare sees zeros
                results.append([tensor.clone() for tensor in computed])
    finally:
        torch.set_flush_denormal(False)
    for alone, together in zip(results[::2], results[1::2], strict=True):
        assert same(alone, together)
    assert same(results[1], results[5])
    assert not same(results[1], results[3])


# Processes.


def run_in(context, target, *args):
    """The child's answer; fails if it hangs or dies."""
    context = multiprocessing.get_context(context)
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(send, *args))
    process.start()
    send.close()
    try:
        assert receive.poll(SECONDS), f"the child hangs (exit code {process.exitcode})"
        return receive.recv()
    finally:
        process.kill()
        process.join()


def child_trains(pipe, optimizer, seeds):
    pipe.send([t.numpy() for t in train(optimizer, seeds)])


def child_makes_and_trains(pipe, case, seeds):
    torch.manual_seed(0)
    pipe.send([t.numpy() for t in train(large(case), seeds)])


def child_loads_and_trains(pipe, data, seeds):
    optimizer = torch.load(io.BytesIO(data), weights_only=False)
    pipe.send([t.numpy() for t in train(optimizer, seeds)])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@each(case=IN_ENGINES, number=[1, 2, 3])
def test_a_forked_child_goes_on_after_the_parent_used_its_threads(case, threads, number):
    threads(number)
    mine = large(case)
    train(mine, range(3))
    got = run_in("fork", child_trains, mine, range(3, 6))
    parent = train(mine, range(3, 6))
    assert same([torch.from_numpy(t) for t in got], parent)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_makes_its_own_optimizer(threads):
    threads(2)
    train(large(ADAMW), range(2))
    got = run_in("fork", child_makes_and_trains, ADAMW, range(3))
    torch.manual_seed(0)
    assert same([torch.from_numpy(t) for t in got], train(large(ADAMW), range(3)))


@pytest.mark.parametrize("case", [ADAMW, MOMENTUM], ids=str)
def test_a_spawned_child_takes_over_through_a_file(case):
    mine = large(case)
    train(mine, range(2))
    file = io.BytesIO()
    torch.save(mine, file)
    got = run_in("spawn", child_loads_and_trains, file.getvalue(), range(2, 4))
    assert same([torch.from_numpy(t) for t in got], train(mine, range(2, 4)))


# Python threads.


def in_threads(works):
    """Run the functions at the same time; raises the first error of any."""
    errors = []
    barrier = threading.Barrier(len(works))

    def run(work):
        try:
            barrier.wait(SECONDS)
            work()
        except BaseException as error:
            errors.append(error)

    team = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in team:
        thread.start()
    end = time.monotonic() + SECONDS
    for thread in team:
        thread.join(max(0.0, end - time.monotonic()))
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


@by_kind_in_engines
def test_different_optimizers_step_in_several_threads(case):
    optimizers = [large(case) for _ in range(4)]
    expected = [train(ours(case, copies(parameters_of(o)), "cpu"), range(8)) for o in optimizers]
    in_threads([lambda o=o: train(o, range(8)) for o in optimizers])
    for optimizer, params in zip(optimizers, expected, strict=True):
        assert same(parameters_of(optimizer), params)


def test_the_very_first_steps_of_a_process_in_several_threads():
    """What is looked up once per process must not be guarded by a lock that waits for the interpreter's."""
    code = """
import sys, threading
sys.setswitchinterval(1e-6)
import torch, fusedstep
def work():
    params = [torch.nn.Parameter(torch.zeros(40)) for _ in range(30)]
    optimizer = fusedstep.AdamW(params)
    for _ in range(20):
        for param in params:
            param.grad = torch.ones(40)
        optimizer.step()
team = [threading.Thread(target=work) for _ in range(8)]
[thread.start() for thread in team]
[thread.join() for thread in team]
print("done")
"""
    for _ in range(3):
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=SECONDS)
        assert result.stdout == "done\n", result.stderr


def test_a_backend_chosen_in_one_thread_is_not_another_threads():
    entered, left = threading.Event(), threading.Event()
    seen = []

    def one():
        with fusedstep.use_backend("reference"):
            entered.set()
            left.wait(SECONDS)
            seen.append(fusedstep.backends.check_choice(None))

    def other():
        entered.wait(SECONDS)
        seen.append(fusedstep.backends.check_choice(None))
        with fusedstep.use_backend("cpu"):
            seen.append(fusedstep.backends.check_choice(None))
        left.set()

    in_threads([one, other])
    assert seen == ["auto", "cpu", "reference"]


def test_steps_in_a_thread_that_is_not_the_main_one():
    mine = ours(ADAMW, parameters(), "cpu")
    other = ours(ADAMW, copies(parameters_of(mine)), "cpu")
    in_threads([lambda: [step(mine, other) for _ in range(3)]])
    assert same(parameters_of(mine), parameters_of(other))


BUSY = """
import os
cores = sorted(os.sched_getaffinity(0))[:2]
os.sched_setaffinity(0, cores)
import statistics, subprocess, sys, time
import torch, fusedstep

def median(threads):
    torch.set_num_threads(threads)
    seconds = []
    for _ in range(40):
        begin = time.perf_counter()
        while time.perf_counter() < begin + 0.004:
            pass  # what a training loop does between two steps
        begin = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)

param = torch.nn.Parameter(torch.zeros(500_000))
param.grad = torch.ones_like(param)
optimizer = fusedstep.SGD([param], lr=0.1, backend="cpu")
others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in 3 * cores]
try:
    time.sleep(0.2)
    print(median(1), median(len(cores)))
finally:
    for other in others:
        other.kill()
"""


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one core")
def test_short_steps_do_not_wait_for_threads_whose_cores_are_busy():
    """There a second thread begins many milliseconds late, which is many times what the whole step takes on one."""
    done = subprocess.run([sys.executable, "-c", BUSY], check=True, capture_output=True, text=True, timeout=SECONDS)
    alone, together = map(float, done.stdout.split())
    assert together < 8 * alone
