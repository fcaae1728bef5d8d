"""Tiny trainings of every algorithm, for one process or, started by a launcher, several.

    torchrun --nproc-per-node 2 tests/training_runs.py DATA FOLDER UPDATES NAME …

Every process writes its number, the number of all processes and its final parameters to FOLDER.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from signal import SIGKILL

import gymnasium
import torch
from safetensors.torch import save_file

from noisear_rl.algos import critic, dpo, nll, npnet, ppo, reinforce, reward_gradient
from noisear_rl.algos.collect import CollectConfig, collect
from noisear_rl.data.pairs import LAYOUT_FEATURES, PAIR_FEATURES
from noisear_rl.data.shards import write_shard
from noisear_rl.distributed import is_main, num_processes
from noisear_rl.files import check_manifest
from noisear_rl.gaussian import standard_noise
from noisear_rl.learning.run import Run
from noisear_rl.policy import NoiseARConfig
from noisear_rl.samplers.noise_critic import NoiseCriticConfig
from noisear_rl.samplers.npnet import NPNetConfig
from tests import toys

SMALL = NoiseARConfig(d_model=16, d_ff=16, n_layers=1, n_heads=2, log_variance="fixed")
LEARNED = NoiseARConfig(d_model=16, d_ff=16, n_layers=1, n_heads=2, log_variance="shared")
TINY = NPNetConfig(image_size=8, patch_size=2, window_size=2, d_model=8, depths=(2, 1), n_heads=(2, 2))
CRITIC = NoiseCriticConfig(d_model=16, d_text=16, n_blocks=1, text_layers=1, n_heads=2, dropout=0.0)
TOY = toys.NoDenoiser((4, 8, 8), 2)
TURBO = {"dtype": "float32"}
PROMPTS = tuple(
    f"a photo of a {colour} {shape}" for colour in ("red", "blue", "green") for shape in ("circle", "square")
)
TOP_LEFT = str(Path(__file__).parent / "files/top_left.py")


class Gaps(toys.Obey):
    """:class:`~tests.toys.Obey` of unequal prompts, whose scorer fails on images that start with a large number."""

    name = "gaps"

    def score(self, images, prompts):
        return torch.where(images[:, 0, 0, 0] > 1.2, torch.nan, super().score(images, prompts))


def prepare(data: Path) -> None:
    """Writes the pairs and rollouts that trainings start from."""
    noise = standard_noise(range(60), (4, 8, 8))
    for name, denoiser, prompts in (("pairs", "shapes-turbo", PROMPTS), ("golden", "none", toys.PROMPTS)):
        check_manifest(data / name, {"denoiser": denoiser, "noise_scale": 0.5 if name == "pairs" else 0.0})
        rows = {"prompt": [prompts[i % len(prompts)] for i in range(60)], "seed": list(range(60))}
        rows["target"] = list((0.7 * noise + 0.3).flatten(1).half().numpy())
        write_shard(data / name, 0, rows, PAIR_FEATURES)
        if name == "pairs":
            check_manifest(data / "layouts", {"denoiser": denoiser, "noise_scale": 0.5})
            write_shard(data / "layouts", 0, rows | {"layout": [i // 6 % 3 for i in range(60)]}, LAYOUT_FEATURES)
    again = {"num_prompts": 6, "samples_per_prompt": 6, "prompts_per_shard": 6, "denoiser_options": TURBO}
    collect(CollectConfig("NoiseAR-ShapesTurbo-v0", prompts=PROMPTS, output_dir=data / "rollouts", **again))


def episodes(module, config, reward, updates, normalize="none", **options):
    """A training on episodes: 21 of them, which two processes share unequally."""
    defaults = {"prompts_per_update": 3, "samples_per_prompt": 7, "updates": updates, "save_every": 3, "policy": SMALL}
    defaults |= {"prompts": ("up", "down", "upwards")}

    def train(folder, **more):
        name = toys.register(reward)  # anew: its reward has statistics
        gymnasium.registry[name].kwargs["reward"].normalize = normalize
        return module.train(config(name, output_dir=folder, **(defaults | options | more)))

    return train


def trainings(data: Path, updates: int):
    """Trainings by name, as functions of their folder and further options."""
    on_ppo = lambda reward=None, **options: episodes(ppo, ppo.PPOConfig, reward or toys.Target(), updates, **options)
    adam = {"optimizer": "adam", "learning_rate": 1e-3}
    natural = {"damping": 1.0}  # at the default of 0.01 a step magnifies rounding errors a thousandfold
    pairs = {"denoiser": "shapes-turbo", "denoiser_options": TURBO, "batch_size": 9, "held_out_share": 0.2}
    pairs |= {"log_every": 5, "save_every": 3, "learning_rate": 1e-3, "epochs": max(1, updates // 6)}
    golden = {"npnet": TINY, "batch_size": 11, "evaluate_every": 4, "save_every": 3}
    golden |= {"learning_rate": 1e-3, "epochs": max(1, updates // 4)}
    chosen = {"threshold": 0.0, "strategy": "all_above_margin", "batch_size": 13, "evaluate_every": 3, "save_every": 3}
    chosen |= {"denoiser_options": TURBO, "policy": SMALL, "learning_rate": 1e-3, "held_out_share": 0.2}
    chosen |= {"epochs": -(-updates // 6), "patience": 0}
    images = {"prompts": PROMPTS[:2], "prompts_per_update": 2, "samples_per_prompt": 3, "updates": updates}
    images |= {"reward": TOP_LEFT, "denoiser_options": TURBO, "policy": SMALL, "save_every": 3}
    judged = {"critic": CRITIC, "denoiser_options": TURBO, "batch_size": 13, "held_out_share": 0.2, "save_every": 3}
    judged |= {"epochs": -(-updates // 2), "evaluate_every": 3, "learning_rate": 1e-3}
    return {
        "ppo-natural": on_ppo(**natural, epochs=2, minibatches=2, fisher_episodes=6),
        "ppo-adam": on_ppo(Gaps(), **adam, minibatches=16, kl_coef=0.1, entropy_coef=0.01, policy=LEARNED),
        "ppo-gae": on_ppo(**adam, advantage="gae", critic_batch_size=8),
        "reinforce": episodes(reinforce, reinforce.ReinforceConfig, Gaps(), updates, **natural, advantage="ema"),
        "reinforce-running": episodes(reinforce, reinforce.ReinforceConfig, Gaps(), updates, "running", **adam),
        "dpo": lambda folder, **more: dpo.train(dpo.DPOConfig(data / "rollouts", output_dir=folder, **(chosen | more))),
        "dpo-aot": lambda folder, **more: dpo.train(
            dpo.DPOConfig(data / "rollouts", output_dir=folder, **(chosen | {"loss_type": ("aot", "sft")} | more))
        ),
        "reward-gradient": lambda folder, **more: reward_gradient.train(
            reward_gradient.RewardGradientConfig(output_dir=folder, **(images | more))
        ),
        "nll": lambda folder, **more: nll.train(
            nll.NLLConfig(data / "pairs", output_dir=folder, policy=LEARNED, **(pairs | more))
        ),
        "nll-layouts": lambda folder, **more: nll.train(
            nll.NLLConfig(data / "layouts", output_dir=folder, policy=replace(LEARNED, layouts=3), **(pairs | more))
        ),
        "critic": lambda folder, **more: critic.train(
            critic.CriticConfig((data / "rollouts",), output_dir=folder, **(judged | more))
        ),
        "npnet": lambda folder, **more: npnet.train(
            npnet.NPNetTrainingConfig(data / "golden", output_dir=folder, **(golden | more)), TOY
        ),
    }


def flat(tensors) -> torch.Tensor:
    """All parameters as one vector."""
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def main(data: str, folder: str, updates: str, *names: str) -> None:
    """Runs trainings one after the other; ``NAME:key=value`` overrides an option, ``KILL`` ends the first at a save."""
    known, rank = trainings(Path(data), int(updates)), int(os.environ.get("RANK", 0))
    Path(folder).mkdir(parents=True, exist_ok=True)
    if names[0] == "KILL":
        save = Run.save
        Run.save = lambda *arguments, **parts: (save(*arguments, **parts), is_main() and os.kill(os.getpid(), SIGKILL))
        names = names[1:]
    for item in names:
        name, *options = item.split(":")
        given = {key: json.loads(value) for key, _, value in (option.partition("=") for option in options)}
        network = known[name](Path(folder) / name, **given)
        save_file(
            {key: value.contiguous() for key, value in network.state_dict().items()}, parameters(folder, name, rank)
        )
    (Path(folder) / f"process-{rank}.json").write_text(json.dumps({"processes": num_processes()}))


def parameters(folder: str | Path, name: str, rank: int = 0) -> Path:
    """The file of a process's final parameters."""
    return Path(folder) / f"{name}.{rank}.safetensors"


if __name__ == "__main__":
    main(*sys.argv[1:])
