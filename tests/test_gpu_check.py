"""`make gpu-check` as far as a machine without a GPU can say: the tiny mode, and what CUDA graphs would record."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hcompress_export.freeze import freeze

ROOT = Path(__file__).parents[1]
CUDA_ONLY = {"PyTorch, CUDA graphs", "TensorRT", "TensorRT, CUDA graphs", "torch.compile, CUDA graphs"}
CUDA_ONLY |= {"ONNX Runtime, CUDA graphs"}
CUDA_ONLY |= {"TensorRT, W8A8", "TensorRT, FP8", "PyTorch, FP8 products"}
EIGHT_BITS = {"PyTorch, INT8 products", "ONNX Runtime, W8A8"}
VARIANTS = ["dense", "CUR 37.5 %", "CUR 50 %"]


def gpu_check(*arguments: object) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([".", "export", *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "benchmarks/gpu_check.py", *map(str, arguments)]
    environ = os.environ | {"PYTHONPATH": paths}
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def benchmarks() -> Any:
    """The modules of benchmarks/, which is no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        import gpu_case
        import gpu_check
        import gpu_contenders

        yield gpu_case, gpu_check, gpu_contenders


@pytest.fixture(scope="module")
def case(benchmarks: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return benchmarks[0].open_case(tmp_path_factory.mktemp("case"), lambda what: None, tiny=True)


def test_tiny_mode_measures_what_runs_here_and_says_why_the_rest_does_not(tmp_path: Path) -> None:
    done = gpu_check("--tiny", "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    assert {file.name for file in tmp_path.iterdir()} == {"gpu-check-cpu.json", "gpu-check-cpu.md"}  # nothing failed
    found = json.loads((tmp_path / "gpu-check-cpu.json").read_text())
    assert found["ok"] and found["command"].startswith("python benchmarks/gpu_check.py --tiny")
    rows = {(row["contender"], row["variant"]): row for row in found["rows"]}
    skipped = {contender: row for (contender, _), row in rows.items() if row["status"] == "skipped"}
    assert skipped.keys() == CUDA_ONLY
    assert all("a CUDA device" in row["reason"] for row in skipped.values())
    ran = [row for row in rows.values() if row["status"] == "ok"]
    assert len(ran) == 15 and {row["contender"] for row in ran} == {contender for contender, _ in rows} - CUDA_ONLY
    for row in ran:
        # 8 bits by the ranges of one sample move a tiny random model by some per cent; broken, by its whole size.
        assert row["error"] <= (0.1 if row["contender"] in EIGHT_BITS else found["tolerance"])
        assert found["tolerance"] == 1e-4 < min(found["caching_moves"].values())
        assert row["latency_ms"] == np.median(row["rounds_ms"]) and len(row["rounds_ms"]) >= 3
        assert row["speedup"] == rows[row["contender"], "dense"]["latency_ms"] / row["latency_ms"]
        assert row["efficiency"] == row["speedup"] / row["mac_ratio"]
        assert row["memory_bytes"] is None  # of a GPU
    assert [row["cur"] for row in ran[:3]] == [0, 0.375, 0.5]
    text = (tmp_path / "gpu-check-cpu.md").read_text()
    assert done.stdout == text + "\n" and done.stderr.count("a CUDA device") == len(CUDA_ONLY)
    for row in ran:
        assert f"| {row['contender']} | {row['variant']} |" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    done = gpu_check("--results", tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: torch {torch.__version__} ") and "--tiny" in done.stderr


def test_what_cuda_graphs_record_are_the_samples_of_the_reference_sampler(benchmarks: Any, case: Any) -> None:
    """Exactly: the operations are the same. Twice, as a recording is replayed, and with slots that live as planned."""
    *_, contenders = benchmarks
    for variant in (*case.variants, *case.few):
        with ExitStack() as stack:
            expected = contenders.eager(case, stack)(variant)()
        for widen in (False, True):
            loop = contenders.Loop(case, case.adapter, freeze(case.adapter.graph, variant.compute, widen=widen))
            assert np.array_equal(loop.run(), expected) and np.array_equal(loop.run(), expected)
            assert not loop.slots


def test_a_step_compiles_as_one_graph(benchmarks: Any, case: Any) -> None:
    """By dynamo and AOT autograd; what inductor makes of it on a GPU is for the GPU to say."""
    few, _, contenders = benchmarks[0].FEW, *benchmarks[1:]
    variant, graphs = case.few[1], []

    def count(graph: torch.fx.GraphModule, inputs: object) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    plan = freeze(case.adapter.graph, variant.compute, widen=True)
    compiler = partial(torch.compile, backend=count, fullgraph=True, dynamic=False)
    loop = contenders.Loop(case, case.adapter, plan, compiler)
    assert variant.deviation(loop.run()) <= 1e-5  # float32 rounding over 4 calls
    assert len(graphs) == len(plan.patterns) == 1 + few
    torch._dynamo.reset()


def test_few_masks_have_few_rows_and_the_cur_asked_for(benchmarks: Any) -> None:
    calls, branches = 20, 56
    for cur in (0.375, 0.5):
        compute = benchmarks[0].few_masks(calls, branches, cur=cur)
        assert compute[0].all() and len(np.unique(compute, axis=0)) == 1 + benchmarks[0].FEW
        assert abs((1 - compute.mean()) - cur) <= 0.5 / branches  # a whole number of branches a row


def test_a_failure_is_a_row_with_its_traceback_in_the_log(benchmarks: Any, case: Any, tmp_path: Path) -> None:
    _, check, contenders = benchmarks
    log, far = tmp_path / "the.log", time.monotonic() + 60

    def broken(case: Any, stack: ExitStack) -> Any:
        eager = contenders.eager(case, stack)

        def prepare(variant: Any) -> Any:
            if variant.is_dense:
                raise RuntimeError("this kernel\nis broken")
            run = eager(variant)
            return run if variant is case.variants[1] else lambda: run() + 1

        return prepare

    rows = check.check(case, "broken", contenders.Contender(broken, 1.0), far, 1e-4, log)
    assert [row.status for row in rows] == ["failed", "ok", "failed"]
    assert rows[0].reason == "RuntimeError: this kernel (the.log has more)" and rows[0].latency_ms is None
    assert rows[1].latency_ms and rows[1].speedup is None  # nothing to compare with
    assert "are off by" in rows[2].reason and rows[2].error > 1e-2
    assert log.read_text().count("Traceback") == 1 and "is broken" in log.read_text()


def test_what_takes_too_long_is_stopped_and_skipped(
    benchmarks: Any, case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, check, contenders = benchmarks
    monkeypatch.setattr(check, "LOADING", 0.25)  # ends after 3 of 12 seconds, and the rest is for measuring

    def slow(case: Any, stack: ExitStack) -> Any:
        eager = contenders.eager(case, stack)
        return lambda variant: eager(variant) if variant is not case.variants[2] else time.sleep(60)

    begin = time.monotonic()
    rows = check.check(case, "slow", contenders.Contender(slow, 1.0), begin + 12, 1e-4, tmp_path / "log")
    assert time.monotonic() - begin < 60
    assert [row.status for row in rows] == ["ok", "ok", "skipped"] and rows[2].reason.startswith("no time")
    assert rows[1].speedup and not (tmp_path / "log").exists()
    late = check.check(case, "slow", contenders.Contender(slow, 1.0), begin, 1e-4, tmp_path / "log")
    assert [(row.variant, row.status) for row in late] == [("all", "skipped")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_a_machine_lacks_is_said_and_is_no_failure(benchmarks: Any, case: Any, tmp_path: Path) -> None:
    """Asked for a GPU here: neither this onnxruntime nor TensorRT can."""
    _, check, contenders = benchmarks
    elsewhere, log, far = replace(case, device="cuda"), tmp_path / "log", time.monotonic() + 60
    for name, reason in (("ONNX Runtime, switch", "no CUDAExecutionProvider"), ("TensorRT", "")):
        [row] = check.check(elsewhere, name, contenders.CONTENDERS[name], far, 1e-4, log)
        assert (row.variant, row.status) == ("all", "skipped") and row.reason.startswith(reason) and row.reason
    assert not log.exists()
