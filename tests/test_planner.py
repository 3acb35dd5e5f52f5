"""What the planner predicts is what bundles hold, and what was measured at full size; what it chooses fits."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from conftest import Exported, random_mask
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hcompress.branches import Branch, BranchGraph
from hcompress.errors import InputError, ScheduleError
from hcompress_export.freeze import freeze
from hcompress_export.planner import ENGINES, Estimate, choose, estimate
from hcompress_runtime.bundle import LAYOUTS, open_bundle

D, TOKENS, LAYERS, MIB = 1152, 256, 28, 1 << 20


def xl() -> BranchGraph:
    """DiT-XL/2 256 by arithmetic: 675 M parameters, 118 GMACs."""
    linear = D * D + D
    branches = []
    for layer in range(LAYERS):
        macs = TOKENS * 4 * D * D + 2 * TOKENS * TOKENS * D
        branches.append(Branch(f"{layer}.attn", macs, (TOKENS, D), params=6 * linear))
        branches.append(Branch(f"{layer}.mlp", TOKENS * 8 * D * D, (TOKENS, D), params=8 * D * D + 5 * D + 2 * linear))
    embedder = 257 * D + linear + 1001 * D
    ends = 17 * D + 2 * linear + 32 * D + 32
    return BranchGraph(tuple(branches), other_macs=10**8, other_params=LAYERS * 2 * linear + embedder + ends)


def half(graph: BranchGraph) -> np.ndarray:
    """The first call dense, the second with every other block."""
    return np.vstack([np.ones(len(graph), bool), np.arange(len(graph)) // 2 % 2 == 0])


def by_layout(graph: BranchGraph, mask: np.ndarray, backend: str, **options: int) -> dict[str, Estimate]:
    options = {"rows": 2, "itemsize": 2} | options
    found = estimate(graph, mask, backend=backend, **options)
    assert [each.layout for each in found] == [*LAYOUTS]
    return {each.layout: each for each in found}


@st.composite
def problems(draw: st.DrawFn) -> tuple[BranchGraph, np.ndarray]:
    mask = draw(arrays(np.bool_, (draw(st.integers(1, 7)), draw(st.integers(1, 5)))))
    mask[0] = True
    params = draw(st.lists(st.integers(1, 10**7), min_size=mask.shape[1], max_size=mask.shape[1]))
    branches = tuple(Branch(f"{n}.b", 10, (n + 1, 3), each) for n, each in enumerate(params))
    return BranchGraph(branches, other_macs=1, other_params=draw(st.integers(1, 10**7))), mask


@pytest.mark.parametrize("backend", ENGINES)
@given(problem=problems(), widen=st.booleans())
def test_weights_and_caches_are_those_of_the_plan(
    problem: tuple[BranchGraph, np.ndarray], widen: bool, backend: str
) -> None:
    graph, mask = problem
    plan = freeze(graph, mask, widen=widen)
    found = by_layout(graph, mask, backend, rows=3, itemsize=4, widen=widen)
    whole = 4 * (graph.other_params + sum(branch.params for branch in graph.branches))
    absent = {branch.name: 4 * branch.params for branch in graph.branches}
    assert found["embedded"].weight_bytes == sum(
        whole - sum(absent[name] for name in reads) for _, reads, _, _ in plan.patterns
    )
    assert found["per-mask"].weight_bytes == found["switch"].weight_bytes == whole
    assert found["embedded"].cache_bytes == found["per-mask"].cache_bytes == plan.peak_cache_bytes(3, 4)
    ever = (~mask).any(axis=0)
    assert found["switch"].cache_bytes == 12 * sum(3 * (n + 1) for n in range(len(graph)) if ever[n])
    assert [each.num_graphs for each in found.values()] == [len(plan.patterns), len(plan.patterns), 1]
    for each in found.values():
        assert each.disk_bytes > whole and each.build_s > 0
        assert each.device_bytes == each.weight_bytes + each.cache_bytes + each.scratch_bytes


def test_an_exported_bundle_holds_what_was_predicted(tiny_bundle: Exported) -> None:
    """Not exact in weights: tensors under 512 bytes, here all vectors at most, lie inside the graphs instead.

    Two that are known are taken out: the timestep embedder, which no step graph has, and the positions, which are in
    every one but no parameter. Graph files are within a quarter, being a line through few measurements.
    """
    network, graph = tiny_bundle.adapter.network, tiny_bundle.adapter.graph
    bundle = open_bundle(tiny_bundle.path)
    found = by_layout(graph, tiny_bundle.schedule.compute, "ort-cpu", rows=6, itemsize=4)["embedded"]
    timestep = sum(p.numel() for p in network.transformer_blocks[0].norm1.emb.timestep_embedder.parameters())
    vectors = sum(p.numel() for p in network.parameters() if p.dim() == 1)
    expected = found.weight_bytes - found.num_graphs * 4 * (timestep - network.pos_embed.pos_embed.numel())
    assert 0 <= expected - sum(bundle.weight_bytes.values()) <= found.num_graphs * 4 * vectors
    assert found.num_graphs == len(bundle.weight_bytes)
    assert found.cache_bytes == bundle.peak_cache_bytes(batch=3)
    graph_bytes = sum((bundle.path / file).stat().st_size for file in bundle.weight_bytes)
    assert found.disk_bytes - 4 * graph.total_params == pytest.approx(graph_bytes, rel=0.25)


def test_full_size_estimates_are_near_what_was_measured() -> None:
    """export.md §12: an engine's code within a third, seconds within a factor of two (a line through three builds)."""
    graph = xl()
    assert graph.total_params == pytest.approx(675e6, rel=0.01)
    dense = by_layout(graph, np.ones((1, len(graph)), bool), "rtx")
    both = by_layout(graph, half(graph), "rtx")

    def code(plan: dict[str, Estimate]) -> int:
        return plan["embedded"].disk_bytes - plan["embedded"].weight_bytes - 2 * graph.total_params

    assert code(dense) == pytest.approx(9.1 * MIB, rel=0.35)
    assert code(both) - code(dense) == pytest.approx(6.2 * MIB, rel=0.35)
    assert dense["per-mask"].disk_bytes < 1.02 * 2 * graph.total_params
    for layout, whole_s, half_s in (("embedded", 7.0, 4.2), ("per-mask", 4.2, 1.8)):
        assert whole_s / 2 < dense[layout].build_s < whole_s * 2
        assert half_s / 2 < both[layout].build_s - dense[layout].build_s < half_s * 2
    # §8, half of all branches kept: twenty engines with weights inside are 12 GB with adaLN and embeddings ignored,
    # 20 GB with neither cut down; one set of weights is 1.4 GB, and all slots of one row are 33 MB.
    twenty = by_layout(graph, random_mask(20, len(graph)), "rtx")
    assert 12e9 < twenty["embedded"].weight_bytes < 20e9 < 15 * twenty["per-mask"].weight_bytes
    assert twenty["per-mask"].device_bytes < 2e9
    assert twenty["switch"].cache_bytes == pytest.approx(2 * 33e6, rel=0.01)


def test_loading_on_onnx_runtime_is_as_measured() -> None:
    """export.md §9: twenty sessions of 403 MB fp32 take 9.9 s where each packs its weights, 0.65 s where none does."""
    graph = BranchGraph(tuple(Branch(f"{n}.b", 1, (1, 1), 0) for n in range(5)), 1, 403_000_000 // 4)
    rows = np.array([[n >> k & 1 for k in range(5)] for n in reversed(range(12, 32))], bool)
    found = by_layout(graph, rows, "ort-cpu", itemsize=4)
    assert found["embedded"].num_graphs == 20
    assert found["embedded"].build_s == pytest.approx(9.9, rel=0.1)
    assert found["per-mask"].build_s == pytest.approx(0.65)


@pytest.mark.parametrize("backend", ENGINES)
def test_scratch_grows_with_rows_and_where_attention_is_not_fused_with_the_square_of_tokens(backend: str) -> None:
    mask = np.ones((1, 1), bool)
    shapes = (64, 128), (4096, 128)
    few, many = (BranchGraph((Branch("0.b", 1, shape, 1),), 1, 1) for shape in shapes)
    # The engine's own code does not depend on rows.
    scratch = [
        by_layout(graph, mask, backend, rows=3)["switch"].scratch_bytes
        - by_layout(graph, mask, backend, rows=1)["switch"].scratch_bytes
        for graph in (few, many)
    ]
    linear = prod(shapes[1]) / prod(shapes[0])
    assert scratch[1] == linear * scratch[0] if ENGINES[backend] else scratch[1] > linear * scratch[0] > 0


LARGE, SMALL = 3_000_000_000, 4_000_000  # bytes of weights of each of two graphs


def pair(weight_bytes: int) -> tuple[BranchGraph, np.ndarray]:
    """Two graphs, a dense and a reusing one, of about `weight_bytes` of float16 weights each."""
    graph = BranchGraph((Branch("0.b", 1, (256, 64), 2), Branch("1.b", 1, (16, 64), 2)), 1, weight_bytes // 2 - 4)
    return graph, np.array([[1, 1], [1, 0]], bool)


@pytest.mark.parametrize(
    ("backend", "weight_bytes", "layout"),
    [
        ("tensorrt", LARGE, "per-mask"),
        ("tensorrt", SMALL, "embedded"),
        ("tensorrt", 33 * MIB, "per-mask"),
        ("tensorrt", 31 * MIB, "embedded"),
        ("rtx", LARGE, "per-mask"),
        ("rtx", SMALL, "embedded"),
        ("ort-cuda", LARGE, "per-mask"),
        ("ort-cuda", SMALL, "per-mask"),
        ("ort-cpu", LARGE, "per-mask"),
        ("ort-cpu", SMALL, "embedded"),
        ("ort-cpu", 511 * MIB, "embedded"),
        ("ort-cpu", 513 * MIB, "per-mask"),
    ],
)
def test_the_choice_and_its_reason(backend: str, weight_bytes: int, layout: str) -> None:
    graph, mask = pair(weight_bytes)
    chosen, reason = choose(
        estimate(graph, mask, rows=1, itemsize=2, backend=backend), backend=backend, memory_budget=None
    )
    assert chosen.layout == layout
    assert reason.startswith(f"{layout}: ") and reason.endswith(".") and ". " not in reason and "\n" not in reason


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("weight_bytes", [SMALL, LARGE])
def test_integers_change_the_choice_only_where_inputs_are_packed_at_each_call(backend: str, weight_bytes: int) -> None:
    graph, mask = pair(weight_bytes)
    estimates = estimate(graph, mask, rows=1, itemsize=2, backend=backend)
    floats, _ = choose(estimates, backend=backend, memory_budget=None)
    chosen, reason = choose(estimates, backend=backend, memory_budget=None, integers=True)
    packed = backend == "ort-cpu" and floats.layout == "per-mask"
    assert chosen.layout == ("switch" if packed else floats.layout)
    assert reason.startswith(f"{chosen.layout}: ") and reason.endswith(".") and ". " not in reason


def test_one_graph_is_embedded_on_a_cpu_however_large() -> None:
    graph, mask = pair(LARGE)
    estimates = estimate(graph, np.ones_like(mask), rows=1, itemsize=2, backend="ort-cpu")
    assert choose(estimates, backend="ort-cpu", memory_budget=None)[0].layout == "embedded"


@pytest.mark.parametrize("backend", ENGINES)
@given(problem=problems(), share=st.floats(0, 2))
def test_what_is_chosen_fits_the_budget_or_nothing_does(
    problem: tuple[BranchGraph, np.ndarray], share: float, backend: str
) -> None:
    graph, mask = problem
    estimates = estimate(graph, mask, rows=4, itemsize=2, backend=backend)
    free, _ = choose(estimates, backend=backend, memory_budget=None)
    least = min(each.device_bytes for each in estimates)
    budget = int(share * free.device_bytes)
    if budget < least:
        with pytest.raises(InputError, match=r"no layout fits into .* needs .*; raise --memory-budget") as caught:
            choose(estimates, backend=backend, memory_budget=budget)
        assert "\n" not in str(caught.value)
        return
    chosen, reason = choose(estimates, backend=backend, memory_budget=budget)
    assert chosen.device_bytes <= budget and reason.startswith(f"{chosen.layout}: ")
    if free.device_bytes <= budget:
        assert chosen == free
    else:
        assert chosen.device_bytes == least and f"; {free.layout}, the first choice on {backend}, needs" in reason


def test_what_would_be_needed_is_named() -> None:
    graph, mask = pair(LARGE)
    estimates = estimate(graph, mask, rows=1, itemsize=2, backend="ort-cuda")
    with pytest.raises(
        InputError, match=r"no layout fits into 2\.00 GB: the smallest, .*, needs 3\.00 GB; raise --mem"
    ):
        choose(estimates, backend="ort-cuda", memory_budget=2_000_000_000)


def test_another_backend_or_mask_is_one_line() -> None:
    graph, mask = pair(SMALL)
    known = r"no backend 'tflite'; choose from: ort-cpu, ort-cuda, tensorrt, rtx"
    with pytest.raises(InputError, match=known):
        estimate(graph, mask, rows=1, itemsize=2, backend="tflite")
    with pytest.raises(InputError, match=known):
        choose([], backend="tflite", memory_budget=None)
    with pytest.raises(ScheduleError, match="does not fit a model of 2 branches"):
        estimate(graph, mask[:, :1], rows=1, itemsize=2, backend="rtx")
