"""What runs a schedule for a comparison: the reference sampler, or the bundle as it is deployed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hcompress.report.quality import PART, Told, in_parts
from hcompress.sampling import sample_seeded
from hcompress.schedule import Schedule
from hcompress.setting import Setting
from hcompress_runtime.conditions import Given

Draw = Callable[[int, int, int, Callable[[int], None]], Tensor]
"""(count, seed, how many at once, progress) -> samples [count, C, H, W] of balanced labels, on the CPU."""


@contextmanager
def _on_torch(setting: Setting, schedule: Schedule | None, folder: Path) -> Iterator[Draw]:
    reuse = {} if schedule is None else {"compute": schedule.compute, "corrections": schedule.corrections}

    def draw(count: int, seed: int, batch: int, progress: Callable[[int], None]) -> Tensor:
        def part(given: Given, first: int, progress: Told) -> Tensor:
            run: dict[str, Any] = {"seed": seed, "cfg": setting.cfg, "batch": batch, "first": first, **reuse}
            return sample_seeded(setting.adapter, setting.table, given, progress=progress, **run).cpu()

        return in_parts(setting, count, part, progress, max(PART, batch))

    yield draw


@contextmanager
def _on_onnxruntime(setting: Setting, schedule: Schedule | None, folder: Path) -> Iterator[Draw]:
    """As it is deployed; the bundle is gone afterwards."""
    from hcompress_export.bundle import export_bundle
    from hcompress_runtime import Runtime

    calls, provider = setting.table.num_calls, setting.adapter.device.type
    with TemporaryDirectory(dir=folder) as scratch:
        bundle = Path(scratch) / "bundle"
        export_bundle(setting.adapter, setting.table, setting.identity, bundle, cfg=setting.cfg, schedule=schedule)
        with Runtime(bundle, provider, torch.get_num_threads()) as runtime:

            def draw(count: int, seed: int, batch: int, progress: Callable[[int], None]) -> Tensor:
                def part(given: Given, first: int, progress: Told) -> Tensor:
                    done = 0

                    def on_step(call: int, x: NDArray[np.float32]) -> None:
                        nonlocal done
                        done += len(x) if call == calls else 0
                        progress(min(done, count - first))

                    return torch.from_numpy(runtime.generate(given, seed, batch=batch, first=first, on_step=on_step))

                return in_parts(setting, count, part, progress, max(PART, batch))

            yield draw


RUNNERS: dict[str, Callable[[Setting, Schedule | None, Path], AbstractContextManager[Draw]]] = {
    "torch": _on_torch,
    "onnxruntime": _on_onnxruntime,
}
