"""What a model family must offer, so that all else sees one call.

An Adapter wraps the denoiser of one family and runs it with a forward of its own, which asks a `Route` for the output
of every residual branch. The route decides: compute it, take it from a slot, mix both (training), or expose it
(tracing). Nothing else about caching is known here, and no family is known anywhere else.

Legend: B samples, R rows of the network's batch (2 B under batched guidance), C channels, L tokens, D width.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hcompress.branches import BranchGraph
from hcompress.errors import ModelError
from hcompress.schedule import Identity
from hcompress_runtime.conditions import Given, Input, complete, take

Route = Callable[[int, Callable[[], Tensor]], Tensor]
"""(branch index, how to compute it) -> the branch's output before its gate, [R, *Branch.shape]."""

Condition = Mapping[str, Tensor]
"""What the sample is conditioned on, one row a sample: {"labels": int64[B]}, or the inputs of a text model."""

Told: TypeAlias = int | Mapping[str, NDArray[Any]] | None
"""What is known of an image: its class, or a row of a prompts file's tensors, made of its caption, or nothing."""


def compute_all(branch: int, compute: Callable[[], Tensor]) -> Tensor:
    """The dense route: every branch is computed."""
    return compute()


class Adapter(ABC, nn.Module):
    """One denoiser and its cacheable branches.

    Subclasses are final: they set `graph`, `sample_shape` (C, H, W), `guided_channels` (how many of the output's
    channels guidance applies to) and `conditions` (what they are told of a sample), and fill in the abstract methods.
    """

    graph: BranchGraph
    sample_shape: tuple[int, int, int]
    guided_channels: int
    conditions: Mapping[str, Input]
    network: nn.Module

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The network's configuration, JSON-able; its hash is the model's identity."""

    @abstractmethod
    def step_constants(self, timesteps: Tensor) -> dict[str, Tensor]:
        """Everything that derives from time alone, [len(timesteps), ...] each; one row a timestep."""

    @abstractmethod
    def forward(self, x: Tensor, condition: Condition, constants: Mapping[str, Tensor], route: Route) -> Tensor:
        """Raw network output [R, C_out, H, W] for x [R, C, H, W]; constants have 1 or R rows."""

    @abstractmethod
    def null_condition(self, condition: Condition) -> Condition:
        """What `forward` is given for the unconditional half, with the names that it reads from `condition`."""

    @abstractmethod
    def random_condition(self, rng: np.random.Generator, count: int) -> Condition:
        """Conditions for `count` training samples, drawn as the method asks (uniform over classes, or prompts)."""

    @abstractmethod
    def even_conditions(self, count: int, first: int = 0) -> Given:
        """Conditions to evaluate samples `first` .. `first` + `count` - 1 with.

        Each class, or each prompt of the model's own, comes equally often.
        """

    def scheduler_config(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """The scheduler's configuration as the family's pipeline runs it, from the one stored with the model."""
        return dict(stored)

    def recount(self) -> None:
        """Set `graph` anew, once hcompress.pruned has changed widths. Raises ModelError where a family cannot."""
        raise ModelError(
            f"{type(self).__name__} cannot be pruned: heads and MLP units are known of DiT and PixArt only"
        )

    @final
    def image_condition(self, told: Sequence[Told], dropped: NDArray[np.bool_], rng: np.random.Generator) -> Condition:
        """What images are trained with of which `told` is known: null where that is nothing, or `dropped`, bool[B].

        Where nothing is known of any, chance draws conditions, for the null ones that belong to them.
        """
        known = [one for one in told if one is not None]
        if known:
            filled = [known[0] if one is None else one for one in told]
            classes = [one for one in filled if isinstance(one, int)]
            prompts = [one for one in filled if isinstance(one, Mapping)]
            condition = self.condition(
                classes or {name: np.stack([one[name] for one in prompts]) for name in prompts[0]}
            )
        else:
            condition = self.random_condition(rng, len(told))
        without = dropped | np.array([one is None for one in told])
        null, rows = self.null_condition(condition), torch.from_numpy(without).to(self.device)
        like = {name: rows.reshape(-1, *[1] * (null[name].ndim - 1)) for name in null}
        return {name: torch.where(like[name], null[name], condition[name]) for name in null}

    @final
    def condition(self, given: Given) -> Condition:
        """What a user gives as tensors on the adapter's device. Raises InputError for what this model cannot take."""
        rows = complete(self.conditions, given)
        every = range(len(next(iter(rows.values()))))
        return {name: torch.from_numpy(row).to(self.device) for name, row in take(rows, every).items()}

    @final
    def label_condition(self, labels: Sequence[int]) -> Condition:
        """The condition of class `labels`."""
        return self.condition(labels)

    @property
    def device(self) -> torch.device:
        """Where the weights are; inputs are expected there."""
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are in: float32, or a half that branches and slots are then in too."""
        return next(self.network.parameters()).dtype

    @final
    def guided(
        self,
        x: Tensor,
        condition: Condition,
        constants: Mapping[str, Tensor],
        cfg: float | Tensor,
        route: Route = compute_all,
    ) -> Tensor:
        """Output [B, C_out, H, W] for x [B, C, H, W] after classifier-free guidance (Ho and Salimans 2022).

        Rows of the doubled batch are [cond ; uncond], one routing decision for both. Some pipelines put uncond first;
        no row sees another, so the order changes nothing but where a slot's rows lie. Channels beyond `guided_channels`
        (a learned variance) keep the conditional half, as in diffusers' pipelines; DiT's own sampler guides only three
        of the four channels of a latent. A scale of exactly 1.0 is no guidance; a scalar Tensor is a scale that is only
        known later, and always doubles the rows.

        x and output are float32 whatever the network computes in, so guidance and solver never round to a half.
        """
        x, wide = x.to(self.dtype), torch.promote_types(self.dtype, torch.float32)
        if isinstance(cfg, float) and cfg == 1.0:
            return self(x, condition, constants, route).to(wide)
        null = self.null_condition(condition)
        both = {name: torch.cat([condition[name], null[name]]) for name in null}
        rows = self(torch.cat([x, x]), both, constants, route).to(wide)
        cond, uncond = rows[: x.shape[0]], rows[x.shape[0] :]  # not chunk(2), which torch.export cannot prove for any B
        n = self.guided_channels
        mixed = uncond[:, :n] + cfg * (cond[:, :n] - uncond[:, :n])
        return mixed if n == cond.shape[1] else torch.cat([mixed, cond[:, n:]], dim=1)

    @final
    def identity(self, name: str, solver: dict[str, Any], cfg: float) -> Identity:
        """The identity that a schedule of this model carries. `solver` from hcompress.solver.solver_identity."""
        return Identity(name, config_hash(self.config()), weight_hash(self.network), solver, cfg)


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of a configuration, without diffusers' private keys and paths."""
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    return hashlib.sha256(json.dumps(public, sort_keys=True, default=str).encode()).hexdigest()


def weight_hash(network: nn.Module) -> str:
    """SHA-256 over names, shapes and values (as float32) of all weights, in name order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy())
    return digest.hexdigest()
