"""`hcompress import`: use a schedule that another project published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def import_(
    file: Annotated[Path, typer.Argument(help="A router .pt of HarmoniCa or L2C, or a SmoothCache .json.")],
    model: Annotated[str, typer.Option(help="The MODEL that it was made for.", show_default=False)],
    steps: Annotated[int, typer.Option(help="The denoising steps that it was made for.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Schedule file to write.", show_default=False)],
    solver: Annotated[str, typer.Option(help="The solver that it was made for.")] = "ddim",
    cfg: Annotated[float, typer.Option(help="The guidance scale that it was made for.")] = 1.5,
    kind: Annotated[str | None, typer.Option(help="harmonica, learning-to-cache or smoothcache, if not clear.")] = None,
    threshold: Annotated[float, typer.Option(help="tau: compute where sigmoid(logit) is above it.")] = 0.1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Turn the schedule of another project into one of ours. The file is read without running any code in it.

    Example: hcompress import DDIM20_router.pt --model facebook/DiT-XL-2-256 --steps 20 --out l2c.safetensors
    """
    from hcompress.interop import import_schedule
    from hcompress.setting import open_setting

    setting = open_setting(model, solver, steps, cfg)
    graph = setting.adapter.graph
    schedule = import_schedule(file, names=graph.names, identity=setting.identity, kind=kind, threshold=threshold)
    schedule.save(out)
    if as_json:
        print(json.dumps({"schedule": str(out), "cur": schedule.cur, "mac_ratio": graph.mac_ratio(schedule.compute)}))
    else:
        print(f"{out}: {schedule.method['name']}, {schedule.num_calls} calls, CUR {100 * schedule.cur:.2f} %")
