"""Time and memory of one PSGD step beside pytorch_optimizer's Kron (the same family of preconditioners) and AdamW.

Run: ``python benchmarks/optim_psgd.py [--rounds 7] [--threads 1] [--json FILE]``  # peers, opt_einsum

Ten million parameters in 40 matrices of 500 x 500, gradients given, whitening. The preconditioner is fitted at every
step, or (``held``) at none, which is what most steps of a long run are. Steps of all arms take turns; medians of the
ratios to Kron's step of the same kind and round. The two do not make the same steps: Kron keeps bias-corrected momentum
and clips, ours finds its scale from the first pair. Limit: with factors of side n a held step multiplies four n x n
matrices per tensor, a fitting step about twelve and two triangular solves.
"""

from _steps import compare, parser
from pytorch_optimizer import Kron
import torch

from gradwise.optim import PSGD

ARMS = {
    "Kron": lambda p: Kron(p, lr=1e-3, pre_conditioner_update_probability=1.0),
    "PSGD kron": lambda p: PSGD(p, 1e-3, "kron", kind="whitening", momentum=0.9),
    "PSGD lra (rank 10)": lambda p: PSGD(p, 1e-3, "lra", kind="whitening", momentum=0.9),
    "PSGD xmat": lambda p: PSGD(p, 1e-3, "xmat", kind="whitening", momentum=0.9),
    "AdamW (foreach)": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "Kron, held": lambda p: Kron(p, lr=1e-3, pre_conditioner_update_probability=0.0),
    "PSGD kron, held": lambda p: PSGD(p, 1e-3, "kron", kind="whitening", momentum=0.9, update_prob=0.0),
}


def peer(name: str) -> str:
    """The step of the same kind."""
    return "Kron, held" if name.endswith("held") else "Kron"


def main() -> None:
    options = parser(__doc__, rounds=7).parse_args()
    torch.manual_seed(0)
    compare(ARMS, [(500, 500)] * 40, peer, options)


if __name__ == "__main__":
    main()
