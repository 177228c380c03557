"""From contours and labels to slices: the one way in which samples are drawn.

`sample.py`, the validation of both diffusion stages, `scripts/evaluate.py` and notebooks call it.
"""

import hashlib
import operator
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fibldm import ct, export
from fibldm.batches import item_noise, to_device
from fibldm.checkpoint import load, load_model, require_equal, source_hash
from fibldm.conditions import ContourForm, Label, fit_contours, read_labels
from fibldm.controlnet import ControlNet, make_denoiser, make_pair
from fibldm.distributed import choose_device
from fibldm.optim import Precision
from fibldm.privacy import LATENTS, PIXELS, Privacy
from fibldm.samplers import SAMPLERS, guide
from fibldm.scheduler import CosineScheduler
from fibldm.tables import Split
from fibldm.unet import UNet
from fibldm.vae import LATENT_SCALE, VAE, clipped

ATTEMPTS = 10  # draws of a sample with `avoid`, the first included
NEXT_SEED = 1_000_003  # from one attempt to the next: far from the seeds that people give
BATCH = 32  # slices at once in `encode` and `decode`
Models = tuple[UNet, ControlNet | None]


@dataclass(frozen=True)
class Sample:
    """A synthetic slice, and what was asked for.

    image (S, S) float32 in [-1, 1], latent (C, h, w) as training has latents, contour (K, S, S)
    uint8, 0 or 1, or None; label a class name, "a=0.4 b=0.6", or "". `seed` draws this sample at
    its first attempt. `copy_of`: the training patient whom it copies, where that was looked for.
    """

    index: int
    seed: int
    attempt: int
    image: np.ndarray
    latent: np.ndarray
    contour: np.ndarray | None
    label: str
    window: ct.Window = ct.DEFAULT_WINDOW
    pixel_spacing: float | None = None  # mm, None where unknown
    request: str = ""  # the hash of all that the samples of one call follow from
    copy_of: str | None = None

    @property
    def hu(self) -> np.ndarray:
        """The slice in HU, float32 (S, S)."""
        return ct.unit_to_hu(self.image, self.window)

    def save(self, path: str | Path, pixel_spacing: float | None = None) -> None:
        """Write it as .png, .npy, .nii.gz or .dcm, by the name's end; all of them hold HU.

        pixel_spacing: mm, in NIfTI and DICOM; the training data's by default, else 1. A PNG gets a
        dataset.json beside it, which says how its values become HU. ValueError for another name,
        or where a dataset.json of other images is there.
        """
        path, spacing = Path(path), pixel_spacing or self.pixel_spacing
        file_format = export.format_of(path)
        if file_format == "png":
            export.require_scale(path.parent, self.window, spacing)
        # No file name of a contour: it may be a patient's, and samples are given away.
        comment = f"Sample {self.index} of seed {self.seed}, class {self.label or 'none'}, "
        comment += f"run {self.request[:12]}."
        export.write_slice(
            path, self.image, self.window, file_format, spacing or 1.0, self.request, self.index,
            comment,
        )  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn: see `Synthesizer.sample`."""

    sampler: str = "ddpm"
    steps: int = 20
    spacing: str = "logsnr"
    guidance_scale: float = 1.0
    guidance_interval: Sequence[float] = (0.0, 1.0)
    guidance_rescale: float = 0.0

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler {self.sampler!r}; expected one of {', '.join(SAMPLERS)}")
        if not np.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale {self.guidance_scale}; expected a number")
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance_interval {low:g} to {high:g}; expected 0 to 1, LOW first")
        if not 0 <= self.guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale {self.guidance_rescale}; expected 0 to 1")


class Synthesizer:
    """A VAE with, for new slices, a U-Net and a ControlNet: `sample`, `encode` and `decode`.

    classes: the names of the U-Net's labels; window: HU of -1 and 1; contour_style: "filled" or
    "outline", to which contours are converted, None: they stay as they are; pixel_spacing: mm of
    the training slices; lineage: hashes of the models' files, which name samples; split: how the
    VAE's training divided patients.
    """

    def __init__(
        self,
        vae: VAE,
        unet: UNet | None = None,
        controlnet: ControlNet | None = None,
        *,
        classes: Sequence[str] = (),
        window: ct.Window = ct.DEFAULT_WINDOW,
        contour_style: str | None = None,
        pixel_spacing: float | None = None,
        precision: Precision | None = None,
        lineage: Sequence[str] = (),
        split: Split | None = None,
    ) -> None:
        self.vae, self.unet, self.controlnet = vae, unet, controlnet
        self.device = vae.latent_shift.device
        self.classes, self.window, self.lineage = list(classes), window, list(lineage)
        self.contour_style, self.pixel_spacing, self.split = contour_style, pixel_spacing, split
        self.precision = precision or Precision("fp32", self.device)
        self.scheduler = CosineScheduler(device=self.device)

    @classmethod
    def from_checkpoints(
        cls,
        vae: str | Path,
        unet: str | Path | None = None,
        controlnet: str | Path | None = None,
        device: str | torch.device = "auto",
        precision: str = "auto",
    ) -> "Synthesizer":
        """Load vae_best.pth, unet_best.pth and controlnet_best.pth; without U-Net no sampling.

        Or give, as `vae`, the folder that scripts/export_weights.py wrote. Raises ValueError where
        a file is damaged, or was trained with another of them.
        """
        if Path(vae).is_dir():  # of scripts/export_weights.py
            if unet is not None or controlnet is not None:
                raise ValueError(f"{vae}: a folder has all models in it; give no others beside it")
            files = [Path(vae) / f"{model.kind}.safetensors" for model in (VAE, UNet, ControlNet)]
            vae, unet, controlnet = files[0], *(f if f.is_file() else None for f in files[1:])
        if unet is None and controlnet is not None:
            raise ValueError(f"{controlnet}: a ControlNet steers a U-Net: give its unet_best.pth")
        device = choose_device() if device == "auto" else torch.device(device)
        vae_model, content = load_model(vae, VAE)
        facts = {"window": tuple(content["window"]), "split": Split(**content["split"])}
        lineage = [source_hash(vae)]
        unet_model = controlnet_model = None

        def require_lineage(path: str | Path, kind: str, of: str, given: str | Path) -> None:
            found, name = load(path, kind)["lineage"][of], {"vae": "VAE", "unet": "U-Net"}[of]
            remedy = f"give the {name} it was trained with, not {given}"
            require_equal(f"{path}: the SHA-256 of its {name}", found, lineage[-1], remedy)
            lineage.append(source_hash(path))

        if unet is not None:
            require_lineage(unet, UNet.kind, "vae", vae)
            unet_model, content = load_model(unet, UNet)
            facts |= {n: content.get(n) for n in ("contour_style", "pixel_spacing")}
            facts["classes"], unet_model = content["classes"], unet_model.to(device)
        if controlnet is not None:
            require_lineage(controlnet, ControlNet.kind, "unet", unet)
            controlnet_model, _ = load_model(controlnet, ControlNet, unet_model)
            controlnet_model = controlnet_model.to(device)
        return cls(
            vae_model.to(device), unet_model, controlnet_model, **facts,
            precision=Precision(precision, device), lineage=lineage,
        )  # fmt: skip

    @property
    def image_size(self) -> int:
        return self.vae.config["image_size"]

    @property
    def contour_form(self) -> ContourForm:
        """The channels, size and style of the contours that the U-Net was trained on."""
        channels = 1 if self.unet is None else self.unet.config["contour_channels"]
        return ContourForm(channels, self.image_size, self.contour_style)

    # Sampling.

    def sample(
        self,
        contours: np.ndarray | Sequence[np.ndarray] | None = None,
        labels: Label | Sequence[Label] = None,
        *,
        indices: Iterable[int] | None = None,
        seed: int = 0,
        sampler: str = Sampling.sampler,
        steps: int = Sampling.steps,
        spacing: str = Sampling.spacing,
        guidance_scale: float = Sampling.guidance_scale,
        guidance_interval: Sequence[float] = Sampling.guidance_interval,
        guidance_rescale: float = Sampling.guidance_rescale,
        batch_size: int = 16,
        avoid: Privacy | None = None,
        copies: bool = False,
    ) -> Iterator[Sample]:
        """Draw new slices, one after the other; sample i follows from (seed, i) alone.

        contours: an array (H, W), (M, H, W) or (M, K, H, W) of any size, filled or outlines, or a
        list of arrays (H, W) or (K, H, W) of several sizes; None: no contour is asked for. labels:
        a class name, {name: weight} with weights that sum to 1, None, or a list with one of these
        for each contour. indices: numbers of the samples; by default one a contour. Sample i has
        contour i modulo M, and label too. avoid: a calibrated `Privacy`; a sample that copies a
        training patient is drawn again with another seed, and left out, with a warning, where it is
        still a copy after ATTEMPTS draws. copies: give the copies too; `copy_of` names the patient.

        sampler: "ddpm" is random, "dpmpp_2m" and "ddim" follow from the first noise; steps:
        evaluations of the denoiser; spacing: of the timesteps; guidance_scale 1: none, higher: more
        of contour and label, disease less varied;
        guidance_interval: noise levels t / T at which it acts; guidance_rescale: 0 to 1, towards
        the unguided contrast. Raises ValueError, before anything is drawn, for what the models
        cannot give.
        """
        how = Sampling(sampler, steps, spacing, guidance_scale, guidance_interval, guidance_rescale)
        batches = self._batches(contours, labels, indices, seed, how, batch_size, avoid)
        return chain.from_iterable(batches if copies else map(without_copies, batches))

    def _batches(
        self,
        contours: np.ndarray | Sequence[np.ndarray] | None,
        labels: Label | Sequence[Label],
        indices: Iterable[int] | None,
        seed: int,
        how: Sampling,
        batch_size: int,
        avoid: Privacy | None,
    ) -> Iterator[list[Sample]]:
        """All draws of each batch of samples. What can be refused is refused at once."""
        if self.unet is None:
            raise ValueError("sampling needs a U-Net: give unet_best.pth to from_checkpoints")
        if contours is None and self.controlnet is not None:
            raise ValueError("a ControlNet needs contours: give some, or load the U-Net alone")
        fitted = None if contours is None else fit_contours(contours, self.contour_form)
        count = None if fitted is None else len(fitted)
        names, numbers = read_labels(labels, self.classes, count)
        items = read_indices(range(len(names)) if indices is None else indices)
        seed = as_integer("seed", seed)
        if as_integer("batch_size", batch_size) < 1:
            raise ValueError(f"batch_size {batch_size}: expected at least 1")
        if avoid is not None and not avoid.thresholds:
            raise ValueError("avoid: not calibrated; held-out slices tell how near is too near")
        timesteps = self.scheduler.timesteps(how.steps, how.spacing)
        request = self.request_hash(fitted, names, seed, how, avoid)
        if fitted is None and not any(names):
            how = replace(how, guidance_scale=1.0)  # there is nothing to guide towards

        def draw(models: Models, batch: list[int], attempt: int) -> list[Sample]:
            asked = None if fitted is None else fitted[[i % len(fitted) for i in batch]]
            label = torch.tensor([numbers[i % len(numbers)] for i in batch], device=self.device)
            now = seed + attempt * NEXT_SEED
            latents = self._draw_latents(models, batch, asked, label, now, how, timesteps)
            images = self.decode(latents, now, batch)
            copied = self.find_copied(images, avoid)
            return [
                Sample(
                    i, now, attempt, images[k], latents[k], None if asked is None else asked[k],
                    names[i % len(names)], self.window, self.pixel_spacing, request, copied[k],
                )
                for k, i in enumerate(batch)
            ]  # fmt: skip

        def draw_all() -> Iterator[list[Sample]]:
            models = self.frozen_models()
            for start in range(0, len(items), batch_size):
                left, drawn = items[start : start + batch_size], []
                for attempt in range(ATTEMPTS):
                    drawn += draw(models, left, attempt)
                    left = [s.index for s in drawn[-len(left) :] if s.copy_of is not None]
                    if not left:
                        break
                yield drawn

        return draw_all()

    def frozen_models(self) -> Models:
        """U-Net and ControlNet as they are now, for many calls."""
        frozen = self.precision.frozen
        return frozen(self.unet), None if self.controlnet is None else frozen(self.controlnet)

    @torch.no_grad()
    def _draw_latents(
        self,
        models: Models,
        items: list[int],
        contours: np.ndarray | None,
        label: Tensor,
        seed: int,
        how: Sampling,
        timesteps: list[int],
    ) -> np.ndarray:
        """Latents (N, C, h, w) for contours (N, K, S, S) and labels as UNet.forward has them."""
        shape = [self.unet.config[name] for name in ("latent_dim", "latent_size", "latent_size")]
        contour = None if contours is None else torch.from_numpy(contours).to(self.device)

        def noise(stream: str, step: int) -> Tensor:
            return to_device(item_noise(seed, stream, step, items, shape), self.device)

        with self.precision.autocast():
            denoiser = guide(
                make_denoiser(*models, contour, label), make_pair(*models, contour, label),
                self.scheduler, how.guidance_scale, how.guidance_interval, how.guidance_rescale,
            )  # fmt: skip
            z = SAMPLERS[how.sampler](
                denoiser, self.scheduler, noise("sample", 0), timesteps, lambda k: noise("step", k)
            )
        return z.float().cpu().numpy()

    def request_hash(
        self,
        contours: np.ndarray | None,
        labels: Sequence[str],
        seed: int,
        how: Sampling,
        avoid: Privacy | None = None,
    ) -> str:
        """SHA-256 of all that samples follow from, but of no file names.

        contours: as `fit_contours` gives them; labels: of each, as `Sample.label` has them.
        """
        facts = [*self.lineage, how.sampler, how.steps, how.spacing, how.guidance_scale]
        facts += [list(how.guidance_interval), how.guidance_rescale, seed]
        facts += [] if avoid is None else [sorted(avoid.thresholds.items())]
        pixels = b"" if contours is None else contours.tobytes()
        return hashlib.sha256(repr([facts, list(labels)]).encode() + pixels).hexdigest()

    # Slices to latents, and back.

    @torch.no_grad()
    def encode(self, images: np.ndarray) -> np.ndarray:
        """Slices (N, S, S) in [-1, 1] -> latents (N, C, h, w), float32, as training has them."""
        parts = [
            self.vae.encode(torch.from_numpy(part)[:, None].to(self.device)).mean * LATENT_SCALE
            for part in _parts(np.asarray(images, np.float32))
        ]
        return torch.cat(parts).cpu().numpy()

    @torch.no_grad()
    def decode(
        self, latents: np.ndarray, seed: int = 0, indices: Sequence[int] | None = None
    ) -> np.ndarray:
        """Latents (N, C, h, w) -> slices (N, S, S) in [-1, 1], float32.

        The texture that latents have no room for is drawn: for sample i from (seed, i), given
        `indices`; without them it is the same for all slices.
        """
        size, images = self.image_size, []
        for start, part in zip(range(0, len(latents), BATCH), _parts(latents), strict=True):
            noise = None
            if indices is not None:
                items = indices[start : start + BATCH]
                noise = item_noise(seed, "texture", 0, items, (1, size, size)).to(self.device)
            z = torch.from_numpy(np.asarray(part, np.float32)).to(self.device) / LATENT_SCALE
            images.append(clipped(self.vae.decode(z, noise))[:, 0].cpu())
        return torch.cat(images).numpy()

    def find_copied(self, images: np.ndarray, avoid: Privacy | None) -> list[str | None]:
        """The training patient whom each slice (N, S, S) copies, or None.

        The slice is encoded again, as the training slices were: it is what will be given away.
        """
        if avoid is None:
            return [None] * len(images)
        latents = self.encode(images) if LATENTS in avoid.spaces else None
        matches = avoid.nearest(images if PIXELS in avoid.spaces else None, latents)
        return [str(avoid.patients[m.row]) if m.flagged else None for m in matches]


def as_integer(name: str, value: object) -> int:
    """A whole number, NumPy's too; ValueError for others, such as None or True."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} {value!r}: expected a whole number") from None


def read_indices(indices: Iterable[int]) -> list[int]:
    """Numbers of samples; ValueError where one is below 0, is no number, or comes twice."""
    items = [as_integer("indices:", i) for i in indices]
    if min(items, default=0) < 0 or len({*items}) < len(items):
        raise ValueError("indices: expected numbers from 0, each once")
    return items


def without_copies(drawn: list[Sample]) -> list[Sample]:
    """The samples of a batch's draws that are no copies, in order; warns of those left out."""
    kept = {sample.index: sample for sample in drawn if sample.copy_of is None}
    for index in dict.fromkeys(sample.index for sample in drawn):
        if index not in kept:
            warnings.warn(
                f"sample {index} is left out: in {ATTEMPTS} attempts it was a copy of a training "
                "slice; the model has memorized it",
                stacklevel=2,
            )
    return [kept[index] for index in dict.fromkeys(s.index for s in drawn) if index in kept]


def _parts(array: np.ndarray) -> Iterator[np.ndarray]:
    """Consecutive parts of at most BATCH."""
    return (array[i : i + BATCH] for i in range(0, len(array), BATCH))
