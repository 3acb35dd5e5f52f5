"""The solver's update as a graph: the numbers of the table on the host; and capture, as far as a CPU can say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import Exported, export, make_dit, random_mask
from hypothesis import given, settings
from hypothesis import strategies as st

from hcompress.errors import BundleError
from hcompress.solver import SOLVERS, make_scheduler, probe
from hcompress_export.trace import OPSET
from hcompress_export.update import write_update
from hcompress_runtime import Runtime
from hcompress_runtime.backends import FLAVORS
from hcompress_runtime.bundle import UPDATE
from hcompress_runtime.device import Device
from hcompress_runtime.ort import BFLOAT16, OnnxRuntime
from hcompress_runtime.table import SolverTable

SHAPE = (2, 3, 4, 5)  # B, C, H, W: all different
# Both sum the same float32 products, in another order: noises before outputs. At most 20 terms, each off by 6e-8.
CLOSE = 20 * 6e-8


def differences(table: SolverTable, folder: Path, seed: int) -> list[float]:
    """Of x at each call and of the sample: how far the graph is from the table, relative to the largest term."""
    random = np.random.default_rng(seed)
    draw = lambda count: [random.standard_normal(SHAPE, np.float32) for _ in range(count)]  # noqa: E731
    (start,), outputs, noises = draw(1), draw(table.num_calls), draw(table.num_noises)
    write_update(folder, SHAPE[1:], table.num_calls, opset=OPSET)
    found = []
    known, shares = table.ahead(start, noises), table.shares()
    with OnnxRuntime(folder / UPDATE, threads=1) as engine:
        x, ahead = engine.put(known[:, 0]), engine.put(known[:, 1:])
        for call in range(table.num_calls + 1):
            want = table.combine(call, start, outputs, noises)
            weights = np.concatenate([table.start[call : call + 1], table.outputs[call], table.noises[call]])
            found.append(np.abs(engine.to_numpy(x) - want).max() / (4 * np.abs(weights).max()))
            if call < table.num_calls:
                inputs = {"ahead": ahead, "model_output": engine.put(outputs[call]), "share": engine.put(shares[call])}
                moved = engine.infer(inputs)
                x, ahead = moved["latent"], moved["ahead_next"]
    return found


@pytest.mark.parametrize("name", SOLVERS)
def test_the_graph_gives_what_the_table_gives_for_all_solvers(name: str, tmp_path: Path) -> None:
    for steps in (5, 20):
        assert max(differences(probe(make_scheduler(name, {}), steps), tmp_path, steps)) <= CLOSE


@settings(max_examples=10, deadline=None)
@given(calls=st.integers(1, 7), noises=st.integers(0, 3), seed=st.integers(0, 1000))
def test_and_for_any_table_there_is(
    tmp_path_factory: pytest.TempPathFactory, calls: int, noises: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    outputs = np.tril(random.standard_normal((calls + 1, calls)), -1)
    start, drawn = random.standard_normal(calls + 1), random.standard_normal((calls + 1, noises))
    table = SolverTable(np.arange(calls, dtype=float), start, outputs, drawn)
    assert max(differences(table, tmp_path_factory.mktemp("update"), seed)) <= CLOSE


def test_the_graph_is_valid_float32_and_says_what_it_is_given(tmp_path: Path) -> None:
    write_update(tmp_path, SHAPE[1:], 3, opset=OPSET)
    onnx.checker.check_model(tmp_path / UPDATE, full_check=True)
    graph = onnx.load(tmp_path / UPDATE).graph
    values = {value.name: value.type.tensor_type for value in (*graph.input, *graph.output)}
    shapes = {name: [d.dim_param or d.dim_value for d in value.shape.dim] for name, value in values.items()}
    assert shapes == {
        "ahead": ["batch", 3, 3, 4, 5],
        "share": [3],
        "model_output": ["batch", 3, 4, 5],
        "latent": ["batch", 3, 4, 5],
        "ahead_next": ["batch", 3, 3, 4, 5],
    }
    assert {value.elem_type for value in values.values()} == {onnx.TensorProto.FLOAT}


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A stochastic solver, weights as inputs, and steps 1 and 3 one graph."""
    mask = random_mask(5, 4, seed=3)
    mask[1] = mask[3] = [True, False, False, True]
    mask[2] = mask[4] = [False, True, True, False]
    return export(tmp_path_factory.mktemp("update") / "b", make_dit(), mask, solver="euler-a", layout="per-mask")


def test_what_is_captured_has_the_same_samples_and_the_same_addresses_again(noisy: Exported) -> None:
    """As CUDA graphs need it. On a CPU nothing is recorded, but everything is where a recording would look for it."""
    with Runtime(noisy.path, threads=1) as plain, Runtime(noisy.path, threads=1, capture=3) as runtime:
        counts = []
        for seed in range(4):
            labels = [seed, 4, 2, 1, 0]  # five samples, three at once: the second batch is filled up
            want = plain.generate(labels, seed)
            # 1e-5: float32 over 5 calls, in batches of other sizes and so by other kernels.
            assert np.abs(runtime.generate(labels, seed) - want).max() <= 1e-5 * np.abs(want).max()
            engines = runtime.engines.items()
            counts.append({file: len(engine.recordings) for file, engine in engines if isinstance(engine, OnnxRuntime)})
        assert counts[1] == counts[-1]  # what is new after two generations is never new again
        assert sum(counts[-1].values()) == 2 * runtime.bundle.table.num_calls  # each call, and the update behind it
        assert runtime.peak_cache_bytes == runtime.bundle.peak_cache_bytes(3)


def test_what_cannot_be_captured_is_one_line(tmp_path: Path) -> None:
    path = export(tmp_path / "b", make_dit(), random_mask(5, 4), layout="switch").path
    with pytest.raises(BundleError, match="layout 'switch', which cannot be captured; export it with per-mask"):
        Runtime(path, capture=2)


def test_bfloat16_is_read_as_float32() -> None:
    ort = pytest.importorskip("onnxruntime")
    halves = np.array([[1.0, -2.5, 3.140625]], np.float32)  # no more bits than bfloat16 has
    bits = (halves.view(np.uint32) >> 16).astype(np.uint16)
    value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, BFLOAT16)
    assert np.array_equal(OnnxRuntime.to_numpy(value), halves)


def test_freed_memory_is_given_out_again_lowest_address_first() -> None:
    """So the same requests meet the same addresses, in whatever order blocks were freed."""
    device = Device(FLAVORS["rtx"])
    device.free = {64: [256, 512, 1024]}
    for freed_first in (0, 1, 2):
        blocks = [device.allocate(64) for _ in range(3)]
        assert [block.address for block in blocks] == [256, 512, 1024]
        del blocks[freed_first], blocks
