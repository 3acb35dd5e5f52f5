"""Every layout of a bundle gives the same samples from weights stored once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from conftest import (
    CALLS,
    export,
    make_dit,
    make_pixart,
    make_pooled_prompts,
    make_prompts,
    make_sd3,
    make_uvit,
    random_mask,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hcompress.adapter import Adapter
from hcompress.errors import BundleError
from hcompress_export.parity import TOLERANCE, parity
from hcompress_runtime import Runtime
from hcompress_runtime.bundle import LAYOUTS, WEIGHTS, open_bundle
from hcompress_runtime.weights import find, map_weights

CLOSE = 1e-5  # as in test_export: float32 rounding between libraries, over 5 calls
LABELS = [0, 1, 2, 4, 3]
MAPS = Path("/proc/self/maps")


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1000), reuse=st.floats(0.1, 0.9))
def test_all_layouts_equal_the_reference_sampler(
    tiny_dit: Adapter, tmp_path: Path, layout: str, seed: int, reuse: float
) -> None:
    mask = random_mask(CALLS, len(tiny_dit.graph), reuse=reuse, seed=seed)
    exported = export(tmp_path / "bundle", tiny_dit, mask, layout=layout)
    with Runtime(exported.path, threads=1) as runtime:
        assert parity(tiny_dit, runtime, LABELS, mask, seed=seed).max() <= CLOSE
        assert runtime.peak_cache_bytes == runtime.bundle.peak_cache_bytes(len(LABELS))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_dense_model_fits_every_layout(tiny_dit: Adapter, tmp_path: Path, layout: str) -> None:
    with Runtime(export(tmp_path / "bundle", tiny_dit, None, layout=layout).path) as runtime:
        assert parity(tiny_dit, runtime, LABELS).max() <= CLOSE


@pytest.mark.skipif(not MAPS.exists(), reason="the system does not list what is mapped")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_closed_bundle_is_no_longer_in_memory(tiny_dit: Adapter, tmp_path: Path, layout: str) -> None:
    path = export(tmp_path / "bundle", tiny_dit, None, layout=layout).path
    runtime = Runtime(path, prepack=False)
    runtime.generate(LABELS)
    assert str(path / WEIGHTS) in MAPS.read_text()
    runtime.close()
    assert str(path / WEIGHTS) not in MAPS.read_text()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_text_model_fits_every_layout(tmp_path: Path, layout: str, dtype: str) -> None:
    """Calls 2 and 4 reuse all cross-attention, call 3 reuses everything: they need no prompts."""
    adapter = make_pixart().to(getattr(torch, dtype))
    mask = random_mask(CALLS, len(adapter.graph))
    mask[2, 1::3], mask[3], mask[4] = False, False, [True, False, True] * 2
    tolerance = CLOSE if dtype == "float32" else TOLERANCE[dtype]
    with Runtime(export(tmp_path / "bundle", adapter, mask, layout=layout).path, threads=1) as runtime:
        assert parity(adapter, runtime, make_prompts(3, seed=1), mask, seed=1).max() <= tolerance
        assert runtime.peak_cache_bytes == runtime.bundle.peak_cache_bytes(3) > 0
        feeds = [runtime.engines[file].feeds for file in runtime.bundle.graphs]
    asks = [{name for name in feed if name in adapter.conditions} for feed in feeds]
    everything = {*adapter.conditions}
    assert asks == (
        [everything] * 5 if layout == "switch" else [everything, everything, set[str](), set[str](), set[str]()]
    )


def test_a_branch_that_only_another_branch_reads_is_switched_on_its_own(tmp_path: Path) -> None:
    """In joint attention: the text's MLP in the last block but one, which nothing but the last attention needs."""
    adapter = make_sd3()
    mask = random_mask(CALLS, len(adapter.graph))
    mask[1:3] = [[True, True, False, True, True], [True, True, True, False, True]]
    path = export(tmp_path / "bundle", adapter, mask, solver="flow-euler", layout="switch").path
    with Runtime(path, threads=1) as runtime:
        assert parity(adapter, runtime, make_pooled_prompts(3, seed=1), mask, seed=1).max() <= CLOSE


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_long_skips_fit_every_layout(tmp_path: Path, layout: str, dtype: str) -> None:
    """Call 2 reuses everything: what is left are the long skips, of slots. Call 3 computes one half, call 4 the other.

    The solver gives singlestep's coefficients, where a call starts from older samples.
    """
    adapter = make_uvit().to(getattr(torch, dtype))
    mask = random_mask(CALLS, len(adapter.graph))
    mask[2], mask[3], mask[4] = False, [True] * 3 + [False] * 3, [False] * 3 + [True] * 3
    tolerance = CLOSE if dtype == "float32" else TOLERANCE[dtype]
    exported = export(tmp_path / "bundle", adapter, mask, layout=layout, solver="dpmsolver")
    with Runtime(exported.path, threads=1) as runtime:
        assert parity(adapter, runtime, LABELS, mask, seed=1).max() <= tolerance
        assert runtime.peak_cache_bytes == runtime.bundle.peak_cache_bytes(len(LABELS)) > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_that_generate_at_once_each_get_their_own_samples(tmp_path: Path, layout: str) -> None:
    adapter = make_dit()
    mask = random_mask(CALLS, len(adapter.graph))
    with Runtime(export(tmp_path / "bundle", adapter, mask, layout=layout).path, threads=1) as runtime:
        want = [runtime.generate(LABELS, seed) for seed in range(6)]
        with ThreadPoolExecutor(4) as pool:
            got = [*pool.map(lambda seed: runtime.generate(LABELS, seed), range(6))]
    assert all(np.array_equal(one, other) for one, other in zip(got, want, strict=True))


def test_all_layouts_store_the_same_weights_once(tmp_path: Path) -> None:
    adapter = make_dit()
    mask = random_mask(CALLS, len(adapter.graph))
    files = {
        layout: (export(tmp_path / layout, adapter, mask, layout=layout).path / WEIGHTS).read_bytes()
        for layout in LAYOUTS
    }
    assert len({*files.values()}) == 1


def test_a_per_mask_graph_holds_no_weights_and_lists_those_it_uses(tmp_path: Path, tiny_dit: Adapter) -> None:
    bundle = open_bundle(export(tmp_path / "b", tiny_dit, random_mask(CALLS, 4), layout="per-mask").path)
    weights = map_weights(bundle.path / WEIGHTS)
    for file, weight_bytes in bundle.weight_bytes.items():
        graph = ir.load(bundle.path / file).graph
        inputs = {str(value.name): value for value in graph.inputs if str(value.name).startswith("w.")}
        assert sum(find(weights, name).nbytes for name in inputs) == weight_bytes
        assert all(find(weights, name).shape == tuple(value.shape.numpy()) for name, value in inputs.items())
        assert (bundle.path / file).stat().st_size < weight_bytes
        assert all(value.const_value.nbytes < 512 for value in graph.initializers.values())


def test_a_switch_bundle_is_one_graph_with_an_if_for_every_branch_that_is_reused(tmp_path: Path) -> None:
    adapter = make_dit()
    mask = np.array([[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]], bool)
    bundle = open_bundle(export(tmp_path / "b", adapter, mask, layout="switch").path)
    assert len({*bundle.graphs}) == 1
    graph = ir.load(bundle.path / bundle.graphs[0]).graph
    bodies = [node.attributes["then_branch"].as_graph() for node in graph if node.op_type == "If"]
    assert len(bodies) == 3 == (~mask).any(axis=0).sum()
    # Norms, both linear layers of an MLP and all four of attention are skipped; the gate's part of adaLN is not.
    inside = [sum(node.op_type == "Gemm" for node in body) for body in bodies]
    assert inside == [4, 2, 2]
    assert all(any(node.op_type == "LayerNormalization" for node in body) for body in bodies)


def test_a_layout_of_another_version_is_refused(tmp_path: Path, tiny_dit: Adapter) -> None:
    path = export(tmp_path / "b", tiny_dit, random_mask(CALLS, 4)).path
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"layout": "embedded"', '"layout": "folded"'))
    with pytest.raises(BundleError, match=r"layout 'folded'.*embedded, per-mask, switch"):
        open_bundle(path)


def test_a_weight_that_is_missing_is_named(tmp_path: Path, tiny_dit: Adapter) -> None:
    path = export(tmp_path / "b", tiny_dit, random_mask(CALLS, 4)).path
    with pytest.raises(BundleError, match=r"wants weights w\.0123\[0:4\]"):
        find(map_weights(path / WEIGHTS), "w.0123[0:4]")
    (path / WEIGHTS).write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    with pytest.raises(BundleError, match="not a weight file"):
        map_weights(path / WEIGHTS)
