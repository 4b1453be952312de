"""The training loss against the formulas of the papers, worked out here from the noise schedule."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from diffusers_scalelong.diffusion_loss import diffusion_loss

TIMESTEPS = torch.tensor([0, 40, 250, 700, 999])
# ᾱ_t of DDPM's linear schedule, β from 1e-4 to 0.02 in 1000 steps (arXiv 2006.11239)
ALPHAS = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[TIMESTEPS.numpy()].reshape(-1, 1, 1, 1)
SNR = (ALPHAS / (1 - ALPHAS)).flatten()


@pytest.fixture
def tensors():
    """Clean images, noise and a prediction, in float64."""
    return torch.randn(3, 5, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind()


def loss_of(prediction_type, prediction, clean, noise, snr_gamma=None, dtype=torch.float32):
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    prediction, clean, noise = prediction.to(dtype), clean.float(), noise.float()
    return diffusion_loss(scheduler, prediction, clean, noise, TIMESTEPS, snr_gamma)


def by_hand(prediction_type, prediction, clean, noise, weights):
    prediction, clean, noise = prediction.numpy(), clean.numpy(), noise.numpy()
    target = {
        "epsilon": noise,
        "sample": clean,
        "v_prediction": np.sqrt(ALPHAS) * noise - np.sqrt(1 - ALPHAS) * clean,
    }[prediction_type]
    return float(np.mean(weights * ((prediction - target) ** 2).mean(axis=(1, 2, 3))))


def test_the_schedule_reaches_both_sides_of_gamma():
    assert SNR.max() > 5 > SNR.min()


@pytest.mark.parametrize(
    ("prediction_type", "weights"), [("epsilon", np.ones(5)), ("v_prediction", np.ones(5)), ("sample", SNR)]
)
def test_without_gamma(tensors, prediction_type, weights):
    clean, noise, prediction = tensors
    expected = by_hand(prediction_type, prediction, clean, noise, weights)
    assert loss_of(prediction_type, prediction, clean, noise).item() == pytest.approx(
        expected, rel=1e-3
    )  # 1 - ᾱ_0 in float32


@pytest.mark.parametrize("gamma", [5.0, 1.0, 0.01])
@pytest.mark.parametrize(
    ("prediction_type", "divisor"), [("epsilon", SNR), ("v_prediction", SNR + 1), ("sample", np.ones(5))]
)
def test_min_snr_weights(tensors, prediction_type, divisor, gamma):
    # Hang et al., arXiv 2303.09556, section 3.4
    clean, noise, prediction = tensors
    expected = by_hand(prediction_type, prediction, clean, noise, np.minimum(SNR, gamma) / divisor)
    assert loss_of(prediction_type, prediction, clean, noise, gamma).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("gamma", [5.0, 0.1])
def test_min_snr_is_one_loss_whatever_is_predicted(tensors, gamma):
    clean, noise, _ = tensors
    alphas = torch.from_numpy(ALPHAS)
    noisy = alphas.sqrt() * clean + (1 - alphas).sqrt() * noise
    sample = clean + 0.1 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    epsilon = (noisy - alphas.sqrt() * sample) / (1 - alphas).sqrt()
    velocity = alphas.sqrt() * epsilon - (1 - alphas).sqrt() * sample
    predictions = {"epsilon": epsilon, "v_prediction": velocity, "sample": sample}
    losses = [loss_of(kind, prediction, clean, noise, gamma).item() for kind, prediction in predictions.items()]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-3)


def test_a_prediction_of_the_image_has_the_loss_of_the_noise(tensors):
    # Salimans and Ho, arXiv 2202.00512: the SNR turns one error into the other
    clean, noise, sample = tensors
    alphas = torch.from_numpy(ALPHAS)
    epsilon = noise - (alphas / (1 - alphas)).sqrt() * (sample - clean)
    losses = [loss_of("epsilon", epsilon, clean, noise).item(), loss_of("sample", sample, clean, noise).item()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_half_precision_is_compared_in_float32(tensors):
    clean, noise, prediction = tensors
    loss = loss_of("epsilon", prediction, clean, noise, dtype=torch.bfloat16)
    assert loss.dtype == torch.float32
    rounded = prediction.to(torch.bfloat16).double()
    assert loss.item() == pytest.approx(by_hand("epsilon", rounded, clean, noise, np.ones(5)), rel=1e-5)


def test_an_unknown_prediction_type_is_refused(tensors):
    clean, noise, prediction = tensors
    with pytest.raises(ValueError, match="epsilon, v_prediction or sample, but is 'flow'"):
        loss_of("flow", prediction, clean, noise)
