"""What is exported is the reference sampler, cut down to what each step needs, stored once."""

from __future__ import annotations

import hashlib
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from conftest import CALLS, CFG, Exported, export, make_dit, make_table, random_mask
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

import hcompress
from hcompress.adapter import Adapter
from hcompress.errors import BundleError, DiskError, ScheduleError
from hcompress.sampling import hard_route, sample_seeded
from hcompress_export.bundle import _version, export_bundle
from hcompress_export.freeze import freeze
from hcompress_export.narrow import parse_rows
from hcompress_export.parity import parity
from hcompress_export.passes import step_graph
from hcompress_export.trace import trace
from hcompress_runtime import Runtime
from hcompress_runtime.bundle import UPDATE, open_bundle

# Of samples of the order of 1; float32 differs by some 1e-7 a call between libraries, guidance and 5 calls add up.
CLOSE = 1e-5
LABELS = [0, 1, 2, 4, 3]


def error(got: np.ndarray, want: np.ndarray) -> float:
    """Largest difference; relative where samples are large, as under a variance-exploding solver."""
    return float(np.abs(got - want).max() / max(1.0, np.abs(want).max()))


def reference(exported: Exported, **options: object) -> np.ndarray:
    """The samples of hcompress.sampling for LABELS."""
    compute = exported.schedule.compute if exported.schedule else None
    finished = sample_seeded(
        exported.adapter, exported.table, LABELS, seed=3, cfg=exported.identity.cfg, compute=compute, **options
    )
    return finished.numpy()


@pytest.fixture(scope="module")
def traced(tiny_dit: Adapter) -> ir.Model:
    return trace(tiny_dit, CFG)


def test_the_bundle_gives_the_samples_of_the_reference_sampler(tiny_bundle: Exported) -> None:
    with Runtime(tiny_bundle.path) as runtime:
        got = runtime.generate(LABELS, seed=3, batch=2)
        assert error(got, reference(tiny_bundle)) <= CLOSE
        moved = sample_seeded(tiny_bundle.adapter, tiny_bundle.table, LABELS, seed=3, cfg=CFG).numpy() - got
        assert np.abs(moved).max() > 1000 * CLOSE  # so caching matters here, and agreement means something
        assert np.array_equal(runtime.generate(LABELS[3:], seed=3, first=3), got[3:])
        assert (parity(tiny_bundle.adapter, runtime, LABELS, tiny_bundle.schedule.compute) <= CLOSE).all()


@pytest.mark.parametrize(
    ("solver", "cfg", "options"),
    [
        ("euler-a", CFG, {}),  # draws noise at every step, scales the model's input
        ("dpm++", 1.0, {}),  # no guidance: no doubling
        ("ddim", 4.0, {"one_embedder": False, "out_channels": 4}),  # a learned variance, unequal embedders
    ],
)
def test_other_settings_too(tmp_path: Path, solver: str, cfg: float, options: dict[str, object]) -> None:
    adapter = make_dit(**options)
    exported = export(tmp_path / "bundle", adapter, random_mask(CALLS, len(adapter.graph)), solver=solver, cfg=cfg)
    with Runtime(exported.path) as runtime:
        assert error(runtime.generate(LABELS, seed=3), reference(exported)) <= CLOSE


def test_measured_cache_is_the_plans_figure_to_the_byte(tiny_bundle: Exported) -> None:
    with Runtime(tiny_bundle.path) as runtime:
        runtime.generate([0, 1, 2])
        assert runtime.peak_cache_bytes == runtime.bundle.peak_cache_bytes(batch=3) > 0


def test_the_dense_bundle_is_one_graph_without_caches(tiny_dense_bundle: Exported) -> None:
    with Runtime(tiny_dense_bundle.path) as runtime:
        assert len(set(runtime.bundle.graphs)) == 1
        assert error(runtime.generate(LABELS, seed=3), reference(tiny_dense_bundle)) <= CLOSE
        assert runtime.peak_cache_bytes == runtime.bundle.peak_cache_bytes(5) == runtime.bundle.cur == 0
        assert runtime.bundle.mac_ratio == 1


def test_steps_of_one_pattern_share_a_file(tiny_bundle: Exported) -> None:
    bundle = open_bundle(tiny_bundle.path)
    assert bundle.graphs[1] == bundle.graphs[3]
    assert len({*bundle.graphs}) == len(bundle.plan.patterns) == 4
    assert {f"graphs/{file.name}" for file in tiny_bundle.path.glob("graphs/*.onnx")} == {*bundle.graphs}


def test_what_is_reused_has_no_nodes_and_no_weights(tiny_bundle: Exported) -> None:
    bundle = open_bundle(tiny_bundle.path)
    models = [ir.load(bundle.path / file) for file in bundle.graphs]
    linears = [sum(node.op_type == "Gemm" for node in model.graph) for model in models]
    products = [sum(node.op_type == "MatMul" for node in model.graph) for model in models]
    always = 2 + 2  # the modulation of each block, and of the output; the output
    narrowed = 2  # the modulation of a block leaves out what lies between two gates
    assert linears == [always + 2 * 4 + 2 * 2, *[always + narrowed + 4] * 4]  # four in attention, two in an MLP
    assert products == [2 * 2, *[2] * 4]  # two in attention
    for model, step in zip(models, bundle.plan.steps, strict=True):
        names = {value.name for value in (*model.graph.inputs, *model.graph.outputs)}
        assert {name for name in names if name.startswith("cache_in.")} == {f"cache_in.{name}" for name in step.reads}
        assert {name for name in names if name.startswith("cache_out.")} == {
            f"cache_out.{name}" for name in step.writes
        }
    assert bundle.weight_bytes[bundle.graphs[1]] < 0.7 * bundle.weight_bytes[bundle.graphs[0]]


def test_the_weight_file_holds_each_tensor_once_and_nothing_else(tiny_bundle: Exported) -> None:
    weights = tiny_bundle.path / "graphs" / "weights.safetensors"
    with safe_open(weights, "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    contents = {hashlib.sha256(f"{t.dtype}{t.shape}".encode() + t.tobytes()).digest() for t in tensors.values()}
    assert len(contents) == len(tensors)
    header = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    assert weights.stat().st_size == header + sum(tensor.nbytes for tensor in tensors.values())
    used = set()
    for file in tiny_bundle.path.glob("graphs/*.onnx"):
        for name, value in ir.load(file).graph.initializers.items():
            if isinstance(value.const_value, ir.ExternalTensor):
                whole, begin, end = parse_rows(name) or (name, 0, None)
                used.add(whole)
                assert np.array_equal(value.const_value.numpy(), tensors[whole][begin:end])
    assert used == tensors.keys()


def test_a_pruned_graph_equals_a_directly_traced_one(tiny_dit: Adapter, traced: ir.Model, tmp_path: Path) -> None:
    """The cut graph gives the very numbers of one that never contained the absent branches."""
    mask = random_mask(3, len(tiny_dit.graph), seed=1)
    mask[1], mask[2] = [False, True, False, True], [False, False, True, False]
    step = freeze(tiny_dit.graph, mask).steps[1]
    ir.save(step_graph(traced, step.pattern), tmp_path / "pruned.onnx")

    class Direct(torch.nn.Module):
        def forward(self, latent, labels, time, *cached):  # type: ignore[no-untyped-def]
            slots = {tiny_dit.graph.names.index(name): value for name, value in zip(step.reads, cached, strict=True)}
            condition = {"labels": labels}
            output = tiny_dit.guided(latent, condition, {"time_embedding": time}, CFG, hard_route(mask[1], slots))
            return output, *(slots[tiny_dit.graph.names.index(name)] for name in step.writes)

    rows = 2 * 3
    example = [torch.randn(3, 2, 8, 8), torch.tensor([0, 1, 4])]
    example += tiny_dit.step_constants(torch.tensor([300.0])).values()
    example += [torch.randn(rows, *tiny_dit.graph.branches[0].shape) for _ in step.reads]
    names = ["latent", "labels", "step.time_embedding", *(f"cache_in.{name}" for name in step.reads)]
    want = [value.detach().numpy() for value in Direct()(*example)]
    flat = [value.flatten(0, 1) if value.shape[0] == rows else value for value in example]  # slots are [rows L, D]
    feeds = {name: value.detach().numpy() for name, value in zip(names, flat, strict=True)}
    session = ort.InferenceSession(tmp_path / "pruned.onnx", providers=["CPUExecutionProvider"])
    got = session.run(None, feeds | {"cfg": np.array(CFG, np.float32)})
    assert [value.name for value in session.get_outputs()] == [
        "model_output",
        *(f"cache_out.{name}" for name in step.writes),
    ]
    assert max(error(ours, theirs.reshape(ours.shape)) for ours, theirs in zip(got, want, strict=True)) <= CLOSE


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 1000), st.floats(0.1, 0.9))
def test_chained_step_graphs_equal_the_reference_for_random_masks(
    tiny_dit: Adapter, tiny_bundle: Exported, traced: ir.Model, tmp_path: Path, seed: int, reuse: float
) -> None:
    mask = random_mask(CALLS, len(tiny_dit.graph), reuse=reuse, seed=seed)
    plan = freeze(tiny_dit.graph, mask)
    for index, pattern in enumerate(plan.patterns):
        ir.save(step_graph(traced, pattern), tmp_path / f"{index}.onnx")
    graphs = tuple(f"{plan.patterns.index(step.pattern)}.onnx" for step in plan.steps)
    shutil.copy(tiny_bundle.path / UPDATE, tmp_path)
    bundle = replace(open_bundle(tiny_bundle.path), path=tmp_path, plan=plan, graphs=graphs)
    with Runtime(bundle, threads=1) as runtime:
        assert parity(tiny_dit, runtime, LABELS, mask, seed=seed).max() <= CLOSE
        assert runtime.peak_cache_bytes == bundle.peak_cache_bytes(len(LABELS))


def test_equal_input_gives_equal_bytes(tiny_bundle: Exported, tmp_path: Path) -> None:
    again = export(tmp_path / "again", make_dit(), tiny_bundle.schedule.compute)
    for path in (tiny_bundle.path, again.path):
        assert not [*path.parent.glob(".*")]
    files = sorted(path.relative_to(again.path) for path in again.path.rglob("*.*"))
    assert files == sorted(path.relative_to(tiny_bundle.path) for path in tiny_bundle.path.rglob("*.*"))
    for file in files:
        pair = [(path / file) for path in (again.path, tiny_bundle.path)]
        if file.name == "constants.safetensors":  # PyTorch's kernels may differ in the last bit from call to call
            constants, others = (load_file(path) for path in pair)
            for name, values in constants.items():
                np.testing.assert_allclose(values, others[name], rtol=1e-5, atol=1e-6)
        elif file.name != "manifest.json":  # which holds the hash of those
            assert pair[0].read_bytes() == pair[1].read_bytes(), file


def test_a_trace_that_is_there_already_gives_the_same_bundle(
    tiny_bundle: Exported, traced: ir.Model, tmp_path: Path
) -> None:
    for name in ("once", "twice"):  # and is not used up
        re_export(tiny_bundle, tmp_path / name, schedule=tiny_bundle.schedule, traced=traced)
        assert open_bundle(tmp_path / name).graphs == open_bundle(tiny_bundle.path).graphs  # named by their content


def test_a_bundle_names_the_versions_that_wrote_it(tiny_bundle: Exported) -> None:
    tools = open_bundle(tiny_bundle.path).manifest["tools"]
    assert tools["hcompress"] == hcompress.__version__ and tools["torch"] == torch.__version__
    assert _version("no-such-package") is None  # a checkout on the path, say


def test_a_schedule_of_another_model_is_refused(tiny_bundle: Exported, tmp_path: Path) -> None:
    other = make_dit(seed=1)
    _, solver = make_table()
    with pytest.raises(ScheduleError, match="re-learn it"):
        export_bundle(
            other,
            tiny_bundle.table,
            other.identity("other", solver, CFG),
            tmp_path / "bundle",
            cfg=CFG,
            schedule=tiny_bundle.schedule,
        )


def re_export(exported: Exported, path: Path, **options: object) -> None:
    export_bundle(exported.adapter, exported.table, exported.identity, path, cfg=CFG, **options)


def test_only_a_bundle_is_replaced(tiny_bundle: Exported, tmp_path: Path) -> None:
    precious = tmp_path / "photos" / "a.jpg"
    precious.parent.mkdir()
    precious.write_bytes(b"precious")
    with pytest.raises(BundleError, match="photos exists and is no bundle; pass another --out"):
        re_export(tiny_bundle, precious.parent)
    assert precious.read_bytes() == b"precious"
    shutil.copytree(tiny_bundle.path, tmp_path / "bundle")
    re_export(tiny_bundle, tmp_path / "bundle")
    assert open_bundle(tmp_path / "bundle").cur == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "photos"]


def test_a_full_disk_leaves_the_old_bundle_whole(tiny_bundle: Exported, tmp_path: Path) -> None:
    """Files of this process may not grow past 64 KiB: the kernel refuses the weights, as a full disk does."""
    shutil.copytree(tiny_bundle.path, tmp_path / "bundle")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
    try:
        with pytest.raises(DiskError, match=r"cannot write .*weights\.safetensors: File too large"):
            re_export(tiny_bundle, tmp_path / "bundle")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert open_bundle(tmp_path / "bundle").cur > 0
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), ZeroDivisionError()])
def test_a_failed_export_leaves_the_old_bundle_whole(tiny_bundle: Exported, tmp_path: Path, failure: Exception) -> None:
    shutil.copytree(tiny_bundle.path, tmp_path / "bundle")

    def fail(folder: Path) -> None:
        assert Runtime(folder).generate([0]).shape == (1, 2, 8, 8)  # what is inspected is complete
        raise failure

    with pytest.raises(DiskError if isinstance(failure, OSError) else ZeroDivisionError):
        re_export(tiny_bundle, tmp_path / "bundle", inspect=fail)
    assert open_bundle(tmp_path / "bundle").cur > 0
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
