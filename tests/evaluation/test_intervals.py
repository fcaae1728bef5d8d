"""Intervals have their nominal coverage, even for few prompts and skewed scores; wins and preferences of pairs."""

import dataclasses
import math

import numpy as np
import pytest

from noisear_rl.evaluation.intervals import (
    Estimate,
    bootstrap,
    bootstrap_many,
    category_mean,
    category_means,
    holm,
    paired_difference,
    preference_probability,
    significance_mark,
    student_quantile,
    student_tail,
    win_rate,
)

REPETITIONS, DRAWS = 3000, 800


def coverage(scores: np.ndarray, categories: list[str], truth: float | np.ndarray, resample: str = "prompts") -> float:
    """Percentage of the ``(R, P, S)`` data sets whose interval contains the truth."""
    _, low, high, _ = bootstrap_many(scores, categories, resample=resample, draws=DRAWS)
    return 100 * float(((low <= truth + 1e-9) & (truth <= high + 1e-9)).mean())


def shares(
    rng: np.random.Generator, prompts: int, categories: int, right: float
) -> tuple[np.ndarray, list[str], float]:
    """Probabilities ``(R, P)`` that an image of a prompt is right (a U-shaped Beta), categories, and the true mean."""
    means = right + np.linspace(-0.08, 0.08, categories) * (categories > 1)
    index = np.arange(prompts) % categories
    chances = rng.beta(1.5 * means[index], 1.5 * (1 - means[index]), size=(REPETITIONS, prompts))
    return chances, [f"c{i}" for i in index], float(means.mean())


@pytest.mark.parametrize("categories", [1, 6])
@pytest.mark.parametrize(
    ("prompts", "samples", "right"),
    [(30, 4, 0.7), (30, 8, 0.8), (60, 1, 0.7), (60, 4, 0.8), (120, 8, 0.8), (200, 1, 0.8), (200, 2, 0.9)],
)
def test_interval_covers_new_prompts(prompts, samples, right, categories):
    rng = np.random.default_rng(prompts + samples)
    chances, names, truth = shares(rng, prompts, categories, right)
    scores = (rng.random((REPETITIONS, prompts, samples)) < chances[..., None]).astype(float)
    assert 93 <= coverage(scores, names, truth) <= 97


@pytest.mark.parametrize(("prompts", "samples", "categories"), [(30, 1, 6), (30, 8, 6), (60, 4, 1), (120, 2, 6)])
def test_interval_of_a_paired_difference_covers(prompts, samples, categories):
    rng = np.random.default_rng(prompts + samples)
    chances, names, truth = shares(rng, prompts, categories, 0.6)
    better = chances + 0.3 * (1 - chances)  # the true gain is 0.3 · (1 - mean)
    draw = lambda p: (rng.random((REPETITIONS, prompts, samples)) < p[..., None]).astype(float)
    assert 93 <= coverage(draw(better) - draw(chances), names, 0.3 * (1 - truth)) <= 97


@pytest.mark.parametrize(("prompts", "samples", "categories"), [(30, 4, 1), (30, 8, 6), (120, 2, 6)])
def test_interval_covers_new_noise_on_the_same_prompts(prompts, samples, categories):
    rng = np.random.default_rng(prompts + samples)
    index = np.arange(prompts) % categories
    chances = np.linspace(0.3, 0.95, prompts)
    truth = np.mean([chances[index == c].mean() for c in range(categories)])
    scores = (rng.random((REPETITIONS, prompts, samples)) < chances[:, None]).astype(float)
    assert 93 <= coverage(scores, [f"c{i}" for i in index], truth, "noise") <= 97


def test_percentiles_alone_would_undercover():
    """Why the interval is not a percentile interval: 30 prompts in six categories, with the correct variance."""
    rng = np.random.default_rng(0)
    chances, names, truth = shares(rng, 30, 6, 0.8)
    scores = (rng.random((REPETITIONS, 30, 8)) < chances[..., None]).mean(2)  # (R, P)
    drawn = np.zeros((DRAWS, REPETITIONS))
    for name in dict.fromkeys(names):
        part = scores[:, np.array(names) == name]
        drawn += (part[:, rng.integers(5, size=(DRAWS, 5))].mean(2).T - part.mean(1)) / 6
    low, high = scores.mean(1) + np.sqrt(5 / 4) * np.quantile(drawn, [0.025, 0.975], axis=0)
    assert 100 * ((low <= truth) & (truth <= high)).mean() < 93


def test_large_samples_get_the_textbook_interval():
    scores = np.random.default_rng(0).normal(5, 2, size=(400, 1))
    estimate = bootstrap(scores, ["all"] * 400, draws=20_000)
    half = 1.966 * scores.std(ddof=1) / 20  # Student's quantile for 399 degrees of freedom
    assert estimate.mean == pytest.approx(scores.mean())
    assert estimate.low == pytest.approx(scores.mean() - half, abs=0.03 * half)
    assert estimate.high == pytest.approx(scores.mean() + half, abs=0.03 * half)


def test_skewed_scores_reach_further_into_the_long_tail():
    scores = np.random.default_rng(0).exponential(size=(40, 1))
    estimate = bootstrap(scores, ["all"] * 40)
    assert estimate.high - estimate.mean > 1.2 * (estimate.mean - estimate.low)


def test_student_quantile():
    table = {1: 12.706, 1.5: 6.017, 2: 4.303, 3: 3.182, 5: 2.571, 10: 2.228, 30: 2.042, 1e9: 1.960}
    freedom, exact = np.array(list(table)), np.array(list(table.values()))
    np.testing.assert_allclose(student_quantile(freedom), exact, rtol=0.01)
    np.testing.assert_allclose(student_tail(exact, freedom), 0.05, rtol=2e-3)
    tails = student_tail(np.array([0.0, 1.0, 63.657, 5.841, 10.0]), np.array([7.0, 1.0, 1.0, 3.0, 1e9]))
    np.testing.assert_allclose(tails, [1, 0.5, 0.01, 0.01, 0], rtol=1e-3, atol=1e-12)


def test_categories_have_equal_weight_and_the_seed_decides():
    scores = np.array([[1.0, 1.0], [0.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    categories = ["a", "b", "b", "b"]
    assert bootstrap(scores, categories).mean == category_mean(scores, categories) == pytest.approx((1 + 1 / 6) / 2)
    scores, categories = np.random.default_rng(0).normal(size=(12, 2)), ["a", "b", "b"] * 4
    first = bootstrap(scores, categories)
    assert first == bootstrap(scores, categories)
    assert first.low != bootstrap(scores, categories, seed=1).low
    many = bootstrap_many(np.stack([scores[::-1], scores]), categories)
    np.testing.assert_allclose([part[1] for part in many], [first.mean, first.low, first.high, first.p])
    constant = bootstrap(np.full((5, 3), 0.7), ["a"] * 5)
    assert (constant.low, constant.high) == (constant.mean, constant.mean)


def test_repeated_prompts_are_samples_of_one_prompt():
    rng = np.random.default_rng(0)
    scores, categories = rng.normal(size=(9, 4)), ["a"] * 4 + ["b"] * 5
    once = bootstrap(scores, categories, prompts=list("pqrstuvwx"))
    assert once == bootstrap(scores, categories)
    # Every prompt in two rows of two samples instead of one row of four.
    split = scores.reshape(18, 2)
    names, prompts = [c for c in categories for _ in range(2)], [p for p in "pqrstuvwx" for _ in range(2)]
    for resample in ("prompts", "noise"):
        whole, parts = (
            bootstrap(values, of, prompts=texts, resample=resample)
            for values, of, texts in ((scores, categories, list("pqrstuvwx")), (split, names, prompts))
        )
        np.testing.assert_allclose(dataclasses.astuple(parts)[:4], dataclasses.astuple(whole)[:4])
    # A prompt that is repeated more often has no more weight.
    more = np.concatenate([scores, scores[:1], scores[:1]])
    names, prompts = [*categories, "a", "a"], [*"pqrstuvwx", "p", "p"]
    assert category_means(more, names, prompts) == pytest.approx(category_means(scores, categories))
    np.testing.assert_allclose(dataclasses.astuple(bootstrap(more, names, prompts=prompts))[:4], [
        once.mean, once.low, once.high, once.p
    ])  # fmt: skip
    assert bootstrap(more, names, prompts=prompts, resample="noise").high > 0
    with pytest.raises(ValueError, match=r"'p' is in two categories: 'a' and 'b'"):
        bootstrap(scores, categories, prompts=list("pqrstpvwx"))
    with pytest.raises(ValueError, match="one prompt per category name, got 8 and 9"):
        bootstrap(scores, categories, prompts=list("pqrstuvw"))


def test_interval_of_a_small_category_with_repeated_prompts_covers():
    """As balanced sets draw them: 20 rows per category, of which two categories have 4 and 6 distinct prompts."""
    rng, distinct = np.random.default_rng(0), (4, 6, 20, 20, 20, 20)
    chances, prompts = [], []
    for category, count in enumerate(distinct):
        own = rng.beta(1.05, 0.45, size=(REPETITIONS, count))
        chances.append(own[:, np.arange(20) % count])
        prompts += [f"{category} {i % count}" for i in range(20)]
    names = [f"c{i // 20}" for i in range(120)]
    scores = (rng.random((REPETITIONS, 120, 4)) < np.concatenate(chances, 1)[..., None]).astype(float)
    covered = []
    for texts in (prompts, None):
        _, low, high, _ = bootstrap_many(scores, names, prompts=texts, draws=DRAWS)
        covered.append(100 * float(((low <= 0.7) & (high >= 0.7)).mean()))
    assert 93 <= covered[0] <= 97
    assert covered[1] < 90  # rows as independent prompts


def test_a_small_category_borrows_variance():
    """Two prompts that agree by chance do not make their category certain; larger categories are as they were."""
    rng = np.random.default_rng(0)
    large, agreeing = (rng.random((20, 8)) < 0.6).astype(float), np.ones((2, 8))
    names = ["a"] * 20 + ["b"] * 2
    estimate = bootstrap(np.concatenate([large, agreeing]), names)
    alone = bootstrap(large, ["a"] * 20)
    assert estimate.high - estimate.low > 1.5 * (alone.high - alone.low) / 2  # the average of both categories
    own = large.mean(1).var(ddof=1)
    error = np.sqrt(own / 20 + own * 2 / 3 / 2) / 2  # two borrowed degrees of freedom, and one of no variance
    assert (estimate.high - estimate.low) / 2 > 1.96 * error
    less = bootstrap(np.concatenate([large, agreeing]), names, resample="noise")
    assert less.high - less.low < estimate.high - estimate.low
    spread = np.concatenate([np.full((20, 1), 0.5), [[0.0], [1.0]]])  # more variance than others have is kept
    assert bootstrap(spread, names).high - 0.5 > 1.96 * np.sqrt(0.5 / 2) / 2


def test_p_values_agree_with_the_interval():
    rng = np.random.default_rng(0)
    scores = rng.exponential(size=(400, 20, 2)) - 1 + rng.normal(0, 0.4, size=(400, 1, 1))
    _, low, high, p = bootstrap_many(scores, ["a", "b"] * 10, draws=DRAWS)
    excludes = (low > 0) | (high < 0)
    assert 100 < excludes.sum() < 300
    assert ((p < 0.05) == excludes).mean() > 0.99  # the quantile is within 1 %
    sample = np.random.default_rng(1).normal(0.1, 1, size=(400, 1))
    t = sample.mean() / (sample.std(ddof=1) / 20)
    expected = student_tail(np.array([t]), np.array([399.0]))[0]
    assert bootstrap(sample, ["a"] * 400, draws=20_000).p == pytest.approx(expected, rel=0.15)
    assert bootstrap(np.zeros((5, 2)), ["a"] * 5).p == 1 and bootstrap(np.ones((5, 2)), ["a"] * 5).p == 0


def test_holm():
    """The worked example of Holm's procedure: sorted p-values times 4, 3, 2, 1, never decreasing."""
    values = [0.01, 0.04, 0.03, 0.005]
    estimates = [Estimate(1.0, 0.1, 1.9, p) for p in values]
    unknown = Estimate(1.0, math.nan, math.nan)
    found = holm([*estimates[:2], unknown, *estimates[2:]])
    assert [e.adjusted for e in found if e is not found[2]] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert math.isnan(found[2].adjusted) and [significance_mark(e) for e in found] == ["*", "", "", "", "*"]
    assert [significance_mark(e) for e in estimates] == ["*"] * 4  # each one alone
    assert [e.adjusted for e in holm([Estimate(0.0, -1.0, 1.0, 0.7)] * 3)] == [1, 1, 1] and holm([]) == []


def test_no_bounds_without_a_spread():
    for scores, categories, resample in (
        (np.array([[1.0], [0.0], [1.0]]), ["a", "b", "b"], "prompts"),
        (np.array([[1.0], [0.0]]), ["a", "a"], "noise"),
        (np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), ["a", "b", "b"], "prompts"),  # noise says nothing of prompts
    ):
        estimate = bootstrap(scores, categories, resample=resample)
        assert math.isnan(estimate.low) and math.isnan(estimate.high)
        assert str(estimate) == f"{estimate.mean:.1f}"
        assert significance_mark(estimate) == "" and math.isnan(estimate.p)
    repeated = bootstrap(np.random.default_rng(0).random((4, 8)), ["a", "a", "b", "b"], prompts=["p", "p", "q", "r"])
    assert math.isnan(repeated.low) and math.isnan(repeated.high)


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        (np.zeros((3, 2)), {"resample": "seeds"}, "unknown resample 'seeds'"),
        (np.zeros((2, 2)), {}, r"expected scores \(3, S\)"),
        (np.zeros((3, 0)), {}, r"expected scores \(3, S\)"),
        (np.zeros(3), {}, r"expected scores \(3, S\)"),
        (np.full((3, 2), np.nan), {}, "finite"),
    ],
)
def test_invalid_arguments(scores, options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap(scores, ["a", "b", "c"], **options)


def test_wins():
    scores, baseline = np.array([[2.0, 1.0], [0.0, 5.0]]), np.array([[1.0, 1.0], [3.0, 4.0]])
    np.testing.assert_array_equal(win_rate(scores, baseline), [[1, 0.5], [0, 1]])
    np.testing.assert_array_equal(win_rate(scores, baseline) + win_rate(baseline, scores), 1)
    random = np.random.default_rng(0).normal(size=(50, 4))
    assert 100 * win_rate(random, random).mean() == 50.0
    with pytest.raises(ValueError, match="same prompts and samples"):
        win_rate(scores, baseline[:1])


def test_preference_probability_is_the_softmax_of_two():
    scores, baseline = np.array([[21.0, 20.0, 900.0]]), np.array([[20.0, 20.0, -900.0]])
    softmax = math.exp(21) / (math.exp(21) + math.exp(20))
    np.testing.assert_allclose(preference_probability(scores, baseline), [[softmax, 0.5, 1.0]])
    np.testing.assert_allclose(preference_probability(baseline, scores), [[1 - softmax, 0.5, 0.0]], atol=1e-12)


def test_paired_difference_and_its_mark():
    rng = np.random.default_rng(0)
    difficulty = rng.normal(0, 10, size=(40, 1))
    baseline = difficulty + rng.normal(size=(40, 4))
    scores = difficulty + rng.normal(size=(40, 4)) + 1
    gain = paired_difference(scores, baseline, ["a"] * 40)
    assert 0.5 < gain.low < gain.mean < gain.high < 1.5 and significance_mark(gain) == "*"
    apart = bootstrap(scores, ["a"] * 40), bootstrap(baseline, ["a"] * 40)
    assert apart[0].low < apart[1].high  # why scores are paired
    assert significance_mark(paired_difference(baseline, scores, ["a"] * 40)) == "*"
    same = paired_difference(scores, scores, ["a"] * 40)
    assert (same.mean, same.low, same.high) == (0, 0, 0) and significance_mark(same) == ""
    with pytest.raises(ValueError, match="same prompts and samples"):
        paired_difference(scores, baseline[:, :1], ["a"] * 40)


def test_estimates_as_text():
    assert str(Estimate(1.0, -0.5, 2.26)) == "1.0 [-0.5, 2.3]"
    assert Estimate(1.0, -0.004, 2.0).text(2, "+") == "+1.00 [0.00, 2.00]"
