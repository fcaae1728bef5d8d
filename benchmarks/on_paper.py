"""What would the paper's runs take on 1, 8 and 64 GPUs? From published seconds per image; part of ``resources.py``.

Published, by Stability AI and NVIDIA (https://huggingface.co/stabilityai/stable-diffusion-xl-1.0-tensorrt): SDXL at
1024 × 1024 pixels with 30 steps takes 2,496 ms on an H100, batch 1, not optimised, and 1,471 ms with TensorRT;
decoding takes 127 ms (its table of the LCM version). A step evaluates the UNet with and without the prompt. Network,
from NVIDIA's data sheet of the H100 and user guide of DGX H100: 900 GB/s of NVLink per GPU, both directions together,
within a machine of eight; 400 Gb/s per GPU between machines. The policy's own FLOPs are charged at 40 % of 67 TFLOPs
per second, the H100's float32 rate; drawing the patches costs at least what reading all weights 16 times takes at
3.35 TB/s.

A ring sends ``2 (n - 1) / n`` times the summed bytes from every GPU. The natural step of an epoch sums the gradient and
one Fisher product per iteration and one for its length.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pages import markdown  # in this folder

from noisear_rl.algos.collect import CollectConfig
from noisear_rl.algos.ppo import PPOConfig
from noisear_rl.config import load_yaml
from noisear_rl.data.pairs import PairsConfig

CONFIGS = Path(__file__).parents[1] / "configs" / "sdxl"
GPUS, MACHINE, STEPS, IMAGES = (1, 8, 64), 8, 50, 1_000_000
PUBLISHED_STEPS, PUBLISHED, OPTIMISED, DECODING = 30, 2.496, 1.471, 0.127  # seconds per image on an H100
NVLINK, INFINIBAND = 450e9, 50e9  # bytes per second and GPU, in one direction
FLOAT32, MEMORY, PATCHES = 0.4 * 67e12, 3.35e12, 16
SOURCE = "https://huggingface.co/stabilityai/stable-diffusion-xl-1.0-tensorrt"
NOISE = 2 * 4 * 128 * 128 + 60  # bytes of a float16 noise and its prompt
FISHER_PASSES = 4  # passes of a Fisher product, in forward passes: Jacobian and its transpose, two each
HEAD = ("run on SDXL", "H100s", "hours", "with TensorRT", "on disk", "traffic per GPU and update", "of the time")


def sent(total: float, gpus: int) -> float:
    """Bytes that a ring all-reduce of ``total`` bytes sends from every GPU."""
    return 2 * (gpus - 1) / gpus * total


def bandwidth(gpus: int) -> float:
    """Bytes per second of the slowest link of a ring."""
    return NVLINK if gpus <= MACHINE else INFINIBAND


def seconds_per_image(per_image: float, steps: int = STEPS) -> float:
    """Seconds per image of another number of steps than the published one."""
    return (per_image - DECODING) / PUBLISHED_STEPS * steps + DECODING


def ppo_update(config: PPOConfig, parameters: int, draw: float, passed: float, image: float, gpus: int) -> list[float]:
    """Seconds of an update: images, drawing patches, the policy's steps, the network; and bytes sent per GPU.

    Args:
        config: Options.
        parameters: Of the policy.
        draw: FLOPs of drawing a noise.
        passed: FLOPs of scoring a noise, once.
        image: Seconds per image.
        gpus: Number of GPUs.
    """
    episodes, products = config.prompts_per_update * config.samples_per_prompt, config.cg_iterations + 1
    own = -(-episodes // gpus)  # the slowest GPU's
    measured = -(-min(config.fisher_episodes, episodes) // gpus)
    steps = config.epochs * config.minibatches
    passes = 2 * own + steps * (3 * own / config.minibatches + (3 + FISHER_PASSES * products) * measured)
    drawing = max(PATCHES * 4 * parameters / MEMORY, own * draw / FLOAT32)
    traffic = sent(steps * (1 + products) * 4 * parameters, gpus)
    return [own * image, drawing, passes * passed / FLOAT32, traffic / bandwidth(gpus), traffic]


def on_paper(parameters: int, draw: float, passed: float, per_pair: int) -> dict[str, Any]:
    """Returns hours, bytes and traffic of the paper's runs.

    Args:
        parameters: Of the policy for SDXL.
        draw: FLOPs of drawing a noise.
        passed: FLOPs of scoring a noise, once.
        per_pair: Network evaluations per weak-to-strong pair.
    """
    pairs, collect = load_yaml(PairsConfig, CONFIGS / "pairs.yaml"), load_yaml(CollectConfig, CONFIGS / "collect.yaml")
    ppo = load_yaml(PPOConfig, CONFIGS / "ppo.yaml")
    assert collect.num_prompts is not None
    rollouts = collect.num_prompts * collect.samples_per_prompt
    episodes = ppo.prompts_per_update * ppo.samples_per_prompt
    rows: list[dict[str, Any]] = []
    for gpus in GPUS:
        evaluation = [(time - DECODING) / (2 * PUBLISHED_STEPS) for time in (PUBLISHED, OPTIMISED)]
        hours = [-(-pairs.pairs // gpus) * per_pair * seconds / 3600 for seconds in evaluation]
        rows.append({"run": f"{pairs.pairs:,} pairs", "gpus": gpus, "hours": hours, "bytes": pairs.pairs * NOISE})
    for gpus in GPUS:
        hours = [-(-rollouts // gpus) * seconds_per_image(time) / 3600 for time in (PUBLISHED, OPTIMISED)]
        name = f"{collect.num_prompts:,} × {collect.samples_per_prompt} rollouts for DPO"
        rows.append({"run": name, "gpus": gpus, "hours": hours, "bytes": rollouts * (NOISE + 8 * PATCHES)})
    updates = -(-IMAGES // episodes)
    checkpoints = updates / ppo.save_every * 4 * parameters
    for gpus in (*GPUS, episodes):
        found = [
            ppo_update(ppo, parameters, draw, passed, seconds_per_image(time), gpus) for time in (PUBLISHED, OPTIMISED)
        ]
        row = {"run": f"PPO, {IMAGES:,} images", "gpus": gpus, "bytes": checkpoints, "traffic": found[0][-1]}
        rows.append(row | {"hours": [updates * sum(f[:-1]) / 3600 for f in found], "seconds": found[0][:-1]})
    turbo = ppo_update(ppo, parameters, draw, passed, seconds_per_image(PUBLISHED, 1) - (PUBLISHED - DECODING) / 60, 64)
    return {"rows": rows, "episodes": episodes, "turbo": turbo, "updates": updates, "save every": ppo.save_every}


def on_paper_parts(found: dict[str, Any]) -> list[str]:
    """Renders :func:`on_paper`: paragraphs and a table."""
    rows = []
    for row in found["rows"]:
        hours, seconds = [f"{hours:,.{1 if hours >= 1 else 2}f}" for hours in row["hours"]], row.get("seconds")
        network = ["0", ""]
        if seconds:
            network = [f"{row['traffic'] / 1e9:.1f} GB", f"{100 * seconds[3] / sum(seconds):.1f} %"]
        rows.append([row["run"], row["gpus"], *hours, f"{row['bytes'] / 2**30:,.1f} GiB", *network])
    last = found["rows"][-1]["seconds"]
    image, drawing, policy, summing = (f"{part:.2f}" for part in last)
    one, *_, most = (sum(row["seconds"]) for row in found["rows"] if "seconds" in row)
    turbo = found["turbo"]
    return [
        "On paper: SDXL with 50 steps and guidance on H100s, from published seconds per image "
        f"([source]({SOURCE}): {PUBLISHED:.3f} s with {PUBLISHED_STEPS} steps, {OPTIMISED:.3f} s with TensorRT); "
        "scorers, whose networks take less than 1 % of an image's FLOPs, are left out. Assumptions: "
        "`benchmarks/on_paper.py`.",
        markdown(HEAD, rows),
        "Pairs and rollouts need no traffic: GPUs share the shards. They stop scaling at one shard per GPU. "
        f"PPO makes {found['updates']:,} updates of {found['episodes']} images and writes a checkpoint of the policy "
        f"every {found['save every']} (`--keep-checkpoints` limits them). It stops scaling at {found['episodes']} "
        f"GPUs, one image each, where an update takes {image} s for the image, {drawing} s to draw patches, {policy} s "
        f"for the policy's steps and {summing} s for the network: {one / most:.0f} times as fast as one GPU. Only "
        "larger updates use more of them. With a denoiser of one step and no guidance on 64 GPUs, images take "
        f"{turbo[0]:.2f} s per update, the policy {turbo[1] + turbo[2]:.2f} s and the network {turbo[3]:.2f} s: the "
        "sums of Fisher products are the limit then, and Adam, which sums one gradient per step, scales further.",
    ]
