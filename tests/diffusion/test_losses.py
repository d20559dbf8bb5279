import pytest
import torch

from gradwise.diffusion import FunctionDenoiser, NoiseLevel, denoising_loss, flow, logit_normal_times, noised
from tests.diffusion.beds import labels, mixture


def test_noised_data_is_what_it_says():
    x0 = torch.randn(5, 3)
    level = flow().level(torch.linspace(0.1, 0.9, 5))
    x, eps = noised(x0, level, torch.Generator().manual_seed(0))
    a, s = level.factors(x0)
    torch.testing.assert_close(x, a * x0 + s * eps)


@pytest.mark.parametrize("kind", ["x0", "eps", "v", "flow", "score"])
def test_the_exact_denoiser_has_the_smallest_loss(kind):
    bed = mixture(kind)
    x0 = bed.draw(4000, generator=0)
    level = flow().level(0.5)
    best = denoising_loss(bed, x0, level, generator=torch.Generator().manual_seed(1)).mean()
    worse = FunctionDenoiser(lambda x, level, cond: bed.predict(x, level, cond) + 0.3, kind)
    other = denoising_loss(worse, x0, level, generator=torch.Generator().manual_seed(1)).mean()
    assert float(other - best) == pytest.approx(0.09, abs=0.03)


def test_weights_turn_one_loss_into_another():
    x0 = mixture().draw(8, generator=0)
    level = NoiseLevel.of(0.8, 0.6, 0.5)

    def loss(kind, weight="none"):
        return denoising_loss(
            mixture(kind), x0, level, labels(), weight=weight, generator=torch.Generator().manual_seed(1)
        )

    torch.testing.assert_close(loss("x0", "snr"), loss("eps"))
    torch.testing.assert_close(loss("x0", "min_snr"), loss("x0"))  # SNR 1.8 is below 5: min(SNR, 5) / SNR is 1
    with pytest.raises(ValueError, match="weight"):
        loss("x0", "edm")


def test_logit_normal_times_have_their_median_and_spread():
    t = logit_normal_times(20000, 1.2, torch.Generator().manual_seed(0))
    logits = torch.logit(t)
    assert abs(float(logits.mean())) < 0.03
    assert float(logits.std()) == pytest.approx(1.2, rel=0.02)
    with pytest.raises(ValueError, match="scale"):
        logit_normal_times(3, 0.0)
