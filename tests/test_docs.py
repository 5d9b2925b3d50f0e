"""The documentation is correct: its code runs as printed, its table matches the catalogue, its commands exist."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)

import hf_attn
from hf_attn import hub
from hf_attn.catalog import OWN_AUTO_CLASSES, PAPERS, find_family
from tests.batteries.families import tiny_model
from tests.batteries.fork_server import ForkServer
from tests.batteries.hub_server import HubServer
from tests.batteries.scripts import loaded_script
from tests.modeling.sd_rpn.tiny import tiny_base, tiny_processor


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
DOCUMENTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")}


def code_blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document, re.DOTALL)


PAGES_WITH_CODE = [name for name, text in PAGES.items() if code_blocks(text, "python")]


@pytest.fixture
def docs_script():
    with loaded_script("make_docs") as module:
        yield module


@pytest.mark.parametrize("name", [*PAGES, *map(str, sorted((ROOT / "model_cards").glob("*.md")))])
def test_no_marker_of_a_merge_conflict_is_left(name):
    assert not re.search(r"^(<{7}|={7}|>{7})( |$)", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)


def test_the_generated_parts_of_the_readme_are_current(docs_script):
    assert docs_script.generated_readme(README) == README, "README.md is out of date: run `make docs`"


def test_the_generated_pages_are_those_of_the_catalogue(docs_script):
    for name, text in docs_script.generated_pages().items():
        assert PAGES[f"docs/{name}"] == text, f"docs/{name} is out of date: run `make docs`"


def test_every_public_name_has_a_place_in_the_reference():
    reference = "".join(text for name, text in PAGES.items() if name.startswith("docs/reference/"))
    documented = {line.rpartition(".")[2] for line in re.findall(r"^::: (.+)$", reference, re.MULTILINE)}
    documented |= {name for name in OWN_AUTO_CLASSES if f"## `{name}`" in reference}
    assert documented == set(hf_attn.__all__) - {"__version__"}


def test_the_table_has_a_row_for_each_paper(docs_script):
    rows = [line for line in docs_script.papers_table("docs/papers/").splitlines() if "arxiv.org" in line]
    assert len(rows) == len(PAPERS) == 29
    for paper in PAPERS.values():
        (row,) = (row for row in rows if f"`{paper.slug}`" in row)
        assert (f"docs/papers/{paper.slug}.md" in row) == paper.available


def test_readme_can_be_read_in_one_go():
    assert len(README.splitlines()) <= 200


def test_a_readme_without_markers_is_refused(docs_script):
    with pytest.raises(ValueError, match=r"README\.md must contain the lines"):
        docs_script.generated_readme("# hf_attn\n")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_files_exist(name):
    text = DOCUMENTS[name]
    links = {link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link}
    files = set(re.findall(r"(?:scripts|tests|model_cards|hf_attn)/[\w/]+\.(?:py|md|json|yaml)", text))
    assert not [path for path in links | files if "<" not in path and not (ROOT / path).exists()]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_make_targets_exist(name):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z]+)", DOCUMENTS[name]))
    assert named and named <= targets


def test_the_facts_that_a_card_may_use_are_documented():
    paper, family = find_family("echo_att")
    documented = set(re.findall(r"`\$(\w+)`", DOCUMENTS["CONTRIBUTING.md"]))
    assert documented == set(hub._facts(tiny_model(family), paper, family, None)) - {"is_headless"}


def small_llama(folder: Path) -> None:
    """Save a tiny model in the place of SmolLM2-135M, with the same number of layers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([README], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    wrapped.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(wrapped),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=30,
        num_attention_heads=3,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def small_vit(folder: Path) -> None:
    """Save a tiny model in the place of a ViT for 224 pixels."""
    config = ViTConfig(hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=3, num_labels=10)
    ViTForImageClassification(config).save_pretrained(folder)


def small_llava(folder: Path) -> None:
    """Save a tiny model in the place of LLaVA-1.5-7B, with enough layers for the branch of SD-RPN, and its processor."""
    config = copy.deepcopy(tiny_base("llava").config)
    config.text_config.num_hidden_layers = 19
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    tiny_processor("llava").save_pretrained(folder)


STAND_INS = {
    "HuggingFaceTB/SmolLM2-135M": small_llama,
    "google/vit-base-patch16-224": small_vit,
    "llava-hf/llava-1.5-7b-hf": small_llava,
}
#: modules that most pages import
LIBRARIES = ("torch", "torchvision", "transformers", "hf_attn", "peft", "datasets", "matplotlib.figure")


@pytest.fixture(scope="module")
def hub_server(tmp_path_factory):
    """A Hub that holds small models under the names that the pages use."""
    with HubServer() as server:
        for name, save in STAND_INS.items():
            folder = tmp_path_factory.mktemp("stand_in")
            save(folder)
            server.repositories[name] = {path.name: path.read_bytes() for path in folder.iterdir()}
        yield server


@pytest.fixture(scope="module")
def fork_server(hub_server, tmp_path_factory):
    environment = {"OMP_NUM_THREADS": "1", **hub_server.environment(tmp_path_factory.mktemp("home"))}
    with ForkServer(LIBRARIES, environment=environment) as server:
        yield server


@pytest.mark.slow
@pytest.mark.xdist_group("pages")
@pytest.mark.parametrize("page", PAGES_WITH_CODE)
def test_the_python_of_a_page_runs_from_its_first_line(page, fork_server, hub_server, tmp_path):
    golden = ROOT / "tests" / "goldens" / "sigmoid_attention" / "gala_tiny"
    shutil.copy(golden / "weights.safetensors", tmp_path / "gala.safetensors")
    (tmp_path / "gala.json").write_text(json.dumps(json.loads((golden / "case.json").read_text())["config"]))
    fork_server.run("\n".join(code_blocks(PAGES[page], "python")), tmp_path)
    assert hub_server.unknown == []
