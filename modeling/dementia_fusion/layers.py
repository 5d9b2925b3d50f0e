"""The layers behind the encoders: attention within a modality, transport between the modalities, and their fusion."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import eager_attention_forward

from hf_attn.architectures.transport import entropic_plan, exact_plan, squared_distances, transported

from .configuration_dementia_fusion import DementiaFusionConfig


def masked_mean(states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over the real tokens, `(batch, length, width)` -> `(batch, width)`."""
    if mask is None:
        return states.mean(1)
    weights = mask.to(states.dtype).unsqueeze(-1)
    return (states * weights).sum(1) / weights.sum(1)


class ModalityAttention(nn.Module):
    """Self-attention within a modality, without an output projection; subclasses change queries and keys before it.

    Args:
        config: configuration.
        modality: `"text"` or `"vision"`.
    """

    is_causal = False

    def __init__(self, config: DementiaFusionConfig, modality: str):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.query_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.key_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.value_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def queries_and_keys(
        self, states: Sequence[torch.Tensor], mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys, `(batch, heads, length, head_dim)`."""
        raise NotImplementedError

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def forward(
        self, states: Sequence[torch.Tensor], mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend. Only keys are masked: rows of padding are computed like the others.

        Args:
            states: states of the layers of the encoder, each `(batch, length, hidden_size)`; the last one is attended.
            mask: `(batch, length)`, true for real tokens.

        Returns:
            `(batch, length, hidden_size)`, and the weights if the attention function returns them, as the eager one does.
        """
        hidden_states = states[-1]
        query, key = self.queries_and_keys(states, mask)
        value = self.split_heads(self.value_proj(hidden_states))
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=mask
        )
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.head_dim**-0.5,
        )
        return output.flatten(-2), weights


class ContextGate(nn.Module):
    """How much of a token's query or key is context, `sigmoid(x v_h + c v_c)`, `(batch, length, 1)`."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.hidden = nn.Linear(hidden_size, 1, bias=False)
        self.context = nn.Linear(hidden_size, 1, bias=False)

    def forward(self, hidden_states: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return (self.hidden(hidden_states) + self.context(context)).sigmoid()


class ContextAttention(ModalityAttention):
    """Context-aware self-attention (Yang et al., AAAI 2019): queries and keys are mixed with a context of the layer.

    c = C U,  lambda = sigmoid(x v_h + c v_c),  x <- (1 - lambda) x + lambda c;  x is the query or the key of a token.
    """

    def __init__(self, config: DementiaFusionConfig, modality: str):
        super().__init__(config, modality)
        width = config.context_size(modality)
        self.context_query_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.context_key_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.query_gate = ContextGate(config.hidden_size)
        self.key_gate = ContextGate(config.hidden_size)

    def context(self, states: Sequence[torch.Tensor], mask: torch.Tensor | None) -> torch.Tensor:
        """Context vectors `(batch, length or 1, context_size)`."""
        kind = self.config.context
        if kind == "global":
            return masked_mean(states[-1], mask).unsqueeze(1)
        wanted = self.context_query_proj.in_features // states[-1].shape[-1] + (kind == "deep")
        if len(states) != wanted:
            raise ValueError(
                f"The {kind} context needs {wanted} hidden states (the embeddings and the output of every layer), got "
                f"{len(states)}."
            )
        if kind == "deep":
            return torch.cat(list(states[:-1]), dim=-1)
        return torch.cat([masked_mean(layer, mask) for layer in states], dim=-1).unsqueeze(1)

    def queries_and_keys(self, states, mask):
        hidden_states, context = states[-1], self.context(states, mask)
        mixed = []
        for proj, context_proj, gate in (
            (self.query_proj, self.context_query_proj, self.query_gate),
            (self.key_proj, self.context_key_proj, self.key_gate),
        ):
            own, around = proj(hidden_states), context_proj(context)
            mixed.append(self.split_heads(torch.lerp(own, around.expand_as(own), gate(own, around).expand_as(own))))
        return mixed


class HeadGate(nn.Module):
    """Gate of queries and keys, `sigmoid(((q W_q + b_q) * (k W_k + b_k)) W + b)`; all heads share the weights."""

    def __init__(self, head_dim: int, channels: int):
        super().__init__()
        self.query = nn.Linear(head_dim, head_dim)
        self.key = nn.Linear(head_dim, head_dim)
        self.out = nn.Linear(head_dim, 2 * channels)

    def forward(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Gates of a token's query, then of its key: `(batch, heads, length, 2 * channels)`."""
        return self.out(self.query(query) * self.key(key)).sigmoid()


class GateAttention(ModalityAttention):
    """Self-attention with a gate model: query and key of a token are multiplied by gates computed from both."""

    def __init__(self, config: DementiaFusionConfig, modality: str):
        super().__init__(config, modality)
        self.gate = HeadGate(self.head_dim, self.head_dim if config.gate == "channel" else 1)

    def queries_and_keys(self, states, mask):
        query, key = (self.split_heads(proj(states[-1])) for proj in (self.query_proj, self.key_proj))
        query_gate, key_gate = self.gate(query, key).chunk(2, dim=-1)
        return query * query_gate, key * key_gate


ATTENTIONS = {"context": ContextAttention, "gate": GateAttention}


@dataclass
class Interaction:
    """Output of the interaction of both modalities.

    Attributes:
        streams: `(batch, streams, hidden_size)`: means of the attended text, the attended image and, with transport, the text
            mapped to the image and the image mapped to the text.
        text_to_image_plan: `(batch, text length, image length)`, rows and columns of padding are zero; `None` without transport.
        image_to_text_plan: `(batch, image length, text length)`.
        attentions: weights of the attention within text and image, if the attention function returns them.
    """

    streams: torch.Tensor
    text_to_image_plan: torch.Tensor | None = None
    image_to_text_plan: torch.Tensor | None = None
    attentions: tuple[torch.Tensor, torch.Tensor] | None = None


class ModalityInteraction(nn.Module):
    """Attention within text and image, and transport between the attended sequences."""

    def __init__(self, config: DementiaFusionConfig):
        super().__init__()
        self.config = config
        self.text_attention = ATTENTIONS[config.intra](config, "text")
        self.image_attention = ATTENTIONS[config.intra](config, "vision")

    def forward(
        self,
        text_states: Sequence[torch.Tensor],
        image_states: Sequence[torch.Tensor],
        text_mask: torch.Tensor | None = None,
    ) -> Interaction:
        """Interact.

        Args:
            text_states: states of the layers of the text encoder, each `(batch, text length, hidden_size)`.
            image_states: the same of the image encoder.
            text_mask: `(batch, text length)`, true for real tokens.
        """
        text_mask = None if text_mask is None else text_mask.bool()
        text, text_weights = self.text_attention(text_states, text_mask)
        image, image_weights = self.image_attention(image_states)
        streams, plans = [masked_mean(text, text_mask), image.mean(1)], (None, None)
        if self.config.cross != "none":
            cost = squared_distances(text, image, text_mask)
            plans = (self.plan(cost, text_mask, None), self.plan(cost.mT, None, text_mask))
            streams += [
                masked_mean(transported(plans[0], image), text_mask),
                transported(plans[1], text).mean(1),
            ]
        attentions = None if text_weights is None else (text_weights, image_weights)
        return Interaction(torch.stack(streams, dim=1), *plans, attentions)

    def plan(
        self, cost: torch.Tensor, row_mask: torch.Tensor | None, column_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Transport plans of costs `(batch, n, m)`."""
        if self.config.cross == "emd":
            return exact_plan(cost, row_mask, column_mask)
        return entropic_plan(cost, self.config.ot_reg, self.config.ot_iters, row_mask, column_mask)


class AttentionFusion(nn.Module):
    """Mean of the streams with the weights `softmax_k(w . tanh(A s_k + b))`."""

    def __init__(self, config: DementiaFusionConfig):
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, streams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(batch, streams, hidden_size)` -> `(batch, hidden_size)` and weights `(batch, streams)`."""
        weights = self.score(self.proj(streams).tanh()).squeeze(-1).softmax(-1)
        return (weights.unsqueeze(-1) * streams).sum(1), weights


class ConcatFusion(nn.Module):
    """`relu(A [s_1; s_2; ...] + b)`."""

    def __init__(self, config: DementiaFusionConfig):
        super().__init__()
        self.proj = nn.Linear(config.num_streams * config.hidden_size, config.hidden_size)

    def forward(self, streams: torch.Tensor) -> tuple[torch.Tensor, None]:
        """`(batch, streams, hidden_size)` -> `(batch, hidden_size)`; there are no weights."""
        return self.proj(streams.flatten(1)).relu(), None


FUSIONS = {"attention": AttentionFusion, "concat": ConcatFusion}


class StreamClassifier(nn.Module):
    """Fusion of the streams, dropout, and a linear classifier."""

    def __init__(self, config: DementiaFusionConfig):
        super().__init__()
        self.label_smoothing = config.label_smoothing
        self.fusion = FUSIONS[config.fusion](config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(
        self, streams: torch.Tensor, labels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Classify.

        Returns:
            Logits `(batch, num_labels)`, the weights of the streams `(batch, streams)` if the fusion has any, and with labels
            `(batch,)` the label-smoothed cross entropy.
        """
        fused, weights = self.fusion(streams)
        logits = self.classifier(self.dropout(fused))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.float(), labels.view(-1), label_smoothing=self.label_smoothing)
        return logits, weights, loss


@dataclass
class FusionHeadOutput:
    """Output of a [`FusionHead`]; see [`Interaction`] and [`StreamClassifier`]."""

    logits: torch.Tensor
    loss: torch.Tensor | None
    fusion_weights: torch.Tensor | None
    interaction: Interaction


class FusionHead(nn.Module):
    """All layers after the encoders, for hidden states that have been computed elsewhere."""

    def __init__(self, config: DementiaFusionConfig):
        super().__init__()
        self.config = config
        self.interaction = ModalityInteraction(config)
        self.classifier = StreamClassifier(config)

    def forward(
        self,
        text_states: Sequence[torch.Tensor],
        image_states: Sequence[torch.Tensor],
        text_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> FusionHeadOutput:
        """Classify; see [`ModalityInteraction.forward`] for the arguments, and `labels` `(batch,)`."""
        interaction = self.interaction(text_states, image_states, text_mask)
        logits, weights, loss = self.classifier(interaction.streams, labels)
        return FusionHeadOutput(logits, loss, weights, interaction)
