import torch

from gradwise.checkup.readings.completeness import POINTS, Completeness, _path


def test_the_gap_is_small_for_a_smooth_model(make_subject, make_context):
    context = make_context(make_subject())
    finding = Completeness().measure(context)
    assert finding.severity == "ok"
    assert finding.value < 1e-4  # tanh network: Gauss-Legendre with 50 nodes is nearly exact
    assert 0 <= finding.details["saturated_share"] <= 1
    assert len(finding.figure.series[0].x) == POINTS


class Rough(torch.nn.Module):
    """Scores that swing along the path: no quadrature with 50 nodes follows them."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)

    def forward(self, x):
        z = self.layer(x)
        return 3 * z + torch.sin(300 * z)


def test_a_score_that_swings_is_found(make_subject, make_context):
    finding = Completeness().measure(make_context(make_subject(model=Rough)))
    assert finding.severity == "act", finding.value
    assert finding.prescribes == ("idgi", "igos")


def test_the_path_runs_from_the_neutral_input_to_the_example(generator):
    x, neutral = torch.randn(5, 4, generator=generator), torch.zeros(1, 4)
    target = torch.tensor([0, 1, 2, 3, 0])
    path = _path(lambda z: z, x, neutral, target)
    assert path.shape == (POINTS, 5)
    torch.testing.assert_close(path[0], torch.zeros(5))
    torch.testing.assert_close(path[-1], x[torch.arange(5), target])
    torch.testing.assert_close(path[10], x[torch.arange(5), target] / 2)


def test_a_small_convolutional_network_stays_below_one_percent(healthy):
    assert healthy.finding("completeness").value < 0.01
