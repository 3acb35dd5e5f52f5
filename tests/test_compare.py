"""Comparisons as they run, on a tiny model: kept, gone on with, divided, and shown."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_dit

from hcompress.compare import compare
from hcompress.comparison import FEWER_STEPS, UNCACHED, Comparison, cells_of, load_comparison, missed
from hcompress.errors import ModelError, RunError
from hcompress.makers import MAKERS
from hcompress.quantize import quantize
from hcompress.recipe import Run, resolve, resolve_quant
from hcompress.report.comparison import best_rows, write_report
from hcompress.report.comparison_progress import ComparisonDisplay
from hcompress.report.quality import PART
from hcompress.runners import RUNNERS
from hcompress.schedule import Schedule
from hcompress.setting import setting_of

TIMES = ("latency_ms", "speedup")  # differ from one run to the next
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Watched:
    """A Watch that remembers, and may press Ctrl-C."""

    def __init__(self, stop=lambda cell, what, done: False):
        self.stop, self.told, self.cells, self.notices = stop, [], [], []

    def start(self, cells):
        self.cells = cells

    def doing(self, cell, what, done, total):
        self.told.append((cell.name, cell.seed, what))
        if self.stop(cell, what, done):
            raise KeyboardInterrupt

    def finished(self, cell, row):
        pass

    def notice(self, line):
        self.notices.append(line)


def recipe(folder: Path, name: str, model: Path, section: str) -> str:
    file = folder / f"{name}.yaml"
    file.write_text(f"model: {model}\nsolver: {{name: ddim, steps: 5}}\ncfg: 1.5\n{section}\n")
    return str(file)


HARMONICA = "caching: {method: harmonica, trajectories: 4, batch: 1, lr: 2.0, init: -2.0, target_cur: 0.4}"
RANDOM = "caching: {method: random, target_cur: 0.4}"
NOTHING = "caching: {method: smoothcache, alpha: 1.0e-9, samples: 1}"  # no error is that small
INT8 = "quant: {method: int8-max, samples: 1, batch: 1}"


@pytest.fixture(scope="module")
def asked(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Two methods at a budget, one that reuses nothing, and one in few bits."""
    folder, model = tmp_path_factory.mktemp("recipes"), tiny_run.parent / "model"
    sections = {"harmonica": HARMONICA, "random": RANDOM, "nothing": NOTHING, "int8": INT8}
    names = [recipe(folder, name, model, section) for name, section in sections.items()]
    asked = {"title": "Tiny & <quick>", "budgets": [0.4], "seeds": [0, 1], "samples": 3, "batch": 2, "rounds": 1}
    comparison = load_comparison(names, asked)
    nothing = comparison.recipes[2].model_copy(update={"vary": {"caching.alpha": [1e-9]}})
    return comparison.model_copy(update={"recipes": [*comparison.recipes[:2], nothing, comparison.recipes[3]]})


@pytest.fixture(scope="module")
def done(asked: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the finished comparison. Do not change it."""
    out = tmp_path_factory.mktemp("compared") / "out"
    with ComparisonDisplay() as display:
        compare(asked, out, display)
    assert len(display.rows) == len(display.cells)
    return out


def read(out: Path) -> dict:
    return json.loads((out / "compare.json").read_text())


def rows(out: Path) -> dict[str, dict]:
    (group,) = read(out)["groups"]
    return {f"{row['name']} {row['point']}".strip(): row for row in group["rows"]}


def untimed(file: Path) -> dict:
    row = json.loads(file.read_text())
    return {key: value for key, value in row["figures"].items() if key not in TIMES}


@pytest.mark.parametrize("shown, left_out", [("PSNR (dB) 38.00", "relative L2"), ("relative L2 0.25", "PSNR")])
def test_a_person_is_shown_the_distance_that_there_is(asked, capsys, shown, left_out):
    """Latents that nothing decodes have no PSNR."""
    paired = {"relative_l2": 0.25} | ({"psnr_db": 38.0} if "PSNR" in shown else {})
    cells = cells_of(asked)[0]
    with ComparisonDisplay() as display:
        display.start(cells)
        display.finished(cells[-1], {"figures": {"cur": 0.4, "mac_ratio": 1.6, **paired}})
    said = capsys.readouterr().err
    assert shown in said and left_out not in said


def test_a_row_is_the_mean_and_the_spread_of_its_seeds(done):
    """The sample's deviation: over few seeds the population's says too little, of two by a factor of root 2."""
    report = read(done)
    assert report["finished"] == report["cells"] == 2 * (1 + 1 + 1 + 1 + 1 + 1)
    for row in rows(done).values():
        files = [done / folder / "row-3-torch.json" for folder in row["folders"]]
        found = [json.loads(file.read_text())["figures"] for file in files]
        for key, figure in row["figures"].items():
            values = [figures[key] for figures in found]
            assert figure == {"mean": statistics.fmean(values), "std": statistics.stdev(values), "seeds": 2}


def test_what_reuses_nothing_is_the_uncached_model_from_the_same_noise(done):
    found = rows(done)
    uncached, nothing = found[UNCACHED]["figures"], found["SmoothCache alpha 1e-09"]["figures"]
    assert nothing["relative_l2"]["mean"] == nothing["relative_l2"]["std"] == 0.0
    assert nothing["mac_ratio"]["mean"] == 1.0 == uncached["speedup"]["mean"] and "psnr_db" not in uncached
    assert nothing["macs"] == uncached["macs"]


def test_fewer_steps_and_few_bits_are_measured_against_the_same_model(done):
    found = rows(done)
    (steps,) = (row for row in found.values() if row["name"] == FEWER_STEPS)
    wanted = int(steps["point"].split()[0])
    assert steps["figures"]["mac_ratio"]["mean"] == pytest.approx(5 / wanted)
    few = found["int8-max w8a8"]["figures"]
    assert few["megabytes"]["mean"] < found[UNCACHED]["figures"]["megabytes"]["mean"] and few["mac_ratio"]["mean"] == 1
    assert 0 < few["relative_l2"]["mean"] < steps["figures"]["relative_l2"]["mean"]


def test_only_rows_that_kept_to_their_budget_are_ranked():
    asked = resolve(None, {"model": "any", "caching.target_cur": 0.4})

    def row(name: str, cur: float, mac_ratio: float, psnr_db: float) -> dict:
        figures = {"cur": cur, "mac_ratio": mac_ratio, "psnr_db": psnr_db, "relative_l2": 1 / psnr_db}
        spread = {key: {"mean": value, "std": 0.0, "seeds": 1} for key, value in figures.items()}
        off = missed(asked, cur, mac_ratio) if name != FEWER_STEPS else None
        return {"name": name, "point": "", "budget": 0.4, "figures": spread, "missed": off}

    near, worse = row("near", 0.41, 1.7, 30.0), row("worse", 0.39, 1.6, 20.0)
    far, steps = row("far", 0.2, 1.2, 50.0), row(FEWER_STEPS, 0.0, 1.25, 60.0)
    for key in ("psnr_db", "relative_l2"):
        assert best_rows({"rows": [far, worse, near, steps]}, key) == {2}
        assert best_rows({"rows": [near, row(FEWER_STEPS, 0.0, 1.67, 60.0)]}, key) == {1}
        assert best_rows({"rows": [near, far]}, key) == set()  # of one there is no best
        same, level = row("same", 0.4, 1.7, 30.000001), row("level", 0.4, 1.7, 30.0)
        assert best_rows({"rows": [near, worse, same]}, key) == {0, 2}  # as they are written
        assert best_rows({"rows": [near, same, level]}, key) == set()  # nor of equals


def test_training_cost_is_what_the_run_recorded(done):
    row = rows(done)["HarmoniCa CUR 40 %"]["training"]
    assert row["updates"]["mean"] >= 4 * 4 and row["images"]["mean"] == 0 and row["seconds"]["mean"] > 0
    assert row["update_ms"]["mean"] == pytest.approx(1e3 * row["seconds"]["mean"] / row["updates"]["mean"], rel=0.5)


def test_finished_cells_are_not_done_again_and_the_comparison_may_grow(asked, done, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(done, out)
    before = {file: file.stat().st_mtime_ns for file in out.rglob("row-*.json")}
    again = Watched()
    report = compare(asked, out, again)
    assert not again.told and report["finished"] == len(before)
    more = Watched()
    compare(asked.model_copy(update={"seeds": [0, 1, 2]}), out, more)
    assert {seed for _, seed, _ in more.told} == {2}
    assert {file: file.stat().st_mtime_ns for file in before} == before


def changed(out: Path, change) -> None:
    """Change every row in `out`."""
    for file in out.rglob("row-*.json"):
        row = json.loads(file.read_text())
        change(row)
        file.write_text(json.dumps(row))


TIMED = {
    "batch": lambda row: row["measured"].update(batch=7),
    "rounds": lambda row: row["measured"].update(rounds=9),
    "device": lambda row: row["measured"].update(device="cuda", device_name="some GPU", threads=None),
    "threads": lambda row: row["measured"].update(threads=64),
}


@pytest.mark.parametrize("what", TIMED)
def test_cells_that_were_timed_otherwise_are_timed_anew_and_keep_their_other_figures(asked, done, tmp_path, what):
    out, one_seed = tmp_path / "out", asked.model_copy(update={"seeds": [0]})
    shutil.copytree(done, out)
    changed(out, TIMED[what])
    compare(one_seed, out, watch := Watched())
    assert {doing for _, _, doing in watch.told} == {"timing"} and len({name for name, *_ in watch.told}) == 6
    for file in out.rglob("*seed-0/row-*.json"):
        new, old = (json.loads((folder / file.relative_to(out)).read_text()) for folder in (out, done))
        assert untimed(file) == untimed(done / file.relative_to(out)) and new["measured"] == old["measured"]
    compare(one_seed, out, again := Watched())
    assert not again.told


def test_rows_that_are_timed_anew_keep_what_they_were_judged_by(asked, done, tmp_path):
    """Though nothing is asked for by now: their figures stay, and so does what is said of them."""
    judged = {"reference": "real.npz", "size": 64, "clip": "some/clip"}
    out, one_seed = tmp_path / "out", asked.model_copy(update={"seeds": [0]})
    shutil.copytree(done, out)
    for change in (
        lambda row: row.update(judged),
        lambda row: row["figures"].update(fid=1.0, clip_score=30.0),
        lambda row: row["measured"].update(rounds=9),
    ):
        changed(out, change)
    report = compare(one_seed, out, watch := Watched())
    assert {doing for _, _, doing in watch.told} == {"timing"}
    for row in report["groups"][0]["rows"]:
        assert (row["references"], row["clips"]) == (["real.npz, cut to 64 pixels"], ["some/clip"])


def test_rows_of_earlier_versions_are_measured_anew_from_what_was_trained(asked, done, tmp_path):
    def forget(row: dict) -> None:
        del row["weights"], row["measured"]

    out, one_seed = tmp_path / "out", asked.model_copy(update={"seeds": [0]})
    shutil.copytree(done, out)
    changed(out, forget)
    report = compare(one_seed, out, watch := Watched())
    assert {doing for _, _, doing in watch.told} == {"sampling", "timing", "measuring"}
    assert report["measured"].keys() == {"date", "machine", "software", "timing"}
    for file in out.rglob("*seed-0/row-*.json"):
        row = json.loads(file.read_text())
        assert row["weights"] and row["measured"]["batch"] == 2
        # one thread adds up in another order than two: 4e-6 dB of 50 were seen
        assert untimed(file) == pytest.approx(untimed(done / file.relative_to(out)), rel=1e-5)


def test_few_bits_with_a_cache_are_compared_with_the_float_model_and_fewer_steps_may_be_asked_for(tiny_run, tmp_path):
    """All in one group, whose uncached row is there once although it is asked for."""
    model, few_bits = tiny_run.parent / "model", tmp_path / "w8a8"
    nothing, int8, rule = (
        recipe(tmp_path, *one)
        for one in (
            ("nothing", model, "caching: {method: interval, every: 1}"),
            ("int8", model, INT8),
            ("rule", few_bits, RANDOM),
        )
    )
    quantize(resolve_quant(Path(int8)), few_bits)
    both = {"recipe": rule, "name": "int8-max with reuse", "baseline": str(model)}
    asked = {"recipes": [nothing, {"recipe": nothing, "set": {"solver.steps": 2}}, int8, both], "budgets": [0.4]}
    asked |= {"seeds": [0], "samples": 2, "batch": 1, "rounds": 1}
    (tmp_path / "asked.yaml").write_text(yaml.safe_dump(asked))
    compare(load_comparison([tmp_path / "asked.yaml"]), tmp_path / "out", Watched())
    found = {
        name: {key: value["mean"] for key, value in row["figures"].items()}
        for name, row in rows(tmp_path / "out").items()
    }
    names = [UNCACHED, "fewer steps 2 steps", "int8-max with reuse CUR 40 %", "fewer steps 3 steps", "int8-max w8a8"]
    assert [*found] == names
    uncached, fewer, both, _, alone = (found[name] for name in names)
    assert fewer["mac_ratio"] == pytest.approx(5 / 2) and both["cur"] == 0.4 and both["mac_ratio"] > 1
    assert both["megabytes"] == alone["megabytes"] < uncached["megabytes"]
    assert both["relative_l2"] > alone["relative_l2"] > 0


@pytest.mark.parametrize("left", [b"", b'{"figures": {"cur"', b"[]", b"\xff\xfe", b"{}"])
def test_a_row_that_cannot_be_read_is_measured_anew_and_that_is_said(asked, done, tmp_path, left):
    out, one_seed = tmp_path / "out", asked.model_copy(update={"seeds": [0]})
    shutil.copytree(done, out)
    (file,) = out.rglob("harmonica*seed-0/row-*.json")
    file.write_bytes(left)
    assert write_report(one_seed, cells_of(one_seed)[0], [], out)["finished"] == 4  # of 5, fewer steps aside
    compare(one_seed, out, watch := Watched())
    assert {(name, what) for name, _, what in watch.told} == {
        ("HarmoniCa", what) for what in ("sampling", "measuring", "timing")
    }
    (line,) = watch.notices
    assert str(file) in line and "measured anew" in line
    assert untimed(file) == pytest.approx(untimed(done / file.relative_to(out)), rel=1e-5)  # as above


def test_a_model_whose_weights_have_changed_is_refused_with_the_way_out(tiny_run, tmp_path):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny_run.parent / "model", model)
    few = {"seeds": [0], "samples": 2, "batch": 1, "rounds": 1, "fewer_steps": False}
    names = [recipe(tmp_path, "random", model, RANDOM)]
    compare(load_comparison(names, few), out, Watched())
    make_dit(channels=1, seed=1).network.save_pretrained(model / "transformer")
    # the same cells, and others under which the old schedule would run
    for more, match in (({}, "uncached_seed-0 was measured with other"), ({"samples": 3}, "trained on another model")):
        with pytest.raises(RunError, match=f"{match}.*pass another --out") as caught:
            compare(load_comparison(names, few | more), out, Watched())
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", ["training", "sampling"])
def test_an_interrupted_comparison_keeps_its_rows_and_goes_on_where_it_was(asked, done, tmp_path, what):
    one_seed = asked.model_copy(update={"seeds": [0]})
    stopping = Watched(lambda cell, doing, done: (cell.name, doing, done) == ("HarmoniCa", what, 3))
    with pytest.raises(KeyboardInterrupt):
        compare(one_seed, tmp_path / "out", stopping)
    report = read(tmp_path / "out")
    assert 0 < report["finished"] < report["cells"] and "not finished" in (tmp_path / "out/compare.md").read_text()
    (run,) = {file.parent for file in (tmp_path / "out").rglob("recipe.yaml")}
    assert (run / "schedule.safetensors").exists() == (what == "sampling")
    going_on = Watched()
    compare(one_seed, tmp_path / "out", going_on)
    assert (UNCACHED, 0, "sampling") not in going_on.told
    for file in (tmp_path / "out").rglob("row-*.json"):
        # one thread adds up in another order than two: 4e-6 dB of 50 were seen
        assert untimed(file) == pytest.approx(untimed(done / file.relative_to(tmp_path / "out")), rel=1e-5)


@pytest.mark.parametrize("how", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_stopped_command_leaves_the_report_of_what_is_finished(asked, tmp_path, how):
    command = [sys.executable, "-m", "hcompress.cli.main", "compare", asked.recipes[1].recipe]
    command += ["--seeds", ",".join(map(str, range(500))), "--samples", "3", "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            while not [*tmp_path.rglob("row-*.json")] and process.poll() is None:
                time.sleep(0.02)
            process.send_signal(how)
            said = process.communicate(timeout=100)[1]
        finally:
            process.kill()
    assert process.returncode == 128 + how and "the same command goes on" in said
    assert 0 < read(tmp_path / "out")["finished"] < 1500 and (tmp_path / "out" / "compare.html").exists()


def test_a_cell_that_fails_leaves_the_others_and_is_named(asked, tiny_run, tmp_path):
    absent = "caching: {method: learning-to-cache, target_cur: 0.4, images: absent}"
    failing = recipe(tmp_path, "failing", tiny_run.parent / "model", absent)
    names = [failing, asked.recipes[1].recipe]
    few = {"seeds": [0], "samples": 2, "batch": 1, "rounds": 1}
    with pytest.raises(RunError, match=r"^1 of 4 cells failed, .* Learning-to-Cache CUR 40 % with seed 0: .*absent"):
        compare(load_comparison(names, few), tmp_path / "out", watch := Watched())
    assert {row["name"] for row in rows(tmp_path / "out").values()} == {UNCACHED, "random", FEWER_STEPS}
    assert len(watch.notices) == 1


def test_training_that_diverged_is_a_failure_and_no_finished_row(asked, tmp_path):
    """Only that there is no such schedule is a row's outcome; a router of NaN is none, and the cell is tried again."""
    one = asked.model_copy(update={"recipes": asked.recipes[:1], "seeds": [0], "fewer_steps": False})
    with pytest.raises(KeyboardInterrupt):
        compare(one, tmp_path / "out", Watched(lambda cell, what, done: (what, done) == ("training", 3)))
    (file,) = (tmp_path / "out").rglob("checkpoint.pt")
    state = torch.load(file, weights_only=True)
    for row in state["rows"].values():
        row.fill_(torch.nan)
    torch.save(state, file)
    for _ in range(2):
        with pytest.raises(RunError, match=r"^1 of 2 cells failed, .* HarmoniCa CUR 40 % with seed 0: .*diverged"):
            compare(one, tmp_path / "out", Watched())
        assert not [*(tmp_path / "out").rglob("harmonica*/row-*.json")]


def test_what_no_method_allows_is_left_out_with_its_reason(tiny_run, tmp_path):
    interval = "caching: {method: interval, target_cur: 0.4}"
    names = [recipe(tmp_path, "interval", tiny_run.parent / "model", interval)]
    few = {"budgets": [0.05, 0.4], "seeds": [0], "samples": 2, "batch": 1, "rounds": 1, "fewer_steps": False}
    report = compare(load_comparison(names, few), tmp_path / "out", Watched())
    (left_out,) = report["groups"][0]["left_out"]
    assert left_out["point"] == "CUR 5 %" and "no interval of 5 calls" in left_out["reason"]
    assert report["finished"] == report["cells"] == 3


def test_a_dry_run_names_all_cells_and_leaves_nothing(hcompress, asked, done, tmp_path):
    file = tmp_path / "asked.yaml"
    file.write_text(yaml.safe_dump(asked.model_dump(exclude_none=True)))
    for flags in ([], ["--json"]):
        code, told, _ = hcompress("compare", file, "--out", tmp_path / "out", "--dry-run", *flags)
        folders = json.loads(told)["folders"] if flags else told.split()
        assert code == 0 and {*folders} == {str(file.parent.relative_to(done)) for file in done.rglob("row-*.json")}
    assert json.loads(told)["cells"] == len(folders) == read(done)["cells"]
    assert sum("fewer-steps" in folder for folder in folders) == 2 and not (tmp_path / "out").exists()


def test_another_recipe_another_folder_and_a_missing_model_are_refused(asked, done, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(done, out)
    changed = asked.recipes[0].model_copy(update={"set": {"caching.lr": 0.5}})
    with pytest.raises(RunError, match=r"harmonica_cur-40_seed-0 was made by another recipe: caching.lr: 2.0 != 0.5"):
        compare(asked.model_copy(update={"recipes": [changed]}), out, Watched())
    file = next(out.rglob("random_*/row-*.json"))
    file.write_text(file.read_text().replace('"target_cur"', '"setting_that_is_gone"'))
    with pytest.raises(RunError, match=r"row-3-torch.json is of another version"):
        compare(asked, out, Watched())
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("precious")
    with pytest.raises(RunError, match=r"holds thesis.txt but no comparison.yaml"):
        compare(asked, tmp_path / "thesis", Watched())
    elsewhere = recipe(tmp_path, "elsewhere", tmp_path / "absent", RANDOM)
    with pytest.raises(ModelError, match="no model folder"):
        compare(load_comparison([elsewhere], {"seeds": [0]}), tmp_path / "new", watch := Watched())
    assert not watch.cells


def test_all_runners_draw_the_same_samples(asked, done, tmp_path):
    """ONNX Runtime and PyTorch differ by the order of float32 sums: 1e-5 of samples of the order of 1."""
    cell = next(cell for cell in cells_of(asked)[0] if cell.name == "random")
    setting, schedule = setting_of(cell.group), Schedule.load(done / cell.folder / "schedule.safetensors")
    drawn = {}
    for name, runner in RUNNERS.items():
        counted = []
        with runner(setting, schedule, tmp_path) as draw:
            drawn[name] = draw(3, 7, 2, counted.append)
        assert {*counted} - {0} == {2, 3} and not [*tmp_path.iterdir()]
    one, *others = drawn.values()
    for other in others:
        assert (one - other).abs().max() < 1e-5 < one.abs().max()


@pytest.mark.parametrize("runner", RUNNERS)
def test_samples_that_are_drawn_in_parts_are_those_that_are_drawn_together(asked, tmp_path, monkeypatch, runner):
    setting = setting_of(cells_of(asked)[0][0].group)
    with RUNNERS[runner](setting, None, tmp_path) as draw:
        whole = draw(7, 3, 2, lambda done: None)
        monkeypatch.setattr("hcompress.runners.PART", 4)
        told = []
        assert (draw(7, 3, 2, told.append) - whole).abs().max() < 1e-5 and sorted({*told} - {0}) == [2, 4, 6, 7]


@pytest.mark.parametrize("runner", RUNNERS)
def test_as_many_samples_run_at_once_as_are_asked_for(asked, tmp_path, runner):
    """Nothing is told of less than all of them, however many: what is timed is one batch."""
    setting = setting_of(cells_of(asked)[0][0].group)
    with RUNNERS[runner](setting, None, tmp_path) as draw:
        for count in (5, PART + 1):
            told = []
            assert len(draw(count, 0, count, told.append)) == count
            assert {*told} - {0} == {count}


@pytest.mark.slow  # two interpreters
def test_two_processes_share_the_cells(asked, done, tmp_path):
    """Each does half; what comes of it is what one process makes."""
    code = "import sys; from hcompress.cli.main import main; main()"
    (tmp_path / "run.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(tmp_path / "run.py"), "compare", asked.recipes[1].recipe, "--out", str(tmp_path / "out")]
    command += ["--seeds", "0", "--samples", "3", "--budgets", "0.4", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["finished"] == 3
    for file in (tmp_path / "out").rglob("random*/row-*.json"):
        # one thread adds up in another order than two: 4e-6 dB of 50 were seen
        assert untimed(file) == pytest.approx(untimed(done / file.relative_to(tmp_path / "out")), rel=1e-5)


def test_every_kind_of_recipe_can_be_a_row():
    assert {Run, *Run.__subclasses__()} == {*MAKERS}


def test_the_page_needs_no_network_and_escapes_what_it_shows(done):
    page = (done / "compare.html").read_text()
    assert not re.search(r"https?://|src=\"(?!data:)|@import|url\((?!#)", page)
    assert "Tiny &amp; &lt;quick&gt;" in page and "<quick>" not in page
    for name in rows(done):
        assert name.split()[0] in page


WATCH_THE_PAGE = """<script>
window.seen = [];
addEventListener("error", (event) => seen.push(event.message || event.target.outerHTML.slice(0, 80)), true);
for (const kind of ["error", "warn"]) console[kind] = (...words) => seen.push(words.join(" "));
</script>"""
REPORT_THE_PAGE = """<script>addEventListener("load", () => {
  const button = (selector) => document.querySelector(selector).click();
  const column = () => [...document.querySelectorAll("table")[0].tBodies[0].rows].map((row) => row.cells[3].innerText);
  const drawn = (marks) => [...marks].filter((mark) => mark.getBoundingClientRect().width).length;
  const shown = () => drawn(document.querySelectorAll("svg .s0"));
  const panels = () => drawn(document.querySelectorAll(".panel"));
  const points = document.querySelectorAll("svg .pt").length, before = shown();
  button(".keys button");
  const after = shown();
  button(".keys button");
  const box = document.querySelector("svg .pt").getBoundingClientRect();
  const at = { clientX: box.x + box.width / 2, clientY: box.y + box.height / 2, bubbles: true };
  document.querySelector("svg .pt").dispatchEvent(new PointerEvent("pointermove", at));
  const tip = document.querySelector(".tip").innerText;
  document.querySelectorAll("table")[0].tHead.rows[0].cells[3].querySelector("button").click();
  const verdict = {
    seen, points, before, after, tip, panels: panels(), sorted: column(),
    undrawn: [...document.images].filter((image) => !image.naturalWidth).length, images: document.images.length,
    plots: [...document.querySelectorAll("[data-panels]")[0].querySelectorAll("svg")].map((svg) => svg.getBBox().width),
    cost: document.querySelectorAll("table")[0].tHead.rows[0].cells[6].getBoundingClientRect().right,
    head: document.querySelectorAll("table")[0].tHead.rows[0].cells[6].innerText,
    overflow: document.documentElement.scrollWidth - innerWidth,
  };
  document.documentElement.innerHTML = "<pre>" + JSON.stringify(verdict).replace(/</g, "&lt;") + "</pre>";
})</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to look at the page with; apt-get install chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_draws_the_whole_page_and_has_nothing_to_complain_of(done, tmp_path, width):
    page = (done / "compare.html").read_text()
    watched = page.replace("<head>", "<head>" + WATCH_THE_PAGE, 1).replace("</body>", REPORT_THE_PAGE + "</body>", 1)
    (tmp_path / "page.html").write_text(watched)
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=4000", "--dump-dom"]
    shown = subprocess.run([*command, f"file://{tmp_path / 'page.html'}"], capture_output=True, text=True, timeout=120)
    verdict = json.loads(
        re.search(r"<pre>(.*)</pre>", shown.stdout, re.DOTALL)[1].replace("&lt;", "<").replace("&amp;", "&")
    )
    assert verdict["seen"] == [] and verdict["undrawn"] == 0
    assert verdict["images"] >= 8 and verdict["points"] >= 2 * 5 and all(verdict["plots"][:2])
    assert verdict["before"] > 0 == verdict["after"]  # a button takes its method out
    assert verdict["tip"].startswith("HarmoniCa ")  # and a point says what it is
    assert verdict["panels"] == 2  # one metric and one budget at a time
    ratios = [float(text.split()[0]) for text in verdict["sorted"] if text]
    assert ratios == sorted(ratios, reverse=True) and len(ratios) > 5
    assert verdict["overflow"] <= 0  # nothing but tables scrolls sideways
    assert verdict["head"].startswith("size") and (
        verdict["cost"] < 1280 or width < 1280
    )  # and no laptop for the costs
