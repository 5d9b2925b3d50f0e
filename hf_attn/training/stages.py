"""Trainings that are started again after they were killed, and then end as if they had not been."""

from contextlib import nullcontext
from pathlib import Path

from transformers import Trainer
from transformers.trainer_callback import TrainerState

from .writing import part_of, written_whole


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint of a Trainer in its output folder that was written to the end, if there is one."""
    steps = {}
    for checkpoint in Path(folder).glob("checkpoint-*"):
        try:
            # A trainer writes its state last.
            steps[TrainerState.load_from_json(checkpoint / "trainer_state.json").global_step] = checkpoint
        except (OSError, ValueError):
            continue
    return steps[max(steps)] if steps else None


def train_stage(trainer: Trainer, folder: str | Path) -> Path:
    """Train to the end, once: continue from the last complete checkpoint, and do nothing if the stage is finished.

    A run that was killed and is started again ends with the same weights as one that was not.

    Args:
        trainer: its output folder holds the checkpoints.
        folder: folder of the finished model.

    Returns:
        `folder`.
    """
    folder = Path(folder)
    if folder.is_dir():
        return folder
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(trainer.args.output_dir))
    # All processes save together; the first one makes the place before, and the folder after.
    with written_whole(folder) if trainer.is_world_process_zero() else nullcontext():
        trainer.accelerator.wait_for_everyone()
        trainer.save_model(str(part_of(folder)))
        trainer.accelerator.wait_for_everyone()
    trainer.accelerator.wait_for_everyone()
    return folder
