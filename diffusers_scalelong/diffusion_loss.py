"""The loss of diffusion training."""

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch.nn import functional as F


def diffusion_loss(
    noise_scheduler: DDPMScheduler,
    prediction: torch.Tensor,
    clean: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    snr_gamma: float | None = None,
) -> torch.Tensor:
    """The mean squared error of a prediction, in float32.

    Args:
        noise_scheduler: its `prediction_type` says what is predicted. `"sample"` is weighted by the signal-to-noise
            ratio, which makes it the loss of the noise (Salimans and Ho, arXiv 2202.00512).
        prediction, clean, noise: (batch, channels, height, width).
        timesteps: (batch,).
        snr_gamma: γ of min-SNR-γ weighting (Hang et al., arXiv 2303.09556, section 3.4); `None` for no weighting.

    Returns:
        A scalar.

    Raises:
        ValueError: an unknown prediction type.
    """
    prediction_type = noise_scheduler.config.prediction_type
    if prediction_type == "epsilon":
        target = noise
    elif prediction_type == "v_prediction":
        target = noise_scheduler.get_velocity(clean, noise, timesteps)
    elif prediction_type == "sample":
        target = clean
    else:
        raise ValueError(f"The prediction type must be epsilon, v_prediction or sample, but is {prediction_type!r}.")
    if snr_gamma is None and prediction_type != "sample":
        return F.mse_loss(prediction.float(), target.float())

    error = F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
    snr = compute_snr(noise_scheduler, timesteps)
    # Each weight is the one of the clean image's error, min(SNR, γ), over the ratio of that error to the target's.
    weight = snr if snr_gamma is None else snr.clamp(max=snr_gamma)
    ratio = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction_type]
    return (weight / ratio * error).mean()
