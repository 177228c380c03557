"""What is going wrong in a VAE's training: each failure by its name, with what to do about it."""

import math

import numpy as np
from torch import Tensor

from fibldm.inspection import hu_problem

DROWNED = 0.1  # share of signal in a latent channel's variance, below which it carries nothing
EXPLODED = 30.0  # standard deviation of a latent channel; at the start of training it is about 1
ANEW = ", in another --save_dir"  # a run keeps its options
BIAS = 0.02  # of the mean in [-1, 1]: 14 HU at the default window
FLAT = 0.9  # standard deviation of reconstructions over that of slices


def input_warnings(slices: dict[str, np.ndarray]) -> list[str]:
    """Slices (HU, by name) whose values are not chest CT's: their scale is not as declared."""
    found = {name: problem for name, hu in slices.items() if (problem := hu_problem(hu))}
    if not found:
        return []
    name, problem = next(iter(found.items()))
    most = len(found) > len(slices) / 2
    remedy = "correct rescale_slope and rescale_intercept in dataset.json, or --window; " * most
    return [
        f"{len(found)} of {len(slices)} slices looked at do not have the HU of chest CT, "
        f"{name}: {problem}; {remedy}scripts/check_data.py names all of them"
    ]


def latent_warnings(std: Tensor, noise_std: Tensor) -> list[str]:
    """Channels that carry nothing, and latents that grow out of all bounds.

    std, noise_std: (C,), standard deviation of the posterior's mean over slices, and the
    posterior's own.
    """
    if not (std.isfinite().all() and noise_std.isfinite().all()):
        return [f"latents are NaN or infinite: the training has diverged; lower --lr{ANEW}"]
    signal = std.square() / (std.square() + noise_std.square()).clamp(min=1e-12)
    warnings = []
    if dead := [i for i, share in enumerate(signal.tolist()) if share < DROWNED]:
        warnings.append(
            f"latent channels {dead} have collapsed: less than {DROWNED:.0%} of what the decoder "
            f"gets in them is signal; lower --kl_weight, or take a smaller --latent_dim{ANEW}"
        )
    if (largest := float(std.max())) > EXPLODED:
        warnings.append(
            f"the latent scale explodes: standard deviation {largest:.3g} in a channel, expected "
            f"about 1; raise --kl_weight, or lower --lr{ANEW}"
        )
    return warnings


def reconstruction_warnings(brightness: float, contrast: float) -> list[str]:
    """Reconstructions of another mean or spread than their slices.

    brightness: mean difference of reconstruction and slice, in [-1, 1]; contrast: ratio of their
    standard deviations.
    """
    if not (math.isfinite(brightness) and math.isfinite(contrast)):
        return [f"reconstructions are NaN or infinite: the training has diverged; lower --lr{ANEW}"]
    warnings = []
    if abs(brightness) > BIAS:
        warnings.append(
            f"reconstructions are {'darker' if brightness < 0 else 'brighter'} than their slices "
            f"by {abs(brightness) / 2:.1%} of the window, expected at most {BIAS / 2:.1%}; train "
            f"longer, or lower --perceptual_weight{ANEW}"
        )
    if contrast < FLAT:
        warnings.append(
            f"reconstructions are flatter than their slices: {contrast:.2f} times their standard "
            f"deviation, expected {FLAT:g} and more; train longer, or lower --kl_weight{ANEW}"
        )
    return warnings


def moments(sums: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) from the sums of values and of squares (2, C), float64."""
    mean, square = sums / count
    return mean.float(), (square - mean.square()).clamp(min=0).sqrt().float()


def heldout_latents(
    train: tuple[Tensor, Tensor], heldout: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """Worst channel of held-out latents that are made standard by the moments of training slices.

    train, heldout: mean and standard deviation (C,). `latent_mean`, expected 0, and
    `latent_variance`, expected 1: those that are furthest from it.
    """
    spread = train[1].clamp(min=1e-6)
    mean = (heldout[0] - train[0]) / spread
    variance = (heldout[1] / spread).square()
    return {
        "latent_mean": float(mean[mean.abs().argmax()]),
        "latent_variance": float(variance[(variance - 1).abs().argmax()]),
    }
