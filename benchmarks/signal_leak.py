"""How much does noise reveal of an image? The signal leak of good images, by strength and by noise scale.

    python benchmarks/signal_leak.py

Denoises Gaussian noise for validation captions, keeps the images that the training reward accepts, and denoises their
leak ``strength·√ᾱ·z0 + noise_scale·ε`` with fresh noise: what a policy would achieve that knew a good layout for every
caption. Writes ``benchmarks/results/signal_leak.md``; ``configs/shapes/signal_leak.yaml`` follows from it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from noisear_rl.denoisers import load_denoiser
from noisear_rl.denoisers.shapes.captions import CATEGORIES, balanced_captions
from noisear_rl.files import write_atomically
from noisear_rl.gaussian import standard_noise
from noisear_rl.provenance import provenance
from noisear_rl.rewards import load_reward

CAPTIONS, SAMPLES = 180, 4
# (strength, noise scale); the first pair is Gaussian noise.
SETTINGS = ((0, 1), (0, 0.7), (1, 1), (1, 0.7), (1.5, 1), (1.5, 0.7), (1.5, 0.5), (2, 0.7), (3, 0.7))


def main() -> None:
    """Measures every setting and writes the table."""
    denoiser, reward, judge = load_denoiser("shapes-turbo"), load_reward("shapes-match"), load_reward("shapes-exact")
    captions = [caption for caption in balanced_captions("validation", CAPTIONS) for _ in range(SAMPLES)]
    prompts = [caption.text for caption in captions]
    conditioning = denoiser.encode(prompts)
    images, latents = denoiser.denoise_with_latents(
        standard_noise(range(len(prompts)), denoiser.latent_shape), conditioning
    )
    good = (reward.score(images, prompts) >= 0.8).nonzero()[:, 0].tolist()
    prompts, conditioning, latents = [prompts[i] for i in good], conditioning[good], latents[good]
    categories = np.array([captions[i].category for i in good])
    dimensions = latents[0].numel()
    rows = []
    for number, (strength, scale) in enumerate(tqdm(SETTINGS, desc="settings")):
        noise = standard_noise([1_000_000 * (number + 1) + i for i in good], denoiser.latent_shape)
        mean = strength * denoiser.signal_level * latents
        right = judge.score(denoiser.denoise(mean + scale * noise, conditioning), prompts).numpy() * 100
        variance = dimensions * (scale**2 - 1 - 2 * np.log(scale)) / 2
        share = [right[categories == category].mean() for category in CATEGORIES]
        cells = [strength, scale, f"{mean.square().sum((1, 2, 3)).mean() / 2:.0f}", f"{variance:.0f}"]
        cells += [f"{np.mean(share):.1f}", *(f"{value:.0f}" for value in share)]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    lines = [
        f"Exactly right in %, held-out detector, `shapes-turbo`: {len(good)} of {CAPTIONS * SAMPLES} images of "
        "validation captions that the training reward accepted, each denoised again from its leak with fresh noise "
        "(mean over categories). KL to N(0, I) in nats, due to the mean and due to the smaller variance.",
        "",
        "| strength | noise scale | KL of mean | KL of variance | right | " + " | ".join(CATEGORIES) + " |",
        "|---" * (5 + len(CATEGORIES)) + "|",
        *rows,
        "",
        f"Command: `python benchmarks/signal_leak.py`. {provenance()}",
    ]
    write_atomically(Path(__file__).parent / "results" / "signal_leak.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    with torch.no_grad():
        main()
