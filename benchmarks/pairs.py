"""Does weak-to-strong noise help the embedded denoiser, and with which settings?

    python benchmarks/pairs.py
    python benchmarks/pairs.py --render    # the page again from its data

Denoises the target noise of pairs on validation captions and compares it, paired, with the Gaussian noise that each
pair started from. Writes ``pairs.md`` and the scores behind it, ``pairs.json``, in ``benchmarks/results``; the defaults
of ``configs/shapes/pairs.yaml`` follow from it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from pages import markdown, page, publish, signed  # in this folder
from tqdm.auto import tqdm

from noisear_rl.data.weak_to_strong import InversionMode, inversion_coefficients, weak_to_strong
from noisear_rl.denoisers import NoisePredictor, load_denoiser, require
from noisear_rl.denoisers.shapes.captions import balanced_captions
from noisear_rl.evaluation.intervals import bootstrap, holm, significance_mark
from noisear_rl.gaussian import standard_noise
from noisear_rl.rewards import load_reward

# (schedule length, strong guidance, rounds, inversion)
SETTINGS: tuple[tuple[int, float, int, InversionMode], ...] = (
    (50, 5.5, 1, "exact"),
    (50, 5.5, 4, "exact"),
    (50, 5.5, 4, "compat"),
    (10, 5.5, 1, "exact"),
    (10, 5.5, 2, "exact"),
    (10, 3.0, 1, "exact"),
    (5, 5.5, 1, "exact"),
)
CAPTIONS, SAMPLES = 240, 3


def measure() -> dict[str, Any]:
    """Returns the scores of Gaussian noise and of every setting."""
    denoiser = require(load_denoiser("shapes"), NoisePredictor, "this page")
    reward = load_reward("shapes-exact")
    captions = balanced_captions("validation", CAPTIONS)
    prompts = [caption.text for caption in captions for _ in range(SAMPLES)]
    noise = standard_noise(range(len(prompts)), denoiser.latent_shape)
    conditioning = denoiser.encode(prompts)

    def right(latents: torch.Tensor) -> list[list[int]]:
        """Scores ``(CAPTIONS, SAMPLES)``, 0 or 1."""
        return reward.score(denoiser.denoise(latents, conditioning), prompts).view(CAPTIONS, SAMPLES).int().tolist()

    settings = []
    for steps, strong, rounds, inversion in tqdm(SETTINGS, desc="settings"):
        target = weak_to_strong(
            denoiser,
            noise,
            conditioning,
            num_inference_steps=steps,
            strong_guidance=strong,
            rounds=rounds,
            inversion=inversion,
        )
        settings.append(
            {
                "setting": [steps, strong, rounds, inversion],
                "k": inversion_coefficients(denoiser.first_order_schedule(steps), inversion).k,
                "shift": (target - noise).square().mean().sqrt().item(),
                "right": right(target),
            }
        )
    texts = [[caption.text, caption.category] for caption in captions]
    return {"captions": texts, "gaussian": right(noise), "settings": settings}


def table(record: dict[str, Any]) -> str:
    """Renders the page from the record."""
    prompts, categories = zip(*record["captions"], strict=True)
    estimate = partial(bootstrap, categories=categories, prompts=prompts)
    start, settings = 100 * np.array(record["gaussian"]), record["settings"]
    scores = [100 * np.array(setting["right"]) for setting in settings]
    gains = holm([estimate(part - start) for part in scores])
    rows: list[list[Any]] = [["Gaussian", "", "", "", "", 0, estimate(start), ""]]
    for setting, part, gain in zip(settings, scores, gains, strict=True):
        measured = [f"{setting['k']:.3f}", f"{setting['shift']:.3f}", estimate(part)]
        rows.append([*setting["setting"], *measured, signed(gain) + significance_mark(gain)])
    return page(
        [
            f"Exactly right in %, {len(set(prompts))} distinct validation captions in {len(prompts)} rows x "
            f"{start.shape[1]} noises, held-out detector, default denoising, mean over six categories; 95 % intervals "
            f"over distinct captions, the gain is paired; * excludes 0, after Holm correction for {len(gains)} "
            "comparisons. Weak guidance 1.",
            markdown(["DDIM steps", "strong guidance", "rounds", "inversion", "k", "RMS shift", "right", "gain"], rows),
        ],
        "pairs",
        record["provenance"],
    )


if __name__ == "__main__":
    publish("pairs", __doc__, table, measure)
