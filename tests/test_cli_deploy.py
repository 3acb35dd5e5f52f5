"""`export`, `generate` and `bench` as a user types them, on a tiny pixel-space model."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CALLS, export, random_corrections, random_mask
from diffusers import DiTTransformer2DModel
from PIL import Image

from hcompress.models.dit import DiT
from hcompress.models.loading import load_model
from hcompress.report.latency import compare_bundles
from hcompress.schedule import Schedule
from hcompress_runtime.bundle import WEIGHTS, open_bundle
from hcompress_runtime.errors import HcompressError
from hcompress_runtime.images import grid
from hcompress_runtime.measure import peak_memory_bytes


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image, float)


@pytest.fixture(scope="module")
def exported(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bundle` and `bundle-dense` of `tiny_run`, in one folder."""
    from typer.testing import CliRunner

    from hcompress.cli.main import app

    folder = tmp_path_factory.mktemp("exported")
    for name, flags in (("bundle", ["--onnx"]), ("bundle-dense", ["--dense", "--json"])):
        done = CliRunner().invoke(app, ["export", str(tiny_run), "--out", str(folder / name), *flags])
        assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    assert (figures["num_graphs"], figures["peak_cache_bytes"], figures["cur"]) == (1, 0, 0)
    assert max(figures["parity"]) < 1e-5
    return folder


def test_export_leaves_a_picture_and_what_the_schedule_asks(exported: Path) -> None:
    bundle = open_bundle(exported / "bundle")
    assert 0 < bundle.cur < 1 < bundle.mac_ratio
    assert picture(exported / "bundle" / "preview.png").shape == (8, 5 * 8 + 4 * 2)  # five classes, one row
    assert {file.name for file in exported.iterdir()} == {"bundle", "bundle-dense"}


def test_samples_are_the_same_in_a_grid_in_files_in_an_npz_and_in_parts(
    hcompress: Any, exported: Path, tmp_path: Path
) -> None:
    def generate(labels: str, out: str, *more: object) -> None:
        asked = ("generate", exported / "bundle", "--labels", labels, "--seed", 3, "--batch", 2, *more)
        code, _, err = hcompress(*asked, "--out", tmp_path / out)
        assert code == 0, err

    generate("0,1,2,3,4", "grid.png")
    generate("0,1,2,3,4", "all.npz")
    generate("3,4", "files", "--first", 3)  # a later part before the first one
    generate("0,1,2", "files")
    pixels = np.load(tmp_path / "all.npz")["arr_0"]
    assert pixels.shape == (5, 8, 8, 3) and pixels.dtype == np.uint8
    assert [file.name for file in sorted((tmp_path / "files").iterdir())] == [f"{i:06}.png" for i in range(5)]
    whole = picture(tmp_path / "grid.png")
    for number, gray in enumerate(pixels[..., 0]):
        assert np.array_equal(picture(tmp_path / "files" / f"{number:06}.png"), gray)
        assert np.array_equal(whole[:, 10 * number : 10 * number + 8], gray)
    code, _, err = hcompress("generate", exported / "bundle", "--labels", "0", "--out", tmp_path / "x.jpg")
    assert code == 1 and "should be a .png (one grid), an .npz (pixels) or a folder" in err
    code, _, err = hcompress(
        "generate", exported / "bundle", "--labels", "0,1,9", "--batch", 1, "--out", tmp_path / "no"
    )
    assert code == 1 and not (tmp_path / "no").exists()  # before any is made


def test_a_bundle_and_its_model_give_the_same_picture(
    hcompress: Any, exported: Path, tiny_run: Path, tmp_path: Path
) -> None:
    common = ("--labels", "0,1,2,3,4,0,1,2,3,4,0", "--seed", 7, "--json")
    one = json.loads(hcompress("generate", exported / "bundle", *common, "--out", tmp_path / "one.png")[1])
    schedule = ("--schedule", tiny_run / "schedule.safetensors")
    other = json.loads(
        hcompress("generate", tiny_run.parent / "model", *schedule, *common, "--out", tmp_path / "other.png")[1]
    )
    assert (one["backend"], other["backend"]) == ("onnxruntime", "torch")
    assert one["latency_ms"] > 0 and one["out"] == str(tmp_path / "one.png")
    pixels = [picture(tmp_path / name) for name in ("one.png", "other.png")]
    assert pixels[0].shape == (8 + 2 + 8, 10 * 8 + 9 * 2)
    assert np.abs(pixels[0] - pixels[1]).max() <= 1  # one level, where a value lies between two


def test_bench_prints_what_others_script_against(hcompress: Any, exported: Path) -> None:
    code, out, _ = hcompress(
        "bench", exported / "bundle", "--batch", 2, "--rounds", 2, "--threads", 1, "--torch", "--json"
    )
    figures = json.loads(out)
    assert code == 0
    assert figures["speedup"] == pytest.approx(figures["dense_latency_ms"] / figures["latency_ms"])
    assert figures["efficiency"] == pytest.approx(figures["speedup"] / figures["mac_ratio"])
    assert figures["cur"] == open_bundle(exported / "bundle").cur
    assert figures["torch_latency_ms"] > 0 and figures["dense_torch_latency_ms"] > 0
    if sys.platform == "linux":
        assert figures["peak_memory_bytes"] > 10_000_000 and figures["dense_peak_memory_bytes"] > 10_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="no proportional set size")
def test_bench_measures_memory_before_it_holds_the_same_pages(tmp_path: Path) -> None:
    """Of weights that are mapped, as the inputs of `per-mask` are, two processes would count half each."""
    shape: dict[str, Any] = {"num_attention_heads": 6, "attention_head_dim": 64, "in_channels": 2, "num_layers": 4}
    network = DiTTransformer2DModel(**shape, sample_size=8, num_embeds_ada_norm=5, norm_type="ada_norm_zero")
    adapter = DiT(network)
    cached = export(tmp_path / "cached", adapter, random_mask(CALLS, len(adapter.graph)), layout="per-mask").path
    dense = export(tmp_path / "dense", adapter, None, layout="per-mask").path
    alone = [peak_memory_bytes(path, 1, 1) for path in (cached, dense)]
    figures = compare_bundles(cached, dense, batch=1, rounds=1, threads=1)
    for want, prefix in zip(alone, ("", "dense_"), strict=True):
        # two processes differ by a few MB of heap; half the weights are 20 MB and more
        assert figures[f"{prefix}peak_memory_bytes"] == pytest.approx(want, abs=(dense / WEIGHTS).stat().st_size / 6)


MISTAKES = {
    "labels that are no numbers": (["generate", "{bundle}", "--labels", "shoe"], "--labels 'shoe' should be numbers"),
    "a class that is not there": (["generate", "{bundle}", "--labels", "9"], "label 9 is outside 0..4"),
    "neither bundle nor model": (["generate", "{bundle}/graphs", "--labels", "0"], "is no diffusers folder"),
    "other steps of a bundle": (
        ["generate", "{bundle}", "--labels", "0", "--steps", "10", "--cfg", "2"],
        "frozen with its own --steps, --cfg",
    ),
    "a cached bundle for an uncached one": (
        ["bench", "{cached}", "--against", "{cached}"],
        "is cached too (CUR 60 %); compare with one that `hcompress export --dense` made",
    ),
    "guidance that is no number": (["generate", "{model}", "--labels", "0", "--cfg", "nan"], "--cfg nan should be a"),
    "a tolerance of nothing": (["verify", "{bundle}", "--tolerance", "nan"], "--tolerance nan should be a positive"),
    "a picture of no schedule": (["inspect", "{model}", "--png", "x.png"], "--png pictures a schedule"),
    "a picture where none can be": (["inspect", "{run}", "--png", "/proc/x.png"], "cannot write /proc/x.png"),
    "no such run": (["export", "{bundle}/no-run"], "no-run"),
    "a folder of something else": (["export", "{run}"], "exists and is no bundle"),
    "two different bundles": (["bench", "{bundle}", "--against", "{tiny}"], "differ in config_hash"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_1(
    hcompress: Any,
    exported: Path,
    tiny_run: Path,
    tiny_dense_bundle: Any,
    tiny_bundle: Any,
    tmp_path: Path,
    name: str,
) -> None:
    arguments, message = MISTAKES[name]
    places = {"bundle": exported / "bundle", "run": tiny_run, "tiny": tiny_dense_bundle.path}
    places |= {"cached": tiny_bundle.path, "model": tiny_run.parent / "model"}
    filled = [argument.format(**places) for argument in arguments]
    if filled[0] in ("generate", "export"):
        (tmp_path / "precious").write_bytes(b"precious")
        filled += ["--out", str(tmp_path if filled[0] == "export" else tmp_path / "grid.png")]
    code, out, err = hcompress(*filled)
    assert (code, out) == (1, "")
    assert message in err and err.startswith("error: ") and err.count("\n") == 1
    assert not {*tmp_path.iterdir()} - {tmp_path / "precious"}


def test_a_grid_is_ten_a_row_with_white_between() -> None:
    samples = np.full((12, 3, 4, 5), -1, np.float32)
    samples[11] = 1.0
    pixels = grid(samples)
    assert pixels.shape == (4 + 2 + 4, 10 * 5 + 9 * 2, 3)
    assert (pixels[:4, :5] == 0).all() and (pixels[:, 5:7] == 255).all() and (pixels[6:, 7:12] == 255).all()
    assert (pixels[6:, 14:] == 255).all()  # an unfinished row is filled up with white
    assert grid(samples[:1, :1]).shape == (4, 5)
    assert grid(np.float32([[[[-3, -1, 0, 1, 3]]]])).tolist() == [[0, 0, 128, 255, 255]]


def test_inspect_shows_the_schedule_of_a_bundle_or_says_that_there_is_none(
    hcompress: Any, exported: Path, tiny_run: Path
) -> None:
    code, out, _ = hcompress("inspect", exported / "bundle", "--json")
    assert code == 0 and out == hcompress("inspect", tiny_run, "--json")[1]
    code, _, err = hcompress("inspect", exported / "bundle-dense")
    model = tiny_run.parent / "model"
    assert code == 1 and f"is a dense bundle, which has no schedule; inspect one that has, or MODEL: {model}" in err


def test_verify_finds_that_bundles_agree_with_pytorch(hcompress: Any, exported: Path) -> None:
    code, out, _ = hcompress("verify", exported / "bundle", "--json")
    proofs = json.loads(out)["proofs"]
    assert code == 0
    assert [Path(proof["bundle"]).name for proof in proofs if proof["backend"] == "cpu"] == ["bundle", "bundle-dense"]
    assert all(0 < proof["worst"] <= proof["tolerance"] == 1e-4 for proof in proofs if not proof["skipped"])
    assert "agrees" in hcompress("verify", exported / "bundle")[1]


def test_verify_names_the_first_tensor_that_a_wrong_weight_moves(
    hcompress: Any, exported: Path, tiny_run: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    network = load_file(tiny_run.parent / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
    wrong = network["transformer_blocks.1.ff.net.2.weight"].tobytes()
    folder = shutil.copytree(exported / "bundle", tmp_path / "bundle")
    weights, manifest = folder / "graphs" / "weights.safetensors", folder / "manifest.json"
    before = weights.read_bytes()
    assert before.count(wrong) == 1
    weights.write_bytes(before.replace(wrong, bytes(len(wrong))))
    hashes = [hashlib.sha256(data).hexdigest() for data in (before, weights.read_bytes())]
    manifest.write_text(manifest.read_text().replace(*hashes))
    code, out, _ = hcompress("verify", folder, "--json")
    drift = json.loads(out)["proofs"][0]["first_drift"]
    assert code == 1 and drift["call"] == 0 and drift["error"] > 1e-4
    assert drift["tensor"] == (
        "cache_out.1.mlp" if "1.mlp" in open_bundle(folder).plan.steps[0].writes else "model_output"
    )
    assert f"first drift: {drift['tensor']} of call 0" in hcompress("verify", folder)[1]


def test_verify_refuses_another_model(hcompress: Any, exported: Path) -> None:
    code, _, err = hcompress("verify", exported / "bundle", "--model", "zoo:fashion-dit")
    assert code == 1 and "other weights" in err and err.count("\n") == 1


def test_a_precision_that_no_backend_here_computes_in_is_one_line(
    hcompress: Any, tiny_run: Path, tmp_path: Path
) -> None:
    asked = ("export", tiny_run, "--dense", "--dtype", "bfloat16", "--out", tmp_path / "bundle")
    code, _, err = hcompress(*asked)
    if code == 0:
        pytest.skip("this onnxruntime has bfloat16 kernels for CPUs")
    assert code == 1 and "has no cpu kernel" in err and "--dtype float16, or with --no-prove" in err
    assert err.count("\n") == 1 and not [*tmp_path.iterdir()]
    assert hcompress(*asked, "--no-prove")[0] == 0
    code, out, _ = hcompress("verify", tmp_path / "bundle")
    assert "on cpu: skipped, onnxruntime" in out and code == int(
        "agrees" not in out
    )  # where nothing ran, nothing holds


def test_dry_run_says_what_every_layout_takes_and_writes_nothing(
    hcompress: Any, tiny_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    code, text, _ = hcompress("export", tiny_run, "--out", out, "--dry-run", "--json")
    figures = json.loads(text)
    assert code == 0 and not out.exists() and figures["why"].startswith(f"{figures['layout']}: ")
    assert [one["layout"] for one in figures["layouts"]] == ["embedded", "per-mask", "switch"]
    assert all(one["device_bytes"] > one["weight_bytes"] > 0 < one["disk_bytes"] for one in figures["layouts"])
    assert "scratch" in hcompress("export", tiny_run, "--dry-run")[1]


def test_a_schedule_in_a_file_brings_its_steps_and_guidance_and_another_scale_is_warned_of(
    hcompress: Any, tiny_run: Path, tmp_path: Path
) -> None:
    schedule, model = Schedule.load(tiny_run), tiny_run.parent / "model"
    widths = load_model(str(model)).adapter.graph.widths
    identity = replace(schedule.identity, cfg=2.5)
    fitted = replace(schedule, identity=identity, corrections=random_corrections(schedule.compute, widths))
    fitted.save(tmp_path / "fitted.safetensors")
    flags = ("--schedule", tmp_path / "fitted.safetensors", "--out", tmp_path / "bundle", "--no-prove")
    code, _, err = hcompress("export", model, *flags)
    bundle = open_bundle(tmp_path / "bundle")
    assert code == 0 and "fitted" not in err and (bundle.table.num_calls, bundle.cfg) == (CALLS, 2.5)
    code, _, err = hcompress("export", model, *flags, "--cfg", 3.0, "--dry-run")
    assert code == 0 and "corrections were fitted at guidance 2.5, not 3.0" in " ".join(err.split())
    code, _, err = hcompress("export", model, *flags, "--steps", 7)
    assert code == 1 and "use the same solver and --steps" in err
    code, _, err = hcompress("export", model, *flags, "--cfg", 3.0, "--reuse", "plain", "--dry-run")
    assert code == 0 and "fitted" not in err


@pytest.mark.parametrize(
    "command",
    [
        ("train", "--target-cur", 0.4, "--set", "caching.trajectories=2"),
        ("train", "--method", "interval", "--set", "caching.every=2"),
        ("export", "--schedule", "random:0.4"),
        ("export", "--dense"),
        ("generate", "--labels", 0),
        ("eval", "--samples", 2),
    ],
)
def test_a_model_whose_output_is_not_finite_is_one_line(
    hcompress: Any, tiny_run: Path, tmp_path: Path, command: tuple[object, ...]
) -> None:
    shutil.copytree(tiny_run.parent / "model", tmp_path / "model")
    network = DiTTransformer2DModel.from_pretrained(tmp_path / "model" / "transformer")
    network.proj_out_2.bias.data[0] = float("nan")
    network.save_pretrained(tmp_path / "model" / "transformer")
    verb, *flags = command
    out = () if verb == "eval" else ("--out", tmp_path / "out.png")
    code, printed, err = hcompress(verb, tmp_path / "model", *flags, "--steps", CALLS, *out)
    assert (code, printed) == (1, "")
    (line,) = (text for text in err.splitlines() if text.startswith("error: "))
    assert "the model's output is not finite at call 0" in line and "Traceback" not in err
    assert not [*(tmp_path / "out.png").glob("*.safetensors"), *(tmp_path / "out.png").glob("manifest.json")]


def test_a_rule_on_a_model_exports_with_merged_masks(hcompress: Any, tiny_run: Path, tmp_path: Path) -> None:
    model, out = tiny_run.parent / "model", tmp_path / "bundle"
    flags = ("--schedule", "random:0.4:1", "--steps", 5, "--out", out, "--json")
    figures = json.loads(hcompress("export", model, *flags, "--max-graphs", 2, "--layout", "per-mask")[1])
    bundle = open_bundle(out)
    assert figures["num_graphs"] == len({*bundle.graphs}) == 2 and bundle.layout == figures["layout"] == "per-mask"
    assert figures["macs_given_up"] > 0 and max(figures["parity"]) < 1e-5
    assert bundle.manifest["method"] == {"name": "rule", "rule": "random:0.4:1", "max_graphs": 2}
    one = json.loads(hcompress("export", model, *flags, "--layout", "switch", "--no-prove")[1])
    assert one["num_graphs"] == 1 and one["parity"] == [] and open_bundle(out).layout == "switch"


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--layout", "folded"], "no layout 'folded'; choose from: auto, embedded, per-mask, switch"),
        (["--memory-budget", "many"], "--memory-budget 'many' should be a size such as 8GB"),
        (["--memory-budget", "100kB"], "no layout fits into 0.1 MB: the smallest, per-mask, needs"),
        (["--memory-budget", "1kB", "--layout", "switch"], "switch needs"),
        (["--max-graphs", "0"], "--max-graphs 1 or more"),
        (["--dtype", "float8"], "no precision 'float8'; choose from: float32, float16, bfloat16"),
        (["--opset", "17"], "--opset 17 should be one of 18 to 24; 20 is the usual one"),
    ],
)
def test_what_export_cannot_do_is_one_line(
    hcompress: Any, tiny_run: Path, tmp_path: Path, flags: list[str], line: str
) -> None:
    code, _, err = hcompress("export", tiny_run, "--out", tmp_path / "bundle", *flags)
    assert code == 1 and line in err and err.count("\n") == 1 and not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--cfg", "7.5"], "is for --cfg 1.5, not 7.5; leave --cfg out"),
        (["--steps", "99"], f"is for --steps {CALLS}, not 99"),
        (["--solver", "unipc"], "is for --solver ddim, not unipc"),
        (["--schedule", "random:0.4"], "is a run with a schedule of its own; leave out --schedule"),
    ],
)
def test_a_run_is_not_exported_as_something_else(
    hcompress: Any, tiny_run: Path, tmp_path: Path, flags: list[str], line: str
) -> None:
    code, out, err = hcompress("export", tiny_run, "--out", tmp_path / "bundle", *flags)
    assert (code, out) == (1, "") and line in err and err.count("\n") == 1
    same = ["--steps", CALLS, "--solver", "ddim", "--dry-run"]
    assert hcompress("export", tiny_run, *same)[0] == 0


def test_a_bundle_is_not_put_in_place_of_where_one_is(
    hcompress: Any, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = hcompress("export", tiny_run, "--out", ".", "--no-prove")
    assert code == 1 and "is where you are" in err and err.count("\n") == 1 and not [*tmp_path.iterdir()]
    (tmp_path / "link").symlink_to(tmp_path / "bundle")
    (tmp_path / "bundle").mkdir()
    for _ in range(2):
        assert hcompress("export", tiny_run, "--out", "link", "--no-prove")[0] == 0
        assert (tmp_path / "link").is_symlink() and open_bundle(tmp_path / "bundle").layout


def test_a_process_that_is_killed_is_one_line(exported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As where memory runs out."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nkill -9 $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(HcompressError, match="killed by signal 9, as happens where memory runs out"):
        peak_memory_bytes(exported / "bundle", 1)


def test_verify_leaves_out_a_neighbour_that_is_another_model(
    hcompress: Any, exported: Path, tiny_dense_bundle: Any, tmp_path: Path
) -> None:
    shutil.copytree(exported / "bundle", tmp_path / "bundle")
    shutil.copytree(tiny_dense_bundle.path, tmp_path / "bundle-dense")
    code, out, _ = hcompress("verify", tmp_path / "bundle")
    assert code == 0 and "bundle on cpu: agrees" in out and "it is of another model" in " ".join(out.split())


def test_a_model_without_a_schedule_is_one_line(hcompress: Any, tiny_run: Path, tmp_path: Path) -> None:
    code, _, err = hcompress("export", tiny_run.parent / "model", "--out", tmp_path / "bundle")
    assert code == 1 and "--schedule" in err and err.count("\n") == 1
    code, _, err = hcompress("export", tiny_run)
    assert code == 1 and "--out" in err


def test_export_builds_engines_for_gpus_that_are_not_here(hcompress: Any, tiny_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed; pip install 'hcompress[trt-rtx]'")
    flags = ("--trt", "--flavor", "rtx", "--sm", 89, "--batch", "1,2,4", "--layout", "per-mask", "--no-prove")
    code, text, _ = hcompress("export", tiny_run, "--out", tmp_path / "bundle", *flags, "--json")
    (built,) = json.loads(text)["engines"]
    files = [*(tmp_path / "bundle" / "engines" / built["target"]).glob("*.engine.gz")]
    assert code == 0 and len(files) == json.loads(text)["num_graphs"] + 1  # and the solver's update
    assert built["engine_bytes"] == sum(file.stat().st_size for file in files) > 0 < built["seconds"]
    assert "engines for batch 1,2,4" in " ".join(
        hcompress("export", tiny_run, "--out", tmp_path / "b", *flags)[1].split()
    )


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--sm", "90"], "sm_90"),
        (["--sm", "89", "--layout", "switch"], "--layout per-mask"),
        (["--sm", "89", "--batch", "4,1"], "such as 1,4,8"),
        (["--flavor", "cpu"], "no flavor 'cpu'"),
    ],
)
def test_engines_that_cannot_be_are_refused_before_the_export(
    hcompress: Any, tiny_run: Path, tmp_path: Path, flags: list[str], line: str
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed; pip install 'hcompress[trt-rtx]'")
    flavor = [] if "--flavor" in flags else ["--flavor", "rtx"]
    code, _, err = hcompress("export", tiny_run, "--trt", *flavor, *flags, "--out", tmp_path / "bundle")
    assert code == 1 and line in err and err.count("\n") == 1 and not (tmp_path / "bundle").exists()
