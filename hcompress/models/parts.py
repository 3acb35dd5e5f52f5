"""What several families of transformers over patches share: counting, and putting patches together."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


def num_params(modules: Iterable[nn.Module]) -> int:
    """Parameters of all `modules`; what several of them hold in common, as one object, counts once."""
    return sum(parameter.numel() for parameter in nn.ModuleList(modules).parameters())


def linear_macs(module: nn.Module) -> int:
    """MACs of all linear layers of `module` for one token."""
    return sum(m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))


def unpatchify(h: Tensor, patch: int, channels: int) -> Tensor:
    """[R, L, patch * patch * C] to [R, C, H, W]; the grid is square."""
    side = int(h.shape[1] ** 0.5)
    h = h.reshape(-1, side, side, patch, patch, channels).permute(0, 5, 1, 3, 2, 4)
    return h.reshape(-1, channels, side * patch, side * patch)


def modulation(layer: nn.Linear, conditioning: Tensor) -> list[Tensor]:
    """The shifts, scales and gates that an adaLN layer gives, [R, 1, D] each, for silu(conditioning) [R, D]."""
    return list(layer(conditioning)[:, None].chunk(layer.out_features // layer.in_features, dim=2))
