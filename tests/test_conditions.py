"""What samples are conditioned on: what is taken, what it becomes, and what is said in one line of all else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_prompts
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from hcompress_runtime.conditions import Input, complete, example, load_prompts, take
from hcompress_runtime.errors import InputError

CLASSES = {"labels": Input("int64", (), classes=5)}
TEXT = {
    "prompt_embeds": Input("float32", (5, 10)),
    "prompt_mask": Input("bool", (5,)),
    "null_embeds": Input("float32", (5, 10), default=np.full((5, 10), 7, np.float32)),
    "null_mask": Input("bool", (5,), default=np.arange(5) < 1),
}
ASKED = {name: make_prompts(3)[name] for name in ("prompt_embeds", "prompt_mask")}


@pytest.mark.parametrize("given", [[0, 4, 2], range(3), np.array([1, 1, 3]), {"labels": [0, 4, 2]}])
def test_labels_are_a_row_each(given: object) -> None:
    rows = complete(CLASSES, given)
    wanted = given["labels"] if isinstance(given, dict) else given
    assert rows["labels"].dtype == np.int64 and rows["labels"].tolist() == list(wanted)


def test_prompts_get_the_null_prompt_of_the_model() -> None:
    rows = complete(TEXT, ASKED)
    assert [*rows] == [*TEXT] and all(len(row) == 3 for row in rows.values())
    assert (rows["null_embeds"] == 7).all() and (rows["null_mask"] == TEXT["null_mask"].default).all()
    assert rows["null_embeds"].strides[0] == 0  # takes no memory a sample


@pytest.mark.parametrize("count", [1, 3])
def test_a_null_prompt_is_one_for_all_or_one_for_each(count: int) -> None:
    null = {"null_embeds": np.random.rand(count, 5, 10).astype(np.float32), "null_mask": np.ones((count, 5), bool)}
    rows = complete(TEXT, ASKED | null)
    assert all(np.array_equal(rows[name], np.broadcast_to(array, rows[name].shape)) for name, array in null.items())


def test_other_types_become_what_the_graph_takes() -> None:
    embeds, mask = ASKED.values()
    for wide, number in ((np.float64, np.int64), (np.float16, np.float32), (np.float32, np.uint8)):
        rows = take(
            complete(TEXT, {"prompt_embeds": embeds.astype(wide), "prompt_mask": mask.astype(number)}), range(3)
        )
        assert rows["prompt_embeds"].dtype == np.float32 and rows["prompt_mask"].dtype == bool
        assert np.array_equal(rows["prompt_mask"], mask)
    lists = complete(TEXT, {name: torch.from_numpy(array) for name, array in ASKED.items()})
    assert np.array_equal(lists["prompt_embeds"], embeds)


@pytest.mark.parametrize("inputs", [CLASSES, TEXT])
def test_complete_rows_and_parts_of_them_stay_what_they_are(inputs: dict[str, Input]) -> None:
    rows = example(inputs, 7)
    again = complete(inputs, rows)
    some = take(again, [2, 3, 4, 2])
    for name, one in inputs.items():
        assert rows[name].shape == (7, *one.shape) and rows[name].dtype == one.dtype
        assert np.array_equal(again[name], rows[name]) and np.array_equal(some[name], rows[name][[2, 3, 4, 2]])
        assert some[name].flags.c_contiguous
        assert np.array_equal(example(inputs, 3)[name], rows[name][:3])


REFUSED = {
    "labels for text": (TEXT, [0, 1], r"on prompt_embeds, prompt_mask \(and null_embeds with null_mask\), got labels"),
    "text for labels": (CLASSES, ASKED, "on labels, got prompt_embeds, prompt_mask; pass --labels"),
    "no mask": (TEXT, {"prompt_embeds": ASKED["prompt_embeds"]}, "got prompt_embeds; pass --prompts, a file"),
    "a label in between": (CLASSES, [0, 1.5], r"whole numbers in a row, .* got \[0, 1\.5\]"),
    "labels as text": (CLASSES, ["shoe"], "whole numbers in a row"),
    "a table of labels": (CLASSES, [[0], [1]], "whole numbers in a row"),
    "one label alone": (CLASSES, 3, "whole numbers in a row, .* got 3"),
    "no labels": (CLASSES, [], "no labels; pass one for each sample"),
    "half a null prompt": (TEXT, ASKED | {"null_mask": np.ones((1, 5))}, "null_embeds with null_mask.*, got"),
    "a tensor too many": (TEXT, ASKED | {"input_ids": np.ones((3, 5))}, "got .*input_ids"),
    "other length": (TEXT, make_prompts(3, tokens=4), r"shape \[3, 4, 10\], .* takes \[N, 5, 10\]; pad or cut prompts"),
    "other width": (TEXT, make_prompts(3, width=8), r"prompt_embeds has shape \[3, 5, 8\]"),
    "one prompt without a batch": (TEXT, {name: array[0] for name, array in ASKED.items()}, r"has shape \[5, 10\]"),
    "fewer masks": (
        TEXT,
        ASKED | {"prompt_mask": ASKED["prompt_mask"][:2]},
        "prompt_mask has 2 rows, but .* 3 samples",
    ),
    "two null prompts": (
        TEXT,
        ASKED | {"null_embeds": np.ones((2, 5, 10)), "null_mask": np.ones((2, 5))},
        "null_embeds has 2 rows, but there are 3 samples",
    ),
    "nothing": (TEXT, {name: array[:0] for name, array in ASKED.items()}, "prompt_embeds is empty"),
    "NaN": (TEXT, ASKED | {"prompt_embeds": ASKED["prompt_embeds"] * np.nan}, "prompt_embeds holds NaN"),
    "a mask of lengths": (TEXT, ASKED | {"prompt_mask": np.full((3, 5), 2)}, "prompt_mask should be 1 where a token"),
    "text as text": (TEXT, ASKED | {"prompt_embeds": np.full((3, 5, 10), "a")}, "prompt_embeds is of type <U1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_model_cannot_take_is_one_line(name: str) -> None:
    inputs, given, message = REFUSED[name]
    with pytest.raises(InputError, match=message) as caught:
        complete(inputs, given)
    assert "\n" not in str(caught.value)


def test_a_prompts_file_is_its_tensors(tmp_path: Path) -> None:
    save_file(ASKED, tmp_path / "prompts.safetensors")
    found = load_prompts(tmp_path / "prompts.safetensors")
    assert found.keys() == ASKED.keys() and all(np.array_equal(found[name], ASKED[name]) for name in ASKED)


def test_prompts_are_read_as_they_are_taken_and_halves_widen_then(tmp_path: Path) -> None:
    """Thirty thousand of PixArt's are 59 GB in single precision."""
    stored = ASKED | {"prompt_embeds": ASKED["prompt_embeds"].astype(np.half)}
    save_file(stored, tmp_path / "prompts.safetensors")
    found = load_prompts(tmp_path / "prompts.safetensors")
    assert all(isinstance(array, np.memmap) for array in found.values())
    rows = complete(TEXT, found)
    assert np.shares_memory(rows["prompt_embeds"], found["prompt_embeds"])
    taken = take(rows, [2, 0])
    assert taken["prompt_embeds"].dtype == np.float32 and taken["prompt_mask"].dtype == bool
    assert np.array_equal(taken["prompt_embeds"], stored["prompt_embeds"][[2, 0]])


def test_what_is_no_prompts_file_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.safetensors"
    with pytest.raises(InputError, match="no prompts at"):
        load_prompts(file)
    file.write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    with pytest.raises(InputError, match="truncated or not a safetensors file"):
        load_prompts(file)
    save_torch({"prompt_embeds": torch.ones(1, 5, 10, dtype=torch.float8_e4m3fn)}, file)
    with pytest.raises(InputError, match="numpy lacks"):
        load_prompts(file)


def test_an_input_checks_itself() -> None:
    with pytest.raises(ValueError, match="dtype 'float16'"):
        Input("float16", ())
    with pytest.raises(ValueError, match=r"default of shape \(4,\)"):
        Input("bool", (5,), default=np.ones(4, bool))
