#!/usr/bin/env bash
# Stage 5 of 5. Samples new slices for the contours of held-out patients -> $OUTPUT_DIR
# Edit below. GPUS, NODES and RDZV_ENDPOINT are taken from the environment: see launch.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

VAE_CHECKPOINT=./vae_run_1/vae_best.pth                                   # from stage 1
UNET_CHECKPOINT=./model_runs/ldm_unet_run_1/unet_best.pth                 # from stage 3
CONTROLNET_CHECKPOINT=./model_runs/controlnet_run_1/controlnet_best.pth   # from stage 4
LATENT_DATA_DIR=./data/latents_dataset     # its contours are asked for
SPLIT=test                                 # contours of which patients: test to report, val to choose
OUTPUT_DIR=./samples                       # gets the slices, samples.csv and grid.png

NUM_SAMPLES=16                # contours are used in turn
SAMPLER=ddpm                  # ddpm: random; dpmpp_2m, ddim: no noise on the way
STEPS=20                      # evaluations of the denoiser
GUIDANCE_SCALE=1              # 1: none; higher: more of the label, disease less varied
FORMAT=png                    # png (16-bit), npy, nifti, dicom: all hold HU
SEED=0                        # sample i depends on the seed and i alone
DROP_COPIES=                  # latent data set (as LATENT_DATA_DIR): copies of its training slices
                              # are drawn again; empty: not looked for

# Contours of your own (--contours FILE_OR_FOLDER) or none (--unconditional) take their place.
CONTOURS=(--latent_data_dir "$LATENT_DATA_DIR" --split "$SPLIT")   # what is asked for
for option in "$@"; do
    case "$option" in
        --contours*) CONTOURS=() ;;
        --unconditional) CONTOURS=() CONTROLNET_CHECKPOINT= ;;   # a ControlNet needs contours
    esac
done

launch sample.py \
    --vae_checkpoint "$VAE_CHECKPOINT" --unet_checkpoint "$UNET_CHECKPOINT" \
    ${CONTROLNET_CHECKPOINT:+--controlnet_checkpoint "$CONTROLNET_CHECKPOINT"} \
    ${CONTOURS[@]+"${CONTOURS[@]}"} --output_dir "$OUTPUT_DIR" \
    --num_samples "$NUM_SAMPLES" --sampler "$SAMPLER" --steps "$STEPS" \
    --guidance_scale "$GUIDANCE_SCALE" --format "$FORMAT" --seed "$SEED" \
    ${DROP_COPIES:+--drop_copies "$DROP_COPIES"} \
    "$@"
