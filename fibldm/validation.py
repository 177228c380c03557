"""What the two diffusion stages measure from the EMA while they train, on held-out patients."""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fibldm import distributed
from fibldm.ct import unit_to_hu
from fibldm.datasets import LatentDataset, chunks
from fibldm.lungs import lung_mask
from fibldm.metrics import RealismMetrics, contour_dice
from fibldm.panels import write_samples
from fibldm.samplers import dpmpp_2m
from fibldm.scheduler import CosineScheduler, Denoiser, diffusion_loss
from fibldm.training import Precision, Run, item_noise, positive
from fibldm.vae import LATENT_SCALE, VAE

NOISE_LEVELS = 8  # the validation loss is the mean over this many timesteps, evenly spaced
GRID = 16  # samples in the picture
BATCH = 32
SEED = 0  # of validation's noise: the same in all runs, so that they can be compared

Steer = Callable[[Tensor, Tensor], Denoiser]  # contours (N, K, H, W), labels (N,) -> denoiser


def add_validation_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("validation")
    group.add_argument(
        "--val_samples", type=positive, default=64, help="held-out contours to sample for"
    )
    group.add_argument("--val_sampling_steps", type=positive, default=20, help="DPM-Solver++ steps")


class Validation:
    """Fixed held-out contours with fixed noise: the loss by noise level, and samples measured."""

    def __init__(
        self,
        data: LatentDataset,
        vae: VAE,
        scheduler: CosineScheduler,
        args: argparse.Namespace,
        precision: Precision,
        run: Run,
    ) -> None:
        self.data, self.vae, self.scheduler, self.args = data, vae, scheduler, args
        self.precision, self.device = precision, precision.device
        held = data.indices("val")
        picked = np.linspace(0, len(held) - 1, min(args.val_samples, len(held))).round()
        self.rows = [held[int(i)] for i in picked]
        self.mine = [self.rows[i] for i in distributed.share(len(self.rows))]
        self.metrics = RealismMetrics(self.device)
        for remedy in dict.fromkeys(self.metrics.missing.values()):
            run.say(remedy)
        real = [held[i] for i in distributed.share(len(held))]
        for rows in chunks(real, BATCH):
            self.metrics.update_real(data.heldout_images(rows, self.device))

    def measure(self, steer: Steer, run: Run, step: int) -> float:
        """Loss, samples and their grid, logged as the run's; returns the loss."""
        path = run.folder / "samples" / f"step_{step:07d}.png"
        values = {**self.loss(steer), **self.samples(steer, path)}
        run.log(step, values, "val")
        run.picture(step, "samples", path)
        return values["loss"]

    @torch.no_grad()
    def loss(self, steer: Steer) -> dict[str, float]:
        """Mean loss, and the loss at each noise level; deterministic for the same weights."""
        last = self.scheduler.num_timesteps - 1
        levels = [round((i + 0.5) / NOISE_LEVELS * last) for i in range(NOISE_LEVELS)]
        totals = torch.zeros(NOISE_LEVELS, dtype=torch.float64)
        for rows in chunks(self.mine, BATCH):
            latents, contours, labels = self.data.batch(rows, self.device)
            with self.precision.autocast():
                denoiser = steer(contours, labels)
                for i, level in enumerate(levels):
                    noise = item_noise(SEED, "val", level, rows, latents.shape[1:])
                    t = torch.full((len(rows),), level, device=self.device)
                    losses = diffusion_loss(
                        denoiser, self.scheduler, latents, t, noise.to(self.device)
                    )
                    totals[i] += losses.double().sum().cpu()
        totals = distributed.sum_over_ranks(totals.to(self.device)).cpu() / len(self.rows)
        by_level = {f"loss_t{level}": float(v) for level, v in zip(levels, totals, strict=True)}
        return {"loss": float(totals.mean()), **by_level}

    @torch.no_grad()
    def samples(self, steer: Steer, grid: Path) -> dict[str, float]:
        """Sample for the fixed contours, write the grid, measure realism and contour Dice."""
        images, size = [], self.data.image_size
        timesteps = self.scheduler.timesteps(self.args.val_sampling_steps)
        self.metrics.reset()
        for rows in chunks(self.mine, BATCH):
            latents, contours, labels = self.data.batch(rows, self.device)
            noise = item_noise(SEED, "sample", 0, rows, latents.shape[1:]).to(self.device)
            with self.precision.autocast():
                z = dpmpp_2m(steer(contours, labels), self.scheduler, noise, timesteps)
            pixels = item_noise(SEED, "grain", 0, rows, (1, size, size)).to(self.device)
            batch = self.vae.decode(z.float() / LATENT_SCALE, pixels).clamp(-1, 1)
            self.metrics.update_fake(batch, self.data.heldout_images(rows, self.device))
            images.append(batch[:, 0].cpu().numpy())
        empty = np.zeros((0, size, size), np.float32)
        drawn = np.concatenate([empty, *images])
        agreement = dice(drawn, self.data.contours[self.mine], self.data.window)
        agreement = np.concatenate(distributed.gather(agreement))
        shown = np.concatenate(distributed.gather(drawn[:GRID]))[:GRID]
        if distributed.is_main():
            write_samples(grid, shown, self.data.contours[self.rows[: len(shown)]])
        return {**self.metrics.compute(), "dice": float(agreement.mean())}


def dice(images: np.ndarray, contours: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Dice (N,) of contours (N, K, H, W) and the lungs in slices (N, H, W) in [-1, 1]."""
    if len(images) == 0:
        return np.zeros(0)
    masks = np.stack([lung_mask(hu) for hu in unit_to_hu(images, window)])
    return contour_dice(masks, contours.max(axis=1) > 0)
