"""Recipes: what resolves, resolves again to the same; what does not fit is one line that names the key."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcompress.caching import CACHING
from hcompress.errors import AbsentModel, RecipeError
from hcompress.recipe import (
    TARGETS,
    PruneRecipe,
    QuantRecipe,
    Recipe,
    dump,
    find,
    first_difference,
    resolve,
    resolve_any,
    schema,
    shipped,
)
from hcompress.recipe_errors import keys, methods, section_of

MODEL = {"model": "zoo:fashion-dit", "caching.target_cur": 0.4}
GOALS = ("caching.beta", *TARGETS)  # of HarmoniCa, which is what a recipe is for unless it says another method
GOAL_OF = {  # the others are given a target
    "deepcache": {},
    "faster-diffusion": {"caching.every": 2},
    "given": {"caching.schedule": "schedule.safetensors"},
}
SETTINGS = {
    method: [key for key in keys(Recipe, method) if key not in ("solver", "caching", "caching.method", "metrics")]
    for method in methods(Recipe)
}
EVERY_SETTING = [(method, key) for method, settings in SETTINGS.items() for key in settings]


def asked(method):
    goal = GOAL_OF.get(method, {"caching.target_cur": 0.4})
    return {"model": "zoo:fashion-dit", "caching.method": method} | goal


def value_at(recipe, path):
    for part in path.split("."):
        recipe = getattr(recipe, part)
    return recipe


def read_back(folder, recipe):
    file = folder / "recipe.yaml"
    file.write_text(dump(recipe))
    return resolve(file)


@settings(deadline=None)  # the first call imports, and CI is a busy machine
@given(
    model=st.one_of(st.sampled_from(["7e-8", "no", "null", "1", "a: b", "# c", " "]), st.text(max_size=8)),
    steps=st.integers(2, 1000),
    cfg=st.floats(0, 1e9),
    goal=st.sampled_from([{"caching.beta": 7e-8}, {"caching.target_cur": 0.4}, {"caching.target_speedup": 1.6}]),
    init=st.one_of(st.just("normal"), st.floats(-5, 5)),
    refresh=st.one_of(st.none(), st.integers(1, 50)),
)
def test_a_dumped_recipe_resolves_to_an_equal_one(tmp_path_factory, model, steps, cfg, goal, init, refresh):
    whole = refresh and refresh * steps
    flags = {"model": model, "solver.steps": steps, "cfg": cfg, "caching.init": init, "caching.refresh": whole} | goal
    recipe = resolve(None, flags)
    assert recipe.caching.refresh % steps == 0
    again = read_back(tmp_path_factory.mktemp("recipe"), recipe)
    assert again == recipe
    assert first_difference(again, recipe) is None


def test_sets_override_flags_override_the_file_overrides_defaults(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("model: m\ncfg: 2.0\nsolver: {name: unipc, steps: 8}\ncaching: {beta: 1e-7, lr: 0.5}\n")
    recipe = resolve(file, {"cfg": 3.0, "solver.steps": 9, "model": None}, ["cfg=4", "caching.lr=1e-2"])
    assert (recipe.model, recipe.cfg, recipe.seed) == ("m", 4.0, 0)
    assert (recipe.solver.name, recipe.solver.steps) == ("unipc", 9)
    assert (recipe.caching.lr, recipe.caching.beta) == (0.01, 1e-7)


@pytest.mark.parametrize("goal", GOALS)
def test_a_later_goal_replaces_an_earlier_one(tmp_path, goal):
    file = tmp_path / "r.yaml"
    file.write_text("model: m\ncaching: {target_cur: 0.3}\n")
    value = {"caching.beta": 2e-8, "caching.target_cur": 0.4, "caching.target_speedup": 1.5}[goal]
    for recipe in (resolve(file, {goal: value}), resolve(file, {}, [f"{goal}={value}"])):
        assert [value_at(recipe, other) for other in GOALS if other != goal] == [None, None]
        assert value_at(recipe, goal) == value


def test_the_methods_of_recipes_are_those_there_are():
    assert methods(Recipe) == list(CACHING)


@pytest.mark.parametrize("method", CACHING)
def test_every_method_resolves_and_reads_back(tmp_path, method):
    recipe = resolve(None, asked(method))
    assert recipe.caching.method == method
    assert read_back(tmp_path, recipe) == recipe


@pytest.mark.parametrize("key", sorted({key for _, key in EVERY_SETTING}))
def test_every_misspelt_setting_is_refused_with_the_right_one(key):
    """A letter lost at the end, two swapped at the front: the nearest key is the one that was meant."""
    section, dot, name = key.rpartition(".")
    for method in (method for method in SETTINGS if key in SETTINGS[method]):
        for misspelt in {name[:-1], name[1] + name[0] + name[2:]} - {name}:
            wrong = f"{section}{dot}{misspelt}"
            with pytest.raises(RecipeError, match=f"unknown key '{wrong}'; did you mean '{key}'") as caught:
                resolve(None, asked(method), [f"{wrong}=1"])
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", [key for key in SETTINGS["harmonica"] if "." in key and not key.endswith(".name")])
def test_a_setting_outside_its_section_is_pointed_home(key):
    with pytest.raises(RecipeError, match=f"did you mean '{key}'"):
        resolve(None, MODEL, [f"{key.rpartition('.')[2]}=1"])


@pytest.mark.parametrize(("method", "key"), EVERY_SETTING)
def test_every_setting_refuses_a_mapping_by_its_path(method, key):
    with pytest.raises(RecipeError, match=rf"^{key} = \{{'x': 1\}} should be ") as caught:
        resolve(None, asked(method), [f"{key}={{x: 1}}"])
    assert "\n" not in str(caught.value)


def test_a_setting_of_another_method_says_whose_it_is():
    with pytest.raises(RecipeError, match=r"'caching\.alpha': method harmonica has no such .* smoothcache has"):
        resolve(None, MODEL, ["caching.alpha=0.1"])
    with pytest.raises(RecipeError, match=r"'caching\.target_speedup': method random has no such"):
        resolve(None, asked("random"), ["caching.target_speedup=1.5"])


@pytest.mark.parametrize(("name", "said"), [("smothcache", "did you mean 'smoothcache'"), ("zzz", "choose from: harm")])
def test_a_method_that_does_not_exist_is_refused_with_those_that_do(name, said):
    with pytest.raises(RecipeError, match=f"^caching.method = '{name}' does not exist; {said}"):
        resolve(None, MODEL | {"caching.method": name})


def test_another_method_takes_over_the_target_and_nothing_else(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("model: m\ncaching: {target_cur: 0.3, lr: 0.5, trajectories: 7}\n")
    recipe = resolve(file, {"caching.method": "smoothcache"})
    assert recipe == resolve(None, {"model": "m", "caching.method": "smoothcache", "caching.target_cur": 0.3})
    by_alpha = resolve(file, {"caching.method": "smoothcache", "caching.alpha": 0.1})
    assert (by_alpha.caching.alpha, by_alpha.caching.target_cur) == (0.1, None)


@pytest.mark.parametrize(("steps", "ceiling"), [(20, "10/20 = 0.500"), (7, "3/7 = 0.429")])
def test_learning_to_cache_reuses_at_most_every_other_step(steps, ceiling):
    wanted = asked("learning-to-cache") | {"solver.steps": steps}
    with pytest.raises(RecipeError, match=f"out of reach: every other of {steps} steps .* ceiling is {ceiling}"):
        resolve(None, wanted | {"caching.target_cur": 0.51})
    assert resolve(None, wanted | {"caching.target_cur": (steps // 2) / steps})


REFUSED = {
    "solver.steps=1": "one step has nothing to reuse",
    "solver.steps=20.5": "solver.steps = 20.5 should be a valid integer",
    "solver.steps=yes": "solver.steps = True should be a valid integer",
    "solver=ddim": "solver = 'ddim' should be a section",
    "caching=": "caching = None should be a section",
    "caching.lr=fast": "caching.lr = 'fast' should be a valid number",
    "caching.target_cur=0.951": r"out of reach.*ceiling is 19/20 = 0\.950",
    "caching.target_cur=": "exactly one of beta, target_cur and target_speedup .got none",
    "caching.proxy=paper": "caching.proxy = 'paper' should be 'leave_one_out', 'cumulative', 'sensitivity' or 'none'",
    "caching.init=zero": "caching.init = 'zero' should be",
    "caching.threshold=0.01": r"threshold = 0\.01 reuses nothing: logits end at -clamp = -4, .* or clamp to 4\.6",
    "caching.clamp=2": r"threshold = 0\.1 reuses nothing: .* takes -2\.1972; raise threshold, or clamp to 2\.2",
    "caching.refresh=30": "caching.refresh = 30 is no multiple of 20 steps; use 40",
    "caching.refresh=7": "use 20",
    "cfg=.nan": "cfg = nan should be a finite number",
    "seed=-1": "seed = -1 should be greater than or equal to 0",
    "model=": "model = None should be a valid string",
    "caching": "write KEY=VALUE",
    "cfg=[": "not a YAML value",
    "caching.no_such_thing_at_all=1": "known here: method, reuse",
}


@pytest.mark.parametrize("setting", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(setting):
    with pytest.raises(RecipeError, match=REFUSED[setting]) as caught:
        resolve(None, MODEL, [setting])
    assert "\n" not in str(caught.value)


def test_two_goals_at_once_and_no_model_are_refused():
    with pytest.raises(RecipeError, match="got beta and target_cur"):
        resolve(None, MODEL, ["caching.beta=1e-8", "caching.target_cur=0.4"])
    with pytest.raises(RecipeError, match="model is not set; give zoo:NAME"):
        resolve(None, {}, ["caching.beta=1e-8"])


@settings(deadline=None)
@given(steps=st.integers(2, 200))
def test_the_ceiling_itself_is_in_reach(steps):
    assert resolve(None, MODEL | {"solver.steps": steps, "caching.target_cur": (steps - 1) / steps})


BROKEN_FILES = {
    "cfg: [1\nseed: 0\n": r"r\.yaml line 2 is not YAML",
    "- a\n- b\n": "holds a list",
    "\x00": "is not a text file",
    "solver: ddim\n": "should be a section",
    "1: 2\n": "unknown key '1'",
}


@pytest.mark.parametrize("text", BROKEN_FILES)
def test_a_broken_file_is_refused_in_one_line(tmp_path, text):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=BROKEN_FILES[text]) as caught:
        resolve(file, MODEL | {"solver.steps": 4})
    assert "\n" not in str(caught.value)


def test_a_recipe_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="did you mean fashion-dit_ddim20_harmonica"):
        find("fashion-dit-ddim20-harmonica")
    with pytest.raises(RecipeError, match="hcompress recipes list"):
        find(tmp_path)
    with pytest.raises(RecipeError, match="No such file"):
        resolve(tmp_path / "absent.yaml")


@pytest.mark.parametrize("name", shipped())
def test_all_shipped_recipes_resolve_and_say_what_they_are(name):
    file = find(name)
    recipe = resolve_any(file)
    solver = f"{recipe.solver.name.removesuffix('-respaced')}{recipe.solver.steps}"
    model = recipe.model.removeprefix("zoo:").rpartition("/")[2].lower()
    method = getattr(recipe, section_of(type(recipe))).method
    assert name.startswith(f"{model}_{solver}_{method}")
    head = file.read_text().partition("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"--recipe {name}" in head


def test_the_page_of_recipes_names_every_published_row_and_no_recipe_that_is_not_there():
    page = (next(iter(shipped().values())).parent / "README.md").read_text()
    named = set(re.findall(r"`([\w+-]+_[\w+-]+)`", page))
    published = {name for name, file in shipped().items() if "# Published: " in file.read_text()}
    assert len(published) > 50 and published <= named <= set(shipped())


SETTINGS_OF_SOLVERS = sorted(
    {(resolve_any(file).solver.name, resolve_any(file).solver.steps) for file in shipped().values()}
)


@pytest.mark.parametrize(("solver", "steps"), SETTINGS_OF_SOLVERS)
def test_the_solver_of_every_shipped_recipe_is_one_table(solver, steps):
    """Which takes no model: what the network is makes no difference to how often it is called."""
    from hcompress.report.forecast import outline

    recipes = [resolve_any(file) for file in shipped().values()]
    for recipe in (one for one in recipes if (one.solver.name, one.solver.steps) == (solver, steps)):
        said = outline(recipe, AbsentModel("no hub"))
        assert f"{steps} steps, {steps} calls" in said["solver"] and said["model"] == recipe.model
        assert getattr(recipe, section_of(type(recipe))).method in said.values()


@pytest.mark.parametrize(
    ("verb", "name"),
    [
        ("train", "pixart-xl-2-256x256_iddpm100_harmonica"),
        ("quantize", "dit-xl-2-256_ddim20_ptq4dit"),
        ("prune", "dit-xl-2-256_ddim20_diff-pruning"),
    ],
)
def test_dry_run_resolves_a_recipe_without_a_hub(hcompress, monkeypatch, tmp_path, verb, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = resolve_any(find(name)).model
    code, stdout, _ = hcompress(verb, model, "--recipe", name, "--dry-run", "--json", "--out", tmp_path / "run")
    plan = json.loads(stdout)
    assert code == 0 and plan["model"] == model and "cannot be fetched from the hub" in plan["left_out"]
    code, _, stderr = hcompress(verb, model, "--recipe", name, "--out", tmp_path / "run")
    assert code == 1 and "cannot be fetched from the hub" in stderr


def test_the_first_difference_is_named():
    recipe = resolve(None, MODEL)
    assert first_difference(recipe, resolve(None, MODEL | {"cfg": 4.0})) == "cfg: 1.5 != 4.0"
    faster = resolve(None, MODEL | {"caching.lr": 0.1, "seed": 3})
    assert first_difference(recipe, faster) == "caching.lr: 0.15 != 0.1"
    assert first_difference(recipe, resolve(None, MODEL | {"metrics.clip": "other"})) is None  # made alike


def test_the_schema_describes_every_setting():
    described = json.loads(schema())
    kinds = [set(described["$defs"][kind["$ref"].rpartition("/")[2]]["properties"]) for kind in described["anyOf"]]
    assert {frozenset(kind - {"model", "solver", "cfg", "seed", "metrics"}) for kind in kinds} == {
        frozenset({"caching"}),
        frozenset({"quant"}),
        frozenset({"prune"}),
    }
    assert all(set(kind.model_fields) in kinds for kind in (Recipe, QuantRecipe, PruneRecipe))
