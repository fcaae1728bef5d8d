import base64
import hashlib
import html
import json
import os
import re
import shlex
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from noisear_rl.algos.evaluate import EvaluateConfig
from noisear_rl.config import parse_config, to_mapping
from noisear_rl.evaluation.results import load_results
from noisear_rl.report import charts as figures
from noisear_rl.report import page as report_page
from noisear_rl.report.embed import embed_file, fit_images
from noisear_rl.report.page import command
from noisear_rl.samplers.by_name import SearchConfig

# Right images out of 4 samples, by prompt; the prompts are named after the order in which they must be shown.
RIGHT = {"Gaussian": [4, 1, 1, 2, 1, 3], "PPO 0": [0, 2, 4, 4, 4, 1], "PPO 1": [0, 2, 4, 4, 4, 3]}
PROMPTS = ["first", "third", "fifth", "fourth", "sixth", "second"]
CATEGORIES = ["colors", "colors", "colors", "counting", "counting", "counting"]
MAP = [[0.0, 0.5], [-0.5, 0.25]]


def noisy(size: tuple[int, int], seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def write_evaluation(folder: Path, *, images: bool = True, **changes) -> Path:
    """Writes an evaluation of 6 prompts, 4 samples and 3 methods in 2 groups; ``changes`` replace parts of it."""
    methods = {}
    for index, (name, counts) in enumerate(RIGHT.items()):
        exact = [[1.0] * count + [0.0] * (4 - count) for count in counts]
        methods[name] = {
            "group": name.split()[0],
            "slug": name.replace(" ", "-").lower(),
            "scores": {"exact": exact, "clip": [[9.5 + i + 1.5 * j for j in range(4)] for i in range(6)]},
            "nfe": 1.0,
            "kl_to_gaussian": 100.0 * index,
            "noise_mean": 0.01,
            "noise_std": 0.98,
            "radial_spectrum": [1.0, 1.25, 0.75],
            "noise_map": MAP,
            "diversity": {"clip": [0.3 - 0.1 * index] * 6},
        }
    record = {
        "version": 1,
        "provenance": {"commit": "abc1234", "device": "x86_64"},
        "config": {"methods": ["PPO 0=runs/a", "PPO 1=runs/b"], "samples": 4, "seed": 100},
        "denoiser": "shapes",
        "prompt_set": "validation",
        "prompts": PROMPTS,
        "categories": CATEGORIES,
        "samples": 4,
        "judge": "exact",
        "methods": methods,
    } | changes
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(record))
    for index, part in enumerate(record["methods"].values() if images else ()):
        (folder / "images" / part["slug"]).mkdir(parents=True)
        for i in range(6):
            for j in range(4):
                noisy((8, 8), 100 * index + 10 * i + j).save(folder / "images" / part["slug"] / f"{i:05d}-{j:02d}.png")
    return folder


def write_training(folder: Path, values: list[float], key: str = "charts/episodic_return") -> Path:
    folder.mkdir(parents=True)
    records = [{"step": i + 1, "charts/images": 64 * (i + 1), key: value} for i, value in enumerate(values)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.yaml").write_text("seed: 0\nlearning_rate: 0.125\n")
    return folder


def report(*folders: Path, options: tuple[str, ...] = ()) -> str:
    """The page that the command writes for these folders."""
    output = folders[0].parent / "out" / "report.html"
    report_page.main([*map(str, folders), "-o", str(output), *options])
    assert [path.name for path in output.parent.iterdir()] == ["report.html"]  # no temporary file is left
    return output.read_text(encoding="utf-8")


def methods_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())["methods"]


def shown_prompts(page: str) -> list[str]:
    return re.findall(r'<article class="case".*?<h3>([^<]*?) ?<', page, re.S)


def test_notes_name_training_seeds_and_trainings_their_commit(tmp_path):
    run, training = write_evaluation(tmp_path / "run"), write_training(tmp_path / "ppo-seed-0", [0.1, 0.2])
    starts = [
        {"step": 0, "commit": "0123abcd", "dirty": True, "command": "noisear ppo"},
        {"step": 20, "commit": "fe12"},
    ]
    (training / "provenance.json").write_text(json.dumps(starts))
    page = report(run, training)
    assert "95 % interval over prompts and training seeds" in " ".join(page.split())
    assert "ppo-seed-0, commit 0123abcd with uncommitted changes" in page
    assert "noisear ppo" in page and "after update 20" in page and "fe12" in page


def test_prompts_where_the_best_method_fails_come_first(tmp_path):
    page = report(write_evaluation(tmp_path / "run"))
    assert shown_prompts(page) == ["first", "second", "third", "fourth", "fifth", "sixth"]


def test_order_of_failures():
    best = np.array([[1, 1], [0, 1], [0, 0], [0, 1]])
    baseline = np.array([[0, 0], [0, 0], [0, 0], [1, 1]])
    assert report_page.failures_first(best, baseline).tolist() == [2, 3, 1, 0]


def test_max_images_keeps_complete_prompts_that_fail_most(tmp_path):
    run = write_evaluation(tmp_path / "run")
    page = report(run, options=("--max-images", "20"))
    assert shown_prompts(page) == ["first", "second"]
    assert len(re.findall(r'class="shot ', page)) == 16 and "2 of 6 prompts are shown" in page
    none = report(run, options=("--max-images", "1"))
    assert shown_prompts(none) == [] and "No images are shown" in none


def test_images_of_a_cell_alternate_between_seeds_and_skip_missing_files(tmp_path):
    run = write_evaluation(tmp_path / "run")
    for sample in (1, 2, 3):
        (run / f"images/gaussian/00000-0{sample}.png").unlink()
    chosen = report_page.choose_images(load_results(run), [0], report_page.ReportConfig(images_per_cell=3))
    assert [item[2:] for item in chosen] == [("Gaussian", 0), ("PPO 0", 0), ("PPO 1", 1), ("PPO 0", 2)]


def test_badges_state_right_and_wrong_in_text(tmp_path):
    page = report(write_evaluation(tmp_path / "run"))
    shots = re.findall(r'class="shot (\w+)".*?alt="([^"]*)".*?class="badge"[^>]*>([^<]+)<', page)
    assert len(shots) == 48
    for kind, alt, mark in shots:
        assert (kind, mark) in (("right", "✓"), ("wrong", "✗")) and alt.endswith(kind)
    assert {kind for kind, _, _ in shots} == {"right", "wrong"}
    by_score = report(write_evaluation(tmp_path / "b/run", judge="clip"))
    shots = re.findall(r'class="shot (\w+)".*?class="badge"[^>]*>([^<]+)<', by_score)
    assert {kind for kind, _ in shots} == {"score"} and {"9.5", "11", "12.5"} <= {mark for _, mark in shots}


def test_hostile_text_is_escaped(tmp_path):
    evil = """</script><script>alert(1)</script><img src=x onerror="alert(2)">'&"""
    methods = methods_of(write_evaluation(tmp_path / "first"))
    methods = {evil + name: part | {"group": evil + part["group"]} for name, part in methods.items()}
    changes = {"prompts": [evil + name for name in PROMPTS], "categories": [evil] * 3 + ["b"] * 3, "methods": methods}
    run = write_evaluation(tmp_path / "run", provenance={"commit": evil}, config={"note": evil}, **changes)
    page = report(run, write_training(tmp_path / "ppo-seed-0", [0.1, 0.2]), options=("--title", evil))
    assert page.count("<script") == 2 and page.count("</script>") == 2  # the page's own: data and code
    assert "<img src=x" not in page
    own = set(re.findall(r"<script[^>]*>", page))
    assert own == {'<script type="application/json" id="details">', "<script>"}
    details = json.loads(re.search(r'id="details">(.*?)</script>', page, re.S)[1])
    assert details[0]["prompt"].startswith(evil)
    text = html.unescape(page)
    assert f"<title>{evil}</title>" in text and f"commit {evil}" in text and text.count(f"{evil}PPO") > 3


def test_only_its_own_script_may_run_and_nothing_is_loaded(tmp_path):
    page = report(write_evaluation(tmp_path / "run"), write_training(tmp_path / "ppo-seed-0", [0.1, 0.2]))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert "default-src 'none'" in policy and "unsafe-inline'; script" in policy
    script = re.search(r"<script>(.*?)</script>", page, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert html.unescape(policy).split("script-src ")[1] == f"'sha256-{digest}'"
    loaded = re.findall(r' (?:src|href|srcset|data|action)="([^"]*)"', page)
    assert "url(" not in page and "@import" not in page
    assert len(loaded) > 40 and all(address.startswith("data:") for address in loaded)


def test_training_runs_alone(tmp_path):
    runs = [write_training(tmp_path / f"ppo-seed-{seed}", [0.1 * i for i in range(50)]) for seed in (0, 1)]
    page = report(*runs)
    assert "No evaluation was given" in page and "noisear evaluate writes one" in page
    assert "2 training seeds" in page and page.count('class="line"') == 2 and "learning_rate: 0.125" in page
    assert "<dialog" not in page and "<table" not in page


def test_missing_parts_are_omitted_with_a_reason(tmp_path):
    methods = methods_of(write_evaluation(tmp_path / "first"))
    for part in methods.values():
        part |= {"diversity": {}, "noise_map": [], "radial_spectrum": []}
    run = write_evaluation(tmp_path / "run", images=False, methods=methods, categories=["all"] * 6)
    page = report(run)
    reasons = ["No images are shown", "No training run was given", "has no categories", "Diversity was not measured"]
    for reason in [*reasons, "measured no noise maps and no spectra"]:
        assert reason in page
    assert 'id="by-category"' not in page and 'class="filter"' not in page and ">Diversity<" not in page
    silent = report(write_training(tmp_path / "b/other", [float("nan")] * 3))
    assert "nothing to draw in its log" in silent


def test_table_and_provenance(tmp_path):
    run = write_evaluation(tmp_path / "run")
    (run / "timing.json").write_text(json.dumps({"Gaussian": 0.25, "PPO 0": 0.5, "PPO 1": 1.5}))
    page = report(run)
    row = re.search(r'<tr class="best">(.*?)</tr>', page, re.S)[1]
    values = [float(value) for value in re.findall(r'<td data-value="([^"]*)"', row)]
    # judge, gain, wins, NFE, clip, diversity, KL, noise's std
    assert values == pytest.approx([66.667, 16.667, 58.333, 1, 14.25, 0.15, 150, 0.98], abs=1e-3)
    assert "2 seeds: 62.5, 70.8" in row and "× 0.50" in row and "1 s" in row
    assert (
        "abc1234" in page
        and "noisear evaluate --methods &#39;PPO 0=runs/a&#39; &#39;PPO 1=runs/b&#39; --samples 4 --seed 100" in page
    )


def test_folders_that_are_not_runs_are_rejected(tmp_path, capsys):
    run = write_evaluation(tmp_path / "run", images=False)
    (tmp_path / "empty").mkdir()
    output = ["-o", str(tmp_path / "report.html")]
    with pytest.raises(FileNotFoundError, match=r"expected results\.json .* or metrics\.jsonl"):
        report_page.main([str(tmp_path / "empty"), *output])
    with pytest.raises(ValueError, match="expected the folder of an evaluation"):
        report_page.main(output)
    with pytest.raises(SystemExit):
        report_page.main([str(run), "--max-images", "-1", *output])
    assert "must be at least 0, not -1" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ValueError, match="one evaluation"):
        report_page.main([str(run), str(write_evaluation(tmp_path / "second", images=False)), *output])
    broken = write_training(tmp_path / "broken", [0.1, 0.2])
    (broken / "metrics.jsonl").write_text('{"step": 1, "lo\n{"step": 2, "loss": 0.1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged"):
        report_page.main([str(broken), *output])
    damaged = write_evaluation(tmp_path / "third")
    (damaged / "images/gaussian/00000-00.png").write_bytes(b"\x89PNG no image")
    with pytest.raises(ValueError, match=r"00000-00\.png is not a complete image"):
        report_page.main([str(damaged), *output])
    assert not (tmp_path / "report.html").exists()


def test_small_images_are_kept_exactly_and_large_ones_fit(tmp_path):
    noisy((64, 48), 0).save(tmp_path / "small.png")
    noisy((300, 200), 1).save(tmp_path / "large.png")
    small, large = fit_images([tmp_path / "small.png", tmp_path / "large.png"])
    decoded = np.array(Image.open(BytesIO(base64.b64decode(small.uri.split(",")[1]))))
    np.testing.assert_array_equal(decoded, np.array(noisy((64, 48), 0)))
    assert (large.width, large.height) == (200, 300)  # never scaled up
    tight = fit_images([tmp_path / "large.png"] * 4, budget=40_000)
    assert sum(len(image.uri) for image in tight) <= 40_000 * 4 / 3
    assert tight[0].height < 300 and tight[0].width / tight[0].height == pytest.approx(2 / 3, abs=0.02)
    with pytest.raises(ValueError, match="--max-images"):
        fit_images([tmp_path / "large.png"] * 4, budget=400)
    assert embed_file(tmp_path / "large.png", 100, 80).height == 100


def test_500_noisy_images_stay_below_15_megabytes(tmp_path):
    """125 prompts x 2 methods x 2 samples of incompressible 512 x 512 noise; hard links keep the test fast."""
    methods = methods_of(write_evaluation(tmp_path / "first", images=False))
    scores = {"exact": [[1.0, 0.0]] * 125}
    two = {name: methods[name] | {"scores": scores, "diversity": {}} for name in ("Gaussian", "PPO 0")}
    prompts = [f"prompt {i}" for i in range(125)]
    changes = {"prompts": prompts, "categories": ["all"] * 125, "samples": 2, "methods": two}
    run = write_evaluation(tmp_path / "run", images=False, **changes)
    for index, part in enumerate(two.values()):
        (run / "images" / part["slug"]).mkdir(parents=True)
        noisy((512, 512), index).save(tmp_path / f"{index}.png", compress_level=1)
        for i in range(250):
            os.link(tmp_path / f"{index}.png", run / "images" / part["slug"] / f"{i // 2:05d}-{i % 2:02d}.png")
    page = report(run)
    assert page.count('class="shot ') == 500
    size = (tmp_path / "out/report.html").stat().st_size
    assert 5e6 < size <= 15e6  # the budget is used


def test_ticks_are_round_and_labels_do_not_overlap():
    assert figures.ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert figures.ticks(20, 1320) == [500, 1000]
    assert figures.ticks(-0.3, 0.3) == [-0.2, 0, 0.2]
    placed = figures.spread_labels([50, 10, 12, 11], 14)
    order = np.argsort([50, 10, 12, 11])
    assert np.all(np.diff(np.array(placed)[order]) >= 14 - 1e-9) and np.mean(placed) == pytest.approx(20.75)
    assert [figures.short(value) for value in (150_000, 1_500_000, 0.25, -2)] == ["150k", "1.5M", "0.25", "−2"]


def test_noise_map_is_white_at_zero_and_diverges():
    image = figures.noise_map(np.array([[0.0, 1.0], [-1.0, 0.5]]), 1.0)
    pixels = np.array(Image.open(BytesIO(base64.b64decode(image.uri.split(",")[1]))).convert("RGB")).astype(int)
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[0, 1, 0] > pixels[0, 1, 2] + 100 and pixels[1, 0, 2] > pixels[1, 0, 0] + 100
    assert np.all(pixels[1, 1] > pixels[0, 1])  # half way to white


def test_curves_of_many_records_are_thinned_and_smoothed():
    rng = np.random.default_rng(0)
    log = [{"step": i, "loss": 1 + rng.standard_normal()} for i in range(2000)] + [{"step": 2000, "loss": 0.0}]
    chart = str(figures.learning_chart([log], "loss", "Loss", 1))
    faint, smooth = (
        np.array([[float(v) for v in point.split(",")] for point in points.split()])
        for points in re.findall(r'points="([^"]*)"', chart)
    )
    assert len(faint) == len(smooth) == figures.POINTS
    assert smooth[:, 1].std() < 0.3 * faint[:, 1].std() and faint[-1, 0] == smooth[-1, 0]
    assert figures.learning_chart([[{"step": 1, "loss": float("nan")}]], "loss", "Loss", 1) is None


def test_the_command_restores_the_options_of_the_evaluation():
    config = EvaluateConfig(
        methods=("PPO=runs/a,runs/b", "PPO+best-of-4"),
        num_prompts=7,
        skip_bad_rows=True,
        search=SearchConfig(step_size=0.25),
        denoiser_options={"dtype": "float32"},
    )
    words = shlex.split(command(to_mapping(config)))
    assert words[:2] == ["noisear", "evaluate"] and parse_config(EvaluateConfig, words[2:], None) == config
