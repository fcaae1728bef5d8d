"""Every algorithm solves problems with known optima: bandits with small and large patches, memory, prompts.

Progress is 0 for Gaussian noise and 1 at the optimum; see ``toys.py``.
"""

import pytest

from noisear_rl.algos import dpo, ppo, reinforce
from noisear_rl.algos.collect import CollectConfig, collect
from noisear_rl.data.rollouts import load_rollouts
from noisear_rl.learning.records import read_records
from noisear_rl.policy import NoiseARConfig
from tests import toys

SMALL, LARGE = {"latent_shape": (1, 8, 4), "patch_size": 4}, {"latent_shape": (1, 128, 64), "patch_size": 64}
POLICY = NoiseARConfig(d_model=32, d_ff=64, n_layers=1, log_variance="fixed")
ON_POLICY = {"reinforce": (reinforce.train, reinforce.ReinforceConfig), "ppo": (ppo.train, ppo.PPOConfig)}


def learn(folder, algorithm, reward, sizes, **options):
    """Trains on policy; progress of the last three updates, and all records."""
    train, config = ON_POLICY[algorithm]
    options = {"policy": POLICY} | options
    train(config(toys.register(reward, **sizes), output_dir=folder, prompts_per_update=2, **options))
    records = read_records(folder)
    returns = [record["charts/episodic_return"] for record in records]
    return toys.progress(reward, sum(returns[-3:]) / 3), records


@pytest.mark.parametrize("algorithm", ON_POLICY)
def test_bandit_with_16_elements_a_patch(tmp_path, algorithm):
    options = {"samples_per_prompt": 32, "updates": 15, "target_kl": 0.5}
    progress, records = learn(tmp_path, algorithm, toys.Target(), SMALL, **options)
    assert progress > 0.9, records
    assert toys.progress(toys.Target(), records[0]["charts/episodic_return"]) < 0.2


@pytest.mark.parametrize("algorithm", ON_POLICY)
def test_bandit_with_4096_elements_a_patch(tmp_path, algorithm):
    """Fixed steps: 128 images in 8,192 dimensions say so little that adaptive ones would still be small."""
    options = {"samples_per_prompt": 64, "updates": 24, "step": "fixed", "target_kl": 1.5, "fisher_episodes": 64}
    progress, records = learn(tmp_path, algorithm, toys.Target(), LARGE, **options)
    assert progress > 0.9, records


@pytest.mark.parametrize("algorithm", ON_POLICY)
def test_second_patch_depends_on_the_first(tmp_path, algorithm):
    """Without memory the best is -5; beyond it the prefix must have been used."""
    options = {"samples_per_prompt": 128, "updates": 15, "target_kl": 0.5}
    progress, records = learn(tmp_path, algorithm, toys.Echo(), SMALL, **options)
    assert progress > 0.9, records


@pytest.mark.parametrize("algorithm", ON_POLICY)
def test_patch_depends_on_the_prompt(tmp_path, algorithm):
    """Without the prompt the best is -5, half of the prompts wanting the opposite of the other half."""
    options = {"samples_per_prompt": 64, "updates": 15, "target_kl": 0.5}
    progress, records = learn(tmp_path, algorithm, toys.Obey(), SMALL, **options)
    assert progress > 0.9, records


def test_ppo_with_a_critic_learns_and_its_first_ratio_is_1(tmp_path):
    options = {"samples_per_prompt": 64, "updates": 20, "target_kl": 0.5, "advantage": "gae", "minibatches": 2}
    progress, records = learn(tmp_path, "ppo", toys.Obey(), SMALL, **options)
    assert progress > 0.9, records
    assert all(record["losses/first_ratio"] == pytest.approx(1, abs=1e-4) for record in records)
    assert records[-1]["losses/value_loss"] < records[0]["losses/value_loss"]


def test_ppos_first_ratio_is_exactly_1(tmp_path):
    options = {"samples_per_prompt": 8, "updates": 3, "policy": NoiseARConfig(log_variance="predicted", dropout=0.3)}
    _, records = learn(tmp_path, "ppo", toys.Target(), SMALL, **options)
    assert [record["losses/first_ratio"] for record in records] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("optimizer", ["adam", "adaptive_adam"])
def test_adam_learns_too(tmp_path, optimizer):
    options = {"samples_per_prompt": 64, "updates": 40, "optimizer": optimizer, "learning_rate": 3e-3}
    progress, records = learn(tmp_path, "ppo", toys.Target(), SMALL, **options)
    assert progress > 0.5, records


@pytest.mark.parametrize(
    ("sizes", "prompts", "limit", "patience"),
    [(SMALL, 128, 2.0, 10), pytest.param(LARGE, 512, 3.0, 0, marks=pytest.mark.slow)],
    ids=["16", "4096"],
)
def test_dpo_on_rollouts_solves_the_bandit(tmp_path, sizes, prompts, limit, patience):
    """Four rounds of collecting and training, each at most a few nats from where it began.

    With 4,096 elements a pair carries little information: the last policy of a round is better than the one that ranks
    51 held-out pairs best.
    """
    names = tuple(f"prompt {i}" for i in range(prompts))
    env_id = toys.register(toys.Target(), **sizes, prompts=names)
    collecting = {"num_prompts": prompts, "samples_per_prompt": 8, "prompts_per_shard": prompts}
    collect(CollectConfig(env_id, output_dir=tmp_path / "rollouts", **collecting))
    options = {"optimizer": "natural", "target_kl": limit / 3, "max_kl": limit, "evaluate_every": 1}
    config = dpo.DPOConfig(
        tmp_path / "rollouts",
        output_dir=tmp_path / "dpo",
        threshold=0.0,
        rounds=4,
        batch_size=512,
        patience=patience,
        **options,
    )
    dpo.iterate(config, toys.NoDenoiser(**sizes))
    collect(CollectConfig(env_id, policy=str(tmp_path / "dpo" / "round-3"), output_dir=tmp_path / "end", **collecting))
    before, after = (load_rollouts(tmp_path / name).rewards.mean() for name in ("rollouts", "end"))
    assert toys.progress(toys.Target(), before) < 0.2
    assert toys.progress(toys.Target(), after) > 0.9, (before, after)
