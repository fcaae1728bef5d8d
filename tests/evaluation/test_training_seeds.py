"""Intervals of several training seeds cover new prompts and a new training seed."""

import numpy as np
import pytest

from noisear_rl.evaluation.intervals import bootstrap, paired_difference, significance_mark
from tests.evaluation.test_intervals import coverage

# Prompts per category; those of the captions of shapes for validation (118) and test (133), and half as many.
SIZES = {60: (4, 6, 8, 10, 14, 18), 118: (2, 9, 16, 11, 40, 40), 133: (4, 12, 23, 14, 40, 40)}


def coverage_over_seeds(
    prompts: int,
    right: float,
    seeds: int,
    spread: float,
    *,
    repetitions: int,
    concentration: float = 1.5,
    samples: int = 4,
) -> dict[str, float]:
    """Simulates training seeds whose true means differ with a standard deviation of ``spread`` points.

    Returns:
        Percentage of intervals that contain the true mean over new prompts and new seeds: of a method's mean, of its
        gain over a baseline without training, and of the gain if the scores of the seeds are averaged first.
    """
    rng = np.random.default_rng(prompts + seeds)
    index = np.repeat(np.arange(6), SIZES[prompts])
    means = right + np.linspace(-0.08, 0.08, 6)
    noise = concentration / (concentration + 1) * means * (1 - means)  # mean of chance * (1 - chance)
    own = concentration * means[index]
    chances = rng.beta(own, concentration - own, size=(repetitions, len(index)))
    slope = chances * (1 - chances) / noise[index]  # 1 on average: chances stay between 0 and 1
    shift = rng.normal(0, spread / 100, size=(repetitions, seeds, 1))
    draw = lambda p: (rng.random((*p.shape, samples)) < p[..., None]).astype(float)
    scores = draw((chances[:, None] + shift * slope[:, None]).clip(0, 1))  # (R, T, P, S)
    baseline = draw(chances - 0.3 * chances * (1 - chances))[:, None]
    names, gain = [f"c{i}" for i in index], float(0.3 * noise.mean())
    return {
        "mean": coverage(scores, names, means.mean()),
        "gain": coverage(scores - baseline, names, gain),
        "averaged first": coverage((scores - baseline).mean(1), names, gain),
    }


@pytest.mark.parametrize("spread", [0, 2.5, 3.0])
@pytest.mark.parametrize(("prompts", "right", "seeds"), [(60, 0.7, 3), (118, 0.9, 5), (133, 0.5, 5), (133, 0.9, 3)])
def test_interval_covers_new_prompts_and_a_new_training_seed(prompts, right, seeds, spread):
    found = coverage_over_seeds(prompts, right, seeds, spread, repetitions=1000)
    assert min(found["mean"], found["gain"]) >= 92.5  # 93, and the error of 1,000 data sets
    assert max(found["mean"], found["gain"]) <= (98.5 if prompts != 118 else 100)  # two prompts say little


def test_averaging_over_seeds_first_would_undercover():
    found = coverage_over_seeds(133, 0.9, 3, 3.0, repetitions=1000, concentration=20, samples=16)
    assert found["averaged first"] < 83 and 92.5 <= found["gain"] <= 98.5


@pytest.mark.slow
@pytest.mark.parametrize("concentration", [1.5, 20])  # prompts that differ much, and little
@pytest.mark.parametrize("spread", [0, 2.5, 3.0])
@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("right", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("prompts", [60, 118, 133])
def test_coverage_in_full(prompts, right, seeds, spread, concentration):
    found = coverage_over_seeds(prompts, right, seeds, spread, repetitions=5000, concentration=concentration)
    print(prompts, right, seeds, spread, concentration, found)
    assert min(found["mean"], found["gain"]) >= 93


def test_interval_of_one_training_seed_is_over_prompts():
    scores = np.random.default_rng(0).normal(size=(1, 12, 2))
    assert bootstrap(scores, ["a", "b"] * 6) == bootstrap(scores[0], ["a", "b"] * 6)


def test_seeds_widen_the_interval_by_their_standard_error():
    """Prompts that hardly differ leave the textbook interval of three seeds' means."""
    scores = np.full((3, 40, 1), 50.0) + np.array([1.0, 2.0, 6.0])[:, None, None]
    scores[:, ::2] += 0.01
    estimate, half = bootstrap(scores, ["a"] * 40, draws=20_000), 4.303 * np.std([1, 2, 6], ddof=1) / 3**0.5
    assert estimate.mean == pytest.approx(53.005)
    assert estimate.high - estimate.mean == pytest.approx(half, rel=0.03)
    assert estimate.mean - estimate.low == pytest.approx(half, rel=0.03)
    baseline = np.full((40, 1), 50.0)
    gain = paired_difference(scores, baseline, ["a"] * 40)
    assert gain.mean == pytest.approx(3.005) and gain.low < 0 < gain.high and significance_mark(gain) == ""
    other = paired_difference(scores + np.array([1.0, 1.1, 0.9])[:, None, None], scores, ["a"] * 40)
    assert other.mean == pytest.approx(1) and significance_mark(other) == "*"  # paired by training seed
    with pytest.raises(ValueError, match="same prompts and samples"):
        paired_difference(scores, scores[:2], ["a"] * 40)
