import copy
import io
import itertools
import math
import pickle

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.utils.estimator_checks import check_estimator
import torch
from torch import nn
from torch.nn import functional
from torch.nn.functional import logsigmoid

from gradwise.base.counting import counting
from gradwise.optim import XGD, CheckeredHead, CheckeredRegression, SumLogConcave, cross_gradient
from gradwise.optim.xgd import checkered_log_probs, checkered_log_terms, checkoid_log_probs, posterior
from gradwise.optim.xgd.checkered import random_posterior
from gradwise.training.closure import Closure
from tests.processes import two_processes

D = torch.float64


def normal(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def laws(n, S, seed=0):
    drawn = torch.empty(n, S, dtype=D).exponential_(generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.sum(-1, keepdim=True)


def signs(m, product):
    return torch.tensor([s for s in itertools.product((1.0, -1.0), repeat=m) if math.prod(s) == product], dtype=D)


# ------------------------------------------------------------------------------------------ the objective and lemma 1

CENTRES, SLOPES = normal(4, 3, seed=1, scale=2.0), normal(4, 3, seed=2, scale=2.0)
FAMILIES = {  # log p_k(t) of rows t [n, 3], each concave in t
    "gaussian": lambda t: -0.5 * (t[:, None] - CENTRES).square().sum(-1),
    "logistic": lambda t: (t[:, None] * SLOPES - 2 * functional.softplus(t[:, None] * SLOPES)).sum(-1),
    "gumbel": lambda t: -((t[:, None] - CENTRES) + torch.exp(CENTRES - t[:, None])).sum(-1),
    "sech": lambda t: (-(t[:, None] - CENTRES) - functional.softplus(-2 * (t[:, None] - CENTRES))).sum(-1),
    "checkered": lambda t: checkered_log_terms(t, (t[:, 0] > 9).long()),
}
NOT_CONCAVE = {"cauchy": lambda t: -torch.log1p((t[:, None] - CENTRES).square()).sum(-1)}


def slack(log_terms, t, s, mu):
    """Left side minus right side of lemma 1 (ii), row by row, as the paper writes it."""

    def parts(x):
        log_p = log_terms(x)
        return -log_p.exp().sum(-1).log(), log_p.exp() / log_p.exp().sum(-1, keepdim=True)

    def kl(p, q):
        return (p * (p / q).log()).sum(-1)

    leaf = t.clone().requires_grad_()
    (cross,) = torch.autograd.grad(-(mu * log_terms(leaf)).sum(), leaf)
    (F_t, w_t), (F_s, w_s) = parts(t), parts(s)
    return F_s - F_t - (cross * (s - t)).sum(-1) - kl(mu, w_t) + kl(mu, w_s)


def pairs(n=10_000):
    return normal(n, 3, seed=3), normal(n, 3, seed=4)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_inequalities_on_ten_thousand_pairs(family):
    log_terms, (t, s) = FAMILIES[family], pairs()
    F = SumLogConcave(log_terms)
    first = slack(log_terms, t, s, F.weights(s))
    second = slack(log_terms, t, s, laws(len(t), 4))
    assert first.min() > -1e-10
    assert second.min() > -1e-10
    assert first.mean() > 0.1
    w = F.weights(t)
    assert slack(log_terms, t, t, w).abs().max() < 1e-12
    torch.testing.assert_close(F.gap(t, s), first.sum())
    torch.testing.assert_close(F.gap(t, s, laws(len(t), 4)), second.sum())


def test_the_inequality_fails_with_the_divergence_on_the_wrong_side_and_without_log_concavity():
    t, s = pairs()
    for family in ("gaussian", "checkered"):
        F = SumLogConcave(FAMILIES[family])
        w, v = F.weights(t), F.weights(s)
        plain = slack(FAMILIES[family], t, s, w) - (w * (w / v).log()).sum(-1)  # ordinary convexity
        assert plain.min() < -0.01
        assert (plain + (w * (w / v).log()).sum(-1)).min() > -1e-10  # the divergence is what is missing
    log_terms = NOT_CONCAVE["cauchy"]
    assert slack(log_terms, t, s, SumLogConcave(log_terms).weights(s)).min() < -0.1


def test_the_slack_of_checkered_regression_is_a_bregman_divergence():
    """F = A(z) - logsumexp <s, z>/2 with A = sum log 2 cosh(z_j/2): both inequalities lose D_A(s, t) and no more."""
    t, s = pairs(1000)
    A = lambda z: torch.log(2 * torch.cosh(z / 2)).sum(-1)  # noqa: E731
    bregman = A(s) - A(t) - (torch.tanh(t / 2) / 2 * (s - t)).sum(-1)
    F = SumLogConcave(FAMILIES["checkered"])
    for mu in (F.weights(s), laws(1000, 4)):
        torch.testing.assert_close(slack(FAMILIES["checkered"], t, s, mu), bregman, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_regularised_loss_is_the_weighted_one_and_convex(family):
    log_terms, (t, s), mu = FAMILIES[family], pairs(500), laws(500, 4)
    F = SumLogConcave(log_terms)
    expected = (mu * (mu.log() - log_terms(t))).sum()
    torch.testing.assert_close(F.regularized(t, mu), expected)
    ends = [(mu * -log_terms(x)).sum(-1) for x in (t, s)]
    assert (((mu * -log_terms((t + s) / 2)).sum(-1)) <= (ends[0] + ends[1]) / 2 + 1e-12).all()


def test_the_loss_itself_is_not_convex():
    for name, log_terms in FAMILIES.items():
        t, s = pairs()
        F = [torch.logsumexp(log_terms(x), -1).neg() for x in (t, s, (t + s) / 2)]
        assert (F[2] > (F[0] + F[1]) / 2 + 0.01).any(), name


def test_gradients():
    t, e, mu = normal(3, seed=5), normal(3, seed=6), laws(1, 4)[0]
    log_terms = lambda x: FAMILIES["gaussian"](x[None])[0]  # noqa: E731
    F = SumLogConcave(log_terms)
    leaf = t.clone().requires_grad_()
    p = log_terms(leaf).exp()
    (expected,) = torch.autograd.grad(-p.sum().log(), leaf)
    torch.testing.assert_close(F.value(t), -p.detach().sum().log())
    torch.testing.assert_close(F.gradient(t), expected)
    torch.testing.assert_close(F.cross_gradient(t, point=t), expected)  # seen from itself
    torch.testing.assert_close(F.cross_gradient(t, mu), (mu[:, None] * (t - CENTRES)).sum(0))
    w = F.weights(e)
    torch.testing.assert_close(cross_gradient(log_terms, t, point=e), (w[:, None] * (t - CENTRES)).sum(0))
    assert (cross_gradient(log_terms, t, point=e) - expected).abs().max() > 0.01
    one = SumLogConcave(lambda x: log_terms(x)[:1])
    for law in (one.weights(e), torch.ones(1, dtype=D)):
        torch.testing.assert_close(one.cross_gradient(t, law), one.gradient(t), rtol=0, atol=0)


def test_a_sum_of_objectives_is_one_with_products_of_terms():
    """Propositions 3.1 and 4.1: the product law on the products of terms gives the sum of the cross-gradients."""
    t, (a, b) = normal(3, seed=5), laws(2, 4)
    shifted = lambda x: FAMILIES["gaussian"](x[None] - 0.3)[0]  # noqa: E731
    both = lambda x: torch.stack([FAMILIES["gumbel"](x[None])[0], shifted(x)])  # noqa: E731
    products = lambda x: (both(x)[0][:, None] + both(x)[1]).reshape(-1)  # noqa: E731
    rows, whole = SumLogConcave(both), SumLogConcave(products)
    torch.testing.assert_close(rows.value(t), whole.value(t))
    torch.testing.assert_close(rows.gradient(t), whole.gradient(t))
    law = (a[:, None] * b).reshape(-1)
    torch.testing.assert_close(rows.cross_gradient(t, torch.stack([a, b])), whole.cross_gradient(t, law))
    mean = SumLogConcave(both, reduction="mean")
    torch.testing.assert_close(2 * mean.gradient(t), rows.gradient(t))


def test_terms_of_minus_infinity_are_absent():
    t = normal(3, seed=5)
    some = lambda x: torch.cat([FAMILIES["gaussian"](x[None])[0], x.new_full((1,), -torch.inf)])  # noqa: E731
    all_ = SumLogConcave(lambda x: FAMILIES["gaussian"](x[None])[0])
    F = SumLogConcave(some)
    torch.testing.assert_close(F.gradient(t), all_.gradient(t))
    law = laws(1, 4)[0]
    torch.testing.assert_close(F.cross_gradient(t, torch.cat([law, law.new_zeros(1)])), all_.cross_gradient(t, law))
    assert F.weights(t)[-1] == 0
    assert F.gap(t, t + 1) > 0
    with pytest.raises(ValueError, match="-inf"):
        F.cross_gradient(t, torch.full((5,), 0.2))


@pytest.mark.parametrize(
    ("log_terms", "mu", "message"),
    [
        (lambda t: t * float("nan"), None, "NaN"),
        (lambda t: t / 0.0, None, "inf"),
        (lambda t: t.new_full((2, 3), -torch.inf), None, "-inf"),
        (lambda t: t.sum(), None, "shape"),
        (lambda t: -t.abs(), [0.5, 0.5, 0.1], "simplex"),
        (lambda t: -t.abs(), [-0.5, 0.5, 1.0], "simplex"),
        (lambda t: -t.abs(), [0.5, 0.5], "shape"),
    ],
)
def test_bad_terms_and_laws(log_terms, mu, message):
    F = SumLogConcave(log_terms)
    with pytest.raises(ValueError, match=message):
        F.value(torch.ones(3)) if mu is None else F.cross_gradient(torch.ones(3), mu)


def test_bad_calls():
    F = SumLogConcave(lambda t: t)
    for options in ({}, {"mu": [1.0], "point": torch.ones(1)}):
        with pytest.raises(ValueError, match="either"):
            F.cross_gradient(torch.ones(1), **options)
    with pytest.raises(TypeError, match="log_terms"):
        SumLogConcave(lambda t: t.long()).value(torch.ones(2))
    with pytest.raises(ValueError, match="reduction"):
        SumLogConcave(lambda t: t, reduction="none")


# --------------------------------------------------------------------------------------------------- checkered losses


@pytest.mark.parametrize("m", range(1, 7))
def test_product_form_sum_form_and_convolution_agree(m):
    z = normal(50, m, seed=m, scale=2.0)
    both = checkoid_log_probs(z)
    product = torch.tanh(z / 2).prod(-1)
    torch.testing.assert_close(both.exp(), torch.stack([1 - product, 1 + product], -1) / 2, rtol=1e-12, atol=1e-14)
    for y, eps in ((0, -1), (1, 1)):
        naive = sum(torch.sigmoid(s * z).prod(-1) for s in signs(m, eps)) if m else None
        torch.testing.assert_close(both[:, y].exp(), naive, rtol=1e-12, atol=1e-14)
        terms = checkered_log_terms(z, torch.full((50,), y))
        assert terms.shape == (50, 2 ** (m - 1))
        torch.testing.assert_close(terms.logsumexp(-1), both[:, y], rtol=1e-12, atol=1e-12)


def test_unlikely_classes_keep_their_accuracy():
    z = torch.tensor([[60.0, 50.0], [60.0, -50.0]], dtype=D)  # tanh products of +-1 in floating point
    both = checkoid_log_probs(z)
    least = torch.tensor(math.log(math.exp(-50) + math.exp(-60)), dtype=D)
    torch.testing.assert_close(torch.stack([both[0, 0], both[1, 1]]), least.expand(2))
    assert torch.isinf(torch.log1p(-torch.tanh(z / 2).prod(-1))[0])  # what the product form gives
    many = checkoid_log_probs(normal(4, 60, scale=100.0).requires_grad_())  # 2^59 terms
    assert many.isfinite().all()


@pytest.mark.parametrize(("m", "c"), [(1, 3), (2, 3), (3, 3), (4, 2), (2, 5), (5, 4)])
def test_sums_modulo_c_equal_enumeration_and_fft(m, c):
    logits = normal(20, m, c, seed=m + c, scale=1.5)
    p = logits.softmax(-1)
    naive = torch.zeros(20, c, dtype=D)
    for draw in itertools.product(range(c), repeat=m):
        naive[:, sum(draw) % c] += math.prod([p[:, k, d] for k, d in enumerate(draw)])
    found = checkered_log_probs(logits).exp()
    torch.testing.assert_close(found, naive, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found, torch.fft.ifft(torch.fft.fft(p).prod(-2)).real, rtol=1e-10, atol=1e-12)
    # the posterior of every draw, and the cross-gradient softmax - posterior, again by enumeration
    y = torch.arange(20) % c
    q, log_p = posterior(logits, y)
    expected = torch.zeros_like(q)
    for draw in itertools.product(range(c), repeat=m):
        share = math.prod([p[:, k, d] for k, d in enumerate(draw)]) * (sum(draw) % c == y)
        for k, d in enumerate(draw):
            expected[:, k, d] += share / naive[range(20), y]
    torch.testing.assert_close(q, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(log_p.exp(), naive[range(20), y])
    torch.testing.assert_close(q.sum(-1), torch.ones(20, m, dtype=D))


@pytest.mark.parametrize("m", range(1, 7))
def test_marginals_of_the_signs(m):
    """E[s_j | y] = (tanh_j + eps prod_others)/(1 + eps prod), and by enumeration; the gradient follows from it."""
    z = normal(30, m, seed=m)
    y = torch.arange(30) % 2
    q, _ = posterior(torch.stack([z, torch.zeros_like(z)], -1), 1 - y)
    tanh, eps = torch.tanh(z / 2), (2.0 * y - 1)[:, None]
    others = torch.stack([tanh[:, [i for i in range(m) if i != j]].prod(-1) for j in range(m)], -1)
    formula = (tanh + eps * others) / (1 + eps * tanh.prod(-1, keepdim=True))
    torch.testing.assert_close(2 * q[..., 0] - 1, formula, rtol=1e-10, atol=1e-12)
    for row in range(30):
        s = signs(m, 2 * int(y[row]) - 1)
        shares = torch.sigmoid(s * z[row]).prod(-1)
        torch.testing.assert_close(formula[row], (shares[:, None] * s).sum(0) / shares.sum(), rtol=1e-10, atol=1e-12)
    leaf = z.clone().requires_grad_()
    (slope,) = torch.autograd.grad(-checkoid_log_probs(leaf)[range(30), y].sum(), leaf)
    torch.testing.assert_close(slope, (tanh - formula) / 2, rtol=1e-10, atol=1e-12)
    assert slope.abs().max() < 1  # so that B = |x| sqrt(m) is a Lipschitz constant


@pytest.mark.parametrize(("m", "c"), [(1, 3), (2, 2), (3, 3), (4, 2)])
def test_drawn_posteriors_add_up_to_the_class(m, c):
    y = torch.arange(12) % c
    q = random_posterior((12,), m, c, y, torch.Generator().manual_seed(0))
    torch.testing.assert_close(q.sum(-1), torch.ones(12, m, dtype=D))
    if m == 1:
        assert torch.equal(q[:, 0], functional.one_hot(y, c).double())
    if (m, c) == (2, 2):  # one free number: both draws agree where the class is even, else they differ
        torch.testing.assert_close(q[:, 1], torch.where((y == 0)[:, None], q[:, 0], q[:, 0].flip(-1)))


def test_the_head_is_an_ordinary_layer():
    torch.manual_seed(0)
    x, y = torch.randn(40, 6), torch.randint(0, 2, (40,))
    head = CheckeredHead(6, 1)
    z = head.hyperplanes(x)[:, 0]
    torch.testing.assert_close(head(x), torch.stack([logsigmoid(-z), logsigmoid(z)], -1))
    for m, c, size in ((3, 2, 3), (2, 4, 8), (1, 4, 4)):
        head = CheckeredHead(6, m, c)
        assert head.hyperplanes.weight.shape == (size, 6)
        torch.testing.assert_close(head(x.reshape(5, 8, 6)).exp().sum(-1), torch.ones(5, 8))
        if m == 1:
            torch.testing.assert_close(head(x), head.hyperplanes(x).log_softmax(-1))
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), CheckeredHead(8, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = functional.nll_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    for options in ({"in_features": 0}, {"n_hyperplanes": 0}, {"n_classes": 1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            CheckeredHead(**{"in_features": 3, **options})
    with pytest.raises(ValueError, match="2\\^10 terms"):
        checkered_log_terms(torch.zeros(1, 11), torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match="classes 0 and 1"):
        checkered_log_terms(torch.zeros(1, 2), torch.tensor([2]))


# ------------------------------------------------------------------------------------------------------ the optimiser


def problem(n=30, d=3, m=2, seed=0):
    """Data of a parity of two signs, and the closure of log-terms as a function of the hyperplanes T [m, d]."""
    x = normal(n, d, seed=seed)
    y = (x[:, 0] * x[:, 1] > 0).long()
    T = nn.Parameter(normal(m, d, seed=seed + 1, scale=0.5))
    return T, lambda: checkered_log_terms(x @ T.T, y), (x, y)


def run(T, closure, steps, **options):
    optimizer = XGD([T], **options)
    return [float(optimizer.step(closure)) for _ in range(steps)], optimizer


MU = torch.tensor([0.3, 0.7], dtype=D)


@pytest.mark.parametrize(
    ("options", "law"),
    [
        ({"mu": "uniform"}, lambda k, w: torch.full_like(w[0], 0.5)),
        ({"mu": MU}, lambda k, w: MU),
        ({"mu": laws(30, 2)}, lambda k, w: laws(30, 2)),
        ({"weights": "current"}, lambda k, w: w[k]),
        ({"weights": "lagged", "refresh": 3}, lambda k, w: w[k - k % 3]),
        ({"weights": "fixed+gd", "switch": 4, "mu": MU}, lambda k, w: MU if k < 4 else w[k]),
    ],
)
def test_policies_are_the_update_of_the_paper(options, law):
    T, closure, (x, y) = problem()
    run(T, closure, 8, lr=0.3, **options)
    S = problem()[0].detach()
    w = []
    for k in range(8):
        leaf = S.clone().requires_grad_()
        terms = checkered_log_terms(x @ leaf.T, y)
        w.append(terms.detach().softmax(-1))
        (slope,) = torch.autograd.grad(-(law(k, w) * terms).sum(-1).mean(), leaf)
        S = S - 0.3 * slope
    torch.testing.assert_close(T.detach(), S)


def test_current_weights_are_gradient_descent():
    T, closure, (x, y) = problem()
    losses, optimizer = run(T, closure, 20, lr=0.5, weights="current", weight_decay=0.01)
    U = nn.Parameter(problem()[0].detach().clone())
    sgd = torch.optim.SGD([U], lr=0.5, weight_decay=0.01)
    for value in losses:
        loss = functional.nll_loss(checkoid_log_probs(x @ U.T), y)
        assert value == pytest.approx(loss.item())
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    torch.testing.assert_close(T.detach(), U.detach())
    assert optimizer.stats["kl"] == pytest.approx(0, abs=1e-12)


def test_one_term_makes_all_policies_one():
    x = normal(30, 3)
    found = []
    for options in (
        {"mu": "uniform"},
        {"mu": "dirichlet"},
        {"mu": torch.ones(1, dtype=D)},
        {"weights": "current"},
        {"weights": "lagged"},
        {"weights": "fixed+gd", "switch": 3},
    ):
        T = nn.Parameter(normal(1, 3, seed=1))
        run(T, lambda: logsigmoid(x @ T.T), 10, lr=0.5, **options)  # noqa: B023
        found.append(T.detach())
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_theorem_4_2_along_the_run():
    """F = -log Xi_2 from (-3, 4): the bound at every T, and the limit lies below every point seen alike."""
    mu = torch.sigmoid(torch.tensor([2.0, -2.0], dtype=D))  # w(e) = mu where e_1 + e_2 = 2
    one = torch.ones(1, dtype=torch.long)
    terms = lambda t: checkered_log_terms(t[None], one)  # noqa: E731
    F = SumLogConcave(terms)
    free = torch.linspace(-4, 6, 101, dtype=D)
    alike = torch.stack([free, 2 - free], 1)
    torch.testing.assert_close(checkered_log_terms(alike, one.expand(101)).softmax(-1), mu.expand(101, 2))
    values = -checkoid_log_probs(alike)[:, 1]
    B = math.sqrt(2)
    start = torch.tensor([-3.0, 4.0], dtype=D)
    for schedule, lr in (("inv_sqrt", 2.0), ("constant", 1.0)):
        t = nn.Parameter(start.clone())
        optimizer = XGD([t], lr=lr, mu=mu, schedule=schedule)
        losses = torch.tensor([float(optimizer.step(lambda: terms(t))) for _ in range(300)], dtype=D)  # noqa: B023
        n = torch.arange(1, 301, dtype=D)
        gamma = lr / n.sqrt() if schedule == "inv_sqrt" else torch.full_like(n, lr)
        total = gamma.cumsum(0)
        left = (gamma * losses).cumsum(0) / total - values[:, None]
        distance = (start - alike).square().sum(1)
        right = (distance[:, None] + B**2 * gamma.square().cumsum(0)) / (2 * total)
        assert (left <= right + 1e-12).all()
        assert not (left <= right / 4).all()  # the right side is of the left side's order
        limit = t.detach()
        torch.testing.assert_close(limit, torch.full((2,), 2.0, dtype=D), atol=2e-2, rtol=0)
        gain = (mu * (mu / F.weights(limit)[0]).log()).sum()
        assert F.value(limit) <= values.min() - gain + 1e-6
        assert F.value(limit) == pytest.approx(0.236, abs=1e-3)
        assert values.min() == pytest.approx(0.4995, abs=1e-3)


def test_lagged_weights_never_raise_the_loss_over_a_refresh():
    """Gradient EM: the inner loops descend a majoriser that touches F at the refresh. Fixed weights raise F."""
    for seed in range(2):
        T, closure, _ = problem(seed=seed)
        losses, _ = run(T, closure, 81, lr=1.0, weights="lagged", refresh=10)
        at = torch.tensor(losses[::10])
        assert (at.diff() <= 1e-12).all()
        assert at[-1] < at[0]
        T, closure, _ = problem(seed=seed)
        assert run(T, closure, 60, weights="current", lr=3.0)[0][-1] < 0.3
        losses, _ = run(T, closure, 60, lr=1.0, mu="uniform")
        assert losses[-1] > losses[0] + 0.1


def test_it_leaves_the_saddle_on_which_descent_stays():
    _, _, (x, y) = problem(100, 2)
    found = {}
    for policy in ("current", "fixed+gd"):
        T = nn.Parameter(torch.zeros(2, 2, dtype=D))
        losses, _ = run(T, lambda: checkered_log_terms(x @ T.T, y), 160, lr=4.0, weights=policy, switch=20)  # noqa: B023
        found[policy] = losses[-1]
        assert losses[0] == pytest.approx(math.log(2))
    assert found["current"] == pytest.approx(math.log(2), abs=1e-12)
    assert found["fixed+gd"] < 0.2


def test_reference_weights_are_those_of_the_point():
    T, closure, (x, y) = problem()
    point = normal(2, 3, seed=9)
    with counting() as counts:
        _, optimizer = run(T, closure, 5, lr=0.3, weights="reference", reference=[point])
    assert counts.forward == 1
    assert counts.gradient == 5
    U, other, _ = problem()
    run(U, other, 5, lr=0.3, mu=checkered_log_terms(x @ point.T, y).softmax(-1))
    assert torch.equal(T, U)
    assert optimizer.stats["kl"] > 0


@pytest.mark.parametrize(
    "options",
    [{"mu": "dirichlet"}, {"weights": "lagged", "refresh": 2}, {"weights": "reference", "reference": [normal(2, 3)]}],
)
def test_mini_batches_keep_every_rows_law(options):
    """Two half-batches at rate zero, then one batch: the same laws as from whole batches, and the same step."""
    T, closure, (x, y) = problem()
    optimizer = XGD([T], lr=0.0, n_samples=30, generator=3, **options)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    for index in order.split(15):
        optimizer.step(lambda: checkered_log_terms(x[index] @ T.T, y[index]), index)  # noqa: B023
    U, other, _ = problem()
    whole = XGD([U], lr=0.0, generator=3, **options)
    for _ in range(2):
        whole.step(other)
    for o, step in ((optimizer, closure), (whole, other)):
        o.param_groups[0]["lr"] = 0.5
        o.step(step)
    torch.testing.assert_close(T.detach(), U.detach())


@pytest.mark.parametrize("options", [{"mu": "dirichlet"}, {"weights": "lagged", "refresh": 2}, {"weights": "current"}])
def test_micro_batches_equal_the_whole(options):
    T, closure, (x, y) = problem()
    losses, whole = run(T, closure, 5, lr=0.5, n_samples=30, **options)
    U = problem()[0]
    parts = [lambda rows=rows: checkered_log_terms(x[rows] @ U.T, y[rows]) for rows in torch.arange(30).split(11)]
    closure = Closure(lambda: torch.cat([part() for part in parts]), needs="losses", micro=parts)
    pieces, optimizer = run(U, closure, 5, lr=0.5, n_samples=30, **options)
    torch.testing.assert_close(T.detach(), U.detach())
    assert pieces == pytest.approx(losses)
    for name in ("loss", "grad_norm", "entropy", "kl"):
        assert optimizer.stats[name] == pytest.approx(whole.stats[name], abs=1e-12), name


def test_stats_and_cost():
    T, closure, _ = problem()
    with counting() as counts:
        losses, optimizer = run(T, closure, 3, lr=0.1, mu=MU)
    assert counts.gradient_equivalents() == 3
    before = problem()
    run(before[0], before[1], 2, lr=0.1, mu=MU)
    terms = before[1]().detach()  # at the point where the third step was made
    w = terms.softmax(-1)
    assert losses[-1] == optimizer.stats["loss"] == pytest.approx(float(-terms.exp().sum(1).log().mean()))
    assert optimizer.stats["entropy"] == pytest.approx(float(-(w * w.log()).sum(1).mean()))
    assert optimizer.stats["kl"] == pytest.approx(float((MU * (MU / w).log()).sum(1).mean()))


POLICIES = [
    {"mu": "dirichlet"},
    {"mu": laws(30, 2)},
    {"weights": "fixed+gd", "switch": 4},
    {"weights": "lagged", "refresh": 4},
    {"weights": "reference", "reference": [normal(2, 3)]},
    {"weights": "current", "schedule": "inv_sqrt"},
]


@pytest.mark.parametrize("options", POLICIES)
def test_a_resumed_run_is_bit_equal(options):
    T, closure, _ = problem()
    _, optimizer = run(T, closure, 3, lr=0.5, generator=5, **options)
    file = io.BytesIO()
    torch.save((T, optimizer.state_dict()), file)
    file.seek(0)
    kept, state = torch.load(file, weights_only=False)
    file.seek(0)
    U, other, _ = problem()
    with torch.no_grad():
        U.copy_(kept)
    resumed = XGD([U], lr=0.5, generator=6, **options)
    resumed.load_state_dict(state)
    twin, copied = copy.deepcopy((T, optimizer))
    pickled = pickle.loads(pickle.dumps(optimizer))
    for _ in range(5):
        optimizer.step(closure)
        resumed.step(other)
    assert torch.equal(T, U)
    assert optimizer.stats == resumed.stats
    assert copied.steps == pickled.steps == 3
    assert copied.param_groups[0]["params"][0] is twin
    if options.get("mu") == "dirichlet":  # without the state the laws would be others
        V, other, _ = problem()
        run(V, other, 8, lr=0.5, generator=6, **options)
        assert not torch.equal(T, V)


@pytest.mark.parametrize("options", POLICIES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nothing_that_is_not_finite_reaches_weights_or_laws(options, bad):
    T, closure, _ = problem()
    _, optimizer = run(T, closure, 4, lr=0.5, **options)
    U, other, _ = problem()
    _, twin = run(U, other, 4, lr=0.5, **options)
    before = T.detach().clone()

    def broken():
        terms = closure()
        spoilt = torch.zeros_like(terms)
        spoilt[3] = bad
        return terms + spoilt

    with pytest.raises(
        FloatingPointError if bad != -float("inf") or twin.policy in ("current", "lagged") else ValueError
    ):
        optimizer.step(broken)
    assert torch.equal(before, T)
    assert T.grad is None
    for _ in range(3):
        optimizer.step(closure)
        twin.step(other)
    assert torch.equal(T, U)


def test_a_bad_mini_batch_leaves_no_law_behind():
    T, closure, (x, y) = problem()
    optimizer = XGD([T], lr=0.5, weights="lagged", refresh=9, n_samples=30)
    first, second = torch.arange(30).split(15)
    optimizer.step(lambda: closure()[first], first)
    with pytest.raises(FloatingPointError):  # rows that are seen for the first time
        optimizer.step(lambda: closure()[second] * float("nan"), second)
    w = checkered_log_terms(x[second] @ T.detach().T, y[second]).softmax(-1)
    optimizer.step(lambda: closure()[second], second)
    torch.testing.assert_close(optimizer.state_dict()["method"]["table"][second], w)
    assert optimizer.stats["skipped"] == 1


def test_groups_tied_empty_and_half_precision_parameters():
    x, y = normal(30, 3).float(), (torch.arange(30) % 2)
    a, b, spare, empty = (nn.Parameter(t) for t in (torch.ones(1, 3), torch.ones(1, 3), torch.ones(2), torch.zeros(0)))
    optimizer = XGD([{"params": [a, spare, empty]}, {"params": [b], "lr": 0.0}], lr=0.1, weight_decay=0.1)
    optimizer.step(lambda: checkered_log_terms(x @ torch.cat([a, b]).T + empty.sum(), y))
    assert torch.equal(b, torch.ones(1, 3))
    assert torch.equal(spare, torch.ones(2))
    assert not torch.equal(a, torch.ones(1, 3))
    T = nn.Parameter(torch.zeros(2, 3, dtype=torch.bfloat16))
    losses, _ = run(T, lambda: checkered_log_terms(x.bfloat16() @ T.T, y), 30, lr=0.5)
    assert T.dtype == torch.bfloat16
    assert T.isfinite().all()
    assert losses[0] == pytest.approx(math.log(2), abs=1e-2)
    generator = torch.get_rng_state()
    T, closure, _ = problem()
    run(T, closure, 2, weights="lagged")
    assert torch.equal(generator, torch.get_rng_state())


def test_dropout_draws_alike_at_the_reference():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2, dtype=D), nn.BatchNorm1d(2, dtype=D))
    x, y = normal(30, 3), torch.arange(30) % 2
    closure = Closure(lambda: checkered_log_terms(model(x), y), needs="losses", module=model)
    here = [p.detach().clone() for p in model.parameters()]
    optimizer = XGD(model.parameters(), lr=0.1, weights="reference", reference=here)
    torch.manual_seed(3)
    optimizer.step(closure)
    assert optimizer.stats["kl"] == pytest.approx(0, abs=1e-12)  # the reference is the present point
    assert model[2].num_batches_tracked == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "em"}, "weights"),
        ({"schedule": "cosine"}, "schedule"),
        ({"lr": -1.0}, "lr"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"switch": -1}, "switch"),
        ({"refresh": 0}, "refresh"),
        ({"concentration": 0.0}, "concentration"),
        ({"n_samples": 0}, "n_samples"),
        ({"mu": "flat"}, "mu"),
        ({"mu": torch.tensor([0.5, 0.4])}, "simplex"),
        ({"mu": torch.ones(1, 1, 1)}, "shape"),
        ({"mu": laws(30, 2), "n_samples": 29}, "n_samples"),
        ({"weights": "reference"}, "reference"),
        ({"reference": [torch.ones(2, 3)]}, "reference"),
        ({"weights": "reference", "reference": [torch.ones(3)]}, "one tensor per parameter"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        XGD([problem()[0]], **options)


def test_bad_steps():
    T, closure, _ = problem()
    with pytest.raises(TypeError, match="mu must be"):
        XGD([T], mu=0.5)
    optimizer = XGD([T])
    before = T.detach().clone()
    for bad, error in (
        (None, TypeError),
        (lambda: 1.0, TypeError),
        (lambda: closure().detach(), TypeError),
        (lambda: closure().sum(), ValueError),
        (lambda: closure()[:0], ValueError),
    ):
        with pytest.raises(error):
            optimizer.step(bad)

    def backward():
        terms = closure()
        terms.sum().backward(retain_graph=True)
        return terms

    with pytest.raises(RuntimeError, match="backward"):
        optimizer.step(backward)
    optimizer.step(closure)
    with pytest.raises(ValueError, match="29 rows"):
        optimizer.step(lambda: closure()[:29])
    with pytest.raises(ValueError, match="index must lie"):
        optimizer.step(closure, torch.arange(1, 31))
    with pytest.raises(ValueError, match="index names 29"):
        optimizer.step(closure, torch.arange(29))
    with pytest.raises(ValueError, match="index names 30"):
        optimizer.step(lambda: closure()[:29], torch.arange(30))
    with pytest.raises(ValueError, match="need n_samples"):
        XGD([T]).step(closure, torch.arange(30))
    for mu in (torch.tensor([0.2, 0.3, 0.5]), laws(30, 3)):
        with pytest.raises(ValueError, match="3 terms"):
            XGD([T], mu=mu).step(closure)
    absent = lambda: torch.cat([closure(), closure()[:, :1] - torch.inf], 1)  # noqa: E731
    with pytest.raises(ValueError, match="-inf"):
        XGD([T]).step(absent)
    assert not torch.equal(before, T)
    XGD([T], mu=torch.tensor([0.5, 0.5, 0.0])).step(absent)
    with pytest.raises(TypeError, match="complex64"):
        XGD([nn.Parameter(torch.ones(2, dtype=torch.complex64))])


class Sharded(nn.Parameter):
    placements = ()


def test_sharded_parameters_are_refused():
    with pytest.raises(TypeError, match="sharded"):
        XGD([Sharded(torch.ones(2))])


def train_replicas(rank):
    x, y = normal(20, 3), torch.arange(20) % 2
    model = nn.Linear(3, 2, dtype=D)
    with torch.no_grad():
        model.weight.copy_(normal(2, 3, seed=1))
        model.bias.zero_()
    replica = nn.parallel.DistributedDataParallel(model)
    rows = slice(10 * rank, 10 * rank + 10)
    optimizer = XGD(model.parameters(), lr=0.5, mu=laws(20, 2)[rows], model=replica)
    for _ in range(5):
        optimizer.step(lambda: checkered_log_terms(replica(x[rows]), y[rows]))
    return {rank: model.weight}


@pytest.mark.distributed
def test_processes_step_as_one_on_the_joined_batch():
    found = two_processes(train_replicas)
    assert torch.equal(found[0], found[1])
    x, y = normal(20, 3), torch.arange(20) % 2
    T, b = nn.Parameter(normal(2, 3, seed=1)), nn.Parameter(torch.zeros(2, dtype=D))
    optimizer = XGD([T, b], lr=0.5, mu=laws(20, 2))
    for _ in range(5):
        optimizer.step(lambda: checkered_log_terms(x @ T.T + b, y))
    torch.testing.assert_close(found[0], T.detach())


# ----------------------------------------------------------------------------------------------------- the classifier


def xor(n=100, d=2, m=2, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.choice([-1.0, 1.0], (n, d)) + 0.25 * rng.normal(size=(n, d))
    return X, (X[:, :m].prod(1) > 0).astype(int)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
def test_scikit_learn_accepts_it():
    check_estimator(CheckeredRegression(max_iter=30, n_restarts=1))


@pytest.mark.parametrize("options", [{}, {"weights": "lagged"}, {"init": "cross"}])
def test_it_solves_parities(options):
    X, y = xor()
    model = CheckeredRegression(random_state=0, max_iter=120, n_restarts=3, **options).fit(X, y)
    assert model.score(X, y) > 0.98
    assert LogisticRegression().fit(X, y).score(X, y) < 0.65
    assert model.coef_.shape == (2, 2)
    assert model.intercept_.shape == (2,)
    z = torch.from_numpy(X @ model.coef_.T + model.intercept_)
    np.testing.assert_allclose(model.predict_proba(X), checkoid_log_probs(z).exp(), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(np.exp(model.predict_log_proba(X)), model.predict_proba(X))


def test_three_hyperplanes_three_signs_and_two_do_not():
    X, y = xor(200, 3, 3)
    options = {"random_state": 0, "n_restarts": 8, "max_iter": 120}
    assert CheckeredRegression(3, **options).fit(X, y).score(X, y) > 0.97
    assert CheckeredRegression(2, **options).fit(X, y).score(X, y) < 0.9


def test_three_classes_that_add_up():
    """The class is the sum modulo 3 of two ternary digits: 9 clusters, 3 colours."""
    rng = np.random.default_rng(0)
    digits = rng.integers(0, 3, (200, 2))
    corners = np.array([[0.0, 1.0], [0.87, -0.5], [-0.87, -0.5]])
    X = np.concatenate([corners[digits[:, 0]], corners[digits[:, 1]]], 1) + 0.1 * rng.normal(size=(200, 4))
    y = np.array(["a", "b", "c"])[digits.sum(1) % 3]
    model = CheckeredRegression(random_state=0, max_iter=120).fit(X, y)
    assert model.score(X, y) > 0.97
    assert LogisticRegression().fit(X, y).score(X, y) < 0.6
    assert model.coef_.shape == (2, 3, 4)
    assert model.intercept_.shape == (2, 3)
    np.testing.assert_allclose(model.predict_proba(X).sum(1), 1)


def test_one_hyperplane_is_logistic_regression():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(150, 3)) * [1.0, 3.0, 10.0] + 5
    y = np.where(X @ [1.0, -0.5, 0.1] + rng.normal(size=150) > 3, "yes", "no")
    ours = CheckeredRegression(1, l2=0.0, max_iter=2000, n_restarts=1, random_state=0).fit(X, y)
    theirs = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(X, y)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-3)
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), atol=1e-4)
    assert (ours.predict(X) == theirs.predict(X)).all()
    assert ours.n_iter_ < 2000


@pytest.mark.parametrize(("m", "c"), [(1, 2), (2, 2), (3, 2), (2, 3)])
@pytest.mark.parametrize("weights", ["current", "lagged"])
def test_the_objective_never_rises(m, c, weights):
    """With lr = 1 the step is one over a bound of the curvature; two and a half times that does rise."""
    rng = np.random.default_rng(m)
    X, y = rng.normal(size=(80, 4)) @ rng.normal(size=(4, 4)), rng.integers(0, c, 80)
    model = CheckeredRegression(m, weights, max_iter=60, n_restarts=2, random_state=0, l2=1e-2, tol=0.0).fit(X, y)
    curve = model.loss_curve_[:: 20 if weights == "lagged" else 1]
    assert (np.diff(curve) <= 1e-12).all()
    assert len(model.loss_curve_) == 61
    assert model.loss_curve_[-1] == model.restart_losses_.min()


def test_steps_beyond_the_bound_can_rise():
    x = np.linspace(-1, 1, 40)[:, None]
    y = (np.arange(40) % 2).astype(int)
    curve = CheckeredRegression(1, lr=9.0, max_iter=20, n_restarts=1, random_state=0).fit(x, y).loss_curve_
    assert (np.diff(curve) > 0).any()


def test_its_steps_are_those_of_the_optimiser():
    """Standardised columns, one start: the run of XGD on the enumerated terms, with current and with lagged weights."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 3))
    X = (X - X.mean(0)) / X.std(0)
    y = (X[:, 0] * X[:, 1] > 0).astype(int)
    wide = torch.from_numpy(np.concatenate([X, np.ones((60, 1))], 1))
    bound = float(torch.linalg.eigvalsh(wide.T @ wide / 60)[-1]) / 4
    for weights in ("current", "lagged"):
        options = {"max_iter": 30, "n_restarts": 1, "l2": 0.0, "random_state": 0}
        model = CheckeredRegression(3, weights, refresh=7, **options).fit(X, y)
        start = torch.randn(1, 3, 1, 4, generator=torch.Generator().manual_seed(0), dtype=D) / 2
        T = nn.Parameter(start[0, :, 0])
        closure = lambda: checkered_log_terms(wide @ T.T, torch.from_numpy(y))  # noqa: B023, E731
        losses, _ = run(T, closure, 30, lr=1 / bound, weights=weights, refresh=7)
        np.testing.assert_allclose(model.loss_curve_[:-1], losses, rtol=1e-9)
        np.testing.assert_allclose(model.coef_, T.detach()[:, :3], rtol=1e-7)
        np.testing.assert_allclose(model.intercept_, T.detach()[:, 3], rtol=1e-7)


def test_predictions_are_the_same_under_the_symmetries():
    X, y = xor()
    model = CheckeredRegression(random_state=0, max_iter=20, n_restarts=1).fit(X, y)
    proba = model.predict_proba(X)
    model.coef_, model.intercept_ = -model.coef_[::-1], -model.intercept_[::-1]
    np.testing.assert_allclose(model.predict_proba(X), proba)


def test_many_hyperplanes_units_and_constant_columns():
    X, y = xor(60)
    model = CheckeredRegression(24, max_iter=10, n_restarts=1, random_state=0).fit(X, y)  # 2^23 terms
    assert np.isfinite(model.predict_log_proba(X)).all()
    plain = CheckeredRegression(random_state=0, max_iter=120).fit(X, y)
    other = np.concatenate([X * [1e4, 1e-4] + 1e3, np.full((60, 1), 7.0)], 1)
    scaled = CheckeredRegression(random_state=0, max_iter=120).fit(other, y)
    assert scaled.score(other, y) == plain.score(X, y)
    assert (scaled.coef_[:, 2] == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_hyperplanes": 0}, "n_hyperplanes"),
        ({"max_iter": 0}, "max_iter"),
        ({"n_restarts": 0}, "n_restarts"),
        ({"refresh": 0}, "refresh"),
        ({"weights": "fixed"}, "weights"),
        ({"init": "zero"}, "init"),
        ({"lr": 0.0}, "lr"),
        ({"l2": -1.0}, "l2"),
        ({"tol": -1.0}, "tol"),
    ],
)
def test_bad_arguments_of_the_classifier(options, message):
    with pytest.raises(ValueError, match=message):
        CheckeredRegression(**options).fit(*xor(20))


def test_bad_data_of_the_classifier():
    X, y = xor(20)
    with pytest.raises(ValueError, match="one class"):
        CheckeredRegression().fit(X, np.zeros(20))
    with pytest.raises(ValueError, match="NaN"):
        CheckeredRegression().fit(np.full((20, 2), np.nan), y)
    with pytest.raises(TypeError, match="n_hyperplanes"):
        CheckeredRegression(2.0).fit(X, y)
    with pytest.raises(FloatingPointError, match="lr"):
        CheckeredRegression(lr=1e308, l2=1.0, max_iter=9, random_state=0).fit(X, y)
