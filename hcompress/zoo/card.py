"""Write the card of a zoo model: loss curve, sample grid and quality figures, all measured here and now.

python -m hcompress.zoo.card fashion-dit --run runs/fashion-dit --hardware "2 CPU cores"
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hcompress.report.quality import distribution, generate
from hcompress.setting import open_setting
from hcompress.zoo.fashion import CLASSES
from hcompress.zoo.fashion_training import BATCH, LABEL_DROPOUT, LEARNING_RATE
from hcompress.zoo.training import EMA_DECAY, averaged

KINDS = {  # what it is, its network, a remark on the parameters, the solver
    "fashion-dit": (
        "diffusion transformer",
        "diffusers `DiTTransformer2DModel`",
        ", of which each block holds an equal copy of the embedder, as diffusers has it",
        "ddim",
    ),
    "fashion-uvit": (
        "U-ViT, a diffusion transformer with long skip connections,",
        "`UViT2DModel` of `hcompress.models.uvit_network`",
        "",
        "dpmsolver",
    ),
}
STEPS, CFG, SAMPLES, SEED, SHOWN = 20, 1.5, 500, 0, 60

CARD = """# zoo:{name}

A class-conditional {kind} on Fashion-MNIST, in pixel space: small enough to train on a laptop, real
enough to show what caching costs. Not for any use beyond testing and demonstrating compression methods.

![samples](samples.png)

Six samples of each class (columns), {solver}, {steps} steps, guidance {cfg}, seed {seed}, not selected.

| | |
|---|---|
| network | {network}, {blocks} blocks, width {width}, patch 4 on 28 x 28, fp16 |
| parameters | {parameters:.2f} M{remark} |
| predicts | noise, linear betas, 1000 timesteps; class {null} is the null class of classifier-free guidance |
| data | Fashion-MNIST, 60 000 training images (Xiao et al. 2017, MIT licence), Debian's `dataset-fashion-mnist` |
| command | `make zoo-{name}` |
| training | {trained} steps of {batch} images, AdamW {lr:g}, EMA {ema}, label dropout {dropout:.0%}, bf16, seed 0 |
| hardware | {hardware} |
| licence | Apache-2.0 |

![loss](loss.png)

## Quality

{samples} samples, {steps} {solver} steps, guidance {cfg}, seed {seed}, by `python -m hcompress.zoo.card {name}`. The
metrics are this project's own offline ones (see `../fashion-classifier`); none of them is FID or IS. The floor is real
images against real images.

| | samples | floor |
|---|---|---|
| FD-64 | {fd64:.2f} | {fd64_floor:.2f} |
| accuracy of the asked class | {accuracy:.3f} | |
| precision | {precision:.3f} | {precision_floor:.3f} |
| recall | {recall:.3f} | {recall_floor:.3f} |
"""


def save_loss_curve(run: Path, path: Path, what: str, last: int | None = None) -> None:
    """Draw the loss of `run`, which is `what`, up to step `last` into `path`."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    records = {(r := json.loads(line))["step"]: r["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()}
    figure, axes = pyplot.subplots(figsize=(7, 2.8), layout="constrained")
    shown = {step: loss for step, loss in records.items() if last is None or step <= last}
    axes.plot(list(shown), list(shown.values()))
    axes.set(xlabel="step", ylabel=what, yscale="log")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


def main() -> None:
    """Generate, measure, draw, write."""
    from hcompress_runtime.images import png

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=KINDS)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--hardware", required=True, help="what it was trained on, for people")
    args = parser.parse_args()
    kind, network, remark, solver = KINDS[args.name]
    folder = Path(__file__).parent / args.name
    setting = open_setting(f"zoo:{args.name}", solver, STEPS, CFG)
    samples = generate(setting, SAMPLES, SEED)
    _, trained = averaged(args.run)
    save_loss_curve(args.run, folder / "loss.png", "mean squared error of the noise", trained)
    (folder / "samples.png").write_bytes(png(samples[:SHOWN].numpy(), columns=10))
    config = setting.adapter.config()
    card = CARD.format(
        name=args.name,
        kind=kind,
        network=network,
        remark=remark,
        solver=solver,
        steps=STEPS,
        cfg=CFG,
        seed=SEED,
        samples=SAMPLES,
        trained=trained,
        blocks=config["num_layers"],
        width=config["num_attention_heads"] * config["attention_head_dim"],
        parameters=sum(p.numel() for p in setting.adapter.parameters()) / 1e6,
        null=len(CLASSES),
        batch=BATCH,
        lr=LEARNING_RATE,
        ema=EMA_DECAY,
        dropout=LABEL_DROPOUT,
        hardware=args.hardware,
        **distribution(setting, samples),
    )
    (folder / "README.md").write_text(card)


if __name__ == "__main__":
    main()
