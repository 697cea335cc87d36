"""Recipes and sweeps: parsing, overrides, inheritance, and error messages."""

from pathlib import Path

import pytest

from sslrun.errors import UserError
from sslrun.recipe import load, load_sweep, parse
from sslrun.recipe.places import Located, read_yaml

GOOD = """\
name: mine
backbone: {name: resnet18, stem: small}
pretext:
  name: simclr
  temperature: 0.5
data: digits
pretrain: {epochs: 2, batch: 64, lr: 1e-3}
evaluate:
  digits:
    protocols: [probe, finetune, lpft]
    labels: [0.1, 1.0]
    finetune: {lr: 0.02}
finetune: {epochs: 3, batch: 32, optimizer: adamw, lr: 0.01}
lpft: {lr: 0.001}
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "mine.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def message(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_every_section_is_read(write):
    recipe = load(write(GOOD))
    assert recipe.backbone.name == "resnet18"
    assert recipe.backbone.options.stem == "small"
    assert recipe.pretext.options.temperature == 0.5
    assert recipe.pretrain.lr == 1e-3  # a string in YAML 1.1
    assert recipe.evaluate["digits"].labels == (0.1, 1.0)


def test_merging_keeps_a_name_with_a_dot_as_one_key(write):
    text = GOOD.replace("labels: [0.1, 1.0]", "shifts: {CIFAR-10.1: {corruption: fog}}")
    shifts = load(
        write(text), ["evaluate.digits.shifts={CIFAR-10.1: {severity: 5}, b.2: contrast}"]
    )
    assert {
        name: (shift.corruption, shift.severity)
        for name, shift in shifts.evaluate["digits"].shifts.items()
    } == {
        "CIFAR-10.1": ("fog", 5),
        "b.2": ("contrast", 3),
    }


def test_a_name_with_a_colon_sets_the_components_shorthand_option(write):
    text = "name: mine\ndata: {name: world, length: 32}\nbackbone: BACKBONE\n"
    assert (
        load(write(text.replace("BACKBONE", "hf:google/bert_tiny"))).backbone.options.model
        == "google/bert_tiny"
    )
    recipe = load(
        write(text.replace("BACKBONE", "{name: 'hf:tiny', pretrained: false}"))
    ).backbone.options
    assert (recipe.model, recipe.pretrained) == ("tiny", False)
    images = load(write("name: mine\ndata: hub:owner/photos\nbackbone: resnet18\n"))
    assert (images.data.name, images.data.options.hub) == ("hub", "owner/photos")
    assert "no such backbone: 'gpt-tiny:x'" in message(
        load, write(text.replace("BACKBONE", "gpt-tiny:x"))
    )


def test_evaluations_inherit_protocol_options_and_lpft_those_of_finetune(write):
    options = load(write(GOOD)).evaluate["digits"].options
    assert (options["finetune"].epochs, options["finetune"].lr) == (3, 0.02)
    assert (options["scratch"].epochs, options["scratch"].lr) == (3, 0.02)
    assert (options["lpft"].epochs, options["lpft"].lr) == (3, 0.001)


def test_restarts_apply_to_gradient_trained_protocols(write):
    text = """\
name: mine
data: {name: world, length: 32}
backbone: lstm
evaluate:
  world-sentiment: {restarts: 3, protocols: [probe]}
  by-sgd: {restarts: 3, protocols: [probe], data: world-sentiment, probe: {solver: sgd}}
  mixed: {restarts: 3, protocols: [probe], data: world-sentiment, task: {pool: mixture}}
  world-span: {restarts: 3, protocols: [probe]}
"""
    evaluate = load(write(text)).evaluate
    restarts = {
        name: [evaluation.restarts_of(one) for one in ("knn", "probe", "lpft")]
        for name, evaluation in evaluate.items()
    }
    assert restarts == {
        "world-sentiment": [1, 1, 3],
        "by-sgd": [1, 3, 3],
        "mixed": [1, 3, 3],
        "world-span": [1, 3, 3],
    }


def test_steps_replace_inherited_epochs(write):
    options = load(write(GOOD + "scratch: {steps: 7}\n")).evaluate["digits"].options
    assert (options["scratch"].epochs, options["scratch"].steps) == (None, 7)


def test_resolved_recipe_reads_back_equal(write):
    recipe = load(write(GOOD))
    again = parse(Located(recipe.resolved(), {(): "resolved"}))
    assert again == recipe


def test_overrides_change_and_add_values(write):
    path = write(GOOD)
    recipe = load(
        path, ["pretrain.epochs=5", "backbone.stem=imagenet", "evaluate.digits.labels=[1.0]"]
    )
    assert recipe.pretrain.epochs == 5
    assert recipe.backbone.options.stem == "imagenet"
    assert recipe.evaluate["digits"].labels == (1.0,)
    assert load(path, ["pretext=null"]).pretext is None


def test_another_component_discards_the_options_of_the_old_one(write):
    recipe = load(write(GOOD), ["pretext={name: rotation}"])
    assert recipe.pretext.name == "rotation"
    kept = load(write(GOOD), ["pretext={temperature: 0.1}"])
    assert (kept.pretext.name, kept.pretext.options.temperature) == ("simclr", 0.1)


def test_overrides_add_options_to_a_bare_component_name(write):
    path = write(GOOD)
    assert load(path, ["data.size=16"]).data.options.size == 16
    assert load(path, ["data={size: 16}"]).data.options.size == 16
    changed = load(path, ["pretext=rotation", "pretext.turns=2"])
    assert (changed.pretext.name, changed.pretext.options.turns) == ("rotation", 2)
    error = message(load, path, ["data.sice=16"])
    assert (
        error
        == "override data.sice=16: data.sice: no such option of 'digits'. Did you mean 'size'?"
    )


@pytest.mark.parametrize(
    ("old", "new", "line", "parts"),
    [
        (
            "temperature",
            "temprature",
            5,
            ["pretext.temprature", "no such option of 'simclr'", "'temperature'"],
        ),
        ("name: simclr", "name: simclear", 3, ["no such pretext: 'simclear'", "'simclr'"]),
        ("resnet18", "resnet81", 2, ["no such backbone", "'resnet18'"]),
        ("data: digits", "data: digit", 6, ["no such data", "'digits'"]),
        ("epochs: 2", "epoch: 2", 7, ["pretrain.epoch", "'epochs'"]),
        ("epochs: 2", "epochs: two", 7, ["pretrain.epochs", "number", "'two'"]),
        ("epochs: 2", "epochs: -1", 7, ["pretrain.epochs", "greater than 0"]),
        ("batch: 64", "batch: 0", 7, ["pretrain.batch", "not 0"]),
        ("lr: 1e-3", "betas: [1.5, 0.9]", 7, ["pretrain.betas", "less than 1, not 1.5"]),
        (
            "lr: 1e-3",
            "schedule: step, milestones: [30, 60]",
            7,
            ["pretrain.milestones", "less than 1, not 30"],
        ),
        ("lr: 0.02", "lr: []", 12, ["finetune.lr"]),
        ("lr: 0.02", "lr: -1", 12, ["finetune.lr", "greater than 0, not -1"]),
        ("lr: 0.02", "lr: [0.1, 0]", 12, ["finetune.lr", "should be greater than 0, not 0"]),
        (
            "temperature: 0.5",
            "augmentation: {crop: [8, 100]}",
            5,
            ["augmentation.crop", "less than or equal to 1, not 8"],
        ),
        (
            "temperature: 0.5",
            "augmentation: {crop: [1.0, 0.2]}",
            5,
            ["augmentation.crop", "the smallest value first, then the largest"],
        ),
        (
            "temperature: 0.5",
            "augmentation: {ratio: [0, 1]}",
            5,
            ["augmentation.ratio", "greater than 0"],
        ),
        (
            "temperature: 0.5",
            "augmentation: {sigma: [0, 1]}",
            5,
            ["augmentation.sigma", "greater than 0"],
        ),
        (
            "temperature: 0.5",
            "augmentation: {jitter: [1, 1, 1, 1]}",
            5,
            ["augmentation.jitter", "equal to 0.5, not 1"],
        ),
        ("lpft: {lr: 0.001}", "lpft: {layer_decay: 1.5}", 14, ["lpft.layer_decay", "not 1.5"]),
        (
            "lpft: {lr: 0.001}",
            "lpft: {learning: 1}",
            14,
            ["lpft.learning", "no such option of 'lpft'"],
        ),
        ("lr: 0.02", "epohcs: 1", 12, ["finetune.epohcs", "'epochs'"]),
        ("lpft:", "lptf:", 14, ["lptf", "no such option of a recipe", "'lpft'"]),
        (
            "[probe,",
            "[prob,",
            10,
            ["evaluate.digits.protocols", "no such protocol: 'prob'", "'probe'"],
        ),
        ("labels: [0.1, 1.0]", "labels: []", 11, ["evaluate.digits.labels"]),
        ("labels: [0.1, 1.0]", "labels: [0]", 11, ["evaluate.digits.labels", "0"]),
        ("name: mine", "name: my recipe", 1, ["name", "'my recipe'"]),
        ("pretrain: {epochs: 2, batch: 64, lr: 1e-3}", "pretrain: 3", 7, ["pretrain", "mapping"]),
        ("pretrain: {epochs: 2, batch: 64, lr: 1e-3}\n", "", 1, ["'pretrain' is missing"]),
        ("data: digits", "pretext: rotation", 6, ["'pretext' is given twice"]),
        ("stem: small}", "stem: small", 3, ["not valid YAML"]),
    ],
)
def test_errors_name_file_line_and_remedy(write, old, new, line, parts):
    assert old in GOOD
    path = write(GOOD.replace(old, new))
    text = message(load, path)
    assert text.startswith(f"{path}:{line}: "), text
    for part in parts:
        assert part in text


def test_a_missing_key_is_an_error(write):
    assert "data: name a data set" in message(load, write(GOOD.replace("data: digits\n", "")))


def test_invalid_overrides_are_errors(write):
    path = write(GOOD)
    assert "override pretrain.epoch=5: pretrain.epoch" in message(load, path, ["pretrain.epoch=5"])
    assert "override pretrain.epochs=x" in message(load, path, ["pretrain.epochs=x"])
    assert "key=value" in message(load, path, ["pretrain.epochs"])
    assert "holds a value" in message(load, path, ["name.x=1"])
    assert "not valid YAML" in message(load, path, ["name=[1"])


def test_invalid_and_missing_files_are_errors(tmp_path, write):
    write(GOOD, "simclr.yaml")
    assert "no such file" in message(load, tmp_path / "simclear.yaml")
    assert "'simclr.yaml'" in message(load, tmp_path / "simclear.yaml")
    assert "is a folder" in message(load, tmp_path)
    assert "mapping" in message(load, write("- 1\n"))
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "can't be read" in message(load, binary)
    assert "not valid YAML" in message(
        load, write("name: !!python/object/apply:os.system [true]\n")
    )


SWEEP = """\
name: few
base: mine.yaml
rows:
  A: {}
  B: {pretext: {name: rotation}, pretrain.epochs: 7}
  nothing: {pretext: null}
seeds: [0, 1]
"""


def test_sweep_rows_change_the_base(write):
    write(GOOD)
    sweep = load_sweep(write(SWEEP, "few.yaml"))
    assert list(sweep.rows) == ["A", "B", "nothing"]
    assert sweep.rows["A"] == load(write(GOOD))
    assert (sweep.rows["B"].pretext.name, sweep.rows["B"].pretrain.epochs) == ("rotation", 7)
    assert sweep.rows["nothing"].pretext is None
    assert sweep.seeds == (0, 1)


def test_sweep_with_its_base_inside_equals_one_with_a_file(write):
    write(GOOD)
    inside = "base:\n" + "".join(f"  {line}\n" for line in GOOD.splitlines())
    both = [
        load_sweep(write(text, "few.yaml"))
        for text in (SWEEP, SWEEP.replace("base: mine.yaml\n", inside))
    ]
    assert both[0] == both[1]


def test_sweep_errors_name_the_file_that_contains_them(write):
    base = write(GOOD)
    path = write(SWEEP.replace("rotation", "rotatoin"), "few.yaml")
    assert message(load_sweep, path).startswith(f"{path}:5: pretext")
    path = write(SWEEP.replace("[0, 1]", "[-1]"), "few.yaml")
    assert message(load_sweep, path).startswith(f"{path}:7: seeds")
    path = write(SWEEP.replace("mine.yaml", "yours.yaml"), "few.yaml")
    assert "no such file" in message(load_sweep, path)
    base.write_text(GOOD.replace("temperature", "temprature"))
    path = write(SWEEP, "few.yaml")
    assert message(load_sweep, path).startswith(f"{base}:5: pretext.temprature")


def test_a_recipe_is_a_sweep_of_one_row_but_a_sweep_is_no_recipe(write):
    write(GOOD)
    assert list(load_sweep(write(GOOD)).rows) == ["mine"]
    assert "sslrun sweep" in message(load, write(SWEEP, "few.yaml"))


def test_lines_are_located_in_merged_mappings(write):
    assert read_yaml(write(GOOD)).places[("evaluate", "digits", "labels")].endswith(":11")
    merged = read_yaml(write("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n"))
    assert merged.value["b"] == {"x": 1, "y": 3}
