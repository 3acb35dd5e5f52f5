"""A calibrator for modelopt that keeps one of modelopt's own for each model call.

modelopt's own way to be aware of steps is a calibrator that counts its forwards, which is wrong as soon as one is
skipped. Here the sampler's loop says which call is under way.
"""

from __future__ import annotations

from typing import Any, final

import torch
from modelopt.torch.quantization.calib import HistogramCalibrator, MaxCalibrator
from modelopt.torch.quantization.calib.calibrator import _Calibrator
from torch import Tensor

from hcompress.errors import ModelError
from hcompress.quant.calibration import unfit


@final
class Now:
    """The call under way; one object for all calibrators of a network."""

    call = 0
    unfit: ModelError | None = None

    def set(self, call: int) -> None:
        """The loop is at `call`. Raises what is wrong with an input of the one before.

        Not from within a layer: there modelopt has replaced functions of torch, and would leave them so.
        """
        if self.unfit is not None:
            raise self.unfit
        self.call = call


@final
class ByCall(_Calibrator):  # type: ignore[misc]  # modelopt is not typed
    """Largest absolute values of layer `name`'s input by call, or with `percentile` (0 to 100) those of a histogram.

    An axis, which SmoothQuant sets, keeps a value for each channel.
    """

    def __init__(self, name: str, now: Now, percentile: float | None = None) -> None:
        super().__init__()
        self.name, self.now, self.percentile = name, now, percentile
        self.each: dict[int, Any] = {}
        self.before: dict[int, Any] = {}

    def collect(self, x: Tensor) -> None:
        """Hand `x` to the calibrator of this call; where it has no range, which modelopt asserts, note that instead."""
        if not x.isfinite().all():
            self.now.unfit = self.now.unfit or unfit(self.name, self.now.call, "holds NaN or infinity")
            return
        if self.now.call not in self.each:
            kind = MaxCalibrator if self.percentile is None else HistogramCalibrator
            self.each[self.now.call] = kind(self._num_bits, self._axis, self._unsigned)
        self.each[self.now.call].collect(x)

    def by_call(self) -> dict[int, Tensor]:
        """Float32 ranges of the calls that were seen, on the CPU, also after a reset."""
        return {call: self._range(one).cpu() for call, one in (self.each or self.before).items()}

    def compute_amax(self, *_: Any, **__: Any) -> Tensor | None:
        """The largest of all calls, which is all that modelopt's quantizer can hold. None where none was seen.

        It stays on the device where it was seen: SmoothQuant divides the weight's range by it.
        """
        ranges = [self._range(one) for one in self.each.values()]
        return torch.stack(ranges).amax(dim=0) if ranges else None

    def reset(self) -> None:
        """modelopt has read what was seen; it is kept for `by_call`."""
        self.before, self.each = self.each or self.before, {}

    def _range(self, one: Any) -> Tensor:
        found = (
            one.compute_amax()
            if self.percentile is None
            else one.compute_amax("percentile", percentile=self.percentile)
        )
        return found.float()
