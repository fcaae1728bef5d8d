"""What a replay draws, forgets, and keeps in checkpoints."""

import numpy as np
import torch

from noisear_rl.learning.replay import Episodes, Replay


def episodes(first, prompts):
    """Episodes whose reward and patches say which they are."""
    rewards = torch.arange(first, first + len(prompts)).float()
    return list(prompts), rewards[:, None, None].expand(-1, 2, 3), rewards


def rng():
    return np.random.default_rng(0)


def test_draws_of_prompts_from_all_sources():
    replay = Replay(2, Episodes(*episodes(0, "aab")))
    replay.add(*episodes(10, "bbc"))
    found = replay.draw(rng(), prompts=10, samples=10)
    assert sorted(zip(found.prompts, found.rewards.tolist(), strict=True)) == [
        ("a", 0), ("a", 1), ("b", 2), ("b", 10), ("b", 11), ("c", 12),
    ]  # fmt: skip
    assert torch.equal(found.patches[:, 0, 0].float(), found.rewards)
    few = replay.draw(rng(), prompts=2, samples=2)
    assert len(few.rows) == 2 and all(len(rows) <= 2 for rows in few.rows.values())
    drawn = {reward for seed in range(50) for reward in replay.draw(np.random.default_rng(seed), 1, 1).rewards.tolist()}
    assert drawn == {0, 1, 2, 10, 11, 12}


def test_forgets_the_oldest_update_and_keeps_rollouts():
    replay = Replay(2, Episodes(*episodes(0, "a")))
    for first in (10, 20, 30):
        replay.add(*episodes(first, "ab"))
    assert sorted(replay.draw(rng(), 10, 10).rewards.tolist()) == [0, 20, 21, 30, 31]
    empty = Replay(0)
    empty.add(*episodes(0, "a"))
    assert empty.draw(rng(), 1, 1) is None and Replay(2).draw(rng(), 1, 1) is None
    assert replay.draw(rng(), 0, 1) is None


def test_draws_the_same_after_a_checkpoint(tmp_path):
    replay, other = Replay(2), Replay(2)
    for first in (10, 20, 30):
        replay.add(*episodes(first, "abc"))
    torch.save(replay.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for part in (replay, other):
        part.add(*episodes(40, "cd"))
    a, b = (part.draw(rng(), 2, 3) for part in (replay, other))
    assert a.prompts == b.prompts and torch.equal(a.patches, b.patches) and torch.equal(a.rewards, b.rewards)
