"""Rollouts on disk, preference pairs, and rejected input."""

import json
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset

from noisear_rl.algos import collect as collecting
from noisear_rl.algos.collect import CollectConfig, collect
from noisear_rl.data.preference_pairs import preference_pairs
from noisear_rl.data.rollouts import Rollouts, load_rollouts
from noisear_rl.data.shards import shard_file
from noisear_rl.patches import patchify
from noisear_rl.policy import NoiseARConfig, load_policy, policy_sha256
from tests import toys
from tests.conftest import random_policy
from tests.launching import launch

TURBO = "NoiseAR-ShapesTurbo-v0"


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    random_policy().save_pretrained(folder)
    return folder


def config(folder, policy, **options):
    defaults = {"num_prompts": 5, "samples_per_prompt": 4, "prompts_per_shard": 2, "seed": 3}
    return CollectConfig(TURBO, policy=str(policy), output_dir=folder, **(defaults | options))


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory, policy_folder):
    folder = tmp_path_factory.mktemp("rollouts")
    collect(config(folder, policy_folder, save_images=True))
    return folder


def test_rows_are_complete_episodes(rollouts, policy_folder, shapes):
    """Log-probability and reward belong to exactly the stored noise; the last shard is short."""
    loaded = load_rollouts(rollouts)
    policy = load_policy(policy_folder)
    assert len(loaded.dataset) == 20 and len(set(loaded.prompts)) == 5
    assert loaded.manifest["policy_sha256"] == policy_sha256(policy)
    assert [len(Dataset.from_parquet(str(shard_file(rollouts, i)))) for i in range(3)] == [8, 8, 4]
    text = shapes.encode(loaded.prompts)
    patches = loaded.patches().float()
    expected = policy.log_prob(patches, text.policy_embeds, text.policy_mask)
    torch.testing.assert_close(torch.tensor(loaded.dataset["log_prob"]), expected, rtol=1e-4, atol=1e-3)
    task = collecting.make_vector_env(TURBO, 1).task
    noise = torch.tensor(loaded.dataset["noise"]).unflatten(1, (4, 8, 8)).float()
    torch.testing.assert_close(patchify(noise, 2), patches)
    outcome = task.finish(patches, task.denoiser.encode(loaded.prompts), loaded.prompts, range(20))
    np.testing.assert_allclose(outcome.rewards, loaded.rewards, atol=0.05)  # bfloat16, another batch
    assert loaded.dataset[0]["image"].size == (64, 64)
    assert loaded.dataset["reward/shapes-match"] == loaded.dataset["reward"]


def test_interrupted_collection_resumes(tmp_path, policy_folder, rollouts, monkeypatch):
    wanted = config(tmp_path, policy_folder, save_images=True)
    write, written = collecting.write_shard, []

    def killed(folder, index, rows, features):
        if written:
            raise KeyboardInterrupt
        written.append(index)
        write(folder, index, rows, features)

    monkeypatch.setattr(collecting, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        collect(wanted)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="interrupted at 8 of 20 rollouts; run the same collect command"):
        load_rollouts(tmp_path)
    collect(wanted)
    for name in ("prompt", "seed", "noise", "log_prob", "reward"):
        assert load_rollouts(tmp_path).dataset[name] == load_rollouts(rollouts).dataset[name]
    with pytest.raises(ValueError, match=r"other settings \(seed: 3, not 4\)"):
        collect(config(tmp_path, policy_folder, save_images=True, seed=4))


@pytest.mark.slow
def test_several_processes_write_the_same(tmp_path):
    options = ["--env-id", TURBO, "--num-prompts", "5", "--samples-per-prompt", "4", "--prompts-per-shard", "2"]
    for count in (1, 2, 3):
        launch(count, "-m", "noisear_rl.algos.collect", *options, "--output-dir", tmp_path / str(count))
    one, two, three = (load_rollouts(tmp_path / name) for name in ("1", "2", "3"))
    assert one.dataset.to_list() == two.dataset.to_list() == three.dataset.to_list()


def test_processes_started_by_accelerate_share_the_shards(tmp_path, policy_folder, rollouts):
    options = ["--env-id", TURBO, "--num-prompts", "5", "--samples-per-prompt", "4", "--prompts-per-shard", "2"]
    options += ["--policy", policy_folder, "--seed", "3", "--output-dir", tmp_path]
    done = launch(2, "-m", "noisear_rl.algos.collect", *options, by_accelerate=True)
    assert done.stdout.count("20 rollouts of 5 prompts") == 1  # the main process reports
    assert load_rollouts(tmp_path).dataset["noise"] == load_rollouts(rollouts).dataset["noise"]
    np.testing.assert_allclose(load_rollouts(tmp_path).rewards, load_rollouts(rollouts).rewards, atol=1e-3)  # threads


def table(prompts, rewards):
    manifest = {"denoiser": "none", "latent_shape": [1, 2, 2], "patch_size": 1, "text_shape": [2, 8]}
    return Rollouts(Dataset.from_dict({"prompt": prompts, "reward": rewards}), manifest)


def test_best_and_worst_of_each_prompt():
    rollouts = table(["a", "b", "a", "b", "a", "c", "c", "d"], [0.1, 0.5, 0.9, 0.4, 0.2, 0.7, 0.7, 1.0])
    pairs = preference_pairs(rollouts, threshold=0.2)
    assert (pairs.chosen.tolist(), pairs.rejected.tolist()) == ([2], [0])  # b is below, c a tie, d alone
    assert (pairs.prompts, pairs.used, pairs.ties, pairs.below) == (4, 1, 2, 1)
    assert "1 pairs from 1 of 4 prompts, mean margin 0.800; dropped 2 ties and 1 below" in str(pairs)


def test_all_above_margin_never_crosses_prompts():
    rng = np.random.default_rng(0)
    prompts = rng.choice(["a", "b", "c"], 40).tolist()
    rewards = rng.choice([0.0, 0.25, 0.5, 1.0], 40).tolist()
    pairs = preference_pairs(table(prompts, rewards), threshold=0.3, strategy="all_above_margin")
    expected = {
        (i, j) for i in range(40) for j in range(40) if prompts[i] == prompts[j] and rewards[i] - rewards[j] > 0.3
    }
    assert set(zip(pairs.chosen.tolist(), pairs.rejected.tolist(), strict=True)) == expected


def test_no_pair_suggests_a_threshold():
    rollouts = table(["a", "a", "b", "b"], [0.1, 0.3, 0.2, 0.6])
    with pytest.raises(ValueError, match=r"median 0.3 and maximum 0.4 over 2 prompts; try a threshold of 0.15"):
        preference_pairs(rollouts, threshold=3.0)
    assert len(preference_pairs(rollouts, threshold=0.15)) == 2
    with pytest.raises(ValueError, match="all rewards of every prompt are equal"):
        preference_pairs(table(["a", "a"], [0.5, 0.5]))
    with pytest.raises(ValueError, match="unknown strategy"):
        preference_pairs(rollouts, strategy="random")
    with pytest.raises(ValueError, match="at least 0"):
        preference_pairs(rollouts, threshold=float("nan"))


def test_bad_folders(tmp_path, rollouts):
    with pytest.raises(FileNotFoundError, match="holds no rollouts"):
        load_rollouts(tmp_path)
    shutil.copytree(rollouts, tmp_path / "nan")
    file = shard_file(tmp_path / "nan", 0)
    data = Dataset.from_parquet(str(file), keep_in_memory=True)
    file.unlink()
    shutil.rmtree(tmp_path / "nan/checksums")  # what was really written is changed below
    order, features, original = data.column_names, data.features, load_rollouts(rollouts)
    for bad in (1, len(data)):
        rewards = [float("nan")] * bad + data["reward"][bad:]
        changed = data.remove_columns("reward").add_column("reward", rewards).select_columns(order)
        changed.cast(features).to_parquet(file)
        if bad < len(original.dataset):
            assert load_rollouts(tmp_path / "nan").dropped == bad
            np.testing.assert_array_equal(load_rollouts(tmp_path / "nan").rewards, original.rewards[bad:])
    for other in (tmp_path / "nan").glob("shard-*.parquet"):
        shutil.copy(file, other) if other != file else None
    with pytest.raises(ValueError, match=r"none of the \d+ rewards is finite"):
        load_rollouts(tmp_path / "nan")
    shutil.copytree(rollouts, tmp_path / "pairs")
    manifest = json.loads((rollouts / "manifest.json").read_text())
    (tmp_path / "pairs" / "manifest.json").write_text(json.dumps({"denoiser": manifest["denoiser"]}))
    with pytest.raises(ValueError, match="holds no rollouts"):
        load_rollouts(tmp_path / "pairs")


def test_policies_that_do_not_fit(rollouts, policy_folder, tmp_path):
    loaded = load_rollouts(rollouts)
    NoiseARConfig().check_sizes(loaded.policy_sizes, "the rollouts")
    with pytest.raises(ValueError, match="its patch_size is 4, that of the rollouts is 2"):
        NoiseARConfig(patch_size=4).check_sizes(loaded.policy_sizes, "the rollouts")
    with pytest.raises(ValueError, match="its text_dim is 2048, that of the rollouts is 256"):
        NoiseARConfig(text_dim=2048).check_sizes(loaded.policy_sizes, "the rollouts")
    env_id = toys.register(toys.Target())
    with pytest.raises(ValueError, match="another denoiser"):
        collect(CollectConfig(env_id, policy=str(policy_folder), output_dir=tmp_path))
    with pytest.raises(ValueError, match="at least 1"):
        collect(config(tmp_path, policy_folder, samples_per_prompt=0))
