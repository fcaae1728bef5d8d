"""Rewards by name, by names and weights, from a Python file, or from a YAML file (:class:`RewardConfig`)."""

from __future__ import annotations

import contextlib
import importlib
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import AfterValidator

from noisear_rl.config import ConfigError, Float, check_config, load_yaml
from noisear_rl.denoisers.placement import resolve_device
from noisear_rl.files import sha256
from noisear_rl.rewards.http import checked_address, is_address
from noisear_rl.rewards.weighted import Normalization, Reward, WeightedReward, checked_scores
from noisear_rl.rewards.within import within
from noisear_rl.trust import check_code, check_secret
from noisear_rl.wording import nearest

Backend = Literal["native", "package"]
ENTRY_POINTS = "noisear_rl.rewards"
APIS = ("noisear", "openai")  # of servers
PACKAGE = Path(__file__).parents[1]  # shipped reward files are found from any folder: configs/rewards/paper.yaml
REWARDS: dict[str, tuple[str, str]] = {  # imported on demand: some load transformers
    "shapes-match": ("shapes", "ShapesMatch"),
    "shapes-clip": ("shapes", "ShapesClip"),
    "shapes-exact": ("shapes", "ShapesExact"),
    "brightness": ("simple", "Brightness"),
    "jpeg-compressibility": ("simple", "JpegCompressibility"),
    "image-reward": ("image_reward", "ImageReward"),
    "pickscore": ("pickscore", "PickScore"),
    "hpsv2": ("hpsv2", "HPSv2"),
    "hpsv2.1": ("hpsv2", "HPSv21"),
    "hpsv3": ("hpsv3", "HPSv3"),
    "mps": ("mps", "MPS"),
    "aesthetic-v1": ("aesthetic", "AestheticV1"),
    "aesthetic-v2": ("aesthetic", "AestheticV2"),
    "aesthetic-v2.5": ("aesthetic", "AestheticV25"),
    "clip-score": ("clip", "CLIPScore"),
    "clip-h": ("clip", "CLIPH"),
    "geneval": ("detection", "GenEval"),
}


@dataclass
class RewardConfig:
    """A reward as stored in a YAML file.

    Attributes:
        weights: Weights by scorer: a name, ``FILE.py``, ``FILE.py:FUNCTION`` or ``http://HOST:PORT``.
        normalize: ``none``, ``running`` or ``fixed``; see :class:`~noisear_rl.rewards.weighted.WeightedReward`.
        statistics: Mean and standard deviation by scorer, as written by ``noisear reward-statistics``.
        options: Keyword arguments by scorer, such as ``{mps: {weights: FILE, dtype: float16}}``; ``backend: package``
            runs the scorer's own package (:mod:`noisear_rl.rewards.package`), ``{mine.py: {timeout: 60}}`` gives a
            function of one's own 60 seconds per batch, and ``{any-name: {url: http://HOST:PORT}}`` asks a server
            (:mod:`noisear_rl.rewards.remote`, :mod:`noisear_rl.rewards.vlm` with ``api: openai``).
        measured: How the statistics were measured.
    """

    weights: dict[str, Float]
    normalize: Normalization = "none"
    statistics: dict[str, list[Float]] = field(default_factory=dict)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_config(self)
        if not self.weights:
            raise ConfigError("reward", "`weights` is empty: expected weights by scorer")
        for name in self.weights:
            if is_address(name):
                checked_address(name)
            elif ".py" in name:
                check_code(name)
        for options in self.options.values():
            if "python" in options:
                check_code(str(options["python"]))
            if "url" in options:
                checked_address(str(options["url"]))
            if options.get("key") is not None:
                check_secret(str(options["key"]))


class FunctionReward:
    """A scorer that calls a function ``(images (B, 3, H, W) in [0, 1], prompts) → (B,)`` real numbers.

    Args:
        name: Name in records.
        function: Gets its own copy of the images.
        file: Where it is defined, for messages.
        timeout: Seconds that a call may take; ``None`` for no limit.

    Raises:
        ValueError: If ``timeout`` is no positive number.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[torch.Tensor, Sequence[str]], Any],
        file: Path | None = None,
        timeout: float | None = None,
    ) -> None:
        if timeout is not None and not (isinstance(timeout, int | float) and 0 < timeout < float("inf")):
            raise ValueError(f"{file or name}: timeout must be a positive number of seconds, not {timeout!r}")
        self.name, self.function, self.file, self.timeout = name, function, file, timeout

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Scores ``(B, 3, H, W)`` images: ``(B,)`` float32.

        Raises:
            ValueError: If the function raises an error, exits, takes too long, changes its images in place, or returns
                anything but real numbers; names file and cause.
        """
        who, given = f"{self.file or self.name}: scorer {self.name!r}", images.clone()
        with _blamed(self.file or self.name, f"scorer {self.name!r} failed"):
            found = within(self.timeout, lambda: self.function(given, list(prompts)))
        if not torch.allclose(given.detach(), images.detach(), rtol=0, atol=0, equal_nan=True):
            raise ValueError(f"{who} changes its images in place; let it work on a copy: images.clone()")
        if not isinstance(found, torch.Tensor):
            try:
                found = torch.as_tensor(found)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"{who} returned {found!r:.60}, expected ({len(prompts)},) numbers") from error
        return checked_scores(found, len(prompts), who).to(images.device)


@contextlib.contextmanager
def _blamed(file: Path | str, what: str) -> Iterator[None]:
    """Turns an error of a user's file, and its attempt to exit, into one that names file, line and cause."""
    try:
        yield
    except SyntaxError as error:
        raise ValueError(f"{file}, line {error.lineno}: syntax error: {error.msg}") from error
    except SystemExit as error:
        raise ValueError(f"{file}: {what}: it exits (code {error.code!r})") from error
    except Exception as error:
        lines = [step.lineno for step in traceback.extract_tb(error.__traceback__) if step.filename == str(file)]
        where = f", line {lines[-1]}" if lines else ""
        raise ValueError(f"{file}{where}: {what}: {type(error).__name__}: {error}") from error


RewardLike = str | Mapping[str, float] | RewardConfig | Reward | WeightedReward | Callable[..., Any]
"""What :func:`load_reward` takes."""


def load_reward(
    spec: RewardLike,
    normalize: Normalization | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    device: str | None = None,
) -> WeightedReward:
    """Builds a reward.

    Args:
        spec: A scorer (``pickscore``, ``my_reward.py``, ``my_reward.py:sharpness``, an entry point's name, the address
            of a server, ``http://HOST:PORT``), weights by scorer, a ``.yaml`` file, or its contents; or a scorer, or a
            function ``(images, prompts) → (B,)`` numbers, with weight 1.
        normalize: Overrides the value in ``spec``.
        options: Keyword arguments by scorer; they override those in ``spec``.
        device: Device of the scorers' networks, such as ``cuda:1``, where their options name none; ``None`` for the
            accelerator if there is one. Scorers without a network and functions compute where the images are.

    Raises:
        ValueError: If a name, an option or a key is unknown, this machine has no such device, or an object is none.
        FileNotFoundError: If a file is missing. Weights are only looked up on first use.
    """
    if not isinstance(spec, str | Mapping | RewardConfig):
        if options or device is not None:
            raise ValueError(f"options and a device belong to scorers given by name, not to {spec!r:.80}")
        return _of_object(spec, normalize)
    config = reward_config(spec)
    given = {name: {**config.options.get(name, {}), **(options or {}).get(name, {})} for name in config.weights}
    if unused := (config.options.keys() | (options or {}).keys()) - config.weights.keys():
        raise ValueError(f"got options for {sorted(unused)}, which the reward does not use")
    if device is not None:
        where = str(resolve_device(device))
        given = {name: ({"device": where} if _has_device(name, own) else {}) | own for name, own in given.items()}
    scorers = [(make_reward(name, **given[name]), float(weight)) for name, weight in config.weights.items()]
    return WeightedReward(scorers, normalize or config.normalize, config.statistics)


def _of_object(reward: Any, normalize: Normalization | None) -> WeightedReward:
    if isinstance(reward, WeightedReward) and normalize is None:
        return reward
    if isinstance(reward, Reward) and not isinstance(reward, type):
        return WeightedReward([(reward, 1.0)], normalize or "none")
    if isinstance(reward, type) or not callable(reward):
        raise ValueError(
            f"reward: expected a name, a function of images and prompts, or a scorer with a `name` and `score(images, "
            f"prompts)`, not {reward!r:.80}"
        )
    name = getattr(reward, "__name__", type(reward).__name__).strip("<>")  # of a lambda, too
    return WeightedReward([(FunctionReward(name, reward), 1.0)], normalize or "none")


def _has_device(name: str, options: Mapping[str, Any]) -> bool:
    """Whether a scorer has a network whose device can be chosen."""
    if is_address(name) or "url" in options:
        return False
    return options.get("backend") == "package" or REWARDS.get(name, ("simple",))[0] != "simple"


def reward_config(spec: str | Mapping[str, float] | RewardConfig) -> RewardConfig:
    """The configuration that :func:`load_reward` builds from ``spec``."""
    if isinstance(spec, RewardConfig):
        return spec
    if not isinstance(spec, str):
        return RewardConfig({name: float(weight) for name, weight in spec.items()})
    path = _yaml_of(spec)
    return RewardConfig({spec: 1.0}) if path is None else load_yaml(RewardConfig, path)


def _yaml_of(spec: str) -> Path | None:
    """The reward file that ``spec`` names, if it names one."""
    if is_address(spec) or not spec.endswith((".yaml", ".yml")):
        return None
    path = next((path for path in (Path(spec), PACKAGE / spec) if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{spec}: no such reward file")
    return path


def make_reward(name: str, backend: Backend = "native", **options: Any) -> Reward:
    """Builds one scorer by name; see :func:`load_reward`.

    Raises:
        ValueError: If the name, the backend or an option is unknown.
        FileNotFoundError: If a user-supplied file is missing.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"unknown backend {backend!r}; expected one of {get_args(Backend)}")
    if is_address(name) or "url" in options:
        return _from_server(name, options)
    if ".py" in name:
        return _from_file(name, options)
    if backend == "package":
        from noisear_rl.rewards.package import PackageReward

        return PackageReward(name, **options)
    if name not in REWARDS:
        return _from_entry_point(name, options)
    module, attribute = REWARDS[name]
    scorer = getattr(importlib.import_module(f"noisear_rl.rewards.{module}"), attribute)
    try:
        return scorer(**options)
    except TypeError as error:
        raise ValueError(f"reward {name!r}: {error}") from error


def _from_file(name: str, options: Mapping[str, Any]) -> Reward:
    """``FILE.py`` stands for its function ``score``; ``FILE.py:FUNCTION`` names another one."""
    path, function = _file_of(name)
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    with _blamed(path, "cannot be loaded"):
        specification.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise ValueError(f"{path} has no function {function!r}: define {function}(images, prompts)")
    timeout = _timeout_of(name, options)
    return FunctionReward(path.stem if function == "score" else function, getattr(module, function), path, timeout)


def _from_entry_point(name: str, options: Mapping[str, Any]) -> Reward:
    """A function that an installed package registers in the entry-point group ``noisear_rl.rewards``."""
    check_reward(name)
    timeout = _timeout_of(name, options)
    with _blamed(name, "cannot be loaded"):
        function = _installed()[name].load()
    return FunctionReward(name, function, timeout=timeout)


def _from_server(name: str, options: Mapping[str, Any]) -> Reward:
    """``http://HOST:PORT``, or any name with the option ``url``."""
    from noisear_rl.rewards.remote import RemoteReward
    from noisear_rl.rewards.vlm import VLMJudge

    given = ({"url": name} if is_address(name) else {"name": name}) | dict(options)
    if (api := given.pop("api", "noisear")) not in APIS:
        raise ValueError(f"reward {name!r:.200}: unknown api {api!r:.80}; expected one of {APIS}")
    try:
        return RemoteReward(**given) if api == "noisear" else VLMJudge(**given)
    except TypeError as error:
        raise ValueError(f"reward {name!r:.200}: {error}") from error


def _timeout_of(name: str, options: Mapping[str, Any]) -> Any:
    if unknown := sorted(options.keys() - {"timeout"}):
        raise ValueError(f"reward {name!r} takes no option {unknown[0]!r}; expected `timeout`, in seconds")
    return options.get("timeout")


def _installed() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def check_reward(spec: str) -> str:
    """Returns what :func:`load_reward` takes; loads no scorer and runs no file.

    Raises:
        ValueError: If a scorer is unknown (names the nearest one), or a reward file is malformed.
        FileNotFoundError: If a file is missing.
    """
    config = reward_config(spec)
    for name in config.weights:
        if is_address(name):
            checked_address(name)
        elif "url" in config.options.get(name, {}):
            pass  # checked with the file
        elif ".py" in name:
            check_code(name)
            _file_of(name)
        elif name not in REWARDS and name not in (installed := _installed()):
            hint = nearest(name, known := sorted([*REWARDS, *installed])) or "."
            raise ValueError(f"unknown reward {name!r:.80}{hint} Expected FILE.py or one of {known}")
    return spec


def reward_sha256(*specs: str) -> str | None:
    """Fingerprint of the files that make up rewards, ``FILE.py`` and ``FILE.yaml``; ``None`` if there is none."""
    files = []
    for spec in specs:
        if (path := _yaml_of(spec)) is not None:
            files.append(path)
        files += [_file_of(name)[0] for name in reward_config(spec).weights if _is_file(name)]
    return sha256([sha256(file) for file in files]) if files else None


RewardSpec = Annotated[str, AfterValidator(check_reward)]
"""A configuration's scorer or reward file."""


def _is_file(name: str) -> bool:
    return ".py" in name and not is_address(name)


def _file_of(name: str) -> tuple[Path, str]:
    """The file of ``FILE.py`` or ``FILE.py:FUNCTION``, and its function, ``score`` if none is named."""
    file, _, function = name.partition(".py")
    path = Path(f"{file}.py")
    if not path.is_file():
        raise FileNotFoundError(f"reward {name!r:.80}: no such file")
    return path, function.removeprefix(":") or "score"
