"""The embedded denoiser ``shapes``: its world, its training and its judges."""

from pathlib import Path

ASSETS = Path(__file__).resolve().parents[2] / "assets" / "shapes"
