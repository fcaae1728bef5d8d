"""How far does a step on "left of" move the noise of "right of"? Untrained policies by text pathway, and a trained one.

    python benchmarks/cross_talk.py
    python benchmarks/cross_talk.py --render    # the page again from its data

Twins are two training captions that differ in "left of" and "right of" alone: they want opposite noises and have nearly
equal text embeddings. A policy takes one natural-gradient step on images of the first, by the default reward, with the
KL measured on that caption or on both; the share is ``⟨Δ_twin, Δ_own⟩ / ⟨Δ_own, Δ_own⟩`` of the shifts of its means. 1:
what one learns, the other learns too, and opposite rewards cancel; 0: they learn independently. Next to it the
diagnostic that training logs, ``policy/cross_talk``, which takes a small step along the plain gradient. Whitening is
fitted on all training captions, as in a run on ``train``, or on the twins alone, as in a run on those two. The trained
policy is the one that comes with the library, on images of its own noise. Writes
``cross_talk.md`` and the numbers behind it, ``cross_talk.json``, in ``benchmarks/results``.

Shapes: ``B`` episodes, ``L`` text tokens, ``D`` text width.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import torch
from pages import SEEDS, markdown, page, publish  # in this folder
from tqdm.auto import tqdm

from noisear_rl.denoisers import Denoiser, load_denoiser, policy_sizes
from noisear_rl.denoisers.shapes.captions import captions_of
from noisear_rl.learning.losses import reinforce_loss
from noisear_rl.learning.natural_gradient import natural_step
from noisear_rl.learning.text_pathway import cross_talk, fit_text
from noisear_rl.patches import patchify
from noisear_rl.policy import NoiseARConfig, NoiseARPolicy
from noisear_rl.policy.config import DENOISER
from noisear_rl.policy.loading import initial_policy, load_policy
from noisear_rl.prompts.reader import PromptReader
from noisear_rl.rewards import WeightedReward, load_reward

PAIRS, EPISODES, KL = 6, 64, 1.0  # pairs, images of the first caption of each, and the size of a step in nats
WHITENED, BY_TWINS = {"text_features": "whitened", "text_scale": 4.0}, "by the twins alone"
PATHWAYS: dict[str, dict[str, Any]] = {
    "denoiser, normalized": {},
    "denoiser, whitened, text x 4": WHITENED,
    f"denoiser, whitened {BY_TWINS}, text x 4": WHITENED,
    "tokens, 2 text layers": {"text_encoder": "tokens", "text_layers": 2},
}
TRAINED = "shapes/nll"


def twins() -> list[tuple[str, str]]:
    """Returns pairs of training captions, half of them with colours, drawn with a fixed seed."""
    captions = [c for c in captions_of("train", "position") if c.relation == "left of"]
    known = {c.text for c in captions_of("train", "position")}
    pairs = [(c, c.text.replace("left of", "right of")) for c in captions]
    pools = [
        [(c.text, twin) for c, twin in pairs if twin in known and bool(c.objects[0].color) is on]
        for on in (True, False)
    ]
    rng = np.random.default_rng(0)
    chosen = [[pool[i] for i in rng.permutation(len(pool))] for pool in pools]
    return [pair for both in zip(*chosen, strict=False) for pair in both][:PAIRS]


def shares(
    policy: NoiseARPolicy, reader: PromptReader, pair: tuple[str, str], noise: torch.Tensor, advantages: torch.Tensor
) -> tuple[float, float, float]:
    """Returns the share by a natural-gradient step on one caption, within an update on both, and as training logs it.

    Args:
        policy: The policy that takes the step.
        reader: Reads the pair.
        pair: The caption of the images, and its twin.
        noise: ``(B, C, H, W)`` of the images.
        advantages: ``(B,)``.
    """
    patches, count = patchify(noise, policy.config.patch_size), len(noise)
    text, mask = reader.read_prompts(pair)  # (2, L, D), (2, L)
    own, twin = ((text[i].expand(count, -1, -1), mask[i].expand(count, -1)) for i in (0, 1))
    rows, at = torch.tensor([0] * count + [1]), torch.arange(count + 1) % count  # one row for the text of the twin
    logged = cross_talk(policy, patches[at], text[rows], mask[rows], advantages[at], rows)
    both = torch.cat([patches, patches]), torch.cat([own[0], twin[0]]), torch.cat([own[1], twin[1]])

    def share(*measured_on: torch.Tensor) -> float:
        """The share by a step whose KL is measured on these episodes."""
        moved = copy.deepcopy(policy)
        reinforce_loss(moved.log_prob(patches, *own), advantages).backward()
        natural_step(moved, *measured_on, target_kl=KL)
        with torch.no_grad():
            shift = [moved.distribution(patches, *t).mean - policy.distribution(patches, *t).mean for t in (own, twin)]
        return float((shift[1] * shift[0]).sum() / (shift[0] * shift[0]).sum())

    return share(patches, *own), share(*both), logged


def policy_of(name: str, reader: PromptReader, pair: tuple[str, str], seed: int) -> NoiseARPolicy:
    """Returns the untrained policy of a pathway, with its text statistics, or the trained one."""
    if name == TRAINED:
        return load_policy(TRAINED)
    torch.manual_seed(seed)
    config, sizes = NoiseARConfig(log_variance="fixed", **PATHWAYS[name]), policy_sizes(reader.denoiser, 2)
    policy = initial_policy(None, config, sizes | reader.sizes, reader.denoiser.name)
    fit_text(policy, reader, pair if BY_TWINS in name else [c.text for c in captions_of("train")], seed)
    return policy


@torch.no_grad()
def episodes(
    denoiser: Denoiser,
    reward: WeightedReward,
    policy: NoiseARPolicy,
    reader: PromptReader,
    prompt: str,
    first: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns noises ``(B, C, H, W)`` of the policy, the same if untrained, and their advantages ``(B,)``."""
    prompts = [prompt] * EPISODES
    noise = policy.noise(policy.sample(*reader.read_prompts(prompts), seeds=range(first, first + EPISODES)))
    rewards = reward.score(denoiser.denoise(noise, denoiser.encode(prompts)), prompts)
    return noise, (rewards - rewards.mean()) / rewards.std()


def measure() -> dict[str, Any]:
    """Returns the three shares of every pathway, ``(pairs, seeds, 3)``."""
    denoiser, reward, pairs = load_denoiser("shapes-turbo"), load_reward("shapes-match"), twins()
    names = [*PATHWAYS, TRAINED]
    read = {name: PATHWAYS.get(name, {}).get("text_encoder", DENOISER) for name in PATHWAYS}
    read[TRAINED] = load_policy(TRAINED).config.text_encoder
    readers = {encoder: PromptReader(encoder, denoiser) for encoder in set(read.values())}
    found: dict[str, list[list[tuple[float, float, float]]]] = {name: [[] for _ in pairs] for name in names}
    for (number, pair), seed in tqdm(list(itertools.product(enumerate(pairs), SEEDS)), desc="pairs and seeds"):
        for name in names:
            reader = readers[read[name]]
            policy = policy_of(name, reader, pair, seed)
            drawn = episodes(denoiser, reward, policy, reader, pair[0], 1_000_000 * (seed + 1) + EPISODES * number)
            found[name][number].append(shares(policy, reader, pair, *drawn))
    return {"pairs": pairs, "shares": found}


def table(record: dict[str, Any]) -> str:
    """Renders the page from the record."""
    rows = []
    for name, values in record["shares"].items():
        cells = []
        for share in np.moveaxis(np.array(values), -1, 0):  # (pairs, seeds)
            of_pairs = share.mean(1)
            cells.append(f"{share.mean():.2f} ({of_pairs.min():.2f} to {of_pairs.max():.2f})")
        rows.append([name, *cells])
    return page(
        [
            f"Share by which a step on {EPISODES} images of a “left of” caption moves the noise of its “right of” "
            f"twin, by untrained policies and by `{TRAINED}`: mean over {len(record['pairs'])} pairs of training "
            f"captions and {len(SEEDS)} seeds, and the range of the pairs. 1: what one caption learns, its twin learns "
            f"too; 0: they learn independently. One caption: a natural-gradient step of {KL:g} nats, measured on that "
            "caption. Both: the same, measured on both captions, as in an update on both. Gradient: a small step along "
            "the plain gradient, as training logs it (`policy/cross_talk`).",
            markdown(["text pathway", "natural, one caption", "natural, both", "gradient"], rows),
            "Pairs: " + "; ".join(first.removeprefix("a photo of ") for first, _ in record["pairs"]) + ".",
        ],
        "cross_talk",
        record["provenance"],
    )


if __name__ == "__main__":
    publish("cross_talk", __doc__, table, measure)
