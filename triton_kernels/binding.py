"""The update rules of the optimizers' classes as functions of Triton: the same text that the reference runs."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from .. import numerics
from ..rule import Rule
from . import numeric


@functools.cache
def bound(function: Callable) -> triton.JITFunction:
    """A function of a rule, where what it calls of numerics.py is what numeric.py has under the same name."""
    names = dict(function.__globals__)
    for name in function.__code__.co_names:
        called = names.get(name)
        if isinstance(called, types.FunctionType):
            names[name] = getattr(numeric, name) if called.__module__ == numerics.__name__ else bound(called)
    return _jitted(function, function.__qualname__, names)


def _jitted(function: Callable, qualname: str, names: dict[str, Any]) -> triton.JITFunction:
    """A function with other global names; its own name tells it from others in Triton's messages and caches."""
    twin = types.FunctionType(function.__code__, {**names, "tl": tl}, function.__name__)
    twin.__module__, twin.__qualname__ = function.__module__, qualname
    return triton.jit(twin)


@triton.jit
def narrowed(scalars, N: tl.constexpr, NARROWS: tl.constexpr, ARITHMETIC: tl.constexpr):
    """The scalars as `numerics.narrowed` gives them to a rule's functions."""
    taken = ()
    for k in tl.static_range(N):
        if NARROWS[k]:
            taken = taken + (scalars[k].to(ARITHMETIC),)
        else:
            taken = taken + (scalars[k],)
    return taken


# The names in capitals are those that the functions below give.
def scalars_of(hyper_ptr, step, ARITHMETIC: tl.constexpr):
    h = HYPER(*load_several(hyper_ptr, N_HYPER))  # noqa: F821
    return SCALARS(*narrowed(PREPARE(h, step), N_SCALARS, NARROWS, ARITHMETIC))  # noqa: F821


def finish_of(s, param_rms, update_rms, ARITHMETIC: tl.constexpr):
    return SCALARS(*narrowed(FINISH(s, param_rms, update_rms), N_SCALARS, NARROWS, ARITHMETIC))  # noqa: F821


@functools.cache
def prepare(rule: type[Rule]) -> triton.JITFunction:
    """`Rule.prepare`, from hyperparameters in memory and a number of steps; scalars are narrowed."""
    names = {"HYPER": rule.Hyper, "N_HYPER": tl.constexpr(len(rule.Hyper._fields)), "PREPARE": bound(rule.prepare)}
    return _narrowing(scalars_of, rule.prepare, rule.Scalars, names)


@functools.cache
def finish(rule: type[Rule]) -> triton.JITFunction:
    """`Rule.finish`, whose scalars are narrowed."""
    return _narrowing(finish_of, rule.finish, rule.Finish, {"FINISH": bound(rule.finish)})


def _narrowing(function: Callable, text: Callable, scalars: type, names: dict[str, Any]) -> triton.JITFunction:
    narrows = numerics.narrows(scalars)
    names |= {"SCALARS": scalars, "N_SCALARS": tl.constexpr(len(narrows)), "NARROWS": tl.constexpr(narrows)}
    names |= {"narrowed": narrowed, "load_several": numeric.load_several}
    return _jitted(function, f"{text.__qualname__}.{function.__name__}", names)
