import math
from fractions import Fraction

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from ticketfind import TicketfindError, layers, readers
from ticketfind.layers import from_layers
from ticketfind.readers import Duration
from ticketfind.recipe import Recipe, RecipeError

# ------------------------------------------------------------------------------------- round trips

durations = st.one_of(
    st.integers(1, 10**6),
    st.integers(1, 10**6).map(lambda n: f"{n}it"),
    st.floats(1e-3, 1e7).map(lambda x: f"{x}ep"),
    st.floats(0, 100).map(lambda x: f"{x:.9f}%"),
)
texts = st.text(min_size=1) | st.sampled_from(
    ["1e-3", "08", "1_0", ".5", "1:30", "off", "null", "~", "5%", "a: b", "#"]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
fractions = st.floats(0.001, 0.999)
some_layers = st.fixed_dictionaries(
    {},
    optional={
        "name": st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", fullmatch=True),
        "model": st.fixed_dictionaries(
            {}, optional={"spec": texts, "args": st.dictionaries(texts, values, max_size=3), "checkpoint": texts}
        ),
        "data": st.fixed_dictionaries({}, optional={"spec": texts, "validation": fractions | st.integers(1)}),
        "train": st.fixed_dictionaries(
            {},
            optional={
                "iterations": st.integers(1, 10**6) | st.floats(1e-3, 1e7).map(lambda x: f"{x}ep"),
                "lr": st.floats(1e-300, 1e300),
                "warmup": durations,
                "milestones": st.lists(durations, max_size=3),
            },
        ),
        "prune": st.fixed_dictionaries(
            {},
            optional={
                "fraction": fractions | st.dictionaries(texts, fractions, min_size=1, max_size=3),
                "rewind": durations | st.just("lr"),
                "until": fractions,
                "skip": st.lists(texts, max_size=3),
            },
        ),
        "run": st.fixed_dictionaries({}, optional={"seed": st.integers(0, 2**63 - 1), "tolerance": st.floats(0, 9)}),
    },
)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(some_layers)
def test_a_recipe_reads_back_equal_from_plain_values_and_from_yaml(layer):
    asked = from_layers(layer)
    assert from_layers(asked.plain()) == asked
    again = from_layers(layers.parse_value(layers.to_yaml(asked)))
    assert again == asked
    assert list(again.prune.fraction) == list(asked.prune.fraction)  # the order decides: the last match counts


def test_a_recipe_file_reads_back_equal(tmp_path):
    asked = from_layers({"model": {"spec": "naïve.py:größe", "args": {"tag": "1e-3"}}, "train": {"lr": 1e-7}})
    (tmp_path / "r.yaml").write_text(layers.to_yaml(asked), encoding="utf-8")
    assert from_layers(layers.read_layer(tmp_path / "r.yaml")) == asked


def test_the_default_recipe_is_what_an_empty_one_gives():
    assert from_layers() == Recipe() == from_layers({}, {"train": {}})


# ------------------------------------------------------------------------------------- shipped recipes


@pytest.mark.parametrize(  # facts.md, "The paper: protocols"; iterations, batch, optimizer, lr, fractions
    ("name", "iterations", "batch_size", "optimizer", "lr", "fraction", "scope"),
    [
        ("digits", 1000, 60, "adam", 1.2e-3, {"*": 0.2, "fc3.*": 0.1}, "layer"),
        ("lenet-300-100", 50_000, 60, "adam", 1.2e-3, {"*": 0.2, "fc3.*": 0.1}, "layer"),
        ("conv-2", 20_000, 60, "adam", 2e-4, {"conv*": 0.1, "fc*": 0.2, "fc3.*": 0.1}, "layer"),
        ("conv-4", 25_000, 60, "adam", 3e-4, {"conv*": 0.1, "fc*": 0.2, "fc3.*": 0.1}, "layer"),
        ("conv-6", 30_000, 60, "adam", 3e-4, {"conv*": 0.15, "fc*": 0.2, "fc3.*": 0.1}, "layer"),
        ("resnet-20", 30_000, 128, "sgd", 0.1, {"*": 0.2}, "global"),
        ("resnet-20-warmup", 30_000, 128, "sgd", 0.03, {"*": 0.2}, "global"),
        ("vgg-19", 112_480, 64, "sgd", 0.1, {"*": 0.2}, "global"),
    ],
)
def test_shipped_recipes_are_the_papers(name, iterations, batch_size, optimizer, lr, fraction, scope):
    found = from_layers(layers.find_layer(name)).resolved(train_size=45_000, validation=5_000, device="cpu")
    assert found.name == name
    assert int(found.train.iterations) == iterations
    assert (found.train.batch_size, found.train.optimizer, found.train.lr) == (batch_size, optimizer, lr)
    assert (found.prune.fraction, found.prune.scope) == (fraction, scope)
    assert found.run.replicates == 5
    if optimizer == "sgd":
        assert (found.train.momentum, found.train.weight_decay) == (0.9, 1e-4)


def test_every_shipped_recipe_is_tested_above():
    assert sorted(layers.shipped()) == sorted(
        ["digits", "lenet-300-100", "conv-2", "conv-4", "conv-6", "resnet-20", "resnet-20-warmup", "vgg-19"]
    )


@pytest.mark.parametrize(
    ("name", "milestones"),
    [("resnet-20", [20_000, 25_000]), ("resnet-20-warmup", [20_000, 25_000]), ("vgg-19", [56_250, 84_375])],
)  # vgg-19: epochs 80 and 120 of 45,000 / 64 iterations
def test_milestones_of_the_shipped_recipes(name, milestones):
    found = from_layers(layers.find_layer(name)).resolved(train_size=45_000, validation=1, device="cpu")
    assert list(map(int, found.train.milestones)) == milestones


# ------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1.2e-3", 0.0012),
        ("-1E+3", -1000.0),
        ("1e5", 1e5),
        (".5", 0.5),
        ("1.", 1.0),
        ("10", 10),
        ("1_000", 1000),
        ("[1e-3, 2]", [0.001, 2]),
        ("{lr: 1e-3}", {"lr": 0.001}),
        ("'1e-3'", "1e-3"),
        ("5%", "5%"),
        ("2ep", "2ep"),
        ("1e", "1e"),
        ("e1", "e1"),
        ("null", None),
        ("true", True),
        ("2024-01-01", "2024-01-01"),
        ("[1, ", "[1, "),  # no YAML: stays a text
    ],
)
def test_values_are_read_as_people_write_them(text, value):
    found = layers.parse_value(text)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("raw", "read", "written"),
    [
        (500, Duration(500), "500it"),
        ("500", Duration(500), "500it"),
        ("500it", Duration(500), "500it"),
        (1e3, Duration(1000), "1000it"),
        ("1e3 it", Duration(1000), "1000it"),
        ("0it", Duration(0), "0it"),
        ("2ep", Duration(2, "ep"), "2ep"),
        ("0.5ep", Duration(0.5, "ep"), "0.5ep"),
        ("1234567.5ep", Duration(1234567.5, "ep"), "1234567.5ep"),
        ("1e+06ep", Duration(1e6, "ep"), "1000000ep"),
        ("5 %", Duration(5, "%"), "5%"),
    ],
)
def test_durations(raw, read, written):
    assert readers.duration(raw) == read
    assert str(read) == written


@pytest.mark.parametrize("raw", ["", "-1", "1.5", "1.5it", "2 epochs", "it", "1e-3", True, None, [500], math.nan, "%"])
def test_no_durations(raw):
    with pytest.raises(ValueError, match="iterations"):
        readers.duration(raw)


@pytest.mark.parametrize(
    ("written", "iterations"), [("500it", 500), ("2ep", 200), ("0.25ep", 25), ("5%", 50), ("0.05%", 0), ("0.06%", 1)]
)
def test_durations_in_iterations(written, iterations):
    assert int(readers.duration(written).resolved(per_epoch=100, total=1000)) == iterations


@pytest.mark.parametrize(("raw", "value"), [(0.05, 0.05), ("5%", 0.05), (" 5.5 %", 0.055), (".5%", 0.005)])
def test_weights_remaining(raw, value):
    assert readers.remaining(raw) == pytest.approx(value)


# -------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        *[("prune.fraction", bad, "a fraction between 0 and 1") for bad in (0, 1, -0.1, 1.5, "a", True, math.nan)],
        ("prune.fraction", {}, "a fraction, or a mapping from glob to fraction"),
        ("prune.fraction", {"*": 1}, "a fraction from 0 up to, but not including, 1"),
        *[("prune.rounds", bad, "a whole number of at least 1") for bad in (0, -1, 1.5, "3", True)],
        *[("prune.until", bad, "weights remaining, as 0.05 or 5%") for bad in (0, 1, "0%", "100%", "1.2.3%", "x")],
        ("prune.scope", "tensor", "one of layer, global"),
        ("prune.score", "magnitud", "one of magnitude, small_final, large_init, "),
        ("prune.rewind", "soon", "0it, an iteration (500it), an epoch (2ep), a share (2%) or lr"),
        ("prune.skip", 3, "a list of globs"),
        ("prune.allow_collapse", "yes", "true or false"),
        *[("train.lr", bad, "a number above 0") for bad in (0, -1, "fast", math.inf, math.nan, None)],
        ("train.momentum", 1, "a fraction from 0 up to, but not including, 1"),
        ("train.weight_decay", -1, "a number of at least 0"),
        *[("train.iterations", bad, "at least one iteration") for bad in (0, "0ep", "50%")],
        ("train.iterations", "ten", "a number of iterations (500), epochs (2ep)"),
        ("train.batch_size", 0, "a whole number of at least 1"),
        ("train.optimizer", "lion", "one of adam, adamw, sgd"),
        ("train.milestones", 5, "a list of iterations"),
        ("train.loss", "mse", "module:name or file.py:name"),
        *[("data.validation", bad, "a number of examples (5000) or a fraction") for bad in (0, 1.5, -3, "x", math.nan)],
        ("model.spec", "", "a text"),
        ("model.args", ["a"], "a mapping from names to plain values"),
        ("model.args", {1: 2}, "a mapping from names to plain values"),
        ("model.args", {"x": {1: 2}}, "a mapping from names to plain values"),
        ("run.seed", -1, "a whole number of at least 0"),
        ("run.seed", 2**63, "a whole number of at least 0 and at most 9223372036854775807"),
        ("run.replicates", 0, "a whole number of at least 1"),
    ],
)
def test_a_bad_value_is_named_with_its_key_and_what_was_expected(key, value, expected):
    with pytest.raises(RecipeError) as error:
        from_layers(layers.nested({key: value}))
    assert str(error.value).startswith(f"{key}: expected {expected}")
    assert repr(value) in str(error.value)


def test_all_faults_are_reported_at_once():
    layer = {
        "name": "../up",
        "trian": {"lr": 1},
        "model": "resnet18",
        "train": {"itterations": 5, "lr": "fast", "batch_size": 0},
        "prune": {"rounds": 0, "fraction": {"*": 2}},
    }
    with pytest.raises(RecipeError) as error:
        from_layers(layer, {"run": {"seeds": 3}}, where="my.yaml")
    lines = str(error.value).splitlines()
    assert all(line.startswith("my.yaml: ") for line in lines)
    named = {line.split(": ")[1] for line in lines}
    of_train = {"train.itterations", "train.lr", "train.batch_size"}
    assert named == {"name", "trian", "model", *of_train, "prune.rounds", "prune.fraction", "run.seeds"}


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"trian": {}}, "trian: unknown key; did you mean train"),
        ({"train": {"itterations": 5}}, "train.itterations: unknown key; did you mean iterations"),
        ({"run": {"xyzzy": 5}}, "run.xyzzy: unknown key"),
        ({"train": None}, "train: expected a mapping, found None"),
        ([], "recipe: expected a mapping of sections (model, data, train, prune, run)"),
    ],
)
def test_unknown_keys_and_wrong_sections(layer, message):
    with pytest.raises(RecipeError) as error:
        from_layers(layer)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("name", ["", "a/b", "..", "-x", "a b", 3])
def test_a_name_must_be_that_of_a_folder(name):
    with pytest.raises(RecipeError, match="name: expected letters"):
        from_layers({"name": name})


def test_a_long_wrong_value_is_cut():
    with pytest.raises(RecipeError) as error:
        from_layers({"model": {"args": "x" * 1000}})
    assert len(str(error.value)) < 200


# ------------------------------------------------------------------------------------------ resolving


def resolve(layer, train_size=1000, validation=100):
    return from_layers(layer).resolved(train_size=train_size, validation=validation, device="cpu")


def test_a_resolved_recipe_has_nothing_left_implicit():
    found = resolve({"train": {"iterations": "4ep", "batch_size": 64, "eval_every": "1ep", "warmup": "10%"}})
    assert int(found.train.iterations) == round(4 * 1000 / 64)
    assert (int(found.train.eval_every), int(found.train.warmup)) == (16, 6)
    assert int(found.prune.rewind) == 1  # 2 % of the training, from scratch
    assert (found.data.validation, found.run.device) == (100, "cpu")


def test_resolving_twice_changes_nothing():
    once = resolve({"train": {"schedule": "step", "milestones": ["2ep", "50%"], "warmup": "3%"}})
    assert once.resolved(train_size=1000, validation=100, device="cpu") == once
    assert from_layers(layers.parse_value(layers.to_yaml(once))) == once


@pytest.mark.parametrize(
    ("layer", "rewind"),
    [
        ({"model": {"checkpoint": "w.pt"}}, Duration(0)),
        ({"model": {"args": {"pretrained": True}}}, Duration(0)),
        ({"model": {"args": {"pretrained": False}}, "train": {"iterations": 1000}}, Duration(20)),
        ({"train": {"iterations": 1000}}, Duration(20)),
        ({"train": {"iterations": 1000}, "prune": {"rewind": "1ep"}}, Duration(8)),
        ({"prune": {"rewind": "lr"}}, "lr"),
    ],
)
def test_the_rewind_point(layer, rewind):
    assert resolve(layer).prune.rewind == rewind


def test_evaluations_are_never_less_than_an_iteration_apart():
    assert int(resolve({"train": {"iterations": 10, "eval_every": "1%"}}).train.eval_every) == 1


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"prune": {"rewind": "100it"}}, "prune.rewind: expected an iteration before the end of the training (100)"),
        ({"prune": {"rewind": "100%"}}, "prune.rewind: expected an iteration before the end of the training (100)"),
        ({"prune": {"rewind": "13ep"}}, "prune.rewind: expected an iteration before the end of the training (100)"),
        ({"train": {"batch_size": 1001}}, "train.batch_size: expected at most the 1000 training examples, found 1001"),
        ({"train": {"iterations": "0.01ep"}}, "train.iterations: expected at least 1, found 0.01ep = 0 iterations"),
        ({"prune": {"rounds": None}}, "prune.rounds: expected a number where prune.until is not given"),
        ({"train": {"momentum": 0.9}}, "train.momentum: expected 0 for adamw, found 0.9"),
        ({"train": {"milestones": [5]}}, "train.milestones: expected with schedule step, and only there, found 1"),
        ({"train": {"schedule": "step"}}, "train.milestones: expected with schedule step, and only there, found 0"),
        (
            {"train": {"iterations": "30ep", "command": "x {out} {iterations:d}"}},
            "train.iterations: expected a number (--iterations N) beside {iterations} in train.command, found 30ep",
        ),
        (
            {"train": {"iterations": "30ep", "command": "x {out} {{{iterations}}}"}},
            "train.iterations: expected a number (--iterations N) beside {iterations} in train.command, found 30ep",
        ),
        (
            {"train": {"iterations": "30ep", "command": "x {out}"}, "prune": {"rewind": "5%"}},
            "prune.rewind: expected iterations (500it) or lr, as a training of your own has no known length, found 5%",
        ),
    ],
)
def test_a_recipe_that_contradicts_itself_or_the_data(layer, message):
    with pytest.raises(RecipeError) as error:
        resolve({"train": {"iterations": 100} | layer.get("train", {}), "prune": layer.get("prune", {})})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("iterations", "command"),
    [(30, "x {out} {iterations}"), (1, "x {out} {iterations}"), ("30ep", "x {out} {{iterations}}")],
)
def test_how_long_a_command_trains_where_it_is_told_so(iterations, command):
    found = resolve({"train": {"iterations": iterations, "command": command}, "run": {"replicates": 2}})
    assert int(found.train.iterations) == (1 if iterations == "30ep" else iterations)


def test_contradictions_too_are_reported_at_once():
    with pytest.raises(RecipeError) as error:
        resolve({"train": {"iterations": 5, "batch_size": 2000, "momentum": 0.9}, "prune": {"rewind": 5}})
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == [
        "train.momentum",
        "train.batch_size",
        "prune.rewind",
    ]


# -------------------------------------------------------------------------- layers, files, differences


@pytest.mark.parametrize("tenths", [7, 41, 290, 333, 570, 999])
def test_a_percentage_is_the_number_nearest_to_it(tenths: int):
    """So that a round that leaves exactly so much is the last."""
    asked = from_layers({"prune": {"until": f"{tenths / 10}%", "rounds": None}})
    assert asked.prune.until == float(Fraction(tenths, 1000))


def test_later_layers_win_and_mappings_are_replaced_whole():
    found = from_layers(
        {"name": "a", "train": {"lr": 1, "batch_size": 7}, "prune": {"fraction": {"*": 0.2, "fc*": 0.1}}},
        {"train": {"lr": 2}, "prune": {"fraction": 0.5}},
    )
    assert (found.name, found.train.lr, found.train.batch_size, found.prune.fraction) == ("a", 2.0, 7, {"*": 0.5})
    args = from_layers({"model": {"args": {"a": 1, "b": 2}}}, {"model": {"args": {"b": 3}}}).model.args
    assert args == {"b": 3}


def test_nested_settings():
    assert layers.nested({"train.lr": 1, "train.loss": "a:b", "name": "x"}) == {
        "train": {"lr": 1, "loss": "a:b"},
        "name": "x",
    }


def test_differences_name_the_keys():
    a = from_layers({"name": "a", "train": {"lr": 0.1}})
    b = from_layers({"name": "b", "train": {"lr": 0.2}, "prune": {"rewind": "3it"}})
    assert list(layers.differences(a, a)) == []
    assert list(layers.differences(a, b)) == [
        "name: b there, a here",
        "train.lr: 0.2 there, 0.1 here",
        "prune.rewind: '3it' there, None here",
    ]


def test_fractions_in_another_order_are_another_recipe():
    a, b = (from_layers({"prune": {"fraction": dict(items)}}) for items in ([("*", 0.2), ("f", 0.1)],) * 2)
    assert list(layers.differences(a, b)) == []
    c = from_layers({"prune": {"fraction": {"f": 0.1, "*": 0.2}}})
    assert [text.split(":")[0] for text in layers.differences(a, c)] == ["prune.fraction"]


def test_a_recipe_file_is_called_after_itself_unless_it_says_otherwise(tmp_path):
    (tmp_path / "my recipe.yaml").write_text("train: {lr: 1e-3}\n")
    (tmp_path / "b.yml").write_text("name: other\n")
    found = from_layers(layers.find_layer(str(tmp_path / "my recipe.yaml")))
    assert (found.name, found.train.lr) == ("my-recipe", 1e-3)
    assert from_layers(layers.find_layer(str(tmp_path / "b.yml"))).name == "other"


def test_an_empty_recipe_file_is_the_default_recipe(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert from_layers(layers.read_layer(tmp_path / "empty.yaml")) == Recipe()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n- b\n", "expected a mapping of sections"),
        (b"just text", "expected a mapping of sections"),
        (b"train: {lr: 1\n", "expected a YAML recipe"),
        (b"\xff\xfe\x00", "expected a YAML recipe"),
        (b"a: !!python/object/apply:os.getcwd []", "expected a YAML recipe"),
    ],
)
def test_files_that_are_no_recipes(tmp_path, content, message):
    file = tmp_path / "r.yaml"
    file.write_bytes(content)
    with pytest.raises(TicketfindError, match=message) as error:
        layers.find_layer(str(file))
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "digit",
            "recipe 'digit': expected a shipped recipe (conv-2, conv-4, conv-6, digits, lenet-300-100, resnet-20",
        ),
        ("digit", "did you mean digits?"),
        ("missing.yaml", "missing.yaml: cannot read the recipe: No such file or directory"),
    ],
)
def test_recipes_that_are_not_there(name, message):
    with pytest.raises(TicketfindError) as error:
        layers.find_layer(name)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("asked", "name", "lr"),
    [
        ((None, None, None), "digits", 1.2e-3),
        (("conv-2", None, None), "conv-2", 2e-4),
        ((None, "conv-4", "x/y.npz"), "conv-4", 3e-4),  # the recipe that is called as the model is
        ((None, None, "/data/fashion/"), "fashion", 1e-3),
        ((None, "resnet10t", "/data/fashion/"), "resnet10t-fashion", 1e-3),
        ((None, "hf-hub:timm/resnet18", None), "resnet18", 1e-3),
        ((None, "dir/net.py:make", "a.npz"), "net.py-make-a.npz", 1e-3),
    ],
)
def test_where_a_search_starts_from(asked, name, lr):
    found = from_layers(*layers.base_layers(*asked))
    assert (found.name, found.train.lr) == (name, lr)


def test_code_specs_are_those_that_would_import_something():
    layer = {
        "model": {"spec": "hf-hub:timm/resnet18"},
        "data": {"spec": "d.py:f"},
        "train": {"loss": "m:l", "metric": "m:m"},
        "prune": {"score": "s:s"},
    }
    found = from_layers(layer)
    keys = ["model.spec", "data.spec", "train.loss", "train.metric", "prune.score"]  # the hub is asked for the model
    assert list(found.code_specs()) == keys
    assert "prune.score" not in found.code_specs(score=False)
    assert from_layers().code_specs() == {}
