"""A comparison: which recipes, at which budgets, with which seeds; and the cells of the table that comes of it.

recipes/compare/NAME.yaml describes one:

    recipes:
      - fashion-dit_ddim20_harmonica                  # a recipe that ships, or a file
      - recipe: fashion-dit_ddim20_harmonica          # one of its settings changed, under a name of its own
        name: without IEPO
        set: {caching.proxy: none}
      - recipe: mine.yaml                             # a method without a target: its own setting is its budget
        vary: {caching.every: [2, 3]}
    budgets: [0.2, 0.4]
    seeds: [0, 1, 2]
    samples: 2000

A budget is a target CUR. A method that has none runs as its recipe says; without budgets all do. What a method cannot
reach is left out of the table, with the reason. Settings of different models, solvers, steps or guidance are groups,
each with its own uncached row and its own fewer steps.

Recipes that reuse nothing (`interval`, every call) are uncached models: with the steps of a group they are its uncached
row, with fewer they are rows of fewer steps. They join the group of their model, solver and guidance whose steps are
the next more. A model that was made from another joins that one's group by `baseline`:

      - {recipe: fashion-dit_ddim20_interval, set: {caching.every: 1, solver.steps: 15}}     # fewer steps, 15
      - {recipe: mine_on_w8a8.yaml, name: W8A8 with HarmoniCa, baseline: zoo:fashion-dit}
"""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from hcompress.caching.settings import MISSED, IntervalSettings
from hcompress.errors import RecipeError
from hcompress.recipe import Recipe, Run, SolverSettings, find, read, resolve_any
from hcompress.recipe_errors import section_of

NAMES = {  # of methods, as their authors write them; all others go by their own
    "harmonica": "HarmoniCa",
    "learning-to-cache": "Learning-to-Cache",
    "smoothcache": "SmoothCache",
    "interval": "FORA",
    "deepcache": "DeepCache, by branch",  # and not by feature map, see caching/long_skips
    "faster-diffusion": "Faster Diffusion, by branch",
    "efficientdm": "EfficientDM",
    "ptq4dit": "PTQ4DiT",
    "diff-pruning": "Diff-Pruning",
}
OURS = "sensitivity"  # a lambda of HarmoniCa that is not its paper's
UNCACHED, FEWER_STEPS, BUDGET = "uncached", "fewer steps", "caching.target_cur"
POINTS = {  # goals of a recipe, as a table says them
    "target_cur": lambda cur: f"CUR {100 * cur:g} %",
    "target_speedup": lambda ratio: f"MACs / {ratio:g}",
    "beta": lambda beta: f"beta {beta:g}",
    "alpha": lambda alpha: f"alpha {alpha:g}",
    "every": lambda every: f"every {every}",
    "keys": lambda keys: f"{len(keys)} key calls",
}
ROUNDING = 1e-9

Number = TypeVar("Number", int, float)


class Entry(BaseModel):
    """A recipe of a comparison; a plain string is one as it stands."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: str = Field(description="a shipped recipe or a file")
    name: str | None = Field(None, min_length=1, description="of its rows; None: the method's")
    baseline: str | None = Field(None, description="MODEL to compare with, if the recipe's own was made from it")
    set: dict[str, Any] = Field({}, description="settings by dotted path that replace the recipe's")
    vary: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        {}, max_length=1, description="one setting and its values, in place of budgets"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, given: Any) -> Any:
        return {"recipe": given} if isinstance(given, str) else given


class Comparison(BaseModel):
    """One table."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str = Field("Comparison", description="of the page")
    recipes: list[Entry] = Field(min_length=1, description="what is compared")
    budgets: list[Annotated[float, Field(gt=0, lt=1)]] | None = Field(None, description="target CURs; None: as written")
    seeds: list[Annotated[int, Field(ge=0)]] = Field([0, 1, 2], min_length=1, description="of training and of noise")
    samples: int = Field(500, ge=1, description="to measure with, a cell; if not given the recipes' metrics.samples")
    fewer_steps: bool = Field(True, description="rows of the uncached model with as many steps as a budget pays for")
    reference: str | None = Field(
        None, description="real pictures or their statistics, for FID and its kin; if not given the recipes' own"
    )
    size: int | None = Field(None, ge=1, description="of a reference folder's pictures, cut and scaled to this side")
    inception: str | None = Field(None, description="Inception's weights as torch-fidelity has them; None: fetched")
    clip: str | None = Field(
        None, description="CLIP that scores pictures of text models, a folder or hub id; if not given the recipes' own"
    )
    runner: Literal["torch", "onnxruntime"] = Field("torch", description="what samples and is timed")
    batch: int = Field(8, ge=1, description="samples at once when it is timed")
    rounds: int = Field(5, ge=1, description="how often it is timed; the median is taken")

    @field_validator("budgets", "seeds")
    @classmethod
    def _distinct(cls, values: list[Any] | None) -> list[Any] | None:
        if values is not None and len({*values}) < len(values):
            raise ValueError("holds one twice")
        return values


@dataclass(frozen=True)
class Cell:
    """One row of the table with one seed: made, sampled and measured on its own.

    group:  the uncached model under its solver, which it is compared with
    name:   the method; point: at which budget, "" where it has none
    recipe: how it is made; a plain Run is the model as it is
    budget: the CUR that it aims at
    """

    group: Run
    name: str
    point: str
    seed: int
    recipe: Run
    budget: float | None = None

    @property
    def own(self) -> Run:
        """The model that its recipe starts from, as it is: the group's, or one that was made from that."""
        return self.group if self.recipe.model == self.group.model else _as_it_is(self.recipe)

    @property
    def row(self) -> tuple[str, str, str]:
        """Group, name and point, which its seeds share."""
        return group_name(self.group), self.name, self.point

    @property
    def folder(self) -> Path:
        """Its run folder, below that of the comparison."""
        return Path(_slug(self.row[0])) / "_".join(_slug(part) for part in (*self.row[1:], f"seed {self.seed}") if part)


@dataclass(frozen=True)
class LeftOut:
    """A row that cannot be, and why."""

    group: Run
    name: str
    point: str
    reason: str


def load_comparison(names: Sequence[str | Path], flags: Mapping[str, Any] | None = None) -> Comparison:
    """The comparison NAME, or one of several recipes; `flags` ({"seeds": [0]}; None = not given) go over its settings.

    Files that a comparison names may lie beside it. Raises RecipeError.
    """
    settings: dict[Any, Any] = {"recipes": [str(name) for name in names]}
    if len(names) == 1 and "recipes" in (described := read(file := find(names[0]))):
        entries = described["recipes"]
        found = [_found(entry, file.parent) for entry in entries] if isinstance(entries, list) else entries
        settings = described | {"recipes": found}
    settings = settings | {key: value for key, value in (flags or {}).items() if value is not None}
    try:
        comparison = _measured_as_recipes_say(Comparison.model_validate(settings, strict=True))
    except ValidationError as error:
        raise RecipeError(_one_line(error)) from error
    for key in ("size", "inception"):
        if getattr(comparison, key) is not None and comparison.reference is None:
            raise RecipeError(f"--{key} would do nothing: there is no --reference")
    return comparison


def _found(entry: Any, folder: Path) -> Any:
    """An entry of a comparison in `folder`, with its recipe's path where that lies there."""
    if isinstance(entry, dict):
        return entry | {"recipe": _found(entry["recipe"], folder)} if "recipe" in entry else entry
    return str(folder / entry) if isinstance(entry, str) and (folder / entry).is_file() else entry


def numbers(flag: str, text: str | None, kind: type[Number]) -> list[Number] | None:
    """[0.2, 0.4] from "0.2,0.4". Raises RecipeError."""
    try:
        return None if text is None else [kind(part) for part in text.split(",")]
    except ValueError as error:
        example = {int: "0,1,2", float: "0.2,0.4"}[kind]
        raise RecipeError(f"{flag} {text}: write numbers with commas between, such as {example}") from error


def cells_of(comparison: Comparison) -> tuple[list[Cell], list[LeftOut]]:
    """All cells but fewer steps, seed by seed and uncached ones first, and what is left out. Raises RecipeError."""
    cells: list[Cell] = []
    left_out: list[LeftOut] = []
    for entry in comparison.recipes:
        file, base = find(entry.recipe), _base_of(entry)
        group, name = _as_it_is(base, entry.baseline), entry.name or _name_of(base)
        for point, flags in _points(comparison, entry, base):
            try:
                made = [resolve_any(file, entry.set | flags | {"seed": seed}) for seed in comparison.seeds]
            except RecipeError as error:
                if BUDGET not in flags:
                    raise
                left_out.append(LeftOut(group, name, point, str(error)))
                continue
            if entry.name and not entry.baseline and _reuses_nothing(made[0]):
                raise RecipeError(f"{entry.recipe} reuses nothing: it is no {entry.name!r} but uncached; drop the name")
            cells += [Cell(group, name, point, recipe.seed, recipe, _budget_of(recipe)) for recipe in made]
    if not cells:
        raise RecipeError(f"no recipe reaches a budget of {comparison.budgets}: {left_out[0].reason}")
    cells = _in_groups(cells)
    groups = {group_name(cell.group): cell.group for cell in cells}
    uncached = [Cell(group, UNCACHED, "", seed, group) for group in groups.values() for seed in comparison.seeds]
    cells = in_order([*uncached, *(cell for cell in cells if cell.name != UNCACHED)], comparison.seeds)
    for folder, count in Counter(cell.folder for cell in cells).items():
        if count > 1:
            raise RecipeError(f"{count} rows are called {folder.name.rpartition('_')[0]}; give each a name of its own")
    return cells, left_out


def in_order(cells: Iterable[Cell], seeds: Sequence[int]) -> list[Cell]:
    """Seed by seed, so that an interrupted comparison has whole ones; what the others are compared with comes first."""
    return sorted(cells, key=lambda cell: (seeds.index(cell.seed), cell.name != UNCACHED))


def fewer_steps(cells: Iterable[Cell], share: Mapping[str, float]) -> list[Cell]:
    """The uncached model with as many steps as each budget among `cells` pays for, to the nearest step, seed by seed.

    share: of a call's MACs that lies in branches, of each group; at a CUR of c, T calls cost as much as (1 - c share) T
    """
    found: dict[tuple[Any, ...], Cell] = {}
    for cell in cells:
        solver = cell.group.solver
        if cell.budget is not None:
            steps = max(1, round(solver.steps * (1 - cell.budget * share[group_name(cell.group)])))
            if steps == solver.steps:
                continue
            fewer = cell.group.model_copy(update={"solver": SolverSettings(name=solver.name, steps=steps)})
            one = Cell(cell.group, FEWER_STEPS, f"{steps} steps", cell.seed, fewer, cell.budget)
            found.setdefault((one.row, one.seed), one)
    return list(found.values())


def row_file(out: Path, cell: Cell, comparison: Comparison) -> Path:
    """Where the finished `cell` lies in the folder of a comparison."""
    return out / cell.folder / f"row-{comparison.samples}-{comparison.runner}.json"


def read_row(file: Path) -> dict[str, Any] | None:
    """A finished row; None of a file that is not there, or cut off."""
    try:
        row = json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return row if isinstance(row, dict) and not row.keys().isdisjoint(("figures", "impossible")) else None


def group_name(group: Run) -> str:
    """What people call a group."""
    return f"{group.model}, {group.solver.name}, {group.solver.steps} steps, guidance {group.cfg:g}"


def missed(recipe: Run, cur: float, mac_ratio: float) -> str | None:
    """ "missed: CUR 12 % of 40 %" of a row that was to reach a CUR or a speed-up and did not, as `train` has it."""
    section = None if type(recipe) is Run else _section(recipe)
    wanted, speedup = getattr(section, "target_cur", None), getattr(section, "target_speedup", None)
    if wanted and abs(cur - wanted) > MISSED + ROUNDING:
        return f"missed: CUR {100 * cur:.3g} % of {100 * wanted:g} %"
    if speedup and abs(1 / mac_ratio - 1 / speedup) > MISSED + ROUNDING:
        return f"missed: MACs / {mac_ratio:.2f} of {speedup:g}"
    return None


def _base_of(entry: Entry) -> Run:
    """Its recipe, under the first of the values that it varies."""
    file = find(entry.recipe)
    if "recipes" in read(file):
        raise RecipeError(f"{entry.recipe} is itself a comparison; pass it alone")
    return resolve_any(file, entry.set | {key: values[0] for key, values in entry.vary.items()})


def _measured_as_recipes_say(comparison: Comparison) -> Comparison:
    """With the samples, reference and CLIP of its recipes' `metrics`, where it says nothing of them itself."""
    said: dict[str, Any] = {}
    for key in ("samples", "reference", "clip"):
        if key in comparison.model_fields_set:
            continue
        found: dict[Any, str] = {}
        for entry in comparison.recipes:
            metrics = _base_of(entry).metrics
            if metrics and key in metrics.model_fields_set:
                found.setdefault(getattr(metrics, key), entry.recipe)
        if len(found) > 1:
            wanted = ", ".join(f"{value} ({name})" for value, name in found.items())
            raise RecipeError(f"the recipes differ in metrics.{key}: {wanted}; pass --{key}")
        if found:
            (said[key],) = found
    return comparison.model_copy(update=said)


def _in_groups(cells: Sequence[Cell]) -> list[Cell]:
    """`cells`; those that reuse nothing are UNCACHED in the group with their steps, FEWER_STEPS in that with more."""
    uncached = [cell for cell in cells if cell.own == cell.group and _reuses_nothing(cell.recipe)]
    groups = [cell.group for cell in cells if cell not in uncached]
    for group in sorted((cell.group for cell in uncached), key=_steps, reverse=True):
        groups += [] if _above(group, groups) else [group]

    def placed(cell: Cell) -> Cell:
        group, steps = min(_above(cell.group, groups), key=_steps), _steps(cell.group)
        name, point = (FEWER_STEPS, f"{steps} steps") if steps < _steps(group) else (UNCACHED, "")
        return Cell(group, name, point, cell.seed, cell.group)

    return [placed(cell) if cell in uncached else cell for cell in cells]


def _above(group: Run, groups: Iterable[Run]) -> list[Run]:
    """Those of `groups` that differ from `group` in nothing but steps, and have no fewer."""
    same = lambda one: (one.model, one.solver.name, one.cfg)  # noqa: E731
    return [one for one in groups if same(one) == same(group) and _steps(one) >= _steps(group)]


def _steps(group: Run) -> int:
    return group.solver.steps


def _reuses_nothing(recipe: Run) -> bool:
    return isinstance(recipe, Recipe) and isinstance(recipe.caching, IntervalSettings) and recipe.caching.every == 1


def _as_it_is(recipe: Run, model: str | None = None) -> Run:
    """The uncached model of a recipe, or another `model` in its place."""
    return Run(model=model or recipe.model, solver=recipe.solver, cfg=recipe.cfg)


def _budget_of(recipe: Run) -> float | None:
    return getattr(_section(recipe), "target_cur", None)


def _section(recipe: Run) -> Any:
    """The section that makes it what it is."""
    return getattr(recipe, section_of(type(recipe)))


def _name_of(recipe: Run) -> str:
    """What its rows are called: its method, the format if in few bits, and what reuse yields if not the slot.

    A method's own name is for what its authors do; OURS is said.
    """
    section = _section(recipe)
    reuse, proxy = getattr(section, "reuse", "plain"), getattr(section, "proxy", None)
    parts = [NAMES.get(section.method, section.method), getattr(section, "resolved_format", "")]
    order = "order 2" if getattr(section, "order", 1) == 2 else ""
    name = " ".join(filter(None, [*parts, "" if reuse == "plain" else reuse, order]))
    return f"{name}, {proxy}" if proxy == OURS else name


def _points(comparison: Comparison, entry: Entry, base: Run) -> list[tuple[str, dict[str, Any]]]:
    """Where the rows of an entry lie, as a table says it, and the settings that put them there."""
    section = _section(base)
    if entry.vary:
        ((key, values),) = entry.vary.items()
        said = POINTS.get(key.rpartition(".")[2], lambda value: f"{key.rpartition('.')[2]} {value}")
        return [(said(value), {key: value}) for value in values]
    if _reuses_nothing(base):
        return [("", {})]
    if comparison.budgets and "target_cur" in type(section).model_fields:
        return [(POINTS["target_cur"](budget), {BUDGET: budget}) for budget in comparison.budgets]
    goals = [said(goal) for key, said in POINTS.items() if (goal := getattr(section, key, None)) is not None]
    return [(goals[0] if goals and isinstance(base, Recipe) else "", {})]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def _one_line(invalid: ValidationError) -> str:
    """The first thing that is wrong with a comparison, unknown keys before all others."""
    errors = sorted(invalid.errors(), key=lambda error: error["type"] != "extra_forbidden")
    *outer, key = errors[0]["loc"] or ("comparison",)
    path = ".".join(map(str, (*outer, key)))
    if errors[0]["type"] == "extra_forbidden":
        known = (Entry if outer else Comparison).model_fields
        close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
        hint = f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(known)}"
        return f"unknown key '{path}'; {hint}"
    if path.startswith("budgets.") and isinstance(given := errors[0]["input"], int | float) and 1 <= given < 100:
        return f"comparison: {path} = {given:g}: a budget is a share of 1; {given / 100:g} means {given:g} %"
    return f"comparison: {path} = {errors[0]['input']!r}: {errors[0]['msg'].removeprefix('Value error, ')}"
