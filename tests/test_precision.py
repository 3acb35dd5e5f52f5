"""A network in float16 or bfloat16: what stays float32, how far samples move, and what the bundle says of itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from conftest import CALLS, CFG, Exported, export, make_dit, random_mask
from onnx.reference import ReferenceEvaluator
from safetensors import safe_open

from hcompress.adapter import Adapter
from hcompress.errors import EngineError
from hcompress.sampling import sample_seeded
from hcompress_export.trace import trace
from hcompress_runtime import Runtime
from hcompress_runtime.bundle import open_bundle

LABELS = [0, 4, 2]
# A half rounds by eps at each of some 30 operators of a call; guidance and 5 calls amplify what is left of it.
HALVES = {
    "float16": (torch.float16, ir.DataType.FLOAT16, 2e-2),
    "bfloat16": (torch.bfloat16, ir.DataType.BFLOAT16, 1e-1),
}
MASK = random_mask(CALLS, 4, seed=2)


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def reference(adapter: Adapter, exported: Exported) -> np.ndarray:
    """The samples of hcompress.sampling for LABELS, by another adapter of the same network."""
    return sample_seeded(adapter, exported.table, LABELS, seed=3, cfg=CFG, compute=MASK).numpy()


@pytest.fixture(scope="module", params=HALVES)
def half(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def adapter(half: str) -> Adapter:
    return make_dit(out_channels=4).to(HALVES[half][0])


@pytest.fixture(scope="module")
def traced(adapter: Adapter) -> ir.Model:
    return trace(adapter, CFG)


@pytest.fixture(scope="module")
def bundle(half: str, adapter: Adapter, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(tmp_path_factory.mktemp(half) / "bundle", adapter, MASK)


@pytest.mark.parametrize("cfg", [1.0, CFG])
def test_guidance_and_solver_see_float32_whatever_the_network_computes_in(tiny_dit: Adapter, cfg: float) -> None:
    x, condition, time = torch.randn(3, *tiny_dit.sample_shape), tiny_dit.label_condition(LABELS), torch.tensor([500.0])
    want = tiny_dit.guided(x, condition, tiny_dit.step_constants(time), cfg)
    assert tiny_dit.dtype == want.dtype == torch.float32
    for dtype, _, tolerance in HALVES.values():
        adapter = make_dit().to(dtype)
        got = adapter.guided(x, condition, adapter.step_constants(time), cfg)
        assert adapter.dtype == dtype and got.dtype == torch.float32
        assert 0 < relative(got.numpy(), want.numpy()) <= tolerance
    double = make_dit().double()
    assert double.guided(x.double(), condition, double.step_constants(time), cfg).dtype == torch.float64


def test_the_graph_is_valid_and_float32_where_it_matters(half: str, traced: ir.Model) -> None:
    element = HALVES[half][1]
    onnx.checker.check_model(ir.to_proto(traced), full_check=True)  # types of all operands too
    types = {value.name: value.dtype for value in (*traced.graph.inputs, *traced.graph.outputs)}
    inside = {name for name in types if name.startswith("cache.")}
    assert len(inside) == 4 and {types[name] for name in inside} == {element}
    assert {types[name] for name in types.keys() - inside - {"labels"}} == {ir.DataType.FLOAT}
    kinds = {node.op_type: [other for other in traced.graph if other.op_type == node.op_type] for node in traced.graph}
    assert {node.outputs[0].dtype for node in kinds["Softmax"]} == {ir.DataType.FLOAT}
    assert {node.attributes.get_int("stash_type") for node in kinds["LayerNormalization"]} == {ir.DataType.FLOAT}
    assert {node.outputs[0].dtype for node in kinds["Gemm"]} == {element}
    # The latent, the time and the output; round each softmax; in bfloat16, round a convolution with folded weights.
    assert len(kinds["Cast"]) == 3 + 2 * 2 + 2 * (half == "bfloat16")


def test_the_graph_gives_the_numbers_of_the_adapter(half: str, adapter: Adapter, traced: ir.Model) -> None:
    """By onnx's own evaluator, which knows bfloat16."""
    x, constants = torch.randn(3, *adapter.sample_shape), adapter.step_constants(torch.tensor([500.0]))
    want = adapter.guided(x, adapter.label_condition(LABELS), constants, CFG)[:, : adapter.sample_shape[0]].numpy()
    feeds = {"latent": x.numpy(), "labels": np.array(LABELS), "cfg": np.array(CFG, np.float32)}
    feeds |= {f"step.{name}": value.detach().float().numpy() for name, value in constants.items()}
    got, *_ = ReferenceEvaluator(ir.to_proto(traced)).run(None, feeds)
    assert got.dtype == np.float32 and relative(got, want) <= HALVES[half][2]


def test_a_bundle_says_what_it_computes_in_and_holds_nothing_wider(half: str, bundle: Exported) -> None:
    opened = open_bundle(bundle.path)
    assert opened.dtype == opened.manifest["dtype"] == half
    assert {rows.dtype for rows in opened.constants.values()} == {np.dtype(np.float32)}
    with safe_open(bundle.path / "graphs" / "weights.safetensors", "pt") as file:
        found = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118 (not a dict)
    assert found == {bundle.adapter.dtype} | ({torch.float32} if half == "bfloat16" else set())  # of the convolution
    slots = sum(np.prod(shape) for shape in opened.plan.slots.values())
    assert 0 < opened.peak_cache_bytes(3) <= 2 * 3 * slots * 2  # under guidance, two rows a sample; two bytes each
    assert opened.peak_cache_bytes(3) == opened.plan.peak_cache_bytes(6, itemsize=2)
    for path in bundle.path.glob("graphs/*.onnx"):
        onnx.checker.check_model(path, full_check=True)


def test_samples_are_those_of_the_reference_sampler(half: str, bundle: Exported) -> None:
    try:
        with Runtime(bundle.path) as runtime:
            got = runtime.generate(LABELS, seed=3)
            assert runtime.peak_cache_bytes == runtime.bundle.peak_cache_bytes(len(LABELS)) > 0
    except EngineError as error:
        assert half == "bfloat16" and str(error).startswith(
            f"onnxruntime {ort.__version__} has no cpu kernel for what "
        )
        assert "bfloat16 takes a GPU" in str(error) and "\n" not in str(error)
        pytest.skip(str(error))
    assert got.dtype == np.float32
    assert 0 < relative(got, reference(make_dit(out_channels=4), bundle)) <= HALVES[half][2]
    assert relative(got, reference(bundle.adapter, bundle)) <= HALVES[half][2]


@pytest.mark.parametrize("layout", ["per-mask", "switch"])
def test_float16_in_other_layouts(tmp_path: Path, layout: str) -> None:
    exported = export(tmp_path / "bundle", make_dit().half(), MASK, layout=layout)
    with Runtime(exported.path) as runtime:
        assert relative(runtime.generate(LABELS, seed=3), reference(make_dit(), exported)) <= HALVES["float16"][2]
