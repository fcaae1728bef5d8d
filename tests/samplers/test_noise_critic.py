"""A critic of noises: it learns which noise suits a prompt, chooses it without an image, and loads as it was saved."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from noisear_rl.algos import critic as training
from noisear_rl.algos.collect import CollectConfig, collect
from noisear_rl.algos.critic import CriticConfig
from noisear_rl.data.rollouts import load_seen, rollout_features
from noisear_rl.data.shards import write_shard
from noisear_rl.evaluation.ranking import choice_gain, rank_correlation, ranks
from noisear_rl.files import check_manifest
from noisear_rl.gaussian import standard_noise
from noisear_rl.learning.records import read_records
from noisear_rl.samplers.by_name import plan_methods
from noisear_rl.samplers.critic_choice import CriticChoice
from noisear_rl.samplers.noise_critic import NoiseCritic, NoiseCriticConfig, load_critic, thumbnails
from tests.conftest import random_policy
from tests.resuming import assert_same_run, kill_and_resume

SMALL = NoiseCriticConfig(d_model=16, d_text=16, n_blocks=1, text_layers=0, n_heads=2, dropout=0.0)
COLOURS, SHAPES = ("red", "blue", "green", "purple"), ("circle", "square", "triangle", "cross")
PROMPTS = [f"a photo of a {colour} {shape}" for colour in COLOURS for shape in SHAPES]


def wanted(prompts, noise):
    """The left half of the first channel should be high for one half of the colours, low for the other."""
    sign = np.array([1.0 if any(f" {c} " in prompt for c in COLOURS[:2]) else -1.0 for prompt in prompts])
    return sign * noise[:, 0, :, :4].mean((1, 2)).numpy() * 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rollouts of a reward that is known, as `noisear collect` writes them."""
    path, count = tmp_path_factory.mktemp("rollouts"), 250
    noise = standard_noise(range(len(PROMPTS) * count), (4, 8, 8)).half()
    prompts = [prompt for prompt in PROMPTS for _ in range(count)]
    reward = wanted(prompts, noise.float()).astype(np.float32).tolist()
    rows = {"prompt": prompts, "seed": list(range(len(prompts))), "denoise_seed": list(range(len(prompts)))}
    rows |= {"noise": list(noise.flatten(1).numpy()), "log_prob": [np.zeros(16, np.float32)] * len(prompts)}
    manifest = {"denoiser": "shapes-turbo", "num_inference_steps": 1, "guidance_scale": 1.0, "dtype": "float32"}
    manifest |= {"latent_shape": [4, 8, 8], "patch_size": 2, "text_shape": [16, 256], "reward": {"known": 1.0}}
    check_manifest(path, manifest | {"rollouts": len(prompts)})
    write_shard(path, 0, rows | {"reward": reward, "reward/known": reward}, rollout_features(["known"], False))
    return path


def config(folder, output, **options) -> CriticConfig:
    sizes = {"critic": SMALL, "batch_size": 64, "epochs": 8, "held_out_share": 0.25, "learning_rate": 1e-2}
    return CriticConfig((folder,), output_dir=output, **(sizes | {"save_every": 40, "evaluate_every": 50} | options))


def test_learns_which_noise_suits_prompts_that_it_never_saw(folder, tmp_path, turbo):
    critic = training.train(config(folder, tmp_path))
    record = read_records(tmp_path)[-1]
    assert record["eval/rank_correlation"] > 0.8 and record["eval/choice_gain"] > 0.8
    prompts, noise = PROMPTS[:4], standard_noise(range(4), (4, 8, 8))
    sampler = CriticChoice(turbo, None, load_critic(str(tmp_path)), 8)
    chosen = sampler(prompts, [5, 6, 7, 8])
    assert wanted(prompts, chosen.noise).mean() > 0.6 and chosen.nfe == turbo.nfe and chosen.kl_to_gaussian is None
    text, mask = sampler.read.read_prompts(prompts)
    expected = critic(noise, text, mask)[0]
    torch.testing.assert_close(load_critic(str(tmp_path))(noise, text, mask)[0], expected, rtol=0, atol=0)
    single = torch.cat([critic(noise[i : i + 1], text[i : i + 1], mask[i : i + 1])[0] for i in range(4)])
    torch.testing.assert_close(single, expected, rtol=0, atol=1e-5)
    longer = torch.nn.functional.pad(text, (0, 0, 0, 0)), mask
    torch.testing.assert_close(critic(noise, *longer)[0], expected, rtol=0, atol=0)


def test_resumed_equals_uninterrupted(folder, tmp_path):
    options = {"epochs": 2, "critic": replace(SMALL, dropout=0.2)}
    whole = training.train(config(folder, tmp_path / "a", **options))
    resumed = kill_and_resume(training.train, config(folder, tmp_path / "b", **options))
    assert_same_run(whole, resumed, tmp_path / "a", tmp_path / "b")


def test_a_choice_is_the_best_of_what_its_policy_draws(turbo):
    """Its candidates are those of best-of-N, and the first is the policy's own."""
    torch.manual_seed(0)
    policy, sizes = random_policy(), {"text_vocabulary": 29, "text_length": 16}
    critic = NoiseCritic(replace(SMALL, **sizes)).eval()
    one, four = (CriticChoice(turbo, policy, critic, count) for count in (1, 4))
    single, best = one(PROMPTS[:3], [1, 2, 3]), four(PROMPTS[:3], [1, 2, 3])
    text, mask = four.read.read_prompts(PROMPTS[:3])
    values = [critic(sample.noise, text, mask)[0] for sample in (single, best)]
    assert (values[1] >= values[0]).all() and (values[1] > values[0]).any()
    again = four(PROMPTS[1:2], [2])
    torch.testing.assert_close(again.noise[0], best.noise[1], rtol=0, atol=1e-5)
    assert torch.equal(single.images, turbo.denoise(single.noise, turbo.encode(PROMPTS[:3]), [9, 9, 9]))


@pytest.mark.parametrize("shape", [(4, 128, 128), (3, 40), (2, 4, 16, 16)])
def test_any_latent(shape):
    critic = NoiseCritic(replace(SMALL, latent_shape=shape, text_encoder="denoiser", text_dim=12))
    reward, thumbnail = critic(torch.randn(2, *shape), torch.randn(2, 5, 12))
    assert reward.shape == (2,) and thumbnail.shape == (2, 3 * 2 ** len(critic.config.cells), *critic.config.cells)


def test_thumbnails_of_collected_images(tmp_path):
    sizes = {"num_prompts": 3, "samples_per_prompt": 4, "prompts_per_shard": 2, "save_images": True}
    collect(CollectConfig("NoiseAR-ShapesTurbo-v0", output_dir=tmp_path, **sizes))
    seen = load_seen([tmp_path])
    small = seen.thumbnails(lambda images: thumbnails(images, NoiseCriticConfig(text_vocabulary=29, text_length=16)))
    assert small is not None and small.shape == (12, 12, 8, 8) and small.dtype == np.uint8
    assert 0 < small.std(0).mean() < 128  # images differ
    twice = load_seen([tmp_path, tmp_path])
    assert twice.noise.shape == (24, 4, 8, 8) and len(set(twice.group)) == 2 * len(set(twice.prompt)) == 6


def test_ranks_and_gains():
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0.0, 2.5, 1.0]
    rewards, prompt = np.array([0.0, 1.0, 2.0, 5.0, 3.0, 4.0]), np.array([0, 0, 0, 1, 1, 1])
    assert rank_correlation(rewards, rewards, prompt) == pytest.approx(1.0)
    assert rank_correlation(-rewards, rewards, prompt) == pytest.approx(-1.0)
    assert rank_correlation(np.zeros(6), rewards, prompt) == 0.0
    assert choice_gain(rewards, rewards, prompt) == 1.0 and choice_gain(-rewards, rewards, prompt) == -1.0


def test_bad_input(folder, tmp_path, turbo):
    with pytest.raises(ValueError, match="needs a critic to choose by: --critic"):
        plan_methods(["critic-4"], turbo)
    with pytest.raises(FileNotFoundError):
        plan_methods(["critic-4"], turbo, critic=str(tmp_path))
    critic = NoiseCritic(replace(SMALL, text_vocabulary=29, text_length=16))
    with pytest.raises(ValueError, match="count must be at least 1 noise per image, got 0"):
        CriticChoice(turbo, None, critic, 0)
    other = NoiseCritic(replace(SMALL, latent_shape=(4, 4, 4), text_vocabulary=29, text_length=16))
    with pytest.raises(ValueError, match="made for another denoiser: its latent_shape is"):
        CriticChoice(turbo, None, other, 2)
    critic.save_pretrained(tmp_path / "critic")
    with pytest.raises(ValueError, match="among the noises of a policy or Gaussian noise"):
        plan_methods(["best-of-2", "best of 2+critic-4"], turbo, "shapes-match", critic=str(tmp_path / "critic"))
    with pytest.raises(ValueError, match="must be a multiple of 8"):
        NoiseCriticConfig(d_model=20)
    with pytest.raises(ValueError, match="at least one folder"):
        load_seen([])
