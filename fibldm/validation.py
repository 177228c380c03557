"""What the two diffusion stages measure from the EMA while they train, on held-out patients."""

import argparse
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fibldm import distributed
from fibldm.anatomy import hu_problem
from fibldm.batches import item_noise
from fibldm.ct import unit_to_hu
from fibldm.datasets import chunks
from fibldm.encoding import LatentDataset
from fibldm.features import Networks, missing_weights
from fibldm.lungs import lung_mask
from fibldm.metrics import contour_dice, set_distances
from fibldm.optim import Precision
from fibldm.panels import write_samples
from fibldm.privacy import Privacy, Rows, evenly_over
from fibldm.run import Run
from fibldm.samplers import dpmpp_2m
from fibldm.scheduler import CosineScheduler, Denoiser, diffusion_loss
from fibldm.vae import LATENT_SCALE, VAE

NOISE_LEVELS = 8  # the validation loss is the mean over this many timesteps, evenly spaced
GRID = 16  # samples in the picture
TRAINING_ROWS = 65_536  # at most in which copies are looked for: half a GiB to read each time
REAL_SLICES = 2048  # held-out slices at most, evenly spaced, that samples are compared with
BATCH = 32
FOLLOWED = 0.95  # of the Dice that the lungs of real slices have with their own contours
FEW_SLICES = 20_000  # of training, repeats included: measured, control was not learnt by fewer
SEED = 0  # of validation's noise: the same in all runs, so that they can be compared

Steer = Callable[[Tensor, Tensor], Denoiser]  # contours (N, K, H, W), labels (N,) -> denoiser


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
        self.precision, self.device, self.run = precision, precision.device, run
        held = data.indices("val")
        self.rows = spread(held, args.val_samples)
        self.mine = [self.rows[i] for i in distributed.share(len(self.rows))]
        self.realism = Realism(self.device, self.heldout(spread(held, REAL_SLICES)))
        for remedy in self.realism.networks.missing.values():
            run.say(remedy)

        # What the lungs of the real slices have, the contours of others, and how near others are.
        images = data.heldout_images(self.mine, torch.device("cpu"))[:, 0].numpy()
        agreement = dice(images, data.contours[self.mine], data.window)
        self.real_dice = float(np.concatenate(distributed.gather(agreement)).mean())
        count = len(self.rows)
        self.other = {row: self.rows[(i + count // 2) % count] for i, row in enumerate(self.rows)}
        self.privacy = read_privacy(data, TRAINING_ROWS)
        if args.steps * args.batch_size < FEW_SLICES:
            run.warn(
                [
                    f"--steps {args.steps} of --batch_size {args.batch_size} are "
                    f"{args.steps * args.batch_size} slices, repeats included; expected at least "
                    f"{FEW_SLICES} for samples that follow their contours: see val/dice"
                ]
            )

    def heldout(self, rows: list[int]) -> Iterator[Tensor]:
        """This rank's share of held-out slices, in batches."""
        for some in chunks([rows[i] for i in distributed.share(len(rows))], BATCH):
            distributed.alive()
            yield self.data.heldout_images(some, self.device)

    def measure(self, steer: Steer, run: Run, step: int) -> bool:
        """Loss, samples and their grid, logged as the run's; whether this snapshot is the best."""
        path = run.folder / "samples" / f"step_{step:07d}.png"
        values = {**self.loss(steer), **self.samples(steer, path)}
        run.log(step, values, "val")
        run.picture(step, path)
        wanted = FOLLOWED * self.real_dice
        if values["dice"] >= wanted and not run.progress["followed"]:
            run.progress["followed"] = step
            run.say(
                f"samples follow their contours at step {step}: Dice {values['dice']:.3f}, "
                f"{self.real_dice:.3f} in the real slices"
            )
        copies = values.get("copies", 0) > self.args.max_copies
        if copies:
            run.warn(
                [
                    f"step {step}: {values['copies']:.0%} of the samples are nearer to a training "
                    f"slice than held-out slices are (--max_copies {self.args.max_copies:g}): the "
                    "model memorizes. More patients or --views, a smaller model or more --dropout "
                    "help; an earlier snapshot is kept as the best where there is one"
                ]
            )
        best = run.is_best(values["loss"], copies)
        last = step == self.args.steps or 0 < self.args.patience <= run.progress["worse"]
        if last and not run.progress["followed"]:
            run.warn(
                [
                    f"after {step} steps the samples do not follow their contours: Dice "
                    f"{values['dice']:.3f}, expected {wanted:.3f}; train for more --steps, or "
                    "larger batches"
                ]
            )
        return best

    def rehearse(self, steer: Steer, folder: Path) -> None:
        """The first batch of all that `measure` does, logged and remembered nowhere."""
        trial = copy.copy(self)
        trial.mine = self.mine[:BATCH]
        trial.loss(steer)
        trial.samples(steer, folder / "samples.png")

    @torch.no_grad()
    def loss(self, steer: Steer) -> dict[str, float]:
        """Mean loss, the loss at each noise level, and what it loses by contours of others.

        Deterministic for the same weights. `contour_gap` is what the loss alone hides: by how much
        it rises, as a share, where each slice is given the contour of another.
        """
        last = self.scheduler.num_timesteps - 1
        levels = [round((i + 0.5) / NOISE_LEVELS * last) for i in range(NOISE_LEVELS)]
        totals = torch.zeros(2, NOISE_LEVELS, dtype=torch.float64)
        for rows in chunks(self.mine, BATCH):
            distributed.alive()
            latents, contours, labels = self.data.batch(rows, self.device)
            _, others, _ = self.data.batch([self.other[row] for row in rows], self.device)
            with self.precision.autocast():
                for total, given in zip(totals, (contours, others), strict=True):
                    denoiser = steer(given, labels)
                    for i, level in enumerate(levels):
                        noise = item_noise(SEED, "val", level, rows, latents.shape[1:])
                        t = torch.full((len(rows),), level, device=self.device)
                        losses = diffusion_loss(
                            denoiser, self.scheduler, latents, t, noise.to(self.device)
                        )
                        total[i] += losses.double().sum().cpu()
        totals = distributed.sum_over_ranks(totals.to(self.device)).cpu() / len(self.rows)
        right, wrong = totals.mean(dim=1).tolist()
        by_level = {f"loss_t{level}": float(v) for level, v in zip(levels, totals[0], strict=True)}
        return {"loss": right, "contour_gap": wrong / max(right, 1e-12) - 1, **by_level}

    @torch.no_grad()
    def samples(self, steer: Steer, grid: Path) -> dict[str, float]:
        """Sample for the fixed contours, write the grid, measure realism and contour Dice."""
        images, latents, size = [], [], self.data.image_size
        timesteps = self.scheduler.timesteps(self.args.val_sampling_steps)
        for rows in chunks(self.mine, BATCH):
            distributed.alive()
            x0, contours, labels = self.data.batch(rows, self.device)
            noise = item_noise(SEED, "sample", 0, rows, x0.shape[1:]).to(self.device)
            with self.precision.autocast():
                z = dpmpp_2m(steer(contours, labels), self.scheduler, noise, timesteps)
            pixels = item_noise(SEED, "grain", 0, rows, (1, size, size)).to(self.device)
            batch = self.vae.decode(z.float() / LATENT_SCALE, pixels).clamp(-1, 1)
            self.realism.add(batch, self.data.heldout_images(rows, self.device))
            images.append(batch[:, 0].cpu().numpy())
            latents.append(z.float().cpu().numpy())
        empty = np.zeros((0, size, size), np.float32)
        drawn = np.concatenate([empty, *images])
        agreement = dice(drawn, self.data.contours[self.mine], self.data.window)
        agreement = np.concatenate(distributed.gather(agreement))
        shown = np.concatenate(distributed.gather(drawn[:GRID]))[:GRID]
        if distributed.is_main():
            with self.run.keep_going(grid):
                write_samples(grid, shown, self.data.contours[self.rows[: len(shown)]])
        values = {**self.realism.compute(), "dice": float(agreement.mean())}
        return {**values, **self.copying(latents)}

    def copying(self, latents: list[np.ndarray]) -> dict[str, float]:
        """`copies`: the share of all ranks' samples that are copies, by their latents.

        `distance_to_training`: of the samples to the nearest training slice, the median; 1 is
        that of held-out slices, 0 a copy (fibldm.privacy).
        """
        if self.privacy is None:
            return {}
        matches = [match for part in latents for match in self.privacy.nearest(None, part)]
        found = [(match.flagged, match.distances["latents"]) for match in matches]
        everywhere = np.array([pair for part in distributed.gather(found) for pair in part])
        usual = float(np.median(self.privacy.heldout["latents"]))
        return {
            "copies": float(everywhere[:, 0].mean()),
            "distance_to_training": float(np.median(everywhere[:, 1])) / max(usual, 1e-12),
        }


class Realism:
    """FID (arXiv 1706.08500), KID, LPIPS and SSIM of samples while a model trains, over all ranks.

    Each rank gives its own share, of any size, and all get the same numbers; all ranks call the
    constructor and `compute`. Features are kept in main memory: 8 KB an image. FID falls with the
    number of images: compare values of equal n_real and n_fake only.
    """

    def __init__(self, device: torch.device, real: Iterable[Tensor]) -> None:
        """real: batches of this rank's held-out slices (N, 1, H, W) in [-1, 1]."""
        missing: dict[str, str] = {}  # what one rank lacks: they take part in the same collectives
        for lacking in distributed.gather(missing_weights(["fid", "kid", "lpips"])):
            missing = lacking | missing
        self.networks = Networks(device, missing)
        self.real = everywhere([self.networks.features(images) for images in real])
        self._fake: list[Tensor] = []
        self._pairs: dict[str, list[float]] = {"ssim": [], "lpips": []}

    def add(self, images: Tensor, paired_real: Tensor | None = None) -> None:
        """Add samples (N, 1, H, W) in [-1, 1], and the slices whose contours they were given."""
        if paired_real is not None:
            for name, values in self.networks.pairs(images, paired_real).items():
                self._pairs[name] += values.tolist()
        self._fake.append(self.networks.features(images))

    def compute(self) -> dict[str, float]:
        """fid, kid, lpips, ssim, n_real, n_fake: of the samples since the last call.

        A metric is there only if its weights are and its images suffice.
        """
        fake, result = everywhere(self._fake), {}
        if self.networks.inception is not None and distributed.is_main():
            # Eigenvalues take seconds on a CPU: one rank computes, all get its numbers.
            result = set_distances(self.real, fake, self.networks.device)
        result = distributed.gather(result)[0]
        result |= {"n_real": float(len(self.real)), "n_fake": float(len(fake))}
        for name, values in self._pairs.items():
            together = [value for rank in distributed.gather(values) for value in rank]
            if together:
                result[name] = float(np.mean(together))
            values.clear()
        self._fake.clear()
        return result


def everywhere(features: list[Tensor]) -> Tensor:
    """The features of all ranks, in the order of the ranks; (0, 0) of no image."""
    parts = [part for rank in distributed.gather(features) for part in rank]
    return torch.cat(parts) if parts else torch.empty(0, 0)


def spread(rows: Sequence[int], most: int) -> list[int]:
    """At most so many of the rows, evenly spaced."""
    return [rows[int(i)] for i in np.linspace(0, len(rows) - 1, min(most, len(rows))).round()]


def read_privacy(data: LatentDataset, most: int | None = None) -> Privacy | None:
    """The training latents, with thresholds by the held-out ones; None where these are too few.

    most: training rows at most, evenly spaced over the patients. Copies of the others are not
    found then. The thresholds hold all the same: held-out slices set them by the same rows that
    samples are compared with, so that as few of them are flagged.
    """
    patients = data.table["patient_id"].to_numpy(str)
    train, held = (np.array(data.indices(*s), int) for s in (("train",), ("val", "test")))
    if len(held) < 2:
        return None
    if most is not None:
        train = train[evenly_over(patients[train], most)]
    privacy = Privacy(None, patients[train], Rows(data.latents, train))
    privacy.calibrate(None, Rows(data.latents, held), patients[held])
    return privacy


def dice(images: np.ndarray, contours: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Dice (N,) of contours (N, K, H, W) and the lungs in slices (N, H, W) in [-1, 1]."""
    if len(images) == 0:
        return np.zeros(0)
    masks = np.stack([lung_mask(hu) for hu in unit_to_hu(images, window)])
    return contour_dice(masks, contours.max(axis=1) > 0)


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
