"""Is a search better if it starts from a policy's noise? On `shapes-turbo`, captions of the test split, held-out judge.

    python benchmarks/policy_and_search.py             # evaluate the policies that shapes.py trained
    python benchmarks/policy_and_search.py --render    # the page again from its data

Policies are those of ``benchmarks/shapes.py``, in ``runs/shapes``; captions and seeds are its own too. Best of N
denoises N noises and keeps the image that ``shapes-match``, the training reward, prefers; ``shapes-exact`` is the
judge. Writes ``policy_and_search.md`` and the scores behind it, ``policy_and_search.json``, in ``benchmarks/results``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from pages import by_seed, markdown, page, parser_of, signed, write  # in this folder
from shapes import RUNS, evaluation, paths  # in this folder

from noisear_rl.algos import evaluate
from noisear_rl.evaluation.intervals import bootstrap, holm, paired_difference, significance_mark
from noisear_rl.evaluation.results import from_record, load_results, to_record

COUNTS = (2, 4, 8)
POLICIES = {"NLL": "nll", "PPO": "ppo", "reward gradient": "reward_gradient"}


def measure() -> dict[str, Any] | None:
    """Evaluates, and returns the scores; ``None`` in all processes but the main one."""
    starts = [f"{name}={paths(stage)}" for name, stage in POLICIES.items()]
    searches = [f"best-of-{n}" for n in COUNTS] + [f"{name}+best-of-{n}" for name in POLICIES for n in COUNTS]
    config = replace(evaluation(), methods=(*starts, *searches), output_dir=RUNS / "policy_and_search")
    return to_record(load_results(config.output_dir)) if evaluate.run(config) else None


def table(record: dict[str, Any]) -> str:
    """Formats the page as Markdown."""
    results = from_record(record, RUNS)
    prompts, categories, judge = results.prompts, results.categories, results.judge
    score = {group: 100 * results.by_seed(group, judge) for group in results.groups}
    baseline = results.methods[results.baseline]
    names = {1: results.baseline} | {n: f"best of {n}" for n in COUNTS}
    pairs = [(name, n) for name in POLICIES for n in names]
    group = lambda name, n: name if n == 1 else f"{name} + best of {n}"
    from_noise = {n: score[names[n]][0] for n in names}
    differences = [
        paired_difference(score[group(*pair)], from_noise[pair[1]], categories, prompts=prompts) for pair in pairs
    ]
    gains = dict(zip(pairs, holm(differences), strict=True))
    rows = []
    for name in (results.baseline, *POLICIES):
        for n in names:
            own = names[n] if name == results.baseline else group(name, n)
            members = [results.methods[member] for member in results.groups[own]]
            spread = np.mean([m.diversity["layout"].mean() for m in members]) / baseline.diversity["layout"].mean()
            gain = gains.get((name, n))
            rows.append(
                [
                    own,
                    f"{members[0].nfe:g}",
                    bootstrap(score[own], categories, prompts=prompts),
                    "" if gain is None else signed(gain) + significance_mark(gain),
                    by_seed(score[own], categories, prompts),
                    f"{spread:.2f}",
                ]
            )
    text = (
        f"Exactly right images in %, held-out detector (`{judge}`), {len(prompts)} captions of the test split "
        f"({len(set(prompts))} distinct ones) x {results.samples} results, mean over six categories. 95 % intervals "
        "over distinct captions and training seeds. Gain: over the same search among Gaussian noise, at equal network "
        "evaluations (NFE) and with the same seeds; * excludes 0, corrected by Holm's method. Searches choose by the "
        "training reward. Diversity: distance of layouts within a caption, Gaussian = 1."
    )
    head = ["method", "NFE", "right", "gain over Gaussian noise at this NFE", "by seed", "layout distance"]
    return page([text, markdown(head, rows)], "policy_and_search", results.provenance)


def main() -> None:
    """Entry point."""
    record = None
    if not parser_of(__doc__).parse_args().render:
        record = measure()
        if record is None:
            return
    write("policy_and_search", table, record)


if __name__ == "__main__":
    main()
