"""XGD: descent along gradients of the terms with weights that are held while the parameters move."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from jaxtyping import Bool, Float, Int
import numpy as np
import torch
from torch import Tensor, nn

from gradwise.autodiff.context import Buffers, RandomState
from gradwise.base.checks import require_choice, require_count, require_positive
from gradwise.base.counting import count
from gradwise.base.random import generator_from
from gradwise.optim.xgd.sum_log_concave import (
    divergence,
    require_log_terms,
    require_simplex,
    require_support,
    values,
    weighted,
)
from gradwise.training.closure import Closure, Needs
from gradwise.training.direct import DirectOptimizer, wide_dtype
from gradwise.training.evaluation import Evaluations, combine_, scaled

POLICIES = ("fixed", "fixed+gd", "current", "lagged", "reference")


def dirichlet(rows: int, terms: int, concentration: float, generator: torch.Generator) -> Float[Tensor, "n S"]:
    """Laws drawn from the symmetric Dirichlet distribution, one per row."""
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    drawn = torch.from_numpy(np.random.default_rng(seed).dirichlet(np.full(terms, concentration), rows))
    return drawn / drawn.sum(-1, keepdim=True)  # to the last bit, which matters for a single term


class XGD(DirectOptimizer):
    """t <- t - gamma_n grad^mu F(t) for F = mean_i -log sum_k p_ik, from the log-terms log p_ik.

    ``loss = optimizer.step(closure)``, where the closure returns log-terms [n, S] (samples, terms) with their graph and
    calls no backward. The step is along sum_k mu_ik grad l_ik, averaged over rows. What the rows' laws mu_i are is the
    policy::

        "fixed"      constant over the run (the paper's): descent on the convex function mean_i sum_k mu_ik l_ik
        "fixed+gd"   fixed for ``switch`` steps, then "current"
        "current"    w_i(t), the present shares: gradient descent on F
        "lagged"     w_i of the last refresh: gradient EM. An inner run that descends lowers F as well
        "reference"  w_i at a given point, constant over the run

    With fixed weights F is not what is minimised: where all rows share one law, or the law is a poor guess, the limit
    can be far above F's minimum. As a start (``"fixed+gd"``) it leaves points where F's gradient vanishes by symmetry.

    Args:
        params: parameters or groups; a group may have its own ``lr`` and ``weight_decay``.
        lr: gamma, in the units of the mean over rows.
        weights: the policy.
        mu: of a fixed policy: ``"uniform"``, ``"dirichlet"`` (drawn once per row, from ``generator``), or a tensor [S]
            (shared by all rows) or [N, S].
        switch: steps before ``"fixed+gd"`` turns to ordinary gradients.
        refresh: steps between two refreshes of ``"lagged"``.
        concentration: of the Dirichlet distribution; 1 is uniform on the simplex.
        schedule: ``"constant"``, or ``"inv_sqrt"``: gamma_n = lr/sqrt(n) of the n-th step, for which theorem 4.2 gives
            the rate log(n)/sqrt(n).
        weight_decay: adds weight_decay/2 ||t||^2 to F, which multiplies every term by the same Gaussian and leaves it
            log-concave. The returned loss is without it.
        reference: of ``"reference"``: the point, one tensor per parameter in the order of the groups.
        n_samples: N, where a step sees some of the rows only (mini-batches, see :meth:`step`) or micro-batches; without
            it the first step's n.
        model, fix_rng: see :class:`~gradwise.training.direct.DirectOptimizer`.
        generator: stream of the draws (a seed is accepted); default seed 0.

    Laws that differ by row are kept as a table [N, S], in ``state_dict`` too. A step costs one gradient
    (``"reference"``: and one forward pass per row once).

    ``stats``: ``loss`` F before the step, ``grad_norm``, ``entropy`` of w(t) in nats (0: one convex term has taken
    over), ``kl`` = KL(mu || w(t)) (how far the weights that were used are from the present ones), both averaged over
    rows, ``skipped``.

    DDP: every process keeps the laws of its own rows (and a state of its own, and should be seeded differently); steps
    are averaged. Sharded parameters (FSDP2) are refused.

    Raises ``ValueError`` for an unknown policy or schedule, lr < 0, weight_decay < 0, switch < 0, refresh < 1,
    concentration <= 0, a mu that is not on the simplex or of the wrong shape, a missing, spare or misshapen reference;
    at a step for log-terms that are not [n, S], rows that do not fit the table, and a term of -inf that has weight.
    ``TypeError`` for sharded parameters and log-terms that are no differentiable tensor; ``FloatingPointError`` where
    log-terms are NaN or +inf, a row is -inf altogether, or the step is not finite: weights are then unchanged.

    >>> x = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]])
    >>> y = torch.tensor([1, 1, 0, 0])
    >>> T = torch.nn.Parameter(torch.zeros(2, 2))  # the gradient vanishes here
    >>> optimizer = XGD([T], lr=1.0, weights="fixed+gd", switch=10, generator=0)
    >>> from gradwise.optim.xgd import checkered_log_terms
    >>> losses = [float(optimizer.step(lambda: checkered_log_terms(x @ T.T, y))) for _ in range(100)]
    >>> losses[0], losses[-1] < 0.1
    (0.693, True)
    """

    needs: ClassVar[Needs] = "losses"
    guarantees: ClassVar[frozenset[str]] = frozenset({"state_dict_exact"})

    def __init__(
        self,
        params: Any,
        lr: float = 0.1,
        weights: str = "fixed",
        mu: Any = "dirichlet",
        switch: int = 50,
        refresh: int = 20,
        concentration: float = 1.0,
        schedule: str = "constant",
        *,
        weight_decay: float = 0.0,
        reference: Sequence[Tensor] | None = None,
        n_samples: int | None = None,
        model: nn.Module | None = None,
        fix_rng: bool = True,
        generator: Any = None,
    ) -> None:
        require_choice("weights", weights, POLICIES)
        require_choice("schedule", schedule, ("constant", "inv_sqrt"))
        require_count("switch", switch, 0)
        require_count("refresh", refresh)
        require_positive("concentration", concentration)
        if n_samples is not None:
            require_count("n_samples", n_samples)
        self.weights, self.switch, self.refresh = weights, switch, refresh
        self.concentration, self.schedule = concentration, schedule
        self.mu = _law(mu) if weights in ("fixed", "fixed+gd") else None
        self.n_samples = n_samples
        self.steps = 0
        self._index: Tensor | None = None
        self._share = 1.0  # what turns the sum over micro-batches into a mean
        self._table: Tensor | None = None
        self._known: Tensor | None = None
        if isinstance(self.mu, Tensor) and self.mu.ndim == 2:
            if n_samples not in (None, len(self.mu)):
                raise ValueError(f"mu has {len(self.mu)} rows, which is not n_samples={n_samples}.")
            self.n_samples = len(self.mu)
            self._table, self._known = self.mu, torch.ones(len(self.mu), dtype=torch.bool)
        stream = generator_from(0 if generator is None else generator)
        super().__init__(
            params,
            {"lr": lr, "weight_decay": weight_decay},
            model=model,
            generator=stream,
            fix_rng=fix_rng,
            sync="final",
        )
        self.reference = self._point(reference)

    def check(self, group: Mapping[str, Any]) -> None:
        """Ranges of all values; sharded parameters are refused."""
        require_positive("lr", group["lr"], strict=False)
        require_positive("weight_decay", group["weight_decay"], strict=False)
        if any(hasattr(p, "placements") for p in group.get("params", ())):
            raise TypeError("XGD does not support sharded parameters (DTensor, FSDP2); use DistributedDataParallel.")

    def extra_state(self) -> dict[str, Any]:
        """Also the number of steps and the rows' laws."""
        own = {"steps": self.steps, "table": self._table, "known": self._known, "n_samples": self.n_samples}
        return {**super().extra_state(), **own}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Also the number of steps and the rows' laws."""
        super().load_extra_state(state)
        self.steps, self.n_samples = state.get("steps", self.steps), state.get("n_samples", self.n_samples)
        table, known = state.get("table", self._table), state.get("known", self._known)
        self._table = None if table is None else table.clone()
        self._known = None if known is None else known.clone()

    @property
    def policy(self) -> str:
        """``"fixed"``, ``"current"``, ``"lagged"`` or ``"reference"``: what the next step does."""
        if self.weights == "fixed+gd":
            return "fixed" if self.steps < self.switch else "current"
        return self.weights

    @torch.no_grad()
    def step(self, closure: Any = None, index: Int[Tensor, " n"] | None = None) -> Tensor:  # type: ignore[override]
        """One step; returns F before it, detached. Further numbers are in ``stats``.

        ``index`` says which of the N rows the closure's are, so that each keeps its law in mini-batches; ``"lagged"``
        then refreshes a row when it is first seen after a refresh is due.
        """
        self._index, self._share = index, 1.0
        try:
            loss = super().step(closure)
        finally:
            self._index = None
        self.steps += 1
        for name in ("loss", "grad_norm"):
            self.stats[name] *= self._share
        return loss

    def displacement(self, at: Evaluations, closure: Any) -> list[Tensor]:
        """-gamma_n (grad^mu F + weight_decay t)."""
        policy, one = self.policy, len(closure.shares) == 1
        if policy == "current":
            self._table = self._known = None
        elif policy == "lagged" and self.steps % self.refresh == 0 and self._known is not None:
            self._known = torch.zeros_like(self._known)
        elif policy == "reference":
            self._look_from(closure)
        seen_rows, sums = [0], []

        def surrogate(share: Callable[[], Any]) -> Tensor:
            terms = _terms(share())
            seen, start = terms.detach(), seen_rows[0]
            seen_rows[0] = end = start + len(seen)
            mu = self._law_of(policy, start, end, one, seen)
            F, w = values(seen), seen.softmax(-1)
            sums.append(torch.stack([-torch.xlogy(w, w).sum(), divergence(mu, seen).sum()]))
            total = weighted(terms, mu).sum()
            total = total - total.detach() + F.sum()  # the gradient of the one, the value of the other
            return total / len(seen) if one else total

        micro = () if one else [partial(surrogate, share) for share in closure.shares]
        options: dict[str, Any] = {"module": closure.module, "generators": closure.generators}
        gradient = at.gradient(Closure(partial(surrogate, closure.shares[0]), micro=micro, **options))
        n = seen_rows[0]
        if self._index is not None and n != len(self._index):
            raise ValueError(f"index names {len(self._index)} rows, the closure returned {n}.")
        if self._index is None and self._table is not None and n != len(self._table):
            raise ValueError(_changed(n, len(self._table)))
        if not one:
            self._share = 1 / n
            torch._foreach_mul_(gradient, self._share)
            at.loss = at.loss * self._share
        entropy, kl = (torch.stack(sums).sum(0) / n).tolist()
        self.stats = {**self.stats, "entropy": entropy, "kl": kl}
        rate = self.scalar(at, "lr") / ((self.steps + 1) ** 0.5 if self.schedule == "inv_sqrt" else 1.0)
        decay = self.scalar(at, "weight_decay")
        return combine_(-rate, gradient, -rate * decay, at.active) if np.any(decay) else scaled(gradient, -rate)

    def _law_of(self, policy: str, start: int, end: int, whole: bool, seen: Tensor) -> Float[Tensor, "n S"]:
        """The laws of the rows from ``start`` to ``end`` of this step, whose log-terms are ``seen``."""
        S = seen.shape[-1]
        if policy == "current":
            return seen.softmax(-1)
        if isinstance(self.mu, str) and self.mu == "uniform":
            mu = seen.new_full((1, S), 1 / S)
        elif isinstance(self.mu, Tensor) and self.mu.ndim == 1:
            mu = self.mu.to(seen)[None]
        else:
            table, known = self._laws(policy, end if whole and self._index is None else None, seen)
            rows = self._rows(start, end, known)
            if policy == "lagged":
                table[rows] = torch.where(known[rows, None], table[rows], seen.softmax(-1))
                known[rows] |= values(seen).isfinite()  # a row that is not stays open; the step will be refused
            mu = table[rows]
        if mu.shape[-1] != S:
            raise ValueError(f"mu has {mu.shape[-1]} terms per row, the closure returned {S}.")
        mu = mu.expand_as(seen)
        require_support(mu, seen)
        return mu

    def _laws(self, policy: str, n: int | None, seen: Tensor) -> tuple[Float[Tensor, "N S"], Bool[Tensor, " N"]]:
        """The table of laws: made at the first step, and on the device and in the type of the log-terms."""
        if self._table is None or self._known is None:
            n = n if self.n_samples is None else self.n_samples
            if n is None:
                raise ValueError("with micro-batches or index= the laws of all rows need n_samples.")
            self._table = torch.zeros(n, seen.shape[-1])
            if policy == "fixed" and self.generator is not None:
                self._table = dirichlet(n, seen.shape[-1], self.concentration, self.generator)
            self._known = torch.full((n,), policy == "fixed")
        self._table, self._known = self._table.to(seen), self._known.to(seen.device)
        return self._table, self._known

    def _rows(self, start: int, end: int, known: Bool[Tensor, " N"]) -> Int[Tensor, " n"]:
        """Numbers in the table of the rows from ``start`` to ``end`` of this step."""
        N = len(known)
        if self._index is None:
            if end > N:
                raise ValueError(_changed(end, N))
            return torch.arange(start, end, device=known.device)
        rows = self._index[start:end].to(known.device)
        if len(rows) != end - start:
            raise ValueError(f"index names {len(self._index)} rows, the closure returned at least {end}.")
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < N:
            raise ValueError(f"index must lie in [0, {N}), got {int(rows.min())} to {int(rows.max())}.")
        return rows

    def _look_from(self, closure: Any) -> None:
        """Enter w of the reference point for rows that are seen for the first time: one forward pass there."""
        if self._known is not None and bool(self._known[slice(None) if self._index is None else self._index].all()):
            return
        parameters = [p for group in self.param_groups for p in group["params"]]
        random = RandomState({p.device for p in parameters}, closure.generators)
        buffers = Buffers(self.model if self.model is not None else closure.module)
        kept = [p.detach().clone() for p in parameters]
        try:
            torch._foreach_copy_(parameters, self.reference)
            terms = torch.cat([_terms(share(), graph=False) for share in closure.shares])
        finally:
            torch._foreach_copy_(parameters, kept)
            buffers.restore()
            random.restore()
        count(forward=1)
        table, known = self._laws("reference", len(terms) if self._index is None else None, require_log_terms(terms))
        rows = self._rows(0, len(terms), known)
        table[rows], known[rows] = terms.softmax(-1), True

    def _point(self, reference: Sequence[Tensor] | None) -> list[Tensor]:
        if (reference is not None) != (self.weights == "reference"):
            raise ValueError("reference (one tensor per parameter) goes with weights='reference', and only with it.")
        if reference is None:
            return []
        parameters = [p for group in self.param_groups for p in group["params"]]
        if [p.shape for p in parameters] != [e.shape for e in reference]:
            shapes = [list(p.shape) for p in parameters], [list(e.shape) for e in reference]
            raise ValueError(f"reference must hold one tensor per parameter, of shapes {shapes[0]}, got {shapes[1]}.")
        return [e.detach().to(p, copy=True) for e, p in zip(reference, parameters, strict=True)]


def _law(mu: Any) -> Any:
    if isinstance(mu, str):
        require_choice("mu", mu, ("uniform", "dirichlet"))
        return mu
    if not isinstance(mu, Tensor):
        raise TypeError(f"mu must be 'uniform', 'dirichlet' or a tensor, got {type(mu).__name__}.")
    if mu.ndim not in (1, 2):
        raise ValueError(f"mu must have shape [S] or [N, S], got {list(mu.shape)}.")
    return require_simplex(mu.detach().clone())


def _terms(log_terms: Any, *, graph: bool = True) -> Float[Tensor, "n S"]:
    """The closure's answer if it is a matrix of log-terms, in float32 at least."""
    if not isinstance(log_terms, Tensor):
        raise TypeError(f"the closure must return log-terms [n, S] as a tensor, got {type(log_terms).__name__}.")
    if log_terms.ndim != 2 or not log_terms.numel():
        raise ValueError(f"the closure must return log-terms [n, S], n and S >= 1, got shape {list(log_terms.shape)}.")
    if graph and not log_terms.requires_grad:
        raise TypeError("the closure returned log-terms without a graph (detached, or computed under no_grad).")
    return log_terms.to(wide_dtype(log_terms))


def _changed(n: int, N: int) -> str:
    return (
        f"the closure returned {n} rows, and laws are kept for {N}: every row keeps its law over the run. Pass "
        "n_samples and step(closure, index) for mini-batches."
    )
