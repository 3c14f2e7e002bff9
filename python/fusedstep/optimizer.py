"""The base class of all optimizers: groups, states, plans and the step. It knows no update rule."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, repeat
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import ParamsT, StateDict

from . import averages, backends, checks, layout, precision
from .backends.plan import Call, Plan, Slot
from .gradients import GradientOptions, Gradients, check_max_norm
from .schedules import on_device

Place: TypeAlias = tuple[int, str | None, Tensor, backends.Backend, Any]  # index, name, parameter, backend, variant


def _named(group: dict[str, Any]) -> Iterator[tuple[str | None, Tensor]]:
    """The parameters of a group with their names, None where there is none."""
    params = group["params"]
    names = group.get("param_names") or ()
    return zip(chain(names, repeat(None)), params, strict=False)  # the user may have edited the list


def _keep_from_compiler(function: Callable) -> None:
    """Let torch.compile break its graph at ``function`` and leave alone all that it calls.

    The same as `torch.compiler.disable`, which would cost 2 us in every call and import the compiler.
    """
    function._torchdynamo_disable = True
    function._torchdynamo_disable_msg = "fusedstep calls its own kernels"
    with contextlib.suppress(ImportError, AttributeError, TypeError):  # a torch that has other names for these
        from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

        set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))


class FusedOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` that updates each parameter group in one call of a compiled kernel.

    A subclass declares its rule: the names below, `check_group`, `states_of`, `hyper`, `prepare` (scalars of one step,
    in float64) and `update` (the arithmetic on whole tensors, which is the reference for the compiled engines).
    """

    rule: ClassVar[str]  # the name of the compiled rule
    hyper_names: ClassVar[tuple[str, ...]]  # what `hyper` returns, in the order of the compiled rule
    state_names: ClassVar[tuple[str, ...]]  # every state the rule can have, in the order of `update`
    step_form: ClassVar[Literal["tensor", "int", "absent"]] = "tensor"  # of "step" in the parent class's state_dict
    state_at_construction: ClassVar[bool] = False  # whether the parent class has states before the first step

    non_negative: ClassVar[tuple[str, ...]] = ()  # states that an 8-bit code stores without a sign

    reduces: ClassVar[bool] = False  # whether the rule has such sums as `rule_of` names

    Scalars: ClassVar[type]

    _step_supports_amp_scaling = True  # GradScaler then passes grad_scale and found_inf on to the kernels
    _plans: list[Plan] | None = None
    _watch: Any = None
    _learning_rates: on_device.LearningRates | None = None  # None: the constructor has not finished
    _finds_nonfinite: bool = False  # set by `fusedstep.GradScaler`: a step fills in its own found_inf
    kernel_calls: int = 0  # calls of a compiled kernel in the last step
    _precision: precision.Precision = precision.PLAIN

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        backend: str | None = None,
        state_dtype: precision.StateDtype = None,
        wide_states: Sequence[str] = precision.WIDE_STATES,
        master_weights: bool | Literal["split"] = False,
        kahan: bool = False,
        rounding: Literal["nearest", "stochastic"] = "nearest",
        rounding_seed: int = 0,
        max_grad_norm: float | None = None,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        skip_nonfinite: bool = False,
        write_grads: bool = False,
        zero_grads: bool = False,
        ema_decay: float | None = None,
        weights_copy: torch.dtype | None = None,
    ) -> None:
        checks.check_implementation(defaults)
        self._precision = precision.Precision.checked(
            state_dtype, master_weights, rounding, kahan, wide_states, rounding_seed
        )
        self.check_group(on_device.at_the_beginning(defaults))
        self._backend = backends.check_choice(backend)
        self._gradients = Gradients(
            GradientOptions(max_grad_norm, norm_type, error_if_nonfinite, skip_nonfinite, write_grads, zero_grads)
        )
        self._followers = averages.Followers(ema_decay, weights_copy)
        self._counters: dict[Tensor, Tensor] = {}
        super().__init__(params, defaults)
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
        """The values of `hyper_names` for parameters of a group: numbers, or one-element tensors."""
        raise NotImplementedError

    def variant_of(self, group: dict[str, Any], name: str | None, param: Tensor) -> Any:
        """What `hyper` needs to know of a parameter; those of a group with equal variants share a kernel call."""
        return None

    @classmethod
    def prepare(cls, hyper: tuple[float, ...], step: int) -> Any:
        """The scalars of a parameter's step number ``step`` (from 1), computed in float64."""
        raise NotImplementedError

    @staticmethod
    def update(param: Tensor, grad: Tensor, *states_and_scalars: Any) -> tuple[Tensor | None, ...]:
        """The new parameter and states, from tensors in the arithmetic dtype; an absent state is None."""
        raise NotImplementedError

    def clips(self) -> bool:
        """Whether `clip` is to be called in a step."""
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

    def init_state(self, key: str, group: dict[str, Any], name: str | None, param: Tensor) -> Tensor:
        """The state ``key`` of a parameter before its first step."""
        return torch.zeros_like(param, memory_format=torch.preserve_format, requires_grad=False)

    # Groups and state.

    @property
    def backends_used(self) -> set[str]:
        """Names of the backends that the parameters' last step ran on (empty before the first)."""
        return {plan.backend.name for plan in self._plans or ()}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does, after checking its options and that the chosen backend can take it.

        Raises:
            ValueError, TypeError: an option is out of range.
            RuntimeError: the backend that was asked for cannot run, with its reasons.
        """
        if isinstance(param_group, dict):
            group = {**self.defaults, **param_group}
            checks.check_implementation(group)
            self.check_group(on_device.at_the_beginning(group))
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            first = sum(len(g["params"]) for g in self.param_groups[:-1])
            for index, (name, param) in enumerate(_named(group), first):
                what = checks.describe(index, name, param)
                reduces = self.rule_of(self.variant_of(group, name, param))[1]
                checks.check_param(type(self), reduces, param, layout.local(param.detach()), what)
                self._precision.check_param(type(self).__name__, reduces, param, name, what)
                self._select(param)
        except BaseException:
            self.param_groups.pop()
            raise
        if self.state_at_construction:
            for name, param in _named(group):
                state = self.state[param]
                self._step_counter(param, param, state, ())
                self._settle(param, name, group)
                for key in self.states_of(group):
                    if key not in state:
                        state[key] = self.init_state(key, group, name, param)
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
        steps = (state["step"] for state in self.state.values() if isinstance(state, dict) and "step" in state)
        return int(max(map(float, chain(steps, self._counters.values())), default=0))

    def _select(self, param: Tensor) -> backends.Backend:
        # Frozen weights of a dtype that nothing can update are carried along, as torch does.
        trained = param.requires_grad or param.grad is not None or param in self.state or param in self._counters
        return backends.select(self._backend, param.device, param.dtype if trained else torch.float32)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_backend", "_counters", "_learning_rates", "_gradients", "_followers", "_precision")
        return super().__getstate__() | {key: vars(self)[key] for key in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_backend", backends.check_choice(None))
        self.__dict__.setdefault("_counters", {})
        self.__dict__.setdefault("_gradients", Gradients(GradientOptions()))
        self.__dict__.setdefault("_followers", averages.Followers())
        self.__dict__.setdefault("_learning_rates", on_device.LearningRates(self._backend)).renew(self.param_groups)
        for group in self.param_groups:  # checkpoints of the parent class, or older than an option
            for option, value in self.defaults.items():
                group.setdefault(option, value)
        self._plans = None

    def state_dict(self) -> StateDict:
        """The state as the torch class of this name would write it; tensors are not copied."""
        state_dict = super().state_dict()
        if self._precision.rounding == "stochastic":
            state_dict["rounding_seed"] = self._precision.rounding_seed
        self._learning_rates.write_numbers(self.param_groups, state_dict["param_groups"], self._most_steps)
        if self.step_form == "int":
            state_dict["state"] = {
                key: {**state, "step": int(state["step"])} if isinstance(state, dict) and "step" in state else state
                for key, state in state_dict["state"].items()
            }
        if self.step_form == "absent":
            # A parameter whose every step was skipped has buffers but has not started.
            ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
            params = chain.from_iterable(group["params"] for group in self.param_groups)
            for key, param in zip(ids, params, strict=True):
                counter = self._counters.get(param)
                if key in state_dict["state"] and counter is not None and counter.item() == 0:
                    del state_dict["state"][key]
        return state_dict

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state, this class's or the torch class's of the same name.

        Tensors are copied, keep their own dtype (torch casts them to the parameter's) and take the parameter's device
        and layout. What was saved with other precision options is converted in the next step, of which one warning
        tells here. `copies` are renewed.

        Raises:
            ValueError: groups do not match, or a state cannot be its parameter's; nothing is changed then.
            RuntimeError: this is inside `swap_ema`.
        """
        self._followers.refuse_swapped("load_state_dict()")
        followed = self._learning_rates.followed(self.param_groups)
        loaded: dict[Tensor, dict[str, Any]] = {}
        rest: dict[Any, Any] = {}
        options = self._precision

        def take_state(_: Any, given: StateDict) -> StateDict:
            ids = [group["params"] for group in given["param_groups"]]
            params = [group["params"] for group in self.param_groups]
            if [len(group) for group in ids] != [len(group) for group in params]:
                return given  # torch reports the mismatch right after this
            nonlocal options
            options = options.with_seed_of(given)
            places = ((group, *named) for group in self.param_groups for named in _named(group))
            by_id = dict(zip(chain.from_iterable(ids), places, strict=True))
            for key, value in given["state"].items():
                if key in by_id:
                    loaded[by_id[key][-1]] = self._adopt(key, *by_id[key], value)
                else:
                    rest[key] = value
            self._followers.report(given["state"][key] for key in by_id if key in given["state"])
            return {**given, "state": {}}

        def give_state(_: Any) -> None:
            self.state.update(loaded)
            self.state.update(rest)
            self._counters.clear()
            self._precision = options
            self._learning_rates.read_numbers(self.param_groups, followed, self._most_steps)
            self.renew_copies()

        # Last before torch's own work and first after it, so that hooks of the user see what torch would show them.
        with (
            self.register_load_state_dict_pre_hook(take_state),
            self.register_load_state_dict_post_hook(give_state, prepend=True),
        ):
            super().load_state_dict(state_dict)
        names = {param: name for group in self.param_groups for name, param in _named(group)}
        precision.warn_of_conversions(self, loaded, names)

    def _adopt(
        self, key: Any, group: dict[str, Any], param_name: str | None, param: Tensor, state: dict[str, Any]
    ) -> dict[str, Any]:
        """A parameter's loaded state: our own copies, on its device."""
        adopted = {}
        if precision.foreign(state):
            state = precision.adopted(key, param, state, self.non_negative)
        for name, value in state.items():
            shape = None
            if name in self.state_names:
                shape = self.state_shape(name, group, param_name, param)
            elif name == averages.KEY:
                shape = param.shape
            if name == "step" or shape is not None:
                codes = () if name == averages.KEY else precision.CODES
                checks.check_loaded(f"'{name}' of parameter {key}", value, param, shape, codes)
            if name == averages.KEY:
                if isinstance(value, Tensor) and self._followers.ema_decay is not None:
                    adopted[name] = self._followers.adopt(param, value)
                continue
            if isinstance(value, Tensor):
                value = value.detach()
                value = value.to_dense() if value.is_sparse else value
                if name == "step":
                    value = value.clone()
                elif shape == param.shape and not layout.is_wrapper(value) and not layout.is_wrapper(param):
                    value = layout.dense_like(param, value.dtype).copy_(value)
                else:
                    value = value.to(param.device, copy=True)
            adopted[name] = value
        return adopted

    # Plans.

    @torch.no_grad()
    def _look_up(self, needs_norm: bool) -> list[list[Place]]:
        """Every parameter of each group, after all checks of it, its gradient and its states; nothing is created."""
        self._learning_rates.settle(self.param_groups)
        chosen: list[list[Place]] = []
        index = 0
        for group in self.param_groups:
            row = []
            for name, param in _named(group):
                backend, variant = self._select(param), self.variant_of(group, name, param)
                reduces = self.rule_of(variant)[1]
                if param.grad is not None:
                    what = checks.describe(index, name, param)
                    checks.check_param(type(self), reduces, param, layout.local(param.detach()), what)
                    self._precision.check_param(type(self).__name__, reduces, param, name, what)
                    checks.check_grad(type(self), group, param, param.grad, what)
                    if needs_norm:
                        checks.check_norm_is_local(type(self), param, what)
                    if self._followers.any:
                        self._followers.check(type(self).__name__, param, self.state.get(param, {}), what)
                    for state in self.states_of(group):
                        kept = self.state.get(param, {})
                        value, shape = kept.get(state), self.state_shape(state, group, name, param)
                        if isinstance(value, Tensor) and shape is not None and not precision.is_coded(kept, state):
                            checks.check_state(type(self).__name__, state, value, param, shape, backend.dtypes, what)
                row.append((index, name, param, backend, variant))
                index += 1
            for variant in {variant for *_, variant in row}:
                self._hyper_of(group, variant)
            chosen.append(row)
        return chosen

    def _build(self, chosen: list[list[Place]]) -> list[Plan]:
        """Create missing states, and plan one kernel call per group, backend and device."""
        plans = []
        for group_index, (group, row) in enumerate(zip(self.param_groups, chosen, strict=True)):
            states = self.states_of(group)
            buckets: dict[Any, list[Slot]] = {}
            seen: Counter[Tensor] = Counter()
            listed = Counter(param for _, _, param, *_ in row)
            for index, name, param, backend, variant in row:
                # A parameter that is listed twice is updated twice, one call after the other; the last one may write
                # to its gradient.
                seen[param] += 1
                is_last = seen[param] == listed[param]
                bucket = (backend, variant, param.device, backend.bucket(param), seen[param], is_last)
                slot = self._slot(index, name, param, group, states, backend, self.rule_of(variant)[1])
                buckets.setdefault(bucket, []).append(slot)
            for (backend, variant, *_, is_last), slots in buckets.items():
                plan = backend.plan(type(self), group_index, group, variant, states, slots)
                plan.zero_grads = is_last and self._gradients.options.zero_grads
                plan.write_grads = is_last and self._gradients.options.write_grads
                plan.average_weight = self._followers.average_weight
                plans.append(plan)
        return plans

    def _slot(
        self,
        index: int,
        name: str | None,
        param: Tensor,
        group: dict[str, Any],
        states: tuple[str, ...],
        backend: backends.Backend,
        reduces: bool,
    ) -> Slot:
        started = param in self.state or param in self._counters
        if param.grad is None and not started:
            return Slot(index, name, param, None, None, ())
        tensor = backend.memory(param, reduces)
        keeps = self._precision.keeps(param) or self._followers.ema_decay is not None
        if states or self.step_form != "absent" or keeps:
            state = self.state[param]
        else:
            state = {}
        step = self._step_counter(param, tensor, state, states)
        storage = None
        if self._settle(param, name, group):
            storage = self._precision.storage(state, states, param, tensor, backend.state_memory)
        tensors = []
        for key in states:
            shape = self.state_shape(key, group, name, param)
            if shape is None:
                tensors.append(None)
                continue
            value = state.get(key)
            if not isinstance(value, Tensor):  # the parent class may have a number where it has not started
                value = state[key] = self.init_state(key, group, name, param)
            elif value.device != param.device:
                value = state[key] = value.to(param.device)
            usable = backend.state_memory(value, tensor)
            if usable is None:
                value = state[key] = layout.laid_out_as(value, tensor if shape == param.shape else value.contiguous())
                usable = value
            tensors.append(usable)
        followers = ()
        if self._followers.any:
            followers = self._followers.of(param, tensor, state, backend, partial(self._weight_of, param))
        matrices = self.matrices(group, name, param) if reduces else None
        return Slot(index, name, param, tensor, step, tuple(tensors), None, matrices, *followers, storage=storage)

    def _settle(self, param: Tensor, name: str | None, group: dict[str, Any]) -> bool:
        """Bring a parameter's state into the form that the precision options ask for; False: it needs none."""
        if self._precision.plain and not precision.foreign(self.state.get(param, {})):
            return False

        def new_state(key: str, like: Tensor) -> Tensor:
            return self.init_state(key, group, name, like)

        states = [key for key in self.states_of(group) if self.state_shape(key, group, name, param) is not None]
        self._precision.settle(self.state[param], states, param, name, new_state, self.non_negative)
        return True

    def _weight_of(self, param: Tensor) -> Tensor:
        """A parameter's weight as averages and copies follow it."""
        return self._precision.followed_weight(param, self.state.get(param, {}))

    def _step_counter(self, param: Tensor, tensor: Tensor, state: dict[str, Any], states: tuple[str, ...]) -> Tensor:
        """The number of updates of ``param`` so far, as one fp32 number on its device."""
        if self.step_form != "absent":
            holder, key = state, "step"
            count = state.get("step", 0.0)
        else:
            saved = self._precision.counts(param)
            holder, key = (state, "step") if saved else (self._counters, param)
            count = state.pop("step", self._counters.get(param))  # of other options too
            missing = all(state.get(name) is None for name in states)
            # Whoever has no buffer, because momentum was 0 so far or the state was cleared, is at its first step.
            if count is None or (missing and (states or not saved)):
                count = 0.0 if missing else 1.0
        if not (
            isinstance(count, Tensor)
            and count.dtype == torch.float32
            and count.device == tensor.device
            and count.dim() == 0
        ):
            if isinstance(count, Tensor):
                count = count.detach().reshape(()).to(tensor.device, torch.float32, copy=True)
            else:
                count = torch.tensor(float(count), dtype=torch.float32, device=tensor.device)
        holder[key] = count
        return count

    # The step.

    def _plans_that_fit(self) -> list[Plan] | None:
        """The plans of the last step with this step's gradients, every pointer checked; None: new ones are needed."""
        plans = self._plans
        if (
            plans is not None
            and self._watch.unchanged(self.state, self.param_groups)
            and all(plan.states == self.states_of(self.param_groups[plan.group]) for plan in plans)
        ):
            try:
                if all(plan.gather() for plan in plans):
                    return plans
            except BaseException:
                self._plans = None  # and with the plans their references to the gradients
                raise
        self._plans = None
        return None

    def _new_plans(self, chosen: list[list[Place]]) -> list[Plan]:
        """Plans with this step's gradients; nothing has been updated when this raises."""
        with torch.no_grad():
            plans = self._build(chosen)
        self._watch = backends.watch(self.state, self.param_groups)
        for plan in plans:
            if not plan.gather():
                raise RuntimeError("a parameter, gradient or state changed in another thread during step()")
        self._plans = plans
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
        named = ((group, name, param) for group in self.param_groups for name, param in _named(group))
        reducing = ((param, self.rule_of(self.variant_of(group, name, param))[1]) for group, name, param in named)
        with torch.no_grad():
            memory = ((p, self._select(p).memory(p, reduces)) for p, reduces in reducing)
            return self._followers.copies_of(memory, self._weight_of)

    def renew_copies(self) -> None:
        """Write `copies` anew, after something else than a step has changed the parameters."""
        self._followers.renew_copies(self._weight_of)

    def swap_ema(self) -> contextlib.AbstractContextManager[None]:
        """Exchange the parameters, in their place in memory, with their averages for the time of a ``with`` block.

        `copies` are renewed too. A parameter that no step has updated yet is its own average. Meanwhile ``step``,
        ``load_state_dict`` and copying or pickling the optimizer raise RuntimeError, and the state that `state_dict`
        shows as "ema" is the weights.

        Raises:
            RuntimeError: the optimizer has no ``ema_decay``, or the averages are in place already, or one of them does
                not fit its parameter.
        """
        return averages.swapped(self)

    def _check_call(self, max_grad_norm: float | None) -> None:
        """Raise if a step cannot be made now, or not so, before the closure has changed anything."""
        self._followers.refuse_swapped("step()")
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
        found_inf = getattr(self, "found_inf", None)
        if not isinstance(found_inf, Tensor):  # GradScaler's sum over no gradients is the number 0
            found_inf = None
        elif found_inf.device.type == "cpu" and found_inf.item() != 0:
            if limits is not None:
                gradients.measure(self, limits, grad_scale, found_inf)
            return gradients.skip(self.param_groups)
        self._learning_rates.begin_step(self.param_groups, self._most_steps)
        plans, groups = self._plans_that_fit(), self.param_groups
        if plans is None:
            chosen = self._look_up(limits is not None)
            if limits is not None and gradients.skip_unplanned(self, limits, grad_scale, found_inf):
                return
            plans = self._new_plans(chosen)
        try:
            hypers = [self._hyper_of(groups[plan.group], plan.variant) for plan in plans]
        except BaseException:
            self._plans = None  # and with the plans their references to the gradients
            raise
        self.kernel_calls, coefficient = 0, None
        try:
            if self.clips():
                if limits is not None:  # what is not finite may be finite once it is clipped
                    given = limits._replace(max_norm=math.inf)
                    self.kernel_calls, _, found_inf = gradients.reduce(plans, given, grad_scale, found_inf)
                    limits = None if limits.max_norm == math.inf else limits._replace(skip_nonfinite=False)
                self._clip(plans, grad_scale)
                grad_scale = None
            if limits is not None:
                calls, coefficient, found_inf = gradients.reduce(plans, limits, grad_scale, found_inf)
                self.kernel_calls += calls
        except BaseException:
            self._plans = None
            raise
        for plan, hyper in zip(plans, hypers, strict=True):
            maximize = bool(groups[plan.group]["maximize"])
            self.kernel_calls += plan.step(Call(hyper, maximize, grad_scale, found_inf, coefficient))
        self.kernel_calls += self._learning_rates.end_step(found_inf)

    @torch.no_grad()
    def _clip(self, plans: list[Plan], grad_scale: Tensor | None) -> None:
        """Put unscaled and clipped gradients into the plans."""
        places, grads = [], []
        for plan in plans:
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
        hyper = self.hyper(group, variant)
        for name, value in zip(self.hyper_names, hyper, strict=True):
            if type(value) not in (float, int, bool):
                checks.check_number(name, value)
        if any(isinstance(value, Tensor) and value.requires_grad for value in hyper):
            hyper = tuple(value.detach() if isinstance(value, Tensor) else value for value in hyper)
        return hyper

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
