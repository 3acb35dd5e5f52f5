"""What is drawn at random: models of published sizes, and schedules."""

from __future__ import annotations

import math
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel

from hcompress.adapter import Adapter
from hcompress.caching.rules import interval, parse_rule, random_mask
from hcompress.errors import ModelError, ScheduleError
from hcompress.models.loading import load_model
from hcompress.models.pixart import PixArt
from hcompress.models.random import (
    CONFIGS,
    FLOW,
    MEDIUM,
    PIXART,
    PIXART_CONFIGS,
    PREFIX,
    SD3_CONFIGS,
    random_dit,
    random_pixart,
    random_scheduler,
    random_sd3,
)
from hcompress.models.sd3 import SD3
from hcompress.schedule import Schedule
from hcompress.solver import make_scheduler, probe, solver_identity
from hcompress_export.bundle import export_bundle

SMALL = CONFIGS["DiT-S-2-256"] | {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
SMALL_TEXT = PIXART | {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 24, "cross_attention_dim": 48}
SMALL_JOINT = MEDIUM | {"num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 128, "sample_size": 32}
SOLVER = {"class": "DDIMScheduler", "steps": 20, "config_hash": "any"}


PAPER = {"S": (12, 384, 6, 33), "B": (12, 768, 12, 130), "L": (24, 1024, 16, 458), "XL": (28, 1152, 16, 675)}
"""Peebles and Xie 2023, tables 1 and 4: layers, width, heads, millions of parameters."""


@pytest.mark.parametrize("name", CONFIGS)
def test_the_configurations_are_those_of_the_paper(name: str) -> None:
    with torch.device("meta"):
        network = DiTTransformer2DModel(**CONFIGS[name])
    layers, heads = network.config.num_layers, network.config.num_attention_heads
    copies = (layers - 1) * sum(weight.numel() for weight in network.transformer_blocks[0].norm1.emb.parameters())
    millions = round((sum(weight.numel() for weight in network.parameters()) - copies) / 1e6)
    _, size, patch, pixels = name.split("-")
    assert (layers, network.inner_dim, heads, millions) == PAPER[size]
    assert (network.config.patch_size, 8 * network.config.sample_size) == (int(patch), int(pixels))


@pytest.mark.parametrize("name", PIXART_CONFIGS)
def test_pixart_is_as_published(name: str) -> None:
    """Chen et al. 2023, table 2: 0.6 B parameters. Resolution and aspect ratio are told to alpha's largest alone."""
    with torch.device("meta"):
        network = PixArtTransformer2DModel(**PIXART_CONFIGS[name])
    config = network.config
    assert (config.num_layers, config.num_attention_heads, network.inner_dim) == (28, 16, 1152)
    assert round(sum(weight.numel() for weight in network.parameters()) / 1e6) == 611
    assert 8 * config.sample_size == int(name.split("-")[-1])
    assert network.use_additional_conditions == (name == "PixArt-XL-2-1024")
    sigma = "Sigma" in name
    assert (
        PixArt(network, tokens=300 if sigma else 120).graph.branches[1].macs
        == sum(2 * tokens * 1152**2 for tokens in (config.sample_size**2 // 4, 300 if sigma else 120))
        + 2 * (config.sample_size**2 // 4) * (300 if sigma else 120) * 1152
    )  # q and out, k and v, both products


TEXT: dict[str, Callable[[], Adapter]] = {
    "pixart": lambda: random_pixart(SMALL_TEXT, tokens=7),
    "sd3": lambda: random_sd3(SMALL_JOINT, tokens=7),
}


@pytest.mark.parametrize("name", TEXT)
def test_a_random_text_model_brings_prompts_and_is_the_same_each_time(name: str) -> None:
    first, again = TEXT[name](), TEXT[name]()
    assert first.identity("a", SOLVER, 4.5) == again.identity("a", SOLVER, 4.5)
    assert first.conditions["prompt_embeds"].shape == (7, 4096)
    given = [adapter.condition(adapter.even_conditions(4)) for adapter in (first, again)]
    assert all(torch.equal(given[0][name], given[1][name]) for name in first.conditions)
    constants = first.step_constants(torch.tensor([500.0]))
    x = torch.randn(4, *first.sample_shape)
    dense = first.guided(x, given[0], constants, 4.5)
    assert 0.1 < dense.std() < 30  # guidance at 4.5
    for without in range(len(first.graph)):
        pruned = first.guided(x, given[0], constants, 4.5, lambda branch, go, cut=without: go() * (branch != cut))
        assert (dense - pruned).std() > 1e-2
    for name, buffer in type(first.network)(**first.network.config).named_buffers():
        assert torch.equal(buffer, first.network.get_buffer(name))


@pytest.mark.parametrize("name", SD3_CONFIGS)
def test_stable_diffusion_3_is_as_published(name: str) -> None:
    """Esser et al. 2024: depth 24, 2 B parameters. The last of 24 blocks has no MLP for text."""
    with torch.device("meta"):
        graph = SD3(SD3Transformer2DModel(**SD3_CONFIGS[name])).graph
    assert (len(graph), round(graph.total_params / 1e8)) == (3 * 24 - 1, 20)
    image, text = (int(name.split("-")[-1]) // 16) ** 2, 77 + 256
    assert graph.branches[0].shape == (image + text, 1536)
    assert make_scheduler("flow-euler", random_scheduler(PREFIX + name)).config.shift == FLOW["shift"]


def test_a_random_model_is_the_same_each_time_and_like_no_other() -> None:
    first, again = (load_model("random:DiT-S-2-256") for _ in range(2))
    assert first.adapter.identity(first.name, SOLVER, 1.5) == again.adapter.identity(again.name, SOLVER, 1.5)
    assert first.adapter.identity("a", SOLVER, 1.5) != random_dit(CONFIGS["DiT-S-2-256"], seed=1).identity(
        "a", SOLVER, 1.5
    )
    assert first.adapter.sample_shape == (4, 32, 32) and first.adapter.num_classes == 1000
    assert not (first.folder / "vae").exists()
    assert not first.adapter.network.training and {weight.dtype for weight in first.adapter.parameters()} == {
        torch.float32
    }
    assert probe(make_scheduler("ddim", first.scheduler_config), 20).num_calls == 20


def test_what_is_no_weight_is_as_diffusers_computes_it() -> None:
    network = random_dit(SMALL).network
    for name, buffer in DiTTransformer2DModel(**SMALL).named_buffers():
        assert torch.equal(buffer, network.get_buffer(name))


def test_every_branch_moves_the_output_and_nothing_blows_up() -> None:
    adapter = random_dit(SMALL)
    assert len(adapter.embedders) == 1
    assert all(
        0.5 < weight.std() * math.prod(weight.shape[1:]) ** 0.5 < 2
        for weight in adapter.parameters()
        if weight.ndim > 1
    )
    constants = adapter.step_constants(torch.tensor([500.0]))
    x, condition = torch.randn(2, *adapter.sample_shape), adapter.label_condition([3, 900])
    dense = adapter.guided(x, condition, constants, 1.5)
    assert 0.1 < dense.std() < 10
    assert (dense - adapter.guided(x, adapter.label_condition([4, 901]), constants, 1.5)).std() > 1e-2
    for without in range(len(adapter.graph)):
        pruned = adapter.guided(
            x, condition, constants, 1.5, lambda branch, compute, cut=without: compute() * (branch != cut)
        )
        assert (dense - pruned).std() > 1e-2


@pytest.mark.parametrize("name", ["random:PixArt-XL-2-2048", "random:", "random:dit-s-2-256"])
def test_an_unknown_random_model_lists_those_there_are(name: str) -> None:
    with pytest.raises(ModelError, match=f"no random model '{name}'; there are: ") as caught:
        load_model(name)
    assert all(PREFIX + known in str(caught.value) for known in (*CONFIGS, *PIXART_CONFIGS, *SD3_CONFIGS))


def test_rules_on_the_command_line() -> None:
    graph = random_dit(SMALL).graph
    rules = {
        "random:0.375": random_mask(20, 4, cur=0.375, seed=0),
        "random:0.375:7": random_mask(20, 4, cur=0.375, seed=7),
        "random:0": np.ones((20, 4), bool),
        "interval:2": interval(20, 4, every=2),
    }
    for text, mask in rules.items():
        assert np.array_equal(parse_rule(text, 20, graph), mask), text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "random",
        "random:",
        "random:half",
        "random:nan",
        "random:inf",
        "random:0.4:x",
        "random:0.4:-1",
        "random:0.4:0:1",
        "interval",
        "interval:1.5",
        "interval:2:3",
        "fora:2",
        "0.375",
    ],
)
def test_what_is_no_rule_is_one_line(text: str) -> None:
    with pytest.raises(ScheduleError, match="is no rule; write random:CUR or random:CUR:SEED") as caught:
        parse_rule(text, 20, random_dit(SMALL).graph)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [("random:0.96", "out of reach"), ("interval:0", "interval of 0 calls")])
def test_a_rule_that_the_calls_do_not_allow(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        parse_rule(text, 20, random_dit(SMALL).graph)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("random:DiT-S-2-256", torch.float16),
        pytest.param("random:PixArt-XL-2-256", torch.float16, marks=pytest.mark.slow),
        pytest.param("random:DiT-XL-2-256", torch.float16, marks=pytest.mark.slow),
        pytest.param("random:DiT-XL-2-256", torch.float32, marks=pytest.mark.slow),
    ],
)
def test_a_published_size_exports_with_its_weights_stored_once(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """20 different steps: the weights once, at most 1 MB for each graph, and at most 12 GB of memory to make them."""
    model, cfg, steps = load_model(name), 1.5, 20
    adapter = model.adapter.to(dtype)
    scheduler = make_scheduler("ddim", model.scheduler_config)
    identity = adapter.identity(name, dict(solver_identity(scheduler, steps)), cfg)
    schedule = Schedule(parse_rule("random:0.375", steps, adapter.graph), adapter.graph.names, identity)
    table = probe(scheduler, steps)
    bundle = export_bundle(adapter, table, identity, tmp_path / "bundle", cfg=cfg, schedule=schedule)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    parameters = sum(parameter.numel() for parameter in adapter.parameters())
    assert round(parameters / 1e6) == (611 if "PixArt" in name else PAPER[name.split("-")[1]][-1])
    graphs = [path.stat().st_size for path in bundle.path.glob("graphs/*.onnx")]
    assert len(graphs) == steps and max(graphs) <= 1e6
    assert bundle.total_bytes() - sum(graphs) <= 1.02 * parameters * dtype.itemsize
    assert peak <= 12e9
    shutil.rmtree(bundle.path)  # pytest keeps its folders, and this may be gigabytes
