"""Stochastic L-BFGS: curvature pairs from Hessian products at averaged iterates.

Byrd, Hansen, Nocedal, Singer, "A Stochastic Quasi-Newton Method for Large-Scale Optimization", SIAM J. Optim. 26, 2016,
arXiv:1401.7020, algorithm 1; Bottou, Curtis, Nocedal, arXiv:1606.04838, section 6.2. The compact form of the memory:
Byrd, Nocedal, Schnabel, Math. Programming 63, 1994. ``pairs="difference"``: Schraudolph, Yu, Guenter, AISTATS 2007.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from jaxtyping import Float
import torch
from torch import Tensor, nn

from gradwise.base.checks import require_choice, require_count, require_positive
from gradwise.linalg import trees
from gradwise.optim.stochastic_gradient._shared import place
from gradwise.training.closure import Closure, as_closure
from gradwise.training.direct import DirectOptimizer, wide_dtype
from gradwise.training.evaluation import Evaluations


def two_loop(
    SY: Float[Tensor, "k k"], YY: Float[Tensor, "k k"], Sg: Float[Tensor, " k"], Yg: Float[Tensor, " k"]
) -> tuple[float, Float[Tensor, " k"], Float[Tensor, " k"]]:
    """(gamma, alpha, delta) with H g = gamma (g - Y'alpha) + S'delta, H the BFGS inverse of k pairs from gamma I.

    Rows of S and Y [k, n] are the pairs, the oldest first; only the products SY = S Y', YY = Y Y', S g and Y g are
    needed. gamma = s'y/y'y of the newest pair. The loop from the newest pair to the oldest is the back substitution
    R alpha = S g with R the upper triangle of SY; the loop back is R'delta = D alpha - gamma (Y g - YY alpha), D its
    diagonal.
    """
    gamma = float(SY[-1, -1] / YY[-1, -1])
    R = SY.triu()
    alpha = torch.linalg.solve_triangular(R, Sg[:, None], upper=True)[:, 0]
    rest = R.diagonal() * alpha - gamma * (Yg - YY @ alpha)
    return gamma, alpha, torch.linalg.solve_triangular(R.mT, rest[:, None], upper=False)[:, 0]


class StochasticLBFGS(DirectOptimizer):
    """w <- w - lr H g_B(w), with H the L-BFGS inverse of ``memory`` pairs measured every ``curvature_every`` steps.

    After every period of L = ``curvature_every`` steps, with wbar the mean of its iterates::

        s = wbar - wbar_before        y = (Hessian on the curvature sample at wbar) s
        the pair is taken when s'y >= eps ||s||^2

    Until there is a pair (the first two periods) a step is a stochastic gradient step with ``start_lr``.

    Args:
        params: parameters or groups; a group may have its own ``lr`` and ``start_lr``.
        lr: step size of quasi-Newton steps, constant or falling like 1/k. There is no line search: above 0.1 the loss
            may blow up for a period in directions that the memory knows badly, also without noise.
        memory: number of pairs. More than 20 seldom help.
        curvature_every: steps of a period.
        start_lr: step size of the gradient steps at the start; ``lr`` by default.
        eps: least curvature of a pair, in units of the loss's.
        pairs: ``"hessian"`` (exact product), or ``"difference"``: y is the difference of the curvature sample's
            gradients at the two means; for losses without second derivatives.
        model, fix_rng: see :class:`~gradwise.training.direct.DirectOptimizer`.

    Cost: one gradient per step, and per period one gradient and one Hessian product (or two gradients) of the curvature
    sample. State: ``memory`` pairs, two copies of the weights. ``stats``: ``loss``, ``grad_norm``, ``pairs`` (in the
    memory), ``curvature`` (s'y/s's of the last pair measured), ``left_out`` (pairs refused), ``skipped``.

    DDP: gradients and products are averaged over the processes, so that all have the same pairs. FSDP2 is not
    supported: products run over all parameters.

    Raises ``ValueError`` for negative rates, memory < 1, curvature_every < 1, eps <= 0 and an unknown ``pairs``; for
    the rest see :meth:`~gradwise.training.direct.DirectOptimizer.step`.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    >>> curvature = torch.tensor([1.0, 100.0], dtype=torch.float64)
    >>> optimizer = StochasticLBFGS([weight], lr=1.0, start_lr=0.005, curvature_every=5)
    >>> losses = [optimizer.step(lambda: 0.5 * (curvature * weight**2).sum()).item() for _ in range(60)]
    >>> losses[-1] < 1e-12 * losses[0]
    True
    """

    guarantees: ClassVar[frozenset[str]] = frozenset({"state_dict_exact"})

    def __init__(
        self,
        params: Any,
        lr: float = 0.1,
        memory: int = 10,
        curvature_every: int = 10,
        *,
        start_lr: float | None = None,
        eps: float = 1e-4,
        pairs: str = "hessian",
        model: nn.Module | None = None,
        fix_rng: bool = True,
    ) -> None:
        require_count("memory", memory)
        require_count("curvature_every", curvature_every)
        require_positive("eps", eps)
        require_choice("pairs", pairs, ("hessian", "difference"))
        self.memory, self.curvature_every, self.eps, self.pairs = memory, curvature_every, eps, pairs
        self.steps = 0
        self._SY = self._YY = torch.zeros(0, 0, dtype=torch.float64)
        self._sample: Closure | None = None
        super().__init__(params, {"lr": lr, "start_lr": start_lr}, model=model, fix_rng=fix_rng, sync="all")

    def check(self, group: Mapping[str, Any]) -> None:
        """Ranges of the rates."""
        require_positive("lr", group["lr"], strict=False)
        if group["start_lr"] is not None:
            require_positive("start_lr", group["start_lr"], strict=False)

    def extra_state(self) -> dict[str, Any]:
        """Also the number of steps and the products of the pairs."""
        return {**super().extra_state(), "steps": self.steps, "SY": self._SY.clone(), "YY": self._YY.clone()}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Also the number of steps and the products of the pairs."""
        super().load_extra_state(state)
        self.steps = state.get("steps", self.steps)
        self._SY, self._YY = (state.get(name, old).cpu() for name, old in (("SY", self._SY), ("YY", self._YY)))

    @property
    def curvature_due(self) -> bool:
        """Whether the next step measures a pair, so that a curvature sample is worth loading."""
        return (self.steps + 1) % self.curvature_every == 0 and self.steps + 1 > self.curvature_every

    @torch.no_grad()
    def step(self, closure: Any = None, curvature_closure: Any = None) -> Tensor:  # type: ignore[override]
        """One update; returns the loss before it, detached.

        ``curvature_closure`` returns the loss of the sample that pairs are measured on, 5 to 20 times as large as the
        batch; by default that of the batch itself. It is only called where :attr:`curvature_due`. For the rest see
        :meth:`~gradwise.training.direct.DirectOptimizer.step`.
        """
        self._sample = None if curvature_closure is None else as_closure(curvature_closure, self.needs)
        try:
            return super().step(closure)
        finally:
            self._sample = None

    def displacement(self, at: Evaluations, closure: Any) -> list[Tensor]:
        """-lr H g, or -start_lr g without pairs; where due, a new pair."""
        gradient = at.gradient(closure)
        known = len(self._SY) > 0
        direction = self._direction(at.active, gradient) if known else gradient
        rates = at.of_active([self._rate(group, known) for group in self.param_groups for _ in group["params"]])
        moves = [(-r * d).to(p.dtype) for p, d, r in zip(at.active, direction, rates.tolist(), strict=True)]
        averages, pair = self._period(at, self._sample or closure)
        self.require_finite(moves, [at.loss, at.last_loss], what="the loss or the step")

        # nothing can fail from here on
        self.steps += 1
        for p, entries in zip(at.active, averages, strict=True):
            self.state[p].update(entries)
        if pair is not None:
            self._consider(at.active, *pair)
        self.stats = {**self.stats, "pairs": float(len(self._SY)), "left_out": self.stats.get("left_out", 0.0)}
        return moves

    def _rate(self, group: Mapping[str, Any], known: bool) -> float:
        early = group.get("start_lr", self.defaults["start_lr"])
        return float(group["lr"] if known or early is None else early)

    def _direction(self, params: Sequence[Tensor], gradient: list[Tensor]) -> list[Tensor]:
        """H g for the pairs in the memory."""
        wide = [g.to(wide_dtype(g)) for g in gradient]
        S, Y = ([self._history(p, name) for p in params] for name in ("s", "y"))
        gamma, alpha, delta = two_loop(self._SY, self._YY, _products(S, wide), _products(Y, wide))
        found = []
        for s, y, g in zip(S, Y, wide, strict=True):
            a, d = alpha.to(g), delta.to(g)
            found.append(torch.addmv(gamma * g.reshape(-1), y.mT, a, alpha=-gamma).addmv_(s.mT, d).view_as(g))
        return found

    def _history(self, parameter: Tensor, name: str) -> Float[Tensor, "k n"]:
        """The parameter's share of s or y of all pairs; zero where it had no gradient then."""
        known = self.state.get(parameter, {}).get(name)
        if known is not None:
            return known.reshape(len(self._SY), parameter.numel())
        return torch.zeros(len(self._SY), parameter.numel(), dtype=wide_dtype(parameter), device=parameter.device)

    def _period(
        self, at: Evaluations, sample: Any
    ) -> tuple[list[dict[str, Any]], tuple[list[Tensor], list[Tensor]] | None]:
        """State of the running means with this iterate, and, where the period ends, s and y."""
        ends = (self.steps + 1) % self.curvature_every == 0
        entries: list[dict[str, Any]] = []
        s: list[Tensor] = []
        for p in at.active:
            state = self.state.get(p, {})
            count, here = state.get("count", 0) + 1, p.detach().to(wide_dtype(p))
            mean = here.clone() if count == 1 else torch.lerp(state["mean"], here, 1.0 / count)
            if ends:
                before = state.get("average")
                s.append(torch.zeros_like(mean) if before is None else mean - before)
                entries.append({"average": mean, "mean": mean, "count": 0})
            else:
                entries.append({"mean": mean, "count": count})
        if not ends or not any("average" in self.state.get(p, {}) for p in at.active):
            return entries, None
        now = [entry["average"].to(p.dtype) for p, entry in zip(at.active, entries, strict=True)]
        place(at, now)
        if self.pairs == "hessian":
            along = [v.to(p.dtype) for p, v in zip(at.active, s, strict=True)]
            _, y = at.curvature(sample, lambda _: along)
        else:
            later = at.gradient(sample)
            place(
                at, [self.state.get(p, {}).get("average", n).to(p.dtype) for p, n in zip(at.active, now, strict=True)]
            )
            y = list(torch._foreach_sub(later, at.gradient(sample)))
        at.restore()
        return entries, (s, [v.to(w.dtype) for v, w in zip(y, s, strict=True)])

    def _consider(self, params: Sequence[Tensor], s: list[Tensor], y: list[Tensor]) -> None:
        """Take the pair into the memory if it is curved enough; the oldest one goes when there are too many."""
        k = max(0, len(self._SY) + 1 - self.memory)
        S, Y = ([self._history(p, name)[k:] for p in params] for name in ("s", "y"))
        ss, sy, yy = (float(trees.dot(a, b)) for a, b in ((s, s), (s, y), (y, y)))
        self.stats = {**self.stats, "curvature": sy / ss if ss > 0 else 0.0}
        if not (ss > 0 and sy >= self.eps * ss and yy < float("inf")):
            self.stats["left_out"] = self.stats.get("left_out", 0.0) + 1
            return
        new = torch.tensor([[sy]], dtype=torch.float64), torch.tensor([[yy]], dtype=torch.float64)
        above, left, side = _products(S, y)[:, None], _products(Y, s)[None], _products(Y, y)[:, None]
        SY = torch.cat([torch.cat([self._SY[k:, k:], above], 1), torch.cat([left, new[0]], 1)])
        YY = torch.cat([torch.cat([self._YY[k:, k:], side], 1), torch.cat([side.mT, new[1]], 1)])
        active = {p: n for n, p in enumerate(params)}
        for p in [q for group in self.param_groups for q in group["params"]]:
            if p not in active and "s" not in self.state.get(p, {}):
                continue
            n = active.get(p)
            for name, pieces in (("s", s), ("y", y)):
                old = self._history(p, name)[k:]
                row = torch.zeros_like(p, dtype=old.dtype) if n is None else pieces[n]
                self.state[p][name] = torch.cat([old, row.reshape(1, p.numel())]).reshape(len(SY), *p.shape)
        self._SY, self._YY = SY, YY


def _products(rows: Sequence[Float[Tensor, "k _"]], vector: Sequence[Tensor]) -> Float[Tensor, " k"]:
    """Rows times vector, both in pieces, in float64 on the CPU."""
    total = torch.zeros(len(rows[0]), dtype=torch.float64)
    for row, v in zip(rows, vector, strict=True):
        total += (row @ v.reshape(-1).to(row.dtype)).to("cpu", torch.float64)
    return total
