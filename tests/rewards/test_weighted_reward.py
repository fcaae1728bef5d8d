"""The weighted sum: normalisation, failed scorers, user-supplied functions, files."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from noisear_rl.algos import ppo, reinforce, reward_gradient
from noisear_rl.algos.collect import CollectConfig, collect
from noisear_rl.data.rollouts import load_rollouts
from noisear_rl.evaluation.reward_statistics import StatisticsConfig, main, measure
from noisear_rl.learning.losses import finite_episodes, group_advantages
from noisear_rl.learning.records import read_records
from noisear_rl.policy import NoiseARConfig
from noisear_rl.rewards import RewardConfig, WeightedReward, load_reward, registry, reward_config
from tests import toys
from tests.resuming import assert_same_run, kill_and_resume

IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
PROMPTS = [f"prompt {i}" for i in range(6)]
OWN = """
def score(images, prompts):
    return images.mean((1, 2, 3))

def length(images, prompts):
    return [len(prompt) for prompt in prompts]
"""


class Given:
    """Returns the numbers passed to the constructor."""

    def __init__(self, name, *values):
        self.name, self.values = name, torch.tensor(values)

    def score(self, images, prompts):
        return self.values[: len(prompts)]


def test_running_statistics_are_those_of_all_scores_so_far():
    values = torch.randn(6, generator=torch.Generator().manual_seed(0)) * 3 + 5
    scorer = Given("a", *values.tolist())
    reward = WeightedReward([(scorer, 2.0)], normalize="running")
    first = reward.score(IMAGES[:4], PROMPTS[:4])
    torch.testing.assert_close(first, 2 * (values[:4] - values[:4].mean()) / values[:4].std())
    scorer.values = values[4:]
    seen = values.double()
    second = reward.score(IMAGES[4:], PROMPTS[4:])
    torch.testing.assert_close(second, (2 * (seen[4:] - seen.mean()) / seen.std()).float())
    other = WeightedReward([(Given("a", 1.0), 2.0)], normalize="running")
    other.load_state_dict(reward.state_dict())
    assert other.moments == reward.moments
    with pytest.raises(ValueError, match=r"scorers are \['a'\], not \['b'\]"):
        WeightedReward([(Given("b", 1.0), 1.0)], normalize="running").load_state_dict(reward.state_dict())


def test_a_failed_scorer_fails_its_image_and_no_other():
    nan, inf = float("nan"), float("inf")
    reward = WeightedReward([(Given("a", 1.0, nan, 3.0, 4.0), 1.0), (Given("b", 1.0, 1.0, inf, 1.0), 0.5)], "running")
    total = reward.score(IMAGES[:4], PROMPTS[:4])
    assert total.isfinite().tolist() == [True, False, False, True]
    assert reward.moments["a"][:2] == [3, pytest.approx(8 / 3)]  # NaN is not observed
    zero = WeightedReward([(Given("a", inf, 1.0), 0.0)]).score(IMAGES[:2], PROMPTS[:2])
    assert zero[0].isnan() and zero[1] == 0  # a weight of 0 does not hide it


def test_reference_needs_statistics():
    with pytest.raises(ValueError, match=r"needs the statistics of 'a'.*reward-statistics"):
        WeightedReward([(Given("a", 1.0), 1.0)], "fixed")
    with pytest.raises(ValueError, match="a mean and a positive standard deviation"):
        WeightedReward([(Given("a", 1.0), 1.0)], "fixed", {"a": (0.0, 0.0)})
    reward = WeightedReward([(Given("a", 3.0), 2.0)], "fixed", {"a": (1.0, 4.0)})
    assert reward.score(IMAGES[:1], PROMPTS[:1]).item() == 1.0


def test_scores_of_a_wrong_shape():
    with pytest.raises(ValueError, match=r"scorer 'a' returned scores \(2,\), expected \(3,\)"):
        WeightedReward([(Given("a", 1.0, 2.0), 1.0)]).score(IMAGES[:3], PROMPTS[:3])


def test_user_supplied_functions(tmp_path, monkeypatch):
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    reward = load_reward({str(file): 1.0, f"{file}:length": 0.5})
    parts = reward.components(IMAGES, PROMPTS)
    torch.testing.assert_close(parts["mine"], IMAGES.mean((1, 2, 3)))
    assert parts["length"].tolist() == [8.0] * 6
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_reward(str(tmp_path / "other.py"))
    with pytest.raises(ValueError, match="has no function 'sharpness': define sharpness"):
        load_reward(f"{file}:sharpness")
    point = SimpleNamespace(name="installed", load=lambda: lambda images, prompts: [2.0] * len(prompts))
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    assert load_reward("installed").score(IMAGES, PROMPTS).tolist() == [2.0] * 6
    with pytest.raises(ValueError, match=r"unknown reward 'pickscor'; did you mean 'pickscore'.*'installed'"):
        load_reward("pickscor")


def test_reward_files(tmp_path):
    path = tmp_path / "reward.yaml"
    path.write_text("weights: {brightness: 2.0}\nnormalize: fixed\nstatistics: {brightness: [0.5, 0.1]}\n")
    torch.testing.assert_close(load_reward(str(path)).score(IMAGES, PROMPTS), 20 * (IMAGES.mean((1, 2, 3)) - 0.5))
    path.write_text("weights: {pickscore: 1.0}\noptions: {pickscore: {dtype: float16, preprocess: tensor}}\n")
    assert load_reward(str(path)).rewards[0][0].dtype == torch.float16
    assert load_reward(str(path), options={"pickscore": {"dtype": "bfloat16"}}).rewards[0][0].dtype == torch.bfloat16
    path.write_text("weigths: {brightness: 1.0}\n")
    with pytest.raises(ValueError, match="unknown key 'weigths'; did you mean 'weights'"):
        load_reward(str(path))
    path.write_text("weights: {brightness: 1.0}\nnormalize: standard\n")
    with pytest.raises(ValueError, match=r"normalize .*'standard'"):
        load_reward(str(path))
    path.write_text("normalize: none\n")
    with pytest.raises(ValueError, match="'weights' is missing"):
        load_reward(str(path))
    with pytest.raises(FileNotFoundError, match="no such reward file"):
        load_reward(str(tmp_path / "none.yaml"))
    with pytest.raises(ValueError, match=r"options for \['mps'\], which the reward does not use"):
        load_reward("brightness", options={"mps": {"device": "cpu"}})
    with pytest.raises(ValueError, match="reward 'brightness'"):
        load_reward("brightness", options={"brightness": {"size": 3}})
    with pytest.raises(ValueError, match="unknown backend"):
        load_reward("brightness", options={"brightness": {"backend": "remote"}})


def test_reference_statistics_are_measured_and_used(tmp_path):
    out = tmp_path / "reward.yaml"
    asked = tmp_path / "asked.yaml"
    asked.write_text("weights: {shapes-match: 1.0, brightness: 0.5}\n")
    main([str(asked), "--denoiser", "shapes-turbo", "--num-prompts", "40", "--output", str(out)])
    written = yaml.safe_load(out.read_text())
    assert written["normalize"] == "fixed" and written["measured"]["prompts"] == 40
    again = measure(StatisticsConfig(str(asked), denoiser="shapes-turbo", num_prompts=40, batch_size=7))
    for name, (mean, std) in again.statistics.items():
        assert written["statistics"][name] == pytest.approx([mean, std], abs=1e-4)
    assert 0.2 < written["statistics"]["shapes-match"][0] < 0.6  # the student on captions of all kinds
    assert load_reward(str(out)).statistics["brightness"] == tuple(written["statistics"]["brightness"])
    constant = tmp_path / "constant.py"
    constant.write_text("def score(images, prompts):\n    return [1.0] * len(prompts)\n")
    with pytest.raises(ValueError, match="the same score"):
        measure(StatisticsConfig(str(constant), denoiser="shapes-turbo", num_prompts=3))


def test_finite_episodes():
    nan = float("nan")
    rewards, groups = torch.tensor([1.0, nan, 2.0, 3.0, nan, 4.0]), torch.tensor([0, 0, 1, 1, 1, 2])
    assert finite_episodes(rewards, groups).tolist() == [
        2,
        3,
        5,
    ]  # episode 0 lost its only partner; episode 5 never had one
    with pytest.raises(ValueError, match="no episode of this update has a finite reward"):
        finite_episodes(torch.tensor([nan, nan]), groups[:2])
    kept = finite_episodes(rewards, groups)[:2]
    assert group_advantages(rewards[kept], groups[kept], "rloo").tolist() == [-1.0, 1.0]


class Moody(toys.Target):
    """Fails on every image whose brightest pixel is above 2.5, otherwise like ``Target``."""

    name = "moody"

    def score(self, images, prompts):
        return torch.where(images.amax((1, 2, 3)) > 2.5, torch.nan, super().score(images, prompts))


@pytest.mark.parametrize("algorithm", [ppo, reinforce])
def test_dropped_episodes_are_counted_and_do_no_harm(algorithm, tmp_path):
    config = {ppo: ppo.PPOConfig, reinforce: reinforce.ReinforceConfig}[algorithm]
    small = NoiseARConfig(d_model=32, d_ff=32, n_layers=1, log_variance="fixed")
    options = {"updates": 25, "prompts_per_update": 2, "samples_per_prompt": 64, "policy": small}
    policy = algorithm.train(config(env_id=toys.register(Moody()), output_dir=tmp_path, **options))
    assert all(parameter.isfinite().all() for parameter in policy.parameters())
    records = read_records(tmp_path)
    assert all(0 < record["charts/dropped_episodes"] < 128 for record in records[:5])
    assert all(np.isfinite(value) for record in records for value in record.values())
    last = np.mean([record["charts/episodic_return"] for record in records[-3:]])
    assert toys.progress(Moody(), last) > 0.6


def test_rollouts_leave_failures_out(tmp_path):
    options = {"num_prompts": 2, "samples_per_prompt": 40, "prompts_per_shard": 1}
    collect(CollectConfig(toys.register(Moody()), output_dir=tmp_path, **options))
    rollouts = load_rollouts(tmp_path)
    assert np.isfinite(rollouts.rewards).all() and 0 < rollouts.dropped < 80
    assert len(rollouts.dataset) + rollouts.dropped == 80 and len(rollouts.patches()) == len(rollouts.rewards)


def test_reward_gradient_leaves_failures_out(tmp_path):
    file = tmp_path / "fails.py"
    file.write_text(
        "import torch\n\ndef score(images, prompts):\n    brightness = images.mean((1, 2, 3))\n"
        "    return torch.where(brightness > brightness.detach().median(), torch.nan, -brightness)\n"
    )
    config = reward_gradient.RewardGradientConfig(
        reward=str(file), output_dir=tmp_path / "run", prompts_per_update=2, samples_per_prompt=4, updates=2
    )
    policy = reward_gradient.train(dataclasses.replace(config, denoiser="shapes-turbo"))
    assert all(parameter.isfinite().all() for parameter in policy.parameters())
    assert [record["charts/dropped_episodes"] for record in read_records(tmp_path / "run")] == [4, 4]


def test_running_statistics_resume_exactly_and_are_refused_for_rollouts(tmp_path):
    file = tmp_path / "reward.yaml"
    file.write_text("weights: {brightness: 1.0}\nnormalize: running\n")
    config = reinforce.ReinforceConfig(
        env_id="NoiseAR-ShapesTurbo-v0", reward=str(file), prompts_per_update=2, samples_per_prompt=4, save_every=1
    )
    whole = reinforce.train(dataclasses.replace(config, output_dir=tmp_path / "a", updates=3))
    resumed = kill_and_resume(reinforce.train, dataclasses.replace(config, output_dir=tmp_path / "b", updates=3))
    assert_same_run(whole, resumed, tmp_path / "a", tmp_path / "b")
    with pytest.raises(ValueError, match="running statistics depend on earlier rollouts"):
        collect(CollectConfig("NoiseAR-ShapesTurbo-v0", reward=str(file), output_dir=tmp_path / "c"))


def test_config_round_trip():
    assert reward_config({"brightness": 1}) == RewardConfig({"brightness": 1.0})
    assert reward_config("mps") == RewardConfig({"mps": 1.0})
