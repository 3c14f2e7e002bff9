"""What rules that reduce do in several processes, for test_ranks_reducing.py, in the way of ranks.py.

Sums are added up in another order than one process has: numbers are those of one process to 1e-6, and where no sum
crosses processes to the last bit.
"""

import functools
import sys

import ranks
import torch
from ranks import (
    MESHES,
    SEVERAL,
    Pair,
    takes_part,
)
from torch.distributed.tensor import DTensor

import fusedstep
from fusedstep.cases import REDUCING

SCENARIOS = {}
scenario = functools.partial(ranks.scenario, among=SCENARIOS)

# Matrices, a batch of them, kernels, vectors; parts that are uneven or empty; single rows and columns.
SHAPES = ((8, 6), (7, 5), (3,), (2, 33), (64, 96), (3, 5, 4), (9, 4, 3, 3), (1, 7), (6, 1), (11,))
EXACT = {"rtol": 0, "atol": 0}
ADAFACTOR = {"lr": 0.05, "relative_step": False, "beta1": 0.5, "weight_decay": 0.1}


def whole(tensor):
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def close(other):
    """1e-6 of the numbers, of which the largest have made the others by cancelling; in float64 the numbers to 1e-9."""
    if other.dtype == torch.float64:
        return {"rtol": 1e-9, "atol": 1e-12}
    return {"rtol": 0, "atol": 1e-6 * other.float().abs().max().item() if other.numel() else 0}


def assert_close(pair, exact=False):
    """Parameters, states and copies are those of one process; what processes share, each of them has so."""
    for i, (part, expected) in enumerate(zip(pair.parts, pair.whole, strict=True)):
        states, others = pair.mine.state.get(part, {}), pair.expected.state.get(expected, {})
        assert states.keys() == others.keys(), (i, states.keys(), others.keys())
        found = {"parameter": (part, expected), **{key: (states[key], others[key]) for key in states}}
        if pair.mine.stepper.kept.copy.dtype is not None:
            found["copy"] = pair.mine.copies[part], pair.expected.copies[expected]
        for key, (mine, other) in found.items():
            text = f"{key} of p{i}, {pair.where[i]}"
            if pair.where[i] is not None and other.dim():
                assert isinstance(mine, DTensor), text
                assert mine.device_mesh == part.device_mesh, text
            assert mine.dtype == other.dtype, text
            torch.testing.assert_close(
                whole(mine),
                other.detach(),
                **(EXACT if exact else close(other)),
                msg=lambda found, text=text: f"{text}: {found}",
            )


def pair_of(case, where, **given):
    given = {"shapes": SHAPES, **given}
    options = {**case.options, **given}
    if "reduce" in options and options["reduce"] == (0,):
        options["reduce"] = {f"p{i}": (0,) for i in range(0, len(given["shapes"]), 2)}  # the others are elementwise
    return Pair(getattr(fusedstep, case.optimizer), where, **options)


@scenario(case=REDUCING)
def rules(case):
    """One parameter has no gradient at first, another one never."""
    for where in (*MESHES, SEVERAL * 2):
        for dtype in (torch.float32, torch.float64):
            if isinstance(where, list) or takes_part(where):
                pair = pair_of(case, where, dtype=dtype)
                for number in range(3):
                    pair.step(skip=(2,) if number else (0, 2))
                assert_close(pair, exact=where == "replicated")


def main():
    ranks.main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], SCENARIOS)


if __name__ == "__main__":
    main()
