#!/usr/bin/env bash
# Stage 4 of 5. Trains the ControlNet that steers the U-Net -> $SAVE_DIR/controlnet_best.pth
# Edit below. GPUS, NODES and RDZV_ENDPOINT are taken from the environment: see launch.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

LATENT_DATA_DIR=./data/latents_dataset                            # from stage 2
VAE_CHECKPOINT=./vae_run_1/vae_best.pth                           # from stage 1
UNET_CHECKPOINT=./model_runs/ldm_unet_run_1/unet_best.pth         # from stage 3; stays as it is
SAVE_DIR=./model_runs/controlnet_run_1                            # the run's folder

LATENT_DIM=8                  # channels of the latents: checked against the data
LATENT_SIZE=16                # side of the latents: checked against the data
CONTOUR_CHANNELS=1            # as in stage 2
STEPS=20000                   # optimizer steps
BATCH_SIZE=32                 # latents a step, over all GPUs together
LR=1e-4                       # learning rate
LR_SCHEDULE=constant          # constant, cosine, cooldown: of the learning rate
VAL_INTERVAL=2500             # steps between validations (loss, samples, metrics)
PRECISION=auto                # auto, fp32, bf16, fp16

launch train_controlnet.py \
    --latent_data_dir "$LATENT_DATA_DIR" --vae_checkpoint "$VAE_CHECKPOINT" \
    --unet_checkpoint "$UNET_CHECKPOINT" --save_dir "$SAVE_DIR" \
    --latent_dim "$LATENT_DIM" --latent_size "$LATENT_SIZE" \
    --contour_channels "$CONTOUR_CHANNELS" \
    --steps "$STEPS" --batch_size "$BATCH_SIZE" --lr "$LR" --lr_schedule "$LR_SCHEDULE" \
    --val_interval "$VAL_INTERVAL" --precision "$PRECISION" \
    "$@"
