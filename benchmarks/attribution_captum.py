"""Integrated gradients beside Captum's, in one process: seconds at equal points, gradients to a tolerance.

Run: ``OMP_NUM_THREADS=1 python benchmarks/attribution_captum.py [--threads 1] [--repeats 9] [--json FILE]``

The model is the classifier of planted digits (three convolutions on 32 x 32 pixels); 32 test images, 50 Gauss-Legendre
nodes. Variants take turns, so that a busy machine is busy for all of them, and medians are compared. Peak memory is
that of a fresh process per variant, beyond what the process holds before the call.
"""

import argparse
from collections.abc import Callable
import copy
from importlib.metadata import version
import json
from pathlib import Path
import statistics
import subprocess
import sys
import time
from typing import Any

from captum.attr import IntegratedGradients as CaptumIG
import torch
from torch import Tensor, nn

from gradwise.attribution import IntegratedGradients
from gradwise.autodiff.functional import probability
from gradwise.base.counting import counting
from gradwise.testbeds.classifiers import planted_digit_classifier
from gradwise.testbeds.planted import planted_digits

BATCH, NODES, REFERENCE = 32, 50, 2048
KINDS = ("gradwise", "captum", "gradwise, 64 rows", "captum, 64 rows", "gradwise with gap", "captum with gap")


def problem(polarity: str = "bright") -> tuple[nn.Module, Tensor, Tensor]:
    """Classifier, images and their predicted classes."""
    model = planted_digit_classifier(0, polarity, "small")
    x = planted_digits(BATCH, polarity=polarity, seed=0, part="test").x
    with torch.no_grad():
        return model, x, model(x).argmax(1)


def variant(kind: str, model: nn.Module, x: Tensor, target: Tensor, n_steps: int = NODES) -> Callable[[], Tensor]:
    """One attribution as a function without arguments."""
    method = (CaptumIG if kind.startswith("captum") else IntegratedGradients)(model)
    options: dict[str, Any] = {"target": target, "n_steps": n_steps}
    if "rows" in kind:
        options["internal_batch_size"] = 64
    if "gap" in kind:
        return lambda: method.attribute(x, return_convergence_delta=True, **options)[0]
    return lambda: method.attribute(x, **options)


def seconds(repeats: int) -> dict[str, float]:
    """Median seconds per variant, and that the maps agree."""
    model, x, target = problem()
    calls = {kind: variant(kind, model, x, target) for kind in KINDS}
    channels_last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    calls |= {f"{kind}, channels last": variant(kind, channels_last, x, target) for kind in KINDS[2:4]}
    maps = {kind: call() for kind, call in calls.items()}
    for kind, result in maps.items():  # within a memory layout: another order of summing can flip a ReLU at its kink
        peer = "captum, 64 rows, channels last" if "channels last" in kind else "captum"
        torch.testing.assert_close(result, maps[peer], rtol=1e-3, atol=1e-5, msg=kind)
    taken: dict[str, list[float]] = {kind: [] for kind in calls}
    for _ in range(repeats):
        for kind, call in calls.items():
            start = time.perf_counter()
            call()
            taken[kind].append(time.perf_counter() - start)
    return {kind: statistics.median(values) for kind, values in taken.items()}


def peak_megabytes(kind: str, n_steps: int) -> float:
    """Growth of the resident set during one call in a fresh process."""
    command = [sys.executable, __file__, "--peak", kind, "--steps", str(n_steps)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_peak(kind: str, n_steps: int) -> None:
    call = variant(kind, *problem(), n_steps)
    variant("gradwise", *problem(), 1)()  # libraries and kernels loaded
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts again
    before = memory("VmRSS")
    call()
    print((memory("VmHWM") - before) / 1024)


def memory(field: str) -> int:
    """Kilobytes that Linux reports for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def gradients(polarity: str, tol: float) -> dict[str, float]:
    """Gradients per image that ours spends at ``tol``, and what equal steps need (Captum, Gauss-Legendre).

    ``every``: until every image's gap is within ``tol``; ``mean``: for the same mean gap; ``map``: for the same error
    of the map against a fine reference (a gap can be small because errors cancel). NaN: 1,024 steps do not suffice.
    """
    model, x, target = problem(polarity)
    score = probability(model)
    with torch.no_grad():
        ends = [score(points).gather(1, target[:, None])[:, 0] for points in (x, torch.zeros_like(x))]
    change = (ends[0] - ends[1]).abs()
    sure = change > 0.5
    x, target, change = x[sure], target[sure], change[sure]
    exact = IntegratedGradients(score).attribute(x, target=target, n_steps=REFERENCE, method="riemann_middle")

    def measured(attributions: Tensor, delta: Tensor) -> tuple[float, float, float]:
        gap = delta.abs() / change
        error = (attributions - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
        return float(gap.max()), float(gap.mean()), float(error.mean())

    with counting() as counts:
        ours = measured(*IntegratedGradients(score).attribute(x, target=target, tol=tol, return_convergence_delta=True))
    wanted = dict(zip(("every", "mean", "map"), (tol, *ours[1:]), strict=True))
    needed: dict[str, float] = {}
    steps = 4
    while len(needed) < len(wanted) and steps <= 1024:
        theirs = CaptumIG(score).attribute(
            x, target=target, n_steps=steps, internal_batch_size=128, return_convergence_delta=True
        )
        for name, value in zip(wanted, measured(*theirs), strict=True):
            if value <= wanted[name]:
                needed.setdefault(name, steps)
        steps = max(steps + 1, int(steps * 1.15))
    row = {"images": len(x), "gradients": counts.gradient / len(x), "largest gap": ours[0]}
    return row | {f"captum, {name}": needed.get(name, float("nan")) for name in wanted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=NODES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print_peak(options.peak, options.steps)
        return
    print(f"torch {torch.__version__}, captum {version('captum')}, {options.threads} thread(s)")
    result: dict[str, Any] = {"seconds": seconds(options.repeats), "peak_megabytes": {}, "gradients": {}}
    base = result["seconds"]["captum"]
    print(f"\n{NODES} nodes, {BATCH} images: median seconds (times as fast as Captum's defaults)")
    for kind, taken in result["seconds"].items():
        print(f"  {kind:<34} {taken:7.3f}  x{base / taken:.2f}")
    print("\npeak memory beyond the process, MB at 50 and 200 nodes")
    for kind in KINDS[:4]:
        peaks = [peak_megabytes(kind, n) for n in (50, 200)]
        result["peak_megabytes"][kind] = peaks
        print(f"  {kind:<34} {peaks[0]:7.0f} {peaks[1]:7.0f}")
    print("\ngradients per image to a tolerance, and Captum's (ratio) for: every gap, the mean gap, the map's error")
    for polarity in ("bright", "random"):
        for tol in (0.05, 0.02, 0.01, 0.005):
            row = gradients(polarity, tol)
            result["gradients"][f"{polarity}, tol={tol}"] = row
            theirs = [row[f"captum, {name}"] for name in ("every", "mean", "map")]
            shares = "  ".join(f"{n:4.0f} ({row['gradients'] / n:.2f})" for n in theirs)
            print(
                f"  {polarity:<7} tol={tol:<6} largest gap {row['largest gap']:.4f}: {row['gradients']:5.1f}   {shares}"
            )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
