"""The published model at its real size with random weights: does everything run, in what memory, and how fast?

    python benchmarks/full_size.py                   # SDXL in bfloat16 on a CPU: 12 GiB of memory, about 5 minutes
    python benchmarks/full_size.py --device cuda     # all presets in half precision, compiled and not, and scorers
    python benchmarks/full_size.py --device cuda --only presets --compile sdxl      # these rows anew

On a CPU: SDXL through ``NoiseAR-SDXL-v0``, an episode of 16 patches of 4,096 elements drawn by a policy of the paper's
size, denoised in two steps with guidance and, as SDXL-Turbo, in one without; a pair; an NLL step; an update of PPO.
Seconds and peak memory of each stage stand beside what ``resources.py`` predicts: weights and activations in bytes,
FLOPs over the rate of a large matrix product in the same dtype and process. Images of random weights mean nothing.

On an accelerator the same stages run, then the policy beside the authors' loop and a matrix product, every preset's
class, and every scorer: the acceptance test of a machine. What fails is shown in its row, and the script ends with an
error. Writes ``full_size.md`` and the numbers behind it, ``full_size.json``, in ``benchmarks/results``; those of
another kind of device stay.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import bench_policy  # in this folder
import gymnasium
import numpy as np
import torch
from accelerate import init_empty_weights
from bench_policy import FULL, HALF, LIKE_AUTHORS
from pages import RESULTS, markdown, page, parser_of, write
from published_networks import SDXL, meta, parameters_of
from published_pipelines import PUBLISHED, bert_tokenizer, build_pipeline, clip_tokenizer, fill, vae
from resources import activations, denoiser_cost, flops, nll_of, policy_config, policy_cost
from timing import Meter, Seconds, ratios

from noisear_rl.algos import ppo
from noisear_rl.data.weak_to_strong import network_evaluations, weak_to_strong
from noisear_rl.denoisers.diffusion_pipeline import DiffusionPipelineDenoiser
from noisear_rl.denoisers.presets import PRESETS
from noisear_rl.envs import NoiseVectorEnv, make_vector_env
from noisear_rl.evaluation.results import read_record
from noisear_rl.gaussian import standard_noise
from noisear_rl.patches import patchify
from noisear_rl.policy import NoiseARPolicy
from noisear_rl.policy.critic import NoiseARCritic
from noisear_rl.provenance import provenance
from noisear_rl.rewards import REWARDS, load_reward
from noisear_rl.rewards.aesthetic import Aesthetic

PROMPT, ENV_ID, EPISODES, BATCH, STEPS = "a photo of a red circle left of a blue square", "FullSize-v0", 2, 2, 2
REWARD = "jpeg-compressibility"
SCORERS = ("clip-score", "aesthetic-v2", "image-reward", "pickscore", "hpsv2.1", "mps")
PRESET_NAMES = ("sdxl", "sdxl-turbo", "hunyuan-dit", "pixart-sigma", "sd3")
PARTS = ("stages", "policy", "presets", "scorers")
DTYPE = "bfloat16"
POLICY = (bench_policy.sampling, bench_policy.nll_step)
DATA = RESULTS / "full_size.json"
HEAD = ("stage", "seconds", "predicted", "ratio", "peak memory, GiB", "predicted", "ratio")


def denoiser_of(name: str, dtype: torch.dtype, device: torch.device, **options: Any) -> DiffusionPipelineDenoiser:
    """Builds a denoiser; prompt embeddings of random weights are never kept on disk."""
    kind: Any = str(dtype).removeprefix("torch.")
    given: dict[str, Any] = {"num_inference_steps": STEPS, "cache_dir": "none"} | options
    pipeline = build_pipeline(name, dtype, device)
    return DiffusionPipelineDenoiser(pipeline, name=name, dtype=kind, device=device, **given)


def predictions() -> dict[str, Any]:
    """Counts FLOPs and bytes; in a process of its own, whose memory is not that of the stages."""
    config = policy_config(SDXL, "paper")
    with torch.device("meta"):
        decoder = vae()
    return {
        "evaluation": sum(denoiser_cost("sdxl")[1].values()),
        "decoding": sum(flops(lambda: decoder.decode(meta(1, *SDXL.latent_shape))).values()),
        "policy": policy_cost("sdxl"),
        "saved": activations(NoiseARPolicy(config).eval(), NoiseARCritic(config).eval(), 77),
    }


def stages(meter: Meter, dtype: torch.dtype) -> dict[str, Any]:
    """Runs every stage of SDXL with the policy of the paper and returns what predictions follow from."""
    device, config = meter.device, policy_config(SDXL, "paper")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        counted = pool.submit(predictions).result()
    cost, saved = counted["policy"], counted["saved"]
    rate = {"half": meter.matmul_rate(dtype), "float32": meter.matmul_rate(torch.float32)}
    evaluation, decoding = counted["evaluation"] / rate["half"], counted["decoding"] / rate["half"]
    weights, policy_bytes = 2 * (SDXL.parameters + PUBLISHED["sdxl"].parameters), 4 * cost["parameters"]

    with meter("build SDXL with random weights", memory=weights):
        denoiser = denoiser_of("sdxl", dtype, device, guidance_scale=5.5)
    held = parameters_of(denoiser.network)
    made = lambda num_envs=1, **options: NoiseVectorEnv(num_envs, denoiser=denoiser, **options)
    gymnasium.register(ENV_ID, vector_entry_point=made)
    env = make_vector_env("NoiseAR-SDXL-v0", 1, denoiser=denoiser, reward=REWARD, prompts=(PROMPT,))

    tokens = 77 * 2 * 0.8178e9  # FLOPs of both encoders per token are two per parameter
    with meter("embed a prompt and the empty one", 2 * tokens / rate["half"], 0):
        observation, _ = env.reset(seed=0)
    with meter("build the policy", memory=policy_bytes):
        policy = NoiseARPolicy(config).to(device).eval()
    text, mask = (torch.from_numpy(observation[key]).to(device) for key in ("text", "text_mask"))
    with meter("draw 16 patches", cost["flops"] / rate["float32"], 0):
        actions = policy.sample(text, mask.bool(), seeds=[0]).patches.cpu().numpy()
    with meter(f"denoise, {STEPS} steps with guidance, and score", 2 * STEPS * evaluation + decoding):
        for patch in range(env.task.n_patches):
            _, rewards, terminated, *_ = env.step(actions[:, patch])
    assert terminated.all() and np.isfinite(rewards).all()
    assert env.images is not None and env.images.shape == (1, 3, 1024, 1024)
    with meter("score again", 0.0, 0):
        score = load_reward(REWARD).score(env.images, [PROMPT])
    assert float(score[0]) == float(rewards[0])

    pair = network_evaluations() * evaluation
    with meter("a weak-to-strong pair", pair):
        target = weak_to_strong(denoiser, standard_noise([1], denoiser.latent_shape), denoiser.encode([PROMPT])).cpu()
    assert target.isfinite().all()

    denoiser.num_inference_steps, denoiser.guidance_scale = 1, 1.0  # as SDXL-Turbo
    with meter("denoise, 1 step without guidance", evaluation + decoding):
        denoiser.denoise(standard_noise([2], denoiser.latent_shape), denoiser.encode([PROMPT]), [2])

    patches = patchify(target, config.patch_size).to(device).expand(BATCH, -1, -1)
    memory = 3 * policy_bytes + BATCH * saved["NLL"]
    with meter(f"an NLL step with Adam, batch {BATCH}", 3 * BATCH * cost["flops"] / rate["float32"], memory):
        optimizer = torch.optim.Adam(policy.parameters(), lr=1e-5, fused=True)
        nll_of(policy.train(), patches, text.expand(BATCH, -1, -1), mask.bool().expand(BATCH, -1)).backward()
        optimizer.step()
    del optimizer, policy
    gc.collect()

    memory = max(3 * policy_bytes + saved["PPO"], 9 * policy_bytes + saved["Fisher"])
    with tempfile.TemporaryDirectory() as folder, meter(f"PPO, an update of {EPISODES} episodes", memory=memory):
        options = ppo.PPOConfig(
            env_id=ENV_ID,
            reward=REWARD,
            prompts=(PROMPT,),
            policy=config,
            updates=1,
            prompts_per_update=1,
            samples_per_prompt=EPISODES,
            micro_batches=EPISODES,
            fisher_episodes=EPISODES,
            output_dir=Path(folder) / "ppo",
        )
        assert all(p.isfinite().all() for p in ppo.train(options).parameters())
    return {"TFLOPs per second": {key: value / 1e12 for key, value in rate.items()}, "UNet": held, "bytes": weights}


def attempt(rows: list[list[Any]], name: list[Any], measure: Callable[[], list[Any]]) -> None:
    """Appends a row of what was measured, or of why it failed."""
    try:
        found = measure()
    except Exception as error:  # the rows that follow are worth having
        traceback.print_exc()
        found = [f"{type(error).__name__}: {error}".splitlines()[0][:200]]
    rows.append([*name, *found])
    print(rows[-1], flush=True)


def presets(meter: Meter, compiled: Sequence[str], save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Times every preset's class at its own number of steps: dtype, compiled or not, seconds per image, and memory."""

    def measure(name: str, dtype: torch.dtype, compile: bool, steps: int, guidance: float) -> list[Any]:
        options = {"num_inference_steps": steps, "guidance_scale": guidance, "compile": compile}
        denoiser = denoiser_of(name, dtype, meter.device, **options)
        noise, conditioning = standard_noise([0], denoiser.latent_shape), denoiser.encode([PROMPT])
        denoiser.num_inference_steps = 1
        denoiser.denoise(noise, conditioning, [0])  # compiles and warms up
        denoiser.num_inference_steps = steps
        seconds = []
        with meter(f"{name}, {dtype}, compiled: {compile}"):
            for _ in range(3):
                began = meter.clock()
                image = denoiser.denoise(noise, conditioning, [0]).cpu()
                seconds.append(meter.clock() - began)
        return [float(np.median(seconds)), meter.rows.pop()["GiB"], bool(image.isfinite().all())]

    rows: list[list[Any]] = []
    for name in PRESET_NAMES:
        preset = PRESETS.get(name)
        steps, guidance = (preset.num_inference_steps, preset.guidance_scale) if preset else (1, 1.0)
        for dtype in (torch.float16, torch.bfloat16):
            for compile in (False, True)[: 1 + (name in compiled)]:
                what = [name, str(dtype).removeprefix("torch."), compile, steps]
                attempt(rows, what, lambda: measure(name, dtype, compile, steps, guidance))  # noqa: B023
                save({"presets": rows})
    return {"presets": rows}


def scorers(meter: Meter) -> dict[str, Any]:
    """Times scorers at full size with random weights: seconds per image in a batch of 8, and memory."""
    images = torch.rand(8, 3, 1024, 1024, generator=torch.Generator().manual_seed(0))

    def measure(name: str) -> list[Any]:
        module, cls = REWARDS[name]
        scorer = getattr(importlib.import_module(f"noisear_rl.rewards.{module}"), cls)(device=meter.device)
        with init_empty_weights(include_buffers=False):
            network = scorer.build()
        scorer.network = fill(network, scorer.dtype, meter.device).to(meter.device)
        scorer.tokenizer = bert_tokenizer() if name == "image-reward" else clip_tokenizer()
        if isinstance(scorer, Aesthetic):
            scorer.head = scorer.make_head(scorer.architecture["projection_dim"]).to(meter.device)
        scores = scorer.score(images, [PROMPT] * len(images))  # warms up
        with meter(name):
            scorer.score(images, [PROMPT] * len(images))
        row = meter.rows.pop()
        return [row["seconds"] / len(images), row["GiB"], bool(scores.isfinite().all())]

    rows: list[list[Any]] = []
    for name in SCORERS:
        attempt(rows, [name], lambda: measure(name))  # noqa: B023
    return {"scorers": rows}


def ratio(value: float, expected: float | None) -> tuple[str, str]:
    return ("", "") if expected is None else (f"{expected:.2f}", f"{value / expected:.2f}" if expected > 0.05 else "")


def table(record: dict[str, Any]) -> str:
    """Renders the page from the record: one part per kind of device."""
    origin = {device: found["provenance"] for device, found in record.items()}
    return page([part for found in record.values() for part in parts_of(found)], "full_size", origin)


def parts_of(record: dict[str, Any]) -> list[str]:
    """Renders what was measured on one kind of device."""
    rate, rows, parts = record.get("TFLOPs per second"), [], []
    for row in record.get("stages", ()):
        times, memory = (ratio(row[key], row[f"{key} predicted"]) for key in ("seconds", "GiB"))
        rows.append([row["stage"], f"{row['seconds']:.2f}", *times, f"{row['GiB']:.2f}", *memory])
    if rate:
        parts += [
            f"SDXL with random weights ({record['UNet'] / 1e9:.2f} G parameters in the UNet, {record['dtype']}) "
            "through `NoiseAR-SDXL-v0`, images of 1024 × 1024 pixels, and a float32 policy of the size of the paper. "
            f"Predicted seconds: FLOPs over the rate of a large matrix product, {rate['half']:.2f} TFLOPs per second "
            f"in {record['dtype']} and {rate['float32']:.2f} in float32, measured in the same process; on a CPU, all "
            "times are those of the process and leave out other programs. Predicted memory: what "
            "the process held before the stage, and the bytes that `resources.py` computes; that of PPO leaves out the "
            "activations of its two images, which are denoised together.",
            markdown(HEAD, rows),
        ]
    if policy := record.get("policy"):
        cells = [
            [
                f"sampling in {dtype}, batch {batch}, of the authors' loop in float32",
                spread(seconds, LIKE_AUTHORS, dtype),
            ]
            for dtype in (FULL, HALF)
            for batch, seconds in policy["sampling"]["seconds"].items()
        ]
        share = policy["nll_step"]["flops"] / policy["nll_step"]["product"]
        for dtype in (FULL, HALF):
            what = f"an NLL step in {dtype}, batch {bench_policy.NLL_BATCH}, rate over that of a matrix product"
            cells.append([what, spread(policy["nll_step"]["seconds"], f"product, {dtype}", dtype, share)])
        parts += ["The policy at its published size; median of 5.", markdown(("what", "ratio"), cells)]
    if record.get("presets"):
        columns = ("preset", "dtype", "compiled", "steps", "seconds per image", "peak memory, GiB", "finite")
        cells = [[*row[:4], *figures(row[4:], 3)] for row in record["presets"]]
        parts += ["Every preset, batch 1, at its own number of steps; median of 3.", markdown(columns, cells)]
    if record.get("scorers"):
        cells = [[row[0], *figures(row[1:], 4)] for row in record["scorers"]]
        names = ("scorer", "seconds per image", "peak memory, GiB", "finite")
        parts += ["Scorers in float32, a batch of 8 images of 1024 × 1024 pixels.", markdown(names, cells)]
    return parts


def spread(seconds: Seconds, over: str, under: str, factor: float = 1.0) -> str:
    median, low, high = (factor * value for value in ratios(seconds, over, under))
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def figures(found: list[Any], digits: int) -> list[str]:
    """Cells of seconds, GiB and whether all is finite, or of an error."""
    return [f"{found[0]:.{digits}f}", f"{found[1]:.1f}", str(found[2])] if len(found) > 1 else [found[0], "", ""]


def main() -> None:
    """Entry point."""
    parser = parser_of(__doc__)
    parser.add_argument("--device", default="cpu", help="`cpu` or an accelerator such as `cuda`")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS, help="what to measure; the rest stays")
    parser.add_argument(
        "--compile", nargs="*", choices=PRESET_NAMES, default=PRESET_NAMES, help="presets to compile; minutes each"
    )
    arguments = parser.parse_args()
    if arguments.render:
        write("full_size", table, None)
        return
    start, meter = provenance(), Meter(torch.device(arguments.device))
    kind = meter.device.type
    measured: dict[str, Callable[[], Any]] = {
        "stages": lambda: stages(meter, getattr(torch, DTYPE)) | {"stages": list(meter.rows)},
        "policy": lambda: {"policy": {f.__name__: f(5, meter.device) for f in POLICY}},
        "presets": lambda: presets(meter, arguments.compile, save),
        "scorers": lambda: scorers(meter),
    }

    def save(found: dict[str, Any]) -> None:  # what is done is not lost
        known = read_record(DATA) if DATA.is_file() else {}
        write("full_size", table, known | {kind: known.get(kind, {}) | {"provenance": start, "dtype": DTYPE} | found})

    for part in ("stages",) if kind == "cpu" else arguments.only:
        save(measured[part]())
        gc.collect()
    found = read_record(DATA)[kind]
    failed = [row for part in ("presets", "scorers") for row in found.get(part, []) if isinstance(row[-1], str)]
    if failed:
        raise SystemExit(f"{len(failed)} rows failed: {failed}")


if __name__ == "__main__":
    main()
