"""Checkpoints of DiT's and U-ViT's authors, against their networks written out here from tensors by name."""

from __future__ import annotations

import argparse
import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from typer.testing import CliRunner

from hcompress.adapter import compute_all
from hcompress.cli.main import app
from hcompress.errors import ModelError
from hcompress.models.convert import convert
from hcompress.models.loading import load_model

WIDTH, HEADS, HIDDEN, PATCH, SIDE, CHANNELS = 32, 2, 80, 2, 8, 4
TOKENS = (SIDE // PATCH) ** 2
CLOSE = 1e-5  # float32, eps 6e-8, over some twenty matrix products; relative to the largest output

State = dict[str, Tensor]


def drawn(shapes: dict[str, tuple[int, ...]]) -> State:
    """Random tensors, none of them zero."""
    generator = torch.Generator().manual_seed(0)
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def linear_shapes(name: str, width_in: int, width_out: int, *, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width_out, width_in)} | ({f"{name}.bias": (width_out,)} if bias else {})


def uvit_state(*, labels: int = 6, conv: bool = False, time_mlp: bool = False, bias: bool = False) -> State:
    """Three blocks with the names of baofff/U-ViT, libs/uvit.py; `labels` rows of label embedding."""
    shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, TOKENS + 1 + (labels > 0), WIDTH)}
    shapes |= {"patch_embed.proj.weight": (WIDTH, CHANNELS, PATCH, PATCH), "patch_embed.proj.bias": (WIDTH,)}
    if time_mlp:
        shapes |= linear_shapes("time_embed.0", WIDTH, 4 * WIDTH) | linear_shapes("time_embed.2", 4 * WIDTH, WIDTH)
    if labels:
        shapes["label_emb.weight"] = (labels, WIDTH)
    for block in ("in_blocks.0", "mid_block", "out_blocks.0"):
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}.{norm}.weight": (WIDTH,), f"{block}.{norm}.bias": (WIDTH,)}
        shapes |= linear_shapes(f"{block}.attn.qkv", WIDTH, 3 * WIDTH, bias=bias)
        shapes |= linear_shapes(f"{block}.attn.proj", WIDTH, WIDTH)
        shapes |= linear_shapes(f"{block}.mlp.fc1", WIDTH, HIDDEN) | linear_shapes(f"{block}.mlp.fc2", HIDDEN, WIDTH)
    shapes |= linear_shapes("out_blocks.0.skip_linear", 2 * WIDTH, WIDTH)
    shapes |= {"norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}
    shapes |= linear_shapes("decoder_pred", WIDTH, PATCH**2 * CHANNELS)
    if conv:
        shapes |= {"final_layer.weight": (CHANNELS, CHANNELS, 3, 3), "final_layer.bias": (CHANNELS,)}
    return drawn(shapes)


def dit_state(out_channels: int = 8) -> State:
    """Two blocks and five classes with the names of facebookresearch/DiT, models.py."""
    shapes = {"x_embedder.proj.weight": (WIDTH, CHANNELS, PATCH, PATCH), "x_embedder.proj.bias": (WIDTH,)}
    shapes |= linear_shapes("t_embedder.mlp.0", 256, WIDTH) | linear_shapes("t_embedder.mlp.2", WIDTH, WIDTH)
    shapes |= {"y_embedder.embedding_table.weight": (6, WIDTH)}
    for block in ("blocks.0", "blocks.1"):
        shapes |= linear_shapes(f"{block}.attn.qkv", WIDTH, 3 * WIDTH)
        shapes |= linear_shapes(f"{block}.attn.proj", WIDTH, WIDTH)
        shapes |= linear_shapes(f"{block}.mlp.fc1", WIDTH, 4 * WIDTH)
        shapes |= linear_shapes(f"{block}.mlp.fc2", 4 * WIDTH, WIDTH)
        shapes |= linear_shapes(f"{block}.adaLN_modulation.1", WIDTH, 6 * WIDTH)
    shapes |= linear_shapes("final_layer.linear", WIDTH, PATCH**2 * out_channels)
    shapes |= linear_shapes("final_layer.adaLN_modulation.1", WIDTH, 2 * WIDTH)
    side = torch.arange(SIDE // PATCH, dtype=torch.float64)
    rates = 10000 ** (-torch.arange(WIDTH // 4, dtype=torch.float64) / (WIDTH // 4))
    rows, columns = torch.meshgrid(side, side, indexing="ij")
    angles = [axis.flatten()[:, None] * rates for axis in (columns, rows)]
    positions = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return drawn(shapes) | {"pos_embed": positions.float()[None]}


def sinusoid(times: Tensor, width: int, last: int) -> Tensor:
    """Cosines, then sines, of frequencies 10000^(-i / last)."""
    angles = times[:, None] * torch.exp(-math.log(10000) * torch.arange(width // 2) / last)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def linear(state: State, name: str, h: Tensor) -> Tensor:
    return functional.linear(h, state[f"{name}.weight"], state.get(f"{name}.bias"))


def attention(state: State, name: str, h: Tensor) -> Tensor:
    qkv = linear(state, f"{name}.qkv", h).reshape(*h.shape[:2], 3, HEADS, WIDTH // HEADS)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT / math.sqrt(WIDTH // HEADS)).softmax(-1)
    return linear(state, f"{name}.proj", (weights @ v).transpose(1, 2).reshape(h.shape))


def patches(state: State, name: str, x: Tensor) -> Tensor:
    return functional.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride=PATCH).flatten(2).mT


def picture(h: Tensor) -> Tensor:
    """[R, L, p p C] to [R, C, H, W]."""
    grid = h.reshape(len(h), SIDE // PATCH, SIDE // PATCH, PATCH, PATCH, -1)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(len(h), -1, SIDE, SIDE)


def uvit(state: State, x: Tensor, times: Tensor, labels: Tensor) -> Tensor:
    """The network of baofff/U-ViT."""

    def norm(name: str, h: Tensor) -> Tensor:
        return functional.layer_norm(h, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"])

    def block(name: str, h: Tensor) -> Tensor:
        h = h + attention(state, f"{name}.attn", norm(f"{name}.norm1", h))
        hidden = functional.gelu(linear(state, f"{name}.mlp.fc1", norm(f"{name}.norm2", h)))
        return h + linear(state, f"{name}.mlp.fc2", hidden)

    time = sinusoid(times, WIDTH, WIDTH // 2)
    if "time_embed.0.weight" in state:
        time = linear(state, "time_embed.2", functional.silu(linear(state, "time_embed.0", time)))
    h = torch.cat([time[:, None], patches(state, "patch_embed.proj", x)], dim=1)
    if "label_emb.weight" in state:
        h = torch.cat([state["label_emb.weight"][labels][:, None], h], dim=1)
    skip = block("in_blocks.0", h + state["pos_embed"])
    h = block("mid_block", skip)
    h = block("out_blocks.0", linear(state, "out_blocks.0.skip_linear", torch.cat([h, skip], dim=2)))
    x = picture(linear(state, "decoder_pred", norm("norm", h))[:, -TOKENS:])
    if "final_layer.weight" in state:
        x = functional.conv2d(x, state["final_layer.weight"], state["final_layer.bias"], padding=1)
    return x


def dit(state: State, x: Tensor, times: Tensor, labels: Tensor) -> Tensor:
    """The network of facebookresearch/DiT, but for the last frequency, which is diffusers' (127 and not 128)."""

    def norm(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return functional.layer_norm(h, (WIDTH,), eps=1e-6) * (1 + scale) + shift

    time = linear(state, "t_embedder.mlp.0", sinusoid(times, 256, 127))
    c = linear(state, "t_embedder.mlp.2", functional.silu(time)) + state["y_embedder.embedding_table.weight"][labels]
    h = patches(state, "x_embedder.proj", x) + state["pos_embed"]
    for name in ("blocks.0", "blocks.1"):
        modulation = linear(state, f"{name}.adaLN_modulation.1", functional.silu(c))[:, None].chunk(6, dim=2)
        h = h + modulation[2] * attention(state, f"{name}.attn", norm(h, *modulation[:2]))
        hidden = functional.gelu(linear(state, f"{name}.mlp.fc1", norm(h, *modulation[3:5])), approximate="tanh")
        h = h + modulation[5] * linear(state, f"{name}.mlp.fc2", hidden)
    shift, scale = linear(state, "final_layer.adaLN_modulation.1", functional.silu(c))[:, None].chunk(2, dim=2)
    return picture(linear(state, "final_layer.linear", norm(h, shift, scale)))


def saved(folder: Path, content: object) -> Path:
    torch.save(content, folder / "weights.pt")
    return folder / "weights.pt"


def converted(folder: Path, content: object) -> Path:
    convert(saved(folder, content), folder / "model", heads=HEADS)
    return folder / "model"


CASES = {  # the state, its network, and what a timestep is to it
    "dit": (dit_state, dit, lambda t: t),
    "dit without variance": (lambda: dit_state(CHANNELS), dit, lambda t: t),
    "uvit": (uvit_state, uvit, lambda t: t + 1),
    "uvit all": (lambda: uvit_state(conv=True, time_mlp=True, bias=True), uvit, lambda t: 999 * (t + 1) / 1000),
    "uvit unconditional": (lambda: uvit_state(labels=0, conv=True), uvit, lambda t: 999 * (t + 1) / 1000),
    "uvit imagenet": (lambda: uvit_state(labels=1000), uvit, lambda t: t + 1),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_converted_computes_what_the_authors_network_does(tmp_path: Path, case: str) -> None:
    make, network, told = CASES[case]
    state = make()
    adapter = load_model(str(converted(tmp_path, state))).adapter
    x, times = torch.randn(3, CHANNELS, SIDE, SIDE), torch.tensor([0.0, 300.0, 999.0])
    labels = torch.tensor([0, 1, 2]) % adapter.num_classes
    got = adapter(x, {"labels": labels}, adapter.step_constants(times), compute_all)
    want = network(state, x, told(times), labels)
    assert want.std() > 0.01
    assert (got - want).abs().max() <= CLOSE * want.abs().max()


@pytest.mark.parametrize(
    ("state", "classes", "guided"),
    [(dit_state, 5, True), (uvit_state, 5, True), (lambda: uvit_state(labels=1000), 1000, False)],
)
def test_the_last_label_is_the_null_class_where_there_is_one(tmp_path: Path, state, classes: int, guided: bool) -> None:
    adapter = load_model(str(converted(tmp_path, state()))).adapter
    condition = adapter.label_condition([0, classes - 1])
    if guided:
        assert adapter.null_condition(condition)["labels"].tolist() == [classes, classes]
    else:
        with pytest.raises(ModelError, match="null class"):
            adapter.null_condition(condition)


@pytest.mark.parametrize(("conv", "betas"), [(False, "scaled_linear"), (True, "linear")])
def test_a_uvit_gets_the_noise_it_was_published_with(tmp_path: Path, conv: bool, betas: str) -> None:
    scheduler = load_model(str(converted(tmp_path, uvit_state(conv=conv)))).scheduler_config
    assert (scheduler["beta_schedule"], scheduler["clip_sample"]) == (betas, False)


def test_a_checkpoint_of_training_gives_its_averaged_weights(tmp_path: Path) -> None:
    ema = dit_state()
    other = {name: torch.zeros_like(tensor) for name, tensor in ema.items()}
    content = {"model": other, "ema": ema, "opt": {"state": {}}, "args": argparse.Namespace(epochs=1400)}
    adapter = load_model(str(converted(tmp_path, content))).adapter
    assert torch.equal(adapter.network.proj_out_2.weight, ema["final_layer.linear.weight"])


def test_heads_are_those_of_the_published_models(tmp_path: Path) -> None:
    what = convert(saved(tmp_path, uvit_state()), tmp_path / "model")
    assert "3 blocks of width 32, 1 heads" in what  # a head for each 64
    with pytest.raises(ModelError, match="3 heads do not divide a width of 32; pass --heads"):
        convert(tmp_path / "weights.pt", tmp_path / "model", heads=3)


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (Path("harm"),)


def changed(change: str) -> object:
    state = dit_state()
    if change == "incomplete":
        del state["final_layer.linear.bias"]
    elif change == "another block":
        state["blocks.1.attn.q_norm.weight"] = torch.ones(16)
    elif change == "positions":
        state["pos_embed"] = state["pos_embed"] + 0.1
    elif change == "shapes":
        state["blocks.1.mlp.fc2.weight"] = torch.ones(WIDTH, 3)
    elif change == "text":
        state = uvit_state() | {"context_embed.weight": torch.ones(WIDTH, 768)}
    return state


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"conv1.weight": torch.ones(3)},
            "neither a DiT nor a U-ViT checkpoint of their authors; it holds conv1.weight",
        ),
        ({}, "it holds nothing"),
        ([1, 2], "neither a DiT nor a U-ViT"),
        ({"epoch": 3, "state": {}}, "holds no network's tensors by name"),
        (changed("text"), "neither a DiT nor a U-ViT"),
        (changed("incomplete"), "lacks final_layer.linear.bias"),
        (changed("another block"), "a DiT has no blocks.1.attn.q_norm.weight"),
        (changed("positions"), "pos_embed is not DiT's sinusoids"),
        (changed("shapes"), "does not fit together: .* size mismatch"),
    ],
)
def test_what_is_no_such_checkpoint_is_one_line(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        convert(saved(tmp_path, content), tmp_path / "model", heads=HEADS)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "model").exists()


def test_a_file_that_cannot_be_read_is_one_line_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = saved(tmp_path, dit_state()).read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], pickle.dumps({"x_embedder.proj.weight": Harmful()})):
        (tmp_path / "weights.pt").write_bytes(content)
        with pytest.raises(ModelError, match=r"cannot read .* as a PyTorch checkpoint"):
            convert(tmp_path / "weights.pt", tmp_path / "model")
    torch.save({"x_embedder.proj.weight": Harmful()}, tmp_path / "weights.pt")
    for path in ("weights.pt", "absent.pt", "."):
        with pytest.raises(ModelError, match=r"cannot read .* as a PyTorch checkpoint") as caught:
            convert(tmp_path / path, tmp_path / "model")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "harm").exists()


def test_the_verb(tmp_path: Path) -> None:
    file = saved(tmp_path, uvit_state())
    done = CliRunner().invoke(app, ["convert", str(file), "--out", str(tmp_path / "a" / "model"), "--heads", "2"])
    assert done.exit_code == 0, done.output
    assert "UViT2DModel, 3 blocks of width 32, 2 heads" in done.stdout
    done = CliRunner().invoke(app, ["convert", str(file), "--out", str(tmp_path / "b"), "--json"])
    assert json.loads(done.stdout)["model"] == str(tmp_path / "b")
    assert load_model(str(tmp_path / "b")).adapter.num_classes == 5
