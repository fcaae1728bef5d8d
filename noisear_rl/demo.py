"""The whole loop on the embedded denoiser, in about five minutes on two CPU cores.

Builds weak-to-strong pairs, pretrains a policy on them, improves it by REINFORCE on a few hard captions, and
compares it with Gaussian noise by the held-out judge at equal cost: on the captions it was trained on, with fresh
noise, and on validation captions, where a policy trained on so few captions is not expected to gain.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from noisear_rl.algos.nll import NLLConfig
from noisear_rl.algos.nll import train as train_nll
from noisear_rl.algos.reinforce import ReinforceConfig
from noisear_rl.algos.reinforce import train as train_reinforce
from noisear_rl.command import run_script
from noisear_rl.config import PositiveInt, Seed, check_config, load_yaml, parse_config, to_mapping
from noisear_rl.data.pairs import PairsConfig, build_pairs
from noisear_rl.denoisers import load_denoiser
from noisear_rl.denoisers.shapes.captions import balanced_captions
from noisear_rl.evaluation.compare import evaluate, summary, table
from noisear_rl.files import write_atomically
from noisear_rl.policy import NoiseARConfig
from noisear_rl.prompts import categories_of
from noisear_rl.provenance import provenance
from noisear_rl.report.plots import comparison
from noisear_rl.rewards import load_reward
from noisear_rl.samplers import GAUSSIAN

# Training captions from three categories, of which Gaussian noise gets 22 to 38 % right.
HARD_CAPTIONS = (
    "a photo of a blue circle left of a yellow square",
    "a photo of a green triangle above a purple cross",
    "a photo of three purple crosses",
    "a photo of a blue square and a blue circle",
)


@dataclass
class DemoConfig:
    """Options of the demo."""

    output_dir: Path = Path("runs/demo")
    """Where everything is written; files of an earlier demo are removed."""
    captions: tuple[str, ...] = HARD_CAPTIONS
    """Captions to improve."""
    pairs: PositiveInt = 2048
    """Weak-to-strong pairs for pretraining."""
    updates: PositiveInt = 36
    """REINFORCE updates of 64 images per caption."""
    samples: PositiveInt = 64
    """Fresh noises per trained caption in the comparison."""
    held_out_prompts: PositiveInt = 120
    """Validation captions in the comparison, 4 noises each."""
    seed: Seed = 0
    """Seed of everything."""

    def __post_init__(self) -> None:
        check_config(self)


def run(config: DemoConfig) -> str:
    """Runs the demo and returns its tables."""
    began, folder = time.time(), config.output_dir
    if (folder / "demo.json").exists():
        shutil.rmtree(folder)
    write_atomically(folder / "demo.json", json.dumps(to_mapping(config)))
    policy_config = NoiseARConfig(log_variance="fixed")

    print("1/4 pairs: strong guidance down, weak guidance up", flush=True)
    presets = Path(__file__).parent / "configs" / "shapes"
    pairs = load_yaml(PairsConfig, presets / "pairs.yaml")
    pairs.output_dir, pairs.pairs, pairs.seed = folder / "pairs", config.pairs, config.seed
    build_pairs(pairs)
    print("2/4 pretraining on them", flush=True)
    nll = load_yaml(NLLConfig, presets / "nll.yaml")
    nll.pairs, nll.output_dir, nll.policy, nll.epochs = folder / "pairs", folder / "nll", policy_config, 4
    pretrained = train_nll(nll)
    print(f"3/4 REINFORCE on {len(config.captions)} hard captions", flush=True)
    reinforce = load_yaml(ReinforceConfig, presets / "reinforce.yaml")
    reinforce.output_dir, reinforce.init_from = folder / "reinforce", str(folder / "nll")
    reinforce.prompts, reinforce.prompts_per_update = config.captions, len(config.captions)
    reinforce.updates, reinforce.save_every, reinforce.seed = config.updates, 15, config.seed
    improved = train_reinforce(reinforce)

    print("4/4 comparison by the held-out judge, which no training used", flush=True)
    denoiser = load_denoiser("shapes")
    reward = load_reward({"shapes-exact": 1.0, "shapes-match": 1.0})
    policies = {GAUSSIAN: None, "NLL": pretrained, "NLL + REINFORCE": improved}
    trained = list(config.captions)
    on_trained = evaluate(denoiser, reward, policies, trained, config.samples, seed=1_000_000, keep_images=6)
    untrained = [caption.text for caption in balanced_captions("validation", config.held_out_prompts)]
    on_untrained = evaluate(denoiser, reward, policies, untrained, 4, seed=2_000_000)
    shown = {GAUSSIAN: on_trained[GAUSSIAN], "NLL + REINFORCE": on_trained["NLL + REINFORCE"]}
    comparison(
        folder / "report.png",
        shown,
        trained,
        f"Same prompts, same seeds, same cost ({denoiser.nfe} network evaluations per image)",
        run=folder / "reinforce",
    )
    text = "\n".join(
        [
            "Exactly right images in %, held-out judge, 95 % intervals, equal cost. KL in nats to N(0, I).",
            "",
            f"On the {len(trained)} captions that REINFORCE trained on, {config.samples} fresh noises each:",
            "",
            table(on_trained, categories_of(trained), resample="noise"),
            "",
            f"On {len(untrained)} validation captions, 4 noises each:",
            "",
            table(on_untrained, categories_of(untrained)),
            "",
            f"{time.time() - began:.0f} s in all; images: {folder / 'report.png'}; "
            f"curves: tensorboard --logdir {folder}",
        ]
    )
    write_atomically(folder / "table.md", text + "\n")
    record = {
        "provenance": provenance(),
        "trained": summary(on_trained, trained),
        "held_out": summary(on_untrained, untrained),
    }
    write_atomically(folder / "results.json", json.dumps(record))
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    print("\n" + run(parse_config(DemoConfig, argv, __doc__)))


if __name__ == "__main__":
    run_script(main)
