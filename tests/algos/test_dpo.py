"""DPO on collected rollouts: learns, resumes, iterates, takes trl's configuration, refuses what it must."""

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from noisear_rl.algos import dpo
from noisear_rl.algos.collect import CollectConfig, collect
from noisear_rl.algos.dpo import DPOConfig, from_trl
from noisear_rl.data.preference_pairs import preference_pairs
from noisear_rl.data.rollouts import load_rollouts
from noisear_rl.denoisers import load_denoiser
from noisear_rl.gaussian import standard_noise
from noisear_rl.learning.records import read_records
from noisear_rl.learning.run import split_by_prompt
from noisear_rl.policy import NoiseARConfig, NoiseARPolicy, load_policy
from noisear_rl.prompts.reader import PromptReader
from tests.conftest import random_policy
from tests.resuming import assert_same_run, kill_and_resume

TURBO = "NoiseAR-ShapesTurbo-v0"


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollouts")
    collect(CollectConfig(TURBO, output_dir=folder, num_prompts=24, samples_per_prompt=4, prompts_per_shard=24))
    return folder


def config(rollouts, folder, **options):
    defaults = {"threshold": 0.1, "batch_size": 4, "epochs": 4, "evaluate_every": 4, "save_every": 6}
    return DPOConfig(rollouts=rollouts, output_dir=folder, **(defaults | options))


def test_resumed_equals_uninterrupted(tmp_path, rollouts):
    whole = dpo.train(config(rollouts, tmp_path / "a", learning_rate=1e-3))
    resumed = kill_and_resume(dpo.train, config(rollouts, tmp_path / "b", learning_rate=1e-3))
    assert_same_run(whole, resumed, tmp_path / "a", tmp_path / "b")


def test_the_best_policy_on_held_out_pairs_remains(tmp_path, rollouts):
    """A learning rate that overfits: training stops early, and what is saved is the best, not the last."""
    options = {"learning_rate": 3e-3, "epochs": 200, "patience": 3, "evaluate_every": 2}
    policy = dpo.train(config(rollouts, tmp_path, **options))
    logged = read_records(tmp_path)
    accuracies = [record["eval/rewards/accuracies"] for record in logged]
    assert len(logged) < 100
    best = logged[accuracies.index(max(accuracies))]
    assert best["step"] == logged[-4]["step"]
    saved = load_policy(tmp_path)
    for a, b in zip(policy.parameters(), saved.parameters(), strict=True):
        torch.testing.assert_close(a, b)

    # What is saved is the policy of the best evaluation, measured anew, and not the one trained last.
    data = load_rollouts(rollouts)
    pairs = preference_pairs(data, 0.1)
    held_out = np.flatnonzero(np.isin(pairs.chosen, split_by_prompt(data.prompts, 0.1, 0)[1]))
    reader = PromptReader("denoiser", load_denoiser("shapes-turbo"))
    batch = dpo.batch_of(held_out, pairs, data.patches(), data.prompts, reader, "cpu")
    scored, drift = dpo.validate(saved, NoiseARPolicy(saved.config).eval(), [batch])
    assert (scored.chosen_ratio > scored.rejected_ratio).float().mean().item() == pytest.approx(max(accuracies))
    assert drift["policy/kl_to_reference"] == pytest.approx(best["policy/kl_to_reference"], rel=1e-3)
    assert drift["policy/kl_to_reference"] < logged[-1]["policy/kl_to_reference"]
    assert {"rewards/chosen", "rewards/margins", "logps/chosen", "loss"} <= logged[0].keys()


def test_without_patience_the_last_policy_remains(tmp_path, rollouts):
    """So a finished run can go on: one epoch and another equal two, where the reference does not move."""
    options = {"learning_rate": 3e-3, "patience": 0, "evaluate_every": 1, "reference": "gaussian"}
    whole = dpo.train(config(rollouts, tmp_path / "a", epochs=2, **options))
    dpo.train(config(rollouts, tmp_path / "b", epochs=1, **options))
    longer = dpo.train(config(rollouts, tmp_path / "b", epochs=2, resume=True, **options))
    for a, b in zip(whole.parameters(), longer.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_reference_is_frozen_and_starts_equal(tmp_path, rollouts):
    """With a step of size 0 every margin is 0: policy and reference are the same density, whatever the dropout."""
    options = {"policy": NoiseARConfig(dropout=0.5), "learning_rate": 0.0, "epochs": 1, "evaluate_every": 1}
    dpo.train(config(rollouts, tmp_path, **options))
    assert all(record["rewards/margins"] == 0 for record in read_records(tmp_path))
    policy = load_policy(tmp_path)
    text = load_denoiser("shapes-turbo").encode(["a photo of a red circle"]).policy_embeds
    assert policy.kl_divergence(standard_noise([0], (16, 16)), text).sum() == 0


def test_rounds_collect_again(tmp_path, rollouts):
    final = dpo.iterate(config(rollouts, tmp_path, rounds=2, epochs=1))
    again = load_rollouts(tmp_path / "round-1" / "rollouts")
    assert set(again.prompts) == set(load_rollouts(rollouts).prompts)
    assert again.manifest["policy"].endswith("round-0")
    saved = load_policy(tmp_path / "round-1")
    for a, b in zip(final.parameters(), saved.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_takes_trls_configuration(tmp_path, rollouts):
    trl = pytest.importorskip("trl")
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"), loss_type=["robust", "sft"], loss_weights=[1.0, 0.5], beta=0.3,
        label_smoothing=0.1, learning_rate=5e-4, num_train_epochs=1, per_device_train_batch_size=4,
        report_to="none", bf16=False,
    )  # fmt: skip
    ours = from_trl(arguments, rollouts=rollouts, output_dir=tmp_path / "run", threshold=0.1, evaluate_every=1)
    assert (ours.loss_type, ours.loss_weights, ours.beta) == (("robust", "sft"), (1.0, 0.5), 0.3)
    assert (ours.learning_rate, ours.epochs, ours.batch_size) == (5e-4, 1, 4)
    dpo.train(ours)
    first = read_records(tmp_path / "run")[0]  # before any step: policy and reference are the same, every margin is 0
    sft = -first["logps/chosen"] / 16  # per patch
    assert first["rewards/margins"] == 0 and first["charts/learning_rate"] == 5e-4
    assert first["loss"] == pytest.approx(math.log(2) + 0.5 * sft, rel=1e-5)
    with pytest.raises(ValueError, match="f_divergence_type='js_divergence'"):
        from_trl(dataclasses.replace(arguments, f_divergence_type="js_divergence"))


def test_script_runs_in_a_process_of_its_own(tmp_path, rollouts):
    command = [sys.executable, "algos/dpo.py", "--config", "configs/shapes/dpo.yaml", "--rollouts", str(rollouts)]
    options = ["--output-dir", str(tmp_path), "--threshold", "0.1", "--epochs", "1", "--batch-size", "8"]
    result = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    assert "held-out pair accuracy" in result.stdout and "pairs from" in result.stdout
    assert load_policy(tmp_path)


def test_bad_input(tmp_path, rollouts):
    with pytest.raises(ValueError, match="try a threshold of"):
        dpo.train(config(rollouts, tmp_path / "run", threshold=50.0))
    random_policy(patch_size=4).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"its patch_size is 4, that of .*rollouts.* is 2"):
        dpo.train(config(rollouts, tmp_path / "run", init_from=str(tmp_path / "other")))
    with pytest.raises(ValueError, match=r"loss_type must be one of .*, not 'dpo'"):
        dpo.train(config(rollouts, tmp_path / "run", loss_type=("dpo",)))
    with pytest.raises(ValueError, match="reference must be"):
        dpo.train(config(rollouts, tmp_path / "run", reference="none"))
    assert not (tmp_path / "run").exists()  # nothing was begun


def test_sft_and_gaussian_reference(tmp_path, rollouts):
    """The paper's simple NLL of the preferred noise lowers that NLL."""
    dpo.train(config(rollouts, tmp_path, loss_type=("sft",), reference="gaussian", learning_rate=1e-3, epochs=20,
                     patience=100))  # fmt: skip
    logged = read_records(tmp_path)
    assert logged[-1]["logps/chosen"] > logged[0]["logps/chosen"]
