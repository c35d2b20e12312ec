"""Every config that ships passes its check, within a minute each."""

from pathlib import Path

import pytest

CONFIGS = sorted({*Path("configs").glob("*.yaml")} - {Path("configs/curves.yaml")})  # which has no file of its own


@pytest.mark.long
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_nothing_is_wrong_in_a_config_that_ships(config, metalit, tmp_path):
    status, output = metalit("check", str(config))
    assert status == 0, output
    assert "nothing is wrong" in output
    report = output[output.index("checked ") : output.index("nothing is wrong")]
    assert max(map(len, report.splitlines())) <= 80
    assert list(tmp_path.iterdir()) == []
