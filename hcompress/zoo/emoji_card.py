"""Write the card of `zoo:emoji-pixart`: loss curve, sample grid and quality figures, all measured here and now.

python -m hcompress.zoo.emoji_card --run runs/emoji-pixart --hardware "1 CPU core"
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hcompress.models.prompts import halves
from hcompress.report.quality import distribution, generate
from hcompress.setting import open_setting
from hcompress.zoo.card import save_loss_curve
from hcompress.zoo.emoji import load_emoji
from hcompress.zoo.train_emoji_pixart import (
    BATCH,
    CAPTION_DROPOUT,
    FOLDER,
    LEARNING_RATE,
    PROMPTS,
    STORED,
    TOKENS,
)
from hcompress.zoo.training import EMA_DECAY

SOLVER, STEPS, CFG, SAMPLES, SEED, COLUMNS = "dpm++", 20, 3.0, 256, 0, 8
SCORED = len(halves(PROMPTS)[1])

CARD = """# zoo:emoji-pixart

A text-to-image diffusion transformer on captioned emoji, in pixel space: PixArt's architecture and caching behaviour at
a size that trains on a laptop. Not for any use beyond testing and demonstrating compression methods.

![samples](samples.png)

The {scored} prompts of `prompts.txt` that are for scoring, DPM-Solver++(2M), {steps} steps, guidance {cfg},
seed {seed}, not selected. Columns 4 and 8 are of concepts that it was never shown.

| | |
|---|---|
| network | diffusers `PixArtTransformer2DModel`, {blocks} blocks, width {width}, patch 4 on 32 x 32 RGB, fp16 |
| parameters | {parameters:.2f} M |
| text | MiniLM-L6 token states (384 numbers each), {tokens} tokens; the null prompt is the empty one |
| predicts | velocity, cosine betas, 1000 timesteps |
| data | {drawings} drawings of {concepts} emoji in three styles; a tenth of all is held out, by a hash of code points |
| captions | `{{label}}, {{style}} style`; styles: noto, fluent, twemoji |
| command | `make zoo-emoji-pixart` |
| training | {trained} steps of {batch} images, AdamW {lr:g}, EMA {ema}, caption dropout {dropout:.0%}, bf16, seed 0 |
| hardware | {hardware} |
| licence | Apache-2.0; what it was trained on: [NOTICE.md](NOTICE.md) |

![loss](loss.png)

`prompts.safetensors` holds {prompts} captions of as many concepts as MiniLM's states, every fourth of a held-out
concept, and the null prompt. Fours take turns: with the first, third, ... four methods are trained, fitted and
calibrated; on the second, fourth, ... they are scored, so that none is scored on prompts that it learned from. Both
halves hold {scored} prompts, a fourth of them of held-out concepts. To ask for something else:

```
hcompress zoo fetch-data minilm
hcompress encode zoo:emoji-pixart "red apple, noto style" "sad robot, fluent style" --out asked.safetensors
hcompress generate zoo:emoji-pixart --solver dpm++ --cfg {cfg} --prompts asked.safetensors --out asked.png
```

A hash of code points holds out concepts, not ideas: "woman running" may be held out while "man running" is not.

## Quality

{samples} samples of the {scored} prompts for scoring, settings as above, by `python -m hcompress.zoo.emoji_card`. The
metrics are this project's own offline ones (see `../emoji-clip`); none of them is FID, KID or CLIP score. The floor is
real emoji.

| | samples | floor |
|---|---|---|
| emoji-CLIP | {emoji_clip:.1f} | {emoji_clip_floor:.1f} |
| retrieval among these prompts | {retrieval:.3f} | |
| FD-EffLite0 | {fd_efflite0:.2f} | {fd_efflite0_floor:.2f} |
| KID-EffLite0 x 1000 | {kid_efflite0:.2f} | {kid_efflite0_floor:.2f} |
"""


def main() -> None:
    """Generate, measure, draw, write."""
    from hcompress_runtime.images import png

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--hardware", required=True, help="what it was trained on, for people")
    args = parser.parse_args()
    emoji = load_emoji()
    setting = open_setting("zoo:emoji-pixart", SOLVER, STEPS, CFG)
    samples = generate(setting, SAMPLES, SEED)
    (FOLDER / "samples.png").write_bytes(png(samples[:SCORED].numpy(), columns=COLUMNS))
    trained = json.loads((args.run / STORED).read_text())["step"]
    config = setting.adapter.config()
    card = CARD.format(
        steps=STEPS,
        cfg=CFG,
        seed=SEED,
        samples=SAMPLES,
        prompts=PROMPTS,
        scored=SCORED,
        tokens=TOKENS,
        trained=trained,
        drawings=int((~emoji.held_out).sum()),
        concepts=len({*emoji.concepts[~emoji.held_out].tolist()}),
        blocks=config["num_layers"],
        width=config["num_attention_heads"] * config["attention_head_dim"],
        parameters=sum(p.numel() for p in setting.adapter.parameters()) / 1e6,
        batch=BATCH,
        lr=LEARNING_RATE,
        ema=EMA_DECAY,
        dropout=CAPTION_DROPOUT,
        hardware=args.hardware,
        **distribution(setting, samples),
    )
    save_loss_curve(args.run, FOLDER / "loss.png", "mean squared error of the velocity", trained)
    (FOLDER / "README.md").write_text(card)


if __name__ == "__main__":
    main()
