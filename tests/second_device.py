"""A second device, for tests of placement on a machine without an accelerator: ``pytest -p tests.second_device``.

Its tensors hold tensors of the CPU, where all of its operations run. As on an accelerator, an operation on tensors of
both devices is an error: all that moves between them must be moved by name. It has no precision of its own and no
generators, and ``auto`` names it.
"""

import contextlib
import os
from typing import Any

import torch
from accelerate import PartialState
from torch.utils import backend_registration
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

NAME = "mirror"  # also a method of tensors and modules
CROSSING = {"aten::copy_", "aten::_to_copy"}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}  # by indices of the CPU


class _Module(backend_registration._DummyBackendModule):
    """What ``torch.mirror`` offers."""

    is_available = is_initialized = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    _is_in_bad_fork = staticmethod(lambda: False)
    get_amp_supported_dtype = staticmethod(lambda: [torch.float32])
    set_device = synchronize = manual_seed = manual_seed_all = staticmethod(lambda *arguments: None)
    empty_cache = staticmethod(lambda: None)
    get_rng_state = staticmethod(lambda device=None: torch.zeros(8, dtype=torch.uint8))
    set_rng_state = staticmethod(lambda state, device=None: None)
    device = staticmethod(lambda index: contextlib.nullcontext())


class _Hook(backend_registration._DummyPrivateUse1Hook):
    is_available = is_built = has_primary_context = staticmethod(lambda *arguments: True)


class SecondTensor(torch.Tensor):
    """A tensor of the second device.

    Attributes:
        held: The same values on the CPU.
    """

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, requires_grad: bool = False) -> "SecondTensor":
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
            requires_grad=requires_grad,
        )
        tensor.held = held
        return tensor

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"{self.held!r} on {NAME}"

    def tolist(self) -> Any:
        return self.held.tolist()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied = self.detach().clone()
            learned = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copied, self.requires_grad) if learned else copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Is saved as a tensor of the CPU."""
        return self.held.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(func, *args, **(kwargs or {}))


def _is_second(device: Any) -> bool:
    return device.type == NAME if isinstance(device, torch.device) else str(device).split(":")[0] == NAME


def _run(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs an operation on the CPU; its results are on the device that it names, or that its tensors are on."""
    flat, spec = tree_flatten((args, kwargs))
    here = [x for x in flat if isinstance(x, SecondTensor)]
    there = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, SecondTensor) and x.dim()]
    name = func._schema.name
    if name == "aten::_has_compatible_shallow_copy_type":
        return len(here) == 2
    if here and there and name not in CROSSING and not (name in INDEXING and args[0] is here[0]):
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got some of {NAME} and of cpu")
    named = [x for x in flat if isinstance(x, torch.device)]
    second = (
        _is_second(named[0]) if named else isinstance(args[0], SecondTensor) if name == "aten::copy_" else bool(here)
    )
    held = {id(x.held): x for x in here}
    to_cpu = lambda x: torch.device("cpu") if isinstance(x, torch.device) and _is_second(x) else x
    bare = [x.held if isinstance(x, SecondTensor) else to_cpu(x) for x in flat]
    args, kwargs = tree_unflatten(bare, spec)
    found = func(*args, **kwargs)

    def back(x: Any) -> Any:
        """The tensor that an operation changed in place, or a new one of the second device."""
        if not isinstance(x, torch.Tensor):
            return x
        return held[id(x)] if id(x) in held else SecondTensor(x) if second else x

    return tree_map(back, found)


class _Generator(torch.Generator):
    """Draws on the CPU, whatever its device is called."""

    def __new__(cls, device: Any = "cpu") -> "_Generator":
        return super().__new__(cls, "cpu" if _is_second(device) else device)  # type: ignore[call-arg]


class _Autocast(torch.autocast):
    """Changes nothing on the second device."""

    def __init__(self, device_type: str, dtype: Any = None, enabled: bool = True, **options: Any) -> None:
        second = device_type == NAME
        super().__init__("cpu" if second else device_type, dtype, enabled and not second, **options)


def _moved_later(make: Any) -> Any:
    """Makes a tensor from data on the CPU and moves it: what is written in C++ knows no such device."""

    def made(*args: Any, device: Any = None, **options: Any) -> torch.Tensor:
        if args and isinstance(args[0], list | tuple) and args[0] and isinstance(args[0][0], SecondTensor):
            args = [x.held.tolist() for x in args[0]], *args[1:]
        if args and isinstance(args[0], SecondTensor):
            return args[0].to(device or args[0].device, options.get("dtype") or args[0].dtype)
        tensor = make(*args, device=None if _is_second(device) else device, **options)
        return tensor.to(device) if _is_second(device) else tensor

    return made


backend_registration._setup_privateuseone_for_python_backend(NAME, _Module(), _Hook())
LIBRARY = torch.library.Library("_", "IMPL")
LIBRARY.fallback(_run, "PrivateUse1")
torch.Generator, torch.autocast, torch.inference_mode = _Generator, _Autocast, torch.no_grad  # type: ignore
for _name in ("tensor", "as_tensor", "arange", "linspace"):
    setattr(torch, _name, _moved_later(getattr(torch, _name)))

os.environ["ACCELERATE_USE_CPU"] = "false"

from transformers.models.clip import modeling_clip  # noqa: E402

from noisear_rl.denoisers import diffusion_pipeline, placement  # noqa: E402

_dtype = placement.resolve_dtype
_forwards = {cls: cls.forward for cls in (modeling_clip.CLIPTextEmbeddings, modeling_clip.CLIPVisionEmbeddings)}


def _resolve_dtype(dtype: Any, device: torch.device) -> torch.dtype:
    """``auto`` is float32, as autocast changes nothing."""
    return torch.float32 if device.type == NAME and dtype == "auto" else _dtype(dtype, device)


def _with_positions(self: Any, *arguments: Any, **options: Any) -> Any:
    """transformers leaves this buffer empty once a backend written in Python is registered."""
    count = self.position_ids.shape[-1]
    self.position_ids = torch.arange(count, device=self.position_ids.device).expand(1, -1)
    return _forwards[type(self)](self, *arguments, **options)


for _cls in _forwards:
    _cls.forward = _with_positions
diffusion_pipeline.resolve_dtype = placement.resolve_dtype = _resolve_dtype
PartialState().device = torch.device(NAME, 0)
