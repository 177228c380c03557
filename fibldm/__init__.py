"""FibLDM: latent diffusion for chest CT of pulmonary fibrosis, steered by lung contours."""

__version__ = "0.1.0"
