"""The VAE decoder as a graph of its own: `decoder/decoder.onnx`, loaded when the first picture is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import onnx_ir as ir
import torch
from torch import nn

from hcompress_export.passes import move_weights_out, name_weights_by_content
from hcompress_export.trace import OPSET, quiet_exporter
from hcompress_export.weights import write_weights
from hcompress_runtime.bundle import DECODER
from hcompress_runtime.files import write_atomically


def write_decoder(folder: Path, decoder: nn.Module, latent_shape: tuple[int, ...], *, opset: int = OPSET) -> None:
    """Write `decoder`, a picture [1, 3, H, W] for a latent [1, *latent_shape], under the bundle in `folder`.

    Its weights are a file of its own, `weights.safetensors` beside the graph. One at a time, because activations of a
    decoder are large, and because diffusers' upsampling branches on the batch.
    """
    latent = torch.zeros(1, *latent_shape)
    with quiet_exporter(), torch.no_grad():
        program = torch.export.export(decoder.eval(), (latent,))
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=["latent"],
            output_names=["picture"],
            verbose=False,
        )
    model = cast(Any, exported).model
    name_weights_by_content(model)
    weights = (folder / DECODER).with_name("weights.safetensors")
    regions = write_weights(weights, [model])
    move_weights_out(model, regions, weights.name)
    write_atomically(folder / DECODER, ir.to_proto(model).SerializeToString(deterministic=True))
