"""The scaling figure and the profiles of ``bench.py``.

Shapes: ``B`` noises, ``N`` patches, ``L`` text tokens.
"""

from __future__ import annotations

import cProfile
import json
import os
import pstats
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from bench_loops import ENVS, HARD, ours  # in this folder
from timing import interleaved

from noisear_rl.denoisers.shapes.captions import balanced_captions
from noisear_rl.envs import make_vector_env
from noisear_rl.policy import NoiseARConfig, NoiseARPolicy

matplotlib.use("Agg")
BATCHES, PATCHES, TOKENS, WIDTH, FEW = (1, 2, 4, 8, 16, 32, 64), (4, 16, 64, 256, 1024), (16, 77, 154, 308), 512, 4
SIDES = {4: 64, 16: 32, 64: 16, 256: 8, 1024: 4}  # of a patch, by their number in SDXL's latent
UPDATES, PROCESSES = 6, (1, 2)
ROLLOUT = {"denoising": ("diffusion_pipeline.py", "denoise"), "scoring": ("weighted.py", "components")}
LOOP = ROLLOUT | {
    "drawing patches": ("model.py", "sample"),
    "gradients": ("_tensor.py", "backward"),
    "natural steps": ("natural_gradient.py", "step"),
}
TITLES = {"batch": "noises in a batch", "patches": "patches per noise", "text tokens": "text tokens", "processes": ""}


def policy_of(patches: int, width: int = WIDTH) -> NoiseARPolicy:
    """An untrained policy for SDXL's latents, narrower than the paper's so that many patches take seconds."""
    config = NoiseARConfig((4, 128, 128), SIDES[patches], text_dim=2048, d_model=width, d_ff=2 * width, n_layers=1)
    return NoiseARPolicy(config).eval()


def scaling(repeats: int) -> dict[str, dict[str, Any]]:
    """CPU seconds per noise of sampling and of scoring with gradients, by batch, patches and text length.

    And seconds per update of PPO with 1 and 2 processes, on the clock.
    """
    found: dict[str, dict[str, Any]] = {"sample": {}, "train": {}}

    def both(policy: NoiseARPolicy, batch: int, tokens: int) -> dict[str, Callable[[], Any]]:
        text, patches = torch.randn(batch, tokens, 2048), torch.randn(batch, policy.n_patches, policy.patch_dim)
        return {
            "sample": lambda: policy.sample(text, seeds=range(batch)),
            "train": lambda: policy.log_prob(patches, text).sum().backward(),
        }

    policies = {count: policy_of(count) for count in PATCHES}
    settings = {f"batch {batch}": (16, batch, 77) for batch in BATCHES}
    settings |= {f"patches {count}": (count, FEW, 77) for count in PATCHES}
    settings |= {f"text tokens {tokens}": (16, FEW, tokens) for tokens in TOKENS}
    calls = {
        f"{name} {way}": call
        for name, (count, batch, tokens) in settings.items()
        for way, call in both(policies[count], batch, tokens).items()
    }
    seconds = interleaved(calls, repeats, "scaling")
    for name, (_, batch, _) in settings.items():
        for way in found:
            found[way][name] = float(np.median(seconds[f"{name} {way}"])) / batch
    return found


def processes() -> dict[int, float]:
    """Seconds per update of PPO by number of processes, one thread each, at the same number of images."""
    script, seconds = Path(__file__).parents[1] / "algos" / "ppo.py", {}
    for count in PROCESSES:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", "--standalone"]
            command += [str(script), "--env-id", "NoiseAR-ShapesTurbo-v0", "--updates", str(UPDATES), "--output-dir"]
            command += [f"{folder}/run", "--prompts", *HARD, "--save-every", str(2 * UPDATES)]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
            lines = [json.loads(line) for line in Path(f"{folder}/run/metrics.jsonl").read_text().splitlines()]
            ends = [line["charts/images"] * 16 / line["charts/SPS"] for line in lines]  # seconds since the start
            seconds[count] = float(np.median(np.diff(ends)))
    return seconds


def figure(path: Path, found: dict[str, Any], by_processes: dict[str, float]) -> None:
    """Draws the scaling figure: cost per noise, relative to proportional growth."""
    from matplotlib import pyplot, ticker

    panels, axes = pyplot.subplots(1, 4, figsize=(15, 3.4), layout="constrained")
    for axis, title in zip(axes, TITLES, strict=True):
        if title == "processes":
            axis.bar(list(by_processes), list(by_processes.values()), width=0.5)
            axis.set(xlabel="processes", ylabel="seconds per update of PPO")
            continue
        for way, label in (("sample", "drawing"), ("train", "scoring with gradients")):
            points = {int(k.split()[-1]): v for k, v in found[way].items() if k.startswith(title)}
            axis.plot(list(points), [1000 * v for v in points.values()], "o-", label=label)
        axis.set(xscale="log", yscale="log", xlabel=TITLES[title], ylabel="CPU milliseconds per noise")
        axis.set_xticks(list(points), map(str, points))
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        axis.yaxis.set_major_formatter(ticker.ScalarFormatter())
        axis.yaxis.set_minor_formatter(ticker.ScalarFormatter())
    axes[0].legend(frameon=False)
    panels.savefig(path, dpi=110)
    pyplot.close(panels)


def profiles() -> dict[str, dict[str, float]]:
    """CPU seconds by part of a rollout and of an update of PPO; the rest is everything else."""
    envs = make_vector_env("NoiseAR-ShapesTurbo-v0", ENVS)
    options = {"prompts": [caption.text for caption in balanced_captions("train", ENVS)]}
    actions = np.random.default_rng(0).standard_normal((envs.task.n_patches, ENVS, envs.task.patch_dim), np.float32)

    def rollout() -> None:
        envs.reset(seed=list(range(ENVS)), options=options)
        for action in actions:
            envs.step(action)

    rollout()  # embeds prompts
    return {"rollout": split(rollout, ROLLOUT, 3), "PPO": split(lambda: ours(UPDATES), LOOP, UPDATES)}


def split(call: Callable[[], Any], names: dict[str, tuple[str, str]], count: int) -> dict[str, float]:
    """CPU seconds of a call by function, divided by ``count``: those of ``names``, and the rest."""
    profiler = cProfile.Profile(time.process_time)
    began = time.process_time()
    for _ in range(count if names is ROLLOUT else 1):
        profiler.runcall(call)
    total = time.process_time() - began
    found = dict.fromkeys(names, 0.0)
    for (file, _, function), (*_, cumulative, _) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        for name, (of_file, wanted) in names.items():
            if function == wanted and Path(file).name == of_file:
                found[name] += cumulative
    return {name: seconds / count for name, seconds in (found | {"rest": total - sum(found.values())}).items()}
