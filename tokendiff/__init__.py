"""Train and sample discrete-diffusion language models as jobs on a Ray cluster."""

__version__ = "0.2.0"
