"""Slices per second of prepare_data.py on 1 and more processes: synthetic DICOM of 512x512."""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import numpy as np
from scans import ct_dataset, write_dicom
from tqdm import tqdm

from fibldm.phantom import phantom_slice

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "prepare_data.py"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--series", type=int, default=6)
    parser.add_argument("--slices", type=int, default=60, help="of each series")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3, help="each measured in turn")
    return parser.parse_args()


def write_series(folder: Path, series: int, slices: int) -> None:
    """Patients from apex to base: 12 drawn slices each, every one taken for several positions."""
    for patient in tqdm(range(series), desc="drawing", disable=None):
        drawn = [phantom_slice(patient, level, 512)[0] for level in np.linspace(0.1, 0.95, 12)]
        datasets = [
            ct_dataset(
                drawn[i * len(drawn) // slices], -2.0 * i,
                PatientID=f"P{patient}", SeriesInstanceUID=f"1.2.{patient}",
                PixelSpacing=[0.7, 0.7],
            )
            for i in range(slices)
        ]  # fmt: skip
        write_dicom(folder / str(patient), datasets)


def measure(folder: Path, output: Path, workers: int) -> float:
    """Seconds of one run of the script, its start included."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, SCRIPT, folder, "--output_dir", output,
         "--num_workers", str(workers)],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return time.perf_counter() - start


def main(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_series(folder / "in", args.series, args.slices)
        seconds = {workers: [] for workers in args.workers}
        for turn in range(args.rounds):
            for workers in args.workers:
                output = folder / f"out_{turn}_{workers}"
                seconds[workers].append(measure(folder / "in", output, workers))
    count = args.series * args.slices
    first = np.median(seconds[args.workers[0]])
    print(
        f"{args.series} series of {args.slices} slices, 512x512; median of {args.rounds} rounds\n"
    )
    print("| processes | seconds | slices/s | speed-up |\n|---|---|---|---|")
    for workers, values in seconds.items():
        median = np.median(values)
        print(f"| {workers} | {median:.1f} | {count / median:.0f} | {first / median:.2f} |")


if __name__ == "__main__":
    main(parse_args())
