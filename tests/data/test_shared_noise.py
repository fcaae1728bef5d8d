"""Noises shared by many prompts: the right ones are found, transferred to similar prompts, and learned."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from noisear_rl.algos import nll
from noisear_rl.algos.collect import CollectConfig, collect
from noisear_rl.data.pairs import load_pairs
from noisear_rl.data.rollouts import load_rollouts
from noisear_rl.data.shared_noise import (
    SharedNoiseConfig,
    build_pairs,
    repeats,
    rewards_by_noise,
)
from noisear_rl.denoisers.shapes.captions import RELATIONS
from noisear_rl.gaussian import standard_noise
from noisear_rl.policy import NoiseARConfig
from noisear_rl.prompts import resolve_prompts
from noisear_rl.prompts.reader import PromptReader
from noisear_rl.rewards import load_reward
from noisear_rl.samplers.by_name import plan_methods
from noisear_rl.samplers.shared_noise import SharedNoises, SharedNoiseSampler, TextFeatures, choose_noise


def world(prompts, noises, luck, seed=0):
    """Two kinds of prompts, each with its own right noise: rewards ``(P, S)``, features, the right noise."""
    rng = np.random.default_rng(seed)
    kind = np.arange(prompts) % 2
    features = np.stack([kind, 1 - kind], 1) + 0.1 * rng.standard_normal((prompts, 2))
    right = np.where(kind == 0, 3, noises - 2)
    rewards = luck * rng.standard_normal((prompts, noises)) + rng.standard_normal((prompts, 1))
    rewards[np.arange(prompts), right] += 1
    return rewards, features, right


def test_finds_the_noise_of_each_kind_of_prompt_through_luck():
    """Each prompt's own best noise is rarely the right one; all prompts together identify it."""
    rewards, features, right = world(200, 64, luck=1.0)
    assert (rewards.argmax(1) == right).mean() < 0.2
    choice = choose_noise(rewards, features, features, noises=2)
    assert (choice.noise == right).all()
    assert choice.expected == pytest.approx(choice.average + 1, abs=0.2)


def test_prompts_that_were_not_tried_get_the_noise_of_their_kind():
    rewards, features, _ = world(100, 32, luck=0.5)
    _, asked, right = world(50, 32, luck=0.5, seed=1)
    assert (choose_noise(rewards, features, asked, noises=4).noise == right).all()


def test_pairs_of_features_decide():
    """Like a word and its place: neither of two features says which noise is right, both together do."""
    rng = np.random.default_rng(0)
    features = rng.choice([-1.0, 1.0], size=(200, 6))
    right = np.where(features[:, 0] * features[:, 1] > 0, 3, 7)
    rewards = 0.5 * rng.standard_normal((200, 10))
    rewards[np.arange(200), right] += 1
    choice = choose_noise(rewards[:120], features[:120], features[120:], noises=10)
    assert (choice.noise == right[120:]).mean() > 0.95


def test_expectation_is_not_fooled_by_luck():
    """If prompts have nothing in common, the recommendation of other prompts is worth nothing."""
    rng = np.random.default_rng(0)
    rewards, features = rng.standard_normal((150, 50)), rng.standard_normal((150, 8))
    choice = choose_noise(rewards, features, features, noises=50)
    assert abs(choice.expected - choice.average) < 0.3 < rewards.max(1).mean() - choice.average


def test_leaving_out_in_closed_form_equals_fitting_without():
    rewards, features, _ = world(12, 5, luck=0.7)
    choice = choose_noise(rewards, features, features, noises=5)
    relative = rewards - rewards.mean(1, keepdims=True)
    x = features - features.mean(0)
    kernel = (x @ x.T / np.square(x).sum(1).mean() + 1) ** 2
    picked = []
    for i in range(12):
        rest = np.delete(np.arange(12), i)
        weights = np.linalg.solve(kernel[np.ix_(rest, rest)] + choice.ridge * np.eye(11), relative[rest])
        picked.append(rewards[i, (kernel[i, rest] @ weights).argmax()])
    assert choice.expected == pytest.approx(np.mean(picked))


@pytest.mark.parametrize(
    ("shapes", "noises", "message"),
    [
        (((3, 4), (2, 5), (2, 5)), 2, "at least two prompts"),
        (((3, 4), (3, 5), (2, 6)), 2, "at least two prompts"),
        (((1, 4), (1, 5), (1, 5)), 2, "at least two prompts"),
        (((3, 4), (3, 5), (2, 5)), 5, "between 1 and the 4"),
        (((3, 4), (3, 5), (2, 5)), 0, "between 1 and the 4"),
    ],
)
def test_bad_input(shapes, noises, message):
    with pytest.raises(ValueError, match=message):
        choose_noise(*(np.zeros(shape) for shape in shapes), noises)


def test_not_finite():
    with pytest.raises(ValueError, match="finite"):
        choose_noise(np.full((3, 4), np.nan), np.zeros((3, 5)), np.zeros((3, 5)), 2)


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tried")
    options = {"num_prompts": 5, "samples_per_prompt": 4, "prompts_per_shard": 2}
    collect(CollectConfig("NoiseAR-ShapesTurbo-v0", same_noise=True, output_dir=folder, **options))
    return folder


def test_collected_noises_are_the_same_for_all_prompts(tried):
    rollouts = load_rollouts(tried)
    prompts, rewards, noise, seeds = rewards_by_noise(rollouts)
    assert len(set(prompts)) == 5 and rewards.shape == (5, 4) and noise.shape == (4, 256)
    everything = np.stack(rollouts.dataset.with_format("numpy")["noise"][:]).reshape(5, 4, 256)
    assert (everything == noise.astype(np.float16)).all()
    assert len(np.unique(everything[0], axis=0)) == 4
    assert rewards[2, 1] == rollouts.rewards[9] and prompts[2] == rollouts.prompts[9]


def test_pairs_hold_the_chosen_noise_and_nll_learns_it(tried, tmp_path, turbo):
    """One noise for all prompts: the policy must reproduce it, with the scale of the fresh noise around it."""
    asked = ("a photo of a red circle", "a photo of two squares", "a photo of a blue cross above a red circle") * 20
    config = SharedNoiseConfig(tried, tmp_path / "pairs", prompts=asked, noises=1, noise_scale=0.7)
    choice = build_pairs(config, turbo)
    rows = load_pairs(tmp_path / "pairs").with_format("numpy")[:]
    _, rewards, noise, _ = rewards_by_noise(load_rollouts(tried))
    assert len(set(choice.noise)) == 1 and rewards.mean(0).argmax() == choice.noise[0]
    target = 0.51**0.5 * noise[choice.noise[0]]
    np.testing.assert_allclose(rows["target"][0], target, atol=2e-3)
    seeded = standard_noise([int(rows["seed"][0])], (4, 8, 8)).flatten().numpy()
    np.testing.assert_allclose(noise[choice.noise[0]], seeded, atol=2e-3)
    policy = nll.train(
        nll.NLLConfig(
            tmp_path / "pairs",
            output_dir=tmp_path / "run",
            denoiser="shapes-turbo",
            policy=NoiseARConfig(log_variance="shared", d_model=64, d_ff=64, n_heads=2, n_layers=1),
            epochs=200,
            learning_rate=1e-2,
            log_every=100,
        )
    )
    text = turbo.encode(asked[:1] * 64)
    sample = policy.noise(policy.sample(text.policy_embeds, text.policy_mask, seeds=range(64))).flatten(1)
    assert (sample.mean(0) - torch.from_numpy(target)).square().mean().sqrt() < 0.2
    assert 0.6 < sample.std(0).mean() < 0.8


@pytest.mark.parametrize("encoder", ["denoiser", "tokens"])
def test_features_are_words_at_their_places(turbo, encoder):
    reader = PromptReader(encoder, turbo)
    prompts = [
        f"a photo of a {a} {r} a {b}" for a, b in (("circle", "square"), ("square", "circle")) for r in RELATIONS
    ]
    features = TextFeatures(reader, prompts)(prompts)
    assert features.shape == (8, features.shape[1]) and len(np.unique(features.round(3), axis=0)) == 8
    alone = TextFeatures(reader, prompts)(prompts[3:4])
    np.testing.assert_allclose(alone[0], features[3], atol=1e-4)
    if encoder == "tokens":  # two words differ
        length = len(prompts[0].split()) + 2  # start and end
        assert features[0] @ features[0] == length and features[0] @ features[4] == length - 2


def test_a_leak_is_the_layout_of_the_chosen_noise(tried, tmp_path, turbo):
    config = SharedNoiseConfig(tried, tmp_path / "pairs", noises=2, target="leak", min_reward=-1.0, noise_scale=0.8)
    choice = build_pairs(config, turbo)
    prompts, _, noise, seeds = rewards_by_noise(load_rollouts(tried))
    rows = load_pairs(tmp_path / "pairs").with_format("numpy")[:]
    assert list(rows["prompt"]) == prompts and list(rows["seed"]) == [seeds[i] for i in choice.noise]
    chosen = torch.from_numpy(noise[choice.noise]).unflatten(1, turbo.latent_shape)
    _, latents = turbo.denoise_with_latents(chosen, turbo.encode(prompts))
    expected = 1.5 * turbo.signal_level * latents.flatten(1).numpy()
    np.testing.assert_allclose(rows["target"], expected, atol=0.05)
    assert str(build_pairs(config, turbo)) == str(choice)  # finished: returns immediately
    with pytest.raises(ValueError, match=r"no image reached min_reward 2\.0"):
        build_pairs(SharedNoiseConfig(tried, tmp_path / "none", noises=2, target="leak", min_reward=2.0), turbo)


def test_the_next_noise_is_tried_where_an_image_is_not_good(tried, tmp_path, turbo):
    options = {"noises": 3, "target": "leak", "prompts": "train-balanced", "num_prompts": 24}
    config = SharedNoiseConfig(tried, tmp_path / "once", **options)
    choice = build_pairs(config, turbo)
    _, _, noise, seeds = rewards_by_noise(load_rollouts(tried))
    prompts = list(dict.fromkeys(resolve_prompts("train-balanced", turbo.name, count=24).prompts))
    reward, by_noise = load_reward({"shapes-match": 1.0}), []
    for column in range(3):
        chosen = torch.from_numpy(noise[choice.ranking[:, column]]).unflatten(1, turbo.latent_shape)
        by_noise.append(reward.score(turbo.denoise(chosen, turbo.encode(prompts)), prompts) >= 0.8)
    good = torch.stack(by_noise, 1).numpy()
    assert good.any(1).sum() > good[:, 0].sum() > 0  # some first noises fail
    build_pairs(replace(config, output_dir=tmp_path / "thrice", tries=5), turbo)
    for folder, tries in (("once", 1), ("thrice", 3)):
        rows = load_pairs(tmp_path / folder).with_format("numpy")[:]
        wanted = {p: seeds[choice.ranking[i, good[i].argmax()]] for i, p in enumerate(prompts) if good[i, :tries].any()}
        assert dict(zip(rows["prompt"], rows["seed"], strict=True)) == wanted


@pytest.mark.parametrize("target", ["noise", "leak"])
def test_a_margin_keeps_noises_that_are_nearly_as_promising(tried, tmp_path, turbo, target):
    config = SharedNoiseConfig(tried, tmp_path / "some", noises=3, tries=3, target=target, min_reward=-1.0, margin=0.02)
    choice = build_pairs(config, turbo)
    prompts, _, _, seeds = rewards_by_noise(load_rollouts(tried))
    rows = load_pairs(tmp_path / "some").with_format("numpy")[:]
    wanted = [
        (prompt, seeds[column], choice.chosen.tolist().index(column))
        for prompt, ranking, predicted in zip(prompts, choice.ranking, choice.predicted, strict=True)
        for column, reward in zip(ranking, predicted, strict=True)
        if reward > predicted[0] - 0.02 or column == ranking[0]
    ]
    assert len(prompts) < len(wanted) < 3 * len(prompts)
    assert list(zip(rows["prompt"], rows["seed"], rows["layout"], strict=True)) == wanted
    build_pairs(replace(config, output_dir=tmp_path / "all", margin=100.0), turbo)
    assert len(load_pairs(tmp_path / "all")) == 3 * len(prompts)
    build_pairs(replace(config, output_dir=tmp_path / "one", margin=0.0), turbo)
    assert "layout" not in load_pairs(tmp_path / "one").column_names


@pytest.mark.parametrize("encoder", ["denoiser", "tokens"])
def test_the_choice_alone_is_a_method(tried, tmp_path, turbo, encoder):
    asked = ("a photo of a red circle", "a photo of two squares", "a photo of a blue cross above a red cross")
    choice = build_pairs(SharedNoiseConfig(tried, tmp_path, asked, noises=3, text_encoder=encoder), turbo)
    _, _, noise, seeds = rewards_by_noise(load_rollouts(tried))
    (method,) = (m for m in plan_methods([f"choice={tmp_path}"], turbo) if m.name == "choice")
    sampler = method.make()
    drawn = sampler([*asked, asked[2]], [0, 1, 2, 99])
    wanted = [*choice.noise, choice.noise[2]]
    np.testing.assert_array_equal(drawn.noise.flatten(1).numpy(), noise[wanted])
    torch.testing.assert_close(drawn.noise, standard_noise([seeds[i] for i in wanted], (4, 8, 8)), rtol=0, atol=2e-3)
    torch.testing.assert_close(sampler(asked[1:2], [5]).images[0], drawn.images[1], rtol=0, atol=1e-4)
    torch.testing.assert_close(drawn.images, turbo.denoise(drawn.noise, turbo.encode([*asked, asked[2]])))
    assert drawn.nfe == turbo.nfe and drawn.kl_to_gaussian is None and method.trained
    shared = SharedNoises.load(tmp_path)
    assert (shared.text_encoder, shared.denoiser) == (encoder, "shapes-turbo") and len(shared.tried) == 5
    with pytest.raises(ValueError, match=r"for 'shapes-turbo', of shape \(4, 4, 8\)"):
        SharedNoiseSampler(turbo, replace(shared, noises=shared.noises[:, :, :4]))


def test_pairs_of_small_categories_are_repeated():
    position = [
        f"a photo of a {a} left of a {b}" for a in ("red cross", "blue cross") for b in ("red circle", "blue square")
    ]
    prompts = [*position, "a photo of a cross", "a photo of a cross", "a lighthouse at dawn"]
    natural = repeats(prompts, 0.0)
    assert natural == {**dict.fromkeys(position, 1), "a photo of a cross": 2, "a lighthouse at dawn": 1}
    assert repeats(prompts, 1.0) == natural | {"a photo of a cross": 4, "a lighthouse at dawn": 4}
    assert repeats(prompts, 0.5) == natural | {"a photo of a cross": 2, "a lighthouse at dawn": 2}


def test_rejects_bad_settings(tried, tmp_path, turbo):
    with pytest.raises(ValueError, match=r"target must be one of .*did you mean 'leak'"):
        build_pairs(SharedNoiseConfig(tried, tmp_path / "a", target="leaks"), turbo)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="noise_scale"):
        build_pairs(SharedNoiseConfig(tried, tmp_path / "a", noise_scale=1.0), turbo)
    with pytest.raises(ValueError, match=r"balance must be at most 1, not 1\.5"):
        build_pairs(SharedNoiseConfig(tried, tmp_path / "a", balance=1.5), turbo)
    own = tmp_path / "own"
    options = {"num_prompts": 2, "samples_per_prompt": 2, "prompts_per_shard": 2}
    collect(CollectConfig("NoiseAR-ShapesTurbo-v0", output_dir=own, **options))
    with pytest.raises(ValueError, match="--same-noise"):
        build_pairs(SharedNoiseConfig(own, tmp_path / "b"), turbo)
    build_pairs(SharedNoiseConfig(tried, tmp_path / "c", noises=1), turbo)
    with pytest.raises(ValueError, match="other settings"):
        build_pairs(SharedNoiseConfig(tried, tmp_path / "c", noises=2), turbo)
