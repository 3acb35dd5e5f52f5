"""The router: T x N logits, all that training them has to remember, and the route of training.

training    h = r f(x) + (1 - r) v        r = sigmoid(theta); where r > tau the slot may take detach(h)
deployment  computed where r > tau, reused elsewhere

v is the slot c as it is, or corrected (hcompress.corrections).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hcompress.adapter import Route
from hcompress.caching.problem import Found, Progress, Ranks
from hcompress.caching.settings import RouterSettings
from hcompress.sampling import NOTHING, Older, Slots, Terms, corrected, store

PAPER_EPS = 1e-8  # AdamW's default, as in the released code; a beta of 7e-8 feels it: gradients are no larger
STEERED_EPS = 1e-16  # steering finds beta at any scale of the loss, so no gradient may drown in eps


class Router:
    """The logits with all that training them has to remember. T rows, one parameter each; some are pinned.

    learned:  the rows that learn; the others compute everything, and row 0 is always one of them
    round:    how many rounds (trajectories, sweeps) are done
    lambdas:  float64[T]     weights of the rows' errors
    velocity: float64[T, N]  how fast each logit moves, a round, for steering; `previous` are its last logits
    """

    def __init__(
        self,
        num_calls: int,
        num_branches: int,
        settings: RouterSettings,
        seed: int,
        learned: Sequence[int],
        first: NDArray[np.float32] | None = None,
    ) -> None:
        """`first`: logits [T, N] to start from, such as those of another schedule; None: as the settings say."""
        rng = np.random.default_rng(seed)
        drawn = rng.standard_normal((num_calls, num_branches)) if settings.init == "normal" else settings.init
        logits = np.asarray(drawn if first is None else first, np.float32)
        table = np.broadcast_to(logits, (num_calls, num_branches)).copy()
        pinned = np.setdiff1d(np.arange(num_calls), learned)
        table[pinned] = settings.clamp
        self.settings, self.learned = settings, list(learned)
        self.rows = nn.ParameterList([nn.Parameter(torch.from_numpy(row)) for row in table])
        for row in pinned:
            self.rows[row].requires_grad_(False)
        eps = PAPER_EPS if settings.beta is not None else STEERED_EPS
        trained = [self.rows[row] for row in self.learned]
        self.optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=0.0, eps=eps)
        self.round = 0
        self.beta = settings.beta or 0.0
        self.lambdas = np.zeros(num_calls)
        self.velocity = np.zeros((num_calls, num_branches))
        self.previous = self.logits().astype(np.float64)

    def update(self, call: int, error: Tensor, ranks: Ranks) -> NDArray[np.float64]:
        """One optimiser step of row `call` on error + beta sum r: one gradient by autograd, the penalty's by hand.

        Returns -d error / dr, float64[N]: how much each branch is needed.
        """
        theta = self.rows[call]
        r = torch.sigmoid(theta.detach()).numpy().astype(np.float64)
        self.optimizer.zero_grad(set_to_none=True)
        error.backward()
        assert theta.grad is not None
        slope = torch.from_numpy(r * (1 - r)).to(theta.dtype)  # dr/dtheta
        gradient = ranks.mean(theta.grad)
        theta.grad = gradient + self.beta * slope
        self.optimizer.step()
        with torch.no_grad():
            theta.clamp_(-self.settings.clamp, self.settings.clamp)
        return -(gradient / slope).double().numpy()

    def logits(self) -> NDArray[np.float32]:
        """float32[T, N]."""
        return np.stack([row.detach().numpy() for row in self.rows])

    def scores(self) -> NDArray[np.float64]:
        """r = sigmoid(theta), float64[T, N]."""
        return np.asarray(1.0 / (1.0 + np.exp(-self.logits().astype(np.float64))))

    def hard(self) -> NDArray[np.bool_]:
        """bool[T, N], computed where r > tau: the schedule that is deployed."""
        compute = self.scores() > self.settings.threshold
        compute[np.setdiff1d(np.arange(len(compute)), self.learned)] = True
        return np.asarray(compute)

    def progress(self, loss: float, mse: float, score_db: float | None) -> Progress:
        """The figures of the round that was done last, from the router as it stands."""
        scores = self.scores()
        return Progress(
            round=self.round,
            loss=loss,
            mse=mse,
            beta=self.beta,
            expected_cur=float((1 - scores[self.learned]).sum() / scores.size),
            hard_cur=float(1 - self.hard().mean()),
            unpolarised=float(((scores > 0.1) & (scores < 0.9)).mean()),
            score_db=score_db,
        )

    def found(self) -> Found:
        """The hard schedule, with its logits."""
        return Found(self.hard(), {"final_beta": self.beta}, self.logits())

    def state(self) -> dict[str, Any]:
        """All of it, for torch.save; load with `weights_only=True`."""
        return {
            "rows": self.rows.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "round": self.round,
            "beta": self.beta,
            "lambdas": torch.from_numpy(self.lambdas),
            "velocity": torch.from_numpy(self.velocity),
            "previous": torch.from_numpy(self.previous),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()`."""
        self.rows.load_state_dict(state["rows"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.round, self.beta = state["round"], state["beta"]
        self.lambdas = state["lambdas"].numpy().copy()
        self.velocity, self.previous = state["velocity"].numpy().copy(), state["previous"].numpy().copy()


def soft_route(
    scores: Tensor,
    keep: NDArray[np.bool_],
    slots: Slots,
    terms: Mapping[int, Terms] = NOTHING,
    older: Older | None = None,
    depth: int = 1,
) -> Route:
    """The training mix of one call. scores: r, [N], with gradient; keep: bool[N], where the slot takes the mixture.

    terms: of the branches whose slot is corrected; older: filled `depth` deep where it is given
    """

    def route(branch: int, evaluate: Callable[[], Tensor]) -> Tensor:
        v = slots[branch]
        if branch in terms:
            v = corrected(v, older.get(branch, ()) if older is not None else (), terms[branch])
        mixed = torch.lerp(v, evaluate(), scores[branch])
        if keep[branch]:
            store(slots, branch, mixed.detach(), older, depth)
        return mixed

    return route
