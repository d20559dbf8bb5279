"""ICG and TSG: a weak prediction for models that never learned a null condition.

Independent condition guidance feeds the network a condition drawn independently of the sample in place of the null:

    D_w = D(x, y') + w (D(x, y) - D(x, y')),   y' drawn anew at each step

because grad log p(x | y') = grad log p(x) + grad log p(y' | x), and the last term vanishes where y' says nothing about
x. Time-step guidance needs no condition at all; its weak prediction comes from the same network told a noisy time:

    D_w = D(x, t', y) + w (D(x, t, y) - D(x, t', y)),   t' = emb(t) + s t^alpha n,  n ~ N(0, I)

Sadat, Kansy, Hilliges, Weber, "No Training, No Problem: Rethinking Classifier-Free Guidance for Diffusion Models", ICLR
2025, arXiv:2407.02687, sections 4 and 5.

ICG is not unbiased: one draw gives the score of a *wrong* condition. At high noise its average is the unconditional
prediction; at low noise, where the classes of the data lie apart, the wrong condition pulls far away and the same scale
guides much more strongly than with a learned null. Differs from the paper: s is measured in standard deviations of the
embedding, so that one value suits several networks, and t is the time in [0, 1].
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from jaxtyping import Float
import torch
from torch import Tensor, nn

from gradwise.autodiff.taps import find_module
from gradwise.base.checks import require_choice, require_count, require_positive
from gradwise.base.random import generator_from, randn_like
from gradwise.diffusion import Branch, PairGuidance, StepContext

EMBEDDINGS = ("time_embedding", "timestep_embedder", "time_embed", "t_embedder", "time_mlp")
"""Names under which networks keep the module that turns a time into a vector."""
Draw = Callable[[Any, torch.Generator], Any]


class IndependentConditionGuidance(PairGuidance):
    """Guidance away from a condition that was drawn at random; two predictions per step, no null condition needed.

    Args:
        scale: w; 1 is off.
        sampler: Where the other condition comes from. ``"random"``: a uniform label below ``num_conditions``, or a
            uniform row of ``bank``. ``"gaussian"``: a normal tensor with the mean and the standard deviation of each
            sample's own embedding; entries that are not floating point (masks) stay. Or a function
            ``sampler(cond, generator)`` giving conditions shaped like ``cond``.
        num_conditions: Number of labels.
        bank: Conditions to draw from, ``[n, ...]`` (or a dict of them, drawn together).
        average: Draws per step, whose predictions are averaged; each costs a call.
        exclude_target: Never draw the sample's own label. By default it may be drawn: independent means independent.
        interval: Times (low, high] within [0, 1], 1 = noise, in which guidance acts.

    The draw is per sample and per step, from the run's generator; both evaluations of a Heun step share it.

    Raises:
        TypeError: ``"gaussian"`` for labels or other conditions without a floating-point entry; no condition at all.
        ValueError: ``"random"`` with neither or both of ``num_conditions`` and ``bank``, ``average`` below 1,
            ``exclude_target`` without labels, a drawn condition of another shape.

    >>> from gradwise.diffusion import GaussianMixtureDenoiser, flow, sample
    >>> mixture = GaussianMixtureDenoiser(torch.tensor([[[-2.0]], [[2.0]]]), 0.1 * torch.ones(2, 1, 1, 1))
    >>> noise = torch.randn(64, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> icg = IndependentConditionGuidance(1.5, num_conditions=2)
    >>> found = sample(mixture, noise, cond=torch.ones(64).long(), guidance=icg, schedule=flow(), steps=20, generator=0)
    >>> bool((found.x > 0).all()), int(found.nfe[0])
    (True, 40)
    """

    def __init__(
        self,
        scale: float = 1.5,
        *,
        sampler: Draw | str = "random",
        num_conditions: int | None = None,
        bank: Any = None,
        average: int = 1,
        exclude_target: bool = False,
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__(scale, interval=interval)
        self.average = require_count("average", average)
        if isinstance(sampler, str):
            require_choice("sampler", sampler, ("random", "gaussian"))
        if sampler == "random" and (num_conditions is None) == (bank is None):
            raise ValueError('sampler="random" needs num_conditions= (for labels) or bank= (of conditions to draw).')
        if exclude_target and (sampler != "random" or num_conditions is None):
            raise ValueError("exclude_target needs labels to compare: sampler='random' with num_conditions=.")
        if num_conditions is not None:
            require_count("num_conditions", num_conditions, 2 if exclude_target else 1)
        self.sampler = sampler
        self.num_conditions = num_conditions
        self.bank = bank
        self.exclude_target = exclude_target
        self._drawn: list[Any] = []

    def reset(self) -> None:
        """Forget the last draw."""
        super().reset()
        self._drawn = []

    def branches(self, ctx: StepContext) -> tuple[Branch, ...]:
        """The user's condition, and as many drawn ones as are averaged."""
        if ctx.evaluation == 0 or not self._drawn:
            self._drawn = [self._draw(ctx) for _ in range(self.average)]
        return (Branch("cond"), *map(Branch, self._drawn))

    def _draw(self, ctx: StepContext) -> Any:
        if ctx.cond is None:
            raise TypeError("independent condition guidance needs a condition; TimeStepGuidance needs none.")
        generator = generator_from(ctx.generator, ctx.x.device)
        if callable(self.sampler):
            drawn = self.sampler(ctx.cond, generator)
        elif self.sampler == "gaussian":
            drawn = _gaussian(ctx.cond, generator)
        elif self.bank is not None:
            drawn = _rows(self.bank, len(ctx.x), generator)
        else:
            assert self.num_conditions is not None
            drawn = _labels(ctx.cond, self.num_conditions, self.exclude_target, generator)
        if isinstance(ctx.cond, Tensor) and (not isinstance(drawn, Tensor) or drawn.shape != ctx.cond.shape):
            shape = list(drawn.shape) if isinstance(drawn, Tensor) else type(drawn).__name__
            raise ValueError(f"the drawn conditions must have shape {list(ctx.cond.shape)}, got {shape}.")
        return drawn


class TimeStepGuidance(PairGuidance):
    """Guidance away from the network's own prediction under a noisy time embedding; works without any condition.

    Args:
        scale: w; 1 is off.
        noise_scale: s, in standard deviations of the embedding (``relative``) or in its own units; 0 is off.
        power: alpha: the noise falls as t^alpha towards the data.
        relative: Whether ``noise_scale`` counts standard deviations.
        layers: Where every block has an embedding of its own, disturb those of the first ``layers`` only.
        embedding: Name of the module that turns the time into a vector, before anything is added to it; ``"auto"``
            finds it under its usual names.
        interval: Times (low, high] within [0, 1], 1 = noise, in which guidance acts.
        pair: Another guidance whose weak branch is disturbed (:class:`IndependentConditionGuidance` for both at once).

    The noise is per sample and per step, from the run's generator.

    Raises:
        ValueError: a negative ``noise_scale``, ``power`` or ``layers`` below 1, an unknown ``embedding``, ``layers``
            for a network with a single embedding, a pair whose weak branch already reads or disturbs a layer.
        RuntimeError: no module with a usual name; the message lists them and the network's own.
    """

    def __init__(
        self,
        scale: float = 2.0,
        *,
        noise_scale: float = 1.0,
        power: float = 1.0,
        relative: bool = True,
        layers: int | None = None,
        embedding: str = "auto",
        interval: tuple[float, float] = (0.0, 1.0),
        pair: PairGuidance | None = None,
    ) -> None:
        super().__init__(scale, interval=interval, pair=pair)
        require_positive("noise_scale", noise_scale, strict=False)
        require_positive("power", power, strict=False)
        self.noise_scale = noise_scale
        self.power = power
        self.relative = relative
        self.layers = None if layers is None else require_count("layers", layers)
        self.embedding = embedding

    def acts(self, ctx: StepContext) -> bool:
        """Whether this step is guided."""
        return super().acts(ctx) and (self.noise_scale > 0 or self.pair is not None)

    def branches(self, ctx: StepContext) -> tuple[Branch, ...]:
        """The prediction as it is, and the one under a noisy time."""
        strong, *weak = (Branch("cond"), Branch("cond")) if self.pair is None else self.pair.branches(ctx)
        if any(branch.hooks is not None for branch in weak):
            raise ValueError("the pair's weak branch already works inside the network; no time noise can be added.")
        generator = generator_from(ctx.generator, ctx.x.device)
        disturb = partial(self._disturbed, amplitude=self.noise_scale * ctx.t**self.power, generator=generator)
        return (strong, *(replace(branch, hooks=disturb) for branch in weak))

    @contextmanager
    def _disturbed(self, network: nn.Module, *, amplitude: float, generator: torch.Generator) -> Iterator[None]:
        drawn: dict[torch.Size, Tensor] = {}

        def after(_: nn.Module, __: tuple, output: Tensor) -> Tensor:
            # blocks with an embedding of their own see the same noise, as if they shared one
            noise = drawn.get(output.shape)
            if noise is None:
                noise = drawn[output.shape] = randn_like(output, generator)
            spread = output.std(-1, keepdim=True) if self.relative else 1.0
            return output + amplitude * spread * noise

        handles = [module.register_forward_hook(after) for module in self._embeddings(network)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _embeddings(self, network: nn.Module) -> list[nn.Module]:
        if self.embedding != "auto":
            return [find_module(network, self.embedding)[1]]
        found = [module for name, module in network.named_modules() if name.rpartition(".")[2] in EMBEDDINGS]
        if not found:
            known = ", ".join(name for name, _ in network.named_children())
            raise RuntimeError(
                f"no time embedding found in {type(network).__name__} under the names {', '.join(EMBEDDINGS)}; name it "
                f"with embedding= (the network has: {known})."
            )
        if self.layers is None:
            return found
        if len(found) < 2:
            raise ValueError("layers= needs a network in which every block has a time embedding of its own.")
        return found[: self.layers]


def _labels(cond: Any, n: int, exclude: bool, generator: torch.Generator) -> Tensor:
    if not isinstance(cond, Tensor) or cond.is_floating_point():
        raise TypeError('sampler="random" with num_conditions= is for integer labels; give bank= for embeddings.')
    if not exclude:
        return torch.randint(n, cond.shape, generator=generator, device=cond.device).to(cond.dtype)
    other = torch.randint(n - 1, cond.shape, generator=generator, device=cond.device).to(cond.dtype)
    return other + (other >= cond).to(cond.dtype)


def _rows(bank: Any, b: int, generator: torch.Generator) -> Any:
    first = next(iter(bank.values())) if isinstance(bank, dict) else bank
    index = torch.randint(len(first), (b,), generator=generator, device=generator.device).to(first.device)
    return {name: entry[index] for name, entry in bank.items()} if isinstance(bank, dict) else bank[index]


def _gaussian(cond: Any, generator: torch.Generator) -> Any:
    entries = cond if isinstance(cond, dict) else {"": cond}
    if not any(isinstance(entry, Tensor) and entry.is_floating_point() for entry in entries.values()):
        raise TypeError(
            'sampler="gaussian" draws embeddings and the condition has none (integer labels?); use sampler="random".'
        )
    drawn = {name: _normal(entry, generator) for name, entry in entries.items()}
    return drawn if isinstance(cond, dict) else drawn[""]


def _normal(entry: Any, generator: torch.Generator) -> Any:
    """A normal tensor with each sample's own mean and standard deviation over all elements."""
    if not isinstance(entry, Tensor) or not entry.is_floating_point():
        return entry
    flat: Float[Tensor, "b n"] = entry.flatten(1).float()
    mean, spread = flat.mean(1, keepdim=True), flat.std(1, keepdim=True)
    return (mean + spread * randn_like(flat, generator)).reshape(entry.shape).to(entry.dtype)
