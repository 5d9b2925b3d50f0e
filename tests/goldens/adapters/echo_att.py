"""EchoAtt: student and teacher, the losses of distillation, similarity and the choice of layers."""

import tempfile

import torch
from transformers import TrainingArguments

from hf_attn.analysis import AttentionSimilarity
from hf_attn.checkpoints.official import from_official
from hf_attn.modeling.echo_att.distillation import (
    EchoAttDistillationTrainer,
    block_ends,
    hard_label_loss,
    intermediate_loss,
    soft_label_loss,
)
from tests.goldens.case import Case
from tests.goldens.tools import expected_gradients, parameter_gradients, recorded


def run(case: Case) -> dict[str, torch.Tensor]:
    return {
        "Llama-style causal LM with shared attention layers": _language_model,
        "similarity and layer choice": _selection,
    }[case.entry](case)


def _selection(case: Case) -> dict[str, torch.Tensor]:
    similarity = AttentionSimilarity.from_maps(list(sample) for sample in case.input("attn"))
    results = {
        "similarity": similarity.similarity,
        "scores": similarity.scores,
        "prefix_suffix": torch.tensor(similarity.untouched_ends),
    }
    for name in case.expected:
        if name.startswith("shared_k"):
            layers = similarity.shared_layers(block_size=int(name.removeprefix("shared_k")))
            results[name] = torch.tensor(layers or [-1])
    return results


def _language_model(case: Case) -> dict[str, torch.Tensor]:
    input_ids = case.input("input_ids").long()
    batched = input_ids if input_ids.dim() == 2 else input_ids[None]

    def like_the_case(tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        return tensor if input_ids.dim() == 2 else tensor.squeeze(dim)

    student = from_official("echo_att", case.weights, config=case.config)
    teacher_weights = {name.removeprefix("teacher_only."): tensor for name, tensor in case.weights.items()}
    teacher = from_official(
        "echo_att", teacher_weights, config={**case.config, "shared_layers": [], "shared_source": None}
    )
    teacher.set_attn_implementation("eager")
    teacher_logits, teacher_states, _ = _forward(teacher, batched)

    results = {
        "teacher_logits": like_the_case(teacher_logits),
        "teacher_hidden_states": like_the_case(teacher_states, dim=1),
    }
    for implementation, way in (("eager", ""), ("sdpa", "@sdpa")):
        student.set_attn_implementation(implementation)
        logits, states, attentions = _forward(student, batched)
        results[f"logits{way}"] = like_the_case(logits)
        results[f"hidden_states{way}"] = like_the_case(states, dim=1)
        if implementation == "eager":
            results["attn"] = like_the_case(torch.stack(attentions), dim=1)

        # `hidden_states` begins with the embeddings, so that layer i ends at index i + 1.
        ends = torch.tensor(block_ends(student.config)) + 1
        compared = (list(states[ends]), list(teacher_states[ends]))
        with tempfile.TemporaryDirectory() as folder:
            trainer = EchoAttDistillationTrainer(
                model=student,
                teacher=teacher,
                args=TrainingArguments(folder, use_cpu=True, report_to=[], disable_tqdm=True),
            )
            total = trainer.compute_loss(student, {"input_ids": batched})
        losses = {
            "loss_LI_mse": intermediate_loss(*compared),
            "loss_LI_sumsq": intermediate_loss(*compared, reduction="sum"),
            "loss_LS_student_teacher": soft_label_loss(logits, teacher_logits),
            "loss_LS_teacher_student": soft_label_loss(logits, teacher_logits, direction="teacher_student"),
            "loss_LH": hard_label_loss(logits, teacher_logits),
            "loss_total": total,
            "next_token_loss": student(batched, labels=batched).loss,
        }
        results |= {f"{name}{way}": loss.reshape(1) for name, loss in losses.items()}
        if "proj" in case.arrays:
            student.zero_grad()
            (like_the_case(logits) * case.input("proj")).sum().backward()
            gradients = expected_gradients(case, parameter_gradients(student))
            results |= {f"{name}{way}": gradient for name, gradient in gradients.items()}
    results["block_ends"] = ends
    return results


def _forward(model, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    """Logits, hidden states before the final norm `(layers + 1, batch, sequence, hidden_size)`, and attention maps."""
    layers = {str(i): layer for i, layer in enumerate(model.model.layers)}
    with recorded({"embeddings": model.model.embed_tokens, **layers}) as states:
        output = model(input_ids, output_attentions=model.config._attn_implementation == "eager")
    return output.logits, torch.stack([states[name] for name in ("embeddings", *layers)]), output.attentions
