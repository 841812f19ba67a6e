"""Bad recipes and plans."""

from tests.damage import *

RECIPE_FILE, PLAN_FILE = "{tmp}/recipe.yaml", "{tmp}/plan.yaml"
RECIPES = [
    Case("recipe-missing", ON_RECIPE, (RECIPE_FILE,)),
    Case("recipe-is-a-folder", ON_RECIPE, (RECIPE_FILE,), folder("recipe.yaml")),
    Case("recipe-not-utf8", ON_RECIPE, (RECIPE_FILE,), recipe(b"device: \xff")),
    Case("recipe-broken-yaml", ON_RECIPE, (RECIPE_FILE, "line 2"), recipe("kv_cache: 0.5\nrope: [high")),
    Case("recipe-nested", ON_RECIPE, (RECIPE_FILE,), recipe("rope: " + 5000 * "[")),
    Case("recipe-a-list", ON_RECIPE, (RECIPE_FILE, "names and values"), recipe("- kv_cache\n- 0.5\n")),
    Case("recipe-empty", ON_RECIPE, (RECIPE_FILE, "names and values"), recipe("")),
    Case("recipe-unknown-key", ON_RECIPE, (RECIPE_FILE, "kv_cash"), recipe("kv_cash: 0.5")),
    Case("recipe-unknown-number", ON_RECIPE, (RECIPE_FILE, "7"), recipe("7: 0.5")),
    Case("recipe-wrong-kind", ON_RECIPE, (RECIPE_FILE, "kv_cache", "'half'"), recipe("kv_cache: half")),
    Case("recipe-wrong-kind-list", ON_RECIPE, (RECIPE_FILE, "seed", "[1]"), recipe("seed: [1]")),
    Case("recipe-wrong-choice", ON_RECIPE, (RECIPE_FILE, "rope", "'spiral'"), recipe("rope: spiral")),
    Case("recipe-out-of-range", ON_RECIPE, (RECIPE_FILE, "kv_cache", "nan"), recipe("kv_cache: .nan")),
    Case("recipe-beside-options", f"{ON_RECIPE} --seed 1", (RECIPE_FILE, "kv_cash"), recipe("kv_cash: 0.5")),
    Case("recipe-plan", f"{PLAN} --recipe {RECIPE_FILE}", (RECIPE_FILE, "kv_cash"), recipe("kv_cash: 0.5")),
]

PLANS = [
    Case("plan-missing", ON_PLAN, (PLAN_FILE,)),
    Case("plan-is-a-recipe", ON_PLAN, (PLAN_FILE,), file("plan.yaml", "kv_cache: 0.5")),
    Case("plan-broken-yaml", ON_PLAN, (PLAN_FILE,), file("plan.yaml", "layers: [")),
    Case("plan-a-list", ON_PLAN, (PLAN_FILE, "names and values"), file("plan.yaml", "[1]")),
    Case("plan-of-fewer-layers", ON_PLAN, ("4 layers", "5"), plan(lambda planned: planned["layers"].pop())),
    Case(
        "plan-bad-recipe", ON_PLAN, (PLAN_FILE, "kv_cache"), plan(lambda planned: planned["recipe"].update(kv_cache=2))
    ),
    Case("plan-size-word", ON_PLAN, (PLAN_FILE, "layers.2.kv_rank"), planned_layer(kv_rank="twelve")),
    Case("plan-rank-negative", ON_PLAN, (PLAN_FILE, "layers.2"), planned_layer(kv_rank=-12, rope_dims=28)),
    Case("plan-rope-dims-odd", ON_PLAN, ("layer", "2", "rope_dims"), planned_layer(kv_rank=13, rope_dims=3)),
    Case(
        "plan-rope-dims-large", ON_PLAN, ("layer", "2", "34"), planned_layer(kv_rank=2, rope_dims=34, cached_numbers=36)
    ),
    Case("plan-rank-large", ON_PLAN, ("layer", "2", "65"), planned_layer(kv_rank=65, rope_dims=4, cached_numbers=69)),
    Case("plan-without-choices", ON_PLAN, (PLAN_FILE, "layers.2"), planned_layer(rope_choices=[])),
    Case("plan-with-a-recipe", f"{ON_PLAN} --recipe {RECIPE_FILE}", ("--plan",), recipe("seed: 1")),
    Case("plan-with-an-option", f"{ON_PLAN} --kv-cache 0.5", ("--plan",), plan(lambda planned: None)),
]
