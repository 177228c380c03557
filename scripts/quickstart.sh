#!/usr/bin/env bash
# All five stages at toy size on a CPU, on synthetic lungs: at most 6 minutes on 2 cores.
# Makes .venv and installs requirements.txt, or uses PYTHON. Writes into quickstart/; interrupted,
# the same command goes on. Usage: bash scripts/quickstart.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh requirements.txt

OUT=quickstart            # everything is written here
PATIENTS=100              # synthetic patients, half of them with fibrosis
IMAGE_SIZE=96             # pixels
LATENT_SIZE=24            # so each latent stands for 4x4 pixels
RUN_OPTIONS="--device cpu --num_workers 1 --warmup_steps 20 --ema_decay 0.99 --log_interval 50"

step() { printf '\n== [%d s] %s\n' "$SECONDS" "$*"; }
SECONDS=0

step "Data: synthetic CT of $PATIENTS patients"
[ -f $OUT/data/label.csv ] || "$PYTHON" scripts/make_phantom_data.py --output_dir $OUT/data \
    --patients $PATIENTS --slices_per_patient 3 --image_size $IMAGE_SIZE

step "1/5 The VAE: slices <-> latents"
"$PYTHON" train_vae.py --csv_file $OUT/data/label.csv --img_dir $OUT/data --save_dir $OUT/vae \
    --image_size $IMAGE_SIZE --latent_size $LATENT_SIZE --base_channels 64 --blocks 1 \
    --val_fraction 0.2 --lr 1e-3 \
    --steps 200 --val_interval 100 $RUN_OPTIONS

step "2/5 Encoding the data set"
"$PYTHON" encode_dataset.py --csv_file $OUT/data/label.csv --img_dir $OUT/data \
    --vae_checkpoint $OUT/vae/vae_best.pth --output_dir $OUT/latents --device cpu --num_workers 1

step "3/5 The U-Net: denoising latents"
"$PYTHON" train_ldm_unet.py --latent_data_dir $OUT/latents --vae_checkpoint $OUT/vae/vae_best.pth \
    --save_dir $OUT/unet --channels 64 128 --blocks 1 --lr 1e-3 --batch_size 16 \
    --steps 1200 --val_interval 1200 --val_samples 32 $RUN_OPTIONS

step "4/5 The ControlNet: steering it by contours"
"$PYTHON" train_controlnet.py --latent_data_dir $OUT/latents \
    --vae_checkpoint $OUT/vae/vae_best.pth --unet_checkpoint $OUT/unet/unet_best.pth \
    --save_dir $OUT/controlnet --lr 5e-4 --batch_size 16 \
    --steps 100 --val_interval 100 --val_samples 32 $RUN_OPTIONS

step "What was measured on held-out patients, at the last validation of each stage"
"$PYTHON" scripts/show_metrics.py $OUT/vae $OUT/unet $OUT/controlnet

step "5/5 Sampling: 16 held-out contours, each without and with fibrosis from the same noise"
"$PYTHON" sample.py --vae_checkpoint $OUT/vae/vae_best.pth --unet_checkpoint $OUT/unet/unet_best.pth \
    --controlnet_checkpoint $OUT/controlnet/controlnet_best.pth --latent_data_dir $OUT/latents \
    --compare_labels normal fibrosis --num_samples 16 --output_dir $OUT/samples --overwrite \
    --device cpu

printf '\n%d s. Look at the same lungs without and with fibrosis: %s\n' \
    "$SECONDS" "$PWD/$OUT/samples/grid.png"
