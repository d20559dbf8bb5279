"""Time and memory of one INNAprop step beside AdamW and a loop over tensors, in one process.

Run: ``python benchmarks/optim_innaprop.py [--rounds 30] [--threads 1] [--json FILE]``

Ten million parameters in 200 tensors, gradients given. Steps of all arms take turns; medians of the ratios to AdamW
(foreach) of the same round. The limit is memory traffic, which is the same for both: weights, gradients and two
states are read, three of them written.
"""

from _steps import compare, parser
import torch

from gradwise.optim import INNAprop

ARMS = {
    "AdamW (foreach)": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "AdamW (fused)": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "AdamW (loop)": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=False),
    "INNAprop": lambda p: INNAprop(p, lr=1e-3),
    "INNAprop (no look for NaN)": lambda p: INNAprop(p, lr=1e-3, nonfinite="pass"),
    "INNAprop (loop)": lambda p: INNAprop(p, lr=1e-3, foreach=False),
    "INNAprop (psi form)": lambda p: INNAprop(p, lr=1e-3, form="psi"),
}


def main() -> None:
    compare(ARMS, [(500, 100)] * 200, lambda name: "AdamW (foreach)", parser(__doc__, rounds=30).parse_args())


if __name__ == "__main__":
    main()
