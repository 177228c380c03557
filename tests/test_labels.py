"""Labels steer what samples show: on phantoms more fibrosis gives more high attenuation."""

import numpy as np
import torch

from fibldm import ct
from fibldm.batches import item_noise, item_uniform
from fibldm.controlnet import make_denoiser
from fibldm.optim import EMA
from fibldm.phantom import phantom_slice
from fibldm.samplers import dpmpp_2m, guide
from fibldm.scheduler import CosineScheduler, diffusion_loss
from fibldm.unet import NO_LABEL, UNet, contour_condition
from fibldm.vae import VAE

SIZE, LATENT = 64, 8
SEVERITIES = (0.0, 0.5, 1.0)  # the classes
PATIENTS, STEPS, BATCH = 60, 500, 16


def high_attenuation_area(slices: np.ndarray, contours: np.ndarray) -> float:
    """Share of the asked lungs that is denser than -600 HU, as fibrosis is and lung is not."""
    return float((ct.unit_to_hu(slices)[contours > 0] > -600).mean())


def test_high_attenuation_area_rises_with_the_label_asked_for():
    """What is trained and sampled is as the scripts do it, at toy size: an untrained VAE is a
    cosine transform, which shows large things."""
    torch.manual_seed(0)
    made = [
        phantom_slice(patient, 0.4 + 0.002 * patient, SIZE, severity)
        for severity in SEVERITIES
        for patient in range(PATIENTS)
    ]
    hu, masks = (np.stack([pair[i] for pair in made]) for i in (0, 1))
    images = torch.from_numpy(ct.hu_to_unit(hu, ct.DEFAULT_WINDOW)).float()[:, None]
    contours = torch.from_numpy(masks.astype(np.uint8))[:, None]
    labels = torch.arange(len(SEVERITIES)).repeat_interleave(PATIENTS)
    # The latents, of mean 0 and variance 1 in each channel.
    vae = VAE(SIZE, LATENT, 8, base_channels=8, blocks=1).eval()
    with torch.no_grad():
        z = vae.encode(images).mean
        seen = vae.decode(z).clamp(-1, 1)[:, 0].numpy()
    real = [high_attenuation_area(seen[labels == k], masks[labels == k]) for k in range(3)]
    mean, std = z.mean(dim=(0, 2, 3), keepdim=True), z.std(dim=(0, 2, 3), keepdim=True)
    latents = (z - mean) / std

    # Training, with labels withheld at random.
    unet, scheduler = (
        UNet(8, LATENT, 1, len(SEVERITIES), channels=(32, 64), blocks=1),
        CosineScheduler(),
    )
    ema = EMA(unet, 0.98)
    optimizer = torch.optim.AdamW(unet.parameters(), 2e-3)
    for step in range(1, STEPS + 1):
        draws = item_uniform(0, "draws", step, range(BATCH), 3)
        rows = (draws[:, 0] * len(latents)).long()
        t = scheduler.training_timesteps(draws[:, 1])
        label = torch.where(draws[:, 2] < 0.1, NO_LABEL, labels[rows])
        noise = item_noise(0, "unet", step, range(BATCH), latents.shape[1:])
        condition = contour_condition(contours[rows], LATENT)
        loss = diffusion_loss(
            lambda x, t, c=condition, y=label: unet(x, t, c, y), scheduler, latents[rows], t, noise
        )
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(unet)

    @torch.no_grad()
    def area(label: torch.Tensor, scale: float = 1.0) -> float:
        asked = contours[: 2 * BATCH]
        given = label.expand(len(asked), *label.shape).clone()
        conditional = make_denoiser(ema.model, None, asked, given)
        without = make_denoiser(ema.model, None, asked)
        denoiser = guide(
            conditional, lambda x, t: (conditional(x, t), without(x, t)), scheduler, scale
        )
        noise = item_noise(1, "sample", 0, range(len(asked)), latents.shape[1:])
        z = dpmpp_2m(denoiser, scheduler, noise, scheduler.timesteps(10)) * std + mean
        return high_attenuation_area(vae.decode(z).clamp(-1, 1)[:, 0].numpy(), asked[:, 0].numpy())

    found = [area(torch.tensor(k)) for k in range(3)]
    assert found[0] < found[1] < found[2], (found, real)
    assert found[2] - found[0] > 0.5 * (real[2] - real[0]), (found, real)

    # Between two labels, and beyond by guidance.
    half = area(torch.tensor([0.5, 0.0, 0.5]))
    assert found[0] < half < found[2], (half, found)
    guided = [area(torch.tensor(k), 2.0) for k in (0, 2)]
    assert guided[1] - guided[0] > found[2] - found[0], (guided, found)
