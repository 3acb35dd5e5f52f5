"""What pruning can be told: the `prune:` part of a recipe. No torch here, so recipes validate fast."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0)]


class PruneSettings(BaseModel):
    """Diff-Pruning (Fang et al. 2023): Taylor importance over diffusion steps, one shot, uniform; then a fine-tune.

    The method is the paper's; the length of the fine-tune is not: its own take 100 000 updates (CIFAR-10, DDPM).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["diff-pruning"] = "diff-pruning"
    ratio: float | None = Field(None, gt=0, lt=1, description="share of each block's heads and MLP units to take out")
    target_speedup: float | None = Field(None, gt=1, description="the ratio whose MACs come nearest to falling by this")
    images: str | None = Field(None, description="folder: classes as sub-folders, captions as NAME.txt; None: zoo data")
    threshold: float = Field(0.05, ge=0, lt=1, description="gradients of a step count while L_t / L_max is above this")
    calibration: int = Field(64, ge=1, description="images whose losses say what matters")
    multiple: int = Field(8, ge=1, description="MLP units that stay are a multiple of this")
    updates: int = Field(2000, ge=0, description="of the fine-tune; 0: none")
    batch: int = Field(64, ge=1, description="images an update")
    micro_batch: int | None = Field(None, ge=1, description="of them at a time, as memory allows; None: all at once")
    lr: Positive = Field(2e-4, description="AdamW's, falling linearly to 0 over the run; paper: 2e-4, constant")
    flip: bool = Field(True, description="mirror every other image")
    label_dropout: float = Field(0.1, ge=0, lt=1, description="share of images that lose their label or caption")

    @model_validator(mode="after")
    def _one_goal(self) -> Self:
        if (self.ratio is None) == (self.target_speedup is None):
            given = "none" if self.ratio is None else "both"
            raise ValueError(f"pass exactly one of ratio and target_speedup (got {given})")
        return self
