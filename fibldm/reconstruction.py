"""What the VAE's training measures on held-out patients, and what it warns of."""

import copy
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fibldm import distributed
from fibldm.anatomy import hu_problem
from fibldm.batches import item_noise, item_uniform
from fibldm.datasets import CTDataset, ahead, chunks, load_slices, spread
from fibldm.distributed import say, warn
from fibldm.features import load_lpips, missing_weights, reconstruction_metrics
from fibldm.panels import write_reconstructions
from fibldm.run import Run
from fibldm.texture import random_angles
from fibldm.vae import TEXTURE_WEIGHT, VAE, clipped, reconstruct

SEED = 0  # of validation's random numbers: the same in all runs, so that they can be compared
BATCH, PANEL = 16, 8  # slices at a time, in the picture
LOOKED_AT = 16  # slices at most, evenly spaced, whose values are looked at before the start
MEASURED = 4096  # slices at most, evenly spaced, for the mean and variance of the latents
DROWNED = 0.1  # share of signal in a latent channel's variance, below which it carries nothing
EXPLODED = 30.0  # standard deviation of a latent channel; at the start of training it is about 1
ANEW = ", in another --save_dir"  # a run keeps its options
BIAS = 0.02  # of the mean in [-1, 1]: 14 HU at the default window
FLAT = 0.9  # standard deviation of reconstructions over that of slices


class VAEValidation:
    """Held-out slices, encoded and decoded: the loss, other metrics, and how latents are spread.

    The ranks share the slices. Noise and angles are each slice's own, and always the same.
    """

    def __init__(self, data: CTDataset, run: Run) -> None:
        self.data, self.run = data, run
        missing = distributed.gather(missing_weights(["lpips"]))  # a rank may lack what others have
        self.lpips = None if any(missing) else load_lpips(run.device)
        say(*{text for found in missing for text in found.values()})

    def measure(self, vae: VAE, step: int) -> VAE | None:
        """Log and draw; a copy of the VAE with standard latents where it is the best so far."""
        run, held, trained_on = self.run, self.data.indices("val"), self.data.indices("train")
        if run.rehearsing:
            held = trained_on = held[: BATCH * distributed.world_size()]
        values, heldout, noise_std = self.reconstruct(vae, held)
        run.picture(step, partial(self.draw, vae, held[:PANEL]))
        best = run.progress.improve(values["loss"])
        if run.rehearsing:
            self.latent_moments(vae, trained_on)
            return vae
        warn(*latent_warnings(heldout[1], noise_std))
        warn(*reconstruction_warnings(values["brightness"], values["contrast"]))
        snapshot = None
        if best:
            snapshot = copy.deepcopy(vae)
            trained = self.latent_moments(snapshot, trained_on)
            values |= heldout_latents(trained, heldout)
        run.log(step, values, "val")
        if snapshot is not None:
            snapshot.calibrate(*trained)
        return snapshot

    @torch.no_grad()
    def reconstruct(
        self, vae: VAE, rows: list[int]
    ) -> tuple[dict[str, float], tuple[Tensor, Tensor], Tensor]:
        """Mean metrics; mean and standard deviation (C,) of the latents; and their noise's."""
        own = [rows[i] for i in distributed.share(len(rows))]
        totals: dict[str, Tensor] = {}
        sums = self._sums(3, vae)
        for batch_rows, x in self._slices(own):
            posterior = vae.encode(x)
            for name, value in self._metrics(vae, posterior.mean, x, batch_rows).items():
                totals[name] = totals.get(name, 0) + value.sum().double()
            mean, noise = posterior.mean.double(), posterior.logvar.double().exp()
            sums += torch.stack([mean, mean.square(), noise]).sum(dim=(1, 3, 4))
        everywhere = distributed.gather({name: float(total) for name, total in totals.items()})
        names = dict.fromkeys(name for found in everywhere for name in found)
        values = {n: sum(found.get(n, 0.0) for found in everywhere) / len(rows) for n in names}
        count = len(rows) * vae.config["latent_size"] ** 2
        sums = distributed.sum_over_ranks(sums)
        return values, moments(sums[:2], count), (sums[2] / count).sqrt().float()

    def _metrics(self, vae: VAE, z: Tensor, x: Tensor, rows: list[int]) -> dict[str, Tensor]:
        """Loss and metrics (N,) of slices that are decoded, and the PSNR of their means."""
        known = vae.likelihood(z)
        noise = item_noise(SEED, "texture", 0, rows, x.shape[1:]).to(x.device)
        angles = random_angles(item_uniform(SEED, "angle", 0, rows, 1)[:, 0]).to(x.device)
        texture = vae.texture.loss(known, x, noise, angles)
        loss = (known.mean - x).abs().mean(dim=(1, 2, 3)) + TEXTURE_WEIGHT * texture
        drawn = clipped(vae.draw(known, noise))
        metrics = {"loss": loss, "texture": texture}
        metrics |= reconstruction_metrics(drawn, x, self.lpips)
        return metrics | {"mean_psnr": reconstruction_metrics(clipped(known.mean), x)["psnr"]}

    @torch.no_grad()
    def latent_moments(self, vae: VAE, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (C,) of each latent channel, over at most MEASURED rows."""
        picked = spread(rows, MEASURED)
        own = [picked[i] for i in distributed.share(len(picked))]
        sums = self._sums(2, vae)
        for _, x in self._slices(own):
            mean = vae.encode(x).mean.double()
            sums += torch.stack([mean, mean.square()]).sum(dim=(1, 3, 4))
        count = len(picked) * vae.config["latent_size"] ** 2
        return moments(distributed.sum_over_ranks(sums), count)

    def _slices(self, rows: list[int]) -> Iterator[tuple[list[int], Tensor]]:
        """Rows and their slices on the device, in batches; the next is read meanwhile."""
        batches = chunks(rows, BATCH)
        loaded = ahead(load_slices(self.data, batches, 0, self.run.device))
        for batch_rows, (batch, x) in zip(batches, loaded, strict=True):
            distributed.alive()
            self.run.note_unreadable(batch["unreadable"])
            yield batch_rows, x

    def _sums(self, count: int, vae: VAE) -> Tensor:
        """Zeros, for so many sums of each latent channel."""
        shape = count, vae.config["latent_dim"]
        return torch.zeros(shape, dtype=torch.float64, device=self.run.device)

    @torch.no_grad()
    def draw(self, vae: VAE, rows: list[int], path: Path) -> None:
        """The panel of slices and their reconstructions, as a PNG."""
        x = torch.stack([self.data[row]["image"] for row in rows])
        decoded = reconstruct(vae, x.to(self.run.device)).cpu()
        write_reconstructions(path, x[:, 0].numpy(), decoded[:, 0].numpy())


def input_warnings(data: CTDataset) -> list[str]:
    """Slices to train on whose values are not chest CT's: their scale is not as declared."""
    rows = spread(data.indices("train"), LOOKED_AT)
    slices = {data.rows[row].image: data.read_or_replace(row)[0] for row in rows}
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
            "longer"
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
