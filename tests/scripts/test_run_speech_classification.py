"""`run_speech_classification.py`: trains over seeds and modalities, measures, saves; and what it refuses."""

import json

import pytest
from transformers import BertModel, DeiTModel, pipeline

from hf_attn import DementiaFusionConfig
from tests.batteries.scripts import loaded_script
from tests.modeling.dementia_fusion.tiny import speech, tokenizer


QUIET = ["--report_to", "none", "--use_cpu", "true", "--disable_tqdm", "true"]


@pytest.fixture(scope="module")
def script():
    with loaded_script("run_speech_classification") as module:
        yield module


def test_made_up_recordings_end_to_end(script, tmp_path, capsys):
    arguments = ["--num_speakers", "16", "--num_seeds", "2", "--num_train_epochs", "1", "--modalities", "both", "text"]
    table = script.main(["--output_dir", str(tmp_path / "out"), *arguments, *QUIET])
    output = capsys.readouterr().out
    assert "the splits have no speakers in common" in output and "best possible accuracy" in output
    assert set(table) == {"both", "text"}
    assert {"accuracy", "f1", "specificity", "ece", "ace", "brier", "ece_scaled"} <= set(table["both"])
    assert table["both"]["brier"]["std"] >= 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["num_seeds"] == 2 and results["temperature"] > 0
    assert (tmp_path / "out" / "reliability.png").stat().st_size > 1000
    pipe = pipeline("audio-text-classification", model=str(tmp_path / "out"), device="cpu")
    assert set(pipe(speech(), text="boy uh", sampling_rate=16000)["probabilities"]) == {"negative", "positive"}
    with pytest.raises(SystemExit, match="not empty"):
        script.main(["--output_dir", str(tmp_path / "out"), *QUIET])


def test_a_table_with_pretrained_encoders_and_lora(script, tmp_path):
    pytest.importorskip("peft")
    soundfile = pytest.importorskip("soundfile")
    fields = DementiaFusionConfig.tiny["text_config"] | {"vocab_size": len(tokenizer())}
    config = DementiaFusionConfig.from_variant(
        "tiny",
        text_config=fields,
        vision_config={**DementiaFusionConfig.tiny["vision_config"], "image_size": 224, "patch_size": 112},
    )
    BertModel(config.text_config).save_pretrained(tmp_path / "text")
    tokenizer().save_pretrained(tmp_path / "text")
    DeiTModel(config.vision_config).save_pretrained(tmp_path / "vision")
    rows = ["audio,label,speaker,text"]
    for index in range(8):
        soundfile.write(tmp_path / f"{index}.wav", speech(seed=index), 16000)
        rows.append(f"{index}.wav,{'ad' if index % 2 else 'cc'},s{index},there is a boy")
    (tmp_path / "table.csv").write_text("\n".join(rows), encoding="utf-8")
    encoders = ["--text_model", str(tmp_path / "text"), "--vision_model", str(tmp_path / "vision")]
    arguments = [*encoders, "--table", str(tmp_path / "table.csv"), "--lora_rank", "2", "--num_seeds", "1"]
    table = script.main([*arguments, "--num_train_epochs", "1", "--output_dir", str(tmp_path / "out"), *QUIET])
    assert list(table) == ["both"]
    model_file = (tmp_path / "out" / "config.json").read_text()
    assert json.loads(model_file)["label2id"] == {"ad": 1, "cc": 0}
    pipeline("audio-text-classification", model=str(tmp_path / "out"), device="cpu")


def test_two_learning_rates(script):
    from hf_attn.modeling.dementia_fusion.modeling_dementia_fusion import DementiaFusionForClassification
    from hf_attn.modeling.dementia_fusion.training import TwoRatesTrainer

    model = DementiaFusionForClassification(DementiaFusionConfig.from_variant("tiny"))
    arguments = script.ScriptTrainingArguments(output_dir="unused", learning_rate=1e-5, weight_decay=0.1, use_cpu=True)
    optimizer = TwoRatesTrainer(model=model, args=arguments, head_learning_rate=1e-3).create_optimizer()
    rates = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    decays = {parameter: group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        assert rates[parameter] == (1e-3 if name.startswith(("head.", "dementia_fusion.interaction.")) else 1e-5)
        assert decays[parameter] == (0.0 if "bias" in name or "norm" in name.lower() else 0.1)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--text_model", "bert"], "both --text_model and --vision_model"),
        (["--table", "x.csv"], "must be used together"),
        (["--modalities", "video"], "both, text, audio"),
        (["--num_seeds", "0"], "num_seeds"),
        (["--label_smoothing_factor", "0.1"], "--loss_smoothing"),
        (["--text_model", "a", "--vision_model", "b", "--table", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_what_it_refuses(script, tmp_path, arguments, problem):
    with pytest.raises(SystemExit, match=problem):
        script.main(["--output_dir", str(tmp_path / "out"), *arguments, *QUIET])
