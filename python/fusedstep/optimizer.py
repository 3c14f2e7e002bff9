"""The base class of all optimizers: groups, states, plans and the step. It knows no update rule."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Unpack

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import ParamsT, StateDict

from . import backends, checkpoint, checks, dcp, layout, planning, sharding
from .backends import cpu
from .backends.lifetime import CHANGED, Graphs, refuse_capture
from .backends.plan import Plan
from .gradients import GradientOptions, Gradients, check_max_norm
from .kept import Kept, ema
from .options import Options
from .rule import Rule
from .schedules import on_device

if TYPE_CHECKING:
    from .accumulate import GradientAccumulator
    from .record import Step


def _keep_from_compiler(function: Callable) -> None:
    """Let torch.compile break its graph at ``function`` and leave alone all that it calls.

    The same as `torch.compiler.disable`, which would cost 2 us in every call and import the compiler.
    """
    function._torchdynamo_disable = True
    function._torchdynamo_disable_msg = "fusedstep calls its own kernels"
    with contextlib.suppress(ImportError, AttributeError, TypeError):  # a torch that has other names for these
        from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

        set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))


class FusedOptimizer(Rule, torch.optim.Optimizer):
    """A `torch.optim.Optimizer` that updates each parameter group in one call of a compiled kernel.

    A subclass declares what `Rule` asks for, and the names below, `check_group`, `states_of` and `hyper`.
    """

    step_form: ClassVar[Literal["tensor", "int", "absent"]] = "tensor"  # of "step" in the parent class's state_dict
    state_at_construction: ClassVar[bool] = False  # whether the parent class has states before the first step

    non_negative: ClassVar[tuple[str, ...]] = ()  # states that an 8-bit code stores without a sign

    variant_options: ClassVar[tuple[str, ...]] = ()  # keys of a group that `variant_of` looks at

    _plans: list[Plan] | None = None
    _watch: Any = None
    _seen_options: list[list[Any]] | None = None  # those that the variants of the plans were made with
    _learning_rates: on_device.LearningRates | None = None  # None: the constructor has not finished
    _finds_nonfinite: bool = False  # set by `fusedstep.GradScaler`: a step fills in its own found_inf
    kernel_calls: int = 0  # calls of a compiled kernel in the last step
    _ran_on: frozenset[str] = frozenset()  # names of that step's backends
    _at_once: bool = False  # whether all plans of the last step can be gathered and stepped in one native call
    _norms_checked: bool = False  # whether it was checked that the plans' gradients are all that a norm is of
    _shared_out: bool = False  # whether other processes have the other parameters
    _warned_of_pieces: bool = False

    def __init__(self, params: ParamsT, defaults: dict[str, Any], **options: Unpack[Options]) -> None:
        checks.check_keywords(type(self).__name__, options)
        self._options = dict(options)
        checks.check_implementation(defaults)
        self._kept = Kept(options)
        checks.check_values(defaults, "the defaults")
        self.check_group(on_device.at_the_beginning(defaults))
        self._backend = backends.check_choice(options.get("backend"))
        self._gradients = Gradients(GradientOptions.chosen(options))
        self._graphs = Graphs()
        self._accumulators: weakref.WeakSet[GradientAccumulator] = weakref.WeakSet()
        self._shared_out = sharding.maker_shares_out()
        self._template: dict[Tensor, dcp.Made] = {}
        super().__init__(params, defaults)
        dcp.own(self)
        self._learning_rates = on_device.LearningRates(self._backend)
        self._learning_rates.follow(self.param_groups, self._most_steps)

    # What a subclass provides.

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError or TypeError for an option of a group that is out of range."""
        raise NotImplementedError

    def states_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Those of `state_names` that the options of a group need, in their order."""
        raise NotImplementedError

    def hyper(self, group: dict[str, Any], variant: Any) -> tuple[float | Tensor, ...]:
        """The values of `Hyper` for parameters of a group: numbers, or one-element tensors."""
        raise NotImplementedError

    def variant_of(self, group: dict[str, Any], name: str | None, param: Tensor) -> Any:
        """What `hyper` needs to know of a parameter; those of a group with equal variants share a kernel call."""
        return None

    def clips(self) -> bool:
        """Whether `clip` is to be called in a step."""
        return False

    def clips_by_norm(self, group: dict[str, Any]) -> bool:
        """Whether `clip` takes the norm of each gradient of a group."""
        return False

    def clip(self, grads: list[tuple[dict[str, Any], Tensor]]) -> list[Tensor]:
        """The gradients as a step shall take them, from unscaled ones, each with its group."""
        raise NotImplementedError

    @classmethod
    def check_sparse(cls, group: dict[str, Any], what: str) -> None:
        """Raise RuntimeError if the parameter that ``what`` describes cannot take its sparse gradient."""
        raise RuntimeError(
            f"{cls.__name__} does not support sparse gradients ({what}); call .to_dense() on the gradient, "
            "or create the embedding with sparse=False"
        )

    @classmethod
    def changes_rows_alone(cls, group: dict[str, Any]) -> bool:
        """Whether a step with a sparse gradient leaves the rows that it does not name as they are."""
        return True

    @classmethod
    def rule_of(cls, variant: Any) -> tuple[str, bool]:
        """The compiled rule for parameters of a variant, and whether it has sums over rows, columns or tensors."""
        return cls.rule, cls.reduces

    def matrices(self, group: dict[str, Any], name: str | None, param: Tensor) -> tuple[int, int, int] | None:
        """For a rule that reduces: (batch, rows, columns) of a contiguous parameter; None: it is taken as flat."""
        raise NotImplementedError

    def state_shape(self, key: str, group: dict[str, Any], name: str | None, param: Tensor) -> torch.Size | None:
        """The shape of the state ``key`` of a parameter; None if this parameter does not have the state."""
        return param.shape

    def exact_states(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Those of `states_of` that stay in fp32 where ``state_dtype`` is less: the rule takes their difference."""
        return ()

    def begins_anew(self, group: dict[str, Any]) -> bool:
        """Whether a step that finds no states differs from one that finds those of `init_state`."""
        return False

    def init_state(self, key: str, group: dict[str, Any], name: str | None, param: Tensor) -> Tensor:
        """The state ``key`` of a parameter before its first step."""
        return torch.zeros_like(param, memory_format=torch.preserve_format, requires_grad=False)

    # Groups and state.

    @property
    def backends_used(self) -> set[str]:
        """Names of the backends that the parameters' last step ran on (empty before the first)."""
        return set(self._ran_on)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does, after checking its options and that the chosen backend can take it.

        Raises:
            ValueError, TypeError: an option is out of range, or holds for all groups.
            RuntimeError: the backend that was asked for cannot run, with its reasons.
        """
        if isinstance(param_group, dict):
            checks.check_placement(param_group, self._options)
            group = {**self.defaults, **param_group}
            checks.check_implementation(group)
            checks.check_values(group, f"parameter group {len(self.param_groups)}")
            self.check_group(on_device.at_the_beginning(group))
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            entries = planning.entries(self)[-1]
            for entry in entries:
                param = entry.param
                reduces = self.rule_of(self.variant_of(group, entry.name, param))[1]
                checks.check_param(type(self), reduces, param, layout.local(param.detach()), entry.what)
                for kind in self._kept:
                    kind.check_param(entry, reduces)
                self._select(param, reduces)
        except BaseException:
            self.param_groups.pop()
            raise
        if self.state_at_construction:
            for entry in entries:
                for kind in self._kept:
                    kind.make(entry._replace(state=self.state[entry.param]))
        if self._learning_rates is not None:
            self._learning_rates.follow(self.param_groups, self._most_steps)
        self._plans = None

    @property
    def schedule_step(self) -> int:
        """The number of steps so far, without skipped ones, by which learning rates follow schedules; may be set."""
        return self._learning_rates.count if self._learning_rates.parts else self._most_steps()

    @schedule_step.setter
    def schedule_step(self, count: int) -> None:
        self._learning_rates.count = count

    def get_last_lr(self) -> list[float]:
        """The learning rate of each group in the next step, as a torch scheduler's method of this name returns it."""
        return [float(group["lr"]) for group in self.param_groups]

    def _most_steps(self) -> int:
        """The largest number of steps of a parameter."""
        return self._kept.step.most(self.state)

    def _select(self, param: Tensor, reduces: bool) -> backends.Backend:
        # Weights of a dtype that nothing can update are carried along until they have a gradient, as torch does.
        trained = param.requires_grad or param.grad is not None or planning.started(self, param)
        updated = trained and not (reduces and param.is_complex())
        return backends.select(self._backend, param.device, param.dtype if updated else torch.float32)

    def __getstate__(self) -> dict[str, Any]:
        dcp.forget_template(self)
        kept = (
            *("_backend", "_kept", "_learning_rates", "_gradients", "_options"),
            *("_shared_out", "_ran_on", "kernel_calls"),
        )
        return super().__getstate__() | {key: getattr(self, key) for key in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        has_differentiable = "differentiable" in state.get("defaults", self.__dict__.get("defaults", ()))
        super().__setstate__(state)
        if not has_differentiable:  # torch adds it to every copied or loaded optimizer's
            del self.defaults["differentiable"]
        self.__dict__.setdefault("_backend", backends.check_choice(None))
        self.__dict__.setdefault("_accumulators", weakref.WeakSet())
        self.__dict__["_template"] = {}
        dcp.own(self)
        self.__dict__.setdefault("_options", {})
        self.__dict__.setdefault("_graphs", Graphs())
        self.__dict__.setdefault("_gradients", Gradients(GradientOptions()))
        self.__dict__.setdefault("_kept", Kept({}))
        self.__dict__.setdefault("_learning_rates", on_device.LearningRates(self._backend)).renew(self.param_groups)
        for group in self.param_groups:  # checkpoints of the parent class, or older than an option
            for option, value in self.defaults.items():
                group.setdefault(option, value)
        self._plans = None

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
        self._kept.ema.refuse_swapped("load_state_dict()")
        with checkpoint.undone_on_error(self):
            with checkpoint.loading(self) as loaded:
                super().load_state_dict(state_dict)
            self._kept.report(loaded)
        self.renew_copies()

    # The step.

    def _plans_fit(self, needs_norm: bool) -> bool:
        """Whether the plans of the last step are for the same tensors and options; their memory is not looked at."""
        plans = self._plans
        return (
            plans is not None
            and (self._norms_checked or not needs_norm)
            and self._watch.unchanged(self.state, self.param_groups)
            and all(plan.states == self.states_of(self.param_groups[plan.group]) for plan in plans)
            and (not self.variant_options or self._seen_options == self._options_of_variants())
        )

    def _plans_that_fit(self, needs_norm: bool = False) -> list[Plan] | None:
        """The plans of the last step with this step's gradients, every pointer checked; None: new ones are needed."""
        plans = self._plans
        if self._plans_fit(needs_norm) and all(plan.gather() for plan in plans):
            return plans
        self._plans = None
        return None

    def _step_at_once(self) -> bool:
        """Make a step whose gradients are taken as they are, in one native call; False: nothing was done."""
        if not self._plans_fit(needs_norm=False):
            return False
        calls = cpu.gather_and_step(self._steps(self._plans))
        if calls is None:
            return False
        self.kernel_calls = calls
        return True

    def _steps(self, plans: list[Plan]) -> list[tuple[Plan, Step]]:
        """Each plan with its step by the options of its group, as if gradients were used as they are."""
        steps = []
        for plan in plans:
            group = self.param_groups[plan.group]
            maximize = group["maximize"]
            if maximize is not True and maximize is not False:
                checks.check_flag("maximize", maximize)
                maximize = bool(maximize)
            hyper = self._hyper_of(group, plan.variant)
            plan.foresee(hyper)
            steps.append((plan, plan.step_with(hyper, maximize)))
        return steps

    def _options_of_variants(self) -> list[list[Any]]:
        return [[group.get(option) for option in self.variant_options] for group in self.param_groups]

    def _new_plans(self, chosen: list[list[planning.Chosen]]) -> list[Plan]:
        """Plans with this step's gradients."""
        with torch.no_grad():
            plans = planning.build(self, chosen)
        self._watch = backends.watch(self.state, self.param_groups)
        self._seen_options = planning.snapshot(self._options_of_variants())
        for plan in plans:
            if not plan.gather():
                raise RuntimeError("a parameter, gradient or state changed in another thread during step()")
        self._at_once = all(plan.steps_at_once for plan in plans)
        self._plans = plans or None  # without one, nothing would notice the first gradient
        self._ran_on = frozenset(plan.backend.name for plan in plans)
        return plans

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of all gradients in the last step that needed it, unscaled and before clipping; None before that.

        A new fp32 number (fp64 if all parameters are) on the parameters' device, which is not waited for. Steps need
        it with ``max_grad_norm``, ``error_if_nonfinite`` or ``skip_nonfinite``, and under `fusedstep.GradScaler`.
        """
        return self._gradients.norm(self.param_groups)

    @property
    def copies(self) -> dict[Tensor, Tensor]:
        """Each parameter's copy in the dtype ``weights_copy``, which every step writes beside the parameter."""
        named = ((group, name, param) for group in self.param_groups for name, param in planning.named(group))
        reducing = ((param, self.rule_of(self.variant_of(group, name, param))[1]) for group, name, param in named)
        with torch.no_grad():
            memory = ((p, self._select(p, reduces).memory(p, reduces)) for p, reduces in reducing)
            return self._kept.copy.of(memory, self._weight_of)

    def _weight_of(self, param: Tensor) -> Tensor:
        """A parameter's weight as averages and copies follow it; its average while that is in its place."""
        return param if self._kept.ema.swapped else self._kept.followed(param, self.state.get(param, {}))

    def renew_copies(self) -> None:
        """Write `copies` anew, after something else than a step has changed the parameters."""
        self._kept.copy.renew(self._weight_of)

    def swap_ema(self) -> contextlib.AbstractContextManager[None]:
        """Exchange the parameters, in their place in memory, with their averages for the time of a ``with`` block.

        `copies` are renewed too. A parameter that no step has updated yet is its own average. Meanwhile ``step``,
        ``load_state_dict`` and copying or pickling the optimizer raise RuntimeError, and the state that `state_dict`
        shows as "ema" is the weights.

        Raises:
            RuntimeError: the optimizer has no ``ema_decay``, or the averages are in place already, or one of them does
                not fit its parameter.
        """
        return ema.swapped(self, self._kept.ema)

    def _check_call(self, max_grad_norm: float | None) -> None:
        """Raise if a step cannot be made now, or not so, before the closure has changed anything."""
        self._kept.ema.refuse_swapped("step()")
        if max_grad_norm is None:
            return
        check_max_norm("max_grad_norm", max_grad_norm)
        if self.clips():
            raise ValueError(
                f"step(max_grad_norm={max_grad_norm}) contradicts the optimizer's own options, which clip gradients "
                "otherwise: clip in one way"
            )

    def _update(self, max_grad_norm: float | None) -> None:
        gradients = self._gradients
        limits = gradients.options.limits(max_grad_norm, self._finds_nonfinite)
        grad_scale = getattr(self, "grad_scale", None)
        if isinstance(grad_scale, Tensor) and grad_scale.dim() > 0:
            grad_scale = grad_scale.reshape(())
        elif grad_scale is not None and not isinstance(grad_scale, Tensor):
            grad_scale = torch.tensor(float(grad_scale))
        found_inf = getattr(self, "found_inf", None)
        if not isinstance(found_inf, Tensor):  # torch's own protocol has the number 0 where there are no gradients
            found_inf = None
        elif found_inf.device.type == "cpu" and found_inf.item() != 0:
            if limits is not None:
                gradients.measure(self, limits, grad_scale, found_inf)
            return gradients.skip(self.param_groups)
        self._learning_rates.begin_step(self.param_groups, self._most_steps)
        groups, coefficient, undo = self.param_groups, None, None
        try:
            clips = self.clips()
            needs_norm = limits is not None or (clips and any(map(self.clips_by_norm, groups)))
            as_they_are = limits is None and not clips and grad_scale is None and found_inf is None
            if as_they_are and self._at_once and self._step_at_once():
                self.kernel_calls += self._learning_rates.end_step(None)
                return
            plans = self._plans_that_fit(needs_norm)
            if plans is None:
                for device in {param.device for group in groups for param in group["params"]}:
                    refuse_capture(device, CHANGED)
                dcp.forget_template(self)
                dcp.own(self)
                # What is made now may be used by a step outside of inference mode.
                with torch.inference_mode(False):
                    chosen = planning.look_up(self, limits is not None)
                    self._norms_checked = needs_norm
                    if limits is not None and gradients.skip_unplanned(self, limits, grad_scale, found_inf):
                        return
                    undo = planning.undo_of(self)
                    plans = self._new_plans(chosen)
            steps = self._steps(plans)
            self.kernel_calls = 0
            if clips:
                if limits is not None:  # what is not finite may be finite once it is clipped
                    given = limits._replace(max_norm=math.inf)
                    self.kernel_calls, _, found_inf = gradients.reduce(plans, given, grad_scale, found_inf)
                    limits = None if limits.max_norm == math.inf else limits._replace(skip_nonfinite=False)
                self._clip(plans, grad_scale)
                grad_scale = None
            if limits is not None:
                calls, coefficient, found_inf = gradients.reduce(plans, limits, grad_scale, found_inf)
                self.kernel_calls += calls
            if gradients.writes:
                gradients.shared.copy(plans)
        except BaseException as error:
            self._plans = None  # and with the plans their references to the gradients
            if undo is not None:
                undo()
            if isinstance(error, (ArithmeticError, RuntimeError, TypeError, ValueError)):
                checks.check_options(groups)
            raise
        # Whatever may fail is behind; from here on things are written.
        for plan, step in steps:
            given = step._replace(grad_scale=grad_scale, found_inf=found_inf, coefficient=coefficient)
            self.kernel_calls += plan.step(given)
        self.kernel_calls += self._learning_rates.end_step(found_inf)

    @torch.no_grad()
    def _clip(self, plans: list[Plan], grad_scale: Tensor | None) -> None:
        """Put unscaled and clipped gradients into the plans."""
        places, grads = [], []
        for plan in plans:
            if self.clips_by_norm(self.param_groups[plan.group]):
                plan.check_norm_is_local()
            for i, grad in plan.grads_in_use():
                grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
                places.append((plan, i))
                grads.append(
                    (self.param_groups[plan.group], grad if grad_scale is None else grad / grad_scale.to(grad))
                )
        for (plan, i), grad in zip(places, self.clip(grads), strict=True):
            plan.replace_grad(i, grad)

    def _hyper_of(self, group: dict[str, Any], variant: Any) -> tuple[float | Tensor, ...]:
        """`hyper`, after a look at what the user may have put into the group since."""
        if group.get("differentiable"):
            checks.check_implementation(group)
        hyper = zip(self.Hyper._fields, self.hyper(group, variant), strict=True)
        try:
            return tuple([value if type(value) is float else checks.as_number(name, value) for name, value in hyper])
        except (TypeError, ValueError) as error:
            index = next(index for index, other in enumerate(self.param_groups) if other is group)
            raise type(error)(f"{error} (parameter group {index})") from None

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
        self._check_call(max_grad_norm)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update(max_grad_norm)
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
    _keep_from_compiler(step)
