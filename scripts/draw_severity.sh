#!/usr/bin/env bash
# The same lungs from no fibrosis to severe: 4 contours, 5 severities, one noise a contour.
# Usage: bash scripts/draw_severity.sh RUNS OUTPUT_DIR [OPTION ...]    -> OUTPUT_DIR/grid.png
# RUNS has vae/, latents/, unet/ and controlnet/, as the quickstart makes them, with the classes
# normal and fibrosis. Options are those of sample.py.
set -euo pipefail
usage="two folders: trained models, and where to draw"
RUNS="$(cd -- "${1:?$usage}" && pwd)"
mkdir -p -- "${2:?$usage}"
OUTPUT_DIR="$(cd -- "$2" && pwd)"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh requirements.txt

"$PYTHON" sample.py --vae_checkpoint "$RUNS/vae/vae_best.pth" \
    --unet_checkpoint "$RUNS/unet/unet_best.pth" \
    --controlnet_checkpoint "$RUNS/controlnet/controlnet_best.pth" \
    --latent_data_dir "$RUNS/latents" --num_samples 4 --output_dir "$OUTPUT_DIR" \
    --compare_labels normal "normal=0.75 fibrosis=0.25" "normal=0.5 fibrosis=0.5" \
    "normal=0.25 fibrosis=0.75" fibrosis "${@:3}"
