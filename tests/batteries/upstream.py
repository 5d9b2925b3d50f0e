"""transformers' own common model tests for the families of the catalogue.

A family inherits the whole battery by one class that defines a tiny configuration:

    class EchoAttUpstreamTest(UpstreamCausalLMTests, unittest.TestCase):
        model_type = "echo_att"

        def get_config(self):
            return EchoAttConfig(vocab_size=99, hidden_size=32, ...)

Its models are those of the catalogue. Upstream overrides tests that do not apply to a model in the
model's test class; here `skipped` does this, and requires a reason.
"""

import fnmatch
import os
from collections import OrderedDict
from typing import ClassVar

import pytest
import torch
import transformers
from transformers import PreTrainedConfig
from transformers.testing_utils import torch_device

from hf_attn.catalog import OWN_AUTO_CLASSES, families, find_family
from hf_attn.registration import load

from . import transformers_sources
from .generation import GenerationTests


try:
    common = transformers_sources.load("test_modeling_common")
    ConfigTester = transformers_sources.load("test_configuration_common").ConfigTester
    BackboneTesterMixin = transformers_sources.load("test_backbone_common").BackboneTesterMixin
except transformers_sources.CannotFetch as error:
    if os.environ.get("CI", "").lower() in ("1", "true"):
        raise
    pytest.skip(f"transformers' own model tests are not here: {error}", allow_module_level=True)


def _introduce_families() -> None:
    """Register our classes where upstream looks up the task of a model by its class name."""
    for auto_class in sorted({name for family in families() for name in family.models} - set(OWN_AUTO_CLASSES)):
        names = getattr(transformers, auto_class)._model_mapping._model_mapping
        ours = {family.model_type: family.models[auto_class] for family in families() if auto_class in family.models}
        for variable, value in vars(common).items():
            if value is names:
                setattr(common, variable, OrderedDict({**names, **ours}))
                break


_introduce_families()


class ModelTester:
    """Upstream's `model_tester`: a configuration, inputs and, by name, facts about them.

    A fact is looked for in the test's `facts`, in its attributes (`batch_size`, `seq_length`) and in the configuration.
    """

    is_training = True

    def __init__(self, test: "FamilyTests"):
        self._test = test
        self._config = test.get_config()

    def get_config(self) -> PreTrainedConfig:
        return self._test.get_config()

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        config = self.get_config()
        return config, self._test.get_inputs(config)

    def __getattr__(self, name: str):
        if name in self._test.facts:
            return self._test.facts[name]
        return getattr(self._test if name in ("batch_size", "seq_length") else self._config, name)


#: The tests that see how the layers of a configuration compute, initialise, save and generate. The others look at classes,
#: signatures and loading in general, which are the same for every configuration of a family.
TESTS_OF_THE_CONFIGURATION = (
    "test_all_tensors_are_parameter_or_buffer",
    "test_attention_outputs",
    "test_batching_equivalence",
    "test_beam_search_with_and_without_cache",
    "test_can_init_all_missing_weights",
    "test_continuing_from_a_cache_matches_one_run",
    "test_decoding_step_compiles_without_graph_breaks",
    "test_decoding_with_cache_matches_full_forward",
    "test_determinism",
    "test_future_tokens_do_not_matter",
    "test_hidden_states_output",
    "test_init_weights_can_init_buffers",
    "test_left_padding_does_not_matter",
    "test_model_outputs_equivalence",
    "test_prefill_in_chunks_matches_one_forward",
    "test_right_padding_does_not_matter",
    "test_save_load",
    "test_static_cache_matches_dynamic_cache",
    "test_tie_model_weights",
    "test_training",
    "test_training_gradient_checkpointing",
)


def _keep(cls: type, kept: tuple[str, ...]) -> None:
    for name in dir(cls):
        if name.startswith("test_") and name not in kept:
            setattr(cls, name, None)


def _skip(cls: type, pattern: str, reason: str) -> None:
    names = fnmatch.filter((name for name in dir(cls) if name.startswith("test_")), pattern)
    if not names:
        raise ValueError(f"{cls.__name__} skips {pattern!r}, and there is no such test.")
    if not reason:
        raise ValueError(f"{cls.__name__} skips {pattern!r} without a reason.")

    def skipped_test(self):
        self.skipTest(reason)

    for name in names:
        setattr(cls, name, skipped_test)


class FamilyTests:
    """Connects one of upstream's mixins with a family of the catalogue.

    Class attributes:
        model_type: the family.
        skipped: upstream test (a shell pattern for parametrised ones) -> the reason why it cannot apply.
        facts: attributes of upstream's `model_tester` that are not fields of the configuration, such as `seq_length` of
            an image model.
        batch_size: rows of the inputs.
        is_further_configuration: another class runs the whole battery for this family; this one runs the tests that depend
            on the configuration, `TESTS_OF_THE_CONFIGURATION`.
    """

    pytestmark = [pytest.mark.upstream]

    model_type: ClassVar[str] = ""
    skipped: ClassVar[dict[str, str]] = {}
    facts: ClassVar[dict[str, object]] = {}
    batch_size: ClassVar[int] = 3
    is_further_configuration: ClassVar[bool] = False
    is_backbone_battery: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for pattern, reason in vars(cls).get("skipped", {}).items():
            _skip(cls, pattern, reason)
        if cls.is_further_configuration:
            _keep(cls, TESTS_OF_THE_CONFIGURATION)

    def get_config(self) -> PreTrainedConfig:
        """A configuration small enough for tests that take a second."""
        raise NotImplementedError(f"{type(self).__name__} has no get_config.")

    def get_inputs(self, config: PreTrainedConfig) -> dict[str, torch.Tensor]:
        """Inputs of all models of the family, without labels."""
        raise NotImplementedError(f"{type(self).__name__} has no get_inputs.")

    def setUp(self):
        _, family = find_family(self.model_type)
        model_classes = {
            load(family.model_reference(auto_class))
            for auto_class in family.models
            if (auto_class == "AutoBackbone") == self.is_backbone_battery
        }
        self.all_model_classes = tuple(sorted(model_classes, key=lambda model_class: model_class.__name__))
        self.config_class = load(family.config_reference)
        self.model_tester = ModelTester(self)


class UpstreamModelTests(FamilyTests, common.ModelTesterMixin):
    """The battery for models of any kind; use one of the subclasses where it fits."""

    # Upstream exempts models that are older than this flag.
    test_can_init_all_missing_weights_before_2023 = True

    def get_labels(self, model_class: type, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Labels for a model class with a task that upstream does not support."""
        return {}

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels:
            inputs |= self.get_labels(model_class, inputs)
        return inputs

    def test_config(self):
        """Upstream's configuration tests, with the fields that the tiny configuration sets."""
        config = self.get_config()
        fields = type(config).__dataclass_fields__
        common_properties = ("hidden_size", "num_attention_heads", "num_hidden_layers")
        tester = ConfigTester(
            self,
            config_class=self.config_class,
            has_text_modality="vocab_size" in fields,
            common_properties=[name for name in common_properties if name in fields],
            **{name: value for name, value in config.to_diff_dict().items() if name in fields},
        )
        tester.run_common_tests()


class UpstreamTextTests(UpstreamModelTests):
    """The battery for text models: `input_ids` and `attention_mask`."""

    seq_length: ClassVar[int] = 7

    def get_inputs(self, config):
        shape = (self.batch_size, self.seq_length)
        input_ids = common.ids_tensor(shape, config.vocab_size)
        special = [token for token in (config.pad_token_id, config.eos_token_id) if isinstance(token, int)]
        if special:
            input_ids[torch.isin(input_ids, torch.tensor(special))] = max(special) + 1
        return {"input_ids": input_ids, "attention_mask": torch.ones(shape, dtype=torch.long, device=torch_device)}


class UpstreamCausalLMTests(GenerationTests, UpstreamTextTests, common.GenerationTesterMixin):
    """The battery for causal language models, with the generation tests of [`tests.batteries.generation`]."""


def image_inputs(test: FamilyTests, config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """`pixel_values` of the size and channels that a configuration names."""
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return {"pixel_values": common.floats_tensor((test.batch_size, config.num_channels, height, width))}


class UpstreamImageTests(UpstreamModelTests):
    """The battery for image models: `pixel_values`. Backbones of the family: [`UpstreamBackboneTests`]."""

    skipped = dict.fromkeys(
        ("test_inputs_embeds*", "test_model_get_set_embeddings", "test_resize_*embeddings*"),
        "image models have no token embeddings",
    )
    get_inputs = image_inputs


class UpstreamBackboneTests(FamilyTests, BackboneTesterMixin):
    """Upstream's tests of backbones, for a class of their own beside that of the other models."""

    is_backbone_battery = True
    get_inputs = image_inputs
