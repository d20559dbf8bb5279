"""Gauss-Newton products and Gramians, against dense Jacobians from row-by-row backward passes in float64."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from gradwise.autodiff.context import double_backward_attention
from gradwise.autodiff.gauss_newton import ggn_operator, ggn_product, gramian, recorded, rule_of
from gradwise.autodiff.loss_curvature import cross_entropy, half_mse, mse
from gradwise.base.counting import counting
from gradwise.linalg.operators import adjoint_gap
from gradwise.linalg.trees import flatten


def dense_jacobian(module, inputs):
    """[bc, d], one backward pass per output entry."""
    params = [p for p in module.parameters() if p.requires_grad]
    outputs = module(*inputs) if isinstance(inputs, tuple) else module(inputs)
    rows = []
    for entry in outputs.reshape(-1):
        grads = torch.autograd.grad(entry, params, retain_graph=True, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(rows)


class Twice(nn.Module):
    """One linear layer used twice, once of them over positions, with a bias of its own use."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))).mean(1))


class Tied(nn.Module):
    """Two layers that share a weight but not the bias, and a third that uses its bias by hand."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x))))) + self.c.bias


class Words(nn.Module):
    """Embedding with padding, layer norm and a head; tokens may repeat."""

    def __init__(self):
        super().__init__()
        self.words, self.norm, self.head = nn.Embedding(7, 4, padding_idx=0), nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, tokens):
        return self.head(torch.tanh(self.norm(self.words(tokens))).mean(1))


class Loose(nn.Module):
    """Parameters that belong to no layer."""

    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(4, 3), nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.unused, self.empty = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(0))

    def forward(self, x):
        return torch.sin(self.linear(x) * self.scale)


class Halves(nn.Module):
    """A layer whose weight is also used by hand."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return linear(torch.tanh(self.linear(x)), self.linear.weight)


def attention():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 2))


def convolutions():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, stride=2, bias=False),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 2, groups=2, padding="same", dilation=2, padding_mode="circular"),
        nn.BatchNorm2d(6),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(6 * 9, 3),
    )


CASES = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)), (6, 5), True),
    "one_output": (lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0)), (6, 5), True),
    "more_rows_than_parameters": (lambda: nn.Linear(2, 3, bias=False), (6, 2), True),
    "convolutions": (convolutions, (4, 2, 6, 5), True),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)), (4, 2, 6), True),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.Flatten()), (3, 1, 2, 3, 2), True),
    "used_twice": (Twice, (5, 3, 4), True),
    "tied": (Tied, (5, 4), False),
    "words": (Words, "tokens", True),
    "loose": (Loose, (5, 4), False),
    "weight_by_hand": (Halves, (5, 4), False),
    "attention": (attention, (4, 3, 8), False),
    "weight_norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 2)),
        (5, 4),
        False,
    ),
}


@pytest.fixture(params=list(CASES))
def case(request, generator):
    make, shape, complete = CASES[request.param]
    module = make().double().eval()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.6 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    if shape == "tokens":
        return module, torch.randint(0, 7, (6, 5), generator=generator), complete
    return module, torch.randn(*shape, generator=generator, dtype=torch.float64), complete


@pytest.mark.parametrize("method", ["auto", "dense"])
def test_the_gramian_is_the_dense_one(case, method):
    module, x, _ = case
    J = dense_jacobian(module, x)
    torch.testing.assert_close(gramian(module, x, method=method), J @ J.mT, atol=1e-12, rtol=1e-10)


def test_layerwise_refuses_what_has_no_rule(case):
    module, x, complete = case
    if complete:
        J = dense_jacobian(module, x)
        torch.testing.assert_close(gramian(module, x, method="layerwise"), J @ J.mT, atol=1e-12, rtol=1e-10)
    else:
        with pytest.raises(ValueError, match="no layer-wise rule, the first is"):
            gramian(module, x, method="layerwise")


def test_float32_and_bfloat16_come_out_in_float32(generator):
    module = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(6, 5, generator=generator)
    J = dense_jacobian(module, x)
    torch.testing.assert_close(gramian(module, x), J @ J.mT, atol=1e-6, rtol=1e-5)
    K = gramian(module.bfloat16(), x.bfloat16())
    assert K.dtype == torch.float32
    torch.testing.assert_close(K, J @ J.mT, atol=0.2, rtol=0.1)


@pytest.mark.parametrize("groups", [1, 2])
def test_large_layers_are_accumulated_in_pieces(monkeypatch, groups, generator):
    module = nn.Sequential(nn.Conv1d(4, 6, 2, groups=groups), nn.Flatten()).double()
    x = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    J = dense_jacobian(module, x)
    monkeypatch.setattr("gradwise.autodiff.gauss_newton.LIMIT", 200)
    torch.testing.assert_close(gramian(module, x), J @ J.mT, atol=1e-12, rtol=1e-10)


def test_frozen_parameters_are_skipped_and_params_choose(generator):
    module = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    module[0].weight.requires_grad_(False)
    x = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    J = dense_jacobian(module, x)
    assert J.shape[1] == 4 + 8 + 2
    torch.testing.assert_close(gramian(module, x), J @ J.mT)
    torch.testing.assert_close(gramian(module, x, params=[module[2].weight]), J[:, 4:12] @ J[:, 4:12].mT)


def test_inputs_may_be_several_or_named(generator):
    module = nn.Bilinear(3, 2, 2).double()
    x, y = (torch.randn(4, n, generator=generator, dtype=torch.float64) for n in (3, 2))
    J = dense_jacobian(module, (x, y))
    torch.testing.assert_close(gramian(module, (x, y)), J @ J.mT)
    torch.testing.assert_close(gramian(module, {"input1": x, "input2": y}), J @ J.mT)


def test_a_module_that_cannot_be_vectorised_is_differentiated_row_by_row(generator):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))

        def forward(self, x):
            return x * self.a if float(x.sum()) > 1e9 else torch.sin(x * self.a)

    module, x = Branching(), torch.randn(4, 2, generator=generator, dtype=torch.float64)
    J = dense_jacobian(module, x)
    torch.testing.assert_close(gramian(module, x), J @ J.mT)


def test_dropout_is_drawn_once(generator):
    module = nn.Sequential(nn.Linear(5, 64), nn.Dropout(0.5), nn.Linear(64, 2)).double()
    x = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    torch.manual_seed(3)
    J = dense_jacobian(module, x)
    for method in ("layerwise", "dense"):
        torch.manual_seed(3)
        torch.testing.assert_close(gramian(module, x, method=method), J @ J.mT)


def test_coupled_rows_are_found_out(generator):
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, x):
            h = torch.tanh(self.a(x))
            return self.b(h - h.mean(0))

    x = torch.randn(6, 4, generator=generator)
    with pytest.raises(RuntimeError, match="own row of the inputs only"):
        gramian(Centred(), x)
    with pytest.raises(RuntimeError, match="own row of the inputs only"):
        gramian(Centred().double(), x.double())
    positions_first = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    with pytest.raises(RuntimeError, match="own row of the inputs only"):
        gramian(Mixed(positions_first), torch.randn(3, 3, 4, generator=generator))


class Mixed(nn.Module):
    """Positions first inside: as many positions as rows, so that shapes do not tell."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.transpose(0, 1)).transpose(0, 1).sum(1)


def test_gramians_refuse_batch_norm_and_outputs_without_a_graph(generator):
    x = torch.randn(6, 4, generator=generator)
    with pytest.raises(ValueError, match="batch norm '1'"):
        gramian(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), x)
    with pytest.raises(ValueError, match="method must be"):
        gramian(nn.Linear(4, 3), x, method="kronecker")
    with pytest.raises(RuntimeError, match="no graph"):
        gramian(nn.Linear(4, 3).requires_grad_(False), x)
    with pytest.raises(RuntimeError, match="none of the parameters"):
        gramian(nn.Linear(4, 3), x, params=[torch.ones(2, requires_grad=True)])


def test_the_module_is_left_as_it_was(generator):
    module = nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    module[0].weight.grad = torch.ones(4, 5)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    gramian(module, torch.randn(3, 5, generator=generator))
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    assert torch.equal(module[0].weight.grad, torch.ones(4, 5))
    assert module[2].weight.grad is None
    assert not any(part._forward_hooks for part in module.modules())
    with pytest.raises(ZeroDivisionError), recorded(module, module.parameters()):
        raise ZeroDivisionError
    assert not any(part._forward_hooks for part in module.modules())


def test_one_pass_per_output_is_counted(generator):
    with counting() as counts:
        gramian(nn.Linear(5, 4), torch.randn(3, 5, generator=generator))
    assert counts.to_dict() == {"per_sample": 4}


def test_only_pytorchs_own_layers_have_a_rule():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert rule_of(nn.Linear(2, 2)) == "linear"
    assert rule_of(Scaled(2, 2)) is None
    assert rule_of(nn.ConvTranspose2d(1, 1, 2)) is None
    assert rule_of(nn.Embedding(3, 2, max_norm=1.0)) is None
    module, x = nn.Sequential(Scaled(4, 3), nn.Tanh()).double(), torch.randn(3, 4, dtype=torch.float64)
    J = dense_jacobian(module, x)
    torch.testing.assert_close(gramian(module, x), J @ J.mT)


def test_products_of_the_recorded_jacobian(case, generator):
    module, x, _ = case
    with recorded(module, module.parameters()) as tape, double_backward_attention():
        jacobian = tape.jacobian(module(x))
    params = jacobian.params
    rows = [torch.autograd.grad(e, params, retain_graph=True, materialize_grads=True) for e in jacobian.z.reshape(-1)]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    assert not any(p is getattr(module, name, None) for p in params for name in ("unused", "empty"))
    s = torch.randn(jacobian.z.shape, generator=generator, dtype=torch.float64)
    flat, _ = flatten([g.reshape(-1) for g in jacobian.vjp(s)])
    torch.testing.assert_close(flat, s.reshape(-1) @ J)
    v = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in params]
    expected = J @ torch.cat([w.reshape(-1) for w in v])
    for _ in range(2):
        torch.testing.assert_close(jacobian.jvp(v).reshape(-1), expected)


@pytest.fixture
def problem(generator):
    x = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    params = {
        "w1": torch.randn(5, 4, generator=generator, dtype=torch.float64),
        "b1": torch.randn(5, generator=generator, dtype=torch.float64),
        "w2": torch.randn(3, 5, generator=generator, dtype=torch.float64),
    }

    def fn(p):
        return torch.tanh(x @ p["w1"].mT + p["b1"]) @ p["w2"].mT

    flat, unflatten = flatten(params)
    J = torch.autograd.functional.jacobian(lambda w: fn(unflatten(w)), flat).reshape(21, -1)
    return fn, params, J


@pytest.mark.parametrize("name", ["cross_entropy", "mse"])
def test_ggn_products_are_the_dense_matrix(problem, name, generator):
    fn, params, J = problem
    if name == "mse":
        targets, loss = torch.randn(7, 3, generator=generator, dtype=torch.float64), mse
        Q = torch.eye(21, dtype=torch.float64) * 2 / 3
    else:
        targets, loss = torch.randint(0, 3, (7,), generator=generator), cross_entropy
        Q = torch.block_diag(*(torch.diag(p) - torch.outer(p, p) for p in torch.softmax(fn(params), 1)))
    H = J.mT @ Q @ J / 7
    v = torch.randn(len(H), generator=generator, dtype=torch.float64)
    _, unflatten = flatten(params)
    product = ggn_product(fn, name, params, unflatten(v), targets)
    torch.testing.assert_close(flatten(product)[0], H @ v)
    op = ggn_operator(fn, loss, params, targets)
    torch.testing.assert_close(op.matvec(torch.stack([v, 2 * v])), torch.stack([H @ v, 2 * H @ v]))
    assert adjoint_gap(op, generator=generator) < 1e-12


def test_the_ggn_of_a_linear_model_is_its_hessian_and_that_of_a_deep_one_is_not(problem, generator):
    fn, params, J = problem
    t = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    flat, unflatten = flatten(params)
    hessian = torch.autograd.functional.hessian(lambda w: half_mse.value(fn(unflatten(w)), t).mean(), flat)
    assert (hessian - J.mT @ J / 7).abs().max() > 0.1
    x = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    w = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    op = ggn_operator(lambda w: x @ w.mT, half_mse, w, t)
    hessian = torch.autograd.functional.hessian(lambda w: half_mse.value(x @ w.reshape(3, 4).mT, t).mean(), w.flatten())
    torch.testing.assert_close(op.matvec(torch.eye(12, dtype=torch.float64)), hessian)


def test_ggn_counts_products_and_refuses_a_vector_that_does_not_fit(problem):
    fn, params, _ = problem
    t = torch.zeros(7, 3, dtype=torch.float64)
    with counting() as counts:
        ggn_product(fn, mse, params, params, t)
    assert counts.to_dict() == {"hvp": 1}
    with pytest.raises(ValueError, match="v must match x: x has 40 entries, v has 3"):
        ggn_product(fn, mse, params, torch.zeros(3), t)
    constant = ggn_product(lambda w: torch.ones(4, 2), mse, torch.ones(3), torch.ones(3), torch.zeros(4, 2))
    assert torch.equal(constant, torch.zeros(3))
