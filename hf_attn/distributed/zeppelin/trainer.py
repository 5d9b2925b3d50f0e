"""Trainer for batches of uneven documents, with a plan for each batch.

class UnevenTrainer(ZeppelinTrainerMixin, Trainer): ...

model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="distributed_zeppelin")
UnevenTrainer(model=model, data_collator=ZeppelinCollator(), train_dataset=documents, ...).train()
"""

from collections.abc import Sequence
from typing import Any

from transformers import DataCollatorWithFlattening

from ..trainer import SequenceParallelTrainerMixin
from .parallel import Cluster
from .partition import PlanError


class ZeppelinCollator(DataCollatorWithFlattening):
    """Pack documents into one row, with their bounds; they are assigned to ranks in the training step.

    Args:
        cluster: if given, a batch beyond its capacity raises an error that states the capacity that would be sufficient.
    """

    def __init__(self, cluster: Cluster | None = None, **kwargs):
        super().__init__(return_flash_attn_kwargs=True, **kwargs)
        self.cluster = cluster

    def __call__(self, features: Sequence[dict[str, Any]], return_tensors=None, separator_id=None) -> dict[str, Any]:
        """Collate features with `input_ids` and, if there are any, `labels` of any length.

        Raises:
            PlanError: for a document without tokens, or more tokens than the capacity of the cluster.
        """
        lengths = [len(feature["input_ids"]) for feature in features]
        if 0 in lengths:
            raise PlanError(
                f"Every document needs at least one token; document {lengths.index(0)} of the batch has none."
            )
        if self.cluster is not None:
            self.cluster.plan(lengths)
        return super().__call__(features, return_tensors, separator_id)


class ZeppelinTrainerMixin(SequenceParallelTrainerMixin):
    """[`~hf_attn.distributed.trainer.SequenceParallelTrainerMixin`] for a model with `attn_implementation="distributed_zeppelin"`.

    `per_device_train_batch_size` is the number of documents of all processes together. The linear layers work on the same
    number of tokens in each process, attention on the shares of the plan, and the loss is the sum over tokens divided by the
    number of those of all processes.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.sequence_context.layout != "zeppelin":
            raise ValueError(
                "ZeppelinTrainerMixin trains a model with attn_implementation='distributed_zeppelin'; call "
                '`model.set_attn_implementation("distributed_zeppelin")` first.'
            )

    @property
    def last_plan(self):
        """The plan of the last training batch."""
        return self.sequence_context.plan
