"""The forward process: how the training of a model noised its images, and what its output means.

    x = alpha x0 + sigma noise        variance preserving (Ho et al. 2020, eq. 4), or flow matching (alpha = 1 - sigma)

`at` gives it at each call of a solver, so that images can be put where a generation would be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hcompress.errors import SolverError
from hcompress.solver import kind_of, make_scheduler

FLOW = "flow"
PREDICTIONS = ("epsilon", "sample", "v_prediction", FLOW)


@dataclass(frozen=True)
class Process:
    """The forward process at T calls.

    alpha, sigma: float64[T]
    prediction:   what the model gives, one of PREDICTIONS; of flow matching noise - x0
    """

    alpha: NDArray[np.float64]
    sigma: NDArray[np.float64]
    prediction: str

    def noised(self, call: int, x0: Any, noise: Any) -> Any:
        """x at `call`."""
        return x0 * float(self.alpha[call]) + noise * float(self.sigma[call])

    def target(self, call: int, x0: Any, noise: Any) -> Any:
        """What the model is trained to give at `call`."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return x0
        if self.prediction == "v_prediction":
            return noise * float(self.alpha[call]) - x0 * float(self.sigma[call])
        return noise - x0

    def estimates(self, call: int, x: Any, output: Any) -> tuple[Any, Any]:
        """x0 and the noise that the model's output at `call` stands for."""
        alpha, sigma = float(self.alpha[call]), float(self.sigma[call])
        if self.prediction == "epsilon":
            return (x - output * sigma) / alpha, output
        if self.prediction == "sample":
            return output, (x - output * alpha) / sigma
        if self.prediction == "v_prediction":  # Salimans and Ho 2022, section 4
            return x * alpha - output * sigma, x * sigma + output * alpha
        return x - output * sigma, x + output * alpha

    def next(self, call: int, x: Any, output: Any) -> Any:
        """x at `call` + 1 by one deterministic step of first order: DDIM (Song et al. 2021, eq. 12, eta = 0)."""
        return self.noised(call + 1, *self.estimates(call, x, output))


def at(config: Mapping[str, Any], timesteps: NDArray[np.float64]) -> Process:
    """The forward process of a model with this scheduler config at `timesteps`, float64[T].

    Raises SolverError for models of other kinds (EDM) and predictions.
    """
    kind = kind_of(config)
    if kind == "flow-matching":
        sigma = timesteps / float(config.get("num_train_timesteps", 1000))
        return Process(1 - sigma, sigma, FLOW)
    prediction = str(config.get("prediction_type", "epsilon"))
    if kind not in (None, "variance-preserving") or prediction not in PREDICTIONS:
        raise SolverError(
            f"the forward process of a {kind} model that predicts {prediction} is not known here; "
            f"it should be variance-preserving or flow-matching and predict {', '.join(PREDICTIONS[:3])}"
        )
    products = make_scheduler("ddpm", config).alphas_cumprod.double().numpy()
    signal = np.interp(timesteps, np.arange(len(products)), products)
    return Process(np.sqrt(signal), np.sqrt(1 - signal), prediction)
