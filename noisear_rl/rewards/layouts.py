"""How different the layouts of pictures of the shapes world are: where what kind of object lies.

Shapes: ``K`` pictures, ``M`` objects a picture.
"""

from __future__ import annotations

import itertools

import numpy as np

from noisear_rl.denoisers.shapes.world import IMAGE_SIZE, Scenes


def layout_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Mean distance of the objects of two pictures under the best assignment, in sides of the picture.

    Objects of the same shape and colour are as far apart as their centres, at most 1; others, and objects without a
    partner, are 1 apart. In [0, 1]: 0 for the same layout and for two empty pictures.

    Args:
        first: ``(M, 4)``: shape, colour, and centre in pixels of every object; at most a handful.
        second: The same of the other picture.
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


def layout_diversity(scenes: Scenes) -> float:
    """Mean :func:`layout_distance` over all pairs of ``K`` pictures of one prompt, as a detector saw them."""
    kinds = np.stack([scenes.shape.cpu().numpy(), scenes.color.cpu().numpy()], -1)
    objects = np.concatenate([kinds, scenes.center.cpu().numpy()], -1)  # (K, M, 4)
    layouts = [picture[picture[:, 0] >= 0] for picture in objects]
    return float(np.mean([layout_distance(a, b) for a, b in itertools.combinations(layouts, 2)]))
