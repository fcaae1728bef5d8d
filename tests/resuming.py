"""Kills trainings and compares resumed runs with uninterrupted ones."""

import dataclasses

import pytest
import torch

from noisear_rl.learning.records import read_records
from noisear_rl.learning.run import Run


def kill_and_resume(train, config, *arguments):
    """Kills a training right after its first checkpoint and resumes it; returns what ``train`` returns."""
    save = Run.save

    def killed(self, *positional, **parts):
        save(self, *positional, **parts)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "save", killed)
        train(config, *arguments)
    return train(dataclasses.replace(config, resume=True), *arguments)


def assert_same_run(whole, resumed, folder, other):
    """The same parameters and, up to speed, the same records."""
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(read_records(folder), read_records(other), strict=True):
        assert a | {"charts/SPS": None} == b | {"charts/SPS": None}
