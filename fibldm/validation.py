"""What the two diffusion stages measure from the averaged weights, on held-out patients."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fibldm import distributed
from fibldm.batches import item_noise
from fibldm.controlnet import make_denoiser
from fibldm.ct import unit_to_hu
from fibldm.datasets import chunks, spread
from fibldm.distributed import say, warn
from fibldm.encoding import LatentDataset
from fibldm.features import Networks, missing_weights
from fibldm.lungs import lung_mask
from fibldm.metrics import contour_dice, set_distances
from fibldm.panels import write_samples
from fibldm.privacy import read_privacy
from fibldm.run import Run
from fibldm.scheduler import diffusion_loss
from fibldm.synthesis import Models, Synthesizer

NOISE_LEVELS = 8  # timesteps of the validation loss, for equal shares of those of training
GRID = 16  # samples in the picture
TRAINING_ROWS = 65_536  # at most in which copies are looked for: half a GiB to read each time
REAL_SLICES = 2048  # held-out slices at most, evenly spaced, that samples are compared with
BATCH = 32
FOLLOWED = 0.95  # of the Dice that the lungs of real slices have with their own contours
FEW_SLICES = 20_000  # of training, repeats included: measured, control was not learnt by fewer
SEED = 0  # of validation's noise: the same in all runs, so that they can be compared


class Validation:
    """Fixed held-out contours with fixed noise: the loss by noise level, and samples measured.

    samples: contours to sample for, at most; steps: of the sampler; max_copies: share of samples
    that may be copies. The ranks share the work.
    """

    def __init__(
        self,
        data: LatentDataset,
        synthesizer: Synthesizer,
        run: Run,
        samples: int,
        steps: int,
        max_copies: float,
    ) -> None:
        self.data, self.synthesizer, self.run = data, synthesizer, run
        self.steps, self.max_copies, self.device = steps, max_copies, synthesizer.device
        held = data.indices("val")
        self.rows = spread(held, samples)
        self.own = distributed.share(len(self.rows))  # this rank's positions in them
        self.realism = Realism(self.device, self.heldout(spread(held, REAL_SLICES)))
        for remedy in self.realism.networks.missing.values():
            say(remedy)

        # What the lungs of the real slices have, the contours of others, and how near others are.
        own = [self.rows[i] for i in self.own]
        images = data.heldout_images(own, torch.device("cpu"))[:, 0].numpy()
        agreement = dice(images, data.contours[own], data.window)
        self.real_dice = float(np.concatenate(distributed.gather(agreement)).mean())
        half = len(self.rows) // 2
        self.others = [*self.rows[half:], *self.rows[:half]]
        self.privacy = read_privacy(data, TRAINING_ROWS)
        slices = run.plan.steps * run.plan.batch_size
        if slices < FEW_SLICES:
            warn(
                f"--steps {run.plan.steps} of --batch_size {run.plan.batch_size} are {slices} "
                f"slices, repeats included; expected at least {FEW_SLICES} for samples that follow "
                "their contours: see val/dice"
            )

    def heldout(self, rows: list[int]) -> Iterator[Tensor]:
        """This rank's share of held-out slices, in batches."""
        for some in chunks([rows[i] for i in distributed.share(len(rows))], BATCH):
            distributed.alive()
            yield self.data.heldout_images(some, self.device)

    def measure(self, step: int) -> bool:
        """Log loss and samples, and draw them; whether this snapshot is the best so far."""
        run = self.run
        if run.rehearsing:
            self.loss(self.own[:BATCH])
            self.samples(self.own[:BATCH], step)
            return True
        values = {**self.loss(self.own), **self.samples(self.own, step)}
        run.log(step, values, "val")
        copies = values.get("copies", 0) > self.max_copies
        if copies:
            classes = [n for n in self.data.classes if f"copies_{n}" in values]
            shares = ", ".join(f"{name} {values[f'copies_{name}']:.0%}" for name in classes)
            warn(
                f"step {step}: {values['copies']:.0%} of the samples{shares and f' ({shares})'} "
                "are nearer to a training slice than held-out slices are "
                f"(--max_copies {self.max_copies:g}): the model "
                "memorizes. More patients or --views, a smaller model or more --dropout help; an "
                "earlier snapshot is kept as the best where there is one"
            )
        best = run.progress.improve(values["loss"], copies)
        self._say_whether_followed(step, values["dice"])
        return best

    def _say_whether_followed(self, step: int, found: float) -> None:
        """Say when samples first follow their contours, and at the end where they do not."""
        plan, progress = self.run.plan, self.run.progress
        wanted = FOLLOWED * self.real_dice
        if found >= wanted and not progress.followed:
            progress.followed = step
            say(
                f"samples follow their contours at step {step}: Dice {found:.3f}, "
                f"{self.real_dice:.3f} in the real slices"
            )
        last = step == plan.steps or 0 < plan.patience <= progress.worse
        if last and not progress.followed:
            warn(
                f"after {step} steps the samples do not follow their contours: Dice {found:.3f}, "
                f"expected {wanted:.3f}; train for more --steps, or larger batches"
            )

    @torch.no_grad()
    def loss(self, own: Sequence[int]) -> dict[str, float]:
        """Mean loss, the loss at each noise level, and what it loses by contours of others.

        Deterministic for the same weights. `contour_gap` is what the loss alone hides: by how much
        it rises, as a share, where each slice is given the contour of another.
        """
        middles = (torch.arange(NOISE_LEVELS) + 0.5) / NOISE_LEVELS
        levels = self.synthesizer.scheduler.training_timesteps(middles).tolist()
        totals, models = torch.zeros(2, NOISE_LEVELS).double(), self.synthesizer.frozen_models()
        for places in chunks(own, BATCH):
            distributed.alive()
            rows = [self.rows[i] for i in places]
            latents, contours, labels = self.data.batch(rows, self.device)
            _, others, _ = self.data.batch([self.others[i] for i in places], self.device)
            for total, given in zip(totals, (contours, others), strict=True):
                total += self._losses(models, rows, levels, latents, given, labels)
        totals = distributed.sum_over_ranks(totals.to(self.device)).cpu() / len(self.rows)
        right, wrong = totals.mean(dim=1).tolist()
        by_level = {f"loss_t{level}": float(v) for level, v in zip(levels, totals[0], strict=True)}
        return {"loss": right, "contour_gap": wrong / max(right, 1e-12) - 1, **by_level}

    def _losses(
        self,
        models: Models,
        rows: list[int],
        levels: list[int],
        x0: Tensor,
        contours: Tensor,
        labels: Tensor,
    ) -> Tensor:
        """The sum of the rows' losses at each level, on the CPU, float64."""
        model, totals = self.synthesizer, []
        with model.precision.autocast():
            denoiser = make_denoiser(*models, contours, labels)
            for level in levels:
                noise = item_noise(SEED, "val", level, rows, x0.shape[1:]).to(self.device)
                t = torch.full((len(rows),), level, device=self.device)
                losses = diffusion_loss(denoiser, model.scheduler, x0, t, noise)
                totals.append(losses.double().sum())
        return torch.stack(totals).cpu()

    def samples(self, own: Sequence[int], step: int) -> dict[str, float]:
        """Sample for the fixed contours, draw the grid, measure realism and contour Dice."""
        data, classes, size = self.data, self.data.classes, self.data.image_size
        labels = [data.table["label"][row] for row in self.rows]
        labels = [label if label in classes else None for label in labels]
        samples = self.synthesizer.sample(
            data.contours[self.rows], labels, indices=own, seed=SEED, steps=self.steps,
            batch_size=BATCH,
        )  # fmt: skip
        images, latents = [np.zeros((0, size, size), np.float32)], []
        for sample in samples:
            distributed.alive()
            images.append(sample.image[None])
            latents.append(sample.latent)
        drawn, rows = np.concatenate(images), [self.rows[i] for i in own]
        for places in chunks(range(len(rows)), BATCH):
            real = data.heldout_images([rows[i] for i in places], self.device)
            self.realism.add(torch.from_numpy(drawn[places])[:, None], real)
        agreement = dice(drawn, data.contours[rows], data.window)
        agreement = np.concatenate(distributed.gather(agreement))
        shown = np.concatenate(distributed.gather(drawn[:GRID]))[:GRID]
        contours = data.contours[self.rows[: len(shown)]]
        self.run.picture(step, lambda path: write_samples(path, shown, contours))
        values = {**self.realism.compute(), "dice": float(agreement.mean())}
        return {**values, **self.copying(latents, [labels[i] for i in own])}

    def copying(self, latents: list[np.ndarray], labels: list[str | None]) -> dict[str, float]:
        """`copies`: the share of all ranks' samples that are copies, by their latents.

        `copies_NAME`: of those asked for by a class. `distance_to_training`: of the samples to the
        nearest training slice, the median; 1 is that of held-out slices, 0 a copy (fibldm.privacy).
        """
        if self.privacy is None:
            return {}
        matches = self.privacy.nearest(None, np.stack(latents)) if latents else []
        own = zip(labels, matches, strict=True)
        own = [(label, match.flagged, match.distances["latents"]) for label, match in own]
        found = [sample for rank in distributed.gather(own) for sample in rank]
        copies = {"copies": float(np.mean([flagged for _, flagged, _ in found]))}
        for name in self.data.classes:
            if flags := [flagged for label, flagged, _ in found if label == name]:
                copies[f"copies_{name}"] = float(np.mean(flags))
        usual = float(np.median(self.privacy.heldout["latents"]))
        distance = float(np.median([distance for *_, distance in found]))
        return {**copies, "distance_to_training": distance / max(usual, 1e-12)}


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


def dice(images: np.ndarray, contours: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Dice (N,) of contours (N, K, H, W) and the lungs in slices (N, H, W) in [-1, 1]."""
    if len(images) == 0:
        return np.zeros(0)
    masks = np.stack([lung_mask(hu) for hu in unit_to_hu(images, window)])
    return contour_dice(masks, contours.max(axis=1) > 0)
