"""The data behind a table: small, exact, written atomically, and enough to render the table again."""

import gzip
import json

import numpy as np
import pytest

from noisear_rl.evaluation import results as module
from noisear_rl.evaluation.results import (
    MethodResult,
    Results,
    load_data,
    load_results,
    read_record,
    save_data,
    write_page,
    write_record,
)
from noisear_rl.evaluation.tables import render, results_table


def evaluation(folder, prompts: int = 12, samples: int = 4) -> Results:
    """Gaussian noise, a method with three training seeds, and a search without a density."""
    rng = np.random.default_rng(0)
    methods = {}
    for name, group in (("Gaussian", "Gaussian"), *((f"PPO {i}", "PPO") for i in range(3)), ("search", "search")):
        exact = (rng.random((prompts, samples)) < 0.6).astype(float)
        methods[name] = MethodResult(
            group=group,
            slug=name.lower(),
            scores={"shapes-exact": exact, "clip": rng.normal(20, 3, size=(prompts, samples)).round(6)},
            nfe=1.0,
            kl_to_gaussian=None if name == "search" else 12.5,
            noise_mean=0.001,
            noise_std=0.99,
            radial_spectrum=np.ones(5),
            noise_map=np.ones((128, 128)),
            diversity={"clip": rng.random(prompts).round(6)},
            trained=group == "PPO",
        )
    texts = [f"a photo of a {i % 5} thing" for i in range(prompts)]
    return Results(
        folder=folder,
        prompts=texts,
        categories=["small" if i % 5 < 2 else "large" for i in range(prompts)],
        samples=samples,
        judge="shapes-exact",
        methods=methods,
        denoiser="shapes-turbo",
        prompt_set="test",
        config={"seed": 1, "resample": "prompts"},
        provenance={"commit": "abc", "dirty": False},
        timing={name: 0.01 for name in methods},
        facts={"training images": {"PPO": 138_240}},
    )


def table(results: Results) -> str:
    return render(*results_table([results], "prompts"), "markdown")


def test_a_table_is_rendered_again_from_its_data(tmp_path):
    results = evaluation(tmp_path)
    path = save_data(results, tmp_path / "x.json")
    assert path == tmp_path / "x.json" and [file.name for file in tmp_path.iterdir()] == ["x.json"]
    kept = load_data(path)
    assert table(kept) == table(results) and "PPO" in table(kept)
    for name, method in results.methods.items():
        for scorer, scores in method.scores.items():
            np.testing.assert_array_equal(kept.methods[name].scores[scorer], scores)
        assert kept.methods[name].kl_to_gaussian == method.kl_to_gaussian
        assert kept.methods[name].noise_map.size == 0  # for figures only
    assert kept.facts == results.facts and kept.seconds_per_image() == results.timing
    assert path.stat().st_size < 8_000 and path.read_bytes() == save_data(kept, path).read_bytes()


def test_an_evaluation_on_disk_becomes_data(tmp_path):
    results = evaluation(tmp_path / "run")
    record = json.loads(save_data(results, tmp_path / "x.json").read_text())
    times = record.pop("timing")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/results.json").write_text(json.dumps(record))
    (tmp_path / "run/timing.json").write_text(json.dumps(times))
    kept = load_data(save_data(load_results(tmp_path / "run"), tmp_path / "y.json"))
    assert table(kept) == table(results) and kept.seconds_per_image() == results.timing


def test_large_data_are_compressed_and_too_large_data_refused(tmp_path, monkeypatch):
    results, path = evaluation(tmp_path, prompts=400, samples=64), tmp_path / "x.json"
    path.write_text("old")
    packed = save_data(results, path)
    assert packed == tmp_path / "x.json.gz" and not path.exists()  # one of both
    assert packed.stat().st_size < module.COMPRESSED < len(gzip.decompress(packed.read_bytes()))
    assert packed.read_bytes() == save_data(results, path).read_bytes()  # no time stamp
    assert table(load_data(path)) == table(load_data(packed.with_suffix(""))) == table(results)
    monkeypatch.setattr(module, "LIMIT", 1000)
    with pytest.raises(ValueError, match=r"x\.json\.gz: .* MB, more than 0\.001: keep fewer scorers"):
        save_data(results, path)
    assert packed.exists() and len(list(tmp_path.iterdir())) == 1
    monkeypatch.undo()
    assert save_data(evaluation(tmp_path), path) == path and not packed.exists()


def test_damaged_and_missing_data(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_data(tmp_path / "none.json")
    path = save_data(evaluation(tmp_path), tmp_path / "x.json")
    whole = path.read_text()
    for text in (whole[:100], "[]", "{}", whole.replace('"version":1', '"version":9')):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"x\.json is damaged or does not hold scores"):
            load_data(path)
    (tmp_path / "y.json.gz").write_bytes(gzip.compress(whole.encode())[:50])
    with pytest.raises(ValueError, match=r"y\.json is damaged or does not hold scores"):
        load_data(tmp_path / "y.json")
    (tmp_path / "y.json").write_text(whole)
    with pytest.raises(ValueError, match="remove the older one"):
        read_record(tmp_path / "y.json")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_record(tmp_path / "z.json", {"x": float("nan")})
    assert not (tmp_path / "z.json").exists()


def test_a_page_comes_from_the_data_on_disk(tmp_path):
    page = tmp_path / "results/x.md"
    show = lambda record: f"{sum(record['values'])} of {record['of']}\n"
    with pytest.raises(FileNotFoundError):
        write_page(page, show)
    assert write_page(page, show, {"values": (1, 2), "of": 4}) == "3 of 4\n" == page.read_text()
    page.write_text("changed by hand")
    assert write_page(page, show) == "3 of 4\n" == page.read_text()
    assert sorted(file.name for file in page.parent.iterdir()) == ["x.json", "x.md"]
