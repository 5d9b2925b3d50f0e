"""DeBERTa: the masked language model with its decoder, and a step of SiFT on a classifier."""

import torch

from hf_attn import apply_fast_attention, from_official, remove_fast_attention
from hf_attn.training.sift import sift_loss

from ..case import Case
from ..tools import recorded


def run(case: Case) -> dict[str, torch.Tensor]:
    return _sift(case) if "vat_lambda" in case.config else _masked_lm(case)


def _masked_lm(case: Case) -> dict[str, torch.Tensor]:
    model = from_official("deberta", case.weights, config=case.config)
    input_ids, mask = case.input("input_ids"), case.input("input_mask")
    labels = case.input("labels").masked_fill(case.input("labels") == 0, -100)
    valid, results = mask.bool(), {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        way = f"@{implementation}"
        layer, base = model.deberta.encoder.layer[0], model.deberta
        with recorded({"embeddings": base.embeddings, "context": layer.attention.self}) as seen:
            weights = model(input_ids, attention_mask=mask, output_attentions=True, output_hidden_states=True)
        output = model(input_ids, attention_mask=mask, labels=labels)
        losses = torch.nn.functional.cross_entropy(output.logits, labels[labels != -100], reduction="none")
        losses.sum().backward()
        found = {
            "embeddings": seen["embeddings"],
            "attn0_context_valid": seen["context"][valid],
            "attn0_probs_valid": weights.attentions[0].transpose(1, 2)[valid],
            "logits_masked": output.logits,
            "loss_masked": losses,
            "labels_masked": labels[labels != -100],
        }
        for index, states in enumerate(weights.hidden_states[1:], start=1):
            found[f"hidden_{index}_valid"] = states[valid]
        if base.embeddings.position_embeddings is not None:
            positions = torch.arange(input_ids.shape[1])
            table = base.embeddings.position_embeddings
            found["position_embeddings"] = table(positions).expand(len(input_ids), -1, -1)
            found["grad_position_embeddings"] = table.weight.grad
            steps = model.decode(weights.hidden_states[-2], mask, output_steps=True)
            found |= {f"emd_step{number}_valid": states[valid] for number, states in enumerate(steps, start=1)}
        found["grad_word_embeddings"] = base.embeddings.word_embeddings.weight.grad
        if model.config.relative_attention:
            found["grad_rel_embeddings"] = base.encoder.rel_embeddings.weight.grad
        results |= {f"{name}{way}": array for name, array in found.items()}
    return results


def _sift(case: Case) -> dict[str, torch.Tensor]:
    model, config = from_official("deberta", case.weights, config=case.config).train(), case.config
    features = {"input_ids": case.input("input_ids"), "attention_mask": case.input("input_mask")}
    results = {}
    for way in ("@transformers", "@fast"):
        if way == "@fast":
            apply_fast_attention(model)
        model.zero_grad()

        def compute_clean():
            output = model(**features, labels=case.input("labels"))
            return output.loss, output

        step = sift_loss(
            model,
            compute_clean,
            lambda: model(**features).logits,
            sift_lambda=config["vat_lambda"],
            learning_rate=config["vat_learning_rate"],
            sigma=config["vat_init_perturbation"],
            inner_loss=config["vat_loss_fn"],
            is_regression=config["num_labels"] == 1,
            first_delta=case.input("delta0"),
        )
        step.loss.backward()
        found = {
            "normalized_input": step.normalized,
            "grad_delta": step.gradient,
            "delta1": step.delta,
            "pert_logits_step0": step.first_logits,
            "pert_logits_step1": step.logits,
            "adv_loss": step.adversarial_loss[None],
            "total_loss": step.loss[None],
            "task_loss": step.task_loss[None],
            "clean_logits": step.outputs.logits,
        }
        found |= {f"grad:{name}": parameter.grad for name, parameter in model.named_parameters()}
        results |= {f"{name}{way}": array for name, array in found.items() if name in case.expected}
    remove_fast_attention(model)
    return results
