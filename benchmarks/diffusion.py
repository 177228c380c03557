"""The diffusion stages beside diffusers' and MONAI's: speed, memory, quality, control.

All get the same latents of real slices (encode_dataset.py), split by patient, in the same batches
with the same noise. The peers are trained and sampled as their own tutorials do: eps-prediction,
their linear schedule, their DDIM. Training time is counted on a CPU as core-minutes of the process,
so that other load on the machine does not count. `speed` measures in turn in one run; `train`
trains arms, one after another; `sample` draws from what is trained and measures the samples against
held-out patients; `samplers` compares samplers, steps and guidance of what train_ldm_unet.py made;
`control` asks for contours that no patient has; `load` times the latent data
set. Pictures of patients go into --out alone: they must not be published.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from vae import MODELS, clock, peak_memory

from fibldm.batches import Batches, Plan, item_noise
from fibldm.checkpoint import load_model, save, save_model
from fibldm.controlnet import ControlNet, make_denoiser
from fibldm.ct import unit_to_hu
from fibldm.datasets import CTDataset, chunks
from fibldm.disease import high_attenuation
from fibldm.disk import replace_text
from fibldm.encoding import LatentDataset, training_batches, write_latents
from fibldm.features import inception_features, load_inception
from fibldm.lungs import lung_mask
from fibldm.metrics import set_distances, set_score
from fibldm.optim import EMA, Precision
from fibldm.panels import write_samples
from fibldm.privacy import read_privacy
from fibldm.samplers import SAMPLERS, guide
from fibldm.scheduler import SPACINGS, CosineScheduler, Denoiser, diffusion_loss
from fibldm.synthesis import Synthesizer
from fibldm.tables import Split, read_table
from fibldm.unet import UNet, contour_condition
from fibldm.vae import LATENT_SCALE, VAE
from fibldm.validation import dice

HERE = Path(__file__).resolve().parent
SIZE, LATENT, CHANNELS, WIDTHS = 256, 16, 8, (128, 256, 512)
HINT = (16, 32, 96, 256, 256)  # widths of the peers' hint encoders: 256 -> 16 pixels
WARMUP, WITHHELD, DROPOUT = 50, 0.1, 0.1
EMA_DECAYS = (0.995, 0.98, 0.99, 0.998, 0.999)  # the first is sampled from
LEVELS = 8  # timesteps of the held-out loss
PEER_STEPS = 50
NAMES, FORMATS = ("ours", "diffusers", "monai"), ("contiguous", "channels_last")


class Diffusers(nn.Module):
    """UNet2DModel; with a ControlNet UNet2DConditionModel and ControlNetModel.

    Each peer has the contour among its U-Net's input channels.
    """

    def __init__(self, control: bool) -> None:
        super().__init__()
        from diffusers import ControlNetModel, UNet2DConditionModel, UNet2DModel

        down = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
        up = ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
        shape = {"in_channels": CHANNELS + 2, "layers_per_block": 2, "block_out_channels": WIDTHS}
        if not control:
            self.unet = UNet2DModel(
                sample_size=LATENT, out_channels=CHANNELS, down_block_types=down,
                up_block_types=up, attention_head_dim=64, **shape,
            )  # fmt: skip
            return
        shape |= {"mid_block_type": "UNetMidBlock2D", "attention_head_dim": 64}
        self.unet = UNet2DConditionModel(
            sample_size=LATENT, out_channels=CHANNELS, down_block_types=down,
            up_block_types=up, **shape,
        )  # fmt: skip
        self.control = ControlNetModel(
            conditioning_channels=1, conditioning_embedding_out_channels=HINT,
            down_block_types=down, **shape,
        )  # fmt: skip
        self.unet.requires_grad_(False)

    def eps(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """x (N, C, h, w), t (N,), condition (N, 2, h, w) -> the noise, (N, C, h, w)."""
        return self.unet(torch.cat([x, condition], dim=1), t).sample

    def controlled_eps(self, x: Tensor, t: Tensor, condition: Tensor, contour: Tensor) -> Tensor:
        """The same, steered by contours (N, 1, H, W)."""
        x = torch.cat([x, condition], dim=1)
        down, middle = self.control(x, t, None, contour, return_dict=False)
        return self.unet(
            x, t, None, down_block_additional_residuals=down, mid_block_additional_residual=middle
        ).sample


class Monai(nn.Module):
    """DiffusionModelUNet and ControlNet."""

    def __init__(self, control: bool) -> None:
        super().__init__()
        from monai.networks.nets import ControlNet as MonaiControlNet
        from monai.networks.nets import DiffusionModelUNet

        shape = {"spatial_dims": 2, "in_channels": CHANNELS + 2, "num_res_blocks": 2}
        shape |= {"channels": WIDTHS, "attention_levels": (False, True, True)}
        shape |= {"num_head_channels": 64}
        self.unet = DiffusionModelUNet(out_channels=CHANNELS, **shape)
        if control:
            self.control = MonaiControlNet(
                conditioning_embedding_in_channels=1, conditioning_embedding_num_channels=HINT,
                **shape,
            )  # fmt: skip
            self.unet.requires_grad_(False)

    def eps(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return self.unet(torch.cat([x, condition], dim=1), t)

    def controlled_eps(self, x: Tensor, t: Tensor, condition: Tensor, contour: Tensor) -> Tensor:
        x = torch.cat([x, condition], dim=1)
        down, middle = self.control(x, t, contour)
        return self.unet(
            x, t, down_block_additional_residuals=down, mid_block_additional_residual=middle
        )


class OursByEps(nn.Module):
    """Our U-Net, trained and sampled as the peers are, with the cosine schedule."""

    def __init__(self, control: bool) -> None:
        super().__init__()
        self.unet = UNet()

    def eps(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return self.unet(x, t, condition)


PEERS: dict[str, Callable[[bool], nn.Module]] = {
    "diffusers": Diffusers,
    "monai": Monai,
    "ours_eps": OursByEps,
}
ARMS = ("ours", "diffusers", "monai", "ours_eps", "no_contour", "one_view", "dropout")
CONTROL_ARMS = {"control_both": "ours", "control_alone": "no_contour"}  # of which U-Net


WHAT = ("speed", "train", "sample", "samplers", "control", "load", "encode", "table")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=WHAT)
    ct = os.environ.get("FIBLDM_CT") or HERE.parents[1] / "shared" / "ct"
    parser.add_argument("--ct", type=Path, default=Path(ct), help="real CT, with lungs/: encode")
    parser.add_argument("--workers", type=int, default=2, help="that decode slices: encode")
    parser.add_argument("--latents", type=Path, help="folder that encode_dataset.py wrote")
    parser.add_argument("--vae", type=Path, help="the VAE that encoded it")
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument(
        "--arms",
        nargs="+",
        default=["ours", "diffusers", "monai"],
        choices=[*ARMS, *CONTROL_ARMS, "vae"],
    )
    parser.add_argument(
        "--minutes", type=float, default=20, help="of training an arm: core-minutes on a CPU"
    )
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch, on a CPU")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3, help="of measuring speed, in turn")
    parser.add_argument("--seconds", type=float, default=3, help="of each measurement of speed")
    sampling = parser.add_argument_group("sample and control (ours; the peers have their own)")
    sampling.add_argument("--per_contour", type=int, default=4, help="samples a held-out contour")
    sampling.add_argument("--sampler", choices=SAMPLERS, default="dpmpp_2m")
    sampling.add_argument("--steps", type=int, default=20)
    sampling.add_argument("--spacing", choices=SPACINGS, default="logsnr")
    sampling.add_argument("--guidance", type=float, default=1.0)
    sampling.add_argument("--interval", type=float, nargs=2, default=(0.0, 1.0))
    many = parser.add_argument_group("samplers")
    many.add_argument("--unets", type=Path, nargs="+", help="one unet_best.pth a seed")
    many.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS))
    many.add_argument("--counts", type=int, nargs="+", default=[10, 20], help="of steps")
    many.add_argument("--scales", type=float, nargs="+", default=[1.0, 2.0], help="of guidance")
    args = parser.parse_args(argv)
    if args.what == "samplers" and not args.unets:
        parser.error("samplers: give --unets FILE ...")
    needy = ("train", "sample", "samplers", "control", "load")
    if args.what in needy and not (args.latents and args.vae):
        parser.error(f"{args.what}: give --latents FOLDER and --vae FILE")
    if args.what == "encode" and not args.vae:
        parser.error("encode: give --vae FILE")
    return args


def channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)


# Speed and memory.


def train_call(name: str, control: bool, args: argparse.Namespace) -> Callable[[], None]:
    """One training step of the U-Net, or of the ControlNet, on random latents."""
    size = args.batch_size // 2 if control else args.batch_size
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(size, CHANNELS, LATENT, LATENT, generator=generator) for _ in "ab")
    t = torch.randint(0, 1000, (size,), generator=generator)
    contour = (torch.rand(size, 1, SIZE, SIZE, generator=generator) > 0.5).float()
    x0, noise, t, contour = (value.to(args.device) for value in (x0, noise, t, contour))
    precision, condition = Precision(args.precision, x0.device), contour_condition(contour, LATENT)
    scheduler = CosineScheduler(device=args.device)
    torch.manual_seed(0)
    if name == "ours":
        unet = trained = UNet().to(args.device)
        if control:
            unet.requires_grad_(False)
            trained = ControlNet(unet, SIZE).to(args.device)

        def denoiser(x: Tensor, t: Tensor) -> Tensor:
            added = trained(x, t, contour, condition) if control else None
            return unet(x, t, condition, None, added)
    else:
        peer = PEERS[name](control).to(args.device)
        if args.memory_format == "channels_last":
            channels_last(peer)
        trained = peer.control if control else peer.unet

        def denoiser(x: Tensor, t: Tensor) -> Tensor:
            if control:
                return peer.controlled_eps(x, t, condition, contour)
            return peer.eps(x, t, condition)

    parts = (unet, trained) if name == "ours" else (peer.unet, trained)
    if args.compile:
        for part in dict.fromkeys(parts):
            part.compile()
    weights = [weight for weight in trained.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, 1e-4, fused=True)

    def step() -> None:
        with precision.autocast():
            loss = diffusion_loss(denoiser, scheduler, x0, t, noise).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step.parameters = sum(weight.numel() for weight in weights)
    return step


def sample_call(name: str, control: bool, args: argparse.Namespace) -> Callable[[], Tensor]:
    """16 samples end to end with decoding: ours 20 DPM-Solver++ steps, a peer 50 of its DDIM."""
    torch.manual_seed(0)
    contour = (torch.rand(16, 1, SIZE, SIZE) > 0.5).float().to(args.device)
    noise = torch.randn(16, CHANNELS, LATENT, LATENT).to(args.device)
    condition = contour_condition(contour, LATENT)
    precision = Precision(args.precision, noise.device)
    if name == "ours":
        unet, scheduler = UNet().to(args.device), CosineScheduler(device=args.device)
        controlnet = ControlNet(unet, SIZE).to(args.device) if control else None
        vae = VAE(SIZE, LATENT, CHANNELS).to(args.device)
        timesteps = scheduler.timesteps(20)

        def draw() -> Tensor:
            with torch.no_grad(), precision.autocast():
                denoiser = make_denoiser(unet, controlnet, contour)
                z = SAMPLERS["dpmpp_2m"](denoiser, scheduler, noise, timesteps)
            with torch.no_grad():
                return vae.decode(z.float() / LATENT_SCALE)

        return draw
    peer, decode = PEERS[name](control).to(args.device), peer_decoder(name, args)
    if args.memory_format == "channels_last":
        channels_last(peer)

    def draw() -> Tensor:
        def eps(x: Tensor, t: Tensor) -> Tensor:
            if control:
                return peer.controlled_eps(x, t, condition, contour)
            return peer.eps(x, t, condition)

        with torch.no_grad(), precision.autocast():
            return decode(peer_ddim(name, eps, noise, PEER_STEPS))

    return draw


def peer_decoder(name: str, args: argparse.Namespace) -> Callable[[Tensor], Tensor]:
    """The decoder of the peer's AutoencoderKL, as benchmarks/vae.py has it."""
    model = MODELS[name](CHANNELS).to(args.device)
    return lambda z: model.decode(z / LATENT_SCALE).float()


def peer_schedulers(name: str) -> tuple[object, object]:
    """A peer's schedulers for training and for DDIM."""
    if name == "monai":
        from monai.networks.schedulers import DDIMScheduler, DDPMScheduler

        return DDPMScheduler(1000), DDIMScheduler(1000, clip_sample=False)
    from diffusers import DDIMScheduler, DDPMScheduler

    beta = "squaredcos_cap_v2" if name == "ours_eps" else "linear"
    return (
        DDPMScheduler(1000, beta_schedule=beta),
        DDIMScheduler(1000, beta_schedule=beta, clip_sample=False),
    )


def peer_ddim(name: str, eps: Denoiser, x: Tensor, steps: int) -> Tensor:
    """x0 by the peer's own DDIM."""
    scheduler = peer_schedulers(name)[1]
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps.tolist():
        predicted = eps(x, torch.full((len(x),), t, device=x.device)).float()
        out = scheduler.step(predicted, t, x)
        x = out[0] if isinstance(out, tuple) else out.prev_sample
    return x


TASKS = {
    "train U-Net": (train_call, False),
    "train ControlNet": (train_call, True),
    "sample": (sample_call, False),
    "sample with ControlNet": (sample_call, True),
}


def measure_speed(args: argparse.Namespace) -> None:
    """Seconds a call of each task, over rounds in turn; peak memory of a U-Net's step.

    A peer is trained in both memory formats, and samples in the one that trains faster.
    """
    seconds: dict[str, dict[str, list[float]]] = {task: {} for task in TASKS}
    for round_number in range(args.rounds):
        for task, (make, control) in TASKS.items():
            for name in NAMES:
                formats = FORMATS
                if name == "ours":
                    formats = FORMATS[:1]  # it sets its own
                elif make is sample_call:
                    trained = seconds["train U-Net"]
                    formats = [min(FORMATS, key=lambda f, n=name: min(trained[f"{n} {f}"]))]
                for args.memory_format in formats:
                    key = f"{name} {args.memory_format}"
                    found = repeat(make(name, control, args), args)
                    seconds[task].setdefault(key, []).append(found)
                    print(round_number, task, key, f"{found:.3f} s", flush=True)
    result = {"seconds": seconds, "memory": {}, "parameters": {}}
    args.memory_format = FORMATS[0]
    for name in NAMES:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            result["memory"][name] = pool.apply(measure_memory, (name, args))
        result["parameters"][name] = [train_call(name, c, args).parameters for c in (False, True)]
    args.out.mkdir(parents=True, exist_ok=True)
    replace_text(args.out / f"speed_{args.precision}.json", json.dumps(result, indent=2))
    print(speed_table(result, args))


def repeat(call: Callable[[], object], args: argparse.Namespace) -> float:
    """Seconds a call, by the wall, after one that is not counted."""
    call()
    clock(args)
    start, count = time.perf_counter(), 0
    while count < 1 or time.perf_counter() - start < args.seconds:
        call()
        count += 1
    clock(args)
    return (time.perf_counter() - start) / count


def measure_memory(name: str, args: argparse.Namespace) -> float:
    """GiB at the peak of three training steps of the U-Net, above the process before."""
    torch.set_num_threads(args.threads)
    if args.device != "cpu":
        call = train_call(name, False, args)
        for _ in range(3):
            call()
        return torch.cuda.max_memory_allocated() / 2**30
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = peak_memory()
    call = train_call(name, False, args)
    for _ in range(3):
        call()
    return peak_memory() - before


def speed_table(result: dict, args: argparse.Namespace) -> str:
    """Images/s of training, seconds for 16 samples, ratios to the faster peer, as markdown."""
    best: dict[str, dict[str, float]] = {}
    for task, found in result["seconds"].items():
        for key, values in found.items():
            name = key.split()[0]
            value = statistics.median(values)
            best.setdefault(task, {})[name] = min(value, best.get(task, {}).get(name, value))
    lines = [f"| {args.precision} | U-Net, ControlNet | {' | '.join(best)} | GiB |"]
    lines.append("|---" * (len(best) + 3) + "|")
    for name in NAMES:
        cells = []
        for task, found in best.items():
            ratio = min(found["diffusers"], found["monai"]) / found[name]
            size = args.batch_size // 2 if "ControlNet" in task else args.batch_size
            rate = found[name] if task.startswith("sample") else size / found[name]
            unit = "s" if task.startswith("sample") else "images/s"
            cells.append(f"{rate:.2f} {unit} ({ratio:.1f}x)")
        sizes = ", ".join(f"{count / 1e6:.1f} M" for count in result["parameters"][name])
        lines.append(f"| {name} | {sizes} | {' | '.join(cells)} | {result['memory'][name]:.2f} |")
    return "\n".join(lines)


# Training.


def train_arm(arm: str, args: argparse.Namespace) -> None:
    """Train one arm for --minutes, into OUT/ARM.pth, with its held-out loss in OUT/ARM.jsonl."""
    device = torch.device(args.device)
    data, precision = LatentDataset(args.latents), Precision(args.precision, device)
    rows = data.indices("train", views=arm != "one_view")
    scheduler = CosineScheduler(device=device)
    torch.manual_seed(args.seed)
    frozen = None
    if arm in CONTROL_ARMS:
        frozen, _ = load_model(args.out / f"{CONTROL_ARMS[arm]}.pth", UNet)
        model = ControlNet(frozen.to(device), data.image_size).to(device)
    elif arm in PEERS:
        model = PEERS[arm](False).to(device)
    else:
        model = UNet(dropout=DROPOUT if arm == "dropout" else 0.0).to(device)
    averages = [EMA(model, decay) for decay in EMA_DECAYS[: 1 if arm in PEERS else None]]
    optimizer = torch.optim.AdamW(
        model.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    if args.compile:
        model.compile()

    def loss_of(net: nn.Module, x0: Tensor, contour: Tensor, t: Tensor, noise: Tensor,
                keep: Tensor) -> Tensor:  # fmt: skip
        given = keep & (arm != "no_contour")
        if arm == "control_alone":
            given = torch.zeros_like(keep)
        condition = contour_condition(contour, LATENT, given)
        if frozen is not None:
            return diffusion_loss(
                lambda x, t: frozen(x, t, condition, None, net(x, t, contour, condition)),
                scheduler, x0, t, noise,
            )  # fmt: skip
        if arm not in PEERS:
            return diffusion_loss(lambda x, t: net(x, t, condition), scheduler, x0, t, noise)
        noisy = peer_schedulers(arm)[0].add_noise(x0, noise, t)
        error = net.eps(noisy, t, condition).float() - noise
        return error.square().mean(dim=(1, 2, 3))

    plan = Plan(10**9, args.batch_size, seed=args.seed)
    batches = training_batches(data, Batches(rows, plan), "bench", 2, device)
    seconds, step, log, due = 0.0, 0, [], 60.0
    start = clock(args)
    for x0, contour, _, noise, draws in batches:
        step += 1
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, step / WARMUP)
        t = scheduler.training_timesteps(draws[:, 0])
        if arm in PEERS:
            t = (draws[:, 0] * scheduler.num_timesteps).long()
        keep = draws[:, 1] >= (0 if frozen is not None else WITHHELD)
        with precision.autocast():
            loss = loss_of(model, x0, contour, t, noise, keep).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        averages[0].update(model)
        now = clock(args)
        seconds += now - start
        for ema in averages[1:]:
            ema.update(model)
        done = seconds >= 60 * args.minutes
        if done or seconds >= due:
            due *= 2**0.5
            held = [
                heldout_loss(lambda *batch, e=ema: loss_of(e.model, *batch), data, precision)
                for ema in averages
            ]
            log.append({"minutes": seconds / 60, "images": step * args.batch_size})
            log[-1] |= {"loss": held[0]} | {
                f"ema {ema.decay}": value for ema, value in zip(averages, held, strict=True)
            }
            print(arm, {key: round(value, 4) for key, value in log[-1].items()}, flush=True)
        start = clock(args)
        if done:
            break
    batches.close()
    replace_text(args.out / f"{arm}.jsonl", "".join(json.dumps(row) + "\n" for row in log))
    if arm in PEERS:
        save(args.out / f"{arm}.pth", {"model": averages[0].model.state_dict()})
    else:
        save_model(args.out / f"{arm}.pth", averages[0].model, {}, step=step)


@torch.no_grad()
def heldout_loss(loss: Callable[..., Tensor], data: LatentDataset, precision: Precision) -> float:
    """Mean over held-out slices and LEVELS timesteps of an arm's own loss."""
    rows, total = data.indices("val"), 0.0
    x0, contour, _ = data.batch(rows, precision.device)
    for level in ((np.arange(LEVELS) + 0.5) / LEVELS * 999).round().astype(int):
        noise = item_noise(0, "val", int(level), rows, x0.shape[1:]).to(x0.device)
        t = torch.full((len(rows),), int(level), device=x0.device)
        with precision.autocast():
            total += float(loss(x0, contour, t, noise, torch.ones_like(t, dtype=torch.bool)).mean())
    return total / LEVELS


# Samples and what they are like.


def denoisers(arm: str, args: argparse.Namespace) -> Callable[[Tensor], Callable[[Tensor], Tensor]]:
    """Contours (N, 1, H, W) -> a function from noise to latents, as this arm samples."""
    device, scheduler = torch.device(args.device), CosineScheduler(device=args.device)
    if arm in PEERS:
        peer = PEERS[arm](False)
        peer.load_state_dict(torch.load(args.out / f"{arm}.pth", weights_only=True)["model"])
        peer.to(device).eval()

        def by_peer(contour: Tensor) -> Callable[[Tensor], Tensor]:
            condition = contour_condition(contour, LATENT)
            return lambda x: peer_ddim(arm, lambda x, t: peer.eps(x, t, condition), x, args.steps)

        return by_peer
    unet, _ = load_model(args.out / f"{CONTROL_ARMS.get(arm, arm)}.pth", UNet)
    unet.to(device)
    controlnet = None
    if arm in CONTROL_ARMS:
        controlnet, _ = load_model(args.out / f"{arm}.pth", ControlNet, unet)
        controlnet.to(device)
    timesteps = scheduler.timesteps(args.steps, args.spacing)

    def by_ours(contour: Tensor) -> Callable[[Tensor], Tensor]:
        if arm == "no_contour":
            denoiser = make_denoiser(unet)
        elif arm == "control_alone":  # the U-Net was not trained to see the contour
            hint, none = controlnet.embed(contour), contour_condition(contour, LATENT) * 0

            def denoiser(x: Tensor, t: Tensor) -> Tensor:
                return unet(x, t, none, None, controlnet(x, t, hint, none, embedded=True))
        else:
            denoiser = make_denoiser(unet, controlnet, contour)
        plain = make_denoiser(unet)
        guided = guide(
            denoiser, lambda x, t: (denoiser(x, t), plain(x, t)), scheduler, args.guidance,
            args.interval,
        )  # fmt: skip
        shape = (CHANNELS, LATENT, LATENT)

        def draw(x: Tensor) -> Tensor:
            return SAMPLERS[args.sampler](
                guided, scheduler, x, timesteps,
                lambda k: item_noise(args.seed, "step", k, range(len(x)), shape).to(device),
            )  # fmt: skip

        return draw

    return by_ours


@torch.no_grad()
def draw_samples(
    arm: str, contours: np.ndarray, args: argparse.Namespace, real: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Latents (N, C, h, w) and slices (N, H, W) in [-1, 1], one for each contour (N, 1, H, W).

    The arm "vae" draws none, but decodes the `real` latents (M, C, h, w): no U-Net can be better.
    """
    device = torch.device(args.device)
    vae, _ = load_model(args.vae, VAE)
    vae.to(device)
    precision = Precision(args.precision, device)
    make = None if arm == "vae" else denoisers(arm, args)
    latents, slices = [], []
    for items in chunks(range(len(contours)), 32):
        noise = item_noise(args.seed, "sample", 0, items, (CHANNELS, LATENT, LATENT)).to(device)
        if make is None:
            z = torch.from_numpy(real[np.array(items) * len(real) // len(contours)]).to(device)
        else:
            with precision.autocast():
                z = make(torch.from_numpy(contours[items]).to(device))(noise).float()
        texture = item_noise(args.seed, "texture", 0, items, (1, SIZE, SIZE)).to(device)
        latents.append(z.cpu().numpy())
        slices.append(vae.decode(z / LATENT_SCALE, texture).clamp(-1, 1)[:, 0].cpu().numpy())
    return np.concatenate(latents), np.concatenate(slices)


def measure_samples(args: argparse.Namespace) -> None:
    """For each arm: KID and Frechet distances to held-out slices, Dice, brightness; one grid."""
    device, data = torch.device(args.device), LatentDataset(args.latents)
    held = data.indices("val")
    real = data.heldout_images(held, torch.device("cpu"))
    patients = data.table["patient_id"].iloc[held].tolist()
    inception = load_inception(device)
    if inception is None:
        raise ValueError("no Inception weights: run scripts/fetch_metric_weights.py")
    real_seen = inception_features(inception, real, device)
    contours = np.repeat(data.contours[held], args.per_contour, axis=0)
    names = np.repeat(patients, args.per_contour).tolist()
    privacy = read_privacy(data)
    real_dice = float(dice(real[:, 0].numpy(), data.contours[held], data.window).mean())
    for arm in args.arms:
        start = clock(args)
        latents, slices = draw_samples(arm, contours, args, data.latents[held])
        seconds = clock(args) - start
        seen = inception_features(inception, torch.from_numpy(slices)[:, None], device)
        kid, fid = (
            set_score(name, real_seen, seen, patients, names, device, "") for name in ("kid", "fid")
        )
        latent = set_score(
            "fid", pooled(data.latents[held]), pooled(latents), patients, names, device, ""
        )
        agreement = dice(slices, contours, data.window)
        matches = privacy.nearest(None, latents)
        grey_level = (slices.mean() + 1) / (float(real.mean()) + 1)
        row = {
            "arm": arm, "sampler": args.sampler if arm not in PEERS else "own ddim",
            "steps": args.steps, "spacing": args.spacing if arm not in PEERS else "own",
            "guidance": args.guidance, "interval": list(args.interval), "core_seconds": seconds,
            "kid": [kid.value, kid.low, kid.high, kid.baseline], "fid": [fid.value, fid.baseline],
            "latent_fd": [latent.value, latent.low, latent.high, latent.baseline],
            "dice": float(agreement.mean()), "dice_of_real": real_dice,
            "brightness": float(grey_level),
            "copies": float(np.mean([match.flagged for match in matches])),
        }  # fmt: skip
        with open(args.out / "samples.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        print(sample_line(row), flush=True)
        shown = range(0, len(slices), args.per_contour)[:16]
        title = f"grid_{arm}_{args.sampler}_{args.steps}_{args.spacing}_{args.guidance:g}.png"
        write_samples(args.out / title, slices[shown], contours[shown])


def pooled(latents: np.ndarray) -> Tensor:
    """Latents (N, C, 16, 16) -> features (N, C * 16): means of 4x4 cells."""
    cells = nn.functional.avg_pool2d(torch.from_numpy(np.asarray(latents)), 4)
    return cells.flatten(1)


HEADER = (
    "| arm | sampler | steps | spacing | guidance | KID (95 %) | latent FD | Dice | brightness | "
    "copies |\n" + "|---" * 10 + "|"
)


def sample_line(row: dict) -> str:
    """One line of the table of samples."""
    kid, latent = row["kid"], row["latent_fd"]
    interval = "" if row["interval"] == [0, 1] else f" in {row['interval']}"
    return (
        f"| {row['arm']} | {row['sampler']} | {row['steps']} | {row['spacing']} | "
        f"{row['guidance']:g}{interval} | {kid[0]:.3f} ({kid[1]:.3f} to {kid[2]:.3f}) | "
        f"{latent[0]:.2f} | {row['dice']:.3f} | {row['brightness']:.3f} | "
        f"{row.get('copies', np.nan):.1%} |"
    )


# Samplers.


def measure_samplers(args: argparse.Namespace) -> None:
    """Of each sampler, count of steps and guidance: mean over the U-Nets (lowest to highest).

    Samples are drawn for held-out contours, with their labels, as sample.py does, and compared
    with held-out slices decoded from their latents: what a U-Net that errs in nothing would give.
    """
    device, data = torch.device(args.device), LatentDataset(args.latents)
    held = data.indices("val")
    contours = np.repeat(data.contours[held], args.per_contour, axis=0)
    labels = np.repeat(data.table["label"].iloc[held].to_numpy(), args.per_contour).tolist()
    models = [
        Synthesizer.from_checkpoints(args.vae, unet, None, device, args.precision)
        for unet in args.unets
    ]
    inception = load_inception(device)
    if inception is None:
        raise ValueError("no Inception weights: run scripts/fetch_metric_weights.py")

    def look(slices: np.ndarray, asked: np.ndarray) -> tuple[Tensor, float, np.ndarray]:
        """Features, mean Dice, and high attenuation of each slice."""
        hu = unit_to_hu(slices, data.window)
        shares = np.array([high_attenuation(one, lung_mask(one)) for one in hu])
        seen = inception_features(inception, torch.from_numpy(slices)[:, None], device)
        return seen, float(dice(slices, asked, data.window).mean()), shares

    decoded = models[0].decode(data.latents[held], args.seed, range(len(held)))
    real, agreement, shares = look(decoded, data.contours[held])
    cells = f"{agreement:.3f} | {np.nanmean(shares):.3f} | {np.nanstd(shares):.3f}"
    print(SAMPLERS_HEADER, f"| held-out slices | | | 0 | {cells} |", sep="\n", flush=True)
    for name, steps, scale in itertools.product(args.samplers, args.counts, args.scales):
        found = []
        for model in models:
            samples = model.sample(
                contours, labels, seed=args.seed, sampler=name, steps=steps, guidance_scale=scale,
                batch_size=32,
            )  # fmt: skip
            slices = np.stack([sample.image for sample in samples])
            seen, agreement, shares = look(slices, contours)
            kid = set_distances(real, seen, device)["kid"]
            found.append((kid, agreement, np.nanmean(shares), np.nanstd(shares)))
        cells = [
            f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
            for values in zip(*found, strict=True)
        ]
        print(f"| {name} | {steps} | {scale:g} | {' | '.join(cells)} |", flush=True)


SAMPLERS_HEADER = (
    "| sampler | steps | guidance | KID | Dice | high attenuation: mean | SD |\n" + "|---" * 7 + "|"
)


# Contours that no patient has.


def unusual(contours: np.ndarray) -> dict[str, np.ndarray]:
    """Held-out contours (N, 1, H, W) made unusual, and drawn ones."""
    from scipy.ndimage import affine_transform, label

    def scaled(factor: float) -> np.ndarray:
        middle = (SIZE - 1) / 2
        place = {"matrix": np.full(2, 1 / factor), "offset": middle - middle / factor}
        return np.stack([affine_transform(c[0], **place, order=0)[None] for c in contours])

    def one_lung(contour: np.ndarray) -> np.ndarray:
        pieces, count = label(contour[0])
        if count == 0:
            return contour
        largest = np.bincount(pieces.ravel())[1:].argmax() + 1
        return (pieces == largest)[None].astype(np.uint8)

    y, x = np.mgrid[:SIZE, :SIZE]

    def ellipses(i: int) -> np.ndarray:
        rng = np.random.default_rng(i)
        both = np.zeros((SIZE, SIZE), bool)
        for side in (-1, 1):
            cx, cy = SIZE / 2 + side * rng.uniform(42, 52), SIZE / 2 + rng.uniform(-12, 8)
            rx, ry = rng.uniform(20, 34), rng.uniform(38, 66)
            both |= ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1
        return both[None].astype(np.uint8)

    return {
        "as they are": contours,
        "scaled by 0.75": scaled(0.75),
        "scaled by 1.15": scaled(1.15),
        "20 px to the side": np.roll(contours, 20, axis=3),
        "20 px up": np.roll(contours, -20, axis=2),
        "one lung": np.stack([one_lung(contour) for contour in contours]),
        "two ellipses": np.stack([ellipses(i) for i in range(len(contours))]),
    }


def measure_control(args: argparse.Namespace) -> None:
    """Dice of samples on usual and unusual contours, with a grid of each kind."""
    data = LatentDataset(args.latents)
    held = data.indices("val")
    usual = data.contours[held]
    images = data.heldout_images(held, torch.device("cpu"))[:, 0].numpy()
    real = dice(images, usual, data.window).mean()
    lines = [f"| contours | {' | '.join(args.arms)} |", "|---" * (len(args.arms) + 1) + "|"]
    lines.append(f"| the real slices themselves | {' | '.join([f'{real:.3f}'] * len(args.arms))} |")
    for kind, contours in unusual(usual).items():
        cells = []
        for arm in args.arms:
            _, slices = draw_samples(arm, contours, args)
            found = dice(slices, contours, data.window)
            cells.append(f"{found.mean():.3f} ({found.mean() / real:.2f}; worst {found.min():.2f})")
            name = f"control_{arm}_{kind.replace(' ', '_')}.png"
            write_samples(args.out / name, slices[:8], contours[:8])
        lines.append(f"| {kind} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    replace_text(args.out / "control.md", "\n".join(lines) + "\n")


# Reading latents.


def measure_loading(args: argparse.Namespace) -> None:
    """Latents/s of the data set and of one torch.load per latent, in turn, both in shuffled order.

    Each latent comes with its contour, in both.
    """
    data, cpu = LatentDataset(args.latents), torch.device("cpu")
    rows = np.random.default_rng(0).permutation(data.indices("train"))
    parts = [rows[i : i + 64].tolist() for i in range(0, len(rows), 64)]
    found: dict[str, list[float]] = {"one read a batch": [], "torch.load": []}
    with tempfile.TemporaryDirectory() as folder:
        for row in rows:
            pair = [torch.from_numpy(array[row].copy()) for array in (data.latents, data.contours)]
            torch.save(pair, Path(folder) / f"{row}.pt")

        def by_files() -> None:
            for part in parts:
                pairs = [torch.load(Path(folder) / f"{i}.pt", weights_only=True) for i in part]
                [torch.stack(column) for column in zip(*pairs, strict=True)]

        def by_batch() -> None:
            for part in parts:
                data.batch(part, cpu)

        for _ in range(args.rounds):
            for name, call in (("one read a batch", by_batch), ("torch.load", by_files)):
                found[name].append(len(rows) / repeat(call, args))
    medians = {name: statistics.median(rates) for name, rates in found.items()}
    for name, rate in medians.items():
        print(f"| {name} | {rate:,.0f} latents/s | {rate / medians['torch.load']:.1f}x |")


def measure_encoding(args: argparse.Namespace) -> None:
    """Slices/s of encoding a data set whole, and of its VAE alone on slices in memory, in turn."""
    device = torch.device(args.device)
    vae, content = load_model(args.vae, VAE)
    vae.to(device)
    source = args.ct / "lungs"
    rows, _ = read_table(source / "label.csv", source, Split(**content["split"]))
    dataset = CTDataset(rows, source, source, SIZE)
    images = torch.stack([dataset[i]["image"] for i in range(32)]).to(device)
    precision = Precision(args.precision, device)
    found: dict[str, list[float]] = {"encode_dataset": [], "VAE alone": []}
    with tempfile.TemporaryDirectory() as folder, precision.autocast(), torch.no_grad():
        for _ in range(args.rounds):
            start = time.perf_counter()
            write_latents(Path(folder) / "latents", dataset, vae, {}, device, 32, args.workers)
            found["encode_dataset"].append(len(dataset) / (time.perf_counter() - start))
            found["VAE alone"].append(32 / repeat(lambda: vae.encode(images), args))
    alone = statistics.median(found["VAE alone"])
    for name, rates in found.items():
        rate = statistics.median(rates)
        print(f"| {name} | {rate:.0f} slices/s | {rate / alone:.2f} |")


def print_table(args: argparse.Namespace) -> None:
    """All that OUT holds."""
    for file in sorted(args.out.glob("speed_*.json")):
        args.precision = file.stem.removeprefix("speed_")
        print(speed_table(json.loads(file.read_text()), args), "\n")
    for arm in (*ARMS, *CONTROL_ARMS):
        file = args.out / f"{arm}.jsonl"
        if file.is_file():
            for row in map(json.loads, file.read_text().splitlines()):
                print(f"| {arm} | {row['minutes']:.1f} | {row['images']} | {row['loss']:.4f} |")
    samples = args.out / "samples.jsonl"
    if samples.is_file():
        rows = map(json.loads, samples.read_text().splitlines())
        print(HEADER, *map(sample_line, rows), sep="\n")


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.what == "train":
        for arm in args.arms:
            train_arm(arm, args)
        return
    {
        "speed": measure_speed,
        "sample": measure_samples,
        "samplers": measure_samplers,
        "control": measure_control,
        "load": measure_loading,
        "encode": measure_encoding,
        "table": print_table,
    }[args.what](args)


if __name__ == "__main__":
    main(parse_args())
