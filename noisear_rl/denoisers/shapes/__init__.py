"""The embedded denoiser ``shapes``: its world, its training and its judges."""
