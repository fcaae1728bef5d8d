"""The methods an evaluation compares, by name: trained policies and networks, and searches that start from them.

``NAME=PATH`` is a policy, an NPNet or a choice of shared noises, ``NAME=PATH,PATH`` the training seeds of one; a path
may be the name of a policy that comes with the library, such as ``shapes/nll``. ``best-of-N``, ``search-N`` and
``reno-N`` start from Gaussian noise, ``NAME+best-of-N`` from a method named earlier; N is the number of images they
denoise per result. ``critic-N`` denoises one, of the noise that a critic prefers among N.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from noisear_rl.checkpoints import find_checkpoint
from noisear_rl.config import NonNegativeFloat, PositiveFloat, PositiveFraction, check_config, to_mapping
from noisear_rl.denoisers import Denoiser
from noisear_rl.files import sha256
from noisear_rl.policy import load_policy
from noisear_rl.policy.loading import find_policy
from noisear_rl.rewards import WeightedReward, load_reward, reward_sha256
from noisear_rl.samplers.base import Sampler
from noisear_rl.samplers.best_of import BestOf
from noisear_rl.samplers.critic_choice import CriticChoice
from noisear_rl.samplers.noise_critic import load_critic
from noisear_rl.samplers.npnet import NPNetSampler, holds_npnet, load_npnet
from noisear_rl.samplers.reno import Reno
from noisear_rl.samplers.search import ZerothOrderSearch
from noisear_rl.samplers.shared_noise import FILE, SharedNoises, SharedNoiseSampler, holds_shared_noises
from noisear_rl.samplers.simple import GAUSSIAN, PolicySampler, as_sampler

SEARCH = re.compile(r"(?:(?P<start>.+)\+)?(?P<kind>best-of|search|reno|critic)-(?P<count>\d{1,18})")
LONGEST_NAME = 100  # characters; its folder is named after it
LARGEST_SEARCH = 100_000  # images denoised per result


@dataclass
class SearchConfig:
    """Settings of searches."""

    step_size: PositiveFraction = 0.7
    """`search-N`: distance of neighbours, in (0, 1]."""
    learning_rate: PositiveFloat = 5.0
    """`reno-N`: step size."""
    max_grad_norm: PositiveFloat = 0.1
    """`reno-N`: the gradient of each noise is clipped to this norm."""
    regularization: NonNegativeFloat = 0.01
    """`reno-N`: weight of the term that keeps the norm of the noise."""

    def __post_init__(self) -> None:
        check_config(self)


@dataclass
class Method:
    """One method with one training seed.

    Attributes:
        name: Unique name.
        group: Name shared by the training seeds of one method.
        make: Builds its sampler, and holds the denoiser.
        identity: What determines its images besides prompts and seeds, as plain values.
        trained: Whether the method was trained, so that its training seeds can differ.
    """

    name: str
    group: str
    make: Callable[[], Sampler]
    identity: list[Any]
    trained: bool

    def forget_sampler(self) -> None:
        """Lets go of the denoiser, once the method's images are drawn."""

        def gone() -> Sampler:
            raise RuntimeError(f"the sampler of {self.name!r} was given up after its images were drawn")

        self.make = gone

    @property
    def slug(self) -> str:
        """Name of its folder."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


def plan_methods(
    items: Sequence[str],
    denoiser: Denoiser,
    choose_by: str | None = None,
    search: SearchConfig | None = None,
    temperature: float | None = None,
    reward_device: str | None = None,
    layout_temperature: float | None = None,
    critic: str | None = None,
) -> list[Method]:
    """Reads names of methods; see the module docstring. Gaussian noise always comes first.

    Args:
        items: Methods as given on the command line.
        denoiser: Denoiser of all methods.
        choose_by: The reward that searches choose by.
        search: Settings of searches.
        temperature: Factor on the standard deviation of policies; ``None`` for their own.
        reward_device: Device of the scorers of ``choose_by``; see :func:`~noisear_rl.rewards.load_reward`.
        layout_temperature: Of policies with layouts; ``None`` for their own.
        critic: Checkpoint, run folder or Hub id of the critic that ``critic-N`` chooses by.

    Raises:
        ValueError: If an item is malformed, a name is repeated or used before it is defined, a search has no reward
            to choose by, or a choice no critic or neither a policy nor Gaussian noise to start from.
        FileNotFoundError: If a path holds no weights.
    """
    methods = {GAUSSIAN: [Method(GAUSSIAN, GAUSSIAN, partial(as_sampler, denoiser, None), [], False)]}
    for item in items:
        name, _, paths = item.partition("=")
        if len(name) > LONGEST_NAME or not name.isprintable():
            raise ValueError(f"{name!r:.120} names a method; expected at most {LONGEST_NAME} printable characters")
        asked = None if paths else SEARCH.fullmatch(item)
        if not paths and asked is None:
            raise ValueError(f"expected NAME=PATH, best-of-N, search-N, reno-N or critic-N, got {item!r}")
        if asked is not None:
            start, kind, count = asked["start"] or GAUSSIAN, asked["kind"], int(asked["count"])
            name = ("" if start == GAUSSIAN else f"{start} + ") + f"{kind.replace('-', ' ')} {count}"
            if start not in methods:
                raise ValueError(f"{item!r} starts from {start!r}; expected one of {list(methods)}, named before it")
            if not 1 <= count <= LARGEST_SEARCH:
                raise ValueError(
                    f"{item!r:.80} denoises {count} images per result, not at least 1 and at most {LARGEST_SEARCH:,}"
                )
            if kind == "critic" and critic is None:
                raise ValueError(f"{item!r} needs a critic to choose by: --critic")
            if kind != "critic" and choose_by is None:
                raise ValueError(f"{item!r} needs a reward to choose by: choose_by")
        if not name or name in methods:
            raise ValueError(f"methods must be distinct NAME=PATH items or searches, got {item!r}")
        if asked is None:
            methods[name] = _trained(name, paths.split(","), denoiser, temperature, layout_temperature)
        elif asked["kind"] == "critic":
            assert critic is not None
            methods[name] = [_chosen(name, count, m, denoiser, critic) for m in methods[start]]
        else:
            assert choose_by is not None
            given, judge = search or SearchConfig(), partial(load_reward, choose_by, device=reward_device)
            methods[name] = [
                _searching(name, kind, count, m, denoiser, choose_by, judge, given) for m in methods[start]
            ]
    found = [method for group in methods.values() for method in group]
    if len({method.slug for method in found}) < len(found):
        raise ValueError(f"names must differ in letters and digits: {[method.name for method in found]}")
    return found


def _trained(
    name: str, paths: Sequence[str], denoiser: Denoiser, temperature: float | None, layout_temperature: float | None
) -> list[Method]:
    """One method per training seed, each with its own path."""

    def make(path: str) -> Sampler:
        if holds_npnet(path):
            return NPNetSampler(denoiser, load_npnet(path))
        if holds_shared_noises(path):
            return SharedNoiseSampler(denoiser, SharedNoises.load(path))
        policy = load_policy(path)
        policy.set_temperatures(temperature, layout_temperature)
        return as_sampler(denoiser, policy)

    paths = [find_policy(path) for path in paths]
    if repeated := [path for path in paths if paths.count(path) > 1]:
        raise ValueError(f"{name}: {repeated[0]} is named twice; training seeds are different trainings")
    for path in paths:
        make(path)  # fails early on a missing or mismatched checkpoint
    names = [name] if len(paths) == 1 else [f"{name} {seed}" for seed in range(len(paths))]
    temperatures = [temperature] if layout_temperature is None else [temperature, layout_temperature]
    return [
        Method(own, name, partial(make, path), [_digest(path), *temperatures], True)
        for own, path in zip(names, paths, strict=True)
    ]


def _chosen(group: str, count: int, start: Method, denoiser: Denoiser, critic: str) -> Method:
    """A critic's choice among the noises of another method."""
    first = start.make()
    if start.name != GAUSSIAN and not isinstance(first, PolicySampler):
        raise ValueError(f"{group!r} chooses among the noises of a policy or Gaussian noise, not of {start.name!r}")

    def make() -> CriticChoice:
        drawn = start.make()
        policy = drawn.policy if isinstance(drawn, PolicySampler) else None
        return CriticChoice(denoiser, policy, load_critic(critic), count)

    make()  # fails early on a missing or mismatched critic
    name = group + start.name.removeprefix(start.group)  # with the training seed
    return Method(name, group, make, [start.identity, "critic", count, _digest(critic)], start.trained)


def _searching(
    group: str,
    kind: str,
    count: int,
    start: Method,
    denoiser: Denoiser,
    choose_by: str,
    judge: Callable[[], WeightedReward],
    search: SearchConfig,
) -> Method:
    """A search that starts from another method's noise."""

    def make() -> Sampler:
        reward, first = judge(), start.make()
        if kind == "best-of" or count == 1:
            return BestOf(first, count, reward)
        if kind == "search":
            return ZerothOrderSearch(first, denoiser, reward, iterations=count - 1, step_size=search.step_size)
        rates = to_mapping(search)
        rates.pop("step_size")
        return Reno(first, denoiser, reward, iterations=count - 1, **rates)  # the start's image is one of them

    name = group + start.name.removeprefix(start.group)  # with the training seed
    identity = [start.identity, kind, count, choose_by, to_mapping(search)]
    if choose_by and (checksum := reward_sha256(choose_by)):
        identity.append(checksum)
    return Method(name, group, make, identity, start.trained)


def _digest(path: str) -> str:
    """SHA-256 of a checkpoint's weights, or of shared noises; a Hub id as it is."""
    if holds_shared_noises(path):
        return sha256(Path(path) / FILE)
    file = Path(find_checkpoint(path, "policy")) / "model.safetensors" if Path(path).is_dir() else Path(path)
    return sha256(file) if file.is_file() else path
