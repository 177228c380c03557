#!/usr/bin/env bash
# Stage 2 of 5. Encodes the slices by the VAE -> $OUTPUT_DIR (latents.npy, manifest.csv, ...)
# Edit below. GPUS, NODES and RDZV_ENDPOINT are taken from the environment: see launch.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

CSV_FILE=./data/label.csv                   # the table that the VAE was trained on
IMG_DIR=./data/                             # folder that its paths are relative to
VAE_CHECKPOINT=./vae_run_1/vae_best.pth     # from stage 1
OUTPUT_DIR=./data/latents_dataset           # appears when it is whole
CONTOUR_CHANNELS=1                          # 1: lung or not; K: contour files hold labels 0 to K
VIEWS=8                                     # encodings of a training slice: moved, scaled a little
MAX_SHIFT=0.0625                            # how far, each way: a share of the side
MAX_SCALE=0.05                              # how much: 0.95 to 1.05
BATCH_SIZE=32                               # slices encoded at once, over all GPUs together

launch encode_dataset.py \
    --csv_file "$CSV_FILE" --img_dir "$IMG_DIR" --vae_checkpoint "$VAE_CHECKPOINT" \
    --output_dir "$OUTPUT_DIR" --contour_channels "$CONTOUR_CHANNELS" --batch_size "$BATCH_SIZE" \
    --views "$VIEWS" --max_shift "$MAX_SHIFT" --max_scale "$MAX_SCALE" \
    "$@"
