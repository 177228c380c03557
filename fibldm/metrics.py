"""How real generated slices look, and what they hold: FID, KID, LPIPS, SSIM, PSNR, Dice and HU.

Nothing here downloads: a metric whose network weights are absent is left out and named, with the
command that fetches them (scripts/fetch_metric_weights.py).
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from fibldm import distributed

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
ALEXNET = "alexnet-owt-7be5be79.pth"

# The files each metric needs in torch.hub's checkpoints folder.
WEIGHTS: dict[str, tuple[str, ...]] = {
    "fid": (INCEPTION,),
    "kid": (INCEPTION,),
    "lpips": (ALEXNET,),
    "ssim": (),
    "psnr": (),
}


def weight_file(name: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def missing_weights(names: Iterable[str] = tuple(WEIGHTS)) -> dict[str, str]:
    """Those of the named metrics that cannot be computed here -> which file is absent, and why."""
    missing = {}
    for name in names:
        if name not in WEIGHTS:
            raise ValueError(f"no metric {name!r}; expected some of {', '.join(WEIGHTS)}")
        absent = [str(weight_file(f)) for f in WEIGHTS[name] if not weight_file(f).is_file()]
        if absent:
            missing[name] = (
                f"{name.upper()} is left out: {', '.join(absent)} is absent; "
                "run `python scripts/fetch_metric_weights.py` once"
            )
    return missing


def to_bytes(images: Tensor) -> Tensor:
    """(N, 1, H, W) in [-1, 1] -> (N, 3, H, W) uint8, truncated as torchmetrics' normalize=True."""
    if images.ndim != 4 or images.shape[1] != 1:
        raise ValueError(f"images of shape {tuple(images.shape)}, expected (N, 1, H, W)")
    if not bool(images.isfinite().all()):
        raise ValueError("images with NaN or infinite values have no metrics")
    unit = (images.float().clamp(-1, 1) + 1) / 2
    return (unit * 255).byte().expand(-1, 3, -1, -1)


def load_inception(device: torch.device) -> nn.Module | None:
    """FID's Inception: (N, 3, H, W) uint8 -> (N, 2048); None where its weights are absent."""
    if missing_weights(["fid"]):
        return None
    from torchmetrics.image.fid import NoTrainInceptionV3

    path = str(weight_file(INCEPTION))  # given a path, it has nothing to download
    with torch.random.fork_rng(devices=[]):
        inception = NoTrainInceptionV3("inception-v3-compat", ["2048"], path)
    return inception.requires_grad_(False).eval().to(device)


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
        trunk = torch.load(weight_file(ALEXNET), map_location="cpu", weights_only=True)
        names = self.net.net.state_dict()  # slice1.0.weight is torchvision's features.0.weight
        self.net.net.load_state_dict({n: trunk[f"features.{n.split('.', 1)[1]}"] for n in names})
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
    """The LPIPS network on a device; None where AlexNet's weights are absent (missing_weights)."""
    return None if missing_weights(["lpips"]) else PerceptualDistance().to(device)


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
    """How well y renders x, image by image: psnr in dB (infinite for equal images), ssim, lpips.

    x, y: (N, 1, H, W) in [-1, 1]. Returns (N,) tensors; `lpips` only if its network is given.
    """
    mse = (x.float() - y.float()).square().mean(dim=(1, 2, 3))
    metrics = {"psnr": 10 * torch.log10(4 / mse), "ssim": ssim_per_image(x, y)}
    if lpips is not None:
        metrics["lpips"] = lpips(x, y)
    return metrics


def frechet_distance(mu1: np.ndarray, cov1: np.ndarray, mu2: np.ndarray, cov2: np.ndarray) -> float:
    """Squared 2-Wasserstein distance of two Gaussians (Dowson & Landau 1982), in float64.

    |mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)); mu (D,), cov (D, D), singular or not.
    """
    mu1, cov1, mu2, cov2 = (np.asarray(a, dtype=np.float64) for a in (mu1, cov1, mu2, cov2))
    values, vectors = np.linalg.eigh(cov1)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov2 @ root).clip(min=0)).sum()
    return float(np.square(mu1 - mu2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross)


def frechet_feature_distance(x: Tensor, y: Tensor) -> float:
    """`frechet_distance` of the Gaussians fitted to features x (N, D) and y (M, D), N and M >= 2.

    With centred features A, B and cov = A^T A / (N - 1), tr (cov1 cov2)^(1/2) is the sum of the
    singular values of A B^T: N x M instead of D x D, and exact where covariances are singular.
    """
    x, y = x.double(), y.double()
    distance = (x.mean(0) - y.mean(0)).square().sum()
    factors = []
    for features in (x, y):
        factor = (features - features.mean(0)) / (len(features) - 1) ** 0.5
        distance = distance + factor.square().sum()
        if len(factor) > factor.shape[1]:
            factor = torch.linalg.qr(factor, mode="r").R
        factors.append(factor)
    cross = torch.linalg.svdvals(factors[0] @ factors[1].T).sum()
    return max(0.0, float(distance - 2 * cross))


def kernel_distance(real: Tensor, fake: Tensor, subset_size: int, subsets: int = 100) -> float:
    """KID (Binkowski et al., arXiv 1801.01401) of features (N, D), (M, D): mean over subsets.

    Subsets are drawn by a generator of its own: the same at each call, and no other draw moves.
    """
    from torchmetrics.image.kid import poly_mmd

    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for _ in range(subsets):
        drawn = [f[torch.randperm(len(f), generator=generator)[:subset_size]] for f in (real, fake)]
        with torch.autocast(real.device.type, enabled=False):
            total += float(poly_mmd(*drawn))
    return total / subsets


class RealismMetrics:
    """FID (arXiv 1706.08500), KID, LPIPS and SSIM of generated slices against real ones.

    Under torchrun each rank gives its own share, of any size, and all get the same result; the
    constructor and `compute` are to be called by all ranks. Inception's features are kept in main
    memory (8 KB an image), those of real slices over resets. FID falls with the number of images:
    compare values of equal n_real and n_fake only. KID does not depend on it; its subsets have
    min(50, n_real, n_fake) images, kept as `kid_subset_size`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device(device)
        # A file that one rank lacks is missing for all: they take part in the same collectives.
        self.missing: dict[str, str] = {}
        for missing in distributed.gather(missing_weights(["fid", "kid", "lpips", "ssim"])):
            self.missing = missing | self.missing
        self.inception = None if "fid" in self.missing else load_inception(self.device)
        self.lpips = None if "lpips" in self.missing else load_lpips(self.device)
        self.kid_subset_size = 0
        self._real: list[Tensor] = []
        self._all_real: Tensor | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the fakes; the real features stay."""
        self._fake: list[Tensor] = []
        self._pairs = torch.zeros(3, dtype=torch.float64)  # number, sum of LPIPS, sum of SSIM

    def update_real(self, real: Tensor) -> None:
        """Add real held-out slices: (N, 1, H, W) in [-1, 1]."""
        self._real += self._features(real)
        self._all_real = None

    @torch.no_grad()
    def update_fake(self, fake: Tensor, paired_real: Tensor | None = None) -> None:
        """Add samples: (N, 1, H, W) in [-1, 1].

        paired_real: of the same shape, the real slices whose contours steered the samples; gives
        LPIPS and SSIM of the pairs.
        """
        self._fake += self._features(fake)
        if paired_real is None:
            return
        if paired_real.shape != fake.shape:
            raise ValueError(
                f"paired_real of shape {tuple(paired_real.shape)}, expected {tuple(fake.shape)}"
            )
        for x, y in zip(fake.split(32), paired_real.split(32), strict=True):
            x, y = (image.to(self.device, torch.float32) for image in (x, y))
            lpips = self.lpips(x, y).double().sum().item() if self.lpips else 0.0
            ssim = ssim_per_image(x, y).double().sum().item()
            self._pairs += torch.tensor([len(x), lpips, ssim], dtype=torch.float64)

    @torch.no_grad()
    def _features(self, images: Tensor) -> list[Tensor]:
        """Inception's features of each chunk on the CPU, (n, 2048), or (n, 0) without weights."""
        features = []
        for chunk in images.split(32) if len(images) else ():
            chunk = to_bytes(chunk.to(self.device))
            if self.inception is None:
                features.append(torch.empty(len(chunk), 0))
            else:
                with torch.autocast(self.device.type, enabled=False):
                    features.append(self.inception(chunk).float().cpu())
        return features

    def _gathered(self, features: list[Tensor]) -> Tensor:
        """The features of all ranks, in the order of the ranks."""
        width = 2048 if self.inception is not None else 0
        own = torch.cat(features) if features else torch.empty(0, width)
        return torch.cat(distributed.gather(own))

    @torch.no_grad()
    def compute(self) -> dict[str, float]:
        """Of all ranks' images: fid, kid, lpips, ssim, n_real, n_fake.

        A metric is there only if its weights are and its images suffice: two real ones and two
        fakes for FID and KID, one pair for LPIPS and SSIM.
        """
        if distributed.any_rank(self._all_real is None, self.device):
            self._all_real = self._gathered(self._real)
        real, fake = self._all_real, self._gathered(self._fake)
        count, lpips, ssim = sum(distributed.gather(self._pairs)).tolist()
        result = {"n_real": float(len(real)), "n_fake": float(len(fake))}
        self.kid_subset_size = min(50, len(real), len(fake))
        if self.inception is not None and self.kid_subset_size >= 2:
            # The singular values take seconds on a CPU: one rank computes, all get its numbers.
            own = {}
            if distributed.is_main():
                on_device = real.to(self.device), fake.to(self.device)
                own["fid"] = frechet_feature_distance(*on_device)
                own["kid"] = kernel_distance(*on_device, self.kid_subset_size)
            result |= distributed.gather(own)[0]
        if count:
            result["ssim"] = ssim / count
            if self.lpips is not None:
                result["lpips"] = lpips / count
        return result


def contour_dice(mask: np.ndarray, contour: np.ndarray) -> np.ndarray:
    """Dice overlap of lung masks with the contours that were asked for, holes of both filled.

    mask, contour: (N, H, W), boolean or 0 and 1; a contour is a filled mask or a closed outline.
    Returns (N,) in [0, 1]; 1 where both are empty.
    """
    mask, contour = np.asarray(mask) > 0, np.asarray(contour) > 0
    if mask.shape != contour.shape or mask.ndim != 3:
        raise ValueError(
            f"mask {mask.shape} and contour {contour.shape}: expected the same (N, H, W)"
        )
    scores = np.ones(len(mask))
    for i, pair in enumerate(zip(mask, contour, strict=True)):
        a, b = (ndimage.binary_fill_holes(image) for image in pair)
        if a.any() or b.any():
            scores[i] = 2 * (a & b).sum() / (a.sum() + b.sum())
    return scores


def hu_statistics(hu: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """Density inside a lung mask: mean, sd (HU), high and low attenuation (shares), n (pixels).

    High attenuation, -600 to -250 HU, rises with fibrosis (Lederer et al. 2009); low attenuation,
    below -950 HU, with emphysema. hu, mask: of the same shape. ValueError if the mask is empty.
    """
    hu, mask = np.asarray(hu, dtype=np.float64), np.asarray(mask) > 0
    if hu.shape != mask.shape or not mask.any():
        raise ValueError(
            f"hu {hu.shape} and mask {mask.shape} with {mask.sum()} pixels: expected "
            "the same shape and a mask that is not empty"
        )
    inside = hu[mask]
    return {
        "mean": float(inside.mean()),
        "sd": float(inside.std()),
        "high_attenuation": float(((inside >= -600) & (inside <= -250)).mean()),
        "low_attenuation": float((inside < -950).mean()),
        "n": float(inside.size),
    }
