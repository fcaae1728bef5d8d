"""Kills a command at random moments, resumes it, and compares what it leaves with an uninterrupted run, byte by byte.

    python tests/faults/kills.py NAME KILLS FOLDER [SEED]

Everything is imported once; every start of the command is a fork of this process. A trial is one folder, in which the
command is killed up to three times by SIGKILL and then finished. Prints the counts as JSON; ends with 1 if any differ.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from noisear_rl.algos import evaluate
from noisear_rl.algos.collect import CollectConfig, collect
from noisear_rl.checkpoints import list_checkpoints, load_state
from noisear_rl.data.pairs import PairsConfig, build_pairs
from noisear_rl.integrity import verify
from noisear_rl.learning.records import read_records
from tests.training_runs import PROMPTS, SMALL, TURBO, prepare, trainings

UPDATES, KILLS_PER_TRIAL, HALF = 12, 3, {"dtype": "bfloat16"}
TRAININGS = ("ppo-natural", "ppo-adam", "ppo-gae", "ppo-adaptive", "reinforce", "nll", "dpo")
TRAININGS += ("reward-gradient", "npnet", "critic")
DATASETS = ("collect", "collect-bfloat16", "pairs", "pairs-leak")
NAMES = (*TRAININGS, *DATASETS, "evaluate")


def run(name: str, data: Path, folder: Path) -> None:
    """Starts the command, or goes on with it."""
    torch.set_num_threads(1)
    if name in TRAININGS:
        options = {"optimizer": "adaptive_adam", "micro_batches": 1} if name == "ppo-adaptive" else {}
        trainings(data, UPDATES)[name.replace("adaptive", "adam")](folder, resume=True, **options)
    elif name.startswith("collect"):
        sizes = {"num_prompts": 6, "samples_per_prompt": 12, "prompts_per_shard": 1, "save_images": True}
        sizes |= {"denoiser_options": HALF if name.endswith("16") else TURBO, "prompts": PROMPTS}
        collect(CollectConfig("NoiseAR-ShapesTurbo-v0", output_dir=folder, **sizes))
    elif name.startswith("pairs"):
        options = {"prompts": PROMPTS, "pairs": 60, "batch_size": 10, "shard_size": 10, "denoiser_options": TURBO}
        if name == "pairs":
            options |= {"num_inference_steps": 4, "denoiser": "shapes"}
        else:
            options |= {"kind": "signal_leak", "filter_reward": "brightness", "min_reward": 0.1}
            options |= {"denoiser": "shapes-turbo"}
        build_pairs(PairsConfig(output_dir=folder, **options))
    else:
        policy = folder.parent / "policy"
        options = {"methods": (f"P={policy}", "best-of-2"), "samples": 4, "num_prompts": 12, "batch_size": 8}
        options |= {"denoiser": "shapes-turbo", "scorers": ("brightness", "shapes-match"), "choose_by": "shapes-clip"}
        evaluate.run(evaluate.EvaluateConfig(output_dir=folder, denoiser_options=TURBO, **options))


def child(name: str, data: Path, folder: Path) -> None:
    """The body of a fork, without output."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    with open(folder.parent / f"{folder.name}.log", "ab") as log:
        os.dup2(quiet, 1)
        os.dup2(log.fileno(), 2)
        if name == "PREPARE":
            prepare(data)
            from noisear_rl.policy import NoiseARPolicy

            NoiseARPolicy(SMALL).save_pretrained(folder.parent / "policy")
        else:
            run(name, data, folder)


def start(name: str, data: Path, folder: Path, after: float | None = None) -> bool:
    """Runs the command in a fork and kills it after so many seconds; returns whether it was killed.

    Raises:
        RuntimeError: If it failed by itself.
    """
    process = multiprocessing.get_context("fork").Process(target=child, args=(name, data, folder))
    process.start()
    process.join(after)
    if process.is_alive():
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    if process.exitcode == -signal.SIGKILL:
        return True
    if process.exitcode:
        log = (folder.parent / f"{folder.name}.log").read_text(errors="replace")
        raise RuntimeError(f"{name} in {folder} ended with {process.exitcode}: {log[-2000:]}")
    return False


def plain(value):
    """A state without its times, as values that compare."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items() if key != "seconds"}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


def contents(name: str, folder: Path) -> dict[str, object]:
    """What must not depend on kills, by a name for the message."""
    found: dict[str, object] = {}
    if name in TRAININGS:
        for checkpoint in list_checkpoints(folder):
            verify(checkpoint)
            found[f"{checkpoint.name}/model"] = (checkpoint / "model.safetensors").read_bytes()
            found[f"{checkpoint.name}/state"] = plain(load_state(checkpoint))
        found["metrics"] = [record | {"charts/SPS": 0} for record in read_records(folder)]
        tag = EventAccumulator(str(folder / "tensorboard/noisear-rl")).Reload()
        scalar = next(key for key in tag.Tags()["scalars"] if key.startswith(("losses/", "loss")))
        found["tensorboard"] = [(event.step, event.value) for event in tag.Scalars(scalar)]
        return found
    skipped = {".lock", "timing.json", "table.md"}
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in skipped):
        place = file.relative_to(folder).as_posix()
        if name == "evaluate" and file.suffix == ".safetensors":  # they hold the time that was spent
            tensors = load_file(file)
            cost = tensors.pop("cost")
            found[place] = plain(tensors), cost[0].item()
        elif not (name == "evaluate" and place.startswith("checksums/")):  # of files that hold times
            content = file.read_bytes()
            if place == "results.json":
                record = json.loads(content)
                content = json.dumps(record | {"config": {}, "provenance": {}}).encode()
            found[place] = content
    return found


def differences(name: str, whole: Path, folder: Path) -> list[str]:
    """Names of what differs between an uninterrupted run and another."""
    expected, found = contents(name, whole), contents(name, folder)
    return [key for key in sorted(expected.keys() | found.keys()) if expected.get(key) != found.get(key)]


def harness(name: str, kills: int, folder: Path, seed: int = 0) -> dict[str, object]:
    """Kills a command ``kills`` times in all; returns the counts and what differs."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, data = random.Random(f"{name} {seed}"), folder / "data"
    if not (folder / "policy").exists():
        start("PREPARE", data, folder / "prepare")
    began = time.monotonic()
    whole = folder / f"{name}-whole"
    assert not start(name, data, whole)
    seconds = time.monotonic() - began
    done = trials = 0
    wrong: list[str] = []
    while done < kills and trials < 3 * kills:
        trial = folder / f"{name}-{trials}"
        for _ in range(min(KILLS_PER_TRIAL, kills - done)):
            if not start(name, data, trial, rng.uniform(0.05, 0.9) * seconds):
                break  # it was faster this time
            done += 1
        start(name, data, trial)
        wrong += [f"{trial}: {key}" for key in differences(name, whole, trial)]
        trials += 1
    return {"command": name, "trials": trials, "kills": done, "different": wrong, "seconds": round(seconds, 1)}


def main(name: str, kills: str, folder: str, seed: str = "0") -> None:
    """Entry point."""
    found = harness(name, int(kills), Path(folder), int(seed))
    print(json.dumps(found))
    sys.exit(bool(found["different"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
