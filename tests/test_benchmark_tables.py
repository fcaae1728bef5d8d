"""Pages of benchmarks with training seeds: their cells are means and intervals of the scores in the record."""

import numpy as np
import pytest
import torch

from benchmarks import ablations, cross_talk, demo, few_captions, pages, pairs, ppo_defaults, what_works
from noisear_rl.denoisers.shapes.captions import captions_of, parse_caption
from noisear_rl.evaluation.compare import MethodScores, as_results, summary
from noisear_rl.evaluation.intervals import bootstrap, holm, paired_difference, significance_mark
from noisear_rl.evaluation.results import to_record
from noisear_rl.gaussian import standard_noise
from noisear_rl.prompts import categories_of
from noisear_rl.prompts.reader import PromptReader
from noisear_rl.samplers import GAUSSIAN

PROMPTS = [
    "a photo of three red circles",
    "a photo of three red circles",  # one prompt with more noise
    "a photo of two blue squares",
    "a photo of a red cross and a green triangle",
    "a photo of a blue circle and a red square",
    "a photo of a green circle and a black cross",
]
CATEGORIES = categories_of(PROMPTS)
SAMPLES = 4


def scores(rng, share):
    right = (rng.random((len(PROMPTS), SAMPLES)) < share).astype(float)
    both = {"shapes-exact": right, "shapes-match": right - 0.1 * rng.random(right.shape)}
    return MethodScores(both, 10 * share, 0.0, 1.0, 1.0, 0.01, torch.zeros(0), PROMPTS)


def evaluated(names, seed=0):
    rng = np.random.default_rng(seed)
    return {name: scores(rng, share) for name, share in zip(names, np.linspace(0.2, 0.8, len(names)), strict=True)}


def record_of(groups, facts, prompt_set="some.txt"):
    names = [name for members in groups.values() for name in members]
    found = evaluated([GAUSSIAN, *names])
    spread = {name: {"shapes-clip": np.full(len(PROMPTS), 0.5 + i)} for i, name in enumerate(found)}
    results = as_results(
        found, CATEGORIES, denoiser="shapes-turbo", prompt_set=prompt_set, groups=groups, diversity=spread, facts=facts
    )
    exact = lambda members: 100 * np.stack([found[name].scores["shapes-exact"] for name in members])
    return to_record(results), {GAUSSIAN: exact([GAUSSIAN])} | {name: exact(part) for name, part in groups.items()}


def row_of(page, title, count=0):
    """The cells of the row that starts with a title, the ``count``-th of them."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    return [row for row in rows if row[0] == title][count]


@pytest.mark.parametrize("resample", ["noise", "prompts"])
def test_cells_of_seeds(resample):
    rng = np.random.default_rng(0)
    right, baseline = 100 * (rng.random((3, 6, 4)) < 0.6), 100.0 * (rng.random((6, 4)) < 0.4)
    estimate = lambda part: bootstrap(part, CATEGORIES, prompts=PROMPTS, resample=resample)
    cells = dict(zip(pages.SEED_HEAD, pages.seed_cells(right, baseline, estimate, 3.25), strict=True))
    assert [cells[f"seed {seed}"] for seed in range(3)] == [str(estimate(part)) for part in right]
    assert cells["pooled"] == str(estimate(right)) != str(estimate(right.mean(0)))
    assert cells["gain"] == estimate(right - baseline).text(1, "+")
    assert cells["std of seeds"] == f"{np.std([estimate(part).mean for part in right], ddof=1):.1f}"
    assert pages.seed_cells(right[:1], None, estimate, 0.0) == ["", "", "", str(estimate(right[0])), "", "", "0.0"]


def test_few_captions():
    groups = {name: [f"{name} {seed}" for seed in range(3)] for name in few_captions.ALGORITHMS}
    final, right = record_of(groups, {"images": {"reinforce": 100, "ppo": 2000}})
    course, _ = record_of({"ppo 10": ["ppo 10"], "ppo 20": ["ppo 20"]}, {})
    page = few_captions.table({"final": final, "course": course})
    pooled = bootstrap(right["ppo"], CATEGORIES, prompts=PROMPTS, resample="noise")
    cells = row_of(page, "PPO")
    assert cells[1] == "2,000" and cells[2 + len(pages.SEEDS)] == str(pooled)
    assert row_of(page, "PPO", 1)[1] == f"{10 * 16 * 64:,}"
    assert cells[-1] == f"{np.mean([4.5, 5.5, 6.5]) / 0.5:.2f}"  # diversity against Gaussian noise


def test_what_works():
    groups = {name: [f"{name} {seed}" for seed in range(3)] for name in what_works.VARIANTS}
    record, right = record_of(groups, {"images": dict.fromkeys(groups, 6144)})
    page = what_works.table(record)
    others = [name for name in groups if name != "base"]
    changes = holm(
        [paired_difference(right[n], right["base"], CATEGORIES, prompts=PROMPTS, resample="noise") for n in others]
    )
    for name, change in zip(others, changes, strict=True):
        variant = what_works.VARIANTS[name]
        row = next(line for line in page.splitlines() if line.startswith(f"| {variant.change} | {variant.setting} |"))
        assert f"| {change.text(1, '+')}{significance_mark(change)} |" in row
    assert f"Holm correction for {len(others)} comparisons" in page


def test_ablations():
    names = list(dict.fromkeys(name for settings in ablations.GROUPS.values() for name in settings))
    groups = {name: [f"{name} {seed}" for seed in range(3)] for name in names}
    facts = {"parameters": {name: 1000 + i for i, name in enumerate(names)}, "nll": dict.fromkeys(names, 1.25)}
    record, right = record_of(groups, facts, "validation")
    page = ablations.table(record)
    assert "5 distinct validation captions in 6 rows" in page
    for title, settings in ablations.GROUPS.items():
        for i, name in enumerate(settings):
            cells = row_of(page, title, i)
            assert cells[1] == ablations.value_of(title, name) and cells[2] == f"{facts['parameters'][name]:,}"
            assert cells[4] == str(bootstrap(right[name], CATEGORIES, prompts=PROMPTS))


def test_demo():
    methods = [GAUSSIAN, "NLL", "NLL + REINFORCE"]
    found = [evaluated(methods, seed) for seed in range(3)]
    for part in found:
        part[GAUSSIAN] = found[0][GAUSSIAN]  # not trained
    records = [{"trained": summary(part, PROMPTS), "held_out": summary(part, PROMPTS)} for part in found]
    page = demo.table({"seeds": [record | {"provenance": {"commit": "abc"}} for record in records]})
    right = 100 * np.stack([part["NLL"].scores["shapes-exact"] for part in found])
    start = 100 * found[0][GAUSSIAN].scores["shapes-exact"]
    for i, resample in enumerate(("noise", "prompts")):
        cells = dict(zip(("method", *pages.SEED_HEAD), row_of(page, "NLL", i), strict=True))
        assert cells["pooled"] == str(bootstrap(right, CATEGORIES, prompts=PROMPTS, resample=resample))
        gain = paired_difference(right, start, CATEGORIES, prompts=PROMPTS, resample=resample)
        assert cells["gain"] == gain.text(1, "+")


def test_pairs():
    rng = np.random.default_rng(0)
    right = (rng.random((7, len(PROMPTS), 3)) < 0.5).astype(int)
    settings = [
        {"setting": list(setting), "k": 0.1, "shift": 0.2, "right": part.tolist()}
        for setting, part in zip(pairs.SETTINGS, right, strict=True)
    ]
    captions = [[prompt, category] for prompt, category in zip(PROMPTS, CATEGORIES, strict=True)]
    record = {"provenance": {}, "captions": captions, "gaussian": right[0].tolist(), "settings": settings}
    page = pairs.table(record)
    gains = holm([bootstrap(100 * (part - right[0]), CATEGORIES, prompts=PROMPTS) for part in right])
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| 50") or line.startswith("| 10")]
    assert rows[1][-1] == f"{gains[1].text(1, '+')}{significance_mark(gains[1])} |"
    assert rows[0][-1].startswith("+0.0")


def test_ppo_defaults():
    rng = np.random.default_rng(0)
    prompts = list(ppo_defaults.PROMPTS)
    drawn = lambda share: {
        name: (rng.random((2, 20)) < share).astype(float) for name in ("shapes-match", "shapes-exact")
    }
    found = {str(seed): drawn(0.8 if seed else 0.2) for seed in range(3)}
    start = drawn(0.2)
    part = lambda scores: {"scores": {k: v.tolist() for k, v in scores.items()}, "kl_to_gaussian": 2.0}
    log = {"steps": [0.05, 0.5], "images": 512}
    record = {
        "prompts": prompts,
        "gaussian": part(start) | {"provenance": {}},
        "seeds": {seed: part(scores) | log for seed, scores in found.items()},
    }
    page = ppo_defaults.table(record)
    options = {"categories": categories_of(prompts), "prompts": prompts, "resample": "noise"}
    gains = holm([paired_difference(s["shapes-match"], start["shapes-match"], **options) for s in found.values()])
    assert [row_of(page, str(seed))[3] for seed in range(3)] == [g.text(3, "+") + significance_mark(g) for g in gains]
    stacked = np.stack([scores["shapes-match"] for scores in found.values()])
    assert row_of(page, "all")[2] == bootstrap(stacked, **options).text(3)
    assert row_of(page, "1")[-2:] == ["2.0", "0.50"]
    assert "rose in 2 of 3 seeds" in page


def test_twins_of_cross_talk():
    chosen, training = cross_talk.twins(), {c.text for c in captions_of("train")}
    assert len(chosen) == len(set(chosen)) == cross_talk.PAIRS
    assert {text for pair in chosen for text in pair} <= training
    for first, twin in chosen:
        one, other = parse_caption(first), parse_caption(twin)
        assert one.objects == other.objects and (one.relation, other.relation) == ("left of", "right of")
    assert sum(bool(parse_caption(first).objects[0].color) for first, _ in chosen) == cross_talk.PAIRS // 2


def test_shares_of_cross_talk(random_denoiser, monkeypatch):
    """A policy cannot tell a caption from itself; whitened by the twins alone, it tells them apart a little."""
    pair, noise = cross_talk.twins()[0], standard_noise(range(8), random_denoiser.latent_shape)
    advantages = torch.randn(8, generator=torch.Generator().manual_seed(0))
    found = {}
    for name in cross_talk.PATHWAYS:
        if "whitened" in name and cross_talk.BY_TWINS not in name:
            continue  # reads all training captions
        reader = PromptReader("tokens" if "tokens" in name else "denoiser", random_denoiser)
        for texts in (pair, (pair[0], pair[0])):
            policy = cross_talk.policy_of(name, reader, pair, 0)
            found[name, texts == pair] = cross_talk.shares(policy, reader, texts, noise, advantages)
        assert found[name, False] == pytest.approx((1, 1, 1), abs=1e-4)
    normalized, by_twins, _ = (shares[0] for (_, differ), shares in found.items() if differ)
    assert by_twins < 0.97 < normalized
