"""EfficientDM, alone and under a schedule, held against its definition on a tiny DiT."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_dit, make_table, random_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from hcompress.adapter import compute_all
from hcompress.caching.problem import Progress
from hcompress.caching.settings import HarmoniCaSettings
from hcompress.cli.main import main
from hcompress.deploy import decide
from hcompress.distil import first_logits, router_settings
from hcompress.errors import RunError, ScheduleError
from hcompress.lowbit.adapter import QuantizedAdapter
from hcompress.lowbit.artefact import load_quantized
from hcompress.lowbit.linear import QuantLinear
from hcompress.models.loading import load_model
from hcompress.quant.build import build
from hcompress.quant.calibration import Walk, draw, observe
from hcompress.quant.efficientdm import Distillation, start_amax, student_of
from hcompress.quant.selection import layers_of, select
from hcompress.quant.settings import EfficientDMSettings
from hcompress.quantize import quantize
from hcompress.recipe import resolve_quant
from hcompress.report.progress import StagesDisplay, TrainingDisplay
from hcompress.sampling import sample
from hcompress.schedule import Identity, Schedule
from hcompress.setting import open_setting

CALLS, CFG = 4, 1.5
TINY = {"format": "w4a8", "updates": 10 * CALLS, "batch": 2, "rank": 4, "lr_lora": 2e-2}
COMMAND = [sys.executable, "-m", "hcompress.cli.main"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def teacher():
    return make_dit(out_channels=4)  # with a learned variance, which no trajectory may see


@pytest.fixture(scope="module")
def table():
    return make_table(calls=CALLS)[0]


def distillation_of(teacher, table, compute=None, **settings) -> Distillation:
    told = EfficientDMSettings(**TINY | settings)
    selection = select(teacher, told.resolved_format)
    walk = Walk(table, CFG, samples=2, batch=2, compute=compute)
    amax = start_amax(observe(teacher, selection, walk, num_values=256), selection)
    return Distillation(teacher, student_of(teacher, selection, amax, walk, told), walk, told)


def drain(distillation: Distillation) -> list[float]:
    return [progress.loss for progress in distillation.run()]


def step(distillation: Distillation, calls: int = 1) -> None:
    steps = distillation.steps(draw(distillation.teacher, distillation.walk, 7, 2), distillation.update)
    for _ in range(calls):
        next(steps)


@pytest.mark.parametrize("format", ["w8a8", "w4a8", "w4a4"])
@pytest.mark.parametrize("w0", ["fp", "int"])
def test_the_folded_model_is_the_trained_one_bit_for_bit(teacher, table, format, w0):
    distillation = distillation_of(teacher, table, format=format, w0=w0, updates=2 * CALLS)
    drain(distillation)
    batch = draw(teacher, distillation.walk, 99, 2)
    x = batch.start
    with torch.no_grad():
        trained = [distillation.denoise(distillation.student, call, x, batch, compute_all) for call in range(CALLS)]
        layers = list(distillation.layers)
        folded = distillation.finish()
        after = [distillation.denoise(folded, call, x, batch, compute_all) for call in range(CALLS)]
    assert all(torch.equal(a, b) for a, b in zip(trained, after, strict=True))
    for layer in layers:
        grid, left = layer.format.weight_grid, layer.fold()
        assert left.integers.min() >= grid.low and left.integers.max() <= grid.high
        assert (left.weight_scale > 0).all()
    assert not any(isinstance(module, type(layers[0])) for module in folded.network.modules())
    assert any(isinstance(module, QuantLinear) for module in folded.network.modules())


def test_untrained_it_is_plain_rounding_at_the_same_step_sizes(teacher, table):
    """B = 0 at first, so an update can only start from what int8-max gives."""
    distillation = distillation_of(teacher, table, format="w8a8")
    selection = select(teacher, "w8a8")
    seen = observe(teacher, selection, distillation.walk, num_values=256)
    plain = build(teacher, selection, seen.amax, torch.from_numpy(table.timesteps), {})
    batch = draw(teacher, distillation.walk, 3, 2)
    run = {"table": table, "condition": batch.condition, "start": batch.start, "cfg": CFG}
    # log and exp of a scale differ in the last bit, which may move a value over to the next multiple
    torch.testing.assert_close(sample(distillation.student, **run), sample(plain, **run), rtol=0, atol=5e-3)
    assert not torch.equal(sample(plain, **run), sample(teacher, **run))


def test_only_the_active_calls_step_sizes_move(teacher, table):
    """One parameter a call: Adam's momentum must not move rows whose gradient is absent."""
    distillation = distillation_of(teacher, table)
    batch = draw(teacher, distillation.walk, 7, 2)
    steps = distillation.steps(batch, distillation.update)
    for call in range(CALLS):
        before = [row.detach().clone() for row in distillation.rows]
        next(steps)
        moved = [not torch.equal(old, row) for old, row in zip(before, distillation.rows, strict=True)]
        assert moved == [index == call for index in range(CALLS)]


def test_b_learns_from_the_first_update_and_a_from_the_second(teacher, table):
    distillation = distillation_of(teacher, table)
    step(distillation)
    assert all(layer.up.grad.abs().max() > 0 for layer in distillation.layers)
    assert all(layer.down.grad.abs().max() == 0 for layer in distillation.layers)
    step(distillation)
    assert all(layer.down.grad.abs().max() > 0 for layer in distillation.layers)


def test_the_gradients_are_those_of_the_definition(teacher, table):
    """d/dB through Q(W0 + B A), straight-through, against the gradient of the merged weight by the chain rule."""
    distillation = distillation_of(teacher, table)
    layer = distillation.layers[0]
    with torch.no_grad():
        layer.up.normal_(std=1e-3, generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(1))
    with distillation.student.scales.during([torch.ones(1)] * len(distillation.rows[0])):
        layer(x).square().sum().backward()
        y = layer(x).detach()
    rounded = layer.format.activation_grid.fake(x, torch.ones(1))
    step_size = layer.log_scale.detach().exp()
    inside = (layer.merged().detach() / step_size).abs() <= layer.format.weight_grid.high
    weight_gradient = (2 * y).T @ rounded * inside
    torch.testing.assert_close(layer.up.grad, weight_gradient @ layer.down.detach().T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.down.grad, layer.up.detach().T @ weight_gradient, rtol=1e-4, atol=1e-5)


def test_the_loss_falls_and_the_model_ends_no_worse_than_rounding(teacher, table):
    before, distillation = distillation_of(teacher, table), distillation_of(teacher, table, updates=40 * CALLS)
    held = draw(teacher, before.walk, 12345, 4)

    def error(one: Distillation) -> float:
        """Relative to what it was at each call, as all calls count alike."""
        one.weights = weights
        with torch.no_grad():
            return float(np.mean(list(one.steps(held, lambda call, loss: None))))

    before.weigh()
    weights = before.weights
    start = error(before)
    losses = drain(distillation)
    assert 0.5 < start < 2  # 1 on the noise that it was weighed on
    assert error(distillation) < 0.9 * start
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert all((row.exp() > 0).all() for row in distillation.rows)
    assert before.score() < distillation.score()


def test_a_schedule_leaves_step_indices_right_and_its_skipped_step_sizes_alone(teacher, table):
    """A branch that is reused is not called, so no other layer may take its turn for another call's."""
    mask = random_mask(CALLS, len(teacher.graph), seed=1)
    mask[-1] = False  # a call that trains nothing
    distillation = distillation_of(teacher, table, compute=mask)
    before = torch.stack([row.detach().clone() for row in distillation.rows])
    drain(distillation)
    moved = torch.stack(list(distillation.rows)) != before
    branch = {layer.name: layer.branch for layer in select(teacher, "w4a8").layers}
    columns = select(teacher, "w4a8").columns
    for name, column in columns.items():
        assert moved[:, column].tolist() == mask[:, branch[name]].tolist()


def test_the_state_follows_the_teacher_alone_and_the_student_under_a_schedule(teacher, table):
    held = draw(teacher, Walk(table, CFG), 5, 2)
    seen: dict[str, list[torch.Tensor]] = {}
    for name, mask in (("alone", None), ("cached", random_mask(CALLS, len(teacher.graph)))):
        distillation = distillation_of(teacher, table, compute=mask)
        targets = seen[name] = []
        original = distillation.denoise

        def spy(adapter, call, x, batch, route, original=original, targets=targets, teacher=teacher):
            if adapter is teacher:
                targets.append(x)
            return original(adapter, call, x, batch, route)

        distillation.denoise = spy
        list(distillation.steps(held, lambda call, loss: None))
    outputs: list[torch.Tensor] = []
    for call, x in enumerate(seen["alone"]):
        torch.testing.assert_close(x, table.combine(call, held.start, outputs), rtol=0, atol=0)
        outputs.append(distillation_of(teacher, table).denoise(teacher, call, x, held, compute_all))
    assert torch.equal(seen["cached"][0], seen["alone"][0])
    assert not torch.equal(seen["cached"][1], seen["alone"][1])


def test_a_restored_run_goes_on_bit_for_bit(teacher, table, tmp_path):
    whole = distillation_of(teacher, table, updates=4 * CALLS)
    drain(whole)
    half = distillation_of(teacher, table, updates=4 * CALLS)
    progress = half.run()
    next(progress), next(progress)
    torch.save(half.state(), tmp_path / "state.pt")
    rest = distillation_of(teacher, table, updates=4 * CALLS)
    rest.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    assert len(drain(rest)) == 2
    one, other = whole.finish(), rest.finish()
    assert torch.equal(one.log_scales, other.log_scales)
    ours, theirs = one.network.state_dict(), other.network.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_training_only_step_sizes_leaves_the_folded_weights(teacher, table):
    distillation = distillation_of(teacher, table)
    drain(distillation)
    folded = distillation.finish()
    before = {name: tensor.clone() for name, tensor in folded.network.state_dict().items()}
    scales = folded.log_scales.detach().clone()
    refreshed = Distillation(teacher, folded, distillation.walk, replace_updates(distillation.settings, CALLS))
    drain(refreshed)
    after = refreshed.finish()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.network.state_dict().items())
    assert not torch.equal(after.log_scales, scales)


def replace_updates(settings: EfficientDMSettings, updates: int) -> EfficientDMSettings:
    return settings.model_copy(update={"updates": updates})


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**16 - 1), st.floats(1.0, 6.0), st.floats(0.3, 0.9))
def test_logits_for_a_mask_say_the_same_and_may_still_change(bits, clamp, threshold):
    mask = np.array([bits >> i & 1 for i in range(16)], bool).reshape(CALLS, 4)
    mask[0] = True
    caching = HarmoniCaSettings(target_cur=0.4, clamp=clamp, threshold=min(threshold, 1 / (1 + np.exp(-clamp / 4))))
    identity = Identity("tiny", None, None, {}, None)
    logits = first_logits(Schedule(mask, tuple("abcd"), identity), caching)
    assert ((1 / (1 + np.exp(-logits)) > caching.threshold) == mask).all()
    assert (np.abs(logits) < clamp).all()


def test_a_relearned_schedule_is_steered_to_the_cur_of_the_one_it_comes_from():
    mask = random_mask(CALLS, 4, seed=3)
    identity = Identity("tiny", None, None, {}, None)
    learned = {"name": "harmonica", "method": "harmonica", "beta": 7e-8, "lr": 0.05, "trajectories": 500, "seed": 1}
    for method in (learned, {"name": "random"}):
        old = Schedule(mask, tuple("abcd"), identity, method)
        refined = router_settings(old, EfficientDMSettings())
        anew = router_settings(old, EfficientDMSettings(relearn="scratch", with_cache="a schedule"))
        assert refined.target_cur == anew.target_cur == old.cur and refined.beta is None
        assert refined.trajectories < anew.trajectories and refined.lr == anew.lr == method.get("lr", 0.15)


def test_a_finished_run_is_opened_not_run_again(tiny_run, tmp_path):
    flags = {"model": str(tiny_run.parent / "model"), "solver.steps": CALLS, "quant.method": "efficientdm"}
    flags |= {"quant.updates": 2 * CALLS, "quant.batch": 1, "quant.samples": 1, "quant.rank": 2}
    recipe = resolve_quant(None, flags)
    stages: list[str] = []
    first = quantize(recipe, tmp_path / "run", on_progress=lambda stage, of, progress: stages.append(stage))
    assert stages == ["distil", "distil"] and first.schedule is None
    written = (tmp_path / "run" / "quantized.safetensors").read_bytes()
    second = quantize(recipe, tmp_path / "run", resume=True, on_progress=lambda *told: stages.append(told[0]))
    assert len(stages) == 2
    assert (tmp_path / "run" / "quantized.safetensors").read_bytes() == written
    assert second.quantized.identity == first.quantized.identity
    opened = open_setting(str(tmp_path / "run"), "ddim", CALLS, CFG)
    assert opened.identity == first.quantized.identity
    with pytest.raises(RunError, match=r"quant.updates: 8 != 12"):
        quantize(resolve_quant(None, flags | {"quant.updates": 3 * CALLS}), tmp_path / "run", resume=True)


# the command


@pytest.fixture(scope="module")
def model(tiny_run: Path) -> Path:
    """A tiny DiT with random weights, as a diffusers folder."""
    return tiny_run.parent / "model"


@pytest.fixture(scope="module")
def schedule(model: Path, tmp_path_factory) -> Path:
    setting = open_setting(str(model), "ddim", CALLS, CFG)
    file = tmp_path_factory.mktemp("given") / "schedule.safetensors"
    mask = random_mask(CALLS, len(setting.adapter.graph), seed=2)
    Schedule(mask, setting.adapter.graph.names, setting.identity, {"name": "random"}).save(file)
    return file


def arguments(model: Path, out: Path, *more: str) -> list[str]:
    settings = {"updates": 6 * CALLS, "refresh": 2 * CALLS, "batch": 2, "samples": 2, "rank": 4, "lr_lora": 0.02}
    sets = [part for key, value in settings.items() for part in ("--set", f"quant.{key}={value}")]
    return ["quantize", str(model), "--format", "w4a8", "--out", str(out), *sets, *more]


def hcompress(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *args], capture_output=True, text=True, env=ENVIRONMENT, timeout=240)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run a verb in this process: (exit code, stderr)."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["hcompress", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0), capsys.readouterr().err

    return run


@pytest.fixture(scope="module")
def together(model: Path, schedule: Path, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("whole") / "run"
    done = hcompress(*arguments(model, out, "--with-cache", str(schedule), "--samples", "4", "--json"))
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


def test_with_cache_leaves_a_schedule_that_fits_the_quantized_model(together, schedule):
    out, printed = together
    setting = open_setting(str(out), "ddim", CALLS, CFG)
    assert isinstance(setting.adapter, QuantizedAdapter)
    learned = Schedule.load(out / "schedule.safetensors")
    learned.check_fits(setting.adapter.graph, setting.identity)
    wanted = Schedule.load(schedule)
    assert learned.cur == printed["cur"]
    assert abs(learned.cur - wanted.cur) <= 1 / wanted.compute.size  # steering ends within half an entry, if it can
    assert list(printed["rows"]) == [
        "dense float",
        "cached float",
        "dense quantized",
        "cached quantized, the float model's schedule",
        "cached quantized, its own schedule",
    ]
    assert printed["rows"]["dense quantized"]["megabytes"] < printed["rows"]["dense float"]["megabytes"]
    assert learned.method["score_db"][learned.method["kept"]] == max(learned.method["score_db"].values())
    assert (learned.compute == wanted.compute).all() == (learned.method["kept"] == "given")


@pytest.mark.parametrize(("stage", "how"), [("distil", signal.SIGINT), ("relearn", signal.SIGKILL)])
def test_a_run_killed_in_any_stage_goes_on_to_the_same_result(model, schedule, together, tmp_path, stage, how):
    whole, _ = together
    out = tmp_path / "run"
    command = arguments(model, out, "--with-cache", str(schedule), "--samples", "0")
    process = subprocess.Popen(
        [*COMMAND, *command],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None and not (out / f"{stage}.pt").exists():
        time.sleep(0.005)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0 and (out / f"{stage}.pt").exists()
    assert not (out / "quantized.safetensors").exists()
    if how == signal.SIGINT:
        assert process.returncode == 130 and "--resume" in stderr.splitlines()[-1]
    done = hcompress(*command, "--resume")
    assert done.returncode == 0, done.stderr
    ours, theirs = Schedule.load(out / "schedule.safetensors"), Schedule.load(whole / "schedule.safetensors")
    assert (ours.logits == theirs.logits).all()
    base = load_model(str(model)).adapter
    one, other = (load_quantized(run / "quantized.safetensors", base) for run in (out, whole))
    assert torch.equal(one.log_scales, other.log_scales)
    left, right = one.network.state_dict(), other.network.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["round"] for record in records if record["stage"] == "distil"] == [1, 2, 3, 4, 5, 6]


def test_what_a_schedule_never_reads_is_marked_and_another_schedule_is_not_exported(together, model):
    out, _ = together
    learned = Schedule.load(out / "schedule.safetensors")
    with safe_open(out / "quantized.safetensors", "torch") as file:
        active = file.get_tensor("active")
    setting = open_setting(str(out), "ddim", CALLS, CFG)
    assert active.shape == setting.adapter.log_scales.shape and not active.all()
    branch = {layer.name: layer.branch for layer in layers_of(load_model(str(model)).adapter)}
    for name, layer in setting.adapter.plan["layers"].items():
        if layer["column"] is not None:
            assert active[:, layer["column"]].tolist() == learned.compute[:, branch[name]].tolist()
    decide(setting, learned)
    other = learned.compute.copy()
    other[1] = ~other[1]
    with pytest.raises(ScheduleError, match="learned under schedule"):
        decide(setting, replace(learned, compute=other, logits=None))


def test_a_schedule_that_is_kept_unasked_is_one_row(model, schedule, tmp_path):
    sets = [part for each in ("updates=4", "batch=1", "samples=1", "rank=2") for part in ("--set", f"quant.{each}")]
    cached = ["--with-cache", str(schedule), "--keep-schedule", "--samples", "2", "--json"]
    done = hcompress("quantize", str(model), "--out", str(tmp_path / "run"), *sets, *cached)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row for row in rows if row.startswith("cached quantized")] == [
        "cached quantized, the float model's schedule"
    ]


def test_no_more_rounds_are_shown_than_there_are(capsys):
    stages, training = StagesDisplay(), TrainingDisplay("trajectories")
    training.rounds = 200
    for done in (119, 120, 124, 213):
        figures = Progress(done, 1.0, 1.0, 1.0, 0.4, 0.4, 0.1, None)
        stages.show("relearn", 120, figures)
        training.show(figures)
        (bar,) = (task for task in stages.bar.tasks if task.description == "relearn")
        assert bar.total == max(done, 120)
    said = capsys.readouterr().err
    assert [line.split("  ")[0] for line in said.splitlines()] == [
        *("relearn 119/120", "119/200", "relearn 120/120"),
        *("relearn 124/124", "relearn 213/213", "213/213"),
    ]


def test_the_reverse_order_trains_a_schedule_on_the_quantized_run(together, here, tmp_path):
    out, _ = together
    sets = ["--set", "caching.trajectories=3", "--set", "caching.batch=1"]
    code, stderr = here("train", str(out), "--target-cur", "0.3", "--out", str(tmp_path / "run"), *sets)
    assert code == 0 and "another can be evaluated on it, not exported" in " ".join(stderr.split()), stderr
    setting = open_setting(str(out), "ddim", CALLS, CFG)
    Schedule.load(tmp_path / "run" / "schedule.safetensors").check_fits(setting.adapter.graph, setting.identity)


REFUSED = {
    "no schedule to relearn": (["--method", "efficientdm", "--relearn"], "--with-cache"),
    "another method": (["--method", "int8-max"], "train"),
    "format": (["--method", "efficientdm", "--format", "fp8"], "w8a8"),
    "another model's": ([], "learned on"),
    "no input": (["--keep", "*attn1*", "--keep", "*.ff.*"], "learns step sizes of inputs, and none is left"),
    "nothing reused": ([], "reuses nothing, so there is none to learn"),
    "relearned and kept": (["--relearn", "--keep-schedule"], "--keep-schedule forgoes; pass one"),
    "a teacher of none": (["--teacher", "quantized", "--keep-schedule"], "--keep-schedule forgoes; pass one"),
    "refreshed and kept": (["--keep-schedule"], "quant.refresh = 8 would be ignored"),
    "refresh of none": (["--method", "efficientdm"], "quant.refresh = 8 would be ignored"),
}
UNCACHED = ("no schedule to relearn", "refresh of none")


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_that_says_the_fix(model, schedule, together, here, tmp_path, case):
    extra, expected = REFUSED[case]
    file = together[0] / "schedule.safetensors" if case == "another model's" else schedule
    if case == "nothing reused":
        whole = Schedule.load(schedule)
        file = tmp_path / "whole.safetensors"
        replace(whole, compute=np.ones_like(whole.compute), logits=None).save(file)
    cached = [] if case in UNCACHED else ["--with-cache", str(file)]
    code, stderr = here(*arguments(model, tmp_path / "run"), *cached, *extra)
    assert code == 1
    assert expected in stderr and len(stderr.strip().splitlines()) == 1, stderr
    assert not (tmp_path / "run").exists()
    if case == "no input":
        assert here(*arguments(model, tmp_path / "run"), *cached, *extra, "--dry-run") == (code, stderr)
