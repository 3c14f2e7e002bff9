"""Sparse gradients, where torch takes them; torch.optim is the judge."""

import io

import pytest
import torch
from kinds import ALL, each

import fusedstep
from fusedstep.backends import BACKENDS
from fusedstep.cases import CASES

TAKES_ROWS = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "maximize": True}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "eps": 1e-3}),
    ("Adagrad", {"lr": 0.1, "initial_accumulator_value": 0.5, "maximize": True}),
]
TAKES_ALL = [
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
]
pytestmark = [
    pytest.mark.plans,
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
]
by_backend = pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])


@pytest.fixture(autouse=True)
def _skip_without(request):
    backend = request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    reasons = BACKENDS[backend].reasons(torch.device("cpu")) if backend else []
    if reasons:
        pytest.skip("; ".join(reasons))


def sparse_grad(param, names, sparse_dim=1):
    """A gradient of the rows ``names``, some named twice."""
    indices = torch.tensor(names)
    indices = indices.unsqueeze(0) if sparse_dim == 1 else indices.t()
    values = torch.randn(indices.shape[1], *param.shape[sparse_dim:], dtype=param.dtype)
    return torch.sparse_coo_tensor(indices, values, param.shape, check_invariants=True)


def pair(name, options, backend, values):
    """Ours on the values themselves, whatever their layout, and torch's on copies."""
    theirs = [torch.nn.Parameter(value.clone()) for value in values]
    mine = [torch.nn.Parameter(value) for value in values]
    ours = getattr(fusedstep, name)(mine, backend=backend, **options)
    return ours, getattr(torch.optim, name)(theirs, foreach=False, **options)


def step(optimizers, grads):
    for optimizer in optimizers:
        for param, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
            param.grad = None if grad is None else grad.clone()
        optimizer.step()


def assert_same(optimizers, **tolerance):
    mine, theirs = (optimizer.param_groups[0]["params"] for optimizer in optimizers)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)
        for key, value in optimizers[1].state[b].items():
            if isinstance(value, torch.Tensor) and key in optimizers[0].state[a]:
                value = value.to_dense() if value.is_sparse else value
                torch.testing.assert_close(optimizers[0].state[a][key], value, **tolerance)


@by_backend
@each(row=TAKES_ROWS + TAKES_ALL, layout=["plain", "transposed", "strided"])
def test_training_matches_torch(row, backend, layout):
    name, options = row
    table = {
        "plain": torch.randn(9, 4, dtype=torch.float64),
        "transposed": torch.randn(4, 9, dtype=torch.float64).t(),
        "strided": torch.randn(18, 9, dtype=torch.float64)[::2, 1:8:2],
    }[layout]
    optimizers = pair(name, options, backend, [table, torch.randn(5, dtype=torch.float64)])
    strides = table.stride()
    for names in ([3, 1, 3], [8], [0, 1, 2, 2, 1, 0]):
        step(optimizers, [sparse_grad(table, names), torch.randn(5, dtype=torch.float64)])
        assert_same(optimizers, rtol=1e-13, atol=1e-14)
    assert optimizers[0].param_groups[0]["params"][0].stride() == strides


@by_backend
@each(row=TAKES_ROWS, dtype=[torch.float32, torch.bfloat16])
def test_other_rows_stay_as_they_are(row, backend, dtype):
    name, options = row
    table = torch.randn(50, 3, dtype=dtype)
    table[7] = float("nan")
    optimizer, _ = pair(name, options, backend, [table.clone()])
    param = optimizer.param_groups[0]["params"][0]
    for _ in range(2):
        version = param._version
        param.grad = sparse_grad(param, [4, 40, 4])
        optimizer.step()
        assert param._version > version
    rest = [row for row in range(50) if row not in (4, 40)]
    torch.testing.assert_close(param.detach()[rest], table[rest], rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(param.detach()[4], table[4])
    for key, state in optimizer.state[param].items():
        if key != "step":
            assert (state[rest] == options.get("initial_accumulator_value", 0.0)).all()


@by_backend
@pytest.mark.parametrize(("name", "options"), TAKES_ROWS if ALL else TAKES_ROWS[1:3])
def test_gradients_may_change_between_sparse_dense_and_none(name, options, backend):
    table = torch.randn(6, 2, 3, dtype=torch.float64)
    optimizers = pair(name, options, backend, [table])
    kinds = [
        sparse_grad(table, [1, 5]),
        torch.randn_like(table),
        sparse_grad(table, [[1, 0], [1, 1], [1, 0]], sparse_dim=2),
        None,
        torch.sparse_coo_tensor(torch.zeros(1, 0, dtype=torch.long), torch.zeros(0, 2, 3).double(), table.shape),
        sparse_grad(table, [2]),
    ]
    for grad in kinds:
        step(optimizers, [grad])
        assert_same(optimizers, rtol=1e-13, atol=1e-14)


@by_backend
def test_an_embedding_under_a_grad_scaler(backend):
    results = []
    for cls, options in ((fusedstep.Adagrad, {"backend": backend}), (torch.optim.Adagrad, {"foreach": False})):
        torch.manual_seed(1)
        model = torch.nn.Embedding(10, 3, sparse=True)
        optimizer = cls(model.parameters(), lr=0.1, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for number in range(4):
            optimizer.zero_grad()
            loss = model(torch.tensor([number, 3, 3])).square().sum()
            scaler.scale(loss * (float("inf") if number == 1 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append((model.weight.detach(), optimizer.state_dict()["state"][0]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_weight_decay_is_refused_in_torchs_words(name):
    optimizers = pair(name, {"lr": 0.1, "weight_decay": 0.1}, "cpu", [torch.randn(4, 2)])
    mine = optimizers[0].param_groups[0]["params"][0]
    before = mine.detach().clone()
    mine.grad = sparse_grad(mine, [1])
    with pytest.raises(RuntimeError, match="weight_decay option is not compatible with sparse gradients") as error:
        optimizers[0].step()
    assert "parameter 0, shape (4, 2)" in str(error.value)
    assert torch.equal(mine, before)
    with pytest.raises(RuntimeError):
        step([optimizers[1]], [sparse_grad(mine, [1])])


def test_the_others_refuse():
    for name in {case.optimizer for case in CASES} - {"SGD", "Adagrad"}:
        param = torch.nn.Parameter(torch.randn(4, 2))
        optimizer = getattr(fusedstep, name)([param])
        param.grad = sparse_grad(param, [1])
        with pytest.raises(RuntimeError, match=f"{name} does not support sparse gradients"):
            optimizer.step()


def test_a_sparse_momentum_buffer_of_torch_is_loaded():
    table = torch.randn(7, 2, dtype=torch.float64)
    mine, theirs = pair("SGD", {"lr": 0.1, "momentum": 0.9}, "cpu", [table])
    for _ in range(2):
        step([theirs], [sparse_grad(table, [1, 4])])
    assert theirs.state_dict()["state"][0]["momentum_buffer"].is_sparse
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    file.seek(0)
    mine.load_state_dict(torch.load(file))
    with torch.no_grad():
        mine.param_groups[0]["params"][0].copy_(theirs.param_groups[0]["params"][0])
    step((mine, theirs), [sparse_grad(table, [0, 4])])
    assert_same((mine, theirs), rtol=1e-13, atol=1e-14)
