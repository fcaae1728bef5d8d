"""``noisear doctor`` on this machine, with weights in its caches, and with an installation that needs repair."""

from importlib import metadata

import pytest
import torch

from noisear_rl import cli, doctor
from noisear_rl.denoisers.presets import PRESETS


def test_report(capsys):
    cli.main(["doctor"])
    out = capsys.readouterr().out
    for line in (f"  torch                {torch.__version__}", "  shapes               comes with the library"):
        assert f"{line}\n" in out
    assert "shapes/ppo" in out and "noisear demo" in out and all(name in out for name in PRESETS)
    for device in range(torch.cuda.device_count()):
        assert torch.cuda.get_device_name(device) in out


def test_weights_on_disk_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    before = doctor.scorer_weights()
    assert before["pickscore"].startswith("not here: fetched from yuvalkirstain/PickScore_v1/model.safetensors")
    assert before["mps"].startswith("by hand: Download MPS_overall_checkpoint.pth") and "shapes-match" not in before
    repository = tmp_path / "hub/models--yuvalkirstain--PickScore_v1"
    (repository / "snapshots/abc").mkdir(parents=True)
    (repository / "snapshots/abc/model.safetensors").write_bytes(b"")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc")
    head = tmp_path / "torch/hub/checkpoints/sa_0_4_vit_l_14_linear.pth"
    head.parent.mkdir(parents=True)
    head.write_bytes(b"")
    after = doctor.scorer_weights()
    assert after["pickscore"] == "here"
    assert "openai" in after["aesthetic-v1"] and "github.com" not in after["aesthetic-v1"]


def test_missing_and_old_requirements_are_named(monkeypatch, capsys):
    lines = [
        "no-such-package>=3",
        "numpy>=99",
        "torch>=2.7",
        'no-such-extra>=1; extra == "wandb"',
        'ruff; extra == "dev"',
    ]
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    numpy = metadata.version("numpy")
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor"])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert f"repair: numpy {numpy}: pip install 'numpy>=99'" in captured.out
    assert "no-such-package: not installed: pip install 'no-such-package>=3'" in captured.err
    assert "no-such-extra" not in captured.out and "ruff" not in captured.out
