"""What a comparison asks for: its cells, what is left out of them, and what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcompress.comparison import (
    FEWER_STEPS,
    UNCACHED,
    Cell,
    Comparison,
    Entry,
    cells_of,
    fewer_steps,
    group_name,
    load_comparison,
)
from hcompress.errors import RecipeError
from hcompress.recipe import COMPARISONS, Run, SolverSettings, find, shipped

LEARNED, RULE, FEW_BITS = (f"fashion-dit_ddim20_{name}" for name in ("harmonica", "interval", "int8-max"))


README = Path(__file__).parents[1] / "recipes" / "README.md"
PUBLISHED = [section for section in README.read_text().split("\n## ") if "\nAs " in section and "`compare/" in section]


def written(folder: Path, text: str) -> Path:
    file = folder / "mine.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("name", shipped(COMPARISONS))
def test_all_shipped_comparisons_have_cells_and_say_what_they_are(name):
    comparison = load_comparison([name])
    cells, left_out = cells_of(comparison)
    assert {cell.seed for cell in cells} == {*comparison.seeds} and len(comparison.seeds) == 3
    head = find(name).read_text().partition("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines()) and f"hcompress compare {name} --out" in head
    assert all("out of reach" in one.reason for one in left_out)


def test_recipes_may_lie_beside_the_comparison_that_names_them(tmp_path):
    """Whatever the working directory is, and however an entry is written."""
    rule = tmp_path / "rule.yaml"
    rule.write_text(find(RULE).read_text())
    file = written(tmp_path, f"recipes:\n- rule.yaml\n- {{recipe: rule.yaml, name: again}}\n- {rule}\n- {LEARNED}\n")
    assert [entry.recipe for entry in load_comparison([file]).recipes] == [str(rule)] * 3 + [LEARNED]
    with pytest.raises(RecipeError, match=r"no recipe 'elsewhere\.yaml'"):
        cells_of(load_comparison([written(tmp_path, "recipes: [elsewhere.yaml]")]))


@pytest.mark.parametrize("section", PUBLISHED)
def test_all_published_tables_are_comparisons_of_their_recipes(section):
    """A row a recipe, in as many groups as the table has baselines: none of it needs the weights to be told."""
    comparisons = [
        load_comparison([name]) for name in re.findall(r"`compare/([^`]+)`\.?,? ?", section.partition("|")[0])
    ]
    listed = {line.split("|")[3].strip(" `") for line in section.splitlines() if line.startswith("|")} - {
        "recipe",
        "---",
    }
    asked = [entry.recipe for comparison in comparisons for entry in comparison.recipes]
    missing = {*asked} - listed  # the baselines that a table takes from another
    assert listed <= {*asked} and len({*asked}) == len(asked) and all("interval1" in name for name in missing)
    for comparison in comparisons:
        cells, left_out = cells_of(comparison)
        rows, groups = {cell.row for cell in cells}, {cell.row[0] for cell in cells}
        baselines = [entry for entry in comparison.recipes if "interval1" in entry.recipe]
        assert len(rows) == len(comparison.recipes) + (not baselines) and not left_out
        fewer = [cell for cell in cells if cell.name == FEWER_STEPS and cell.seed == comparison.seeds[0]]
        assert len(groups) == max(1, len(baselines) - len(fewer))
        assert comparison.reference is not None or section.startswith("Training")


@settings(deadline=None, max_examples=20)
@given(
    budgets=st.lists(st.integers(1, 94), min_size=1, max_size=4, unique=True),
    seeds=st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True),
)
def test_every_recipe_at_every_budget_with_every_seed_is_one_cell_or_left_out(budgets, seeds):
    names = [LEARNED, RULE, "fashion-dit_ddim20_learning-to-cache"]
    asked = {"budgets": [budget / 100 for budget in budgets], "seeds": seeds}
    cells, left_out = cells_of(load_comparison(names, asked))
    cached = [cell for cell in cells if cell.name != UNCACHED]
    assert len(cached) + len(left_out) * len(seeds) == len(names) * len(budgets) * len(seeds)
    assert {one.name for one in left_out} <= {"Learning-to-Cache"}  # half of 20 steps is all it may reuse
    assert len({cell.folder for cell in cells}) == len(cells)
    for cell in cached:
        assert (cell.recipe.caching.target_cur, cell.recipe.seed) == (cell.budget, cell.seed)
    assert [cell.seed for cell in cells] == sorted((cell.seed for cell in cells), key=seeds.index)
    starts = [index for index, cell in enumerate(cells) if cell.name == UNCACHED]
    assert [cells[index - 1].seed for index in starts[1:]] == seeds[:-1]  # each seed begins with its uncached cell


@settings(deadline=None)
@given(budget=st.floats(0.01, 0.94), share=st.floats(0.1, 1.0))
def test_fewer_steps_cost_what_the_budget_costs_to_half_a_step(budget, share):
    cells, _ = cells_of(load_comparison([RULE], {"budgets": [budget], "seeds": [4]}))
    found = fewer_steps(cells, {group_name(cells[0].group): share})
    if not found:
        assert 20 * budget * share <= 0.5  # as many steps
        return
    (fewer,) = found
    assert fewer.row[0] == cells[0].row[0] and (fewer.name, fewer.seed) == (FEWER_STEPS, 4)
    assert abs(fewer.recipe.solver.steps - 20 * (1 - budget * share)) <= 0.5 or fewer.recipe.solver.steps == 1


def test_recipes_of_other_models_solvers_or_steps_are_groups_of_their_own():
    cells, _ = cells_of(load_comparison([LEARNED, "fashion-dit_ddim10_harmonica"], {"seeds": [0]}))
    groups = {group_name(cell.group): cell.group.solver for cell in cells}
    assert [*groups.values()] == [SolverSettings(name="ddim", steps=steps) for steps in (20, 10)]
    assert sum(cell.name == UNCACHED for cell in cells) == 2


@settings(deadline=None, max_examples=30)
@given(
    cached=st.sets(st.integers(10, 30), max_size=3),
    uncached=st.sets(st.integers(2, 40), min_size=1, max_size=4),
    other=st.sampled_from(({}, {"cfg": 2.0}, {"solver.name": "unipc"}, {"model": "other"})),
)
def test_what_reuses_nothing_is_the_uncached_row_of_its_steps_or_fewer_of_the_next_more(cached, uncached, other):
    """Where no method has as many steps, or the same model, solver and guidance, the most are a group of their own."""
    asked = [Entry(recipe=RULE, set={"solver.steps": steps, "caching.every": 2}) for steps in cached]
    asked += [Entry(recipe=RULE, set={"solver.steps": steps, "caching.every": 1} | other) for steps in uncached]
    cells = [cell for cell in cells_of(Comparison(recipes=asked, seeds=[0]))[0] if type(cell.recipe) is Run]
    setting = {"model": "zoo:fashion-dit", "solver.name": "ddim", "cfg": 1.5}
    tops = set() if other else cached
    tops = tops | {max(uncached)} if max(uncached) > max(tops, default=0) else tops
    wanted = {(*setting.values(), steps, UNCACHED, steps) for steps in cached}
    setting |= other
    wanted |= {(*setting.values(), steps, UNCACHED, steps) for steps in tops}
    wanted |= {
        (*setting.values(), min(top for top in tops if top >= steps), FEWER_STEPS, steps) for steps in uncached - tops
    }
    found = [
        (
            cell.group.model,
            cell.group.solver.name,
            cell.group.cfg,
            cell.group.solver.steps,
            cell.name,
            cell.recipe.solver.steps,
        )
        for cell in cells
    ]
    assert {*found} == wanted and len(found) == len(wanted)


def test_a_model_that_was_made_from_another_is_in_its_group_with_a_recipe_of_its_own():
    asked = [FEW_BITS, Entry(recipe=LEARNED, set={"model": "runs/w8a8"}, baseline="zoo:fashion-dit", name="both")]
    uncached, few_bits, both = cells_of(Comparison(recipes=asked, seeds=[0]))[0]
    assert uncached.group == few_bits.group == both.group == few_bits.own and both.own.model == "runs/w8a8"
    nothing = Entry(
        recipe=RULE, set={"model": "runs/w8a8", "caching.every": 1}, baseline="zoo:fashion-dit", name="W8A8"
    )
    assert [cell.name for cell in cells_of(Comparison(recipes=[nothing], seeds=[0]))[0]] == [UNCACHED, "W8A8"]
    assert group_name(both.own) == group_name(both.group).replace("zoo:fashion-dit", "runs/w8a8")


def test_without_budgets_recipes_run_as_they_are_and_few_bits_have_none():
    cells, _ = cells_of(load_comparison([LEARNED, FEW_BITS], {"seeds": [0]}))
    assert [(cell.name, cell.point) for cell in cells] == [
        (UNCACHED, ""),
        ("HarmoniCa, sensitivity", "CUR 40 %"),
        ("int8-max w8a8", ""),
    ]
    with_budgets, _ = cells_of(load_comparison([LEARNED, FEW_BITS], {"seeds": [0], "budgets": [0.2, 0.3]}))
    assert [cell.point for cell in with_budgets] == ["", "CUR 20 %", "CUR 30 %", ""]


def test_a_recipe_may_be_changed_named_and_varied(tmp_path):
    file = written(
        tmp_path,
        f"recipes:\n- {{recipe: {LEARNED}, name: without IEPO, set: {{caching.proxy: none}}}}\n"
        f"- {{recipe: {LEARNED}, set: {{caching.method: deepcache}}, vary: {{caching.every: [2, 5]}}}}\n"
        "budgets: [0.3]\nseeds: [1]\n",
    )
    _, plain, *varied = cells_of(load_comparison([file]))[0]
    assert (plain.name, plain.recipe.caching.proxy, plain.budget) == ("without IEPO", "none", 0.3)
    assert [(cell.name, cell.point, cell.recipe.caching.every) for cell in varied] == [
        ("DeepCache, by branch", "every 2", 2),
        ("DeepCache, by branch", "every 5", 5),
    ]


def test_samples_reference_and_clip_are_the_recipes_unless_it_says_so_itself(tmp_path):
    recipes = [tmp_path / f"{name}.yaml" for name in ("one", "same", "silent", "other")]
    for recipe, metrics in zip(
        recipes, ("{samples: 70, reference: a.npz, clip: one}",) * 2 + (None, "{samples: 80, clip: other}"), strict=True
    ):
        recipe.write_text(find(RULE).read_text() + (f"\nmetrics: {metrics}\n" if metrics else ""))
    one, same, silent, other = recipes

    def asked(*names: Path, **flags: object) -> tuple[int, str | None, str | None]:
        found = load_comparison(names, flags)
        return found.samples, found.reference, found.clip

    assert asked(one, same, silent) == (70, "a.npz", "one") and asked(silent) == (500, None, None)
    assert asked(one, other, samples=9, clip="mine") == (9, "a.npz", "mine")
    assert asked(one, reference="b.npz") == (70, "b.npz", "one")
    with pytest.raises(RecipeError, match=r"differ in metrics.clip: one \(.*one.yaml\), other \(.*\); pass --clip$"):
        asked(one, other, samples=9)
    with pytest.raises(RecipeError, match=r"differ in metrics.samples: 70 \(.*one.yaml\), 80 \(.*\); pass --samples$"):
        asked(one, other)
    said = written(tmp_path, f"recipes: [{one}, {other}]\nsamples: 3\nreference: null\nclip: null\n")
    assert asked(said) == (3, None, None)


def test_only_what_the_paper_does_has_the_plain_name_of_its_method():
    proxies = {"leave_one_out": "HarmoniCa", "cumulative": "HarmoniCa", "sensitivity": "HarmoniCa, sensitivity"}
    for proxy, name in proxies.items():
        entry = Entry(recipe=LEARNED, set={"caching.proxy": proxy})
        assert cells_of(Comparison(recipes=[entry], seeds=[0]))[0][1].name == name


def test_rows_of_corrected_reuse_say_their_rule_and_order_2():
    names = {("plain", 1): "FORA", ("taylor", 1): "FORA taylor", ("taylor", 2): "FORA taylor order 2"}
    for (reuse, order), name in (names | {("corrected", 2): "FORA corrected order 2"}).items():
        entry = Entry(recipe=RULE, set={"caching.reuse": reuse, "caching.order": order})
        assert cells_of(Comparison(recipes=[entry], seeds=[0]))[0][1].name == name


REFUSED = {
    "recipes: []\n": r"recipes = \[\]",
    "recipes: [absent]\n": "no recipe 'absent'",
    f"recipes: [{LEARNED}]\nsedes: [0]\n": "unknown key 'sedes'; did you mean 'seeds'",
    f"recipes: [{{recipe: {LEARNED}, nmae: x}}]\n": "unknown key 'recipes.0.nmae'; did you mean 'name'",
    f"recipes: [{LEARNED}]\nbudgets: [1.5]\n": r"budgets.0 = 1.5: a budget is a share",
    f"recipes: [{LEARNED}]\nbudgets: [0.2, 40.0]\n": r"budgets.1 = 40: a budget is a share of 1; 0.4 means 40 %",
    f"recipes: [{LEARNED}]\nbudgets: [0.2, 40]\n": r"budgets.1 = 40: a budget is a share of 1; 0.4 means 40 %",
    f"recipes: [{LEARNED}]\nbudgets: [-0.5]\n": r"budgets.0 = -0.5: Input should be greater than 0",
    f"recipes: [{LEARNED}]\nbudgets: [0.97]\n": "no recipe reaches a budget .*ceiling is 19/20",
    f"recipes: [{LEARNED}]\nseeds: [1, 1]\n": "holds one twice",
    f"recipes: [{LEARNED}]\nrunner: abacus\n": "runner = 'abacus'",
    f"recipes: [{LEARNED}, {LEARNED}]\n": "2 rows are called harmonica-sensitivity_cur-40",
    "recipes: [fashion-dit_ddim20]\n": "itself a comparison",
    f"recipes: [{{recipe: {LEARNED}, set: {{caching.treshold: 1}}}}]\n": "did you mean 'caching.threshold'",
    f"recipes: [{{recipe: {LEARNED}, vary: {{caching.every: [2]}}}}]\n": "unknown key 'caching.every'",
    f"recipes: [{{recipe: {RULE}, name: dense, set: {{caching.every: 1}}}}]\n": "it is no 'dense' but uncached",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, text):
    with pytest.raises(RecipeError, match=REFUSED[text]) as caught:
        cells_of(load_comparison([written(tmp_path, text)]))
    assert "\n" not in str(caught.value)


def test_the_command_refuses_in_one_line_and_plans_without_torch(tmp_path):
    def compare(*more: str) -> subprocess.CompletedProcess[str]:
        code = "import sys; sys.modules['torch'] = None; from hcompress.cli.main import main; main()"
        command = [sys.executable, "-c", code, "compare", LEARNED, "--out", str(tmp_path / "out"), *more]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = compare("--budgets", "0.2;0.4")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: --budgets 0.2;0.4: write numbers with commas between, such as 0.2,0.4\n"
    planned = compare("--budgets", "0.2,0.4", "--seeds", "0,1,2", "--dry-run", "--json")
    plan = json.loads(planned.stdout)
    assert plan["cells"] == len(plan["folders"]) == 9, planned.stderr
    (line,) = plan["left_out"]
    assert line.startswith("fewer steps") and "torch is not installed; pip install 'hcompress[train]'" in line
    assert not (tmp_path / "out").exists()


def test_cells_of_a_row_differ_in_their_seed_alone():
    cells, _ = cells_of(load_comparison([LEARNED], {"seeds": [3, 7]}))
    one, two = (cell for cell in cells if cell.name != UNCACHED)
    assert one.row == two.row and one.folder != two.folder
    assert isinstance(one, Cell) and one.recipe.model_copy(update={"seed": 7}) == two.recipe
