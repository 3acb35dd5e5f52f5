"""What each quantizer can be told: the `quant:` part of a recipe. No torch here, so recipes validate fast."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hcompress.errors import RecipeError

Positive = Annotated[float, Field(gt=0)]
FORMATS_HERE = ("w8a8", "w4a8", "w4a4", "fp8", "w8", "w4")
ELSEWHERE = {"nvfp4": "a Blackwell GPU", "mxfp4": "a Blackwell GPU", "mxfp8": "a Blackwell GPU"}
INTEGERS = ("w8a8", "w4a8", "w4a4", "w8")
LEARNED = ("w8a8", "w4a8", "w4a4")
METHOD_FORMATS = {"fp8": ("fp8",), "int4-wo": ("w4",), "int8-smoothquant": ("w8a8",)}  # INTEGERS for all others
DEFAULT_FORMATS = {"fp8": "fp8", "int4-wo": "w4"}  # of a method; w8a8 for all others


class QuantSettings(BaseModel):
    """What all methods have: which layers are quantized, and in which format."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    format: str | None = Field(None, description=f"{', '.join(FORMATS_HERE)}; None: the method's own")
    modulation: str = Field("w8", description="format of block adaLN, a third of DiT's weights, or keep")
    keep: list[str] = Field([], description="globs of layer names that stay in float")
    only: list[str] = Field([], description="globs of layer names that are quantized instead of the default ones")
    samples: int = Field(16, ge=1, description="noises that calibrate; guidance doubles the rows")
    batch: int = Field(8, ge=1, description="of them at a time")

    @property
    def resolved_format(self) -> str:
        """`format`, or the method's own."""
        return self.format or DEFAULT_FORMATS.get(self.method, "w8a8")

    def unused(self) -> dict[str, str]:
        """The settings that this method, or this way of using it, ignores, each with the reason."""
        return {}

    def check_used(self) -> None:
        """Raise RecipeError where something was set that would be ignored.

        No part of validation: runs that were made while this was let pass are still read.
        """
        for key, reason in self.unused().items():
            if getattr(self, key) != type(self).model_fields[key].default:
                raise RecipeError(f"quant.{key} = {getattr(self, key)!r} would be ignored: {reason}")

    def told(self) -> dict[str, Any]:
        """What says how the result came to be, beside its layers' formats; JSON-able."""
        layers = {"method", "keep", "only", "modulation", "format"}
        return {"name": self.method} | self.model_dump(exclude_none=True, exclude=layers | self.unused().keys())

    @model_validator(mode="after")
    def _known_formats(self) -> Self:
        for key, name in (("format", self.format), ("modulation", self.modulation)):
            allowed = (*FORMATS_HERE, "keep") if key == "modulation" else FORMATS_HERE
            if name in ELSEWHERE:
                raise RecipeError(
                    f"quant.{key} = {name!r} needs {ELSEWHERE[name]} and is not written by hcompress; "
                    f"what runs here: {', '.join(allowed)}"
                )
            if name is not None and name not in allowed:
                raise RecipeError(f"quant.{key} = {name!r} should be one of {', '.join(allowed)}")
        return self


class PtqSettings(QuantSettings):
    """Quantization after training: ranges are measured along the deployment trajectory, no weight learns anything.

    A range for each call is the default: it costs nothing at run time, where step sizes are step constants, and is
    worth 4.6 dB on zoo:fashion-dit (45.0 against 40.5, INT8 min-max).
    """

    method: Literal["int8-max", "int8-percentile", "int8-smoothquant", "fp8", "int4-wo", "ptq4dit"] = "int8-max"
    one_scale: bool = Field(False, description="one range of an input for all calls, instead of one for each")
    percentile: float = Field(99.99, gt=0, le=100, description="int8-percentile: share of values inside the range")
    alpha: float = Field(0.8, ge=0, le=1, description="int8-smoothquant: how far inputs are smoothed into weights")

    def unused(self) -> dict[str, str]:
        """What other methods go by."""
        owners = {"percentile": "int8-percentile", "alpha": "int8-smoothquant"}
        return {key: f"it is {owner}'s, not {self.method}'s" for key, owner in owners.items() if owner != self.method}

    @model_validator(mode="after")
    def _method_has_the_format(self) -> Self:
        allowed = METHOD_FORMATS.get(self.method, INTEGERS)
        if self.resolved_format not in allowed:
            raise RecipeError(f"quant.format = {self.format!r} is none of {self.method}'s: {', '.join(allowed)}")
        return self


class EfficientDMSettings(QuantSettings):
    """EfficientDM: low-rank updates inside the rounding, distilled without data.

    The method is the paper's; the learning rates are not: they settle in 2 000 updates, where the paper takes 16 000.
    """

    method: Literal["efficientdm"] = "efficientdm"
    updates: int = Field(2000, ge=1, description="optimiser steps, one a model call; rounded to whole trajectories")
    refresh: int = Field(
        200, ge=1, description="with_cache: updates of the inputs' step sizes under the schedule that is kept"
    )
    batch: int = Field(4, ge=1, description="noises a trajectory, of calibration too; guidance doubles the rows")
    rank: int = Field(32, ge=1, description="of the low-rank update B A")
    w0: Literal["fp", "int"] = Field("fp", description="what B A is added to: the float weight, or the rounded one")
    weighting: Literal["relative", "none"] = Field(
        "relative", description="each call's error counts relative to what it was before training, or as it is (paper)"
    )
    lr_lora: Positive = Field(4e-3, description="AdamW's rate of A and B, in mean weight steps of the layer")
    lr_weight: Positive = Field(1e-3, description="relative rate of the weights' step sizes")
    lr_activation: Positive = Field(5e-3, description="relative rate of the inputs' step sizes")
    with_cache: str | None = Field(None, description="schedule of the float model, under which the result will run")
    relearn: Literal["refine", "scratch", "keep"] = Field(
        "refine", description="with_cache: learn its schedule on the quantized model, from its logits, anew, or not"
    )
    teacher: Literal["quantized", "fp"] = Field(
        "quantized", description="with_cache: whose uncached output the schedule is learned to match"
    )

    def unused(self) -> dict[str, str]:
        """What is about learning a schedule, where none is learned."""
        if self.with_cache is None:
            return dict.fromkeys(("refresh", "relearn", "teacher"), "there is no schedule; pass one: --with-cache FILE")
        if self.relearn == "keep":
            return dict.fromkeys(("refresh", "teacher"), "quant.relearn = 'keep' learns no schedule")
        return {}

    @model_validator(mode="after")
    def _learns_the_format(self) -> Self:
        if self.resolved_format not in LEARNED:
            raise RecipeError(f"quant.format = {self.format!r} is none of efficientdm's: {', '.join(LEARNED)}")
        return self


Quant = Annotated[PtqSettings | EfficientDMSettings, Field(discriminator="method")]
"""What the `quant:` section may be."""
