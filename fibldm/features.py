"""How far apart two slices are, and what frozen networks see in slices.

Nothing here downloads: weights are files that scripts/fetch_metric_weights.py makes.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
ALEXNET = "alexnet-owt-7be5be79.pth"

NETWORKS = {INCEPTION: "Inception-v3 (torchmetrics)", ALEXNET: "AlexNet (lpips 0.1)"}

# The files each metric needs in torch.hub's checkpoints folder.
WEIGHTS: dict[str, tuple[str, ...]] = {
    "fid": (INCEPTION,),
    "kid": (INCEPTION,),
    "precision": (INCEPTION,),
    "recall": (INCEPTION,),
    "lpips": (ALEXNET,),
    "diversity": (ALEXNET,),
    "ssim": (),
    "psnr": (),
}


_weights_dir: Path | None = None  # None: where torch.hub looks, below TORCH_HOME


def use_weights(folder: Path | None) -> None:
    """Look for weight files in this folder from now on; None: where torch.hub looks.

    ValueError if it holds none of them.
    """
    global _weights_dir
    if folder is not None:
        wanted = sorted({name for names in WEIGHTS.values() for name in names})
        if not any((folder / name).is_file() for name in wanted):
            raise ValueError(
                f"{folder}: expected a folder with {' or '.join(wanted)}; "
                f"run `python scripts/fetch_metric_weights.py --output_dir {folder}` once"
            )
    _weights_dir = folder


def weight_file(name: str) -> Path:
    return (_weights_dir or Path(torch.hub.get_dir()) / "checkpoints") / name


def weights_hash(name: str) -> str:
    """The first 12 hexadecimal digits of a weight file's SHA-256."""
    with weight_file(name).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def missing_weights(names: Iterable[str] = tuple(WEIGHTS)) -> dict[str, str]:
    """Those of the named metrics that cannot be computed here -> which file is absent, and why."""
    missing = {}
    for name in names:
        if name not in WEIGHTS:
            raise ValueError(f"no metric {name!r}; expected some of {', '.join(WEIGHTS)}")
        absent = [str(weight_file(f)) for f in WEIGHTS[name] if not weight_file(f).is_file()]
        if absent:
            folder = f" --output_dir {_weights_dir}" if _weights_dir else ""
            missing[name] = (
                f"{name.upper()} is left out: {', '.join(absent)} is absent; "
                f"run `python scripts/fetch_metric_weights.py{folder}` once"
            )
    return missing


def damaged(name: str, error: object) -> ValueError:
    """What to raise for a weight file that cannot be read or holds something else."""
    path = weight_file(name)
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return ValueError(
        f"{path}: not the weights expected ({reason[0][:200]}); "
        f"run `python scripts/fetch_metric_weights.py --overwrite --output_dir {path.parent}`"
    )


def to_bytes(images: Tensor) -> Tensor:
    """(N, 1, H, W) in [-1, 1] -> (N, 3, H, W) uint8, truncated as torchmetrics' normalize=True."""
    if images.ndim != 4 or images.shape[1] != 1:
        raise ValueError(f"images of shape {tuple(images.shape)}, expected (N, 1, H, W)")
    if not bool(images.isfinite().all()):
        raise ValueError("images with NaN or infinite values have no metrics")
    unit = (images.float().clamp(-1, 1) + 1) / 2
    return (unit * 255).byte().expand(-1, 3, -1, -1)


def load_inception(device: torch.device) -> nn.Module | None:
    """FID's Inception: (N, 3, H, W) uint8 -> (N, 2048); None where its weights are absent.

    It resizes to 299x299 as TensorFlow 1 did: FID's first version, and torch-fidelity. ValueError
    if the weight file is damaged.
    """
    if missing_weights(["fid"]):
        return None
    from torchmetrics.image.fid import NoTrainInceptionV3

    path = str(weight_file(INCEPTION))  # given a path, it has nothing to download
    try:
        with torch.random.fork_rng(devices=[]):
            inception = NoTrainInceptionV3("inception-v3-compat", ["2048"], path, antialias=False)
    except Exception as error:  # whatever torch says of a cut-off or foreign file
        raise damaged(INCEPTION, error) from error
    # The classifier is NaN in the files that scripts/fetch_metric_weights.py makes.
    used = [value for key, value in inception.state_dict().items() if not key.startswith("fc.")]
    if not all(bool(value.isfinite().all()) for value in used):
        raise damaged(INCEPTION, "NaN or infinite numbers")
    if device.type == "cpu":
        inception = inception.to(memory_format=torch.channels_last)  # takes a third less time
    return inception.requires_grad_(False).eval().to(device)


@torch.no_grad()
def inception_features(inception: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    """Features (N, 2048) on the CPU, in float32 whatever is around, of images (N, 1, H, W)."""
    features = [torch.empty(0, 2048)]
    for chunk in images.split(32) if len(images) else ():
        with torch.autocast(device.type, enabled=False):
            features.append(inception(to_bytes(chunk.to(device))).float().cpu())
    return torch.cat(features)


class PerceptualDistance(nn.Module):
    """LPIPS (Zhang et al., arXiv 1801.03924) over AlexNet for one channel, as metric or as loss.

    Frozen, in evaluation mode and float32 whatever the training around it does; gradients flow to
    both inputs.
    """

    def __init__(self) -> None:
        super().__init__()
        import warnings

        import lpips

        # Built with a random trunk and filled here: lpips itself would go and download it.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.net = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
        names = self.net.net.state_dict()  # slice1.0.weight is torchvision's features.0.weight
        try:
            trunk = torch.load(weight_file(ALEXNET), map_location="cpu", weights_only=True)
            state = {n: trunk[f"features.{n.split('.', 1)[1]}"] for n in names}
            self.net.net.load_state_dict(state)
        except Exception as error:  # whatever torch says of a cut-off or foreign file
            raise damaged(ALEXNET, error) from error
        if not all(bool(value.isfinite().all()) for value in state.values()):
            raise damaged(ALEXNET, "NaN or infinite numbers")
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "PerceptualDistance":
        return super().train(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance of each pair.

        x, y: (N, 1, H, W) in [-1, 1], at least 32x32. Returns (N,), >= 0; 0 for equal images.
        """
        if min(x.shape[-2:]) < 32:
            raise ValueError(f"LPIPS needs images of at least 32x32, found {tuple(x.shape[-2:])}")
        with torch.autocast(x.device.type, enabled=False):
            x, y = (image.float().expand(-1, 3, -1, -1) for image in (x, y))
            return self.net(x, y).flatten()


def load_lpips(device: torch.device) -> PerceptualDistance | None:
    """The LPIPS network on a device; None where AlexNet's weights are absent (missing_weights).

    ValueError if the weight file is damaged.
    """
    return None if missing_weights(["lpips"]) else PerceptualDistance().to(device)


LEAST_SPREAD = 0.02  # in [-1, 1]; a slice of less is blank, and ratios to it mean nothing


def ssim_per_image(x: Tensor, y: Tensor) -> Tensor:
    """SSIM (Wang et al. 2004), Gaussian window of sigma 1.5: (N, 1, H, W) in [-1, 1] -> (N,)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    if min(x.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs images of at least 11x11, found {tuple(x.shape[-2:])}")
    with torch.autocast(x.device.type, enabled=False):
        ssim = structural_similarity_index_measure(
            x.float(), y.float(), reduction="none", data_range=2.0
        )
    return ssim.reshape(-1)


def reconstruction_metrics(
    x: Tensor, y: Tensor, lpips: nn.Module | None = None
) -> dict[str, Tensor]:
    """How well x renders y, image by image: psnr in dB (infinite for equal images), ssim, lpips.

    And what these hide: brightness, the difference of their means; contrast and sharpness, the
    ratios of standard deviation and of mean gradient, 1 where x is as sharp as y.
    x, y: (N, 1, H, W) in [-1, 1]. Returns (N,) tensors; `lpips` only if its network is given.
    """
    x, y = x.float(), y.float()
    dims = (1, 2, 3)
    mse = (x - y).square().mean(dim=dims)
    metrics = {
        "psnr": 10 * torch.log10(4 / mse),
        "ssim": ssim_per_image(x, y),
        "brightness": (x - y).mean(dim=dims),
        "contrast": x.std(dim=dims) / y.std(dim=dims).clamp(min=LEAST_SPREAD),
        "sharpness": mean_gradient(x) / mean_gradient(y).clamp(min=LEAST_SPREAD / 10),
    }
    if lpips is not None:
        metrics["lpips"] = lpips(x, y)
    return metrics


def mean_gradient(x: Tensor) -> Tensor:
    """Mean length of the gradient of images (N, 1, H, W), per pixel -> (N,)."""
    return torch.hypot(x.diff(dim=2)[..., :-1], x.diff(dim=3)[..., :-1, :]).mean(dim=(1, 2, 3))


class Networks:
    """The frozen networks that the metrics see with, as far as their weights are here.

    `missing` maps each metric that is left out to the reason (`missing_weights`). Several processes
    that share the work give what any of them lacks. ValueError if a weight file is damaged.
    """

    def __init__(self, device: torch.device, missing: dict[str, str] | None = None) -> None:
        self.device = torch.device(device)
        self.missing = missing_weights() if missing is None else missing
        self.inception = None if "fid" in self.missing else load_inception(self.device)
        self.lpips = None if "lpips" in self.missing else load_lpips(self.device)
        self.sources = {"ssim": "torchmetrics, Gaussian window of sigma 1.5"}
        for file, network in ((INCEPTION, self.inception), (ALEXNET, self.lpips)):
            names = [name for name, files in WEIGHTS.items() if file in files]
            if network is not None:
                source = f"{NETWORKS[file]}, weights {weights_hash(file)}"
                self.sources |= dict.fromkeys(names, source)

    @property
    def width(self) -> int:
        """Numbers of an image's features."""
        return 0 if self.inception is None else 2048

    def features(self, images: Tensor) -> Tensor:
        """Inception's (N, 2048) on the CPU, of images (N, 1, H, W); (N, 0) without its weights.

        ValueError for images of another shape, or with NaN.
        """
        if self.inception is None:
            return torch.empty(len(to_bytes(images)), 0)
        return inception_features(self.inception, images, self.device)

    @torch.no_grad()
    def pairs(self, x: Tensor, y: Tensor) -> dict[str, np.ndarray]:
        """SSIM and, where its weights are, LPIPS of pairs of images (N, 1, H, W): (N,) each."""
        if x.shape != y.shape:
            raise ValueError(f"no pairs: images of {tuple(x.shape)} and of {tuple(y.shape)}")
        found: dict[str, list[float]] = {"ssim": [], "lpips": []}
        for pair in zip(x.split(32), y.split(32), strict=True) if len(x) else ():
            a, b = (image.to(self.device, torch.float32) for image in pair)
            found["ssim"] += ssim_per_image(a, b).tolist()
            if self.lpips is not None:
                found["lpips"] += self.lpips(a, b).tolist()
        return {name: np.array(values) for name, values in found.items()}
