"""Parts of a whole tensor: each process alone, as one of several whose collectives do nothing."""

import contextlib

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from support import ADAMW, ELEMENTWISE, KINDS, WEIGHTS, each, examples, few, ours

from fusedstep import shards

dist = pytest.importorskip("torch.distributed")
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


@contextlib.contextmanager
def rank(number, size):
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=number, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def placements_of(text):
    """ "0", "1", ... for Shard of that dimension, "r" for Replicate; "s0" for the strided Shard of FSDP around TP."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    return [
        Replicate() if one == "r" else _StridedShard(int(one[1:]), split_factor=2) if one[0] == "s" else Shard(int(one))
        for one in text
    ]


def distributed(values, mesh_shape, placements):
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    # Operations on DTensors remember the mesh of another rank, which is equal: a parameter is one without them.
    mesh = init_device_mesh("cpu", tuple(mesh_shape))
    return distribute_tensor(values, mesh, placements_of(placements), src_data_rank=None)


# The shape, the mesh and what each of its dimensions does.
LAYOUTS = {
    "rows": ((8, 6), (2,), ["0"]),
    "uneven rows": ((7, 5), (3,), ["0"]),
    "empty": ((2, 300), (4,), ["0"]),
    "columns": ((4, 48), (2,), ["1"]),
    "uneven columns": ((5, 11), (3,), ["1"]),
    "replicated": ((4, 6), (2,), ["r"]),
    "HSDP": ((16, 40), (2, 2), ["r", "0"]),
    "FSDP and TP": ((16, 64), (2, 2), ["0", "1"]),
    "one dimension twice": ((24, 16), (2, 2), ["s0", "0"]),
    "inner dimensions": ((4, 6, 10), (2, 2), ["1", "2"]),
    "blocks": ((6, 1024), (2,), ["1"]),
    "blocks of rows": ((8, 512), (3,), ["0"]),
}
by_layout = pytest.mark.parametrize("layout", LAYOUTS)


def every_rank(mesh_shape):
    size = torch.Size(mesh_shape).numel()
    for number in range(size):
        with rank(number, size):
            yield number


def check_place(shape, mesh_shape, placements, order):
    """A tensor of the numbers of its elements, in torch's own hands, says where each of them has gone."""
    for _ in every_rank(mesh_shape):
        numel = torch.Size(shape).numel()
        whole = torch.arange(numel).reshape([shape[d] for d in order])
        whole = whole.permute([order.index(d) for d in range(len(shape))])
        param = distributed(whole, mesh_shape, placements)
        local = param.to_local()
        if not local.numel():
            continue
        own = torch.empty_like(local)
        own.as_strided((local.numel(),), (1,)).copy_(torch.arange(local.numel()))
        if param.stride() == whole.stride() and own.stride() == local.stride():
            try:
                found = shards.element_map_of(param, "it")
            except ValueError:  # torch has laid out the part in another order than it says of the whole tensor
                dims = [d for d in range(local.dim()) if local.shape[d] > 1]
                assert sorted(dims, key=local.stride().__getitem__) != sorted(dims, key=whole.stride().__getitem__)
                continue
            assert torch.equal(found.elements(own), local)


@by_layout
def test_the_place_of_a_part(layout):
    shape, mesh_shape, placements = LAYOUTS[layout]
    check_place(shape, mesh_shape, placements, list(range(len(shape))))


@hypothesis.given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    mesh_shape=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    data=st.data(),
)
@examples(100)
def test_places_of_parts(shape, mesh_shape, data):
    dims = st.sampled_from(["r", *map(str, range(len(shape)))])
    placements = data.draw(st.lists(dims, min_size=len(mesh_shape), max_size=len(mesh_shape)))
    check_place(shape, mesh_shape, placements, data.draw(st.permutations(range(len(shape)))))


def test_too_scattered_parts_are_refused():
    with rank(1, 8):
        values = torch.ones(2, 4, 6, 8, dtype=torch.bfloat16)
        param = distributed(values, (2, 2, 2), ["1", "2", "3"]).requires_grad_()
        param.grad = torch.zeros_like(param)
        mine = ours(ADAMW, [("experts", param)], rounding="stochastic")
        with pytest.raises(ValueError, match=r"'stochastic' does not support .*parameter 0 'experts'.*shard fewer"):
            mine.step()
        assert not mine.state


OPTIONS = [
    {},
    {"ema_decay": 0.5, "weights_copy": torch.float16},
    {"master_weights": "split"},
    {"kahan": True, "state_dtype": torch.float32},
    WEIGHTS["stochastic"],
    {**WEIGHTS["stochastic"], "state_dtype": torch.bfloat16, "ema_decay": 0.5},
]


@hypothesis.given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    mesh_shape=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    case=st.sampled_from(ELEMENTWISE),
    options=st.sampled_from(OPTIONS),
    data=st.data(),
)
@examples(100)
def test_parts_have_the_bits_of_one_process(shape, mesh_shape, case, options, data):
    dims = st.sampled_from(["r", *map(str, range(len(shape)))])
    placements = data.draw(st.lists(dims, min_size=len(mesh_shape), max_size=len(mesh_shape)))
    values, *grads = torch.randn(4, *shape).bfloat16()
    whole = torch.nn.Parameter(values.clone())
    expected = ours(case, [("weight", whole)], "cpu", **options)
    for grad in grads:
        whole.grad = grad.clone()
        expected.step()
    for _ in every_rank(mesh_shape):
        param = distributed(values.clone(), mesh_shape, placements).requires_grad_()
        mine = ours(case, [("weight", param)], "cpu", **options)
        for grad in grads:
            param.grad = distributed(grad.clone(), mesh_shape, placements)
            mine.step()
        pairs = [(param, whole)]
        pairs += [(mine.state[param][key], state) for key, state in expected.state.get(whole, {}).items()]
        for part, state in pairs:
            if state.dim():
                part, state = part.detach().to_local(), distributed(state.detach(), mesh_shape, placements).to_local()
            assert torch.equal(part, state)


@each(
    layout=few(LAYOUTS, "uneven rows", "columns", "HSDP", "one dimension twice").keys(),
    dtype=[torch.bfloat16, torch.float16],
    case=[KINDS["no step"], ADAMW],
)
def test_random_bits_are_those_of_one_process(layout, dtype, case, engine):
    """Each element of each part is rounded as in the whole tensor, and so replicas stay equal."""
    shape, mesh_shape, placements = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(3)
    first = torch.randn(3, generator=generator).to(dtype)
    values = torch.randn(shape, generator=generator).to(dtype)
    grads = [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]
    whole = [torch.nn.Parameter(first.clone()), torch.nn.Parameter(values.clone())]
    expected = ours(case, whole, engine, **WEIGHTS["stochastic"])
    for grad in grads:
        whole[1].grad = grad.clone()
        expected.step()
    for _ in every_rank(mesh_shape):
        params = [torch.nn.Parameter(first.clone())]
        params.append(distributed(values.clone(), mesh_shape, placements).requires_grad_())
        mine = ours(case, params, engine, **WEIGHTS["stochastic"])
        for grad in grads:
            params[1].grad = distributed(grad.clone(), mesh_shape, placements)
            mine.step()
        part = distributed(whole[1].detach().clone(), mesh_shape, placements).to_local()
        assert torch.equal(params[1].detach().to_local().view(torch.int16), part.view(torch.int16))
