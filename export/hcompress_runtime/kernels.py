"""Which kernels ONNX Runtime runs for a bundle, by its own profile: a graph says what to compute, the optimizer how.

executed(bundle)      # Counter({"QGemm": 72, "QuantizeLinear": 48, "MatMul": 24, ...})
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
from hcompress_runtime.ort import BFLOAT16, WEIGHT, SharedWeights, open_session

OF_INTEGERS = ("QGemm", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul")
"""Matrix products of 8-bit integers. On a CPU all of them are the same kernel, MLAS's integer GEMM."""
OF_FLOATS = ("Gemm", "MatMul", "FusedGemm", "FusedMatMul", "MatMulNBits")

SLOTS = {"float32": (1, np.float32), "float16": (10, np.float16), "bfloat16": (BFLOAT16, np.uint16)}
"""ONNX's type of a slot, and what NumPy holds it as."""


def executed(bundle: Bundle, call: int = 0, provider: str = "cpu", threads: int | None = None) -> Counter[str]:
    """How often each operator runs at `call`.

    Slots that the graph reads hold zeros. Raises MissingExtra, and BundleError for a graph that is rejected.
    """
    return Counter(node["op_name"] for node in _profile(bundle, provider, threads, call))


def milliseconds(bundle: Bundle, provider: str = "cpu", threads: int | None = None) -> Counter[str]:
    """What each operator takes in the first call, all its nodes together; of one sample, in the last of three runs.

    An If counts its body too. Raises as `executed` does.
    """
    spent: Counter[str] = Counter()
    for node in _profile(bundle, provider, threads, 0, runs=3):
        spent[node["op_name"]] += node["ms"]
    return spent


def _profile(bundle: Bundle, provider: str, threads: int | None, call: int, runs: int = 1) -> list[dict[str, Any]]:
    """What ONNX Runtime notes of each node in the last of `runs` runs: `op_name`, `ms` and more."""
    with tempfile.TemporaryDirectory(prefix="hcompress-profile-") as folder:
        session = open_session(bundle.path / bundle.graphs[call], provider, threads, profile=Path(folder) / "run")
        feeds = _feeds(bundle, session, call, SharedWeights(bundle.path / WEIGHTS, provider))
        for _ in range(runs):
            session.run_with_ort_values(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    nodes = [event["args"] | {"ms": event["dur"] / 1e3} for event in events if event["cat"] == "Node"]
    nodes = [node for node in nodes if "op_name" in node]
    return nodes[-(len(nodes) // runs) :]


def _feeds(bundle: Bundle, session: Any, call: int, weights: SharedWeights) -> dict[str, Any]:
    """What `session` asks for at `call`, for one sample."""
    from onnxruntime import OrtValue

    arrays: dict[str, Any] = dict(take(complete(bundle.conditions, example(bundle.conditions, 1)), range(1)))
    arrays |= {f"step.{name}": rows[call : call + 1] for name, rows in bundle.constants.items()}
    arrays |= {"latent": gaussian(0, range(1), bundle.sample_shape), "cfg": np.array(bundle.cfg, np.float32)}
    computes = bundle.plan.steps[call].computes
    arrays["compute"] = np.array([branch in computes for branch in bundle.plan.branches])
    arrays |= bundle.table.noise_input(call, [], (1, *bundle.sample_shape))
    feeds = {name: OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    element, dtype = SLOTS[bundle.dtype]
    for slot, (tokens, width) in bundle.plan.slots.items():
        zeros = np.zeros((bundle.rows_per_sample * tokens, width), dtype)
        feeds[f"cache_in.{slot}"] = OrtValue.ortvalue_from_numpy_with_onnx_type(zeros, element)
    names = [value.name for value in session.get_inputs()]
    return {name: weights[name] if name.startswith(WEIGHT) else feeds[name] for name in names}
