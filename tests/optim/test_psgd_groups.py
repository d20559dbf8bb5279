"""The groups against dense linear algebra and against the paper's updates written out with full matrices."""

import itertools
import math

import pytest
import torch

from gradwise.optim.psgd import groups
from gradwise.optim.psgd.groups import LRA, Dense, Diag, Kron, XMat, norm_estimate

F64 = {"dtype": torch.float64}
SHAPES = [(4, 3), (5,), (2, 3, 2), (4, 3), (1, 3), ()]
BUILD = {
    "diag": lambda d=7, g=None: Diag(d, generator=g, **F64),
    "xmat": lambda d=8, g=None: XMat(d, generator=g, **F64),
    "xmat_odd": lambda d=9, g=None: XMat(d, generator=g, **F64),
    "lra": lambda d=9, g=None: LRA(d, 3, generator=g, **F64),
    "dense": lambda d=6, g=None: Dense(d, generator=g, **F64),
    "kron": lambda d=None, g=None: Kron(SHAPES, generator=g, **F64),
    "kron_diagonal_sides": lambda d=None, g=None: Kron(SHAPES, max_size=3, generator=g, **F64),
}
every_group = pytest.mark.parametrize("name", BUILD)
normalizers = pytest.mark.parametrize("normalizer", ["2nd", "1st"])


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, g):
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def pairs(d, n, seed=1):
    """Probes and products with an indefinite Hessian."""
    g = stream(seed)
    H = randn(d, d, g=g)
    H = H + H.mT
    for _ in range(n):
        v = randn(d, g=g)
        yield v, H @ v


def trained(name, n=30):
    P = BUILD[name](g=stream())
    for v, h in pairs(P.d, n):
        assert P.update(v, h)
    return P


def columns(f, d):
    """The matrix of a linear map."""
    return torch.stack([f(e) for e in torch.eye(d, **F64)], 1)


def matricised(P):
    """Positions in the vector of every tensor's matrix: all divisions of the axes, smallest sum of squares."""
    start = 0
    for shape in SHAPES:
        n = math.prod(shape)
        index = torch.arange(start, start + n).view(shape)
        best = None
        for k in range(len(shape) + 1):
            for rows in itertools.combinations(range(len(shape)), k):
                m = math.prod(shape[a] for a in rows)
                cost = m**2 + (n // m) ** 2
                if best is None or cost < best[0]:
                    best = (cost, rows, m)
        _, rows, m = best
        order = [*rows, *(a for a in range(len(shape)) if a not in rows)]
        yield index.permute(order).reshape(m, -1)
        start += n


def factor(P):
    """Q as a dense matrix, from the state alone."""
    s, d = P.state, P.d
    if isinstance(P, Diag):
        return torch.diag(s["q"])
    if isinstance(P, XMat):
        a, b = (
            torch.cat([s[k][0], middle, s[k][1].flip(0)]) for k, middle in (("a", s["middle"]), ("b", 0 * s["middle"]))
        )
        return torch.diag(a) + torch.diag(b).flip(1)
    if isinstance(P, LRA):
        U, V = s["W"][: P.rank].mT, s["W"][P.rank :].mT
        return (torch.eye(d, **F64) + U @ V.mT) @ torch.diag(s["q"])
    if isinstance(P, Dense):
        return s["Q"]
    Q = torch.zeros(d, d, **F64)
    for k, (_, views) in enumerate(P.stacks):
        for j, view in enumerate(views):
            left, right = (f if f.ndim == 2 else torch.diag(f) for f in (s[f"{k}.left"][j], s[f"{k}.right"][j]))
            cells = view.of(torch.arange(d)).reshape(view.sides).reshape(-1)
            Q[cells[:, None], cells] = torch.kron(left, right)  # row-major: vec(Q1 G Q2')
    return Q


@every_group
def test_formulas_are_dense_linear_algebra(name):
    P = trained(name)
    Q = factor(P)
    g = stream(5)
    v, h, x = (randn(P.d, g=g) for _ in range(3))
    a, b = P.whiten(v, h)
    torch.testing.assert_close(a, Q @ h, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(b, torch.linalg.inv(Q).mT @ v, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(P.apply(x), Q.mT @ Q @ x, rtol=1e-10, atol=1e-10)
    expected = h @ Q.mT @ Q @ h + v @ torch.linalg.solve(Q.mT @ Q, v)
    torch.testing.assert_close(P.criterion(v, h), expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(Q.mT @ Q, torch.eye(P.d, **F64) * (Q.mT @ Q)[0, 0], rtol=0.1)  # there is something to see


# the paper's updates with full matrices


def size_of(a, b, second):
    """Of aa' + bb' or aa' - bb' where nothing better is said."""
    return (a.square() + b.square()).max() if second else (a.square() - b.square()).abs().max()


def naive_diag(Q, v, h, step, second):
    a, b = Q @ h, torch.linalg.inv(Q).mT @ v
    E = torch.diag(a.square() - b.square())
    return Q - step / size_of(a, b, second) * E @ Q


def naive_xmat(Q, v, h, step, second):
    d = len(v)
    a, b = Q @ h, torch.linalg.inv(Q).mT @ v
    on_cross = torch.eye(d, dtype=torch.bool) | torch.eye(d, dtype=torch.bool).flip(1)
    full = torch.outer(a, a) - torch.outer(b, b)
    E = torch.where(on_cross, full, 0.0)
    anti = full.flip(1).diagonal().clone()
    if d % 2:
        anti[d // 2] = 0
    size = (a.square() + b.square()).max() if second else full.diagonal().abs().max() + anti.abs().max()
    return Q - step / size * E @ Q


def naive_dense(Q, v, h, step, second):
    a, b = Q @ h, torch.linalg.inv(Q).mT @ v
    E = torch.outer(a, a) - torch.outer(b, b)
    size = a @ a + b @ b if second else torch.linalg.matrix_norm(E, 2)
    return Q - step / size * E.triu() @ Q


NAIVE = {
    "diag": naive_diag,
    "xmat": naive_xmat,
    "xmat_odd": naive_xmat,
    "dense": naive_dense,
}


@normalizers
@pytest.mark.parametrize("name", NAIVE)
def test_updates_are_the_projected_gradient_step_on_the_group(name, normalizer):
    P = BUILD[name]()
    P.set_scale(0.7)
    Q = factor(P).clone()
    for v, h in pairs(P.d, 40):
        Q = NAIVE[name](Q, v, h, 0.1, normalizer == "2nd")
        P.update(v, h, 0.1, normalizer=normalizer)
    torch.testing.assert_close(factor(P), Q, rtol=1e-9, atol=1e-9)


@normalizers
@pytest.mark.parametrize("refresh", [1, 7, 1000])
def test_low_rank_updates_with_full_matrices(normalizer, refresh, monkeypatch):
    """U and V as in the paper, whatever is carried along in the Gram matrix; coins drawn from the same stream."""
    monkeypatch.setattr(groups, "REFRESH", refresh)
    monkeypatch.setattr(groups, "BALANCE", 0.2)
    d, r, second = 9, 3, normalizer == "2nd"
    P, coins = LRA(d, r, generator=stream(3), **F64), stream(3)
    start = torch.randn(2 * r, d, generator=coins, dtype=torch.float64) / math.sqrt(d * (r + 10))
    U, V, q, eye = start[:r].mT, start[r:].mT, torch.full((d,), 0.5, **F64), torch.eye(r, **F64)
    P.set_scale(0.5)
    moved = set()
    for v, h in pairs(d, 120):
        Q = (torch.eye(d, **F64) + U @ V.mT) @ torch.diag(q)
        PP = Q.mT @ Q
        a, b = Q @ h, torch.linalg.inv(Q).mT @ v
        ph, pv = PP @ h, torch.linalg.solve(PP, v)
        slope = ph * h - v * pv
        bound = ((ph.square() + v.square()).sqrt() * (h.square() + pv.square()).sqrt()).max()
        q = q - 0.1 / (bound if second else slope.abs().max()) * slope * q
        if torch.rand((), generator=coins) < 0.5:
            E = torch.outer(a, V @ (V.mT @ a)) - torch.outer(b, V @ (V.mT @ b))
            size = a.norm() * (V @ (V.mT @ a)).norm() + b.norm() * (V @ (V.mT @ b)).norm()
            core = eye + V.mT @ U
            change = torch.outer(a, V.mT @ a) @ core - torch.outer(b, V.mT @ b) @ core
            U = U - 0.1 / (size if second else E.norm()) * change
            moved.add("U")
        else:
            E = torch.outer(U @ (U.mT @ a), a) - torch.outer(U @ (U.mT @ b), b)
            size = a.norm() * (U @ (U.mT @ a)).norm() + b.norm() * (U @ (U.mT @ b)).norm()
            change = torch.outer(a + V @ (U.mT @ a), U.mT @ a) - torch.outer(b + V @ (U.mT @ b), U.mT @ b)
            V = V - 0.1 / (size if second else E.norm()) * change
            moved.add("V")
        if torch.rand((), generator=coins) < 0.2:
            rho = (U.norm() / V.norm()).sqrt()
            U, V = U / rho, V * rho
            moved.add("balance")
        P.update(v, h, 0.1, normalizer=normalizer)
    assert moved == {"U", "V", "balance"}
    for found, expected in ((P.state["W"][:r].mT, U), (P.state["W"][r:].mT, V), (P.state["q"], q)):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(P.state["gram"], P.state["W"] @ P.state["W"].mT, rtol=1e-9, atol=1e-9)


@normalizers
@pytest.mark.parametrize("name", ["kron", "kron_diagonal_sides"])
def test_kronecker_updates_tensor_by_tensor(name, normalizer, monkeypatch):
    monkeypatch.setattr(groups, "BALANCE", 0.2)
    P, coins = BUILD[name](g=stream(3)), stream(3)
    P.set_scale(0.49)
    limit = 3 if "diagonal" in name else 100
    cells = list(matricised(P))
    Q = [[0.7 * torch.eye(s, **F64) for s in c.shape] for c in cells]
    balanced = 0
    for v, h in pairs(P.d, 40):
        balance = bool(torch.rand((), generator=coins) < 0.2)
        balanced += balance
        for c, factors in zip(cells, Q, strict=True):
            q1, q2 = factors
            A = q1 @ h[c] @ q2.mT
            B = torch.linalg.inv(q1).mT @ v[c] @ torch.linalg.inv(q2)
            new = []
            for q, x, y in ((q1, A, B), (q2, A.mT, B.mT)):
                diagonal = len(q) < 2 or len(q) > limit
                E, S = ((x @ x.mT - y @ y.mT), (x @ x.mT + y @ y.mT))
                E = torch.diag(E.diagonal()) if diagonal else E.triu()
                measured = S if normalizer == "2nd" else E
                size = measured.diagonal().abs().max() if diagonal else norm_estimate(measured)
                new.append(q - 0.1 / size * E @ q)
            if balance:
                rho = (new[0].abs().max() / new[1].abs().max()).sqrt()
                new = [new[0] / rho, new[1] * rho]
            factors[:] = new
        P.update(v, h, 0.1, normalizer=normalizer)
    assert balanced
    dense = torch.zeros(P.d, P.d, **F64)
    for (q1, q2), c in zip(Q, cells, strict=True):
        dense[c.reshape(-1)[:, None], c.reshape(-1)] = torch.kron(q1, q2)
    tolerance = (
        1e-9 if normalizer == "2nd" else 1e-6
    )  # at a solution "1st" goes on in steps of one size, whose sign is rounding
    torch.testing.assert_close(factor(P), dense, rtol=tolerance, atol=tolerance)


def test_sides_of_length_one_and_long_sides_are_diagonal():
    P = Kron([(20, 3)], max_skew=2)
    assert P.state["0.left"].shape == (1, 20)
    assert P.state["0.right"].shape == (1, 3, 3)
    assert Kron([(5,)]).state["0.right"].shape == (1, 1)
    assert Kron([(3, 4, 5, 2)]).stacks[0][0] == (12, 10)  # axes 0 and 1, though 3 x 40 or 15 x 8 would do as well


def test_spectral_norm_estimate_is_a_tight_lower_bound():
    A = torch.stack([randn(6, 4, g=stream(i)) for i in range(20)]) * 1e30
    estimate, exact = norm_estimate(A), torch.linalg.matrix_norm(A, 2)
    assert (estimate <= exact * (1 + 1e-12)).all()
    assert (estimate >= exact / math.sqrt(2)).all()
    rank_one = torch.outer(randn(5, g=stream(1)), randn(3, g=stream(2)))
    torch.testing.assert_close(norm_estimate(rank_one), torch.linalg.matrix_norm(rank_one, 2))
    assert norm_estimate(torch.zeros(3, 3)) == 0


@every_group
@pytest.mark.parametrize("step", [0.1, 0.5])
def test_the_group_is_closed(name, step):
    P, g = BUILD[name](g=stream()), stream(9)
    for _ in range({Kron: 60, LRA: 400}.get(type(P), 1000)):
        assert P.update(randn(P.d, g=g), randn(P.d, g=g) * torch.exp(2 * randn((), g=g)), step)
    Q = factor(P)
    assert Q.isfinite().all()
    assert torch.linalg.eigvalsh(Q.mT @ Q).min() > 0
    if isinstance(P, Kron):
        for key, value in P.state.items():
            if isinstance(value, torch.Tensor) and value.dtype != torch.bool:
                diagonal = value if value.ndim == 2 else value.diagonal(dim1=1, dim2=2)
                assert (diagonal > 0).all(), key
                assert value.ndim == 2 or torch.equal(value, value.triu())
    elif isinstance(P, LRA):
        core = torch.eye(3, **F64) + P.state["W"][3:] @ P.state["W"][:3].mT
        assert torch.linalg.det(core) > 0
    elif isinstance(P, XMat):
        on_cross = torch.eye(P.d, dtype=torch.bool) | torch.eye(P.d, dtype=torch.bool).flip(1)
        assert (Q[~on_cross] == 0).all()
        assert P.state["b"].abs().min() > 0
        assert ((P.state["a"].prod(0) - P.state["b"].prod(0)).abs() > 0).all()
    elif isinstance(P, Dense):
        assert torch.equal(Q, Q.triu())
        assert (Q.diagonal() > 0).all()


def follow(P, Q0, T, n=60):
    """P' of a run in the coordinates theta = T theta', against T^-1 P T^-T of the run in theta."""
    first, second = P(Q0), P(Q0 @ torch.linalg.inv(T).mT)
    for v, h in pairs(len(T), n):
        first.update(v, h)
        second.update(torch.linalg.solve(T, v), T.mT @ h)
    inverse = torch.linalg.inv(T)
    one, two = (factor(x).mT @ factor(x) for x in (first, second))
    return inverse @ one @ inverse.mT, two


def dense_from(Q):
    return Dense(len(Q), state={"Q": Q.clone(), "started": True}, **F64)


def diag_from(Q):
    return Diag(len(Q), state={"q": Q.diagonal().clone(), "started": True}, **F64)


def test_equivariance_under_the_group():
    """A change of coordinates within the group changes nothing but the coordinates, along the whole run."""
    eye, g = torch.eye(6, **F64), stream(4)
    lower = (0.5 * randn(6, 6, g=g)).tril() + eye
    expected, found = follow(dense_from, eye, lower)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    scales = torch.diag(torch.exp(randn(6, g=g)))
    expected, found = follow(diag_from, eye, scales)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    upper = (0.5 * randn(6, 6, g=g)).triu() + eye  # outside: Q T^-T is not triangular, and is cut by the state
    expected, found = follow(lambda Q: dense_from(Q.triu()), eye, upper)
    assert (found - expected).norm() > 0.1 * expected.norm()


@every_group
def test_only_the_directions_of_a_pair_matter(name):
    first, second = BUILD[name](g=stream()), BUILD[name](g=stream())
    for v, h in pairs(first.d, 10):
        first.update(v, h)
        second.update(1e-3 * v, 1e-3 * h)
    torch.testing.assert_close(factor(first), factor(second), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [Diag, Dense, lambda d, **k: Kron([(d,)], **k)], ids=["diag", "dense", "kron"])
def test_a_number_is_found_at_a_linear_rate(kind):
    """Q^2 -> 1/|H| for a number H: near it ratio - 1 shrinks by 1 - 2 step per update."""
    P = kind(1, **F64)
    P.set_scale(1.0)
    errors = []
    for _ in range(45):
        v = torch.ones(1, **F64)
        P.update(v, -4.0 * v, 0.1)
        errors.append(abs(float(P.apply(v)) * 4 - 1))
    rate = (errors[-1] / errors[-21]) ** (1 / 20)
    # with Kron both sides of a 1 x 1 matrix move, so that Q moves twice as far
    assert rate == pytest.approx(0.6 if isinstance(P, Kron) else 0.8, rel=0.02)
    assert errors[-1] < 1e-3


def test_an_indefinite_hessian_is_fitted_by_its_absolute_value():
    d, g = 8, stream(2)
    basis = torch.linalg.qr(randn(d, d, g=g))[0]
    values = torch.tensor([1.0, -1.5, 2, -3, 4, -5, 6, 8], **F64)
    H, absolute = basis * values @ basis.mT, basis * values.abs() @ basis.mT
    P = Dense(d, **F64)

    def misfit(target):
        return float((factor(P).mT @ factor(P) @ target - torch.eye(d, **F64)).norm() / d**0.5)

    for k in range(1500):
        v = randn(d, g=g)
        P.update(v, H @ v, 0.1 if k < 800 else 0.01)
    assert misfit(absolute) < 0.12
    assert misfit(H) > 1  # the signed inverse is not what is found


def test_exact_products_of_a_definite_hessian_are_fitted_without_a_floor():
    """There b = a at the solution, so that every pair says the same; an indefinite one keeps a noise of size step."""
    d, g = 5, stream(2)
    basis = torch.linalg.qr(randn(d, d, g=g))[0]
    for signs, exact in ((torch.ones(d), True), (torch.tensor([1.0, -1, 1, -1, 1]), False)):
        H = basis * (torch.arange(1.0, d + 1, **F64) * signs) @ basis.mT
        absolute = basis * torch.arange(1.0, d + 1, **F64) @ basis.mT
        P = Dense(d, **F64)
        for _ in range(800):
            v = randn(d, g=g)
            P.update(v, H @ v, 0.2)
        misfit = float((factor(P).mT @ factor(P) @ absolute - torch.eye(d, **F64)).norm())
        assert (misfit < 1e-4) is exact


def test_whitening_finds_the_inverse_root_of_the_covariance():
    d, g = 5, stream(3)
    root = randn(d, d, g=g)
    C = root @ root.mT + 0.2 * torch.eye(d, **F64)
    values, basis = torch.linalg.eigh(C)
    expected = basis * values.rsqrt() @ basis.mT
    P = Dense(d, **F64)
    chol = torch.linalg.cholesky(C)
    for k in range(2000):
        P.update(randn(d, g=g), chol @ randn(d, g=g), 0.1 if k < 800 else 0.01)
    found = factor(P).mT @ factor(P)
    assert (found - expected).norm() < 0.1 * expected.norm()
    assert (found - torch.linalg.inv(C)).norm() > 0.1 * torch.linalg.inv(C).norm()  # the root, not the inverse


@every_group
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_the_first_pair_sets_the_scale(name, size):
    P = BUILD[name](g=stream())
    v, h = next(iter(pairs(P.d, 1)))
    h = size * h
    P.update(v, h, 1e-9)
    Q = factor(P)
    if isinstance(P, Kron):
        for c in matricised(P):
            scale = (v[c].square().sum() / h[c].square().sum()) ** 0.25
            flat = c.reshape(-1)
            torch.testing.assert_close(Q[flat, flat], scale.expand(len(flat)), rtol=1e-6, atol=0)
    else:
        scale = v.square().mean() ** 0.25 * h.pow(4).mean() ** (-1 / 8)
        if isinstance(P, LRA):
            torch.testing.assert_close(P.state["q"], scale.expand(P.d), rtol=1e-6, atol=0)
        else:
            torch.testing.assert_close(Q.diagonal(), scale.expand(P.d), rtol=1e-6, atol=0)


def test_the_first_scale_survives_float32():
    """h^4 of a gradient of 1e-12 is 0 in float32."""
    P = Diag(4)
    P.update(torch.ones(4), torch.full((4,), 1e-12))
    torch.testing.assert_close(P.state["q"], torch.full((4,), 1e6))


@every_group
def test_useless_pairs_change_nothing(name):
    P = trained(name)
    before = {key: torch.as_tensor(value).clone() for key, value in P.state.items()}
    v = torch.ones(P.d, **F64)
    bad = torch.ones(P.d, **F64)
    bad[1] = math.nan
    for h in (torch.zeros(P.d, **F64), bad, v * math.inf):
        assert not P.update(v, h)
    assert all(torch.equal(torch.as_tensor(P.state[key]), value) for key, value in before.items())
    assert P.update(v, v)


@pytest.mark.parametrize("name", ["diag", "xmat", "lra", "dense", "kron"])
def test_a_pair_that_overflows_does_no_harm(name):
    """In float32 the squares of a are infinite."""
    low_rank = LRA(7, 2, generator=0)
    P = {"diag": Diag(7), "xmat": XMat(7), "lra": low_rank, "dense": Dense(4), "kron": Kron([(3, 2)])}[name]
    P.update(torch.ones(P.d), torch.ones(P.d))
    P.update(torch.ones(P.d), torch.full((P.d,), 1e30))
    assert P.apply(torch.ones(P.d)).isfinite().all()


def test_kronecker_tensors_without_curvature_stay():
    P = Kron([(3, 2), (3, 2), (4,)], **F64)
    v = torch.ones(16, **F64)
    h = torch.cat([torch.ones(6), torch.zeros(6), torch.ones(4)]).double()
    for _ in range(20):
        P.update(v, h)
    Q = factor(P)
    assert torch.equal(Q[6:12, 6:12], torch.eye(6, **F64))
    assert P.state["0.started"].tolist() == [True, False]
    P.update(v, 100 * v, 1e-9)
    torch.testing.assert_close(factor(P)[6:12, 6:12].diagonal(), torch.full((6,), 0.1, **F64), rtol=1e-6, atol=0)


@every_group
def test_state_continues_bit_for_bit(name):
    P = trained(name)
    coins = torch.Generator()
    coins.set_state(P.generator.get_state())
    copy = {k: x.clone() if isinstance(x, torch.Tensor) else x for k, x in P.state.items()}
    d = {} if isinstance(P, Kron) else {"d": P.d}
    twin = {
        Diag: lambda **k: Diag(**d, **k),
        XMat: lambda **k: XMat(**d, **k),
        LRA: lambda **k: LRA(rank=3, **d, **k),
        Dense: lambda **k: Dense(**d, **k),
        Kron: lambda **k: Kron(SHAPES, 3 if "diagonal" in name else math.inf, **k),
    }[type(P)](state=copy, generator=coins, **F64)
    for v, h in pairs(P.d, 20 if isinstance(P, Kron) else 80, seed=8):
        P.update(v, h)
        twin.update(v, h)
    for key, value in P.state.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(twin.state[key])), key


def test_damping_is_a_share_of_the_mean_size():
    g, v = torch.tensor([3.0, -1, 0, 0, 10], **F64), torch.tensor([1.0, 2, 3, -4, 5], **F64)
    torch.testing.assert_close(Diag(5).dampened(g, v, 0.5), g + 0.5 * 2.8 * v)
    by_tensor = torch.tensor([1.0, 1, 1, 1, 10], **F64)
    torch.testing.assert_close(Kron([(2, 2), (1,)]).dampened(g, v, 0.5), g + 0.5 * by_tensor * v)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Diag(0), ValueError, "d must"),
        (lambda: XMat(1), ValueError, "d must"),
        (lambda: LRA(9, 0), ValueError, "rank"),
        (lambda: LRA(9, 1.5), TypeError, "rank"),
        (lambda: Diag(3).set_scale(0.0), ValueError, "init_scale"),
        (lambda: Diag(3).update(torch.ones(3), torch.ones(3), normalizer="3rd"), ValueError, "normalizer"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
