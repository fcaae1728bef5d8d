"""The command that trains the embedded denoiser: it resumes exactly, and its export loads."""

import numpy as np
import pytest
import torch

from noisear_rl.denoisers.presets import load_pipeline_denoiser
from noisear_rl.denoisers.shapes import train
from noisear_rl.denoisers.shapes.detectors import load_detector


def test_an_interrupted_stage_resumes_exactly(tmp_path, monkeypatch):
    monkeypatch.setitem(train.STEPS, "toy", 7)

    def run(folder, stop_at=None):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)

        def step(i: int, rng: np.random.Generator) -> torch.Tensor:
            if i == stop_at:
                raise KeyboardInterrupt
            x = torch.from_numpy(rng.standard_normal((8, 3))).float()
            return (model(x) - x.sum(1, keepdim=True)).square().mean()

        folder.mkdir(exist_ok=True)
        return train.fit("toy", model, step, folder=folder, learning_rate=0.1, seed=0, save_every=3)

    whole = run(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", stop_at=5)
    resumed = run(tmp_path / "b")
    assert torch.equal(whole.weight, resumed.weight) and not whole.training


@pytest.mark.slow
def test_every_stage_runs_and_the_export_loads(tmp_path, monkeypatch):
    """Fifty steps per stage: enough to show that the parts fit together, not that they learn."""
    monkeypatch.setattr(train, "STEPS", dict.fromkeys(train.STEPS, 50))
    monkeypatch.setattr(train, "UNET_IMAGES", 256)
    train.main(["all", "--output-dir", str(tmp_path / "run"), "--assets", str(tmp_path / "assets")])
    denoiser = load_pipeline_denoiser(str(tmp_path / "assets/pipeline"), num_inference_steps=2)
    images = denoiser.denoise(torch.randn(1, 4, 8, 8), denoiser.encode(["a photo of a circle"]))
    assert images.shape == (1, 3, 64, 64) and images.isfinite().all()
    for judge in ("train_detector", "held_out_detector"):
        assert load_detector(tmp_path / "assets" / judge).detect(images).shape.shape == (1, 6)
    assert "| unet |" in (tmp_path / "assets/training.md").read_text()
