"""Every Triton kernel compiles for a GPU as its launch does, on the installed Triton, and keeps its promises."""

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
import triton_barriers
from kinds import ALL
from kinds import RULES as BY_NAME
from support import precision_modes
from triton_code import code_of, norms, schedules, updates

import fusedstep
from fusedstep.backends.triton_reducing import names_of
from fusedstep.cases import CASES

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

FLOATS = ("fp32", "bf16", "fp16", "fp64")
FORMS = sorted({name.split("-")[0] for name in precision_modes("own")} - {"plain"})
EVERYTHING = {"optional": True, "followers": ("fp32", "bf16"), "left": "zero", "maximize": True}


def elementwise():
    """For each elementwise rule its name and which of its states there are, everywhere that an optimizer has it."""
    found = {("accumulate", ())}
    for case in CASES:
        optimizer = getattr(fusedstep, case.optimizer)([torch.zeros(1)], backend="reference", **case.options)
        states = optimizer.states_of(optimizer.param_groups[0])
        found.add((optimizer.rule, tuple(name in states for name in optimizer.state_names)))
    return sorted(found)


def reducing():
    """The same for rules that reduce, with the states in the order of the kernels' constants."""
    found = []
    for rule, functions in sorted(BY_NAME.items()):
        if not functions.reduces:
            continue
        has = names_of(functions)
        lines = (bool(has.row), bool(has.column))
        for first in {lines, (bool(has.flat),) * 2} - {(False, False)}:
            for element in {False, bool(has.element)}:
                found.append((rule, (*first, element, bool(has.tensor), bool(has.row2), bool(has.column2))))
    return found


RULES = elementwise()
REDUCING_RULES = reducing()


def stored(states, dtype):
    return [dtype if there else "" for there in states]


def kernels():
    """Every rule with every set of its states, every dtype, form, format of states, follower and left gradient."""
    yield schedules()
    for dtype, last in itertools.product(FLOATS, (False, True)):
        yield norms(dtype, first=dtype == "fp32", last=last, by_max_abs=dtype == "bf16", optional=last)
    for number, (rule, states) in enumerate(RULES):
        for dtype in ("fp32", "bf16") if ALL or number % 4 == 0 else ("fp32",):
            yield updates(rule, (dtype, dtype, *stored(states, dtype)))
        yield updates(rule, ("fp32", "bf16", *stored(states, "fp32")), **EVERYTHING)
    for number, (rule, states) in enumerate(REDUCING_RULES):
        for dtype in ("fp32", "bf16") if ALL or number % 4 == 0 else ("fp32",):
            yield updates(rule, (dtype, dtype, *stored(states, dtype)))
        yield updates(rule, ("bf16", "fp32", *stored(states, "bf16")), **EVERYTHING)
    rule, states = REDUCING_RULES[0]
    for dtype in ("fp16", "fp64"):
        yield updates("adam", (dtype,) * 5, left="changed", optional=True)
        yield updates(rule, (dtype, dtype, *stored(states, dtype)), left="changed", optional=True)
    codes = ("i8", "u8", "")
    for weight_format in FORMS:
        for dtype in ("bf16",) if weight_format == "split" else ("bf16", "fp16"):
            yield updates("adam", (dtype, dtype, "bf16", "bf16", ""), weight_format=weight_format)
            yield updates("adam", (dtype, dtype, *codes), weight_format=weight_format, **EVERYTHING)
    yield updates("adam", ("fp32", "fp32", *codes))
    yield updates("adam", ("fp32", "fp32", "bf16", "bf16", ""))
    for followers in (("bf16", "fp16"), ("fp16", ""), ("", "bf16"), ("fp64", "fp32")):
        yield updates("lion", ("fp32", "fp32", "fp32"), followers=followers)
    for capability in (80, 100):
        yield updates("adam", ("fp32", "fp32", "fp32", "fp32", ""), capability=capability)


KERNELS = list(kernels())


@pytest.fixture(scope="module")
def code():
    return list(zip(KERNELS, code_of(KERNELS), strict=True))


def test_every_kernel_compiles(code):
    assert {wanted["rule"] for kind, wanted in KERNELS if kind == "update"} >= {rule for rule, _ in RULES}
    for (kind, wanted), launches in code:
        names = [launch["name"] for launch in launches]
        if kind == "update" and wanted["rule"] in dict(REDUCING_RULES):
            expected = ["sums_kernel", "apply_kernel"]
            if not wanted["rule"].startswith("amos"):
                expected.insert(1, "update_kernel")
            assert names == expected
        else:
            assert names == [{"update": "step_kernel"}.get(kind, f"{kind}_kernel")]


def test_nothing_is_contracted_flushed_approximated_or_spilled(code):
    for wanted, launches in code:
        for launch in launches:
            found = {name: launch[name] for name in ("approximate", "local")}
            # A rule that reduces takes a real power in float64, which has both within it.
            if wanted[1].get("rule") not in ("adafactor", "torch_adafactor"):
                found |= {name: launch[name] for name in ("fma", "flushing")}
            assert not any(found.values()), (wanted, found)


def test_divisions_and_roots_are_rounded_as_ieee_asks(code):
    for (kind, wanted), launches in code:
        if kind == "update" and wanted["rule"] in dict(REDUCING_RULES):
            assert launches[0]["rounded_divisions"] > 0
        elif kind == "update":
            plain = wanted["rule"] in ("sgd", "lion", "accumulate")
            (found,) = launches
            assert (found["rounded_roots"] > 0) == (not plain)
            divides = not plain or wanted["optional"] or "i8" in wanted["dtypes"]
            assert (found["rounded_divisions"] > 0) == divides, wanted


def test_elementwise_kernels_access_16_bytes_at_a_time(code):
    for (kind, wanted), (found, *_) in code:
        if kind == "norm":
            assert found["wide_loads"] > 0
        elif kind == "update" and wanted["rule"] in dict(RULES):
            bits = {"fp32": 32, "bf16": 16, "fp16": 16, "fp64": 64, "i8": 8, "u8": 8}
            sizes = [bits[name] for name in wanted["dtypes"] if name]
            if wanted["weight_format"] == "plain":  # a thread has 8 elements of a whole block: 16 bytes of 16 bits each
                assert found["wide_loads"] >= sum(size // 16 for size in sizes)
                assert found["wide_stores"] >= sum(size // 16 for size in sizes[:1] + sizes[2:])
            else:
                assert found["wide_loads"] > 0


def test_reducing_kernels_access_16_bytes_at_a_time(code):
    bits = {"": 0, "fp32": 32, "bf16": 16, "fp16": 16, "fp64": 64}
    seen = set()
    for (kind, wanted), launches in code:
        if kind != "update" or wanted["rule"] not in dict(REDUCING_RULES):
            continue
        param, grad, _, _, element, *_ = (bits[name] for name in wanted["dtypes"])
        average, copy = (bits[name] for name in wanted["followers"])

        def accesses(elements, *sizes, grad=grad):
            """A thread's accesses: it has 16 bytes of the gradient side by side, and so fewer of narrower numbers."""
            return sum(elements * size for size in sizes if size >= grad) // (128 if grad < 64 else 256)

        # A thread has 16 elements of a tile, or 8 of half a tile; in float64 half of that.
        sums, *update, apply = launches
        assert sums["wide_loads"] >= accesses(16, grad, 0 if wanted["rule"].startswith("amos") else param), wanted
        assert all(launch["wide_loads"] >= accesses(16, grad) for launch in update), wanted
        assert apply["wide_loads"] >= accesses(8, grad, param, element, average), wanted
        left = grad if wanted["left"] else 0
        assert apply["wide_stores"] >= accesses(8, param, element, average, copy, left), wanted
        seen.add(wanted["rule"])
    assert seen == set(dict(REDUCING_RULES))


def test_no_thread_stores_what_another_has_yet_to_load(code):
    for wanted, launches in code:
        for launch in launches:
            assert launch["unordered"] == [], (wanted, launch["name"])


def test_a_barrier_lies_between_a_gradient_and_what_is_left_in_its_place(code):
    seen = set()
    for (_, wanted), launches in code:
        pairs = launches[-1]["gradient_pairs"]  # earlier launches of a rule that reduces leave it as it is
        assert not any(launch["gradient_pairs"] for launch in launches[:-1])
        if wanted.get("left"):
            seen.add(wanted["rule"])
            assert len(pairs) >= 2  # in whole blocks and at the end, or in tiles and in flat tensors
            assert set(pairs) == {"barrier"}, wanted
        else:
            assert pairs == []
    assert seen == {rule for rule, _ in RULES + REDUCING_RULES}


OLD = """
module attributes {"ttg.num-warps" = 8 : i32} {
  tt.func public @kernel(%grads_ptr: !tt.ptr<i64> loc("a"(#loc)), %n: i32 loc("n"(#loc))) {
    %zeros = arith.constant dense<0.0> : tensor<256xf32, #blocked> loc(#loc1)
    %grad = tt.load %grads_ptr : !tt.ptr<i64> loc(#loc1)
    %ptr = tt.int_to_ptr %grad : i64 -> !tt.ptr<f32> loc(#loc1)
    %lanes = tt.splat %ptr : !tt.ptr<f32> -> tensor<256x!tt.ptr<f32>, #blocked> loc(#loc1)
    %start:2 = scf.while (%at = %n, %sum = %zeros) : (i32, tensor<256xf32>) -> (i32, tensor<256xf32>) {
      %more = arith.cmpi slt, %at, %n : i32 loc(#loc1)
      scf.condition(%more) %at, %sum : i32, tensor<256xf32> loc(#loc1)
    } do {
    ^bb0(%at: i32 loc("a"(#loc)), %sum: tensor<256xf32> loc("b"(#loc))):
      %here = tt.addptr %lanes, %at : tensor<256x!tt.ptr<f32>>, tensor<256xi32> loc(#loc1)
      %g = tt.load %here : tensor<256x!tt.ptr<f32>> loc(callsite(#loc1 at #loc2))
      %more_sum = arith.addf %sum, %g : tensor<256xf32> loc(#loc1)
      BETWEEN
      %again = ttg.convert_layout %here : tensor<256x!tt.ptr<f32>, #blocked1> loc(#loc1)
      tt.store %again, STORED : tensor<256x!tt.ptr<f32>> loc(#loc1)
      scf.yield %at, %more_sum : i32, tensor<256xf32> loc(#loc1)
    } loc(#loc1)
    %total = "tt.reduce"(%start#WHICH) <{axis = 0 : i32}> ({
    ^bb0(%a: f32 loc("a"(#loc)), %b: f32 loc("b"(#loc))):
      %c = arith.addf %a, %b : f32 loc(#loc1)
      tt.reduce.return %c : f32 loc(#loc1)
    }) : (tensor<256xf32>) -> f32 loc(#loc1)
    tt.return loc(#loc1)
  } loc(#loc1)
} loc(#loc)
"""


@pytest.mark.parametrize(
    ("between", "stored", "which", "how"),
    [
        ("", "%zeros", 0, ""),
        ("gpu.barrier", "%zeros", 0, "barrier"),
        ("ttg.barrier all", "%zeros", 0, "barrier"),
        ("%h = arith.negf %g : tensor<256xf32>", "%h", 0, "value"),
        ("%h = arith.negf %g : tensor<256xf32>", "%h", 1, ""),  # the sum goes round the loop, then over all threads
        ("%h = arith.negf %zeros : tensor<256xf32>", "%h", 0, ""),
    ],
)
def test_what_keeps_a_load_and_a_store_in_order(between, stored, which, how):
    text = OLD.replace("BETWEEN", between).replace("STORED", stored).replace("WHICH", str(which))
    assert triton_barriers.gradient_pairs(text) == [how]
    assert len(triton_barriers.unordered(text)) == (how == "")


def test_dtypes_have_the_numbers_of_the_compiled_engines():
    from fusedstep.triton_kernels import numeric

    from fusedstep.backends.triton import DTYPES, NONE

    source = (Path(__file__).parents[1] / "csrc" / "numeric.h").read_text()
    for dtype, cpp, name in (
        (torch.float32, "kF32", "FP32"),
        (torch.bfloat16, "kBF16", "BF16"),
        (torch.float16, "kF16", "FP16"),
        (torch.float64, "kF64", "FP64"),
        (torch.int8, "kI8", "I8"),
        (torch.uint8, "kU8", "U8"),
        (torch.int16, "kI16", "BITS"),
    ):
        number = getattr(numeric, name).value
        assert f"{cpp} = {number}" in source
        assert DTYPES.get(dtype, number) == number
    assert numeric.NONE.value == NONE
