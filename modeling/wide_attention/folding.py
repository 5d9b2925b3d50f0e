"""Folding of a softmax layer with a class token, which is exact: only the state of that token is computed.

The class token is the same in every text, so its query is a constant of the weights, and so are, in each head,

    g_h = Wk_h^T q_h / sqrt(d),   p_h = softmax_j(y_j g_h),   o_h = Wv_h sum_j p_hj y_j + bv_h

with y the normalised inputs of the layer. Keys and values are never formed; a bias of the keys cancels in the softmax. The
input of the layer is an embedding plus a position, so for a small vocabulary the scores are a table over positions, tokens
and heads.
"""

from dataclasses import dataclass

import torch
from torch import nn

from .positions import sinusoids


#: largest table of scores that is created by default, in bytes
MAX_TABLE = 128 * 2**20


def refusal(model: nn.Module) -> str | None:
    """Why a [`WideTransformerForSequenceClassification`] cannot be folded, or `None` if it can."""
    config = model.config
    if model.training:
        return "it is in training mode, where dropout applies to the attention weights; call eval() first"
    if config.pooling != "cls":
        return f"pooling={config.pooling!r} needs all hidden states, but only that of the class token can be folded"
    if len(model.model.layers) != 1 or config.num_hidden_layers != 1:
        return f"it has {len(model.model.layers)} layers, but only a model with one layer can be folded"
    if config.attention_type != "softmax":
        return f"attention_type={config.attention_type!r} is not softmax attention over all tokens"
    layer = model.model.layers[0]
    projections = {f"{part}_proj": getattr(layer.self_attn, f"{part}_proj") for part in "qkv"}
    for name, module in projections.items():
        if type(module) is not nn.Linear:
            return f"{name} is a {type(module).__name__}, not a plain linear layer; merge adapters first"
    if type(layer.input_layernorm) is not nn.LayerNorm:
        return f"its norm is a {type(layer.input_layernorm).__name__}, not a LayerNorm"
    if config.qk_norm:
        return "qk_norm=True normalises each key"
    if any(parameter.is_meta for parameter in model.parameters()):
        return "some of its weights are offloaded"
    return None


@dataclass
class _Constants:
    """Constants computed from the weights.

    Attributes:
        scores: `(hidden_size, heads)`, maps normalised inputs, before the norm's weight, to scores.
        inputs: `(vocabulary + 1, hidden_size)`, embeddings without their means; the class token's is the last.
        positions: `(longest + 1, hidden_size)`, position embeddings without their means.
        table: `(longest + 1, vocabulary + 1, heads)`, scores; `None` if there is no table.
        scale: `(longest + 1, vocabulary + 1)`, one over the standard deviation of the sum of both.
    """

    scores: torch.Tensor
    inputs: torch.Tensor
    positions: torch.Tensor
    table: torch.Tensor | None = None
    scale: torch.Tensor | None = None


class FoldedClassToken:
    """Computes the state of the class token of a folded model; recomputes its constants when weights have changed.

    Args:
        model: a [`WideTransformerForSequenceClassification`].
        table: whether to keep the scores of all tokens at all positions.
    """

    def __init__(self, model: nn.Module, table: bool):
        self.has_table = table
        self._constants, self._made_from = None, None
        self.constants(model)

    @staticmethod
    def _sources(model: nn.Module) -> tuple[torch.Tensor, ...]:
        layer = model.model.layers[0]
        attention, norm = layer.self_attn, layer.input_layernorm
        modules = (model.model.embed_tokens, model.model.cls_token, attention.q_proj, attention.k_proj, norm)
        return tuple(parameter for module in modules for parameter in module.parameters())

    def constants(self, model: nn.Module) -> _Constants:
        """The constants for the present weights."""
        made_from = tuple(
            (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version, tensor.dtype)
            for tensor in self._sources(model)
        )
        if made_from != self._made_from:
            # Outside of inference mode, so that they can also be used outside of it.
            with torch.inference_mode(False), torch.no_grad():
                self._constants = _make_constants(model, self.has_table)
            self._made_from = made_from
        return self._constants

    def state(
        self,
        model: nn.Module,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """State `(batch, hidden_size)` of the class token after the final norm.

        Args:
            model: the model.
            input_ids: `(batch, length)`, or `None`.
            inputs_embeds: `(batch, length, hidden_size)`, or `None`.
            mask: `(batch, length)`, false for padding.
        """
        constants = self.constants(model)
        mask = torch.cat([mask[:, :1], mask], dim=1)
        if inputs_embeds is None:
            # The class token is the last row of the embeddings.
            class_token = input_ids.new_full((len(input_ids), 1), len(constants.inputs) - 1)
            input_ids = torch.cat([class_token, input_ids], dim=1)
        if inputs_embeds is None and constants.table is not None:
            mixed = _mix_by_table(constants, input_ids, mask)
        else:
            if inputs_embeds is None:
                embeds = nn.functional.embedding(input_ids, constants.inputs)
            else:
                embeds = inputs_embeds.to(constants.inputs.dtype)
                embeds = embeds - embeds.mean(-1, keepdim=True)
                embeds = torch.cat([constants.inputs[-1].expand(len(embeds), 1, -1), embeds], dim=1)
            mixed = _mix(constants, embeds, mask, model.model.layers[0].input_layernorm.eps)

        layer = model.model.layers[0]
        norm, attention = layer.input_layernorm, layer.self_attn
        mixed = mixed * norm.weight if norm.bias is None else mixed * norm.weight + norm.bias
        weight = attention.v_proj.weight.unflatten(0, (-1, attention.head_dim))
        heads = torch.einsum("bhe,hde->bhd", mixed.to(weight.dtype), weight).flatten(1)
        if attention.v_proj.bias is not None:
            heads = heads + attention.v_proj.bias
        state = model.model.cls_token.weight + _position_zero(model)
        state = state + attention.o_proj(heads)
        state = state + layer.mlp(layer.post_attention_layernorm(state))
        return model.model.norm(state)


def _position_zero(model: nn.Module) -> torch.Tensor:
    """Position embedding of the class token: sine 0 and cosine 1 in turns."""
    weight = model.model.cls_token.weight
    return (torch.arange(weight.shape[0], device=weight.device) % 2).to(weight.dtype)


def _make_constants(model: nn.Module, has_table: bool) -> _Constants:
    encoder, layer = model.model, model.model.layers[0]
    attention, norm = layer.self_attn, layer.input_layernorm
    dtype = torch.promote_types(encoder.embed_tokens.weight.dtype, torch.float32)
    inputs = torch.cat([encoder.embed_tokens.weight, encoder.cls_token.weight[None]]).double()
    longest, size = model.config.max_position_embeddings, inputs.shape[1]
    positions = sinusoids(torch.arange(longest + 1, device=inputs.device), size, torch.float32).double()

    cls = nn.functional.layer_norm(inputs[-1] + positions[0], (size,), eps=norm.eps)
    cls = _affine(norm, cls)
    query = attention.q_proj.weight.double() @ cls
    if attention.q_proj.bias is not None:
        query = query + attention.q_proj.bias.double()
    heads = (-1, attention.head_dim)
    keys = attention.k_proj.weight.double().unflatten(0, heads)
    # The contribution of the norm's bias is the same for all keys, and cancels like the bias of the keys.
    scores = (
        torch.einsum("hd,hde->eh", query.unflatten(0, heads), keys) * attention.scaling * norm.weight.double()[:, None]
    )

    inputs, positions = (states - states.mean(-1, keepdim=True) for states in (inputs, positions))
    table = scale = None
    if has_table:
        variance = inputs.square().mean(-1) + positions.square().mean(-1)[:, None] + 2 / size * positions @ inputs.T
        scale = (variance + norm.eps).rsqrt()
        table = ((positions @ scores)[:, None] + inputs @ scores) * scale[..., None]
        table, scale = table.to(dtype), scale.to(dtype)
    return _Constants(scores.to(dtype), inputs.to(dtype), positions.to(dtype), table, scale)


def _affine(norm: nn.LayerNorm, states: torch.Tensor) -> torch.Tensor:
    states = states * norm.weight.double()
    return states if norm.bias is None else states + norm.bias.double()


def _mix(constants: _Constants, embeds: torch.Tensor, mask: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalised inputs, before weight and bias of the norm, mixed in each head: `(batch, heads, hidden_size)`.

    Args:
        constants: constants computed from the weights.
        embeds: `(batch, length, hidden_size)` with the class token in front, without their means; it is overwritten.
        mask: `(batch, length)`.
        eps: of the norm.
    """
    size = embeds.shape[-1]
    states = embeds.add_(constants.positions[: embeds.shape[1]])
    scale = (torch.linalg.vector_norm(states, dim=-1).square() / size + eps).rsqrt()[:, None]
    logits = (states @ constants.scores).transpose(1, 2) * scale
    weights = logits.masked_fill_(~mask[:, None], -torch.inf).softmax(-1)
    return weights.mul_(scale) @ states


def _mix_by_table(constants: _Constants, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The same with scores from the table, for ids with the class token in front. A token that occurs many times in a text is
    mixed once."""
    batch, length = mask.shape
    _, vocabulary, heads = constants.table.shape
    cells = ids + vocabulary * torch.arange(length, device=ids.device)
    logits = nn.functional.embedding(cells, constants.table.view(-1, heads)).transpose(1, 2)
    weights = logits.masked_fill(~mask[:, None], -torch.inf).softmax(-1).mul_(constants.scale.view(-1)[cells][:, None])
    counts = weights.new_zeros(batch * vocabulary, heads)
    rows = ids + vocabulary * torch.arange(batch, device=ids.device)[:, None]
    counts.index_add_(0, rows.flatten(), weights.transpose(1, 2).reshape(-1, heads))
    counts = counts.view(batch, vocabulary, heads).transpose(1, 2)
    by_token = counts.reshape(batch * heads, vocabulary) @ constants.inputs
    by_position = weights.reshape(batch * heads, length) @ constants.positions[:length]
    return (by_token + by_position).view(batch, heads, -1)
