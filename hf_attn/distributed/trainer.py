"""Trainer for sequences that are split over all processes.

class LongTrainer(SequenceParallelTrainerMixin, Trainer): ...

model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="distributed_ring")
LongTrainer(model=model, ...).train()        # started with torchrun or accelerate launch
"""

from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, IterableDatasetShard
from torch import distributed, nn

from .context import activated, global_loss, layout_of, make_context
from .exchange import Peers


class SequenceParallelTrainerMixin:
    """Mixin for `transformers.Trainer`: every process gets every batch and computes its share of the tokens.

    `per_device_train_batch_size` is the number of sequences of all processes together. Loss, gradients, checkpoints and logs are
    those of a single process. Evaluation returns only the loss, since no process has all logits.

    Attributes:
        sequence_split: `"zigzag"` or `"contiguous"`.
        sequence_grid: grid shape for the layout `"grid"`.
        num_nodes: number of nodes, for the plans of `"distributed_zeppelin"`.
        sequence_capacity: maximum number of tokens per process in those plans.
        sequence_timeout: seconds to wait for another process; by default `ddp_timeout` of the arguments.
    """

    sequence_split: str = "zigzag"
    sequence_grid: tuple[int, int] | None = None
    num_nodes: int = 1
    sequence_capacity: int | None = None
    sequence_timeout: float | None = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        layout = layout_of(self.model)
        refused = {
            "label_smoothing_factor": self.args.label_smoothing_factor,
            "compute_loss_func": self.compute_loss_func,
            "compute_metrics": self.compute_metrics,
        }
        named = [name for name, value in refused.items() if value]
        if named:
            raise ValueError(
                "A sequence that is split over processes is trained with the model's own loss: do not use "
                f"{', '.join(named)}."
            )
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError("SequenceParallelTrainerMixin works with DDP; FSDP and DeepSpeed are not supported.")
        ready = distributed.is_available() and distributed.is_initialized()
        peers = Peers(timeout=self.sequence_timeout) if ready else Peers.alone()
        self.sequence_context = make_context(
            layout, peers, self.sequence_split, self.sequence_grid, self.num_nodes, self.sequence_capacity
        )

    def get_tp_size(self) -> int:
        """Number of processes with the same batch, by which Trainer corrects its counts of tokens and samples."""
        return self.args.world_size

    def _get_dataloader(self, *args, **kwargs):
        prepared = super()._get_dataloader(*args, **kwargs)
        if isinstance(prepared, DataLoaderDispatcher) and self.args.world_size > 1:
            raise ValueError(
                "With an IterableDataset, all processes must read the same batches: pass "
                'accelerator_config={"dispatch_batches": False} in the TrainingArguments.'
            )
        # accelerate would give each process different batches,
        for sharded in (getattr(prepared, "batch_sampler", None), getattr(prepared, "dataset", None)):
            if isinstance(sharded, (BatchSamplerShard, IterableDatasetShard)):
                sharded.num_processes, sharded.process_index = 1, 0
                # and fill up the last batch with samples from the beginning.
                sharded.even_batches = False
        return prepared

    def training_step(self, *args, **kwargs):
        # The backward pass is included, because it may recompute layers.
        with activated(self.sequence_context):
            return super().training_step(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        context = self.sequence_context
        local = context.shard(inputs)
        if num_items_in_batch is None:
            num_items_in_batch = local.pop("num_items_in_batch", None)
        loss, outputs = super().compute_loss(model, local, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if not context.replicated:
            # DDP averages the gradients of the processes, but they have to be summed.
            averaged = isinstance(model, nn.parallel.DistributedDataParallel)
            loss = global_loss(loss, context.peers, context.peers.size if averaged else 1)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with activated(self.sequence_context):
            return super().prediction_step(model, inputs, True, ignore_keys)
