"""`hcompress train` as a user runs it: killed, resumed, interrupted, on two processes, and refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hcompress.schedule import Schedule

COMMAND = [sys.executable, "-m", "hcompress.cli.main"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def model(tiny_run: Path) -> Path:
    """A tiny DiT with random weights, as a diffusers folder."""
    return tiny_run.parent / "model"


def arguments(model: Path, out: Path, *more: str, trajectories: int = 12, batch: int = 2) -> list[str]:
    settings = {"trajectories": trajectories, "batch": batch, "lr": 0.4, "refresh": 16, "init": 1.0}
    sets = [part for key, value in settings.items() for part in ("--set", f"caching.{key}={value}")]
    return ["train", str(model), "--steps", "4", "--target-cur", "0.4", "--out", str(out), *sets, *more]


def hcompress(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *args], capture_output=True, text=True, env=ENVIRONMENT, timeout=240)


def wait_for_trajectories(run: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"no {count} trajectories before the process ended: {process.communicate()}")


@pytest.fixture(scope="module")
def uninterrupted(tiny_run, tmp_path_factory) -> Schedule:
    out = tmp_path_factory.mktemp("whole") / "run"
    done = hcompress(*arguments(tiny_run.parent / "model", out, "--json"))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    schedule = Schedule.load(Path(result["schedule"]))
    assert result["cur"] == schedule.cur > 0
    return schedule


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_resumes_to_the_same_schedule_bit_for_bit(model, tmp_path, uninterrupted, how):
    out = tmp_path / "run"
    process = subprocess.Popen(
        [*COMMAND, *arguments(model, out)],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    wait_for_trajectories(out, 3, process)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0 and not (out / "schedule.safetensors").exists()
    if how == signal.SIGINT:
        assert process.returncode == 130 and "--resume" in stderr.splitlines()[-1]
    done = hcompress(*arguments(model, out, "--resume"))
    assert done.returncode == 0, done.stderr
    resumed = Schedule.load(out / "schedule.safetensors")
    assert (resumed.logits == uninterrupted.logits).all()
    assert (resumed.compute == uninterrupted.compute).all()
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["round"] for record in records] == list(range(1, len(records) + 1))
    assert len(records) >= 12


def test_two_processes_train_as_one_with_the_batch_of_both(model, tmp_path):
    """Gradients and lambdas are means over ranks, so 2 x 1 noises equal 1 x 2 up to the order of float32 sums."""
    alone, launched = tmp_path / "alone", tmp_path / "launched"
    done = hcompress(*arguments(model, alone, trajectories=3, batch=2))
    assert done.returncode == 0, done.stderr
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch += ["-m", "hcompress.cli.main"]  # what `accelerate launch` runs on GPUs; on CPUs it starts one process only
    command = [*launch, *arguments(model, launched, trajectories=3, batch=1)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=240)
    assert done.returncode == 0, done.stderr
    one, two = (Schedule.load(run / "schedule.safetensors") for run in (alone, launched))
    moved = np.abs(one.logits[1:] - 1.0).max()
    assert moved > 0.1  # else agreement would be empty
    np.testing.assert_allclose(two.logits, one.logits, atol=1e-3 * moved)


def test_a_dry_run_says_what_would_happen_and_leaves_nothing(model, tmp_path):
    done = hcompress(*arguments(model, tmp_path / "run", "--dry-run", "--json"))
    plan = json.loads(done.stdout)
    assert plan["branches"] == 4 and plan["updates_per_row"] == 12 and plan["highest_cur"] == 0.75
    assert not (tmp_path / "run").exists()


REFUSED = {
    "one step": (["--steps", "1"], "one step has nothing to reuse"),
    "out of reach": (["--target-cur", "0.9"], "out of reach"),
    "unknown setting": (["--set", "caching.treshold=0.2"], "caching.threshold"),
    "unknown solver": (["--solver", "ddmi"], "ddim"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_that_says_the_fix(model, tmp_path, case):
    extra, expected = REFUSED[case]
    done = hcompress(*arguments(model, tmp_path / "run"), *extra)
    assert done.returncode == 1
    assert expected in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run" / "schedule.safetensors").exists()


def test_a_missing_model_is_one_line_and_a_run_is_never_overwritten(model, tmp_path):
    done = hcompress("train", str(tmp_path / "absent"), "--target-cur", "0.4", "--out", str(tmp_path / "run"))
    assert done.returncode == 1 and "no model folder" in done.stderr and len(done.stderr.splitlines()) == 1
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    done = hcompress(*arguments(model, tmp_path / "full"))
    assert done.returncode == 1 and "not empty" in done.stderr
    assert (tmp_path / "full" / "thesis.txt").read_text() == "precious"
