"""Real images for the methods that need them: a folder of anybody's, or the data of a zoo model.

A folder may hold images directly, which then have no class, or one sub-folder a class: named by the class's number, or
as many as there are classes, in alphabetical order (torchvision's ImageFolder). A text model reads the captions beside
them (hcompress.captions). Images are cut and scaled to the model's size (ADM's centre crop). A file that cannot be read
is named, counted, and replaced by the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hcompress.adapter import Told
from hcompress.caching.problem import TRAINING_STREAMS
from hcompress.captions import Prompt, caption_of, encode_captions, reads_captions
from hcompress.errors import DataError
from hcompress.models.decoder import Encoder, load_encoder
from hcompress.models.loading import ZOO
from hcompress.models.prompts import halves
from hcompress.pictures import SUFFIXES, UNREADABLE, picture_files, read_picture
from hcompress.setting import Setting
from hcompress.zoo.emoji import load_emoji
from hcompress.zoo.fashion import read_fashion
from hcompress_runtime.noise import gaussian

FLIP, LATENT_DRAW = 2, 1  # uses of chance, beside those of caching.problem and learning_to_cache


class Source(Protocol):
    """Pictures of one size, by number."""

    def __len__(self) -> int:
        """How many there are."""

    def picture(self, index: int) -> NDArray[np.float32]:
        """float32[C, H, W] in [-1, 1]. Raises one of UNREADABLE."""

    def name(self, index: int) -> str:
        """For people."""

    def label(self, index: int) -> int | str | None:
        """Its class or its caption, None where neither is known."""


@final
@dataclass(frozen=True)
class Arrays:
    """Pictures uint8[n, C, H, W] and their classes int64[n] or captions, where they have any, in memory.

    Samples of another range are float32, and are given as they are.
    """

    pixels: NDArray[np.uint8] | NDArray[np.float32]
    labels: NDArray[np.int64] | Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def picture(self, index: int) -> NDArray[np.float32]:
        """float32[C, H, W]."""
        pixels = self.pixels[index].astype(np.float32)
        return pixels / 127.5 - 1 if self.pixels.dtype == np.uint8 else pixels

    def name(self, index: int) -> str:
        """Its number."""
        return f"image {index}"

    def label(self, index: int) -> int | str | None:
        """Its class or its caption."""
        label = None if self.labels is None else self.labels[index]
        return label if isinstance(label, str) or label is None else int(label)


def _emoji() -> Arrays:
    """The emoji of a training, but for those whose captions are prompts that the model is scored on."""
    found = load_emoji()
    prompts = (ZOO / "emoji-pixart" / "prompts.txt").read_text("utf-8").splitlines()
    scored = {prompts[number] for number in halves(len(prompts))[1]}
    shown = found.where(~found.held_out & [caption not in scored for caption in found.captions])
    return Arrays(shown.images.transpose(0, 3, 1, 2), shown.captions)


# What a zoo model was trained on.
ZOO_DATA: dict[str, Callable[[], Source]] = {
    "zoo:fashion-dit": lambda: Arrays(*read_fashion("train")),
    "zoo:fashion-uvit": lambda: Arrays(*read_fashion("train")),
    "zoo:emoji-pixart": _emoji,
}


@final
class Folder:
    """The images in a folder and all below it.

    size: of a picture's sides; channels: 1 or 3; classes: of the model, None where it knows no labels
    captioned: whether the captions beside the images are read

    Raises DataError where there are none, sub-folders that do not fit the classes, or captions that are no text.
    """

    def __init__(self, folder: Path, size: int, channels: int, classes: int | None, *, captioned: bool = False) -> None:
        self.size, self.mode = size, "L" if channels == 1 else "RGB"
        if not folder.is_dir():
            raise DataError(f"no folder {folder}; pass --images a folder that holds images")
        self.files = picture_files(folder)
        if not self.files:
            raise DataError(f"{folder} holds no images ({', '.join(sorted(SUFFIXES))}); pass another --images")
        groups = {file.relative_to(folder).parts[0] for file in self.files if file.parent != folder}
        self.labels: Sequence[int | str | None] = [caption_of(file) if captioned else None for file in self.files]
        if classes is not None and groups:
            numbers = _class_numbers(sorted(groups), classes, folder)
            self.labels = [numbers.get(file.relative_to(folder).parts[0]) for file in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def picture(self, index: int) -> NDArray[np.float32]:
        """float32[C, size, size]."""
        pixels = read_picture(self.files[index], self.mode, self.size).astype(np.float32)
        return pixels.transpose(2, 0, 1) / 127.5 - 1.0

    def name(self, index: int) -> str:
        """Its path."""
        return str(self.files[index])

    def label(self, index: int) -> int | str | None:
        """The number of its sub-folder's class, or its caption."""
        return self.labels[index]


@final
class ImageStream:
    """A source as Images of hcompress.caching: shuffled anew for each epoch, mirrored by chance, encoded to latents.

    captions: what a text encoder made of each that the source has, and of None, which is the null prompt
    """

    def __init__(
        self,
        source: Source,
        seed: int,
        encoder: Encoder | None,
        device: torch.device,
        on_broken: Callable[[str], object] = lambda line: None,
        captions: Mapping[str | None, Prompt] | None = None,
    ) -> None:
        self.source, self.seed, self.encoder, self.device = source, seed, encoder, device
        self.captions = captions or {}
        self.broken: list[str] = []
        self.on_broken = on_broken
        self._epoch, self._order = -1, np.empty(0, np.int64)

    @property
    def count(self) -> int:
        """How many different images there are."""
        return len(self.source)

    def batch(self, first: int, count: int, *, flip: bool) -> tuple[Tensor, list[Told]]:
        """Images `first` .. as samples [count, C, H, W], and the class or prompt of each, None where it has neither."""
        streams = range(TRAINING_STREAMS + first, TRAINING_STREAMS + first + count)
        pictures: list[NDArray[np.float32]] = []
        told: list[Told] = []
        for number, stream in enumerate(streams, start=first):
            picture, label = self._readable(number)
            chance = np.random.Generator(np.random.Philox(key=(self.seed, stream), counter=(0, 0, FLIP, 0)))
            pictures.append(picture[:, :, ::-1] if flip and chance.random() < 0.5 else picture)
            told.append(label if isinstance(label, int) else self.captions.get(label))
        samples = torch.from_numpy(np.stack(pictures)).to(self.device)
        if self.encoder is not None:
            samples = self.encoder(samples, lambda shape: gaussian(self.seed, streams, shape, draw=LATENT_DRAW))
        return samples, told

    def _readable(self, number: int) -> tuple[NDArray[np.float32], int | str | None]:
        """Image `number` of the endless order, or the next that can be read."""
        total = len(self.source)
        epoch, at = divmod(number, total)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(total)
        for later in range(total):
            index = int(self._order[(at + later) % total])
            try:
                return self.source.picture(index), self.source.label(index)
            except UNREADABLE as error:
                name = self.source.name(index)
                if name not in self.broken:
                    self.broken.append(name)
                    self.on_broken(f"{name} cannot be read ({type(error).__name__}): skipped")
        raise DataError(f"none of {total} images can be read; the first is {self.source.name(0)}")


def open_images(
    setting: Setting, seed: int, folder: str | None, on_notice: Callable[[str], object] = lambda line: None
) -> ImageStream:
    """The images in `folder`, or the zoo data of the setting's model, as samples of it.

    on_notice: told of images that cannot be read or have no caption, and of what takes its time

    Raises DataError, and what `encode_captions` raises.
    """
    model, adapter = setting.model, setting.adapter
    source, encoder = _source(setting, folder)
    captions: dict[str | None, Prompt] = {}
    if reads_captions(adapter):
        labels = [source.label(index) for index in range(len(source))]
        captions = encode_captions(model, [label for label in labels if isinstance(label, str)], on_notice)
        if without := labels.count(None):
            on_notice(f"{without} of {len(labels)} images have no caption (NAME.txt): they train the null prompt")
    elif "prompt_embeds" in adapter.conditions:
        on_notice(f"{model.name} is told more of a prompt than captions give: its images train the null prompt")
    return ImageStream(source, seed, encoder, adapter.device, on_notice, captions)


def _source(setting: Setting, folder: str | None) -> tuple[Source, Encoder | None]:
    """The pictures, and what makes latents of them."""
    model, adapter = setting.model, setting.adapter
    if folder is None:
        if model.zoo not in ZOO_DATA:
            raise DataError(f"{model.name} comes with no images; pass --images FOLDER, what it was trained on or alike")
        return ZOO_DATA[model.zoo](), None
    encoder = load_encoder(model.folder)
    channels, size, _ = adapter.sample_shape
    if encoder is not None:
        encoder.to(adapter.device)
        channels, size = 3, size * encoder.scale_down
    labels = adapter.conditions.get("labels")
    classes, captioned = labels.classes if labels else None, reads_captions(adapter)
    return Folder(Path(folder), size, channels, classes, captioned=captioned), encoder


def _class_numbers(groups: Sequence[str], classes: int, folder: Path) -> dict[str, int]:
    """The class of each sub-folder."""
    if all(name.isdecimal() and int(name) < classes for name in groups):
        return {name: int(name) for name in groups}
    if len(groups) == classes:
        return {name: number for number, name in enumerate(groups)}
    raise DataError(
        f"{folder} has {len(groups)} sub-folders ({groups[0]}, ...) but this model has {classes} classes; name them by "
        f"number, 0 to {classes - 1}, or put the images into {folder} itself to train without classes"
    )
