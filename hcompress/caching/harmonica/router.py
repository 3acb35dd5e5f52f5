"""The router: T x N logits, all that training them has to remember, and the route of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hcompress.adapter import Route
from hcompress.caching.settings import HarmoniCaSettings
from hcompress.sampling import Slots

PAPER_EPS = 1e-8  # AdamW's default, as in the released code; a beta of 7e-8 feels it: gradients are no larger
STEERED_EPS = 1e-16  # steering finds beta at any scale of lambda, so no gradient may drown in eps


class Router:
    """The logits with all that training them has to remember. T rows, one parameter each; row 0 is pinned.

    lambdas:  float64[T]     IEPO's weights; row 0 has no loss
    velocity: float64[T, N]  how fast each logit moves, a trajectory, for steering; `previous` are its last logits
    """

    def __init__(
        self,
        num_calls: int,
        num_branches: int,
        settings: HarmoniCaSettings,
        seed: int,
        first: NDArray[np.float32] | None = None,
    ) -> None:
        """`first`: logits to start from, [T, N], such as those of another schedule; None: as the settings say."""
        rng = np.random.default_rng(seed)
        drawn = rng.standard_normal((num_calls, num_branches)) if settings.init == "normal" else settings.init
        logits = np.asarray(drawn if first is None else first, np.float32)
        table = np.broadcast_to(logits, (num_calls, num_branches)).copy()
        table[0] = settings.clamp
        self.rows = nn.ParameterList([nn.Parameter(torch.from_numpy(row)) for row in table])
        self.rows[0].requires_grad_(False)
        eps = PAPER_EPS if settings.beta is not None else STEERED_EPS
        self.optimizer = torch.optim.AdamW(list(self.rows)[1:], lr=settings.lr, weight_decay=0.0, eps=eps)
        self.trajectory = 0
        self.beta = settings.beta or 0.0
        self.lambdas = np.zeros(num_calls)
        self.velocity = np.zeros((num_calls, num_branches))
        self.previous = self.logits().astype(np.float64)

    def logits(self) -> NDArray[np.float32]:
        """float32[T, N]."""
        return np.stack([row.detach().numpy() for row in self.rows])

    def scores(self) -> NDArray[np.float64]:
        """r = sigmoid(theta), float64[T, N]."""
        return np.asarray(1.0 / (1.0 + np.exp(-self.logits().astype(np.float64))))

    def hard(self, threshold: float) -> NDArray[np.bool_]:
        """bool[T, N], computed where r > tau: the schedule that is deployed."""
        return np.asarray(self.scores() > threshold)

    def state(self) -> dict[str, Any]:
        """All of it, for torch.save; load with `weights_only=True`."""
        return {
            "rows": self.rows.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "trajectory": self.trajectory,
            "beta": self.beta,
            "lambdas": torch.from_numpy(self.lambdas),
            "velocity": torch.from_numpy(self.velocity),
            "previous": torch.from_numpy(self.previous),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()`."""
        self.rows.load_state_dict(state["rows"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.trajectory, self.beta = state["trajectory"], state["beta"]
        self.lambdas = state["lambdas"].numpy().copy()
        self.velocity, self.previous = state["velocity"].numpy().copy(), state["previous"].numpy().copy()


def soft_route(scores: Tensor, keep: NDArray[np.bool_], slots: Slots) -> Route:
    """The training mix of one call. scores: r, [N], with gradient; keep: bool[N], where the slot takes the mixture."""

    def route(branch: int, evaluate: Callable[[], Tensor]) -> Tensor:
        mixed = torch.lerp(slots[branch], evaluate(), scores[branch])
        if keep[branch]:
            slots[branch] = mixed.detach()
        return mixed

    return route
