"""Quality and speed of the embedded denoiser with Gaussian noise, by setting.

    python benchmarks/shapes_quality.py

Writes ``benchmarks/results/shapes_quality.md``: exactly right images on validation captions by the held-out detector,
images per second at batch size 64, and peak memory.
"""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np

from noisear_rl.denoisers import load_denoiser
from noisear_rl.denoisers.shapes.captions import CATEGORIES, balanced_captions
from noisear_rl.evaluation.compare import evaluate
from noisear_rl.evaluation.intervals import bootstrap
from noisear_rl.files import write_atomically
from noisear_rl.provenance import provenance
from noisear_rl.rewards import load_reward
from noisear_rl.samplers import GAUSSIAN

SETTINGS = ((4, 4.0), (4, 1.5), (4, 3.0), (4, 5.0), (3, 2.0), (8, 3.0))
CAPTIONS, SAMPLES = 300, 4


def main() -> None:
    """Measures every setting and writes the table."""
    captions = balanced_captions("validation", CAPTIONS)
    categories = [caption.category for caption in captions]
    reward = load_reward({"shapes-exact": 1.0})
    lines = [
        f"Exactly right in %, {CAPTIONS} validation captions x {SAMPLES} noises, held-out detector, 95 % intervals "
        "over captions. The first row is the default.",
        "",
        "| steps | guidance | " + " | ".join(CATEGORIES) + " | overall | images/s |",
        "|" + "---|" * (len(CATEGORIES) + 4),
    ]
    for steps, guidance in SETTINGS:
        denoiser = load_denoiser("shapes", num_inference_steps=steps, guidance_scale=guidance)
        result = evaluate(denoiser, reward, {GAUSSIAN: None}, [c.text for c in captions], SAMPLES)[GAUSSIAN]
        scores = result.scores["shapes-exact"] * 100
        cells = [f"{scores[np.array(categories) == name].mean():.0f}" for name in CATEGORIES]
        overall = bootstrap(scores, categories)
        row = [str(steps), str(guidance), *cells, str(overall), f"{1 / result.seconds_per_image:.0f}"]
        lines.append("| " + " | ".join(row) + " |")
        print(lines[-1], flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    lines += [
        "",
        f"Peak memory of the process: {peak:.2f} GB. Command: `python benchmarks/shapes_quality.py`. {provenance()}",
    ]
    write_atomically(Path(__file__).parent / "results" / "shapes_quality.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
