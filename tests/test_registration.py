"""What `import hf_attn` registers, and what it does not import; in fresh processes and in every order of imports."""

import copy
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import hf_attn
from hf_attn.catalog import DISTRIBUTED_ATTENTION, OWN_AUTO_CLASSES, PAPERS, families
from hf_attn.registration import LazyContent, load
from tests.batteries.fork_server import ForkServer


FAMILIES = families()
#: modules whose import takes time and that many users do not need
HEAVY = (
    "accelerate",
    "datasets",
    "diffusers",
    "evaluate",
    "matplotlib",
    "peft",
    "scipy",
    "sklearn",
    "torchvision",
    "transformers.image_processing_utils",
    "transformers.modeling_utils",
    "transformers.trainer",
    "triton",
)


def run(code: str) -> str:
    """Run Python code in a fresh process and return what it prints."""
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture(scope="module")
def run_quickly():
    """Like [`run`], in a process that has already imported third-party libraries other than transformers."""
    libraries = ("torch", "torchvision", "scipy.optimize", "sklearn.metrics", "accelerate", "PIL.Image", "tokenizers")
    with ForkServer(libraries, forget=("transformers",)) as server:
        yield server.run


# --- what is not imported ---------------------------------------------------------------------------------------------


def test_import_alone_imports_neither_torch_nor_transformers():
    loaded = run("import sys, hf_attn; print(*sys.modules)").split()
    assert not {"torch", "transformers", "numpy"} & set(loaded)
    assert {name for name in loaded if name.startswith("hf_attn.")} == {
        "hf_attn._import_hooks",
        "hf_attn._moved",
        "hf_attn.catalog",
        "hf_attn.catalog.domains",
        "hf_attn.catalog.entries",
        "hf_attn.catalog.images",
        "hf_attn.catalog.text",
        "hf_attn.registration",
    }


def test_import_with_the_auto_classes_adds_nothing_to_theirs():
    """After `from transformers import AutoConfig, AutoModelForCausalLM`, importing hf_attn adds only three modules."""
    auto = "from transformers import AutoConfig, AutoModelForCausalLM"
    without = set(run(f"import sys; {auto}; print(*sys.modules)").split())
    both = set(run(f"import sys, hf_attn; {auto}; print(*sys.modules)").split())
    assert {name for name in both - without if not name.startswith("hf_attn")} == set()
    assert not both & set(HEAVY)
    assert not [name for name in both if name.startswith("hf_attn.modeling")]


def test_a_foreign_model_imports_no_family(run_quickly):
    loaded = run_quickly(
        """
        import sys, hf_attn
        from transformers import LlamaConfig, LlamaForCausalLM
        LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                     num_attention_heads=2), )
        print(*sys.modules)
        """
    ).split()
    assert "hf_attn.attention.sigmoid" in loaded
    assert not [name for name in loaded if name.startswith("hf_attn.modeling")]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_a_family_imports_no_other_and_needs_the_core_install_only(family, run_quickly):
    """With the packages of all extras missing, its configuration and models can still be imported."""
    extras = [
        "datasets",
        "diffusers",
        "evaluate",
        "gguf",
        "matplotlib",
        "peft",
        "PIL",
        "sklearn",
        "torchvision",
        "triton",
    ]
    references = [family.config_reference, *(family.model_reference(name) for name in family.models)]
    loaded = run_quickly(
        f"""
        import sys
        sys.modules.update(dict.fromkeys({extras}))
        import hf_attn
        from hf_attn.registration import load
        for reference in {references}:
            load(reference)
        print(*(name for name in sys.modules if name.startswith("hf_attn.modeling.")))
        """
    ).split()
    assert {name.split(".")[2] for name in loaded} == {family.folder or family.model_type}


# --- what is registered, in every order ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "imports",
    [
        "import hf_attn, transformers",
        "import transformers, hf_attn",
        "from transformers import AutoModelForCausalLM, AutoConfig; import hf_attn",
        "import hf_attn; from transformers import AutoModelForCausalLM",
        "from transformers import LlamaForCausalLM; import hf_attn",
        "import hf_attn; from transformers import LlamaForCausalLM",
        "import transformers.masking_utils, hf_attn",
        "import hf_attn, transformers.masking_utils",
        "import hf_attn.attention",
        "import hf_attn.modeling.echo_att.modeling_echo_att",
        "import hf_attn, importlib; importlib.reload(hf_attn)",
    ],
)
def test_order_of_imports_does_not_matter(imports, run_quickly):
    run_quickly(
        f"""
        {imports}
        from transformers import AttentionInterface, AutoConfig, AutoModel, AutoModelForCausalLM
        from transformers.masking_utils import AttentionMaskInterface
        config = AutoConfig.for_model("sigmoid_attention", hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                      num_attention_heads=2, vocab_size=11)
        assert type(AutoModelForCausalLM.from_config(config)).__name__ == "SigmoidAttentionForCausalLM"
        assert type(AutoModel.from_config(config)).__name__ == "SigmoidAttentionModel"
        for name in ("sigmoid", "sigmoid_eager", "sigmoid_torch", "sigmoid_triton"):
            assert name in AttentionInterface._global_mapping and name in AttentionMaskInterface._global_mapping
        """
    )


@pytest.mark.parametrize("imports", ["import hf_attn, peft", "import peft, hf_attn", "import peft.utils, hf_attn"])
def test_peft_tables_are_filled_in_both_orders(imports, run_quickly):
    pytest.importorskip("peft")
    run_quickly(
        f"""
        {imports}
        from hf_attn.catalog import families
        from peft.utils import constants
        tables = {{name: table for name, table in vars(constants).items()
                  if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("TARGET_MODULES_MAPPING")}}
        assert len(tables) > 30
        expected = [family for family in families() if family.peft]
        assert expected
        for family in expected:
            for name, table in tables.items():
                if isinstance(family.peft, str):
                    assert table.get(family.model_type) == table.get(family.peft), (name, family.model_type)
            assert constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[family.model_type]
        """
    )


def test_a_failed_import_can_be_tried_again(run_quickly):
    """Registration happens at the first import that succeeds."""
    run_quickly(
        """
        import sys, types
        import hf_attn
        from hf_attn._import_hooks import when_imported
        import pathlib, tempfile
        folder = tempfile.mkdtemp()
        sys.path.insert(0, folder)
        pathlib.Path(folder, "fragile.py").write_text("import not_there_yet\\nvalue = 1")
        seen = []
        when_imported("fragile", lambda module: seen.append(module.value))
        try:
            import fragile
        except ModuleNotFoundError:
            pass
        assert seen == []
        pathlib.Path(folder, "not_there_yet.py").write_text("")
        import importlib
        importlib.invalidate_caches()
        import fragile
        assert seen == [1]
        """
    )


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_auto_classes_resolve_the_family(family):
    config_class = load(family.config_reference)
    assert config_class.model_type == family.model_type
    assert CONFIG_MAPPING[family.model_type] is config_class
    assert type(AutoConfig.for_model(family.model_type)) is config_class
    import transformers

    for auto_class in family.models:
        model_class = load(family.model_reference(auto_class))
        owner = hf_attn if auto_class in OWN_AUTO_CLASSES else transformers
        assert getattr(owner, auto_class)._model_mapping[config_class] is model_class
        assert model_class.config_class is config_class


def test_a_folder_loads_and_generates_through_the_pipeline(tmp_path, run_quickly):
    """Saved here, loaded by a process that imported the package but names none of its classes."""
    config = AutoConfig.for_model(
        "sigmoid_attention",
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=32,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(32)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w1").save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("w3 w4")["input_ids"] == [3, 4]
    printed = run_quickly(
        f"""
        import hf_attn
        from transformers import pipeline
        generator = pipeline("text-generation", model={str(tmp_path)!r})
        print(type(generator.model).__name__)
        print(generator("w3 w4", max_new_tokens=3, min_new_tokens=3, do_sample=False)[0]["generated_text"])
        """
    ).splitlines()[-2:]
    assert printed[0] == "SigmoidAttentionForCausalLM"
    assert printed[1].startswith("w3 w4") and printed[1].count("w") == 5


def test_transformers_own_models_are_left_alone():
    llama = CONFIG_MAPPING["llama"]
    assert AutoModelForCausalLM._model_mapping[llama].__module__ == "transformers.models.llama.modeling_llama"


# --- the mappings stay ordinary mappings -----------------------------------------------------------------------------


def test_mappings_can_be_pickled_and_copied():
    config_class = CONFIG_MAPPING["echo_att"]
    for mapping in (AutoModel._model_mapping, AutoModelForCausalLM._model_mapping):
        for other in (pickle.loads(pickle.dumps(mapping)), copy.deepcopy(mapping)):
            assert other[config_class] is mapping[config_class]
    assert pickle.loads(pickle.dumps(CONFIG_MAPPING))["echo_att"] is config_class


def test_mappings_can_be_iterated():
    names = {load(family.config_reference) for family in FAMILIES if "AutoModelForCausalLM" in family.models}
    assert names <= set(AutoModelForCausalLM._model_mapping.keys())
    assert len(list(AutoModelForCausalLM._model_mapping)) == len(AutoModelForCausalLM._model_mapping.items())
    assert {family.model_type for family in FAMILIES} <= set(CONFIG_MAPPING.keys())


def test_names_of_model_types_are_listed_without_importing_anything(run_quickly):
    loaded = run_quickly(
        """
        import sys, hf_attn
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
        assert "echo_att" in CONFIG_MAPPING and "echo_att" in list(CONFIG_MAPPING) and "echo_att" in CONFIG_MAPPING.keys()
        print(*(name for name in sys.modules if name.startswith("hf_attn.modeling")))
        """
    )
    assert loaded == ""


def test_lazy_content():
    content = LazyContent(
        {"other": 1}, {"path": "pathlib.Path", "set": "collections.OrderedDict"}, keys_are_classes=False
    )
    import collections
    import pathlib

    assert len(content) == 3 and list(content) == ["other", "path", "set"]
    assert content.get("nothing", "default") == "default"
    with pytest.raises(KeyError):
        content["nothing"]
    content["set"] = "mine"
    assert content["set"] == "mine" and len(content) == 3
    assert content["path"] is pathlib.Path
    assert dict(content) == {"other": 1, "path": pathlib.Path, "set": "mine"}

    by_class = LazyContent({}, {"collections.OrderedDict": "collections.Counter"}, keys_are_classes=True)
    assert collections.Counter not in by_class
    assert collections.OrderedDict in by_class and by_class[collections.OrderedDict] is collections.Counter
    assert list(by_class.items()) == [(collections.OrderedDict, collections.Counter)]


def test_a_user_can_still_register_classes(tmp_path):
    class MyConfig(PreTrainedConfig):
        model_type = "my_own_type"

    AutoConfig.register("my_own_type", MyConfig)
    try:
        assert type(AutoConfig.for_model("my_own_type")) is MyConfig
        AutoModel.register(MyConfig, torch.nn.Linear)
        assert AutoModel._model_mapping[MyConfig] is torch.nn.Linear
    finally:
        CONFIG_MAPPING._extra_content.pop("my_own_type", None)
        AutoModel._model_mapping._extra_content.pop(MyConfig, None)


def test_transformers_keeps_registered_classes_where_we_put_ours():
    """The only private name that we use. If this fails, transformers has moved it: see `hf_attn.registration._fill`."""
    message = (
        "transformers no longer keeps registered classes in `_extra_content`; find their new place, adapt "
        "hf_attn/registration.py and raise the lower bound of the transformers requirement."
    )
    probe = copy.deepcopy(AutoModel._model_mapping)
    probe.register(CONFIG_MAPPING["echo_att"], torch.nn.Identity, exist_ok=True)
    assert probe._extra_content[CONFIG_MAPPING["echo_att"]] is torch.nn.Identity, message
    assert isinstance(AutoModel._model_mapping._extra_content, LazyContent), message
    assert isinstance(CONFIG_MAPPING._extra_content, LazyContent), message


def test_another_transformers_gives_a_clear_error():
    from hf_attn.registration import _fill

    with pytest.raises(RuntimeError, match=r"hf_attn cannot register its families: .*version"):
        _fill(object(), {}, keys_are_classes=False)


# --- the catalogue --------------------------------------------------------------------------------------------------


def test_catalogue_is_consistent():
    assert len(PAPERS) == 29
    model_types = [family.model_type for family in FAMILIES]
    assert len(set(model_types)) == len(model_types)
    for paper in PAPERS.values():
        if not paper.available:
            assert not paper.families and not paper.attention and not paper.converter, paper.slug


def test_every_attention_function_belongs_to_a_paper():
    from hf_attn.attention import MECHANISMS

    listed = [name for paper in PAPERS.values() for name in paper.attention]
    assert sorted(listed) == sorted([*(mechanism.name for mechanism in MECHANISMS), *DISTRIBUTED_ATTENTION])


def test_public_names_resolve():
    for name in hf_attn.__all__:
        assert getattr(hf_attn, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = hf_attn.nothing
