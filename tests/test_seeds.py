"""Streams of randomness do not collide."""

import itertools

from noisear_rl.seeds import Stream, stream_rng


def test_streams_do_not_collide():
    keys = list(itertools.product((0, 1, 2, 2**40), Stream, (0, 1, 2)))
    drawn = {int(stream_rng(seed, stream, index).integers(2**63)) for seed, stream, index in keys}
    assert len(drawn) == len(keys)
    assert len(set(Stream)) == len(Stream.__members__) and 0 not in set(Stream)
    again = [int(stream_rng(*key).integers(2**63)) for key in keys]
    assert set(again) == drawn
