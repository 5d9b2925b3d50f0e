"""Cards, stubs, saving and pushing; models are pushed to a Hub in this process and loaded from it."""

import json
import os
import re
import subprocess
import sys
from importlib import resources
from string import Template

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load as load_weights
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from hf_attn import hub
from hf_attn.catalog import OWN_AUTO_CLASSES, PAPERS, families, find_family
from hf_attn.hub import STUB_NAME, HubConfigMixin, HubTrainerMixin, auto_map, model_card, write_model_card, write_stub
from hf_attn.modeling.echo_att.modeling_echo_att import EchoAttForCausalLM
from hf_attn.registration import load
from tests.batteries.adapters import CAN_ADD_ADAPTERS, needs_add_adapter
from tests.batteries.families import main_auto_class, tiny_model
from tests.batteries.hub_server import HubServer


FAMILIES = {family.model_type: family for family in families()}
LANGUAGE_MODELS = [name for name, family in FAMILIES.items() if "AutoModelForCausalLM" in family.models]


@pytest.fixture
def echo_att():
    return tiny_model(FAMILIES["echo_att"])


def assert_same_tensors(one: dict, other: dict):
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


# --- model cards ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_card_is_valid_and_states_the_facts(model_type):
    family = FAMILIES[model_type]
    paper, _ = find_family(model_type)
    model = tiny_model(family)

    card = ModelCard(model_card(model, "someone/something"))

    assert card.data.library_name in ("transformers", "sentence-transformers")
    assert card.data.license
    assert card.data.pipeline_tag
    assert {"hf_attn", model_type} <= set(card.data.tags)
    for fact in (paper.title, paper.arxiv, type(model).__name__, f"{model.num_parameters():,}", "someone/something"):
        assert fact in card.text
    assert "import hf_attn" in card.text


@pytest.mark.parametrize("slug", [paper.slug for paper in PAPERS.values() if paper.families])
def test_the_template_asks_for_known_facts_only(slug):
    text = resources.files("hf_attn.model_cards").joinpath(f"{slug}.md").read_text(encoding="utf-8")
    template = Template(text)
    known = {"repo_id", "name", "title", "arxiv", "auto_class", "model_class", "model_type", "pipeline_tag"}
    assert template.is_valid()
    assert "\npipeline_tag: $pipeline_tag\n" in text
    assert set(template.get_identifiers()) <= known | {"num_parameters", "dtype", "config"}


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_a_model_without_a_head_is_a_feature_extractor(model_type):
    card = ModelCard(model_card(tiny_model(FAMILIES[model_type], "AutoModel")))
    assert card.data.pipeline_tag == "feature-extraction"


def test_the_configuration_in_the_card_is_what_differs_from_the_defaults(echo_att):
    text = model_card(echo_att)
    config = json.loads(text.split("```json\n")[1].split("```")[0])
    assert config["shared_layers"] == [1, 3]
    assert config["hidden_size"] == 32
    assert "rms_norm_eps" not in config and "id2label" not in config


def test_what_the_caller_knows_is_in_the_card(echo_att):
    text = model_card(
        echo_att,
        license="mit",
        language=["en"],
        datasets=["roneneldan/TinyStories"],
        tags=["small", "hf_attn"],
        evaluation={"Perplexity": 12.34567, "Tokens": 1000},
        training={"learning_rate": 1e-4},
    )
    card = ModelCard(text)
    assert card.data.license == "mit"
    assert card.data.language == ["en"]
    assert card.data.datasets == ["roneneldan/TinyStories"]
    assert card.data.tags.count("hf_attn") == 1 and "small" in card.data.tags
    assert "| Perplexity | 12.3457 |" in text and "| Tokens | 1000 |" in text
    assert "| learning_rate | 0.0001 |" in text
    assert text.index("## Evaluation") < text.index("## Training") < text.index("## Citation")


def test_the_licence_of_a_model_with_a_base_is_that_of_the_base(echo_att):
    card = ModelCard(model_card(echo_att, base_model="someone/base"))
    assert card.data.base_model == "someone/base"
    assert card.data.license == "other"
    assert card.data.license_link == "https://huggingface.co/someone/base"
    assert ModelCard(model_card(echo_att, base_model="someone/base", license="llama3")).data.license == "llama3"


def test_the_base_is_known_after_from_base(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    base = LlamaForCausalLM(config)
    assert EchoAttForCausalLM.from_base(base, shared_layers=[1]).base_report.base == ""
    base.save_pretrained(tmp_path)
    student = EchoAttForCausalLM.from_base(tmp_path, shared_layers=[1])
    assert student.base_report.base == str(tmp_path)
    assert ModelCard(model_card(student)).data.base_model is None

    assert ModelCard(model_card(student)).data.license == "unknown"

    base.config.name_or_path = "someone/base"
    student = EchoAttForCausalLM.from_base(base, shared_layers=[1])
    assert ModelCard(model_card(student)).data.base_model == "someone/base"


def test_base_and_licence_stay_with_the_model(echo_att, tmp_path):
    """Through saving, loading, saving elsewhere, a lost card, adapters that are merged, and training."""
    import shutil

    from transformers import LlamaConfig, LlamaForCausalLM

    def origin(folder) -> tuple:
        data = ModelCard.load(folder / "README.md").data
        return data.base_model, data.license

    config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    base = LlamaForCausalLM(config)
    base.config.name_or_path = "someone/base"
    EchoAttForCausalLM.from_base(base, shared_layers=[1]).save_pretrained(tmp_path / "made")
    EchoAttForCausalLM.from_pretrained(tmp_path / "made").save_pretrained(tmp_path / "again")
    (tmp_path / "again" / "README.md").unlink()
    model = EchoAttForCausalLM.from_pretrained(tmp_path / "again")
    get_peft_model(model, LoraConfig()).merge_and_unload().save_pretrained(tmp_path / "merged")
    for name in ("made", "merged"):
        assert origin(tmp_path / name) == ("someone/base", "other")

    # If the base is a folder, its card names the base model; a folder without a card is not named.
    base.save_pretrained(tmp_path / "base")
    facts = "license: llama3\nbase_model: someone/original"
    (tmp_path / "base" / "README.md").write_text(f"---\n{facts}\n---\n")
    EchoAttForCausalLM.from_base(tmp_path / "base", shared_layers=[1]).save_pretrained(tmp_path / "from_folder")
    assert origin(tmp_path / "from_folder") == ("someone/original", "llama3")
    shutil.rmtree(tmp_path / "base")
    EchoAttForCausalLM.from_pretrained(tmp_path / "from_folder").save_pretrained(tmp_path / "from_folder_again")
    assert origin(tmp_path / "from_folder_again") == ("someone/original", "llama3")
    echo_att.save_pretrained(tmp_path / "scratch")
    card = ModelCard(model_card(echo_att, base_model=str(tmp_path / "scratch")))
    assert (card.data.base_model, card.data.license) == (None, "unknown")


@pytest.mark.parametrize("model_type", ["hat", "drct", "gman", "oat"])
def test_a_model_without_a_head_gets_no_example_of_its_task(model_type, tmp_path):
    text = model_card(tiny_model(FAMILIES[model_type], "AutoModel"), str(tmp_path))
    assert 'pipeline("' not in text
    assert "has no head" in text
    tiny_model(FAMILIES[model_type], "AutoModel").save_pretrained(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(block, namespace := {})
    assert type(namespace["model"]).__name__ == FAMILIES[model_type].models["AutoModel"]


def test_numbers_and_names_keep_their_meaning_in_a_table():
    rows = {"accuracy": 0.99996, "perplexity": 12345.6, "tokens": 1234567.8, "lr": 1e-5, "steps": 3.0, "F1 | macro": 1}
    cells = [
        line.split(" | ")[-1].removesuffix(" |") for line in hub._table(("Metric", "Value"), rows).splitlines()[2:]
    ]
    assert cells == ["0.99996", "12345.6", "1234567.8", "1e-05", "3", "1"]
    assert hub._cell(0.99999999) == "0.99999999"
    assert hub._cell("F1 | macro\nof all") == r"F1 \| macro of all"


def test_a_model_of_another_package_has_no_card_here():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ValueError, match="There is no family with model type 'llama'"):
        model_card(LlamaForCausalLM(config))


# --- stubs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_stub_holds_every_class_of_the_auto_map(model_type, tmp_path):
    family = FAMILIES[model_type]
    write_stub(tmp_path, family)
    names = {}
    exec(compile((tmp_path / f"{STUB_NAME}.py").read_text(), STUB_NAME, "exec"), names)

    mapped = auto_map(family)
    assert set(mapped) == {"AutoConfig", *family.models}
    for reference in mapped.values():
        module, name = reference.split(".")
        assert module == STUB_NAME
        assert names[name].__name__ == name and name in names["__all__"]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_classes_cannot_be_copied_into_a_folder(model_type):
    family = FAMILIES[model_type]
    for reference in (family.config_reference, *map(family.model_reference, family.models)):
        load(reference).register_for_auto_class()
        assert load(reference)._auto_class is None


# --- saving --------------------------------------------------------------------------------------------------------


def test_a_card_that_is_there_is_kept(echo_att, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    echo_att.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    write_model_card(tmp_path, echo_att)
    assert "EchoAtt" in (tmp_path / "README.md").read_text()


def test_only_the_main_process_writes(echo_att, tmp_path):
    echo_att.save_pretrained(tmp_path, is_main_process=False)
    assert list(tmp_path.iterdir()) == []


def test_shards_and_dtype(echo_att, tmp_path):
    echo_att.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="20KB")
    files = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "generation_config.json", "README.md", f"{STUB_NAME}.py"} < files
    assert "model.safetensors.index.json" in files and "model.safetensors" not in files
    assert "saved in bfloat16" in (tmp_path / "README.md").read_text()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert reloaded.dtype == torch.bfloat16
    assert_same_tensors(reloaded.state_dict(), echo_att.state_dict())


def test_generation_config_travels_along(echo_att, tmp_path):
    echo_att.generation_config.max_new_tokens = 7
    echo_att.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.max_new_tokens == 7


def test_a_compiled_model_is_saved_as_itself(echo_att, tmp_path):
    compiled = torch.compile(echo_att)
    compiled.save_pretrained(tmp_path)
    assert "`EchoAttForCausalLM`" in (tmp_path / "README.md").read_text()
    assert "`EchoAttForCausalLM`" in model_card(compiled)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_tensors(reloaded.state_dict(), echo_att.state_dict())


def test_saving_a_peft_model_saves_the_adapter_and_peft_s_card(echo_att, tmp_path):
    echo_att.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    input_ids = torch.arange(5)[None]
    expected = adapted(input_ids).logits

    adapted.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "config.json").exists()
    assert not (tmp_path / "adapter" / f"{STUB_NAME}.py").exists()
    assert ModelCard.load(tmp_path / "adapter" / "README.md").data.library_name == "peft"
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    reloaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(reloaded(input_ids).logits, expected)

    reloaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert ModelCard.load(tmp_path / "merged" / "README.md").data.library_name == "transformers"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(input_ids).logits, expected, atol=1e-5, rtol=1e-4)


@needs_add_adapter
def test_saving_a_model_with_an_adapter_writes_no_card_of_a_whole_model(echo_att, tmp_path):
    echo_att.add_adapter(LoraConfig(task_type="CAUSAL_LM", target_modules=["v_proj"]))
    echo_att.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "generation_config.json",
    }


def test_a_users_own_model_type_is_saved_as_transformers_would(tmp_path):
    class OwnConfig(HubConfigMixin, PreTrainedConfig):
        model_type = "own"

    OwnConfig().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


# --- Trainer -------------------------------------------------------------------------------------------------------


class CardTrainer(HubTrainerMixin, Trainer):
    pass


def tiny_trainer(model, folder, trainer_class=CardTrainer):
    rows = [{"input_ids": torch.arange(6), "labels": torch.arange(6)}] * 4
    arguments = TrainingArguments(
        output_dir=folder, max_steps=2, learning_rate=0.25, report_to="none", use_cpu=True, eval_strategy="epoch"
    )
    return trainer_class(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)


def test_the_trainer_s_card_is_ours_with_what_it_knows(echo_att, tmp_path):
    trainer = tiny_trainer(echo_att, tmp_path)
    trainer.train()
    trainer.create_model_card(tags="more", language="en")
    card = ModelCard.load(tmp_path / "README.md")
    assert {"hf_attn", "echo_att", "generated_from_trainer", "more"} <= set(card.data.tags)
    assert card.data.language == "en"
    assert "## The mechanism" in card.text
    assert "| learning_rate | 0.25 |" in card.text
    assert "| Loss |" in card.text


def test_the_trainer_s_card_of_an_adapter_is_left_to_peft(echo_att, tmp_path):
    adapted = get_peft_model(echo_att, LoraConfig(task_type="CAUSAL_LM"))
    trainer = tiny_trainer(adapted, tmp_path)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft"
    assert "## The mechanism" not in card.text


# --- pushing and loading -------------------------------------------------------------------------------------------


PUSH = """
import json, sys
from pathlib import Path
import torch, transformers
from huggingface_hub import ModelCard, create_repo
import hf_attn

from hf_attn.hub import HubTrainerMixin
from transformers import TrainingArguments

folder = Path(sys.argv[1])
for model_type, auto_class in json.loads(sys.argv[2]).items():
    library = transformers if hasattr(transformers, auto_class) else hf_attn
    model = getattr(library, auto_class).from_pretrained(folder / model_type)
    model.push_to_hub(f"tester/{model_type}", tags=["pushed"], commit_message="first")
    ModelCard.load(f"tester/{model_type}").validate()

model = transformers.AutoModelForCausalLM.from_pretrained(folder / "echo_att")
model.save_pretrained(folder / "saved", push_to_hub=True, repo_id="saved")

(folder / "edited").mkdir()
(folder / "edited" / "README.md").write_text("---\\nlicense: mit\\n---\\nedited in the folder\\n")
model.save_pretrained(folder / "edited", push_to_hub=True, repo_id="edited")

create_repo("tester/with_card")
ModelCard("---\\nlicense: mit\\n---\\nedited on the Hub\\n").push_to_hub("tester/with_card")
model.push_to_hub("tester/with_card", tags=["pushed"])

if sys.argv[3] == "with adapter":
    model.add_adapter(__import__("peft").LoraConfig(task_type="CAUSAL_LM", target_modules=["v_proj"]))
    model.push_to_hub("tester/adapter")

class Trainer(HubTrainerMixin, transformers.Trainer):
    pass

model = transformers.AutoModelForCausalLM.from_pretrained(folder / "sigmoid_attention")
arguments = TrainingArguments(
    output_dir=folder / "trained", max_steps=2, save_steps=1, report_to="none", use_cpu=True,
    push_to_hub=True, hub_strategy="every_save", hub_always_push=True,
)
rows = [{"input_ids": torch.arange(6), "labels": torch.arange(6)}] * 4
trainer = Trainer(model=model, args=arguments, train_dataset=rows)
trainer.train()
trainer.push_to_hub(commit_message="the end")
"""

LOAD = """
import json, os, sys, traceback
import transformers
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

def load(source, auto_class, folder):
    assert not any(name.split(".")[0] == "hf_attn" for name in sys.modules)
    loaded = getattr(transformers, auto_class).from_pretrained(source, trust_remote_code=True)
    if folder is not None:
        loaded.save_pretrained(folder)
    return f"{type(loaded).__module__}.{type(loaded).__qualname__}"

for source, auto_class, folder in json.loads(sys.argv[1]):
    # A process of its own for each, in which nothing has been registered yet; without the cost of importing transformers.
    child = os.fork()
    if child == 0:
        try:
            print(json.dumps([source, auto_class, load(source, auto_class, folder)]), flush=True)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if os.waitpid(child, 0)[1] != 0:
        sys.exit(f"{auto_class} cannot load {source}")
"""

LOAD_WITHOUT_THE_PACKAGE = """
import sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_attn":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
"""


def run(script: str, *arguments: str, environment: dict[str, str], check: bool = True):
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        cwd=environment["HF_HOME"],
        timeout=400,
    )
    assert not check or result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """A Hub to which every family and some special cases have been pushed, and the folder they came from."""
    folder = tmp_path_factory.mktemp("hub")
    for model_type, family in FAMILIES.items():
        tiny_model(family).save_pretrained(folder / model_type)
    with HubServer() as hub:
        environment = hub.environment(folder)
        auto_classes = {model_type: main_auto_class(family) for model_type, family in FAMILIES.items()}
        adapter = "with adapter" if CAN_ADD_ADAPTERS else "without"
        run(PUSH, str(folder), json.dumps(auto_classes), adapter, environment=environment)
        assert hub.unknown == []
        yield hub, folder, environment


def card_of(hub: HubServer, repository: str) -> ModelCard:
    return ModelCard(hub.repositories[repository]["README.md"].decode())


@pytest.mark.slow
@pytest.mark.xdist_group("hub")
class TestPushing:
    @pytest.mark.parametrize("model_type", FAMILIES)
    def test_what_arrives(self, pushed, model_type):
        hub, folder, _ = pushed
        family = FAMILIES[model_type]
        files = hub.repositories[f"tester/{model_type}"]
        can_generate = load(family.model_reference(main_auto_class(family))).can_generate()
        # An embedder includes the files of sentence-transformers.
        of_embedders = {"modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"}
        assert set(files) - of_embedders == {
            "README.md",
            "config.json",
            "model.safetensors",
            f"{STUB_NAME}.py",
            *(["generation_config.json"] if can_generate else []),
        }
        assert json.loads(files["config.json"])["auto_map"] == auto_map(family)
        assert files[f"{STUB_NAME}.py"] == (folder / model_type / f"{STUB_NAME}.py").read_bytes()
        assert files["model.safetensors"] == (folder / model_type / "model.safetensors").read_bytes()
        # Trainer's `load_best_model_at_end` reads the file without the renaming of `from_pretrained`.
        assert load_weights(files["model.safetensors"]).keys() <= tiny_model(family).state_dict().keys()
        card = card_of(hub, f"tester/{model_type}")
        assert {"hf_attn", model_type, "pushed"} <= set(card.data.tags)
        assert f"tester/{model_type}" in card.text
        assert (f"tester/{model_type}", "first") in [commit[:2] for commit in hub.commits]

    def test_saving_with_push_to_hub(self, pushed):
        hub, _, _ = pushed
        assert "model.safetensors" in hub.repositories["tester/saved"]
        assert "## The mechanism" in card_of(hub, "tester/saved").text
        assert "tester/saved" in card_of(hub, "tester/saved").text

    def test_a_card_edited_in_the_folder_is_pushed_and_kept(self, pushed):
        hub, folder, _ = pushed
        assert card_of(hub, "tester/edited").text.strip() == "edited in the folder"
        assert "edited in the folder" in (folder / "edited" / "README.md").read_text()

    def test_the_card_of_a_repository_is_kept_and_tagged(self, pushed):
        hub, _, _ = pushed
        card = card_of(hub, "tester/with_card")
        assert card.text.strip() == "edited on the Hub"
        assert card.data.license == "mit" and card.data.tags == ["pushed"]

    @needs_add_adapter
    def test_an_adapter_is_pushed_without_the_card_of_a_whole_model(self, pushed):
        hub, _, _ = pushed
        assert "adapter_model.safetensors" in hub.repositories["tester/adapter"]
        assert "## The mechanism" not in card_of(hub, "tester/adapter").text

    def test_trainer_pushes_the_stub_from_the_first_weights_on(self, pushed):
        hub, _, _ = pushed
        commits = [files for repository, _, files in hub.commits if repository == "tester/trained"]
        with_weights = [files for files in commits if "model.safetensors" in files]
        assert len(with_weights) >= 2
        assert all(f"{STUB_NAME}.py" in files for files in with_weights)

    def test_trainer_pushes_the_card_of_the_family(self, pushed):
        hub, _, _ = pushed
        card = card_of(hub, "tester/trained")
        assert "## The mechanism" in card.text and "| learning_rate |" in card.text
        assert "generated_from_trainer" in card.data.tags

    def test_every_auto_class_loads_it_where_hf_attn_was_not_imported(self, pushed):
        hub, folder, environment = pushed
        snapshots, jobs, expected = folder / "snapshots", [], []
        for model_type, family in FAMILIES.items():
            for path, content in hub.repositories[f"tester/{model_type}"].items():
                (snapshots / model_type).mkdir(parents=True, exist_ok=True)
                (snapshots / model_type / path).write_bytes(content)
            main = main_auto_class(family)
            # Auto classes of this package import it, so they cannot be tested without it.
            if main not in OWN_AUTO_CLASSES:
                jobs.append((f"tester/{model_type}", main, str(folder / "again" / model_type)))
            # transformers 5.23 cannot load any backbone from a folder by AutoBackbone.
            left_out = {"AutoBackbone", *OWN_AUTO_CLASSES}
            for auto_class in ("AutoConfig", *(name for name in family.models if name not in left_out)):
                jobs.append((str(snapshots / model_type), auto_class, None))
            references = {"AutoConfig": family.config_reference}
            references.update({name: family.model_reference(name) for name in family.models})
            expected += [[s, a, references[a]] for s, a, _ in jobs[len(expected) :]]

        result = run(LOAD, json.dumps(jobs), environment=environment)
        assert [json.loads(line) for line in result.stdout.splitlines()] == expected
        assert hub.unknown == []

        # Saving the model that was loaded through the stub gives the same folder.
        for model_type in (
            name for name, family in FAMILIES.items() if main_auto_class(family) not in OWN_AUTO_CLASSES
        ):
            before, after = snapshots / model_type, folder / "again" / model_type
            assert {path.name for path in after.iterdir()} == {path.name for path in before.iterdir()}
            assert (after / f"{STUB_NAME}.py").read_text() == (before / f"{STUB_NAME}.py").read_text()
            assert json.loads((after / "config.json").read_text()) == json.loads((before / "config.json").read_text())
            assert_same_tensors(load_file(after / "model.safetensors"), load_file(before / "model.safetensors"))

    def test_the_code_of_the_cards_runs(self, pushed, monkeypatch):
        hub, folder, environment = pushed
        # The first tokens are special in some of the models.
        vocabulary = ("<unk>", "<1>", "<2>", "<3>", "<4>", "The", "lambda", "expression")
        words = {word: index for index, word in enumerate(vocabulary)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder / "tokenizer")
        code = []
        for model_type in LANGUAGE_MODELS:
            files = dict(hub.repositories[f"tester/{model_type}"])
            files.update({path.name: path.read_bytes() for path in (folder / "tokenizer").iterdir()})
            monkeypatch.setitem(hub.repositories, f"tester/{model_type}", files)
            code += re.findall(r"```python\n(.*?)```", files["README.md"].decode(), re.DOTALL)
        assert len(code) >= len(LANGUAGE_MODELS)
        output = run("\n".join(code), environment=environment).stdout
        asked = sum("The lambda expression" in block for block in code)
        assert asked >= 4 and output.count("'generated_text': 'The lambda expression") == asked

    def test_without_the_package_the_user_reads_what_to_install(self, pushed):
        result = run(LOAD_WITHOUT_THE_PACKAGE, "tester/echo_att", environment=pushed[2], check=False)
        assert result.returncode != 0 and "`pip install hf_attn`" in result.stderr


def test_a_folder_loads_without_trust_once_the_package_is_imported(echo_att, tmp_path):
    echo_att.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(echo_att.config)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is type(echo_att)
