"""Which of Adam's hyperparameters to tune for a number of trials, and where to look for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, NamedTuple

MANY_TRIALS = 100  # "substantially more than 25"


class LogUniform(NamedTuple):
    """Numbers between two bounds, all orders of magnitude equally likely."""

    low: float
    high: float

    def at(self, share: float) -> float:
        """The number below which ``share`` (from 0 to 1) of all draws lie: for random or quasi-random search.

        Raises:
            ValueError: ``share`` is not from 0 to 1.
        """
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"Invalid share: {share} (it must be from 0 to 1)")
        return min(max(self.low ** (1.0 - share) * self.high**share, self.low), self.high)


def search_space(
    trials: int,
    *,
    lr: tuple[float, float] = (1e-5, 1e-1),
    one_minus_beta1: tuple[float, float] = (1e-2, 0.5),
    eps: tuple[float, float] = (1e-10, 1e-3),
    one_minus_beta2: tuple[float, float] = (1e-4, 1e-1),
) -> dict[str, LogUniform]:
    """The hyperparameters of Adam that are worth tuning with so many trials, each with the range to draw it from.

    ========================= =========================================
    trials                    tuned
    ========================= =========================================
    fewer than 10             ``lr``
    10 to 24                  ``lr``, ``one_minus_beta1``
    25 to 99                  ``lr``, ``one_minus_beta1``, ``eps``
    100 and more              all of these and ``one_minus_beta2``
    ========================= =========================================

    The rule is that of the Deep Learning Tuning Playbook (Godbole, Dahl, Gilmer, Shallue and Nado, 2023,
    github.com/google-research/tuning_playbook, "How should Adam's hyperparameters be tuned?"), which leaves two things
    open that are this package's choice: "substantially more than 25" trials are 100, and the bounds, which lie around
    the usual values. It recommends quasi-random search while exploring, and to widen a range whose best value lies at
    a bound.

    Args:
        trials: how many there will be, at least 1.
        lr, one_minus_beta1, eps, one_minus_beta2: lower and upper bound, larger than 0; at most 1 for the two
            complements of a beta.

    Raises:
        ValueError, TypeError: an argument is out of range.

    Example:
        >>> space = fusedstep.tuning.search_space(trials=30)
        >>> def objective(trial):  # of Optuna
        ...     optimizer = fusedstep.AdamW(model.parameters(), **fusedstep.tuning.suggest(trial, space))
        ...     return train(model, optimizer)
        >>> study = optuna.create_study(sampler=optuna.samplers.QMCSampler())
        >>> study.optimize(objective, n_trials=30)
    """
    if isinstance(trials, bool) or not isinstance(trials, int):
        raise TypeError(f"Invalid trials: {trials!r} is a {type(trials).__name__}; it must be a whole number")
    if trials < 1:
        raise ValueError(f"Invalid trials: {trials} (it must be 1 or larger)")
    space = {
        "lr": _range("lr", lr),
        "one_minus_beta1": _range("one_minus_beta1", one_minus_beta1, 1.0),
        "eps": _range("eps", eps),
        "one_minus_beta2": _range("one_minus_beta2", one_minus_beta2, 1.0),
    }
    tuned = 1 if trials < 10 else 2 if trials < 25 else 3 if trials < MANY_TRIALS else 4
    return dict(list(space.items())[:tuned])


def _range(name: str, bounds: Any, most: float = math.inf) -> LogUniform:
    numbers = isinstance(bounds, (tuple, list)) and all(isinstance(b, Real) for b in bounds) and len(bounds) == 2
    if not numbers:
        raise TypeError(f"Invalid {name}: {bounds!r} (it must be two numbers, the lower and the upper bound)")
    low, high = map(float, bounds)
    if not (0.0 < low < high <= most) or math.isinf(high):
        limit = "finite" if math.isinf(most) else f"at most {most:g}"
        raise ValueError(f"Invalid {name}: {bounds!r} (it must be 0 < lower bound < upper bound, {limit})")
    return LogUniform(low, high)


def options(values: Mapping[str, float], betas: tuple[float, float] = (0.9, 0.999)) -> dict[str, Any]:
    """Arguments for an Adam from one value of each hyperparameter in a space.

    Args:
        values: by the names of `search_space`; what is not there keeps the optimizer's default.
        betas: the values of those that are not tuned.

    Raises:
        ValueError: a name is not one of `search_space`.
    """
    unknown = [name for name in values if name not in ("lr", "one_minus_beta1", "eps", "one_minus_beta2")]
    if unknown:
        raise ValueError(f"Invalid hyperparameters: {unknown} (they must be those of search_space)")
    result: dict[str, Any] = {name: float(values[name]) for name in ("lr", "eps") if name in values}
    if "one_minus_beta1" in values or "one_minus_beta2" in values:
        beta1, beta2 = betas
        result["betas"] = (
            1.0 - values["one_minus_beta1"] if "one_minus_beta1" in values else beta1,
            1.0 - values["one_minus_beta2"] if "one_minus_beta2" in values else beta2,
        )
    return result


def suggest(trial: Any, space: Mapping[str, LogUniform], betas: tuple[float, float] = (0.9, 0.999)) -> dict[str, Any]:
    """Arguments for an Adam, drawn by an Optuna trial.

    Args:
        trial: an ``optuna.trial.Trial``.
        space: of `search_space`.
        betas: the values of those that are not tuned.
    """
    drawn = {name: trial.suggest_float(name, low, high, log=True) for name, (low, high) in space.items()}
    return options(drawn, betas)
