"""Schedules that other projects published, as ours.

    harmonica          ModelTC/HarmoniCa          .pt: {"routers": {"<row>.prob": logits float[N]}, "args": Namespace}
    learning-to-cache  horseee/learning-to-cache  .pt: the same layout; its rule below
    smoothcache        Roblox/SmoothCache         .json: {"attn": [1, 0, ...], "mlp": [...]}, 1 = compute

Router rows ascend in t: they are flipped here, and nothing else ever flips rows. SmoothCache's flags are in the order
of execution: its port of an L2C schedule reuses at odd positions, which are L2C's even rows.

A .pt file is a pickle, which may run code. Only tensors and an argparse.Namespace are ever built from one.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hcompress.errors import ScheduleError
from hcompress.schedule import Identity, Schedule

KINDS = ("harmonica", "learning-to-cache", "smoothcache")
PINNED = 5.0  # the logit of entries that are computed whatever was learned; HarmoniCa's own clamp
DIFFUSERS_NAMES = {"attn": "attn1", "mlp": "ff"}  # what SmoothCache calls the branches of a diffusers DiT


def import_schedule(
    path: Path | str, *, names: Sequence[str], identity: Identity, kind: str | None = None, threshold: float = 0.1
) -> Schedule:
    """The schedule in a router checkpoint (`.pt`) of HarmoniCa or Learning-to-Cache, or in a JSON of SmoothCache.

    names:     the branches of the model it is for, `adapter.graph.names`
    identity:  that model and its solver; the file records neither, so it is the caller who vouches for them
    kind:      one of KINDS; by default found out from the content
    threshold: tau of the routers; a branch is computed where sigmoid(logit) > tau

    Raises ScheduleError where the file is absent, damaged, of an unknown kind or for another model or number of steps.
    """
    if not 0 < threshold < 1:
        raise ScheduleError(f"a threshold of {threshold} is outside 0 to 1; the routers were published with 0.1")
    path = Path(path)
    if path.suffix == ".safetensors":
        raise ScheduleError(f"{path} is no file of another project; a schedule of hcompress is used as it is")
    content = _read(path)
    kind = kind or _kind(content)
    if kind not in KINDS:
        raise ScheduleError(
            f"cannot import {path} as {kind or 'anything known'}; pass kind, one of: {', '.join(KINDS)}"
        )
    method: dict[str, Any] = {"name": kind, "file": path.name}
    logits = None
    if kind == "smoothcache":
        compute = _flags(content, names, path)
    else:
        beta = getattr(content.get("args"), "l1", None)
        method |= {"threshold": threshold} | ({"beta": beta} if isinstance(beta, float) else {})
        logits = _logits(content, names, path)
        always = np.zeros(len(logits), np.bool_)
        if kind == "learning-to-cache":  # every odd row is full and refills the cache; only even rows were trained
            always = np.arange(len(logits))[::-1] % 2 == 1
        always[0] = True
        logits[always] = PINNED
        compute = (logits > math.log(threshold / (1 - threshold))) | always[:, None]
    steps = identity.solver.get("steps", len(compute))
    if len(compute) != steps:
        raise ScheduleError(f"{path} is for {len(compute)} steps, not {steps}; pass the number it was made for")
    return Schedule(compute, tuple(names), replace(identity, weight_hash=None), method, logits)


def _read(path: Path) -> Mapping[str, Any]:
    """The dict in a JSON or torch file."""
    if not path.is_file():
        raise ScheduleError(f"no file {path}; pass a router checkpoint (.pt) or a SmoothCache schedule (.json)")
    with path.open("rb") as file:
        is_json = file.read(64).lstrip().startswith((b"{", b"["))
    try:
        content = json.loads(path.read_bytes()) if is_json else _unpickle(path)
    except Exception as error:  # a damaged or hostile file can raise anything
        raise ScheduleError(
            f"{path} is damaged, no router and no JSON, or holds code and was not run ({type(error).__name__}); "
            "download it again"
        ) from error
    if not isinstance(content, Mapping):
        raise ScheduleError(f"{path} holds a {type(content).__name__}, no router and no schedule")
    return content


def _unpickle(path: Path) -> Any:
    """What torch.save wrote, tensors on the CPU; raises on anything but plain data, tensors and argparse.Namespace."""
    import torch

    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _kind(content: Mapping[str, Any]) -> str | None:
    """Which of KINDS a file is, None where it does not tell. Of the two routers, only HarmoniCa refreshes a lambda."""
    if "routers" not in content:
        return "smoothcache" if all(isinstance(flags, list) for flags in content.values()) else None
    if not isinstance(content.get("args"), argparse.Namespace):
        return None
    return "harmonica" if hasattr(content["args"], "lambda_c") else "learning-to-cache"


def _logits(content: Mapping[str, Any], names: Sequence[str], path: Path) -> NDArray[np.float32]:
    """float32[T, N], row 0 executed first. Columns are attention, MLP of each block, as in the adapter of DiT."""
    try:
        routers = content["routers"]
        ascending = [routers[f"{row}.prob"].detach().float().numpy() for row in range(len(routers))]
    except (KeyError, AttributeError, TypeError, RuntimeError) as error:
        raise ScheduleError(f"{path} lacks or garbles {error}; a router has '0.prob', '1.prob', ...") from error
    widths = {row.shape for row in ascending}
    if widths != {(len(names),)}:
        got = ", ".join(str(list(width)) for width in sorted(widths)) or "none"
        raise ScheduleError(f"{path} has rows of shape {got}, but this model has {len(names)} branches")
    return np.stack(ascending[::-1])


def _flags(content: Mapping[str, Any], names: Sequence[str], path: Path) -> NDArray[np.bool_]:
    """bool[T, N]. A key is a kind of branch, for all layers ("attn") or one ("attn-3"); a kind left out is computed."""
    lists = [flags if isinstance(flags, list) else [None] for flags in content.values()]
    if len({len(flags) for flags in lists}) != 1 or not all(flag in (0, 1) for flags in lists for flag in flags):
        raise ScheduleError(f"{path} is no SmoothCache schedule: it must hold lists of 0 and 1, all of one length")
    columns: list[list[int]] = []
    used: set[str] = set()
    for name in names:
        layer, _, kind = name.rpartition(".")
        bases = (kind, DIFFUSERS_NAMES.get(kind, kind))
        key = next((key for base in bases for key in (f"{base}-{layer}", base) if key in content), None)
        columns.append(content[key] if key else [1] * len(lists[0]))
        used |= {key} if key else set()
    if unknown := sorted(set(content) - used):
        raise ScheduleError(
            f"{path} has flags for {unknown[0]!r}, which names no branch of this model ({names[0]!r}, ...)"
        )
    return np.array(columns, np.bool_).T
