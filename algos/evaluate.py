"""Is this noise better, by how much, and at what cost? Compares methods on the same prompts and seeds by a judge.

    noisear evaluate --methods "PPO=runs/ppo" "NLL=runs/nll" "best-of-4" "PPO+best-of-4" --prompts validation
    noisear evaluate --config sdxl/evaluate --methods "NoiseAR=model.pth" --prompts drawbench
    torchrun --nproc-per-node 4 -m noisear_rl.cli evaluate …    # the same results

There are three stages. The first draws the images of every method and the second scores them, both in shards that
processes share; the third writes ``results.json``, ``timing.json`` and ``table.md``. A shard depends only on its
prompts and seeds: running the same command again completes missing shards, and methods may be added. ``noisear table``
and ``noisear report`` read the folder.

A method is ``NAME=PATH`` (a policy, an NPNet, or the folder of ``noisear shared-noise``: its choice alone; several
paths ``NAME=PATH,PATH`` are training seeds of one method; a policy that comes with the library has a path like
``shapes/ppo``) or a search that starts from Gaussian noise or from a named method: ``best-of-N``, ``search-N``
(zeroth-order), ``reno-N`` (gradients of the reward), ``NAME+best-of-N``. N is the number of images denoised per result.
Gaussian noise is always the first method.

Shapes: ``P`` prompts, ``S`` samples per prompt, noise ``(B, C, h, w)``, images ``(B, 3, H, W)`` in [0, 1].
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from noisear_rl.command import run_script
from noisear_rl.config import PositiveFloat, PositiveInt, Seed, check_config, parse_config, to_mapping
from noisear_rl.denoisers import EMBEDDED, DenoiserName, DenoiserOptions, dtype_of, embed_all, load_denoiser
from noisear_rl.denoisers.shapes.captions import SPLITS
from noisear_rl.distributed import barrier, is_main, process
from noisear_rl.evaluation.compare import finite_components
from noisear_rl.evaluation.diversity import diversity, radial_spectrum
from noisear_rl.evaluation.intervals import Resample
from noisear_rl.evaluation.results import VERSION, image_file, load_results
from noisear_rl.evaluation.tables import render, results_table
from noisear_rl.files import atomic, check_manifest, sha256, write_atomically
from noisear_rl.images import load_png, save_png
from noisear_rl.integrity import lock_folder, verify, write_checksums
from noisear_rl.patches import as_frames
from noisear_rl.prompts import PromptSet, resolve_prompts
from noisear_rl.provenance import provenance
from noisear_rl.rewards import (
    RewardConfig,
    RewardSpec,
    WeightedReward,
    load_reward,
    reward_config,
    reward_sha256,
)
from noisear_rl.rewards.layouts import layout_diversity
from noisear_rl.rewards.shapes import ShapesExact
from noisear_rl.samplers import Sampler
from noisear_rl.samplers.by_name import SEARCH, Method, SearchConfig, plan_methods

NOT_RESULTS = ("output_dir", "denoiser_options", "reward_device")  # options that are recorded elsewhere, or change none


@dataclass
class EvaluateConfig:
    """Options of evaluation."""

    methods: tuple[str, ...] = ()
    """Methods: NAME=PATH, NAME=PATH,PATH (training seeds), best-of-N, search-N, reno-N, NAME+best-of-N."""
    denoiser: DenoiserName = "shapes"
    """Name or folder of the denoiser."""
    prompts: str = "validation"
    """Prompt set: a file, the name of a published set, `geneval-style` (generated prompts), or a split of `shapes`:
    `validation` to choose settings by, `test` for published results alone."""
    num_prompts: PositiveInt | None = None
    """Number of prompts: equal shares of the categories for generated prompts and splits of `shapes` (120 if unset),
    the first ones for files and published sets (all if unset)."""
    skip_bad_rows: bool = False
    """Skip malformed rows of the prompt file."""
    samples: PositiveInt = 8
    """Noises per prompt."""
    scorers: tuple[RewardSpec, ...] = ("shapes-exact", "shapes-match", "shapes-clip")
    """Scorers, or a reward file. The first one is the judge: neither training nor searches may use it."""
    choose_by: RewardSpec | None = None
    """Reward that searches choose by, not the judge; unset for `shapes-match` with the embedded denoisers."""
    critic: str | None = None
    """Checkpoint, run folder or Hub id of the critic that `critic-N` chooses by."""
    reward_device: str | None = None
    """Device of the scorers, such as `cuda:1` or `cpu`; unset for the accelerator if there is one."""
    search: SearchConfig = field(default_factory=SearchConfig)
    """Settings of `search-N` and `reno-N`."""
    temperature: PositiveFloat | None = None
    """Factor on the standard deviation of policies; unset for their own."""
    layout_temperature: PositiveFloat | None = None
    """Of policies with layouts: above their own, layouts differ more and more images are wrong; unset for their own."""
    resample: Resample = "prompts"
    """Intervals for new `prompts` like these, or for new `noise` on the same prompts."""
    seed: Seed = 1_000_000
    """First seed of the noises; training uses other seeds."""
    batch_size: PositiveInt = 64
    """Noises per batch, which form one shard."""
    output_dir: Path = Path("runs/evaluate")
    """Folder for images and results."""
    denoiser_options: DenoiserOptions = field(default_factory=dict)
    """Options of the denoiser, such as `dtype float32`."""

    def __post_init__(self) -> None:
        check_config(self)


def prompt_set(config: EvaluateConfig) -> PromptSet:
    """Returns the prompts to evaluate on."""
    drawn = config.prompts in SPLITS or config.prompts == "geneval-style"
    count = config.num_prompts or (120 if drawn else None)
    return resolve_prompts(
        config.prompts, config.denoiser, count=count, skip_bad_rows=config.skip_bad_rows, allow_test=True
    )


def scorers_of(config: EvaluateConfig) -> RewardConfig:
    """Returns the scorers in order; the first one is the judge."""
    if len(config.scorers) == 1:
        return dataclasses.replace(reward_config(config.scorers[0]), normalize="none")
    return RewardConfig({name: 1.0 for name in config.scorers})


def draw_shard(config: EvaluateConfig, prompts: Sequence[str], rows: range, method: Method, sampler: Sampler) -> None:
    """Draws the images of some prompts and writes them, followed by the statistics of their noise."""
    samples = config.samples
    texts = [prompts[row] for row in rows for _ in range(samples)]
    seeds = [config.seed + row * samples + j for row in rows for j in range(samples)]
    began = time.perf_counter()
    drawn = sampler(texts, seeds)
    seconds = time.perf_counter() - began
    check_images(drawn.images, method, texts, seeds)
    for i, image in enumerate(drawn.images):
        file = image_file(config.output_dir, method.slug, rows[i // samples], i % samples)
        with atomic(file) as temporary:
            save_png(image, temporary)
    noise = drawn.noise.double().cpu()  # (B, C, *spatial)
    planes = torch.stack([as_frames(latent) for latent in noise])  # (B, T, C, h, w); T is 1 unless of videos
    statistics = {
        "sums": torch.stack([noise.sum(), noise.square().sum(), torch.tensor(float(noise.numel()))]).double(),
        "map": planes.mean((1, 2)).sum(0),  # (h, w)
        "spectrum": radial_spectrum(planes.flatten(0, 1)) * len(noise),
        "cost": torch.tensor([drawn.nfe * len(noise), seconds], dtype=torch.float64),
    }
    if drawn.kl_to_gaussian is not None:
        statistics["kl"] = drawn.kl_to_gaussian.double().sum()[None].cpu()
    file = _shard_file(config, "noise", method, rows)
    with atomic(file) as temporary:
        save_file({name: value.contiguous() for name, value in statistics.items()}, temporary)
        images = [image_file(config.output_dir, method.slug, row, j) for row in rows for j in range(samples)]
        write_checksums(
            config.output_dir, {path: path for path in images} | {file: temporary}, _part("noise", method, rows)
        )


def check_images(images: torch.Tensor, method: Method, prompts: Sequence[str], seeds: Sequence[int]) -> None:
    """Refuses images without a picture: as files they would be black, and get scores.

    Raises:
        ValueError: If pixels are NaN or infinite; names the method and the first prompt.
    """
    broken = (~images.isfinite().flatten(1).all(1)).nonzero()[:, 0].tolist()
    if broken:
        raise ValueError(
            f"method {method.name!r}: {len(broken)} of {len(images)} images hold NaN or infinite values, the first for "
            f"prompt {prompts[broken[0]]!r:.80} with seed {seeds[broken[0]]}: try --denoiser-options dtype float32, or "
            "another policy"
        )


def score_shard(
    config: EvaluateConfig, reward: WeightedReward, prompts: Sequence[str], rows: range, method: Method
) -> None:
    """Scores the images of some prompts as stored on disk, and measures how much the images of a prompt differ."""
    samples = config.samples
    texts = [prompts[row] for row in rows for _ in range(samples)]
    verify(
        config.output_dir, part=_part("noise", method, rows), advice=_advice(_shard_file(config, "noise", method, rows))
    )
    files = [image_file(config.output_dir, method.slug, row, j) for row in rows for j in range(samples)]
    images = torch.cat([load_png(file) for file in files])  # (B, 3, H, W), or (B, T, 3, H, W) of videos
    still = images if images.dim() == 4 else images[:, images.shape[1] // 2]
    components = finite_components(reward, images, texts, method.name)
    record = {"scores": {name: _rounded(values.reshape(-1, samples)) for name, values in components.items()}}
    record["diversity"] = diversities(reward, still.unflatten(0, (-1, samples))) if samples > 1 else {}
    file = _shard_file(config, "scores", method, rows)
    with atomic(file) as temporary:
        temporary.write_text(json.dumps(record))
        write_checksums(config.output_dir, {file: temporary}, _part("scores", method, rows))


def diversities(reward: WeightedReward, images: torch.Tensor) -> dict[str, list[float]]:
    """Returns the mean pairwise distance of each prompt's images ``(P, S, 3, H, W)``, by scorer that measures one."""
    found = {}
    for scorer, _ in reward.rewards:
        if embed := getattr(scorer, "embed", None):
            found[scorer.name] = _rounded(torch.from_numpy(diversity(images, embed)))
        if isinstance(scorer, ShapesExact):
            found["layout"] = [round(layout_diversity(scorer.detect(part)), 6) for part in images]
    return found


def join_shards(
    config: EvaluateConfig, judge: str, chosen: PromptSet, methods: Sequence[Method], shards: Sequence[range]
) -> None:
    """Joins the shards into ``results.json`` and ``timing.json``."""
    results, seconds_per_image, num_images = {}, {}, len(chosen) * config.samples
    for method in methods:
        for rows in shards:
            for stage, file in (
                ("scores", _shard_file(config, "scores", method, rows)),
                ("noise", _shard_file(config, "noise", method, rows)),
            ):
                name = file.relative_to(config.output_dir).as_posix()
                verify(config.output_dir, [name], part=_part(stage, method, rows), advice=_advice(file))
        parts = [json.loads(_shard_file(config, "scores", method, rows).read_text()) for rows in shards]
        statistics = [load_file(_shard_file(config, "noise", method, rows)) for rows in shards]
        total = {name: torch.stack([part[name] for part in statistics]).sum(0) for name in statistics[0]}
        mean, square = (total["sums"][:2] / total["sums"][2]).tolist()
        results[method.name] = {
            "group": method.group,
            "slug": method.slug,
            "trained": method.trained,
            "scores": _concatenated([part["scores"] for part in parts]),
            "nfe": round(total["cost"][0].item() / num_images, 6),
            "kl_to_gaussian": round(total["kl"].item() / num_images, 6) if "kl" in total else None,
            "noise_mean": round(mean, 6),
            "noise_std": round((square - mean**2) ** 0.5, 6),
            "radial_spectrum": _rounded(total["spectrum"] / num_images),
            "noise_map": _rounded(total["map"] / num_images),
            "diversity": _concatenated([part["diversity"] for part in parts]),
        }
        seconds_per_image[method.name] = total["cost"][1].item() / num_images
    options = {key: value for key, value in to_mapping(config).items() if key not in NOT_RESULTS}
    record = {
        "version": VERSION,
        "provenance": provenance(),
        "config": options | {"denoiser_options": config.denoiser_options},
        "denoiser": config.denoiser,
        "prompt_set": chosen.name,
        "prompts": chosen.prompts,
        "categories": chosen.categories,
        "samples": config.samples,
        "judge": judge,
        "methods": results,
    }
    timing, file = config.output_dir / "timing.json", config.output_dir / "results.json"
    write_atomically(timing, json.dumps(seconds_per_image, indent=1))
    with atomic(file) as temporary:
        temporary.write_text(json.dumps(record))
        write_checksums(config.output_dir, {timing: timing, file: temporary}, "results")


def _rounded(values: torch.Tensor) -> list[Any]:
    return np.round(values.double().cpu().numpy(), 6).tolist()


def _concatenated(parts: Sequence[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}


def _shard_file(config: EvaluateConfig, stage: Literal["noise", "scores"], method: Method, rows: range) -> Path:
    suffix = "safetensors" if stage == "noise" else "json"
    return config.output_dir / stage / method.slug / f"{rows[0]:05d}.{suffix}"


def _part(stage: str, method: Method, rows: range) -> str:
    return f"{stage}-{method.slug}-{rows[0]:05d}"


def _advice(file: Path) -> str:
    return f"remove {file} and run the same command again, which makes it anew"


def run(config: EvaluateConfig) -> str:
    """Runs the evaluation and returns its table; empty in all processes but the main one.

    Raises:
        ValueError: If an option is invalid, a scorer fails, or the folder holds an evaluation with other settings.
    """
    check_config(config)
    state = process()
    chosen, scorers = prompt_set(config), scorers_of(config)
    choose_by = config.choose_by or ("shapes-match" if config.denoiser in EMBEDDED else None)
    if choose_by == next(iter(scorers.weights)) and any(SEARCH.fullmatch(method) for method in config.methods):
        raise ValueError(f"{choose_by!r} cannot both choose and judge: reorder scorers or change choose_by")
    load_scorers = partial(load_reward, scorers, device=config.reward_device)
    load_scorers().check_prompts(chosen.prompts)  # fails early; loaded again once the denoiser is gone
    denoiser = load_denoiser(config.denoiser, **config.denoiser_options)
    embed_all(denoiser, chosen.prompts)
    methods = plan_methods(
        config.methods,
        denoiser,
        choose_by,
        config.search,
        config.temperature,
        config.reward_device,
        config.layout_temperature,
        config.critic,
    )

    # The folder belongs to these prompts, seeds and scorers; methods may be added.
    manifest = {
        "version": VERSION,
        "prompts_sha256": sha256(chosen.prompts),
        "prompts": len(chosen),
        "samples": config.samples,
        "seed": config.seed,
        "batch_size": config.batch_size,
        "scorers": to_mapping(scorers),
        "denoiser": config.denoiser,
        "denoiser_options": config.denoiser_options,
        "num_inference_steps": denoiser.num_inference_steps,
        "guidance_scale": denoiser.guidance_scale,
        "dtype": dtype_of(denoiser),
    }
    if checksum := reward_sha256(*config.scorers):
        manifest["reward_sha256"] = checksum
    _lock = lock_folder(config.output_dir) if is_main() else None
    if is_main():
        check_manifest(config.output_dir, manifest)
        for method in methods:
            check_manifest(config.output_dir / "noise" / method.slug, {"method": method.name, "is": method.identity})
    barrier()

    shard_size = max(1, config.batch_size // config.samples)  # prompts per shard
    shards = [range(start, min(start + shard_size, len(chosen))) for start in range(0, len(chosen), shard_size)]
    work = [(method, rows) for method in methods for rows in shards][state.process_index :: state.num_processes]
    counts = [len(rows) * config.samples for _, rows in work]
    progress: dict[str, Any] = {"unit": "image", "total": sum(counts), "disable": not is_main()}

    # Images.
    sampler, sampled_method = None, None
    with tqdm(desc="images", **progress) as bar:
        for (method, rows), count in zip(work, counts, strict=True):
            if not _shard_file(config, "noise", method, rows).exists():
                if sampler is None or sampled_method is not method:
                    sampler, sampled_method = method.make(), method
                draw_shard(config, chosen.prompts, rows, method, sampler)
            bar.update(count)
    for method in methods:
        method.forget_sampler()
    del sampler, denoiser  # with them goes the denoiser, which frees memory for the scorers
    barrier()

    # Scores, once all images exist.
    reward = load_scorers()
    with tqdm(desc="scores", **progress) as bar:
        for (method, rows), count in zip(work, counts, strict=True):
            if not _shard_file(config, "scores", method, rows).exists():
                score_shard(config, reward, chosen.prompts, rows, method)
            bar.update(count)
    barrier()

    # Results.
    text = ""
    if is_main():
        join_shards(config, reward.rewards[0][0].name, chosen, methods, shards)
        text = render(*results_table([load_results(config.output_dir)], config.resample), "markdown")
        file = config.output_dir / "table.md"
        with atomic(file) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
            write_checksums(config.output_dir, {file: temporary}, "table")
    barrier()
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(EvaluateConfig, argv, __doc__)
    if text := run(config):
        print(f"{text}\n\nfiles: {config.output_dir}; view them with `noisear report {config.output_dir}`")


if __name__ == "__main__":
    run_script(main)
