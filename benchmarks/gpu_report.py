"""What gpu_check.py found, for machines and for people."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu_case import Case

PACKAGES = ("onnxruntime-gpu", "onnx-ir", "onnxscript", "tensorrt", "tensorrt-rtx-cu13", "cuda-python", "triton")
COLUMNS = ["contender", "variant", "CUR (%)", "steps that differ", "latency (ms)", "speed-up", "MACs /", "efficiency"]
COLUMNS += ["memory (MB)", "error"]


@dataclass
class Row:
    """One contender on one variant. status: "ok", "skipped" (absent, or no time) or "failed"; None: not measured."""

    contender: str
    variant: str
    status: str = "ok"
    reason: str = ""
    cur: float | None = None
    mac_ratio: float | None = None
    distinct_steps: int | None = None
    latency_ms: float | None = None
    speedup: float | None = None
    efficiency: float | None = None
    memory_bytes: int | None = None
    error: float | None = None
    rounds_ms: list[float] = field(default_factory=list)


def machine(case: Case) -> dict[str, Any]:
    """Device, driver and versions."""
    import torch

    from hcompress.rundir import environment

    found: dict[str, Any] = {"device": "CPU", "driver": None, "cuda": torch.version.cuda, **environment()}
    if case.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "memory_bytes": properties.total_memory, "driver": _driver()}
        found["sm"] = 10 * properties.major + properties.minor
    for package in PACKAGES:
        try:
            found["packages"][package] = version(package)
        except PackageNotFoundError:
            found["packages"][package] = None
    return found


def _driver() -> str | None:
    """The version of NVIDIA's driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def report(case: Case, rows: list[Row], head: Mapping[str, Any]) -> dict[str, Any]:
    """Everything, for JSON. `ok`: nothing failed, and something ran."""
    dtype = str(case.adapter.dtype).removeprefix("torch.")
    dense, *cached = (*case.variants, *case.few[1:])
    moved = {variant.name: dense.deviation(variant.reference) for variant in cached}
    asked = {"model": case.name, "dtype": dtype, "solver": "ddim", "calls": case.table.num_calls}
    asked |= {"samples": len(case.labels), "rows": 2 * len(case.labels), "cfg": case.identity.cfg}
    ok = all(row.status != "failed" for row in rows) and any(row.status == "ok" for row in rows)
    return {"ok": ok, **head, "asked": asked, "caching_moves": moved, "rows": [asdict(row) for row in rows]}


def markdown(found: Mapping[str, Any]) -> str:
    """The report for people."""
    asked, here = found["asked"], found["machine"]
    installed = ", ".join(f"{name} {number}" for name, number in here["packages"].items() if number)
    scale = ", ".join(f"{100 * moved:.1f} % at {name}" for name, moved in found["caching_moves"].items())
    lines = [
        f"# gpu-check: {here['device']}",
        "",
        f"{found['date']}, driver {here['driver']}, CUDA {here['cuda']}, Python {here['python']}, {installed}.",
        f"`{found['command']}` took {found['took_s']:.0f} s of {60 * found['minutes']:.0f}.",
        "",
        f"{asked['model']}, {asked['dtype']}, {asked['samples']} samples, {asked['rows']} rows,",
        f"guidance {asked['cfg']}, {asked['solver']} at {asked['calls']} steps.",
        f"Errors up to {found['tolerance']:.0e} are allowed; caching itself moves what the network adds by {scale}.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    untold = []
    for row in (Row(**plain) for plain in found["rows"]):
        if row.status != "ok":
            untold.append(f"- {row.contender}, {row.variant}: {row.status}: {row.reason}")
        if row.latency_ms is None:
            continue
        cells = [row.contender, row.variant, _show(row.cur, 1, 100), str(row.distinct_steps), _show(row.latency_ms, 1)]
        cells += [_show(row.speedup, 2), _show(row.mac_ratio, 2), _show(row.efficiency, 2)]
        cells += [_show(row.memory_bytes, 0, 1e-6), f"{row.error:.1e}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *untold, ""])


def _show(value: float | None, digits: int, scale: float = 1.0) -> str:
    return "-" if value is None else f"{scale * value:.{digits}f}"
