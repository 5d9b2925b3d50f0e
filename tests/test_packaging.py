"""The wheel: it contains everything that is needed and nothing else, and works without the checkout."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import hf_attn


ROOT = Path(__file__).parent.parent
MAPPED = {"hf_attn": "hf_attn", "modeling": "hf_attn/modeling", "pipelines": "hf_attn/pipelines"}
MAPPED["model_cards"] = "hf_attn/model_cards"


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Path of a wheel built from a copy of the checkout."""
    copy, output = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in (*MAPPED, "tests", "scripts"):
        shutil.copytree(ROOT / name, copy / name)
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index")
    run(*pip, "--wheel-dir", output, copy, cwd=copy)
    (path,) = output.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Folder of an environment that contains only the wheel, and uses the dependencies of the running environment."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site_packages = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    )
    before = {path.name for path in site_packages.iterdir()}
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    (folder / "added.txt").write_text("\n".join({path.name for path in site_packages.iterdir()} - before))
    # A path in a .pth file comes last, and the .pth files in that folder (of an editable install) are not read.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


@pytest.mark.slow
@pytest.mark.xdist_group("packaging")
class TestWheel:
    def test_it_holds_every_module_and_template_and_nothing_else(self, wheel):
        page = "hf_attn/analysis/vit/report/page"
        expected = {"hf_attn/py.typed", f"{page}.html", f"{page}.css", f"{page}.js"}
        for folder, target in MAPPED.items():
            for pattern in ("*.py", "*.md") if folder == "model_cards" else ("*.py",):
                expected |= {f"{target}/{path.relative_to(ROOT / folder)}" for path in (ROOT / folder).rglob(pattern)}
        with zipfile.ZipFile(wheel) as archive:
            names = set(archive.namelist())
        assert {name for name in names if ".dist-info/" not in name} == expected

    def test_its_metadata(self, wheel):
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
            metadata = archive.read(name).decode()
            assert archive.read(name.replace("METADATA", "top_level.txt")).decode().split() == ["hf_attn"]
        assert f"\nVersion: {hf_attn.__version__}\n" in metadata
        assert "\nLicense-Expression: Apache-2.0\n" in metadata
        assert "\nRequires-Python: >=3.11\n" in metadata
        core = set(re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata, re.MULTILINE))
        assert core == {"torch", "transformers", "accelerate", "safetensors", "huggingface_hub", "filelock"}

    def test_one_name_is_added_to_site_packages(self, installed):
        added = (installed / "added.txt").read_text().split()
        assert sorted(added) == ["hf_attn", f"hf_attn-{hf_attn.__version__}.dist-info"]

    def test_the_entry_point(self, installed, tmp_path):
        assert "echo_att" in run(installed / "bin" / "hf-attn", "papers", cwd=tmp_path)

    def test_a_model_is_saved_with_its_card_and_loaded(self, installed, tmp_path):
        script = """
import importlib.util, pathlib, sys
import hf_attn, hf_attn.pipelines, hf_attn.model_cards
from hf_attn.modeling.echo_att.configuration_echo_att import EchoAttConfig
from transformers import AutoModelForCausalLM

environment = pathlib.Path(sys.argv[1])
assert pathlib.Path(hf_attn.__file__).is_relative_to(environment), hf_attn.__file__
assert (pathlib.Path(hf_attn.__file__).parent / "py.typed").is_file()
assert not [name for name in ("modeling", "pipelines", "model_cards", "tests") if importlib.util.find_spec(name)]

config = EchoAttConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
                       shared_layers=[1])
AutoModelForCausalLM.from_config(config).save_pretrained("saved")
assert "## The mechanism" in pathlib.Path("saved/README.md").read_text()
print(type(AutoModelForCausalLM.from_pretrained("saved")).__module__)
"""
        output = run(installed / "bin" / "python", "-c", script, installed, cwd=tmp_path)
        assert output.split() == ["hf_attn.modeling.echo_att.modeling_echo_att"]


def test_make_installs_once_and_again_when_the_requirements_change(tmp_path):
    for name in ("Makefile", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    dry_run = ("make", "--dry-run", "install")
    first = [line for line in run(*dry_run, cwd=tmp_path).splitlines() if "pip install" in line]
    # torch is installed first and alone, because the resolver may replace it.
    assert [line.split("pip install ")[1].split()[0] for line in first] == ["torch==2.14.1", "-e"]

    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".installed").touch()
    assert "pip" not in run(*dry_run, cwd=tmp_path)
    later = (tmp_path / ".venv" / ".installed").stat().st_mtime + 10
    os.utime(tmp_path / "setup.py", (later, later))
    assert "pip install -e" in run(*dry_run, cwd=tmp_path)


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == hf_attn.__version__
    assert citation["cff-version"] and citation["title"] and citation["authors"]
