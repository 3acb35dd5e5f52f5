"""What is PixArt's alone: prompts and their padding, the null prompt, diffusers' pipeline, the shell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CALLS, Exported, export, make_dit, make_pixart, make_prompts, random_mask
from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline
from PIL import Image
from safetensors.numpy import load_file, save_file

from hcompress.adapter import Adapter, compute_all
from hcompress.errors import ModelError
from hcompress.models.loading import load_model
from hcompress.models.pixart import PixArt, load_pixart
from hcompress.recipe import resolve
from hcompress.sampling import sample, sample_seeded
from hcompress.solver import probe
from hcompress.train import train
from hcompress_runtime import Runtime
from hcompress_runtime.bundle import open_bundle
from hcompress_runtime.trt_build import build_engine

ASKED = make_prompts(3, seed=5)


def save(adapter: Adapter, folder: Path, prompts: dict[str, np.ndarray] | None) -> Path:
    """`adapter` as a diffusers folder, with a prompts file where there are `prompts`."""
    adapter.network.save_pretrained(folder / "transformer")
    DPMSolverMultistepScheduler().save_pretrained(folder / "scheduler")
    if prompts:
        save_file(prompts, folder / "prompts.safetensors")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in pixel space with prompts of its own."""
    return save(make_pixart(channels=1, out_channels=2), tmp_path_factory.mktemp("pixart"), make_prompts(3))


def call(adapter: Adapter, condition: dict[str, torch.Tensor]) -> torch.Tensor:
    """The raw output for 3 rows."""
    x = torch.randn(3, *adapter.sample_shape, generator=torch.Generator().manual_seed(0))
    return adapter(x, condition, adapter.step_constants(torch.tensor([10.0, 500, 999])), compute_all)


@pytest.mark.parametrize("config", [{}, {"use_additional_conditions": True}])
def test_without_a_mask_every_token_counts_as_in_diffusers(config: dict[str, Any]) -> None:
    adapter = make_pixart(**config)
    embeds = torch.from_numpy(ASKED["prompt_embeds"])
    x = torch.randn(3, *adapter.sample_shape, generator=torch.Generator().manual_seed(0))
    told = {"resolution": torch.full((3, 2), 64.0), "aspect_ratio": torch.ones(3, 1)}
    time = torch.tensor([10.0, 500, 999])
    want = adapter.network(x, timestep=time, encoder_hidden_states=embeds, added_cond_kwargs=told).sample
    got = call(adapter, {"prompt_embeds": embeds})
    assert torch.equal(got, want)
    assert not torch.equal(got, call(adapter, dict(adapter.condition(ASKED))))


def test_padding_has_no_say(tiny_pixart: Adapter) -> None:
    """The embeddings that a mask leaves out weigh exactly nothing: exp(-10000) is 0."""
    other = ASKED | {"prompt_embeds": np.where(ASKED["prompt_mask"][..., None], ASKED["prompt_embeds"], 5)}
    assert not np.array_equal(other["prompt_embeds"], ASKED["prompt_embeds"])
    assert torch.equal(*(call(tiny_pixart, dict(tiny_pixart.condition(given))) for given in (ASKED, other)))


def test_the_null_prompt_is_the_models_own_unless_one_is_given(tiny_pixart: Adapter) -> None:
    own, prompts = make_prompts(3), {name: ASKED[name] for name in ("prompt_embeds", "prompt_mask")}
    for given, null in ((prompts, own), (ASKED, ASKED)):
        found = tiny_pixart.null_condition(tiny_pixart.condition(given))
        assert found.keys() == prompts.keys()
        assert np.array_equal(found["prompt_embeds"], np.repeat(null["null_embeds"], 3, axis=0))
        assert np.array_equal(found["prompt_mask"], np.repeat(null["null_mask"], 3, axis=0))
    bare = make_pixart(own=False).condition(prompts)
    assert not bare["null_embeds"].any() and bare["null_mask"].sum(dim=1).tolist() == [1, 1, 1]


def test_conditions_are_drawn_from_the_models_own_prompts(tiny_pixart: Adapter) -> None:
    own, drawn = make_prompts(3), tiny_pixart.random_condition(np.random.default_rng(0), 50)
    which = [(own["prompt_embeds"] == one.numpy()).all((1, 2)).argmax() for one in drawn["prompt_embeds"]]
    assert {*which} == {0, 1, 2}
    assert np.array_equal(drawn["prompt_mask"], own["prompt_mask"][which])


@pytest.mark.parametrize("count", [1, 3, 8, 20])
def test_prompts_for_scoring_go_on_where_a_part_ended(count: int) -> None:
    adapter = PixArt(make_pixart().network, make_prompts(count), tokens=5)
    whole, parts = adapter.even_conditions(30), [adapter.even_conditions(10, first) for first in (0, 10, 20)]
    for name, rows in whole.items():
        assert np.array_equal(rows, np.concatenate([part[name] for part in parts]))


@pytest.mark.parametrize("count", [1, 3, 7, 8, 9, 11, 12, 16, 128])
def test_nothing_is_scored_on_a_prompt_that_it_learned_from(count: int) -> None:
    """But with fewer than eight, of which all are for both. What comes every fourth time is in both halves."""
    own, adapter = make_prompts(count), PixArt(make_pixart().network, make_prompts(count), tokens=5)
    drawn = adapter.random_condition(np.random.default_rng(0), 40 * count)["prompt_embeds"].numpy()
    scored = adapter.condition(adapter.even_conditions(3 * count))["prompt_embeds"].numpy()
    number = {row.tobytes(): i for i, row in enumerate(own["prompt_embeds"])}
    learning, scoring = ([number[row.tobytes()] for row in rows] for rows in (drawn, scored))
    assert {*learning} | {*scoring} == {*range(count)}  # chance misses one in e^40 times
    assert {*learning} & {*scoring} == ({*range(count)} if count < 8 else set())
    choices = len({*scoring})
    assert scoring == (sorted({*scoring}) * -(-3 * count // choices))[: 3 * count]  # round robin
    if count % 8 == 0:
        for half in ({*learning}, {*scoring}):
            for every in (2, 4):
                assert {len([n for n in half if n % every == rest]) for rest in range(every)} == {count // 2 // every}


def test_without_prompts_of_its_own_it_says_what_is_missing() -> None:
    bare = make_pixart(own=False)
    for ask in (lambda: bare.random_condition(np.random.default_rng(0), 2), lambda: bare.even_conditions(2)):
        with pytest.raises(ModelError, match=r"no prompts to draw from: .* put prompts\.safetensors into its folder"):
            ask()


def test_samples_are_those_of_diffusers_pipeline() -> None:
    """Which guides [uncond ; cond], and all eight channels, of which it drops four."""
    adapter, scheduler, prompts = make_pixart(channels=4, out_channels=8), DPMSolverMultistepScheduler(), ASKED
    start = torch.randn(3, *adapter.sample_shape, generator=torch.Generator().manual_seed(0))
    pipe = PixArtAlphaPipeline(None, None, None, adapter.network, scheduler)
    pipe.set_progress_bar_config(disable=True)
    null = {name: torch.from_numpy(np.repeat(prompts[name], 3, axis=0)) for name in ("null_embeds", "null_mask")}
    want = pipe(
        prompt_embeds=torch.from_numpy(prompts["prompt_embeds"]),
        prompt_attention_mask=torch.from_numpy(prompts["prompt_mask"]),
        negative_prompt=None,
        negative_prompt_embeds=null["null_embeds"],
        negative_prompt_attention_mask=null["null_mask"],
        latents=start,
        num_inference_steps=CALLS,
        guidance_scale=4.5,
        use_resolution_binning=False,
        output_type="latent",
        return_dict=False,
    )[0]
    got = sample(adapter, probe(scheduler, CALLS), adapter.condition(prompts), start, cfg=4.5)
    # float32 through 5 calls, by a table and by the scheduler's own steps
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_a_folder_gives_the_model_and_its_prompts(folder: Path) -> None:
    adapter, own = load_model(str(folder)).adapter, make_prompts(3)
    assert isinstance(adapter, PixArt) and adapter.conditions["prompt_embeds"].shape == (5, 10)
    assert np.array_equal(adapter.conditions["null_embeds"].default, own["null_embeds"][0])
    assert np.array_equal(adapter.condition(adapter.even_conditions(3))["prompt_embeds"], own["prompt_embeds"])


@pytest.mark.parametrize(
    ("pipeline", "tokens"), [(None, 120), ("PixArtAlphaPipeline", 120), ("PixArtSigmaPipeline", 300)]
)
def test_without_prompts_the_pipeline_says_how_long_text_is(tmp_path: Path, pipeline: str | None, tokens: int) -> None:
    save(make_pixart(own=False), tmp_path, None)
    if pipeline:
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    assert load_pixart(tmp_path / "transformer").conditions["prompt_mask"].shape == (tokens,)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (make_prompts(3, width=8), r"prompts\.safetensors does not fit the model: prompt_embeds has shape \[3, 5, 8\]"),
        ({"null_mask": np.ones((1, 5))}, r"prompts\.safetensors does not fit the model: .* got null_mask"),
        ({"prompt_embeds": np.ones(5)}, r"prompts\.safetensors does not fit the model"),
    ],
)
def test_prompts_of_another_model_are_refused(tmp_path: Path, prompts: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(str(save(make_pixart(own=False), tmp_path, prompts)))


@pytest.mark.parametrize("make", [make_dit, make_pixart])
def test_the_name_that_published_models_still_have_is_understood(tmp_path: Path, make: Any) -> None:
    adapter = make()
    config = save(adapter, tmp_path, None) / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "Transformer2DModel"}))
    found = load_model(str(tmp_path)).adapter
    assert type(found) is type(adapter)
    assert found.identity("a", {}, 1.0) == adapter.identity("a", {}, 1.0)


def test_a_router_is_trained_on_prompts_of_the_models_own(folder: Path, tmp_path: Path) -> None:
    flags = {"model": str(folder), "solver.name": "dpm++", "solver.steps": CALLS, "cfg": 4.5, "caching.beta": 1e-4}
    recipe = resolve(None, flags, ["caching.trajectories=2", "caching.batch=2", f"caching.refresh={CALLS}"])
    schedule = train(recipe, tmp_path / "run")
    assert schedule.names == load_model(str(folder)).adapter.graph.names
    assert schedule.logits is not None and np.ptp(schedule.logits[1:]) > 0
    bare = save(make_pixart(own=False), tmp_path / "bare", None)
    with pytest.raises(ModelError, match="no prompts to draw from"):
        train(resolve(None, flags | {"model": str(bare)}), tmp_path / "other")


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image, float)


def test_from_the_shell(hcompress: Any, folder: Path, tmp_path: Path) -> None:
    """Export, verify, bench, and generate: from the bundle as from the model, with the null prompt of either."""
    bundle, schedule = tmp_path / "bundle", tmp_path / "bundle" / "schedule.safetensors"
    common = ("--solver", "dpm++", "--steps", CALLS, "--cfg", 3, "--out", bundle, "--json")
    exported = json.loads(hcompress("export", folder, "--schedule", "random:0.4", *common)[1])
    assert max(exported["parity"]) < 1e-5 and exported["cur"] == pytest.approx(0.4, abs=0.05)
    assert hcompress("verify", bundle)[0] == 0
    dense = tmp_path / "bundle-dense"
    assert hcompress("export", folder, "--dense", *common[:-2], dense, "--json", "--no-prove")[0] == 0
    bench = hcompress("bench", bundle, "--batch", 2, "--rounds", 1, "--torch", "--json")
    assert json.loads(bench[1])["torch_latency_ms"] > 0
    quality = hcompress("eval", folder, "--schedule", schedule, "--solver", "dpm++", "--samples", 3, "--json")
    assert json.loads(quality[1])["psnr_db"] > 0
    both = ({name: ASKED[name] for name in ("prompt_embeds", "prompt_mask")}, ASKED)
    for number, prompts in enumerate(both):
        save_file(prompts, tmp_path / "asked.safetensors")
        ask = ("--prompts", tmp_path / "asked.safetensors", "--seed", 3, "--batch", 2, "--json", "--out")
        figures = json.loads(hcompress("generate", bundle, *ask, tmp_path / f"{number}.png")[1])
        assert figures["prompts"] == str(tmp_path / "asked.safetensors")
        model = ("--schedule", schedule, "--solver", "dpm++")
        hcompress("generate", folder, *ask, tmp_path / f"{number}-torch.png", *model)
        pair = [picture(tmp_path / f"{number}{of}.png") for of in ("", "-torch")]
        assert np.abs(pair[0] - pair[1]).max() <= 1  # one level, where a value lies between two
    assert np.abs(picture(tmp_path / "0.png") - picture(tmp_path / "1.png")).max() > 1

    manifest = open_bundle(bundle).manifest
    assert manifest["conditions"]["prompt_embeds"] == {"dtype": "float32", "shape": [5, 10]}
    assert load_file(bundle / "constants.safetensors")["condition.null_embeds"].shape == (1, 5, 10)
    out = ("--out", tmp_path / "no.png")
    for arguments, line in (
        ((), "say what to generate: --labels 0,1,2 for classes, or --prompts FILE"),
        (("--labels", "0", "--prompts", tmp_path / "asked.safetensors"), "not both"),
        (("--labels", "0"), "conditioned on prompt_embeds, prompt_mask (and null_embeds with null_mask), got labels"),
        (("--prompts", tmp_path / "absent"), "no prompts at"),
    ):
        code, _, err = hcompress("generate", bundle, *arguments, *out)
        assert code == 1 and line in err and err.count("\n") == 1 and not (tmp_path / "no.png").exists()


@pytest.fixture(scope="module")
def unguided(tiny_pixart: Adapter, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A bundle without guidance, under a random mask."""
    mask = random_mask(CALLS, len(tiny_pixart.graph))
    return export(tmp_path_factory.mktemp("unguided") / "bundle", tiny_pixart, mask, cfg=1.0, layout="per-mask")


def test_a_bundle_is_asked_in_batches_and_by_arrays(unguided: Exported) -> None:
    prompts = {name: ASKED[name] for name in ("prompt_embeds", "prompt_mask")}
    with Runtime(unguided.path) as runtime:
        got = runtime.generate(prompts, seed=2, batch=2)
        assert not any("null" in name for engine in runtime.engines.values() for name in engine.feeds)
        last = runtime.generate({name: rows[2:] for name, rows in prompts.items()}, seed=2, first=2)
    adapter, compute = unguided.adapter, unguided.schedule.compute
    want = sample_seeded(adapter, unguided.table, prompts, seed=2, cfg=1.0, compute=compute, batch=2).numpy()
    # float32 through 5 calls; a batch of one and one of two, as two libraries, round differently
    close = 1e-5 * np.abs(want).max()
    assert np.abs(got - want).max() <= close and np.abs(got[2:] - last).max() <= close


def test_tensorrt_rtx_builds_engines_that_take_prompts(unguided: Exported, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    bundle = open_bundle(unguided.path)
    rows = {f"cache_in.{name}": shape[0] for name, shape in bundle.plan.slots.items()}
    graph, engine = bundle.path / bundle.graphs[1], tmp_path / "rtx.engine"
    built = build_engine(graph, engine, flavor="rtx", sm=89, batch=(1, 2, 4), per_sample=rows)
    assert built.inputs["prompt_embeds"] == (-1, 5, 10) and built.inputs["prompt_mask"] == (-1, 5)
    assert engine.stat().st_size == built.engine_bytes
