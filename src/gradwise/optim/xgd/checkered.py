"""Checkered regression: the class is the sum, modulo the number of classes, of independent draws.

Two classes: m hyperplanes z_j are m coins that succeed with probability sigma(z_j), and the class is 1 where an even
number fails: P(1) = (1 + prod_j tanh(z_j/2))/2, smooth checkerboard colours. c classes: m independent softmax draws in
{0..c-1} are added modulo c, so that class probabilities are the circular convolution of m softmax vectors. One draw is
logistic regression.
"""

from jaxtyping import Float, Int
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradwise.base.checks import require_count

MOST = 10  # hyperplanes up to which the 2^(m-1) terms are written out


def circular(a: Float[Tensor, "*b c"], b: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
    """log sum_l exp(a_l + b_(y-l)), y - l modulo c: the law of the sum of two draws."""
    c = a.shape[-1]
    classes = torch.arange(c, device=a.device)
    return (a[..., None, :] + b[..., (classes[:, None] - classes) % c]).logsumexp(-1)


def checkered_log_probs(logits: Float[Tensor, "*b m c"]) -> Float[Tensor, "*b c"]:
    """Log-probabilities of the sum modulo c of m draws with these logits, by a tree of convolutions.

    Every number is a logarithm of a sum of positive terms: relative accuracy holds for the unlikely classes too, where
    1 - prod tanh would cancel.

    >>> checkered_log_probs(torch.zeros(3, 2)).exp()
    tensor([0.5000, 0.5000])
    """
    laws = logits.log_softmax(-1)
    while laws.shape[-2] > 1:
        pairs = laws.shape[-2] // 2
        laws = torch.cat(
            [circular(laws[..., :pairs, :], laws[..., pairs : 2 * pairs, :]), laws[..., 2 * pairs :, :]], dim=-2
        )
    return laws[..., 0, :]


def checkoid_log_probs(z: Float[Tensor, "*b m"]) -> Float[Tensor, "*b 2"]:
    """Logarithms of 1 - Xi_m(z) and Xi_m(z) = (1 + prod_j tanh(z_j/2))/2, classes 0 and 1.

    >>> checkoid_log_probs(torch.tensor([3.0, -3.0])).exp()  # different signs: class 0
    tensor([0.9097, 0.0903])
    """
    return checkered_log_probs(coins(z)).flip(-1)


def coins(z: Float[Tensor, "*b m"]) -> Float[Tensor, "*b m 2"]:
    """Logits of draws in {0, 1} that are 0 with probability sigma(z_j)."""
    return torch.stack([z, torch.zeros_like(z)], -1)


def checkered_log_terms(z: Float[Tensor, "n m"], y: Int[Tensor, " n"]) -> Float[Tensor, "n S"]:
    """The sum form: log prod_j sigma(s_j z_j) of the S = 2^(m-1) sign vectors s whose product is that of class y.

    P(y | z) is the sum of their exponentials; :class:`~gradwise.optim.XGD` takes them. Raises ``ValueError`` for labels
    other than 0 and 1, and for m > 10 (:func:`checkoid_log_probs` has no such limit).
    """
    m = z.shape[-1]
    if m > MOST:
        raise ValueError(f"z has {m} hyperplanes, that is 2^{m - 1} terms; above {MOST} use checkoid_log_probs.")
    if bool(((y != 0) & (y != 1)).any()):
        raise ValueError("y must hold the classes 0 and 1.")
    free = (
        torch.cartesian_prod(*[z.new_tensor([1.0, -1.0])] * (m - 1)).reshape(-1, m - 1) if m > 1 else z.new_zeros(1, 0)
    )
    last = free.prod(1) * (2 * y - 1).to(z.dtype)[:, None]  # the sign that makes the product right
    fixed = functional.logsigmoid(free * z[:, None, : m - 1]).sum(-1)
    return fixed + functional.logsigmoid(last * z[:, -1:])


def posterior(
    logits: Float[Tensor, "*b m c"], y: Int[Tensor, "*b"]
) -> tuple[Float[Tensor, "*b m c"], Float[Tensor, "*b"]]:
    """The law of every draw given the class, and log P(y); detached.

    The gradient of log P(y) with respect to draw k's logits is its law given y minus its law, softmax(logits_k): one
    backward pass through the convolutions gives all laws, without leave-one-out products.
    """
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        log_p = checkered_log_probs(leaf).gather(-1, y[..., None])[..., 0]
        (slope,) = torch.autograd.grad(log_p.sum(), leaf)
    return leaf.detach().softmax(-1) + slope, log_p.detach()


def random_posterior(
    shape: tuple[int, ...], m: int, c: int, y: Int[Tensor, "*b"], generator: torch.Generator
) -> Float[Tensor, "*b m c"]:
    """Laws of m draws given their sum y modulo c: all but the last uniform on the simplex, the last as they leave it.

    For two coins this is a Dirichlet(1, 1) law on the two terms of the class.
    """
    waiting = torch.empty(*shape, m - 1, c, dtype=torch.float64).exponential_(generator=generator).clamp_min(1e-300)
    laws = (waiting / waiting.sum(-1, keepdim=True)).log()
    if m > 1:
        others = checkered_log_probs(laws)
    else:
        others = torch.full((*shape, c), -torch.inf, dtype=torch.float64)
        others[..., 0] = 0.0
    last = others.gather(-1, (y[..., None] - torch.arange(c)) % c)
    return torch.cat([laws, last[..., None, :]], dim=-2).exp()


class CheckeredHead(nn.Module):
    """An output layer: [..., d] to log-probabilities [..., c] of checkered regression, for ``nll_loss``.

    Args:
        in_features: d.
        n_hyperplanes: m, the draws that are added; 1 is the ordinary linear layer with log-softmax.
        n_classes: c. Two classes take m hyperplanes, c > 2 take m c.

    Raises ``TypeError`` or ``ValueError`` unless the numbers are integers, at least 1, 1 and 2.

    The gradient vanishes at zero weights for m >= 2; PyTorch's start of a linear layer is away from it.

    >>> CheckeredHead(5, n_hyperplanes=3)(torch.ones(7, 5)).exp().sum(-1).round(decimals=4)
    tensor([1., 1., 1., 1., 1., 1., 1.], grad_fn=...)
    """

    def __init__(self, in_features: int, n_hyperplanes: int = 2, n_classes: int = 2) -> None:
        super().__init__()
        require_count("in_features", in_features)
        self.n_hyperplanes = require_count("n_hyperplanes", n_hyperplanes)
        self.n_classes = require_count("n_classes", n_classes, 2)
        self.hyperplanes = nn.Linear(in_features, n_hyperplanes * (1 if n_classes == 2 else n_classes))

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b c"]:
        """Log-probabilities of the classes."""
        z = self.hyperplanes(x)
        if self.n_classes == 2:
            return checkoid_log_probs(z)
        return checkered_log_probs(z.unflatten(-1, (self.n_hyperplanes, self.n_classes)))
