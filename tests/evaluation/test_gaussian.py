"""The figure of Gaussian noise: distinct captions, equal images per category, resumable, rendered from its data."""

import json
import math
import re

import numpy as np
import pytest

from benchmarks import gaussian
from noisear_rl.denoisers.shapes.captions import CATEGORIES, SPLITS, captions_of, evaluation_captions, meaning
from noisear_rl.evaluation.intervals import category_mean


@pytest.mark.parametrize("split", SPLITS)
def test_evaluation_captions_have_distinct_meanings(split):
    chosen = evaluation_captions(split)
    assert len({meaning(c) for c in chosen}) == len(chosen) and set(chosen) <= set(captions_of(split))
    assert chosen == evaluation_captions(split)
    for category in CATEGORIES:
        own = [c for c in chosen if c.category == category]
        meanings = {meaning(c) for c in captions_of(split, category)}
        assert len(own) == min(40, len(meanings))
        plain = [c for c in own if not c.objects[0].color]
        if category == "position":
            assert len(plain) == 20 and len({c.relation for c in own}) == 4
        assert own[:2] == [c for c in evaluation_captions(split, 2) if c.category == category]


def test_figure():
    """Two categories of unequal captions, whose means and errors are known."""
    captions = {"validation": [["p", "a"], ["q", "b"]], "test": [["r", "b"], ["s", "a"], ["t", "b"]]}
    right = {"validation": ["1010", "11111111"], "test": ["0000", "1110", "10"]}
    record = {"captions": captions, "denoisers": {"x": {"right": right}}}
    both = gaussian.figure(record, "x")
    assert both.categories == {"a": pytest.approx((50 + 75) / 2), "b": pytest.approx((100 + 0 + 50) / 3)}
    assert both.right.mean == pytest.approx((62.5 + 50) / 2) and both.images == 22
    variance = (1 / 3 / 4 + 1 / 4 / 4) / 4**2 + (1 / 2 / 2) / 6**2  # sample variance / images * weight ** 2
    assert both.noise == pytest.approx(196 * math.sqrt(variance))
    alone = gaussian.figure(record, "x", ("validation",))
    assert alone.right.mean == pytest.approx((50 + 100) / 2) and math.isnan(alone.right.low)  # one caption per category
    assert 196 * math.sqrt(0.25 / (len(CATEGORIES) * gaussian.IMAGES)) <= 0.5  # whatever is right


def test_measure_resume_and_render(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gaussian, "provenance", lambda: {"commit": "abc"})  # it may change while the tests run
    page, runs = tmp_path / "results/gaussian.md", tmp_path / "runs"
    command = ["--per-category", "2", "--images", "5", "--runs", str(runs), "--page", str(page)]
    gaussian.main(command)
    text, record = page.read_text(), json.loads(page.with_suffix(".json").read_text())
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| shapes-turbo")]
    assert [row[1].strip() for row in rows] == ["validation", "test", "both"]
    assert [int(row[2]) for row in rows] == [36, 36, 72]  # 6 categories x 2 captions x 3 noises
    bits = record["denoisers"]["shapes-turbo"]["right"]["test"]
    scores = np.array([[float(bit) for bit in part] for part in bits])
    names = [category for _, category in record["captions"]["test"]]
    assert float(rows[1][3].split("[")[0]) == pytest.approx(100 * category_mean(scores, names), abs=0.051)
    assert len({text for text, _ in record["captions"]["test"]}) == 12

    # A caption that was not finished is measured again and gives the same; the others are not.
    lost = runs / "shapes-turbo/test/003.txt"
    kept = {file: file.stat().st_mtime_ns for file in runs.rglob("*.txt") if file != lost}
    before = lost.read_text()
    lost.unlink()
    gaussian.main(command)
    assert lost.read_text() == before and {file: file.stat().st_mtime_ns for file in kept} == kept
    assert page.read_text() == text

    page.write_text("changed by hand")
    with monkeypatch.context() as patch:
        patch.setattr(gaussian, "measure", None)
        gaussian.main([*command, "--render"])
    assert page.read_text() == text and text in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"written with other settings \(captions: "):
        gaussian.main(["--per-category", "1", *command[2:]])
    other = json.loads(page.with_suffix(".json").read_text())
    other["denoisers"]["shapes"] = other["denoisers"]["shapes-turbo"]
    page.with_suffix(".json").write_text(json.dumps(other))
    gaussian.main(command)
    assert re.findall(r"^\| (\S+) \| both", page.read_text(), re.M) == ["shapes-turbo", "shapes"]  # same weights: kept
    other["denoisers"]["shapes"]["weights"] = "old"
    page.with_suffix(".json").write_text(json.dumps(other))
    gaussian.main(command)
    assert re.findall(r"^\| (\S+) \| both", page.read_text(), re.M) == ["shapes-turbo"]
