"""The VAE beside diffusers', MONAI's and a plain one: speed, memory, held-out quality.

All get the same slices, split by patient, in the same batches, and the same loss, mean squared
error + KL. Ours is trained by Muon, as train_vae.py does, the others by AdamW; plain_muon, the
plain one by Muon, tells the network's part from the optimizer's. Training time is counted on a CPU
as core-minutes of the process, so that other load on the machine does not count. `speed` measures
in turn in one run; `train` trains models, one after another, and goes on where it was stopped;
`table` prints what was found and draws curves. Pictures of patients (panels) go into --out alone:
they must not be published. benchmarks/texture.py measures files that train_vae.py wrote.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fibldm import checkpoint
from fibldm.batches import Batches, Plan, item_noise, item_uniform
from fibldm.ct import (
    DEFAULT_WINDOW,
    hu_to_unit,
    unit_to_hu,
)
from fibldm.datasets import CTDataset, shift_slices
from fibldm.disease import noise_power
from fibldm.disk import replace_text, write_atomically
from fibldm.features import load_lpips
from fibldm.layers import ChannelNorm
from fibldm.optim import EMA, Muon, Precision
from fibldm.panels import grey, write_panel
from fibldm.phantom import phantom_slice
from fibldm.tables import Split, read_table, write_csv
from fibldm.vae import VAE, Decoder, Encoder

HERE = Path(__file__).resolve().parent
SIZE, LATENT, WIDTHS = 256, 16, (64, 128, 128, 256, 256)
HELD_OUT = 40  # patients, the first by a hash of their names
COUNTS = [100, 200, 400, 800, *(k * 2**i for i in range(10) for k in (1200, 1600))]
WARMUP = 30  # steps
KL_WEIGHT = 1e-7  # beside a squared error of about 0.005: as train_vae.py's 1e-6 beside L1
SAVE_SECONDS = 120
PANEL, PHANTOMS = 6, 3  # slices in the pictures: held-out ones, evenly spaced; synthetic ones
UPPER = slice(4, 8)  # of the noise power's 8 rings: from half the Nyquist frequency


class Ours(nn.Module):
    """This project's VAE at its defaults, or with other networks."""

    def __init__(
        self, channels: int, patch: int = 0, widths: tuple[int, ...] = (), blocks: int = 2
    ) -> None:
        super().__init__()
        self.vae = VAE(SIZE, LATENT, channels)
        if patch:
            self.vae.encoder = Encoder(patch, list(widths), blocks, channels)
            self.vae.decoder = Decoder(patch, list(widths), blocks, channels)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(self.vae.encode(x))

    def decode(self, z: Tensor) -> Tensor:
        return self.vae.likelihood(z).mean

    def draw(self, z: Tensor) -> Tensor:
        """With its texture, as the pipeline decodes."""
        return self.vae.decode(z)


class RandomStart(Ours):
    """With PyTorch's initialization of the shortcut instead of the cosine transform."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.vae.encoder.shortcut.reset_parameters()
        self.vae.decoder.shortcut[0].reset_parameters()


class GroupNorm(Ours):
    """With group norm, as diffusers and MONAI have it, where ours has a norm of each position."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        for module in list(self.vae.modules()):
            for name, child in module.named_children():
                if isinstance(child, ChannelNorm):
                    setattr(module, name, nn.GroupNorm(32, *child.normalized_shape))


class Haar(Ours):
    """Two levels of the Haar transform, and back, where pixels move into channels."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        pairs = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5
        first = torch.kron(torch.eye(2), pairs)  # of 4 pixels in a row: sums and differences
        row = torch.cat([pairs @ first[::2], first[1::2]])
        basis = torch.kron(row, row)[:, :, None, None]  # orthonormal, (16, 16)
        there, back = nn.Conv2d(16, 16, 1, bias=False), nn.Conv2d(128, 128, 1, bias=False, groups=8)
        there.weight = nn.Parameter(basis, requires_grad=False)
        back.weight = nn.Parameter(basis.transpose(0, 1).repeat(8, 1, 1, 1), requires_grad=False)
        encoder, mean = self.vae.encoder.network, self.vae.decoder.mean
        encoder[0] = nn.Sequential(encoder[0], there)
        mean[1] = nn.Sequential(back, mean[1])


class Diffusers(nn.Module):
    """AutoencoderKL of diffusers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        from diffusers import AutoencoderKL

        levels = len(WIDTHS)
        self.vae = AutoencoderKL(
            *(1, 1, ("DownEncoderBlock2D",) * levels, ("UpDecoderBlock2D",) * levels, WIDTHS),
            *(1, "silu", channels, 32, SIZE),
        )

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(x).latent_dist
        return posterior.mean, posterior.logvar

    def decode(self, z: Tensor) -> Tensor:
        return self.vae.decode(z).sample


class Monai(nn.Module):
    """AutoencoderKL of MONAI."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        from monai.networks.nets import AutoencoderKL

        levels = len(WIDTHS)
        self.vae = AutoencoderKL(
            *(2, 1, 1, (1,) * levels, WIDTHS, (False,) * levels, channels),
        )

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = self.vae.encode(x)
        return mean, 2 * std.log()

    def decode(self, z: Tensor) -> Tensor:
        return self.vae.decode(z)


class Plain(nn.Module):
    """Four strided 4x4 convolutions with ReLU, mirrored: what such projects start from."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        down = [1, 64, 128, 256, 2 * channels]
        up = [channels, 256, 128, 64, 1]
        self.encoder, self.decoder = (
            nn.Sequential(
                *(
                    layer
                    for i in range(4)
                    for layer in (kind(widths[i], widths[i + 1], 4, 2, 1), nn.ReLU())
                )
            )[:-1]
            for kind, widths in ((nn.Conv2d, down), (nn.ConvTranspose2d, up))
        )

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder(x).chunk(2, dim=1)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "ours": Ours,
    "diffusers": Diffusers,
    "monai": Monai,
    "plain": Plain,
    "plain_muon": Plain,
}
LEVERS: dict[str, Callable[[int], nn.Module]] = {
    "ours_as_it_is": Ours,
    "by_adamw": Ours,
    "random_start": RandomStart,
    "group_norm": GroupNorm,
    "haar": Haar,
    "patch_2": partial(Ours, patch=2, widths=(32, 64, 96, 128)),
    "patch_8": partial(Ours, patch=8, widths=(96, 128)),
    "wide_above": partial(Ours, patch=4, widths=(96, 96, 96)),
    "wide_below": partial(Ours, patch=4, widths=(48, 96, 192)),
    "shallow": partial(Ours, patch=4, widths=(96, 144, 192), blocks=1),
    "deep": partial(Ours, patch=4, widths=(64, 96, 128), blocks=3),
}
LAYOUTS = ("contiguous_format", "channels_last")  # memory formats
BY_ADAMW = ("diffusers", "monai", "plain", "by_adamw")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("speed", "train", "table"))
    ct = os.environ.get("FIBLDM_CT") or HERE.parents[1] / "shared" / "ct"
    parser.add_argument("--ct", type=Path, default=Path(ct), help="folder of real CT, with lungs/")
    parser.add_argument("--out", type=Path, required=True, help="folder for results; resumed")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=[*MODELS, *LEVERS])
    parser.add_argument("--channels", type=int, default=8, help="of the latent")
    parser.add_argument(
        "--minutes", type=float, default=60, help="of training a model: core-minutes on a CPU"
    )
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch, on a CPU")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=5e-4, help="of AdamW")
    parser.add_argument("--muon_lr", type=float, default=2e-3)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5, help="of measuring speed, in turn")
    parser.add_argument("--seconds", type=float, default=4, help="of each measurement of speed")
    args = parser.parse_args(argv)
    if not (args.ct / "lungs" / "label.csv").is_file():
        parser.error(f"--ct {args.ct}: no lungs/label.csv there (or set FIBLDM_CT)")
    args.seed = 0
    return args


def load_slices(args: argparse.Namespace) -> tuple[Tensor, Tensor, np.ndarray]:
    """Training slices (N, 1, S, S) in [-1, 1], held-out ones, and the lungs of these.

    Writes the split into OUT/label.csv, with dataset.json, which train_vae.py takes as well.
    """
    source = args.ct / "lungs"
    rows, _ = read_table(source / "label.csv", source, Split(0, 0.5, 0.0))
    names = sorted({r.patient_id for r in rows}, key=lambda n: hashlib.sha256(n.encode()).digest())
    held = set(names[:HELD_OUT])
    args.out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / "dataset.json", args.out / "dataset.json")
    rows = [replace(r, split="val" if r.patient_id in held else "train") for r in rows]
    columns = ["image", "contour", "patient_id", "split"]
    write_csv(args.out / "label.csv", pd.DataFrame(rows), columns)
    rows, _ = read_table(args.out / "label.csv", source, Split())
    data = CTDataset(rows, source, source, SIZE)

    def stack(split: str, name: str) -> Tensor:
        return torch.stack([data[i][name] for i in data.indices(split)])

    return stack("train", "image"), stack("val", "image"), stack("val", "contour").numpy()[:, 0]


def make(name: str, args: argparse.Namespace, layout: str = "") -> nn.Module:
    """The model with its first weights, by default in the memory format `speed` found faster."""
    torch.manual_seed(args.seed)
    layout = layout or faster_layout(name, args)
    return (MODELS | LEVERS)[name](args.channels).to(
        args.device, memory_format=getattr(torch, layout)
    )


def faster_layout(name: str, args: argparse.Namespace) -> str:
    """The memory format in which `speed` saw the model train faster, or the one it derives from."""
    file = args.out / f"speed_{args.precision}.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    like = {"plain_muon": "plain", **dict.fromkeys(LEVERS, "ours")}
    known = name if name in found else like.get(name, name)
    if known not in found:
        raise ValueError(f"{file}: no speed of {known} there; run 'speed' with this --out first")
    return found[known]["layout"]


def make_optimizer(name: str, model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    if name in BY_ADAMW:
        return torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.95), weight_decay=0.01)
    return Muon(model, args.muon_lr)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    noise: Tensor,
    precision: Precision,
) -> float:
    """One step on x: mean squared error + KL. Returns the first."""
    with precision.autocast():
        mean, logvar = model.encode(x)
        recon = model.decode(mean + torch.exp(0.5 * logvar) * noise)
        loss = (recon.float() - x).square().mean()
        mean, logvar = mean.float(), logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / len(x)
    (loss + KL_WEIGHT * kl).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def clock(args: argparse.Namespace) -> float:
    """Seconds: of all cores of this process on a CPU, of the wall on a GPU."""
    if args.device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


# Speed and memory.


def measure_speed(args: argparse.Namespace) -> None:
    """Images/s of train, encode and decode by wall-clock, medians over rounds in turn; memory."""
    train, _, _ = load_slices(args)
    precision = Precision(args.precision, torch.device(args.device))
    found: dict[str, dict] = {}
    for round_number in range(args.rounds):
        for name in args.models:
            for layout in LAYOUTS:
                key = f"{name} {layout}"
                if round_number == 0:
                    found[key] = {"train": [], "encode": [], "decode": []}
                for task, rate in rates(name, layout, train, precision, args).items():
                    found[key][task].append(rate)
                print(round_number, key, {k: round(v[-1], 2) for k, v in found[key].items()})
    result = {}
    for name in args.models:
        medians = {
            task: {la: statistics.median(found[f"{name} {la}"][task]) for la in LAYOUTS}
            for task in ("train", "encode", "decode")
        }
        best = max(LAYOUTS, key=lambda la: medians["train"][la])
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            memory = pool.apply(measure_memory, (name, best, args))
        result[name] = {
            "parameters": sum(p.numel() for p in make(name, args, best).parameters()),
            "layout": best,
            "memory": memory,
            **{task: max(values.values()) for task, values in medians.items()},
            "all": {key: found[key] for key in found if key.startswith(f"{name} ")},
        }
    file = args.out / f"speed_{args.precision}.json"
    before = json.loads(file.read_text()) if file.is_file() else {}
    replace_text(file, json.dumps(before | result, indent=2))
    print(speed_table(args))


def rates(
    name: str, layout: str, train: Tensor, precision: Precision, args: argparse.Namespace
) -> dict[str, float]:
    model = make(name, args, layout)
    if args.compile:
        compile_parts(model)
    optimizer = make_optimizer(name, model, args)
    x = train[: args.batch_size].to(args.device, memory_format=getattr(torch, layout))
    noise = torch.randn(len(x), args.channels, LATENT, LATENT, device=args.device)

    def inference(function: Callable[[Tensor], object], value: Tensor) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad(), precision.autocast():
                return function(value)

        return call

    tasks = {
        "train": lambda: train_step(model, optimizer, x, noise, precision),
        "encode": inference(model.encode, x),
        "decode": inference(getattr(model, "draw", model.decode), noise),
    }
    return {task: args.batch_size * repeats(call, args) for task, call in tasks.items()}


def repeats(call: Callable[[], object], args: argparse.Namespace) -> float:
    """Calls a second, by the wall."""
    call()
    clock(args)
    start, count = time.perf_counter(), 0
    while count < 2 or time.perf_counter() - start < args.seconds:
        call()
        count += 1
        if count % 8 == 0:
            clock(args)
    clock(args)
    return count / (time.perf_counter() - start)


def measure_memory(name: str, layout: str, args: argparse.Namespace) -> float:
    """GiB at the peak of three training steps, above the process before the model was made."""
    torch.set_num_threads(args.threads)
    cpu = args.device == "cpu"
    if cpu:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = peak_memory() if cpu else 0.0
    model = make(name, args, layout)
    precision = Precision(args.precision, torch.device(args.device))
    optimizer = make_optimizer(name, model, args)
    x = torch.zeros(args.batch_size, 1, SIZE, SIZE, device=args.device)
    x = x.to(memory_format=getattr(torch, layout))
    noise = torch.zeros(args.batch_size, args.channels, LATENT, LATENT, device=args.device)
    for _ in range(3):
        train_step(model, optimizer, x, noise, precision)
    return peak_memory() - before if cpu else torch.cuda.max_memory_allocated() / 2**30


def peak_memory() -> float:
    """GiB that this process had in main memory at most (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


# Quality.


def title_of(name: str, args: argparse.Namespace) -> str:
    """Of the files of a model in OUT."""
    return name if args.channels == 8 else f"{name}_{args.channels}"


def train_model(name: str, args: argparse.Namespace) -> None:
    """Train within the budget; a row of OUT/NAME.jsonl at each of COUNTS and at the end.

    Of the levers, which are many, at the end alone. `ours` is also written as OUT/ours_vae.pth, to
    start train_vae.py from; its texture decoder has learnt nothing.
    """
    train, held, lungs = load_slices(args)
    device, lpips = torch.device(args.device), load_lpips(torch.device(args.device))
    precision, title = Precision(args.precision, device), title_of(name, args)
    model = make(name, args)
    ema, optimizer = EMA(model, 0.999), make_optimizer(name, model, args)
    file, state = args.out / f"{title}.jsonl", args.out / f"{title}.pth"
    names = ("batch_size", "lr", "muon_lr", "precision", "device")
    settings = {key: getattr(args, key) for key in names} | {"kl_weight": KL_WEIGHT}
    step, seconds, rows = 0, 0.0, []
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        if saved["settings"] != settings:
            raise ValueError(f"{state}: trained with {saved['settings']}, asked for is {settings}")
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        step, seconds, rows = saved["step"], saved["seconds"], saved["rows"]
    if args.compile:
        compile_parts(model)
    order = Batches(range(len(train)), Plan(10**9, args.batch_size, seed=args.seed))
    saved_at = seconds
    while seconds < 60 * args.minutes:
        start = clock(args)
        step += 1
        positions = range(args.batch_size)
        x = train[order.rows_of(step)]
        uniform = item_uniform(args.seed, "shift", step, positions, 2)
        x = shift_slices(x, uniform, SIZE // LATENT).to(device)
        noise = item_noise(args.seed, "vae", step, positions, (args.channels, LATENT, LATENT))
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("peak", group["lr"]) * min(1.0, step / WARMUP)
        loss = train_step(model, optimizer, x, noise.to(device), precision)
        ema.update(model)
        seconds += clock(args) - start
        images, done = step * args.batch_size, seconds >= 60 * args.minutes
        due = done or (images in COUNTS and name in MODELS)
        if due:
            recon = reconstruct(ema.model, held, precision, device)
            row = {"images": images, "minutes": seconds / 60, "loss": loss}
            row |= measure(recon, held, lungs, lpips)
            rows.append(row)
            replace_text(file, "".join(json.dumps(row) + "\n" for row in rows))
            np.save(args.out / f"{title}_panel.npy", recon[picked(len(held))].numpy())
            made = reconstruct(ema.model, phantoms(), precision, device)
            np.save(args.out / f"{title}_phantoms.npy", made.numpy())
            print(title, {key: round(value, 4) for key, value in row.items()}, flush=True)
        if due or seconds - saved_at > SAVE_SECONDS:
            content = {"model": model.state_dict(), "ema": ema.state_dict(), "step": step}
            content |= {"optimizer": optimizer.state_dict(), "seconds": seconds, "rows": rows}
            content["settings"] = settings
            write_atomically(state, lambda path: torch.save(content, path))
            saved_at = seconds
    if name == "ours":
        facts = {"window": list(DEFAULT_WINDOW), "split": {}, "step": step}
        checkpoint.save_model(args.out / f"{title}_vae.pth", ema.model.vae, {}, **facts)
    print(f"{title}: has had {seconds / 60:.1f} minutes")


def compile_parts(model: nn.Module) -> None:
    """torch.compile of what is trained; made after the copy for the average, which stays as is."""
    for part in model.vae.children() if hasattr(model, "vae") else model.children():
        part.compile()


@torch.no_grad()
def reconstruct(model: nn.Module, x: Tensor, precision: Precision, device: torch.device) -> Tensor:
    """x (N, 1, S, S) through the posterior's mean and back, clipped to [-1, 1], on the CPU."""
    parts = []
    for part in x.split(8):
        with precision.autocast():
            parts.append(model.decode(model.encode(part.to(device))[0]).float().cpu())
    return torch.cat(parts).clamp(-1, 1)


def measure(
    recon: Tensor, x: Tensor, lungs: np.ndarray, lpips: Callable[[Tensor, Tensor], Tensor] | None
) -> dict[str, float]:
    """Means over slices x (N, 1, S, S) in [-1, 1] with lungs (N, S, S).

    psnr, ssim, lpips of the window, and `lung_...` of the lungs alone (LPIPS: all else replaced
    by the original); HU error in the lungs; noise_power and gradient, the ratio of recon's to x's.
    """
    inside = torch.from_numpy(lungs > 0)[:, None]
    area = inside.sum(dim=(1, 2, 3)).clamp(min=1)
    square = (recon - x).square()
    _, ssim = structural_similarity_index_measure(
        recon, x, reduction="none", data_range=2.0, return_full_image=True
    )
    hu_error = (unit_to_hu(recon.numpy(), DEFAULT_WINDOW) - unit_to_hu(x.numpy(), DEFAULT_WINDOW))[
        inside.numpy()
    ]
    found = {
        "psnr": 10 * torch.log10(4 / square.mean(dim=(1, 2, 3))),
        "ssim": ssim.mean(dim=(1, 2, 3)),
        "lung_psnr": 10 * torch.log10(4 / ((square * inside).sum(dim=(1, 2, 3)) / area)),
        "lung_ssim": (ssim * inside).sum(dim=(1, 2, 3)) / area,
    }
    if lpips is not None:
        device = next(lpips.parameters()).device
        pasted = torch.where(inside, recon, x)
        for key, image in (("lpips", recon), ("lung_lpips", pasted)):
            pairs = zip(image.split(8), x.split(8), strict=True)
            with torch.no_grad():
                found[key] = torch.cat([lpips(a.to(device), b.to(device)).cpu() for a, b in pairs])
    power = [mean_noise_power(y, lungs) for y in (recon, x)]
    slopes = [mean_gradient(y, inside) for y in (recon, x)]
    return {
        **{key: float(value.mean()) for key, value in found.items()},
        "hu_error": float(hu_error.mean()),
        "hu_error_sd": float(hu_error.std()),
        "noise_power": float((power[0] / power[1])[UPPER].mean()),
        "noise_power_all": float((power[0] / power[1]).mean()),
        "gradient": slopes[0] / slopes[1],
    }


def mean_noise_power(x: Tensor, lungs: np.ndarray) -> np.ndarray:
    """Noise power spectrum of the lungs, (8,), mean over slices."""
    hu = unit_to_hu(x[:, 0].numpy(), DEFAULT_WINDOW)
    return np.nanmean([noise_power(a, b) for a, b in zip(hu, lungs, strict=True)], axis=0)


def mean_gradient(x: Tensor, inside: Tensor) -> float:
    """Mean length of the gradient in the lungs."""
    length = torch.hypot(x.diff(dim=2)[..., :-1], x.diff(dim=3)[..., :-1, :])
    return float(length[inside[..., :-1, :-1]].mean())


def picked(count: int) -> np.ndarray:
    return np.linspace(0, count - 1, PANEL).round().astype(int)


def phantoms() -> Tensor:
    """Synthetic slices (PHANTOMS, 1, S, S) with fibrosis, as nobody trained on: for pictures."""
    cases = [(2 * i + 1, 0.35 + 0.1 * i, 0.4 + 0.12 * i) for i in range(PHANTOMS)]
    hu = np.stack([phantom_slice(who, level, SIZE, sick)[0] for who, level, sick in cases])
    return torch.from_numpy(hu_to_unit(hu, DEFAULT_WINDOW))[:, None]


# What was found.


def speed_table(args: argparse.Namespace) -> str:
    """Images/s, ratios to the faster peer, and memory, as markdown."""
    lines = []
    for precision in ("fp32", "bf16"):
        file = args.out / f"speed_{precision}.json"
        if not file.is_file():
            continue
        found = json.loads(file.read_text())
        tasks = ("train", "encode", "decode")
        peers = [found[name] for name in ("diffusers", "monai") if name in found]
        lines += [
            f"{precision}, batch {args.batch_size}:\n",
            "| | parameters | format | train, images/s | encode | decode | GiB |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, row in found.items():
            cells = []
            for task in tasks:
                ratio = row[task] / max(peer[task] for peer in peers) if peers else float("nan")
                cells.append(f"{row[task]:.2f} ({ratio:.1f}x)")
            lines.append(
                f"| {name} | {row['parameters'] / 1e6:.1f} M | {row['layout']} | "
                f"{' | '.join(cells)} | {row['memory']:.2f} |"
            )
        lines.append("")
    return "\n".join(lines)


COLUMNS = {
    "images": ("images", "{:.0f}"),
    "minutes": ("minutes", "{:.1f}"),
    "psnr": ("PSNR, dB", "{:.2f}"),
    "ssim": ("SSIM", "{:.3f}"),
    "lpips": ("LPIPS", "{:.3f}"),
    "lung_psnr": ("lungs: PSNR", "{:.2f}"),
    "lung_ssim": ("SSIM", "{:.3f}"),
    "lung_lpips": ("LPIPS", "{:.4f}"),
    "hu_error": ("HU error, mean", "{:.1f}"),
    "hu_error_sd": ("SD", "{:.0f}"),
    "noise_power": ("noise power, upper half", "{:.2f}"),
    "noise_power_all": ("all", "{:.2f}"),
    "gradient": ("gradient", "{:.2f}"),
}


def quality_table(runs: dict[str, list[dict]]) -> str:
    """At the end of each model's budget, and after as many images as all models have seen."""
    models = {name: rows for name, rows in runs.items() if name in MODELS}
    common = set.intersection(*({row["images"] for row in rows} for rows in models.values()))
    parts = {"at the end": {name: rows[-1] for name, rows in runs.items()}}
    if common:
        same = max(common)
        parts["equal images"] = {
            name: next(row for row in rows if row["images"] == same)
            for name, rows in models.items()
        }
    return "\n\n".join(rows_table(title, rows) for title, rows in parts.items())


def rows_table(title: str, rows: dict[str, dict]) -> str:
    """One line for each of `rows`, as markdown."""
    shown = {k: spec for k, spec in COLUMNS.items() if all(k in row for row in rows.values())}
    lines = [f"| {title} | {' | '.join(head for head, _ in shown.values())} |"]
    lines.append("|---" * (len(shown) + 1) + "|")
    for name, row in rows.items():
        cells = [form.format(row[key]) for key, (_, form) in shown.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_curves(runs: dict[str, list[dict]], path: Path) -> None:
    """PSNR, lungs' LPIPS and noise power over minutes and over images."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = ("psnr", "lpips", "noise_power")
    figure, axes = pyplot.subplots(len(rows), 2, figsize=(10, 9), sharey="row")
    for line, key in zip(axes, rows, strict=True):
        for axis, over in zip(line, ("minutes", "images"), strict=True):
            for name, points in runs.items():
                known = [point for point in points if key in point]
                axis.plot([p[over] for p in known], [p[key] for p in known], label=name)
            axis.set_xscale("log")
            axis.set_xlabel("core-minutes" if over == "minutes" else over)
            axis.set_ylabel(COLUMNS[key][0])
            axis.grid(alpha=0.3)
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def print_table(args: argparse.Namespace) -> None:
    """All that OUT holds: tables, curves beside this file, panels in OUT and of phantoms here."""
    print(speed_table(args))
    files = {name: args.out / f"{title_of(name, args)}.jsonl" for name in args.models}
    runs = {
        name: [json.loads(line) for line in file.read_text().splitlines()]
        for name, file in files.items()
        if file.is_file()
    }
    if not runs:
        return
    print(quality_table(runs))
    draw_curves(runs, HERE / "vae_curves.png")
    _, held, _ = load_slices(args)
    write_panels(args.out / "panel.png", held[picked(len(held))], args, "panel", runs)
    write_panels(HERE / "vae_phantoms.png", phantoms(), args, "phantoms", runs)


def write_panels(
    path: Path, originals: Tensor, args: argparse.Namespace, kind: str, runs: dict[str, list[dict]]
) -> None:
    """One line a slice: the original and each model's reconstruction."""
    columns = {"original": grey(originals[:, 0].numpy())}
    for name in runs:
        file = args.out / f"{title_of(name, args)}_{kind}.npy"
        if file.is_file():
            columns[name] = grey(np.load(file)[:, 0])
    write_panel(path, columns, per_line=1)


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    if args.what == "speed":
        return measure_speed(args)
    if args.what == "train":
        for name in args.models:
            train_model(name, args)
        return None
    return print_table(args)


if __name__ == "__main__":
    main(parse_args())
