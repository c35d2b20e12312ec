"""Fed with what is nearly right: settings, runs, checkpoints and arrays whose form holds, but for a few values."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import torch
from fuzz import judge_call, judge_command, spoilt_yaml
from nudges import CLASSES, array, checkpoint, nudged, options, resolved, settings
from picture_folders import omniglot_like
from repository import TINY_BY_CLASS
from test_fuzz import both, fed  # noqa: F401

from metalit.data import Arrays, ClassTasks, Episodes
from metalit.data.classes.asked import AskedArrays

CONFIGS = [str(path) for path in sorted(Path("configs").glob("*.yaml"))]


def class_configs(folder):
    """Configs of classes from a folder, a file and nothing."""
    omniglot_like(folder / "pictures", 5, 2, 4, 16)
    generator = np.random.default_rng(0)
    np.savez(folder / "a.npz", x=generator.random((40, 1, 9, 9)), y=np.repeat(np.arange(8), 5))
    folder_of = f"ImageFolder, init_args: {{folder: {folder}/pictures, size: 9, channels: 1}}"
    file = f"Arrays, init_args: {{file: {folder}/a.npz}}"
    for name, source in (("folder", folder_of), ("file", file), ("glyphs", "Glyphs, init_args: {faces: 3}")):
        (folder / f"{name}.yaml").write_text(CLASSES.replace("SOURCE", source))
    return [str(folder / f"{name}.yaml") for name in ("folder", "file", "glyphs")]


@both(0.12, 4)
def test_settings(cases, fed, tmp_path):  # noqa: F811
    configs = [*CONFIGS[:: 5 if len(cases) < 9 else 1], *class_configs(tmp_path) * 4]
    file = tmp_path / "config.yaml"
    for case in cases:
        draw = random.Random(case)
        file.write_bytes(settings(draw, configs))
        stage = ["check"] if draw.random() < 0.03 else ["fit"]
        seeds = [f"--seeds={draw.choice((2, 2, 1, 0, 'x', '-1', 2**31, 10**30))}"] if draw.random() < 0.03 else []
        judge_command([*stage, f"--config={file}", f"--trainer.default_root_dir={tmp_path}", *seeds], fed, "settings")
        shutil.rmtree(tmp_path / "lightning_logs", ignore_errors=True)


@both(0.08, 3)
def test_options(cases, fed, tmp_path):  # noqa: F811
    configs = [*CONFIGS[2 :: 9 if len(cases) < 9 else 1], *class_configs(tmp_path) * 4]
    fixed = ["--trainer.fast_dev_run=1", *TINY_BY_CLASS["MetaLearner"], f"--trainer.default_root_dir={tmp_path}"]
    for case in cases:
        draw = random.Random(case)
        config = draw.choice(configs)
        of_meta = resolved(config)["model"]["class_path"].endswith("MetaLearner")
        given = [*fixed[:1], *(fixed[1:3] if of_meta else []), *fixed[3:]]
        judge_command(["fit", f"--config={config}", *given, *options(draw, config)], fed, "options")


@both(0.03, 2)
def test_runs_to_reproduce(cases, fed, trained, tmp_path):  # noqa: F811
    trained("configs/sine_maml.yaml")
    run, spoilt = tmp_path / "lightning_logs/sine_maml/version_0", tmp_path / "run"
    for case in cases:
        draw = random.Random(case)
        shutil.copytree(run, spoilt)
        record, config = spoilt / "run.json", spoilt / "config.yaml"
        if draw.random() < 0.7:
            found = nudged(draw, json.loads(record.read_text()))
            end = found.get("end")
            if isinstance(end, dict) and isinstance(end.get("steps"), int):  # that many are taken
                end["steps"] = min(end["steps"], 10)
            text = json.dumps(found, indent=1)
            record.write_bytes(text.encode() if draw.random() < 0.8 else spoilt_yaml(draw, text))
        if draw.random() < 0.4:
            config.write_bytes(spoilt_yaml(draw, config.read_text()))
        judge_command(["reproduce", str(spoilt), f"--trainer.default_root_dir={tmp_path}"], fed, "runs to reproduce")
        shutil.rmtree(spoilt)


@both(0.05, 3)
def test_checkpoints_of_other_contents(cases, fed, trained, tmp_path):  # noqa: F811
    trained("configs/sine_maml.yaml")
    folder = tmp_path / "lightning_logs/sine_maml/version_0/checkpoints"
    whole = torch.load(folder / "last.ckpt", weights_only=True)
    for case in cases:
        draw = random.Random(case)
        torch.save(checkpoint(draw, whole), folder / "other.ckpt")
        stage = draw.choice((["fit", "--trainer.max_steps=7"], ["test"], ["validate"]))
        config = [f"--config={folder.parent / 'config.yaml'}"] if stage[0] == "fit" else []
        judge_command([*stage, *config, f"--ckpt_path={folder / 'other.ckpt'}"], fed, "checkpoints of other contents")


@both(0.06)
def test_arrays_of_other_forms(cases, fed, tmp_path):  # noqa: F811
    file = tmp_path / "a.npz"
    x, y = np.random.default_rng(0).integers(0, 255, (40, 8, 8), dtype=np.uint8), np.repeat(np.arange(8), 5)
    asked = {"support_x": x[:6], "support_y": y[:6], "query_x": x[6:9]}
    for case in cases:
        draw = random.Random(case)
        trains = draw.random() < 0.5
        arrays = {
            name: array(draw, v) if draw.random() < 0.5 else v
            for name, v in ({"x": x, "y": y} if trains else asked).items()
        }
        if draw.random() < 0.05:
            arrays.pop(draw.choice(list(arrays)))
        draw.choice((np.savez, np.savez_compressed))(file, **arrays)

        def read(trains=trains):
            if not trains:
                return AskedArrays(str(file)).values((1, 8, 8))
            tasks = ClassTasks(Arrays(str(file)), rotations=draw.random() < 0.3, skip_small=draw.random() < 0.3)  # noqa: B023
            size = Episodes(shots=1, queries=1, ways=2)
            tasks.needs(dict.fromkeys(("train", "val", "test"), size))
            tasks.prepare()
            tasks.check("train", size)
            index = torch.arange(3)
            return tasks.load(tasks.of_size("train", index, torch.arange(3), size), torch.device("cpu"))

        forms = {name: (value.dtype, value.shape) for name, value in arrays.items()}
        judge_call(read, fed, "arrays of other forms", f"case {case}: {forms}")
