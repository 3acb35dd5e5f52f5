"""What each caching method can be told: the `caching:` part of a recipe. No torch here, so recipes validate fast."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0)]


class HarmoniCaSettings(BaseModel):
    """HarmoniCa: step-wise denoising training (SDT) with the image error proxy objective (IEPO).

    The method is the paper's; the defaults of lr, clamp, init, trajectories and batch are not: they settle in 200
    updates a row, where the paper takes 2 000 at a fifteenth of the rate (recipe dit-xl-2-256_ddim10_harmonica).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["harmonica"] = "harmonica"
    beta: Positive | None = Field(None, description="fixed weight of the cache-usage penalty (the paper's protocol)")
    target_cur: float | None = Field(None, gt=0, lt=1, description="steer beta until this share of T N is reused")
    target_speedup: float | None = Field(None, gt=1, description="steer beta until MACs fall by this ratio")
    ramp: float = Field(0.5, gt=0, le=1, description="share of a steered run over which its target rises from 0")
    trajectories: int = Field(200, ge=1, description="denoising trajectories; each updates rows 1 .. T-1 once")
    batch: int = Field(4, ge=1, description="noises a trajectory and rank; guidance doubles the rows")
    lr: Positive = Field(0.15, description="AdamW's learning rate of the logits, weight decay 0; paper: 0.01")
    threshold: float = Field(0.1, gt=0, lt=1, description="tau: a branch is reused where sigmoid(logit) <= tau")
    clamp: Positive = Field(4.0, description="logits stay within +-clamp, row 0 is pinned at +clamp; paper: 5")
    init: Literal["normal"] | float = Field(
        2.0, description="first logits: a constant, or normal, N(0, 1), the paper's"
    )
    proxy: Literal["leave_one_out", "cumulative", "sensitivity"] = Field(
        "leave_one_out", description="which lambda IEPO uses"
    )
    reduction: Literal["mean", "sum"] = Field("mean", description="of lambda over a latent; beta is tied to it")
    refresh: int = Field(500, ge=1, description="C: iterations (= T a trajectory) between refreshes of lambda")
    lambda_momentum: float = Field(0.0, ge=0, lt=1, description="share of the old lambda kept at a refresh; paper: 0")
    lambda_floor: float = Field(0.0, ge=0, lt=1, description="least lambda as a share of its mean; paper: 0")

    @model_validator(mode="after")
    def _one_goal(self) -> Self:
        goals = [n for n in ("beta", "target_cur", "target_speedup") if getattr(self, n) is not None]
        if len(goals) != 1:
            given = f"got {' and '.join(goals)}" if goals else "got none"
            raise ValueError(f"pass exactly one of beta, target_cur and target_speedup ({given})")
        return self
