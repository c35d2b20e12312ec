"""Which classes are held out: by fraction, by name, or by files of names, as they are published."""

import pytest
from class_sources import Told
from csv_files import told

from metalit.data import ClassTasks

GROUPS = tuple("abcab" * 2)  # a: 0 3 5 8, b: 1 4 6 9, c: 2 7


def held(groups=None, **options):
    tasks = ClassTasks(Told(groups=groups), **options)
    tasks.prepare()
    names = {split: tasks.class_names(split) for split in ("train", "val", "test")}
    return {split: "".join(name[-1] for name in each) for split, each in names.items()}


def refused(groups=None, **options):
    return lambda: held(groups, **options)


def written(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_fractions_are_of_the_classes():
    found = held(val=0.2, test=0.3)
    assert [len(found[split]) for split in ("train", "val", "test")] == [5, 2, 3]
    assert sorted("".join(found.values())) == list("0123456789")
    assert found != held(val=0.2, test=0.3, split_seed=1)
    assert found == held(val=0.2, test=0.3)


def test_names_and_a_fraction_of_the_rest():
    found = held(val=["c7", "c1"], test=0.3)
    assert (len(found["train"]), found["val"], len(found["test"])) == (5, "17", 3)


def test_fractions_are_of_groups_where_there_are_some():
    found = held(GROUPS, val=0.3, test=0.3)
    assert sorted(found.values()) == ["0358", "1469", "27"]


def test_a_fraction_of_groups_is_about_one_of_the_classes():
    groups = ("large",) * 6 + tuple("abcd")
    for seed in range(5):
        found = held(groups, val=0.2, test=0.2, split_seed=seed)
        assert (found["train"], sorted(found["val"] + found["test"])) == ("012345", list("6789"))
        assert len(found["val"]) == 2


def test_the_name_of_a_group_stands_for_its_classes():
    assert held(GROUPS, val=["a"], test=["b/c1", "c/c7"]) == {"train": "2469", "val": "0358", "test": "17"}
    # a group that is named in part has no share in fractions
    assert held(GROUPS, val=["a/c0"], test=0.3)["test"] in ("1469", "27")


def test_outer_folders_may_be_left_out():
    assert held(("x/a",) * 5 + ("y/b",) * 5, val=["a/c1", "c2"], test=["b"])["test"] == "56789"
    assert held(("x/a",) * 5 + ("y/b",) * 5, val=["x"], test=["c8"])["val"] == "01234"


def test_published_lists(tmp_path):
    omniglot = written(tmp_path / "test.txt", "a/c0/rot000\na/c0/rot090\na/c3/rot000\n\n")
    imagenet = written(tmp_path / "val.csv", "filename,label\nx.jpg,b/c1\ny.jpg,b/c1\nz.jpg,c/c2\n")
    train = written(tmp_path / "train.txt", "\ufeffb/c4\r\na/c5")
    assert held(GROUPS, train=train, val=imagenet, test=omniglot) == {"train": "45", "val": "12", "test": "03"}


def test_no_class_need_be_held_out():
    assert held(val=0, test=0) == {"train": "0123456789", "val": "", "test": ""}


# --- what is told ---------------------------------------------------------------------------------------------------


def test_a_class_in_two_splits_is_told():
    told(refused(val=["c1"], test=["c2", "c1"]), "the class 'c1' would be in val and in test")
    told(refused(GROUPS, val=["a"], test=["a/c3"]), "the class 'a/c3' would be in val and in test")
    told(refused(train=["c1"], val=["c1"]), "the class 'c1' would be in train and in val")


def test_unknown_names_are_told_with_the_nearest(tmp_path):
    told(refused(val=["C 1"]), "data.tasks.val: there is no class 'C 1'; did you mean 'c1'?")
    told(refused(test=["zebra"]), "data.tasks.test: there is no class 'zebra'; each must be the name of a class")
    file = written(tmp_path / "names.csv", "label\nc1\nzebra\n")
    told(refused(val=file), f"data.tasks.val={file!r}: there is no class 'zebra'")


def test_files_that_cannot_be_used_are_told(tmp_path):
    told(refused(val="c1"), "data.tasks.val='c1' is no file of names; for a single class, give a list: [c1]")
    told(refused(val="nowhere.txt"), "data.tasks.val='nowhere.txt': there is no such file")
    told(refused(val="nowhere.csv"), "data.tasks.val='nowhere.csv': there is no such file")
    told(refused(val=written(tmp_path / "a.csv", "file,name\n1,2\n")), "there is no column 'label' or 'class'")


@pytest.mark.parametrize("fraction", [-0.1, 1.1, 2])
def test_a_fraction_beyond_its_range_is_told(fraction):
    told(refused(val=fraction), f"data.tasks.val={fraction} must be a fraction between 0 and 1")
    told(refused(train=fraction), f"data.tasks.train={fraction} must be a list of names")


def test_all_may_be_held_out():
    for groups in (None, GROUPS):
        assert held(groups, val=0, test=1) == {"train": "", "val": "", "test": "0123456789"}
        assert held(groups, val=1.0, test=0)["val"] == "0123456789"
    told(refused(val=0.2, test=1.0), "data.tasks.test=1.0 is of all classes", "data.tasks.val=0.2; set that to 0")
    told(refused(val=1, test=["c1"]), "data.tasks.val=1 is of all classes", "data.tasks.test=['c1']; set that to 0")
    told(refused(val=0, test=1, train=["c1"]), "data.tasks.train=['c1'] names some; add --data.tasks.train null")


def test_a_split_without_a_class_is_told():
    told(refused(val=0.01, test=0.1), "10 class(es) cannot be split", "val=0.01 and test=0.1", "change the fractions")
    told(refused(GROUPS, val=0.1, test=0.4), "3 group(s) of classes cannot be split", "lists of names")
    told(refused(val=0.5, test=0.5), "10 class(es) cannot be split")


@pytest.mark.parametrize("val", ["val", "Valid", None])
def test_what_is_split_already_is_not_split_anew(val):
    groups = tuple(f"{place}/deep" for place in ["train"] * 5 + [val or "train"] * 2 + ["test"] * 3)
    folders = {"train": ["train"], "val": [val] if val else 0, "test": ["test"]}
    told(refused(groups), "'train'", "'test'", "split already", f"--data.tasks.val {f'[{val}]' if val else '0'} ")
    assert held(groups, **folders) == {
        "train": "01234" if val else "0123456",
        "val": "56" if val else "",
        "test": "789",
    }
    assert held(groups, val=0, test=1)["test"] == "0123456789"
    assert len(held(groups, val=["c0"], test=0.3)["val"]) == 1  # what is named is meant
