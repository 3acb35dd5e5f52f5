"""One ONNX graph of the guided denoiser, with the output of every branch in the open.

The graph is traced once; `hcompress_export.passes` cuts every step's graph out of it. Its inputs and outputs:

    in   latent            float32[batch, C, H, W], before guidance doubles the rows
    in   <condition>       such as labels, int64[batch], or prompt_embeds, float32[batch, tokens, width]
    in   step.<constant>   float32[1, ...], everything that derives from the timestep alone; no more precise than dtype
    in   cfg               float32[], the guidance scale; absent where there is no guidance (a scale of 1)
    in   noise             float32[batch, C, H, W], of the call; where the solver scales it by the learned variance only
    out  model_output      float32[batch, C, H, W], after guidance, without the channels of a learned variance; with
                           `noise` scaled by them, as hcompress_runtime.table says
    out  cache.<branch>    dtype[rows tokens, width], before the gate; rows = 2 batch under guidance

dtype is the adapter's. Only the network itself is in it: guidance, softmax and norms are float32 whatever it is.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import onnx_ir as ir
import torch
from torch import Tensor, nn

from hcompress.adapter import Adapter, Condition
from hcompress.sampling import fill_route, solver_output
from hcompress_export.passes import count_by_latent, keep_slots_flat, name_batch, name_weights_by_content
from hcompress_export.qdq import opset_of, settle
from hcompress_export.translate import TRANSLATIONS
from hcompress_runtime.conditions import example

OPSET = 20  # 23 has an Attention operator, which ONNX Runtime 1.30 runs no faster on a CPU
OPSETS = (18, 24)  # what torch's exporter writes


def trace(adapter: Adapter, cfg: float, *, opset: int | None = None, learned_variance: bool = False) -> ir.Model:
    """The guided denoiser as ONNX, any batch size; the numbers are those of `Adapter.guided`.

    opset: OPSET or, for what that has no types for, the oldest that has. Raises InputError for one that is too old.
    learned_variance: under a solver that scales its noise by the model's own guess
    """
    opset = opset_of(adapter.network, OPSET, opset)
    device = adapter.device
    latent = torch.zeros(3, *adapter.sample_shape, device=device)  # 3: torch.export takes 0 and 1 for constants
    condition = dict(adapter.condition(example(adapter.conditions, len(latent))))
    constants = {name: value.float() for name, value in adapter.step_constants(torch.zeros(1, device=device)).items()}
    options = {} if cfg == 1.0 else {"cfg": torch.tensor(cfg, device=device)}
    if learned_variance:
        options["noise"] = torch.zeros_like(latent)
        constants |= {name: torch.zeros(1, device=device) for name in ("noise_gain", "noise_slope")}
    batch = {0: torch.export.Dim("batch", min=1, max=1 << 20)}
    names = ["latent", *condition, *(f"step.{name}" for name in constants), *options]
    with quiet_exporter(), torch.no_grad():
        # Exported here and not inside torch.onnx.export, which silently falls back to a fixed batch size.
        program = torch.export.export(
            _Exposed(adapter).eval(),
            (latent, condition, constants, options),
            dynamic_shapes=(
                batch,
                dict.fromkeys(condition, batch),
                dict.fromkeys(constants),
                {name: batch if name == "noise" else None for name in options},
            ),
        )
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=names,
            output_names=["model_output", *(f"cache.{name}" for name in adapter.graph.names)],
            custom_translation_table=TRANSLATIONS,
            verbose=False,
        )
    model = cast(Any, exported).model
    settle(model)
    name_batch(model)
    count_by_latent(model)
    keep_slots_flat(model)
    name_weights_by_content(model)
    return model


class _Exposed(nn.Module):
    """`Adapter.guided` that also returns what every branch gave, in branch order."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(
        self, latent: Tensor, condition: Condition, constants: dict[str, Tensor], options: dict[str, Tensor]
    ) -> tuple[Tensor, ...]:
        exposed: dict[int, Tensor] = {}
        rounded = {name: value.to(self.adapter.dtype) for name, value in constants.items()}
        raw = self.adapter.guided(latent, condition, rounded, options.get("cfg", 1.0), fill_route(exposed))
        output = solver_output(raw, constants, options.get("noise"), self.adapter.sample_shape[0])
        return output, *(exposed[branch] for branch in sorted(exposed))


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Without what torch 2.13's exporter says on every call and nobody can act on."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")  # "torchvision is not installed"
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
