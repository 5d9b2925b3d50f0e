"""The adversarial stage of Real-HAT and Real-DRCT, as a part of `transformers.Trainer`.

generator:      loss of the model + perceptual loss + 0.1 cross entropy of D(reconstruction) with "real"
discriminator:  cross entropies of D(photograph) with "real" and of D(reconstruction) with "generated"
"""

from collections import defaultdict
from pathlib import Path

import torch
from torch import nn

from .adversarial import PerceptualLoss, discriminator_loss, generator_loss


class AdversarialTrainerMixin:
    """Trains a model for super-resolution against a discriminator, which a checkpoint contains with its optimizer.

        class Trainer(AdversarialTrainerMixin, transformers.Trainer): ...

    Both have Adam and the learning rate of the model. A batch may have `originals` beside `labels`: the photographs that the
    discriminator sees as real ones if the labels are sharpened. The terms of the losses are logged. Evaluation has the loss
    of the model alone. Works in one process and in several with a copy of the model each.

    Args:
        discriminator: images `(batch, channels, height, width)` -> logits.
        perceptual_loss: distance of reconstructions and labels; None leaves it out.

    Raises:
        ValueError: under DeepSpeed or FSDP, which shard one model only.
    """

    #: factor on the adversarial loss of the generator
    adversarial_weight = 0.1
    #: in the folder of a checkpoint
    discriminator_file = "discriminator.pt"

    def __init__(self, *args, discriminator: nn.Module, perceptual_loss: PerceptualLoss | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                "The adversarial stage trains two models at once, which is not supported with DeepSpeed and FSDP."
            )
        self.perceptual_loss = None if perceptual_loss is None else perceptual_loss.to(self.args.device)
        optimizer = torch.optim.Adam(
            discriminator.parameters(), self.args.learning_rate, betas=(self.args.adam_beta1, self.args.adam_beta2)
        )
        self.discriminator, self.discriminator_optimizer = self.accelerator.prepare(discriminator, optimizer)
        self._pair: tuple[torch.Tensor, torch.Tensor] | None = None
        self._terms: dict[str, list[torch.Tensor]] = defaultdict(list)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        """The generator's loss at training, the model's own at evaluation."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        inputs = dict(inputs)
        originals = inputs.pop("originals", inputs["labels"])
        outputs = model(**inputs)
        self._pair = (originals, outputs.reconstruction.detach())

        # Without the wrapper that shares gradients among processes: this pass gives the discriminator none.
        discriminator = self.accelerator.unwrap_model(self.discriminator).requires_grad_(False)
        adversarial = generator_loss(discriminator(outputs.reconstruction))
        discriminator.requires_grad_(True)
        loss = outputs.loss + self.adversarial_weight * adversarial
        self._note(reconstruction_loss=outputs.loss, adversarial_loss=adversarial)
        if self.perceptual_loss is not None:
            perceptual = self.perceptual_loss(outputs.reconstruction, inputs["labels"])
            loss = loss + perceptual
            self._note(perceptual_loss=perceptual)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        """A backward of the generator, then a step of the discriminator on the same images."""
        loss = super().training_step(*args, **kwargs)
        self.discriminator.train()
        with self.compute_loss_context_manager():
            # One pass: processes that share gradients expect one backward for each forward.
            real, generated = self.discriminator(torch.cat(self._pair)).chunk(2)
            discriminator = discriminator_loss(real, generated)
        self._pair = None
        self._note(discriminator_loss=discriminator)
        self.accelerator.backward(discriminator / self.current_gradient_accumulation_steps)
        for group in self.discriminator_optimizer.param_groups:
            group["lr"] = self.lr_scheduler.get_last_lr()[0]
        # While gradients accumulate, accelerate's optimizer does neither.
        self.discriminator_optimizer.step()
        self.discriminator_optimizer.zero_grad()
        return loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds the means of the terms since the last line."""
        if "loss" in logs:
            logs |= {name: torch.stack(values).mean().item() for name, values in self._terms.items()}
            self._terms.clear()
        super().log(logs, *args, **kwargs)

    def _note(self, **terms: torch.Tensor) -> None:
        for name, value in terms.items():
            self._terms[name].append(value.detach().float())

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            state = {
                "discriminator": self.accelerator.unwrap_model(self.discriminator).state_dict(),
                "optimizer": self.discriminator_optimizer.state_dict(),
            }
            torch.save(state, Path(output_dir) / self.discriminator_file)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        file = Path(checkpoint) / self.discriminator_file
        if not file.is_file():
            raise ValueError(
                f"{checkpoint} contains no discriminator: its training was not adversarial. Use it as the initial "
                "model instead of resuming from it."
            )
        state = torch.load(file, map_location="cpu", weights_only=True)
        self.accelerator.unwrap_model(self.discriminator).load_state_dict(state["discriminator"])
        self.discriminator_optimizer.load_state_dict(state["optimizer"])
