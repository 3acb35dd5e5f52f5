"""Which kernels ONNX Runtime runs for a bundle, by its own profile: a graph says what to compute, the optimizer how.

    executed(bundle)["graphs/0123.onnx"]      # Counter({"QGemm": 72, "QuantizeLinear": 48, "MatMul": 24, ...})
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from hcompress_runtime.bundle import WEIGHTS, Bundle
from hcompress_runtime.conditions import complete, example, take
from hcompress_runtime.noise import gaussian
from hcompress_runtime.ort import SharedWeights, open_session

OF_INTEGERS = ("QGemm", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul")
"""Matrix products of 8-bit integers. On a CPU all of them are the same kernel, MLAS's integer GEMM."""
OF_FLOATS = ("Gemm", "MatMul", "FusedGemm", "FusedMatMul", "MatMulNBits")


def executed(bundle: Bundle, provider: str = "cpu", threads: int | None = None) -> dict[str, Counter[str]]:
    """Graph file -> how often one run of it runs each operator, for every distinct graph at its first call.

    Slots that a graph reads hold zeros. Raises MissingExtra, and BundleError for a graph that is rejected.
    """
    weights = SharedWeights(bundle.path / WEIGHTS, provider)
    found: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory(prefix="hcompress-profile-") as folder:
        for call, graph in enumerate(bundle.graphs):
            if graph not in found:
                session = open_session(bundle.path / graph, provider, threads, profile=Path(folder) / str(call))
                session.run_with_ort_values(None, _feeds(bundle, session, call, weights))
                events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
                nodes = [event["args"] for event in events if event["cat"] == "Node"]
                found[graph] = Counter(node["op_name"] for node in nodes if "op_name" in node)
    return found


def _feeds(bundle: Bundle, session: Any, call: int, weights: SharedWeights) -> dict[str, Any]:
    """What `session` asks for at `call`, for one sample."""
    from onnxruntime import OrtValue

    dtype = {"float16": np.float16}.get(bundle.dtype, np.float32)
    arrays: dict[str, Any] = dict(take(complete(bundle.conditions, example(bundle.conditions, 1)), range(1)))
    arrays |= {f"step.{name}": rows[call : call + 1] for name, rows in bundle.constants.items()}
    arrays |= {"latent": gaussian(0, range(1), bundle.sample_shape), "cfg": np.array(bundle.cfg, np.float32)}
    computes = bundle.plan.steps[call].computes
    arrays["compute"] = np.array([branch in computes for branch in bundle.plan.branches])
    for slot, (tokens, width) in bundle.plan.slots.items():
        arrays[f"cache_in.{slot}"] = np.zeros((bundle.rows_per_sample * tokens, width), dtype)
    names = [value.name for value in session.get_inputs()]
    return {
        name: weights[name] if name.startswith("w.") else OrtValue.ortvalue_from_numpy(np.ascontiguousarray(arrays[name]))
        for name in names
    }
