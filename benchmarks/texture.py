"""Texture decoders beside each other: other ways to draw what the VAE's mean lacks.

Each is trained on the same frozen VAE for the same core-minutes. On the held-out slices of
label.csv, by class, stand: PSNR, LPIPS, KID, noise power in the lungs, high attenuation, and how
often a small classifier, cross-validated by patient, tells real slices from decoded ones. `--files`
measures VAEs that train_vae.py wrote in the same way.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fibldm.batches import Batches, Plan, item_noise, item_uniform, shift_slices
from fibldm.checkpoint import load_model
from fibldm.ct import DEFAULT_WINDOW, unit_to_hu
from fibldm.datasets import CTDataset
from fibldm.disease import high_attenuation, noise_power
from fibldm.features import Networks, load_lpips
from fibldm.metrics import set_distances
from fibldm.optim import EMA, Muon, Precision
from fibldm.panels import grey, write_panel
from fibldm.tables import Split, read_table
from fibldm.texture import Likelihood, TextureDecoder, random_angles
from fibldm.vae import VAE, clipped

CPU = torch.device("cpu")
BATCH, LR, SEED = 4, 1e-3, 0
STD = 0.12  # of the residual, where it is taken to be the same everywhere
FOLDS, LOOKS, CROP = 5, 150, 128  # of the classifier: folds by patient, steps, pixels


class Straight(TextureDecoder):
    """Rectified flow (arXiv 2209.03003): a straight path, one strength everywhere."""

    def strength(self, features: Tensor) -> Tensor:
        side = self.patch * features.shape[2]
        return features.new_full((len(features), 1, side, side), 2 * math.log(STD)).float()

    def sample(self, known: Likelihood, noise: Tensor, steps: int = 2) -> Tensor:
        u, logvar = noise, self.strength(known.features)
        for k in range(steps, 0, -1):
            angle = u.new_full((len(u),), k / steps * math.pi / 2)
            u = u - self(u, angle, known, logvar) / steps
        return known.mean + STD * u

    def loss(self, known: Likelihood, x: Tensor, noise: Tensor, angle: Tensor) -> Tensor:
        r, t = (x - known.mean) / STD, (angle / (math.pi / 2))[:, None, None, None]
        v = self((1 - t) * r + t * noise, angle, known, self.strength(known.features))
        return (v - (noise - r)).square().mean(dim=(1, 2, 3))


class OneStrength(TextureDecoder):
    """The circle, with one strength everywhere."""

    strength = Straight.strength


class ByDDIM(TextureDecoder):
    """Trained as ours; DDIM's steps instead of Euler's."""

    def sample(self, known: Likelihood, noise: Tensor, steps: int = 2) -> Tensor:
        logvar, u, step = self.strength(known.features), noise, math.pi / 2 / steps
        for k in range(steps, 0, -1):
            v = self(u, u.new_full((len(u),), k * step), known, logvar)
            u = math.cos(step) * u - math.sin(step) * v
        return known.mean + torch.exp(0.5 * logvar) * u


class NoFeatures(TextureDecoder):
    """Sees the mean and the strength alone."""

    def forward(self, u: Tensor, angle: Tensor, known: Likelihood, logvar: Tensor) -> Tensor:
        known = known._replace(features=torch.zeros_like(known.features))
        return super().forward(u, angle, known, logvar)


class NoMean(TextureDecoder):
    """Sees the features and the strength alone."""

    def forward(self, u: Tensor, angle: Tensor, known: Likelihood, logvar: Tensor) -> Tensor:
        known = known._replace(mean=torch.zeros_like(known.mean))
        return super().forward(u, angle, known, logvar)


class Deep(TextureDecoder):
    """Four blocks in the middle instead of two."""

    def __init__(self, patch: int, channels: int) -> None:
        super().__init__(patch, channels)
        self.middle.extend(TextureDecoder(patch, channels).middle)


ARMS: dict[str, Callable[[int, int], TextureDecoder]] = {
    "ours": TextureDecoder,
    "by_ddim": ByDDIM,
    "one_strength": OneStrength,
    "straight": Straight,
    "no_features": NoFeatures,
    "no_mean": NoMean,
    "deep": Deep,
    "uniform_angles": TextureDecoder,
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--csv_file", required=True, help="label.csv, with a split")
    add("--img_dir", type=Path, required=True, help="folder its paths are relative to")
    add("--out", type=Path, required=True, help="gets pictures: of patients, not to be published")
    add("--vae", help="vae_best.pth on which texture decoders are trained")
    add("--arms", nargs="*", choices=ARMS, default=[], help="which of them")
    add("--minutes", type=float, default=5.0, help="core-minutes of training")
    add("--seed", type=int, default=0)
    add("--files", nargs="*", default=[], help="vae_best.pth to measure as they are")
    add("--steps", type=int, nargs="+", default=[1, 2, 4], help="of sampling")
    add("--classify", action="store_true", help="train the classifier too")
    return parser.parse_args(argv)


class Held:
    """Held-out slices x (N, 1, S, S), their lungs (N, S, S), classes and patients."""

    def __init__(self, data: CTDataset) -> None:
        rows = data.indices("val")
        items = [data[row] for row in rows]
        self.x = torch.stack([item["image"] for item in items])
        self.lungs = np.stack([item["contour"][0].numpy() > 0 for item in items])
        self.labels = np.array([data.rows[row].label or "all" for row in rows])
        self.patients = np.array([data.rows[row].patient_id for row in rows])


def train(arm: str, vae: VAE, data: CTDataset, args: argparse.Namespace) -> TextureDecoder:
    """The averaged weights after --minutes of one core."""
    x = torch.stack([data[row]["image"] for row in data.indices("train")])
    torch.manual_seed(args.seed)
    texture = ARMS[arm](vae.texture.patch, vae.config["base_channels"])
    ema, optimizer, precision = EMA(texture, 0.999), Muon(texture, LR), Precision("bf16", CPU)
    order = Batches(range(len(x)), Plan(10**9, BATCH, seed=args.seed))
    size, step, start = x.shape[-1], 0, time.process_time()
    while (share := (time.process_time() - start) / (60 * args.minutes)) < 1:
        step += 1
        uniform = item_uniform(args.seed, "shift", step, range(BATCH), 3)
        slices = shift_slices(
            x[order.rows_of(step)], uniform[:, :2], size // vae.config["latent_size"]
        )
        noise = item_noise(args.seed, "texture", step, range(BATCH), (1, size, size))
        angles = uniform[:, 2] * (math.pi / 2)
        angles = angles if arm == "uniform_angles" else random_angles(uniform[:, 2])
        with precision.autocast():
            with torch.no_grad():
                posterior = vae.encode(slices)
                known = vae.likelihood(posterior.sample(torch.randn_like(posterior.mean)))
            loss = texture.loss(known, slices, noise, angles).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(texture.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, step / 50) * min(1.0, 5 * (1 - share))
        optimizer.step()
        optimizer.zero_grad()
        ema.update(texture)
    print(f"{arm}: {step} steps of {BATCH}", file=sys.stderr)
    return ema.model


@torch.no_grad()
def decoded(vae: VAE, x: Tensor, steps: int) -> tuple[Tensor, float]:
    """x (N, 1, S, S) there and back, the mean for 0 steps; and seconds a slice for decoding."""
    parts, seconds = [], 0.0
    noise = item_noise(SEED, "texture", 0, range(len(x)), x.shape[1:])
    for part, own in zip(x.split(8), noise.split(8), strict=True):
        with Precision("bf16", CPU).autocast():
            z = vae.encode(part).mean
            start = time.process_time()
            known = vae.likelihood(z)
            parts.append(clipped(vae.draw(known, own, steps) if steps else known.mean))
            seconds += time.process_time() - start
    return torch.cat(parts), seconds / len(x)


def classified(real: Tensor, fake: Tensor, patients: np.ndarray) -> float:
    """Accuracy of a small network that tells real from fake slices, patients held out in turn.

    NaN for fewer than FOLDS patients.
    """
    names, right = np.unique(patients), []
    for fold in range(FOLDS if len(names) >= FOLDS else 0):
        held = np.isin(patients, names[fold::FOLDS])
        torch.manual_seed(fold)
        widths, layers = [16, 24, 32, 48], [nn.PixelUnshuffle(2)]
        for i, width in enumerate(widths):
            layers += [nn.Conv2d(widths[i - 1] if i else 4, width, 3, 1 + i % 2), nn.ReLU()]
        network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 1))
        optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
        a, b = real[~held], fake[~held]
        for _ in range(LOOKS):
            i, j = (torch.randint(len(a), (8,)) for _ in range(2))
            (y, k), most = torch.randint(0, real.shape[-1] - CROP + 1, (2,)).tolist(), CROP
            x = torch.cat([a[i], b[j]])[..., y : y + most, k : k + most]
            wanted = torch.cat([torch.ones(8), torch.zeros(8)])[:, None]
            F.binary_cross_entropy_with_logits(network(x), wanted).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            right += [*(network(real[held]) > 0).flatten().tolist()]
            right += [*(network(fake[held]) <= 0).flatten().tolist()]
    return float(np.mean(right)) if right else math.nan


def grid_power(residual: Tensor) -> float:
    """Power at the frequencies of the patches' grids over that around them, the largest."""
    side = residual.shape[-1]
    power = torch.fft.fft2(residual[:, 0]).abs().square().mean(dim=0)
    ratios = []
    for period in (2, 4, 8, 16):
        lines = torch.arange(0, side, side // period)
        at = torch.cartesian_prod(lines, lines)
        at = at[(at != 0).all(dim=1)]  # tables and edges that lie straight are on the axes
        around = torch.stack([power[(at + torch.tensor(shift)).remainder(side).unbind(1)]
            for shift in ((3, 3), (3, -3), (-3, 3), (-3, -3))])  # fmt: skip
        ratios.append(float(power[at.unbind(1)].mean() / around.mean()))
    return max(ratios)


def measure(held: Held, x: Tensor, label: str, networks: Networks, classify: bool) -> list[str]:
    """The cells of a row: of the decoded slices x of one class."""
    own = held.labels == label
    real, x, lungs = held.x[own], x[own], held.lungs[own]
    hu = [unit_to_hu(images[:, 0].numpy(), DEFAULT_WINDOW) for images in (x, real)]
    power = [
        np.nanmean([noise_power(*pair) for pair in zip(images, lungs, strict=True)], axis=0)
        for images in hu
    ]
    attenuation = [
        np.mean([high_attenuation(i, m) for i, m in zip(images, lungs, strict=True)])
        for images in hu
    ]
    lpips = load_lpips(CPU)
    with torch.no_grad():
        distances = torch.cat([lpips(a, b) for a, b in zip(x.split(8), real.split(8), strict=True)])
    square = (x - real).square().mean(dim=(1, 2, 3))
    found = set_distances(networks.features(real), networks.features(x), CPU)
    cells = [
        f"{float((10 * torch.log10(4 / square)).mean()):.2f}",
        f"{float(distances.mean()):.3f}",
    ]
    cells += [f"{found['kid']:.3f}", " ".join(f"{p:.2f}" for p in power[0] / power[1])]
    cells += [f"{attenuation[0]:.3f} ({attenuation[1]:.3f})", f"{grid_power(x - real):.1f}"]
    return cells + ([f"{classified(real, x, held.patients[own]):.2f}"] if classify else [])


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    rows, _ = read_table(args.csv_file, args.img_dir, Split())
    data = CTDataset(rows, args.img_dir, Path(args.csv_file).parent, 256)
    held, networks = Held(data), Networks(CPU, {})
    head = [
        "",
        "steps",
        "slices",
        "PSNR",
        "LPIPS",
        "KID",
        "noise power, 8 bands",
        "HAA (real)",
        "grid",
    ]
    head += ["classifier"] * args.classify + ["decoding, times the mean's"]
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|", flush=True)
    columns = {"slices": grey(held.x[:, 0].numpy())}
    for name in [*args.arms, *args.files]:
        vae, _ = load_model(args.vae if name in args.arms else name, VAE)
        if name in args.arms:
            vae.requires_grad_(False)
            vae.texture = train(name, vae, data, args)
        usual = 0.0
        for steps in (0, *args.steps):
            x, seconds = decoded(vae, held.x, steps)
            usual = usual or seconds
            for label in np.unique(held.labels):
                cells = measure(held, x, label, networks, args.classify)
                line = [name, steps or "mean", label, *cells, f"{seconds / usual:.1f}"]
                print(f"| {' | '.join(map(str, line))} |", flush=True)
        columns[name] = grey(x[:, 0].numpy())
    args.out.mkdir(parents=True, exist_ok=True)
    write_panel(args.out / "texture.png", columns, per_line=2)


if __name__ == "__main__":
    main(parse_args())
