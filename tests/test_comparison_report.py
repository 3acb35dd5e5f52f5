"""What a comparison's report says of rows as they lie in its folder, finished, impossible or missing."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcompress.comparison import (
    UNCACHED,
    Cell,
    Comparison,
    LeftOut,
    cells_of,
    group_name,
    load_comparison,
    missed,
    row_file,
)
from hcompress.recipe import resolve
from hcompress.report.comparison import markdown, summarise, write_report

RULES = [f"fashion-dit_ddim20_{name}" for name in ("interval", "random")]
REASONS = ("no interval comes near", "no alpha comes near")
OUTCOMES = ("figures", *REASONS, None)  # of a cell: finished, impossible for one reason or another, not there yet


def asked(**more: Any) -> Comparison:
    return load_comparison(RULES, {"budgets": [0.4], "seeds": [0, 1, 2], **more})


def keep(out: Path, comparison: Comparison, cell: Cell, outcome: str | None, cur: float = 0.4, **more: Any) -> None:
    """Write the row of `cell`, as hcompress.compare does."""
    if outcome is None:
        return
    figures = {"cur": cur, "mac_ratio": 1.5, "psnr_db": 30.0 + cell.seed, "speedup": 1.4, "latency_ms": 7.0}
    row = {"figures": figures, "training": {}} if outcome == "figures" else {"impossible": outcome}
    file = row_file(out, cell, comparison)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(row | more))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(OUTCOMES), min_size=9, max_size=9))
def test_every_finished_cell_is_in_a_row_or_left_out_with_its_reason(outcomes):
    comparison = asked()
    cells = cells_of(comparison)[0]
    with tempfile.TemporaryDirectory() as folder:
        for cell, outcome in zip(cells, outcomes, strict=True):
            keep(Path(folder), comparison, cell, outcome)
        report = summarise(comparison, cells, [], Path(folder))
    (group,) = report["groups"]
    told = {(row["name"], seed): "figures" for row in group["rows"] for seed in row["seeds"]}
    told |= {(one["name"], seed): one["reason"] for one in group["left_out"] for seed in one["seeds"]}
    assert told == {(cell.name, cell.seed): one for cell, one in zip(cells, outcomes, strict=True) if one}
    for row in group["rows"]:
        assert row["figures"]["psnr_db"]["seeds"] == len(row["seeds"]) == len(row["folders"])
    said = markdown(report)
    for one in group["left_out"]:
        line = next(line for line in said.splitlines() if line.startswith(one["name"]) and one["reason"] in line)
        assert ("with seed" in line) == (one["seeds"] != comparison.seeds)


MEASURED = {"date": "2026-01-05", "batch": 8, "rounds": 5, "device": "cpu", "device_name": "a CPU", "threads": 4}
MEASURED |= {"packages": {"hcompress": "1.0", "torch": "2.9"}}
OTHERWISE = {
    "date": ({"date": "2026-01-02"}, "2026-01-02 to 2026-01-05"),
    "threads": ({"threads": 1}, "a CPU, 4 threads (but a CPU, 1 thread for FORA CUR 40 % seed 1)"),
    "GPU": ({"device": "cuda", "device_name": "a GPU", "threads": None}, "4 threads (but a GPU for FORA CUR 40 % seed"),
    "version": ({"packages": {"hcompress": "1.0", "torch": "2.8"}}, "torch 2.9 (but hcompress 1.0, torch 2.8 for FORA"),
    "batch": ({"batch": 1}, "8 samples at once, median of 5 rounds (but 1 sample at once, median of 5 rounds for FORA"),
    "nothing": (None, "a CPU, 4 threads (but unrecorded for FORA CUR 40 % seed 1)"),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_the_report_says_what_rows_recorded_and_where_they_differ(tmp_path, name):
    """It does so wherever and whenever it is written: all that it says of machines and versions is from the rows."""
    comparison = asked()
    cells = cells_of(comparison)[0]
    for cell in cells:
        keep(tmp_path, comparison, cell, "figures", measured=MEASURED)
    write_report(comparison, cells, [], tmp_path)
    pages = [(tmp_path / file).read_text() for file in ("compare.md", "compare.html")]
    assert all("2026-01-05" in page and "a CPU, 4 threads" in page and "(but" not in page for page in pages)
    change, line = OTHERWISE[name]
    one = next(cell for cell in cells if (cell.name, cell.seed) == ("FORA", 1))
    keep(tmp_path, comparison, one, "figures", **({} if change is None else {"measured": MEASURED | change}))
    write_report(comparison, cells, [], tmp_path)
    for file in ("compare.md", "compare.html"):
        assert line in (tmp_path / file).read_text()


def test_the_report_of_nothing_is_written(tmp_path):
    comparison = asked()
    write_report(comparison, cells_of(comparison)[0], [], tmp_path)
    said = (tmp_path / "compare.md").read_text()
    assert "9 of 9 cells are not finished" in said and "measured" not in said


@pytest.mark.parametrize("impossible", [0, 2])
def test_the_whole_report_of_seeds_that_differ_is_written(tmp_path, impossible):
    comparison = asked()
    cells = cells_of(comparison)[0]
    for cell in cells:
        keep(tmp_path, comparison, cell, REASONS[0] if cell.name == "FORA" and cell.seed == impossible else "figures")
    write_report(comparison, cells, [], tmp_path)
    line = f"FORA at CUR 40 % with seed {impossible} is left out: {REASONS[0]}."
    assert line in (tmp_path / "compare.md").read_text() and line in (tmp_path / "compare.html").read_text()


def test_a_group_with_nothing_but_what_is_left_out_is_in_the_report(tmp_path):
    """Of two models one reaches no budget at all; the other's rows are as they would be without it."""
    comparison = asked()
    cells = cells_of(comparison)[0]
    other = next(cell for cell in cells if cell.name == UNCACHED).group.model_copy(update={"model": "other"})
    for cell in cells:
        keep(tmp_path, comparison, cell, "figures")
    alone = summarise(comparison, cells, [], tmp_path)["groups"]
    report = write_report(comparison, cells, [LeftOut(other, "FORA", "CUR 97 %", REASONS[0])], tmp_path)
    *others, last = report["groups"]
    assert others == alone and (last["name"], last["rows"]) == (group_name(other), [])
    for file in ("compare.md", "compare.html"):
        assert f"FORA at CUR 97 % is left out: {REASONS[0]}." in (tmp_path / file).read_text()


@settings(deadline=None, max_examples=10)
@given(st.lists(st.sampled_from((0.0, 0.375, 0.385, 0.4, 0.415, 0.43)), min_size=3, max_size=3))
def test_a_row_that_missed_its_budget_says_so_and_one_that_reuses_nothing_is_in_no_plot(curs):
    """At most 0.02 of CUR is no miss, of the mean over seeds; one seed alone at 100 dB would stretch a whole plot."""
    comparison = asked()
    cells = cells_of(comparison)[0]
    with tempfile.TemporaryDirectory() as folder:
        for cell in cells:
            keep(Path(folder), comparison, cell, "figures", curs[cell.seed] if cell.name == "FORA" else 0.4)
        report = write_report(comparison, cells, [], Path(folder))
        tables, page = ((Path(folder) / f"compare.{kind}").read_text() for kind in ("md", "html"))
    assert "random | missed" not in tables
    fora = next(row for row in report["groups"][0]["rows"] if row["name"] == "FORA")
    mean = sum(curs) / 3
    line = f"missed: CUR {100 * mean:.3g} % of 40 %"
    for text in (tables, page):
        assert (line in text) == (abs(mean - 0.4) > 0.02) == (fora["missed"] is not None)
    assert fora["reused_nothing"] == [seed for seed, cur in enumerate(curs) if cur == 0]
    drawn = re.findall(r'data-tip="(\w+)', page)
    assert "random" in drawn and ("FORA" in drawn) == (0.0 not in curs)


def test_a_speedup_that_was_not_reached_is_missed_as_well():
    recipe = resolve(None, {"model": "any", "caching.target_speedup": 1.5})
    assert missed(recipe, 0.4, 1.47) is None  # of MACs saved, 0.33 and 0.32
    assert missed(recipe, 0.1, 1.1) == "missed: MACs / 1.10 of 1.5"


def test_latents_that_nothing_decodes_are_said_to_have_no_psnr(tmp_path):
    comparison = asked()
    cells = cells_of(comparison)[0]
    for cell in cells:
        keep(tmp_path, comparison, cell, "figures")
    for psnr, said in ((True, "PSNR, SSIM and relative L2 compare with"), (False, "Relative L2 compares with")):
        for file in tmp_path.rglob("row-*.json"):
            row = json.loads(file.read_text())
            figures = {key: value for key, value in row["figures"].items() if psnr or key != "psnr_db"}
            file.write_text(json.dumps(row | {"figures": figures | {"relative_l2": 0.1}}))
        write_report(comparison, cells, [], tmp_path)
        for file in ("compare.md", "compare.html"):
            page = (tmp_path / file).read_text()
            assert said in page and ("have no PSNR" in page) == (not psnr)


def test_what_holds_of_some_figures_names_their_rows(tmp_path):
    """As where the reference was changed and the rows are not all measured anew yet."""
    comparison = asked()
    cells = cells_of(comparison)[0]
    judged = {"reference": "a.npz", "size": 64, "notes": ["fid of 6 samples is mostly bias"]}
    for cell in cells:
        keep(tmp_path, comparison, cell, "figures", **(judged if cell.name == "FORA" else {"reference": "b.npz"}))
    for file in tmp_path.rglob("fora*/row-*.json"):
        row = json.loads(file.read_text())
        file.write_text(json.dumps(row | {"figures": row["figures"] | {"fid": 122.64}}))
    write_report(comparison, cells, [], tmp_path)
    for file in ("compare.md", "compare.html"):
        said = (tmp_path / file).read_text()
        assert "fid of 6 samples is mostly bias (FORA CUR 40 %)." in said
        assert "compare with a.npz, cut to 64 pixels (FORA CUR 40 %)." in said and "b.npz" not in said
