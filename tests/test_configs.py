"""Every config that ships runs under all the subcommands that its learner knows."""

import csv
from pathlib import Path

import pytest
import yaml

TEMPLATE = Path(__file__).parent.parent / "configs" / "curves.yaml"  # has no file of its own
FOLDER = TEMPLATE.with_stem("folder_protonet")  # nor has this
CONFIGS = sorted({*TEMPLATE.parent.glob("*.yaml")} - {TEMPLATE, FOLDER})
SLOW = ("glyphs_maml", "glyphs_protonet", "glyphs_ridge")  # which draw 25,000 pictures first

# those that go through every subcommand in the quick run, too; all others only begin to train there
WHOLE = ("curves_gapminder", "bilevel_ridge", "sam_digits")
WITH_SPREAD = ("BayesianHead", "NeuralProcess")


def learner_of(config):
    return yaml.safe_load(config.read_text())["model"]["class_path"]


def of_learner(name):
    configs = [config for config in CONFIGS if learner_of(config) == name]
    assert configs
    marked = [config if config.stem in WHOLE else pytest.param(config, marks=pytest.mark.long) for config in configs]
    return pytest.mark.parametrize("config", marked, ids=lambda path: path.stem)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(config, marks=pytest.mark.long) if config.stem in SLOW else config
        for config in CONFIGS
        if config.stem not in WHOLE
    ],
    ids=lambda path: path.stem,
)
def test_takes_its_first_steps(config, metalit):
    status, output = metalit("fit", str(config), "--trainer.max_steps=2", "--trainer.val_check_interval=1.0")
    assert status == 0, output


@of_learner("MetaLearner")
def test_meta_learner_fits_validates_tests_predicts(config, metalit, tmp_path):
    status, output = metalit("fit", str(config), "--figures.tasks=2")
    assert status == 0, output
    run = tmp_path / "lightning_logs" / config.stem / "version_0"
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert (run / "config.yaml").exists()
    assert (run / "figures" / "val.png").stat().st_size > 10_000

    status, output = metalit("validate", str(config))
    assert status == 0, output
    assert f"validating {run / 'checkpoints' / 'best.ckpt'}" in output
    of_images = config.stem.startswith(("glyphs", "digits"))
    assert ("-way 1-shot" if of_images else "val tasks, adapted to") in output
    given = yaml.safe_load(config.read_text())["model"]["init_args"]
    steps = given.get("eval_steps", 10 if "inner_optimizer" in given else 0)  # else init adapts
    assert f"│ {steps} " in output

    status, output = metalit("test", str(config), "--ckpt_path=best")
    assert status == 0, output
    assert "mean ± 95 % interval" in output.replace("\n", " ")
    rows = (run / "test.csv").read_text().splitlines()
    learned = [row.split(",")[:2] for row in rows if row.startswith("learner,")]
    assert learned == [["learner", str(k)] for k in range(steps + 1)]

    if of_images:  # which has tests of its own
        return
    columns = _columns(config)
    points = tmp_path / "points.csv"
    first, last, between = (1960, 1970, 1965) if "year" in columns else (-2.0, 1.0, 0.5)
    points.write_text(f"{columns}\nnew,{first},2.0\nnew,{last},3.0\nnew,{between},\n")
    status, output = metalit("predict", str(config), f"--data.predict_file={points}")
    assert status == 0, output
    header, *lines = (tmp_path / "points_predicted.csv").read_text().splitlines()
    output = columns.split(",")[-1]
    ends = ("predicted", "lower", "upper") if given["problem"]["class_path"] in WITH_SPREAD else ("predicted",)
    assert header == ",".join([columns, *(f"{output}_{end}" for end in ends)])
    assert len(lines) == 3
    assert (tmp_path / "points_predicted.png").stat().st_size > 5_000


@of_learner("BilevelLearner")
def test_bilevel_learner_fits_validates_tests(config, metalit, tmp_path):
    status, output = metalit("fit", str(config))
    assert status == 0, output
    run = tmp_path / "lightning_logs" / config.stem / "version_0"
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert "scores on val after 6 outer steps" in output
    results = list((run / "results").iterdir())
    assert results
    for path in results:
        assert str(path) in output
        header, *rows = csv.reader(path.open())
        assert header[0] == "row"
        assert all(len(row) == len(header) for row in rows)
        assert rows
    _check_scores(config, metalit, run)


@of_learner("SupervisedLearner")
def test_supervised_learner_fits_validates_tests(config, metalit, tmp_path):
    status, output = metalit("fit", str(config))
    assert status == 0, output
    run = tmp_path / "lightning_logs" / config.stem / "version_0"
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    _check_scores(config, metalit, run)


def _check_scores(config, metalit, run):
    for subcommand, split in (("validate", "val"), ("test", "test")):
        status, output = metalit(subcommand, str(config))
        assert status == 0, output
        assert f"scores on {split}" in output
        with (run / f"{split}.csv").open() as handle:
            first = next(csv.DictReader(handle))
        assert first["row"] == "learned"
        assert float(first["loss"]) >= 0
    status, output = metalit("predict", str(config))
    assert status == 2
    assert "predict" in output.splitlines()[-1]


def test_curves_of_gapminder_are_learned_as_the_template_learns_all_curves(metalit):
    template, gapminder = (
        yaml.safe_load(path.read_text()) for path in (TEMPLATE, Path("configs/curves_gapminder.yaml"))
    )
    for config in (template, gapminder):
        del config["data"]["init_args"]["tasks"]["init_args"]
    assert template == gapminder
    status, output = metalit("fit", str(TEMPLATE))
    assert status == 2
    assert "data.tasks.file='curves.csv'" in output
    assert output.count("\n") == 1


@pytest.mark.parametrize("config", [*CONFIGS, TEMPLATE, FOLDER], ids=lambda path: path.stem)
def test_is_on_one_screen_and_in_the_readme(config):
    text = config.read_text()
    assert len(text.splitlines()) <= 40
    assert text.startswith("# ")
    assert f"`{config.stem}`" in Path("README.md").read_text()


def _columns(config: Path) -> str:
    tasks = yaml.safe_load(config.read_text())["data"]["init_args"]["tasks"]
    own = tasks.get("init_args", {})
    return (
        ",".join([own.get("task", "task"), *own.get("x", ["x"])[:1], *own.get("y", ["y"])])
        if "file" in own
        else "task,x,y"
    )


@pytest.mark.parametrize("fragment", sorted(Path("configs/trainer").glob("*.yaml")), ids=lambda path: path.stem)
def test_fragments_of_trainers_go_with_any_config(fragment, metalit, capfd):
    config = "configs/bilevel_ridge.yaml"
    with pytest.raises(SystemExit) as stop:
        metalit("fit", config, f"--config={fragment}", "--print_config", tiny=False)
    assert stop.value.code == 0
    asked, found = (yaml.safe_load(text)["trainer"] for text in (fragment.read_text(), capfd.readouterr().out))
    for name, value in asked.items():
        strategy = isinstance(value, dict)
        assert found[name]["init_args"]["timeout"] == "0:10:00" if strategy else found[name] == value
    assert found["max_steps"] == yaml.safe_load(Path(config).read_text())["trainer"]["max_steps"]
