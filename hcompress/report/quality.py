"""How good a schedule's samples are, and what they cost: the rows of every comparison.

Paired figures compare each sample with the uncached one from the same noise: no sampling error, and no network but the
model's own VAE, by which latents are looked at.
Distribution figures are the model's own offline metrics (hcompress.metrics), each beside its real-vs-real floor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hcompress.corrections import Corrections
from hcompress.errors import missing
from hcompress.lowbit.artefact import network_bytes
from hcompress.metrics import emoji, fashion
from hcompress.metrics.paired import WINDOW, psnr_db, relative_l2, ssim
from hcompress.models.decoder import load_viewer
from hcompress.quantize import Quantized
from hcompress.sampling import sample_seeded
from hcompress.schedule import Schedule
from hcompress.setting import Setting
from hcompress.zoo import emoji_clip
from hcompress_runtime.conditions import Given

DECODED = 8  # latents at once
PART = 256  # samples whose prompts, up to 2 MB each, are held at once
COUNTS = {  # fewest and most samples that the metrics of a zoo model's data take
    "fashion": (fashion.MIN_SAMPLES, fashion.MAX_SAMPLES),
    "emoji": (emoji.MIN_SAMPLES, emoji.MAX_SAMPLES),
}
WITH_CACHE = (
    "dense float",
    "cached float",
    "dense quantized",
    "cached quantized, the float model's schedule",
    "cached quantized, its own schedule",
)

Told = Callable[[int], None]
"""Is told how many samples are done."""


def in_parts(
    setting: Setting, count: int, draw: Callable[[Given, int, Told], Tensor], progress: Told, size: int = PART
) -> Tensor:
    """`count` samples [count, C, H, W] of balanced conditions, `size` after `size`: so many prompts are held at once.

    draw: (conditions, number of the first, progress of this part) -> samples
    """
    parts = []
    for first in range(0, count, size):
        given = setting.adapter.even_conditions(min(size, count - first), first)
        parts.append(draw(given, first, partial(lambda before, done: progress(before + done), first)))
    return torch.cat(parts)


def generate(
    setting: Setting,
    count: int,
    seed: int,
    compute: NDArray[np.bool_] | None = None,
    progress: Told = lambda done: None,
    corrections: Corrections | None = None,
) -> Tensor:
    """`count` samples [count, C, H, W] of balanced labels from the streams 0 .. count-1 of `seed`; None = uncached."""

    def draw(given: Given, first: int, progress: Told) -> Tensor:
        reuse: dict[str, Any] = {"compute": compute, "corrections": corrections}
        run: dict[str, Any] = {"seed": seed, "cfg": setting.cfg, "first": first, "progress": progress}
        return sample_seeded(setting.adapter, setting.table, given, **run, **reuse)

    return in_parts(setting, count, draw, progress)


def paired(setting: Setting, samples: Tensor, reference: Tensor) -> dict[str, float]:
    """psnr_db and ssim of pictures, relative_l2 of samples [N, C, h, w], against the uncached `reference`.

    Latents are decoded to pictures first; where no VAE came with the model they have no psnr_db and no ssim: the range
    of both is [-1, 1], and latents know none. Pictures below 11 x 11 have no ssim.
    """
    distance = relative_l2(samples, reference)
    viewer = load_viewer(setting.model.folder, samples.shape[1])
    figures = {} if viewer is None else _of_pictures(viewer, setting.adapter.device, samples, reference)
    return figures | {"relative_l2": distance}


def distribution(setting: Setting, samples: Tensor) -> dict[str, float]:
    """The offline metrics of the model's data with their floors; empty where there are none, see `left_out`."""
    data = _data(setting)
    if data is None or left_out(setting, len(samples)):
        return {}
    asked = setting.adapter.even_conditions(len(samples))
    measured: fashion.FashionMetrics | emoji.EmojiMetrics
    if isinstance(asked, Mapping):
        states, mask = (torch.from_numpy(np.array(asked[name])) for name in ("prompt_embeds", "prompt_mask"))
        measured = emoji.emoji_metrics(samples, states, mask)
    else:
        measured = fashion.fashion_metrics(samples, torch.tensor(asked))
    return {name: value for name, value in vars(measured).items() if name != "num_samples"}


def left_out(setting: Setting, count: int) -> str | None:
    """Why `distribution` of `count` samples will be empty although the model has offline metrics; None: it will not."""
    data = _data(setting)
    if data is None:
        return None
    if data == "emoji" and not emoji_clip.installed():
        return f"emoji metrics are left out: {missing('efficientnet-lite-pytorch', 'zoo')}"
    least, most = COUNTS[data]
    if least <= count <= most:
        return None
    return f"{data} metrics are left out: they need {least} to {most} samples, got {count}"


def cost(setting: Setting, compute: NDArray[np.bool_]) -> dict[str, float]:
    """cur, macs of one sample (guidance counted twice) and mac_ratio, dense over cached."""
    graph = setting.adapter.graph
    passes = 1 if setting.cfg == 1.0 else 2
    return {
        "cur": float(1 - compute.mean()),
        "macs": passes * graph.total_macs(compute),
        "mac_ratio": graph.mac_ratio(compute),
    }


def evaluate(
    setting: Setting,
    schedule: Schedule | None,
    count: int,
    seed: int,
    progress: Callable[[str, int], None] = lambda what, done: None,
    published: Callable[[Tensor, str], dict[str, float]] = lambda samples, what: {},
) -> dict[str, Any]:
    """One schedule against the uncached model: {"cached": {...}, "uncached": {...}, "num_samples", "seed"}.

    Without a schedule there is no "cached". published: more metrics of samples [count, C, h, w].
    """
    reference = generate(setting, count, seed, None, lambda done: progress("uncached", done))
    everything = np.ones((setting.table.num_calls, len(setting.adapter.graph)), np.bool_)
    uncached = distribution(setting, reference) | published(reference, "uncached") | cost(setting, everything)
    result: dict[str, Any] = {"uncached": uncached, "num_samples": count, "seed": seed}
    if schedule is None:
        return result
    compute = schedule.compute
    samples = generate(setting, count, seed, compute, lambda done: progress("cached", done), schedule.corrections)
    cached = distribution(setting, samples) | published(samples, "cached") | cost(setting, compute)
    return {"cached": paired(setting, samples, reference) | cached} | result


def against_float(
    dense: Setting,
    quantized: Setting,
    count: int,
    seed: int,
    progress: Callable[[str, int], None] = lambda what, done: None,
) -> dict[str, Any]:
    """A model in few bits against the one it came from: {"float": {...}, "quantized": {...}, "num_samples", "seed"}.

    megabytes: of the network's weights as a bundle holds them
    """
    reference = generate(dense, count, seed, None, lambda done: progress("float", done))
    samples = generate(quantized, count, seed, None, lambda done: progress("quantized", done))
    return {
        "float": distribution(dense, reference) | {"megabytes": network_bytes(dense.adapter) / 1e6},
        "quantized": paired(quantized, samples, reference)
        | distribution(dense, samples)
        | {"megabytes": network_bytes(quantized.adapter) / 1e6},
        "num_samples": count,
        "seed": seed,
    }


def against_original(
    original: Setting,
    changed: Setting,
    count: int,
    seed: int,
    progress: Callable[[str, int], None] = lambda what, done: None,
) -> dict[str, Any]:
    """A pruned model against the one it came from: {"original": {...}, "pruned": {...}, "num_samples", "seed"}."""
    reference = generate(original, count, seed, None, lambda done: progress("original", done))
    samples = generate(changed, count, seed, None, lambda done: progress("pruned", done))
    return {
        "original": distribution(original, reference),
        "pruned": paired(changed, samples, reference) | distribution(changed, samples),
        "num_samples": count,
        "seed": seed,
    }


def rows_with_cache(made: Quantized) -> tuple[str, ...]:
    """WITH_CACHE's, without the last where the float model's schedule was kept unasked and nothing was refreshed."""
    return WITH_CACHE if made.first is not made.quantized else WITH_CACHE[:-1]


def with_cache(
    made: Quantized,
    given: Schedule,
    count: int,
    seed: int,
    progress: Callable[[str, int], None] = lambda what, done: None,
) -> dict[str, Any]:
    """Rounding and reuse, alone and together, each against the float model's uncached samples: `rows_with_cache`.

    given: the float model's schedule. Under it, and uncached, the quantized model is the one that was distilled under
    it; under its own schedule it is the one that was refreshed.
    """
    assert made.schedule is not None and made.first is not None
    everything = np.ones_like(given.compute)
    settings = (made.dense, made.dense, made.first, made.first, made.quantized)
    masks = (everything, given.compute, everything, given.compute, made.schedule.compute)
    reference, rows = None, {}
    for name, setting, mask in zip(rows_with_cache(made), settings, masks, strict=False):
        compute = None if mask.all() else mask
        samples = generate(setting, count, seed, compute, partial(progress, name))
        reference = samples if reference is None else reference
        rows[name] = (paired(setting, samples, reference) if name != WITH_CACHE[0] else {}) | cost(setting, mask)
        rows[name] |= distribution(setting, samples)
        rows[name]["megabytes"] = network_bytes(setting.adapter) / 1e6
    return {"rows": rows, "num_samples": count, "seed": seed}


@torch.no_grad()
def _of_pictures(viewer: nn.Module, device: torch.device, samples: Tensor, reference: Tensor) -> dict[str, float]:
    """psnr_db and ssim of what `viewer` makes of both, on `device`."""
    totals: dict[str, float] = {}
    viewer.to(device)
    for pair in zip(samples.split(DECODED), reference.split(DECODED), strict=True):
        ours, theirs = (viewer(one.to(device)).float().clamp(-1, 1) for one in pair)
        figures = {"psnr_db": psnr_db(ours, theirs)}
        if min(ours.shape[-2:]) >= WINDOW:
            figures["ssim"] = ssim(ours, theirs)
        for name, mean in figures.items():
            totals[name] = totals.get(name, 0.0) + mean * len(ours)
    return {name: total / len(samples) for name, total in totals.items()}


def _data(setting: Setting) -> str | None:
    """Which of COUNTS the model was trained on."""
    return next((data for data in COUNTS if (setting.model.zoo or "").startswith(f"zoo:{data}")), None)
