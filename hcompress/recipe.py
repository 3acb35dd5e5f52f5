"""A recipe: everything that decides a run, read from YAML, checked once, frozen.

Defaults give way to the recipe file, the file to flags, flags to `--set a.b=value`. Whatever does not fit is a
RecipeError of one line that names the key by its dotted path.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from hcompress.caching.settings import HarmoniCaSettings
from hcompress.errors import RecipeError
from hcompress.quant.settings import EfficientDMSettings, PtqSettings

Kind = TypeVar("Kind", bound="Run")
GOALS = ("caching.beta", "caching.target_cur", "caching.target_speedup")  # exactly one; a later layer's replaces it


class SolverSettings(BaseModel):
    """Which diffusers scheduler, and how many steps of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field("ddim", description="scheduler, such as ddim, dpm++ or unipc")
    steps: int = Field(20, description="denoising steps T; one step has nothing to reuse")


class Run(BaseModel):
    """What every kind of run has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="zoo:NAME, a local diffusers folder or a hub id")
    solver: SolverSettings = SolverSettings()
    cfg: float = Field(1.5, ge=0, allow_inf_nan=False, description="classifier-free guidance scale; 1 is no guidance")


class QuantRecipe(Run):
    """One quantization; which of the two below, `quant.method` says."""

    quant: PtqSettings | EfficientDMSettings
    seed: int = Field(0, ge=0, description="of the noises and the labels")


class PtqRecipe(QuantRecipe):
    """One quantization after training."""

    quant: PtqSettings


class EfficientDMRecipe(QuantRecipe):
    """One quantization that is distilled."""

    quant: EfficientDMSettings


class Recipe(Run):
    """One training run."""

    caching: HarmoniCaSettings
    seed: int = Field(0, ge=0, description="of the router, the noises and the labels")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        steps, caching = self.solver.steps, self.caching
        if steps < 2:
            raise RecipeError(f"solver.steps = {steps}: one step has nothing to reuse; use 2 or more")
        ceiling = (steps - 1) / steps
        if caching.target_cur is not None and caching.target_cur > ceiling:
            raise RecipeError(
                f"caching.target_cur = {caching.target_cur} is out of reach: the first of {steps} steps always "
                f"computes everything, so the ceiling is {steps - 1}/{steps} = {ceiling:.3f}"
            )
        if "refresh" in caching.model_fields_set and caching.refresh % steps:
            nearest = _whole_trajectories(caching.refresh, steps)
            raise RecipeError(f"caching.refresh = {caching.refresh} is no multiple of {steps} steps; use {nearest}")
        return self


def shipped() -> dict[str, Path]:
    """The recipes that come with hcompress, by name; a checkout has them beside the package, a wheel inside."""
    package = Path(__file__).parent
    folder = next((folder for folder in (package / "_recipes", package.parent / "recipes") if folder.is_dir()), package)
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def find(name: str | Path) -> Path:
    """The file of a recipe given by path or, if it ships with hcompress, by name."""
    if Path(name).is_file():
        return Path(name)
    recipes = shipped()
    if str(name) not in recipes:
        close = difflib.get_close_matches(Path(name).stem, recipes, n=1)
        hint = f"did you mean {close[0]}?" if close else "`hcompress recipes list` shows those that ship"
        raise RecipeError(f"no recipe {str(name)!r}; {hint}")
    return recipes[str(name)]


def resolve(file: Path | None = None, flags: Mapping[str, Any] | None = None, sets: Sequence[str] = ()) -> Recipe:
    """The recipe in `file` under `flags` ({"solver.steps": 10}; None = not given) under `sets` ("solver.steps=10")."""
    recipe = _checked(Recipe, {"caching": {}} | _layered(file, flags, sets))
    if "refresh" in recipe.caching.model_fields_set:
        return recipe
    refresh = _whole_trajectories(recipe.caching.refresh, recipe.solver.steps)
    return recipe.model_copy(update={"caching": recipe.caching.model_copy(update={"refresh": refresh})})


def resolve_quant(
    file: Path | None = None, flags: Mapping[str, Any] | None = None, sets: Sequence[str] = ()
) -> QuantRecipe:
    """As `resolve`, for a recipe with a `quant:` section."""
    settings = {"quant": {}} | _layered(file, flags, sets)
    distilled = isinstance(settings["quant"], dict) and settings["quant"].get("method") == "efficientdm"
    return _checked(EfficientDMRecipe if distilled else PtqRecipe, settings)


def resolve_any(file: Path) -> Recipe | QuantRecipe:
    """The recipe in `file`, of whichever kind its section says."""
    return resolve_quant(file) if "quant" in read(file) else resolve(file)


def _layered(file: Path | None, flags: Mapping[str, Any] | None, sets: Sequence[str]) -> dict[str, Any]:
    given = {path: value for path, value in (flags or {}).items() if value is not None}
    settings: dict[str, Any] = {}
    for layer in ({} if file is None else _flat(read(file)), given, dict(map(_assignment, sets))):
        replaced = set() if layer.keys().isdisjoint(GOALS) else set(GOALS)
        settings = {path: value for path, value in settings.items() if path not in replaced} | layer
    return _nested(settings)


def _checked(kind: type[Kind], settings: Mapping[str, Any]) -> Kind:
    """Raises RecipeError for what does not fit `kind`, a section of another kind first."""
    own, other = ("quant", "caching") if issubclass(kind, QuantRecipe) else ("caching", "quant")
    if other in settings:
        raise RecipeError(f"a run is of one kind, and this one has a {own} section: put {other} into another recipe")
    try:
        return kind.model_validate(settings, strict=True)
    except ValidationError as error:
        raise RecipeError(_one_line(error, kind)) from error


def read(file: Path) -> dict[Any, Any]:
    """The settings that a YAML file holds, unchecked."""
    try:
        settings = _parse(Path(file).read_text("utf-8"))
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{file}{line} is not YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file} is not a text file") from error
    except OSError as error:
        raise RecipeError(f"cannot read recipe {file}: {error.strerror}") from error
    if not isinstance(settings, dict):
        raise RecipeError(f"{file} holds a {type(settings).__name__}, but a recipe is a mapping such as `cfg: 1.5`")
    return settings


def dump(recipe: Run) -> str:
    """YAML that resolves to an equal recipe, every default spelled out."""
    return yaml.dump(recipe.model_dump(exclude_none=True), Dumper=_Dumper, sort_keys=False)


def schema() -> str:
    """JSON Schema of a recipe file, for editors."""
    kinds = TypeAdapter(Recipe | PtqRecipe | EfficientDMRecipe)
    return json.dumps(kinds.json_schema(), indent=2, ensure_ascii=False)


def first_difference(old: Run, new: Run) -> str | None:
    """The first setting in which two recipes differ, such as "cfg: 1.5 != 4.0"; None where they are equal."""
    ours, theirs = _flat(old.model_dump()), _flat(new.model_dump())
    return next((f"{key}: {ours[key]} != {theirs.get(key)}" for key in ours if ours[key] != theirs.get(key)), None)


class _Loader(yaml.SafeLoader):
    """Plain YAML, with 7e-8 a number as in YAML 1.2 and Python; PyYAML wants 7.0e-8."""


class _Dumper(yaml.SafeDumper):
    """What `_Loader` reads back as it was."""


for _yaml in (_Loader, _Dumper):
    _float = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    _yaml.add_implicit_resolver("tag:yaml.org,2002:float", _float, list("-+.0123456789"))


def _whole_trajectories(iterations: int, steps: int) -> int:
    """The multiple of `steps` nearest to `iterations`, at least one."""
    return max(1, round(iterations / steps)) * steps


def _parse(text: str) -> Any:
    value = yaml.load(text, _Loader)
    return {} if value is None else value


def _assignment(text: str) -> tuple[str, Any]:
    """("caching.beta", 7e-8) from "caching.beta=7e-8"."""
    path, equals, value = text.partition("=")
    if not path or not equals:
        raise RecipeError(f"--set {text}: write KEY=VALUE, such as --set caching.beta=7e-8")
    try:
        return path, yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {text}: {value!r} is not a YAML value") from error


def _flat(settings: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """{"a.b": 1} from {"a": {"b": 1}}."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a": {"b": 1}} from {"a.b": 1}. Where "a" itself is a value it stays one, and pydantic will say so."""
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *sections, key = path.split(".")
        inner: Any = nested
        for section in sections:
            inner = inner.setdefault(section, {}) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            inner[key] = value
    return nested


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted path of a recipe: "model", "solver", "solver.name", ..."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(f"{prefix}{name}")
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _keys(field.annotation, f"{prefix}{name}.")
    return keys


def _one_line(invalid: ValidationError, kind: type[Run]) -> str:
    """What is wrong with the first offending key, unknown keys first."""
    errors = invalid.errors()
    for error in errors:
        if error["type"] == "extra_forbidden":
            unknown = ".".join(map(str, error["loc"]))
            return f"unknown key '{unknown}'; {_suggestion(unknown, kind)}"
    path, first = _known_path(errors[0]["loc"], kind), errors[0]
    if first["type"] == "missing":
        return f"{path} is not set; give {kind.model_fields[path].description}"
    if first["type"] == "value_error":
        return f"{path}: {first['msg'].removeprefix('Value error, ')}"
    if first["type"] == "model_type":
        return f"{path} = {first['input']!r} should be a section of settings such as `{path}: {{...}}`"
    wanted = [
        error["msg"].removeprefix("Input should be ") for error in errors if _known_path(error["loc"], kind) == path
    ]
    return f"{path} = {first['input']!r} should be {', or '.join(wanted)}"


def _known_path(location: Sequence[int | str], kind: type[Run]) -> str:
    """The dotted path of an error, without the union members that pydantic appends."""
    paths = [".".join(map(str, location[:end])) for end in range(1, len(location) + 1)]
    return [path for path in paths if path in _keys(kind)][-1]


def _suggestion(unknown: str, kind: type[Run]) -> str:
    """The same name elsewhere, else the nearest name of the section, else the nearest of all."""
    section, _, name = unknown.rpartition(".")
    siblings = {key.rpartition(".")[2]: key for key in _keys(kind) if key.rpartition(".")[0] == section}
    anywhere = {key.rpartition(".")[2]: key for key in _keys(kind)}
    if name in anywhere:
        return f"did you mean '{anywhere[name]}'?"
    for names in (siblings, anywhere):
        if close := difflib.get_close_matches(name, names, n=1, cutoff=0.5):
            return f"did you mean '{names[close[0]]}'?"
    return f"known here: {', '.join(siblings)}"
