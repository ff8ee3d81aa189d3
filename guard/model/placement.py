"""Where a model computes, in which type, and with which kernels."""

from typing import NamedTuple

import torch

from guard.errors import CheckpointError
from guard.model.kernels import TorchKernels, fastest


class Placement(NamedTuple):
    """`dtype` is that of the weights in memory."""

    device: torch.device
    dtype: torch.dtype
    kernels: TorchKernels


def place(device: str, dtype: str, *, int8: bool) -> Placement:
    """As the settings say, see guard.settings; `int8` says that products of int8 change no verdicts to speak of.

    Raises CheckpointError for a device that is not here, or a type that it cannot compute in.
    """
    where = _pick_device(device)
    kernels = fastest(where)
    return Placement(where, _pick_dtype(dtype, where, kernels, int8=int8), kernels)


def _pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # an unknown name, or no such device on this machine
        raise CheckpointError(f"device {name!r} cannot be used here") from error
    return device


def _pick_dtype(name: str, device: torch.device, kernels: TorchKernels, *, int8: bool) -> torch.dtype:
    """The fastest type that changes no verdicts to speak of.

    On CPUs that is int8 where the kernels multiply integers. Next comes bfloat16 where products of it are fast: CUDA,
    and CPUs with AMX. Elsewhere float32 is up to twice as fast.
    """
    if device.type == "cuda" and name not in ("auto", "bfloat16"):  # its attention is of 16 bits
        raise CheckpointError(f"dtype {name} cannot be used on {device}")
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.int8}[name]
    if device.type == "cuda":
        return torch.bfloat16
    if int8 and kernels.multiplies_integers:
        return torch.int8
    return torch.bfloat16 if torch.cpu.get_capabilities().get("amx_bf16") else torch.float32
