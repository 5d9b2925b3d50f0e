"""The adversarial stage in Trainer: the loss of each network, and resuming."""

import pytest
import torch
import transformers

from hf_attn.modeling.hat.configuration_hat import HATConfig
from hf_attn.modeling.hat.modeling_hat import HATForImageSuperResolution
from hf_attn.restoration.adversarial import UNetDiscriminator, discriminator_loss, generator_loss
from hf_attn.restoration.adversarial_training import AdversarialTrainerMixin


class Trainer(AdversarialTrainerMixin, transformers.Trainer):
    pass


def pairs(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"pixel_values": (3, 4, 4), "labels": (3, 8, 8), "originals": (3, 8, 8)}
    return [{name: torch.rand(shape, generator=generator) for name, shape in shapes.items()} for _ in range(count)]


def make_trainer(folder, perceptual_loss=None, **options) -> Trainer:
    torch.manual_seed(0)
    small = {"embed_dim": 8, "depths": [1], "num_heads": [2], "window_size": 4, "drop_path_rate": 0.0}
    config = HATConfig(**small, compress_ratio=2, squeeze_factor=2, upscale=2)
    arguments = transformers.TrainingArguments(
        folder, use_cpu=True, remove_unused_columns=False, report_to="none", disable_tqdm=True, **options
    )
    return Trainer(
        model=HATForImageSuperResolution(config),
        args=arguments,
        train_dataset=pairs(8),
        discriminator=UNetDiscriminator(num_features=4),
        perceptual_loss=perceptual_loss,
    )


class Distance(torch.nn.Module):
    """Replaces VGG."""

    def forward(self, images, targets):
        return (images - targets).square().mean()


def test_each_network_has_its_own_loss(tmp_path):
    trainer = make_trainer(tmp_path, Distance(), learning_rate=1e-2, max_steps=1)
    trainer.create_optimizer_and_scheduler(1)
    model, discriminator = trainer.model, trainer.discriminator
    batch = {name: values[None] for name, values in pairs(1)[0].items()}
    # Outside of training mode, the power iteration of the spectral norm is not updated.
    trainer.discriminator.eval()
    before = [weight.detach().clone() for weight in discriminator.parameters()]

    loss = trainer.compute_loss(model.train(), batch)
    outputs = model(pixel_values=batch["pixel_values"], labels=batch["labels"])
    judged = generator_loss(discriminator(outputs.reconstruction))
    expected = outputs.loss + 0.1 * judged + Distance()(outputs.reconstruction, batch["labels"])
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(weight.grad is None for weight in discriminator.parameters())
    assert all(weight.requires_grad for weight in discriminator.parameters())

    discriminator.train()
    reconstruction = outputs.reconstruction.detach()
    state = {name: value.clone() for name, value in discriminator.state_dict().items()}
    trainer.current_gradient_accumulation_steps = 1
    trainer.training_step(model, batch)
    after = [weight.detach().clone() for weight in discriminator.parameters()]

    # The same by hand: Adam's first step is the sign of the gradient.
    twin = UNetDiscriminator(num_features=4)
    twin.load_state_dict(state)
    with torch.no_grad():
        twin(reconstruction)  # the generator's pass also updates the spectral norm
    real, generated = twin(torch.cat((batch["originals"], reconstruction))).chunk(2)
    discriminator_loss(real, generated).backward()
    for old, new, weight in zip(before, after, twin.parameters(), strict=True):
        certain = weight.grad.abs() > 1e-5
        assert certain.any()
        torch.testing.assert_close((old - new)[certain], 1e-2 * weight.grad.sign()[certain], atol=1e-4, rtol=0)


def test_resumes_where_it_stopped(tmp_path):
    options = {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 2}
    whole = make_trainer(tmp_path, **options)
    whole.train()
    resumed = make_trainer(tmp_path, **options)
    start = resumed.discriminator.first.weight.detach().clone()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (resumed.discriminator.first.weight - start).abs().max() > 1e-5
    for network in ("model", "discriminator"):
        states = [getattr(trainer, network).state_dict() for trainer in (whole, resumed)]
        torch.testing.assert_close(*states, atol=1e-7, rtol=0)
    steps = [int(state["step"]) for state in resumed.discriminator_optimizer.state_dict()["state"].values()]
    assert set(steps) == {4}


def test_the_terms_are_logged_and_evaluation_has_the_loss_of_the_model(tmp_path):
    trainer = make_trainer(tmp_path, Distance(), max_steps=2, logging_steps=2, per_device_train_batch_size=4)
    trainer.train()
    line = next(line for line in trainer.state.log_history if "loss" in line)
    total = line["reconstruction_loss"] + 0.1 * line["adversarial_loss"] + line["perceptual_loss"]
    assert line["loss"] == pytest.approx(total, abs=1e-4)
    assert line["discriminator_loss"] > 0
    data = [{name: pair[name] for name in ("pixel_values", "labels")} for pair in pairs(2)]
    evaluation = trainer.evaluate(data)
    with torch.no_grad():
        losses = [trainer.model(**{name: value[None] for name, value in pair.items()}).loss for pair in data]
    assert evaluation["eval_loss"] == pytest.approx(float(sum(losses)) / 2, abs=1e-5)


def test_a_checkpoint_without_a_discriminator(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, save_steps=1)
    trainer.train()
    (tmp_path / "checkpoint-1" / "discriminator.pt").unlink()
    with pytest.raises(ValueError, match=r"contains no discriminator.*as the initial model instead of resuming"):
        make_trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
