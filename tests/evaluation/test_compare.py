import json

import numpy as np
import pytest
import torch

from noisear_rl.evaluation.compare import as_results, best_of, evaluate, summary, table
from noisear_rl.evaluation.diversity import diversity, radial_spectrum
from noisear_rl.evaluation.intervals import bootstrap
from noisear_rl.evaluation.results import load_data, save_data
from noisear_rl.evaluation.tables import render, results_table
from noisear_rl.rewards import load_reward
from noisear_rl.samplers import GAUSSIAN
from tests.conftest import random_policy

PROMPTS = ["a photo of a red circle", "a photo of two squares", "a photo of a blue cross above a red circle"]


def test_overall_is_the_mean_over_categories():
    scores = np.array([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    assert bootstrap(scores, ["a", "b", "b", "b"]).mean == 0.5
    with pytest.raises(ValueError, match="unknown resample"):
        bootstrap(scores, ["a"] * 4, resample="seeds")


def test_methods_are_paired_and_batches_do_not_matter(random_denoiser):
    policies = {GAUSSIAN: None, "same": random_policy(scale=0.0), "other": random_policy()}
    reward = load_reward("shapes-match")
    results = evaluate(random_denoiser, reward, policies, PROMPTS, 3, batch_size=4, keep_images=2)
    together = evaluate(random_denoiser, reward, policies, PROMPTS, 3, batch_size=64)
    for name in policies:
        assert results[name].scores["shapes-match"].shape == (3, 3)
        np.testing.assert_allclose(
            results[name].scores["shapes-match"], together[name].scores["shapes-match"], atol=1e-5
        )
        assert results[name].images.shape == (3, 2, 3, 64, 64)
        torch.testing.assert_close(results[name].images[:, :1], together[name].images, rtol=0, atol=1e-5)
        assert results[name].nfe == 4 and results[name].seconds_per_image > 0
    np.testing.assert_array_equal(results[GAUSSIAN].scores["shapes-match"], results["same"].scores["shapes-match"])
    assert results["same"].kl_to_gaussian == 0 and results["other"].kl_to_gaussian > 1
    assert results[GAUSSIAN].noise_std == pytest.approx(1, abs=0.1)
    record = json.loads(json.dumps(summary(results, PROMPTS)))
    assert record["prompts"] == PROMPTS and list(record["methods"]) == list(policies)
    kept = record["methods"]["other"]
    np.testing.assert_allclose(kept["scores"]["shapes-match"], results["other"].scores["shapes-match"], atol=1e-4)
    assert kept["kl_to_gaussian"] == results["other"].kl_to_gaussian
    categories = ["colors", "counting", "position"]
    for resample, gain in (("noise", "+0.0 [0.0, 0.0]"), ("prompts", "+0.0")):  # one prompt per category: no interval
        text = table(results, categories, scorer="shapes-match", resample=resample)
        rows = [line.split("|") for line in text.splitlines()]
        assert len(rows) == 5 and len({len(row) for row in rows}) == 1
        assert rows[3][-4].strip() == gain  # a method has no gain over itself


def test_repeated_prompts_count_once(random_denoiser):
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[2], PROMPTS[2]]
    categories = ["single"] * 4 + ["pair"] * 2
    policies = {GAUSSIAN: None, "other": random_policy()}
    results = evaluate(random_denoiser, load_reward("shapes-match"), policies, prompts, 2, keep_images=0)
    scores = 100 * results["other"].scores["shapes-match"]
    single, pair = (scores[:3].mean() + scores[3].mean()) / 2, scores[4:].mean()
    cells = table(results, categories, scorer="shapes-match").splitlines()[3].split("|")
    assert [cell.strip() for cell in cells[2:5]] == [f"{x:.1f}" for x in (single, pair, (single + pair) / 2)]


def test_evaluations_in_memory_have_the_tables_and_data_of_those_on_disk(random_denoiser, tmp_path):
    policies = {GAUSSIAN: None, "PPO 0": random_policy(), "PPO 1": random_policy(1)}
    evaluated = evaluate(random_denoiser, load_reward("shapes-match"), policies, PROMPTS, 2, keep_images=0)
    results = as_results(
        evaluated,
        ["a", "a", "a"],
        denoiser="random",
        prompt_set="three captions",
        judge="shapes-match",
        groups={"PPO": ["PPO 0", "PPO 1"]},
        diversity={name: {"clip": np.array([0.5, 0.25, 0.75])} for name in evaluated},
        facts={"training images": {"PPO": 1024}},
    )
    assert results.groups == {GAUSSIAN: [GAUSSIAN], "PPO": ["PPO 0", "PPO 1"]} and results.prompts == PROMPTS
    np.testing.assert_array_equal(results.by_seed("PPO", "shapes-match")[1], evaluated["PPO 1"].scores["shapes-match"])
    kept = load_data(save_data(results, tmp_path / "x.json"))
    assert kept.facts == {"training images": {"PPO": 1024}} and kept.provenance == results.provenance
    text = render(*results_table([kept], "prompts"), "markdown")
    assert text == render(*results_table([results], "prompts"), "markdown")
    assert "three captions: 3 prompts × 2 samples, denoiser random, judge shapes-match" in text
    assert "95 % intervals over prompts and training seeds" in text and "| PPO |" in text


def test_best_of_chooses_by_one_scorer_and_returns_all():
    scores = {"reward": np.array([[1.0, 3.0, 2.0, 0.0]]), "judge": np.array([[0.0, 1.0, 0.0, 1.0]])}
    best = best_of(scores, 2, "reward")
    np.testing.assert_array_equal(best["reward"], [[3.0, 2.0]])
    np.testing.assert_array_equal(best["judge"], [[1.0, 0.0]])


def test_spectrum_of_white_and_of_coloured_noise():
    noise = torch.randn(400, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    white = radial_spectrum(noise)
    assert white.shape == (5,) and (white - 1).abs().max() < 0.1
    assert radial_spectrum(2 * noise)[2] == pytest.approx(4 * white[2].item())
    smooth = (noise + noise.roll(1, -1) + noise.roll(1, -2)) / 3**0.5
    power = radial_spectrum(smooth)
    assert power[0] == pytest.approx(3, rel=0.2) and power[-1] < 1
    constant = radial_spectrum(torch.ones(1, 1, 8, 8))
    assert constant[0] == 64 and constant[1:].abs().max() < 1e-20


def test_diversity_is_the_mean_pairwise_distance():
    images = torch.rand(3, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    embed = lambda part: torch.nn.functional.normalize(part.flatten(1), dim=-1)
    by_hand = []
    for part in images:
        vectors = embed(part)
        pairs = [1 - vectors[i] @ vectors[j] for i in range(4) for j in range(4) if i != j]
        by_hand.append(torch.stack(pairs).mean().item())
    np.testing.assert_allclose(diversity(images, embed), by_hand, atol=1e-6)


def test_missing_scores_stop_a_comparison(random_denoiser, tmp_path):
    file = tmp_path / "fails.py"
    file.write_text("def score(images, prompts):\n    return [float('nan')] * len(prompts)\n")
    with pytest.raises(ValueError, match="scorer 'fails' returned NaN or infinity for 'Gaussian'"):
        evaluate(random_denoiser, load_reward(str(file)), {GAUSSIAN: None}, PROMPTS, 1)
