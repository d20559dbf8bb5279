"""Integrated Gradients: the gradient averaged along the straight line from a baseline to the input.

    IG_i(x) = (x_i - x'_i) * integral_0^1 dF/dx_i (x' + a (x - x')) da                                   (Eq. 1)

Where the model is saturated the gradient at the input says nothing; the average over the path does, and the
attributions add up to F(x) - F(x') (completeness).

Sundararajan, Taly, Yan, "Axiomatic Attribution for Deep Networks", ICML 2017, arXiv:1703.01365.
Differences from Captum's class of the same name, whose arguments it shares: path points are streamed, so memory does
not grow with ``n_steps``; weights add up to exactly 1 in the input's dtype (Captum's K-point trapezoid adds up to
(K-1)/K, and its weights are rounded to float32); ``riemann_trapezoid`` has K + 1 nodes; ``tol`` refines to a tolerance.
"""

from collections.abc import Iterator
from typing import Any
import warnings

from jaxtyping import Float
import torch
from torch import Tensor

from gradwise.attribution._paths import PathMethod, straight_samples
from gradwise.attribution._refinement import FLOOR, Refined, refined_average
from gradwise.attribution._scores import Explained, row_sums, zeros
from gradwise.autodiff.paths import PathSample, Score, State, default_memory_budget, path_samples, real_product
from gradwise.base.checks import require_choice, require_count, require_positive
from gradwise.base.random import generator_from
from gradwise.linalg.quadrature import rule

METHODS = {
    "gausslegendre": "gausslegendre",
    "riemann_left": "left",
    "riemann_right": "right",
    "riemann_middle": "midpoint",
    "riemann_trapezoid": "trapezoid",
}
AUTO_TOL, LOUD_GAP = 0.01, 0.05


class IntegratedGradients(PathMethod):
    """Integrated gradients with Captum's arguments: ``IntegratedGradients(model).attribute(images, target=labels)``.

    Explain probabilities or logits as ``forward_func`` returns them. Inputs may be complex (coefficients of a
    transform); attributions are real.

    Args:
        forward_func: Model or function of the inputs that returns ``[b]`` or ``[b, classes, ...]``.
        multiply_by_inputs: Return (x - x') times the averaged gradient (default), or the averaged gradient alone.

    Raises:
        TypeError: ``forward_func`` is not callable.
    """

    guarantees = PathMethod.guarantees | {"complete", "dummy", "linear", "symmetric", "implementation_invariant"}

    def __init__(self, forward_func: Any, multiply_by_inputs: bool = True) -> None:
        super().__init__(forward_func)
        self.multiply_by_inputs = multiply_by_inputs

    def attribute(
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        n_steps: Any = 50,
        method: str = "gausslegendre",
        internal_batch_size: int | None = None,
        return_convergence_delta: bool = False,
        *,
        tol: float | None = None,
        max_steps: int = 1024,
        memory_budget: float | None = None,
        expected: bool = False,
        generator: Any = None,
    ) -> Any:
        """Attributions shaped like ``inputs`` (tensor or tuple), in their dtype and on their device.

        Args:
            inputs: Tensor ``[b, ...]`` or tuple of such.
            baselines: ``None`` (zeros), a number, a tensor broadcastable to the inputs, or a tuple of these. With
                ``expected`` a sample ``[m, ...]`` of the baseline distribution per input.
            target: Explained output: class, one class per example, or a tuple of indices (list of tuples: one each).
            additional_forward_args: Passed after the inputs; tensors with b rows go along with their examples.
            n_steps: Gradients per example (``riemann_trapezoid``: one more). ``"auto"`` is ``tol=0.01``; with ``tol``
                the number is not used.
            method: Quadrature: ``"gausslegendre"`` (exact for polynomial integrands of degree 2 n_steps - 1),
                ``"riemann_left"``, ``"riemann_right"``, ``"riemann_middle"``, ``"riemann_trapezoid"``. Not used with
                ``tol`` (nested trapezoids) and ``expected``.
            internal_batch_size: Largest number of rows per forward pass; ``None`` measures what suits memory.
            return_convergence_delta: Also return sum(attributions) - (F(x) - F(x')), ``[b]``.
            tol: Refine each example's path where its score bends, until its completeness gap is at most
                ``tol |F(x) - F(x')|``, and not by cancellation (two standard deviations of the gaps along the path).
            max_steps: Largest number of gradients per example with ``tol``.
            memory_budget: Bytes for evaluations; default 1 GiB, on CUDA a quarter of the free memory.
            expected: Average over the baseline distribution: ``n_steps`` pairs of a random baseline and a random path
                position, shared by all examples; unbiased.
            generator: Seed or generator of these draws.

        Raises:
            TypeError: integer inputs, targets that are not integers.
            ValueError: shapes, targets, methods or numbers of steps that do not fit; ``expected`` with ``tol``.
            RuntimeError: a score that does not depend on the inputs, or is not finite.

        Warns in training mode with dropout or batch norm; where ``tol`` was not reached; and, when the gap is not
        returned, where it exceeds 5 % of the score's change.
        """
        require_choice("method", method, METHODS)
        task = Explained(
            self.forward_func,
            inputs,
            None if expected else baselines,
            target,
            additional_forward_args,
            allow_complex=True,
        )
        adaptive = tol is not None or n_steps == "auto"
        if expected and adaptive:
            raise ValueError(
                "expected=True draws a fixed number of samples and cannot be refined: pass n_steps=<int> and no tol."
            )
        steps = 0 if n_steps == "auto" else require_count("n_steps", n_steps)
        rows = task.rows_per_call(internal_batch_size, memory_budget)
        if expected:
            return self._expected(task, inputs, baselines, steps, rows, generator, return_convergence_delta)
        if adaptive:
            tol = AUTO_TOL if tol is None else tol
            require_positive("tol", tol)
            require_count("max_steps", max_steps, 2)
            budget = default_memory_budget(task.device) if memory_budget is None else memory_budget
            done = refined_average(task, tol=tol, max_nodes=max_steps, rows=rows, memory_budget=budget)
            mean, start, end = done.mean_gradient, done.start, done.end
            _warn_about_open(done, tol)
        else:
            mean, start, end = self._fixed(task, METHODS[method], steps, rows)
        steps_taken = tuple(x - x0 for x, x0 in zip(task.x, task.x0, strict=True))
        products = tuple(real_product(g, d) for g, d in zip(mean, steps_taken, strict=True))
        delta = row_sums(products) - (end.double() - start.double()).to(task.device)
        if not (return_convergence_delta or adaptive):
            _warn_about_gap(delta, start, end)
        attributions = self.presented(products if self.multiply_by_inputs else mean, inputs)
        return (attributions, delta.to(task.x[0].real.dtype)) if return_convergence_delta else attributions

    def path_samples(
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        n_steps: int = 50,
        internal_batch_size: int | None = None,
        memory_budget: float | None = None,
    ) -> Iterator[PathSample]:
        """See :meth:`PathMethod.path_samples`: states x' + (j / n_steps) (x - x')."""
        require_count("n_steps", n_steps)
        task = Explained(self.forward_func, inputs, baselines, target, additional_forward_args, allow_complex=True)
        rows = task.rows_per_call(internal_batch_size, memory_budget)
        return straight_samples(task, [j / n_steps for j in range(n_steps + 1)], rows)

    def _fixed(self, task: Explained, method: str, n_steps: int, rows: int) -> tuple[State, Tensor, Tensor]:
        """Average gradient by a quadrature rule, and the scores at both ends (evaluated if not among the nodes)."""
        mean = zeros(task.x)
        nodes, weights = rule(method, n_steps, dtype=mean[0].real.dtype)
        positions, scores = nodes.tolist(), {}
        for a, weight, sample in zip(positions, weights.tolist(), straight_samples(task, positions, rows), strict=True):
            for out, grad in zip(mean, sample.grads, strict=True):
                out.add_(grad, alpha=weight)
            scores[a] = sample.score
        start = scores[0.0] if 0.0 in scores else task.values(task.x0, rows)
        end = scores[1.0] if 1.0 in scores else task.values(task.x, rows)
        return mean, start, end

    def _expected(
        self, task: Explained, inputs: Any, baselines: Any, n_steps: int, rows: int, generator: Any, with_delta: bool
    ) -> Any:
        """Monte Carlo over baselines and positions: both stratified, in independent random order."""
        starts = _distribution(task, baselines)
        m = len(starts[0])
        draw = generator_from(generator)
        which = torch.cat([torch.randperm(m, generator=draw) for _ in range(-(-n_steps // m))])[:n_steps].tolist()
        offset = torch.rand(n_steps, generator=draw, dtype=torch.float64)
        at = ((torch.randperm(n_steps, generator=draw) + offset) / n_steps).tolist()

        def stream(score: Score, x: State, x0: State) -> Iterator[PathSample]:
            states = (
                tuple(torch.lerp(start[j].expand_as(t), t, a) for start, t in zip(starts, x, strict=True))
                for j, a in zip(which, at, strict=True)
            )
            return path_samples(score, states, rows=rows, positions=at)

        mean, products = zeros(task.x), zeros(task.x, real=True)
        for j, sample in zip(which, task.samples(stream, rows), strict=True):
            for average, product, start, x, grad in zip(mean, products, starts, task.x, sample.grads, strict=True):
                average += grad / n_steps
                product += real_product(grad, x - start[j]) / n_steps
        attributions = self.presented(products if self.multiply_by_inputs else mean, inputs)
        if not with_delta:
            return attributions
        ends = [
            task.values(tuple(s[j].expand_as(t) for s, t in zip(starts, task.x, strict=True)), rows) for j in range(m)
        ]
        change = task.values(task.x, rows).double() - torch.stack(ends).double().mean(0)
        return attributions, (row_sums(products) - change).to(task.x[0].real.dtype)


def _distribution(task: Explained, baselines: Any) -> State:
    """One sample ``[m, ...]`` of the baseline distribution per input."""
    given = baselines if isinstance(baselines, tuple) else (baselines,)
    shapes = [list(x.shape[1:]) for x in task.x]
    if len(given) != len(task.x) or any(
        not isinstance(s, Tensor) or s.shape[1:] != x.shape[1:] or not len(s) or len(s) != len(given[0])
        for s, x in zip(given, task.x, strict=False)
    ):
        raise ValueError(f"expected=True needs a sample of baselines [m, ...] per input, shaped {shapes} per baseline.")
    return tuple(s.detach().to(x) for s, x in zip(given, task.x, strict=True))


def _warn_about_gap(delta: Float[Tensor, " b"], start: Tensor, end: Tensor) -> None:
    scale = torch.maximum((end - start).abs(), FLOOR * torch.maximum(end.abs(), start.abs()))
    loud = int((delta.abs() > LOUD_GAP * scale).sum())
    if loud:
        warnings.warn(
            f"the attributions of {loud} of {len(delta)} examples miss the score's change by more than 5 %: raise "
            "n_steps, or let tol= choose it.",
            stacklevel=3,
        )


def _warn_about_open(done: Refined, tol: float) -> None:
    missed = (~done.converged).nonzero().flatten().tolist()
    if missed:
        low, high = done.widest[missed[0]].tolist()
        warnings.warn(
            f"{len(missed)} of {len(done.gap)} examples did not reach tol={tol}: raise max_steps. Most of what is "
            f"missing for example {missed[0]} lies where the score jumps, at {low:.4g} to {high:.4g} of its path.",
            stacklevel=3,
        )
