"""Search spaces: the published rule, and a real study with Optuna."""

import inspect
import math

import pytest
import torch

import fusedstep
from fusedstep import tuning
from fusedstep.tuning import LogUniform, search_space

ALL = ["lr", "one_minus_beta1", "eps", "one_minus_beta2"]


def test_the_more_trials_the_more_is_tuned():
    for trials, tuned in ((1, 1), (9, 1), (10, 2), (24, 2), (25, 3), (99, 3), (100, 4), (10_000, 4)):
        space = search_space(trials)
        assert list(space) == ALL[:tuned], trials
        assert all(isinstance(r, LogUniform) and 0 < r.low < r.high for r in space.values())


def test_the_ranges_hold_the_defaults_of_the_optimizers():
    space = search_space(100)
    for cls in (fusedstep.Adam, fusedstep.AdamW, torch.optim.Adam, torch.optim.AdamW):
        defaults = {name: p.default for name, p in inspect.signature(cls).parameters.items()}
        beta1, beta2 = defaults["betas"]
        values = (defaults["lr"], 1 - beta1, defaults["eps"], 1 - beta2)
        for name, value in zip(ALL, values, strict=True):
            assert space[name].low < value < space[name].high


def test_every_point_of_a_space_makes_an_optimizer():
    space = search_space(100, one_minus_beta1=(1e-3, 1.0), one_minus_beta2=(1e-8, 1.0))
    for share in (0.0, 0.3, 1.0):
        values = {name: r.at(share) for name, r in space.items()}
        optimizer = fusedstep.AdamW([torch.zeros(2)], **tuning.options(values))
        beta1, beta2 = optimizer.defaults["betas"]
        assert optimizer.defaults["lr"] == values["lr"]
        assert optimizer.defaults["eps"] == values["eps"]
        assert (beta1, beta2) == (1 - values["one_minus_beta1"], 1 - values["one_minus_beta2"])


def test_shares_are_spread_over_orders_of_magnitude():
    lr = LogUniform(1e-4, 1e-2)
    assert lr.at(0) == 1e-4
    assert lr.at(1) == 1e-2
    assert math.isclose(lr.at(0.5), 1e-3)
    for share in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"Invalid share: .* \(it must be from 0 to 1\)"):
            lr.at(share)


def test_what_is_not_tuned_keeps_its_value():
    assert tuning.options({"lr": 0.1}) == {"lr": 0.1}
    assert tuning.options({"lr": 0.1, "one_minus_beta1": 0.25}) == {"lr": 0.1, "betas": (0.75, 0.999)}
    assert tuning.options({"one_minus_beta2": 0.25}, betas=(0.5, 0.9)) == {"betas": (0.5, 0.75)}
    with pytest.raises(ValueError, match=r"Invalid hyperparameters: \['beta1'\]"):
        tuning.options({"beta1": 0.9})


@pytest.mark.parametrize(
    ("trials", "ranges", "error", "message"),
    [
        (0, {}, ValueError, r"Invalid trials: 0 \(it must be 1 or larger\)"),
        (2.5, {}, TypeError, "Invalid trials: 2.5 is a float"),
        (True, {}, TypeError, "Invalid trials: True is a bool"),
        (5, {"lr": 0.1}, TypeError, "Invalid lr: 0.1"),
        (5, {"lr": (0.1,)}, TypeError, "two numbers"),
        (5, {"lr": ("a", "b")}, TypeError, "two numbers"),
        (5, {"lr": (0.0, 0.1)}, ValueError, r"Invalid lr: \(0.0, 0.1\) \(it must be 0 < lower bound < upper bound"),
        (5, {"eps": (0.2, 0.1)}, ValueError, "Invalid eps"),
        (5, {"eps": (0.2, math.inf)}, ValueError, "finite"),
        (5, {"eps": (math.nan, 1.0)}, ValueError, "Invalid eps"),
        (5, {"one_minus_beta1": (0.1, 1.1)}, ValueError, "Invalid one_minus_beta1.*at most 1"),
    ],
)
def test_bad_arguments(trials, ranges, error, message):
    with pytest.raises(error, match=message):
        search_space(trials, **ranges)


@pytest.mark.filterwarnings("ignore")  # optuna's own: the sampler is experimental
def test_a_study_with_optuna_finds_a_good_learning_rate():
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = search_space(30, lr=(1e-6, 10.0))
    target = torch.linspace(-1, 1, 8)

    def objective(trial):
        param = torch.nn.Parameter(torch.zeros(8))
        optimizer = fusedstep.AdamW([param], **tuning.suggest(trial, space))
        for _ in range(40):
            optimizer.zero_grad()
            loss = (param - target).square().sum()
            loss.backward()
            optimizer.step()
        return loss.item()

    study = optuna.create_study(sampler=optuna.samplers.QMCSampler(scramble=True, seed=0))
    study.optimize(objective, n_trials=30)
    assert set(study.best_params) == set(space)
    assert study.best_value < 0.1 < max(trial.value for trial in study.trials)
    for trial in study.trials:
        for name, value in trial.params.items():
            assert space[name].low <= value <= space[name].high
    distribution = study.trials[0].distributions["lr"]
    assert distribution.log
    assert (distribution.low, distribution.high) == (1e-6, 10.0)
