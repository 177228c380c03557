"""FibLDM: latent diffusion for chest CT of pulmonary fibrosis, steered by lung contours."""
