"""Properties that hold for whatever hypothesis comes up with: patches, configurations, prompt files, environments."""

import csv
import dataclasses
import io
import json
import math
import tempfile
import typing
import warnings
from pathlib import Path

import gymnasium
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from gymnasium.error import ClosedEnvironmentError, ResetNeeded
from hypothesis import HealthCheck, given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from noisear_rl.config import from_mapping, load_yaml, to_mapping
from noisear_rl.envs import NoiseEnv, NoiseVectorEnv
from noisear_rl.patches import patchify, sequence_shape, unpatchify
from noisear_rl.prompts.sets import load_prompt_set
from noisear_rl.rewards import WeightedReward
from tests import toys
from tests.test_config import CONFIGS

quick = settings(
    derandomize=True, deadline=None, database=None, max_examples=40, suppress_health_check=list(HealthCheck)
)


@st.composite
def cuts(draw):
    """Latents of any rank, and a patch size that divides them."""
    axes = draw(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=4))
    batch, channels = draw(st.integers(0, 3)), draw(st.integers(1, 3))
    sizes = tuple(size for _, size in axes)
    spatial = tuple(number * size for number, size in axes)
    elements = batch * channels * math.prod(spatial)
    return torch.arange(elements).reshape(batch, channels, *spatial), sizes[0] if len(set(sizes)) == 1 else sizes


@quick
@given(cuts())
def test_patches_of_any_rank(cut):
    """Both ways, and every patch is a block of all channels, in raster order."""
    latents, size = cut
    shape = latents.shape[1:]
    patches = patchify(latents, size)
    n, a = sequence_shape(shape, size)
    assert patches.shape == (len(latents), n, a) and n * a == math.prod(shape)
    assert torch.equal(unpatchify(patches, shape, size), latents)
    assert torch.equal(patchify(unpatchify(patches, shape, size), size), patches)
    sizes = (size,) * (len(shape) - 1) if isinstance(size, int) else size
    grid = [s // p for s, p in zip(shape[1:], sizes, strict=True)]
    for i in range(n):
        place = np.unravel_index(i, grid)
        block = tuple(slice(at * p, (at + 1) * p) for at, p in zip(place, sizes, strict=True))
        assert torch.equal(patches[:, i], latents[(slice(None), slice(None), *block)].reshape(len(latents), a))


def values_of(hint):
    """Valid values of an option's type; ``None`` for types whose values are names of something."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return st.sampled_from(args)
    if hint is bool:
        return st.booleans()
    if origin is typing.Annotated and args[0] in (int, float):
        return st.from_type(hint).filter(math.isfinite)
    if origin is typing.Annotated and typing.get_origin(args[0]) is typing.Annotated:
        return values_of(args[0])
    if hint is Path:
        return st.text("ab./ -_é'\"#:", min_size=1).map(Path)
    if type(None) in args and len(args) == 2:
        inner = values_of(next(part for part in args if part is not type(None)))
        return None if inner is None else st.none() | inner
    if origin is tuple and len(args) == 2 and args[1] is ...:
        inner = values_of(args[0])
        return None if inner is None else st.lists(inner, min_size=1, max_size=3).map(tuple)
    return None


def options_of(cls):
    hints = typing.get_type_hints(cls, include_extras=True)
    known = {field.name: values_of(hints[field.name]) for field in dataclasses.fields(cls)}
    free = {name: values for name, values in known.items() if values is not None}
    return st.fixed_dictionaries({}, optional=free)


@quick
@given(st.data(), st.sampled_from(CONFIGS))
def test_configurations_survive_yaml(data, cls):
    """What is written and read again is the same, in the file as in memory."""
    given = data.draw(options_of(cls))
    try:
        config = cls(**given)
    except ValueError:
        return  # options that do not go together
    written = to_mapping(config)
    assert from_mapping(cls, written) == config
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "preset.yaml"
        path.write_text(yaml.safe_dump(written, sort_keys=False), encoding="utf-8")
        assert load_yaml(cls, path) == config and to_mapping(load_yaml(cls, path)) == written


def test_most_options_vary():
    """The test above draws at least a third of the options of every configuration."""
    for cls in CONFIGS:
        if cls.__name__ != "PriorConfig":
            hints = typing.get_type_hints(cls, include_extras=True)
            assert sum(values_of(hint) is not None for hint in hints.values()) >= len(hints) / 3, cls


PROMPTS = st.lists(
    st.text(st.characters(categories=("L", "N", "P", "S", "Zs")), min_size=1, max_size=12).map(str.strip).filter(len),
    min_size=1,
    max_size=6,
)


def write(path, prompts):
    """Writes prompts as an ordinary program would, in the format of the file's suffix."""
    if path.suffix in (".csv", ".tsv"):
        text = io.StringIO(newline="")
        delimiter = "," if path.suffix == ".csv" else "\t"
        quoting = csv.QUOTE_MINIMAL if path.suffix == ".csv" else csv.QUOTE_NONE
        writer = csv.writer(text, delimiter=delimiter, quoting=quoting, quotechar=None if quoting else '"')
        writer.writerows([["prompt"], *([prompt] for prompt in prompts)])
        path.write_text(text.getvalue(), encoding="utf-8", newline="")
    elif path.suffix == ".parquet":
        Dataset.from_dict({"prompt": prompts}).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"prompt": prompt} for prompt in prompts]), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
    else:
        path.write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")


@quick
@given(PROMPTS, st.sampled_from(["csv", "tsv", "json", "jsonl", "txt"]))
def test_prompt_files_are_read_as_written(prompts, suffix):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"prompts.{suffix}"
        write(path, prompts)
        assert load_prompt_set(path).prompts == list(dict.fromkeys(prompts))


@quick
@given(st.binary(max_size=60), st.sampled_from(["csv", "tsv", "json", "jsonl", "txt", "parquet"]), st.booleans())
def test_any_bytes_are_prompts_or_refused(content, suffix, skip):
    """Nothing but an error that names the file, or prompts that are text."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / f"prompts.{suffix}"
        path.write_bytes(content)
        try:
            found = load_prompt_set(path, skip_bad_rows=skip).prompts
        except (ValueError, OSError) as error:
            assert "prompts." in str(error)
        else:
            assert found and all(prompt.strip() and isinstance(prompt, str) for prompt in found)


COPIES = 3
SEEDS = st.integers(0, 2**31)
CHOSEN = st.sampled_from(["up", "down", "sideways"])


class Environments(RuleBasedStateMachine):
    """A batched environment and scalar ones beside it, in any order of calls."""

    def __init__(self):
        super().__init__()
        kwargs = {"reward": WeightedReward([(toys.Obey(), 1.0)]), "prompts": toys.PROMPTS}
        denoiser = toys.NoDenoiser((1, 8, 4), 4)
        self.batched = NoiseVectorEnv(COPIES, denoiser, **kwargs)
        self.scalars = [NoiseEnv(denoiser, **kwargs) for _ in range(COPIES)]
        self.patches = None  # so far; None before the first reset
        self.closed = False

    def began(self, observation, info, found):
        """Both have begun the same episodes."""
        self.patches = 0
        self.same(observation, [observation for observation, _ in found])
        assert info["prompt"].tolist() == [info["prompt"] for _, info in found]
        self.prompts = info["prompt"].tolist()

    def same(self, observation, observations):
        for key, values in observation.items():
            assert np.array_equal(values, np.stack([own[key] for own in observations])), key
        assert observation["step"].tolist() == [self.patches] * COPIES

    @precondition(lambda self: not self.closed and self.patches is not None)
    @rule()
    def reset(self):
        self.began(*self.batched.reset(), [env.reset() for env in self.scalars])

    @precondition(lambda self: not self.closed)
    @rule(seed=SEEDS)
    def reset_with_a_seed(self, seed):
        found = [env.reset(seed=seed + i) for i, env in enumerate(self.scalars)]
        self.began(*self.batched.reset(seed=seed), found)
        assert self.batched.np_random_seed == seed
        assert self.batched.np_random.random() == gymnasium.utils.seeding.np_random(seed)[0].random()

    @precondition(lambda self: not self.closed)
    @rule(seeds=st.lists(SEEDS, min_size=COPIES, max_size=COPIES), prompts=st.lists(CHOSEN, min_size=3, max_size=3))
    def reset_with_seeds_and_prompts(self, seeds, prompts):
        scalar = zip(self.scalars, seeds, prompts, strict=True)
        found = [env.reset(seed=seed, options={"prompt": prompt}) for env, seed, prompt in scalar]
        options = {"prompts": prompts, "reset_mask": np.ones(COPIES, dtype=bool)}
        self.began(*self.batched.reset(seed=seeds, options=options), found)
        assert self.prompts == prompts

    @precondition(lambda self: not self.closed and self.patches is not None)
    @rule(prompt=CHOSEN)
    def reset_with_one_prompt(self, prompt):
        options = {"prompt": prompt}
        found = [env.reset(options=dict(options)) for env in self.scalars]
        self.began(*self.batched.reset(options=options), found)
        assert self.prompts == [prompt] * COPIES and options == {"prompt": prompt}

    @precondition(lambda self: not self.closed)
    @rule(mask=st.sampled_from([np.array([True, False, True]), np.zeros(COPIES, dtype=bool), np.ones(2, dtype=bool)]))
    def reset_of_some(self, mask):
        """Refused: all act in lockstep. Nothing has changed."""
        with pytest.raises(ValueError, match="all true: the copies act in lockstep"):
            self.batched.reset(options={"reset_mask": mask})

    @precondition(lambda self: not self.closed)
    @rule(options=st.sampled_from([{"prompts": ["up"]}, {"prompts": "sideways"}, {"prompt": " "}, {"prompt": 3}]))
    def reset_with_bad_options(self, options):
        if self.patches is None:
            self.reset_with_a_seed(0)
        with pytest.raises(ValueError, match=r"expected 3 prompts|a prompt must be text"):
            self.batched.reset(seed=None, options=options)

    @precondition(lambda self: not self.closed and self.patches is not None)
    @rule(seed=SEEDS, scale=st.sampled_from([1.0, 8.0]))
    def step(self, seed, scale):
        """One patch for each; after the end new episodes begin."""
        actions = (scale * np.random.default_rng(seed).standard_normal((COPIES, 16))).astype(np.float32)
        observation, rewards, terminated, truncated, info = self.batched.step(actions)
        assert not truncated.any()
        if self.patches == 2:
            self.began(observation, info, [env.reset() for env in self.scalars])
            assert not rewards.any() and not terminated.any()
            return
        found = [env.step(action) for env, action in zip(self.scalars, actions, strict=True)]
        self.patches += 1
        self.same(observation, [step[0] for step in found])
        np.testing.assert_allclose(rewards, [step[1] for step in found], rtol=1e-5)
        assert terminated.tolist() == [step[2] for step in found] == [self.patches == 2] * COPIES
        assert info["clipped"].tolist() == [step[4]["clipped"] for step in found]
        assert bool(info["noise"].any()) == (self.patches == 2)  # zero before the end
        assert info["prompt"].tolist() == self.prompts

    @precondition(lambda self: not self.closed and self.patches in (0, 1))
    @rule(
        value=st.sampled_from([float("nan"), float("inf")]),
        shape=st.sampled_from([(COPIES, 16), (COPIES, 15), (2, 16)]),
    )
    def step_with_bad_actions(self, value, shape):
        with pytest.raises(ValueError):
            self.batched.step(np.full(shape, value, dtype=np.float32))

    @precondition(lambda self: not self.closed and self.patches is None)
    @rule()
    def step_too_early(self):
        for env in (self.batched, self.scalars[0]):
            with pytest.raises(ResetNeeded):
                env.step(env.action_space.sample())

    @precondition(lambda self: self.patches is not None)
    @rule()
    def close(self):
        self.batched.close()
        self.closed = True

    @precondition(lambda self: self.closed)
    @rule()
    def use_after_closing(self):
        for call in (self.batched.reset, lambda: self.batched.step(self.batched.action_space.sample())):
            with pytest.raises(ClosedEnvironmentError, match="make a new one"):
                call()

    @invariant()
    def spaces_hold(self):
        if self.patches is not None and not self.closed:
            assert self.batched.observation_space.contains(self.batched._observation())


test_environments_in_any_order = pytest.mark.filterwarnings("ignore")(Environments.TestCase)
Environments.TestCase.settings = settings(quick, max_examples=25, stateful_step_count=12)
