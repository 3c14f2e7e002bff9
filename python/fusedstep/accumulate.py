"""Gradient accumulation over micro-batches: a round from its first micro-batch to the gradients that it hands over.

How sums are kept and added to is in `gradient_sums`; no plan and no kernel is known here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Real
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, checks, layout, planning
from .compiler import keep_from_compiler
from .gradient_sums import GradientSums
from .numerics import where
from .optimizer import FusedOptimizer
from .rule import Rule

STATE_KEYS = ("step", "weight", "gradients")


class Hyper(NamedTuple):
    weight: float


class Scalars(NamedTuple):
    weight: float
    first: bool


class GradientAccumulator(Rule):
    r"""Sum (or mean) of the gradients of several micro-batches, kept in fp32 whatever the gradients' dtype.

    With gradient :math:`g_k` of micro-batch :math:`k` and its weight :math:`w_k` (1 unless given):

    .. math::
        a \leftarrow a + w_k g_k \qquad \text{and with mean, handed over:} \quad a / \textstyle\sum_k w_k

    Calling the accumulator after each ``backward()`` reads every ``.grad`` and clears it, in one kernel call for all
    parameters of a device. `assign` makes the result the ``.grad`` of its parameter, in fp32 for a bf16 or fp16
    parameter too, so that clipping, ``GradScaler.unscale_`` and a `fusedstep` optimizer work on unrounded gradients, in
    place (torch takes no other tensor of that dtype as ``.grad``); another optimizer, which may take no other dtype
    than its parameter's, gets them rounded to that. `reset` starts the next round; it touches no buffer.

    Args:
        params: an optimizer, whose groups may change later, or an iterable of parameters or ``(name, parameter)``
            pairs.
        mean: hand the weighted mean over, not the sum.
        set_to_none: clear a ``.grad`` that was read by dropping it; if False, it stays where it is and is set to zero
            by the same kernel that reads it.
        backend: "auto", "cuda", "triton", "cpu" or "reference"; None takes the optimizer's.

    State of each parameter: one buffer, fp32 (fp64, complex64 or complex128 for parameters of these dtypes), from its
    first gradient on: 4 bytes per parameter. A parameter without a gradient in a whole round has none: its ``.grad``
    stays None.

    Raises:
        ValueError, TypeError: an argument is out of range.
        RuntimeError: ``backend`` cannot run for these parameters.

    Example:
        >>> accumulator = fusedstep.GradientAccumulator(optimizer, mean=True)
        >>> for number, batch in enumerate(batches, 1):
        ...     loss(model, batch).backward()
        ...     accumulator()
        ...     if number % 4 == 0:
        ...         accumulator.assign()
        ...         optimizer.step()
        ...         accumulator.reset()

    With ``DistributedDataParallel``, run the micro-batches under ``no_sync()`` and call `all_reduce` before `assign`:
    one exchange for a round, in fp32.

    Follows Hugging Face's TensorFlow ``GradientAccumulator`` (transformers before v5, ``optimization_tf.py``):
    ``step``, ``gradients``, calling it with a list of gradients, ``reset`` and the errors. Differs: a gradient that
    comes first in a later micro-batch counts (there it is left out for ever), and after ``reset`` there are no
    ``gradients`` (there they are zeros).
    """

    rule = "accumulate"
    Hyper, Scalars = Hyper, Scalars
    state_names = ()

    def __init__(
        self,
        params: torch.optim.Optimizer | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
        *,
        mean: bool = False,
        set_to_none: bool = True,
        backend: str | None = None,
    ) -> None:
        checks.check_flag("mean", mean)
        checks.check_flag("set_to_none", set_to_none)
        self._optimizer = params if isinstance(params, torch.optim.Optimizer) else None
        self._round = self._optimizer is not None and not isinstance(params, FusedOptimizer)
        if backend is None and isinstance(params, FusedOptimizer):
            backend = params.stepper.backend
        self._sums = GradientSums(type(self), backends.check_choice(backend))
        self.mean = mean
        self.set_to_none = set_to_none
        self.kernel_calls = 0  # of a compiled kernel, in the last call of the accumulator
        self._step = 0
        self._weight = 0.0
        self._closed = False  # from all_reduce() or assign() to reset()
        # Parameter, its ``.grad``, and what was that before.
        self._assigned: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._listed: list[Tensor] = []
        self._params: dict[Tensor, str | None] = {}
        self._list(params)
        self._make_known()
        for index, (param, name) in enumerate(self._params.items()):
            if not param.is_leaf:
                what = checks.describe(index, name, param)
                raise ValueError(f"can't accumulate the gradient of a non-leaf Tensor: {what}")
            self._sums.backend_of(param)

    def _list(self, params: Any = None) -> None:
        """Look up the parameters; the same one listed twice counts once, for it has one gradient."""
        if self._optimizer is None and self._params:
            return  # only an optimizer's may change
        if self._optimizer is not None:
            groups = self._optimizer.param_groups
            listed = [param for group in groups for param in group["params"]]
            if len(listed) == len(self._listed) and all(map(is_, listed, self._listed)):
                return
            names = planning.first_names(groups)
        else:
            if isinstance(params, Tensor) or not isinstance(params, Iterable):
                raise TypeError(
                    "params argument given to GradientAccumulator should be an optimizer or an iterable of Tensors "
                    f"or (name, Tensor) pairs, but got {type(params).__name__}"
                )
            named = [param if isinstance(param, tuple) and len(param) == 2 else (None, param) for param in params]
            for _, param in named:
                if not isinstance(param, Tensor):
                    raise TypeError(f"GradientAccumulator can only take Tensors, but one of the params is {param!r}")
            listed = [param for _, param in named]
            names = {param: name for name, param in named}
        if not listed:
            raise ValueError("GradientAccumulator got an empty parameter list")
        self._listed = listed
        self._params = names
        self._sums.follow(names)

    def _make_known(self) -> None:
        if isinstance(self._optimizer, FusedOptimizer):
            self._optimizer.stepper.accumulators.add(self)

    def forget_replaced(self) -> None:
        """Drop what is kept for parameters that the optimizer has no more; it calls this when it has found out."""
        if any(group["params"] for group in self._optimizer.param_groups):
            self._list()

    # The rule.

    @staticmethod
    def prepare(h, step):
        return Scalars(h.weight, step == 1)

    @staticmethod
    def update(param, grad, s, has):
        grad = s.weight * grad
        return (where(s.first, grad, param + grad),)

    # Accumulating.

    @property
    def step(self) -> int:
        """How many micro-batches were accumulated since the last `reset`."""
        return self._step

    @property
    def gradients(self) -> list[Tensor | None]:
        """What was accumulated so far, one tensor or None for each parameter (with ``mean``, new tensors).

        Raises:
            ValueError: nothing was accumulated yet.
        """
        self._check_called()
        sums = self._sums.totals()
        if not self.mean or self._assigned or self._weight == 1:
            return sums
        return [None if total is None else total * (1.0 / self._weight) for total in sums]

    def _check_called(self) -> None:
        if self._step == 0:
            raise ValueError("The accumulator should be called first to initialize the gradients")

    @staticmethod
    def _refuse_if(handed_over: Any, then: str = "accumulating again") -> None:
        if handed_over:
            raise RuntimeError(f"the accumulated gradients were handed over; call reset() before {then}")

    def __call__(self, gradients: Sequence[Tensor | None] | None = None, *, weight: float = 1.0) -> None:
        """Add the gradients of one micro-batch.

        Everything is checked before anything is added: if this raises, nothing has changed.

        Args:
            gradients: one for each parameter, None for none; they are left alone. By default each parameter's
                ``.grad``, which is cleared.
            weight: what the gradients are multiplied by, larger than 0; for instance the number of tokens in the
                micro-batch, to get the mean over tokens.

        Raises:
            ValueError: not as many gradients as parameters, or a weight that is out of range.
            RuntimeError: a gradient is sparse, or of another shape, device or kind of number than its parameter; or
                `assign` or `all_reduce` was called and `reset` was not.
        """
        if isinstance(weight, bool) or not isinstance(weight, Real):
            raise TypeError(f"Invalid weight: {weight!r} is a {type(weight).__name__}; it must be a number")
        if not 0.0 < checks.as_float("weight", weight) < float("inf"):
            raise ValueError(f"Invalid weight: {weight} (it must be larger than 0 and finite)")
        self._refuse_if(self._closed)
        self._list()
        if gradients is not None:
            gradients = list(gradients)
            if len(gradients) != len(self._params):
                raise ValueError(f"Expected {len(self._params)} gradients, but got {len(gradients)}")
            for grad in gradients:
                if grad is not None and not isinstance(grad, Tensor):
                    raise TypeError(f"Expected a Tensor or None for each gradient, but got {type(grad).__name__}")
        zero = gradients is None and not self.set_to_none
        self.kernel_calls = self._sums.add(gradients, float(weight), zero=zero)
        self._step += 1
        self._weight += float(weight)
        if gradients is None and self.set_to_none:
            for param in self._params:
                param.grad = None

    keep_from_compiler(__call__)

    # Handing over.

    def all_reduce(self, group: Any = None) -> None:
        """Add up what the processes of a group accumulated, once and before `assign`.

        The sum is divided by the number of processes, as ``DistributedDataParallel`` does; with ``mean`` the weights
        are added up too, so that the result is the weighted mean over all micro-batches of all processes. A parameter
        that had a gradient in one process gets one in all. Every process must call this.

        Args:
            group: a process group of ``torch.distributed``; None takes the default one.

        Raises:
            ValueError: nothing was accumulated yet.
            RuntimeError: a parameter is a DTensor, whose gradients its own mesh reduces; or `assign` or `all_reduce`
                was called and `reset` was not.
        """
        import torch.distributed as dist

        self._check_called()
        self._refuse_if(self._closed)
        if any(layout.is_wrapper(param) for param in self._params):
            raise RuntimeError("all_reduce() takes plain parameters; backward() reduces the gradients of DTensors")
        weight = torch.tensor([self._weight], dtype=torch.float64, device=next(iter(self._params)).device)
        dist.all_reduce(weight, group=group)
        self._sums.all_reduce(group)
        self._closed = True
        if self.mean:
            self._weight = weight.item()
        else:
            self._sums.scale(1.0 / dist.get_world_size(group))

    def assign(self) -> None:
        """Make what was accumulated the ``.grad`` of the parameters, until `reset`.

        A parameter that had no gradient since the last `reset` gets None.

        Raises:
            ValueError: nothing was accumulated yet.
            RuntimeError: it was called and `reset` was not.
        """
        self._check_called()
        self._refuse_if(self._assigned)
        if self.mean:
            self._sums.scale(1.0 / self._weight)
        self._closed = True
        for param in self._params:
            own, param.grad = param.grad, None
            if param not in self._sums.seen:
                if own is not None and not self.set_to_none:
                    self._assigned.append((param, own, own))
                continue
            buffer = self._sums.buffer(param)
            if self._round:
                buffer = buffer.to(param.grad_dtype or param.dtype)
            _hand_over(buffer, param)
            self._assigned.append((param, param.grad, None if self.set_to_none else own))

    def reset(self) -> None:
        """Forget what was accumulated, and take back what `assign` made a ``.grad``."""
        for param, assigned, own in self._assigned:
            if param.grad is None or param.grad is assigned:  # else it is of a backward() since
                param.grad = own if own is not None and _may_have(param, own) else None
        self._assigned = []
        self._closed = False
        self._step = 0
        self._weight = 0.0
        self._sums.begin_anew()

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """The state between two micro-batches; tensors are not copied.

        ``step``, ``weight`` (the sum of the weights) and ``gradients``: the weighted sum, or None, for each parameter.

        Raises:
            RuntimeError: between `assign` or `all_reduce` and `reset`.
        """
        self._refuse_if(self._closed, "saving them")
        return {"step": self._step, "weight": self._weight, "gradients": self._sums.totals()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken. Tensors are copied, to the parameters' devices.

        Raises:
            ValueError, TypeError: the state does not fit these parameters; nothing is changed then.
        """
        if not isinstance(state_dict, dict):
            raise TypeError(f"Expected state_dict to be a dict, got {type(state_dict).__name__}")
        missing = [key for key in STATE_KEYS if key not in state_dict]
        unexpected = [key for key in state_dict if key not in STATE_KEYS]
        if missing or unexpected:
            raise ValueError(f"loaded state dict: missing keys {missing}, unexpected keys {unexpected}")
        step, weight, gradients = (state_dict[key] for key in STATE_KEYS)
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"loaded state dict: 'step' is {step!r}, it must be a whole number, 0 or larger")
        if isinstance(weight, bool) or not isinstance(weight, Real) or not (0 < weight if step else weight == 0):
            expected = "a number larger than 0" if step else "0 as 'step' is"
            raise ValueError(f"loaded state dict: 'weight' is {weight!r}, it must be {expected}")
        self._list()
        if not isinstance(gradients, (list, tuple)):
            raise TypeError(f"loaded state dict: 'gradients' is a {type(gradients).__name__}, it must be a list")
        if len(gradients) != len(self._params):
            raise ValueError(f"loaded state dict: Expected {len(self._params)} gradients, but got {len(gradients)}")
        for index, ((param, name), value) in enumerate(zip(self._params.items(), gradients, strict=True)):
            if value is None:
                continue
            what = checks.describe(index, name, param)
            if not isinstance(value, Tensor):
                raise TypeError(f"loaded state dict: the gradient of {what} is a {type(value).__name__}")
            if value.shape != param.shape:
                raise ValueError(f"loaded state dict: a gradient of shape {tuple(value.shape)} for {what}")
            if value.is_complex() != param.is_complex() or not (value.is_floating_point() or value.is_complex()):
                raise ValueError(f"loaded state dict: a gradient of dtype {value.dtype} for {what}")
            if step == 0:
                raise ValueError(f"loaded state dict: 'step' is 0, but there is a gradient of {what}")
        self.reset()
        self._sums.load(gradients)
        self._step, self._weight = step, float(weight)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_known()


def _may_have(param: Tensor, grad: Tensor) -> bool:
    """Whether torch takes ``grad`` as the gradient of a parameter, which may have been converted since it did."""
    fits = grad.shape == param.shape and grad.device == param.device
    return fits and param.grad_dtype in (None, grad.dtype)


def _hand_over(buffer: Tensor, param: Tensor) -> None:
    """Make ``buffer`` the gradient of a parameter, whose own dtype is left to set by the user and nobody else."""
    dtype = param.grad_dtype
    if dtype is None or dtype == buffer.dtype:
        param.grad = buffer
    elif layout.is_wrapper(param):  # the tensor inside cannot be exchanged
        param.grad_dtype = None  # which stays so: there is no way back to "that of the parameter"
        param.grad = buffer
    else:
        # `grad_dtype` could be set, but not unset again, and would outlast a conversion of the parameter.
        param.grad = torch.empty((), dtype=dtype, device=buffer.device).expand(buffer.shape)
        param.grad.data = buffer
