import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from noisear_rl.denoisers import load_denoiser
from noisear_rl.denoisers.shapes.captions import balanced_captions, hard_negative
from noisear_rl.denoisers.shapes.world import render, sample_scenes
from noisear_rl.evaluation.compare import evaluate
from noisear_rl.rewards import WeightedReward, load_reward
from noisear_rl.rewards.shapes import ShapesClip, ShapesExact, ShapesMatch
from noisear_rl.samplers import GAUSSIAN


@pytest.fixture(scope="module")
def drawn():
    import random

    captions = balanced_captions("validation", 300)
    rng = np.random.default_rng(3)
    images = render(sample_scenes(captions, rng), rng)
    negatives = [hard_negative(caption, random.Random(i)).text for i, caption in enumerate(captions)]
    return images, [caption.text for caption in captions], negatives


@pytest.mark.parametrize(("scorer", "share"), [(ShapesMatch(), 0.99), (ShapesExact(), 0.99), (ShapesClip(), 0.9)])
def test_prefers_the_truth_to_a_hard_negative(scorer, share, drawn):
    images, prompts, negatives = drawn
    right, wrong = scorer.score(images, prompts), scorer.score(images, negatives)
    assert right.shape == (300,) and right.dtype == torch.float32
    assert (right > wrong).float().mean() >= share


def test_match_range_and_levels(drawn):
    images, prompts, _ = drawn
    scorer = ShapesMatch()
    scores = scorer.score(images, prompts)
    assert scores.median() > 0.9 and scores.max() <= 1 + 1e-5
    blank = torch.full((2, 3, 64, 64), 0.95)
    assert scorer.score(blank, ["a circle", "two squares"]).abs().max() < 0.1
    noise = torch.rand(50, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert scorer.score(noise, prompts[:50]).min() >= -0.4 - 1e-5


def test_match_is_differentiable_in_the_image(drawn):
    images, prompts, _ = drawn
    image = images[:8].clone().requires_grad_()
    ShapesMatch().score(image, prompts[:8]).sum().backward()
    assert image.grad.isfinite().all() and (image.grad.abs().amax((1, 2, 3)) > 0).all()


@pytest.mark.parametrize("scorer", [ShapesMatch(), ShapesExact(), ShapesClip()])
def test_does_not_depend_on_the_batch(scorer, drawn):
    images, prompts, _ = drawn
    whole = scorer.score(images[:10], prompts[:10])
    single = torch.cat([scorer.score(images[i : i + 1], prompts[i : i + 1]) for i in range(10)])
    torch.testing.assert_close(whole, single, rtol=0, atol=1e-5)


def test_weighted_sum_and_normalisation(drawn):
    images, prompts, _ = drawn
    reward = load_reward({"shapes-match": 2.0, "shapes-clip": -0.5})
    parts = reward.components(images[:5], prompts[:5])
    torch.testing.assert_close(
        reward.score(images[:5], prompts[:5]), 2 * parts["shapes-match"] - 0.5 * parts["shapes-clip"]
    )
    normal = load_reward({"shapes-match": 2.0, "shapes-clip": -0.5}, normalize="fixed")
    (m, s), (cm, cs) = ShapesMatch.statistics, ShapesClip.statistics
    expected = 2 * (parts["shapes-match"] - m) / s - 0.5 * (parts["shapes-clip"] - cm) / cs
    torch.testing.assert_close(normal.total(parts), expected)


def test_bad_input():
    images = torch.zeros(2, 3, 64, 64)
    with pytest.raises(ValueError, match="unknown reward 'beauty'"):
        load_reward({"beauty": 1.0})
    with pytest.raises(ValueError, match="at least one scorer and unique names"):
        WeightedReward([])
    with pytest.raises(ValueError, match="finite"):
        load_reward({"shapes-match": float("inf")})
    with pytest.raises(ValueError, match="unknown normalize 'standard'"):
        load_reward("shapes-match", normalize="standard")
    with pytest.raises(ValueError, match=r"expected images \(1, 3, H, W\)"):
        load_reward("shapes-match").score(images, ["a circle"])
    with pytest.raises(ValueError, match="not a caption of the shapes world"):
        load_reward("shapes-match").score(images, ["a zebra", "a circle"])


def test_statistics_are_those_of_gaussian_noise():
    """Measured again on 180 training captions: within 15 % of what normalisation assumes."""
    reward = load_reward({"shapes-match": 1.0, "shapes-clip": 1.0, "shapes-exact": 1.0})
    prompts = [caption.text for caption in balanced_captions("train", 180)]
    result = evaluate(load_denoiser("shapes"), reward, {GAUSSIAN: None}, prompts, 1)[GAUSSIAN]
    for scorer, _ in reward.rewards:
        scores = result.scores[scorer.name]
        assert scores.mean() == pytest.approx(scorer.statistics[0], rel=0.15)
        assert scores.std() == pytest.approx(scorer.statistics[1], rel=0.15)


def test_numbers_of_the_demo_come_from_the_results():
    root = Path(__file__).parents[2]
    results = (root / "benchmarks/results/demo.md").read_text()
    rows = re.findall(r"^\| (?:the 4 trained|120 held).*", (root / "docs/index.md").read_text(), flags=re.M)
    assert len(rows) == 2
    for number in re.findall(r"-?\d+\.\d \[-?\d+\.\d, -?\d+\.\d\]", " ".join(rows)):
        assert number in results


def test_scorers_without_weights():
    grey, noise = torch.full((1, 3, 64, 64), 0.25), torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    images, prompts = torch.cat([grey, noise]), ["anything", "at all"]
    bright = load_reward("brightness").score(images, prompts)
    torch.testing.assert_close(bright, torch.tensor([0.25, float(noise.mean())]), rtol=0, atol=1e-6)
    sizes = load_reward("jpeg-compressibility").score(images, prompts)
    file = io.BytesIO()
    pixels = (noise[0].permute(1, 2, 0) * 255).round().byte().numpy()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    assert sizes[1] == pytest.approx(-len(file.getvalue()) / 1000)
    assert sizes[1] < sizes[0] < 0
