"""Bad recipes and plans."""

from tests.damage import ON_PLAN, ON_RECIPE, PLAN, Case, file, folder, plan, planned_layer, recipe

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


def of_recipe(name: str, content: bytes | str, *words: str) -> Case:
    return Case(f"recipe-{name}", f"{PLAN} --recipe {RECIPE_FILE}", (RECIPE_FILE, *words), recipe(content))


def of_plan(name: str, content: bytes | str, *words: str) -> Case:
    return Case(f"plan-{name}", ON_PLAN, (PLAN_FILE, *words), file("plan.yaml", content))


BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(8 * [f'*{old}'])}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
WRONG = {"kv_cache": '"0.5"', "rope": "7", "rope_dims": "2.0", "kv_rank": "true", "factorization": "[qr]"} | {
    "expected_rotation": "1",
    "calibration": "7",
    "calibration_tokens": '"4096"',
    "calibration_length": "64.5",
    "device": "[cpu]",
    "dtype": "float8",
    "seed": "{}",
}
OUT_OF_RANGE = {
    "kv_cache": (".inf", "-.inf", "0", "-1", "1e400"),
    "rope_dims": ("-2", 400 * "9"),
    "kv_rank": ("0", "-1", 400 * "9"),
    "calibration": ('""',),
    "calibration_tokens": ("0", "255", 30 * "9"),
    "calibration_length": ("7", 30 * "9"),
    "device": (100 * "a",),
    "seed": ("-1", 30 * "9"),
}
TAG = '!!python/object/apply:os.mkdir ["loaded"]'
ODD_YAML: list[tuple[str, bytes | str, tuple[str, ...]]] = [
    ("python-tag", f"device: {TAG}", ("python/object",)),
    ("python-name", "device: !!python/name:os.system", ("python/name",)),
    ("python-tag-as-all", TAG, ("python/object",)),
    ("unknown-tag", "device: !evil cpu", ("!evil",)),
    ("alias-bomb", BOMB, ("aliases", "line 2")),
    ("alias", "rope: &a high\nfactorization: *a", ("aliases", "line 2")),
    ("alias-to-itself", "&a rope: [*a]", ("aliases",)),
    ("name-twice", "seed: 1\nkv_cache: 0.5\nseed: 2", ("'seed'", "twice", "line 3")),
    ("merge-of-nothing", "<<: 7", ()),
    ("date-of-no-day", "seed: 2001-99-99", ()),
    ("number-of-no-kind", "seed: !!int x", ()),
    ("bool-of-no-kind", "seed: !!bool x", ()),
    ("date-of-no-kind", "seed: !!timestamp x", ()),
    ("number-empty", 'seed: !!int ""', ()),
    ("digits", f"seed: {5000 * '9'}", ()),
    ("float-empty", 'seed: !!float ""', ()),
    ("name-a-list", "? [a]\n: 1", ()),
    ("name-null", "~: 1", ("None",)),
    ("name-bool", "yes: 1", ("True",)),
    ("name-unprintable", '"\\e[2J": 1', ("x1b",)),
    ("name-long", f"? {5000 * 'a'}\n: 1", ("aaa",)),
    ("two-documents", "seed: 1\n---\nseed: 2", ()),
    ("nul", b"seed: 1\0", ()),
    ("utf16", "seed: 1".encode("utf-16"), ()),
    ("bytes", bytes(range(256)), ()),
    ("tab", "seed:\n\t1", ("line 2",)),
    ("text", "just words", ("names and values",)),
    ("number", "7", ("names and values",)),
    ("large", (2 << 20) * b"#", ("1 MiB", "too large")),
]
RECIPES += [
    *(of_recipe(f"{name}-wrong", f"{name}: {value}", name) for name, value in WRONG.items()),
    *(
        of_recipe(f"{name}-out-{index}", f"{name}: {value}", name)
        for name, values in OUT_OF_RANGE.items()
        for index, value in enumerate(values)
    ),
    *(of_recipe(name, content, *words) for name, content, words in ODD_YAML),
    Case("recipe-endless", f"{PLAN} --recipe /dev/zero", ("/dev/zero", "too large")),
    Case("recipe-text-of-nobody", ON_RECIPE, ("~nobody-knows/text",), recipe("calibration: ~nobody-knows/text.txt")),
    Case("recipe-text-nul", ON_RECIPE, ("text", "a\\x00b"), recipe('calibration: "a\\0b.txt"')),
    Case("recipe-text-half-character", ON_RECIPE, ("calibration", "ud800"), recipe('calibration: "\\ud800.txt"')),
    Case("recipe-device-nul", ON_RECIPE, ("--device",), recipe('device: "cpu\\0"')),
]
PLANS += [
    *(of_plan(name, content) for name, content, _ in ODD_YAML),
    of_plan("layers-null", "model: m\nrecipe: {}\nlayers: null", "layers"),
    of_plan("layers-a-number", "model: m\nrecipe: {}\nlayers: 7", "layers"),
    of_plan("layers-of-text", "model: m\nrecipe: {}\nlayers: [x]", "layers.0"),
    of_plan("model-a-list", "model: [m]\nrecipe: {}\nlayers: []", "model"),
    of_plan("recipe-a-list", "model: m\nrecipe: [1]\nlayers: []", "recipe"),
    of_plan("unknown-key", "model: m\nrecipe: {}\nlayers: []\nextra: 1", "extra"),
    Case("plan-of-no-layers", ON_PLAN, ("0 layers", "5"), file("plan.yaml", "model: m\nrecipe: {}\nlayers: []")),
    Case("plan-unknown-key-of-recipe", ON_PLAN, (PLAN_FILE, "kv_cash"), plan(lambda p: p["recipe"].update(kv_cash=1))),
    Case("plan-layer-null", ON_PLAN, ("layer 2", "attention"), plan(lambda p: p["layers"].__setitem__(2, None))),
    Case("plan-layer-unknown-key", ON_PLAN, (PLAN_FILE, "layers.2.extra"), planned_layer(extra=1)),
    Case("plan-rank-text", ON_PLAN, (PLAN_FILE, "layers.2.kv_rank"), planned_layer(kv_rank="12")),
    Case("plan-rank-fraction", ON_PLAN, (PLAN_FILE, "layers.2.kv_rank"), planned_layer(kv_rank=12.5)),
    Case("plan-rank-bool", ON_PLAN, (PLAN_FILE, "layers.2.kv_rank"), planned_layer(kv_rank=True)),
    Case("plan-numbers-huge", ON_PLAN, (PLAN_FILE, "layers.2.cached_numbers"), planned_layer(cached_numbers=10**30)),
    Case("plan-numbers-zero", ON_PLAN, (PLAN_FILE, "layers.2.cached_numbers"), planned_layer(cached_numbers=0)),
    Case("plan-choices-text", ON_PLAN, (PLAN_FILE, "layers.2.rope_choices"), planned_layer(rope_choices="24")),
    Case("plan-choices-odd", ON_PLAN, (PLAN_FILE, "layers.2.rope_choices"), planned_layer(rope_choices=[3])),
    Case("plan-choices-negative", ON_PLAN, (PLAN_FILE, "layers.2.rope_choices"), planned_layer(rope_choices=[-2])),
    Case("plan-sizes-do-not-add-up", ON_PLAN, (PLAN_FILE, "layers.2", "add up"), planned_layer(kv_rank=3, rope_dims=2)),
]
