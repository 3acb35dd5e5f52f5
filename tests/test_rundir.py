"""A run's folder: nothing is overwritten, nothing of another recipe is resumed, no metric appears twice."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
import torch

from hcompress.checkpoint import read_checkpoint, resumed, write_checkpoint
from hcompress.errors import RunError
from hcompress.recipe import resolve
from hcompress.rundir import open_run

FLAGS = {"model": "zoo:fashion-dit", "caching.target_cur": 0.4}
RECIPE = resolve(None, FLAGS)


def test_a_new_run_records_its_recipe_and_its_machine(tmp_path):
    run = open_run(tmp_path / "runs" / "a", RECIPE)
    assert resolve(run.recipe) == RECIPE
    env = json.loads((run.path / "env.json").read_text())
    assert env["python"] == ".".join(map(str, sys.version_info[:3]))
    assert env["packages"]["hcompress"] and env["packages"]["numpy"]
    assert sorted(os.listdir(run.path)) == ["env.json", "recipe.yaml"]
    assert {file.parent for file in (run.checkpoint, run.schedule, run.metrics)} == {run.path}


def test_a_folder_in_use_is_refused_unless_resumed(tmp_path):
    open_run(tmp_path, RECIPE).metrics.write_text("")
    with pytest.raises(RunError, match="is not empty; pass --resume or another --out"):
        open_run(tmp_path, RECIPE)
    assert open_run(tmp_path, RECIPE, resume=True).path == tmp_path


def test_a_run_that_failed_before_it_did_anything_is_in_nobodys_way(tmp_path):
    open_run(tmp_path, RECIPE)
    other = RECIPE.model_copy(update={"seed": 7})
    assert resolve(open_run(tmp_path, other).recipe) == other
    (tmp_path / "env.json").unlink()
    with pytest.raises(RunError, match="is not empty"):  # a recipe alone is somebody's own
        open_run(tmp_path, RECIPE)


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_something_else_is_never_touched(tmp_path, resume):
    (tmp_path / "thesis.tex").write_text("all my work")
    with pytest.raises(RunError, match="another --out"):
        open_run(tmp_path, RECIPE, resume=resume)
    assert os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("resume", [False, True])
def test_a_file_in_place_of_the_folder_is_one_line(tmp_path, resume):
    (tmp_path / "run").write_text("")
    with pytest.raises(RunError, match="Not a directory"):
        open_run(tmp_path / "run", RECIPE, resume=resume)


def test_another_recipe_is_not_resumed(tmp_path):
    open_run(tmp_path, RECIPE)
    other = resolve(None, {"model": "zoo:fashion-dit", "caching.target_cur": 0.4, "solver.steps": 10})
    with pytest.raises(RunError, match=r"solver\.steps: 20 != 10"):
        open_run(tmp_path, other, resume=True)
    assert resolve(tmp_path / "recipe.yaml") == RECIPE


@pytest.mark.parametrize("remains", [[], ["env.json"], [".env.json.part"], ["env.json", ".recipe.yaml.part"]])
@pytest.mark.parametrize("resume", [False, True])
def test_a_start_that_was_killed_is_started_again(tmp_path, remains, resume):
    for name in remains:
        (tmp_path / name).write_text("{")
    run = open_run(tmp_path, RECIPE, resume=resume)
    assert resolve(run.recipe) == RECIPE
    assert json.loads((run.path / "env.json").read_text())


def test_of_two_processes_in_one_run_the_second_is_told(tmp_path):
    """And may go on once the first is gone, however it went; one process may open its run as often as it likes."""
    code = f"""
from pathlib import Path
from hcompress.recipe import resolve
from hcompress.rundir import open_run
run = open_run(Path({str(tmp_path / "run")!r}), resolve(None, {FLAGS!r}))
print("open", flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(RunError, match=r"another process is at work in .*run; wait for it, or stop it"):
            open_run(tmp_path / "run", RECIPE, resume=True)
        other.kill()
    mine = [open_run(tmp_path / "run", RECIPE, resume=True) for _ in range(2)]
    assert mine[0] == mine[1] and mine[0].claim is mine[1].claim


def test_metrics_come_back_in_order_and_rewind_drops_the_rest(tmp_path):
    run = open_run(tmp_path, RECIPE)
    assert run.records() == []
    run.rewind(3)
    for step in range(5):
        run.log({"step": step, "loss": 1 / 3})
    run.rewind(3)
    run.log({"step": 3})
    assert [record["step"] for record in run.records()] == [0, 1, 2, 3]
    assert run.records()[0]["loss"] == 1 / 3


def test_a_line_cut_short_by_a_kill_is_forgotten(tmp_path):
    run = open_run(tmp_path, RECIPE)
    run.log({"step": 0})
    with run.metrics.open("a") as file:
        file.write('{"step": 1, "lo')
    assert run.records() == [{"step": 0}]
    run.rewind(1)
    run.log({"step": 1})
    assert run.records() == [{"step": 0}, {"step": 1}]


def test_what_was_logged_survives_a_kill(tmp_path):
    log_then_die = """
import os, signal, sys
from pathlib import Path
from hcompress.rundir import RunDir

RunDir(Path(sys.argv[1])).log({"step": 7})
os.kill(os.getpid(), signal.SIGKILL)
"""
    run = open_run(tmp_path, RECIPE)
    subprocess.run([sys.executable, "-c", log_then_die, tmp_path], check=False)
    assert run.records() == [{"step": 7}]


def test_a_checkpoint_of_a_gpu_is_read_without_one(tmp_path, monkeypatch):
    """A file says where each tensor was; this one says cuda:0."""
    with monkeypatch.context() as written:
        written.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        write_checkpoint(tmp_path / "state.pt", {"weight": torch.arange(3.0), "round": 4})
    state = read_checkpoint(tmp_path / "state.pt")
    assert state["weight"].device.type == "cpu" and state["weight"].tolist() == [0, 1, 2] and state["round"] == 4


@dataclass(frozen=True)
class Round:
    round: int


class Counter:
    """A stage of 40 rounds of a millisecond, whose state takes `slow` seconds to write."""

    def __init__(self, slow=0.0, on_round=lambda number: None):
        self.done, self.slow, self.on_round, self.written = 0, slow, on_round, []

    def run(self):
        while self.done < 40:
            time.sleep(0.001)
            self.on_round(self.done + 1)
            self.done += 1
            yield Round(self.done)

    def state(self):
        time.sleep(self.slow)
        self.written.append(self.done)
        return {"done": self.done}

    def restore(self, state):
        self.done = state["done"]


def test_checkpoints_that_are_slow_to_write_are_written_seldom_and_the_last_always(tmp_path):
    slow = Counter(slow=0.05)  # a second to the next, in which the 40 rounds are over on any machine but a stalled one
    assert len(list(resumed(open_run(tmp_path, RECIPE), "stage", slow, slow.run()))) == 40
    assert slow.written[0] == 1 and slow.written[-1] == 40 and len(slow.written) < 10
    assert read_checkpoint(tmp_path / "stage.pt") == {"done": 40}


def test_ctrl_c_ends_the_round_writes_it_down_and_raises(tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        run = open_run(tmp_path, RECIPE)
        stopped = Counter(0.05, lambda number: os.kill(os.getpid(), signal.SIGINT) if number == 17 else None)
        with pytest.raises(KeyboardInterrupt):
            list(resumed(run, "stage", stopped, stopped.run()))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert read_checkpoint(tmp_path / "stage.pt") == {"done": 17}
        again = Counter()
        assert [done.round for done in resumed(run, "stage", again, again.run())] == list(range(18, 41))
        assert [record["round"] for record in run.records()] == list(range(1, 41))
        twice = Counter(0.05, lambda number: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
        with pytest.raises(KeyboardInterrupt):
            list(resumed(run, "other", twice, twice.run()))
        assert not (tmp_path / "other.pt").exists()  # at once: the round that was under way may be half done
    finally:
        signal.signal(signal.SIGINT, before)
