"""The forward process, held against diffusers' schedulers and against the tables of first-order solvers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from hcompress import process
from hcompress.errors import SolverError
from hcompress.solver import probe

CALLS = 6
FIRST_ORDER = {
    prediction: DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, prediction_type=prediction)
    for prediction in ("epsilon", "v_prediction", "sample")
} | {"flow": FlowMatchEulerDiscreteScheduler(shift=3.0)}


@pytest.mark.parametrize("scheduler", FIRST_ORDER.values(), ids=FIRST_ORDER)
def test_one_step_is_that_of_the_first_order_solver(scheduler):
    """x at call k and the output give x at k + 1: the row of the table less the part that is already in x_k."""
    table = probe(scheduler, CALLS)
    level = process.at(scheduler.config, table.timesteps)
    random = np.random.default_rng(0)
    start, outputs = random.standard_normal(8), random.standard_normal((CALLS, 8))
    for call in range(CALLS - 1):
        x, after = (table.combine(k, start, outputs) for k in (call, call + 1))
        # 1e-5: the tolerance of a table, whose scheduler may round to float32
        np.testing.assert_allclose(level.next(call, x, outputs[call]), after, rtol=0, atol=1e-5 * np.abs(after).max())


def test_noised_images_are_those_of_the_scheduler():
    scheduler = FIRST_ORDER["epsilon"]
    table = probe(scheduler, CALLS)
    level = process.at(scheduler.config, table.timesteps)
    x0, noise = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for call, t in enumerate(table.timesteps):
        want = scheduler.add_noise(x0, noise, torch.tensor([int(t)]))
        torch.testing.assert_close(level.noised(call, x0, noise), want)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow"])
def test_what_the_output_stands_for_is_what_was_mixed(prediction):
    alpha = np.array([0.6])
    level = process.Process(alpha, 1 - alpha if prediction == "flow" else np.sqrt(1 - alpha**2), prediction)
    x0, noise = np.random.default_rng(1).standard_normal((2, 8))
    sigma = level.sigma[0]
    output = {"epsilon": noise, "sample": x0, "v_prediction": alpha[0] * noise - sigma * x0, "flow": noise - x0}[
        prediction
    ]
    np.testing.assert_allclose(level.estimates(0, level.noised(0, x0, noise), output), (x0, noise), atol=1e-12)


@pytest.mark.parametrize(
    "config", [EDMEulerScheduler().config, {"beta_schedule": "linear", "prediction_type": "score"}]
)
def test_a_process_that_is_not_known_is_refused(config):
    with pytest.raises(SolverError, match=r"forward process of a .* is not known here"):
        process.at(config, np.arange(3.0))
