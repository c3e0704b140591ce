"""inference_only: answers in the types documented whatever autocast says, and no gradients in silence."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

_REFUSED = (
    "dbattn serves inference: rows are stored detached and its kernels keep no gradients. Call it under "
    "torch.no_grad() or torch.inference_mode(); for gradients, use the model unwrapped"
)
_DEVICES = ("cpu", "cuda")


class _Refused(torch.autograd.Function):
    """The identity; its backward raises."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, severed: Tensor) -> Tensor:
        return out.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(_REFUSED)


def refuse_gradients(out: Any) -> Any:
    """A float tensor, or each one of a tuple, as part of a graph whose backward raises and says why."""
    if isinstance(out, tuple):
        return tuple(refuse_gradients(part) for part in out)
    if not isinstance(out, Tensor) or not out.is_floating_point():
        return out
    with torch.enable_grad():
        return _Refused.apply(out.detach(), torch.empty(0, requires_grad=True))  # type: ignore[no-untyped-call]


def inference_only(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function without autocast and without a graph.

    Where an argument requires a gradient (tensors, and whatever else has ``requires_grad``), the tensors returned are
    part of a graph whose backward raises RuntimeError.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return call(*args, **kwargs)
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        severed = any(getattr(part, "requires_grad", False) for part in (*args, *kwargs.values()))
        with torch.no_grad():
            out = function(*args, **kwargs)
        return cast(R, refuse_gradients(out)) if severed else out

    return call
