"""The evaluation command writes the same bytes when resumed or run in several processes, and rejects bad options."""

import json
import signal
import subprocess
import sys
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from noisear_rl.algos import evaluate
from noisear_rl.algos.evaluate import EvaluateConfig, main, prompt_set, run
from noisear_rl.denoisers import load_denoiser
from noisear_rl.evaluation.results import load_results
from noisear_rl.rewards.layouts import layout_distance
from noisear_rl.samplers.by_name import plan_methods
from tests.conftest import random_policy
from tests.launching import launch

SMALL = EvaluateConfig(denoiser="shapes-turbo", num_prompts=7, samples=3, batch_size=6)
IMAGES, SHARDS = 7 * 3, 4  # per method
PROVENANCE = {"commit": "abc1234", "torch": "2", "device": "cpu", "threads": 1}
# Lets a number of files of a kind be written, then kills the process before it renames the temporary file of the next.
KILLED = """
import os, signal, sys
from pathlib import Path

pattern, left, replace = sys.argv[1], int(sys.argv[2]), Path.replace

def replace_or_die(self, target):
    global left
    if Path(target).match(pattern):
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
    return replace(self, target)

Path.replace = replace_or_die
from noisear_rl.algos.evaluate import main
main(sys.argv[3:])
"""


@pytest.fixture(scope="module", autouse=True)
def same_provenance():
    """Fixes the provenance: the commit may change while the tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "provenance", lambda: PROVENANCE)
        yield


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policies")
    for seed in range(2):
        random_policy(scale=0.03 * (1 + seed)).save_pretrained(folder / str(seed))
    return [str(folder / str(seed)) for seed in range(2)]


@pytest.fixture(scope="module")
def finished(policies, tmp_path_factory):
    """A finished evaluation of Gaussian noise and four methods, two of them with two training seeds."""
    methods = ("best-of-2", f"mine={policies[0]},{policies[1]}", "mine+search-2", "reno-2")
    config = replace(SMALL, methods=methods, output_dir=tmp_path_factory.mktemp("finished"))
    run(config)
    return config


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("results.json", "table.md")}


def times(files: Sequence[Path]) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in files}


def arguments(config: EvaluateConfig) -> list[str]:
    options = ["--denoiser", config.denoiser, "--num-prompts", "7", "--samples", "3", "--batch-size", "6"]
    return ["--methods", *config.methods, *options, "--output-dir", str(config.output_dir)]


def test_results_hold_every_image_once(finished):
    results = load_results(finished.output_dir)
    assert results.groups == {
        "Gaussian": ["Gaussian"],
        "best of 2": ["best of 2"],
        "mine": ["mine 0", "mine 1"],
        "mine + search 2": ["mine + search 2 0", "mine + search 2 1"],
        "reno 2": ["reno 2"],
    }
    for name, method in results.methods.items():
        assert method.scores["shapes-exact"].shape == (7, 3)  # 7 is not a multiple of the 2 prompts per shard
        assert method.diversity["layout"].shape == method.diversity["shapes-clip"].shape == (7,)
        assert {Image.open(results.image_path(name, p, s)).size for p in range(7) for s in range(3)} == {(64, 64)}
    images = list((finished.output_dir / "images").rglob("*"))
    assert sum(file.is_file() for file in images) == len(results.methods) * IMAGES  # and no temporary files
    assert results.provenance == PROVENANCE
    nfe = {name: method.nfe for name, method in results.methods.items()}
    assert [nfe[name] for name in ("Gaussian", "best of 2", "mine 0", "mine + search 2 1", "reno 2")] == [1, 2, 1, 2, 2]
    gaussian, mine = results.methods["Gaussian"], results.methods["mine 1"]
    assert gaussian.kl_to_gaussian == 0 and mine.kl_to_gaussian > 1
    assert results.methods["best of 2"].kl_to_gaussian is None and not results.methods["best of 2"].trained
    assert abs(gaussian.noise_std - 1) < 0.05 and gaussian.noise_map.shape == (8, 8)
    assert gaussian.radial_spectrum.shape == (5,) and abs(gaussian.radial_spectrum[1:].mean() - 1) < 0.2
    chosen, first = (results.methods[name].scores["shapes-match"] for name in ("best of 2", "Gaussian"))
    assert (chosen >= first - 1e-6).all() and (chosen > first).any()  # candidate 0 is the Gaussian image itself
    assert set(results.seconds_per_image()) == set(results.methods)


def test_killed_and_resumed_equals_uninterrupted(finished, tmp_path):
    """Killed while it draws the images of a shard, again while it writes scores, then finished in this process."""
    config, methods = replace(finished, output_dir=tmp_path), len(load_results(finished.output_dir).methods)
    kinds = ("images/*/*.png", "noise/*/*.safetensors", "scores/*/*.json")
    for pattern, left, expected in (
        (kinds[0], 25, (IMAGES + 4, SHARDS, 0)),  # one method and 4 of the 6 images of a shard, which is drawn again
        (kinds[2], 10, (methods * IMAGES, methods * SHARDS, 10)),
    ):
        command = [sys.executable, "-c", KILLED, pattern, str(left), *arguments(config)]
        process = subprocess.run(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        assert process.returncode == -signal.SIGKILL, process.stderr
        assert tuple(len(list(tmp_path.glob(kind))) for kind in kinds) == expected
        assert not (tmp_path / "results.json").exists()
    before = times([file for kind in kinds for file in tmp_path.glob(kind)])
    run(config)
    assert times(list(before)) == before  # what was finished is not repeated
    assert contents(tmp_path) == contents(finished.output_dir)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_equal_one(finished, tmp_path, count):
    for number in (1, count):  # each with one thread
        launch(number, "algos/evaluate.py", *arguments(replace(finished, output_dir=tmp_path / str(number))))
    one, many = (json.loads((tmp_path / str(number) / "results.json").read_text()) for number in (1, count))
    assert many.pop("provenance")["processes"] == count
    one.pop("provenance")
    assert many == one


def test_the_denoiser_is_gone_when_scorers_are_loaded(tmp_path, policies, monkeypatch):
    """With every sampler that held it, so that both need not fit into memory."""
    seen, scored_after, load, score = [], [], evaluate.load_denoiser, evaluate.load_reward

    def loaded(*names, **options):
        denoiser = load(*names, **options)
        seen.append(weakref.ref(denoiser))
        return denoiser

    def scoring(*names, **options):
        assert all(denoiser() is None for denoiser in seen)
        scored_after.append(len(seen))
        return score(*names, **options)

    monkeypatch.setattr(evaluate, "load_denoiser", loaded)
    monkeypatch.setattr(evaluate, "load_reward", scoring)
    methods = ("best-of-2", f"mine={policies[0]}", "mine+search-2")
    run(replace(SMALL, methods=methods, num_prompts=2, samples=2, output_dir=tmp_path))
    assert scored_after == [0, 1]  # once to check the prompts, once to score


def test_methods_can_be_added(finished, tmp_path, policies):
    config = replace(finished, methods=("best-of-2",), output_dir=tmp_path)
    run(config)
    before = times(list(tmp_path.glob("images/*/*.png")))
    assert len(before) == 2 * IMAGES
    run(replace(config, methods=finished.methods))
    assert times(list(before)) == before
    assert contents(tmp_path) == contents(finished.output_dir)


def test_other_settings_are_rejected(finished):
    with pytest.raises(ValueError, match=r"written with other settings \(samples: 3, not 2\)"):
        run(replace(finished, samples=2))
    with pytest.raises(ValueError, match=r"noise/best-of-2 was written with other settings \(is: "):
        run(replace(finished, methods=("best-of-2",), choose_by="brightness"))


def test_bad_methods(policies, tmp_path):
    turbo = load_denoiser("shapes-turbo")
    for items, message in (
        (["mine"], "expected NAME=PATH"),
        (["best-of-2", "best-of-2"], "distinct"),
        (["PPO+best-of-2"], "starts from 'PPO'; expected one of"),
        (["best-of-0"], "at least"),
        ([f"a b={policies[0]}", f"a-b={policies[0]}"], "differ in letters and digits"),
        ([f"={policies[0]}"], "NAME=PATH"),
    ):
        with pytest.raises(ValueError, match=message):
            plan_methods(items, turbo, "shapes-match")
    with pytest.raises(ValueError, match="choose_by"):
        plan_methods(["best-of-2"], turbo)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        plan_methods([f"mine={tmp_path / 'none'}"], turbo, "shapes-match")
    with pytest.raises(ValueError, match="cannot both choose and judge"):
        run(replace(SMALL, methods=("best-of-2",), scorers=("shapes-match", "shapes-exact"), output_dir=tmp_path))
    with pytest.raises(ValueError, match="at least 1"):
        run(replace(SMALL, samples=0, output_dir=tmp_path))
    with pytest.raises(ValueError, match=r"resample must be one of .*, not 'seeds'"):
        run(replace(SMALL, resample="seeds", output_dir=tmp_path))
    assert not list(tmp_path.iterdir())  # options are checked before any work


def test_prompt_files_and_reward_files(tmp_path, capsys):
    """A published layout with a malformed row and the scorers of a reward file, on the command line."""
    prompts, scorers = tmp_path / "drawbench.csv", tmp_path / "scorers.yaml"
    prompts.write_text(
        'Prompts,Category\na photo of a red circle,Colors\n"",Counting\na photo of two squares,Counting\n'
    )
    scorers.write_text("weights: {brightness: 1.0, jpeg-compressibility: 1.0}\n")
    options = ["--prompts", str(prompts), "--scorers", str(scorers), "--denoiser", "shapes-turbo", "--samples", "2"]
    options += ["--output-dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"(?s)drawbench.csv, line 3: .*--skip-bad-rows"):
        main(options)
    with pytest.warns(UserWarning, match="1 of 3 rows are malformed"):
        main([*options, "--skip-bad-rows"])
    assert "| Gaussian |" in capsys.readouterr().out
    results = load_results(tmp_path / "out")
    assert results.judge == "brightness" and results.prompts == ["a photo of a red circle", "a photo of two squares"]
    assert results.categories == ["colors", "counting"]


def test_prompt_sets():
    found = prompt_set(replace(SMALL, num_prompts=12))
    assert len(found) == 12 and len(set(found.categories)) == 6
    ours = prompt_set(replace(SMALL, denoiser="sdxl", prompts="geneval-style", num_prompts=30))
    assert len(set(ours.prompts)) == 30 and {ours.categories.count(name) for name in ours.categories} == {5}


def test_layout_distance():
    a = np.array([[0, 1, 10, 10], [2, 3, 40, 40]], dtype=float)
    b = np.array([[2, 3, 40, 40], [0, 1, 10, 42]], dtype=float)
    assert layout_distance(a, a[::-1]) == 0
    assert layout_distance(a, b) == pytest.approx(0.5 * 32 / 64)
    assert layout_distance(a, b[:1]) == pytest.approx(0.5)  # the circle has no partner
    other = b.copy()
    other[1, 1] = 5  # another colour
    assert layout_distance(a, other) == pytest.approx(0.5)
    empty = np.zeros((0, 4))
    assert layout_distance(empty, empty) == 0 and layout_distance(a, empty) == 1
