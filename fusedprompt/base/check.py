"""Argument checks shared by the public ops and by batches; each message names the argument, the rule and the value."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def tensor(argument: str, value: object, shape: str, ndim: int) -> torch.Tensor:
    """Return `value` if it is a tensor of `ndim` dimensions, described to the user as `shape`."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{argument}: expected a tensor of shape {shape}, got {type(value).__name__}")
    if value.dim() != ndim:
        raise ValueError(f"{argument}: expected shape {shape}, got {tuple(value.shape)}")
    return value


def floating(argument: str, value: torch.Tensor) -> None:
    if not value.is_floating_point():
        raise TypeError(f"{argument}: expected a floating-point dtype, got {value.dtype}")


def token_ids(argument: str, value: torch.Tensor) -> None:
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{argument}: expected int64 or int32 ids, got {value.dtype}")


def shape(argument: str, value: torch.Tensor, rule: str, expected: Sequence[int]) -> None:
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{argument}: expected shape {rule} = {tuple(expected)}, got {tuple(value.shape)}")


def same_device(argument: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{argument}: expected the device of {other_name}, {other.device}, got {value.device}")


def same_dtype(argument: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if value.dtype != other.dtype:
        raise TypeError(f"{argument}: expected the dtype of {other_name}, {other.dtype}, got {value.dtype}")


def integral(argument: str, value: torch.Tensor) -> None:
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{argument}: expected an integer dtype, got {value.dtype}")


def probability(argument: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{argument}: expected a number in [0, 1), got {value!r} of type {type(value).__name__}")
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{argument}: expected a number in [0, 1), got {value}")
