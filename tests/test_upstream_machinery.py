"""The machinery that runs transformers' own tests: fetching, skipping, and the report at the end of a run."""

import importlib.util
import os
import subprocess
import sys
import textwrap
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hf_attn.catalog import families
from tests.batteries import transformers_sources
from tests.batteries.upstream import UpstreamCausalLMTests, UpstreamImageTests, common


ROOT = Path(__file__).parents[1]


# --- fetching ------------------------------------------------------------------------------------------------------


def test_every_family_has_its_upstream_tests():
    """Every new family needs a test class with its model type."""
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "modeling").rglob("test_*.py"))
    for family in families():
        assert f'model_type = "{family.model_type}"' in sources, (
            f"{family.model_type} has no test class: see the example in tests/batteries/upstream.py."
        )


def test_unpacked_package_is_complete():
    package = transformers_sources.cache_folder() / transformers_sources.PACKAGE
    for name, source in transformers_sources.STUBS.items():
        assert (package / name).read_text(encoding="utf-8") == source
        assert (package / name).with_name("__init__.py").is_file()
    assert (package / "test_modeling_common.py").is_file()


def test_several_processes_fetch_once(tmp_path, monkeypatch):
    downloads = []

    def download(folder: Path) -> None:
        downloads.append(folder)
        source = folder / "transformers-0" / "tests"
        source.mkdir(parents=True)
        (source / "test_modeling_common.py").write_text("value = 1\n")
        subprocess.run(
            ["tar", "-czf", str(folder / "transformers-0.tar.gz"), "-C", str(folder), "transformers-0"], check=True
        )

    monkeypatch.setattr(transformers_sources, "_download", download)
    folder = tmp_path / "cache" / "tests"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(transformers_sources.fetch, [folder] * 4))
    assert len(downloads) == 1
    assert (folder / transformers_sources.PACKAGE / "test_modeling_common.py").read_text() == "value = 1\n"
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == ["tests"]


def test_a_failed_download_leaves_nothing_behind(tmp_path, monkeypatch):
    def download(folder: Path) -> None:
        (folder / "half").write_text("")
        raise transformers_sources.CannotFetch("no network")

    monkeypatch.setattr(transformers_sources, "_download", download)
    with pytest.raises(transformers_sources.CannotFetch, match="no network"):
        transformers_sources.fetch(tmp_path / "tests")
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_what_pip_says_is_passed_on(tmp_path, monkeypatch):
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(transformers_sources.CannotFetch, match=r"(?s)transformers==.*No matching distribution found"):
        transformers_sources.fetch(tmp_path / "tests")


@pytest.mark.parametrize("ci", ["", "true"])
def test_without_the_sources_a_desk_skips_and_ci_fails(ci, monkeypatch):
    attempts = []

    def fetch(folder: Path) -> None:
        attempts.append(folder)
        raise transformers_sources.CannotFetch("no network")

    monkeypatch.setattr(transformers_sources, "fetch", fetch)
    monkeypatch.setenv("CI", ci)
    transformers_sources.try_to_fetch.cache_clear()
    try:
        for _ in range(2):  # as in the imports of two test files
            spec = importlib.util.spec_from_file_location(
                "tests.batteries.upstream_again", ROOT / "tests" / "batteries" / "upstream.py"
            )
            expected = transformers_sources.CannotFetch if ci else pytest.skip.Exception
            with pytest.raises(expected, match="no network"):
                spec.loader.exec_module(importlib.util.module_from_spec(spec))
        assert len(attempts) == 1
    finally:
        transformers_sources.try_to_fetch.cache_clear()


# --- what a family says ------------------------------------------------------------------------------------------------


def test_families_are_known_to_upstream_by_their_task():
    """Upstream chooses labels by class name; without this no loss of ours would be tested."""
    names = common.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    assert names["sigmoid_attention"] == "SigmoidAttentionForCausalLM"
    assert names["llama"] == "LlamaForCausalLM"
    assert (
        "sigmoid_attention"
        not in __import__("transformers").models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    )


def test_a_skip_needs_a_test_and_a_reason():
    with pytest.raises(ValueError, match="skips 'test_nothing', and there is no such test"):
        type("Wrong", (UpstreamCausalLMTests,), {"skipped": {"test_nothing": "because"}})
    with pytest.raises(ValueError, match="skips 'test_training' without a reason"):
        type("Wrong", (UpstreamCausalLMTests,), {"skipped": {"test_training": ""}})


def test_a_skip_by_pattern_tells_its_reason():
    class Skipping(UpstreamImageTests, unittest.TestCase):
        skipped = {"test_eager_matches_sdpa*": "told so"}

    names = [name for name in dir(Skipping) if name.startswith("test_eager_matches_sdpa")]
    assert len(names) > 10
    for name in names:
        with pytest.raises(unittest.SkipTest, match="told so"):
            getattr(Skipping, name)(Skipping(name))


# --- the report ----------------------------------------------------------------------------------------------------


def test_report_tells_what_ran_and_why_not(tmp_path):
    """With two workers, whose reports are sent to the printing process."""
    source = """
        import unittest

        from hf_attn.modeling.echo_att.configuration_echo_att import EchoAttConfig
        from tests.batteries.upstream import UpstreamCausalLMTests


        class WrittenTest(UpstreamCausalLMTests, unittest.TestCase):
            model_type = "echo_att"
            skipped = {"test_training": "told so"}

            def get_config(self):
                return EchoAttConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
                                     num_attention_heads=2, shared_layers=[1])

            def test_model_is_small(self):
                self.fail("on purpose")
    """
    path = tmp_path / "test_written.py"
    path.write_text(textwrap.dedent(source))
    selection = "test_training or test_model_is_small or test_logits_to_keep"
    options = ["-q", "-p", "no:cacheprovider", "-ra", "-p", "tests.conftest", "-n", "2", "-k", selection]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", str(path), *options], cwd=ROOT, capture_output=True, text=True, check=False
    )
    lines = result.stdout.splitlines()
    # `test_logits_to_keep` is ours; so is the failing test, since the class is.
    heading = next(i for i, line in enumerate(lines) if "transformers' common model tests" in line)
    assert lines[heading + 1] == "echo_att: 4 ran, 3 passed, 1 failed, 1 skipped", result.stdout
    assert lines[heading + 2] == "      1 skipped: told so"
    assert "1 failed, " in lines[-1] and "1 skipped" in lines[-1]
    assert "SKIPPED" not in result.stdout
    assert result.returncode == 1
