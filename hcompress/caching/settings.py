"""What each caching method can be told: the `caching:` part of a recipe. No torch here, so recipes validate fast.

`method` decides which of these classes a section is. Goals (`beta`, `target_cur`, ...) exclude each other.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hcompress.corrections import Reuse

Positive = Annotated[float, Field(gt=0)]
Target = Annotated[float | None, Field(gt=0, lt=1)]
Convention = Literal["alternate", "countdown"]
MISSED = 0.02  # of CUR, or of the share of MACs saved: a goal that a run came no nearer to, which steering does in time
LEAST_SAMPLES = 8  # that corrections may be fitted on: three or four unknowns a channel, and tokens are alike


class MethodSettings(BaseModel):
    """What all methods have: a name, the most that they could reuse, and what a reused branch yields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    reuse: Reuse = Field(
        "plain", description="what a reused branch yields: plain (the papers'), taylor or corrected (fitted)"
    )
    order: int = Field(
        1, ge=1, le=2, description="how many computed values before the last taylor and corrected look at"
    )
    fit_samples: int = Field(60, ge=LEAST_SAMPLES, description="noises that corrections are fitted on, by each rank")
    fit_steps: int = Field(100, ge=0, description="gradient steps on the image's error after least squares")

    @model_validator(mode="after")
    def _order_of_a_rule(self) -> Self:
        if self.reuse == "plain" and self.order != 1:
            raise ValueError(
                f"order = {self.order} means nothing where reuse is plain; drop it, or pass --reuse taylor or corrected"
            )
        return self

    def reusing_steps(self, steps: int) -> tuple[int, str]:
        """How many of `steps` steps may reuse anything, and why no more."""
        return steps - 1, f"the first of {steps} steps always computes everything"

    def _exactly_one(self, *goals: str) -> None:
        given = [goal for goal in goals if getattr(self, goal) is not None]
        if len(given) != 1:
            wanted = f"{', '.join(goals[:-1])} and {goals[-1]}"
            got = f"got {' and '.join(given) or 'none'}"
            raise ValueError(f"pass exactly one of {wanted} ({got}), such as --set caching.{goals[0]}=VALUE")


class RouterSettings(MethodSettings):
    """What the two methods that learn a router share. The defaults settle in 200 updates a row (recipes/LOG.md)."""

    beta: Positive | None = Field(None, description="fixed weight of the cache-usage penalty (the papers' protocol)")
    target_cur: Target = Field(None, description="steer beta until this share of T N is reused")
    target_speedup: float | None = Field(None, gt=1, description="steer beta until MACs fall by this ratio")
    ramp: float = Field(0.5, gt=0, le=1, description="share of a steered run over which its target rises from 0")
    lr: Positive = Field(0.15, description="AdamW's learning rate of the logits, weight decay 0; papers: 0.01, 0.001")
    threshold: float = Field(0.1, gt=0, lt=1, description="tau: a branch is reused where sigmoid(logit) <= tau")
    clamp: Positive = Field(4.0, description="logits stay within +-clamp, rows not learned at +clamp; papers: 5")
    init: Literal["normal"] | float = Field(
        2.0, description="first logits: a constant, or normal, N(0, 1), the papers'"
    )

    @model_validator(mode="after")
    def _one_goal(self) -> Self:
        self._exactly_one("beta", "target_cur", "target_speedup")
        return self

    @model_validator(mode="after")
    def _some_logit_reuses(self) -> Self:
        lowest = math.log((1 - self.threshold) / self.threshold)  # -logit of r = tau
        if self.clamp < lowest:
            raise ValueError(
                f"threshold = {self.threshold:g} reuses nothing: logits end at -clamp = {-self.clamp:g}, and "
                f"sigmoid(logit) <= threshold takes {-lowest:.4f}; raise threshold, or clamp to "
                f"{math.ceil(100 * lowest) / 100:g}"
            )
        return self


class HarmoniCaSettings(RouterSettings):
    """HarmoniCa: step-wise denoising training (SDT) with the image error proxy objective (IEPO).

    The method is the paper's; the defaults of lr, clamp, init, trajectories and batch are not: they settle in 200
    updates a row, where the paper takes 2 000 at a fifteenth of the rate (recipe dit-xl-2-256_ddim10_harmonica).
    """

    method: Literal["harmonica"] = "harmonica"
    trajectories: int = Field(200, ge=1, description="denoising trajectories; each updates rows 1 .. T-1 once")
    batch: int = Field(4, ge=1, description="noises a trajectory and rank; guidance doubles the rows")
    proxy: Literal["leave_one_out", "cumulative", "sensitivity", "none"] = Field(
        "leave_one_out", description="which lambda IEPO uses; none: 1 everywhere, SDT alone"
    )
    score: Literal["soft", "hard"] = Field(
        "soft", description="r of training, or its hard decision with the gradient of r (straight through)"
    )
    reduction: Literal["mean", "sum"] = Field("mean", description="of lambda over a latent; beta is tied to it")
    refresh: int = Field(500, ge=1, description="C: iterations (= T a trajectory) between refreshes of lambda")
    lambda_momentum: float = Field(0.0, ge=0, lt=1, description="share of the old lambda kept at a refresh; paper: 0")
    lambda_floor: float = Field(0.0, ge=0, lt=1, description="least lambda as a share of its mean; paper: 0")


class LearningToCacheSettings(RouterSettings):
    """Learning-to-Cache (Ma et al. 2024): every other call computes everything; those between learn what to reuse.

    Needs images. The defaults are HarmoniCa's where both have one, so that equal sweeps are equal updates a row.
    """

    method: Literal["learning-to-cache"] = "learning-to-cache"
    images: str | None = Field(None, description="folder: classes as sub-folders, captions as NAME.txt; None: zoo data")
    sweeps: int = Field(200, ge=1, description="updates of each learned row, on average; T // 2 iterations each")
    batch: int = Field(8, ge=1, description="images an iteration and rank; guidance plays no part")
    flip: bool = Field(True, description="mirror every other image, as the paper does")
    label_dropout: float = Field(0.1, ge=0, lt=1, description="share of images that lose label or caption; paper: 0.1")

    def reusing_steps(self, steps: int) -> tuple[int, str]:
        """Half of them."""
        return steps // 2, f"every other of {steps} steps computes everything"


class SmoothCacheSettings(MethodSettings):
    """SmoothCache (Liu et al. 2024): calls are skipped while the outputs of a kind of branch change little."""

    method: Literal["smoothcache"] = "smoothcache"
    alpha: Positive | None = Field(None, description="most relative L1 error that reuse may cause; paper: 0.08 to 0.22")
    target_cur: Target = Field(None, description="the alpha whose CUR comes nearest")
    target_speedup: float | None = Field(None, gt=1, description="the alpha whose ratio of MACs comes nearest")
    lookahead: int = Field(3, ge=1, description="most calls in a row that reuse; paper: 3")
    samples: int = Field(10, ge=1, description="generated to calibrate, by each rank; paper: 10")

    @model_validator(mode="after")
    def _one_goal(self) -> Self:
        self._exactly_one("alpha", "target_cur", "target_speedup")
        return self


class IntervalSettings(MethodSettings):
    """FORA (Selvaraju et al. 2024): everything is computed at every n-th call and reused in between."""

    method: Literal["interval"] = "interval"
    every: int | None = Field(None, ge=1, description="n; 1 reuses nothing")
    target_cur: Target = Field(None, description="the n whose CUR comes nearest")
    convention: Convention | None = Field(
        None, description="alternate (the papers' tables) or countdown (the code); None: alternate, or the nearer one"
    )

    @model_validator(mode="after")
    def _one_goal(self) -> Self:
        self._exactly_one("every", "target_cur")
        return self


class ChanceSettings(MethodSettings):
    """Random entries are reused: what a schedule is worth that knows nothing."""

    method: Literal["random"] = "random"
    target_cur: float = Field(gt=0, lt=1, description="share of T N that is reused, to the entry")


class UniformSettings(MethodSettings):
    """Every branch reuses equally often, its calls evenly spread, and the branches take turns."""

    method: Literal["uniform"] = "uniform"
    target_cur: float = Field(gt=0, lt=1, description="share of T N that is reused, to the entry")


class DeepCacheSettings(MethodSettings):
    """DeepCache (Ma et al. 2024): between full calls only the outermost blocks of a network with long skips run."""

    method: Literal["deepcache"] = "deepcache"
    every: int = Field(3, ge=1, description="N: a full call every so many; paper: 3")
    pairs: int = Field(2, ge=1, description="m: so many blocks at either end are always computed")


class FasterDiffusionSettings(MethodSettings):
    """Faster Diffusion (Li et al. 2024): between key calls the encoder rests and only the decoder runs."""

    method: Literal["faster-diffusion"] = "faster-diffusion"
    every: int | None = Field(None, ge=1, description="a key call every so many")
    keys: list[int] | None = Field(None, description="key calls by number; paper, of 50: 0 1 2 3 5 10 15 25 35")

    @model_validator(mode="after")
    def _one_goal(self) -> Self:
        self._exactly_one("every", "keys")
        return self


class GivenSettings(MethodSettings):
    """The mask of a schedule that there is already, to be run, and corrected, under another rule of reuse."""

    method: Literal["given"] = "given"
    schedule: str = Field(description="file of the schedule; it has to fit model, solver and steps")


CachingSettings = Annotated[
    HarmoniCaSettings
    | LearningToCacheSettings
    | SmoothCacheSettings
    | IntervalSettings
    | ChanceSettings
    | UniformSettings
    | DeepCacheSettings
    | FasterDiffusionSettings
    | GivenSettings,
    Field(discriminator="method"),
]
