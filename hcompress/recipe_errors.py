"""What is wrong with a recipe, in one line: the key by its dotted path and, if it was misspelt, the right one."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

Model = type[BaseModel]


def one_line(invalid: ValidationError, recipe: Model, method: object) -> str:
    """The first offending key of a recipe whose method is `method`; unknown keys come first."""
    known, section = methods(recipe), section_of(recipe)
    if method not in known:
        close = difflib.get_close_matches(str(method), known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"choose from: {', '.join(known)}"
        return f"{section}.method = {method!r} does not exist; {hint}"
    settings = keys(recipe, str(method))
    errors = [(_without_tag(error["loc"], section, known), error) for error in invalid.errors()]
    for location, error in errors:
        if error["type"] == "extra_forbidden":
            return _unknown(".".join(map(str, location)), recipe, str(method))
    (location, first), path = errors[0], _known_path(errors[0][0], settings)
    if first["type"] == "missing":
        return f"{path} is not set; give {settings[path]}"
    if first["type"] == "value_error":
        return f"{path}: {first['msg'].removeprefix('Value error, ')}"
    if first["type"] in ("model_type", "model_attributes_type"):
        return f"{path} = {first['input']!r} should be a section of settings such as `{path}: {{...}}`"
    wanted = [
        error["msg"].removeprefix("Input should be ")
        for location, error in errors
        if _known_path(location, settings) == path
    ]
    return f"{path} = {first['input']!r} should be {', or '.join(wanted)}"


def section_of(recipe: Model) -> str:
    """The section that makes a run what it is: "caching", "quant" or "prune"."""
    return next(name for name in ("caching", "quant", "prune") if name in recipe.model_fields)


def methods(recipe: Model) -> list[str]:
    """The methods that the recipe's section may name."""
    annotation = recipe.model_fields[section_of(recipe)].annotation
    return [name for one in get_args(annotation) or [annotation] for name in _names(one)]


def keys(model: Model, method: str, prefix: str = "") -> dict[str, str]:
    """Every dotted path of a recipe of `method` with its description: "model", "solver", "solver.name", ..."""
    found: dict[str, str] = {}
    for name, field in model.model_fields.items():
        found[f"{prefix}{name}"] = field.description or ""
        annotated = [field.annotation, *get_args(field.annotation)]
        sections = [one for one in annotated if isinstance(one, type) and issubclass(one, BaseModel)]
        for section in sections:
            if len(sections) == 1 or method in _names(section):
                found |= keys(section, method, f"{prefix}{name}.")
    return found


def _names(settings: Any) -> tuple[str, ...]:
    """The methods that have these settings; several may share them."""
    return get_args(settings.model_fields["method"].annotation)


def _without_tag(location: Sequence[int | str], section: str, known: Sequence[str]) -> Sequence[int | str]:
    """The place of an error without the method's name, which pydantic puts after the section."""
    tagged = len(location) > 1 and location[0] == section and location[1] in known
    return [location[0], *location[2:]] if tagged else location


def _known_path(location: Sequence[int | str], settings: dict[str, str]) -> str:
    """The dotted path of an error, without the union members that pydantic appends."""
    paths = [".".join(map(str, location[:end])) for end in range(1, len(location) + 1)]
    return [path for path in paths if path in settings][-1]


def _unknown(key: str, recipe: Model, method: str) -> str:
    """That there is no such key, and the one meant: the same name elsewhere, the nearest of the section, or of all."""
    settings = keys(recipe, method)
    owners = [other for other in methods(recipe) if key in keys(recipe, other)]
    if owners:
        have = f"{', '.join(owners)} {'has' if len(owners) == 1 else 'have'}"
        return f"unknown key '{key}': method {method} has no such setting, but {have}; see --method"
    section, _, name = key.rpartition(".")
    siblings = {path.rpartition(".")[2]: path for path in settings if path.rpartition(".")[0] == section}
    anywhere = {path.rpartition(".")[2]: path for path in settings}
    said = f"unknown key '{key}'; "
    if name in anywhere:
        return f"{said}did you mean '{anywhere[name]}'?"
    for names in (siblings, anywhere):
        if close := difflib.get_close_matches(name, names, n=1, cutoff=0.5):
            return f"{said}did you mean '{names[close[0]]}'?"
    return f"{said}known here: {', '.join(siblings)}"
