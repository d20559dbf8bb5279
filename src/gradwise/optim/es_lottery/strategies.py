"""Ask-and-tell evolution strategies with a diagonal Gaussian: SNES, Sep-CMA-ES, PGPE and OpenES. All minimise."""

from collections.abc import Callable, Mapping
import math
from typing import Any

from jaxtyping import Float
import numpy as np
import torch
from torch import Tensor

from gradwise.base.checks import (
    require_choice,
    require_count,
    require_finite,
    require_floating,
    require_open_unit,
    require_positive,
    require_shape,
)
from gradwise.base.random import generator_from

BLOCK = 2**18  # numbers of a population that are worked on at a time, on the CPU


def by_rank(table: Float[Tensor, " p"], losses: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
    """``table[r]`` for the member of rank r (0: smallest loss); members that tie share the mean of their entries.

    Losses that are not finite rank last. On the CPU, in float64.
    """
    values = losses.numpy()
    values = np.where(np.isfinite(values), values, np.inf)
    order = values.argsort(kind="stable")
    group = np.append(0, (values[order[1:]] != values[order[:-1]]).cumsum())
    shared = np.bincount(group, weights=table.numpy()) / np.bincount(group)
    found = np.empty_like(values)
    found[order] = shared[group]
    return torch.from_numpy(found)


def snes_utilities(popsize: int) -> Float[Tensor, " p"]:
    """u_r = max(0, log(p/2 + 1) - log r)/sum - 1/p for ranks r = 1, ..., p; they add up to 0."""
    raw = (math.log(popsize / 2 + 1) - torch.arange(1, popsize + 1, dtype=torch.float64).log()).clamp_min(0)
    return raw / raw.sum() - 1 / popsize


def tempered_weights(popsize: int, temperature: float) -> Float[Tensor, " p"]:
    """softmax(-20 sigmoid(temperature (r/(p-1) - 1/2))) over ranks r = 0, ..., p-1: the paper's SNES runs."""
    centred = torch.linspace(-0.5, 0.5, popsize, dtype=torch.float64)
    return torch.softmax(-20 * torch.sigmoid(temperature * centred), 0)


def centred_ranks(popsize: int) -> Float[Tensor, " p"]:
    """-1/2 (best) to 1/2 (worst) in equal steps."""
    return torch.linspace(-0.5, 0.5, popsize, dtype=torch.float64)


class Strategy:
    """Base of the strategies: sampling, checks, state. A generation is ``X = es.ask(); es.tell(X, losses)``.

    Args:
        start: the first mean [d], or a dimension (mean 0, float32). Half precision is kept in float32.
        popsize: members per generation.
        sigma_init: first standard deviation of every coordinate.
        mean_decay: the mean shrinks by this share in every generation (weight decay).
        antithetic: members come in mirrored pairs, the second half of ``X`` mirrors the first.
        lr: step size of the mean, in the units of the strategy.
        generator: random stream, or a seed; on the device of ``start``.

    Attributes:
        mean, std: of the search distribution, each [d].
        lr, mean_decay: may be changed between generations.
        generation: how many updates were made; ``skipped``: how many generations had no finite loss.

    ``state_dict`` holds all of it and the generator, so that a run continues bit for bit.

    Raises ``ValueError`` for a popsize below 2, or odd with mirrored pairs, sigma_init <= 0, lr < 0, mean_decay
    outside [0, 1), and a start that is empty or not finite; ``TypeError`` for a start that is not a real
    floating-point vector.
    """

    _saved: tuple[str, ...] = ("mean", "std", "generation", "skipped")

    def __init__(
        self,
        start: Any,
        popsize: int = 64,
        sigma_init: float = 0.1,
        mean_decay: float = 0.0,
        antithetic: bool = True,
        *,
        lr: float = 1.0,
        generator: Any = None,
    ) -> None:
        start = torch.zeros(require_count("start", start)) if isinstance(start, int) else start
        require_shape("start", require_floating("start", start), "d")
        require_count("start's length", len(start))
        require_finite("start", start)
        if require_count("popsize", popsize, 2) % 2 and antithetic:
            raise ValueError(f"popsize must be even for mirrored pairs, got {popsize}; or pass antithetic=False.")
        require_positive("sigma_init", sigma_init)
        require_positive("lr", lr, strict=False)
        require_decay(mean_decay)
        self.mean: Tensor = start.detach().to(torch.promote_types(start.dtype, torch.float32), copy=True)
        self.std: Tensor = torch.full_like(self.mean, sigma_init)
        self.popsize, self.antithetic, self.lr, self.mean_decay = popsize, antithetic, lr, mean_decay
        self.generation = self.skipped = 0
        self.generator = generator_from(generator, self.mean.device)

    @torch.no_grad()
    def ask(self, out: Tensor | None = None) -> Float[Tensor, "p d"]:
        """The members of a new generation, in the memory of ``out`` where it is given (fresh memory costs time)."""
        X = self.mean.new_empty(self.popsize, len(self.mean)) if out is None else out
        half = X[: self.popsize // 2] if self.antithetic else X
        half.normal_(generator=self.generator).mul_(self.std)
        if self.antithetic:
            torch.sub(self.mean, half, out=X[self.popsize // 2 :])
        half.add_(self.mean)
        return X

    @torch.no_grad()
    def tell(self, X: Float[Tensor, "p d"], losses: Any) -> None:
        """Update the distribution by the members ``X`` and their losses [p].

        Draws are read off ``X``, so members may have been repaired since they were asked for. A loss that is not finite
        counts as the worst; a generation without any finite loss changes nothing and is counted in ``skipped``.

        Raises ``ValueError`` for shapes that do not fit; ``FloatingPointError`` when the update would leave the range
        of numbers (nothing is changed).
        """
        losses = torch.as_tensor(losses).detach().to("cpu", torch.float64)
        if tuple(X.shape) != (self.popsize, len(self.mean)):
            raise ValueError(f"X must have shape [{self.popsize}, {len(self.mean)}], got {list(X.shape)}.")
        if tuple(losses.shape) != (self.popsize,):
            raise ValueError(f"losses must have one value per member, [{self.popsize}], got {list(losses.shape)}.")
        if not losses.isfinite().any():
            self.skipped += 1
            return
        before = self.state_dict()
        self._update(X.to(self.mean), losses)
        if self.mean_decay:
            self.mean.mul_(1 - self.mean_decay)
        if not math.isfinite(float(self.mean.sum() + self.std.sum())):
            self.load_state_dict(before)
            raise FloatingPointError(f"{type(self).__name__}: the search distribution is not finite; nothing changed.")
        self.generation += 1

    def state_dict(self) -> dict[str, Any]:
        """Copies of everything that continues the run, the generator's state included."""
        state: dict[str, Any] = {name: _copied(getattr(self, name)) for name in self._saved}
        return {**state, "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``. Raises ``KeyError`` for a missing entry, ``ValueError`` for another dimension."""
        for name in self._saved:
            present, value = getattr(self, name), state[name]
            if isinstance(present, Tensor):
                if present.shape != value.shape:
                    raise ValueError(f"{name} has shape {list(present.shape)}, the state's {list(value.shape)}.")
                present.copy_(value)
            else:
                setattr(self, name, value)
        self.generator.set_state(state["generator"].cpu())

    def _update(self, X: Tensor, losses: Tensor) -> None:
        raise NotImplementedError(f"{type(self).__name__} must define _update(X, losses).")

    def _moments(self, X: Tensor, weights: Tensor, scale: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """sum_j w_j, sum_j w_j z_j and sum_j w_j z_j^2 with z = (X - mean)/scale, each but the first [d].

        Block by block, so that no second population is allocated and a block stays in the processor's cache.
        """
        w = weights.to(self.mean)
        first, second = torch.zeros_like(self.mean), torch.zeros_like(self.mean)
        rows = max(1, (BLOCK if X.device.type == "cpu" else 64 * BLOCK) // X.shape[1])
        for part, share in zip(X.split(rows), w.split(rows), strict=True):
            z = (part - self.mean).div_(scale)
            first.add_(share @ z)
            second.add_(share @ z.square_())
        return w.sum(), first, second


class SNES(Strategy):
    """Separable natural evolution strategy: the natural gradient of a diagonal Gaussian, from ranks.

    With x_j = mean + std z_j and utilities u_j by rank (:func:`snes_utilities`)::

        mean <- mean + lr std sum_j u_j z_j,      std <- std exp(lr_sigma/2 sum_j u_j (z_j^2 - 1))

    Args:
        lr_sigma: default (3 + log d)/(5 sqrt d).
        temperature: replaces the utilities by :func:`tempered_weights`; the paper's runs take 12 to 48.
        start, popsize, sigma_init, mean_decay, antithetic, lr, generator: see :class:`Strategy`.

    The run does not change when the loss is replaced by an increasing function of it.

    >>> es = SNES(torch.ones(5), popsize=20, sigma_init=0.5, generator=0)
    >>> for _ in range(100):
    ...     X = es.ask()
    ...     es.tell(X, X.square().sum(1))
    >>> bool(es.mean.norm() < 0.01)
    True
    """

    def __init__(
        self,
        start: Any,
        popsize: int = 64,
        sigma_init: float = 0.1,
        mean_decay: float = 0.0,
        antithetic: bool = True,
        *,
        lr: float = 1.0,
        lr_sigma: float | None = None,
        temperature: float | None = None,
        generator: Any = None,
    ) -> None:
        super().__init__(start, popsize, sigma_init, mean_decay, antithetic, lr=lr, generator=generator)
        d = len(self.mean)
        self.lr_sigma = (3 + math.log(d)) / (5 * math.sqrt(d)) if lr_sigma is None else lr_sigma
        require_positive("lr_sigma", self.lr_sigma)
        if temperature is not None:
            require_positive("temperature", temperature)
        self.utilities = snes_utilities(popsize) if temperature is None else tempered_weights(popsize, temperature)

    def _update(self, X: Tensor, losses: Tensor) -> None:
        total, first, second = self._moments(X, by_rank(self.utilities, losses), self.std)
        self.mean.addcmul_(self.std, first, value=self.lr)
        growth = second.sub_(total).mul_(self.lr_sigma / 2)
        self.std.mul_(growth.exp_()).clamp_min_(torch.finfo(self.std.dtype).tiny)


class SepCMAES(Strategy):
    """CMA-ES with a diagonal covariance sigma^2 C: linear time and space, learning rates (d + 2)/3 times the full ones.

    The best ``elite_ratio`` of the members recombine with logarithmic weights; sigma follows the length of the
    cumulated path, C the rank-one and rank-mu updates of Hansen's tutorial (arXiv:1604.00772) restricted to the
    diagonal, without negative weights. ``std`` is sigma sqrt(C).

    Args:
        elite_ratio: share of the members that recombine, in (0, 1].
        lr: learning rate of the mean (c_m).
        start, popsize, sigma_init, mean_decay, generator: see :class:`Strategy`. Members are drawn independently:
            mirrored pairs bias the step size of a recombination of the best.

    Raises ``ValueError`` as :class:`Strategy`, and for an elite_ratio outside (0, 1].
    """

    _saved = (*Strategy._saved, "sigma", "C", "path_sigma", "path_c")

    def __init__(
        self,
        start: Any,
        popsize: int = 64,
        sigma_init: float = 0.1,
        mean_decay: float = 0.0,
        *,
        lr: float = 1.0,
        elite_ratio: float = 0.5,
        generator: Any = None,
    ) -> None:
        if elite_ratio != 1:
            require_open_unit("elite_ratio", elite_ratio)
        super().__init__(start, popsize, sigma_init, mean_decay, False, lr=lr, generator=generator)
        d, elite = len(self.mean), max(1, int(popsize * elite_ratio))
        raw = math.log((popsize + 1) / 2) - torch.arange(1, elite + 1, dtype=torch.float64).log()
        raw = raw.clamp_min_(0)
        self.recombination = torch.zeros(popsize, dtype=torch.float64)
        self.recombination[:elite] = raw / raw.sum()
        self.mu_eff = mu = float(1 / self.recombination.square().sum())
        self.c_sigma = (mu + 2) / (d + mu + 5)
        self.damping = 1 + 2 * max(0.0, math.sqrt((mu - 1) / (d + 1)) - 1) + self.c_sigma
        self.c_c = (4 + mu / d) / (d + 4 + 2 * mu / d)
        self.c_1 = min(1.0, (d + 2) / 3 * 2 / ((d + 1.3) ** 2 + mu))
        self.c_mu = min(1 - self.c_1, (d + 2) / 3 * 2 * (mu - 2 + 1 / mu) / ((d + 2) ** 2 + mu))
        self.expected_norm = math.sqrt(d) * (1 - 1 / (4 * d) + 1 / (21 * d * d))
        self.sigma, self.C = self.mean.new_tensor(sigma_init), torch.ones_like(self.mean)
        self.path_sigma, self.path_c = torch.zeros_like(self.mean), torch.zeros_like(self.mean)

    def _update(self, X: Tensor, losses: Tensor) -> None:
        d = len(self.mean)
        _, step, square = self._moments(X, by_rank(self.recombination, losses), self.sigma)
        self.mean.addcmul_(self.sigma, step, value=self.lr)

        c = self.c_sigma
        self.path_sigma.mul_(1 - c).addcdiv_(step, self.C.sqrt(), value=math.sqrt(c * (2 - c) * self.mu_eff))
        norm = float(self.path_sigma.norm())
        usual = math.sqrt(1 - (1 - c) ** (2 * (self.generation + 1))) * self.expected_norm
        moving = norm < (1.4 + 2 / (d + 1)) * usual  # a path that is far too long says nothing about C

        c = self.c_c
        self.path_c.mul_(1 - c).add_(step, alpha=moving * math.sqrt(c * (2 - c) * self.mu_eff))
        kept = 1 - self.c_1 - self.c_mu + (not moving) * self.c_1 * c * (2 - c)
        self.C.mul_(kept).addcmul_(self.path_c, self.path_c, value=self.c_1).add_(square, alpha=self.c_mu)
        self.sigma.mul_(math.exp(min(1.0, self.c_sigma / self.damping * (norm / self.expected_norm - 1))))
        tiny = torch.finfo(self.C.dtype).tiny
        self.C.clamp_min_(tiny), self.sigma.clamp_min_(tiny)
        torch.mul(self.C.sqrt(), self.sigma, out=self.std)


class ClipUp(torch.optim.Optimizer):
    """Steps of length ``lr`` along the normalised gradient, with momentum and a speed limit (arXiv:2008.02387)."""

    def __init__(self, params: Any, lr: float, momentum: float = 0.9, max_speed: float | None = None) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "max_speed": max_speed})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            limit = 2 * group["lr"] if group["max_speed"] is None else group["max_speed"]
            for p in group["params"]:
                if p.grad is not None:
                    velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                    length = p.grad.norm().clamp_min(torch.finfo(p.dtype).tiny)
                    velocity.mul_(group["momentum"]).add_(p.grad * (group["lr"] / length))
                    velocity.mul_(limit / velocity.norm().clamp_min(limit))
                    p.sub_(velocity)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "clipup": ClipUp}


class _GradientStrategy(Strategy):
    """A strategy that hands an estimated gradient of the mean to a gradient optimiser."""

    def __init__(
        self,
        start: Any,
        popsize: int,
        sigma_init: float,
        mean_decay: float,
        antithetic: bool,
        lr: float,
        optimizer: Any,
        shaping: str,
        generator: Any,
    ) -> None:
        require_choice("shaping", shaping, ("rank", "value"))
        if not callable(optimizer):
            require_choice("optimizer", optimizer, tuple(OPTIMIZERS))
        super().__init__(start, popsize, sigma_init, mean_decay, antithetic, lr=lr, generator=generator)
        self.shaping = shaping
        self.mean_optimizer = (optimizer if callable(optimizer) else OPTIMIZERS[optimizer])([self.mean], lr=lr)

    def costs(self, losses: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """Centred ranks, or the losses less their mean (those that are not finite count as the worst finite one)."""
        if self.shaping == "rank":
            return by_rank(centred_ranks(self.popsize), losses)
        finite = losses.isfinite()
        values = torch.where(finite, losses, losses[finite].max())
        return values - values.mean()

    def state_dict(self) -> dict[str, Any]:
        """Also the state of the mean's optimiser."""
        inner = self.mean_optimizer.state_dict()
        inner["state"] = {k: {n: _copied(v) for n, v in s.items()} for k, s in inner["state"].items()}
        return {**super().state_dict(), "mean_optimizer": inner}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Also the state of the mean's optimiser."""
        super().load_state_dict(state)
        self.mean_optimizer.load_state_dict(state["mean_optimizer"])

    def _descend(self, gradient: Tensor) -> None:
        for group in self.mean_optimizer.param_groups:
            group["lr"] = self.lr
        self.mean.grad = gradient
        try:
            self.mean_optimizer.step()
        finally:
            self.mean.grad = None


class PGPE(_GradientStrategy):
    """Policy gradients with parameter-based exploration: mirrored samples and likelihood-ratio gradients.

    With deviations e_j = x_j - mean and costs c_j (centred ranks, or losses less their mean)::

        g_mean = 1/p sum_j c_j e_j,      g_std = 1/p sum_j c_j (e_j^2 - std^2)/std

    For mirrored pairs g_mean is the mean of (c+ - c-)/2 e and sees no even part of the loss, g_std no odd part. The
    mean moves by ``optimizer``, std by -lr_sigma g_std, changing by no more than ``max_change`` of itself.

    Args:
        lr: learning rate of ``optimizer``.
        lr_sigma: step size of the deviations. max_change: their largest relative change per generation, in (0, 1).
        optimizer: ``"adam"``, ``"clipup"`` or ``optimizer(params, lr=...)`` giving a ``torch.optim.Optimizer``.
        shaping: ``"rank"`` or ``"value"``.
        start, popsize, sigma_init, mean_decay, antithetic, generator: see :class:`Strategy`.

    Raises ``ValueError`` as :class:`Strategy`, and for lr_sigma < 0, max_change outside (0, 1), unknown names.
    """

    def __init__(
        self,
        start: Any,
        popsize: int = 64,
        sigma_init: float = 0.1,
        mean_decay: float = 0.0,
        antithetic: bool = True,
        *,
        lr: float = 0.01,
        lr_sigma: float = 0.1,
        max_change: float = 0.2,
        optimizer: Any = "adam",
        shaping: str = "rank",
        generator: Any = None,
    ) -> None:
        require_positive("lr_sigma", lr_sigma, strict=False)
        require_open_unit("max_change", max_change)
        super().__init__(start, popsize, sigma_init, mean_decay, antithetic, lr, optimizer, shaping, generator)
        self.lr_sigma, self.max_change = lr_sigma, max_change

    def gradients(
        self, X: Float[Tensor, "p d"], losses: Float[Tensor, " p"]
    ) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
        """(g_mean, g_std) of one generation."""
        total, g_mean, square = self._moments(X, self.costs(losses) / self.popsize, 1.0)
        return g_mean, (square - total * self.std.square()) / self.std

    def _update(self, X: Tensor, losses: Tensor) -> None:
        g_mean, g_std = self.gradients(X, losses)
        self._descend(g_mean)
        change = (g_std * (-self.lr_sigma / self.std)).clamp_(-self.max_change, self.max_change)
        self.std.mul_(1 + change).clamp_min_(torch.finfo(self.std.dtype).tiny)


class OpenES(_GradientStrategy):
    """One fixed deviation sigma for all coordinates, mirrored samples, and Adam on the estimated gradient.

    g = 1/(p sigma) sum_j c_j z_j with centred ranks c. Its |mean|/std orders weights as |mean| does.

    Args:
        lr: learning rate of ``optimizer``.
        sigma_decay: sigma shrinks by this share in every generation.
        optimizer, shaping: as in :class:`PGPE`.
        start, popsize, sigma_init, mean_decay, antithetic, generator: see :class:`Strategy`.

    Raises ``ValueError`` as :class:`Strategy`, and for a sigma_decay outside [0, 1) and unknown names.
    """

    def __init__(
        self,
        start: Any,
        popsize: int = 64,
        sigma_init: float = 0.1,
        mean_decay: float = 0.0,
        antithetic: bool = True,
        *,
        lr: float = 0.01,
        sigma_decay: float = 0.0,
        optimizer: Any = "adam",
        shaping: str = "rank",
        generator: Any = None,
    ) -> None:
        require_decay(sigma_decay, "sigma_decay")
        super().__init__(start, popsize, sigma_init, mean_decay, antithetic, lr, optimizer, shaping, generator)
        self.sigma_decay = sigma_decay

    def _update(self, X: Tensor, losses: Tensor) -> None:
        _, first, _ = self._moments(X, self.costs(losses) / self.popsize, self.std)
        self._descend(first.div_(self.std))
        self.std.mul_(1 - self.sigma_decay).clamp_min_(torch.finfo(self.std.dtype).tiny)


STRATEGIES: dict[str, Callable[..., Strategy]] = {"snes": SNES, "sep_cma_es": SepCMAES, "pgpe": PGPE, "open_es": OpenES}


def require_decay(value: float, name: str = "mean_decay") -> None:
    """Raise ``ValueError`` unless ``0 <= value < 1``."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {value}.")


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
