"""Diff-Pruning: what is taken out is gone and nothing else is, what matters is what the gradients say, and a pruned
model is a model like any other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CALLS, CFG, make_dit, make_pixart, make_prompts, make_uvit
from PIL import Image
from torch import Tensor

from hcompress.adapter import Adapter, Told, compute_all
from hcompress.errors import ModelError, RecipeError
from hcompress.lowbit.adapter import twin
from hcompress.models.loading import load_model
from hcompress.process import Process
from hcompress.prune.finetune import FROZEN, FineTune
from hcompress.prune.settings import PruneSettings
from hcompress.prune.taylor import _speedup, importance, most_important, ratios_for, uniform
from hcompress.pruned import Widths, load_pruned, narrowed, read_base, save_pruned
from hcompress.recipe import resolve_prune
from hcompress.report.progress import StagesDisplay
from hcompress.rundir import RunDir
from hcompress.setting import open_setting
from hcompress.solver import make_scheduler, probe

tp = pytest.importorskip("torch_pruning")

FAMILIES: dict[str, Callable[[], Adapter]] = {"dit": make_dit, "pixart": make_pixart}
KEPT = [([1], [0, 3, 5, 60]), ([0, 1], list(range(7, 90)))]  # of two blocks
STEPS = 6
PROCESS = Process(np.linspace(0.99, 0.2, STEPS), np.sqrt(1 - np.linspace(0.99, 0.2, STEPS) ** 2), "epsilon")


@pytest.fixture(params=FAMILIES)
def adapter(request: pytest.FixtureRequest) -> Adapter:
    return FAMILIES[request.param]()


def inputs(adapter: Adapter, count: int = 3) -> tuple[Tensor, Any]:
    x = torch.randn(count, *adapter.sample_shape, generator=torch.Generator().manual_seed(1))
    condition = adapter.condition(adapter.even_conditions(count))
    return x, {name: condition[name] for name in adapter.null_condition(condition)}


@torch.no_grad()
def output(adapter: Adapter) -> Tensor:
    x, condition = inputs(adapter)
    return adapter(x, condition, adapter.step_constants(torch.tensor([7.0])), compute_all)


def test_what_is_taken_out_adds_nothing_and_the_rest_is_unmoved(adapter: Adapter) -> None:
    before, silent = output(adapter), twin(adapter)
    for block, (heads, units) in zip(silent.network.transformer_blocks, KEPT, strict=True):
        size = block.attn1.to_q.out_features // block.attn1.heads
        for layer, kept in (
            (block.attn1.to_out[0], [head * size + channel for head in heads for channel in range(size)]),
            (block.ff.net[2], units),
        ):
            weight = torch.zeros_like(layer.weight)
            weight[:, kept] = layer.weight[:, kept]
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    pruned = narrowed(adapter, KEPT)
    torch.testing.assert_close(output(pruned), output(silent))  # sums of fewer terms round otherwise
    assert not torch.allclose(output(pruned), before)
    assert torch.equal(output(adapter), before)
    assert Widths.of(pruned.network) == Widths((1, 2), (4, 83))
    everything = narrowed(adapter, Widths.of(adapter.network).kept())
    assert torch.equal(output(everything), before) and everything.graph == adapter.graph


def test_macs_and_parameters_are_those_of_the_pruned_widths(adapter: Adapter) -> None:
    pruned = narrowed(adapter, KEPT)
    assert pruned.graph.names == adapter.graph.names
    assert [branch.shape for branch in pruned.graph.branches] == [branch.shape for branch in adapter.graph.branches]
    for before, after in zip(adapter.graph.branches, pruned.graph.branches, strict=True):
        block, kind = before.name.split(".")
        heads, units = KEPT[int(block)]
        full = Widths.of(adapter.network)
        left = {"attn": len(heads) / full.heads[0], "mlp": len(units) / full.units[0]}.get(kind, 1)
        assert after.macs == pytest.approx(before.macs * left, rel=1e-12)
    count = sum(parameter.numel() for parameter in pruned.network.parameters())
    removed = sum(parameter.numel() for parameter in adapter.network.parameters()) - count
    assert adapter.graph.total_params - pruned.graph.total_params == removed
    same = [([0], range(40))] * 2
    assert narrowed(adapter, same).graph.call_macs == round(
        adapter.graph.call_macs / _speedup(adapter, 1 / 2, 40 / Widths.of(adapter.network).units[0])
    )


def test_it_takes_out_what_torch_pruning_takes_out() -> None:
    adapter = make_dit()
    whole, pruned = twin(adapter).network.requires_grad_(True), narrowed(adapter, KEPT)
    x, condition = inputs(adapter, 1)
    example = {"hidden_states": x, "timestep": torch.tensor([7]), "class_labels": condition["labels"]}
    groups = tp.DependencyGraph().build_dependency(whole, example_inputs=example)
    for block, (heads, units) in zip(whole.transformer_blocks, KEPT, strict=True):
        channels = [channel for channel in range(32) if channel // 16 not in heads]
        rest = [unit for unit in range(128) if unit not in units]
        for layer, gone in ((block.attn1.to_q, channels), (block.ff.net[0].proj, rest)):
            if gone:
                groups.get_pruning_group(layer, tp.prune_linear_out_channels, gone).prune()
    theirs = whole.state_dict()
    assert theirs.keys() == pruned.network.state_dict().keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in pruned.network.state_dict().items())


def test_importance_is_the_sum_of_weight_times_gradient_over_what_goes_together(adapter: Adapter) -> None:
    x, condition = inputs(adapter)
    noise, losses = torch.randn_like(x), []
    found = importance(adapter, PROCESS, x, condition, noise, 0.0, lambda step, loss: losses.append(loss))
    assert len(losses) == STEPS and not any(p.requires_grad for p in adapter.parameters())
    network = twin(adapter)
    network.requires_grad_(True)
    for step in range(STEPS):
        constants = network.step_constants(torch.tensor([float(step)]))
        guess = network(PROCESS.noised(step, x, noise), condition, constants, compute_all)[:, : x.shape[1]]
        (guess - noise).square().mean().backward()
    for block, (heads, units) in zip(network.network.transformer_blocks, found, strict=True):
        layers = (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v)
        taken = lambda layer, axis: (layer.weight * layer.weight.grad).abs().sum(dim=axis)  # noqa: E731
        own = sum(taken(layer, 1) for layer in layers) + taken(block.attn1.to_out[0], 0)
        torch.testing.assert_close(heads, own.reshape(len(heads), -1).sum(dim=1))
        torch.testing.assert_close(units, taken(block.ff.net[0].proj, 1) + taken(block.ff.net[2], 0))
    adapter.requires_grad_(False)


def test_steps_count_until_their_loss_falls_below_the_threshold() -> None:
    adapter = make_dit()
    x, condition = inputs(adapter)
    noise, losses = torch.randn_like(x), []
    importance(adapter, PROCESS, x, condition, noise, 0.0, lambda step, loss: losses.append(loss))
    for threshold in (0.5, 0.95, 0.999):
        counted: list[float] = []
        importance(adapter, PROCESS, x, condition, noise, threshold, lambda step, loss, to=counted: to.append(loss))
        first = next((n for n, one in enumerate(losses) if one < threshold * max(losses[: n + 1])), STEPS)
        assert counted == losses[:first]


def test_the_most_important_stay_and_shares_come_nearest_to_the_macs(adapter: Adapter) -> None:
    scores = [(torch.tensor([3.0, 1.0]), torch.arange(128.0)), (torch.tensor([1.0, 2.0]), -torch.arange(128.0))]
    kept = most_important(scores, (0.5, 0.5), 8)
    assert [list(heads) for heads, _ in kept] == [[0], [1]]
    assert [list(units) for _, units in kept] == [list(range(64, 128)), list(range(64))]
    assert most_important(scores, (0.99, 0.99), 8)[0] == ([0], list(range(120, 128)))
    for speedup in (1.1, 1.5, 2.0):
        kept = most_important(uniform(adapter), ratios_for(adapter, speedup, 1), 1)
        reached = adapter.graph.call_macs / narrowed(adapter, kept).graph.call_macs
        assert reached == pytest.approx(speedup, rel=0.02)  # a unit of 128 or so is a percent of a block's MACs


def test_a_pruned_model_reads_back_equal_and_what_is_damaged_is_refused(adapter: Adapter, tmp_path: Path) -> None:
    pruned, file = narrowed(adapter, KEPT), tmp_path / "pruned.safetensors"
    save_pruned(pruned, "the model", file)
    again = load_pruned(file, adapter)
    assert read_base(file) == "the model" and torch.equal(output(again), output(pruned))
    assert again.identity("m", {}, 1.0) == pruned.identity("m", {}, 1.0) != adapter.identity("m", {}, 1.0)
    with pytest.raises(ModelError, match=r"does not fit the model .* prune anew"):
        load_pruned(file, FAMILIES["dit"]() if len(adapter.graph) == 6 else FAMILIES["pixart"]())
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="truncated or not a safetensors file"):
        read_base(file)


def test_a_network_of_another_kind_is_refused() -> None:
    with pytest.raises(ModelError, match=r"UViT2DModel cannot be pruned: .* DiT and PixArt only"):
        Widths.of(make_uvit().network)


def tuning(adapter: Adapter, updates: int, **changes: Any) -> FineTune:
    settings = PruneSettings(**{"ratio": 0.5, "updates": updates, "batch": 4, "lr": 1e-3} | changes)
    pixels = torch.randn(64, *adapter.sample_shape, generator=torch.Generator().manual_seed(2)) / 3
    prompts = make_prompts(5) if "prompt_embeds" in adapter.conditions else None

    def told(number: int) -> Told:
        return {name: rows[number % len(rows)] for name, rows in prompts.items()} if prompts else number % 5

    def batch(first: int, count: int) -> tuple[Tensor, list[Told]]:
        numbers = range(first, first + count)
        return pixels[[number % 64 for number in numbers]], [told(number) for number in numbers]

    table = probe(make_scheduler("ddim", {"num_train_timesteps": STEPS, "clip_sample": False}), 3)
    pruned = narrowed(adapter, KEPT)
    return FineTune(adapter, pruned, PROCESS, batch, settings, table, CFG, seed=0)


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_a_batch_in_parts_is_the_same_batch(adapter: Adapter, micro_batch: int) -> None:
    whole, parts = tuning(adapter, 1), tuning(adapter, 1, micro_batch=micro_batch)
    assert sum(1 for _ in parts.losses(0)) == -(-4 // micro_batch)
    assert sum(part.item() for part in parts.losses(0)) == pytest.approx(next(whole.losses(0)).item(), rel=1e-5)
    gradients = []
    for one in (whole, parts):
        for parameter in one.parameters:
            parameter.requires_grad_(True)
        for part in one.losses(0):
            part.backward()
        gradients.append([parameter.grad for parameter in one.parameters])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)  # sums of float32 in another order
    x, condition = inputs(adapter)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    told: list[list[float]] = [[], []]
    found = [
        importance(
            adapter, PROCESS, x, condition, noise, 0.99, lambda step, loss, to=to: to.append(loss), micro_batch=size
        )
        for to, size in zip(told, (None, micro_batch), strict=True)
    ]
    assert told[0] == pytest.approx(told[1], rel=1e-5) and 0 < len(told[0]) < STEPS  # the last does not count
    for before, after in zip(*found, strict=True):
        for one, other in zip(before, after, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)  # as above


def test_a_fine_tune_learns_and_a_resumed_one_is_the_same(adapter: Adapter) -> None:
    before, whole = output(adapter), tuning(adapter, 60)
    narrow = output(whole.pruned)
    progress = list(whole.run())
    assert [one.round for one in progress] == [1, 2, 3]
    assert progress[-1].loss < progress[0].loss and progress[-1].score_db is not None
    half = tuning(adapter, 60)
    next(half.run())
    state, again = half.state(), tuning(adapter, 60)
    again.restore(state)
    list(again.run())
    assert torch.equal(output(again.pruned), output(whole.pruned)) and not torch.equal(output(whole.pruned), narrow)
    assert torch.equal(output(adapter), before)  # it shares no weight that learns
    fresh = narrowed(adapter, KEPT).network.state_dict()
    moved = {name for name, value in whole.pruned.network.state_dict().items() if not torch.equal(value, fresh[name])}
    assert moved and not any(FROZEN in name for name in moved)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten gray pictures of five classes, and one that is none."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(10):
        (folder / str(number % 5)).mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8), np.uint8)
        Image.fromarray(pixels).save(folder / str(number % 5) / f"{number}.png")
    (folder / "0" / "broken.png").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def common(tiny_run: Path, images: Path) -> tuple[Any, ...]:
    settings = ("threshold=0.99", "calibration=4", "updates=25", "batch=2", "multiple=1")
    flags = ("--ratio", 0.5, "--steps", CALLS, "--cfg", CFG, "--images", images, "--samples", 2, "--json")
    return (tiny_run.parent / "model", *flags, *(flag for one in settings for flag in ("--set", f"prune.{one}")))


def test_a_pruned_run_is_a_model_for_every_verb(hcompress: Any, common: tuple[Any, ...], tmp_path: Path) -> None:
    out = tmp_path / "pruned"
    code, stdout, stderr = hcompress("prune", *common, "--out", out)
    figures = json.loads(stdout)
    assert code == 0 and stderr.count("broken.png cannot be read") == 1
    assert figures["mac_ratio"] > 1.2 and figures["params"] < figures["params_before"]
    assert {file.name for file in out.iterdir()} == {
        *("recipe.yaml", "env.json", "metrics.jsonl", "kept.json", "finetune.pt", "pruned.safetensors", "quality.json")
    }
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["stage"] for record in records] == ["taylor", "finetune", "finetune", "pruned"]
    assert records[0]["heads"] == [1, 1] and records[-1]["images_skipped"] == 1
    loaded = load_model(str(out))
    assert Widths.of(loaded.adapter.network) == Widths((1, 1), (64, 64))

    before = (out / "pruned.safetensors").stat().st_mtime_ns
    assert hcompress("prune", *common, "--out", out, "--resume")[0] == 0
    assert (out / "pruned.safetensors").stat().st_mtime_ns == before
    code, _, stderr = hcompress("prune", *common, "--out", out, "--resume", "--seed", 1)
    assert code == 1 and "seed: 0 != 1" in stderr

    trained, picture = tmp_path / "trained", tmp_path / "p.png"
    small = ("--target-cur", 0.3, "--set", "caching.trajectories=2", "--set", "caching.batch=1")
    assert hcompress("train", out, *small, "--out", trained)[0] == 0
    schedule = trained / "schedule.safetensors"
    code, stdout, _ = hcompress("eval", out, "--samples", 2, "--json")
    assert code == 0 and json.loads(stdout)["uncached"]["macs"] == 2 * CALLS * loaded.adapter.graph.call_macs
    code, stdout, _ = hcompress("eval", out, "--schedule", schedule, "--samples", 2, "--json")
    assert code == 0 and {"psnr_db", "cur"} <= json.loads(stdout).keys()
    assert hcompress("generate", out, "--labels", "0,1", "--out", picture)[0] == 0
    quantized = ("--set", "quant.samples=2", "--samples", 0, "--steps", CALLS, "--cfg", CFG)
    assert hcompress("quantize", out, *quantized, "--out", tmp_path / "int8")[0] == 0
    assert load_model(str(tmp_path / "int8")).adapter.graph == loaded.adapter.graph
    code, stdout, _ = hcompress("quantize", out, "--dry-run", "--json", "--out", tmp_path / "plan")
    assert code == 0 and f"{CALLS} steps" in json.loads(stdout)["solver"]
    for source, name in ((out, "dense"), (trained, "cached")):
        code, stdout, _ = hcompress("export", source, "--out", tmp_path / name, "--json")
        assert code == 0 and max(json.loads(stdout)["parity"]) < 1e-4  # float32 through another runtime

    code, _, stderr = hcompress("prune", out, "--ratio", 0.5, "--out", tmp_path / "x")
    assert code == 1 and "is pruned already" in stderr
    code, _, stderr = hcompress("prune", tmp_path / "int8", "--ratio", 0.5, "--steps", CALLS, "--out", tmp_path / "x")
    assert code == 1 and "is quantized; prune" in stderr
    lost = tmp_path / "lost"
    lost.mkdir()
    pruned = narrowed(open_setting(str(common[0]), "ddim", CALLS, CFG).adapter, [([0], [0])] * 2)
    save_pruned(pruned, str(tmp_path / "absent"), lost / "pruned.safetensors")
    with pytest.raises(ModelError, match=r"was pruned from .*absent, which it needs"):
        load_model(str(lost))


def test_a_killed_run_goes_on_to_the_same_model(hcompress: Any, common: tuple[Any, ...], tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert hcompress("prune", *common, "--out", whole)[0] == 0
    shutil.copytree(whole, killed)
    (killed / "pruned.safetensors").unlink()
    assert hcompress("prune", *common, "--out", killed, "--resume")[0] == 0  # of a finished fine-tune nothing is left
    assert (killed / "pruned.safetensors").read_bytes() == (whole / "pruned.safetensors").read_bytes()
    lost = ("pruned.safetensors", "finetune.pt", "kept.json")
    for count in (2, 3):  # what was found to stay is not found again, unless that is lost too
        for file in lost[:count]:
            (killed / file).unlink()
        assert hcompress("prune", *common, "--out", killed, "--resume")[0] == 0
        assert (killed / "pruned.safetensors").read_bytes() == (whole / "pruned.safetensors").read_bytes()
    told = [
        [{name: record.get(name) for name in ("stage", "round", "loss")} for record in RunDir(run).records()]
        for run in (killed, whole)
    ]
    assert told[0] == told[1]  # what it took besides, in seconds and bytes, is never the same twice


def test_interrupted_it_says_what_is_kept_and_importance_is_not_measured_twice(
    hcompress: Any, common: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, done = tmp_path / "stopped", StagesDisplay.count

    def stop_in(wanted: str) -> Any:
        def count(self: StagesDisplay, stage: str, *rest: Any) -> None:
            if stage == wanted:
                raise KeyboardInterrupt
            done(self, stage, *rest)

        return count

    for stage, said in (("importance", "importance is measured from the start"), ("fine-tune", "goes on from there")):
        with monkeypatch.context() as pressed:
            pressed.setattr(StagesDisplay, "count", stop_in(stage))
            code, _, stderr = hcompress("prune", *common, "--out", out, "--resume")
        assert code == 130 and "--resume" in stderr.splitlines()[-1] and said in stderr.splitlines()[-1]
    with monkeypatch.context() as pressed:
        pressed.setattr(StagesDisplay, "count", stop_in("importance"))
        assert hcompress("prune", *common, "--out", out, "--resume")[0] == 0
    assert [record["stage"] for record in RunDir(out).records()] == ["taylor", "finetune", "finetune", "pruned"]


def test_what_is_refused_leaves_no_folder_in_the_way(
    hcompress: Any, common: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, stderr = hcompress("prune", *common, "--images", tmp_path / "absent", "--out", tmp_path / "out")
    assert code == 1 and "absent" in stderr and not (tmp_path / "out").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, stderr = hcompress("prune", *common, "--out", tmp_path / "out")
    assert code == 1 and "pruning runs in one process, and this is one of 2" in stderr
    assert not (tmp_path / "out").exists()


def test_dry_run_says_what_stays_and_writes_nothing(hcompress: Any, common: tuple[Any, ...], tmp_path: Path) -> None:
    code, stdout, _ = hcompress("prune", *common, "--dry-run", "--out", tmp_path / "out")
    plan = json.loads(stdout)
    assert code == 0 and plan["heads"] == [1, 1] and plan["units"] == [64, 64] and plan["mac_ratio"] > 1
    assert not (tmp_path / "out").exists()


def test_one_goal_is_asked_for() -> None:
    with pytest.raises(RecipeError, match=r"pass exactly one of ratio and target_speedup .got none"):
        resolve_prune(None, {"model": "m"})
    later = resolve_prune(None, {"model": "m", "prune.ratio": 0.3}, ["prune.target_speedup=1.5"])
    assert (later.prune.ratio, later.prune.target_speedup) == (None, 1.5)
    with pytest.raises(RecipeError, match=r"unknown key 'prune\.rato'; did you mean 'prune\.ratio'"):
        resolve_prune(None, {"model": "m", "prune.ratio": 0.3}, ["prune.rato=0.5"])
