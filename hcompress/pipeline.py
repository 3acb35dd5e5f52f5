"""A schedule inside an unmodified diffusers pipeline.

    pipe = DiTPipeline.from_pretrained(...)
    hcompress.apply_schedule(pipe, "run/schedule.safetensors")
    pipe([207, 360], num_inference_steps=20)      # cached: the pictures of hcompress.sampling
    hcompress.remove_schedule(pipe)               # as it was, to the bit

Two methods are replaced, on the pipeline's own objects. The scheduler is the clock: its `scale_model_input`, called
before each model call, says which of the T calls is next; the first one empties the cache, so whatever an interrupted
generation left behind is never read. The network's `forward` then runs the adapter's under that row. Under fitted
corrections the pipeline's class is one of its own as well, whose call looks at its guidance scale and warns.

`torch.compile(fullgraph=True)` works before or after, as `torch.compile(pipe.transformer)` or
`pipe.transformer.compile()`. The replaced `forward` stays in Python; what is compiled is one function for each distinct
row (equal rows being corrected alike), from the slots that it reuses and their corrections to the slots that it fills.
torch.compile caches per code object, 8 variants each, so each of these functions owns its code: one graph a row,
whatever T, and one more once the batch size varies. Modes that replay CUDA graphs ("reduce-overhead") overwrite the
outputs of earlier calls, slots among them: use another.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Set
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from numpy.typing import NDArray
from torch import Tensor, nn

from hcompress.adapter import Adapter, config_hash, weight_hash
from hcompress.errors import ModelError, ScheduleError
from hcompress.models.dit import DiT
from hcompress.sampling import Older, Slots, Terms, hard_route, store, terms_of
from hcompress.schedule import Identity, Schedule
from hcompress.solver import Scheduler, solver_identity

Pipeline: TypeAlias = Any  # a diffusers DiTPipeline; diffusers ships no types

Known = Mapping[int, Tensor]
Before = Mapping[int, tuple[Tensor, ...]]
Call = Callable[[Tensor, Tensor, Tensor, Known, Before, Mapping[int, Terms]], tuple[Tensor, dict[int, Tensor]]]
"""(x [R, C, H, W], timesteps [R], labels [R], the slots it reuses, what corrections of them look at from the times
before, and these corrections) -> (network output, the slots it fills)."""

_APPLIED = "_hcompress"  # where a pipeline, its network and its scheduler hold the _Cached that they run under


def apply_schedule(pipe: Pipeline, schedule: Schedule | Path | str) -> None:
    """Run a `DiTPipeline` under a schedule, at any guidance and batch size, until `remove_schedule`.

    Replaces a schedule applied before. The weights are compared where the pipeline is float32, as hashes are of float32
    values. With accelerate's offloading, enable that first. The pipeline's call warns at a guidance scale that
    corrections were not fitted at.

    Raises ScheduleError for another model or solver, and from the pipeline's call for another number of steps;
    ModelError for a pipeline of a family without an adapter.
    """
    if not isinstance(schedule, Schedule):
        schedule = Schedule.load(Path(schedule))
    network = _network(pipe)
    if not isinstance(network, DiTTransformer2DModel):
        raise ModelError(
            f"{type(pipe).__name__} runs a {type(network).__name__}; schedules apply to a DiTPipeline, "
            "whose transformer is a DiTTransformer2DModel"
        )
    cached = _Cached(pipe, network, schedule)
    remove_schedule(pipe)
    cached.install()


def remove_schedule(pipe: Pipeline) -> None:
    """Undo `apply_schedule`; nothing happens where none is applied."""
    for holder in (pipe, _network(pipe), pipe.scheduler):  # two pipelines may share the last two
        cached = vars(holder).get(_APPLIED)
        if cached is not None:
            cached.uninstall()


class _Cached:
    """A pipeline under a schedule: what it takes the place of, and the slots of the generation under way.

    next:  the call that the scheduler has announced and the network has not made yet
    done:  the call made last
    slots: what the branches that are reused anywhere in the schedule computed last
    older: what those of them that a correction continues computed before that, as far as any looks
    terms: the corrections of each call
    """

    def __init__(self, pipe: Pipeline, network: DiTTransformer2DModel, schedule: Schedule) -> None:
        self.pipe, self.network, self.schedule = pipe, network, schedule
        self.scheduler: Scheduler = pipe.scheduler
        self.adapter = _adapter(network)
        theirs = schedule.identity
        comparable = theirs.weight_hash and network.dtype == torch.float32
        self.identity = Identity(
            model=network.config.get("_name_or_path") or "this pipeline's transformer",
            config_hash=config_hash(self.adapter.config()),
            weight_hash=weight_hash(network) if comparable else None,
            solver={},
            cfg=None,
        )
        self._check(theirs.solver.get("steps", schedule.num_calls))

        kept = set(np.flatnonzero(~schedule.compute.all(axis=0)).tolist())
        corrections, plain = schedule.corrections, np.zeros_like(schedule.compute)
        changed, depth = (corrections.changes, corrections.depth) if corrections else (plain, plain.astype(int))
        keys = [b"".join(map(bytes, rows)) for rows in zip(schedule.compute, changed, depth, strict=True)]
        functions: dict[bytes, Call] = {}
        for key, row in zip(keys, schedule.compute, strict=True):
            functions.setdefault(key, _call(self.adapter, row, kept, name=f"row_{len(functions)}"))
        self.calls = [functions[key] for key in keys]
        self.depths: list[list[int]] = depth.tolist()  # of each call and branch
        self.deepest: list[int] = depth.max(axis=0).tolist()
        self.next: int | None = None
        self.done = -1
        self.slots: Slots = {}
        self.older: Older = {}
        self.terms: list[dict[int, Terms]] = []

    def install(self) -> None:
        """Take the place of the network's forward and the scheduler's scaling."""
        # A module that accelerate moves between devices has its hook as forward, which calls _old_forward.
        method = "_old_forward" if hasattr(self.network, "_hf_hook") else "forward"
        # `forward` itself stays in Python, functions that it calls would not.
        self.store, self.terms_of = torch.compiler.disable(store), torch.compiler.disable(terms_of)
        self.undo = [
            _replace(self.network, method, torch.compiler.disable(self.forward, recursive=False)),
            _replace(self.scheduler, "scale_model_input", self.scale_model_input),
            *(_replace(owner, _APPLIED, self) for owner in (self.pipe, self.network, self.scheduler)),
        ]
        if self.schedule.reuse == "corrected":
            kind = type(self.pipe)
            self.undo.append(partial(setattr, self.pipe, "__class__", kind))
            self.pipe.__class__ = _warning(kind, self.schedule)

    def uninstall(self) -> None:
        """Put everything back."""
        for undo in self.undo:
            undo()

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """What the scheduler does here, and note which call comes next."""
        scaled = cast(Tensor, type(self.scheduler).scale_model_input(self.scheduler, sample, timestep))
        call = _position(self.scheduler, timestep)
        if call == 0:
            self._check(self.scheduler.num_inference_steps)
            if len(self.scheduler.timesteps) != self.schedule.num_calls:
                raise ScheduleError(
                    f"schedule has {self.schedule.num_calls} calls, but {type(self.scheduler).__name__} makes "
                    f"{len(self.scheduler.timesteps)}; pass the num_inference_steps it was made for"
                )
            self.slots, self.older = {}, {}
        elif call != self.done + 1:
            raise ScheduleError(
                f"the scheduler went from call {self.done} to call {call}, but a schedule starts at the first call and "
                "leaves none out; call remove_schedule(pipe) to run other loops"
            )
        self.next = call
        return scaled

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """`DiTTransformer2DModel.forward` under the row of the call that the scheduler announced."""
        if self.pipe.scheduler is not self.scheduler:
            raise ScheduleError("pipe.scheduler was replaced after apply_schedule; apply the schedule again")
        if self.next is None:
            raise ScheduleError(
                "the transformer was called without its pipeline, so its place in the schedule is unknown; "
                "call remove_schedule(pipe) to use it alone"
            )
        call, self.next = self.next, None
        if call == 0:
            calls, at = self.schedule.num_calls, (hidden_states.device, hidden_states.dtype)
            self.terms = self.terms_of(self.schedule.corrections, calls, *at)
        terms = self.terms[call]
        reused = {branch: self.slots[branch] for branch in np.flatnonzero(~self.schedule.compute[call]).tolist()}
        older = {branch: self.older[branch][:depth] for branch, depth in enumerate(self.depths[call]) if depth}
        output, filled = self.calls[call](hidden_states, timestep, class_labels, reused, older, terms)
        for branch, value in filled.items():
            self.store(self.slots, branch, value, self.older, self.deepest[branch])
        if call == self.schedule.num_calls - 1:
            self.slots, self.older, self.terms = {}, {}, []
        self.done = call
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _check(self, steps: int) -> None:
        """Raise ScheduleError unless the schedule was made for this network and scheduler at `steps` steps."""
        solver = dict(solver_identity(self.scheduler, steps))
        self.schedule.check_fits(self.adapter.graph, replace(self.identity, solver=solver))


def _call(adapter: Adapter, compute: NDArray[np.bool_], kept: Set[int], name: str) -> Call:
    """One model call under row `compute`, bool[N], filling the slots of the branches `kept`; owns its code object."""
    row: Any = tuple(compute.tolist())  # plain bools: under torch.compile, numpy's are tensors
    filled = [branch for branch in np.flatnonzero(compute).tolist() if branch in kept]

    def call(
        x: Tensor, timesteps: Tensor, labels: Tensor, known: Known, before: Before, terms: Mapping[int, Terms]
    ) -> tuple[Tensor, Any]:
        slots, older = dict(known), dict(before)
        constants = adapter.step_constants(timesteps)
        output = adapter(x, {"labels": labels}, constants, hard_route(row, slots, terms, older))
        return output, {branch: slots[branch] for branch in filled}

    return FunctionType(call.__code__.replace(co_name=name), call.__globals__, name, closure=call.__closure__)


def _warning(kind: type, schedule: Schedule) -> type:
    """The class `kind`, whose call warns of a guidance scale that `schedule` was not fitted at; 1 or less is none."""
    signature = inspect.signature(kind.__call__)

    def call(pipe: Pipeline, *given: Any, **named: Any) -> Any:
        asked = signature.bind(pipe, *given, **named)
        asked.apply_defaults()
        if note := schedule.fitted_elsewhere(max(1.0, asked.arguments["guidance_scale"])):
            warnings.warn(note, stacklevel=2)
        return kind.__call__(pipe, *given, **named)

    return type(kind)(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})


def _position(scheduler: Scheduler, timestep: Any) -> int:
    """Which of its T calls a scheduler is at, 0 before the first.

    By its own counter once it has one (PNDM's is called `counter`). Before the first step there is none, and DDIM and
    DDPM never have one; their timesteps are all different.
    """
    for counter in ("step_index", "counter"):
        at = getattr(scheduler, counter, None)
        if at is not None:
            return int(at)
    return int((scheduler.timesteps == timestep).nonzero()[0])


def _network(pipe: Pipeline) -> Any:
    """The pipeline's transformer without the wrapper that torch.compile put around it; the pipeline if it has none."""
    network = getattr(pipe, "transformer", pipe)
    return getattr(network, "_orig_mod", network)


def _adapter(network: DiTTransformer2DModel) -> DiT:
    """An adapter of a network that stays as trainable and as much in training mode as it was."""
    training = {module: module.training for module in cast(nn.Module, network).modules()}
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    adapter = DiT(network)
    for module, mode in training.items():
        module.training = mode
    for parameter in trainable:
        parameter.requires_grad_()
    return adapter


def _replace(owner: Any, name: str, value: Any) -> Callable[[], object]:
    """Set an attribute of this one object, past its __setattr__; returns what undoes it."""
    attributes = vars(owner)
    undo = (
        partial(attributes.__setitem__, name, attributes[name]) if name in attributes else partial(attributes.pop, name)
    )
    attributes[name] = value
    return undo
