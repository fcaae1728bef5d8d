"""GenEval's rules on hand-made detections, and against verdicts of the published script.

``tests/files/geneval_verdicts.json`` holds random detections with what the functions of the published script
(djghosh13/geneval, ``evaluation/evaluate_images.py``) answered. The color of an object was "red" if the left edge of
its box is even, else "orange".
"""

import json
from pathlib import Path

import pytest

from noisear_rl.rewards.geneval import Detection, accuracy, judge, kept_objects, overlap, relations

PUBLISHED = json.loads((Path(__file__).parents[1] / "files" / "geneval_verdicts.json").read_text())


def by_edge(objects):
    return [("red", "orange")[int(one.box[0]) % 2] for one in objects]


def asked_for_nothing(objects):
    raise AssertionError("the prompt names no color")


def test_verdicts_of_the_published_script():
    for case in PUBLISHED["images"]:
        detections = [Detection(name, tuple(box), score) for name, *box, score in case["detections"]]
        kept = kept_objects(detections, case["metadata"]["tag"], max_overlap=case["max_overlap"])
        verdict = judge(case["metadata"], kept, by_edge)
        assert verdict.correct == case["correct"] == (not verdict.reasons), case
    assert sum(case["correct"] for case in PUBLISHED["images"]) == len(PUBLISHED["images"]) / 2 == 100


def test_positions_of_the_published_script():
    found = [sorted(relations(tuple(a), tuple(b))) for a, b, _ in PUBLISHED["positions"]]
    assert found == [expected for _, _, expected in PUBLISHED["positions"]]
    assert {len(names) for names in found} == {0, 1, 2}


def dog(x, y, size=10, score=0.95, name="dog"):
    return Detection(name, (x, y, x + size, y + size), score)


def verdict(detections, *include, tag="two_object", colors=asked_for_nothing, exclude=()):
    metadata = {"tag": tag, "include": list(include), "exclude": list(exclude)}
    return judge(metadata, kept_objects(detections, tag), colors)


DOG, CAT = {"class": "dog", "count": 1}, {"class": "cat", "count": 1}


def test_counts_and_confidence():
    three = {"class": "dog", "count": 3}, {"class": "dog", "count": 4}
    dogs = [dog(20 * i, 0) for i in range(4)]
    count = lambda found: verdict(found, three[0], tag="counting", exclude=[three[1]])
    assert count(dogs[:3]).correct
    assert count(dogs[:2]).reasons == ("expected 3 dog, found 2",)
    assert count(dogs).reasons == ("expected fewer than 4 dog, found 4",)
    assert count([*dogs[:3], dog(80, 0, score=0.9)]).correct  # counting takes only confidence above 0.9
    assert verdict([dog(0, 0, score=0.31)], DOG).correct and not verdict([dog(0, 0, score=0.3)], DOG).correct
    assert not verdict([], DOG).correct and verdict([], tag="single_object").correct


def test_only_sixteen_objects_of_a_class_count():
    dogs = [dog(20 * i, 0) for i in range(20)]
    assert len(kept_objects(dogs, "counting")["dog"]) == 16


def test_overlapping_detections_can_be_dropped():
    found = [dog(0, 0, 9, 0.8), dog(0, 0, 9, 0.9), dog(5, 0, 9, 0.7), dog(100, 0, 9, 0.6), dog(0, 0, 9, 0.5, "cat")]
    assert overlap(found[0].box, found[1].box) == 1 and overlap(found[0].box, found[3].box) == 0
    assert overlap((0, 0, 9, 9), (5, 0, 14, 9)) == pytest.approx(50 / 150)  # ten pixels wide, five of them shared
    kept = kept_objects(found, "position", max_overlap=0.5)
    assert [one.score for one in kept["dog"]] == [0.9, 0.7, 0.6] and len(kept["cat"]) == 1
    assert [one.score for one in kept_objects(found, "position")["dog"]] == [0.9, 0.8, 0.7, 0.6]


def test_colors_of_the_most_confident_objects():
    red = DOG | {"color": "red"}
    found = [dog(1, 0, score=0.9), dog(2, 0, score=0.8)]  # orange, red
    assert verdict(found, red, colors=by_edge).reasons == ("expected 1 red dog, found orange",)
    assert verdict(found[::-1][:1], red, colors=by_edge).correct
    assert not verdict(found, red | {"count": 2}, colors=by_edge).correct


def test_positions_with_their_margin():
    cat = dog(100, 100, name="cat")
    left = DOG | {"position": ["left of", 0]}
    assert relations(dog(50, 100).box, cat.box) == {"left of"} and relations(cat.box, dog(50, 100).box) == {"right of"}
    assert relations(dog(100, 50).box, cat.box) == {"above"} and relations(dog(60, 60).box, cat.box) == {
        "left of",
        "above",
    }
    assert relations(dog(98, 100).box, cat.box) == set()  # a tenth of both widths: 2 pixels
    assert relations(dog(97, 100).box, cat.box) == set()  # what remains is a third of the distance
    assert relations(dog(95, 100).box, cat.box) == {"left of"}
    assert verdict([dog(50, 100), cat], CAT, left).correct
    assert verdict([dog(150, 100), cat], CAT, left).reasons == ("expected dog left of cat, found right of",)
    assert verdict([dog(50, 100)], CAT, left).reasons == (
        "expected 1 cat, found 0",
        "no target for dog to be left of",
    )
    with pytest.raises(ValueError, match="entry 1, which is not an earlier one"):
        verdict([dog(50, 100), cat], CAT, DOG | {"position": ["left of", 1]})


def test_accuracy_by_category():
    found = accuracy([True, False, True, True], ["colors", "colors", "counting", "colors"])
    assert found == pytest.approx({"colors": 2 / 3, "counting": 1.0, "overall": 5 / 6})
    for verdicts, tags in (([], []), ([True], [])):
        with pytest.raises(ValueError, match="one category per image"):
            accuracy(verdicts, tags)
