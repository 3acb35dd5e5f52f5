"""Schedules of other projects: rows the right way round, each project's rule, and no code run from a file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from typer.testing import CliRunner

from hcompress.cli.main import app
from hcompress.errors import ScheduleError
from hcompress.interop import KINDS, import_schedule
from hcompress.models.dit import DiT
from hcompress.schedule import Identity, Schedule

PUBLISHED = Path(__file__).parents[2] / "shared" / "data" / "interop"
L2C = PUBLISHED / "learning-to-cache_DiT-XL-2-256_DDIM20_router.pt"
SMOOTHCACHE = PUBLISHED / "smoothcache_50-N-3-threshold-0.18.json"
published = pytest.mark.skipif(not PUBLISHED.is_dir(), reason=f"the published files are not at {PUBLISHED}")

BRANCHES = tuple(f"{layer}.{kind}" for layer in range(2) for kind in ("attn", "mlp"))
DIT_XL = tuple(f"{layer}.{kind}" for layer in range(28) for kind in ("attn", "mlp"))
ARGS = {
    "harmonica": argparse.Namespace(l1=7e-8, num_sampling_steps=4, lambda_c=500, cfg_scale=1.5),
    "learning-to-cache": argparse.Namespace(l1=5e-6, num_sampling_steps=4, ste_threshold=None),
}


def identity(steps: int = 4) -> Identity:
    return Identity("some/dit", "c" * 64, "w" * 64, {"class": "DDIMScheduler", "steps": steps}, 1.5)


def router(folder: Path, kind: str, logits: np.ndarray) -> Path:
    """A checkpoint as both projects write it: one parameter a row, rows ascending in t, the flags beside them."""
    rows = {f"{row}.prob": torch.tensor(values) for row, values in enumerate(logits)}
    torch.save({"routers": rows, "opt": {"state": {}}, "args": ARGS[kind]}, folder / "router.pt")
    return folder / "router.pt"


LOGITS = np.array([[-3, 1, 0, 4], [2, -4, 1, 1], [0, -1, -3, -5], [-4, -3, -3, 2]], np.float32)  # ascending in t
REUSED = LOGITS < -2.1972  # log(tau / (1 - tau)) at tau = 0.1; something in every row


def test_harmonica_rows_are_flipped_and_the_first_is_pinned(tmp_path):
    schedule = import_schedule(router(tmp_path, "harmonica", LOGITS), names=BRANCHES, identity=identity())
    for row, t in enumerate((3, 2, 1, 0)):
        want = np.ones(4, bool) if row == 0 else ~REUSED[t]
        assert (schedule.compute[row] == want).all()
        assert (schedule.logits[row] == (5.0 if row == 0 else LOGITS[t])).all()
    assert schedule.method == {"name": "harmonica", "file": "router.pt", "threshold": 0.1, "beta": 7e-8}
    assert schedule.identity.weight_hash is None
    assert schedule.identity.config_hash == identity().config_hash


def test_learning_to_cache_reuses_at_even_rows_only(tmp_path):
    schedule = import_schedule(router(tmp_path, "learning-to-cache", LOGITS), names=BRANCHES, identity=identity())
    want = [np.ones(4, bool), ~REUSED[2], np.ones(4, bool), ~REUSED[0]]  # t = 3, 2, 1, 0
    assert (schedule.compute == want).all()
    assert schedule.method["name"] == "learning-to-cache"


def test_the_threshold_decides(tmp_path):
    path = router(tmp_path, "harmonica", LOGITS)
    curs = [import_schedule(path, names=BRANCHES, identity=identity(), threshold=tau).cur for tau in (0.01, 0.1, 0.9)]
    assert curs == sorted(curs) and len(set(curs)) == 3
    with pytest.raises(ScheduleError, match="outside 0 to 1"):
        import_schedule(path, names=BRANCHES, identity=identity(), threshold=1.0)


@published
def test_the_published_l2c_router_reuses_what_its_authors_report():
    schedule = import_schedule(L2C, names=DIT_XL, identity=identity(20))
    assert f"{100 * schedule.cur:.1f}" == "22.1"
    assert schedule.compute[::2].all()  # T is even: calls 0, 2, ... are the odd rows
    assert schedule.method["beta"] == 5e-6


@published
def test_the_published_smoothcache_schedule_is_one_row_for_all_layers():
    flags = json.loads(SMOOTHCACHE.read_text())
    schedule = import_schedule(SMOOTHCACHE, names=DIT_XL, identity=identity(50))
    for column, name in enumerate(DIT_XL):
        assert schedule.compute[:, column].tolist() == [bool(flag) for flag in flags[name.partition(".")[2]]]
    assert schedule.logits is None


SMOOTHCACHES = {
    "kinds": {"attn": [1, 0, 1, 0], "mlp": [1, 1, 0, 0]},
    "one kind": {"mlp": [1, 0, 1, 0]},
    "layers": {"attn-0": [1, 0, 0, 0], "attn-1": [1, 0, 0, 1], "mlp-0": [1, 0, 1, 0], "mlp-1": [1, 0, 1, 1]},
    "as diffusers calls them": {"attn1": [1, 0, 0, 1], "ff": [1, 0, 1, 1]},
}
COLUMNS = {
    "kinds": ["1010", "1100", "1010", "1100"],
    "one kind": ["1111", "1010", "1111", "1010"],
    "layers": ["1000", "1010", "1001", "1011"],
    "as diffusers calls them": ["1001", "1011", "1001", "1011"],
}


@pytest.mark.parametrize("case", SMOOTHCACHES)
def test_smoothcache(tmp_path, case):
    path = tmp_path / "any-name"
    path.write_text(json.dumps(SMOOTHCACHES[case]))
    schedule = import_schedule(path, names=BRANCHES, identity=identity())
    assert ["".join("01"[int(flag)] for flag in column) for column in schedule.compute.T] == COLUMNS[case]


class Payload:
    """Unpickled freely, it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("place", ["args", "routers"])
def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path, place):
    touched, path = tmp_path / "touched", tmp_path / "router.pt"
    torch.save({"routers": {"0.prob": torch.zeros(4)}, "args": None} | {place: Payload(touched)}, path)
    with pytest.raises(ScheduleError, match="holds code and was not run"):
        import_schedule(path, names=BRANCHES, identity=identity())
    assert not touched.exists()
    torch.load(path, weights_only=False)  # the file is a real one
    assert touched.exists()


def broken(folder: Path) -> dict[str, tuple[Path, str]]:
    """Files that cannot be imported, with what the error says."""
    good = router(folder, "harmonica", LOGITS).read_bytes()
    files = {
        "truncated": (good[: len(good) // 2], "damaged"),
        "garbage": (b"\x00" * 64, "damaged"),
        "empty": (b"", "damaged"),
        "half.json": (b'{"attn": [1, 0', "damaged"),
        "list.json": (b"[1, 0]", "holds a list"),
        "nothing.json": (b"{}", "lists of 0 and 1, all of one length"),
        "uneven.json": (b'{"attn": [1, 0, 1, 0], "mlp": [1, 0]}', "all of one length"),
        "two.json": (b'{"attn": [1, 2, 1, 0]}', "lists of 0 and 1"),
        "object.json": (b'{"attn": {"0": 1}}', "as anything known; pass kind, one of: harmonica"),
        "foreign.json": (b'{"attn": [1, 0, 1, 0], "conv": [1, 0, 1, 0]}', "'conv', which names no branch"),
        "reuse.json": (b'{"attn": [0, 0, 1, 0]}', "row 0 reuses '0.attn'"),
        "long.json": (b'{"attn": [1, 0, 1, 0, 1]}', "is for 5 steps, not 4"),
    }
    for name, (content, _) in files.items():
        (folder / name).write_bytes(content)
    tensors = {
        "unnamed.pt": ({"0.prob": torch.zeros(4)}, "pass kind"),
        "other.pt": ({"routers": {"0.prob": torch.zeros(4), "two": torch.zeros(4)}}, r"garbles '1\.prob'"),
        "none.pt": ({"routers": {}}, "rows of shape none"),
        "number.pt": ({"routers": 3}, "lacks or garbles"),
        "text.pt": ({"routers": {"0.prob": "0"}}, "garbles 'str' object"),
        "wide.pt": (
            {"routers": {f"{row}.prob": torch.zeros(6) for row in range(4)}},
            r"shape \[6\], but .* 4 branches",
        ),
        "nan.pt": ({"routers": {f"{row}.prob": torch.full((4,), torch.nan) for row in range(4)}}, "NaN"),
    }
    for name, (content, _) in tensors.items():
        torch.save(content | {"args": ARGS["harmonica"]} if "routers" in content else content, folder / name)
    named = {name: (folder / name, message) for name, (_, message) in (files | tensors).items()}
    return named | {"absent": (folder / "absent.pt", "no file")}


def test_what_cannot_be_imported_says_why_in_one_line(tmp_path):
    for name, (path, message) in broken(tmp_path).items():
        with pytest.raises(ScheduleError, match=message) as caught:
            import_schedule(path, names=BRANCHES, identity=identity())
        assert "\n" not in str(caught.value), name


def test_a_router_that_does_not_say_whose_it_is_needs_a_kind(tmp_path):
    path = tmp_path / "router.pt"
    torch.save({"routers": {f"{row}.prob": torch.tensor(LOGITS[row]) for row in range(4)}}, path)
    with pytest.raises(ScheduleError, match=f"pass kind, one of: {', '.join(KINDS)}"):
        import_schedule(path, names=BRANCHES, identity=identity())
    with pytest.raises(ScheduleError, match="as l2c; pass kind"):
        import_schedule(path, names=BRANCHES, identity=identity(), kind="l2c")
    curs = [import_schedule(path, names=BRANCHES, identity=identity(), kind=kind).cur for kind in KINDS[:2]]
    assert curs[0] > curs[1] > 0


def test_the_verb_writes_a_schedule_that_fits_its_model(tmp_path):
    network = DiTTransformer2DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=4, in_channels=1, sample_size=4, num_embeds_ada_norm=3
    )
    network.save_pretrained(tmp_path / "dit" / "transformer")
    DDIMScheduler(clip_sample=False).save_pretrained(tmp_path / "dit" / "scheduler")
    out = tmp_path / "out.safetensors"
    command = ["import", router(tmp_path, "harmonica", LOGITS), "--model", tmp_path / "dit", "--steps", 4, "--out", out]
    done = CliRunner().invoke(app, [*map(str, command), "--json"], catch_exceptions=False)
    schedule = Schedule.load(out)
    ratio = DiT(network).graph.mac_ratio(schedule.compute)
    assert json.loads(done.stdout) == {"schedule": str(out), "cur": schedule.cur, "mac_ratio": ratio}
    assert schedule.names == BRANCHES
    assert schedule.identity.solver["steps"] == 4
