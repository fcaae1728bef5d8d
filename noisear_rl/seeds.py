"""Named streams of randomness: every draw follows from ``(seed, stream, index)``, so resuming needs no saved generator.

Keys always have these three parts. Keys of different lengths would collide: numpy pads them with zeros, so that
``[s, 1, 0]`` seeds the same generator as ``[s, 1]``.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What is drawn; the index of a draw is in brackets. The numbers are part of every result: never reuse one."""

    PROMPT_ORDER = 1
    """Order of the prompts [round]."""
    ROLLOUT = 2
    """Noise of an update's episodes, then its minibatches [update]."""
    HELD_OUT_PROMPTS = 3
    """Which prompts are held out [0]."""
    BATCH_ORDER = 4
    """Order of the training rows [epoch]."""
    HELD_OUT_ROWS = 5
    """Which held-out rows are evaluated [0]."""
    REPARAMETERIZATION = 6
    """Noise of a supervised update's targets and samples [update]."""
    HELD_OUT_NOISE = 7
    """The same for held-out rows [0]."""
    COLLECTED_PROMPTS = 8
    """Which prompts rollouts are collected of [0]."""
    COLLECTED_NOISE = 9
    """Noise of collected rollouts [shard]."""
    SHARED_NOISE = 10
    """Noise that all prompts share [0]."""
    TEXT_STATISTICS = 11
    """Which prompts text statistics are fitted on [0]."""
    DROPOUT = 12
    """Masks of dropout [update]."""
    LAYOUTS = 13
    """Which of a prompt's layouts are trained on [update]."""
    HELD_OUT_LAYOUTS = 14
    """Which of a held-out prompt's layouts is validated on [0]."""


def stream_rng(seed: int, stream: Stream, index: int = 0) -> np.random.Generator:
    """The generator of a stream's ``index``-th draw; different arguments give independent generators."""
    return np.random.default_rng([seed, int(stream), index])
