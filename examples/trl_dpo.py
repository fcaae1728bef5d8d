"""DPO on collected noises, with options and metrics of TRL.

    pip install 'noisear-rl[examples]'
    python examples/trl_dpo.py

A ``trl.DPOConfig`` says which loss and how it is optimised; what concerns language models alone is ignored. The losses
are tested against trl's own.
"""

import tempfile
from pathlib import Path

import trl

from noisear_rl.algos.collect import CollectConfig, collect
from noisear_rl.algos.dpo import from_trl, train
from noisear_rl.data.rollouts import load_rollouts
from noisear_rl.denoisers.shapes.captions import balanced_captions
from noisear_rl.learning.records import read_records
from noisear_rl.policy import NoiseARConfig

CAPTIONS = tuple(caption.text for caption in balanced_captions("train", 24))
TASK = {"env_id": "NoiseAR-ShapesTurbo-v0", "reward": "brightness", "prompts": CAPTIONS, "prompts_per_shard": 8}


def main(noises: int = 16, seed: int = 0) -> dict[str, float]:
    """Collects, trains, and collects new noises for the same captions.

    Returns:
        The mean reward of both, and the last metrics by trl's names.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        collect(CollectConfig(**TASK, samples_per_prompt=noises, seed=seed, output_dir=folder / "gaussian"))
        arguments = trl.DPOConfig(
            str(folder / "trl"),
            loss_type=["sigmoid"],
            beta=0.5,
            learning_rate=1e-3,
            num_train_epochs=4,
            per_device_train_batch_size=64,
            seed=seed,
            report_to="none",
            use_cpu=True,
            bf16=False,
        )
        config = from_trl(
            arguments,
            rollouts=folder / "gaussian",
            output_dir=folder / "dpo",
            strategy="all_above_margin",
            threshold=0.01,
            evaluate_every=10,
            policy=NoiseARConfig(d_model=32, d_ff=64, n_layers=1, log_variance="fixed"),
        )
        train(config)
        again = {"policy": str(folder / "dpo"), "seed": seed + 1, "output_dir": folder / "trained"}
        collect(CollectConfig(**TASK, samples_per_prompt=noises, **again))
        rewards = {name: float(load_rollouts(folder / name).rewards.mean()) for name in ("gaussian", "trained")}
        return rewards | read_records(folder / "dpo")[-1]


if __name__ == "__main__":
    for key, value in main().items():
        print(f"{key}: {value:.3f}")
