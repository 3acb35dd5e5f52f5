"""Engines: TensorRT-RTX really builds them here, without a GPU; only the last test runs one, where there is a GPU."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import Exported, export

from hcompress_runtime.backends import (
    FLAVORS,
    Gpu,
    check_driver,
    check_version,
    choose_flavor,
    find_gpu,
    load,
)
from hcompress_runtime.bundle import Bundle, open_bundle
from hcompress_runtime.engine_cache import RECORD, Engines, Target, build_engines, find_engines, parse_batch
from hcompress_runtime.errors import BundleError, EngineError, HcompressError, InputError, MissingExtra
from hcompress_runtime.trt_build import build_engine

TOKENS = {f"cache_in.{layer}.{branch}": 2 * 16 for layer in (0, 1) for branch in ("attn", "mlp")}  # rows x tokens
CACHE = [sys.executable, "-m", "hcompress_runtime.engine_cache"]


def rtx():
    """The library itself; a test that wants it is skipped where it is absent, since it is an extra."""
    return pytest.importorskip("tensorrt_rtx", reason="pip install 'hcompress[trt-rtx]'")


def has_gpu() -> bool:
    try:
        find_gpu()
    except EngineError:
        return False
    return True


def one_line(caught: pytest.ExceptionInfo[HcompressError]) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def bundles(tiny_bundle: Exported, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny bundle with its weights in the graphs' reach, and with its weights as inputs."""
    folder = tmp_path_factory.mktemp("engines")
    mask = tiny_bundle.schedule.compute
    return {
        "embedded": Path(shutil.copytree(tiny_bundle.path, folder / "embedded")),
        "per-mask": export(folder / "per-mask", tiny_bundle.adapter, mask, layout="per-mask").path,
    }


@pytest.fixture(scope="module")
def built(bundles: dict[str, Path]) -> dict[str, list[Engines]]:
    """Engines of both for two kinds of GPU, one to three samples at once."""
    rtx()
    return {layout: build_engines(path, "rtx", [89, 120], (1, 2, 3)) for layout, path in bundles.items()}


@pytest.fixture
def copy(bundles: dict[str, Path], built: dict[str, list[Engines]], tmp_path: Path) -> Bundle:
    """A bundle of one's own, with engines."""
    return open_bundle(shutil.copytree(bundles["per-mask"], tmp_path / "copy"))


@pytest.fixture
def graph(tiny_bundle: Exported) -> Path:
    """A graph that reads slots."""
    bundle = open_bundle(tiny_bundle.path)
    return bundle.path / bundle.graphs[1]


def edit(graph: Path, into: Path, change) -> Path:
    """A copy of a graph, with its weights beside it, after `change` of its operators."""
    shutil.copy(graph.parent / "weights.safetensors", into)
    model = ir.load(graph)
    change([*model.graph])
    model.opset_imports["com.acme"] = 1
    (into / "edited.onnx").write_bytes(ir.to_proto(model).SerializeToString())
    return into / "edited.onnx"


@pytest.mark.parametrize("layout", ["embedded", "per-mask"])
def test_every_distinct_graph_builds_for_every_target_without_a_gpu(layout, bundles, built):
    bundle = open_bundle(bundles[layout])
    assert [engines.target.sm for engines in built[layout]] == [89, 120]
    for engines in built[layout]:
        assert tuple(engines.files) == bundle.all_graphs
        for graph, file in engines.files.items():
            model, content = ir.load(bundle.path / graph).graph, gzip.decompress(file.read_bytes())
            # An engine cannot be opened without a GPU, but it names its inputs and outputs in plain text.
            assert not [value.name for value in [*model.inputs, *model.outputs] if value.name.encode() not in content]
    assert not [*bundle.path.rglob("*.part")]


def test_per_mask_graphs_take_whole_weights_and_rows_of_them_as_inputs(bundles):
    graphs = [ir.load(file).graph for file in (bundles["per-mask"] / "graphs").glob("*.onnx")]
    names = {value.name for graph in graphs for value in graph.inputs}
    assert any(name.startswith("w.") and name.endswith("]") for name in names)  # or the tests above would show little
    assert any(name.startswith("w.") and not name.endswith("]") for name in names)


def test_weights_in_a_safetensors_file_are_read_bit_for_bit(graph):
    trt = rtx()
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(graph))
    read = set()
    for layer in map(network.get_layer, range(network.num_layers)):
        if layer.type == trt.LayerType.CONSTANT:
            layer.__class__ = trt.IConstantLayer
            read.add(np.asarray(layer.weights).tobytes())
        elif layer.type == trt.LayerType.CONVOLUTION:
            layer.__class__ = trt.IConvolutionLayer
            read.add(np.asarray(layer.kernel).tobytes())
    external = [
        value.const_value
        for value in ir.load(graph).graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    ]
    assert len(external) > 10
    assert all(tensor.tobytes() in read for tensor in external)


def test_one_batch_size_gives_static_shapes_and_a_range_gives_open_ones(graph, tmp_path):
    rtx()
    static = build_engine(graph, tmp_path / "s", flavor="rtx", sm=89, batch=(2, 2, 2), per_sample=TOKENS)
    assert static.inputs["latent"] == static.outputs["model_output"] == (2, 2, 8, 8)
    assert {shape for name, shape in static.inputs.items() if name in TOKENS} == {(2 * 2 * 16, 32)}
    packed = (tmp_path / "s").read_bytes()
    assert len(packed) == static.engine_bytes < len(gzip.decompress(packed)) / 5 == static.unpacked_bytes / 5
    ranged = build_engine(graph, tmp_path / "r", flavor="rtx", sm=89, batch=(1, 2, 4), per_sample=TOKENS)
    assert ranged.inputs["latent"] == (-1, 2, 8, 8)
    with pytest.raises(BundleError, match="Shape Error"):  # the slots of two samples are not those of one
        build_engine(graph, tmp_path / "w", flavor="rtx", sm=89, batch=(2, 2, 2), per_sample={})


def break_one(nodes):
    gemm = next(node for node in nodes if node.op_type == "Gemm")
    gemm.op_type, gemm.domain = "FancyGemm", "com.acme"


def break_two(nodes):
    break_one(nodes)
    break_one(nodes)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (break_one, ["FancyGemm in layer 'node_"]),
        (break_two, ["FancyGemm in layer 'node_", " / operator FancyGemm in layer 'node_"]),
        (lambda nodes: setattr(nodes[-1], "op_type", "Unique"), ["Unique in layer", "UNSUPPORTED_NODE"]),
    ],
)
def test_an_operator_that_the_parser_refuses_is_named_with_its_layer(change, says, graph, tmp_path):
    rtx()
    edited = edit(graph, tmp_path, change)
    with pytest.raises(BundleError) as caught:
        build_engine(edited, tmp_path / "e.engine.gz", flavor="rtx", sm=89, batch=(1, 1, 1), per_sample=TOKENS)
    assert all(part in one_line(caught) for part in [str(edited), *says])
    assert not (tmp_path / "e.engine.gz").exists()


@pytest.mark.parametrize("size", [0, 20, 10_000])
def test_a_graph_cut_short_is_refused(size, graph, tmp_path):
    rtx()
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(graph.read_bytes()[:size])
    with pytest.raises(BundleError, match=r"cut\.onnx.*; export the bundle again") as caught:
        build_engine(cut, tmp_path / "e.engine.gz", flavor="rtx", sm=89, batch=(1, 1, 1), per_sample=TOKENS)
    one_line(caught)
    assert [*tmp_path.iterdir()] == [cut]


def test_sm_90_is_refused_with_the_way_out(bundles):
    rtx()
    asked = [*CACHE, str(bundles["embedded"]), "--flavor", "rtx", "--sm", "90"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: TensorRT-RTX does not support sm_90, only 75, 80, 86, 89, 120, 121")
    assert done.stderr.endswith("--flavor trt on such a GPU\n") and done.stderr.count("\n") == 1
    assert not [*bundles["embedded"].rglob("*sm90*")]


def test_two_processes_build_each_engine_once(copy):
    rtx()
    asked = [*CACHE, str(copy.path), "--flavor", "rtx", "--sm", "86"]
    both = [subprocess.Popen(asked, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    # Each reports the seconds that building took as the record has them: a second build would have taken others.
    assert answers[0] == answers[1]
    assert json.loads(answers[0])["seconds"] > 0


def test_a_disk_that_is_full_leaves_nothing_half_written(graph, tmp_path):
    rtx()
    code = """
import json, resource, sys
from pathlib import Path
from hcompress_runtime.errors import DiskError
from hcompress_runtime.trt_build import build_engine
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # bytes a file may have; an engine has more
graph, out, tokens = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
try:
    build_engine(graph, out, flavor="rtx", sm=89, batch=(1, 1, 1), per_sample=tokens)
except DiskError as error:
    print(error)
"""
    out = tmp_path / "e.engine.gz"
    asked = [sys.executable, "-c", code, str(graph), str(out), json.dumps(TOKENS)]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"cannot write {out}: ") and done.stdout.count("\n") == 1
    assert not [*tmp_path.iterdir()]


def change(file: Path, content: bytes) -> None:
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda file: change(file, file.read_bytes()[:1000]), "has 1000 bytes instead of"),
        (lambda file: change(file, file.read_bytes()[:-1] + b"?"), "was changed"),
        (lambda file: file.unlink(), "is missing"),
    ],
)
def test_an_engine_that_is_not_whole_is_found_and_only_that_is_built_again(damage, says, copy):
    target = Target("rtx", load(FLAVORS["rtx"]).__version__, 89)
    files = [*find_engines(copy, target).files.values()]
    before = {file: file.stat().st_mtime_ns for file in files}
    damage(files[1])
    with pytest.raises(BundleError, match=says) as caught:
        find_engines(copy, target)
    command = f"python -m hcompress_runtime.engine_cache {copy.path} --flavor rtx --sm 89 --batch 1,2,3"
    assert one_line(caught).endswith(f"; build: {command}")
    subprocess.run([sys.executable, *command.split()[1:]], check=True, capture_output=True)
    assert [*find_engines(copy, target).files.values()] == files
    assert [file for file in files if file.stat().st_mtime_ns != before[file]] == [files[1]]


def test_engines_of_another_gpu_version_or_bundle_are_not_used(copy):
    version = load(FLAVORS["rtx"]).__version__
    for other in (Target("rtx", version, 86), Target("rtx", "1.0.0.0", 89), Target("trt", "11.4.0.106", 90)):
        with pytest.raises(BundleError, match=f"no engines for {other}, only for rtx-{version}-sm120, rtx-") as caught:
            find_engines(copy, other)
        assert f"--flavor {other.flavor} --sm {other.sm}" in one_line(caught)
    (copy.path / "manifest.json").write_bytes((copy.path / "manifest.json").read_bytes() + b"\n")
    with pytest.raises(BundleError, match="of another bundle; build: "):
        find_engines(copy, Target("rtx", version, 89))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": "hcompress-engines-1", "batch": [1], "engines": []}'])
def test_a_garbled_record_counts_as_none(text, copy):
    target = Target("rtx", load(FLAVORS["rtx"]).__version__, 89)
    (copy.path / "engines" / str(target) / RECORD).write_text(text)
    with pytest.raises(BundleError, match="no engines for"):
        find_engines(copy, target)


def test_the_switch_layout_is_for_onnxruntime(tiny_bundle):
    bundle = open_bundle(tiny_bundle.path)
    switch = replace(bundle, manifest=bundle.manifest | {"layout": "switch"})
    with pytest.raises(BundleError, match="--layout per-mask"):
        build_engines(switch, "rtx", [89])


def test_batches():
    assert parse_batch("4") == (4, 4, 4)
    assert parse_batch("1,4,8") == (1, 4, 8)
    for wrong in ("", "x", "0", "1,2", "4,1,8", "1,2,3,4", "-1"):
        with pytest.raises(InputError, match="such as 1,4,8"):
            parse_batch(wrong)


def test_each_way_a_backend_can_be_missing_has_its_line(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="choose from: auto, trt, rtx"):
        choose_flavor("cuda")
    for flavor, too_old, too_new in (("trt", "10.12.0.36", "12.0.0"), ("rtx", "1.6.9", "2.0.0")):
        for version in (too_old, too_new):
            with pytest.raises(EngineError, match=rf"{version} is not .* or newer.*pip install 'hcompress"):
                check_version(FLAVORS[flavor], version)
    for flavor, version in (("trt", "10.13.0.35"), ("trt", "11.4.0.106"), ("rtx", "1.7.1.116")):
        check_version(FLAVORS[flavor], version)
    absent = replace(FLAVORS["trt"], module="no_such_library")
    with pytest.raises(MissingExtra, match=r"no_such_library is not installed; pip install 'hcompress\[trt\]'"):
        load(absent)
    (tmp_path / "broken_library.py").write_text("raise ImportError('libfoo.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EngineError, match=r"broken_library does not load: libfoo.*--force-reinstall"):
        load(replace(FLAVORS["trt"], module="broken_library"))


def test_a_driver_older_than_the_library_is_named():
    rtx()
    check_driver(FLAVORS["rtx"], Gpu("new", 89, (13, 0)))
    with pytest.raises(EngineError, match=r"knows CUDA 12\.4, but .* needs CUDA 13; update the NVIDIA driver"):
        check_driver(FLAVORS["rtx"], Gpu("old", 89, (12, 4)))


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_without_a_gpu_engines_are_not_run_and_not_guessed_for(copy):
    from hcompress_runtime.trt import engines_of

    with pytest.raises(EngineError, match=r"driver|GPU"), engines_of(copy, "rtx"):
        pass
    with pytest.raises(EngineError, match=r"(driver|GPU).*; name the kind of GPU to build for, such as --sm 89"):
        build_engines(copy, "rtx")


@pytest.mark.skipif(not has_gpu(), reason="needs a GPU")
@pytest.mark.parametrize("capture", [None, 3])
@pytest.mark.parametrize("layout", ["embedded", "per-mask"])
def test_engines_give_the_samples_of_onnxruntime(layout, capture, bundles):
    from hcompress_runtime.runtime import Runtime

    try:
        built = build_engines(bundles[layout], "auto", batch=(1, 2, 3))
    except (EngineError, MissingExtra) as error:
        pytest.skip(str(error))
    expected = Runtime(bundles[layout]).generate([0, 1, 2, 3], batch=3)
    with Runtime(bundles[layout], built[0].target.flavor, capture=capture) as runtime:
        for _ in range(4):  # a run is captured when it comes again
            # TensorFloat-32, TensorRT's default for float32, keeps 10 bits of the factors: 2**-10, over a few layers
            assert np.abs(runtime.generate([0, 1, 2, 3], batch=3) - expected).max() < 0.02
