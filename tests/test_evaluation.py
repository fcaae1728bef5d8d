import json

import numpy as np
import pytest

from noisear_rl.algos import evaluate as script
from noisear_rl.evaluation import GAUSSIAN, bootstrap, evaluate, table
from noisear_rl.rewards import load_reward
from tests.conftest import random_policy

PROMPTS = ["a photo of a red circle", "a photo of two squares", "a photo of a blue cross above a red circle"]


@pytest.mark.parametrize("resample", ["prompts", "noise"])
def test_interval_covers(resample):
    """A nominal 95 % interval covers the truth in 91 to 98 % of 300 synthetic data sets."""
    rng, covered = np.random.default_rng(0), 0
    difficulty = rng.uniform(0.2, 0.8, size=40)
    for _ in range(300):
        p = rng.uniform(0.2, 0.8, size=40) if resample == "prompts" else difficulty
        scores = (rng.random((40, 8)) < p[:, None]).astype(float)
        estimate = bootstrap(scores, ["all"] * 40, resample=resample, draws=400)
        covered += estimate.low <= (0.5 if resample == "prompts" else difficulty.mean()) <= estimate.high
    assert 0.91 <= covered / 300 <= 0.98


def test_overall_is_the_mean_over_categories():
    scores = np.array([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    assert bootstrap(scores, ["a", "b", "b", "b"]).mean == 0.5
    with pytest.raises(ValueError, match="unknown resample"):
        bootstrap(scores, ["a"] * 4, resample="seeds")


def test_methods_are_paired_and_batches_do_not_matter(random_denoiser):
    policies = {GAUSSIAN: None, "same": random_policy(scale=0.0), "other": random_policy()}
    reward = load_reward("shapes-match")
    results = evaluate(random_denoiser, reward, policies, PROMPTS, 3, batch_size=4, keep_images=2)
    whole = evaluate(random_denoiser, reward, policies, PROMPTS, 3, batch_size=64)
    for name in policies:
        assert results[name].scores["shapes-match"].shape == (3, 3)
        np.testing.assert_allclose(results[name].scores["shapes-match"], whole[name].scores["shapes-match"], atol=1e-5)
        assert results[name].images.shape == (3, 2, 3, 64, 64)
        assert results[name].nfe == 4
    np.testing.assert_array_equal(results[GAUSSIAN].scores["shapes-match"], results["same"].scores["shapes-match"])
    assert results["same"].kl_to_gaussian == 0 and results["other"].kl_to_gaussian > 1
    assert results[GAUSSIAN].noise_std == pytest.approx(1, abs=0.1)
    text = table(results, ["colors", "counting", "position"], scorer="shapes-match")
    rows = [line.split("|") for line in text.splitlines()]
    assert len(rows) == 5 and len({len(row) for row in rows}) == 1
    assert "+0.0 [0.0, 0.0]" in rows[3][-4]  # no gain of a method over itself


def test_command_writes_files(tmp_path, capsys):
    policy = random_policy(scale=0.01)
    policy.save_pretrained(tmp_path / "policy")
    arguments = ["--policies", f"mine={tmp_path / 'policy'}", "--num-prompts", "6", "--samples", "2"]
    script.main([*arguments, "--output-dir", str(tmp_path / "out")])
    assert "| mine |" in capsys.readouterr().out
    record = json.loads((tmp_path / "out/results.json").read_text())
    assert np.shape(record["methods"]["mine"]["scores"]["shapes-exact"]) == (6, 2)
    assert record["provenance"]["torch"] and record["config"]["samples"] == 2
    with pytest.raises(ValueError, match="NAME=PATH"):
        script.main(["--policies", "mine"])
