"""Train `zoo:fashion-classifier`, the network behind the Fashion-MNIST metrics, and store it with its reference.

    python -m hcompress.zoo.train_fashion_classifier          # writes hcompress/zoo/fashion-classifier

Cost: about three minutes on one CPU core, which is all it uses; the same seed gives the same bytes. 500 images of each
class of the training split are held out: their features are real, unseen by the classifier and disjoint from the test
set, so they give the real-vs-real floor of every metric. No augmentation: a mirrored shoe or a shifted shirt is an
error of a generator and must cost something.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from hcompress.zoo.fashion import load_fashion
from hcompress.zoo.fashion_classifier import FOLDER, NUM_CLASSES, FashionClassifier, load_classifier

BATCH, LEARNING_RATE, WEIGHT_DECAY = 256, 5e-3, 1e-2
NUM_THREADS = 1  # the sums are then taken in the same order however many cores there are
HELDOUT_PER_CLASS, REFERENCE_PER_CLASS, NUM_IMAGES = 500, 500, 200


def balanced(labels: Tensor, per_class: int) -> Tensor:
    """Indices int64[10 * per_class] of the first `per_class` images of every class; entry i is of class i % 10."""
    columns = [torch.nonzero(labels == c).flatten()[:per_class] for c in range(NUM_CLASSES)]
    return torch.stack(columns, dim=1).flatten()


def train(images: Tensor, labels: Tensor, epochs: int, seed: int) -> FashionClassifier:
    """Cross-entropy, AdamW, one cycle of the learning rate (Smith and Topin 2018)."""
    torch.manual_seed(seed)
    torch.set_num_threads(NUM_THREADS)
    classifier = FashionClassifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    per_epoch = len(images) // BATCH
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * per_epoch)
    started = time.monotonic()
    for epoch in range(epochs):
        total = 0.0
        for index in torch.randperm(len(images))[: per_epoch * BATCH].view(per_epoch, BATCH):
            loss = functional.cross_entropy(classifier(images[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()
            total += loss.item()
        print(
            f"epoch {epoch + 1}/{epochs}  loss {total / per_epoch:.4f}  {time.monotonic() - started:.0f} s", flush=True
        )
    return classifier.eval()


@torch.no_grad()
def features(classifier: FashionClassifier, images: Tensor) -> Tensor:
    """Features [n, 64] of images [n, 1, 28, 28]."""
    return torch.cat([classifier.features(batch) for batch in images.split(500)])


def store(classifier: FashionClassifier, folder: Path) -> None:
    """Write the weights as fp16; the reference is then taken from what was stored."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.half() if v.is_floating_point() else v for k, v in classifier.state_dict().items()}
    save_file(weights, folder / "model.safetensors")


def main() -> None:
    """Train, store, measure, and store what real images look like."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=FOLDER)
    args = parser.parse_args()

    images, labels = (torch.from_numpy(array) for array in load_fashion("train"))
    heldout = balanced(labels, HELDOUT_PER_CLASS)
    kept = torch.ones(len(labels), dtype=torch.bool)
    kept[heldout] = False
    store(train(images[kept], labels[kept], args.epochs, args.seed), args.out)
    classifier = load_classifier(args.out)

    test_images, test_labels = (torch.from_numpy(array) for array in load_fashion("t10k"))
    test_features, heldout_features = features(classifier, test_images), features(classifier, images[heldout])
    for name, seen, asked in (("test", test_features, test_labels), ("held-out", heldout_features, labels[heldout])):
        accuracy = (classifier.head(seen).argmax(dim=1) == asked).double().mean()
        print(f"accuracy on {len(asked)} {name} images: {accuracy:.4f}")
    chosen = balanced(test_labels, REFERENCE_PER_CLASS)
    reference = {
        "mean": test_features.double().mean(dim=0),
        "covariance": test_features.double().T.cov(),
        "features": test_features[chosen].half(),
        "heldout_features": heldout_features.half(),
        "images": ((test_images[chosen[:NUM_IMAGES], 0] + 1) * 127.5).round().byte(),
    }
    save_file(reference, args.out / "reference.safetensors")
    for path in sorted(args.out.glob("*.safetensors")):
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
