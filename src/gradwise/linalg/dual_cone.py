"""Projection onto the dual cone of vectors of which only the Gramian is known, for many vectors at once.

The projection of J'u onto {y : J y >= 0} is J'w with w = argmin of v'Gv over v >= u, where G = J J' (Quinton and Rey,
"Jacobian Descent for Multi-Objective Optimization", arXiv:2406.16232, proposition 1). With z = v - u this is a
quadratic programme over z >= 0, one per row of U, all with the same matrix.

A few accelerated projected-gradient steps on all rows together (FISTA: Beck and Teboulle, SIAM J. Imaging Sci. 2, 2009)
guess which entries of z are zero; block principal pivoting (Kim and Park, SIAM J. Sci. Comput. 33, 2011) corrects the
guess and solves exactly; the rare rows on which exchanging blocks does not end go to an interior-point method
(Mehrotra, SIAM J. Optim. 2, 1992). All are batched, on the tensors' device, in float64.
"""

from typing import Any
import warnings

from jaxtyping import Bool, Float
import torch
from torch import Tensor, nn

from gradwise.base.checks import require_count, require_floating, require_positive

FACE_STEPS = 10  # projected-gradient steps between two looks at the set of zeros
FACE_LOOKS = 5
SETTLED = 0.97  # share of rows whose set must not have changed for pivoting to begin
RIDGE = 1e-9  # on the interior-point method's matrix, which singular problems make singular towards the end
EXCHANGES = 12  # rounds of pivoting before a row is given up
COMPLEMENT_FROM = 32  # sizes from which the smaller of two systems is solved
PROXIMAL = 1e-8  # weight of the proximal term for singular matrices of unit diagonal
CHUNK = {"cpu": 2**18, "cuda": 2**25}  # numbers held by one batch of subsystems


@torch.no_grad()
def dual_cone(
    G: Any, U: Any, *, tol: float = 1e-9, max_iter: int = 50, warm_start: Any = None
) -> Float[Tensor, "*k m"]:
    """Weights W [..., m] of projections: w minimises v'Gv over v >= u, so J'w is the y nearest to J'u with J y >= 0.

    Args:
        G: Gramian J J' [m, m], positive semi-definite up to the rounding of its dtype; may be singular (w is then not
            unique, J'w is) and badly scaled (rows are brought to unit length inside).
        U: the vectors to project, as weights [..., m].
        tol: largest violation of an optimality condition, relative to each row's largest gradient entry, gradients
            taken per unit-length row of J. What is returned is usually exact to rounding.
        max_iter: interior-point steps spent on rows that pivoting did not finish (10 to 20 are usual).
        warm_start: weights of an earlier call with a similar Gramian, shaped like U; the result does not depend on it.

    Works in float64 and returns U's dtype; w >= u holds exactly. Not differentiable. Memory is O((k + m) m); time is
    that of some tens of products [k, m] x [m, m] and two or three batches of k Cholesky factorisations.

    Raises ``ValueError`` for a matrix that is not square, symmetric, finite (the message names the row) or positive
    semi-definite, and for other shapes that do not fit; warns (``RuntimeWarning``) where ``tol`` was not reached.

    >>> dual_cone(torch.tensor([[1.0, -1.0], [-1.0, 2.0]]), torch.eye(2))
    tensor([[1.0000, 0.5000],
            [1.0000, 1.0000]])
    """
    matrix = gramian(G)
    require_floating("U", U)
    if U.ndim < 1 or U.shape[-1] != G.shape[-1]:
        raise ValueError(f"U must have shape [..., {G.shape[-1]}] to fit G {list(G.shape)}, got {list(U.shape)}.")
    if warm_start is not None and warm_start.shape != U.shape:
        raise ValueError(f"warm_start must be shaped like U {list(U.shape)}, got {list(warm_start.shape)}.")
    rows = U.detach().reshape(-1, U.shape[-1]).to(matrix)
    start = None if warm_start is None else warm_start.reshape(rows.shape).to(rows) - rows
    Z = nonnegative_qp(matrix, rows @ matrix, tol=tol, max_iter=max_iter, start=start, rounding=_rounding(G))
    return (rows + Z).to(U).reshape(U.shape)


def gramian(G: Any) -> Float[Tensor, "m m"]:
    """``G`` in float64, exactly symmetric; raises ``ValueError`` where it cannot be a Gramian."""
    require_floating("G", G)
    if G.ndim != 2 or G.shape[0] != G.shape[1] or not len(G):
        raise ValueError(f"G must be a non-empty square matrix, got shape {list(G.shape)}.")
    G = G.detach().to(_exact(G.device), torch.float64)
    finite = G.isfinite()
    if not finite.all():
        row = int((~finite).sum(1).argmax())
        raise ValueError(f"G is not finite: row {row} holds {int((~finite[row]).sum())} NaN or infinite value(s).")
    gap = float((G - G.mT).abs().max())
    if gap > 1e-2 * float(G.abs().max()):
        raise ValueError(f"G must be symmetric, but G and its transpose differ by {gap:.3g}.")
    return (G + G.mT) / 2


@torch.no_grad()
def nonnegative_qp(
    M: Float[Tensor, "m m"],
    C: Float[Tensor, "k m"],
    *,
    tol: float = 1e-9,
    max_iter: int = 50,
    start: Float[Tensor, "k m"] | None = None,
    rounding: float = 0.0,
) -> Float[Tensor, "k m"]:
    """For every row c of ``C`` the minimiser of z'Mz/2 + c'z over z >= 0 (``M`` symmetric positive semi-definite).

    ``start`` is a guess; ``rounding`` says how accurate the entries of ``M`` are, relative to its diagonal: negative
    eigenvalues of that order are lifted to zero. For ``tol`` and ``max_iter`` see :func:`dual_cone`. A singular ``M``
    is solved by a few steps of the proximal-point method (M + delta I, delta small), each started where the last ended.

    Raises ``ValueError`` for an indefinite ``M``; warns (``RuntimeWarning``) where ``tol`` was not reached, as for a
    problem that is unbounded below.
    """
    require_positive("tol", tol)
    require_count("max_iter", max_iter)
    norms = M.diagonal().clamp_min(0).double().sqrt()
    d = torch.where(norms > 0, norms, torch.ones_like(norms))
    c = C.double() / d
    A = M.double() / d[:, None] / d
    A.diagonal().add_(A.eq(0).all(1) & c.ge(0).all(0))  # z is 0 there; the rest may still be definite
    A, delta, inverse = _definite(A, float(rounding))
    scale = c.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    z = torch.zeros_like(c) if start is None else (start.double() * d).clamp_min(0)

    z, face = _guess(A, c, z)
    todo = torch.arange(len(c), device=c.device)
    stuck: list[Tensor] = []
    B = A if delta == 0 else A + delta * torch.eye(len(A), dtype=A.dtype, device=A.device)
    for _ in range(1 if delta == 0 else 20):
        z[todo], face[todo], ended = _pivot(B, inverse, c[todo] - delta * z[todo], face[todo], scale[todo], tol)
        stuck.append(todo[~ended])
        far = (_residual(A, c[todo], z[todo]) > tol * scale[todo]).any(1)
        todo = todo[far & ended]
        if not len(todo):
            break
    todo = torch.cat([todo, *stuck])
    if not len(todo):
        return z / d
    for rows in todo.split(max(1, _budget(A) // len(A) ** 2)):
        z[rows] = _interior_point(A, c[rows], scale[rows], tol, max_iter)
        if delta == 0:
            exact, *_ = _pivot(A, None, c[rows], z[rows] > torch.addmm(c[rows], z[rows], A), scale[rows], tol)
            better = _residual(A, c[rows], exact).amax(1) <= _residual(A, c[rows], z[rows]).amax(1)
            z[rows] = torch.where(better[:, None], exact, z[rows])
    left = (_residual(A, c[todo], z[todo]) / scale[todo]).amax(1)
    if bool((left > tol).any()):
        warnings.warn(
            f"{int((left > tol).sum())} of {len(c)} programmes stopped at a relative residual of up to "
            f"{float(left.max()):.1e} (tol {tol:.1e}).",
            RuntimeWarning,
            stacklevel=3,
        )
    return z / d


def _residual(A: Tensor, c: Tensor, z: Tensor) -> Tensor:
    """|min(s, z)| with s = c + A z: zero exactly at the solution."""
    return torch.addmm(c, z, A).minimum(z).abs()


def _definite(A: Tensor, rounding: float) -> tuple[Tensor, float, Tensor | None]:
    """(A, delta, inverse): A free of negative eigenvalues; delta > 0 where it is singular; inverse where it helps."""
    factor, info = torch.linalg.cholesky_ex(A)
    pivots = factor.diagonal().square().min()
    if not int(info) and float(pivots) > 1e-10:
        useful = len(A) >= COMPLEMENT_FROM and float(pivots) > 1e-6
        return A, 0.0, torch.cholesky_inverse(factor) if useful else None
    values = torch.linalg.eigvalsh(A)
    lowest, highest = float(values[0]), float(values[-1])
    if lowest < -max(1e-4, 32 * rounding) * max(highest, 1.0):
        raise ValueError(
            f"the matrix is not positive semi-definite: with its diagonal scaled to one, its eigenvalues reach from "
            f"{lowest:.3g} to {highest:.3g}."
        )
    if lowest < 0:
        A = A - 1.01 * lowest * torch.eye(len(A), dtype=A.dtype, device=A.device)
    return A, PROXIMAL, None


def _largest(A: Tensor) -> Tensor:
    """A bound of the largest eigenvalue (1 or more) at most m^(1/32) times too large: the norm of A^16, to the 1/16."""
    log = torch.zeros((), dtype=A.dtype, device=A.device)
    for _ in range(4):
        norm = torch.linalg.matrix_norm(A).clamp_min(torch.finfo(A.dtype).tiny)
        A = A / norm
        A = A @ A
        log = 2 * (log + norm.log())
    return ((log + torch.linalg.matrix_norm(A).log()) / 16).exp().clamp_min(1.0)


def _guess(A: Tensor, c: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Accelerated projected gradient until the sets of positive entries settle; they need not be right."""
    face = z > torch.addmm(c, z, A)
    shrink, shift = _gradient_step(A, c)
    y = z
    for number in range(FACE_STEPS * FACE_LOOKS):
        new = torch.addmm(shift, y, shrink).clamp_min_(0)
        y = torch.lerp(z, new, 1 + number / (number + 3))
        z = new
        if number % FACE_STEPS == FACE_STEPS - 1:
            seen, face = face, z > torch.addmm(c, z, A)
            if float((seen == face).all(1).double().mean()) >= SETTLED:
                break
    return z, face


def _gradient_step(A: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """(I - A/L, -c/L), so that a gradient step is one product."""
    step = 1 / _largest(A)
    return torch.eye(len(A), dtype=A.dtype, device=A.device) - step * A, -step * c


def _pivot(
    B: Tensor, inverse: Tensor | None, c: Tensor, face: Tensor, scale: Tensor, tol: float
) -> tuple[Tensor, Tensor, Bool[Tensor, " k"]]:
    """Block principal pivoting: solve with the entries outside ``face`` at zero, exchange all that have a wrong sign.

    Returns (z, face, whether a row ended with all signs right). What counts as wrong starts at rounding level and grows
    to ``tol``.
    """
    z, face = torch.zeros_like(c), face.clone()
    free = None if inverse is None else -(c @ inverse)
    live = torch.arange(len(c), device=c.device)
    ended = torch.zeros_like(live, dtype=torch.bool)
    for number in range(EXCHANGES):
        on = face[live]
        z[live], s = _on_face(B, inverse, c[live], on, None if free is None else free[live])
        wrong = torch.where(on, z[live], s) < -min(tol, 1e-13 * 4**number) * scale[live]
        right = ~wrong.any(1)
        ended[live] = right
        face[live] = on ^ wrong
        live = live[~right]
        if not len(live):
            break
    return z.clamp_min(0), face, ended


def _on_face(
    B: Tensor, inverse: Tensor | None, c: Tensor, face: Bool[Tensor, "k m"], free: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(z, s) with B z + c = s, z = 0 outside ``face``, s = 0 inside, by whichever of the two systems is smaller.

    Inside: B_FF z_F = -c_F. Outside, with P = B^{-1} and the unconstrained minimiser ``free``: P_AA s_A = -free_A.
    """
    large = 2 * face.sum(1) > face.shape[1]
    if inverse is None or free is None or not large.any():
        z = _subsystems(B, face, -c)
        return z, torch.addmm(c, z, B).masked_fill_(face, 0)
    x = torch.empty_like(c)
    for rows, matrix, part, rhs in ((~large, B, face, -c), (large, inverse, ~face, -free)):
        x[rows] = _subsystems(matrix, part[rows], rhs[rows])
    z = torch.where(large[:, None], torch.addmm(free, x, inverse).masked_fill_(~face, 0), x)
    s = torch.where(large[:, None], x, torch.addmm(c, x, B).masked_fill_(face, 0))
    return z, s


def _interior_point(A: Tensor, c: Tensor, scale: Tensor, tol: float, steps: int) -> Tensor:
    """Mehrotra's predictor and corrector for s = A z + c, z s = 0, z and s >= 0; one factorisation per row and step."""
    z = torch.zeros_like(c)
    live = torch.arange(len(c), device=c.device)
    x, y, q = torch.ones_like(c), torch.ones_like(c), c / scale
    for _ in range(steps):
        gap, mean = torch.addmm(q, x, A) - y, (x * y).mean(1, keepdim=True)
        ratio = y / x
        factor, _ = torch.linalg.cholesky_ex(A + torch.diag_embed(ratio + RIDGE))
        dx = _cholesky_solve(factor, -gap - y)
        dy = -y - ratio * dx
        length = _step_to_boundary(x, dx, y, dy)
        centring = (((x + length * dx) * (y + length * dy)).mean(1, keepdim=True) / mean) ** 3
        target = centring * mean - dx * dy
        dx = _cholesky_solve(factor, -gap - y + target / x)
        dy = target / x - y - ratio * dx
        length = 0.995 * _step_to_boundary(x, dx, y, dy)
        x, y = x + length * dx, y + length * dy
        z[live] = torch.where(x.isfinite().all(1, keepdim=True), x * scale[live], z[live])
        left = (_residual(A, q, x) > 1e-2 * tol).any(1)
        live, x, y, q = live[left], x[left], y[left], q[left]
        if not len(live):
            break
    return z


def _step_to_boundary(x: Tensor, dx: Tensor, y: Tensor, dy: Tensor) -> Tensor:
    """The largest step up to 1 that keeps x and y non-negative, per row [k, 1]."""
    ratio = torch.maximum(-dx / x, -dy / y).amax(1, keepdim=True)
    return 1 / ratio.clamp_min(1.0)


def _cholesky_solve(factor: Tensor, right: Tensor) -> Tensor:
    """Batched solve with one vector each; ``torch.cholesky_solve`` takes five times as long on CPU."""
    half = torch.linalg.solve_triangular(factor, right.unsqueeze(2), upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True).squeeze(2)


def _budget(A: Tensor) -> int:
    return CHUNK.get(A.device.type, CHUNK["cpu"])


def _subsystems(B: Tensor, part: Bool[Tensor, "k m"], rhs: Tensor) -> Tensor:
    """x with B_SS x_S = rhs_S and zero elsewhere, S the row's entries of ``part``; rows of similar size together."""
    m = len(B)
    padded = nn.functional.pad(B, (0, 1, 0, 1)).flatten()  # index m stands for "no entry"
    x = nn.functional.pad(torch.zeros_like(rhs), (0, 1))
    sizes, order = part.sum(1).sort(descending=True)
    counts = sizes.tolist()
    budget, first = _budget(B), 0
    while first < len(counts) and counts[first]:
        n = counts[first]
        rows = order[first : first + max(1, budget // n**2)]
        first += len(rows)
        inside, index = part[rows].to(torch.uint8).sort(dim=1, descending=True, stable=True)
        absent = inside[:, :n] == 0
        index = index[:, :n].masked_fill(absent, m)
        block = padded.take(index[:, :, None] * (m + 1) + index[:, None, :])
        block.diagonal(dim1=1, dim2=2).add_(absent)
        factor, _ = torch.linalg.cholesky_ex(block)
        solution = _cholesky_solve(factor, nn.functional.pad(rhs[rows], (0, 1)).gather(1, index))
        x[rows] = x[rows].scatter(1, index, solution)
    return x[:, :m]


def _exact(device: torch.device) -> torch.device:
    """Where float64 exists: Apple's MPS has none."""
    return torch.device("cpu") if device.type == "mps" else device


def _rounding(G: Tensor) -> float:
    return float(torch.finfo(G.dtype).eps)
