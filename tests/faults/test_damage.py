"""Flipped bytes, cut and missing files: what is read is what was written, or an error names the file."""

import json
import os
import random
import shutil
import warnings

import numpy as np
import pytest
import torch

from noisear_rl import cli
from noisear_rl.checkpoints import list_checkpoints
from noisear_rl.data.pairs import PAIR_FEATURES, load_pairs
from noisear_rl.data.rollouts import load_rollouts, rollout_features
from noisear_rl.data.shards import shard_file, write_shard
from noisear_rl.evaluation.results import load_results, to_record
from noisear_rl.files import check_manifest, read_entries, read_manifest
from noisear_rl.integrity import DamagedError
from noisear_rl.learning.records import read_records
from noisear_rl.learning.run import Counters, Run
from noisear_rl.policy import load_policy
from noisear_rl.report.publishing import evaluation_section
from noisear_rl.samplers.shared_noise import SharedNoises
from tests.conftest import random_policy
from tests.learning.test_run import Options

SIZES = {"n_layers": 1, "d_model": 16, "d_ff": 16, "n_heads": 2}
ROWS = {"prompt": ["a", "b"] * 4, "seed": list(range(8))}


def write_run(folder, steps=(1, 2, 3)):
    """A run folder with one checkpoint per step; returns the policies."""
    run, policies = Run(folder, Options()), {}
    for step in steps:
        policies[step] = random_policy(step, **SIZES)
        optimizer = torch.optim.Adam(policies[step].parameters(), lr=0.01)
        policies[step].log_prob(torch.randn(2, 16, 16), torch.randn(2, 16, 256)).sum().backward()
        optimizer.step()
        run.log({"charts/episodic_return": float(step % 3)}, step)
        run.save(policies[step], Counters(step), optimizer=optimizer)
    run.close()
    return policies


def resume(folder):
    """What a resumed run starts from."""
    policy = random_policy(**SIZES)
    optimizer = torch.optim.Adam(policy.parameters())
    run = Run(folder, Options(), resume=True)
    try:
        counters = run.load(policy, optimizer=optimizer)
    finally:
        run.close()
    return policy, optimizer, counters


def same_policy(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def make_checkpoint(folder):
    write_run(folder, (1,))
    return list_checkpoints(folder)[0]


def make_pairs(folder):
    rng = np.random.default_rng(0)
    check_manifest(folder, {"denoiser": "shapes", "noise_scale": 0.0, "seed": 0, "latent_shape": [1, 4, 4]})
    for shard in range(2):
        targets = list(rng.standard_normal((8, 16)).astype(np.float16))
        write_shard(folder, shard, ROWS | {"target": targets}, PAIR_FEATURES)
    return folder


def make_rollouts(folder):
    rng = np.random.default_rng(0)
    manifest = {"denoiser": "shapes", "latent_shape": [1, 4, 4], "patch_size": 2, "rollouts": 8, "text_shape": [2, 8]}
    check_manifest(folder, manifest)
    rows = {"noise": list(rng.standard_normal((8, 16)).astype(np.float16)), "reward": rng.random(8).tolist()}
    rows |= {"log_prob": list(rng.standard_normal((8, 4)).astype(np.float32)), "denoise_seed": list(range(8))}
    write_shard(folder, 0, ROWS | rows | {"reward/x": rng.random(8).tolist()}, rollout_features(["x"], False))
    return folder


def make_choice(folder):
    rng = torch.Generator().manual_seed(0)
    noises, weights = torch.randn(2, 1, 4, 4, generator=rng), torch.randn(3, 2, generator=rng)
    SharedNoises(noises, weights, ["a", "b", "c"], "denoiser", "shapes").save(folder)
    return folder


def read_choice(folder):
    found = SharedNoises.load(folder)
    return found.noises.tolist(), found.weights.tolist(), found.tried, found.text_encoder, found.denoiser


def make_provenance(folder):
    write_run(folder, (1,))
    return folder


def make_evaluation(folder):
    options = ["--denoiser", "shapes-turbo", "--samples", "2", "--num-prompts", "6", "--batch-size", "6"]
    cli.main(["evaluate", *options, "--scorers", "shapes-match", "brightness", "--output-dir", str(folder)])
    return folder


def read_checkpoint(folder):
    policy, optimizer, counters = resume(folder.parents[1])
    return [p.tolist() for p in (*policy.parameters(), *(s["exp_avg"] for s in optimizer.state.values()))], counters


def read_rollouts(folder):
    rollouts = load_rollouts(folder)
    return rollouts.dataset.to_dict(), rollouts.manifest


KINDS = {
    "checkpoint": (make_checkpoint, read_checkpoint),
    "pairs": (make_pairs, lambda folder: (load_pairs(folder).to_dict(), read_manifest(folder))),
    "rollouts": (make_rollouts, read_rollouts),
    "choice": (make_choice, read_choice),
    "provenance": (make_provenance, lambda folder: read_entries(folder / "provenance.json")),
    "records": (lambda folder: write_run(folder) and folder, read_records),
    "evaluation": (make_evaluation, lambda folder: to_record(load_results(folder))),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A folder of every kind, made once, with what reading it gives."""
    found = {}
    for kind, (make, read) in KINDS.items():
        folder = make(tmp_path_factory.mktemp(kind) / "it")
        found[kind] = folder, read(folder)
    return found


def files_of(kind, folder):
    """What is read of a folder."""
    if kind == "records":
        return [folder / "metrics.jsonl"]
    if kind == "provenance":
        return [folder / "provenance.json"]
    if kind == "evaluation":
        return [folder / "results.json", folder / "timing.json", folder / "checksums/results.json"]
    skipped = {".lock"}
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in skipped)


def flip_bytes(kind, original, expected, count, seed):
    """Flips one byte after the other; returns how many were reported and how many changed nothing."""
    rng, read = random.Random(f"{kind} {seed}"), KINDS[kind][1]
    files, reported, harmless = files_of(kind, original), 0, 0
    for i in range(count):
        file = files[i % len(files)]
        content = file.read_bytes()
        at, bit = rng.randrange(len(content)), 1 << rng.randrange(8)
        file.write_bytes(content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :])
        try:
            found = read(original)
        except (OSError, ValueError) as error:  # what commands show without a traceback
            owner = original if "checksums" in str(file.relative_to(original.parents[1])) else file
            assert str(owner) in str(error), (file, at, bit, error)
            reported += 1
        else:
            assert repr(found) == repr(expected), f"{file}: bit {bit} of byte {at} changed silently what is read"
            harmless += 1
        finally:
            file.write_bytes(content)
    return reported, harmless


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bytes(kind, originals):
    original, expected = originals[kind]
    reported, harmless = flip_bytes(kind, original, expected, count=30, seed=0)
    assert reported >= 20


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_many_flipped_bytes(kind, originals):
    original, expected = originals[kind]
    reported, harmless = flip_bytes(kind, original, expected, count=200, seed=1)
    print(f"\nflipped bytes, {kind}: 200, reported {reported}, without effect {harmless}, silent 0")


def cut(file):
    file.write_bytes(file.read_bytes()[:-7])


def flip(file):
    content = file.read_bytes()
    file.write_bytes(content[:60] + bytes([content[60] ^ 1]) + content[61:])


@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", cut),
        ("model.safetensors", lambda file: file.unlink()),
        ("state.pt", cut),
        ("state.pt", lambda file: file.write_bytes(b"")),
        ("config.json", lambda file: file.write_text("{")),
        ("model.safetensors", flip),
        ("state.pt", flip),
        ("", lambda folder: [file.unlink() for file in folder.iterdir()]),
    ],
)
def test_resumption_falls_back_to_the_newest_whole_checkpoint(name, damage, checksums, tmp_path):
    policies = write_run(tmp_path)
    newest = list_checkpoints(tmp_path)[-1]
    if not checksums:
        for checkpoint in list_checkpoints(tmp_path):
            (checkpoint / "checksums.json").unlink()  # as earlier versions wrote them
    damage(newest / name)
    if not checksums and damage is flip:
        pytest.skip("without checksums a flipped byte cannot be told")
    with pytest.warns(UserWarning, match=rf"{newest}.*Going on from step-000002") as caught:
        policy, _, counters = resume(tmp_path)
    assert len(caught) == 1 and counters.step == 2 and same_policy(policy, policies[2])
    assert [record["step"] for record in read_records(tmp_path)] == [1, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resume(tmp_path)[2].step == 2  # the damaged one was moved aside
    assert (tmp_path / "checkpoints/damaged-step-000003").is_dir()


def test_no_whole_checkpoint(tmp_path):
    write_run(tmp_path, (1,))
    cut(list_checkpoints(tmp_path)[0] / "state.pt")
    with pytest.raises(DamagedError, match=r"no checkpoint of .* is whole: .*state\.pt: damaged: \d+ bytes instead of"):
        resume(tmp_path)


def test_verification_can_be_switched_off(tmp_path, monkeypatch):
    write_run(tmp_path, (1,))
    file = list_checkpoints(tmp_path)[0] / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DamagedError, match=r"model\.safetensors: damaged: its SHA-256"):
        load_policy(tmp_path)
    monkeypatch.setenv("NOISEAR_VERIFY", "0")
    load_policy(tmp_path)


def test_a_replaced_shard_is_read_anew(tmp_path):
    """Same path, same size, same time: a cache by these would give the old rows."""
    first, second = make_pairs(tmp_path / "a"), tmp_path / "b"
    stat = shard_file(first, 0).stat()
    assert load_pairs(first)["seed"][:8] == list(range(8))
    write_shard(
        second, 0, ROWS | {"seed": list(range(8, 16)), "target": load_pairs(first)["target"][:8]}, PAIR_FEATURES
    )
    for name in ("shard-00000.parquet", "checksums/shard-00000.json"):
        shutil.copy(second / name, first / name)
    os.utime(shard_file(first, 0), ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert load_pairs(first)["seed"][:8] == list(range(8, 16))


def test_a_checksum_whose_name_is_damaged(tmp_path):
    make_provenance(tmp_path)
    file = tmp_path / "provenance.json"
    entries = read_entries(file)
    content = file.read_text()
    file.write_text(content.replace('"sha256"', '"sha:56"'))
    with pytest.raises(ValueError, match=r"provenance\.json is damaged"):
        read_entries(file)
    file.write_text(json.dumps(entries))  # as earlier versions did
    assert read_entries(file) == entries


def test_shards_without_a_manifest_are_not_adopted(tmp_path):
    folder = make_pairs(tmp_path / "a")
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"shard-0000\d\.parquet has no manifest.*choose another output_dir"):
        check_manifest(folder, {"seed": 1})


@pytest.mark.parametrize("name", ["table.md", "results.json"])
def test_a_damaged_table_is_not_published(name, originals, tmp_path):
    folder = tmp_path / "it"
    shutil.copytree(originals["evaluation"][0], folder)
    digest, manifest = "0123", folder / "noise/gaussian/manifest.json"
    manifest.unlink()
    check_manifest(manifest.parent, {"method": "Gaussian", "is": [digest]})  # as if it were a policy
    assert evaluation_section(folder, digest).strip().endswith((folder / "table.md").read_text().strip())
    flip(folder / name)
    with pytest.raises(DamagedError, match=rf"{folder}/{name}: damaged: its SHA-256.*run the same `noisear evaluate`"):
        evaluation_section(folder, digest)


def test_damaged_images_are_not_scored(originals, tmp_path):
    folder = tmp_path / "it"
    shutil.copytree(originals["evaluation"][0], folder)
    shutil.rmtree(folder / "scores")
    image = sorted(folder.glob("images/*/*.png"))[0]
    flip(image)
    with pytest.raises(SystemExit, match=rf"{image}: damaged.*remove .*safetensors and run the same command again"):
        make_evaluation(folder)
    for file in folder.glob("noise/*/00000.safetensors"):
        file.unlink()
    make_evaluation(folder)
    assert to_record(load_results(folder))["methods"] == originals["evaluation"][1]["methods"]
