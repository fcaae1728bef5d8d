"""Quality and speed of the embedded denoiser with Gaussian noise, by setting.

    python benchmarks/shapes_quality.py
    python benchmarks/shapes_quality.py --render    # the page again from its data

Exactly right images on validation captions by the held-out detector, images per second of CPU time of one thread, and
peak memory. Writes ``shapes_quality.md`` and the scores behind it, ``shapes_quality.json``, in ``benchmarks/results``.
"""

from __future__ import annotations

import resource
import time
from typing import Any

import numpy as np
import torch
from pages import markdown, page, publish  # in this folder

from noisear_rl.denoisers import Denoiser, load_denoiser
from noisear_rl.denoisers.shapes.captions import CATEGORIES, balanced_captions
from noisear_rl.evaluation.compare import evaluate
from noisear_rl.evaluation.intervals import bootstrap, category_means
from noisear_rl.gaussian import standard_noise
from noisear_rl.rewards import load_reward
from noisear_rl.samplers import GAUSSIAN

SETTINGS = ((4, 4.0), (4, 1.5), (4, 3.0), (4, 5.0), (3, 2.0), (8, 3.0))  # steps and guidance; the first is the default
CAPTIONS, SAMPLES, BATCH = 300, 4, 64


@torch.no_grad()
def images_per_second(denoiser: Denoiser, prompts: list[str]) -> float:
    """Returns how many images one thread denoises per second of CPU time, the best of three batches."""
    noise, conditioning, seconds = standard_noise(range(BATCH), denoiser.latent_shape), denoiser.encode(prompts), []
    for _ in range(3):
        began = time.process_time()  # other processes do not count
        denoiser.denoise(noise, conditioning)
        seconds.append(time.process_time() - began)
    return BATCH / min(seconds)


def measure() -> dict[str, Any]:
    """Returns the scores of every setting, its speed, and the peak memory of the process."""
    torch.set_num_threads(1)
    captions = balanced_captions("validation", CAPTIONS)
    reward, settings = load_reward({"shapes-exact": 1.0}), []
    for steps, guidance in SETTINGS:
        denoiser = load_denoiser("shapes", num_inference_steps=steps, guidance_scale=guidance)
        result = evaluate(denoiser, reward, {GAUSSIAN: None}, [c.text for c in captions], SAMPLES)[GAUSSIAN]
        right = result.scores["shapes-exact"].astype(int).tolist()
        speed = images_per_second(denoiser, [c.text for c in captions[:BATCH]])
        settings.append({"steps": steps, "guidance": guidance, "right": right, "images per second": speed})
    texts = [[caption.text, caption.category] for caption in captions]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"captions": texts, "settings": settings, "peak memory in GB": peak}


def table(record: dict[str, Any]) -> str:
    """Renders the page from the record."""
    prompts, categories = zip(*record["captions"], strict=True)
    rows = []
    for setting in record["settings"]:
        scores = 100 * np.array(setting["right"])
        means = category_means(scores, categories, prompts)
        cells = [*(f"{means[name]:.0f}" for name in CATEGORIES), bootstrap(scores, categories, prompts=prompts)]
        rows.append([setting["steps"], setting["guidance"], *cells, f"{setting['images per second']:.0f}"])
    return page(
        [
            f"Exactly right in %, {len(set(prompts))} distinct validation captions in {len(prompts)} rows x "
            f"{scores.shape[1]} noises, held-out detector, 95 % intervals over distinct captions. The first row is the "
            f"default. Images per second: of one thread, by CPU time, {BATCH} at once. Peak memory of the process: "
            f"{record['peak memory in GB']:.2f} GB.",
            markdown(["steps", "guidance", *CATEGORIES, "mean", "images/s"], rows),
        ],
        "shapes_quality",
        record["provenance"],
    )


if __name__ == "__main__":
    publish("shapes_quality", __doc__, table, measure)
