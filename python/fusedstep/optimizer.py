"""The base class of all optimizers: torch's contract of groups, states, hooks and the step. It knows no update rule."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from itertools import chain
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import ParamsT, StateDict

from . import checkpoint, checks, dcp, layout, planning, sharding
from .compiler import keep_from_compiler
from .gradient_options import check_max_norm
from .kept import ema
from .options import Options
from .rule import Rule
from .schedules import on_device
from .stepping import Stepper


class FusedOptimizer(Rule, torch.optim.Optimizer):
    """A `torch.optim.Optimizer` that updates each parameter group in one call of a compiled kernel.

    A subclass declares what `Rule` asks for.
    """

    kernel_calls: int = 0  # calls of a compiled kernel in the last step
    stepper: Stepper  # the machinery behind the step, for this package alone

    def __init__(self, params: ParamsT, defaults: dict[str, Any], **options: Unpack[Options]) -> None:
        checks.check_keywords(type(self).__name__, options)
        checks.check_implementation(defaults)
        self.stepper = Stepper(options)
        checks.check_values(defaults, "the defaults")
        self.check_group(on_device.at_the_beginning(defaults))
        self.stepper.shared_out = sharding.maker_shares_out()
        super().__init__(params, defaults)
        dcp.own(self)
        self.stepper.learning_rates = on_device.LearningRates(self.stepper.backend)
        self.stepper.learning_rates.follow(self.param_groups, self.most_steps)

    # Groups and state.

    @property
    def backends_used(self) -> set[str]:
        """Names of the backends that the parameters' last step ran on (empty before the first)."""
        return set(self.stepper.ran_on)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does, after checking its options and that the chosen backend can take it.

        Raises:
            ValueError, TypeError: an option is out of range, or holds for all groups.
            RuntimeError: the backend that was asked for cannot run, with its reasons.
        """
        if isinstance(param_group, dict):
            checks.check_placement(param_group, self.stepper.options)
            group = {**self.defaults, **param_group}
            checks.check_implementation(group)
            checks.check_values(group, f"parameter group {len(self.param_groups)}")
            sharding.check_learning_rate(self, group)
            self.check_group(on_device.at_the_beginning(group))
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            entries = planning.entries_of_last_group(self)
            for entry in entries:
                param = entry.param
                reduces = self.rule_of(self.variant_of(group, entry.name, param))[1]
                checks.check_param(type(self), reduces, param, layout.local(param.detach()), entry.what)
                for kind in self.stepper.kept:
                    kind.check_param(entry, reduces)
                self.stepper.select(self, param, reduces)
        except BaseException:
            self.param_groups.pop()
            raise
        if self.state_at_construction:
            for entry in entries:
                for kind in self.stepper.kept:
                    kind.make(entry._replace(state=self.state[entry.param]))
        if self.stepper.learning_rates is not None:
            self.stepper.learning_rates.follow(self.param_groups, self.most_steps)
        self.stepper.plans = None

    @property
    def schedule_step(self) -> int:
        """The number of steps so far, without skipped ones, by which learning rates follow schedules; may be set."""
        return self.stepper.learning_rates.count if self.stepper.learning_rates.parts else self.most_steps()

    @schedule_step.setter
    def schedule_step(self, count: int) -> None:
        self.stepper.learning_rates.count = count

    def get_last_lr(self) -> list[float]:
        """The learning rate of each group in the next step, as a torch scheduler's method of this name returns it."""
        return [float(group["lr"]) for group in self.param_groups]

    def most_steps(self) -> int:
        """The largest number of steps of a parameter."""
        return self.stepper.kept.step.most(self.state)

    def __getstate__(self) -> dict[str, Any]:
        dcp.forget_template(self)
        return super().__getstate__() | {"stepper": self.stepper, "kernel_calls": self.kernel_calls}

    def __setstate__(self, state: dict[str, Any]) -> None:
        has_differentiable = "differentiable" in state.get("defaults", self.__dict__.get("defaults", ()))
        super().__setstate__(state)
        if not has_differentiable:  # torch adds it to every copied or loaded optimizer's
            del self.defaults["differentiable"]
        stepper = self.__dict__.setdefault("stepper", Stepper({}))
        stepper.template = {}
        dcp.own(self)
        if stepper.learning_rates is None:
            stepper.learning_rates = on_device.LearningRates(stepper.backend)
        stepper.learning_rates.renew(self.param_groups)
        for group in self.param_groups:  # checkpoints of the parent class, or older than an option
            for option, value in self.defaults.items():
                group.setdefault(option, value)
        stepper.plans = None

    def state_dict(self) -> StateDict:
        """The state as the torch class of this name would write it; tensors are not copied."""
        return checkpoint.written(self, super().state_dict())

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state, this class's or the torch class's of the same name.

        Tensors are copied, keep their own dtype (torch casts them to the parameter's) and take the parameter's device
        and layout. What was saved with other precision options is converted in the next step, of which one warning
        tells here. `copies` are renewed. After an error, a hook's too, nothing has changed.

        Raises:
            ValueError: groups do not match, or an option or state is none that a step can be made with.
            RuntimeError: this is inside `swap_ema`.
        """
        self.stepper.kept.ema.refuse_swapped("load_state_dict()")
        with checkpoint.undone_on_error(self):
            with checkpoint.loading(self) as loaded:
                super().load_state_dict(state_dict)
            self.stepper.kept.report(loaded)
        self.renew_copies()

    # The step.

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of all gradients in the last step that needed it, unscaled and before clipping; None before that.

        A new fp32 number (fp64 if all parameters are) on the parameters' device, which is not waited for. Steps need
        it with ``max_grad_norm``, ``error_if_nonfinite`` or ``skip_nonfinite``, and under `fusedstep.GradScaler`.
        """
        return self.stepper.gradients.norm(self.param_groups)

    @property
    def copies(self) -> dict[Tensor, Tensor]:
        """Each parameter's copy in the dtype ``weights_copy``, which every step writes beside the parameter."""
        named = ((group, name, param) for group in self.param_groups for name, param in planning.named(group))
        reducing = ((param, self.rule_of(self.variant_of(group, name, param))[1]) for group, name, param in named)
        with torch.no_grad():
            memory = ((p, self.stepper.select(self, p, reduces).memory(p, reduces)) for p, reduces in reducing)
            return self.stepper.kept.copy.of(memory, self._weight_of)

    def _weight_of(self, param: Tensor) -> Tensor:
        """A parameter's weight as averages and copies follow it; its average while that is in its place."""
        return param if self.stepper.kept.ema.swapped else self.stepper.kept.followed(param, self.state.get(param, {}))

    def renew_copies(self) -> None:
        """Write `copies` anew, after something else than a step has changed the parameters."""
        self.stepper.kept.copy.renew(self._weight_of)

    def swap_ema(self) -> contextlib.AbstractContextManager[None]:
        """Exchange the parameters, in their place in memory, with their averages for the time of a ``with`` block.

        `copies` are renewed too. A parameter that no step has updated yet is its own average. Meanwhile ``step``,
        ``load_state_dict`` and copying or pickling the optimizer raise RuntimeError, and the state that `state_dict`
        shows as "ema" is the weights.

        Raises:
            RuntimeError: the optimizer has no ``ema_decay``, or the averages are in place already, or one of them does
                not fit its parameter.
        """
        kept = self.stepper.kept
        return ema.swapped(self, kept.ema, (kept.ema, kept.copy))

    def check_call(self, max_grad_norm: float | None) -> None:
        """Raise if a step cannot be made now, or not so, before the closure has changed anything."""
        self.stepper.kept.ema.refuse_swapped("step()")
        if max_grad_norm is None:
            return
        check_max_norm("max_grad_norm", max_grad_norm)
        if self.clips():
            raise ValueError(
                f"step(max_grad_norm={max_grad_norm}) contradicts the optimizer's own options, which clip gradients "
                "otherwise: clip in one way"
            )

    def _hooked_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One step with the hooks around it, as torch's own wrapper of `step` runs them."""
        hooks = chain(torch_optimizer._global_optimizer_pre_hooks.values(), self._optimizer_step_pre_hooks.values())
        for pre_hook in hooks:
            result = pre_hook(self, args, kwargs)
            if result is not None:
                if not (isinstance(result, tuple) and len(result) == 2):
                    raise RuntimeError(
                        f"{type(self).step} must return None or a tuple of (new_args, new_kwargs), but got {result}."
                    )
                args, kwargs = result
        loss = self._plain_step(*args[1:], **kwargs)
        self._optimizer_step_code()  # where torch.profiler looks in
        hooks = chain(self._optimizer_step_post_hooks.values(), torch_optimizer._global_optimizer_post_hooks.values())
        for post_hook in hooks:
            post_hook(self, args, kwargs)
        return loss

    def _plain_step(self, closure: Callable[[], Any] | None = None, *, max_grad_norm: float | None = None) -> Any:
        try:
            self.check_call(max_grad_norm)
        except Exception as error:
            self.stepper.refuse(self, error)
            raise
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.stepper.update(self, max_grad_norm)
        return loss

    def step(self, closure: Callable[[], Any] | None = None, *, max_grad_norm: float | None = None) -> Any:
        """Update every parameter that has a gradient.

        All parameters are checked before the first is written: if this raises, nothing has changed.

        Args:
            closure: reevaluates the model and returns the loss, which is returned.
            max_grad_norm: in place of the constructor's in this step; infinity: no clipping.

        Raises:
            ValueError, TypeError: ``max_grad_norm`` is out of range.
            RuntimeError: a gradient is sparse, or of another shape, device or kind of number than its parameter; or
                the backend that was asked for cannot run; or the norm is not finite, with ``error_if_nonfinite``.
        """
        if not (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or torch_optimizer._global_optimizer_pre_hooks
            or torch_optimizer._global_optimizer_post_hooks
            or torch.autograd._profiler_enabled()
        ):
            return self._plain_step(closure, max_grad_norm=max_grad_norm)
        args = (self,) if closure is None else (self, closure)
        kwargs = {} if max_grad_norm is None else {"max_grad_norm": max_grad_norm}
        if torch.autograd._profiler_enabled():
            with torch.autograd.profiler.record_function(f"Optimizer.step#{type(self).__name__}.step"):
                return self._hooked_step(args, kwargs)
        return self._hooked_step(args, kwargs)

    # torch would wrap `step` in a profiler range and in its hooks: ours opens the range only while profiling.
    step.hooked = True  # type: ignore[attr-defined]
    keep_from_compiler(step)
