"""Finished pictures, or a model's samples, under the published metrics: `hcompress eval --reference`, `--prompts`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from hcompress.errors import DataError
from hcompress.metrics.clip_score import Clip, clip_score, read_prompts
from hcompress.metrics.image_sets import Folder, ImageSet, open_set
from hcompress.metrics.inception import Inception, features_of
from hcompress.metrics.published import published_metrics
from hcompress.metrics.reference import load_reference
from hcompress.models.decoder import load_viewer
from hcompress.prompts import words_of
from hcompress.setting import Setting

BATCH = 32
Say = Callable[[str], object]
Show = Callable[[str, int, int], None]  # what is being read, pictures done, of how many


@final
@dataclass
class Judge:
    """FID and its kin of several sets of pictures against one reference; network and reference are read once.

    reference: a folder or npz; weights: of Inception, see hcompress.metrics.inception; size: of a folder's pictures
    say:       is told what to know about the figures, each line once
    """

    reference: Path
    weights: Path | None = None
    size: int | None = None
    device: str = "cpu"
    say: Say = lambda line: None
    show: Show = lambda what, done, total: None
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.reference.exists():
            raise DataError(
                f"no reference {self.reference}; it is a folder or npz of real pictures, or ADM's statistics"
            )
        self.network = Inception(self.weights, self.device)
        self.real = load_reference(
            self.reference,
            self.network,
            self.size,
            on_broken=self.note,
            progress=lambda done, total: self.show("reference", done, total),
        )

    def note(self, line: str) -> None:
        """Say a line that was not said yet."""
        if line not in self.said:
            self.said.append(line)
            self.say(line)

    def __call__(self, images: ImageSet, what: str = "samples") -> dict[str, float]:
        """The metrics of an ImageSet."""
        features = features_of(images, self.network, BATCH, lambda done: self.show(what, done, len(images)))
        figures, notes = published_metrics(features, self.real)
        for line in notes:
            self.note(line)
        return figures

    def of_samples(self, setting: Setting, samples: Tensor, what: str) -> dict[str, float]:
        """The metrics of a model's samples [N, C, h, w], decoded where they are latents."""
        return self(Generated(samples, viewer_of(setting), self.device), what)


@final
class ByPrompt:
    """CLIP scores of models' samples, each by the words that it was asked for in; the network is read once.

    clip: a local folder or a hub id
    """

    def __init__(self, clip: str, device: str = "cpu", show: Show = lambda what, done, total: None) -> None:
        self.network, self.device, self.show = Clip(clip, device), device, show

    def of_samples(self, setting: Setting, samples: Tensor, what: str) -> dict[str, float]:
        """The score of a model's samples [N, C, h, w], of its own prompts for scoring in order."""
        images, count = Generated(samples, viewer_of(setting), self.device), len(samples)
        words = words_of(setting.model, count)
        score = clip_score(images, words, self.network, BATCH, lambda done: self.show(f"{what} by CLIP", done, count))
        return {"clip_score": score}


def check_judged(setting: Setting, count: int, *, reference: bool, clip: bool) -> None:
    """Raise what judging `count` samples of the model would, by a reference or a CLIP, before any of them is made.

    DataError for latents that nothing decodes; InputError, ModelError for a CLIP without words to compare with.
    """
    if clip:
        words_of(setting.model, count)
    if reference or clip:
        viewer_of(setting)


def judged(judges: Iterable[Judge | ByPrompt], setting: Setting, samples: Tensor, what: str) -> dict[str, float]:
    """The figures of a model's samples [N, C, h, w] by all of `judges`."""
    figures: dict[str, float] = {}
    for judge in judges:
        figures |= judge.of_samples(setting, samples, what)
    return figures


def viewer_of(setting: Setting) -> nn.Module:
    """What makes pictures of the model's samples. Raises DataError for latents that came without their VAE."""
    model = setting.model
    viewer = load_viewer(model.folder, model.adapter.sample_shape[0])
    if viewer is None:
        raise DataError(
            f"{model.name} makes latents of {model.adapter.sample_shape[0]} channels and {model.folder / 'vae'} is "
            "missing, so there are no pictures for --reference or --clip; download the VAE of its pipeline there"
        )
    return viewer


@final
class Generated:
    """A model's samples as pictures in 256 levels, as they would be saved, gray ones in three channels: an ImageSet."""

    def __init__(self, samples: Tensor, viewer: nn.Module, device: str = "cpu") -> None:
        self.samples, self.viewer, self.device = samples, viewer.to(device), device

    def __len__(self) -> int:
        return len(self.samples)

    def traits(self) -> list[Any]:
        """Never the same twice."""
        return [id(self)]

    @torch.no_grad()
    def batches(self, size: int) -> Iterator[tuple[list[int], Tensor]]:
        """As of every ImageSet."""
        for first in range(0, len(self), size):
            rows = self.samples[first : first + size]
            pictures = self.viewer(rows.to(self.device))
            pictures = ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
            yield list(range(first, first + len(rows))), pictures.expand(-1, 3, -1, -1)


def judge_pictures(
    pictures: Path,
    judge: Judge | None,
    clip: str | None,
    prompts: Path | None,
    *,
    size: int | None = None,
    device: str = "cpu",
    say: Say = lambda line: None,
    show: Show = lambda what, done, total: None,
) -> dict[str, Any]:
    """What `pictures`, a folder or npz, are worth: against the judge's reference, and by CLIP against their prompts.

    num_samples counts those that could be read, `left_out` the broken ones. Raises DataError, ModelError.
    """
    images = open_set(pictures, size, say)
    lines = read_prompts(prompts, len(images)) if clip and prompts else []
    network = Clip(clip, device) if clip and prompts else None
    figures: dict[str, Any] = judge(images) if judge else {}
    if network:
        score = clip_score(images, lines, network, BATCH, lambda done: show("clip", done, len(images)))
        figures |= {"clip_score": score, "clip": clip}
    broken = len(images.broken) if isinstance(images, Folder) else 0
    return figures | {"num_samples": len(images) - broken, "left_out": broken}
