"""Every config that ships passes its check, within a minute each."""

from pathlib import Path

import pytest

WITHOUT_DATA = {Path(f"configs/{name}.yaml") for name in ("curves", "folder_protonet")}  # the user has it
CONFIGS = sorted({*Path("configs").glob("*.yaml")} - WITHOUT_DATA)


@pytest.mark.long
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_nothing_is_wrong_in_a_config_that_ships(config, metalit, tmp_path):
    status, output = metalit("check", str(config))
    assert status == 0, output
    assert "nothing is wrong" in output
    report = output[output.index("checked ") : output.index("nothing is wrong")]
    assert max(map(len, report.splitlines())) <= 80
    assert list(tmp_path.iterdir()) == []
