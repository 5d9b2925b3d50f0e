"""The script that compares trainings with and without sigma-reparametrisation."""

import json
import math

import pytest

from tests.batteries.scripts import loaded_script


pytest.importorskip("sklearn", reason="the digits are in scikit-learn")
pytest.importorskip("matplotlib", reason="the curves need matplotlib")

SMALL = ["--depth", "2", "--hidden_size", "16", "--steps", "4", "--entropy_every", "2", "--seeds", "0"]


@pytest.fixture(scope="module")
def script():
    with loaded_script("sigma_reparam_stability") as module:
        yield module


def test_both_forms_start_with_the_same_loss_and_the_curves_are_kept(script, tmp_path, capsys):
    runs = script.main([*SMALL, "--learning_rates", "1e-3", "--output_dir", str(tmp_path)])
    assert [(run.architecture, run.reparametrised) for run in runs] == [
        ("post_ln", False),
        ("post_ln", True),
        ("no_ln", False),
        ("no_ln", True),
    ]
    for plain, reparametrised in (runs[:2], runs[2:]):
        assert reparametrised.losses[0] == pytest.approx(plain.losses[0], rel=1e-5)
        assert reparametrised.losses[-1] != plain.losses[-1]
        assert plain.entropy_steps == [0, 2, 4]
    assert capsys.readouterr().out.count("sigma-reparam") == 2
    assert json.loads((tmp_path / "results.json").read_text())[0]["losses"] == runs[0].losses
    assert (tmp_path / "stability.png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_that_diverges_ends_and_is_drawn(script, tmp_path):
    arguments = ["--architectures", "no_ln", "--learning_rates", "1e12", "--output_dir", str(tmp_path)]
    plain = script.main([*SMALL, *arguments])[0]
    assert len(plain.losses) <= 4 and not math.isfinite(plain.losses[-1])
    assert (tmp_path / "stability.png").exists()
