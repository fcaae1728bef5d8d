import random

import numpy as np
import pytest
import torch

from noisear_rl.denoisers.shapes import captions as C
from noisear_rl.denoisers.shapes.captions import (
    CaptionTensors,
    all_captions,
    balanced_captions,
    captions_of,
    meaning,
    parse_caption,
)
from noisear_rl.denoisers.shapes.world import (
    GAP,
    LARGE_ABOVE,
    RADIUS,
    RADIUS_OF_SIZE,
    SMALL_BELOW,
    Scenes,
    coverage,
    matches,
    random_scenes,
    relation_margin,
    render,
    sample_scenes,
)
from noisear_rl.files import sha256

# Captions and SHA-256 of the texts of each part, which no change of the code may move.
PARTS = {
    "train": (2296, "7ae23535ac4d12abd8aa4896a4c88f6b5aef4d3d593750b6ae404c02b0be9be1"),
    "validation": (531, "c6bdf5f7e414ff1bb5742aab41ad655e5f4af69459336b044b48017575e9f752"),
    "test": (709, "b98ee6d5201b67ef352d64e2bd9136b1be9bfe632e0b02784764baf583471e73"),
}


def test_captions_and_split():
    everything = all_captions()
    assert len({c.text for c in everything}) == len(everything) >= 2000
    parts = {split: captions_of(split) for split in C.SPLITS}
    assert tuple(parts) == ("train", "validation", "test")
    texts = [c.text for part in parts.values() for c in part]
    assert len(set(texts)) == len(texts) == len(everything)
    meanings = {split: {meaning(c) for c in part} for split, part in parts.items()}
    assert sum(map(len, meanings.values())) == len({meaning(c) for c in everything})  # disjoint by meaning
    for split, part in parts.items():
        assert {word for c in part for word in c.text.split()} == set(C.vocabulary())
        assert {c.category for c in part} == set(C.CATEGORIES)
        assert (len(part), sha256([c.text for c in part])) == PARTS[split]  # the split is fixed
    for category in C.CATEGORIES:
        found = {meaning(c) for c in captions_of("test", category)}
        assert len(found) == 4 if category == "single_object" else len(found) >= 12
    assert len(C.COLORS) >= 6 and len(C.SHAPES) >= 4
    with pytest.raises(ValueError, match=r"unknown split 'held_out'; expected one of .*'validation'"):
        captions_of("held_out")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("a red circle left of a blue square", "a blue square right of a red circle", True),
        ("a small circle above a cross", "a cross below a small circle", True),
        ("a circle and a large square", "a large square and a circle", True),
        ("a red circle and a blue square", "a blue square and a red circle", True),
        ("a red circle left of a blue square", "a blue square left of a red circle", False),
        ("a red circle left of a blue square", "a red circle right of a blue square", False),
        ("a red circle left of a blue square", "a red circle above a blue square", False),
        ("a red circle left of a blue square", "a red circle and a blue square", False),
        ("a red circle and a blue square", "a blue circle and a red square", False),
        ("a small circle left of a large square", "a large circle left of a small square", False),
        ("a small circle", "a circle", False),
        ("two circles", "three circles", False),
    ],
)
def test_meaning_is_what_a_caption_says_in_any_order(one, other, same):
    assert (meaning(parse_caption(one)) == meaning(parse_caption(other))) is same


def test_balanced_captions():
    drawn = balanced_captions("validation", 120)
    assert [sum(c.category == name for c in drawn) for name in C.CATEGORIES] == [20] * 6
    assert drawn == balanced_captions("validation", 120) != balanced_captions("validation", 120, seed=1)
    assert all(c in captions_of("validation") for c in drawn)


def test_parse():
    caption = parse_caption("A photo of a red circle  left of a blue square.")
    assert caption.relation == "left of" and [str(o) for o in caption.objects] == ["red circle", "blue square"]
    assert parse_caption("two crosses").objects == parse_caption("a photo of two crosses").objects
    (large,) = parse_caption("a large red circle").objects
    assert (large.size, large.color, large.shape) == ("large", "red", "circle")
    assert [o.size for o in parse_caption("a small circle below a square").objects] == ["small", None]
    assert [str(o) for o in parse_caption("two small blue crosses").objects] == ["small blue cross"] * 2
    assert all(parse_caption(c.text) is c for c in all_captions())
    with pytest.raises(ValueError, match="nearest one is 'a photo of a red circle'"):
        parse_caption("a photo of a red circel")


def test_scenes_fit_their_captions_and_no_hard_negative():
    sized = [c for c in all_captions() if any(o.size for o in c.objects)]
    caps = list(captions_of("train", "position")[:200]) + balanced_captions("train", 300) + sized[::5]
    scenes = sample_scenes(caps, np.random.default_rng(0))
    assert matches(scenes, CaptionTensors.from_captions(caps)).diagonal().all()
    rng = random.Random(0)
    negatives = [C.hard_negative(c, rng) for c in caps]
    assert not matches(scenes, CaptionTensors.from_captions(negatives)).diagonal().any()


def test_hard_negatives_change_a_size_or_exchange_the_sizes():
    rng = random.Random(0)
    texts = lambda caption: {C.hard_negative(parse_caption(caption), rng).text for _ in range(300)}
    assert "a photo of a large circle" in texts("a small circle")
    assert "a photo of two small red crosses" in texts("two large red crosses")
    two = texts("a small circle and a large square")
    assert {"a photo of a large circle and a small square", "a photo of a small circle and a small square"} <= two
    assert "a photo of a square left of a small circle" in texts("a small circle left of a square")


def test_scenes_have_the_sizes_that_captions_state():
    caps = [parse_caption(c) for c in ("a small circle and a large square", "two large crosses", "a triangle")] * 100
    scenes = sample_scenes(caps, np.random.default_rng(0))
    bounds = [[RADIUS_OF_SIZE.get(o.size, RADIUS) for o in c.objects] for c in caps]
    for radius, allowed in zip(scenes.radius.tolist(), bounds, strict=True):
        assert all(low <= r <= high for r, (low, high) in zip(radius, allowed, strict=False))
    free = scenes.radius[2::3, 0]
    assert free.min() < SMALL_BELOW and free.max() > LARGE_ABOVE  # a caption without a size allows all of them
    assert RADIUS_OF_SIZE["small"][1] <= SMALL_BELOW - 0.75 and RADIUS_OF_SIZE["large"][0] >= LARGE_ABOVE + 0.75


def scene(*objects):
    shape, color, center, radius = zip(*objects, strict=True)
    return Scenes(
        torch.tensor([shape]), torch.tensor([color]), torch.tensor([center]).float(), torch.tensor([radius]).float()
    )


RED_CIRCLE, BLUE_SQUARE = (0, 0, (16, 32), 9), (1, 2, (48, 32), 9)
NOTHING = (-1, -1, (0, 0), 0)
SMALL_CIRCLE, LARGE_SQUARE = (0, 0, (16, 32), 7), (1, 2, (48, 32), 11)


def circle(radius):
    """A red circle in the middle."""
    return (0, 0, (32, 32), radius)


@pytest.mark.parametrize(
    ("objects", "caption", "right"),
    [
        ((RED_CIRCLE,), "a circle", True),
        ((RED_CIRCLE,), "a red circle", True),
        ((RED_CIRCLE,), "a green circle", False),
        ((RED_CIRCLE, BLUE_SQUARE), "a red circle", False),  # extra object
        ((NOTHING, RED_CIRCLE, NOTHING, BLUE_SQUARE), "a blue square and a red circle", True),  # any slots
        ((BLUE_SQUARE, RED_CIRCLE), "a red circle left of a blue square", True),
        ((BLUE_SQUARE, RED_CIRCLE), "a red circle right of a blue square", False),
        ((BLUE_SQUARE, RED_CIRCLE), "a red circle above a blue square", False),
        ((BLUE_SQUARE, RED_CIRCLE), "a blue circle and a red square", False),  # swapped attributes
        ((RED_CIRCLE, (0, 0, (48, 32), 9)), "two red circles", True),
        ((RED_CIRCLE, (0, 1, (48, 32), 9)), "two circles", True),
        ((RED_CIRCLE, (0, 1, (48, 32), 9)), "two red circles", False),
        ((RED_CIRCLE, (0, 0, (48, 32), 9), (0, 0, (32, 10), 9)), "three red circles", True),
        ((RED_CIRCLE, (0, 0, (48, 32), 9), (0, 0, (32, 10), 9), (0, 0, (32, 50), 9)), "three red circles", False),
        ((NOTHING,), "a circle", False),
        ((circle(7),), "a small circle", True),
        ((circle(7),), "a large circle", False),
        ((circle(7),), "a circle", True),
        ((circle(11),), "a large red circle", True),
        ((circle(11),), "a small red circle", False),
        ((circle(11),), "a large blue circle", False),
        ((circle(SMALL_BELOW - 0.01),), "a small circle", True),
        ((circle(SMALL_BELOW),), "a small circle", False),
        ((circle(LARGE_ABOVE + 0.01),), "a large circle", True),
        ((circle(LARGE_ABOVE),), "a large circle", False),
        ((circle(9.25),), "a circle", True),  # neither small nor large
        ((circle(9.25),), "a small circle", False),
        ((circle(9.25),), "a large circle", False),
        ((LARGE_SQUARE, SMALL_CIRCLE), "a small circle and a large square", True),
        ((LARGE_SQUARE, SMALL_CIRCLE), "a large circle and a small square", False),  # swapped sizes
        ((LARGE_SQUARE, SMALL_CIRCLE), "a small circle left of a square", True),
        ((LARGE_SQUARE, SMALL_CIRCLE), "a large circle left of a square", False),
        ((SMALL_CIRCLE, (0, 3, (48, 32), 7)), "two small circles", True),
        ((SMALL_CIRCLE, (0, 3, (48, 32), 11)), "two small circles", False),
    ],
)
def test_matches(objects, caption, right):
    if len(objects) < 3:
        objects = (*objects, *[NOTHING] * (3 - len(objects)))
    assert matches(scene(*objects), CaptionTensors.from_captions([parse_caption(caption)])).item() is right


def test_relation_margin_is_genevals():
    """By hand: offset (-30, 10), sizes 20 + 20, so (-26, 6) / 26.68."""
    margin = relation_margin(torch.tensor([10.0, 40.0]), torch.tensor([40.0, 30.0]), torch.tensor(40.0))
    torch.testing.assert_close(margin, torch.tensor([26, -26, -6, 6]) / np.hypot(26, 6).item(), check_dtype=False)
    assert relation_margin(torch.zeros(2), torch.tensor([1.0, 1.0]), torch.tensor(40.0)).abs().max() == 0


def test_render():
    caps = balanced_captions("train", 60)
    scenes = sample_scenes(caps, np.random.default_rng(0))
    images = render(scenes, np.random.default_rng(1))
    assert images.shape == (60, 3, 64, 64) and images.min() >= 0 and images.max() <= 1
    assert torch.equal(images, render(scenes, np.random.default_rng(1)))
    corner = images[:, :, 0, 0]
    assert (corner >= 0.85 - 1e-6).all() and torch.equal(corner.amax(1), corner.amin(1))
    circle = coverage(scene((0, 0, (32, 32), 10)))
    assert circle.sum().item() == pytest.approx(np.pi * 100, rel=0.01)
    inside = scenes.radius[scenes.shape >= 0]
    assert RADIUS[0] <= inside.min() and inside.max() <= RADIUS[1]
    cover = coverage(scenes)
    assert (cover.sum(1) <= 1 + 1e-6).all() and GAP > 0  # objects never overlap


def test_random_scenes_hold_up_to_four_objects():
    counts = random_scenes(200, np.random.default_rng(0)).count
    assert set(counts.tolist()) == {0, 1, 2, 3, 4}
