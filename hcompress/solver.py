"""Any affine diffusers scheduler as a table, made by running it once on basis vectors.

A scheduler that neither clips nor thresholds is a linear map: feed it a different unit vector as start noise, as each
model output and as each noise it draws, and what comes out in every coordinate is the coefficient of that vector. So
one run on a batch of directions fills a whole `SolverTable`, without knowing what kind of solver it was. A second run
on random numbers then shows whether the scheduler was linear after all; one that was not is refused.

What counts is a scheduler's *config*: it is rebuilt from that for each run, so the caller's object is never touched,
and attributes set on it afterwards (`set_shift`, `set_begin_index`) are not seen. Random draws are those that `step`
makes with its default arguments; DDIM's are therefore none (eta = 0).
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import inspect
import json
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hcompress.errors import SolverError
from hcompress_runtime.table import SolverTable

Scheduler: TypeAlias = Any  # a diffusers scheduler; diffusers ships no types, and importing it would load torch

# Command-line name: (class in diffusers, the settings that make it this solver whatever the model's config says).
SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),  # Song et al. 2021, eq. 12, eta = 0
    "ddim-respaced": ("DDIMScheduler", {"respaced": True}),  # the same as DiT's own code has it, see `_respaced`
    "ddpm": ("DDPMScheduler", {}),  # Ho et al. 2020, algorithm 2
    "iddpm": ("DDPMScheduler", {"variance_type": "learned_range"}),  # Nichol and Dhariwal 2021, eq. 15
    "iddpm-respaced": ("DDPMScheduler", {"variance_type": "learned_range", "respaced": True}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),  # Lu et al. 2022, 2M
    "dpm++-singlestep": (  # Lu et al. 2022, 2S; an odd number of steps and a last sigma of 0 need lower_order_final
        "DPMSolverSinglestepScheduler",
        {"algorithm_type": "dpmsolver++", "lower_order_final": True},
    ),
    "dpmsolver": (  # Lu et al. 2022a, DPM-Solver-2 fast: noise prediction, which has no last sigma of 0
        "DPMSolverSinglestepScheduler",
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "lower_order_final": True},
    ),
    "dpm++-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "sa": ("SASolverScheduler", {"algorithm_type": "data_prediction"}),  # Xue et al. 2023
    "unipc": ("UniPCMultistepScheduler", {}),  # Zhao et al. 2023
    "deis": ("DEISMultistepScheduler", {"algorithm_type": "deis"}),  # Zhang and Chen 2023
    "euler": ("EulerDiscreteScheduler", {}),  # Karras et al. 2022, algorithm 2 without churn
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),  # Karras et al. 2022, algorithm 1; 2 T - 1 calls
    "kdpm2": ("KDPM2DiscreteScheduler", {}),  # Karras et al. 2022, DPM2; 2 T - 1 calls
    "pndm": ("PNDMScheduler", {}),  # Liu et al. 2022
    "lms": ("LMSDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),  # Luo et al. 2023
    "edm-euler": ("EDMEulerScheduler", {}),  # Karras et al. 2022, algorithm 2 with EDM's preconditioning
    "flow-euler": ("FlowMatchEulerDiscreteScheduler", {}),  # Lipman et al. 2023; Esser et al. 2024
}

# The Euler and DPM-Solver families and flow matching compute in float32 (eps 6e-8) whatever they are given. All of
# SOLVERS stay below 4e-7 at 20 steps and 3e-6 at 999; clipping and thresholding are off by 1 and more.
TOLERANCE = 1e-5

_NOT_AFFINE = {
    "clip_sample": "clips its x0 prediction",
    "clip_denoised": "clips its x0 prediction",
    "thresholding": "thresholds its x0 prediction",
}

# What a model was trained as, by a setting that only the schedulers of that kind have.
_KINDS = {"beta_schedule": "variance-preserving", "sigma_data": "EDM", "shift": "flow-matching"}


def make_scheduler(name: str, config: Mapping[str, Any]) -> Scheduler:
    """The solver `name` of SOLVERS on the noise schedule, prediction type and spacing of a model's scheduler config.

    config: the model's own, as from `scheduler.config` or scheduler_config.json. Keys that the solver has no use for
    are left out; all others are kept as they are, also those that were only defaults of the model's own class. One key
    is ours, as it is no setting of diffusers but an argument of some pipelines: with `even_sigmas` the sigmas of T
    steps are 1, 1 - 1 / T, ..., 1 / T before the shift.

    Clipping is kept where the config has it, so `probe` refuses DDIM for a model whose own DDIM clips. Where the config
    has no `clip_sample`, because its class does not know it, DDIM and DDPM get False: their default of True would be
    a change that nobody asked for.

    Raises SolverError for an unknown name, for a model of another kind (variance preserving, EDM, flow matching), and
    for a noise schedule that the solver cannot follow.
    """
    import diffusers

    if name not in SOLVERS:
        close = difflib.get_close_matches(name, SOLVERS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise SolverError(f"there is no solver {name!r}; {hint}Choose from: {', '.join(SOLVERS)}")
    classes = {other: getattr(diffusers, class_name) for other, (class_name, _) in SOLVERS.items()}
    accepted = _accepted(classes[name])
    kind = kind_of(config)
    if kind not in (None, kind_of(accepted)):
        fitting = ", ".join(other for other in SOLVERS if kind_of(_accepted(classes[other])) == kind)
        raise SolverError(f"{name!r} is for {kind_of(accepted)} models, but this one is {kind}; choose from: {fitting}")
    class_name, settings = SOLVERS[name]
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in accepted:
        raise SolverError(f"{name!r} cannot follow this model's schedule: {class_name} has no rescale_betas_zero_snr")
    wanted = {"clip_sample": False, **config, **settings}
    scheduler_class = classes[name]
    if config.get("even_sigmas"):
        scheduler_class = _with_even_sigmas(scheduler_class)
    elif settings.get("respaced"):
        scheduler_class = _respaced(scheduler_class)
    with _one_line(f"{class_name} does not take this model's config"):
        return scheduler_class.from_config({key: value for key, value in wanted.items() if key in accepted})


def probe(scheduler: Scheduler, steps: int) -> SolverTable:
    """The table of any affine diffusers scheduler at `steps` steps, checked against the scheduler itself.

    Row k is what the model is given at call k (`init_noise_sigma` and `scale_model_input` included), the last row the
    finished sample. Draws whose weight is 0 everywhere are kept, so that the m-th column is the m-th draw.

    Raises SolverError, by name and with the setting to change, for a scheduler that is not affine, and for one that
    cannot make this number of steps.
    """
    name = type(scheduler).__name__
    settings = _settings(scheduler)
    for key, what in _NOT_AFFINE.items():
        if settings.get(key):
            raise SolverError(f"{name} {what}, which is not affine; set {key}=False")
    if _variance(scheduler) == "learned":
        raise SolverError(
            f"{name} scales its noise by the model's own output in no known way; set variance_type='learned_range'"
        )
    table = _basis_run(scheduler, steps, variance=-1.0)
    if _variance(scheduler) == "learned_range":
        table = _with_learned_noise(table, _basis_run(scheduler, steps, variance=1.0))
    error = verify(table, scheduler, steps)
    if not error <= TOLERANCE:
        raise SolverError(
            f"{name} is not affine in its model outputs and noises at {steps} steps: a table of it is off by "
            f"{error:.0e}, {TOLERANCE:.0e} is allowed; choose from: {', '.join(SOLVERS)}"
        )
    return table


def verify(table: SolverTable, scheduler: Scheduler, steps: int, seed: int = 0) -> float:
    """The largest relative error of `table` over a random trajectory of `scheduler`; inf if their timesteps differ.

    Relative to the largest number of each row, so that a row is judged by its own scale.
    """
    import torch

    fresh = _with_timesteps(scheduler, steps)
    if not np.array_equal(table.timesteps, [float(t) for t in fresh.timesteps]):
        return float("inf")
    shape = (2, 3, 4, 4)
    random = np.random.default_rng(seed)
    start = random.standard_normal(shape)
    outputs = random.standard_normal((table.num_calls, *shape))
    noises = random.standard_normal((table.num_noises, *shape))
    variances = random.uniform(-1, 1, (table.num_calls, *shape))
    raw = outputs if table.learned is None else np.concatenate([outputs, variances], axis=2)
    want, _ = _run(fresh, *map(torch.from_numpy, (start, raw, noises)))
    if table.learned is not None:
        gain, slope = table.learned[: len(noises)].T.reshape(2, -1, 1, 1, 1, 1)
        outputs[: len(noises)] += gain * noises * np.exp(slope * (1 + variances[: len(noises)]))
    got = np.multiply.outer(table.start, start)
    got += np.tensordot(table.outputs, outputs, 1) + np.tensordot(table.noises, noises, 1)
    row = tuple(range(1, want.ndim))
    return float(np.max(np.abs(got - want).max(row) / np.abs(want).max(row)))


def solver_identity(scheduler: Scheduler, steps: int) -> dict[str, str | int]:
    """What a schedule is bound to: class, steps, and the SHA-256 of all settings that the class reads.

    Equal for equal settings in any order and any process; defaults count as settings.
    Raises SolverError for a setting that is code (SA-Solver's `tau_func`), which has no value to compare.
    """
    name = type(scheduler).__name__

    def plain(value: Any) -> Any:
        if hasattr(value, "tolist"):  # betas as an array or tensor
            return value.tolist()
        raise SolverError(f"{name} has a setting of type {type(value).__name__}, which has no identity; use plain data")

    text = json.dumps(_settings(scheduler), sort_keys=True, default=plain)
    return {"class": name, "steps": steps, "config_hash": hashlib.sha256(text.encode()).hexdigest()}


def kind_of(keys: Collection[str]) -> str | None:
    """What a model was trained as, or a solver is made for, by the names of its settings; None if they do not tell."""
    return next((kind for key, kind in _KINDS.items() if key in keys), None)


@cache
def _with_even_sigmas(scheduler_class: Any) -> Any:
    """`scheduler_class` under a name of its own, which is told its sigmas as `FluxPipeline` tells it."""

    def set_timesteps(self: Scheduler, steps: int) -> None:
        scheduler_class.set_timesteps(self, sigmas=np.linspace(1, 1 / steps, steps))

    return type(f"{scheduler_class.__name__}EvenSigmas", (scheduler_class,), {"set_timesteps": set_timesteps})


@cache
def _respaced(scheduler_class: Any) -> Any:
    """`scheduler_class` on a noise schedule of T levels, those of timesteps round(k (N - 1) / (T - 1)) among N.

    Nichol and Dhariwal 2021, section 4; the code of ADM, DiT and HarmoniCa samples so. Unlike any spacing of diffusers
    it begins at the last timestep, ends at 0 and steps from each level to the next, the last time to no noise.
    """
    import torch

    def set_timesteps(self: Scheduler, steps: int, device: Any = None) -> None:
        if steps > self.config.num_train_timesteps:
            raise ValueError(f"the model was trained on {self.config.num_train_timesteps} timesteps")
        kept = np.round(np.linspace(0, self.config.num_train_timesteps - 1, steps)).astype(np.int64)
        alphas = self.alphas_cumprod.double().numpy()[kept]
        betas = 1 - alphas / np.concatenate([[1.0], alphas[:-1]])
        own = {"trained_betas": betas, "num_train_timesteps": steps, "timestep_spacing": "leading", "steps_offset": 0}
        wanted = {**_settings(self), **own, "set_alpha_to_one": True}
        self.few = scheduler_class.from_config({key: wanted[key] for key in _accepted(scheduler_class) & wanted.keys()})
        self.few.set_timesteps(steps)
        self.level_of = {int(timestep): level for level, timestep in enumerate(kept)}
        self.num_inference_steps, self.timesteps = steps, torch.from_numpy(kept[::-1].copy()).to(device)

    def step(self: Scheduler, output: Any, timestep: Any, sample: Any, **options: Any) -> Any:
        return self.few.step(output, self.level_of[int(timestep)], sample, **options)

    members = {"set_timesteps": set_timesteps, "step": step}
    return type(f"{scheduler_class.__name__}Respaced", (scheduler_class,), members)


def _accepted(scheduler_class: Any) -> Collection[str]:
    """The names of the settings that a scheduler class reads."""
    return inspect.signature(scheduler_class.__init__).parameters


def _settings(scheduler: Scheduler) -> dict[str, Any]:
    """The part of a scheduler's config that its class reads: no private keys, none kept for other classes."""
    accepted = _accepted(type(scheduler))
    return {key: value for key, value in scheduler.config.items() if key in accepted}


def _variance(scheduler: Scheduler) -> str | None:
    """What scales the noise, as DDPM's family calls it.

    DPM-Solver has the same setting but only drops the variance channels; DDPM's family copies it to an attribute.
    """
    return vars(scheduler).get("variance_type")


def _basis_run(scheduler: Scheduler, steps: int, variance: float) -> SolverTable:
    """The table of one run on basis vectors, in which a model that guesses its variance always says `variance`."""
    import torch

    fresh = _with_timesteps(scheduler, steps)
    timesteps = np.array([float(t) for t in fresh.timesteps])
    calls = len(timesteps)
    # The batch axis runs over directions: x_T, each model output, and one noise a call, the most that any step draws.
    directions = torch.eye(1 + 2 * calls, dtype=torch.float64, device="cpu").reshape(1 + 2 * calls, -1, 1, 1, 1)
    outputs = directions[1 : 1 + calls]
    if _variance(scheduler) == "learned_range":
        outputs = torch.cat([outputs, torch.full_like(outputs, variance)], dim=2)
    trajectory, drawn = _run(fresh, directions[0], outputs, directions[1 + calls :])
    rows = trajectory.reshape(calls + 1, -1)
    if not np.isfinite(rows).all():
        raise SolverError(
            f"{type(scheduler).__name__} gives infinite or undefined samples at {steps} steps; "
            "ask for fewer, or change prediction_type, variance_type or rescale_betas_zero_snr"
        )
    return SolverTable(timesteps, rows[:, 0], rows[:, 1 : 1 + calls], rows[:, 1 + calls : 1 + calls + drawn])


def _with_learned_noise(least: SolverTable, most: SolverTable) -> SolverTable:
    """The table that puts each noise into the output of its call, from those of the least and the largest variance.

    What a call's noise moves, its output moves too, in a fixed proportion: DDPM looks at nothing but the last step.
    """
    calls, drawn = np.arange(least.num_noises), least.num_noises
    learned = np.zeros((least.num_calls, 2))
    at = (calls + 1, calls)
    learned[:drawn, 0] = least.noises[at] / least.outputs[at]
    learned[:drawn, 1] = np.log(most.noises[at] / least.noises[at]) / 2
    return replace(least, noises=np.zeros_like(least.noises), learned=learned)


def _with_timesteps(scheduler: Scheduler, steps: int) -> Scheduler:
    """An unused scheduler of the same settings, on the CPU, ready for `steps` steps."""
    import torch

    name = type(scheduler).__name__
    if steps < 1:
        raise SolverError(f"{name} cannot make {steps} steps; ask for 1 or more")
    with _one_line(f"{name} cannot make {steps} steps"), torch.device("cpu"):
        fresh = type(scheduler).from_config(copy.deepcopy(_settings(scheduler)))
        fresh.set_timesteps(steps)
    return fresh


def _run(scheduler: Scheduler, start: Any, outputs: Any, noises: Any) -> tuple[NDArray[np.float64], int]:
    """The trajectory of a scheduler that is ready to step, and how many noises it drew. Uses the scheduler up.

    start: Tensor[*shape], outputs: Tensor[T, *shape], noises: Tensor[M or more, *shape], all float64.
    Returns float64[T + 1, *shape] and M.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class Replay(TorchFunctionMode):
        """Gives the next of `noises` for every normal draw, wherever in diffusers it is made, in this thread only."""

        drawn = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func not in (torch.randn, torch.randn_like):
                return func(*args, **kwargs)
            self.drawn += 1
            return noises[self.drawn - 1].to(kwargs.get("dtype") or noises.dtype)

    rows = []
    x = start * float(getattr(scheduler, "init_noise_sigma", 1.0))  # flow matching has none
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)  # nor this
    name, calls = type(scheduler).__name__, len(scheduler.timesteps)
    with _one_line(f"{name} cannot run its {calls} calls"), torch.device("cpu"), Replay() as replay:
        for t, output in zip(scheduler.timesteps, outputs, strict=True):
            rows.append(scale(x, t))
            x = scheduler.step(output, t, x, return_dict=False)[0]
        return np.stack([row.double().numpy() for row in (*rows, x)]), replay.drawn


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turns whatever diffusers raises for settings it cannot serve (ValueError, IndexError, ...) into a SolverError.

    What it says of `dpmsolver`, that `dpmsolver++` is better, is kept back: it is asked for by name.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*algorithm_types=dpmsolver", FutureWarning)
            yield
    except Exception as error:
        raise SolverError(f"{what}: {' '.join(str(error).split()) or type(error).__name__}") from error
