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

from hcompress.caching.settings import CachingSettings, HarmoniCaSettings
from hcompress.errors import RecipeError
from hcompress.prune.settings import PruneSettings
from hcompress.quant.settings import Quant
from hcompress.recipe_errors import one_line, section_of

TARGETS = ("caching.target_cur", "caching.target_speedup")
PRUNING = ("prune.ratio", "prune.target_speedup")
GOALS = (  # one; a later layer's replaces it
    *("caching.beta", "caching.alpha", "caching.every", "caching.keys", *TARGETS),
    *PRUNING,
)
DEFAULT_METHODS = {
    "caching": "harmonica",
    "quant": "int8-max",
    "prune": "diff-pruning",
}  # of the section that makes a run what it is
COMPARISONS = "compare"  # the folder, among recipes, of what `hcompress compare` reads (hcompress.comparison)
Kind = TypeVar("Kind", bound="Run")


class SolverSettings(BaseModel):
    """Which diffusers scheduler, and how many steps of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field("ddim", description="scheduler, such as ddim, dpm++ or unipc")
    steps: int = Field(20, ge=1, description="denoising steps T; one step has nothing to reuse")


class MetricsSettings(BaseModel):
    """How a run's results are to be measured: what `hcompress eval --recipe` goes by."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: int = Field(500, ge=1, description="how many to generate; published figures: 50000")
    reference: str | None = Field(None, description="real pictures or ADM's npz of their statistics: FID and its kin")
    clip: str | None = Field(None, description="of a text model: what its CLIP score is by, a local folder or a hub id")


class Run(BaseModel):
    """What every kind of run has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="zoo:NAME, a local diffusers folder or a hub id")
    solver: SolverSettings = SolverSettings()
    cfg: float = Field(1.5, ge=0, allow_inf_nan=False, description="classifier-free guidance scale; 1 is no guidance")
    metrics: MetricsSettings | None = Field(None, description="how its results are to be measured")


class QuantRecipe(Run):
    """One quantization."""

    quant: Quant
    seed: int = Field(0, ge=0, description="of the noises and the labels")


class PruneRecipe(Run):
    """One pruning. Solver and guidance are those that its results are compared under, and MODEL's own from then on."""

    prune: PruneSettings
    seed: int = Field(0, ge=0, description="of the images' order, the noises and the labels")


class Recipe(Run):
    """One training run."""

    caching: CachingSettings
    seed: int = Field(0, ge=0, description="of the router, the noises and the labels")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        steps, caching = self.solver.steps, self.caching
        if steps < 2:
            raise RecipeError(f"solver.steps = {steps}: one step has nothing to reuse; use 2 or more")
        reusing, reason = caching.reusing_steps(steps)
        wanted = getattr(caching, "target_cur", None)
        if wanted is not None and wanted > reusing / steps:
            raise RecipeError(
                f"caching.target_cur = {wanted} is out of reach: {reason}, "
                f"so the ceiling is {reusing}/{steps} = {reusing / steps:.3f}"
            )
        if isinstance(caching, HarmoniCaSettings) and "refresh" in caching.model_fields_set and caching.refresh % steps:
            nearest = _whole_trajectories(caching.refresh, steps)
            raise RecipeError(f"caching.refresh = {caching.refresh} is no multiple of {steps} steps; use {nearest}")
        return self


def shipped(folder: str = "") -> dict[str, Path]:
    """The recipes that come with hcompress, by name; a checkout has them beside the package, a wheel inside."""
    package = Path(__file__).parent
    root = next((root for root in (package / "_recipes", package.parent / "recipes") if root.is_dir()), package)
    return {file.stem: file for file in sorted((root / folder).glob("*.yaml"))}


def find(name: str | Path) -> Path:
    """The file of a recipe or comparison given by path or, if it ships with hcompress, by name."""
    if Path(name).is_file():
        return Path(name)
    recipes = shipped() | shipped(COMPARISONS)
    if str(name) not in recipes:
        close = difflib.get_close_matches(Path(name).stem, recipes, n=1)
        hint = f"did you mean {close[0]}?" if close else "`hcompress recipes list` shows those that ship"
        raise RecipeError(f"no recipe {str(name)!r}; {hint}")
    return recipes[str(name)]


def resolve(file: Path | None = None, flags: Mapping[str, Any] | None = None, sets: Sequence[str] = ()) -> Recipe:
    """The recipe in `file` under `flags` ({"solver.steps": 10}; None = not given) under `sets` ("solver.steps=10")."""
    recipe = _checked(Recipe, _layered("caching", file, flags, sets))
    caching = recipe.caching
    if not isinstance(caching, HarmoniCaSettings) or "refresh" in caching.model_fields_set:
        return recipe
    refresh = _whole_trajectories(caching.refresh, recipe.solver.steps)
    return recipe.model_copy(update={"caching": caching.model_copy(update={"refresh": refresh})})


def resolve_quant(
    file: Path | None = None, flags: Mapping[str, Any] | None = None, sets: Sequence[str] = ()
) -> QuantRecipe:
    """As `resolve`, for a recipe with a `quant:` section."""
    return _checked(QuantRecipe, _layered("quant", file, flags, sets))


def resolve_prune(
    file: Path | None = None, flags: Mapping[str, Any] | None = None, sets: Sequence[str] = ()
) -> PruneRecipe:
    """As `resolve`, for a recipe with a `prune:` section."""
    return _checked(PruneRecipe, _layered("prune", file, flags, sets))


def resolve_any(file: Path, flags: Mapping[str, Any] | None = None) -> Recipe | QuantRecipe | PruneRecipe:
    """The recipe in `file` under `flags`, of whichever kind its section says."""
    settings = read(file)
    if "prune" in settings:
        return resolve_prune(file, flags)
    return resolve_quant(file, flags) if "quant" in settings else resolve(file, flags)


def _layered(section: str, file: Path | None, flags: Mapping[str, Any] | None, sets: Sequence[str]) -> dict[str, Any]:
    """Settings by dotted path: the default method of `section`, under the file, under flags, under sets."""
    given = {path: value for path, value in (flags or {}).items() if value is not None}
    settings: dict[str, Any] = {f"{section}.method": DEFAULT_METHODS[section]}
    for layer in ({} if file is None else _flat(read(file)), given, dict(map(_assignment, sets))):
        settings = _over(settings, layer)
    return settings


def _checked(kind: type[Kind], settings: dict[str, Any]) -> Kind:
    """Raises RecipeError for what does not fit `kind`, a section of another kind first."""
    own = section_of(kind)
    for other in {path.partition(".")[0] for path in settings} & (DEFAULT_METHODS.keys() - {own}):
        verbs = {"caching": "train", "quant": "quantize", "prune": "prune"}
        raise RecipeError(f"a {other} section is for `hcompress {verbs[other]}`, and this is `hcompress {verbs[own]}`")
    try:
        return kind.model_validate(_nested(settings), strict=True)
    except ValidationError as error:
        raise RecipeError(one_line(error, kind, settings[f"{own}.method"])) from error


def _over(settings: dict[str, Any], layer: dict[str, Any]) -> dict[str, Any]:
    """`layer` over `settings`: its goal replaces theirs, and another method all that was said but a target."""
    dropped = set() if layer.keys().isdisjoint(GOALS) else set(GOALS)
    method = settings.get("caching.method")
    if layer.get("caching.method", method) != method:
        dropped |= {path for path in settings if path.startswith("caching.") and path not in TARGETS}
    return {path: value for path, value in settings.items() if path not in dropped} | layer


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
    return json.dumps(TypeAdapter(Recipe | QuantRecipe | PruneRecipe).json_schema(), indent=2, ensure_ascii=False)


def first_difference(old: Run, new: Run) -> str | None:
    """The first setting in which two recipes differ, such as "cfg: 1.5 != 4.0"; None where they make the same.

    How results are measured makes no difference to them.
    """
    ours, theirs = (_flat(recipe.model_dump(exclude={"metrics"})) for recipe in (old, new))
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
