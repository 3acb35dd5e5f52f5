"""What `eval`, `inspect`, `bench --train` and the page show, and what they refuse."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hcompress.report.heatmap import COMPUTED, REUSED, save_heatmap, terminal_grid
from hcompress.report.page import Picture, Section, write_page
from hcompress.report.scatter import COLOURS, MARKERS, colour, marker
from hcompress.schedule import Identity, Schedule


def hcompress(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "hcompress.cli.main", *args], capture_output=True, text=True)


@pytest.fixture(scope="module")
def schedule() -> Schedule:
    mask = np.array([[1, 1, 1], [0, 1, 0], [1, 0, 0]], bool)
    return Schedule(mask, ("0.attn", "0.mlp", "1.attn"), Identity("m", None, None, {}, 1.5), {"name": "random"})


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour.removeprefix("#")))


def test_the_heatmap_has_as_much_dark_and_light_as_the_schedule(schedule, tmp_path):
    save_heatmap(schedule, tmp_path / "new" / "map.png")
    pixels = np.asarray(Image.open(tmp_path / "new" / "map.png").convert("RGB")).reshape(-1, 3)
    dark, light = (int((pixels == rgb(colour)).all(axis=1).sum()) for colour in (COMPUTED, REUSED))
    assert light / (dark + light) == pytest.approx(schedule.cur, abs=0.02)  # cell borders differ by pixels


def test_the_terminal_grid_counts_what_each_call_computes(schedule):
    lines = terminal_grid(schedule).plain.splitlines()
    assert [line.split()[-1] for line in lines[1:]] == ["3", "1", "1"]
    assert sum(line.count("·") for line in lines) == 4


def test_no_two_series_of_a_plot_look_alike():
    looks = [(colour(series), marker(series)) for series in range(COLOURS * len(MARKERS))]
    assert len({*looks}) == len(looks)


def test_the_page_needs_no_network_and_escapes_what_it_shows(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    section = Section("<b>", "a & b", [("x", "y"), ("1", "<2")], [Picture(tmp_path / "a.png", "four by four")])
    write_page(tmp_path / "page.html", "title", "lead", [section])
    page = (tmp_path / "page.html").read_text()
    assert not re.search(r"https?://|src=\"(?!data:)", page)
    assert "<b>" not in page and "&lt;b&gt;" in page and "a &amp; b" in page and "&lt;2" in page
    assert page.count("data:image/png;base64,") == 1


def test_eval_prints_what_others_script_against(tiny_run: Path):
    model, schedule = tiny_run.parent / "model", tiny_run / "schedule.safetensors"
    done = hcompress("eval", str(model), "--schedule", str(schedule), "--samples", "3", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    loaded = Schedule.load(schedule)
    assert result["cur"] == loaded.cur and result["mac_ratio"] > 1 and 0 < result["psnr_db"] < 100
    assert result["uncached"]["cur"] == 0 and result["uncached"]["macs"] > result["macs"]


def test_eval_refuses_another_solver_in_one_line(tiny_run: Path):
    model, schedule = tiny_run.parent / "model", tiny_run / "schedule.safetensors"
    done = hcompress("eval", str(model), "--schedule", str(schedule), "--solver", "dpm++", "--samples", "3")
    assert done.returncode == 1 and "DPMSolverMultistepScheduler" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_inspect_shows_a_run_and_a_model(tiny_run: Path, tmp_path: Path):
    done = hcompress("inspect", str(tiny_run), "--png", str(tmp_path / "map.png"), "--json")
    shown = json.loads(done.stdout)
    assert (tmp_path / "map.png").stat().st_size > 1000
    assert len(shown["compute"]) == Schedule.load(tiny_run / "schedule.safetensors").num_calls
    done = hcompress("inspect", str(tiny_run.parent / "model"), "--json")
    assert [branch["name"] for branch in json.loads(done.stdout)["branches"]] == ["0.attn", "0.mlp", "1.attn", "1.mlp"]


def test_freezing_the_model_and_the_teacher_saves_time_and_memory(tiny_run: Path):
    """Ratios at full size are in the README; here only that both variants run and are told apart."""
    done = hcompress("bench", str(tiny_run.parent / "model"), "--train", "--batch", "64", "--rounds", "8", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["speedup"] == pytest.approx(figures["unfrozen"]["iteration_ms"] / figures["frozen"]["iteration_ms"])
    assert figures["frozen"]["peak_memory_bytes"] < figures["unfrozen"]["peak_memory_bytes"]


def test_a_missing_library_is_one_line_with_the_command_that_brings_it(tmp_path: Path):
    """In a Python that cannot see torch, as on a serving box."""
    code = "import sys; sys.modules['torch'] = None; from hcompress.cli.main import main; main()"
    arguments = ["train", "zoo:fashion-dit", "--target-cur", "0.4", "--out", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: torch is not installed; pip install 'hcompress[train]'\n"
