"""The rows that a linear layer or a convolution multiplies: what a moment of its input is an average over."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from deltaw.errors import TargetError


def matrix_sizes(module: Any, name: str = "") -> tuple[int, int]:
    """(out, in) of a module's matrix."""
    if isinstance(module, nn.modules.conv._ConvNd):
        if module.groups != 1 or module.transposed:
            raise TargetError(f"{name!r} is a grouped or transposed convolution; capture serves plain ones only")
        return module.out_channels, module.weight[0].numel()
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.out_features), int(module.in_features)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return int(module.nf), int(module.nx)
    raise TargetError(f"{name!r} is a {type(module).__name__}; capture serves Linear, Conv1D and Conv modules")


def row_recipe(module: nn.Module) -> tuple[Any, ...]:
    """Modules with equal values here turn one input into equal rows."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return (module.kernel_size, module.stride, module.padding, module.dilation, module.padding_mode)
    return ()


def rows_of(module: nn.Module, side: str, x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows [t, n] that a module's input, output or output gradient consists of, padding left out."""
    if isinstance(module, nn.modules.conv._ConvNd):
        dims = len(module.kernel_size)
        x = x if x.ndim == dims + 2 else x.unsqueeze(0)
        return _patches(module, x) if side == "input" else x.movedim(1, -1).flatten(0, -2)
    if mask is not None:
        if x.ndim >= 3 and x.shape[:2] == mask.shape:
            return x[mask].flatten(0, -2)
        if x.ndim == 2 and x.shape[0] == mask.numel() and mask.shape[1] > 1:
            return x[mask.flatten()]
    return x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)


def _patches(module: nn.modules.conv._ConvNd, x: Tensor) -> Tensor:
    """The patches [t, c·k…] that a convolution multiplies, for any number of spatial dimensions."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = nn.functional.pad(x, list(module._reversed_padding_repeated_twice), mode=mode)
    dims = len(module.kernel_size)
    for d, (k, s, dilation) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True)):
        x = x.unfold(2 + d, (k - 1) * dilation + 1, s)[..., ::dilation]
    x = x.movedim(1, 1 + dims)  # [batch, positions…, channels, kernel…]
    return x.flatten(1 + dims).flatten(0, dims)
