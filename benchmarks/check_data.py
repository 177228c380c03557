"""What scripts/check_data.py finds of defects put into clean data, and what it says of clean data.

    python benchmarks/check_data.py ../shared/ct/lungs --name lungs

Of the data set's patients a share (at least one) gets one defect; all slices are then judged by the
checks of fibldm.inspection. Prints a Markdown table: of the slices with the defect how many are
flagged, by any check and not as they were in the clean data set, and of the other slices how many
are flagged that were not there. Files are written to a temporary copy of the data set.
"""

import argparse
import io
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage as ndi

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fibldm import ct  # noqa: E402
from fibldm.findings import Findings  # noqa: E402
from fibldm.inspection import SliceReader, check_slices, read_slices  # noqa: E402
from fibldm.tables import Split, parse_table  # noqa: E402

SHARES = (0.01, 0.05, 0.2)


def windowed(hu, low, high):
    """8 bits over another window than check_data takes them for."""
    levels = np.round((np.clip(hu, low, high) - low) / (high - low) * 255)
    return levels / 255 * 1400 - 1000


def by_image(hu):
    return windowed(hu, hu.min(), hu.max())


def jpeg(hu):
    file = io.BytesIO()
    Image.fromarray(np.uint8((ct.hu_to_unit(hu) + 1) * 127.5)).save(file, "JPEG", quality=75)
    return np.asarray(Image.open(file)).astype(float) / 255 * 1400 - 1000


def shifted(array, share):
    step = max(1, round(share * array.shape[0]))
    return np.roll(array, (step, -step), (0, 1))


def outline(mask):
    return mask & ~ndi.binary_erosion(mask)


def opened(mask):
    line = outline(mask)
    rows = np.arange(len(mask))[:, None]
    return line & (rows % 12 > 1)


def one_lung(mask):
    return mask & (np.arange(mask.shape[1]) < mask.shape[1] // 2)


# Of an image in HU; of a contour; of both; and of an image, made to be another patient's.
IMAGE = {
    "intercept missing (+1024 HU)": lambda hu: hu + 1024,
    "intercept twice (-1024 HU)": lambda hu: hu - 1024,
    "slope 2": lambda hu: (hu + 1024) * 2 - 1024,
    "slope 1/2": lambda hu: (hu + 1024) / 2 - 1024,
    "slope 1.25": lambda hu: (hu + 1024) * 1.25 - 1024,
    "8 bits of window -160 to 240": lambda hu: windowed(hu, -160, 240),
    "8 bits of window -1350 to 150": lambda hu: windowed(hu, -1350, 150),
    "clipped to -160 to 240": lambda hu: np.clip(hu, -160, 240),
    "clipped to -1000 to 0": lambda hu: np.clip(hu, -1000, 0),
    "inverted (8 bits)": lambda hu: -600 - np.clip(hu, -1000, 400),
    "inverted (12 bits)": lambda hu: 2047 - hu,
    "normalized to 0..1": lambda hu: (hu - hu.min()) / np.ptp(hu),
    "normalized to -1..1": lambda hu: 2 * (hu - hu.min()) / np.ptp(hu) - 1,
    "mean 0, deviation 1": lambda hu: (hu - hu.mean()) / hu.std(),
    "min-max of the image, 8 bits": by_image,
    "air alone": lambda hu: np.minimum(hu, -950),
    "constant": lambda hu: hu * 0 - 1000,
}
CONTOUR = {
    "contour empty": lambda mask: mask & False,
    "contour inverted": lambda mask: ~mask,
    "contour shifted by 1 %": lambda mask: shifted(mask, 0.01),
    "contour shifted by 2 %": lambda mask: shifted(mask, 0.02),
    "contour shifted by 5 %": lambda mask: shifted(mask, 0.05),
    "contour mirrored left-right": lambda mask: mask[:, ::-1],
    "contour mirrored top-bottom": lambda mask: mask[::-1],
    "contour of one lung": one_lung,
    "contour as outline among filled": outline,
    "contour as open outline": opened,
    "contour of another patient": None,
    "contour and image swapped": None,
}
BOTH = {
    "mirrored left-right": lambda a: a[:, ::-1],
    "mirrored top-bottom": lambda a: a[::-1],
    "turned by 180 degrees": lambda a: a[::-1, ::-1],
    "turned by 90 degrees": lambda a: np.rot90(a),
    "transposed": lambda a: a.T,
    "shrunk to a half, 0 HU around": lambda a: np.pad(a[::2, ::2], len(a) // 4),
}
COPY = {
    "copy, exact": lambda hu: hu,
    "copy, 3 % brighter and 20 HU": lambda hu: hu * 1.03 + 20,
    "copy, noise of 20 HU": lambda hu: hu + np.random.default_rng(0).normal(0, 20, hu.shape),
    "copy, JPEG at 75": jpeg,
    "copy, shifted by 1 pixel": lambda hu: np.roll(hu, (1, 1), (0, 1)),
    "copy, shifted by 2 pixels": lambda hu: np.roll(hu, (2, -2), (0, 1)),
}


def flagged_rows(rows, readings, rescale) -> dict[int, str]:
    """{row: the checks that flag it, and with which severity}; -1 stands for the whole data set."""
    flagged: dict[int, str] = {}
    findings = Findings()
    check_slices(findings, rows, readings, rescale)
    for finding in findings.in_order():
        for row in finding.rows or ([-1] if finding.lines else []):
            flagged[row] = f"{flagged.get(row, '')} {finding.severity} {finding.check}".strip()
    return flagged


def measure(folder: Path, name: str, shares: list[float]) -> None:
    """Print the table of one data set; files with defects are written into its folder."""
    rows, _, _ = parse_table(folder / "label.csv", folder, Split())
    reader = SliceReader(folder, ct.read_rescale(folder))
    readings = read_slices(rows, reader, 2)
    clean = flagged_rows(rows, readings, reader.rescale)
    slope, intercept = reader.rescale
    shown = ", ".join(f"{part:.0%}" for part in shares)
    print(f"\n{name}: {len(rows)} slices; flagged in the clean set: {len(clean)}")
    for row, checks in clean.items():
        print(f"- {rows[row].image if row >= 0 else 'all'}: {checks}")
    print(f"\n| defect, in {shown} of the patients | found | of others | severity |")
    print("|---|---|---|---|", flush=True)
    patients = sorted({row.patient_id for row in rows})

    for defect in [*IMAGE, *CONTOUR, *BOTH, *COPY]:
        found, others, severities = [], [], set()
        for part in shares:
            rng = np.random.default_rng([len(defect), round(100 * part)])
            ill = set(rng.permutation(patients)[: max(1, round(part * len(patients)))])
            well = [i for i, row in enumerate(rows) if row.patient_id not in ill]
            ill_rows = [i for i, row in enumerate(rows) if row.patient_id in ill]
            new_rows, new_readings, partners = list(rows), list(readings), set()
            for i in ill_rows:
                row, other = rows[i], well[int(rng.integers(len(well)))]
                image, contour = f"defect_{i}.npy", f"defect_{i}.png"
                hu, mask = reader.image(row)[0].astype(float), reader.contour(row)[0]
                if defect in IMAGE:
                    hu = IMAGE[defect](hu)
                elif defect in BOTH:
                    hu, mask = BOTH[defect](hu), BOTH[defect](mask)
                elif defect in COPY:
                    hu, mask = reader.image(rows[other])[0].astype(float), mask
                    hu, mask = COPY[defect](hu), reader.contour(rows[other])[0]
                    partners.add(other)
                elif defect == "contour of another patient":
                    mask = reader.contour(rows[other])[0]
                elif CONTOUR[defect]:
                    mask = CONTOUR[defect](mask)
                np.save(folder / image, ((hu - intercept) / slope).astype(np.float32))
                Image.fromarray(np.uint8(mask) * 255).save(folder / contour)
                new_rows[i] = replace(row, image=image, contour=contour)
                if defect == "contour and image swapped":
                    new_rows[i] = replace(row, image=row.contour, contour=image)
                new_readings[i] = reader.read(new_rows[i])
            flagged = flagged_rows(new_rows, new_readings, reader.rescale)
            hits = [i for i in ill_rows if i in flagged and flagged[i] != clean.get(i)]
            found.append(f"{len(hits)}/{len(ill_rows)}")
            more = [i for i in well if i in flagged and i not in clean and i not in partners]
            others.append(f"{len(more)}/{len(well)}" if more else "0")
            severities |= {word for i in hits for word in flagged[i].split() if word in SEVERITIES}
            if -1 in flagged:
                severities.add("whole set")
        row = [defect, ", ".join(found), ", ".join(others), ", ".join(sorted(severities))]
        print("| " + " | ".join(row) + " |", flush=True)


SEVERITIES = {"error", "warning"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="a clean data set")
    parser.add_argument("--name", help="of the data set in the table")
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        copy = shutil.copytree(args.folder, Path(temporary) / "data")
        measure(copy, args.name or args.folder.name, args.shares)


if __name__ == "__main__":
    main()
