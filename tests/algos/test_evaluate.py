"""The evaluation command writes the same bytes when resumed or run in several processes, and rejects bad options."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from noisear_rl.algos.evaluate import EvaluateConfig, main, prompt_set, run
from noisear_rl.denoisers import load_denoiser
from noisear_rl.evaluation.results import load_results
from noisear_rl.rewards.layouts import layout_distance
from noisear_rl.samplers.by_name import plan_methods
from tests.conftest import random_policy

ROOT = Path(__file__).parents[2]
SMALL = EvaluateConfig(denoiser="shapes-turbo", num_prompts=7, samples=3, batch_size=6)


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policies")
    for seed in range(2):
        random_policy(scale=0.03 * (1 + seed)).save_pretrained(folder / str(seed))
    return [str(folder / str(seed)) for seed in range(2)]


@pytest.fixture(scope="module")
def whole(policies, tmp_path_factory):
    """Four methods, one of two training seeds; ``(config, folder)``."""
    methods = ("best-of-2", f"mine={policies[0]},{policies[1]}", "mine+search-2", "reno-2")
    config = replace(SMALL, methods=methods, output_dir=tmp_path_factory.mktemp("whole"))
    run(config)
    return config


def files(folder):
    return {name: (folder / name).read_bytes() for name in ("results.json", "table.md")}


def command(config):
    script = "import sys; from noisear_rl.algos.evaluate import main; main(sys.argv[1:])"
    options = ["--denoiser", config.denoiser, "--num-prompts", "7", "--samples", "3", "--batch-size", "6"]
    return [
        sys.executable,
        "-c",
        script,
        "--methods",
        *config.methods,
        *options,
        "--output-dir",
        str(config.output_dir),
    ]


def test_results_hold_every_image_once(whole):
    results = load_results(whole.output_dir)
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


def test_killed_and_resumed_equals_uninterrupted(whole, tmp_path):
    """Killed without warning while it draws, and again while it scores; then finished in one process."""
    config, rng = replace(whole, output_dir=tmp_path), np.random.default_rng()
    for kind, pattern in (("noise", "*.safetensors"), ("scores", "*.json")):
        after = int(rng.integers(1, 20))
        process = subprocess.Popen(command(config), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            if len([f for f in (tmp_path / kind).rglob(pattern) if f.name != "manifest.json"]) >= after:
                process.send_signal(signal.SIGKILL)
                process.wait()
            time.sleep(0.01)
        assert process.returncode == -signal.SIGKILL, after
        assert not (tmp_path / "results.json").exists()
    run(config)
    assert files(tmp_path) == files(whole.output_dir)


@pytest.mark.slow
def test_two_processes_equal_one(whole, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    options = command(replace(whole, output_dir=tmp_path))[3:]
    subprocess.run(
        [*launch, ROOT / "algos/evaluate.py", *options], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    ours, theirs = (json.loads(content["results.json"]) for content in (files(tmp_path), files(whole.output_dir)))
    for record in (ours, theirs):
        record.pop("provenance")
    assert ours == theirs


def test_methods_can_be_added(whole, tmp_path, policies):
    config = replace(whole, methods=("best-of-2",), output_dir=tmp_path)
    run(config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "images").rglob("*.png")}
    run(replace(config, methods=whole.methods))
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())
    assert files(tmp_path) == files(whole.output_dir)


def test_other_settings_are_rejected(whole):
    with pytest.raises(ValueError, match=r"written with other settings \(samples: 3, not 2\)"):
        run(replace(whole, samples=2))
    with pytest.raises(ValueError, match="written with other settings"):
        run(replace(whole, methods=("best-of-2",), choose_by="brightness"))


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
