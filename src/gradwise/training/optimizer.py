"""The base of all optimisers: what a method declares, checks, saves and refuses.

:class:`MethodOptimizer` is a ``torch.optim.Optimizer`` that declares what it ``needs`` at a step. A *wrapping*
optimiser (:class:`WrappingOptimizer`) evaluates the gradient several times and hands the combined direction to an
ordinary optimiser; it shares the ``param_groups`` and ``state`` of that base, so that schedulers, checkpoints and
code that reads ``group["lr"]`` may hold either of the two.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gradwise.base.checks import require_choice
from gradwise.training.closure import Closure, Needs, Parts, as_closure
from gradwise.training.evaluation import Evaluations

Sync = str  # "final" or "all"


class MethodOptimizer(torch.optim.Optimizer):
    """An optimiser that says what it needs from a closure, what it guarantees and what its last step did.

    Class attributes:
        needs: ``"grad"`` (gradients in ``.grad``, as for any optimiser of PyTorch), ``"loss"``, ``"outputs"`` or
            ``"losses"`` (``step(closure)`` asks for them; the closure never calls backward).
        parts: what a part is, for methods that evaluate ``closure(part)``.
        guarantees: properties that hold for this method, as names the contract tests know.
        accepts_complex: whether complex parameters are supported; otherwise they are refused.

    Attributes:
        stats: numbers of the last step, such as ``loss`` and ``grad_norm``.
        generator: the random stream of the method, saved in ``state_dict`` so that a resumed run is bit-equal.

    Raises ``TypeError`` for complex parameters, and whatever :meth:`check` raises, at construction, for added groups,
    for loaded states and at every step (hyper-parameters may be scheduled).
    """

    needs: ClassVar[Needs] = "grad"
    parts: ClassVar[Parts | None] = None
    guarantees: ClassVar[frozenset[str]] = frozenset()
    accepts_complex: ClassVar[bool] = False

    def __init__(self, params: Any, defaults: dict[str, Any], *, generator: torch.Generator | None = None) -> None:
        self.stats: dict[str, float] = {}
        self.generator = generator
        super().__init__(params, defaults)

    def check(self, group: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` for hyper-parameters of ``group`` that are out of range. Methods override this."""

    def check_groups(self) -> None:
        """Check every group again; called at the start of a step, because values may have been scheduled."""
        for group in self.param_groups:
            self.check({**self.defaults, **group})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as PyTorch's optimisers do, after the method's own checks."""
        super().add_param_group(param_group)
        try:
            self._accept(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def extra_state(self) -> dict[str, Any]:
        """What continues a run besides state and groups: numbers of the last step and the generator's state."""
        state: dict[str, Any] = {"stats": dict(self.stats)}
        if self.generator is not None:
            state["generator"] = self.generator.get_state()
        return state

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`extra_state` saved; entries that are missing leave the present values."""
        self.stats = dict(state.get("stats", self.stats))
        if self.generator is not None and "generator" in state:
            self.generator.set_state(state["generator"])

    def state_dict(self) -> dict[str, Any]:
        """PyTorch's state and groups, and under ``"method"`` what this method needs to continue bit for bit."""
        return {**super().state_dict(), "method": self.extra_state()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a ``state_dict`` of this method or of the plain optimiser with the same groups."""
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "method"})
        self._keep_types(state_dict)
        self.load_extra_state(state_dict.get("method", {}))
        self.check_groups()

    def _keep_types(self, state_dict: Mapping[str, Any]) -> None:
        """State in the types it was saved in: PyTorch casts it to those of the parameters, which may be narrower."""
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for key, parameter in zip(keys, parameters, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor) and value.dtype != self.state[parameter][name].dtype:
                    self.state[parameter][name] = value.to(parameter.device, copy=True)

    def name_of(self, parameter: Tensor) -> str:
        """The parameter's name where the groups have names, else its position and shape, for messages."""
        for number, group in enumerate(self.param_groups):
            for index, p in enumerate(group["params"]):
                if p is parameter:
                    if "param_names" in group:
                        return f"parameter {group['param_names'][index]!r}"
                    return f"parameter {index} of group {number} (shape {list(p.shape)})"
        return f"a parameter of shape {list(parameter.shape)}"

    def __getstate__(self) -> dict[str, Any]:
        # Hooks and a scheduler's patched step are bound to this very object; PyTorch drops them when pickling too.
        kept = {k: v for k, v in self.__dict__.items() if k != "step" and not k.startswith(("_optimizer", "_opt"))}
        kept.pop("_zero_grad_profile_name", None)
        return kept

    def _accept(self, group: Mapping[str, Any]) -> None:
        for parameter in group["params"]:
            if parameter.is_complex() and not self.accepts_complex:
                raise TypeError(
                    f"{type(self).__name__} takes real parameters only: {self.name_of(parameter)} is "
                    f"{parameter.dtype}; optimise torch.view_as_real of it instead."
                )
        self.check({**self.defaults, **group})


class EvaluatingOptimizer(MethodOptimizer):
    """What methods share that evaluate a closure several times in a step; sets aside ``.grad`` meanwhile.

    ``model``, ``fix_rng``, ``sync`` and ``scaler`` are those of :class:`~gradwise.training.evaluation.Evaluations`.
    """

    needs: ClassVar[Needs] = "loss"
    model: nn.Module | None = None
    fix_rng: bool = True
    sync: Sync = "final"
    scaler: Any = None

    def evaluate(self, closure: Any, act: Callable[[Evaluations, Closure], bool]) -> Tensor:
        """One step of a method that evaluates ``closure`` itself: ``act`` evaluates, updates, says whether it did.

        Returns the loss of the first evaluation, detached, and fills ``stats``. Raises ``TypeError`` without a
        closure; a ``FloatingPointError`` of ``act`` leaves ``stats`` as they were but for the evaluation's numbers
        and ``skipped``.
        """
        if closure is None:
            raise TypeError(
                f"{type(self).__name__}.step needs a closure that returns the loss (and calls no backward)."
            )
        closure = as_closure(closure, self.needs)
        self.check_groups()
        skipped, own = self.stats.get("skipped", 0.0), dict(self.stats)
        parameters = [p for group in self.param_groups for p in group["params"]]
        model = self.model if self.model is not None else closure.module
        with Evaluations(parameters, model=model, fix_rng=self.fix_rng, sync=self.sync, scaler=self.scaler) as at:
            try:
                stepped = act(at, closure)
            except FloatingPointError:
                self.stats = {**own, **at.stats, "skipped": skipped + 1}
                raise
            self.stats = {**self.stats, **at.stats, "skipped": skipped + (not stepped)}
            return at.loss

    def scalar(self, at: Evaluations, name: str) -> Any:
        """Hyper-parameter ``name``: a float, or where groups differ a NumPy array with one entry per active parameter.

        Ask after the first evaluation, which decides what is active. Arithmetic reads the same for both.
        """
        values = [group.get(name, self.defaults[name]) for group in self.param_groups]
        if all(value == values[0] for value in values):
            return float(values[0])
        pairs = zip(self.param_groups, values, strict=True)
        return at.of_active([value for group, value in pairs for _ in group["params"]])


class WrappingOptimizer(EvaluatingOptimizer):
    """Several gradient evaluations per step, one update by ``base_optimizer``.

    Args:
        base_optimizer: any optimiser that steps from ``.grad`` (of PyTorch or of gradwise). Hooks registered on it run
            when the combined direction is in ``.grad``: ``base_optimizer.register_step_pre_hook`` is the place to clip.
        defaults: the method's own hyper-parameters, under names that no base uses (``sam_rho``). A group that has the
            key overrides the value; schedule by setting the key in the groups. Nothing is written into the groups.
        model: the module being trained: its buffers advance as in one plain forward pass, and a
            ``DistributedDataParallel`` is synchronised. Taken from the closure when it knows its module.
        fix_rng: replay the random state, so that dropout draws the same masks in all evaluations of a step.
        sync: ``"all"``: every gradient is averaged over the processes; ``"final"``: each process perturbs by its local
            gradient and only the direction is averaged (m-sharpness).
        scaler: a ``torch.amp.GradScaler`` for float16. It is stepped and updated inside; gradients are unscaled inside.

    ``.grad`` of the parameters is set aside during a step and given back unchanged.

    Raises ``TypeError`` when ``base_optimizer`` is no optimiser or itself needs a closure.
    """

    guarantees: ClassVar[frozenset[str]] = frozenset({"wraps", "restores_weights", "one_forward_buffers"})

    def __init__(
        self,
        base_optimizer: Any,
        defaults: dict[str, Any],
        *,
        model: nn.Module | None = None,
        fix_rng: bool = True,
        sync: Sync = "final",
        scaler: Any = None,
    ) -> None:
        if not isinstance(base_optimizer, torch.optim.Optimizer):
            raise TypeError(f"base_optimizer must be a torch.optim.Optimizer, got {type(base_optimizer).__name__}.")
        if getattr(base_optimizer, "needs", "grad") != "grad" or isinstance(base_optimizer, torch.optim.LBFGS):
            raise TypeError(f"{type(base_optimizer).__name__} needs a closure itself and cannot be wrapped.")
        require_choice("sync", sync, ("final", "all"))
        self.base_optimizer: torch.optim.Optimizer = base_optimizer
        self.model, self.fix_rng, self.sync, self.scaler = model, fix_rng, sync, scaler
        self._own = tuple(defaults)
        super().__init__(list(base_optimizer.param_groups), {**base_optimizer.defaults, **defaults})

    def direction(self, at: Evaluations, closure: Any) -> list[Tensor]:
        """Combine gradients evaluated through ``at``; one tensor per active parameter. Methods override this."""
        raise NotImplementedError(f"{type(self).__name__} must define direction(at, closure).")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Tensor:  # type: ignore[override]
        """One update from several evaluations of ``closure``; returns the loss of the first, detached.

        Raises ``TypeError`` without a closure and ``RuntimeError`` for one that calls backward. If any evaluation is
        not finite nothing is updated: weights are put back bit for bit and ``FloatingPointError`` is raised (with a
        scaler the step is skipped and the scale lowered instead); ``stats["skipped"]`` counts such steps.
        """
        return self.evaluate(closure, self._apply)

    def _apply(self, at: Evaluations, closure: Closure) -> bool:
        return at.apply(self.direction(at, closure), self.base_optimizer)

    # The base owns groups and state: one list and one dictionary, whichever of the two optimisers is asked.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the base optimiser."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if groups:  # PyTorch's constructor starts from an empty list, which must not empty the base
            self.base_optimizer.param_groups = groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The state of the base optimiser."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        if state:
            self.base_optimizer.state = state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base; a group that the base has already is only checked."""
        new = not any(param_group is group for group in self.param_groups)
        if new:
            self.base_optimizer.add_param_group(param_group)
        try:
            self._accept(self.param_groups[-1] if new else param_group)
        except (TypeError, ValueError):
            if new:
                self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """The base optimiser's ``state_dict``, and under ``"method"`` (and ``"base"``) what continues bit for bit."""
        state = self.base_optimizer.state_dict()
        inner = {"base": state["method"]} if "method" in state else {}
        return {**state, **inner, "method": self.extra_state()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load into the base and continue; a ``state_dict`` of the bare base is accepted."""
        inner = {k: v for k, v in state_dict.items() if k not in ("method", "base")}
        if "base" in state_dict:
            inner["method"] = state_dict["base"]
        self.base_optimizer.load_state_dict(inner)
        self.load_extra_state(state_dict.get("method", {}))
        self.check_groups()

    def extra_state(self) -> dict[str, Any]:
        """Also the method's own hyper-parameters and the scaler's state."""
        state = {**super().extra_state(), "defaults": {name: self.defaults[name] for name in self._own}}
        return state if self.scaler is None else {**state, "scaler": self.scaler.state_dict()}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Also the method's own hyper-parameters and the scaler's state."""
        super().load_extra_state(state)
        self.defaults.update({k: v for k, v in state.get("defaults", {}).items() if k in self._own})
        if self.scaler is not None and state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
