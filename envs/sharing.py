"""What both environments do so that other libraries can copy, pickle and configure them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Self

from gymnasium.envs.registration import EnvSpec

from noisear_rl.config import nearest


class _SharedArguments(dict[str, Any]):
    """Keyword arguments whose deep copy holds the same objects."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)(self)


class SharedSpec:
    """Mixin of an environment whose ``spec`` shares the objects that it was made of.

    Gymnasium and its wrappers copy specs deeply. A denoiser or scorer would be in memory twice, and one that cannot be
    copied would fail.
    """

    _spec: EnvSpec | None = None

    @property
    def spec(self) -> EnvSpec | None:
        """What ``gymnasium.make`` made the environment of."""
        return self._spec

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:
        if spec is not None:
            spec.kwargs = _SharedArguments(spec.kwargs)
        self._spec = spec


FOREIGN = ("minari_autoseed",)  # options that other libraries read, but also hand on


def checked_options(options: Mapping[str, Any] | None, known: Collection[str]) -> dict[str, Any]:
    """The options of ``reset``.

    Raises:
        ValueError: If one is unknown; names the nearest known one.
    """
    for name in options or {}:
        if name not in (*known, *FOREIGN):
            raise ValueError(
                f"unknown reset option {name!r:.80}; expected one of {sorted(known)}{nearest(name, known)}"
            )
    return dict(options or {})
