"""Training of the network: batches, loss, gradients, and a task that it learns."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import TrainingArguments

from hf_attn.modeling.sd_rpn.first_pass import run_first_pass
from hf_attn.modeling.sd_rpn.modeling_sd_rpn import SdRpnModel
from hf_attn.modeling.sd_rpn.planted import COLOURS, PlantedSquares, box_labels, tiny_llava
from hf_attn.modeling.sd_rpn.training import RoiCollator, SdRpnTrainer, labelling_inputs

from .tiny import BRANCH, GRID, LAYERS, picture, tiny_base, tiny_processor, tiny_rpn


def rows(cells: int = GRID) -> list[dict]:
    """Two images with labels, as in a dataset."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([1, 0, -100])[torch.randint(0, 3, (2, cells, cells), generator=generator)].tolist()
    images = [picture(90, 60), picture(50, 80, seed=1)]
    questions = ["Who?", "Where is it?"]
    return [
        {"image": image, "question": question, "roi_labels": grid}
        for image, question, grid in zip(images, questions, labels, strict=True)
    ]


def make_trainer(tmp_path, kind="llava", **options) -> SdRpnTrainer:
    base = tiny_base(kind)
    arguments = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        **options,
    }
    return SdRpnTrainer(
        model=tiny_rpn(kind),
        args=TrainingArguments(str(tmp_path), **arguments),
        base=base,
        train_dataset=rows(24 if kind == "qwen2_5_vl" else GRID),
        eval_dataset=rows(24 if kind == "qwen2_5_vl" else GRID),
        data_collator=RoiCollator(tiny_processor(kind), base.config),
    )


@pytest.mark.parametrize("kind", ["llava", "llava_next", "qwen2_5_vl"])
def test_only_the_networks_used_tensors_are_trained(tmp_path, kind):
    trainer = make_trainer(tmp_path, kind)
    base_before = copy.deepcopy(trainer.base.state_dict())
    before = copy.deepcopy(trainer.model.state_dict())
    loss = trainer.train().training_loss
    assert loss > 0
    for name, tensor in trainer.base.state_dict().items():
        assert torch.equal(tensor, base_before[name]), name
    changed = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert not any("layers.2.mlp" in name or "layers.2.self_attn.v_proj" in name for name in changed)
    assert ("norm.weight" in changed) == (kind != "qwen2_5_vl")
    assert all(parameter.grad is None for parameter in trainer.base.parameters())


def test_loss_is_the_mean_over_labelled_cells(tmp_path):
    trainer = make_trainer(tmp_path)
    batch = trainer.data_collator(rows())
    loss, output = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    labels = torch.stack(batch["roi_target_map"]).flatten(1)
    is_labelled = labels != -100
    expected = F.binary_cross_entropy_with_logits(output.logits[is_labelled], labels[is_labelled].float())
    torch.testing.assert_close(loss, expected)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
    ignored = [torch.full_like(labels, -100) for labels in batch["roi_target_map"]]
    nothing = trainer.compute_loss(trainer.model, {**batch, "roi_target_map": ignored})
    assert nothing.item() == 0
    nothing.backward()


def test_a_base_in_half_precision_trains_a_network_in_full(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.base = copy.deepcopy(trainer.base).bfloat16()
    inputs = trainer.data_collator(rows())
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    loss = trainer.compute_loss(trainer.model, inputs)
    assert loss.dtype == torch.float32
    loss.backward()


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_query_is_the_last_token_of_the_prompt(kind):
    """The token before the answer: the answer after it changes nothing."""
    base, rpn = tiny_base(kind), tiny_rpn(kind)
    batch = RoiCollator(tiny_processor(kind), base.config)(rows()[:1])
    del batch["roi_target_map"]
    short = rpn(**run_first_pass(base, BRANCH, **batch).rpn_inputs()).logits
    length = batch["input_ids"].shape[1]
    answer = torch.full((1, 3), 70)
    batch["input_ids"] = torch.cat([batch["input_ids"], answer], 1)
    batch["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones_like(answer)], 1)
    query = torch.tensor([length - 1])
    long = rpn(**run_first_pass(base, BRANCH, **batch).rpn_inputs(), query_positions=query).logits
    torch.testing.assert_close(long, short, atol=1e-5, rtol=1e-5)


def test_qwens_images_become_squares_of_24_cells():
    base, processor = tiny_base("qwen2_5_vl"), tiny_processor("qwen2_5_vl")
    size = dict(processor.image_processor.size)
    inputs = labelling_inputs(processor, base.config, [picture(300, 100), picture(50, 80)], ["Who?"] * 2)
    assert inputs["image_grid_thw"].tolist() == [[1, 48, 48]] * 2
    assert (inputs["input_ids"] == base.config.image_token_id).sum(1).tolist() == [576, 576]
    assert dict(processor.image_processor.size) == size


def test_rows_and_networks_that_do_not_fit(tmp_path):
    collator = RoiCollator(tiny_processor("llava"), tiny_base("llava").config)
    with pytest.raises(ValueError, match="rows have no question, roi_labels; they have image"):
        collator([{"image": picture(10, 10)}])
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match=r"roi_target_map of prompt 0 has 25 labels, but the prompt has 36"):
        trainer.compute_loss(trainer.model, trainer.data_collator(rows(5)))
    with pytest.raises(ValueError, match="is for a llava whose decoder has 7 layers"):
        SdRpnTrainer(model=tiny_rpn("llava"), base=tiny_base("qwen2_5_vl"), args=trainer.args)


def test_labels_of_a_box_follow_its_share_of_a_cell():
    # 40x20 in a square of 40: 4x4 cells of 10x10 pixels, 10 pixels of padding above
    labels = box_labels((5, 0, 26, 10), (40, 20), 4)
    assert labels[1].tolist() == [1, 1, 1, 0]
    assert (labels[[0, 2, 3]] == 0).all()
    assert box_labels((0, 0, 14, 10), (40, 20), 4)[1].tolist() == [1, -100, 0, 0]


def test_planted_squares_are_where_they_are_said_to_be():
    images = PlantedSquares(6, GRID, seed=3)
    for i in range(6):
        left, top, right, bottom = images[i]["box"]
        crop = torch.tensor(list(images[i]["image"].crop((left, top, right, bottom)).get_flattened_data())).float()
        name = images[i]["question"].split()[3]
        assert (crop.mean(0) - torch.tensor(COLOURS[name])).abs().max() < 8
        assert images[i]["image"].tobytes() == PlantedSquares(9, GRID, seed=3)[i]["image"].tobytes()
    assert len(list(images)) == 6
    assert images[0]["image"].tobytes() != PlantedSquares(6, GRID, seed=4)[0]["image"].tobytes()


def test_learns_where_the_only_square_is(tmp_path):
    """A short version of the default task of the training script."""
    base, processor = tiny_llava(GRID, hidden_size=32)
    torch.manual_seed(0)
    rpn = SdRpnModel.from_base(base, branch_layer=1, num_hidden_layers=LAYERS)
    trainer = SdRpnTrainer(
        model=rpn,
        args=TrainingArguments(
            str(tmp_path),
            max_steps=240,
            per_device_train_batch_size=8,
            learning_rate=5e-3,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
        ),
        base=base,
        train_dataset=PlantedSquares(480, GRID, seed=0, squares=1),
        eval_dataset=PlantedSquares(32, GRID, seed=1, squares=1),
        data_collator=RoiCollator(processor, base.config),
    )
    trainer.train()
    # The loss of a model that knows only the fraction of foreground, and nothing about the image.
    labels = torch.stack([row["roi_labels"] for row in trainer.eval_dataset])
    share = (labels == 1).sum() / (labels != -100).sum()
    blind = F.binary_cross_entropy(share, share).item()
    assert trainer.evaluate()["eval_loss"] < blind / 2


def test_accumulated_gradients_are_those_of_one_large_batch(tmp_path):
    """Images with different numbers of labelled cells, so that a mean of means would differ."""
    data = rows()
    data[1]["roi_labels"] = torch.full((GRID, GRID), -100).index_fill_(0, torch.tensor([2]), 1).tolist()
    data += [{**data[1], "roi_labels": torch.full((GRID, GRID), -100).tolist()}]

    def update(batch_size: int, steps: int) -> dict[str, torch.Tensor]:
        options = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": steps, "max_steps": 1}
        trainer = make_trainer(tmp_path, **options, optim="sgd", max_grad_norm=0.0, learning_rate=1.0)
        trainer.train_dataset = data
        before = copy.deepcopy(trainer.model.state_dict())
        trainer.train()
        return {name: tensor - before[name] for name, tensor in trainer.model.state_dict().items()}

    together, accumulated = update(3, 1), update(1, 3)
    for name, tensor in together.items():
        torch.testing.assert_close(accumulated[name], tensor, atol=2e-7, rtol=1e-3)
    assert max(tensor.abs().max() for tensor in together.values()) > 1e-3
