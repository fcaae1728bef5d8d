"""Do priors that were trained with `shapes-turbo`, one network evaluation per image, help its teacher `shapes`?

    python benchmarks/shapes.py       # trains the policies
    python benchmarks/teacher.py      # evaluates them with the teacher
    python benchmarks/teacher.py --render

The policies of ``benchmarks/shapes.py`` draw the noise of the teacher, which takes eight steps with guidance; nothing
is trained here. Captions of the test split, held-out judge. Interrupted runs resume. Writes ``teacher.md`` and the
scores behind it, ``teacher.json``, in ``benchmarks/results``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pages import by_seed, markdown, page, parser_of, signed, write  # in this folder
from shapes import RUNS, STAGES, evaluation, paths  # in this folder

from noisear_rl.algos import evaluate
from noisear_rl.evaluation.intervals import bootstrap, category_means, paired_difference, significance_mark
from noisear_rl.evaluation.results import from_record, load_results, to_record

FOLDER = RUNS / "teacher"
NAME, STAGE = list(STAGES.items())[-1]


def table(record: dict[str, Any]) -> str:
    """Renders the page from the record."""
    results = from_record(record, RUNS)
    prompts, categories, judge = results.prompts, results.categories, results.judge
    start = 100 * results.methods[results.baseline].scores[judge]
    order, rows = list(dict.fromkeys(categories)), []
    for group, names in results.groups.items():
        score = 100 * results.by_seed(group, judge)
        means = category_means(score.mean(0), categories, prompts)
        trained = ["", ""]
        if group != results.baseline:
            gain = paired_difference(score, start, categories, prompts=prompts)
            trained = [signed(gain) + significance_mark(gain), by_seed(score, categories, prompts)]
        row = [group, f"{results.methods[names[0]].nfe:g}", bootstrap(score, categories, prompts=prompts), *trained]
        rows.append([*row, *(f"{means[name]:.1f}" for name in order)])
    return page(
        [
            f"Exactly right images in %, held-out detector (`{judge}`), {len(prompts)} captions of the test split "
            f"({len(set(prompts))} distinct ones) x {results.samples} noises, denoiser `{results.denoiser}`, by noise "
            "from N(0, I) and from policies that were trained with `shapes-turbo`: mean over six categories. 95 % "
            "intervals over distinct captions and training seeds, gains paired with Gaussian noise of the same seeds; "
            "* excludes 0. NFE: network evaluations per image.",
            markdown(["noise", "NFE", "right", "gain", "by seed", *order], rows),
        ],
        "teacher",
        results.provenance,
    )


def main() -> None:
    """Entry point."""
    record = None
    if not parser_of(__doc__).parse_args().render:
        config = replace(evaluation(), methods=(f"{NAME}={paths(STAGE)}",), denoiser="shapes", output_dir=FOLDER)
        if not evaluate.run(config):
            return  # not the main process
        record = to_record(load_results(FOLDER))
    write("teacher", table, record)


if __name__ == "__main__":
    main()
