"""Draws the figures of the concepts page: ``python docs/figures.py`` writes ``docs/assets/*.svg``."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import FancyArrowPatch, Rectangle
from torch.distributions import Independent, Normal, kl_divergence

from noisear_rl.denoisers import load_denoiser
from noisear_rl.gaussian import kl_to_gaussian, standard_noise
from noisear_rl.rewards import load_reward

ASSETS = Path(__file__).parent / "assets"
STYLE: Any = {"svg.hashsalt": "noisear-rl", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
SEED = 11  # of a right image
PROMPT = "a photo of a red circle left of a blue square"


def save(figure: plt.Figure, name: str) -> None:
    """Writes ``assets/NAME.svg`` on white, so that it is legible in a dark theme too."""
    figure.savefig(ASSETS / f"{name}.svg", bbox_inches="tight", facecolor="white", metadata={"Date": None})
    plt.close(figure)


def mdp() -> None:
    """An episode: two prefixes of a noise, the whole noise, its image."""
    denoiser = load_denoiser("shapes-turbo", dtype="float32")
    noise = standard_noise([SEED], denoiser.latent_shape)
    images = denoiser.denoise(noise, denoiser.encode([PROMPT]))
    reward = load_reward("shapes-match").score(images, [PROMPT]).item()
    latent = noise[0].mean(0).numpy()  # (8, 8), patches of 2 x 2
    figure, axes = plt.subplots(1, 4, figsize=(9, 2.5), gridspec_kw={"wspace": 0.75})
    for axis, filled in zip(axes[:3], (0, 5, 16), strict=True):
        shown = np.full_like(latent, np.nan)
        for patch in range(filled):
            rows, columns = slice(patch // 4 * 2, patch // 4 * 2 + 2), slice(patch % 4 * 2, patch % 4 * 2 + 2)
            shown[rows, columns] = latent[rows, columns]
        axis.imshow(shown, cmap="gray", vmin=-1.5, vmax=1.5)
        for line in range(5):
            axis.axhline(2 * line - 0.5, color="0.7", lw=0.6)
            axis.axvline(2 * line - 0.5, color="0.7", lw=0.6)
        if filled < 16:
            corner = (filled % 4 * 2 - 0.5, filled // 4 * 2 - 0.5)
            axis.add_patch(Rectangle(corner, 2, 2, fill=False, ec="tab:red", lw=2, clip_on=False))
    axes[3].imshow(images[0].permute(1, 2, 0).numpy())
    titles = ("state 0: the prompt", "state 5: five patches", "state 16: the whole noise", "image")
    notes = ("action: the first patch", "action: the next patch", "end of the episode", f"reward {reward:.2f}")
    for axis, title, note in zip(axes, titles, notes, strict=True):
        axis.set_title(title)
        axis.set_xlabel(note, color="tab:red" if note.startswith("action") else "black")
        axis.set(xticks=[], yticks=[])
    for left, right, text in zip(axes[:3], axes[1:], ("5 ×", "11 ×", "denoiser"), strict=True):
        begin, end = left.get_position(), right.get_position()
        x0, x1, y = begin.x1 + 0.012, end.x0 - 0.012, (begin.y0 + begin.y1) / 2
        figure.add_artist(FancyArrowPatch((x0, y), (x1, y), arrowstyle="-|>", mutation_scale=12, color="black"))
        figure.text((x0 + x1) / 2, y + 0.05, text, ha="center")
    figure.text(0.5, 0.93, f'"{PROMPT}"', ha="center", style="italic")
    save(figure, "mdp")


def kl() -> None:
    """What a shift of the mean costs, and how far a step of given KL spreads a patch's log-ratio."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.9), gridspec_kw={"wspace": 0.3})
    shifts = np.linspace(0, 0.2, 60)
    for name, elements in (("shapes: 256 elements", 256), ("SDXL: 65,536", 65536), ("SD3, FLUX: 262,144", 262144)):
        density = Independent(Normal(torch.from_numpy(shifts)[:, None].expand(-1, elements), 1.0), 1)
        left.plot(shifts, kl_to_gaussian(density), label=name)
    left.axhline(50, color="0.6", ls="--", lw=1)
    left.set(xlabel="shift of every mean, in σ", ylabel="KL to N(0, I), nats per noise", ylim=(0, 150))
    left.text(0.2, 52, "50 nats", ha="right", color="0.4")
    left.legend(frameon=False, loc="center right", bbox_to_anchor=(1.05, 0.62))
    generator = torch.Generator().manual_seed(0)
    lengths = np.array([0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0])
    for elements, mark in ((16, "o"), (4096, "x")):
        spread = []
        for nats in lengths:
            old = Independent(Normal(torch.zeros(elements), 1.0), 1)
            new = Independent(Normal(torch.full((elements,), float(np.sqrt(2 * nats / elements))), 1.0), 1)
            assert abs(kl_divergence(old, new).item() - nats) < 1e-3
            sample = torch.randn(4000, elements, generator=generator)
            spread.append((new.log_prob(sample) - old.log_prob(sample)).std().item())
        right.plot(lengths, spread, mark, label=f"patch of {elements:,} elements")
    right.plot(lengths, np.sqrt(2 * lengths), color="0.6", lw=1, label="√(2 KL)")
    right.axhspan(-np.log(2), np.log(1.5), color="tab:orange", alpha=0.2, lw=0)
    right.text(2.0, 0.12, "not clipped at ± 0.5", color="tab:orange", ha="right")
    right.set(xlabel="KL of the step, nats per patch", ylabel="standard deviation\nof the log-ratio", ylim=(0, 2.2))
    right.legend(frameon=False, loc="upper left")
    save(figure, "kl")


if __name__ == "__main__":
    ASSETS.mkdir(exist_ok=True)
    with plt.rc_context(STYLE):
        mdp()
        kl()
