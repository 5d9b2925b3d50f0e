"""One image on several devices: each process computes some rows of it (arXiv 2412.16112, patch-parallel inference).

    torch.distributed.init_process_group("nccl")
    load_clear_weights(pipe.transformer, "clear_local_16")
    with clear_parallel(pipe.transformer):
        image = pipe(prompt, generator=torch.Generator().manual_seed(0), ...).images[0]  # the same call in every process

Every process has all weights and all of the text, and a strip of the image. Image queries need the keys of `radius - 1` rows
beyond their strip, which the neighbours send. Text queries see the whole image. With O_p, L_p output and log-sum-exp of
their attention to the keys of process p, of which one counts the text,

    O = sum_p exp(L_p - L) O_p,    L = log sum_p exp(L_p)

is what one process computes ("exact"). The paper averages instead (Eq. 7): O = 1/P sum_p O_p with the text among the keys of
every process ("averaged"), which sends less and changes the image. On the distilled tiny FLUX of `scripts/distill_clear.py`
it changes a prediction by 1.1% on two processes and 3.0% on four, and the latent of an image after 20 steps by 4% and 10%
(of the norm); "exact" by 2e-7. Runs on gloo here; it has not been run on GPUs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import distributed, nn
from torch.nn import functional as F

from ...attention.clear import clear_attention
from ...kernels.clear.tiles import attention_with_logsumexp, clear_attention_tiles
from .patch import clear_processors
from .processors import ClearContext, diffusers


TEXT_QUERIES = ("exact", "averaged")


@dataclass(frozen=True)
class Strip:
    """The rows of an image that a process computes.

    Attributes:
        bounds: first row of each process, and the number of rows at the end.
        rank: of this process in the group.
        width: of the image, in tokens.
        text_queries: `"exact"` or `"averaged"`.
        group: of processes.
    """

    bounds: tuple[int, ...]
    rank: int
    width: int
    text_queries: str
    group: distributed.ProcessGroup

    @property
    def start(self) -> int:
        return self.bounds[self.rank]

    @property
    def stop(self) -> int:
        return self.bounds[self.rank + 1]

    @property
    def num_tokens(self) -> int:
        return (self.stop - self.start) * self.width

    @property
    def tokens(self) -> slice:
        """Of the image, row by row."""
        return slice(self.start * self.width, self.stop * self.width)

    def halo(self, rank: int, reach: int) -> tuple[int, int]:
        """Rows that a process needs from the one above and from the one below."""
        return min(reach, self.bounds[rank]), min(reach, self.bounds[-1] - self.bounds[rank + 1])

    def check(self, radius: int) -> None:
        """Raise unless all rows that a process needs are those of its neighbours."""
        for rank in range(len(self.bounds) - 1):
            for needed, neighbour in zip(self.halo(rank, radius - 1), (rank - 1, rank + 1), strict=True):
                rows = self.bounds[neighbour + 1] - self.bounds[neighbour] if needed else 0
                if rows < needed:
                    raise ValueError(
                        f"{self.bounds[-1]} rows of tokens on {len(self.bounds) - 1} processes leave one process with "
                        f"{rows}, but its neighbour needs {needed} of them with a radius of {radius}. Use fewer "
                        "processes, or larger images."
                    )

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        radius: int,
        text_mask: torch.Tensor | None,
        scaling: float,
        attn_implementation: str,
    ) -> torch.Tensor:
        """CLEAR attention of the text and this strip to the text and the whole image.

        Args:
            query: `(batch, heads, text + strip, head_dim)`.
            key: of the same shape.
            value: of the same shape.
            radius: of the disc, in tokens.
            text_mask: boolean `(batch, text)`, False for padding.
            scaling: of the logits.
            attn_implementation: as of [`hf_attn.attention.clear.clear_attention`].

        Returns:
            Output of the shape of the query; that of the text is the same in all processes.
        """
        if torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value)):
            raise ValueError("CLEAR on several processes is for inference: call the model under `torch.no_grad()`.")
        text_length = query.shape[2] - self.num_tokens
        parts = [states.split([text_length, self.num_tokens], dim=2) for states in (query, key, value)]
        (text_query, image_query), (text_key, image_key), (text_value, image_value) = parts
        # The neighbours' rows travel while the text is computed.
        halo = _HaloExchange(self, torch.stack([image_key, image_value]), radius - 1)
        text_output = self._text_output(text_query, parts[1], parts[2], text_mask, scaling)
        image_key, image_value = halo.wait()
        before, after = (rows * self.width for rows in self.halo(self.rank, radius - 1))
        image_output = _image_output(
            # Queries of the neighbours' rows are computed elsewhere; here they are nothing.
            F.pad(image_query, (0, 0, before, after)),
            image_key,
            image_value,
            text_key,
            text_value,
            grid=(image_key.shape[2] // self.width, self.width),
            radius=radius,
            text_mask=text_mask,
            scaling=scaling,
            attn_implementation=attn_implementation,
        )
        return torch.cat([text_output, image_output[:, :, before : before + self.num_tokens]], dim=2)

    def _text_output(self, query, keys, values, text_mask, scaling) -> torch.Tensor:
        if query.shape[2] == 0:
            return query
        exact = self.text_queries == "exact"
        (text_key, image_key), (text_value, image_value) = keys, values
        key, value, mask = image_key, image_value, None
        if not exact or self.rank == 0:
            key, value = torch.cat([text_key, image_key], dim=2), torch.cat([text_value, image_value], dim=2)
            if text_mask is not None:
                mask = F.pad(text_mask, (0, image_key.shape[2]), value=True)[:, None, None]
        output, logsumexp = attention_with_logsumexp(query, key, value, mask, scaling)
        if exact:
            return merged(output, logsumexp, self.group)
        output = output.to(logsumexp.dtype)
        distributed.all_reduce(output, group=self.group)
        return (output / distributed.get_world_size(self.group)).to(query.dtype)


def merged(output: torch.Tensor, logsumexp: torch.Tensor, group: distributed.ProcessGroup) -> torch.Tensor:
    """Attention to the keys of all processes, from that to the keys of each.

    Args:
        output: of this process `(batch, heads, queries, head_dim)`.
        logsumexp: of its logits `(batch, heads, queries)`.
        group: of processes.
    """
    largest = logsumexp.clone()
    distributed.all_reduce(largest, distributed.ReduceOp.MAX, group=group)
    share = torch.exp(logsumexp - largest)[..., None]
    total = torch.cat([share * output.to(share.dtype), share], dim=-1)
    distributed.all_reduce(total, group=group)
    return (total[..., :-1] / total[..., -1:]).to(output.dtype)


class _HaloExchange:
    """Rows beyond a strip, being received from the neighbours; `states` are `(2, batch, heads, strip, head_dim)`."""

    def __init__(self, strip: Strip, states: torch.Tensor, reach: int):
        self.received: list[torch.Tensor] = []
        self.states, self.operations = states, []
        before, after = strip.halo(strip.rank, reach)
        for neighbour, rows, first in ((strip.rank - 1, before, True), (strip.rank + 1, after, False)):
            if rows == 0:
                self.received.append(states[..., :0, :])
                continue
            # What the neighbour needs of this strip: its rows below for the one above, and vice versa.
            needed = strip.halo(neighbour, reach)[first] * strip.width
            sent = states[..., :needed, :] if first else states[..., states.shape[3] - needed :, :]
            self.received.append(states.new_empty(*states.shape[:3], rows * strip.width, states.shape[4]))
            peer = distributed.get_global_rank(strip.group, neighbour)
            self.operations += [
                distributed.P2POp(distributed.isend, sent.contiguous(), peer, strip.group),
                distributed.P2POp(distributed.irecv, self.received[-1], peer, strip.group),
            ]
        self.requests = distributed.batch_isend_irecv(self.operations) if self.operations else []

    def wait(self) -> torch.Tensor:
        """Keys and values of the rows above, of the strip, and of the rows below."""
        for request in self.requests:
            request.wait()
        before, after = self.received
        return torch.cat([before, self.states, after], dim=3)


def _image_output(query, key, value, text_key, text_value, *, text_mask, attn_implementation, scaling, **arguments):
    if attn_implementation == "tiles" or (attn_implementation == "auto" and query.device.type == "cpu"):
        return clear_attention_tiles(
            query, key, value, text_key, text_value, shared_mask=text_mask, scaling=scaling, **arguments
        )
    # The other implementations compute text queries as well.
    query = torch.cat([torch.zeros_like(text_key), query], dim=2)
    key, value = torch.cat([text_key, key], dim=2), torch.cat([text_value, value], dim=2)
    output = clear_attention(
        query,
        key,
        value,
        text_mask=text_mask,
        scaling=scaling,
        attn_implementation=attn_implementation,
        **arguments,
    )
    return output[:, :, text_key.shape[2] :]


@contextmanager
def clear_parallel(
    transformer: nn.Module, text_queries: str = "exact", group: distributed.ProcessGroup | None = None
) -> Iterator[None]:
    """Within this context the processes of a group share the work on each image; all have to make the same calls.

    The rows of the token grid are split as evenly as possible. Every call returns the whole output in every process.

    Args:
        transformer: FLUX transformer with CLEAR on all attention layers, without pooled keys.
        text_queries: `"exact"`, or `"averaged"` as the paper does it.
        group: of processes; all by default.

    Raises:
        TypeError: if the transformer is not one of FLUX.
        ValueError: for layers with full attention or pooled keys, an unknown way to compute text queries; when called, for
            images with too few rows, and with gradients; within another such context.
        RuntimeError: if there is no process group.
    """
    if not isinstance(transformer, diffusers.FluxTransformer2DModel):
        raise TypeError(
            f"CLEAR supports only FLUX transformers on several processes, got a {type(transformer).__name__}."
        )
    if text_queries not in TEXT_QUERIES:
        raise ValueError(f"text_queries must be one of {', '.join(TEXT_QUERIES)}, got {text_queries!r}.")
    if not (distributed.is_available() and distributed.is_initialized()):
        raise RuntimeError("There is no process group: start with `torchrun` and call `init_process_group` first.")
    if getattr(transformer, "_is_clear_parallel", False):
        raise ValueError(
            "The transformer already runs on several processes: clear_parallel contexts cannot be nested."
        )
    processors = clear_processors(transformer)
    if len(processors) < len(transformer.attn_processors):
        raise ValueError(
            "Layers with full attention would attend to only a part of the image: use `apply_clear` on all layers."
        )
    if any(processor.down_factor > 1 for processor in processors.values()):
        raise ValueError(
            "Pooled keys are not supported on several processes: every query attends to those of all processes."
        )
    group = distributed.group.WORLD if group is None else group
    current: list[Strip] = []

    def split(module, args, kwargs):
        context: ClearContext = kwargs["joint_attention_kwargs"]["clear_context"]
        strip = _strip(context.grid, text_queries, group)
        for radius in {processor.radius for processor in processors.values()}:
            strip.check(radius)
        current[:] = [strip]
        own = kwargs | {
            "hidden_states": kwargs["hidden_states"][:, strip.tokens],
            "img_ids": kwargs["img_ids"][..., strip.tokens, :],
            "joint_attention_kwargs": kwargs["joint_attention_kwargs"]
            | {"clear_context": context._replace(strip=strip)},
        }
        for name in ("controlnet_block_samples", "controlnet_single_block_samples"):
            if kwargs.get(name) is not None:
                own[name] = [residual[:, strip.tokens] for residual in kwargs[name]]
        return args, own

    def gather(module, args, output):
        sample = _gathered(output[0], current[0])
        if isinstance(output, tuple):
            return (sample,)
        output.sample = sample
        return output

    # After the hook of `apply_clear`, which finds out the grid.
    handles = [
        transformer.register_forward_pre_hook(split, with_kwargs=True),
        transformer.register_forward_hook(gather),
    ]
    transformer._is_clear_parallel = True
    try:
        yield
    finally:
        del transformer._is_clear_parallel
        for handle in handles:
            handle.remove()


def _strip(grid: tuple[int, int], text_queries: str, group: distributed.ProcessGroup) -> Strip:
    height, width = grid
    world = distributed.get_world_size(group)
    if height < world:
        raise ValueError(f"{height} rows of tokens are too few for {world} processes. Use fewer processes.")
    bounds = tuple(i * height // world for i in range(world + 1))
    return Strip(bounds, distributed.get_rank(group), width, text_queries, group)


def _gathered(own: torch.Tensor, strip: Strip) -> torch.Tensor:
    """The whole image from its strips `(batch, tokens, channels)`, which may differ in length."""
    lengths = [(stop - start) * strip.width for start, stop in zip(strip.bounds, strip.bounds[1:], strict=False)]
    padded = F.pad(own, (0, 0, 0, max(lengths) - own.shape[1])).contiguous()
    strips = [torch.empty_like(padded) for _ in lengths]
    distributed.all_gather(strips, padded, group=strip.group)
    return torch.cat([states[:, :length] for states, length in zip(strips, lengths, strict=True)], dim=1)
