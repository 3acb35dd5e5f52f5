"""Train emoji-CLIP, the network that tells whether an emoji shows what was asked for, and store it with its reference.

    hcompress zoo fetch-data emoji minilm && pip install 'hcompress[zoo]'
    python -m hcompress.zoo.train_emoji_clip          # writes hcompress/zoo/emoji-clip

Cost: two minutes on one CPU core, most of it for the features of the images; both networks are frozen and only the two
linear heads learn, by the symmetric InfoNCE of CLIP (Radford et al. 2021, figure 3). The concepts that it is not shown
are those that `zoo:emoji-pixart` is not shown either.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from hcompress.text_encoder import TextEncoder
from hcompress.zoo import data_folder
from hcompress.zoo.emoji import STYLES, Emoji, load_emoji
from hcompress.zoo.emoji_clip import COMPONENTS, FOLDER, EmojiClip, image_features, load_clip, load_efflite0, sentences

TOKENS = 20
EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY, DROPOUT = 40, 512, 2e-3, 0.1, 0.2
FLOOR_CONCEPTS = 700  # of all: enough for 2 000 images
NUM_THREADS = 1  # the sums are then taken in the same order however many cores there are


def train(images: Tensor, texts: Tensor, seed: int) -> EmojiClip:
    """Heads for image features [n, 1280] and sentences [n, 384], row i of one belonging to row i of the other."""
    torch.manual_seed(seed)
    clip = EmojiClip()
    optimizer = torch.optim.AdamW(clip.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    per_epoch = len(images) // BATCH
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=EPOCHS * per_epoch)
    own = torch.arange(BATCH)
    for epoch in range(EPOCHS):
        total = 0.0
        for index in torch.randperm(len(images))[: per_epoch * BATCH].view(per_epoch, BATCH):
            shown = clip.image(functional.dropout(images[index], DROPOUT))
            named = clip.text(functional.dropout(texts[index], DROPOUT))
            logits = clip.log_scale.exp() * shown @ named.T
            loss = (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()
            total += loss.item()
        if (epoch + 1) % 10 == 0:
            print(f"epoch {epoch + 1}/{EPOCHS}  loss {total / per_epoch:.4f}", flush=True)
    return clip.eval().requires_grad_(False)


@torch.no_grad()
def retrieval(clip: EmojiClip, images: Tensor, texts: Tensor, ranks: tuple[int, ...] = (1, 10)) -> list[float]:
    """Share of images whose own caption is among the nearest 1, 10 of all captions given."""
    similarity = clip.image(images) @ clip.text(texts).T
    better = (similarity > similarity.diagonal()[:, None]).sum(dim=1)
    return [float((better < rank).double().mean()) for rank in ranks]


def principal_axes(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and the COMPONENTS principal axes [D, COMPONENTS] of features [n, D], the widest first."""
    mean = features.double().mean(dim=0)
    _, vectors = torch.linalg.eigh(features.double().T.cov())
    return mean.float(), vectors.flip(1)[:, :COMPONENTS].float().contiguous()


def halves(emoji: Emoji) -> tuple[Tensor, Tensor]:
    """Indices of the reference images and of those for the floor, which share no concept; each in random order."""
    rng = np.random.default_rng(0)
    floor = np.isin(emoji.concepts, rng.permutation(np.unique(emoji.concepts))[:FLOOR_CONCEPTS])
    first, second = (torch.from_numpy(rng.permutation(np.flatnonzero(half))) for half in (~floor, floor))
    return first, second


def main() -> None:
    """Train, store, measure, and store what real emoji look like."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=FOLDER)
    args = parser.parse_args()
    torch.set_num_threads(NUM_THREADS)

    emoji = load_emoji()
    states, mask = TextEncoder(data_folder() / "minilm").states(emoji.captions, TOKENS)
    texts = sentences(torch.from_numpy(states), torch.from_numpy(mask))
    pixels = torch.from_numpy(emoji.images).permute(0, 3, 1, 2).float() / 127.5 - 1
    images = image_features(load_efflite0(), pixels)
    held_out, styles = torch.from_numpy(emoji.held_out), torch.from_numpy(emoji.styles)

    args.out.mkdir(parents=True, exist_ok=True)
    trained = train(images[~held_out], texts[~held_out], args.seed)
    save_file({name: weight.half() for name, weight in trained.state_dict().items()}, args.out / "model.safetensors")
    clip = load_clip(args.out)
    for style, name in enumerate(STYLES):
        here = held_out & (styles == style)
        first, tenth = retrieval(clip, images[here], texts[here])
        print(f"{name}: of {int(here.sum())} held-out captions the own is nearest {first:.1%}, in ten {tenth:.1%}")

    reference, floor = halves(emoji)
    mean, axes = principal_axes(images[reference])
    scores = (clip.image(images) * clip.text(texts)).sum(dim=1)
    stored = {
        "mean": mean,
        "components": axes,
        "reference": ((images[reference] - mean) @ axes).half(),
        "floor": ((images[floor] - mean) @ axes).half(),
        "clip": scores[held_out],
    }
    save_file(stored, args.out / "reference.safetensors")
    explained = stored["reference"].float().var(dim=0).sum() / images[reference].var(dim=0).sum()
    print(f"{len(reference)} reference images, {len(floor)} for the floor; {COMPONENTS} axes hold {explained:.1%}")
    print(
        f"emoji-CLIP of real images: {100 * scores[held_out].mean():.1f} held out, {100 * scores[~held_out].mean():.1f}"
    )
    for path in sorted(args.out.glob("*.safetensors")):
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
