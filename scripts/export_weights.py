"""Export trained models for others: safetensors, config.json and a model card.

No slice and no name of a patient is in them.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fibldm import limits
from fibldm.checkpoint import WEIGHTS_ALONE, export_weights
from fibldm.cli import make_parser, run_script
from fibldm.disk import file_hash, replace_text
from fibldm.journal import read_log
from fibldm.synthesis import Synthesizer
from fibldm.tables import SPLITS, Split, parse_table

KINDS = ("vae", "unet", "controlnet")
NAMES = {"vae": "VAE", "unet": "U-Net", "controlnet": "ControlNet"}
VALIDATION = ("mean_psnr", "psnr", "lpips", "loss", "dice", "kid", "fid", "copies")  # in the card

LIMITS = """\
- For research. Not for diagnosis: no sample shows a person.
- The models know only what their patients, scanners and labels showed them.
- Texture finer than a latent is drawn at random. It is no anatomy.
- A model can memorize patients. Look for copies before you share samples (`--drop_copies`).
- Weights may reveal who was trained on. Ask your ethics board before you share them.
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(
        __doc__.split("\n\n")[0],
        "  python scripts/export_weights.py vae_run_1 model_runs/ldm_unet_run_1 \\\n"
        "      model_runs/controlnet_run_1 --report report --output_dir exported",
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs that belong together")
    add("--output_dir", "--output", type=Path, required=True, help="gets the files; must be new")
    add("--report", type=Path, help="folder that evaluate.py wrote: its numbers go into the card")
    return parser.parse_args(argv)


def find_checkpoints(runs: list[Path]) -> dict[str, Path]:
    """The best checkpoint of each kind; ValueError where a run has none, or two have one kind."""
    found: dict[str, Path] = {}
    for run in runs:
        files = [run / f"{kind}_best.pth" for kind in KINDS if (run / f"{kind}_best.pth").is_file()]
        if not files:
            raise ValueError(f"{run}: no *_best.pth in it; expected the folder of a trained run")
        for file in files:
            kind = file.name.removesuffix("_best.pth")
            if kind in found:
                raise ValueError(f"{found[kind]} and {file}: expected one run of each stage")
            found[kind] = file
    if "vae" not in found:
        raise ValueError("no vae_best.pth in these runs; give the VAE's run too")
    return {kind: found[kind] for kind in KINDS if kind in found}


def describe_data(run: Path, content: dict) -> list[str]:
    """Slices and patients of each split, where the table is still where the VAE was trained."""
    settings = limits.read_json(run / "args.json") if (run / "args.json").is_file() else {}
    table, root = (Path(settings.get(name) or "") for name in ("csv_file", "img_dir"))
    lines = ["| split | patients | slices |", "|---|---|---|"]
    known = table.is_file() and file_hash(table) == content["lineage"].get("label_csv")
    if not known:
        return ["The training table was not found at the export: its numbers are not known."]
    rows, _, _ = parse_table(table, root, Split(**content["split"]))
    for split in SPLITS:
        patients = Counter(row.patient_id for row in rows if row.split == split)
        lines.append(f"| {split} | {len(patients)} | {patients.total()} |")
    return [*lines, "", "A patient's slices are in one split. Metrics are of held-out patients."]


def describe_report(folder: Path) -> list[str]:
    """Every number of a report with its interval and baseline, as a table."""
    try:
        groups = limits.read_json(folder / "metrics.json")["groups"]
        rows = []
        for group, content in groups.items():
            question, _, label = group.partition(": ")
            for s in content["scores"]:  # of disease the source says what a number is of
                name = s["name"] + (f" ({s['source']})" if question == "Disease" else "")
                name = (name + (f", {label}" if label else "")).replace("|", r"\|")
                rows.append((name, s["value"], s["low"], s["high"], s["baseline"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--report {folder}: no metrics.json of evaluate.py: {error}") from error

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4g}"

    lines = ["95 % intervals are by patients. The real-vs-real baseline is what other real"]
    lines += ["patients have.", ""]
    lines += ["| metric | value | 95 % interval | real-vs-real baseline |", "|---|---|---|---|"]
    for name, value, low, high, baseline in rows:
        between = "-" if low is None else f"{number(low)} to {number(high)}"
        lines.append(f"| {name} | {number(value)} | {between} | {number(baseline)} |")
    return lines


def describe_validation(checkpoints: dict[str, Path], facts: dict[str, dict]) -> list[str]:
    """What the runs measured at the step that is exported; it has no intervals."""
    lines = ["From validation while training, without intervals. `scripts/evaluate.py` gives them;"]
    lines += ["export again with `--report`.", "", "| model | step | metric | value |"]
    lines += ["|---|---|---|---|"]
    for kind, file in checkpoints.items():
        values = {}
        for row in read_log(file.parent):
            if row["step"] == facts[kind].get("step"):
                values |= {n.removeprefix("val/"): v for n, v in row.items() if n[:4] == "val/"}
        by_class = sorted(name for name in values if name.startswith("copies_"))
        for name in (*VALIDATION, *by_class):
            if name in values:
                step = facts[kind]["step"]
                lines.append(f"| {NAMES[kind]} | {step} | {name} | {values[name]:.4g} |")
    return lines


def write_card(folder: Path, model: Synthesizer, data: list[str], metrics: list[str]) -> str:
    """The model card: what the models are, of what data, how good, and where they end."""
    models = {"vae": model.vae, "unet": model.unet, "controlnet": model.controlnet}
    sizes = {
        NAMES[kind]: sum(p.numel() for p in one.parameters()) / 1e6
        for kind, one in models.items()
        if one is not None
    }
    low, high = model.window
    spacing = "not known" if model.pixel_spacing is None else f"{model.pixel_spacing:.4g} mm"
    return "\n".join(
        [
            "# FibLDM model", "",
            "Latent diffusion for axial chest CT slices, trained with FibLDM.", "",
            f"- Slices: {model.image_size}x{model.image_size} pixels, {low:g} to {high:g} HU",
            f"- Pixel spacing: {spacing}",
            f"- Classes: {', '.join(model.classes) or 'none'}",
            f"- Contours: {model.contour_style or 'of no single style'}",
            *(f"- {name}: {size:.1f} M parameters" for name, size in sizes.items()), "",
            "## Use", "",
            "    from fibldm.synthesis import Synthesizer",
            f'    model = Synthesizer.from_checkpoints("{folder.name}")',
            "    for sample in model.sample(contours, seed=0):",
            '        sample.save(f"{sample.index}.dcm")', "",
            "## Data", "", *data, "",
            "## Metrics", "", *metrics, "",
            "## Limits", "", LIMITS,
        ]
    )  # fmt: skip


def main(args: argparse.Namespace) -> None:
    checkpoints = find_checkpoints(args.runs)
    model = Synthesizer.from_checkpoints(**checkpoints, device="cpu")  # they fit together
    metrics = None if args.report is None else describe_report(args.report)
    output = args.output_dir
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"--output_dir {output}: not empty; expected a new folder")
    output.mkdir(parents=True, exist_ok=True)
    facts = {
        kind: export_weights(file, kind, output / f"{kind}{WEIGHTS_ALONE}")
        for kind, file in checkpoints.items()
    }
    replace_text(output / "config.json", json.dumps(facts, indent=2) + "\n")
    metrics = metrics or describe_validation(checkpoints, facts)
    data = describe_data(checkpoints["vae"].parent, facts["vae"])
    replace_text(output / "README.md", write_card(output, model, data, metrics))
    Synthesizer.from_checkpoints(output, device="cpu")
    print(f"{output}: {', '.join(sorted(path.name for path in output.iterdir()))}")


if __name__ == "__main__":
    run_script(main, parse_args)
