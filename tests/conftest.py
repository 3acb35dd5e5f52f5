"""Tiny models that every test may use, and one bundle that the deployment tests share.

The model: DiT, 2 blocks of width 32, 16 tokens, 2x8x8 samples, 5 classes. Its weights are random and nothing is
zero-initialised, so every branch moves the samples; the last layer is small, so samples stay of the order of 1.
A PixArt of much the same size stands for text: 5 tokens of width 10, 3 prompts of its own. A Stable Diffusion 3 and a
FLUX stand for joint attention: the same text, and a pooled vector of width 6; a U-ViT for long skips.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from hcompress.adapter import Adapter
    from hcompress.caching.problem import Method, Problem
    from hcompress.corrections import Corrections
    from hcompress.schedule import Identity, Schedule
    from hcompress_runtime.table import SolverTable

CALLS, CFG = 5, 1.5


def make_dit(
    num_layers: int = 2, *, one_embedder: bool = True, channels: int = 2, out_channels: int | None = None, seed: int = 0
) -> Adapter:
    """The tiny model; with `one_embedder` all blocks hold equal copies of one, as diffusers stores trained DiTs."""
    import copy

    import torch
    from diffusers import DiTTransformer2DModel

    from hcompress.models.dit import DiT

    network = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=channels,
        out_channels=out_channels or channels,
        num_layers=num_layers,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=5,
        norm_type="ada_norm_zero",
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        std = 0.01 if name.startswith("proj_out_2") else 0.1
        torch.nn.init.normal_(parameter, std=std, generator=generator)
    if one_embedder:
        for block in network.transformer_blocks:
            block.norm1.emb = copy.deepcopy(network.transformer_blocks[0].norm1.emb)
    return DiT(network)


def make_pixart(
    num_layers: int = 2, *, channels: int = 2, out_channels: int = 4, own: bool = True, seed: int = 0, **config: object
) -> Adapter:
    """The tiny text-conditional model; `own`: with prompts of its own. It guesses a variance unless told otherwise."""
    from diffusers import PixArtTransformer2DModel

    from hcompress.models.pixart import PixArt

    shape = {"num_attention_heads": 2, "attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": 10}
    shape |= {"in_channels": channels, "out_channels": out_channels, "num_layers": num_layers, "sample_size": 8}
    network = PixArtTransformer2DModel(**shape | config)
    _draw(network, seed, wide=0.3)
    return PixArt(network, make_prompts(3) if own else None, tokens=5)


def make_sd3(num_layers: int = 2, *, channels: int = 2, own: bool = True, seed: int = 0, **config: object) -> Adapter:
    """The tiny model of joint attention, for flow matching; `own`: with prompts of its own."""
    from diffusers import SD3Transformer2DModel

    from hcompress.models.sd3 import SD3

    shape = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "caption_projection_dim": 24,
        "joint_attention_dim": 10,
    }
    shape |= {"pooled_projection_dim": 6, "in_channels": channels, "out_channels": channels, "num_layers": num_layers}
    shape |= {"sample_size": 8, "pos_embed_max_size": 6}
    network = SD3Transformer2DModel(**shape | config)
    _draw(network, seed)
    return SD3(network, make_pooled_prompts(3) if own else None, tokens=5)


def make_flux(num_layers: int = 1, *, own: bool = True, null: bool = True, seed: int = 0, **config: object) -> Adapter:
    """The tiny model of double- and single-stream blocks; `null`: with a null prompt among those of its `own`."""
    from diffusers import FluxTransformer2DModel

    from hcompress.models.flux import Flux

    shape = {"num_attention_heads": 2, "attention_head_dim": 12, "axes_dims_rope": (4, 4, 4), "joint_attention_dim": 10}
    shape |= {"pooled_projection_dim": 6, "in_channels": 8, "num_layers": num_layers, "num_single_layers": 2}
    network = FluxTransformer2DModel(**shape | config)
    _draw(network, seed)
    prompts = {name: array for name, array in make_pooled_prompts(3).items() if null or "null" not in name}
    return Flux(network, prompts if own else None, tokens=5, side=8)


def _draw(network: object, seed: int, wide: float = 0.2) -> None:
    """Weights that let every branch move the output; the last layer is small."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        std = 0.02 if name.startswith("proj_out") else wide
        torch.nn.init.normal_(parameter, std=std, generator=generator)


def make_uvit(num_layers: int = 3, *, channels: int = 2, seed: int = 0, **config: object) -> Adapter:
    """The tiny U-ViT, with long skips, of much the same size and 5 classes."""
    import torch

    from hcompress.models.uvit import UViT
    from hcompress.models.uvit_network import UViT2DModel

    shape = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": channels, "num_layers": num_layers}
    network = UViT2DModel(**shape | {"sample_size": 8, "patch_size": 2, "num_classes": 5} | config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        std = 0.02 if name.startswith(("decoder_pred", "final_layer.bias")) else 0.2
        torch.nn.init.normal_(parameter, std=std, generator=generator)
    return UViT(network)


def make_prompts(count: int, *, tokens: int = 5, width: int = 10, seed: int = 0) -> dict[str, np.ndarray]:
    """What a prompts file holds: `count` prompts of different lengths, and a null prompt of one token."""
    random = np.random.default_rng(seed)
    return {
        "prompt_embeds": random.standard_normal((count, tokens, width), np.float32),
        "prompt_mask": np.arange(tokens) < 2 + np.arange(count)[:, None] % (tokens - 1),
        "null_embeds": random.standard_normal((1, tokens, width), np.float32),
        "null_mask": np.arange(tokens)[None] < 1,
    }


def make_pooled_prompts(count: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """The same for a model of joint attention: no masks, and a pooled vector of width 6."""
    random = np.random.default_rng(seed)
    prompts = {name: array for name, array in make_prompts(count, seed=seed).items() if "mask" not in name}
    pooled = {"pooled_prompt_embeds": (count, 6), "pooled_null_embeds": (1, 6)}
    return prompts | {name: random.standard_normal(shape, np.float32) for name, shape in pooled.items()}


def make_table(solver: str = "ddim", calls: int = CALLS) -> tuple[SolverTable, dict[str, str | int]]:
    """A solver at `calls` steps, and its identity."""
    from hcompress.solver import make_scheduler, probe, solver_identity

    config = {"shift": 3.0} if solver.startswith("flow") else {"beta_schedule": "linear", "clip_sample": False}
    scheduler = make_scheduler(solver, config)
    return probe(scheduler, calls), solver_identity(scheduler, calls)


def save_vae(folder: Path) -> None:
    """The VAE of a tiny latent model in `folder`/vae: 4 x h x w latents, 3 x 2h x 2w pictures."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    shape = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4, "scaling_factor": 0.5}
    AutoencoderKL(**shape, **kinds).save_pretrained(folder / "vae")


LONG_SKIPS = ("in.0", "in.1", "mid", "out.0", "out.1")


def make_skipping_dit() -> Adapter:
    """A tiny DiT that guesses a variance, its blocks called like those of a network with long skips."""
    from hcompress.branches import BranchGraph

    adapter = make_dit(num_layers=len(LONG_SKIPS), out_channels=4)
    graph, names = adapter.graph, [f"{block}.{kind}" for block in LONG_SKIPS for kind in ("attn", "mlp")]
    renamed = tuple(replace(branch, name=name) for branch, name in zip(graph.branches, names, strict=True))
    adapter.graph = BranchGraph(renamed, graph.other_macs, graph.other_params)
    return adapter


def make_problem(adapter: Adapter, *, solver: str = "ddim", calls: int = 6, seed: int = 3) -> Problem:
    """What a caching method is given: `adapter` under a solver, and eleven noisy images of its five classes."""
    from hcompress import process
    from hcompress.caching.problem import Problem
    from hcompress.images import Arrays, ImageStream

    random = np.random.default_rng(0)
    source = Arrays(random.standard_normal((11, *adapter.sample_shape), np.float32), random.integers(5, size=11))
    table = make_table(solver, calls)[0]
    return Problem(
        adapter,
        table,
        CFG,
        seed,
        process=lambda: process.at({"beta_schedule": "linear"}, table.timesteps),
        images=lambda folder: ImageStream(source, seed, None, adapter.device),
    )


def make_method(name: str, adapter: Adapter, settings: dict[str, object], **problem: Any) -> Method:
    """A caching method of CACHING on `make_problem`."""
    from pydantic import TypeAdapter

    from hcompress.caching import CACHING
    from hcompress.caching.settings import CachingSettings

    checked = TypeAdapter(CachingSettings).validate_python({"method": name} | settings)
    return CACHING[name](make_problem(adapter, **problem), checked)


def random_mask(calls: int, branches: int, *, reuse: float = 0.5, seed: int = 0) -> np.ndarray:
    """bool[calls, branches], row 0 computed."""
    mask = np.random.default_rng(seed).random((calls, branches)) >= reuse
    mask[0] = True
    return mask


def random_corrections(mask: np.ndarray, widths: tuple[int, ...], *, seed: int = 0, depth: int = 2) -> Corrections:
    """Of a mask: of what is reused a quarter yields its slot as it is, the rest is corrected, half of that by p too.

    depth: how many values before the last are looked at anywhere: with 2 a quarter of all is corrected by q, some of it
           without p's own term. Vectors are small, so samples stay of the order of 1.
    """
    from hcompress.corrections import Corrections, history

    random = np.random.default_rng(seed)
    kind = random.random(mask.shape)

    def term(where: np.ndarray, size: float) -> tuple[np.ndarray, ...]:
        rows = [random.uniform(-size, size, (len(mask), width)).astype(np.float32) for width in widths]
        return tuple(row * where[:, [n]] for n, row in enumerate(rows))

    some, by_p = ~mask & (kind > 0.25), history(mask) & (kind > 0.6) & (depth > 0)
    by_q = history(mask, 2) & (kind > 0.5) & (kind < 0.75) & (depth > 1)
    return Corrections("corrected", term(some, 0.3), term(by_p, 0.8), term(some, 0.2), term(by_q, 0.5))


@dataclass(frozen=True)
class Exported:
    """An adapter under a schedule, and the bundle at `path` that came of it."""

    adapter: Adapter
    table: SolverTable
    identity: Identity
    schedule: Schedule | None
    path: Path


def export(
    path: Path,
    adapter: Adapter,
    mask: np.ndarray | None,
    *,
    solver: str = "ddim",
    cfg: float = CFG,
    layout: str = "embedded",
    corrections: Corrections | None = None,
    **options: Any,
) -> Exported:
    """Export `adapter` under `mask` (None: dense) to `path`; options as `export_bundle` takes them."""
    from hcompress.schedule import Schedule
    from hcompress_export.bundle import export_bundle

    table, solver_identity = make_table(solver)
    identity = adapter.identity("tiny", solver_identity, cfg)
    schedule = None
    if mask is not None:
        schedule = Schedule(mask, adapter.graph.names, identity, {"name": "random"}, corrections=corrections)
    export_bundle(adapter, table, identity, path, cfg=cfg, schedule=schedule, layout=layout, **options)
    return Exported(adapter, table, identity, schedule, path)


@pytest.fixture(scope="session")
def tiny_dit() -> Adapter:
    """The tiny model. Do not change it."""
    return make_dit()


@pytest.fixture(scope="session")
def skipping_dit() -> Adapter:
    """A tiny model whose blocks are called like a U-ViT's. Do not change it."""
    return make_skipping_dit()


@pytest.fixture(scope="session")
def tiny_pixart() -> Adapter:
    """The tiny text-conditional model. Do not change it."""
    return make_pixart()


@pytest.fixture(scope="session")
def tiny_uvit() -> Adapter:
    """The tiny model with long skips. Do not change it."""
    return make_uvit()


@pytest.fixture(scope="session")
def tiny_bundle(tiny_dit: Adapter, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A bundle of 5 steps in which steps 1 and 3 are one graph. Do not change its files; copy them."""
    mask = np.array([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 1, 0]], bool)
    return export(tmp_path_factory.mktemp("tiny") / "bundle", tiny_dit, mask)


@pytest.fixture(scope="session")
def tiny_dense_bundle(tiny_dit: Adapter, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The dense counterpart of `tiny_bundle`."""
    return export(tmp_path_factory.mktemp("tiny") / "dense", tiny_dit, None)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a tiny pixel-space model (one channel), whose diffusers folder is `model` beside it."""
    from diffusers import DDIMScheduler

    from hcompress.recipe import resolve
    from hcompress.rundir import open_run
    from hcompress.schedule import Schedule
    from hcompress.setting import setting_of

    folder = tmp_path_factory.mktemp("run")
    adapter = make_dit(channels=1)
    adapter.network.save_pretrained(folder / "model" / "transformer")
    DDIMScheduler(clip_sample=False).save_pretrained(folder / "model" / "scheduler")
    flags = {"model": str(folder / "model"), "solver.steps": CALLS, "cfg": CFG, "caching.target_cur": 0.4}
    run = open_run(folder / "run", resolve(None, flags))
    setting = setting_of(resolve(run.recipe))
    mask = random_mask(CALLS, len(adapter.graph))
    Schedule(mask, adapter.graph.names, setting.identity, {"name": "random"}).save(run.schedule)
    return run.path


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole tiny CLIP on disk: network, tokenizer, preprocessor. Do not change it."""
    import json

    import torch
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(words), "max_position_embeddings": 12, "bos_token_id": 52, "eos_token_id": 53}
    config = CLIPConfig(
        text_config={**small, **text}, vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=8
    )
    torch.manual_seed(2)
    network = CLIPModel(config)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)  # the default hardly tells one input from another
    network.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture
def hcompress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a verb in this process: (exit code, stdout, stderr)."""
    from hcompress.cli.main import main

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hcompress", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0), *capsys.readouterr()

    return run
