"""How much does noise reveal of an image? The signal leak of good images, by strength and by noise scale.

    python benchmarks/signal_leak.py
    python benchmarks/signal_leak.py --render    # the page again from its data

Denoises Gaussian noise for validation captions, keeps the images that the training reward accepts, and denoises their
leak ``strength·√ᾱ·z0 + noise_scale·ε`` with fresh noise: what a policy would achieve that knew a good layout for every
caption. Writes ``signal_leak.md`` and the scores behind it, ``signal_leak.json``, in ``benchmarks/results``;
``configs/shapes/signal_leak.yaml`` follows from it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pages import markdown, page, publish  # in this folder
from tqdm.auto import tqdm

from noisear_rl.denoisers import LatentDenoiser, load_denoiser, require
from noisear_rl.denoisers.shapes.captions import CATEGORIES, balanced_captions
from noisear_rl.evaluation.intervals import bootstrap, category_means
from noisear_rl.gaussian import standard_noise
from noisear_rl.rewards import load_reward

CAPTIONS, SAMPLES = 180, 4
# (strength, noise scale); the first pair is Gaussian noise.
SETTINGS = ((0, 1), (0, 0.7), (1, 1), (1, 0.7), (1.5, 1), (1.5, 0.7), (1.5, 0.5), (2, 0.7), (3, 0.7))


@torch.no_grad()
def measure() -> dict[str, Any]:
    """Returns the captions of the accepted images, and the scores of every setting on them."""
    denoiser = require(load_denoiser("shapes-turbo"), LatentDenoiser, "this page")
    reward, judge = load_reward("shapes-match"), load_reward("shapes-exact")
    captions = [caption for caption in balanced_captions("validation", CAPTIONS) for _ in range(SAMPLES)]
    prompts = [caption.text for caption in captions]
    conditioning = denoiser.encode(prompts)
    images, latents = denoiser.denoise_with_latents(
        standard_noise(range(len(prompts)), denoiser.latent_shape), conditioning
    )
    good = (reward.score(images, prompts) >= 0.8).nonzero()[:, 0].tolist()
    prompts, conditioning, latents = [prompts[i] for i in good], conditioning[good], latents[good]
    dimensions, settings = latents[0].numel(), []
    for number, (strength, scale) in enumerate(tqdm(SETTINGS, desc="settings")):
        noise = standard_noise([1_000_000 * (number + 1) + i for i in good], denoiser.latent_shape)
        mean = strength * denoiser.signal_level * latents
        right = judge.score(denoiser.denoise(mean + scale * noise, conditioning), prompts)
        settings.append(
            {
                "strength": strength,
                "noise scale": scale,
                "KL of mean": mean.square().sum((1, 2, 3)).mean().item() / 2,
                "KL of variance": float(dimensions * (scale**2 - 1 - 2 * np.log(scale)) / 2),
                "right": right.int().tolist(),
            }
        )
    texts = [[captions[i].text, captions[i].category] for i in good]
    return {"images": len(captions), "captions": texts, "settings": settings}


def table(record: dict[str, Any]) -> str:
    """Renders the page from the record."""
    prompts, categories = zip(*record["captions"], strict=True)
    rows = []
    for setting in record["settings"]:
        right = 100 * np.array(setting["right"])[:, None]
        means = category_means(right, categories, prompts)
        kl = [f"{setting[key]:.0f}" for key in ("KL of mean", "KL of variance")]
        cells = [bootstrap(right, categories, prompts=prompts), *(f"{means[name]:.0f}" for name in CATEGORIES)]
        rows.append([setting["strength"], setting["noise scale"], *kl, *cells])
    return page(
        [
            f"Exactly right in %, held-out detector, `shapes-turbo`: {len(prompts)} of {record['images']} images of "
            f"validation captions that the training reward accepted, of {len(set(prompts))} distinct captions, each "
            "denoised again from its leak with fresh noise (mean over categories, 95 % intervals over distinct "
            "captions). KL to N(0, I) in nats, due to the mean and due to the smaller variance.",
            markdown(["strength", "noise scale", "KL of mean", "KL of variance", "right", *CATEGORIES], rows),
        ],
        "signal_leak",
        record["provenance"],
    )


if __name__ == "__main__":
    publish("signal_leak", __doc__, table, measure)
