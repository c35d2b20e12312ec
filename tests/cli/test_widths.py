"""Networks get as many inputs and outputs as the data has, and a table of one's own needs but its file and columns."""

from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import Namespace

from metalit.cli.widths import fill_widths
from metalit.data import ImageFolder, Sine
from metalit.errors import InputError
from metalit.modules import MetaLearner, SupervisedLearner

CURVES = Path("configs/curves.yaml")
FILE = "{file: curves.csv, task: curve, x: [x], y: [y], skip_short: true}"
PATIENTS = "patient;day;dose;sex;level;crp\n" + "".join(
    f"p{task};{day},5;{10 * (1 + (task + day) % 3)};{'fm'[task % 2]};{100 + task + day};{task},25\n"
    for task in range(10)
    for day in range(5)
)


@pytest.fixture
def mine(tmp_path):
    """A copy of the config of curves in which the file and the columns are one's own."""

    def made(x, y, more=""):
        (tmp_path / "table.csv").write_text(PATIENTS)
        text = CURVES.read_text()
        assert FILE in text
        own = f"{{file: {tmp_path / 'table.csv'}, task: patient, x: {x}, y: {y}{more}}}"
        (tmp_path / "mine.yaml").write_text(text.replace(FILE, own))
        return str(tmp_path / "mine.yaml")

    return made


def sizes_in(config):
    return config["model"]["init_args"]["problem"]["init_args"]["network"]["init_args"]["sizes"]


@pytest.mark.parametrize(
    ("x", "y", "more", "sizes"),
    [
        ("[day, dose]", "[level, crp]", "", [2, 10, 4]),
        ("[day, sex]", "[level]", ", categories: {sex: [f, m]}", [3, 10, 4]),
    ],
)
def test_a_table_of_ones_own_needs_but_its_file_and_columns(mine, metalit, tmp_path, x, y, more, sizes):
    config = mine(x, y, more)
    status, output = metalit("fit", config, "--figures.tasks=0")
    assert status == 0, output
    run = tmp_path / "lightning_logs" / "mine" / "version_0"
    assert sizes_in(yaml.safe_load((run / "config.yaml").read_text())) == sizes
    learner = MetaLearner.load_from_checkpoint(run / "checkpoints" / "best.ckpt")
    assert learner.problem.network.hidden1.in_features == sizes[0]
    assert learner.problem.network.out.out_features == sizes[-1]
    assert learner.problem.prior_mean.shape == (1 + sizes[0] + sizes[-1], len(yaml.safe_load(y)))
    points = tmp_path / "points.csv"
    points.write_text("patient;day;dose;sex;level;crp\na;1,5;10;f;104;2,5\na;2,5;20;f;106;2\na;4;20;f;;\n")
    status, output = metalit("predict", config, f"--data.predict_file={points}")
    assert status == 0, output
    assert "differ" not in output
    assert len((tmp_path / "points_predicted.csv").read_text().splitlines()) == 4


def test_other_widths_are_told_with_the_right_ones(mine, metalit, tmp_path):
    config = mine("[day, dose]", "[level]")
    status, output = metalit("fit", config, "--model.problem.network.sizes=[1, 8, 1]")
    assert status == 2
    assert output.count("\n") == 1
    for fragment in ("model.problem.network.sizes=[1, 8, 1]", "2 input(s) ['day', 'dose']", "give [2, 8, 1]", "'auto'"):
        assert fragment in output
    assert not (tmp_path / "lightning_logs").exists()


@pytest.mark.parametrize(("sizes", "filled"), [(["auto", 8, 5], [2, 8, 5]), ([3, 8, 5], None)])
def test_a_head_has_the_columns_of_the_data_and_as_many_features_as_it_likes(tmp_path, sizes, filled):
    (tmp_path / "table.csv").write_text(PATIENTS)
    given = {"file": str(tmp_path / "table.csv"), "task": "patient", "x": ["day", "dose"], "y": ["level", "crp"]}
    network = Namespace(class_path="metalit.networks.MLP", init_args=Namespace(sizes=sizes))
    head = Namespace(
        class_path="metalit.problems.BayesianHead",
        init_args=Namespace(inputs="auto", outputs="auto", network=network),
    )
    tasks = Namespace(class_path="metalit.data.Curves", init_args=Namespace(given))
    config = Namespace(
        model=Namespace(init_args=Namespace(problem=head)), data=Namespace(init_args=Namespace(tasks=tasks))
    )
    if filled is None:
        with pytest.raises(InputError, match=r"2 input\(s\) \['day', 'dose'\].*give \[2, 8, 5\]"):
            fill_widths(config)
    else:
        fill_widths(config)
        assert (head["init_args"]["inputs"], head["init_args"]["outputs"]) == (2, 2)
        assert network["init_args"]["sizes"] == filled


class Pictures(Sine):
    """Stands for a source of classes: images of 2 channels."""

    def input_shape(self):
        return [2, 20, 30]

    def class_names(self, split):
        return ["a", "b"]


def of_pictures(network, problem="Prototypes", tasks="Pictures", **ways):
    """A config of a network, its numbers left out, on tasks of classes."""
    network = Namespace(class_path=f"metalit.networks.{network[0]}", init_args=Namespace(network[1]))
    problem = Namespace(class_path=f"metalit.problems.{problem}", init_args=Namespace(network=network))
    if isinstance(tasks, str):
        tasks = Namespace(class_path="metalit.data.Sine" if tasks == "Sine" else f"{__name__}.{tasks}")
    data = Namespace(tasks=tasks, **{k: Namespace(ways=v) for k, v in ways.items()})
    config = Namespace(model=Namespace(init_args=Namespace(problem=problem)), data=Namespace(init_args=data))
    fill_widths(config)
    return vars(network["init_args"])


CONV4 = ("Conv4", {"channels": "auto", "size": "auto", "ways": "auto"})


def test_a_network_of_images_has_their_channels_and_size_and_the_classes_of_a_task():
    assert of_pictures(CONV4) == {"channels": 2, "size": [20, 30], "ways": 5}
    same = {"train": 7, "val": 7, "test": 7}
    assert of_pictures(CONV4, "FewShot", **same) == {"channels": 2, "size": [20, 30], "ways": 7}
    assert of_pictures(("MLP", {"sizes": ["auto", 9, "auto"]}), "FewShot") == {"sizes": [1200, 9, 5]}


def test_no_image_is_read_to_know_their_size(monkeypatch):
    monkeypatch.setattr(ImageFolder, "read_classes", None)
    source = Namespace(class_path="metalit.data.ImageFolder", init_args=Namespace(folder="pictures", size=32))
    tasks = Namespace(class_path="metalit.data.ClassTasks", init_args=Namespace(source=source))
    assert of_pictures(CONV4, tasks=tasks) == {"channels": 3, "size": [32, 32], "ways": 5}


def test_an_output_for_each_class_takes_one_number_of_them():
    features = ("Conv4", {"channels": "auto", "size": "auto", "ways": None})
    assert of_pictures(features, train=20, val=5)["ways"] is None
    told = r"data.train.ways=20, data.val.ways=5, data.test.ways=5: the network has one output for .* as Prototypes"
    for network, problem in ((CONV4, "Prototypes"), (features, "FewShot")):
        with pytest.raises(InputError, match=told):
            of_pictures(network, problem, train=20)


def test_features_are_no_outputs_of_classes():
    network = ("Conv4", {"channels": "auto", "size": "auto", "ways": None})
    with pytest.raises(InputError, match=r"network.ways=null: FewShot needs .* an output for each class; write 'auto'"):
        of_pictures(network, "FewShot")
    assert of_pictures(network, "ProtoMAML")["ways"] is None


def test_tasks_without_images_or_classes_are_told():
    with pytest.raises(
        InputError, match=r"network.channels: 'auto' follows the images of data.tasks, and there are no"
    ):
        of_pictures(CONV4, tasks="Sine")
    with pytest.raises(InputError, match=r"network.ways: 'auto' follows the classes of data.tasks, and there are none"):
        of_pictures(("Conv4", {"ways": "auto"}), tasks="Sine")


@pytest.fixture
def table(tmp_path):
    """A table of three columns and a class, as the README puts it in place of scikit-learn's."""
    torch.manual_seed(0)
    rows = [f"{a},{b},{c},{'low' if a + b < c else 'high'}" for a, b, c in torch.randn(80, 3).tolist()]
    (tmp_path / "rows.csv").write_text("\n".join(["a,b,c,kind", *rows, ""]))
    return ["--data.rows.class_path=CsvRows", f"--data.rows.file={tmp_path / 'rows.csv'}"]


def test_a_classifier_of_rows_has_as_many_inputs_and_outputs_as_the_table(table, metalit, tmp_path):
    status, output = metalit("fit", "configs/sgd_digits.yaml", *table, "--data.rows.y=kind", "--data.rows.classes=true")
    assert status == 0, output
    run = tmp_path / "lightning_logs" / "sgd_digits" / "version_0"
    network = SupervisedLearner.load_from_checkpoint(run / "checkpoints" / "last.ckpt").network
    assert (network.hidden1.in_features, network.out.out_features) == (3, 2)


def test_penalties_are_as_many_as_the_columns_and_those_of_noise(table, metalit, tmp_path):
    rows = [*table, "--data.rows.y=a", "--data.rows.x=[b, c]", "--data.noise_columns=4"]
    status, output = metalit("fit", "configs/bilevel_ridge.yaml", *rows)
    assert status == 0, output
    run = tmp_path / "lightning_logs" / "bilevel_ridge" / "version_0"
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"][
        "problem.log_penalty"
    ].shape == (6,)


def test_data_without_columns_is_told(metalit):
    status, output = metalit(
        "fit", "configs/low_rank.yaml", "--model.problem={class_path: Ridge, init_args: {features: auto}}"
    )
    assert status == 2
    assert "model.problem.features: 'auto' follows the columns of data.tasks or data.rows" in output


def test_a_final_model_uses_all_tasks_and_its_last_checkpoint(mine, metalit, tmp_path):
    config = mine("[day]", "[level]", ", val: 0, test: 0")
    status, output = metalit("fit", config, "--figures.tasks=0")
    assert status == 0, output
    assert "no best checkpoint: the last one" in output
    checkpoints = tmp_path / "lightning_logs" / "mine" / "version_0" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["last.ckpt"]
    (tmp_path / "points.csv").write_text("patient,day,level\na,1,104\na,2,106\na,4,\n")
    status, output = metalit("predict", config, f"--data.predict_file={tmp_path / 'points.csv'}", "--ckpt_path=best")
    assert status == 0, output
    assert f"version_0 has no best checkpoint, as nothing was validated: taking {checkpoints / 'last.ckpt'}" in output
    status, output = metalit("test", config)
    assert status == 2
    assert "no task is held out for test" in output
