"""`hcompress quantize` as a user types it, and its folder as the MODEL of every other verb."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from conftest import CALLS, CFG, make_dit, random_corrections, random_mask
from PIL import Image

from hcompress.errors import EngineError, ModelError, RecipeError, ScheduleError
from hcompress.lowbit.adapter import QuantizedAdapter
from hcompress.lowbit.artefact import read_origin
from hcompress.models.loading import load_model
from hcompress.quantize import quantize, resample
from hcompress.recipe import resolve_any, resolve_quant
from hcompress.schedule import Schedule
from hcompress.setting import open_setting
from hcompress_runtime.bundle import open_bundle
from hcompress_runtime.engine_cache import build_engines


@pytest.fixture(scope="module")
def model(tiny_run: Path) -> Path:
    """The diffusers folder of the tiny pixel-space model."""
    return tiny_run.parent / "model"


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It, quantized. Do not change it."""
    out = tmp_path_factory.mktemp("quantized") / "q"
    flags = {"model": str(model), "solver.steps": CALLS, "cfg": CFG, "quant.samples": 4}
    quantize(resolve_quant(None, flags), out)
    return out


def line(stderr: str) -> str:
    """The one line of an error."""
    lines = [text for text in stderr.splitlines() if text.startswith("error: ")]
    assert len(lines) == 1, stderr
    return lines[0]


def test_a_table_of_what_it_did_and_a_folder_that_is_a_model(hcompress: Any, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "q"
    flags = (
        "--steps",
        CALLS,
        "--method",
        "ptq4dit",
        "--samples",
        3,
        "--set",
        "quant.samples=4",
        "--json",
        "--out",
        out,
    )
    code, stdout, _ = hcompress("quantize", model, *flags)
    assert code == 0
    figures = json.loads(stdout)
    assert figures["quantized"]["psnr_db"] > 30  # eight bits; half of all pixels wrong by a tenth would be 23
    assert figures["quantized"]["megabytes"] < figures["float"]["megabytes"]
    assert {file.name for file in out.iterdir()} == {
        "recipe.yaml",
        "env.json",
        "quality.json",
        "quantized.safetensors",
    }
    assert json.loads((out / "quality.json").read_text()) | {"out": str(out)} == figures
    assert hcompress("quantize", model, *flags, "--resume")[0] == 0 and not (out / "metrics.jsonl").exists()
    assert resolve_any(out / "recipe.yaml").quant.method == "ptq4dit"  # type: ignore[union-attr]
    loaded = load_model(str(out))
    assert isinstance(loaded.adapter, QuantizedAdapter) and loaded.folder == model


def test_resume_opens_what_is_finished_and_another_recipe_is_refused(
    hcompress: Any, run: Path, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "q"
    shutil.copytree(run, out)
    before = (out / "quantized.safetensors").stat().st_mtime_ns
    common = (
        "quantize",
        model,
        "--steps",
        CALLS,
        "--cfg",
        CFG,
        "--set",
        "quant.samples=4",
        "--samples",
        0,
        "--out",
        out,
    )
    assert hcompress(*common, "--resume")[0] == 0
    assert (out / "quantized.safetensors").stat().st_mtime_ns == before
    assert "is not empty; pass --resume" in line(hcompress(*common)[2])
    assert "quant.method: int8-max != fp8" in line(hcompress(*common, "--resume", "--method", "fp8")[2])


def test_train_and_generate_take_it_with_no_other_flag(hcompress: Any, run: Path, tmp_path: Path) -> None:
    trained = tmp_path / "t"
    small = ("--target-cur", 0.3, "--set", "caching.trajectories=2", "--set", "caching.batch=1")
    assert hcompress("train", run, *small, "--out", trained)[0] == 0
    schedule = Schedule.load(trained / "schedule.safetensors")
    assert (schedule.num_calls, schedule.identity.cfg, schedule.identity.model) == (CALLS, CFG, str(run))
    setting = open_setting(str(run), "ddim", CALLS, CFG)
    schedule.check_fits(setting.adapter.graph, setting.identity)
    picture = tmp_path / "p.png"
    given = ("--schedule", trained / "schedule.safetensors", "--labels", "0,1", "--out", picture)
    assert hcompress("generate", run, *given)[0] == 0
    with Image.open(picture) as image:
        assert image.size[1] == 8
    with pytest.raises(ScheduleError, match="config_hash"):  # of the float model it was quantized from
        dense = open_setting(str(setting.model.folder), "ddim", CALLS, CFG)
        schedule.check_fits(dense.adapter.graph, dense.identity)


def test_verify_says_how_it_compared_a_bundle_in_few_bits(hcompress: Any, run: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    assert hcompress("export", run, "--schedule", "interval:2", "--out", bundle)[0] == 0
    code, out, _ = hcompress("verify", bundle, "--json")
    proof = next(proof for proof in json.loads(out)["proofs"] if not proof["skipped"])
    assert code == 0 and proof["rounded"] and proof["worst"] <= proof["tolerance"] == 1e-4  # as without rounding
    assert proof["chained"] <= proof["chained_tolerance"] and proof["chained_tolerance"] >= 1e-3
    assert "call by call, of the same rounded inputs, " in hcompress("verify", bundle)[1]


def test_eval_and_inspect_take_it(hcompress: Any, run: Path, tmp_path: Path) -> None:
    setting = open_setting(str(run), "ddim", CALLS, CFG)
    mask = random_mask(CALLS, len(setting.adapter.graph))
    file = tmp_path / "schedule.safetensors"
    Schedule(mask, setting.adapter.graph.names, setting.identity, {"name": "random"}).save(file)
    code, stdout, _ = hcompress("eval", run, "--schedule", file, "--samples", 2, "--json")
    assert code == 0 and json.loads(stdout)["cur"] == pytest.approx(1 - mask.mean())
    code, stdout, _ = hcompress("inspect", run, "--json")
    described = json.loads(stdout)
    assert code == 0 and len(described["branches"]) == 4
    assert described["quantization"]["method"]["name"] == "int8-max"


def test_a_schedule_of_its_own_is_what_it_runs_under_unless_told_otherwise(
    hcompress: Any, run: Path, tmp_path: Path
) -> None:
    own = tmp_path / "q"
    shutil.copytree(run, own)
    setting = open_setting(str(own), "ddim", CALLS, CFG)
    mask = np.zeros((CALLS, len(setting.adapter.graph)), bool)
    mask[0] = True
    Schedule(mask, setting.adapter.graph.names, setting.identity, {"name": "rare"}).save(own / "schedule.safetensors")
    told, pixels = f"under {own / 'schedule.safetensors'}, the schedule that its step sizes were made for", {}
    ways: dict[str, tuple[object, ...]] = {"own": (), "given": ("--schedule", own), "dense": ("--dense",)}
    for name, flags in ways.items():
        code, _, err = hcompress("generate", own, "--labels", "0,1,2,3,4", "--out", tmp_path / f"{name}.npz", *flags)
        assert code == 0 and (told in err) == (name == "own")
        pixels[name] = np.load(tmp_path / f"{name}.npz")["arr_0"]
        code, stdout, err = hcompress("eval", own, "--samples", 2, "--json", *flags)
        assert code == 0 and (told in err) == (name == "own")
        assert json.loads(stdout).get("cur") == (None if name == "dense" else pytest.approx(1 - mask.mean()))
    assert (pixels["own"] == pixels["given"]).all() and (pixels["own"] != pixels["dense"]).any()
    code, _, err = hcompress("eval", own, "--schedule", own, "--dense")
    assert code == 1 and "leave out --dense or --schedule" in line(err)
    assert "error" not in hcompress("eval", own, "--reuse", "taylor", "--samples", 2)[2]


def quantized_as(method: str, model: Path, out: Path) -> Path:
    flags = {"model": str(model), "solver.steps": CALLS, "cfg": CFG, "quant.method": method, "quant.samples": 1}
    quantize(resolve_quant(None, flags), out)
    return out


def test_an_opset_is_what_the_bundle_is_in_or_one_line(hcompress: Any, model: Path, tmp_path: Path) -> None:
    source, out = quantized_as("int4-wo", model, tmp_path / "q"), tmp_path / "bundle"
    code, _, err = hcompress("export", source, "--opset", 20, "--out", out)
    assert code == 1 and "ONNX opset 20 has no int4 weights; use 21" in line(err) and not out.exists()
    assert hcompress("export", source, "--opset", 22, "--out", out)[0] == 0
    bundle = open_bundle(out)
    files = [onnx.load(out / graph, load_external_data=False) for graph in (*bundle.graphs, "update.onnx")]
    assert {file.opset_import[0].version for file in files} == {bundle.manifest["opset"]} == {22}


def test_float8_engines_for_a_gpu_without_it_are_refused_before_the_export(
    hcompress: Any, model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed; pip install 'hcompress[trt-rtx]'")
    source, out = quantized_as("fp8", model, tmp_path / "q"), tmp_path / "bundle"
    engines = ("--trt", "--flavor", "rtx", "--sm", 120, "--sm", 86)
    code, _, err = hcompress("export", source, *engines, "--out", out)
    assert code == 1 and "sm_86 has no float8, which needs sm_89 or newer; quantize to int8" in line(err)
    assert not out.exists()
    assert hcompress("export", source, "--out", out, "--no-prove")[0] == 0
    with pytest.raises(EngineError, match="sm_86 has no float8"):
        build_engines(open_bundle(out), "rtx", [120, 86])
    assert not (out / "engines").exists()


def test_analyze_ranks_and_draws(hcompress: Any, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    flags = ("--steps", CALLS, "--analyze", "--set", "quant.samples=2", "--only", "*.ff.*", "--json", "--out", out)
    code, stdout, _ = hcompress("quantize", model, *flags)
    assert code == 0
    ranked = json.loads(stdout)["layers"]
    assert len(ranked) == 4 and ranked[0]["error"] >= ranked[-1]["error"] > 0
    with Image.open(out / "sensitivity.png") as image:
        assert image.width > 300
    assert not (out / "quantized.safetensors").exists()


def test_dry_run_says_what_and_writes_nothing(hcompress: Any, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "q"
    code, stdout, _ = hcompress("quantize", model, "--steps", CALLS, "--keep", "*.to_out.0", "--dry-run", "--out", out)
    assert code == 0 and not out.exists()
    assert "transformer_blocks.0.attn1.to_q" in stdout and "to_out" not in stdout


def test_another_grid_is_refused_until_it_is_resampled(hcompress: Any, run: Path, tmp_path: Path) -> None:
    code, _, stderr = hcompress("generate", run, "--steps", 7, "--labels", "0", "--out", tmp_path / "p.png")
    assert code == 1
    assert f"calls of DDIMScheduler with {CALLS} steps, not for DDIMScheduler with 7" in line(stderr)
    out = tmp_path / "other"
    assert hcompress("quantize", run, "--resample-steps", "--steps", 7, "--out", out)[0] == 0
    assert hcompress("generate", out, "--labels", "0", "--out", tmp_path / "p.png")[0] == 0
    first, then = (load_model(str(path)).adapter for path in (run, out))
    assert isinstance(first, QuantizedAdapter) and isinstance(then, QuantizedAdapter)
    assert then.log_scales.shape[0] == 7
    for timestep, row in zip(then.timesteps, then.log_scales, strict=True):
        assert torch.equal(row, first.log_scales[(first.timesteps - timestep).abs().argmin()])
    before = (out / "quantized.safetensors").stat().st_mtime_ns
    again = ("quantize", run, "--resample-steps", "--steps", 7, "--out", out)
    assert "is not empty; pass --resume" in line(hcompress(*again)[2])
    assert hcompress(*again, "--resume")[0] == 0
    assert (out / "quantized.safetensors").stat().st_mtime_ns == before
    plan = ("quantize", run, "--resample-steps", "--steps", 9, "--dry-run", "--json", "--out", tmp_path / "plan")
    assert json.loads(hcompress(*plan)[1])["steps"] == 9
    assert not (tmp_path / "plan").exists()


@pytest.mark.parametrize(
    "flags", [("--method", "fp8"), ("--set", "quant.samples=2"), ("--keep", "*"), ("--analyze",), ("--samples", 9)]
)
def test_flags_without_meaning_beside_resampling_are_refused(
    hcompress: Any, run: Path, tmp_path: Path, flags: tuple[Any, ...]
) -> None:
    code, _, stderr = hcompress("quantize", run, "--resample-steps", *flags, "--out", tmp_path / "q")
    assert code == 1 and line(stderr).startswith(f"error: {flags[0]} has no meaning with --resample-steps")
    assert not (tmp_path / "q").exists()


def test_a_model_for_a_schedule_is_not_resampled_to_calls_that_schedule_cannot_have(
    tiny_run: Path, model: Path, tmp_path: Path
) -> None:
    recipe = resolve_quant(None, {"model": str(model), "solver.steps": CALLS, "cfg": CFG, "quant.samples": 1})
    quantize(recipe, tmp_path / "q", schedule=Schedule.load(tiny_run / "schedule.safetensors"))
    with pytest.raises(ScheduleError, match=r"was made for a schedule of 5 calls, which no run of 7 can have"):
        resample(str(tmp_path / "q"), "ddim", 7, CFG, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert resample(str(tmp_path / "q"), "dpm++", CALLS, CFG, tmp_path / "other").table.num_calls == CALLS


@pytest.mark.parametrize("method", ["int8-max", "efficientdm"])
def test_what_is_refused_leaves_no_folder_in_the_way(hcompress: Any, model: Path, tmp_path: Path, method: str) -> None:
    small = ("--set", "quant.samples=1", "--set", "quant.batch=1", "--samples", 0)
    small += ("--set", f"quant.updates={CALLS}") if method == "efficientdm" else ()
    command = ("quantize", model, "--method", method, "--steps", CALLS, *small, "--out", tmp_path / "q")
    assert hcompress(*command, "--keep", "*attention*")[0] == 1
    assert hcompress(*command, "--keep", "*attn1*")[0] == 0


@pytest.mark.parametrize("asked", ["percentile=99.0", "alpha=0.5"])
def test_a_setting_of_another_method_is_refused_but_read_in_a_run_that_has_it(
    hcompress: Any, run: Path, model: Path, tmp_path: Path, asked: str
) -> None:
    command = ("quantize", model, "--steps", CALLS, "--out", tmp_path / "q", "--set", f"quant.{asked}")
    assert f"quant.{asked.replace('=', ' = ')} would be ignored: it is int8-" in line(hcompress(*command)[2])
    old = tmp_path / "old"
    shutil.copytree(run, old)
    recipe, (key, value) = yaml.safe_load((old / "recipe.yaml").read_text()), asked.split("=")
    recipe["quant"][key] = float(value)
    (old / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert hcompress("generate", old, "--labels", "0", "--out", tmp_path / "p.png")[0] == 0


def test_a_plan_holds_what_the_method_goes_by(model: Path, tmp_path: Path) -> None:
    common = {"model": str(model), "solver.steps": CALLS, "quant.samples": 1}
    told = {}
    for method in ("int8-max", "int8-percentile", "int8-smoothquant", "ptq4dit"):
        quantize(resolve_quant(None, common | {"quant.method": method}), tmp_path / method)
        told[method] = read_origin(tmp_path / method / "quantized.safetensors").plan["method"].keys()
    assert told["int8-percentile"] - told["int8-max"] == {"percentile"}
    assert told["int8-smoothquant"] - told["int8-max"] == {"alpha"}
    assert told["ptq4dit"] == told["int8-max"] == {"name", "one_scale", "samples", "batch"}


# ---- what is refused, in one line


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ("--format", "nvfp4"),
            "quant.format = 'nvfp4' needs a Blackwell GPU and is not written by hcompress; what runs",
        ),
        (("--format", "w3a3"), "quant.format = 'w3a3' should be one of w8a8"),
        (("--method", "fp8", "--format", "w4a4"), "quant.format = 'w4a4' is none of fp8's: fp8"),
        (("--method", "int8"), "quant.method = 'int8' does not exist; did you mean 'int8-max'?"),
        (("--set", "quant.samples=0"), "quant.samples = 0 should be greater than or equal to 1"),
        (("--set", "quant.sampels=4"), "unknown key 'quant.sampels'; did you mean 'quant.samples'?"),
        (("--set", "caching.beta=1.0"), "a caching section is for `hcompress train`, and this is `hcompress quantize`"),
        (("--keep", "*attention*"), "the pattern '*attention*' matches no linear layer"),
        (("--resample-steps",), "--resample-steps is for a folder of `hcompress quantize`"),
    ],
)
def test_bad_flags(hcompress: Any, model: Path, tmp_path: Path, flags: tuple[str, ...], said: str) -> None:
    code, stdout, stderr = hcompress("quantize", model, "--steps", CALLS, *flags, "--out", tmp_path / "q")
    assert (code, stdout) == (1, "")
    assert said in line(stderr)
    assert not (tmp_path / "q" / "quantized.safetensors").exists()


def test_a_quantized_model_is_not_quantized_again(hcompress: Any, run: Path, model: Path, tmp_path: Path) -> None:
    said = line(hcompress("quantize", run, "--steps", CALLS, "--out", tmp_path / "q")[2])
    assert f"{run} is quantized already; quantize {model}" in said


def test_a_base_with_other_weights_is_refused(tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    out = tmp_path / "q"
    quantize(resolve_quant(None, {"model": str(folder), "solver.steps": CALLS, "quant.samples": 1}), out)
    make_dit(channels=1, seed=1).network.save_pretrained(folder / "transformer")
    with pytest.raises(ModelError, match=r"was made from a .* of other weights .* bring that model back"):
        load_model(str(out))
    shutil.rmtree(folder)
    with pytest.raises(ModelError, match=r"was quantized from .*, which it needs: no model folder|is no local folder"):
        load_model(str(out))


def test_a_damaged_file_is_one_line(tmp_path: Path, run: Path) -> None:
    out = tmp_path / "q"
    shutil.copytree(run, out)
    file = out / "quantized.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="is truncated or not a safetensors file"):
        load_model(str(out))


def test_a_schedule_of_another_model_is_refused(tmp_path: Path, tiny_run: Path, model: Path) -> None:
    recipe = resolve_quant(None, {"model": str(model), "solver.steps": 7, "quant.samples": 1})
    schedule = Schedule.load(tiny_run / "schedule.safetensors")
    with pytest.raises(ScheduleError, match="5 steps, but this run uses DDIMScheduler with 7"):
        quantize(recipe, tmp_path / "q", schedule=schedule)
    assert not (tmp_path / "q").exists()


def test_a_corrected_schedule_of_the_float_model_is_refused(tmp_path: Path, tiny_run: Path, model: Path) -> None:
    recipe = resolve_quant(None, {"model": str(model), "solver.steps": CALLS, "quant.samples": 1})
    graph = load_model(str(model)).adapter.graph
    schedule = Schedule.load(tiny_run / "schedule.safetensors").reusing("taylor", graph)
    with pytest.raises(ScheduleError, match="a schedule of taylor reuse belongs to the float model; quantize under"):
        quantize(recipe, tmp_path / "q", schedule=schedule)
    assert not (tmp_path / "q").exists()


def test_the_command_that_strips_a_corrected_schedule_works_as_it_is_printed(
    hcompress: Any, model: Path, tiny_run: Path, tmp_path: Path
) -> None:
    schedule = Schedule.load(tiny_run)
    vectors = random_corrections(schedule.compute, load_model(str(model)).adapter.graph.widths)
    replace(schedule, corrections=vectors).save(tmp_path / "fitted.safetensors")
    common = ("quantize", model, "--set", "quant.updates=5", "--keep-schedule", "--samples", 0, "--out", tmp_path / "q")
    code, _, err = hcompress(*common, "--with-cache", tmp_path / "fitted.safetensors")
    assert code == 1 and not (tmp_path / "q").exists()
    command = line(err).split("hcompress train ")[1].removesuffix(", then fit to what came out: ")
    assert hcompress("train", *shlex.split(command.replace("PLAIN", str(tmp_path / "plain"))))[0] == 0
    stripped = Schedule.load(tmp_path / "plain")
    assert stripped.reuse == "plain" and (stripped.compute == schedule.compute).all()
    assert hcompress(*common, "--with-cache", tmp_path / "plain")[0] == 0


def test_a_recipe_is_of_one_kind(tmp_path: Path) -> None:
    file = tmp_path / "both.yaml"
    file.write_text("model: m\nquant: {method: fp8}\ncaching: {target_cur: 0.4}\n")
    with pytest.raises(RecipeError, match="a caching section is for `hcompress train`"):
        resolve_any(file)
