"""What processes do that do not wait for the numbers they share, as where these are on a GPU; for test_ranks_device.py.

The sums of parts are those of the CUDA source, run on the host, which reads the flag of a skipped step by itself. The
order of exchanges, and what each process does with the flags, is what a GPU has; NCCL, streams and kernels are not.
"""

import functools

import ranks
import torch
import torch.distributed as dist
from host_plan import HostPartsBackend
from kinds import OF_EACH_REDUCING
from ranks import SEVERAL, Pair, assert_untouched, local, raised, snapshot, takes_part
from ranks_reducing import (
    ADAFACTOR,
    SHAPES,
    a_flag_of_one_process_skips_on_all,
    a_scaler,
    an_overflow_on_one_process_skips_on_all,
    assert_close,
    gradients_on_some_processes_alone,
    options,
    pair_of,
    random_layouts,
)
from torch.overrides import TorchFunctionMode

import fusedstep
from fusedstep import exchange, gradients
from fusedstep.backends import parts

SCENARIOS = {}
scenario = functools.partial(ranks.scenario, among=SCENARIOS)


class Unseen(exchange.Exchange):
    """Whose numbers the host does not look at unless it must."""

    def __init__(self, params):
        super().__init__(params)
        self.host_sees = False


class Asked(TorchFunctionMode):
    """Counts how often the host asks for numbers, for which it would wait."""

    NAMES = ("tolist", "item", "numpy", "__bool__", "__float__", "__int__", "__index__")
    times = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.times += getattr(function, "__name__", "") in self.NAMES
        return function(*args, **(kwargs or {}))


scenario(option=["average and copy", "write"])(options)
scenario(where=["HSDP", "FSDP and TP"])(gradients_on_some_processes_alone)
for same in (an_overflow_on_one_process_skips_on_all, a_flag_of_one_process_skips_on_all, a_scaler):
    scenario(same)


@scenario(case=OF_EACH_REDUCING)
def rules(case):
    """One parameter has no gradient at first."""
    for where, dtype in (("three", torch.float64), (SEVERAL, torch.float32)):
        if where is SEVERAL or takes_part(where):
            pair = pair_of(case, where, shapes=SHAPES[:5], dtype=dtype)
            for number in range(2):
                pair.step(skip=() if number else (0,))
            assert_close(pair)


@scenario
def some_random_layouts():
    random_layouts("cpu", range(12))


@scenario
def a_steady_step_asks_for_no_number():
    """One for which a process has no gradient asks for its flags, all at once."""
    for given in ({}, {"max_grad_norm": 1.0, "skip_nonfinite": True, "zero_grads": True}):
        pair = Pair(fusedstep.Adafactor, "four", SHAPES[:5], **ADAFACTOR, **given)
        with Asked() as asked:
            torch.ones(2).tolist()
        assert asked.times == 1
        for number in range(4):
            pair.give(skip=(1,) if number == 3 else ())
            with Asked() as asked:
                pair.mine.step()
            if number >= 2:
                assert asked.times == (number == 3), (number, asked.times)


@scenario
def who_fails_raises_and_the_others_skip_the_step():
    for where in ("four", "HSDP", SEVERAL):
        for given in ({}, {"max_grad_norm": 1.0}):
            pair = Pair(fusedstep.Adafactor, where, SHAPES[:5], **given)
            pair.step()
            before = snapshot(pair)
            pair.give()
            if dist.get_rank() == 2:
                pair.parts[2].grad = torch.zeros(pair.parts[2].shape)
                assert "the gradient is a plain tensor" in raised(RuntimeError, pair.mine.step)
            else:
                pair.mine.step()
            assert_untouched(pair, before)
            for _ in range(2):
                pair.step()
            assert_close(pair)


@scenario
def who_has_frozen_a_parameter_raises_and_the_others_skip_the_step():
    pair = Pair(fusedstep.Adafactor, "four", SHAPES[:3])
    pair.step()
    before = snapshot(pair)
    pair.give()
    if dist.get_rank() == 1:
        pair.parts[1].requires_grad_(False)
        pair.parts[1].grad = None
        assert "some processes have a gradient of parameter 1 'p1'" in raised(RuntimeError, pair.mine.step)
    else:
        pair.mine.step()
    assert_untouched(pair, before)
    pair.parts[1].requires_grad_(True)
    pair.step()
    assert_close(pair)


@scenario
def another_limit_than_the_others_have_skips_the_step():
    """The others enter the sums that follow, and so does the process that raises."""
    pair = Pair(fusedstep.Adafactor, "four", SHAPES[:3], max_grad_norm=1.0)
    pair.step()
    before = snapshot(pair)
    pair.give()
    if dist.get_rank() == 3:
        found = raised(RuntimeError, functools.partial(pair.mine.step, max_grad_norm=2.0))
        assert "processes differ in what step() was given" in found
    else:
        pair.mine.step()
    assert_untouched(pair, before)
    pair.step()
    assert_close(pair)


@scenario
def parts_of_which_torchs_operations_make_the_step_are_skipped_too():
    """One process has a part that is no stretch of memory: it asks, and the others go on with what it sends."""
    for flag in (0.0, 1.0):
        pair = Pair(fusedstep.Adafactor, "columns", ((6, 9), (4, 9)), **ADAFACTOR)
        if dist.get_rank() == 1:
            part = pair.parts[0]
            memory = local(part).t().contiguous().t()
            with torch.no_grad():
                part._local_tensor.set_(memory)
        if dist.get_rank() < 3:
            pair.step()
            before = snapshot(pair)
            pair.give()
            pair.mine.found_inf = torch.tensor(flag if dist.get_rank() == 2 else 0.0)
            pair.mine.step()
            del pair.mine.found_inf
            if flag:
                assert_untouched(pair, before)
            else:
                pair.expected.step()
                assert_close(pair)


def main():
    parts.CPU_PARTS, gradients.Exchange = HostPartsBackend(), Unseen
    ranks.main(SCENARIOS)


if __name__ == "__main__":
    main()
