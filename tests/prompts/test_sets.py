import json
import re
import warnings
from collections import Counter

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from noisear_rl.denoisers.shapes.captions import CATEGORIES
from noisear_rl.prompts import PUBLISHED, PromptSet, load_prompt_set
from noisear_rl.prompts.geneval_style import COLORS, NUMBERS, OBJECTS, geneval_style_prompts, plural
from noisear_rl.prompts.sets import HPD_FILES

DRAWBENCH = (
    'Prompts,Category\nA teal kettle.,Colors\n"A sign that says ""Open"".",Text\n"One fox, two hens.",Counting\n'
)
HEN, FOX = {"class": "hen", "count": 1}, {"class": "fox", "count": 1}
GENEVAL = [
    {"tag": "single_object", "include": [HEN], "prompt": "a photo of a hen"},
    {"tag": "counting", "include": [HEN | {"count": 2}], "exclude": [HEN | {"count": 3}], "prompt": "two hens"},
    {"tag": "position", "include": [HEN, FOX | {"position": ["left of", 0]}], "prompt": "a fox left of a hen"},
    {"tag": "colors", "include": [FOX | {"color": "red"}], "prompt": "a photo of a red fox"},
]


@pytest.fixture
def write(tmp_path):
    """Writes a file of bytes, text or JSON lines and returns its path."""

    def to_file(name, content):
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return to_file


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network, and empty caches in the returned folder."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return tmp_path


def bad_lines(path) -> list[int]:
    """Lines of the malformed rows, from the error."""
    with pytest.raises(ValueError, match="--skip-bad-rows") as caught:
        load_prompt_set(path)
    return [int(number) for number in re.findall(rf"{path.name}, (?:line|row) (\d+)", str(caught.value))]


def test_drawbench_csv(write):
    found = load_prompt_set(write("DrawBench Prompts - Sheet1.csv", DRAWBENCH))
    assert found == PromptSet(
        "DrawBench Prompts - Sheet1",
        ["A teal kettle.", 'A sign that says "Open".', "One fox, two hens."],
        ["Colors", "Text", "Counting"],
    )


def test_geneval_jsonl_and_txt(write):
    found = load_prompt_set(write("evaluation_metadata.jsonl", GENEVAL), name="GenEval")
    assert (found.name, found.prompts) == ("GenEval", [row["prompt"] for row in GENEVAL])
    assert found.categories == ["single_object", "counting", "position", "colors"]
    plain = load_prompt_set(write("generation_prompts.txt", "".join(row["prompt"] + "\n" for row in GENEVAL)))
    assert plain.prompts == found.prompts and set(plain.categories) == {"all"}


def test_pick_a_pic_parquet(tmp_path):
    path = tmp_path / "test.parquet"
    captions = ["a fox in the rain", "a fox in the rain", "a hen, oil on canvas"]
    Dataset.from_dict({"best_image_uid": ["a", "b", "c"], "caption": captions, "jpg_0": [b"\xff"] * 3}).to_parquet(path)
    found = load_prompt_set(path)
    assert found.prompts == ["a fox in the rain", "a hen, oil on canvas"] and found.categories == ["all", "all"]


def test_class_labels_of_a_parquet_file_become_names(tmp_path):
    path = tmp_path / "drawbench.parquet"
    features = Features({"prompts": Value("string"), "category": ClassLabel(names=["Colors", "Text"])})
    Dataset.from_dict({"prompts": ["x", "y", "z"], "category": [1, 0, -1]}, features=features).to_parquet(path)
    assert load_prompt_set(path).categories == ["Text", "Colors", "all"]


def test_parti_prompts_tsv_keeps_quotation_marks(write):
    text = 'Prompt\tCategory\tChallenge\tNote\n"H I" on a wall\tIllustrations\tBasic\t\na hen\tAnimals\tBasic\tA note\n'
    found = load_prompt_set(write("PartiPrompts.tsv", text))
    assert found.prompts == ['"H I" on a wall', "a hen"] and found.categories == ["Illustrations", "Animals"]


def test_hpd_folder_and_file(write, tmp_path):
    for i, file in enumerate(HPD_FILES):
        write(file, json.dumps([f"prompt {i}", f"another {i}", "in every file"]))
    found = load_prompt_set(tmp_path)
    assert found.prompts[:4] == ["prompt 0", "another 0", "in every file", "prompt 1"] and len(found) == 9
    assert Counter(found.categories) == {"anime": 3, "concept-art": 2, "paintings": 2, "photo": 2}
    assert set(load_prompt_set(tmp_path / "photo.json").categories) == {"photo"}
    (tmp_path / "photo.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no photo\.json"):
        load_prompt_set(tmp_path)


@pytest.mark.parametrize("column", ["prompt", "Prompts", "Prompt", "caption", "TEXT"])
@pytest.mark.parametrize("category", ["category", "Category", "tag"])
def test_column_names(write, column, category):
    found = load_prompt_set(write("own.csv", f"id,{category},{column}\n7,animals,a hen\n"))
    assert (found.prompts, found.categories) == (["a hen"], ["animals"])
    found = load_prompt_set(write("own.jsonl", [{"id": 7, category: "animals", column: "a hen"}]))
    assert (found.prompts, found.categories) == (["a hen"], ["animals"])


@pytest.mark.parametrize("name", ["own.csv", "own.txt"])
def test_byte_order_mark_and_windows_line_ends(write, name):
    header = "Prompt\r\n" if name.endswith("csv") else ""
    found = load_prompt_set(write(name, b"\xef\xbb\xbf" + f"{header}a hen\r\n\r\n  two hens \r\n".encode()))
    assert found.prompts == ["a hen", "two hens"]


def test_unusual_line_separators_stay_in_a_prompt(write):
    assert load_prompt_set(write("own.txt", "a\u2028hen\x0bhere\n")).prompts == ["a\u2028hen\x0bhere"]


def test_quoted_line_breaks_keep_line_numbers_right(write):
    path = write(
        "own.csv", b'Prompt,Category\r\n"a hen\r\non two lines",x\r\na,b,c\r\n"four\n\n\nlines",y\r\nonly one\r\n'
    )
    assert bad_lines(path) == [4, 9]
    with pytest.warns(UserWarning, match="2 of 4 rows"):
        found = load_prompt_set(path, skip_bad_rows=True)
    assert found.prompts == ["a hen\r\non two lines", "four\n\n\nlines"]


def test_bad_rows_of_csv(write):
    path = write("own.csv", b'Prompt,Category\na,x\n,x\nb\nc,x,y\n"d"e,x\nf \xff,x\n   ,x\ng,x\n')
    assert bad_lines(path) == [3, 4, 5, 6, 7]  # and a sixth, which is only counted
    with pytest.raises(ValueError, match=r"6 of 8 rows are malformed[\s\S]*and 1 more"):
        load_prompt_set(path)
    with pytest.warns(UserWarning, match=r"6 of 8 rows .*own\.csv, line 3"):
        found = load_prompt_set(path, skip_bad_rows=True)
    assert found.prompts == ["a", "g"]
    assert [re.search(r"line \d+", message)[0] for message in found.skipped] == [f"line {n}" for n in range(3, 9)]


def test_a_text_with_unquoted_commas_is_never_cut(write):
    """Also where as many columns are left out as commas are unquoted."""
    path = write("own.csv", 'Prompt,Category\na hen,x\nOne fox, two hens.\n"a fox, a hen"," x"\na fox, a hen,x\n')
    assert bad_lines(path) == [3, 5]
    with pytest.warns(UserWarning, match=r"2 of 4 rows .*own\.csv, line 3: a space follows a comma"):
        found = load_prompt_set(path, skip_bad_rows=True)
    assert (found.prompts, found.categories) == (["a hen", "a fox, a hen"], ["x", "x"])
    spaced = load_prompt_set(write("spaced.csv", "Prompt, Category\na hen, x\n"))  # this file's own style
    assert (spaced.prompts, spaced.categories) == (["a hen"], ["x"])
    assert load_prompt_set(write("own.tsv", "Prompt\tCategory\nOne fox, two hens.\t x\n")).prompts[0].endswith("hens.")


def test_a_quotation_mark_that_is_never_closed_names_its_line(write):
    assert bad_lines(write("own.csv", 'Prompt,Category\na,x\n"b,x\nc,x\n')) == [3]


def test_bad_rows_of_tsv(write):
    assert bad_lines(write("own.tsv", b"Prompt\tCategory\na\tx\nb\n\tx\nc\xfe\tx\n")) == [3, 4, 5]


def test_bad_rows_of_txt(write):
    assert bad_lines(write("own.txt", b"a\n\nb \xc3(\n")) == [3]


def test_bad_rows_of_jsonl(write):
    rows = ['{"prompt": "a"}', "", "{broken", '["b"]', '{"id": 1}', '{"prompt": 3}', '{"prompt": " "}', '"plain"']
    path = write("own.jsonl", "\n".join(rows))
    assert bad_lines(path) == [3, 4, 5, 6, 7]
    with pytest.warns(UserWarning, match="5 of 7"):
        assert load_prompt_set(path, skip_bad_rows=True).prompts == ["a", "plain"]


NO_PROMPTS = ['{"prompt": null}', '{"prompt": "\\ud83d"}', '{"prompt": "b", "tag": ["x"]}', '{"prompt": ["b"]}', "NaN"]


@pytest.mark.parametrize("row", [*NO_PROMPTS, "[" * 100_000])
def test_a_row_that_is_no_prompt(write, row):
    assert bad_lines(write("own.jsonl", f'{{"prompt": "a"}}\n{row}\n')) == [2]


@pytest.mark.parametrize(
    "change",
    [
        {"include": []},
        {"include": "hen"},
        {"include": [{"class": "hen"}]},
        {"include": [{"class": 3, "count": 1}]},
        {"include": [{"class": "hen", "count": 0}]},
        {"include": [{"class": "hen", "count": "two"}]},
        {"include": [{"class": "hen", "count": 1, "color": 3}]},
        {"include": [{"class": "hen", "count": 1, "position": ["left of", 1]}]},
        {"include": [{"class": "hen", "count": 1, "position": "left of"}]},
        {"include": ["hen"]},
        {"exclude": {"class": "hen", "count": 3}},
    ],
)
def test_malformed_objects_of_geneval(write, change):
    path = write("evaluation_metadata.jsonl", [*GENEVAL, {**GENEVAL[0], "prompt": "another", **change}, GENEVAL[0]])
    assert bad_lines(path) == [5]
    with pytest.raises(ValueError, match=next(iter(change))):
        load_prompt_set(path)


def test_bad_rows_of_json(write):
    path = write("own.json", '[\n  "a",\n  "",\n  {"prompt": "b",\n   "tag": "x"},\n  7, "c",\n  null\n]\n')
    assert bad_lines(path) == [3, 6, 7]
    with pytest.raises(ValueError, match=r"line 6, item 4: .*7"):
        load_prompt_set(path)
    with pytest.warns(UserWarning):
        found = load_prompt_set(path, skip_bad_rows=True)
    assert (found.prompts, found.categories) == (["a", "b", "c"], ["all", "x", "all"])


@pytest.mark.parametrize("text", ['["a", "b"', '{"anime": ["a"]}', '"a"', '["a",\n "\n"]'])
def test_a_json_file_without_a_list_is_always_an_error(write, text):
    with pytest.raises(ValueError, match=r"own\.json: expected a JSON list"):
        load_prompt_set(write("own.json", text), skip_bad_rows=True)


def test_bad_rows_of_parquet(tmp_path):
    path = tmp_path / "own.parquet"
    not_utf8 = pyarrow.array([b"a", b"", b"b \xff", None, b"c"]).cast(pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"caption": not_utf8}), path)
    assert bad_lines(path) == [2, 3, 4]
    pyarrow.parquet.write_table(pyarrow.table({"caption": [1, 2]}), path)
    assert bad_lines(path) == [1, 2]
    pyarrow.parquet.write_table(pyarrow.table({"image": ["x"]}), path)
    with pytest.raises(ValueError, match=r"no prompt: expected one of .* found 'image'"):
        load_prompt_set(path)
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ValueError, match="damaged"):
        load_prompt_set(path)


def test_good_files_warn_of_nothing(write):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_prompt_set(write("own.csv", DRAWBENCH), skip_bad_rows=True).skipped == []


def test_duplicates_count_once_and_the_limit_counts_what_is_left(write):
    path = write("own.csv", "prompt,category\na,x\na ,y\nb,y\nA,y\n")
    found = load_prompt_set(path)
    assert (found.prompts, found.categories) == (["a", "b", "A"], ["x", "y", "y"])
    assert load_prompt_set(path, limit=2).prompts == ["a", "b"]
    assert load_prompt_set(path, limit=9) == found
    with pytest.raises(ValueError, match="limit"):
        load_prompt_set(path, limit=0)


@pytest.mark.parametrize("suffix", ["txt", "csv", "tsv", "jsonl", "json"])
def test_empty_files(write, suffix):
    with pytest.raises(ValueError, match="no prompts"):
        load_prompt_set(write(f"own.{suffix}", ""))
    with pytest.raises(ValueError, match="no prompts"):
        load_prompt_set(write(f"own.{suffix}", {"csv": "prompt\n", "tsv": "prompt\n", "json": "[]"}.get(suffix, "\n")))


def test_files_of_another_kind(write):
    with pytest.raises(ValueError, match=r"not from \.yaml"):
        load_prompt_set(write("own.yaml", "a hen"))
    with pytest.raises(ValueError, match="found 'a hen', 'animals'"):
        load_prompt_set(write("own.csv", "a hen,animals\ntwo hens,animals\n"))
    with pytest.raises(ValueError, match="UTF-16"):
        load_prompt_set(write("own.csv", DRAWBENCH.encode("utf-16")))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_name_without_network_says_where_to_get_the_file(name, offline):
    source, _, files = PUBLISHED[name]
    with pytest.raises(FileNotFoundError, match=f"{name}.*{re.escape(files[-1])}.*{source}.*pass the path"):
        load_prompt_set(name)


def test_an_unknown_name_lists_the_known_ones(offline):
    with pytest.raises(FileNotFoundError, match=r"parti-prompts.*did you mean 'drawbench'"):
        load_prompt_set("drawbnch")


def test_a_name_reads_what_the_hub_has_on_disk(offline):
    source, revision, files = PUBLISHED["drawbench"]
    folder = offline / "hub" / f"datasets--{source.replace('/', '--')}" / "snapshots" / revision
    folder.mkdir(parents=True)
    (folder / files[0]).write_text(DRAWBENCH)
    found = load_prompt_set("drawbench", limit=1)
    assert found == PromptSet("drawbench", ["A teal kettle."], ["Colors"])


def test_geneval_is_downloaded_once(write, offline, monkeypatch):
    _, revision, files = PUBLISHED["geneval"]
    (offline / revision / "prompts").mkdir(parents=True)
    published = write(f"{revision}/{files[0]}", GENEVAL)
    monkeypatch.setitem(PUBLISHED, "geneval", (offline.as_uri(), revision, files))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    found = load_prompt_set("geneval")
    assert found.name == "geneval" and found.categories == [row["tag"] for row in GENEVAL]
    published.unlink()
    assert load_prompt_set("geneval") == found


def test_geneval_style_prompts_are_unique_balanced_and_follow_the_seed():
    most = geneval_style_prompts(len(OBJECTS), seed=3)
    assert len(set(most.prompts)) == len(most) == 6 * len(OBJECTS)
    assert Counter(most.categories) == dict.fromkeys(CATEGORIES, len(OBJECTS))
    assert geneval_style_prompts(10, seed=3).prompts == most.prompts[:60]
    assert set(geneval_style_prompts(10, seed=4).prompts) != set(most.prompts[:60])
    for count in (0, len(OBJECTS) + 1):
        with pytest.raises(ValueError, match="1 to 48"):
            geneval_style_prompts(count)


def test_geneval_style_prompts_are_english():
    """Every prompt consists of words that its category allows, with the right article and plural."""
    vowels = {"airplane", "apple", "elephant", "envelope", "owl", "umbrella", "orange"}
    plurals = {"knife": "knives", "sheep": "sheep", "bench": "benches", "bus": "buses", "butterfly": "butterflies"}
    assert {noun: plural(noun) for noun in plurals} == plurals
    nouns, counted = "|".join(OBJECTS), "|".join(plurals.get(noun, plural(noun)) for noun in OBJECTS)
    plain, colored = rf"an? (?:{nouns})", rf"an? (?:{'|'.join(COLORS)}) (?:{nouns})"
    patterns = {
        "single_object": plain,
        "two_object": f"{plain} and {plain}",
        "counting": f"(?:{'|'.join(NUMBERS)}) (?:{counted})",
        "colors": colored,
        "position": f"{plain} (?:left of|right of|above|below) {plain}",
        "color_attr": f"{colored} and {colored}",
    }
    seen = set()
    for seed in range(10):
        written = geneval_style_prompts(len(OBJECTS), seed)
        for prompt, category in zip(written.prompts, written.categories, strict=True):
            assert re.fullmatch(f"a photo of {patterns[category]}", prompt), prompt
            for article, word in re.findall(r"\b(an?) (\w+)", prompt.removeprefix("a photo of ")):
                assert (article == "an") == (word in vowels), prompt
            named = [word for word in re.findall(r"\w+", prompt) if word in OBJECTS or word in COLORS]
            assert len(set(named)) == len(named), prompt  # two objects and two colours always differ
            seen.update(re.findall(r"\w+ ?(?:of)?", prompt))
    assert {"left of", "right of"} <= seen and {word.strip() for word in seen} >= {*OBJECTS, *COLORS, *NUMBERS}
