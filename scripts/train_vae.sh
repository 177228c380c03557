#!/usr/bin/env bash
# Stage 1 of 5. Trains the VAE on the slices of label.csv -> $SAVE_DIR/vae_best.pth
# Edit below. GPUS, NODES and RDZV_ENDPOINT are taken from the environment: see launch.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

CSV_FILE=./data/label.csv     # table: image, contour, and optionally patient_id, label, split
IMG_DIR=./data/               # folder that its paths are relative to
SAVE_DIR=./vae_run_1          # the run's folder; the same command again resumes it

IMAGE_SIZE=256                # slices are padded to a square and resized to this
LATENT_SIZE=16                # side of the latent; must divide IMAGE_SIZE
LATENT_DIM=8                  # channels of the latent
STEPS=20000                   # optimizer steps
BATCH_SIZE=16                 # slices a step, over all GPUs together
LR=2e-3                       # learning rate
LR_SCHEDULE=constant          # constant, cosine, cooldown: of the learning rate
PRECISION=auto                # auto, fp32, bf16, fp16

launch train_vae.py \
    --csv_file "$CSV_FILE" --img_dir "$IMG_DIR" --save_dir "$SAVE_DIR" \
    --image_size "$IMAGE_SIZE" --latent_size "$LATENT_SIZE" --latent_dim "$LATENT_DIM" \
    --steps "$STEPS" --batch_size "$BATCH_SIZE" --lr "$LR" --lr_schedule "$LR_SCHEDULE" \
    --precision "$PRECISION" \
    "$@"
