"""An encoder with the layers and mixers of the decoder, in which every token attends to all tokens.

A family is written like one on the decoder, see [`hf_attn.architectures.decoder`], with an `EncoderConfig` and

    class ToyModel(ToyPreTrainedModel, EncoderModel): ...

    class ToyForMaskedLM(ToyPreTrainedModel, EncoderForMaskedLM):
        model_class = ToyModel

    class ToyForSequenceClassification(GenericForSequenceClassification, ToyPreTrainedModel): ...

and likewise `GenericForTokenClassification` and `GenericForQuestionAnswering` of transformers. The generic head for sequences
classifies by the last token that is not padding.
"""

from typing import ClassVar

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask, create_bidirectional_sliding_window_mask
from transformers.modeling_outputs import MaskedLMOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .decoder import DecoderModel, DecoderPreTrainedModel, EncoderConfig


class EncoderModel(DecoderModel):
    """The encoder without a head."""

    mask_functions = {
        "full_attention": create_bidirectional_mask,
        "sliding_attention": create_bidirectional_sliding_window_mask,
    }


class EncoderForMaskedLM(DecoderPreTrainedModel):
    """The encoder with a head that predicts masked tokens.

    Attributes:
        model_class: the family's model without a head.
    """

    model_class: ClassVar[type[EncoderModel]] = EncoderModel
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        """Predict the tokens.

        Args:
            labels: `(batch, length)`, ids of the tokens with -100 where no loss is wanted; they are not shifted.

        The other arguments are those of [`EncoderModel`].
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = ["EncoderForMaskedLM", "EncoderModel"]
