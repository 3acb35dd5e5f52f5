"""What a comparison judges pictures by beside the offline metrics of their model's data: a reference, a CLIP."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, final

from torch import Tensor

from hcompress.comparison import Comparison
from hcompress.report.published import ByPrompt, Judge, Say, check_judged, judged
from hcompress.setting import Setting

JUDGED_BY = ("reference", "size", "clip")  # of a Comparison, which rows record


@final
class Judges:
    """The networks that a comparison asks for, read once. `said`: what to know about all their figures.

    Raises DataError, ModelError, InputError, MissingExtra for all that would fail of `settings`, whose samples they are
    to judge: no file of a reference, latents that nothing decodes, prompts without words.
    """

    def __init__(self, asked: Comparison, settings: Iterable[Setting], device: str, say: Say) -> None:
        self.judges: list[Judge | ByPrompt] = []
        self.said: list[str] = []
        for setting in settings:
            named = {"reference": asked.reference is not None, "clip": asked.clip is not None}
            check_judged(setting, asked.samples, **named)
        if asked.reference is not None:
            weights = Path(asked.inception) if asked.inception else None
            judge = Judge(Path(asked.reference), weights, asked.size, device, say, said=self.said)
            self.judges.append(judge)
        if asked.clip is not None:
            self.judges.append(ByPrompt(asked.clip, device))

    def of_samples(self, setting: Setting, samples: Tensor, what: str) -> dict[str, float]:
        """The figures of samples [N, C, h, w]."""
        return judged(self.judges, setting, samples, what)


def judged_so(row: Mapping[str, Any], asked: Comparison) -> bool:
    """Whether a finished row was judged by what is asked for; it may have been by more. One without figures is so."""
    if "figures" not in row:
        return True
    wanted: dict[str, Any] = {"clip": asked.clip} if asked.clip is not None else {}
    if asked.reference is not None:
        wanted |= {"reference": asked.reference, "size": asked.size}
    return all(row.get(key) == value for key, value in wanted.items())
