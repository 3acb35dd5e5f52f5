"""Quantizers: an Adapter in, an Adapter with the same branches and layers in few bits out (hcompress.lowbit).

One file for each method, or for several that differ in a preset, and one line in QUANTIZERS; of efficientdm, which is
trained in a run folder, a line in hcompress.distil.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hcompress.lowbit.adapter import QuantizedAdapter

Quantizer = Callable[..., "QuantizedAdapter"]
"""(adapter, walk, settings, on_call) -> the adapter in few bits; `on_call` is told the number of model calls done."""


def _ptq(*args: Any, **named: Any) -> QuantizedAdapter:
    from hcompress.quant.ptq import ptq

    return ptq(*args, **named)


def _ptq4dit(*args: Any, **named: Any) -> QuantizedAdapter:
    from hcompress.quant.ptq4dit import ptq4dit

    return ptq4dit(*args, **named)


QUANTIZERS: dict[str, Quantizer] = {
    "int8-max": _ptq,
    "int8-percentile": _ptq,
    "int8-smoothquant": _ptq,
    "fp8": _ptq,
    "int4-wo": _ptq,
    "ptq4dit": _ptq4dit,
}
