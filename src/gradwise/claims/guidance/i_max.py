"""Claim: above its native size a flow model keeps its global structure when its low frequencies are pulled.

Du, Liu, Zhuo, Qin, Li, Ma, Gao, 2024, arXiv:2410.07536. Projected flow should restore the global statistics that a
model loses at twice its native side, and leave fine detail to the model.

Protocol, ``digits``. A convolutional flow network that sees 7 x 7 pixels is trained on digits of 8 x 8 and sampled at
16 x 16, 30 Euler steps, 400 samples per seed. ``accuracy``: of a classifier on the averages of 2 x 2 blocks, against
the label asked for; ``detail``: share of the power that block averages do not hold. ``native`` are its samples at
8 x 8, ``enlarged`` those by bicubic interpolation, ``plain`` its samples at 16 x 16; the projected flow follows
``enlarged`` under the three schedules of the paper and code.

Protocol, ``textures``. Gaussian textures on a 32 x 32 torus with known spectrum, exact denoisers, 50 steps, 512
samples. The native model knows the law of 2 x 2 block averages, the large one a wrong law that repeats with period 16
(power at even wavenumbers only) and is right in the high band. ``low`` and ``high`` are mean absolute errors of log
spectra of the block averages and of the rest; ``repetition`` the correlation of block averages half a picture apart.
The guide is enlarged by repetition, so that its block averages are the native pixels.

Controls: a pull of zero must be the plain run exactly, and a constant pull to guides of other labels must leave the
label asked for at chance.

Differs from the paper: no text-to-image model, no preferences; no time shift.
"""

from functools import lru_cache, partial
import math
from typing import Any

import torch
from torch import Tensor, nn
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)

from gradwise.base.counting import count, preparing
from gradwise.diffusion import FunctionDenoiser, Guidance, flow, from_module, sample
from gradwise.guidance import ProjectedFlowGuidance, haar_lowpass
from gradwise.testbeds.cache import Recipe, trained
from gradwise.testbeds.digits import digits
from gradwise.testbeds.guidance_bed import digits_classifier
from gradwise.testbeds.nets import seeded
from gradwise.trials import Arm, Bound, Control, Difference, Equal, NonInferior, Ratio, Run, Trial

WIDTH, BATCH, LEARNING_RATE, SIDE = 48, 128, 4e-3, 32
DECAY, CONSTANT, SHIFT = "cosine_decay", "constant", "cosine_shift"


# ------------------------------------------------------------------------------------------------------- digits


class ConvFlow(nn.Module):
    """Three 3 x 3 convolutions, shifted and scaled by time and label: any size of picture, a view of 7 x 7."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in ((1, WIDTH), (WIDTH, WIDTH), (WIDTH, 1)))
        self.time = nn.Sequential(nn.Linear(16, 2 * WIDTH), nn.SiLU(), nn.Linear(2 * WIDTH, 4 * WIDTH))
        self.label = nn.Embedding(10, 4 * WIDTH)

    def forward(self, x: Any, t: Any, label: Any) -> Tensor:
        """The velocity of pictures [b, 1, h, w]."""
        angles = t[:, None] * (math.pi * 2.0 ** torch.arange(8) / 4)
        signal = (self.time(torch.cat([angles.sin(), angles.cos()], 1)) + self.label(label))[..., None, None]
        scale, shift, scale2, shift2 = signal.chunk(4, 1)
        h = F.silu(self.layers[0](x) * (1 + scale) + shift)
        h = F.silu(self.layers[1](h) * (1 + scale2) + shift2)
        return self.layers[2](h)


def _build(generator: torch.Generator, **config: Any) -> ConvFlow:
    with seeded(generator):
        return ConvFlow()


def _train(net: nn.Module, generator: torch.Generator, *, steps: int, data_seed: int) -> None:
    data = digits(seed=data_seed, shape="image").train
    optimizer = torch.optim.AdamW(net.parameters(), LEARNING_RATE, fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * step / steps)) / 2
        rows = torch.randint(len(data.x), (BATCH,), generator=generator)
        x0, t = data.x[rows], torch.sigmoid(1.2 * torch.randn(BATCH, generator=generator))
        eps = torch.randn(x0.shape, generator=generator)
        velocity = eps - x0
        loss = (net(x0 + t[:, None, None, None] * velocity, t, data.y[rows]) - velocity).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        count(gradient=1)


RECIPE = Recipe(_build, _train)


def digit_bed(run: Run) -> tuple[Any, nn.Module, Tensor, int]:
    """The denoiser, the judge, the labels asked for and the number of steps."""
    with preparing():
        config = {"steps": run.pick(smoke=20, small=1000, full=3000), "data_seed": run.seed}
        denoiser = from_module(trained(RECIPE, config, run.seed), "flow")
        judge = digits_classifier("judge", seed=run.seed)
    n = run.pick(smoke=40, small=400, full=4000)
    return denoiser, judge, torch.arange(n) % 10, run.pick(smoke=5, small=30, full=50)


def drawn(run: Run, side: int, cond: Tensor, guidance: Guidance | None = None) -> Tensor:
    """Digits of a size, from the noise that all arms share."""
    denoiser, _, _, steps = digit_bed(run)
    noise = torch.randn(len(cond), 1, side, side, generator=run.generator(f"noise {side}"))
    return sample(denoiser, noise, cond=cond, guidance=guidance, schedule=flow(), steps=steps).x


def enlarged(run: Run, cond: Tensor) -> Tensor:
    """Native digits, enlarged."""
    return F.interpolate(drawn(run, 8, cond), scale_factor=2, mode="bicubic")


def judged(run: Run, x: Tensor) -> dict[str, float]:
    """Accuracy of the block averages, and the share of the power beyond them."""
    _, judge, labels, _ = digit_bed(run)
    small = F.avg_pool2d(x, 2) if x.shape[-1] == 16 else x
    with torch.no_grad():
        right = judge(small.clamp(-1, 1).flatten(1)).argmax(1) == labels
    found = {"accuracy": float(right.double().mean())}
    if x.shape[-1] == 16:
        found["detail"] = float((x - haar_lowpass(x)).square().mean() / x.square().mean())
    return found


def digit_arm(run: Run, *, of: str, schedule: Any = None) -> dict[str, float]:
    """One way to a digit of 16 x 16 (or the native one)."""
    labels = digit_bed(run)[2]
    if of == "native":
        return judged(run, drawn(run, 8, labels))
    if of == "enlarged":
        return judged(run, enlarged(run, labels))
    if of == "plain":
        return judged(run, drawn(run, 16, labels))
    guide = enlarged(run, labels if of == "projected" else (labels + 5) % 10)
    return judged(run, drawn(run, 16, labels, ProjectedFlowGuidance(guide, schedule=schedule)))


# ----------------------------------------------------------------------------------------------------- textures


def spectrum() -> Tensor:
    """Power of the true texture at each wavenumber of the torus."""
    k = torch.fft.fftfreq(SIDE, 1 / SIDE, dtype=torch.float64)
    power = (1 + (k[:, None] ** 2 + k**2) / 9) ** -1.5
    return power / power.mean()


def averaged(power: Tensor) -> Tensor:
    """Power of the 2 x 2 block averages: aliased, and damped by the block."""
    k = torch.fft.fftfreq(SIDE, 1 / SIDE, dtype=torch.float64)
    block = torch.cos(math.pi * k / SIDE) ** 2
    damped = power * block[:, None] * block
    half = SIDE // 2
    return sum((damped.roll((i, j), (0, 1))[:half, :half] for i in (0, half) for j in (0, half)), torch.zeros(())) / 4


def repeated(power: Tensor) -> Tensor:
    """A wrong law: in the low band only even wavenumbers have power, as in a picture tiled four times."""
    k = torch.fft.fftfreq(SIDE, 1 / SIDE, dtype=torch.float64)
    low = (k.abs()[:, None] < SIDE / 4) & (k.abs() < SIDE / 4)
    even = low & (k[:, None] % 2 == 0) & (k % 2 == 0)
    wrong = torch.where(low & ~even, 1e-4 * power, power)
    return torch.where(even, wrong * (power[low].sum() - wrong[low & ~even].sum()) / power[even].sum(), wrong)


def ideal(power: Tensor) -> FunctionDenoiser:
    """The exact denoiser of a stationary Gaussian texture, as a velocity."""

    def predict(x: Tensor, level: Any, cond: Any) -> Tensor:
        a, s = level.factors(x)
        transformed = torch.fft.fft2(x)
        scale = transformed / (a * a * power + s * s)
        return torch.fft.ifft2((s - a * power) * scale).real

    return FunctionDenoiser(predict, "flow")


def texture(power: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Exact draws."""
    white = torch.randn(n, 1, *power.shape, generator=generator, dtype=torch.float64)
    return torch.fft.ifft2(power.sqrt() * torch.fft.fft2(white)).real


@lru_cache(maxsize=1)
def reference() -> tuple[Tensor, Tensor]:
    """Mean spectra of block averages and of the rest, of many true textures."""
    return bands(texture(spectrum(), 8192, torch.Generator().manual_seed(0)))


def bands(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean power of the block averages and of what they leave."""
    low, high = F.avg_pool2d(x, 2), x - haar_lowpass(x)
    return (torch.fft.fft2(low).abs().square().mean((0, 1)), torch.fft.fft2(high).abs().square().mean((0, 1)))


def texture_arm(run: Run, *, schedule: Any) -> dict[str, float]:
    """Textures of the wrong model, plain or pulled."""
    n, steps = run.pick(smoke=16, small=512, full=4096), run.pick(smoke=5, small=50, full=200)

    def start(side: int) -> Tensor:
        return torch.randn(n, 1, side, side, generator=run.generator(f"noise {side}"), dtype=torch.float64)

    native = sample(ideal(averaged(spectrum())), start(SIDE // 2), schedule=flow(), steps=steps).x
    guide = F.interpolate(native, scale_factor=2, mode="nearest")
    guidance = None if schedule is None else ProjectedFlowGuidance(guide, schedule=schedule)
    x = sample(ideal(repeated(spectrum())), start(SIDE), guidance=guidance, schedule=flow(), steps=steps).x
    (low, high), (true_low, true_high) = bands(x), reference()
    inside = true_high > 1e-6 * true_high.max()
    small = F.avg_pool2d(x, 2)
    moved = small.roll(SIDE // 4, -1)
    return {
        "low": float((low / true_low).log().abs().mean()),
        "high": float((high / true_high)[inside].log().abs().mean()),
        "repetition": float((small * moved).mean() / small.square().mean()),
    }


# --------------------------------------------------------------------------------------------------------- claim


def nothing(progress: float) -> float:
    """A gate that is shut."""
    return 0.0


def _arms() -> list[Arm]:
    on, off = ("digits",), ("textures",)
    arms = [
        Arm("native", partial(digit_arm, of="native"), "baseline", settings=on),
        Arm("plain", partial(digit_arm, of="plain"), "baseline", settings=on),
        Arm("enlarged", partial(digit_arm, of="enlarged"), "competitor", settings=on),
        Arm("no pull", partial(digit_arm, of="projected", schedule=nothing), "control", settings=on),
        Arm("guides of other labels", partial(digit_arm, of="other", schedule=CONSTANT), "control", settings=on),
        Arm("plain texture", partial(texture_arm, schedule=None), "baseline", settings=off),
    ]
    for schedule in (DECAY, CONSTANT, SHIFT):
        arms.append(Arm(schedule, partial(digit_arm, of="projected", schedule=schedule), "method", settings=on))
        arms.append(Arm(f"{schedule} texture", partial(texture_arm, schedule=schedule), "method", settings=off))
    return arms


claim = Trial(
    id="guidance/i_max",
    title="I-Max: projected flow above the native resolution",
    statement="At twice the native side projected flow raises a digit's accuracy by at least 0.1 over the plain model, "
    "to within 0.05 of the native one, with at least twice the detail of bicubic enlargement; on textures it lowers "
    "the spectral error of the low band tenfold without raising that of the high band.",
    arms=_arms(),
    expectations=[
        *(
            expectation
            for schedule in (DECAY, CONSTANT)
            for expectation in (
                Difference(schedule, "plain", "accuracy", margin=0.1, setting="digits"),
                NonInferior(schedule, "native", "accuracy", margin=0.05, setting="digits"),
                Ratio(schedule, "enlarged", "detail", at_least=2.0, setting="digits"),
                Ratio(f"{schedule} texture", "plain texture", "low", at_most=0.1, setting="textures"),
                Ratio(f"{schedule} texture", "plain texture", "high", at_most=1.0, setting="textures"),
            )
        ),
        Difference(SHIFT, "plain", "accuracy", margin=0.1, setting="digits", role="reported"),
        Ratio(SHIFT, "enlarged", "detail", at_least=2.0, setting="digits", role="reported"),
        Ratio(f"{SHIFT} texture", "plain texture", "low", at_most=0.1, setting="textures", role="reported"),
        Bound("plain texture", "repetition", at_least=0.5, setting="textures", role="reported"),
        Bound(f"{CONSTANT} texture", "repetition", at_most=0.1, setting="textures", role="reported"),
        Bound(f"{DECAY} texture", "repetition", at_most=0.1, setting="textures", role="reported"),
    ],
    controls=[
        Control(Equal("no pull", "plain", "accuracy", setting="digits"), "equal"),
        Control(Bound("guides of other labels", "accuracy", at_most=0.2, setting="digits"), "chance"),
    ],
    settings={"digits": {}, "textures": {}},
    note="The paper shows preferences on pictures of up to 4096 x 4096; no figure of it is at hand.",
)
