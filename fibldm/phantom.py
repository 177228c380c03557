"""Synthetic axial lung CT in HU, with pulmonary fibrosis and its contour: the embedded data set.

A drawing, not a simulation: enough anatomy, texture and disease for every stage to have something
to learn where no patient's data may be used. Fibrosis follows the pattern of usual interstitial
pneumonia (Raghu et al. 2022, doi:10.1164/rccm.202202-0399ST): reticulation, ground glass and
honeycombing that grow to the pleura, to the back and to the base.
"""

import math
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage as ndi
from scipy.spatial import cKDTree
from tqdm import tqdm

from fibldm import ct
from fibldm.tables import write_csv

# Every slice is drawn on this grid and then resized, so that a structure has the same size in the
# chest at any resolution. Lengths are in units of half the image: x to the patient's left (image
# right), y to the back (image bottom), both from -1 to 1.
GRID = 256
DRAWN = 4 * GRID  # vessels and airways are drawn this fine and reduced, for smooth edges
AIR, FAT, MUSCLE, BLOOD, LIVER, MARROW, CORTEX = -1000.0, -100.0, 50.0, 42.0, 60.0, 230.0, 620.0
LEVELS = (0.2, 0.9)  # of the slices in a data set
COLUMNS = ("image", "contour", "patient_id", "label")  # of label.csv


@dataclass(frozen=True)
class Patient:
    """What all slices of a patient share; lengths in units of half the image."""

    width: float  # of the rib cage, from the middle to the side
    depth: float  # of the rib cage, from the middle to the front
    square: float  # exponent of the rib cage's superellipse: 2 is an ellipse
    fat: float  # thickness under the skin
    heart: float  # factor on the heart's size
    lean: float  # of the heart to the left
    shift: tuple[float, float]  # of the patient on the table
    density: float  # HU of healthy parenchyma
    breast: float  # by how much they stand out
    contrast: float  # HU that contrast agent adds to blood
    noise: float  # HU, standard deviation
    table: bool
    severity: float  # of fibrosis, 0 to 1

    @classmethod
    def draw(cls, patient: int, seed: int) -> "Patient":
        rng = np.random.default_rng([seed, patient])
        return cls(
            width=rng.uniform(0.64, 0.74),
            depth=rng.uniform(0.47, 0.57),
            square=rng.uniform(2.1, 2.5),
            fat=rng.uniform(0.02, 0.09),
            heart=rng.uniform(0.88, 1.12),
            lean=rng.uniform(0.06, 0.12),
            shift=(rng.uniform(-0.04, 0.04), rng.uniform(-0.05, 0.03)),
            density=rng.uniform(-885, -845),
            breast=rng.choice([0.0, 0.0, 0.0, 0.03, 0.08]).item(),
            contrast=rng.choice([0.0, 0.0, 120.0]).item(),
            noise=rng.uniform(12, 26),
            table=bool(rng.random() < 0.75),
            severity=rng.uniform(0.35, 1.0) if patient % 2 else 0.0,
        )


def phantom_slice(
    patient: int, level: float, size: int = 256, fibrosis: float | None = None, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """One slice: (size, size) float32 HU and the (size, size) bool mask of the filled lungs.

    A function of its arguments alone. `patient` fixes body, lungs, heart and severity: odd patients
    have fibrosis, even ones have none. `level` goes from 0, the top of the lungs, to 1, their base.
    `fibrosis` from 0 to 1 replaces the patient's own severity. Anterior is at the top, the
    patient's left is on the right.
    """
    if not 0 <= level <= 1:
        raise ValueError(f"level: expected 0 (top of the lungs) to 1 (base), found {level}")
    if fibrosis is not None and not 0 <= fibrosis <= 1:
        raise ValueError(f"fibrosis: expected a severity from 0 to 1, found {fibrosis}")
    who = Patient.draw(patient, seed)
    severity = who.severity if fibrosis is None else fibrosis
    rng = np.random.default_rng([seed, patient, round(level * 1e6)])
    x, y = _coordinates(who, np.random.default_rng([seed, patient, 1, 1]))

    hu, lung = _draw_body(who, x, y, level)
    inside = _cover(lung)
    tissue = _draw_parenchyma(who, lung, y, level, severity, rng)
    hu += inside * (tissue - hu)
    _draw_trachea(hu, x, y, level, lung)
    hu += 7 * _blobs(rng, 40) * (hu > -300)  # no organ is even
    hu = _scan(hu, who, rng)

    if size != GRID:
        hu, inside = _resize(hu, size), _resize(inside, size)
    return np.clip(hu, -1024, 3071).astype(np.float32), inside >= 0.5


# Shapes: fields over the grid, positive inside, about the distance to the edge.


@cache
def _grid() -> tuple[np.ndarray, np.ndarray]:
    at = (np.arange(GRID, dtype=np.float32) + 0.5) / GRID * 2 - 1
    x, y = np.meshgrid(at, at)
    return x, y


def _oval(x, y, center, axes, power=2.0, angle=0.0):
    """Superellipse; `angle` in radians, clockwise on the image."""
    u, v = x - center[0], y - center[1]
    axes = [max(axis, 1e-3) for axis in axes]
    if angle:
        cos, sin = math.cos(angle), math.sin(angle)
        u, v = cos * u + sin * v, cos * v - sin * u
    if power == 2.0:
        rho = np.sqrt((u / axes[0]) ** 2 + (v / axes[1]) ** 2)
    else:
        rho = (np.abs(u / axes[0]) ** power + np.abs(v / axes[1]) ** power) ** (1 / power)
    rho = np.maximum(rho, 1e-3)
    return np.sqrt(u * u + v * v) * (1 / rho - 1)


def _both(a, b, round_by):
    """Intersection with a rounded edge (polynomial smooth minimum)."""
    h = np.clip(0.5 + 0.5 * (b - a) / round_by, 0, 1)
    return b + (a - b) * h - round_by * h * (1 - h)


def _cover(field):
    """Share of each pixel that lies inside, 0 to 1."""
    return np.clip(field * (GRID / 2) + 0.5, 0, 1)


def _paint(hu, field, value) -> None:
    hu += _cover(field) * (value - hu)


def _resize(image: np.ndarray, size: int) -> np.ndarray:
    how = Image.Resampling.BOX if size < image.shape[0] else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(image.astype(np.float32)).resize((size, size), how))


def _blobs(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Smooth noise with about `cells` blobs across the image, standard deviation about 0.6."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((GRID, GRID), Image.Resampling.BICUBIC))


def _coordinates(who: Patient, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of the patient: shifted, and bent a little so that no shape is an exact oval."""
    x, y = _grid()
    x = x - who.shift[0] + 0.016 * _blobs(rng, 5)
    y = y - who.shift[1] + 0.016 * _blobs(rng, 5)
    return x, y


# Anatomy.


def _along(level: float, levels, values) -> float:
    """A value between those given at some levels. A plain float keeps fields in float32."""
    return float(np.interp(level, levels, values))


def _draw_body(who: Patient, x, y, level):
    """Everything but lung tissue -> HU, field of the lungs."""
    wide = who.width * _along(level, [0, 0.15, 0.35, 0.6, 1], [0.62, 0.78, 0.93, 1, 1.02])
    deep = who.depth * _along(level, [0, 0.15, 0.35, 0.6, 1], [0.60, 0.78, 0.95, 1, 1.04])
    middle = _along(level, [0, 0.4, 1], [0.07, 0.0, 0.0])
    side = np.abs(x)

    # Lungs: the inside of the rib cage on each side of the mediastinum.
    cage = _oval(x, y, (0, middle), (wide, deep), who.square)
    at = [-1.0, -0.75, -0.4, 0.0, 0.35, 0.65, 1.0]
    top = [0.20, 0.16, 0.13, 0.12, 0.11, 0.13, 0.18]
    mid = [0.02, 0.05, 0.13, 0.15, 0.11, 0.14, 0.18]
    low = [0.08, 0.11, 0.11, 0.10, 0.08, 0.14, 0.18]
    half = [_along(level, [0.1, 0.4, 0.75], three) for three in zip(top, mid, low, strict=True)]
    half = np.interp((y - middle) / deep, at, half).astype(np.float32)
    lung = _both(cage - 0.012, (side - half) * 0.9, 0.09)

    # Lungs: less heart, aorta and the domes of the diaphragm.
    beat = who.heart * _along(level, [0.38, 0.5, 0.7, 1.0], [0.40, 0.80, 1.0, 0.85])
    heart_at = (who.lean, middle - 0.36 * deep)
    heart = _oval(x, y, heart_at, (0.33 * beat, 0.24 * beat), 2.2, 0.5)
    aorta = _oval(x, y, (0.09, middle + 0.50 * deep), (0.058, 0.058))
    right, left = (float(max(0, level - start) / (1 - start)) ** 0.5 for start in (0.70, 0.78))
    liver = _oval(x, y, (-0.50 * wide, middle - 0.10), (0.50 * wide * right, 0.74 * deep * right))
    spleen = _oval(x, y, (0.56 * wide, middle - 0.06), (0.40 * wide * left, 0.68 * deep * left))
    if level > 0.38:
        lung = _both(lung, -heart - 0.015, 0.05)
    if level > 0.28:
        lung = _both(lung, -aorta - 0.012, 0.04)
    for dome, reached in ((liver, right), (spleen, left)):
        if reached:
            lung = _both(lung, -dome - 0.006, 0.03)

    # Table.
    hu = np.full_like(x, AIR)
    if who.table:
        under = who.depth + 0.30 + who.fat
        for depth, value in ((under, -350.0), (under + 0.07, -150.0)):
            _paint(hu, 0.008 - np.abs(np.hypot(x, y + 2.2) - 2.2 - depth), value)

    # Wall of the chest: skin, fat, muscle with planes of fat, and the pleura's fat.
    shoulders = _along(level, [0, 0.3, 1], [0.10, 0.02, 0.0])
    axes = (
        who.width + 0.12 + who.fat + shoulders,
        who.depth + 0.12 + 0.8 * who.fat - 0.4 * shoulders,
    )
    groove = 0.035 * np.exp(-((x / 0.09) ** 2)) * np.sign(y - 0.2)
    chest = body = _oval(x, y + groove, (0, 0.045), axes, who.square)
    if who.breast:
        bulge = math.exp(-(((level - 0.55) / 0.25) ** 2))
        extent = (0.25 * bulge, (0.10 + who.breast) * bulge)
        breast = _oval(side, y, (0.42, -who.depth - 0.02), extent)
        body = -_both(-chest, -breast, 0.08)
    _paint(hu, body, 20.0)
    _paint(hu, body - 0.012, FAT)
    trunk = chest - 0.02 - who.fat * (0.7 + 0.5 * np.minimum(side / who.width, 1))
    _paint(hu, trunk, MUSCLE)
    planes = np.abs(np.sin(26 * cage + 5 * x * y + 2 * np.sin(4 * x)))
    _paint(hu, np.minimum(trunk - 0.015, -cage - 0.075) - 0.12 * (planes > 0.28), FAT)
    _paint(hu, cage + 0.065, MUSCLE)
    _paint(hu, cage + 0.012, -30.0)

    # Mediastinum: fat between the great vessels, heart, aorta, gullet; liver and spleen below.
    _paint(hu, cage - 0.005, FAT + 15)
    blood = BLOOD + who.contrast
    if level < 0.5:
        _paint(hu, _oval(x, y, (0.0, middle + 0.12 * deep), (0.12, 0.10)), MUSCLE - 10)
        size = _along(level, [0.2, 0.3], [0.65, 1.0])
        for u, v, radius in ((-0.03, -0.42, 0.08), (-0.11, -0.26, 0.05), (0.09, -0.28, 0.065)):
            _paint(hu, _oval(x, y, (u, middle + v * deep), (radius * size, radius * size)), blood)
    if level > 0.38:
        _paint(hu, heart, BLOOD - 5)
        cavity = (who.lean + 0.03, middle - 0.34 * deep)
        _paint(hu, _oval(x, y, cavity, (0.18 * beat, 0.11 * beat), 2.0, 0.6), blood - 5)
        _paint(hu, _oval(x, y, (-0.03, middle - 0.04 * deep), (0.11 * beat, 0.08)), blood)
    if level > 0.28:
        _paint(hu, aorta, blood)
    _paint(hu, _oval(x, y, (0.02, middle + 0.36 * deep), (0.035, 0.025)), MUSCLE - 15)
    if right:
        _paint(hu, np.minimum(liver, cage), LIVER + 0.3 * who.contrast)
    if left:
        _paint(hu, np.minimum(spleen, cage), LIVER - 10 + 0.4 * who.contrast)
    _draw_bones(hu, x, y, cage, trunk, level, middle, deep)
    return hu, lung


def _draw_bones(hu, x, y, cage, trunk, level, middle, deep) -> None:
    # Ribs cross the slice at a slant: each shows as a lens in a ring around the lungs.
    angle = np.arctan2(y - middle, np.abs(x))
    phase = 9 * angle + 0.8 * np.sin(3 * angle) + 13 * level + 0.9 * (x > 0)
    thick = 0.026 * np.sqrt(np.clip(np.cos(phase) * 0.8 + 0.25, 0, 1))
    ribs = thick - np.abs(cage + 0.044) - ((thick < 0.008) | (np.abs(x) < 0.12))
    _paint(hu, ribs, CORTEX)
    _paint(hu, ribs - 0.010, MARROW)

    # Sternum; vertebra with canal, arch and processes; shoulder blades.
    sternum = _oval(x, y, (0, middle - deep - 0.05), (0.115, 0.032), 2.6)
    spine = middle + 0.82 * deep
    vertebra = _oval(x, y, (0, spine), (0.125, 0.10), 2.5)
    arch = _oval(x, y, (0, spine + 0.135), (0.09, 0.066))
    spinous = np.minimum(_oval(x, y, (0, spine + 0.21), (0.018, 0.075)), trunk - 0.01)
    wings = _oval(np.abs(x), y, (0.13, spine + 0.12), (0.08, 0.024), 2.0, 0.35)
    for bone in (sternum, vertebra, arch, spinous, wings):
        _paint(hu, bone, CORTEX - 150)
    for bone in (sternum, vertebra, arch, wings):
        _paint(hu, bone - 0.015, MARROW)
    _paint(hu, _oval(x, y, (0, spine + 0.135), (0.05, 0.042)), 25.0)
    if level < 0.4:
        blade = _oval(np.abs(x), y, (0.62, middle + 0.36), (0.20, 0.02), 2.0, -0.75)
        _paint(hu, np.minimum(blade, -cage - 0.08), CORTEX - 100)


def _draw_trachea(hu, x, y, level, lung) -> None:
    """Trachea above the carina, main bronchi below it, outside the lungs."""
    if level < 0.42:
        tubes = [((0.0, 0.03), (0.052, 0.048))]
    elif level < 0.52:
        apart = 0.055 + 0.7 * (level - 0.42)
        tubes = [((side * apart, 0.04), (0.045, 0.034)) for side in (-1, 1)]
    else:
        return
    for center, axes in tubes:
        tube = np.minimum(_oval(x, y, center, axes), -lung - 0.012)
        _paint(hu, np.minimum(tube + 0.012, -lung), MUSCLE - 20)
        _paint(hu, tube, AIR + 10)


# Lung tissue.


def _draw_parenchyma(who: Patient, lung, y, level, severity, rng) -> np.ndarray:
    """HU of lung tissue on the whole grid; only the part inside the lungs is used."""
    gravity = np.clip(y / who.depth, -1, 1)
    grain = ndi.gaussian_filter(rng.standard_normal(y.shape).astype(np.float32), 0.9)
    tissue = who.density + 35 * gravity + 12 * _blobs(rng, 12) + 66 * grain
    depth = ndi.distance_transform_edt(lung > 0).astype(np.float32) * 2 / GRID
    vessels, airways = _draw_trees(depth, rng)

    # Vessels end before the pleura.
    vessels *= np.clip((depth - 0.012) / 0.04, 0, 1)
    tissue += vessels * (BLOOD + 0.6 * who.contrast - tissue)
    if severity > 0:
        tissue = _fibrose(tissue, depth, gravity, level, severity, rng)
    walls = np.clip(ndi.grey_dilation(airways, 3) - airways, 0, 1) * (depth > 0.02)
    tissue += walls * (-150 - tissue)
    tissue += airways * (AIR + 20 - tissue)
    return tissue


def _draw_trees(depth: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Vessels and airways that branch from each hilum -> their share of each pixel, 0 to 1."""
    vessels, airways = (Image.new("L", (DRAWN, DRAWN)) for _ in range(2))
    vessel_pen, airway_pen = ImageDraw.Draw(vessels), ImageDraw.Draw(airways)
    columns = np.arange(GRID)
    for half in (columns < GRID // 2, columns >= GRID // 2):
        part = depth * half
        if part.max() < 0.03:
            continue
        spots = np.argwhere(part > 0)[:, ::-1].astype(float)

        # The hilum: at the medial edge, about half way from front to back.
        medial = np.abs(spots[:, 0] - GRID / 2)
        score = 0.8 * medial + np.abs(spots[:, 1] - np.median(spots[:, 1]))
        root = spots[np.argmin(score + 6 * (part[part > 0] < 0.02))]

        # Branches; vessels that cross the slice and show as dots; airways, each beside a vessel.
        for goal in rng.choice(spots, 7):
            angle = math.atan2(goal[1] - root[1], goal[0] - root[0])
            _grow(vessel_pen, part, root, angle, rng.uniform(1.8, 3.6), rng)
        for spot in rng.choice(spots, len(spots) // 110):
            near = math.exp(-math.dist(spot, root) / 30)
            radius = rng.uniform(0.35, 0.8) + 1.2 * rng.random() ** 2 * near
            _dot(vessel_pen, spot, radius, int(rng.uniform(110, 255)))
        for goal in rng.choice(spots, 3):
            spot = root + (goal - root) * rng.uniform(0.1, 0.45)
            radius = rng.uniform(1.2, 2.3)
            _dot(vessel_pen, spot + np.array([radius * 1.7, 0]), radius, 255)
            _dot(airway_pen, spot, radius, 255)
    scale = DRAWN // GRID
    return tuple(np.asarray(i.reduce(scale), np.float32) / 255 for i in (vessels, airways))


def _dot(pen, center, radius, fill) -> None:
    """A disk; `center` and `radius` in pixels of the grid."""
    u, v, r = (float(n) * DRAWN / GRID for n in (*center, radius))
    pen.ellipse((u - r, v - r, u + r, v + r), fill=fill)


def _grow(pen, part, point, angle, width, rng) -> None:
    """Draw one vessel, `width` in pixels of the grid, and from it its side branches.

    It wanders out of the slice and back into it, so that only pieces of it show.
    """
    scale = DRAWN / GRID
    height = rng.normal(0, 0.5)
    while width > 0.5:
        end = point + 4 * np.array([math.cos(angle), math.sin(angle)])
        u, v = int(end[0]), int(end[1])
        if not (0 <= u < GRID and 0 <= v < GRID) or part[v, u] <= 0:
            return
        if abs(height) < 0.6:
            fill = int(255 - 150 * abs(height))
            pen.line((*(point * scale), *(end * scale)), fill, max(2, int(width * scale)))
        point = end
        angle += rng.normal(0, 0.16)
        height += rng.normal(0, 0.28)
        width *= 0.945
        if rng.random() < 0.17 and width > 0.7:
            turn = rng.choice((-1, 1)) * rng.uniform(0.5, 0.9)
            _grow(pen, part, point, angle + turn, width * 0.72, rng)


def _fibrose(tissue, depth, gravity, level, severity, rng) -> np.ndarray:
    """Ground glass, reticulation and honeycombing, from the pleura inward."""
    spread = severity * _along(level, [0, 0.4, 1], [0.12, 0.5, 1.1])
    reach = 0.03 + 0.11 * spread  # depth to which disease goes
    amount = spread * (0.60 + 0.45 * gravity) * 1.5 + 0.35 * _blobs(rng, 9) * math.sqrt(spread)
    amount = np.clip(amount, 0, 1) * np.exp(-((depth / reach) ** 1.5))

    # Ground glass: a haze.
    tissue = tissue + 210 * amount * (0.8 + 0.5 * _blobs(rng, 24))

    # Reticulation: the walls of small cells, broken here and there.
    edge, _ = _some_cells(6.0, rng)
    lines = np.clip(1.1 - edge + 0.5 * _blobs(rng, 48), 0, 1) * np.clip(
        0.7 + 0.6 * _blobs(rng, 40), 0, 1
    )
    net = np.clip(2.0 * amount, 0, 1) * lines
    tissue = tissue + net * (-150 - tissue)

    # Honeycombing: clustered cysts with walls, where disease is worst.
    worst = np.clip((amount + 0.2 * _blobs(rng, 14) - 0.55) * 8, 0, 1) * (severity > 0.3)
    edge, cell = _some_cells(7.0, rng)
    hollow = np.clip((edge - 0.55) / 0.9, 0, 1)
    comb = -180 - (700 + 70 * np.sin(7.0 * cell)) * hollow
    return tissue + worst * (comb - tissue)


@cache
def _cells(spacing: float) -> tuple[np.ndarray, np.ndarray]:
    """Voronoi cells about `spacing` pixels apart on a torus as large as the grid.

    Returns the distance to the nearest edge in pixels and a number for each cell. Slices share it,
    for its cost; each takes it shifted and mirrored in its own way.
    """
    rng = np.random.default_rng(round(spacing * 100))
    count = int(GRID / spacing)
    seeds = np.stack(np.meshgrid(np.arange(count), np.arange(count)), -1).reshape(-1, 2) + 0.5
    seeds = (seeds + rng.uniform(-0.45, 0.45, seeds.shape)) * (GRID / count)
    seeds = seeds[rng.random(len(seeds)) < 0.8]  # cells differ in size
    pixels = np.stack(np.meshgrid(np.arange(GRID) + 0.5, np.arange(GRID) + 0.5), -1)
    distance, index = cKDTree(seeds, boxsize=GRID).query(pixels, k=2)
    edge = (distance[..., 1] - distance[..., 0]) / 2
    return edge.astype(np.float32), index[..., 0].astype(np.float32)


def _some_cells(spacing: float, rng: np.random.Generator) -> list[np.ndarray]:
    shift, turn = rng.integers(GRID, size=2), int(rng.integers(4))
    return [np.rot90(np.roll(part, shift, (0, 1)), turn) for part in _cells(spacing)]


# The scanner.


def _scan(hu: np.ndarray, who: Patient, rng: np.random.Generator) -> np.ndarray:
    """Blur of the reconstruction and its correlated noise."""
    hu = ndi.gaussian_filter(hu, 0.45)
    grain = ndi.gaussian_filter(rng.standard_normal(hu.shape).astype(np.float32), 0.7)
    return hu + who.noise * grain / grain.std()


def write_dataset(
    folder: str | os.PathLike,
    patients: int,
    slices_per_patient: int,
    size: int,
    seed: int = 0,
    contour_style: str = "filled",
) -> None:
    """Write images/, contours/, dataset.json and label.csv for patients 0 to `patients` - 1.

    Images are 16-bit PNG, HU = pixel - 1024; contours are masks, 0 or 255, "filled" or their
    "outline", one pixel wide. label.csv comes last and in one move, so that an interrupted run is
    not taken for a whole data set.
    """
    if contour_style not in ct.STYLES:
        raise ValueError(f"contour_style: expected filled or outline, found {contour_style!r}")
    folder = Path(folder)
    for name in ("images", "contours"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rows = []
    low, high = LEVELS
    for patient in tqdm(range(patients), desc="patients", unit="patient", disable=None):
        rng = np.random.default_rng([seed, patient, 2, 2])
        steps = np.arange(slices_per_patient) + rng.random(slices_per_patient)
        levels = low + (high - low) * steps / slices_per_patient
        for number, level in enumerate(levels):
            hu, mask = phantom_slice(patient, float(level), size, seed=seed)
            if contour_style == "outline":
                mask = ct.outline_mask(mask[None])[0]
            name = f"P{patient:04d}_S{number:03d}.png"
            Image.fromarray(np.round(hu + 1024).astype(np.uint16)).save(folder / "images" / name)
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "contours" / name)
            label = "fibrosis" if patient % 2 else "normal"
            cells = f"images/{name}", f"contours/{name}", f"P{patient:04d}", label
            rows.append(dict(zip(COLUMNS, cells, strict=True)))
    ct.write_dataset_info(folder, ct.DatasetInfo((1.0, -1024.0)))
    write_csv(folder / "label.csv", rows, COLUMNS)
