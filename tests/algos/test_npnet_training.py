"""NPNet learns the golden noise of pairs, keeps its best weights and resumes exactly."""

import dataclasses

import pytest
import torch

from noisear_rl.algos import npnet as algorithm
from noisear_rl.algos.npnet import NPNetTrainingConfig
from noisear_rl.data.pairs import PAIR_FEATURES
from noisear_rl.data.shards import write_shard
from noisear_rl.files import check_manifest
from noisear_rl.gaussian import standard_noise
from noisear_rl.learning.records import read_records
from noisear_rl.samplers.npnet import NPNet, NPNetConfig, load_npnet
from tests.resuming import assert_same_run, kill_and_resume
from tests.toys import NoDenoiser

TINY = {"image_size": 8, "patch_size": 2, "window_size": 2, "d_model": 8, "depths": (2, 1), "n_heads": (2, 2)}
TOY = NoDenoiser((4, 8, 8), 2)


def write_pairs(folder, count=320, noise_scale=0.0):
    """Targets are 0.7 times the noise, shifted up or down as the prompt says."""
    prompts = ["up" if i % 2 else "down" for i in range(count)]
    noise = standard_noise(range(count), TOY.latent_shape)
    shift = torch.tensor([0.5 if prompt == "up" else -0.5 for prompt in prompts])[:, None, None, None]
    target = shift.expand_as(noise) if noise_scale else 0.7 * noise + shift
    return write_rows(folder, prompts, target, noise_scale)


def write_rows(folder, prompts, target, noise_scale=0.0):
    """Pairs with the seeds 0, 1, …"""
    check_manifest(folder, {"denoiser": "none", "noise_scale": noise_scale})
    rows = {"prompt": prompts, "seed": list(range(len(prompts))), "target": list(target.flatten(1).half().numpy())}
    write_shard(folder, 0, rows, PAIR_FEATURES)
    return folder


def config(pairs, folder, **options):
    defaults = {"epochs": 12, "learning_rate": 2e-2, "evaluate_every": 15}
    network = NPNetConfig(**TINY)
    return NPNetTrainingConfig(pairs=pairs, output_dir=folder, npnet=network, **(defaults | options))


def test_learns_golden_noise_and_keeps_the_best(tmp_path):
    npnet = algorithm.train(config(write_pairs(tmp_path / "pairs"), tmp_path / "run"), TOY)
    rows = read_records(tmp_path / "run")
    identity = rows[0]["losses/mse_of_input"]
    assert identity == pytest.approx(0.3**2 + 0.5**2, abs=0.02)
    assert min(row["losses/mse_held_out"] for row in rows) < 0.05 * identity, rows
    assert rows[-1]["noise/std"] == pytest.approx((0.7**2 + 0.5**2) ** 0.5, abs=0.05)
    noise = standard_noise(range(10_000, 10_064), TOY.latent_shape)  # noise that no pair held
    golden = npnet(noise, TOY.encode(["up"] * 64).policy_embeds)
    assert (golden - (0.7 * noise + 0.5)).square().mean() < 0.05 * identity
    assert torch.equal(load_npnet(tmp_path / "run")(noise, TOY.encode(["up"] * 64).policy_embeds), golden)


def test_updates_that_only_do_harm_leave_the_network_as_it_began(tmp_path):
    """Held-out targets shift the noise up, training targets down: what is learned makes held-out pairs worse."""
    noise = standard_noise(range(64), TOY.latent_shape)
    shift = torch.where(torch.arange(64) < 6, 0.5, -0.5)[:, None, None, None]  # the first tenth is held out
    pairs = write_rows(tmp_path / "pairs", ["up"] * 64, noise + shift)
    options = {"batch_size": 16, "epochs": 6, "evaluate_every": 3}
    kept = algorithm.train(config(pairs, tmp_path / "run", **options), TOY)
    rows = read_records(tmp_path / "run")
    assert [row["losses/mse_of_input"] for row in rows] == [pytest.approx(0.25, abs=1e-3)] * len(rows)
    assert rows[-1]["losses/mse"] < 0.1 and len(rows) > 3  # it did learn
    assert all(row["losses/mse_held_out"] > 0.25 for row in rows)
    assert rows[-1]["losses/mse_held_out"] > 0.5  # 1 once the training targets are met
    text = TOY.encode(["up"] * 64).policy_embeds
    torch.testing.assert_close(kept(noise, text), noise, rtol=0, atol=1e-5)
    torch.testing.assert_close(load_npnet(tmp_path / "run")(noise, text), noise, rtol=0, atol=1e-5)


def test_noise_on_top_of_a_mean_is_the_input(tmp_path):
    pairs = write_pairs(tmp_path / "pairs", noise_scale=0.6)
    npnet = algorithm.train(config(pairs, tmp_path / "run"), TOY)
    noise = standard_noise(range(20_000, 20_064), TOY.latent_shape)
    for prompt, mean in (("up", 0.5), ("down", -0.5)):
        golden = npnet(noise, TOY.encode([prompt] * 64).policy_embeds)
        assert (golden - (mean + 0.6 * noise)).square().mean() < 0.03


def test_resumed_equals_uninterrupted(tmp_path):
    options = {"epochs": 2, "save_every": 6, "evaluate_every": 4, "batch_size": 32}
    pairs = write_pairs(tmp_path / "pairs", noise_scale=0.6)
    uninterrupted = algorithm.train(config(pairs, tmp_path / "a", **options), TOY)
    killed = config(pairs, tmp_path / "b", **options)
    resumed = kill_and_resume(algorithm.train, killed, TOY)
    assert_same_run(uninterrupted, resumed, tmp_path / "a", tmp_path / "b")
    finished = algorithm.train(dataclasses.replace(killed, resume=True), TOY)  # nothing left to do
    for a, b in zip(resumed.parameters(), finished.parameters(), strict=True):
        assert torch.equal(a, b)


def test_training_rejects_bad_pairs_and_networks(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no pairs"):
        algorithm.train(config(tmp_path, tmp_path / "a"), TOY)
    pairs = write_pairs(tmp_path / "pairs", 1)
    with pytest.raises(ValueError, match="made for denoiser 'none', not 'shapes'"):
        algorithm.train(config(pairs, tmp_path / "b", denoiser="shapes"))
    with pytest.raises(ValueError, match="too few"):
        algorithm.train(config(pairs, tmp_path / "c"), TOY)
    NPNet(NPNetConfig(text_shape=(3, 8))).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="another denoiser"):
        algorithm.train(config(pairs, tmp_path / "d", init_from=str(tmp_path / "other")), TOY)
