"""What the user's own images and rows are taken for: from a folder, from arrays and from a table."""

import numpy as np
import pandas as pd
import pytest
import torch
from fits import told_once, trainer
from kinds import Kinds, namer, refused
from PIL import Image
from tiny import meta

from metalit.callbacks import PredictionWriter
from metalit.callbacks.class_predictions import draw_classes
from metalit.data import ClassTasks, CsvRows, Episodes, Sine, TaskDataModule
from metalit.data.classes.asked import AskedArrays, AskedPictures
from metalit.modules.adapted_classes import NamedClasses

SHAPE = (1, 4, 4)
PIXELS = np.random.default_rng(0).integers(0, 256, (7, 4, 4), dtype=np.uint8)
ROLES = ["dog/1.png", "dog/2.png", "cat/1.png", "cat/2.png", "b.png", "a.png", "c.png"]
LABELS = ["dog", "dog", "cat", "cat"]


def learner(*shape, **options):
    module = namer(*(shape or SHAPE), **options)
    module.scaling = Kinds(*(shape or SHAPE)).scaling()
    return module


def pictures(tmp_path, files=ROLES):
    root = tmp_path / "my pets"
    for file, pixels in zip(files, PIXELS, strict=False):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / file)
    return root


def data(tasks=None, **options):
    return TaskDataModule(tasks or Kinds(*SHAPE), *[Episodes(2, 2, 2)] * 3, **options)


def predict(tmp_path, module, given):
    trainer(tmp_path, logger=False, callbacks=[PredictionWriter()]).predict(module, given)


def expected(module, examples=PIXELS[:4], asked=PIXELS[4:], labels=LABELS):
    return module.adapt(torch.tensor(examples)[:, None], labels)(torch.tensor(asked)[:, None])


def test_a_folder_gets_a_table_of_its_images_and_a_picture(tmp_path, capsys):
    module, root = learner(), pictures(tmp_path)
    predict(tmp_path, module, data(predict_folder=str(root)))
    written = pd.read_csv(tmp_path / "my pets_predicted.csv")
    assert list(written) == ["file", "predicted", "probability_cat", "probability_dog"]
    assert list(written["file"]) == ["a.png", "b.png", "c.png"]
    found = expected(module, asked=PIXELS[[5, 4, 6]])
    np.testing.assert_allclose(written["probability_dog"], found["dog"], atol=1e-6)
    assert list(written["predicted"]) == found.best()
    with Image.open(tmp_path / "my pets_predicted.png") as picture:
        assert np.asarray(picture).std() > 10
    printed = capsys.readouterr().out
    assert "inner steps: 1, as trained: there was no validation" in printed
    assert f"predictions: {tmp_path / 'my pets_predicted.csv'}\n" in printed
    assert f"  a.png: {found.best()[0]} (" in printed
    # nothing of the folder itself is changed, and the next prediction asks the same
    assert sorted(path.name for path in root.iterdir()) == ["a.png", "b.png", "c.png", "cat", "dog"]
    predict(tmp_path, module, data(predict_folder=str(root)))
    assert "(replaced)" in capsys.readouterr().out


def test_arrays_get_a_row_for_each_that_is_asked(tmp_path):
    module, file = learner(), tmp_path / "pets.npz"
    np.savez(file, support_x=PIXELS[:4], support_y=np.array([3, 3, -1, -1]), query_x=PIXELS[4:])
    predict(tmp_path, module, data(predict_file=str(file)))
    written = pd.read_csv(tmp_path / "pets_predicted.csv")
    assert list(written) == ["row", "predicted", "probability_-1", "probability_3"]
    np.testing.assert_allclose(written["probability_3"], expected(module)["dog"], atol=1e-6)
    assert (tmp_path / "pets_predicted.png").exists()


def table(tmp_path, rows, name="flowers.csv", header="width;kind;length"):
    file = tmp_path / name
    file.write_text("\n".join([header, *rows]) + "\n")
    return file


def test_a_table_keeps_its_form_and_all_rows_get_an_answer(tmp_path, capsys):
    file = table(tmp_path, ["1,5;iris;0,5", "-1,0;rose;1,0", "0,5;;2,0", "1,0;NA;-1,0"])
    module = learner(2)
    source = CsvRows("nowhere.csv", "kind", ["length", "width"])
    predict(tmp_path, module, data(ClassTasks(source), predict_file=str(file)))
    written = pd.read_csv(tmp_path / "flowers_predicted.csv", sep=";", decimal=",")
    assert list(written) == ["width", "kind", "length", "kind_predicted", "probability_iris", "probability_rose"]
    x = torch.tensor([[0.5, 1.5], [1.0, -1.0], [2.0, 0.5], [-1.0, 1.0]])
    found = module.adapt(x[:2], ["iris", "rose"])(x)
    np.testing.assert_allclose(written["probability_iris"], found["iris"], atol=1e-6)
    assert list(written["kind_predicted"]) == found.best()
    assert not (tmp_path / "flowers_predicted.png").exists()
    told = [line.split(" (")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert told == [f"  line {row + 2}: {found.best()[row]}" for row in (2, 3)]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["a.png"], "make a subfolder for each class"),
        (["dog/1.png", "cat/1.png"], "no image lies beside its folders, so none is asked"),
        (["dog/1.png", "a.png"], "1 class(es), ['dog']; give examples of two at least"),
        (
            ["1/1.png", "2/1.png", "3/1.png", "4/1.png", "a.png"],
            "there are 4 classes, and what is learned has outputs for 3",
        ),
    ],
    ids=["no class", "nothing asked", "one class", "too many classes"],
)
def test_a_folder_that_cannot_be_used_is_told_in_one_line(tmp_path, files, said):
    root = pictures(tmp_path, files)
    refused(lambda: predict(tmp_path, learner(), data(predict_folder=str(root))), "data.predict_folder=", said)
    assert not list(tmp_path.glob("*_predicted*"))


def test_a_broken_image_and_an_empty_folder_are_told(tmp_path):
    root = pictures(tmp_path)
    (root / "cat/2.png").write_text("no picture")
    refused(lambda: predict(tmp_path, learner(), data(predict_folder=str(root))), "2.png' is no image that can be read")
    (root / "empty").mkdir()
    refused(lambda: predict(tmp_path, learner(), data(predict_folder=str(root))), "the folder 'empty' holds no image")
    assert not list(tmp_path.glob("*_predicted*"))


def test_other_learners_are_told(tmp_path):
    root = pictures(tmp_path)
    refused(lambda: predict(tmp_path, learner(2), data(predict_folder=str(root))), "takes rows of 2 number(s)")
    sine = TaskDataModule(Sine(), *[Episodes(2, 2, 2)] * 3, predict_folder=str(root))
    refused(lambda: predict(tmp_path, meta(), sine), "data.predict_folder", "tasks of Sine have no classes")
    for given in ({}, {"predict_folder": str(root), "predict_file": "a.csv"}):
        refused(lambda given=given: predict(tmp_path, learner(), data(**given)), "one of them")


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": PIXELS}, "holds the arrays ['x'], but no 'support_x'"),
        (
            {"support_x": PIXELS, "support_y": LABELS, "query_x": PIXELS},
            "support_x has 7 example(s) and support_y has 4",
        ),
        ({"support_x": PIXELS[:4], "support_y": LABELS, "query_x": PIXELS[:0]}, "query_x has no row"),
        (
            {"support_x": PIXELS[:4], "support_y": LABELS, "query_x": PIXELS[:, :2]},
            "what is asked has shape (7, 1, 2, 4); the network takes images [rows, 1, 4, 4]",
        ),
    ],
    ids=["names", "lengths", "nothing asked", "shape"],
)
def test_arrays_that_cannot_be_used_are_told_in_one_line(tmp_path, arrays, said):
    file = tmp_path / "pets.npz"
    np.savez(file, **arrays)
    refused(lambda: predict(tmp_path, learner(), data(predict_file=str(file))), "data.predict_file=", said)
    assert not list(tmp_path.glob("*_predicted*"))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["1;iris;2", "2;rose;3"], "no row asks; leave its cell empty"),
        (["1;;2", "2;;3"], "no row is an example; give its class"),
        (["1;iris;x", "2;;3"], "'length' holds 'x' in line 2"),
    ],
)
def test_tables_that_cannot_be_used_are_told_in_one_line(tmp_path, rows, said):
    file, source = table(tmp_path, rows), CsvRows("nowhere.csv", "kind", ["length", "width"])
    refused(lambda: predict(tmp_path, learner(2), data(ClassTasks(source), predict_file=str(file))), said)


def test_a_table_for_a_learner_of_images_is_told(tmp_path):
    file = table(tmp_path, ["1;iris;2", "2;;3"])
    refused(
        lambda: predict(tmp_path, learner(), data(predict_file=str(file))), "takes images; give data.predict_folder"
    )


def test_what_is_no_earlier_prediction_is_not_overwritten(tmp_path):
    root, other = pictures(tmp_path), tmp_path / "my pets_predicted.csv"
    other.write_text("file,predicted by me\n")
    refused(lambda: predict(tmp_path, learner(), data(predict_folder=str(root))), "is no earlier prediction")
    assert other.read_text() == "file,predicted by me\n"


def test_what_diverges_is_told_and_not_written(tmp_path):
    root, module = pictures(tmp_path), learner()
    with torch.no_grad():
        module.problem.network[1].out.bias[0] = torch.nan
    refused(lambda: predict(tmp_path, module, data(predict_folder=str(root))), "not finite", "model.eval_steps")
    assert not list(tmp_path.glob("*_predicted*"))


def test_what_is_fitted_worse_than_before_is_told(tmp_path):
    root = pictures(tmp_path)
    for place in ("dog/1.png", "dog/2.png", "cat/1.png"):  # that are the same, so that a large step is far too large
        Image.fromarray(PIXELS[3]).save(root / place)
    given = data(predict_folder=str(root))
    told_once(lambda: predict(tmp_path, learner(lr=300.0), given), "'my pets', are fitted worse at their own support")


def test_the_picture_shows_each_image_beside_the_examples_of_its_class(tmp_path):
    asked = AskedPictures(str(pictures(tmp_path)))
    examples, images = asked.values(SHAPE)
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]])
    figure = draw_classes(asked, NamedClasses(["cat", "dog"], scores, True, examples, images))
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["3 images of my pets", "examples", "taken for it", "cat", "90 %", "70 %", "dog", "80 %"]
    shown = [image.get_array() for image in figure.axes[0].images]
    order = [2, 3, 5, 6, 0, 1, 4]  # of the files: those of a cat, then of a dog
    low, high = PIXELS.min(), PIXELS.max()
    for image, place in zip(shown, order, strict=True):
        np.testing.assert_allclose(image, (PIXELS[place].astype(float) - low) / (high - low))


def test_the_picture_of_many_classes_is_cut(tmp_path):
    file, names = tmp_path / "many.npz", [f"{number:02d}" for number in range(20)]
    np.savez(file, support_x=np.zeros((20, 4, 4)), support_y=names, query_x=np.ones((9, 4, 4)))
    asked = AskedArrays(str(file))
    found = NamedClasses(names, torch.eye(20)[:9], True, *asked.values(SHAPE))
    texts = [text.get_text() for text in draw_classes(asked, found).axes[0].texts]
    assert texts[0] == "9 images of many.npz (not all shown)"
    assert [name for name in names if name in texts] == names[:12]
