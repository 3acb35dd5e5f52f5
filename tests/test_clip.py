"""CLIP scores by a tiny random CLIP: of finished pictures, and of rows of comparisons by the words of their prompts."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CALLS, make_pixart, make_prompts
from diffusers import DDIMScheduler
from safetensors.numpy import load_file, save_file

from hcompress.errors import DataError, ModelError
from hcompress.metrics.clip_score import Clip, clip_score, read_prompts
from hcompress.models.loading import load_model
from hcompress.prompts import words_kept, words_of

CAPTIONS = [f"a {colour} {what}" for what in ("bag", "dog", "sun") for colour in ("red", "blue", "gray", "dark")]
SCORED = CAPTIONS[4:8]  # fours take turns: the first and the third are for learning
SAMPLES = 6  # so that the prompts come round


class Pictures:
    """An ImageSet of noise."""

    def __init__(self, count: int) -> None:
        self.pictures = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, 24, 24), np.uint8))

    def __len__(self) -> int:
        return len(self.pictures)

    def traits(self) -> list[Any]:
        return []

    def batches(self, size: int) -> Any:
        for first in range(0, len(self), size):
            rows = self.pictures[first : first + size]
            yield [*range(first, first + len(rows))], rows


def keep(folder: Path, prompts: list[str], tensors: dict[str, np.ndarray]) -> None:
    """As `hcompress encode --for-training` leaves them."""
    save_file(tensors, folder / "prompts.safetensors", words_kept(prompts))
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text model of gray pictures and its own captions. Do not change it."""
    folder = tmp_path_factory.mktemp("asked in words") / "model"
    make_pixart(own=False, channels=1, out_channels=1).network.save_pretrained(folder / "transformer")
    DDIMScheduler(clip_sample=False).save_pretrained(folder / "scheduler")
    keep(folder, CAPTIONS, make_prompts(len(CAPTIONS)))
    return folder


def recipe(folder: Path, model: str | Path, metrics: str = "") -> Path:
    file = folder / "rule.yaml"
    solver = f"solver: {{name: ddim, steps: {CALLS}}}"
    file.write_text(f"model: {model}\n{solver}\ncaching: {{method: random, target_cur: 0.4}}\n{metrics}\n")
    return file


def rows(out: Path) -> dict[str, dict[str, Any]]:
    """Finished rows by the names of their folders."""
    return {file.parent.name: json.loads(file.read_text()) for file in out.rglob("row-*.json")}


def test_the_score_is_the_mean_of_clamped_cosines_in_percent(clip: Path) -> None:
    lines = ["a red bag", "b", "the zoo", "a red bag", "blue", "a prompt that is longer than the context is wide"]
    images, network = Pictures(6), Clip(str(clip))
    each = [float(network(images.pictures[[n]], [line])) for n, line in enumerate(lines)]
    assert min(each) == 0 < max(each) <= 100 and len(set(each)) > 2
    counted: list[int] = []
    together = clip_score(images, lines, network, 4, counted.append)
    assert together == pytest.approx(np.mean(each), abs=1e-4)  # float32 in batches of another size
    assert counted == [4, 6]


def test_prompts_and_clips_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    assert read_prompts(tmp_path / "prompts.txt", 2) == ["one", "two"]
    with pytest.raises(DataError, match=r"holds 2 prompts for 3 pictures"):
        read_prompts(tmp_path / "prompts.txt", 3)
    with pytest.raises(DataError, match="cannot be read as a text file"):
        read_prompts(tmp_path / "absent.txt", 3)
    with pytest.raises(ModelError, match=r"no CLIP can be loaded from .* pass --clip"):
        Clip(str(tmp_path))


def test_a_prompts_file_keeps_its_words_and_one_beside_it_does_for_those_without(model: Path, tmp_path: Path) -> None:
    """In the order in which prompts are scored; whatever is beside a file that keeps its own is not looked at."""
    asked = load_model(str(model))
    assert words_of(asked, SAMPLES) == [*SCORED, *SCORED[:2]]
    own = tmp_path / "own"
    shutil.copytree(model, own)
    (own / "prompts.txt").write_text("of other prompts\n")
    assert words_of(load_model(str(own)), 4) == SCORED
    save_file(load_file(model / "prompts.safetensors"), own / "prompts.safetensors")  # as earlier versions left it
    (own / "prompts.txt").write_text("".join(f"{line}\n" for line in CAPTIONS))
    older = load_model(str(own))
    assert words_of(older, 4) == SCORED
    assert np.array_equal(older.adapter.even_conditions(4)["prompt_embeds"], make_prompts(12)["prompt_embeds"][4:8])
    assert len(words_of(load_model("zoo:emoji-pixart"), 3)) == 3
    said = ["two\nlines", "“é” \u2028 one", ""]
    save_file(make_prompts(3), own / "prompts.safetensors", words_kept(said))
    assert words_of(load_model(str(own)), 3) == said


def test_a_row_of_a_comparison_has_the_score_of_its_finished_pictures(
    hcompress: Any, model: Path, clip: Path, tmp_path: Path
) -> None:
    """As `generate` writes them from the same noise, 100 + its seed, and `eval FOLDER --prompts` scores them."""
    given = ("--clip", clip, "--samples", SAMPLES, "--seeds", "0,1", "--out", tmp_path / "out", "--json")
    code, stdout, stderr = hcompress("compare", recipe(tmp_path, model), *given)
    assert code == 0, stderr
    (group,) = json.loads(stdout)["groups"]
    assert all(row["figures"]["clip_score"]["seeds"] == 2 and row["clips"] == [str(clip)] for row in group["rows"])
    tables = (tmp_path / "out" / "compare.md").read_text()
    assert (
        "| CLIP ↑ |" in tables
        and f"CLIP is 100 times the cosine of picture and prompt, at least 0, by {clip}." in tables
    )
    assert f"at least 0, by {clip}." in (tmp_path / "out" / "compare.html").read_text()

    order = np.resize(np.arange(4, 8), SAMPLES)
    prompts = {name: rows if len(rows) == 1 else rows[order] for name, rows in make_prompts(len(CAPTIONS)).items()}
    save_file(prompts, tmp_path / "asked.safetensors")
    (tmp_path / "asked.txt").write_text("".join(f"{CAPTIONS[row]}\n" for row in order))
    run, found = ("--steps", CALLS, "--prompts", tmp_path / "asked.safetensors"), rows(tmp_path / "out")
    for seed in (0, 1):
        pictures = tmp_path / f"{seed}.npz"
        assert hcompress("generate", model, *run, "--seed", 100 + seed, "--out", pictures)[0] == 0
        code, stdout, _ = hcompress("eval", pictures, "--prompts", tmp_path / "asked.txt", "--clip", clip, "--json")
        score = found[f"uncached_seed-{seed}"]["figures"]["clip_score"]
        # a value may round to the next of 256 levels; other words are off by about 1
        assert score == pytest.approx(json.loads(stdout)["clip_score"], abs=0.05) and score > 0


def test_eval_scores_a_models_samples_with_and_without_a_schedule(
    hcompress: Any, model: Path, clip: Path, tiny_run: Path, tmp_path: Path
) -> None:
    """As a comparison does, and where a recipe asks for it; of a model that takes no text that is refused."""
    asked = recipe(tmp_path, model, f"metrics: {{clip: {clip}, samples: {SAMPLES}}}")
    assert hcompress("train", model, "--recipe", asked, "--out", tmp_path / "run")[0] == 0
    code, stdout, stderr = hcompress("eval", model, "--schedule", tmp_path / "run", "--recipe", asked, "--json")
    both = json.loads(stdout)
    assert code == 0 and both["clip"] == str(clip) and both["clip_score"] != both["uncached"]["clip_score"] > 0, stderr
    run = ("--steps", CALLS, "--samples", SAMPLES, "--clip", clip)
    alone = json.loads(hcompress("eval", model, *run, "--json")[1])["uncached"]
    assert alone["clip_score"] == both["uncached"]["clip_score"]
    code, _, stderr = hcompress("eval", tiny_run.parent / "model", *run)
    assert code == 1 and "takes labels, so leave out --clip" in stderr and stderr.count("\n") == 1


def test_rows_are_scored_anew_where_another_clip_is_asked_for_and_kept_where_none_is(
    hcompress: Any, model: Path, clip: Path, tmp_path: Path
) -> None:
    """From what was made: the schedule stays. A recipe that names the CLIP is as good as the flag."""
    other, out = tmp_path / "other", tmp_path / "out"
    shutil.copytree(clip, other)

    def compare(*more: object, metrics: str = "") -> dict[str, dict[str, Any]]:
        common = ("--samples", 2, "--seeds", 0, "--budgets", 0.4, "--out", out)
        code, _, stderr = hcompress("compare", recipe(tmp_path, model, metrics), *common, *more)
        assert code == 0, stderr
        return rows(out)

    plain = compare()
    made = {file: file.stat().st_mtime_ns for file in out.rglob("schedule.safetensors")}
    assert all("clip_score" not in row["figures"] and row["clip"] is None for row in plain.values())
    first = compare("--clip", clip)
    second = compare(metrics=f"metrics: {{clip: {other}}}")
    for name, row in first.items():
        assert (row["clip"], second[name]["clip"]) == (str(clip), str(other))
        assert row["figures"]["clip_score"] == second[name]["figures"]["clip_score"]  # the same weights
        assert row["figures"].get("relative_l2") == plain[name]["figures"].get("relative_l2")
    for row in out.rglob("row-*.json"):
        timed = json.loads(row.read_text())
        row.write_text(json.dumps(timed | {"measured": timed["measured"] | {"rounds": 77}}))
    again = compare()
    assert {name: row["clip"] for name, row in again.items()} == dict.fromkeys(again, str(other))
    assert f"at least 0, by {other}." in (out / "compare.md").read_text()
    assert {file: file.stat().st_mtime_ns for file in made} == made


def test_rows_of_other_prompts_are_refused(hcompress: Any, model: Path, tmp_path: Path) -> None:
    """Their samples are not those that the new ones would be compared with."""
    own = tmp_path / "model"
    shutil.copytree(model, own)
    asked = (
        "compare",
        recipe(tmp_path, own),
        "--samples",
        2,
        "--seeds",
        0,
        "--budgets",
        0.4,
        "--out",
        tmp_path / "out",
    )
    assert hcompress(*asked)[0] == 0 and hcompress(*asked)[0] == 0
    keep(own, ["another", *CAPTIONS[1:]], load_file(own / "prompts.safetensors"))
    code, _, stderr = hcompress(*asked)
    assert code == 1 and "is of other prompts than" in stderr and stderr.count("\n") == 1


def test_what_cannot_be_scored_is_told_in_one_line_before_anything_is_made(
    hcompress: Any, model: Path, clip: Path, tiny_run: Path, tmp_path: Path
) -> None:
    silent, bare = tmp_path / "silent", tmp_path / "bare"
    for copy in (silent, bare):
        shutil.copytree(model, copy)
        (copy / "prompts.txt").unlink()
    save_file(load_file(model / "prompts.safetensors"), silent / "prompts.safetensors")
    (bare / "prompts.safetensors").unlink()
    latent = tmp_path / "latent"
    make_pixart(own=False, channels=4).network.save_pretrained(latent / "transformer")
    DDIMScheduler(clip_sample=False).save_pretrained(latent / "scheduler")
    keep(latent, CAPTIONS, make_prompts(len(CAPTIONS)))
    labels, encoding = tiny_run.parent / "model", f"hcompress encode {silent} --from CAPTIONS.txt --for-training"
    refused = {
        (silent, clip): f"none are kept: write them into .*prompts.txt, a line each, or delete prompts.*: {encoding}$",
        (bare, clip): "this model has no prompts to draw from: hcompress encode MODEL --from",
        (latent, clip): "vae is missing, so there are no pictures for --reference or --clip",
        (labels, clip): "CLIP compares pictures with text; .*model takes labels, so leave out --clip",
        (model, tmp_path / "absent"): "no CLIP can be loaded from .*absent",
    }
    for number, ((asked, by), said) in enumerate(refused.items()):
        out = tmp_path / f"{number}"
        code, _, stderr = hcompress("compare", recipe(tmp_path, asked), "--clip", by, "--samples", 4, "--out", out)
        (line,) = stderr.splitlines()
        assert code == 1 and line.startswith("error: ")
        assert re.search(said, line), line
        assert not [file for file in out.iterdir() if file.is_dir()]
    (silent / "prompts.txt").write_text("one\n")
    code, _, stderr = hcompress("compare", recipe(tmp_path, silent), "--clip", clip, "--out", tmp_path / "few")
    assert code == 1 and "the words of the 12 prompts in" in stderr and "and 1 are kept" in stderr
