"""The machinery behind an optimizer's step, for this package alone: its plans, and what they are made of."""

from __future__ import annotations

import functools
import math
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import backends, checks, dcp, exchange, planning, shared_sums
from .backends import cpu
from .backends.lifetime import CHANGED, Graphs, refuse_capture
from .gradient_options import GradientOptions
from .gradients import Gradients
from .kept import Kept
from .options import DEFAULTS
from .schedules import on_device

if TYPE_CHECKING:
    from .accumulate import GradientAccumulator
    from .backends.norm import Limits
    from .backends.plan import Plan
    from .optimizer import FusedOptimizer
    from .record import Step


class Stepper:
    """All that an optimizer has beside torch's groups and states; its methods are given the optimizer.

    Args:
        options: those of `fusedstep.Options` that the optimizer was given.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = {**DEFAULTS, **options}
        self.kept = Kept(self.options)
        self.gradients = Gradients(GradientOptions.chosen(self.options))
        self.backend = backends.check_choice(self.options["backend"])
        self.learning_rates: on_device.LearningRates | None = None  # None: the constructor has not finished
        self.shared_out = False  # whether other processes have the other parameters
        self._begin()

    def _begin(self) -> None:
        """What a copy begins with too."""
        self.plans: list[Plan] | None = None  # of the last step; None: they no longer fit
        self.watch: Any = None
        self.seen_options: list[list[Any]] | None = None  # those that the variants of the plans were made with
        self.at_once = False  # whether all plans can be gathered and stepped in one native call
        self.sums: shared_sums.SharedSums | None = None  # that cross processes; None: none does
        self.norms_checked = False  # whether it was checked that the plans' gradients are all that a norm is of
        self.finds_nonfinite = False  # set by `fusedstep.GradScaler`: a step fills in its own found_inf
        self.graphs = Graphs()
        self.accumulators: weakref.WeakSet[GradientAccumulator] = weakref.WeakSet()
        self.template: dict[Tensor, dcp.Made] = {}
        self.ran_on: frozenset[str] = frozenset()  # names of the last step's backends
        self.warned_of_pieces = False

    def __getstate__(self) -> dict[str, Any]:
        kept = ("options", "kept", "gradients", "backend", "learning_rates", "shared_out", "ran_on")
        return {key: getattr(self, key) for key in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._begin()
        vars(self).update(state)

    def select(self, optimizer: FusedOptimizer, param: Tensor, reduces: bool) -> backends.Backend:
        """The backend for a parameter, by a rule that reduces or not.

        Weights of a dtype that nothing can update are carried along until they have a gradient, as torch does.
        """
        trained = param.requires_grad or param.grad is not None or planning.started(optimizer, param)
        updated = trained and not (reduces and param.is_complex())
        return backends.select(self.backend, param.device, param.dtype if updated else torch.float32)

    def plans_fit(self, optimizer: FusedOptimizer, needs_norm: bool) -> bool:
        """Whether the plans of the last step are for the same tensors and options; their memory is not looked at."""
        groups = optimizer.param_groups
        if self.plans is None or not (self.norms_checked or not needs_norm):
            return False
        if not self.watch.unchanged(optimizer.state, groups):
            return False
        for plan in self.plans:
            if plan.states != optimizer.states_of(groups[plan.group]):
                return False
        return not optimizer.variant_options or self.seen_options == self.options_of_variants(optimizer)

    def plans_that_fit(self, optimizer: FusedOptimizer, needs_norm: bool = False) -> list[Plan] | None:
        """The plans of the last step with this step's gradients, every pointer checked; None: new ones are needed."""
        plans = self.plans
        if self.plans_fit(optimizer, needs_norm) and all(plan.gather() for plan in plans):
            return plans
        self.plans = None
        return None

    def step_at_once(self, optimizer: FusedOptimizer) -> bool:
        """Make a step whose gradients are taken as they are, in one native call; False: nothing was done."""
        if not self.plans_fit(optimizer, needs_norm=False):
            return False
        calls = cpu.gather_and_step(self.steps(optimizer, self.plans))
        if calls is None:
            return False
        optimizer.kernel_calls = calls
        return True

    def steps(self, optimizer: FusedOptimizer, plans: list[Plan]) -> list[tuple[Plan, Step]]:
        """Each plan with its step by the options of its group, as if gradients were used as they are."""
        steps = []
        for plan in plans:
            group = optimizer.param_groups[plan.group]
            maximize = group["maximize"]
            if maximize is not True and maximize is not False:
                checks.check_flag("maximize", maximize)
                maximize = bool(maximize)
            hyper = self.hyper_of(optimizer, group, plan.variant)
            plan.foresee(hyper)
            steps.append((plan, plan.step_with(hyper, maximize)))
        return steps

    def options_of_variants(self, optimizer: FusedOptimizer) -> list[list[Any]]:
        return [[group.get(option) for option in optimizer.variant_options] for group in optimizer.param_groups]

    def new_plans(self, optimizer: FusedOptimizer, chosen: list[list[planning.Chosen]]) -> list[Plan]:
        """Plans with this step's gradients."""
        with torch.no_grad():
            plans = planning.build(optimizer, chosen)
        self.watch = backends.watch(optimizer.state, optimizer.param_groups)
        self.seen_options = planning.snapshot(self.options_of_variants(optimizer))
        for plan in plans:
            if not plan.gather():
                raise RuntimeError("a parameter, gradient or state changed in another thread during step()")
        self.at_once = all(plan.steps_at_once for plan in plans)
        self.plans = plans or None  # without one, nothing would notice the first gradient
        self.ran_on = frozenset(plan.backend.name for plan in plans)
        return plans

    def update(self, optimizer: FusedOptimizer, max_grad_norm: float | None) -> None:
        """One step, once hooks and closure have run; raises before anything was written, if at all."""
        gradients = self.gradients
        limits = gradients.options.limits(max_grad_norm, self.finds_nonfinite)
        grad_scale = getattr(optimizer, "grad_scale", None)
        if isinstance(grad_scale, Tensor) and grad_scale.dim() > 0:
            grad_scale = grad_scale.reshape(())
        elif grad_scale is not None and not isinstance(grad_scale, Tensor):
            grad_scale = torch.tensor(float(grad_scale))
        found_inf = getattr(optimizer, "found_inf", None)
        if not isinstance(found_inf, Tensor):  # torch's own protocol has the number 0 where there are no gradients
            found_inf = None
        groups, coefficient, undo = optimizer.param_groups, None, None
        clips = optimizer.clips()
        norm_of_each = clips and any(map(optimizer.clips_by_norm, groups))
        # Where other processes wait in an exchange, they get to know there that the step is skipped.
        skipped = found_inf is not None and found_inf.device.type == "cpu" and found_inf.item() != 0
        if self.plans is None:
            self._look_for_sharers(optimizer, limits, skipped)
        try:
            limits = gradients.for_all(type(optimizer).__name__, limits)
        except RuntimeError as error:
            self._expect(optimizer, None, clips, norm_of_each)
            gradients.give_up(type(optimizer).__name__, error)
            raise
        self._expect(optimizer, limits, clips, norm_of_each)
        if skipped and not gradients.to_come:
            if limits is not None:
                gradients.measure(optimizer, limits, grad_scale, found_inf)
            return gradients.skip(groups)
        try:
            self.learning_rates.begin_step(optimizer.param_groups, optimizer.most_steps)
            needs_norm = limits is not None or norm_of_each
            as_they_are = limits is None and not clips and grad_scale is None and found_inf is None
            if as_they_are and self.at_once and self.step_at_once(optimizer):
                optimizer.kernel_calls += self.learning_rates.end_step(None)
                return
            plans = self.plans_that_fit(optimizer, needs_norm)
            if plans is None:
                for device in {param.device for group in groups for param in group["params"]}:
                    refuse_capture(device, CHANGED)
                dcp.forget_template(optimizer)
                dcp.own(optimizer)
                # What is made now may be used by a step outside of inference mode.
                with torch.inference_mode(False):
                    chosen = planning.check_and_select(optimizer, limits is not None)
                    self.norms_checked = needs_norm
                    if limits is not None and gradients.skip_unplanned(optimizer, limits, grad_scale, found_inf):
                        return
                    undo = planning.undo_of(optimizer)
                    plans = self.new_plans(optimizer, chosen)
            steps = self.steps(optimizer, plans)
            optimizer.kernel_calls = 0
            if clips:
                if limits is not None:  # what is not finite may be finite once it is clipped
                    given = limits._replace(max_norm=math.inf)
                    optimizer.kernel_calls, _, found_inf = gradients.reduce(plans, given, grad_scale, found_inf)
                    limits = limits_of_clipped(limits)
                self.clip(optimizer, plans, grad_scale)
                grad_scale = None
            if limits is not None:
                calls, coefficient, found_inf = gradients.reduce(plans, limits, grad_scale, found_inf)
                optimizer.kernel_calls += calls
            if gradients.writes:
                gradients.shared.copy(plans)
            scaled = {"grad_scale": grad_scale, "coefficient": coefficient}
            steps = [(plan, step._replace(found_inf=found_inf, **scaled)) for plan, step in steps]
            if self.sums is not None:
                found_inf = self.sums.begin(optimizer, gradients, steps, found_inf)
        except BaseException as error:
            self.plans = None  # and with the plans their references to the gradients
            if undo is not None:
                undo()
            try:
                if isinstance(error, (ArithmeticError, RuntimeError, TypeError, ValueError)):
                    checks.check_options(groups)
            finally:
                if isinstance(error, Exception):
                    gradients.give_up(type(optimizer).__name__, error)
            raise
        # Whatever may fail is behind; from here on things are written.
        if self.sums is not None:
            self.sums.finish(gradients, found_inf)
        for plan, step in steps:
            optimizer.kernel_calls += plan.step(step._replace(found_inf=found_inf))
        optimizer.kernel_calls += self.learning_rates.end_step(found_inf)

    @torch.no_grad()
    def clip(self, optimizer: FusedOptimizer, plans: list[Plan], grad_scale: Tensor | None) -> None:
        """Put unscaled and clipped gradients into the plans."""
        groups = optimizer.param_groups
        origins, grads = [], []
        for plan in plans:
            if optimizer.clips_by_norm(optimizer.param_groups[plan.group]):
                plan.check_norm_is_known()
            for i, grad in plan.grads_in_use():
                grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
                origins.append((plan, i))
                grads.append(
                    (optimizer.param_groups[plan.group], grad if grad_scale is None else grad / grad_scale.to(grad))
                )

        def norms(grads: list[Tensor | None]) -> list[Tensor | None]:
            asked = [k for k, grad in enumerate(grads) if grad is not None]
            parts = [(origins[k][0].records[origins[k][1]].index, grads[k]) for k in asked]
            found = dict(zip(asked, self.gradients.single_norms(parts, kinds_of(groups)), strict=True))
            return [found.get(k) for k in range(len(grads))]

        for (plan, i), grad in zip(origins, optimizer.clip(grads, norms), strict=True):
            plan.replace_grad(i, grad)

    def _look_for_sharers(self, optimizer: FusedOptimizer, limits: Limits | None, skipped: bool) -> None:
        """Find other processes that have parts of the parameters; they hear of what is wrong with a first step here."""

        @torch.inference_mode(False)
        def check() -> None:
            if not skipped:
                planning.check_and_select(optimizer, limits is not None)

        self.gradients.look_for_sharers(optimizer, limits, check)

    def refuse(self, optimizer: FusedOptimizer, error: Exception) -> None:
        """Before the error of a call that begins no step is raised: let other processes know that wait for this one."""
        cls, limits = type(optimizer).__name__, self.gradients.options.limits(None, self.finds_nonfinite)
        try:
            if self.plans is None:
                self.gradients.look_for_sharers(optimizer, limits, functools.partial(_raise, error))
            limits = self.gradients.for_all(cls, limits)
            clips = optimizer.clips()
            self._expect(optimizer, limits, clips, clips and any(map(optimizer.clips_by_norm, optimizer.param_groups)))
        except Exception:
            return  # which is theirs too, or the same one
        self.gradients.give_up(cls, error)

    def _expect(self, optimizer: FusedOptimizer, limits: Limits | None, clips: bool, norm_of_each: bool) -> None:
        """Tell `gradients` in what order a step enters exchanges with other processes, if there are others."""
        if self.gradients.sharers is None:
            self.sums = None
            return
        if not self.plans_fit(optimizer, needs_norm=False):
            self.sums = shared_sums.shared_sums(optimizer, self.gradients.sharers)
        exchanges: list[tuple[bool, Any]] = []
        if clips and limits is not None:
            exchanges.append((limits.by_max_abs, None))
            limits = limits_of_clipped(limits)
        if norm_of_each:
            exchanges.append((False, kinds_of(optimizer.param_groups)))
        if limits is not None:
            exchanges.append((limits.by_max_abs, None))
        if self.sums is not None:
            # Where the host sees in the first one that another process fails, all raise before the others.
            packs = self.sums.packs[:1] if self.gradients.sharers.host_sees else self.sums.packs
            exchanges += [(False, pack) for pack in packs if pack.members]
        self.gradients.expect(exchanges)

    def hyper_of(self, optimizer: FusedOptimizer, group: dict[str, Any], variant: Any) -> tuple[float | Tensor, ...]:
        """`hyper`, after a look at what the user may have put into the group since."""
        if group.get("differentiable"):
            checks.check_implementation(group)
        hyper = zip(optimizer.Hyper._fields, optimizer.hyper(group, variant), strict=True)
        try:
            return tuple([value if type(value) is float else checks.as_number(name, value) for name, value in hyper])
        except (TypeError, ValueError) as error:
            index = next(index for index, other in enumerate(optimizer.param_groups) if other is group)
            raise type(error)(f"{error} (parameter group {index})") from None


def _raise(error: Exception) -> None:
    raise error


def limits_of_clipped(limits: Limits) -> Limits | None:
    """What is left to decide by the norm of gradients that were clipped otherwise, once that of the given ones is."""
    return None if limits.max_norm == math.inf else limits._replace(skip_nonfinite=False)


def kinds_of(groups: list[dict[str, Any]]) -> list[exchange.Over]:
    """Over which processes the parts of each parameter add up."""
    return [exchange.over(param) for group in groups for param in group["params"]]
