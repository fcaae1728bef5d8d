"""The numbers of a report and the sentence that summarises them."""

import math
import re
from pathlib import Path

import numpy as np
import pytest

from noisear_rl.evaluation.results import load_results
from noisear_rl.report.summary import table_rows, verdict
from tests.report.test_page import methods_of, report, write_evaluation


def verdict_of(folder: Path, judge: str = "exact") -> str:
    return verdict(table_rows(load_results(folder)), judge, binary=judge == "exact").replace("\u00a0", " ")


def test_verdict_at_equal_cost(tmp_path):
    sentence = verdict_of(write_evaluation(tmp_path / "run"))
    # 12 of 24 right against (15 + 17) / 2 of 24; both categories have the same number of prompts.
    assert sentence.startswith(
        "PPO gets 66.7 % of the images right, 16.7 points more than Gaussian noise (95 % interval"
    )
    assert sentence.endswith("not significant), at equal cost: 1 network evaluation per image.")
    assert sentence.count(". ") == 0  # one sentence


def test_verdict_names_significance_cost_and_the_best_at_equal_cost(tmp_path):
    methods = methods_of(write_evaluation(tmp_path / "first"))
    methods["Gaussian"]["scores"]["exact"] = [[0.0, 0.0, 0.0, 1.0]] * 5 + [[0.0] * 4]
    search = {"group": "best of 4", "slug": "search", "nfe": 4.0, "kl_to_gaussian": None}
    search["scores"] = methods["PPO 0"]["scores"] | {"exact": [[1.0] * 4] * 5 + [[1.0, 1.0, 1.0, 0.0]]}
    sentence = verdict_of(write_evaluation(tmp_path / "run", methods=methods | {"s": methods["PPO 0"] | search}))
    assert sentence.startswith("Best of 4 gets 95.8 % of the images right, 75.0 points more than Gaussian noise")
    assert re.search(r"\(95 % interval \+\d\d\.\d to \+\d\d\.\d, significant\), but not at equal cost", sentence)
    assert "4 network evaluations per image instead of 1; at equal cost the best is PPO, +45.8 points" in sentence


def test_verdict_of_scores_losses_and_a_lone_baseline(tmp_path):
    methods = methods_of(write_evaluation(tmp_path / "first"))
    for apart, known in ((0.5, "not significant"), (0.05, "significant")):  # two training seeds must agree
        for name, shift in (("PPO 0", 1.5 - apart), ("PPO 1", 1.5 + apart)):
            methods[name]["scores"]["clip"] = (np.array(methods["Gaussian"]["scores"]["clip"]) - shift).tolist()
        loss = verdict_of(write_evaluation(tmp_path / f"loss {apart}", methods=methods, judge="clip"), "clip")
        # Means over prompts and samples: 9.5 + 2.5 + 2.25 for Gaussian noise, 1.5 less for PPO.
        assert re.match(rf"PPO scores 12\.(8|75) on clip, 1\.50? less than Gaussian noise \([^)]*, {known}\)", loss)
    alone = verdict_of(write_evaluation(tmp_path / "alone", methods={"Gaussian": methods["Gaussian"]}))
    assert alone.startswith("Only Gaussian noise was evaluated: it gets 50.0 % of the images right")


def test_many_comparisons_are_corrected(tmp_path):
    """Six methods with the same small gain are not significant together; five are marked without a correction."""
    first = methods_of(write_evaluation(tmp_path / "first"))["Gaussian"]
    base = np.array([[0, 0, 1, 1]] * 5 + [[0, 1, 1, 1]]).astype(float)
    better = base.copy()
    better[[0, 1, 3, 4], 0] = 1  # two of three prompts in each category
    scores = {"Gaussian": base} | {f"M{i}": better for i in range(6)}
    methods = {
        name: first | {"group": name, "slug": name, "trained": False, "scores": {"exact": values.tolist()}}
        for name, values in scores.items()
    }
    five, six = (
        write_evaluation(tmp_path / str(n), images=False, methods=dict(list(methods.items())[: n + 1])) for n in (5, 6)
    )
    rows = table_rows(load_results(five))[1:]
    assert all(row.gain and math.isnan(row.gain.adjusted) for row in rows)
    corrected = table_rows(load_results(six))[1:]
    for row in corrected:
        assert row.gain and rows[0].gain and row.gain.adjusted == pytest.approx(min(1, 6 * rows[0].gain.p))
        assert not row.significant
    assert "not significant after Holm" in verdict_of(six) and "Holm" not in verdict_of(five)
    note = lambda folder: " ".join(re.search(r"Small print below.*?</p>", report(folder), re.S)[0].split())
    assert "after Holm's correction for 6 comparisons" in note(six)
    assert "it is not corrected for the number of methods" in note(five)
    assert "95 % interval over prompts." in note(six)


def test_one_prompt_and_one_sample_have_no_interval(tmp_path):
    methods = methods_of(write_evaluation(tmp_path / "first"))
    for part in methods.values():
        part["scores"] = {name: [values[1][1:2]] for name, values in part["scores"].items()}
        part["diversity"] = {}
    run = write_evaluation(tmp_path / "run", methods=methods, prompts=["only"], categories=["all"], samples=1)
    assert "too few images to rule out chance" in verdict_of(run)
    page = report(run)
    assert "no interval" in page and not re.search(r"\bnan\b", re.sub(r'base64,[^"]*"', "", page))
