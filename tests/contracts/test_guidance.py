"""What every guidance must satisfy, whatever it does. A new one adds one row to ``ROWS``."""

from collections.abc import Callable
from dataclasses import dataclass, replace
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from gradwise.base.counting import counting
from gradwise.diffusion import (
    ClassifierFreeGuidance,
    FunctionDenoiser,
    Guidance,
    StepContext,
    Unguided,
    convert,
    ddim_step,
    edm,
    flow,
    guide,
    sample,
)
from gradwise.guidance import (
    AdaptiveGuidance,
    AdaptiveProjectedGuidance,
    BlurGuidance,
    ClassifierReferenceGuidance,
    ContrastiveComponentGuidance,
    IndependentConditionGuidance,
    InternalGuidance,
    LinearAdaptiveGuidance,
    LinearDenoiser,
    ManifoldGuidance,
    NoiseLevelGuidance,
    PredictorCorrectorGuidance,
    ProjectedFlowGuidance,
    SelfAttentionGuidance,
    TimeStepGuidance,
)
from gradwise.testbeds.flow_nets import TinyDiT
from gradwise.testbeds.nets import seeded
from tests.diffusion.beds import labels, mixture, noise

KINDS = ("x0", "eps", "v", "flow")


def pictures(prediction="x0"):
    """The exact denoiser of ``N(mean of the label, 1)`` pixels, any shape; label 3 is the null."""

    def predict(x, level, cond):
        a, s = level.factors(x)
        mean = torch.tensor([-1.0, 0.5, 2.0, 0.4]).to(x)[cond].reshape(-1, *[1] * (x.ndim - 1))
        variance = torch.tensor([0.5, 1.0, 0.7, 2.0]).to(x)[cond].reshape(-1, *[1] * (x.ndim - 1))
        x0 = (a * variance * x + s * s * mean) / (a * a * variance + s * s)
        eps = s * (x - a * mean) / (a * a * variance + s * s)
        return {"x0": x0, "eps": eps, "v": a * eps - s * x0, "flow": eps - x0}[prediction]

    return FunctionDenoiser(predict, prediction, null=3)


class TwoHeaded(nn.Module):
    """Predicts from x, an embedded time and a label; an early prediction on demand."""

    def __init__(self):
        super().__init__()
        with seeded(0):
            self.time_embedding = nn.Sequential(nn.Linear(1, 8), nn.Tanh())
            self.label = nn.Embedding(4, 8)
            self.early, self.late = (nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)) for _ in range(2))

    def forward(self, x, t, label, return_intermediate=False):
        h = torch.cat([x, self.time_embedding(t[:, None]) + self.label(label)], 1)
        return (self.late(h), self.early(h)) if return_intermediate else self.late(h)


def network_bed(net, kind, null):
    """A network of velocities, as one of another kind."""
    net = net.double().eval()

    def predict(x, level, cond):
        flow_prediction = net(x, level.t.to(x).expand(len(x)), cond)
        return convert(flow_prediction, x, level, "flow", kind)

    return FunctionDenoiser(predict, kind, null=null, network=net)


def two_headed(kind="flow"):
    return network_bed(TwoHeaded(), kind, 3)


def attentive(kind="flow"):
    with seeded(0):
        net = TinyDiT()
        nn.init.normal_(net.head.out.weight, std=0.2)
    return network_bed(net, kind, 10)


def small_pictures(n=6, dtype=torch.float64, seed=1):
    return noise(n, 64, seed=seed, dtype=dtype).reshape(n, 1, 8, 8)


def brightness(x):
    """Reads three classes from the mean of a sample."""
    return -(x.flatten(1).mean(1, keepdim=True) - torch.tensor([-1.0, 0.5, 2.0]).to(x)).square()


def shut(progress):
    return 0.0


def moments():
    """A linear model of the exact mixture."""
    return LinearDenoiser(mixture().means.mean(1), mixture().covs.mean(1))


@dataclass
class Row:
    """One guidance.

    ``make()`` at a setting that acts; ``neutral()`` at the setting that must change nothing (``None``: it has none);
    ``calls`` evaluations per sample and step while it acts (``None``: it depends on the sample); ``bed(kind)`` a
    denoiser it works on, ``start(n)`` noise for it; ``draws`` whether it uses the generator; ``pictures`` whether it
    also works on ``[b, c, h, w]``; ``solvers`` those it works with, the others it must refuse; ``kinds``
    whether the bed's network can pretend to predict other kinds.
    """

    make: Callable[[], Guidance]
    neutral: Callable[[], Guidance] | None = None
    calls: float | None = 2
    bed: Callable[[str], Any] = mixture
    start: Callable[..., torch.Tensor] = noise
    draws: bool = False
    pictures: bool = True
    solvers: tuple[str, ...] = ("ddim", "heun", "dpm++", "ddpm")
    kinds: bool = True


ROWS = {
    "unguided": Row(Unguided, Unguided, calls=1),
    "classifier_free": Row(lambda: ClassifierFreeGuidance(2.5), lambda: ClassifierFreeGuidance(1.0)),
    "classifier_free-rescaled": Row(
        lambda: ClassifierFreeGuidance(2.5, rescale=0.7), lambda: ClassifierFreeGuidance(1.0, rescale=0.7)
    ),
    "adaptive_projected": Row(
        lambda: AdaptiveProjectedGuidance(3.0, norm_threshold=1.5), lambda: AdaptiveProjectedGuidance(1.0)
    ),
    "manifold": Row(
        lambda: ManifoldGuidance(0.6),
        lambda: ManifoldGuidance(0.6, interval=(1.0, 1.0)),
        solvers=("ddim", "dpm++", "ddpm"),
    ),
    "independent_condition": Row(
        lambda: IndependentConditionGuidance(2.5, num_conditions=3),
        lambda: IndependentConditionGuidance(1.0, num_conditions=3),
        draws=True,
    ),
    "time_step": Row(
        lambda: TimeStepGuidance(2.0),
        lambda: TimeStepGuidance(2.0, noise_scale=0.0),
        bed=two_headed,
        draws=True,
        pictures=False,
    ),
    "internal": Row(
        lambda: InternalGuidance(2.0),
        lambda: InternalGuidance(1.0),
        calls=1,
        bed=two_headed,
        pictures=False,
        kinds=False,  # the early prediction is read inside the network
    ),
    "blur": Row(lambda: BlurGuidance(0.5), lambda: BlurGuidance(0.0), calls=None, bed=pictures, start=small_pictures),
    "self_attention": Row(
        lambda: SelfAttentionGuidance(0.5),
        lambda: SelfAttentionGuidance(0.0),
        calls=None,
        bed=attentive,
        start=small_pictures,
        pictures=False,
    ),
    "projected_flow": Row(
        lambda: ProjectedFlowGuidance(small_pictures(1, seed=5)),
        lambda: ProjectedFlowGuidance(small_pictures(1, seed=5), schedule=shut),
        calls=1,
        bed=pictures,
        start=small_pictures,
        pictures=False,
    ),
    "noise_level": Row(
        lambda: NoiseLevelGuidance(steps=2, noise_var=0.0),
        lambda: NoiseLevelGuidance(steps=0, renormalise=False),
        calls=None,
    ),
    "predictor_corrector": Row(
        lambda: PredictorCorrectorGuidance(2.0),
        lambda: PredictorCorrectorGuidance(2.0, corrector_steps=0),
        calls=None,
        draws=True,
    ),
    "adaptive": Row(lambda: AdaptiveGuidance(2.5, threshold=0.97), lambda: AdaptiveGuidance(1.0), calls=None),
    "linear_adaptive": Row(
        lambda: LinearAdaptiveGuidance(2.5, extrapolate="hold"), lambda: LinearAdaptiveGuidance(1.0), calls=None
    ),
    "classifier_reference": Row(
        lambda: ClassifierReferenceGuidance(brightness, 3.0, num_classes=3),
        lambda: ClassifierReferenceGuidance(brightness, 1.0, num_classes=3),
        calls=None,
    ),
    "contrastive_components": Row(
        lambda: ContrastiveComponentGuidance(moments(), 2.0),
        lambda: ContrastiveComponentGuidance(moments(), 0.0),
        calls=1,
        pictures=False,
    ),
}
STEPS = 6


@pytest.fixture(params=ROWS.values(), ids=ROWS)
def row(request):
    return request.param


def run(row, guidance, *, kind="flow", n=6, seed=0, **options):
    start = options.pop("start", None)
    start = row.start(n) if start is None else start
    bed = options.pop("bed", row.bed)(kind)
    settings = {"cond": labels(len(start)), "schedule": flow(), "steps": STEPS} | options
    return sample(bed, start, guidance=guidance, generator=seed, **settings)


def test_neutral_is_the_unguided_run_bit_for_bit_and_as_cheap(row):
    if row.neutral is None:
        pytest.skip("has no setting that changes nothing")
    found, plain = run(row, row.neutral()), run(row, Unguided())
    assert torch.equal(found.x, plain.x)
    assert found.nfe.tolist() == plain.nfe.tolist()


def test_it_does_something(row):
    if row.make is Unguided:
        pytest.skip("does nothing by design")
    assert not torch.allclose(run(row, row.make()).x, run(row, Unguided()).x)


@pytest.mark.parametrize("kind", ["x0", "eps", "v"])
def test_the_kind_of_prediction_does_not_matter(row, kind):
    if not row.kinds:
        pytest.skip("its network has a kind of its own")
    options = {"schedule": edm(0.05, 20), "n": 4}
    found = run(row, row.make(), kind=kind, **options)
    expected = run(row, row.make(), kind="flow", **options)
    torch.testing.assert_close(found.x, expected.x, rtol=1e-6, atol=1e-6)
    assert found.nfe.tolist() == expected.nfe.tolist()


def test_samples_do_not_see_one_another(row):
    if row.draws:
        pytest.skip("draws for the whole batch at once")
    together = run(row, row.make(), n=4)
    for i in range(4):
        alone = run(row, row.make(), start=row.start(4)[i : i + 1], cond=labels(4)[i : i + 1])
        torch.testing.assert_close(alone.x[0], together.x[i], rtol=1e-9, atol=1e-9)
        assert int(alone.nfe[0]) == int(together.nfe[i])


def test_calls_are_counted_as_they_are_made(row):
    bed = row.bed("flow")
    made = [0]
    inner = bed.predict

    def predict(x, level, cond=None):
        made[0] += len(x)
        return inner(x, level, cond)

    bed.predict = predict
    with counting() as counts:
        found = sample(
            bed, row.start(6), cond=labels(6), guidance=row.make(), schedule=flow(), steps=STEPS, generator=0
        )
    assert made[0] == int(found.nfe.sum())
    assert counts.network_calls == pytest.approx(made[0] / 6)
    if row.calls is not None:
        assert found.nfe.tolist() == [row.calls * STEPS] * 6


def test_a_second_run_forgets_the_first(row):
    guidance = row.make()
    first = run(row, guidance)
    run(row, guidance, seed=7, steps=3)
    assert torch.equal(run(row, guidance).x, first.x)


def test_it_can_be_pickled(row):
    guidance = row.make()
    expected = run(row, guidance)
    copy = pickle.loads(pickle.dumps(guidance))
    assert torch.equal(run(row, copy).x, expected.x)


def test_randomness_comes_from_the_generator_alone(row):
    state = torch.get_rng_state()
    first, again, other = (run(row, row.make(), seed=seed).x for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert torch.equal(first, other) is not row.draws


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_types_are_kept_and_nothing_is_recorded(row, dtype):
    with torch.inference_mode():
        inferred = run(row, row.make(), start=row.start(4, dtype=dtype)) if dtype == torch.float64 else None
    if dtype == torch.float32 and row.bed is not mixture and row.bed is not pictures:
        pytest.skip("its network is float64 here")
    found = run(row, row.make(), start=row.start(4, dtype=dtype))
    assert found.x.dtype == dtype
    assert not found.x.requires_grad
    if inferred is not None:
        assert torch.equal(inferred.x, found.x)


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpm++", "ddpm"])
def test_every_solver_runs(row, solver):
    if solver not in row.solvers:
        with pytest.raises(ValueError, match=type(row.make()).__name__):
            run(row, row.make(), solver=solver)
        return
    found = run(row, row.make(), solver=solver)
    assert bool(torch.isfinite(found.x).all())


@pytest.mark.parametrize("kind", KINDS)
def test_pictures(row, kind):
    if not row.pictures:
        pytest.skip("works on its own kind of data")
    start = noise(4, 3 * 8 * 8).reshape(4, 3, 8, 8)
    found = run(row, row.make(), kind=kind, start=start, bed=pictures, schedule=edm(0.05, 20))
    assert found.x.shape == start.shape
    assert bool(torch.isfinite(found.x).all())


def test_a_run_can_be_resumed_from_its_state(row):
    guidance = row.make()
    if not hasattr(guidance, "state_dict"):
        pytest.skip("keeps no state")
    bed, levels = row.bed("flow"), flow().grid(STEPS)

    def walk(guidance, x, first, last, generator):
        for index in range(first, last):
            ctx = StepContext(
                x=x, level=levels[index], next_level=levels[index + 1], index=index, num_steps=STEPS,
                cond=labels(4), prediction="flow", null=True, generator=generator,
                nfe=torch.zeros(4, dtype=torch.long), schedule=flow(),
            )  # fmt: skip
            guided = guide(bed, guidance, ctx)
            x = ddim_step(guided.x0, guided.eps, levels[index + 1])
        return x

    guidance.reset()
    generator = torch.Generator().manual_seed(0)
    middle = walk(guidance, row.start(4), 0, 3, generator)
    saved, drawn = pickle.loads(pickle.dumps(guidance.state_dict())), generator.get_state()
    expected = walk(guidance, middle, 3, STEPS, generator)
    other = row.make()
    other.load_state_dict(saved)
    found = walk(other, middle, 3, STEPS, torch.Generator().set_state(drawn))
    assert torch.equal(found, expected)


class Leaking(Unguided):
    """Mixes the samples of a batch, remembers across runs and draws from the global state."""

    seen = 0.0

    def step(self, ctx):
        prediction = yield from super().step(ctx)
        self.seen += 0.1
        return prediction + 0.1 * prediction.mean(0) + self.seen + 0.01 * torch.randn(())


def test_the_checks_can_fail():
    row = Row(Leaking, Leaking, calls=2)
    for check in (
        test_neutral_is_the_unguided_run_bit_for_bit_and_as_cheap,
        test_samples_do_not_see_one_another,
        test_calls_are_counted_as_they_are_made,
        test_a_second_run_forgets_the_first,
        test_it_can_be_pickled,
        test_randomness_comes_from_the_generator_alone,
    ):
        with pytest.raises(AssertionError):
            check(row)
    with pytest.raises(AssertionError):
        test_the_kind_of_prediction_does_not_matter(replace(row), "eps")
