"""What both environments do so that other libraries do not copy what they are made of."""

from __future__ import annotations

from typing import Any, Self

from gymnasium.envs.registration import EnvSpec


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
