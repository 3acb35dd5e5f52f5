"""A bundle that is not what its exporter wrote is refused, in one line that names what is wrong."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Exported
from safetensors.numpy import load_file, save_file

from hcompress.errors import BundleError, InputError
from hcompress_runtime import Runtime
from hcompress_runtime.bundle import is_bundle, open_bundle


@pytest.fixture
def bundle(tiny_bundle: Exported, tmp_path: Path) -> Path:
    """A copy that may be broken."""
    return Path(shutil.copytree(tiny_bundle.path, tmp_path / "bundle"))


def edit(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def vouch(bundle: Path, name: str) -> None:
    """Have the manifest vouch for a file as it is now: what a careful forger would do."""
    content = (bundle / name).read_bytes()
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit(bundle, lambda manifest: manifest["files"].update({name: entry}))


def change_constant(bundle: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    constants = load_file(bundle / "constants.safetensors")
    save_file(constants | {name: change(constants[name])}, bundle / "constants.safetensors")
    vouch(bundle, "constants.safetensors")


def truncate(bundle: Path) -> None:
    weights = bundle / "graphs" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


def flip(bundle: Path) -> None:
    weights = bundle / "graphs" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


def swap_weights(bundle: Path) -> None:
    """Those of another bundle of the same architecture, so the file is as long."""
    weights = bundle / "graphs" / "weights.safetensors"
    content, data = weights.read_bytes(), 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    values = np.frombuffer(content[data:], np.float32)
    weights.write_bytes(content[:data] + np.random.default_rng(0).permutation(values).tobytes())


def lose_a_graph(bundle: Path) -> None:
    next(bundle.glob("graphs/*.onnx")).unlink()


def garble_a_graph(bundle: Path) -> None:
    graph = next(bundle.glob("graphs/*.onnx"))
    graph.write_bytes(b"not a graph")
    vouch(bundle, f"graphs/{graph.name}")


def leave_the_bundle(bundle: Path) -> None:
    (bundle.parent / "secret").write_bytes(b"secret")
    vouch(bundle, "../secret")


def link_out_of_the_bundle(bundle: Path) -> None:
    (bundle.parent / "secret").write_bytes(b"secret")
    (bundle / "inside").symlink_to(bundle.parent / "secret")
    vouch(bundle, "inside")


def name_an_absolute_path(bundle: Path) -> None:
    vouch(bundle, str(bundle / "schedule.safetensors"))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, r"weights\.safetensors has \d+ bytes instead of \d+"),
    "tampered": (flip, r"weights\.safetensors was changed"),
    "weights of another bundle": (swap_weights, r"weights\.safetensors was changed: SHA-256 .* instead of"),
    "graph missing": (lose_a_graph, r"\.onnx is missing"),
    "graph garbled": (garble_a_graph, r"onnxruntime cannot load .*\.onnx"),
    "path outside": (leave_the_bundle, r"lists '\.\./secret', which is outside the bundle"),
    "link outside": (link_out_of_the_bundle, r"lists 'inside', which is outside the bundle"),
    "absolute path": (name_an_absolute_path, r"which is outside the bundle"),
    "no manifest": (lambda b: (b / "manifest.json").unlink(), r"no bundle at .*manifest\.json is missing"),
    "half a manifest": (
        lambda b: (b / "manifest.json").write_text((b / "manifest.json").read_text()[:500]),
        r"manifest\.json cannot be read as JSON",
    ),
    "another format": (
        lambda b: edit(b, lambda m: m.update(format="hcompress-bundle-99")),
        r"has format 'hcompress-bundle-99', this version reads 'hcompress-bundle-1'",
    ),
    "no update": (lambda b: (b / "update.onnx").unlink(), r"update\.onnx is missing"),
    "made before there was an update": (
        lambda b: edit(b, lambda m: m["files"].pop("update.onnx")),
        r"uses 'update\.onnx' without listing it; export or copy it again",
    ),
    "no plan": (lambda b: edit(b, lambda m: m.pop("slots")), r"manifest\.json lacks 'slots'"),
    "slot read before it is written": (
        lambda b: edit(b, lambda m: m["steps"][0].update(writes=[])),
        r"step 1 reads slot '.*', which nothing has written",
    ),
    "unlisted graph": (
        lambda b: edit(b, lambda m: m["steps"][0].update(graph="graphs/other.onnx")),
        r"uses 'graphs/other\.onnx' without listing it",
    ),
    "too few steps": (lambda b: edit(b, lambda m: m["steps"].pop()), r"4 steps but a solver of 5 calls|never freed"),
    "wrong dtype": (
        lambda b: change_constant(b, "step.time_embedding", lambda x: x.astype(np.float16)),
        r"step\.time_embedding is float16 instead of float32",
    ),
    "NaN": (
        lambda b: change_constant(b, "table.start", lambda x: np.full_like(x, np.nan)),
        r"table\.start holds NaN or infinity",
    ),
    "rows missing": (
        lambda b: change_constant(b, "step.time_embedding", lambda x: x[:-1].copy()),
        r"time_embedding has 4 rows for 5 calls",
    ),
    "not causal": (
        lambda b: change_constant(b, "table.outputs", np.ones_like),
        r"strictly lower triangular",
    ),
    "unknown kind of condition": (
        lambda b: edit(b, lambda m: m["conditions"]["labels"].update(dtype="float8")),
        r"is garbled: a condition of dtype 'float8', which is none of: int64, float32, bool",
    ),
    "nothing to count samples by": (
        lambda b: edit(b, lambda m: m["conditions"].clear()),
        r"is garbled: no condition says how many samples there are",
    ),
    "unknown precision": (
        lambda b: edit(b, lambda m: m.update(dtype="float8")),
        r"computes in float8; this version runs: float32, float16, bfloat16",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_bundle_is_one_line(bundle: Path, name: str) -> None:
    damage, message = BROKEN[name]
    damage(bundle)
    with pytest.raises(BundleError, match=message) as caught:
        Runtime(bundle)
    assert "\n" not in str(caught.value)


def test_what_is_whole_opens(bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert is_bundle(bundle) and not is_bundle(bundle / "graphs") and not is_bundle(bundle / "absent")
    listed = sum((bundle / name).stat().st_size for name in opened.manifest["files"])
    assert opened.total_bytes() == listed


def test_labels_as_older_bundles_describe_them(bundle: Path) -> None:
    edit(bundle, lambda m: m.update(conditions={"labels": {"classes": 5}}))
    with Runtime(bundle) as runtime:
        assert runtime.generate([0, 4]).shape == (2, 2, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": [0, 5]}, r"label 5 is outside 0\.\.4"),
        ({"labels": [-1]}, r"label -1 is outside 0\.\.4"),
        ({"labels": []}, "no labels"),
        ({"labels": [0], "batch": 0}, "batch 0 should be 1 or more"),
        ({"labels": [0], "seed": -1}, "seed -1"),
        ({"labels": [0], "seed": 1 << 64}, "number random streams"),
    ],
)
def test_what_this_model_cannot_take_is_one_line(
    tiny_bundle: Exported, arguments: dict[str, Any], message: str
) -> None:
    with Runtime(tiny_bundle.path) as runtime, pytest.raises(InputError, match=message):
        runtime.generate(**arguments)


def test_an_unknown_provider_is_one_line(tiny_bundle: Exported) -> None:
    with pytest.raises(InputError, match="there is no provider 'tpu'; choose from: cpu, cuda"):
        Runtime(tiny_bundle.path, provider="tpu")
