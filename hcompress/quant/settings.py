"""What each quantizer can be told: the `quant:` part of a recipe. No torch here, so recipes validate fast."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hcompress.errors import RecipeError

FORMATS_HERE = ("w8a8", "w4a8", "w4a4", "fp8", "w8", "w4")
ELSEWHERE = {"nvfp4": "a Blackwell GPU", "mxfp4": "a Blackwell GPU", "mxfp8": "a Blackwell GPU"}
INTEGERS = ("w8a8", "w4a8", "w4a4", "w8")
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

    @property
    def resolved_format(self) -> str:
        """`format`, or the method's own."""
        return self.format or DEFAULT_FORMATS.get(self.method, "w8a8")

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
    samples: int = Field(16, ge=1, description="noises that calibrate; guidance doubles the rows")
    batch: int = Field(8, ge=1, description="of them at a time")
    percentile: float = Field(99.99, gt=0, le=100, description="int8-percentile: share of values inside the range")
    alpha: float = Field(0.8, ge=0, le=1, description="int8-smoothquant: how far inputs are smoothed into weights")

    @model_validator(mode="after")
    def _method_has_the_format(self) -> Self:
        allowed = METHOD_FORMATS.get(self.method, INTEGERS)
        if self.resolved_format not in allowed:
            raise RecipeError(f"quant.format = {self.format!r} is none of {self.method}'s: {', '.join(allowed)}")
        return self


Quant = PtqSettings
"""What the `quant:` section may be."""
