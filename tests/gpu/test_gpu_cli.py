"""The command line on a GPU: a fit writes its checkpoints and pictures, and its checkpoint predicts on the CPU too."""

import csv

import pytest
from on_device import on

pytestmark = pytest.mark.gpu
POINTS = "task,x,y\nmine,-2.0,0.4\nmine,1.0,0.0\nmine,2.5,\nmine,0.3,\n"


def flags(device):
    return [f"--trainer.{name}={value}" for name, value in on(device).items()]


def predictions(file):
    with file.open() as lines:
        return [float(row["y_predicted"]) for row in csv.DictReader(lines)]


@pytest.mark.parametrize("name", ["sine_maml", "bilevel_ridge", "bilevel_logistic", "sam_digits", "low_rank"])
def test_a_fit_and_its_test(metalit, tmp_path, device, name):
    config = f"configs/{name}.yaml"
    assert metalit("fit", config, *flags(device))[0] == 0
    run = tmp_path / "lightning_logs" / name / "version_0"
    assert (run / "checkpoints/best.ckpt").exists()
    assert (run / "checkpoints/last.ckpt").exists()
    assert metalit("test", config, "--ckpt_path=best", *flags(device))[0] == 0


def test_compiled_and_predicted_on_both_devices(metalit, tmp_path, device, record_property):
    config, compiled = "configs/sine_maml.yaml", ["--model.compile=true", "--model.fused_steps=2", "--figures.tasks=1"]
    status, told = metalit("fit", config, *flags(device), *compiled)
    assert status == 0
    record_property("told", [line for line in told.splitlines() if "compil" in line])
    assert "not compiled" not in told
    run = tmp_path / "lightning_logs/sine_maml/version_0"
    assert list(run.rglob("*.png")), told
    assert list(run.glob("events.out.tfevents.*"))
    found = []
    for place in (device, "cpu"):
        file = tmp_path / f"points_{place}.csv"
        file.write_text(POINTS)
        last = run / "checkpoints/last.ckpt"
        status, told = metalit(
            "predict", config, f"--ckpt_path={last}", f"--data.predict_file={file}", *compiled, *flags(place)
        )
        assert status == 0, told
        found.append(predictions(tmp_path / f"points_{place}_predicted.csv"))
        assert (tmp_path / f"points_{place}_predicted.png").exists()
    assert len(found[0]) > 1
    assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-4)
