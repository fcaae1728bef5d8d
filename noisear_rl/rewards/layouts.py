"""How much the layouts of images of the shapes world differ: which kind of object is where.

Shapes: ``K`` images, ``M`` objects per image.
"""

from __future__ import annotations

import itertools

import numpy as np

from noisear_rl.denoisers.shapes.world import IMAGE_SIZE, Scenes


def layout_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Mean distance between the objects of two images under the best assignment, in units of the image side.

    Objects of the same shape and colour are as far apart as their centres, at most 1; all other pairs, and objects
    without a partner, are 1 apart. In [0, 1]: 0 for identical layouts and for two empty images.

    Args:
        first: ``(M, 4)``: shape, colour, and centre in pixels of every object; all assignments are tried, so keep ``M``
            to a handful.
        second: The same for the other image.
    """
    few, many = sorted((first, second), key=len)
    if not len(few):
        return float(len(many) > 0)
    distance = np.linalg.norm(few[:, None, 2:] - many[None, :, 2:], axis=-1) / IMAGE_SIZE
    same = (few[:, None, :2] == many[None, :, :2]).all(-1)
    cost = np.where(same, np.minimum(distance, 1), 1.0)
    rows = range(len(few))
    best = min(cost[rows, columns].sum() for columns in itertools.permutations(range(len(many)), len(few)))
    return float((best + len(many) - len(few)) / len(many))


def layout_distances(scenes: Scenes) -> np.ndarray:
    """:func:`layout_distance` of all pairs of ``K`` images of one prompt, as seen by a detector: ``(K, K)``."""
    kinds = np.stack([scenes.shape.cpu().numpy(), scenes.color.cpu().numpy()], -1)
    objects = np.concatenate([kinds, scenes.center.cpu().numpy()], -1)  # (K, M, 4)
    layouts = [rows[rows[:, 0] >= 0] for rows in objects]
    distances = np.zeros((len(layouts), len(layouts)))
    for (i, first), (j, second) in itertools.combinations(enumerate(layouts), 2):
        distances[i, j] = distances[j, i] = layout_distance(first, second)
    return distances


def layout_diversity(scenes: Scenes) -> float:
    """Mean :func:`layout_distance` over all pairs of ``K`` images of one prompt."""
    distances = layout_distances(scenes)
    return float(distances[np.triu_indices(len(distances), 1)].mean())
