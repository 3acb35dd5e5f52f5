"""Properties of every solver's table, held against the diffusers scheduler it was made from."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    PNDMScheduler,
)

from hcompress.errors import SolverError
from hcompress.sampling import solver_output
from hcompress.solver import SOLVERS, TOLERANCE, make_scheduler, probe, solver_identity, verify
from hcompress_runtime.table import SolverTable

# torch 2.13's Tensor.__array__ and __array_wrap__ predate NumPy 2; diffusers calls np.array(tensor) and np.log(tensor).
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",
    "ignore:__array_wrap__ must accept context and return_scalar:DeprecationWarning",
)

FIELDS = ("timesteps", "start", "outputs", "noises", "learned")
TOO_FEW_STEPS = {("pndm", 2)}  # PNDM's Runge-Kutta start needs 4 steps
CASES = [(name, steps) for name in SOLVERS for steps in (2, 5, 20) if (name, steps) not in TOO_FEW_STEPS]
VARIANCE_PRESERVING = [name for name in SOLVERS if name not in ("edm-euler", "flow-euler")]


@pytest.mark.parametrize(("name", "steps"), CASES)
def test_table_gives_the_trajectory_that_the_scheduler_gives(name: str, steps: int) -> None:
    scheduler = make_scheduler(name, {})
    table = _table(name, steps)

    # As any diffusers pipeline does it, with a network that is not linear. In float64, because in float32 it is the
    # scheduler that is off: by 2e-5 for Heun at 2 steps, which divides by its last sigma, 0.03, what it had times 25.
    scheduler.set_timesteps(steps)
    torch.manual_seed(0)
    shape = (2, 3, 4, 4)
    start = torch.randn(shape, dtype=torch.float64)
    x = start * getattr(scheduler, "init_noise_sigma", 1.0)
    inputs, outputs, variances = [], [], []
    for t in scheduler.timesteps:
        inputs.append(scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x)
        outputs.append(torch.sin(3 * inputs[-1] + 0.01 * t).roll(1, dims=-1))
        variances.append(torch.cos(5 * inputs[-1]))
        raw = outputs[-1] if table.learned is None else torch.cat([outputs[-1], variances[-1]], dim=1)
        x = scheduler.step(raw, t, x).prev_sample

    torch.manual_seed(0)
    drawn = torch.float32 if name == "dpm++-sde" else torch.float64
    assert torch.equal(torch.randn(shape, dtype=torch.float64), start)
    noises = [torch.randn(shape, dtype=drawn).double() for _ in range(table.num_noises)]
    assert table.timesteps.tolist() == [float(t) for t in scheduler.timesteps]
    if table.learned is not None:
        constants = [dict(zip(("noise_gain", "noise_slope"), row, strict=True)) for row in torch.tensor(table.learned)]
        raw = [torch.cat(pair, dim=1) for pair in zip(outputs, variances, strict=True)]
        outputs = [
            solver_output(raw[call], constants[call], table.noise_of(call, noises), 3) for call in range(len(raw))
        ]
    for call, want in enumerate([*inputs, x]):
        got = table.combine(call, start, outputs, noises)
        # 1e-5: some 20 steps of those schedulers that round to float32 (eps 6e-8) whatever they are given.
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("name", SOLVERS)
def test_every_output_moves_the_next_input_and_nothing_earlier(name: str) -> None:
    table = _table(name, 5)
    assert not np.triu(table.outputs).any()
    moves = np.diag(table.outputs, -1)
    # PNDM without set_alpha_to_one goes from t = 0 to t = 0 in its last step: that call is for nothing.
    assert moves[:-1].all() and bool(moves[-1]) == (name != "pndm")


@pytest.mark.parametrize("name", SOLVERS)
def test_noises_are_those_of_the_stochastic_solvers_and_come_after_their_call(name: str) -> None:
    table = _table(name, 5)
    assert table.num_noises == {
        "ddpm": 4,
        "iddpm": 4,
        "iddpm-respaced": 4,
        "lcm": 4,
        "dpm++-sde": 5,
        "sa": 5,
        "euler-a": 5,
    }.get(name, 0)
    assert not np.triu(table.noises).any()
    if table.learned is not None:  # noises are in the outputs, of every call but the last
        assert not table.noises.any()
        assert np.flatnonzero(table.learned.all(axis=1)).tolist() == [*range(table.num_noises)]
    elif table.num_noises:
        assert np.diag(table.noises, -1).any()


@pytest.mark.parametrize("steps", [5, 20, 250])
def test_respaced_ddim_is_that_of_the_closed_form_on_evenly_spread_levels(steps: int) -> None:
    """From timestep 999 to 0 and on to no noise, as the released code of DiT has it."""
    table = probe(make_scheduler("ddim-respaced", {"beta_schedule": "linear"}), steps)
    timesteps = [round(k * 999 / (steps - 1)) for k in reversed(range(steps))]
    kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[timesteps]
    rows = [np.eye(1 + steps)[0]]
    for call, (now, then) in enumerate(zip(kept, [*kept[1:], 1.0], strict=True)):
        denoised = (rows[-1] - np.sqrt(1 - now) * np.eye(1 + steps)[1 + call]) / np.sqrt(now)
        rows.append(np.sqrt(then) * denoised + np.sqrt(1 - then) * np.eye(1 + steps)[1 + call])
    assert table.timesteps.tolist() == timesteps
    got = np.concatenate([table.start[:, None], table.outputs], axis=1)
    # 1e-5: diffusers holds its noise levels in float32 (eps 6e-8), and the first of 1 000 is 4e-5 from no signal.
    assert np.abs(got - np.array(rows)).max() <= 1e-5 * np.abs(rows).max()


@pytest.mark.parametrize("name", ["ddim-respaced", "iddpm-respaced"])
def test_respacing_needs_no_more_steps_than_timesteps(name: str) -> None:
    with pytest.raises(SolverError, match=r"1001 steps: .*1000"):
        probe(make_scheduler(name, {}), 1001)


@pytest.mark.parametrize("name", SOLVERS)
def test_probing_twice_gives_the_same_table_and_leaves_the_scheduler_alone(name: str) -> None:
    scheduler = make_scheduler(name, {})
    scheduler.set_timesteps(7)
    config, state = dict(scheduler.config), _state(scheduler)
    first = _table(name, 5)
    with torch.device("meta"):  # a default device, which here would lose every number, is not followed
        second = probe(scheduler, 5)
    for field in FIELDS:
        assert np.array_equal(getattr(first, field), getattr(second, field))
    assert dict(scheduler.config) == config
    assert _state(scheduler) == state


@pytest.mark.parametrize("name", SOLVERS)
def test_verify_notices_a_wrong_coefficient_and_other_steps(name: str) -> None:
    scheduler = make_scheduler(name, {})
    table = _table(name, 5)
    assert verify(table, scheduler, 5, seed=1) <= TOLERANCE
    assert verify(table, scheduler, 6) == float("inf")
    for field in FIELDS[1:]:
        arrays = {key: getattr(table, key).copy() for key in FIELDS if getattr(table, key) is not None}
        if field in arrays and arrays[field].size and not (field == "noises" and "learned" in arrays):
            row = 0 if field == "learned" else -1
            arrays[field][(row, 0)[: arrays[field].ndim]] += 0.01 * np.abs(arrays["outputs"][-1]).max()
            assert verify(SolverTable(**arrays), scheduler, 5, seed=1) > 100 * TOLERANCE


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(clip_sample=False, prediction_type="v_prediction", rescale_betas_zero_snr=True),
        DDIMScheduler(clip_sample=False, prediction_type="sample", timestep_spacing="trailing"),
        DPMSolverMultistepScheduler(use_karras_sigmas=True),
        DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        DPMSolverMultistepScheduler(variance_type="learned_range"),  # only drops the variance channels
        PNDMScheduler(skip_prk_steps=True),
        CMStochasticIterativeScheduler(clip_denoised=False),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_settings_and_classes_outside_the_named_solvers_have_tables_too(scheduler: Any) -> None:
    assert verify(probe(scheduler, 6), scheduler, 6, seed=1) <= TOLERANCE


@pytest.mark.parametrize(
    ("scheduler", "setting"),
    [
        (DDIMScheduler(), "set clip_sample=False"),
        (DDPMScheduler(), "set clip_sample=False"),
        (LCMScheduler(clip_sample=True), "set clip_sample=False"),
        (CMStochasticIterativeScheduler(), "set clip_denoised=False"),
        (DDIMScheduler(clip_sample=False, thresholding=True), "set thresholding=False"),
        (DPMSolverMultistepScheduler(thresholding=True), "set thresholding=False"),
        (DDPMScheduler(clip_sample=False, variance_type="learned"), "set variance_type='learned_range'"),
        (
            DDIMScheduler(clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing"),
            "change prediction_type",
        ),
    ],
)
def test_what_has_no_table_is_refused_by_name_with_the_setting_to_change(scheduler: Any, setting: str) -> None:
    with pytest.raises(SolverError, match=f"^{type(scheduler).__name__} .*{setting}"):
        probe(scheduler, 5)


class Squared(DDIMScheduler):
    """A solver that no setting gives away."""

    def step(self, model_output: torch.Tensor, timestep: int, sample: torch.Tensor, **options: Any) -> Any:
        return super().step(model_output * model_output.abs(), timestep, sample, **options)


def test_a_solver_that_is_not_affine_for_an_unnamed_reason_is_refused_by_its_numbers() -> None:
    with pytest.raises(SolverError, match="Squared is not affine"):
        probe(Squared(clip_sample=False), 5)


@pytest.mark.parametrize(
    ("name", "steps"), [(name, 0) for name in SOLVERS] + [("ddim", -1), ("lcm", 51), *TOO_FEW_STEPS]
)
def test_a_number_of_steps_that_cannot_be_made_is_refused_with_the_reason(name: str, steps: int) -> None:
    with pytest.raises(SolverError, match=f"^{SOLVERS[name][0]}(Respaced)? cannot make {steps} steps[:;] .+$"):
        probe(make_scheduler(name, {}), steps)


class Broken(DDIMScheduler):
    """A solver whose own error has two lines."""

    def step(self, *arguments: Any, **options: Any) -> Any:
        raise ValueError("not like\n this")


def test_a_solver_that_fails_in_the_middle_is_refused_in_one_line() -> None:
    with pytest.raises(SolverError, match=r"^Broken cannot run its 5 calls: not like this$"):
        probe(Broken(clip_sample=False), 5)


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
@pytest.mark.parametrize("source", ["ddim", "dpm++-sde", "sa", "unipc", "deis", "euler"])  # each with words of its own
def test_a_solver_takes_any_models_betas_and_says_nothing(
    source: str, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    own = {"beta_start": 0.001, "beta_end": 0.015, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
    model = make_scheduler(source, own)
    scheduler = make_scheduler(name, {"_diffusers_version": "0.1.0", "unknown": 1, **model.config})
    scheduler.set_timesteps(5)
    assert torch.equal(scheduler.betas, model.betas)
    assert scheduler.config.prediction_type == "v_prediction"
    if SOLVERS[name][0] != "DPMSolverSinglestepScheduler":  # which knows one spacing only
        assert scheduler.config.timestep_spacing == model.config.timestep_spacing
    assert capfd.readouterr() == ("", "")


def test_clipping_stays_as_the_model_has_it() -> None:
    assert make_scheduler("ddpm", DDIMScheduler().config).config.clip_sample is True
    assert make_scheduler("ddpm", DDIMScheduler(clip_sample=False).config).config.clip_sample is False
    assert make_scheduler("ddim", DPMSolverMultistepScheduler().config).config.clip_sample is False


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("dpm+", {}, r"did you mean 'dpm\+\+'\?.*euler"),
        ("zzz", {}, "no solver 'zzz'; Choose from: ddim, "),
        ("edm-euler", DDIMScheduler().config, "EDM models, but this one is variance-preserving; choose from: ddim, "),
        ("ddim", {"shift": 3.0}, "this one is flow-matching; choose from: flow-euler$"),
        ("heun", {"rescale_betas_zero_snr": True}, "HeunDiscreteScheduler has no rescale_betas_zero_snr"),
        ("euler", {"beta_schedule": "sigmoid"}, "EulerDiscreteScheduler does not take this model's config: sigmoid"),
    ],
)
def test_a_solver_that_does_not_suit_the_model_is_refused(name: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(SolverError, match=message):
        make_scheduler(name, config)


@pytest.mark.parametrize("name", SOLVERS)
def test_identity_follows_the_settings_and_nothing_else(name: str) -> None:
    scheduler = make_scheduler(name, {})
    own = solver_identity(scheduler, 20)
    assert own["class"].removesuffix("Respaced") == SOLVERS[name][0] and own["steps"] == 20
    shuffled = dict(reversed(scheduler.config.items()))
    scheduler.set_timesteps(5)
    assert solver_identity(scheduler, 20) == solver_identity(make_scheduler(name, shuffled), 20) == own
    changed = {"beta_end": 0.0201} if "beta_end" in scheduler.config else {"num_train_timesteps": 999}
    assert solver_identity(make_scheduler(name, changed), 20)["config_hash"] != own["config_hash"]
    assert solver_identity(scheduler, 19) == {**own, "steps": 19}


def test_identity_takes_betas_as_an_array_or_a_list_and_no_code() -> None:
    betas = np.linspace(1e-4, 0.02, 1000)
    array, plain = (solver_identity(DDIMScheduler(trained_betas=b), 5) for b in (betas, betas.tolist()))
    assert array == plain != solver_identity(DDIMScheduler(trained_betas=betas * 1.1), 5)
    with pytest.raises(SolverError, match="SASolverScheduler has a setting of type function"):
        solver_identity(make_scheduler("sa", {"tau_func": lambda t: 1}), 5)


def test_identity_is_the_same_in_another_process_and_importing_loads_no_torch() -> None:
    lines = [
        "import sys, hcompress.solver as s",
        "assert not {'torch', 'diffusers'} & set(sys.modules)",
        "print(s.solver_identity(s.make_scheduler('ddim', {}), 5)['config_hash'])",
    ]
    other = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == solver_identity(make_scheduler("ddim", {}), 5)["config_hash"]


@cache
def _table(name: str, steps: int) -> SolverTable:
    return probe(make_scheduler(name, {}), steps)


def _state(scheduler: Any) -> str:
    """Every attribute of a scheduler, printed to the last digit."""
    with np.printoptions(threshold=sys.maxsize, floatmode="unique"):
        state = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in sorted(vars(scheduler).items())}
        return repr(state)
