"""Properties of every caching method, on a tiny DiT whose blocks are called like those of a network with long skips."""

from __future__ import annotations

import io
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CFG, LONG_SKIPS, make_method, make_problem, make_table, random_mask
from PIL import Image

from hcompress.caching import CACHING
from hcompress.caching.rules import FAR
from hcompress.cli.main import main
from hcompress.errors import ScheduleError
from hcompress.recipe import resolve
from hcompress.report.forecast import forecast
from hcompress.sampling import sample
from hcompress.schedule import Schedule
from hcompress.setting import open_finished
from hcompress.train import train

CALLS = 6
ENTRIES = CALLS * 2 * len(LONG_SKIPS)
QUICK = {"batch": 2, "lr": 0.2}

GIVEN = Path(tempfile.mkdtemp(prefix="given-"))

# As each is usually asked for, and told to reuse nothing.
USUAL = {
    "harmonica": QUICK | {"target_cur": 0.4, "trajectories": 3, "refresh": 3 * CALLS},
    "learning-to-cache": QUICK | {"target_cur": 0.4, "sweeps": 3},
    "smoothcache": {"target_cur": 0.4, "samples": 2},
    "interval": {"target_cur": 0.5},
    "random": {"target_cur": 0.4},
    "uniform": {"target_cur": 0.4},
    "deepcache": {"every": 2, "pairs": 1},
    "faster-diffusion": {"every": 2},
    "given": {"schedule": str(GIVEN / "usual.safetensors")},
}
NOTHING = {
    "harmonica": USUAL["harmonica"] | {"target_cur": None, "beta": 1e-30},
    "learning-to-cache": USUAL["learning-to-cache"] | {"target_cur": None, "beta": 1e-30},
    "smoothcache": {"alpha": 1e-12, "samples": 2},
    "interval": {"every": 1},
    "random": {"target_cur": 1e-9},
    "uniform": {"target_cur": 1e-9},
    "deepcache": {"every": 1, "pairs": 1},
    "faster-diffusion": {"every": 1},
    "given": {"schedule": str(GIVEN / "nothing.safetensors")},
}
TRAINS = ["harmonica", "learning-to-cache"]


@pytest.fixture(scope="module", autouse=True)
def given_schedules(skipping_dit):
    identity = skipping_dit.identity("tiny", make_table(calls=CALLS)[1], CFG)
    for name, mask in (
        ("usual", random_mask(CALLS, len(skipping_dit.graph))),
        ("nothing", np.ones((CALLS, len(skipping_dit.graph)), bool)),
    ):
        Schedule(mask, skipping_dit.graph.names, identity).save(GIVEN / f"{name}.safetensors")
    yield
    shutil.rmtree(GIVEN)


def finish(method):
    return [progress.round for progress in method.run()], method.found()


@pytest.mark.parametrize("name", CACHING)
def test_the_mask_is_a_schedule_of_the_model_and_the_same_for_the_same_seed(name, skipping_dit):
    rounds, found = finish(make_method(name, skipping_dit, USUAL[name]))
    method = make_method(name, skipping_dit, USUAL[name])
    assert rounds == [*range(1, len(rounds) + 1)] and len(rounds) >= method.rounds
    assert found.compute.shape == (CALLS, len(skipping_dit.graph)) and found.compute.dtype == np.bool_
    assert found.compute[0].all()
    identity = skipping_dit.identity("tiny", make_table(calls=CALLS)[1], CFG)
    schedule = Schedule(found.compute, skipping_dit.graph.names, identity, dict(found.history), found.logits)
    schedule.check_fits(skipping_dit.graph, identity)
    again = finish(method)[1]
    assert (again.compute == found.compute).all() and again.history == found.history
    assert (again.logits is None) == (found.logits is None) == (name not in TRAINS)
    assert found.logits is None or (again.logits == found.logits).all()


@pytest.mark.parametrize("name", CACHING)
def test_a_method_that_reuses_nothing_gives_the_dense_samples_to_the_bit(name, skipping_dit):
    compute = finish(make_method(name, skipping_dit, NOTHING[name]))[1].compute
    problem = make_problem(skipping_dit)
    condition, start, noises = problem.draw(0, 2)
    dense, cached = (
        sample(skipping_dit, problem.table, condition, start, cfg=CFG, noises=noises, compute=mask)
        for mask in (None, compute)
    )
    assert torch.equal(dense, cached)


@pytest.mark.parametrize("name", CACHING)
def test_every_method_works_under_a_stochastic_solver_with_a_memory(name, skipping_dit):
    assert finish(make_method(name, skipping_dit, USUAL[name], solver="sa"))[1].compute.shape == (
        CALLS,
        len(skipping_dit.graph),
    )


@pytest.mark.parametrize("name", ["harmonica", "learning-to-cache", "smoothcache", "random"])
def test_another_seed_gives_another_schedule(name, skipping_dit):
    alike = [finish(make_method(name, skipping_dit, USUAL[name], seed=seed))[1] for seed in (3, 4)]
    assert any(
        str(one) != str(other)
        for one, other in zip(*[(f.compute.tolist(), f.records, f.logits) for f in alike], strict=True)
    )


@pytest.mark.parametrize("name", TRAINS)
def test_a_restored_method_ends_where_an_uninterrupted_one_does(name, skipping_dit):
    whole = finish(make_method(name, skipping_dit, USUAL[name]))[1]
    first = make_method(name, skipping_dit, USUAL[name])
    walk = first.run()
    next(walk)
    file = io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    second = make_method(name, skipping_dit, USUAL[name])
    second.restore(torch.load(file, weights_only=True))
    assert second.done == 1
    found = finish(second)[1]
    assert (found.logits == whole.logits).all() and found.history == whole.history
    assert not (first.found().logits == whole.logits).all()


# How far a CUR may be from a target of 0.4; where entries are picked one by one, half an entry.
DISTANCE = {"smoothcache": FAR, "interval": FAR, "random": 0.5 / ENTRIES, "uniform": 0.5 / ENTRIES}


@pytest.mark.parametrize("name", DISTANCE)
def test_a_target_is_met_to_the_stated_distance(name, skipping_dit):
    cur = 1 - finish(make_method(name, skipping_dit, {"target_cur": 0.4}))[1].compute.mean()
    assert abs(cur - 0.4) <= DISTANCE[name]


def test_learning_to_cache_steers_to_a_cur(skipping_dit):
    """HarmoniCa's steering has tests of its own; two entries may stay behind, as they differ by decades."""
    settings = {"target_cur": 0.3, "sweeps": 40, "batch": 2, "lr": 0.4}
    method = make_method("learning-to-cache", skipping_dit, settings)
    compute = finish(method)[1].compute
    assert abs(1 - compute.mean() - 0.3) <= 2.5 / ENTRIES


@pytest.mark.parametrize("name", [name for name in CACHING if name not in ("deepcache", "faster-diffusion", "given")])
def test_train_leaves_a_run_folder_that_all_else_can_open_and_forecasts_it(name, tiny_run, tmp_path):
    settings = {f"caching.{key}": value for key, value in USUAL[name].items() if key != "refresh"}
    if name == "learning-to-cache":
        (tmp_path / "images").mkdir()
        Image.new("L", (8, 8), 99).save(tmp_path / "images" / "gray.png")
        settings["caching.images"] = str(tmp_path / "images")
    recipe = resolve(
        None, {"model": str(tiny_run.parent / "model"), "solver.steps": CALLS, "caching.method": name} | settings
    )
    planned = forecast(recipe)
    assert json.loads(json.dumps(planned)) == planned
    schedule = train(recipe, tmp_path / "run")
    assert (schedule.method["name"], schedule.num_calls) == (name, CALLS)
    assert schedule.cur <= planned["highest_cur"] and ("cur" not in planned or planned["cur"] == schedule.cur)
    again = train(recipe, tmp_path / "run", resume=True)
    assert (again.compute == schedule.compute).all()
    assert (open_finished(tmp_path / "run")[1].compute == schedule.compute).all()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert (
        [line["round"] for line in lines] == [*range(1, len(lines) + 1)]
        if name in TRAINS
        else lines[-1]["cur"] == schedule.cur
    )
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left - {"checkpoint.pt"} == {
        "recipe.yaml",
        "env.json",
        "metrics.jsonl",
        "schedule.safetensors",
        "heatmap.png",
    }


def test_a_given_mask_keeps_its_entries_under_another_rule(tiny_run, tmp_path):
    theirs = tiny_run / "schedule.safetensors"
    given = Schedule.load(theirs)
    flags = {"model": str(tiny_run.parent / "model"), "caching.method": "given", "caching.schedule": str(theirs)}
    flags |= given.flags | {"caching.reuse": "corrected", "caching.fit_samples": 8, "caching.fit_steps": 0}
    made = train(resolve(None, flags), tmp_path / "run")
    assert made.reuse == "corrected" and (made.compute == given.compute).all()
    assert made.method["given"] == given.method and made.method["name"] == "given"
    with pytest.raises(ScheduleError, match="use the same solver and --steps"):
        train(resolve(None, flags | {"solver.steps": given.num_calls + 1}), tmp_path / "other")
    assert train(resolve(None, flags), tmp_path / "other").fingerprint == made.fingerprint  # nothing was in its way


def test_the_command_says_where_a_goal_was_missed_and_goes_on_from_the_runs_own_recipe(
    tiny_run, tmp_path, monkeypatch, capsys
):
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hcompress", "train", str(tiny_run.parent / "model"), *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        return (stopped.value.code or 0, *capsys.readouterr())

    out, sets = str(tmp_path / "run"), ["--set", "caching.trajectories=1", "--set", "caching.batch=1"]
    code, _, err = run("--steps", "3", "--target-cur", "0.6", *sets, "--out", out)
    assert code == 0 and "CUR 60 % was not reached; give it more trajectories" in err
    assert run("--resume", "--out", out)[0] == 0
    code, _, err = run("--resume", "--target-cur", "0.5", "--out", out)
    assert code == 1 and "caching.target_cur: 0.6 != 0.5" in err
    code, _, err = run("--schedule", f"{out}/schedule.safetensors", "--target-cur", "0.5", "--out", out)
    assert code == 1 and "--schedule takes the mask that there is: --target-cur would do nothing" in err


def test_the_command_takes_steps_and_guidance_from_a_given_schedule(tiny_run, tmp_path, monkeypatch, capsys):
    given = Schedule.load(tiny_run / "schedule.safetensors")
    arguments = ["train", str(tiny_run.parent / "model"), "--schedule", str(tiny_run / "schedule.safetensors")]
    monkeypatch.setattr(sys, "argv", ["hcompress", *arguments, "--out", str(tmp_path / "run"), "--dry-run", "--json"])
    with pytest.raises(SystemExit) as stopped:
        main()
    planned = json.loads(capsys.readouterr().out)
    assert not stopped.value.code and (planned["method"], planned["cur"]) == ("given", given.cur)
    assert planned["solver"].endswith(f"{given.num_calls} calls")
