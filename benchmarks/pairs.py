"""Does weak-to-strong noise help the embedded denoiser, and with which settings?

    python benchmarks/pairs.py

Denoises the target noise of pairs on validation captions and compares it, paired, with the Gaussian noise that each
pair started from. Writes ``benchmarks/results/pairs.md``; the defaults of ``configs/shapes/pairs.yaml`` follow from it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from noisear_rl.data.weak_to_strong import InversionMode, inversion_coefficients, weak_to_strong
from noisear_rl.denoisers import load_denoiser
from noisear_rl.denoisers.shapes.captions import balanced_captions
from noisear_rl.evaluation.intervals import bootstrap
from noisear_rl.files import write_atomically
from noisear_rl.gaussian import standard_noise
from noisear_rl.provenance import provenance
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


def main() -> None:
    """Measures every setting and writes the table."""
    denoiser, reward = load_denoiser("shapes"), load_reward("shapes-exact")
    captions = balanced_captions("validation", CAPTIONS)
    prompts = [caption.text for caption in captions for _ in range(SAMPLES)]
    categories = [caption.category for caption in captions]
    noise = standard_noise(range(len(prompts)), denoiser.latent_shape)
    conditioning = denoiser.encode(prompts)

    def exact(latents: torch.Tensor) -> np.ndarray:
        """Scores ``(CAPTIONS, SAMPLES)`` in %."""
        return reward.score(denoiser.denoise(latents, conditioning), prompts).view(CAPTIONS, SAMPLES).numpy() * 100

    start = exact(noise)
    lines = [
        f"Exactly right in %, {CAPTIONS} validation captions x {SAMPLES} noises, held-out detector, default denoising; "
        "the gain is paired, with a 95 % interval over captions. Weak guidance 1.",
        "",
        "| DDIM steps | strong guidance | rounds | inversion | k | RMS shift | overall | gain |",
        "|---|---|---|---|---|---|---|---|",
        f"| Gaussian | | | | | 0 | {bootstrap(start, categories)} | |",
    ]
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
        scores = exact(target)
        k = inversion_coefficients(denoiser.first_order_schedule(steps), inversion).k
        shift = (target - noise).square().mean().sqrt()
        gain = bootstrap(scores - start, categories)
        row = [steps, strong, rounds, inversion, f"{k:.3f}", f"{shift:.3f}", bootstrap(scores, categories), gain]
        lines.append("| " + " | ".join(str(cell) for cell in row) + " |")
    lines += ["", f"Command: `python benchmarks/pairs.py`. {provenance()}"]
    write_atomically(Path(__file__).parent / "results" / "pairs.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
