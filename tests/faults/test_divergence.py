"""Trainings that blow up: no NaN is saved, updates that ruin a policy are undone, and runs that do not recover end."""

import copy
import json
import warnings
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch

from noisear_rl import cli
from noisear_rl.algos import nll, ppo
from noisear_rl.checkpoints import list_checkpoints, load_state
from noisear_rl.learning.guards import IN_A_ROW, WINDOW, CollapseWatch, DivergedError, Guard
from noisear_rl.learning.losses import group_advantages, standardized
from noisear_rl.learning.natural_gradient import PolicyOptimizer
from noisear_rl.learning.records import read_records
from noisear_rl.learning.run import Counters, Run
from noisear_rl.policy import load_policy
from noisear_rl.rewards import WeightedReward
from noisear_rl.samplers.npnet import load_npnet
from tests import toys
from tests.conftest import random_policy
from tests.learning.test_run import Options
from tests.resuming import assert_same_run
from tests.training_runs import SMALL, prepare, trainings

TINY = {"n_layers": 1, "d_model": 16, "d_ff": 16, "n_heads": 2}
skips = pytest.mark.filterwarnings("ignore:update .* was skipped")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pairs and rollouts of the tiny trainings."""
    folder = tmp_path_factory.mktemp("data")
    prepare(folder)
    return folder


# Every algorithm at a learning rate that ruins its network, and how many updates it takes to notice.
RUINOUS = {
    "nll": {"learning_rate": 1e30, "save_every": 500},
    "npnet": {"learning_rate": 1e30, "save_every": 500},
    "dpo": {"learning_rate": 1e3},
    "dpo-aot": {"learning_rate": 1e25},
    "ppo-adam": {"learning_rate": 1e3, "minibatches": 1},
    "ppo-gae": {"learning_rate": 1e25},
    "reinforce-running": {"learning_rate": 1e3},
    "trajectory-balance": {"learning_rate": 1e3, "optimizer": "adam"},
    "reward-gradient": {"learning_rate": 1e3, "optimizer": "adam"},
}


@skips
@pytest.mark.parametrize("name", RUINOUS)
def test_a_training_that_blows_up_ends(name, data, tmp_path):
    """With a diagnosis; what is saved is whole and finite."""
    with pytest.raises(DivergedError, match=r"training diverged: .*Lower (learning_rate|target_kl)"):
        trainings(data, 24)[name](tmp_path, **RUINOUS[name])
    load = load_npnet if name == "npnet" else load_policy
    for checkpoint in list_checkpoints(tmp_path):
        network = load(checkpoint)
        assert all(value.isfinite().all() for value in network.state_dict().values())
        if name != "npnet":  # every update was undone
            assert not (network.sample(torch.zeros(1, 2, network.config.text_dim), seeds=[0]).patches.abs() > 10).any()
    records = read_records(tmp_path) if (tmp_path / "metrics.jsonl").exists() else []
    if name.startswith(("ppo", "reinforce", "trajectory", "reward")):
        assert [record["charts/skipped_updates"] for record in records] == list(range(1, IN_A_ROW))
        assert {record["losses/approx_kl"] for record in records} == {0.0}


@skips
@pytest.mark.parametrize("when", ["saved", "last"])
def test_nll_saves_no_policy_without_a_loss(when, data, tmp_path):
    """A finite policy whose loss is not is refused where it would be saved."""
    options = {"learning_rate": 1e18, "save_every": 1 if when == "saved" else 500}
    with pytest.raises(DivergedError, match="training diverged"):
        trainings(data, 6)["nll"](tmp_path, **options)
    assert not list_checkpoints(tmp_path)


def test_exit_code_2(data, tmp_path):
    options = [f"--pairs={data / 'pairs'}", "--denoiser=shapes-turbo", "--learning-rate=1e30", "--batch-size=9"]
    options += ["--policy.n-layers=1", "--policy.d-model=16", "--policy.n-heads=2", f"--output-dir={tmp_path}"]
    with pytest.raises(SystemExit, match="noisear nll: training diverged") as stop, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cli.main(["nll", *options])
    assert stop.value.code == 2 and not list_checkpoints(tmp_path)


def ruined(folder, value):
    policy = random_policy(**TINY)
    with torch.no_grad():
        list(policy.parameters())[-1].view(-1)[3] = value
    policy.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_policies_that_are_not_finite(value, tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path}/model\.safetensors holds NaN or infinite values in 'network\."):
        load_policy(ruined(tmp_path, value))
    run = Run(tmp_path / "run", Options())
    policy = random_policy(**TINY)
    run.save(policy, Counters(1))
    for parameter in policy.parameters():
        parameter.data.fill_(value)
    with pytest.raises(ValueError, match="update 2 is not saved: the network holds NaN or infinite"):
        run.save(policy, Counters(2))
    with pytest.raises(ValueError, match="update 2 is not saved: best holds NaN or infinite"):
        run.save(random_policy(**TINY), Counters(2), best=policy)
    run.close()
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-000001"]
    with pytest.raises(ValueError, match="holds NaN"):
        Guard(policy, Counters())


@skips
def test_losses_that_are_not_finite(data, tmp_path, monkeypatch):
    """NLL skips and counts such updates, and learns from the others."""
    true_loss, calls = nll.nll_loss, []

    def broken(distribution, target, noise_scale):
        loss = true_loss(distribution, target, noise_scale)
        calls.append(loss.requires_grad)
        return loss * (float("nan") if loss.requires_grad and sum(calls) in (4, 5, 9) else 1.0)

    monkeypatch.setattr(nll, "nll_loss", broken)
    trainings(data, 12)["nll"](tmp_path, log_every=1)
    records = read_records(tmp_path)
    assert [record["charts/skipped_updates"] for record in records] == [0, 0, 0, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    held_out = [record["losses/nll_held_out"] for record in records]
    assert held_out[3] == held_out[4] == held_out[2] > held_out[-1] and np.isfinite(held_out).all()


@skips
def test_an_update_is_undone_exactly(data, tmp_path, monkeypatch):
    """PPO whose third update has NaN in its loss: policy and Adam are those of two updates, and it resumes exactly."""
    true_loss, updates = ppo.ppo_loss, []

    def broken(log_prob, *rest):
        updates.append(len(updates))
        loss = true_loss(log_prob, *rest)
        return loss * float("nan") if len(updates) == 3 else loss

    monkeypatch.setattr(ppo, "ppo_loss", broken)
    options = {"epochs": 1, "save_every": 1, "samples_per_prompt": 3}
    train = lambda name, updates, **more: trainings(data, updates)["ppo-gae"](tmp_path / name, **options, **more)
    train("a", 4)
    two, three = (load_state(tmp_path / f"a/checkpoints/step-00000{step}") for step in (2, 3))
    assert three["counters"]["skipped"] == three["counters"]["skipped_in_a_row"] == 1
    for key, values in two["optimizer"]["state"].items():
        for name, value in values.items():
            assert torch.equal(value, three["optimizer"]["state"][key][name])
    before, after = (load_policy(tmp_path / f"a/checkpoints/step-00000{step}") for step in (2, 3))
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    records = read_records(tmp_path / "a")
    assert [record["charts/skipped_updates"] for record in records] == [0, 0, 1, 1]
    updates.clear()
    train("b", 3)
    updates.extend(range(3))
    resumed = train("b", 4, resume=True)
    assert_same_run(load_policy(tmp_path / "a"), resumed, tmp_path / "a", tmp_path / "b")


@pytest.mark.filterwarnings("ignore:update .* was skipped")
@pytest.mark.parametrize("kind", ["adam", "adaptive_adam"])
def test_a_step_that_is_undone_leaves_no_trace(kind):
    """Parameters, Adam's moments and the next step are those of a twin that never blew up."""
    policies = [random_policy(scale=0.02, **TINY) for _ in range(2)]
    optimizers = [PolicyOptimizer(policy, kind, target_kl=1e-3, learning_rate=1e-3) for policy in policies]
    guards = [Guard(p, Counters(), o, 0.1) for p, o in zip(policies, optimizers, strict=True)]
    text, patches = torch.randn(4, 2, 256), torch.randn(4, 16, 16)

    def backward(policy):
        policy.zero_grad()
        policy.log_prob(patches, text).mean().backward()

    for policy, guard in zip(policies, guards, strict=True):
        backward(policy)
        assert 0 < guard.step(patches, text, None) < 1
    rate = optimizers[0].learning_rate
    backward(policies[0])
    optimizers[0]._set_learning_rate(10.0)
    guards[0].remember()
    kl = optimizers[0].step(patches, text, None)
    assert kl > 100 and guards[0].settle(kl) == 0.0 and guards[0].counters == Counters(skipped=1, skipped_in_a_row=1)
    slower = optimizers[0].learning_rate
    assert slower < 10 / 1.4 if kind == "adaptive_adam" else slower == 10.0
    optimizers[0]._set_learning_rate(rate)
    for policy, guard in zip(policies, guards, strict=True):
        backward(policy)
        guard.step(patches, text, None)
    assert guards[0].counters == Counters(skipped=1)
    for a, b in zip(policies[0].parameters(), policies[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_gradients_that_are_not_finite():
    for kind in ("adam", "natural"):
        policy = random_policy(**TINY)
        optimizer, before = PolicyOptimizer(policy, kind), copy.deepcopy(policy.state_dict())
        for parameter in policy.parameters():
            parameter.grad = torch.full_like(parameter, float("nan"))
        assert np.isnan(optimizer.step(torch.randn(2, 16, 16), torch.randn(2, 2, 256), None))
        assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


def test_equal_rewards_of_each_prompt_are_no_advantage():
    """Rounding errors of equal rewards are not scaled up, although the rewards of the prompts differ."""
    groups = torch.arange(24) % 3
    for scale in (0.1, 0.7, 123.4):
        rewards = scale * torch.tensor([0.3, 0.7, 0.9])[groups]
        for kind in ("rloo", "grpo"):
            assert group_advantages(rewards + torch.rand(24), groups, kind).abs().min() > 1e-4
            assert not standardized(group_advantages(rewards, groups, kind), rewards).any(), (scale, kind)


def record(**values):
    return {"policy/std": 1.0, "charts/episodic_return": 0.0} | values


def watch_of(**weights):
    scorers = [(SimpleNamespace(name=name, score=None), weight) for name, weight in weights.items()]
    return CollapseWatch(WeightedReward(scorers))


def test_signs_of_collapse():
    watch = watch_of(a=1.0)
    watch.look(record())
    with pytest.warns(UserWarning, match=r"noise fell from 1\.00 to 0\.40: images lose variety; try --policy\.log-var"):
        watch.look(record(**{"policy/std": 0.4}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch.look(record(**{"policy/std": 0.3}))  # said already
        for _ in range(IN_A_ROW - 1):
            watch.look(record(), torch.zeros(4))
        watch.look(record(), torch.ones(4))
        for _ in range(IN_A_ROW - 1):
            watch.look(record(), torch.zeros(4))
    with pytest.warns(UserWarning, match="did not differ in 10 updates in a row.*try more samples"):
        watch.look(record(), torch.zeros(4))


@pytest.mark.parametrize(("weight", "falls"), [(0.0, True), (0.0, False), (1.0, True)])
def test_a_reward_that_is_exploited(weight, falls):
    watch, rng = watch_of(a=1.0, judge=weight), np.random.default_rng(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for update in range(3 * WINDOW):
            trend, noise = update / 30, rng.normal(0, 0.2, 2)
            judged = noise[1] - trend if falls else noise[1] + trend
            watch.look(record(**{"charts/episodic_return": trend + noise[0], "reward/judge": judged}))
    said = [str(warning.message) for warning in caught]
    assert len(said) == (1 if falls and not weight else 0)
    assert all("'judge', which is not trained on, falls: the policy exploits its reward" in text for text in said)


def test_held_out_scorers_are_logged_with_weight_0(tmp_path):
    """A scorer of weight 0 is in the records, where the watch finds it, and changes nothing else."""
    env = toys.register(toys.Target())
    gymnasium.registry[env].kwargs["reward"] = WeightedReward([(toys.Target(), 1.0), (toys.Echo(), 0.0)])
    options = {"updates": 2, "prompts_per_update": 2, "samples_per_prompt": 4, "policy": SMALL}
    ppo.train(ppo.PPOConfig(env, output_dir=tmp_path, **options))
    assert all("reward/echo" in record for record in read_records(tmp_path))
    for found in read_records(tmp_path):
        assert found["charts/episodic_return"] == pytest.approx(found["reward/target"])
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["charts/skipped_updates"] == 0
