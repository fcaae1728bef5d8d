"""Tables of hand-written evaluations, in which every number is known."""

import csv
import io
import json
import re

import numpy as np
import pytest

from noisear_rl.evaluation import paper_tables
from noisear_rl.rewards import reward_config

CATEGORIES = ["colors", "colors", "counting", "counting"]
BASE = [[1, 0], [0, 0], [1, 1], [0, 0]]  # colors 25 %, counting 50 %
SEED_0 = [[1, 1], [1, 0], [1, 1], [1, 0]]  # colors 75 %, counting 75 %
SEED_1 = [[1, 1], [1, 1], [1, 1], [1, 0]]  # colors 100 %, counting 75 %


def method(group: str, scores: dict, **changes) -> dict:
    """A method's record in the schema of `results.json`."""
    record = {"group": group, "slug": group.lower(), "scores": scores, "nfe": 1.0, "kl_to_gaussian": 0.0}
    record |= {"noise_mean": 0.0, "noise_std": 1.0, "radial_spectrum": [1.0], "noise_map": [[0.0]]}
    return record | {"diversity": {"shapes-clip": [0.5, 0.3, 0.5, 0.3]}} | changes


def plus(scores: list, amount: float) -> list:
    return (np.array(scores) + amount).tolist()


def write(folder, methods: dict, **changes) -> str:
    """Writes an evaluation's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"version": 1, "provenance": {"commit": "abc", "device": "x86_64", "threads": 2}, "config": {}}
    record |= {"denoiser": "shapes-turbo", "prompt_set": "validation", "prompts": ["p0", "p1", "p2", "p3"]}
    record |= {"categories": CATEGORIES, "samples": 2, "judge": "shapes-exact", "methods": methods}
    (folder / "results.json").write_text(json.dumps(record | changes))
    return str(folder)


@pytest.fixture
def shapes(tmp_path) -> str:
    """Gaussian noise, PPO with two training seeds, and a search without a density."""
    scores = lambda exact, shift: {
        "shapes-exact": exact,
        "shapes-clip": plus([[16.0, 17.0]] * 4, shift),
        "shapes-match": BASE,
    }
    changes = {"noise_mean": 0.01, "noise_std": 0.98, "diversity": {"shapes-clip": [0.1, 0.1, 0.3, 0.3]}}
    methods = {
        "Gaussian": method("Gaussian", scores(BASE, 0)),
        "PPO 0": method("PPO", scores(SEED_0, 1), kl_to_gaussian=200.0, **changes),
        "PPO 1": method("PPO", scores(SEED_1, -1), kl_to_gaussian=220.0, **changes),
        "search & pick_best": method("search & pick_best", scores(BASE, 0), nfe=4.0, kl_to_gaussian=None),
    }
    folder = write(tmp_path / "shapes", methods)
    times = {"Gaussian": 0.01, "PPO 0": 0.02, "PPO 1": 0.04, "search & pick_best": 0.05}
    (tmp_path / "shapes" / "timing.json").write_text(json.dumps(times))
    return folder


@pytest.fixture
def drawbench(tmp_path) -> str:
    """An evaluation with the paper's scorers, one category."""
    scores = {
        "image-reward": [[0.5, 0.7]] * 4,
        "hpsv2.1": [[0.27, 0.29]] * 4,
        "aesthetic-v2": [[5.5, 5.7]] * 4,
        "pickscore": [[20.0, 21.0]] * 4,
        "clip-score": [[0.83, 0.85]] * 4,
    }
    better = {name: plus(values, 0.1) for name, values in scores.items()} | {"pickscore": [[21.0, 21.0]] * 4}
    methods = {"Gaussian": method("Gaussian", scores), "DPO": method("DPO", better)}
    names = {"denoiser": "dreamshaper", "prompt_set": "prompts/drawbench.txt", "judge": "image-reward"}
    return write(tmp_path / "drawbench", methods, **names, categories=["all"] * 4)


def run(capsys, *arguments: str) -> str:
    paper_tables.main(list(arguments))
    return capsys.readouterr().out


def read_csv(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def read_markdown(text: str) -> list[dict[str, str]]:
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line] for line in lines]
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_results_in_csv(shapes, capsys):
    gaussian, ppo, search = read_csv(run(capsys, shapes, "--format", "csv"))
    assert [row["method"] for row in (gaussian, ppo, search)] == ["Gaussian", "PPO", "search & pick_best"]
    number = lambda row, name: float(row[name])
    assert number(gaussian, "shapes-exact (%)") == 37.5
    assert number(ppo, "shapes-exact (%)") == pytest.approx((87.5 + 75) / 2)  # seeds pooled, categories averaged
    assert number(ppo, "colors (%)") == 87.5 and number(ppo, "counting (%)") == 75
    assert number(ppo, "gain (%)") == pytest.approx(81.25 - 37.5)
    assert number(ppo, "gain (%) low") < 43.75 < number(ppo, "gain (%) high")
    assert number(ppo, "shapes-exact wins (%)") == pytest.approx(50 + 43.75 / 2)
    for row in (gaussian, search):
        assert number(row, "shapes-exact wins (%)") == number(row, "shapes-clip wins (%)") == 50.0
        assert number(row, "shapes-clip prob. (%)") == 50.0
    assert number(ppo, "shapes-clip wins (%)") == 50.0  # one seed wins everywhere, the other nowhere
    assert number(ppo, "shapes-clip prob. (%)") == pytest.approx(50.0)  # sigmoid(1) and sigmoid(-1)
    assert number(ppo, "shapes-clip") == 16.5
    assert number(ppo, "diversity by shapes-clip (baseline 1)") == pytest.approx(0.5)
    assert (ppo["KL (nats)"], search["KL (nats)"]) == ("210", "")
    assert (ppo["noise mean"], ppo["noise std"], search["NFE"]) == ("0.01", "0.98", "4")
    assert (ppo["training seeds"], gaussian["training seeds"]) == ("2", "")
    assert number(ppo, "std of seeds") == pytest.approx(np.std([75, 87.5], ddof=1), rel=1e-4)
    assert gaussian["gain (%)"] == gaussian["gain (%) excludes 0"] == ""
    assert (number(search, "gain (%)"), search["gain (%) excludes 0"]) == (0, "0")
    assert "shapes-match wins (%)" not in ppo and number(ppo, "shapes-match") == 0.375


def test_results_in_markdown(shapes, capsys):
    text = run(capsys, shapes)
    gaussian, ppo, search = read_markdown(text)
    assert re.fullmatch(r"81\.2 \[\d+\.\d, \d+\.\d\]", ppo["shapes-exact (%)"])
    assert re.fullmatch(r"\+43\.8 \[-?\d+\.\d, \d+\.\d\]\*?", ppo["gain (%)"])
    assert gaussian["gain (%)"] == "–" and search["gain (%)"] == "+0.0 [0.0, 0.0]"
    assert (ppo["KL (nats)"], search["KL (nats)"], search["NFE"]) == ("210.0", "–", "4")
    assert (ppo["diversity by shapes-clip (baseline 1)"], ppo["std of seeds"]) == ("0.50", "8.8")
    assert (
        "validation: 4 prompts × 2 samples, denoiser shapes-turbo, judge shapes-exact (%), baseline Gaussian." in text
    )
    assert text == run(capsys, shapes)  # byte for byte


def test_the_mark_of_a_gain(tmp_path, capsys):
    right = {"shapes-exact": [[0, 0]] * 19 + [[0, 1]]}
    better = {"shapes-exact": [[1, 1]] * 19 + [[0, 1]]}
    methods = {"Gaussian": method("Gaussian", right), "PPO": method("PPO", better), "off": method("off", right)}
    size = {"prompts": [str(i) for i in range(20)], "categories": ["all"] * 20}
    folder = write(tmp_path / "run", methods, **size)
    marks = [row["gain (%)"].endswith("*") for row in read_markdown(run(capsys, folder))]
    assert marks == [False, True, False]
    assert "$^{*}$" in run(capsys, folder, "--format", "latex")
    rows = read_csv(run(capsys, folder, "--format", "csv"))
    assert [row["gain (%) excludes 0"] for row in rows] == ["", "1", "0"]


def gains(count: int) -> dict[str, dict]:
    """Gaussian noise and methods with growing gains over 20 prompts."""
    rng = np.random.default_rng(0)
    base, difference = rng.normal(size=(20, 2)), rng.normal(size=(20, 2))
    difference -= difference.mean()
    scores = {"Gaussian": base} | {f"M{i}": base + difference + 0.1 * (i + 1) for i in range(count)}
    return {name: method(name, {"shapes-exact": values.tolist()}) for name, values in scores.items()}


def test_marks_of_many_comparisons_are_corrected(tmp_path, capsys):
    size = {"prompts": [str(i) for i in range(20)], "categories": ["all"] * 20}
    five, six = (write(tmp_path / str(n), gains(n), **size) for n in (5, 6))
    text, corrected = run(capsys, five), run(capsys, six)
    assert "* excludes 0. " in text and "Holm" not in text
    assert "* excludes 0, after Holm correction for 6 comparisons." in corrected
    rows = read_csv(run(capsys, six, "--format", "csv"))[1:]
    p, adjusted = ([float(row[f"gain {kind}"]) for row in rows] for kind in ("p", "adjusted p"))
    expected = np.maximum.accumulate(np.sort(p) * np.arange(6, 0, -1)).clip(max=1)
    assert sorted(adjusted) == pytest.approx(expected.tolist(), rel=1e-4)
    marks = [row["gain"].endswith("*") for row in read_markdown(corrected)[1:]]
    assert marks == [value < 0.05 for value in adjusted]
    assert [row["gain excludes 0"] for row in rows] == [str(int(value < 0.05)) for value in p]
    assert sum(marks) < sum(value < 0.05 for value in p)  # the smallest gains lose their mark
    again = write(tmp_path / "again", gains(3), **size)
    assert "Holm correction for 6 comparisons" in run(capsys, again, write(tmp_path / "other", gains(3), **size))
    ablations = run(capsys, f"a=1:{five}", f"a=2:{again}", "--table", "4")
    assert "* excludes 0, after Holm correction for 8 comparisons." in ablations
    assert [row["adjusted p"] for row in read_csv(run(capsys, five, "--format", "csv")) if "adjusted p" in row] == []


def test_notes_say_what_the_intervals_cover(shapes, tmp_path, capsys):
    assert "95 % intervals over prompts and training seeds, paired" in (text := run(capsys, shapes))
    assert "With one training seed, an interval is over prompts only" in text  # the search of this file is "trained"
    alone = {"Gaussian": method("Gaussian", {"shapes-exact": BASE}, trained=False)}
    search = {"best of 2": method("best of 2", {"shapes-exact": SEED_0}, trained=False)}
    text = run(capsys, write(tmp_path / "untrained", alone | search))
    assert "95 % intervals over prompts, paired" in text and "training" not in text.split("In brackets")[1]
    text = run(capsys, write(tmp_path / "single", alone | search, categories=["a", "b", "b", "b"]))
    assert "No interval where a category has a single prompt." in text and "[" not in text.split("In brackets")[0]
    text = run(capsys, write(tmp_path / "noise", alone, categories=["a", "b", "b", "b"]), "--resample", "noise")
    assert "No interval" not in text and "[" in text.split("In brackets")[0]


def test_repeated_prompts_are_one_prompt(tmp_path, capsys):
    scores = {"Gaussian": BASE, "PPO": SEED_0}
    once = {name: method(name, {"shapes-exact": values}) for name, values in scores.items()}
    rows = [0, 0, 0, 1, 2, 3]
    twice = {name: method(name, {"shapes-exact": [values[i] for i in rows]}) for name, values in scores.items()}
    size = {"prompts": [f"p{i}" for i in rows], "categories": [CATEGORIES[i] for i in rows]}
    for part in (once, twice):
        for record in part.values():
            record["diversity"] = {}
    text, repeated = run(capsys, write(tmp_path / "once", once)), run(capsys, write(tmp_path / "twice", twice, **size))
    assert read_markdown(text) == read_markdown(repeated)
    assert "4 prompts × 2 samples" in text and "4 prompts in 6 rows × 2 samples" in repeated


@pytest.mark.parametrize("layout", ["results", "1", "2", "3"])
def test_latex_is_balanced_and_escaped(shapes, drawbench, capsys, layout):
    text = run(capsys, shapes, drawbench, "--table", layout, "--format", "latex")
    kinds = re.search(r"\\begin\{tabular\}\{([lr]+)\}", text)[1]
    rows = [line for line in text.splitlines() if line.endswith(r" \\")]
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(kinds) - 1}
    for part in (r"\toprule", r"\midrule", r"\bottomrule", r"\end{tabular}"):
        assert text.count(part) == 1
    assert r"search \& pick\_best" in text
    outside_math = re.sub(r"\$[^$]*\$", "", text.split(r"\midrule")[1])
    assert not re.search(r"(?<!\\)[%_#$]|[↑×–]", outside_math)


def test_several_evaluations_in_one_table(shapes, drawbench, capsys):
    rows = read_markdown(run(capsys, shapes, drawbench))
    assert [row["denoiser"] for row in rows] == ["shapes-turbo"] * 3 + ["dreamshaper"] * 2
    assert rows[3]["shapes-exact (%)"] == "–" and rows[0]["image-reward (×100)"] == "–"
    assert rows[4]["image-reward (×100)"].startswith("70.0") and rows[4]["gain (×100)"].startswith("+10.0")


def test_our_numbers_next_to_the_papers(drawbench, capsys):
    text = run(capsys, drawbench, "--table", "1")
    rows = read_markdown(text)
    place = [(row["dataset"], row["denoiser"]) for row in rows]
    assert len(rows) == 27 + 2 and place == sorted(place, key=place.index)  # our rows join those of the paper
    mine = [row for row in rows if row["dataset"] == "DrawBench" and row["denoiser"] == "DreamShaper-xl-v2-turbo"]
    assert [row["method"] for row in mine] == [
        "Standard (paper)", "Golden Noise (paper)", "NoiseAR (paper)", "Gaussian (ours)", "DPO (ours)"
    ]  # fmt: skip
    *_, paper, gaussian, dpo = [list(row.values())[3:] for row in mine]
    assert paper == ["31.02", "5.61", "53.58", "107.91", "86.62", "56.08", "–"]
    assert gaussian == ["28.00", "5.60", "50.00", "60.00", "84.00", "–", "50.00"]
    probability = 50 * (1 / (1 + np.exp(-1)) + 0.5)
    assert dpo == ["38.00", "5.70", f"{probability:.2f}", "70.00", "94.00", "–", "75.00"]
    assert list(mine[0])[3:] == [
        "HPSv2↑", "AES↑", "PickScore↑ (%)", "ImageReward↑ (×100)", "CLIPScore↑ (%)", "MPS↑ (%)", "PickScore wins↑ (%)"
    ]  # fmt: skip
    assert "Scorers: hpsv2.1, aesthetic-v2, pickscore, image-reward, clip-score." in text
    assert "very likely what the paper prints" in text and "250 × cosine by default" in text


def test_published_preferences_are_no_win_rates():
    """Of 200 prompts with one image each, a win rate would be a multiple of 0.5 %, or of 0.25 % with ties."""
    rows = [row for row in paper_tables.published("tables.csv") if row["dataset"] == "DrawBench"]
    printed = [float(row[name]) for row in rows for name in ("pickscore_pct", "mps_pct")]
    shares = [value for value in printed if value * 100 % 25 == 0]
    assert len(printed) == 30 and not shares


def test_the_six_metrics_are_those_of_the_papers_columns():
    """HPSv2 in version 2.1, and the mask of MPS's README for pairs."""
    metrics = reward_config("configs/rewards/metrics.yaml")
    first = [kinds for _, kinds in paper_tables.PAPER_SCORERS.values()]
    assert metrics.weights.keys() == {"hpsv2.1", "aesthetic-v2"} | {kinds[0] for kinds in first[2:]}
    assert first[0][0] == "hpsv2.1" and metrics.options["mps"]["threshold"] == 0.01
    assert max(float(row["hpsv2"]) for row in paper_tables.published("tables.csv")) > 31


def test_published_numbers_alone(capsys):
    first, second = (read_csv(run(capsys, "--table", name, "--format", "csv")) for name in "12")
    assert len(first) == 27 and len(second) == 6
    assert all(row["method"].endswith(" (paper)") for row in first + second)
    assert first[2] == {
        "dataset": "DrawBench", "denoiser": "SDXL", "method": "NoiseAR (paper)", "HPSv2↑": "27.86", "AES↑": "5.56",
        "PickScore↑ (%)": "58.06", "ImageReward↑ (×100)": "75.99", "CLIPScore↑ (%)": "84.27", "MPS↑ (%)": "58.09",
    }  # fmt: skip
    assert second[3]["method"] == "NoiseAR-DPO (paper)" and second[3]["ImageReward↑ (×100)"] == "112.58"


def test_cost(shapes, capsys):
    rows = read_csv(run(capsys, shapes, "--table", "3", "--format", "csv"))
    cells = [[row[name] for name in ("method", "NFE", "seconds per image", "GFLOPs per image")] for row in rows]
    assert cells == [
        ["denoising (paper)", "", "15", "2600"],
        ["NoiseAR (paper)", "", "0.03", "23.12"],
        ["Gaussian (ours)", "1", "0.01", ""],
        ["PPO (ours)", "1", "0.03", ""],
        ["search & pick_best (ours)", "4", "0.05", ""],
    ]


def test_no_diversity_ratio_to_identical_images(tmp_path, capsys):
    same = {"diversity": {"shapes-clip": [0.0] * 4}}
    methods = {
        "Gaussian": method("Gaussian", {"shapes-exact": BASE}, **same),
        "PPO": method("PPO", {"shapes-exact": BASE}),
    }
    rows = read_markdown(run(capsys, write(tmp_path / "same", methods)))
    assert [row["diversity by shapes-clip (baseline 1)"] for row in rows] == ["–", "–"]


def test_cost_without_timing(drawbench, capsys):
    assert [row["seconds per image"] for row in read_markdown(run(capsys, drawbench, "--table", "3"))[2:]] == ["–", "–"]


def test_ablations(shapes, drawbench, capsys):
    text = run(capsys, f"patch_size=4:{shapes}", f"temperature=0.5:{drawbench}", "--table", "4")
    rows = read_markdown(text)
    assert [row["ablation"] for row in rows] == (
        ["patch_size"] * (5 + 3) + ["decoder_layers"] * 5 + ["head_layers"] * 5 + ["temperature"] * 2
    )
    assert rows[3]["value"] == "32 (default)" and rows[3]["method"] == "NoiseAR (paper)"
    assert (rows[3]["CLIPScore↑ (%)"], rows[3]["ImageReward↑ (×100)"], rows[3]["gain"]) == ("84.27", "76.00", "–")
    assert (rows[6]["value"], rows[6]["method"], rows[6]["CLIPScore↑ (%)"]) == ("4", "PPO (ours)", "–")
    assert rows[6]["judge"].startswith("81.2") and rows[6]["gain"].startswith("+43.8")
    assert rows[-1]["CLIPScore↑ (%)"] == "94.00" and rows[-1]["ImageReward↑ (×100)"] == "70.00"
    assert "patch_size 4 (ours): validation: 4 prompts" in text and "patch_size (paper): the five sizes" in text
    assert len(read_csv(run(capsys, "--table", "4", "--format", "csv"))) == 15


def test_output_file(shapes, tmp_path, capsys):
    path = tmp_path / "new" / "table.csv"
    assert str(path) in run(capsys, shapes, "--format", "csv", "-o", str(path))
    assert path.read_text() == run(capsys, shapes, "--format", "csv")


def test_invalid_folders_and_options(shapes, tmp_path, capsys):
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "results.json").write_text('{"version": 1, "methods": {')
    lacking = {"Gaussian": method("Gaussian", {"shapes-exact": BASE}), "PPO": method("PPO", {"shapes-match": BASE})}
    write(tmp_path / "lacking", lacking)
    write(tmp_path / "short", {"Gaussian": method("Gaussian", {"shapes-exact": BASE[:3]})})
    write(tmp_path / "empty", {})
    for arguments, error, message in (
        ([], ValueError, "expected the folder of an evaluation"),
        ([str(tmp_path / "none")], FileNotFoundError, "holds no results.json"),
        ([str(tmp_path / "torn")], ValueError, "damaged"),
        ([str(tmp_path / "lacking")], ValueError, "scores of 'PPO' by 'shapes-exact'"),
        ([str(tmp_path / "short")], ValueError, r"expected \(4, 2\) scores of 'Gaussian'"),
        ([str(tmp_path / "empty")], ValueError, "expected methods"),
        ([shapes, "--table", "4"], ValueError, "NAME=VALUE:FOLDER"),
    ):
        with pytest.raises(error, match=message):
            paper_tables.main(arguments)
    with pytest.raises(ValueError, match=r"resample must be one of \('prompts', 'noise'\), not 'seeds'"):
        paper_tables.make_table(paper_tables.TableConfig(runs=(shapes,), resample="seeds"))
    for option in ("--resample", "--format", "--table"):
        with pytest.raises(SystemExit):
            paper_tables.main([shapes, option, "seeds"])
        message = capsys.readouterr().err
        assert "invalid choice 'seeds'" in message and option in message
