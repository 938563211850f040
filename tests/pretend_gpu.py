"""A second device for machines that have one: tensors with values on the CPU that say they are elsewhere.

Within `PretendGpu` the device `meta` holds numbers, and an operation on tensors of two devices raises as CUDA does. So
what a test runs under it has put every tensor where it belongs. Says nothing of streams, kernels or speed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

DEVICE = torch.device("meta")
_MOVES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
# CUDA takes indices that are on the CPU.
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}


class Away(Tensor):
    """A tensor of the pretended device; `held` has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Away:
        away = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=DEVICE, requires_grad=held.requires_grad,
        )  # fmt: skip
        away.held = held
        return away

    def tolist(self) -> Any:
        return self.held.tolist()  # torch's own refuses subclasses

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{function}: outside PretendGpu")


class PretendGpu(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [each for each in tree_iter((args, kwargs)) if isinstance(each, Tensor)]
        is_away = any(isinstance(each, Away) for each in tensors)
        if function not in _MOVES:
            _check_devices(function, args, tensors)
        if kwargs.get("device") is not None:
            is_away = torch.device(kwargs["device"]).type == DEVICE.type
            kwargs["device"] = torch.device("cpu")
        elif function in _MOVES:
            is_away = isinstance(args[0], Away)
        result = function(*tree_map(_held, args), **tree_map(_held, kwargs))
        if not is_away:
            return result
        # What an operation wrote into is still the tensor it was given.
        given = {id(each.held): each for each in tensors if isinstance(each, Away)}
        return tree_map(lambda each: given.get(id(each), Away(each)) if isinstance(each, Tensor) else each, result)


def _check_devices(function: Any, args: Any, tensors: list[Tensor]) -> None:
    counted = [each for each in tensors if each.ndim]
    if function._schema.name.partition("::")[2] in _INDEXING:
        counted = [args[0], *(each for each in args[1] if isinstance(each, Away))]
        counted += [each for each in args[2:3] if isinstance(each, Tensor) and each.ndim]
    devices = {isinstance(each, Away) for each in counted}
    if len(devices) > 1:
        raise RuntimeError(f"{function}: expected all tensors to be on the same device, but found at least two devices")


def _held(value: Any) -> Any:
    return value.held if isinstance(value, Away) else value
