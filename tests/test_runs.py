"""Folders of runs: each run has its own, whatever its loggers are and whoever starts beside it; no refusal has one."""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fits import bare, trainer
from lightning.pytorch.loggers import CSVLogger

from metalit.errors import InputError
from metalit.locks import FolderLock
from metalit.modules import MetaLearner
from metalit.runs import RunFolder, experiment_folder, run_folder

MAML, RIDGE = "configs/sine_maml.yaml", "configs/bilevel_ridge.yaml"


@pytest.fixture
def experiment(tmp_path):
    return tmp_path / "lightning_logs" / "sine_maml"


def listing(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def logger(class_name, **arguments):
    given = [f"--trainer.logger.{name}={value}" for name, value in arguments.items()]
    return [f"--trainer.logger=lightning.pytorch.loggers.{class_name}", *given]


class TestLoggers:
    """The folder of a run does not depend on them."""

    def loggers(self, tmp_path, name):
        return {
            "none": ["--trainer.logger=false"],
            "CSV": logger("CSVLogger", save_dir=tmp_path / "elsewhere"),
            "TensorBoard": logger("TensorBoardLogger", save_dir=tmp_path / "elsewhere", name="mine", version="first"),
        }[name]

    @pytest.mark.parametrize("name", ["none", pytest.param("CSV", marks=pytest.mark.long), "TensorBoard"])
    def test_a_run_is_found_again(self, metalit, tmp_path, experiment, name):
        options = self.loggers(tmp_path, name)
        for number in (0, 1):
            assert metalit("fit", MAML, "--figures.tasks=1", *options)[0] == 0
            files = listing(experiment / f"version_{number}")
            assert {"checkpoints/best.ckpt", "checkpoints/last.ckpt", "config.yaml", "figures/val.png"} <= set(files)
        for asked in ("auto", "last"):
            status, output = metalit("fit", MAML, *options, f"--ckpt_path={asked}", "--trainer.max_steps=9")
            assert status == 0
            assert "version_1/checkpoints/last.ckpt" in output
        status, output = metalit("test", MAML, "--figures.tasks=1", *options)
        assert status == 0
        assert f"testing {experiment / 'version_1/checkpoints/best.ckpt'}" in output
        assert {"test.csv", "figures/test.png", "config_test.yaml"} <= set(listing(experiment / "version_1"))
        assert sorted(folder.name for folder in experiment.iterdir()) == ["version_0", "version_1"]
        assert any((tmp_path / "elsewhere").rglob("*")) == (name != "none")

    def test_results_are_files_without_any(self, metalit, tmp_path):
        assert metalit("fit", RIDGE, "--trainer.logger=false")[0] == 0
        files = listing(tmp_path / "lightning_logs/bilevel_ridge/version_0")
        assert {"val.csv", "results/features.csv"} <= set(files)

    def test_of_a_trainer_in_python_it_is_lightnings(self, tmp_path):
        assert run_folder(trainer(tmp_path)) == tmp_path / "run/version_0"
        assert run_folder(trainer(tmp_path, logger=CSVLogger(tmp_path, "own", 3))) == tmp_path / "own/version_3"
        assert run_folder(bare(tmp_path)) == tmp_path
        assert run_folder(bare(tmp_path, fast_dev_run=1)) is None

    def test_checkpoints_of_the_users_own_lie_there_too(self, metalit, experiment):
        callback = "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint"
        own = [callback, "--trainer.callbacks.every_n_train_steps=2", "--trainer.callbacks.filename=mine"]
        assert metalit("fit", MAML, *own, *logger("CSVLogger", save_dir=experiment / "elsewhere"))[0] == 0
        assert "checkpoints/mine.ckpt" in listing(experiment / "version_0")


class TestNumbers:
    """No two runs have the same."""

    def opened(self, experiment, tmp_path):
        run = RunFolder(experiment)
        with run.opened(bare(tmp_path, callbacks=[run]), trains=False):
            pass
        return run.folder

    def test_of_many_that_start_at_once_no_two_are_equal(self, experiment, tmp_path):
        with ThreadPoolExecutor(8) as pool:
            folders = list(pool.map(lambda _: self.opened(experiment, tmp_path), range(16)))
        assert len(set(folders)) == 16
        assert sorted(folder.name for folder in folders) == sorted(f"version_{number}" for number in range(16))

    def test_folders_that_a_user_renamed_do_not_count(self, experiment, tmp_path):
        for name in ("version_2", "version_7_old", "versions"):
            (experiment / name).mkdir(parents=True)
        assert self.opened(experiment, tmp_path).name == "version_3"

    @pytest.mark.parametrize("name", ["..", "../..", "a/../../b", "/tmp", "", "a\0b", "~/runs", "."])
    def test_a_name_that_leads_elsewhere_is_refused(self, name):
        with pytest.raises(InputError, match=r"experiment=.*must be the name of a folder in lightning_logs"):
            experiment_folder(None, name)

    def test_a_name_may_have_parts(self):
        assert experiment_folder("root", "sines/first") == Path("root/lightning_logs/sines/first")

    def test_it_is_refused_from_the_shell(self, metalit, tmp_path):
        for name in ("../../other", ""):
            status, output = metalit("fit", MAML, f"--experiment={name}")
            assert status == 2
            assert f"metalit: error: experiment={name!r} must be" in output
        assert listing(tmp_path) == []


class TestLock:
    def test_a_run_that_is_trained_is_not_resumed_by_another(self, metalit, experiment):
        metalit("fit", MAML)
        lock = FolderLock(experiment / "version_0")
        before = listing(experiment)
        for asked in ("last", "auto"):
            status, output = metalit("fit", MAML, f"--ckpt_path={asked}", "--trainer.max_steps=9")
            assert status == 2
            (line,) = [line for line in output.splitlines() if line.startswith("metalit: error: ")]
            assert f"{experiment / 'version_0'} is being written by process " in line
            assert ", since 20" in line
            assert "without --ckpt_path" in line
        assert listing(experiment) == before
        # to read is allowed
        assert metalit("test", MAML, "--ckpt_path=last")[0] == 0
        lock.release()
        assert metalit("fit", MAML, "--ckpt_path=last", "--trainer.max_steps=9")[0] == 0

    def test_who_holds_it_removes_what_a_killed_process_left(self, metalit, experiment):
        metalit("fit", MAML)
        left = experiment / "version_0/checkpoints/.last.ckpt.0123.part"
        left.write_bytes(b"half of it")
        assert metalit("fit", MAML, "--ckpt_path=last", "--trainer.max_steps=9")[0] == 0
        assert not left.exists()

    def test_it_dies_with_its_process(self, tmp_path):
        context = multiprocessing.get_context("fork")
        ready, go = context.Event(), context.Event()

        def hold():
            lock = FolderLock(tmp_path)
            ready.set()
            go.wait()
            lock.release()

        process = context.Process(target=hold)
        process.start()
        assert ready.wait(60)
        with pytest.raises(InputError, match=f"written by process {process.pid}, since"):
            FolderLock(tmp_path)
        process.kill()
        process.join()
        FolderLock(tmp_path).release()

    def test_a_file_system_without_locks_is_told(self, tmp_path, monkeypatch):
        def refuse(*_):
            raise OSError(37, "No locks available")

        monkeypatch.setattr("fcntl.flock", refuse)
        with pytest.warns(UserWarning, match="has no locks"):
            FolderLock(tmp_path).release()


class TestRefusals:
    """A start that is refused leaves the disk as it was, and says nothing of training."""

    @pytest.mark.parametrize(
        ("config", "options"),
        [
            (MAML, ["--model.problem.network.sizes=[2,4,1]"]),
            (MAML, ["--trainer.max_steps=-1"]),
            (MAML, ["--trainer.callbacks+=metalit.callbacks.SampleGradientNorms"]),
            (MAML, ["--model.fused_steps=4", "--trainer.num_sanity_val_steps=0"]),
            (RIDGE, ["--model.hypergradient=FirstOrder", "--trainer.num_sanity_val_steps=0"]),
        ],
    )
    def test_of_a_new_run(self, metalit, tmp_path, config, options):
        status, output = metalit("fit", config, *options)
        assert status == 2, output
        assert f"training {Path(config).stem}" not in output
        assert listing(tmp_path) == []

    def test_of_a_further_run(self, metalit, tmp_path):
        (tmp_path / "lightning_logs/sine_maml/version_0").mkdir(parents=True)
        before = listing(tmp_path)
        assert metalit("fit", MAML, "--model.problem.network.sizes=[2,4,1]")[0] == 2
        assert listing(tmp_path) == before
        assert not (tmp_path / "lightning_logs/sine_maml/version_1").exists()

    def test_takes_no_number(self, metalit):
        for _ in range(2):
            assert metalit("fit", MAML, "--model.problem.network.sizes=[2,4,1]")[0] == 2
        status, output = metalit("fit", MAML)
        assert status == 0
        assert "version_0" in output

    def test_of_a_run_that_goes_on(self, metalit, experiment):
        metalit("fit", MAML)
        before = {path: path.read_bytes() for path in experiment.rglob("*") if path.is_file() and path.name != ".lock"}
        options = ["--ckpt_path=last", "--trainer.max_steps=9", "--model.problem.network.sizes=[1,30,1]"]
        assert metalit("fit", MAML, *options)[0] == 2
        after = {path: path.read_bytes() for path in experiment.rglob("*") if path.is_file() and path.name != ".lock"}
        assert after == before

    @pytest.mark.parametrize("step", [0, 2])
    def test_an_error_in_the_first_step_leaves_nothing_and_a_later_one_what_there_is(
        self, metalit, tmp_path, experiment, monkeypatch, step
    ):
        def full(module, batch):
            if module.global_step == step:
                raise MemoryError
            return steps_on(module, batch)

        steps_on = MetaLearner.steps_on
        monkeypatch.setattr(MetaLearner, "steps_on", full)
        status, output = metalit("fit", MAML)
        assert status == 1
        assert "metalit: error: " in output
        assert "there is not enough memory" in output
        assert listing(tmp_path) == [] if step == 0 else "config.yaml" in listing(experiment / "version_0")

    def test_the_greeting_comes_after_the_checks(self, metalit, experiment):
        _, output = metalit("fit", MAML)
        assert f"logs: {experiment / 'version_0'}" in output


def test_a_run_that_is_to_write_nothing_has_no_folder(metalit, tmp_path):
    assert metalit("fit", MAML, "--trainer.fast_dev_run=1")[0] == 0
    assert listing(tmp_path) == []


def test_a_checkpoint_from_elsewhere_is_judged_in_a_folder_of_its_own(metalit, tmp_path, experiment):
    metalit("fit", MAML)
    moved = (experiment / "version_0/checkpoints/best.ckpt").rename(tmp_path / "mine.ckpt")
    assert metalit("test", MAML, f"--ckpt_path={moved}")[0] == 0
    assert (experiment / "version_1/test.csv").exists()


def test_a_refused_prediction_leaves_the_folder_as_it_was(metalit, tmp_path):
    assert metalit("fit", MAML)[0] == 0
    before = set(tmp_path.rglob("*"))
    status, output = metalit("predict", MAML)
    assert status == 2
    assert "data.predict_file" in output
    assert set(tmp_path.rglob("*")) == before
