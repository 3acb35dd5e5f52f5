"""MODEL on the command line: what is found, and what is said in one line where nothing is or it is broken."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import DiTTransformer2DModel

from hcompress.errors import ModelError
from hcompress.models import MODELS
from hcompress.models.dit import DiT
from hcompress.models.loading import load_model, zoo_names
from hcompress.solver import make_scheduler


@pytest.fixture(scope="module")
def network() -> DiTTransformer2DModel:
    config = dict(num_layers=2, num_attention_heads=2, attention_head_dim=8, in_channels=2, sample_size=4)
    return DiTTransformer2DModel(**config, num_embeds_ada_norm=3)


@pytest.fixture
def folder(tmp_path: Path, network: DiTTransformer2DModel) -> Path:
    """A tiny model as a diffusers pipeline's folder without a VAE."""
    network.save_pretrained(tmp_path / "dit" / "transformer")
    make_scheduler("ddim", {"clip_sample": False}).save_pretrained(tmp_path / "dit" / "scheduler")
    return tmp_path / "dit"


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """HF_HUB_OFFLINE=1 and an empty cache, as huggingface_hub reads them when it is first imported."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def refused(name: object) -> str:
    """The line that `name` is refused with."""
    with pytest.raises(ModelError) as caught:
        load_model(str(name))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_gives_the_model_that_was_saved(folder: Path, network: DiTTransformer2DModel) -> None:
    model = load_model(str(folder))
    want, got = network.state_dict(), model.adapter.network.state_dict()
    assert want.keys() == got.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert (model.name, model.folder) == (str(folder), folder)
    assert model.scheduler_config["_class_name"] == "DDIMScheduler"
    assert model.adapter.identity("a", {}, 1.0) == DiT(network).identity("a", {}, 1.0)


def test_half_precision_weights_become_float32(folder: Path) -> None:
    half = load_model(str(folder)).adapter.network.half()
    half.save_pretrained(folder / "transformer")
    parameters = list(load_model(str(folder)).adapter.parameters())
    assert {parameter.dtype for parameter in parameters} == {torch.float32}


def test_a_folder_that_is_absent_or_something_else(tmp_path: Path) -> None:
    assert "no model folder" in refused(tmp_path / "absent")
    assert "no model folder fashion-dit; pass zoo:NAME, a local diffusers folder or a hub id" in refused("fashion-dit")
    assert "transformer/config.json is missing" in refused(tmp_path)
    assert "no zoo model 'zoo:absent'" in refused("zoo:absent")


def test_the_zoo_lists_what_it_has() -> None:
    assert all(name in refused("zoo:absent") for name in zoo_names())


@pytest.mark.usefixtures("no_hub")
def test_without_the_hub_it_says_so_and_how_to_go_on() -> None:
    line = refused("facebook/DiT-XL-2-256")
    assert "no local folder and cannot be fetched from the hub" in line
    assert "pass the path of a downloaded diffusers folder" in line


def test_a_family_without_an_adapter_lists_those_that_have_one(folder: Path) -> None:
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps({"_class_name": "WanTransformer3DModel"}))
    line = refused(folder)
    assert "is a WanTransformer3DModel, which has no adapter yet" in line
    assert all(family in line for family in MODELS)


def test_truncated_weights(folder: Path) -> None:
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    for length in (0, 7, 100, len(content) // 2, len(content) - 1):
        weights.write_bytes(content[:length])
        assert "cannot be read" in refused(folder), length
    weights.unlink()
    assert "cannot be read" in refused(folder)


def test_a_configuration_that_does_not_fit_its_weights(folder: Path) -> None:
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_attention_heads": 3}))
    assert "cannot be read" in refused(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "[1]", '"text"'])
@pytest.mark.parametrize("part", ["transformer/config.json", "scheduler/scheduler_config.json"])
def test_a_configuration_that_is_no_configuration(folder: Path, part: str, content: str) -> None:
    (folder / part).write_text(content)
    assert Path(part).name in refused(folder)


def test_a_missing_scheduler(folder: Path) -> None:
    (folder / "scheduler" / "scheduler_config.json").unlink()
    assert "scheduler_config.json is missing" in refused(folder)


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("name", ["a b/c", "a/b--c", "org/..", "org/model?"])
def test_names_that_the_hub_does_not_allow(name: str) -> None:
    assert refused(name)
