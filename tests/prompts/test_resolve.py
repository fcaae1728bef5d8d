"""Resolution of the ``prompts`` option."""

import itertools
from collections import Counter

import pytest

from noisear_rl.denoisers.shapes.captions import CATEGORIES, captions_of, parse_caption
from noisear_rl.prompts import resolve_prompts


def test_splits_by_name():
    names = {name: resolve_prompts(name, "shapes-turbo").prompts for name in ("train", "validation", "train-balanced")}
    names["test"] = resolve_prompts("test", "shapes-turbo", allow_test=True).prompts
    for one, other in itertools.combinations(("train", "validation", "test"), 2):
        assert not set(names[one]) & set(names[other])
    assert set(names["train-balanced"]) <= set(names["train"]) == set(resolve_prompts(None, "shapes").prompts)
    counts = Counter(parse_caption(prompt).category for prompt in names["train-balanced"])
    assert set(counts.values()) == {500} and len(counts) == 6
    with pytest.raises(FileNotFoundError, match="neither a file"):
        resolve_prompts("train-balanced", "sdxl")


def test_the_test_split_is_refused_unless_allowed():
    for name in ("test", "test-balanced"):
        with pytest.raises(ValueError, match=rf"'{name}' is kept for published results.*Use 'validation"):
            resolve_prompts(name, "shapes")
        assert set(resolve_prompts(name, "shapes", allow_test=True).prompts) <= {c.text for c in captions_of("test")}


def test_a_count_draws_equal_shares_of_a_split():
    found = resolve_prompts("validation", "shapes", count=60)
    assert found.name == "shapes-validation" and Counter(found.categories) == dict.fromkeys(CATEGORIES, 10)
    assert found.categories == [parse_caption(prompt).category for prompt in found.prompts]
    assert resolve_prompts("validation", "shapes", count=60) == found
    with pytest.raises(ValueError, match="at least 1"):
        resolve_prompts("train", "shapes", count=0)


def test_prompts_themselves():
    texts = ["a photo of a red circle", "three apples"]
    found = resolve_prompts(texts, "shapes")
    assert found.prompts == texts and found.categories == ["colors", "all"]
    assert resolve_prompts(texts, "shapes", count=1).prompts == texts[:1]
    assert resolve_prompts(texts[0], "sdxl").prompts == texts[:1]  # one prompt on the command line is a string
    for empty in ([], [" "], ["a hen", ""]):
        with pytest.raises(ValueError, match="non-empty"):
            resolve_prompts(empty, "shapes")
    for misspelt in ("captoins.txt", "drawbnch", "held-out"):
        with pytest.raises(FileNotFoundError, match=misspelt):
            resolve_prompts(misspelt, "shapes")


def test_files_and_generated_prompts(tmp_path):
    file = tmp_path / "own prompts.txt"
    file.write_text("a hen\ntwo hens\na hen\n")
    assert resolve_prompts(str(file), "sdxl").prompts == ["a hen", "two hens"]
    assert resolve_prompts(str(file), "sdxl", count=1).prompts == ["a hen"]
    ours = resolve_prompts("geneval-style", "sdxl", count=30)
    assert len(set(ours.prompts)) == 30 and set(Counter(ours.categories).values()) == {5}
