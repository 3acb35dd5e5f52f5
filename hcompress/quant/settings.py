"""What each quantizer can be told: the `quantization:` part of a recipe. No torch here, so recipes validate fast."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0)]


class EfficientDMSettings(BaseModel):
    """EfficientDM: low-rank updates inside the rounding, distilled without data."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["efficientdm"] = "efficientdm"
    format: Literal["w8a8", "w4a8", "w4a4"] = Field("w8a8", description="bits of weights and inputs")
    updates: int = Field(2000, ge=1, description="optimiser steps, one a model call; rounded to whole trajectories")
    batch: int = Field(4, ge=1, description="noises a trajectory; guidance doubles the rows")
    rank: int = Field(32, ge=1, description="of the low-rank update B A")
    w0: Literal["fp", "int"] = Field("fp", description="what B A is added to: the float weight, or the rounded one")
    lr_lora: Positive = Field(4e-4, description="AdamW's rate of A and B, in mean weight steps of the layer")
    lr_weight: Positive = Field(1e-3, description="relative rate of the weights' step sizes")
    lr_activation: Positive = Field(1e-2, description="relative rate of the inputs' step sizes")
    calibration_samples: int = Field(16, ge=1, description="samples on which the inputs' step sizes start")
