"""The arithmetic of a guidance step beside the guiders of diffusers, on the same tensors, in one process.

Run: ``OMP_NUM_THREADS=1 python benchmarks/guidance_combine.py [--rounds 40] [--threads 1] [--device cpu] [--json F]``

From the two predictions of a step to the guided one, the network left out, at the latent sizes of Stable Diffusion.
Where the method is the same the results are compared first, over several steps. The arms take turns; a ratio is the
median over rounds of two times of the same round (processor time on a CPU, wall time of a synchronised GPU).
The ``noise network`` is projected in clean estimates, as in the paper: both predictions are turned into clean data and
the answer back into noise, which diffusers does not do.
"""

import argparse
from collections.abc import Callable
import json
from pathlib import Path
import statistics
import time
from typing import Any

import diffusers
from diffusers import guiders
import torch
from torch import Tensor

from gradwise.diffusion import ClassifierFreeGuidance, NoiseLevel, StepContext
from gradwise.guidance import AdaptiveProjectedGuidance

SHAPES = ((2, 4, 96, 96), (1, 16, 128, 128))
SCALE, ETA, LIMIT, MOMENTUM = 6.0, 0.0, 15.0, -0.5
REPEATS = 10
Step = Callable[[], Tensor]


def context(x: Tensor, prediction: str) -> StepContext:
    """A step in the middle of a run, of a network of the given kind."""
    level = NoiseLevel.of(0.6, 0.8, 0.5)
    nfe = torch.zeros(len(x), dtype=torch.long)
    return StepContext(x, level, None, 1, 10, None, prediction, True, None, nfe)


def theirs(guider: Any, cond: Tensor, null: Tensor) -> Step:
    """A guider of diffusers at its first step."""
    guider.set_state(step=0, num_inference_steps=10, timestep=torch.tensor(500))
    guider.prepare_inputs({})
    return lambda: guider.forward(cond, null).pred


def ours(guidance: Any, cond: Tensor, null: Tensor, ctx: StepContext) -> Step:
    """A guidance of ours."""
    guidance.reset()
    return lambda: guidance.combine(cond, null, ctx)


def their_apg(scale: float, original: bool) -> Any:
    """APG of diffusers with the settings used here."""
    return guiders.AdaptiveProjectedGuidance(
        guidance_scale=scale,
        adaptive_projected_guidance_momentum=MOMENTUM,
        adaptive_projected_guidance_rescale=LIMIT,
        eta=ETA,
        use_original_formulation=original,
    )


def pairs(shape: tuple[int, ...], device: str) -> dict[str, tuple[Step, Step, bool]]:
    """Name -> (ours, theirs, whether the results must agree)."""
    generator = torch.Generator().manual_seed(0)
    cond = torch.randn(shape, generator=generator)
    null = (cond + 0.1 * torch.randn(shape, generator=generator)).to(device)
    x, cond = torch.randn(shape, generator=generator).to(device), cond.to(device)
    clean, ctx = context(x, "x0"), context(x, "eps")  # clean data projects as it is, noise is converted first
    options: dict[str, Any] = {"eta": ETA, "norm_threshold": LIMIT, "momentum": MOMENTUM}
    paper = AdaptiveProjectedGuidance(SCALE, **options)
    raw = AdaptiveProjectedGuidance(SCALE, formulation="diffusers", **options)
    free, their_free = ClassifierFreeGuidance(SCALE), guiders.ClassifierFreeGuidance(guidance_scale=SCALE)
    return {
        "classifier-free": (ours(free, cond, null, clean), theirs(their_free, cond, null), True),
        "APG": (ours(paper, cond, null, clean), theirs(their_apg(SCALE - 1, True), cond, null), True),
        "APG, diffusers' formula": (ours(raw, cond, null, clean), theirs(their_apg(SCALE, False), cond, null), True),
        "APG of a noise network": (
            ours(AdaptiveProjectedGuidance(SCALE, **options), cond, null, ctx),
            theirs(their_apg(SCALE - 1, True), cond, null),
            False,
        ),
    }


def clock(device: str) -> float:
    """Seconds so far."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def compare(shape: tuple[int, ...], device: str, rounds: int) -> dict[str, dict[str, float]]:
    """Microseconds per step of both, and their ratio."""
    rows = {}
    for name, (mine, other, same) in pairs(shape, device).items():
        for _ in range(4):
            found, expected = mine(), other()
            if same:
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=name)
        taken: dict[Step, list[float]] = {mine: [], other: []}
        for _ in range(rounds):
            for step, times in taken.items():
                begun = clock(device)
                for _ in range(REPEATS):
                    step()
                times.append((clock(device) - begun) / REPEATS)
        ratio = statistics.median(a / b for a, b in zip(taken[mine], taken[other], strict=True))
        micro = [1e6 * statistics.median(times) for times in taken.values()]
        rows[name] = {"ours": micro[0], "diffusers": micro[1], "ratio": ratio}
        print(f"  {name:<26} {micro[0]:9.0f} us   diffusers {micro[1]:9.0f} us   x{ratio:.2f}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    print(
        f"torch {torch.__version__}, diffusers {diffusers.__version__}, {options.device}, {options.threads} thread(s)"
    )
    found = {}
    for shape in SHAPES:
        print(f"\n{list(shape)}")
        found[str(list(shape))] = compare(shape, options.device, options.rounds)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
