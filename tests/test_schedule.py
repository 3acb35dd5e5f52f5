"""A schedule survives its file, counts right, and is refused wherever it does not belong or is not whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors import safe_open
from safetensors.numpy import save
from safetensors.torch import save_file

from hcompress.branches import Branch, BranchGraph
from hcompress.errors import ScheduleError
from hcompress.schedule import FORMAT, Identity, Schedule

GRAPH = BranchGraph(tuple(Branch(f"{i}.{kind}", 10, (4, 8), 9) for i in range(2) for kind in ("attn", "mlp")), 5, 7)
SOLVER = {"class": "DDIMScheduler", "steps": 5, "config_hash": "s" * 64}
IDENTITY = Identity("zoo:tiny", "c" * 64, "w" * 64, SOLVER, 1.5)
COMPUTE = np.array([[1, 1, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1]], bool)
LOGITS = np.linspace(-5, 5, COMPUTE.size, dtype=np.float32).reshape(COMPUTE.shape)


def schedule(**changes: object) -> Schedule:
    described = dict(compute=COMPUTE, names=GRAPH.names, identity=IDENTITY, method={"name": "harmonica", "beta": 7e-8})
    return Schedule(**described | {"logits": LOGITS} | changes)


@st.composite
def masks(draw: st.DrawFn) -> np.ndarray:
    mask = draw(arrays(np.bool_, st.tuples(st.integers(2, 12), st.integers(1, 8))))
    mask[0] = True
    return mask


@given(compute=masks(), learned=st.booleans(), cfg=st.none() | st.floats(0, 20))
def test_a_saved_schedule_loads_as_it_was(tmp_path_factory, compute, learned, cfg) -> None:
    path = tmp_path_factory.mktemp("saved") / "new folder" / "schedule.safetensors"
    logits = compute.astype(np.float32) - 0.5 if learned else None
    names = tuple(f"{i}.b" for i in range(compute.shape[1]))
    saved = schedule(compute=compute, names=names, logits=logits, identity=replace(IDENTITY, cfg=cfg))
    saved.save(path)
    loaded = Schedule.load(path)
    assert (loaded.compute == compute).all() and loaded.compute.dtype == np.bool_
    assert (loaded.names, loaded.identity, loaded.method) == (saved.names, saved.identity, saved.method)
    assert (loaded.logits is None) if logits is None else (loaded.logits == logits).all()
    assert loaded.cur == saved.cur


@given(masks())
def test_cur_is_the_reused_share_of_all_entries_the_first_call_included(compute) -> None:
    names = tuple(map(str, range(compute.shape[1])))
    one = schedule(compute=compute, names=names, logits=None)
    assert one.cur == pytest.approx((~compute).sum() / compute.size)
    assert 0 <= one.cur <= (one.num_calls - 1) / one.num_calls + 1e-12


def test_the_file_is_plain_safetensors_with_json(tmp_path: Path) -> None:
    schedule().save(tmp_path / "s.safetensors")
    with safe_open(tmp_path / "s.safetensors", "numpy") as file:
        assert sorted(file.keys()) == ["compute", "logits"]
        described = json.loads(file.metadata()[FORMAT])
    assert described["cur"] == schedule().cur
    assert described["identity"]["solver"] == SOLVER


NAN, INFINITE, SHORT = LOGITS.copy(), LOGITS.copy(), LOGITS[:3]
NAN[2, 1], INFINITE[0, 0] = np.nan, np.inf
REUSES_FIRST = COMPUTE.copy()
REUSES_FIRST[0, 2] = False
WRONG = {
    "row 0 reuses": ({"compute": REUSES_FIRST}, r"row 0 reuses '1\.attn'"),
    "one call": ({"compute": COMPUTE[:1], "logits": None}, "2 steps or more"),
    "no call": ({"compute": COMPUTE[:0], "logits": None}, "2 steps or more"),
    "one dimension": ({"compute": COMPUTE[0]}, r"must be bool\[T, N\], got bool\[4\]"),
    "numbers": ({"compute": COMPUTE.astype(np.uint8)}, r"must be bool\[T, N\], got uint8\[5, 4\]"),
    "too few columns": ({"compute": COMPUTE[:, :3]}, "3 columns but 4 branch names"),
    "NaN": ({"logits": NAN}, "NaN or infinity"),
    "infinite": ({"logits": INFINITE}, "NaN or infinity"),
    "short logits": ({"logits": SHORT}, r"`logits` \[3, 4\] and `compute` \[5, 4\] differ"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_refused_when_made_and_when_read(tmp_path: Path, changes, message) -> None:
    with pytest.raises(ScheduleError, match=message):
        schedule(**changes)
    path = write(tmp_path, tensors={"compute": COMPUTE, "logits": LOGITS} | changes)
    with pytest.raises(ScheduleError, match=message):
        Schedule.load(path)


def write(folder: Path, *, tensors: dict[str, np.ndarray | None] | None = None, **changes: object) -> Path:
    """A schedule's file with other tensors, or with something else in its metadata."""
    schedule().save(folder / "good")
    with safe_open(folder / "good", "numpy") as file:
        metadata = file.metadata()
    if "described" in changes:
        metadata[FORMAT] = changes.pop("described")
    else:
        metadata[FORMAT] = json.dumps(json.loads(metadata[FORMAT]) | changes)
    tensors = tensors or {"compute": COMPUTE}
    path = folder / "changed.safetensors"
    path.write_bytes(save({name: tensor for name, tensor in tensors.items() if tensor is not None}, metadata))
    return path


TAMPERED = {
    "no compute": {"tensors": {"logits": LOGITS}},
    "no JSON": {"described": "{"},
    "a list": {"described": "[]"},
    "names are no list": {"names": 3},
    "identity is a list": {"identity": []},
    "identity knows too little": {"identity": {"model": "zoo:tiny"}},
    "identity knows too much": {"identity": {**vars(IDENTITY), "more": 1}},
}


@pytest.mark.parametrize("changes", TAMPERED.values(), ids=TAMPERED)
def test_a_tampered_file_is_one_line(tmp_path: Path, changes) -> None:
    with pytest.raises(ScheduleError, match="lacks or garbles") as caught:
        Schedule.load(write(tmp_path, **changes))
    assert "\n" not in str(caught.value)


MISTYPED = {
    "solver is a list": {"identity": {**vars(IDENTITY), "solver": [1]}},
    "hash is a number": {"identity": {**vars(IDENTITY), "config_hash": 5}},
    "names are numbers": {"names": [0, 1, 2, 3]},
    "method is a list": {"method": [1]},
}


@pytest.mark.parametrize("changes", MISTYPED.values(), ids=MISTYPED)
def test_metadata_of_another_type_is_one_line(tmp_path: Path, changes) -> None:
    with pytest.raises(ScheduleError, match="lacks or garbles") as caught:
        Schedule.load(write(tmp_path, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float64, torch.int64])
@pytest.mark.parametrize("name", ["compute", "logits"])
def test_a_tensor_of_another_type_is_one_line(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    with safe_open(write(tmp_path), "pt") as file:
        metadata = file.metadata()
    tensors = {"compute": torch.tensor(COMPUTE), "logits": torch.tensor(LOGITS)}
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, tmp_path / "other.safetensors", metadata)
    with pytest.raises(ScheduleError) as caught:
        Schedule.load(tmp_path / "other.safetensors")
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_one_line_wherever_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "schedule.safetensors"
    schedule().save(path)
    whole = path.read_bytes()
    for length in (0, 1, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ScheduleError, match="truncated or not a safetensors file") as caught:
            Schedule.load(path)
        assert "\n" not in str(caught.value)


def test_other_files_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match=r"no schedule at .*; `hcompress train` leaves"):
        Schedule.load(tmp_path / "absent.safetensors")
    with pytest.raises(ScheduleError, match="no schedule at"):
        Schedule.load(tmp_path)
    (tmp_path / "text").write_text("compute everything")
    with pytest.raises(ScheduleError, match="not a safetensors file"):
        Schedule.load(tmp_path / "text")
    (tmp_path / "weights").write_bytes(save({"weight": LOGITS}))
    with pytest.raises(ScheduleError, match="no schedule that this version reads"):
        Schedule.load(tmp_path / "weights")


def test_it_fits_what_it_was_made_for() -> None:
    schedule().check_fits(GRAPH, IDENTITY)
    schedule().check_fits(GRAPH, replace(IDENTITY, model="./copy", cfg=4.0))
    schedule().check_fits(GRAPH, replace(IDENTITY, weight_hash=None))


def test_what_an_imported_schedule_does_not_record_is_not_compared() -> None:
    imported = schedule(identity=Identity("published", None, None, {}, None))
    imported.check_fits(GRAPH, IDENTITY)


def renamed(*names: str) -> BranchGraph:
    return BranchGraph(tuple(Branch(name, 10, (4, 8), 9) for name in names), 5, 7)


ELSEWHERE = {
    "names": (renamed("0.attn", "0.mlp", "1.cross", "1.mlp"), {}, r"first difference at 2: '1\.attn' != '1\.cross'"),
    "order": (renamed("0.mlp", "0.attn", "1.attn", "1.mlp"), {}, r"first difference at 0: '0\.attn' != '0\.mlp'"),
    "fewer": (renamed("0.attn", "0.mlp"), {}, "schedule has 4 branches but .* has 2"),
    "model": (GRAPH, {"config_hash": "d" * 64}, "config_hash cccccccccccc.*config_hash dddddddddddd"),
    "weights": (GRAPH, {"weight_hash": "x" * 64}, "weight_hash wwwwwwwwwwww.*weight_hash xxxxxxxxxxxx"),
    "solver": (GRAPH, {"solver": SOLVER | {"class": "DDPMScheduler"}}, "uses DDPMScheduler with 5 .*class differs"),
    "steps": (GRAPH, {"solver": SOLVER | {"steps": 6}}, "with 5 steps, but this run uses DDIMScheduler with 6"),
    "settings": (GRAPH, {"solver": SOLVER | {"config_hash": "t" * 64}}, "config_hash differs"),
}


@pytest.mark.parametrize(("graph", "changes", "message"), ELSEWHERE.values(), ids=ELSEWHERE)
def test_elsewhere_it_is_refused_in_a_line_that_names_the_first_difference(graph, changes, message) -> None:
    with pytest.raises(ScheduleError, match=message) as caught:
        schedule().check_fits(graph, replace(IDENTITY, **changes))
    assert "\n" not in str(caught.value)


def test_a_mask_of_other_branches_has_no_cost() -> None:
    with pytest.raises(ScheduleError, match=r"shape \(5, 3\) does not fit a model of 4 branches"):
        GRAPH.mac_ratio(COMPUTE[:, :3])
    dense = 5 * (5 + 40)
    assert GRAPH.total_macs(COMPUTE) == 5 * 5 + 10 * int(COMPUTE.sum())
    assert GRAPH.mac_ratio(COMPUTE) == dense / GRAPH.total_macs(COMPUTE)


def test_a_mask_is_saved_as_it_reads_however_it_lies_in_memory(tmp_path):
    """safetensors writes the bytes of a transposed array as they lie."""
    mask = np.array([[1, 0, 1], [1, 1, 0]], bool).T
    mask = np.vstack([np.ones((1, 2), bool), mask])
    columns = np.asfortranarray(mask)
    identity = Identity("tiny", None, None, {}, None)
    Schedule(columns, ("a", "b"), identity, logits=np.asfortranarray(mask.astype(np.float32))).save(
        tmp_path / "s.safetensors"
    )
    again = Schedule.load(tmp_path / "s.safetensors")
    assert (again.compute == mask).all() and (again.logits == mask).all()


def test_a_folder_is_read_as_the_schedule_in_it(tmp_path):
    identity = Identity("tiny", None, None, {}, None)
    Schedule(np.ones((2, 1), bool), ("a",), identity).save(tmp_path / "schedule.safetensors")
    assert Schedule.load(tmp_path).fingerprint == Schedule.load(tmp_path / "schedule.safetensors").fingerprint
    (tmp_path / "empty").mkdir()
    with pytest.raises(ScheduleError, match=r"no schedule at .*empty/schedule\.safetensors; `hcompress train` leaves"):
        Schedule.load(tmp_path / "empty")
