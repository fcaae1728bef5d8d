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
    parse_caption,
)
from noisear_rl.denoisers.shapes.world import (
    GAP,
    RADIUS,
    Scenes,
    coverage,
    matches,
    random_scenes,
    relation_margin,
    render,
    sample_scenes,
)


def test_captions_and_split():
    everything = all_captions()
    assert len({c.text for c in everything}) == len(everything) >= 2000
    train, held_out = captions_of("train"), captions_of("held_out")
    assert not {c.text for c in train} & {c.text for c in held_out}
    assert len(train) + len(held_out) == len(everything)
    for side in (train, held_out):
        assert {word for c in side for word in c.text.split()} == set(C.vocabulary())
        assert {c.category for c in side} == set(C.CATEGORIES)
    assert held_out[0].text == "a photo of a square"  # the split is fixed
    assert len(C.COLORS) >= 6 and len(C.SHAPES) >= 4


def test_balanced_captions():
    drawn = balanced_captions("held_out", 120)
    assert [sum(c.category == name for c in drawn) for name in C.CATEGORIES] == [20] * 6
    assert drawn == balanced_captions("held_out", 120) != balanced_captions("held_out", 120, seed=1)
    assert all(c in captions_of("held_out") for c in drawn)


def test_parse():
    caption = parse_caption("A photo of a red circle  left of a blue square.")
    assert caption.relation == "left of" and [str(o) for o in caption.objects] == ["red circle", "blue square"]
    assert parse_caption("two crosses").objects == parse_caption("a photo of two crosses").objects
    assert all(parse_caption(c.text) is c for c in all_captions())
    with pytest.raises(ValueError, match="nearest one is 'a photo of a red circle'"):
        parse_caption("a photo of a red circel")


def test_scenes_fit_their_captions_and_no_hard_negative():
    caps = list(captions_of("train", "position")[:200]) + balanced_captions("train", 300)
    scenes = sample_scenes(caps, np.random.default_rng(0))
    assert matches(scenes, CaptionTensors.from_captions(caps)).diagonal().all()
    rng = random.Random(0)
    negatives = [C.hard_negative(c, rng) for c in caps]
    assert not matches(scenes, CaptionTensors.from_captions(negatives)).diagonal().any()


def scene(*objects):
    shape, color, center, radius = zip(*objects, strict=True)
    return Scenes(
        torch.tensor([shape]), torch.tensor([color]), torch.tensor([center]).float(), torch.tensor([radius]).float()
    )


RED_CIRCLE, BLUE_SQUARE = (0, 0, (16, 32), 9), (1, 2, (48, 32), 9)
NOTHING = (-1, -1, (0, 0), 0)


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
