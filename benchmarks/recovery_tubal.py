"""Half-spectrum tubal algebra beside the full transform, in one process.

Run: ``OMP_NUM_THREADS=1 python benchmarks/recovery_tubal.py [--repeats 15] [--json FILE]``

Two comparisons, taking turns, by medians of one thread's processor time. ``t_svd`` against a full complex transform
with one complex decomposition per slice. One iteration of ``tubal_gd`` against the iteration as published (real
iterates, full transforms in every product) and against its bare products with A and A*.
"""

import argparse
from importlib.metadata import version
import json
from pathlib import Path
from typing import Any

from _timing import medians
import torch
from torch import Tensor

from gradwise.recovery import tubal_gd
from gradwise.recovery.tubal import t_svd
from gradwise.testbeds.sensing import sensing

SHAPES = ((64, 64, 32), (128, 96, 16), (64, 64, 31))
PROBLEMS = {"n 10, k 4, m 150": (10, 4, 150, 20), "n 20, k 8, m 1200": (20, 8, 1200, 20)}
ITERATIONS = 200


def full_svd(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All k slices, decomposed one by one as complex matrices, and back."""
    slices = torch.fft.fft(A, dim=-1).movedim(-1, 0)
    parts = [torch.linalg.svd(slice_, full_matrices=False) for slice_ in slices]
    U, S, Vh = (torch.stack([part[i] for part in parts]) for i in range(3))
    back = (U, torch.diag_embed(S).to(U.dtype), Vh.mH)
    u, s, v = (torch.fft.ifft(x, dim=0).real.movedim(0, -1) for x in back)
    return u, s, v


def full_product(A: Tensor, B: Tensor) -> Tensor:
    """The t-product by full complex transforms."""
    a, b = (torch.fft.fft(x, dim=-1).movedim(-1, 0) for x in (A, B))
    return torch.fft.ifft((a @ b).movedim(0, -1), dim=-1).real


def transposed(A: Tensor) -> Tensor:
    """The t-transpose."""
    turned = A.transpose(0, 1)
    return torch.cat([turned[..., :1], turned[..., 1:].flip(-1)], -1)


def published(matrix: Tensor, y: Tensor, U: Tensor, step: float, iterations: int) -> Tensor:
    """U <- U - step (1/m) A*(A(U * U^T) - y) * U with real iterates."""
    n, _, k = U.shape
    for _ in range(iterations):
        residual = matrix @ full_product(U, transposed(U)).reshape(-1) - y
        U = U - step * full_product((residual @ matrix).reshape(n, n, k) / len(y), U)
    return U


def show(title: str, row: dict[str, float], unit: float, name: str) -> None:
    first = next(iter(row.values()))
    print(f"{title}: " + ", ".join(f"{k} {v * unit:.3g} {name} ({v / first:.2f} x)" for k, v in row.items()))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"torch": version("torch"), "threads": torch.get_num_threads(), "t_svd": {}, "tubal_gd": {}}
    for shape in SHAPES:
        A = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        row = medians({"gradwise": lambda A=A: t_svd(A), "full transform": lambda A=A: full_svd(A)}, options.repeats)
        found["t_svd"]["x".join(map(str, shape))] = row
        show(f"t_svd {shape}", row, 1e3, "ms")
    for name, (n, k, m, columns) in PROBLEMS.items():
        measurements, y, _ = sensing(n, 1, m, tubes=k, seed=0)
        matrix = measurements.adjoint(torch.eye(m, dtype=y.dtype)).flatten(1)
        start = 0.01 * torch.randn(n, columns, k, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        x = full_product(start, transposed(start)).reshape(-1)

        def ours(A: Any = measurements, y: Tensor = y, U: Tensor = start) -> Tensor:
            options: dict[str, Any] = {"x0": U, "step": 0.05, "max_iter": ITERATIONS, "tol": 0.0}
            return tubal_gd(A, y, U.shape[1], **options).factor

        def theirs(matrix: Tensor = matrix, y: Tensor = y, U: Tensor = start) -> Tensor:
            return published(matrix, y, U, 0.05, ITERATIONS)

        def products(matrix: Tensor = matrix, x: Tensor = x) -> None:
            for _ in range(ITERATIONS):
                (matrix @ x) @ matrix

        torch.testing.assert_close(ours(), theirs())
        calls = {"gradwise": ours, "as published": theirs, "products with A, A* alone": products}
        row = {key: value / ITERATIONS for key, value in medians(calls, options.repeats).items()}
        found["tubal_gd"][name] = row
        show(f"iteration, {name}", row, 1e6, "us")
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
