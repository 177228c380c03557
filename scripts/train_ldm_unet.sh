#!/usr/bin/env bash
# Stage 3 of 5. Trains the U-Net on the latents -> $SAVE_DIR/unet_best.pth
# Edit below. GPUS, NODES and RDZV_ENDPOINT are taken from the environment: see launch.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

LATENT_DATA_DIR=./data/latents_dataset      # from stage 2
VAE_CHECKPOINT=./vae_run_1/vae_best.pth     # from stage 1; decodes the samples of validation
SAVE_DIR=./model_runs/ldm_unet_run_1        # the run's folder; the same command again resumes it

LATENT_DIM=8                  # channels of the latents: checked against the data
LATENT_SIZE=16                # side of the latents: checked against the data
CHANNELS="128 256 768"        # width at each resolution
BLOCKS="1 1 3"                # and how many blocks
DROPOUT=0                     # 0.1 helps against memorization of few patients
STEPS=50000                   # optimizer steps
BATCH_SIZE=64                 # latents a step, over all GPUs together
LR=2e-4                       # learning rate
LR_SCHEDULE=constant          # constant, cosine, cooldown: of the learning rate
EMA_DECAY=0.999               # of the averaged weights; samples are drawn by these
VAL_INTERVAL=2500             # steps between validations (loss, samples, metrics)
PATIENCE=0                    # validations without a new best after which it ends; 0: never
PRECISION=auto                # auto, fp32, bf16, fp16

# shellcheck disable=SC2086  # CHANNELS and BLOCKS are several words
launch train_ldm_unet.py \
    --latent_data_dir "$LATENT_DATA_DIR" --vae_checkpoint "$VAE_CHECKPOINT" --save_dir "$SAVE_DIR" \
    --latent_dim "$LATENT_DIM" --latent_size "$LATENT_SIZE" --channels $CHANNELS --blocks $BLOCKS \
    --dropout "$DROPOUT" --ema_decay "$EMA_DECAY" --patience "$PATIENCE" \
    --steps "$STEPS" --batch_size "$BATCH_SIZE" --lr "$LR" --lr_schedule "$LR_SCHEDULE" \
    --val_interval "$VAL_INTERVAL" --precision "$PRECISION" \
    "$@"
