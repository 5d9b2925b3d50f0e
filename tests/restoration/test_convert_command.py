"""`hf-attn convert` on checkpoint files as written by the papers' training code, and use of the resulting folder."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageToImage, pipeline

from hf_attn.cli import main
from hf_attn.restoration.metrics import to_uint8
from tests.architectures.restoration.networks import SMALL_NETWORK, spandrel_network


@pytest.mark.parametrize("family", ["hat", "drct"])
def test_a_checkpoint_file_becomes_a_folder_for_models_and_pipelines(family, tmp_path, capsys):
    network = spandrel_network(family, **SMALL_NETWORK[family])
    raw = {name: torch.zeros_like(tensor) for name, tensor in network.state_dict().items()}
    torch.save({"params": raw, "params_ema": network.state_dict()}, tmp_path / "net_g_latest.pth")
    output = tmp_path / "folder"
    # No option is needed: all sizes are inferred from the shapes.
    assert main(["convert", family, str(tmp_path / "net_g_latest.pth"), "--output", str(output)]) == 0
    assert f"parameters was saved to {output}." in capsys.readouterr().out
    assert "image-restoration" in (output / "README.md").read_text(encoding="utf-8")

    model = AutoModelForImageToImage.from_pretrained(output)
    image = np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)
    pixel_values = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        expected = network(pixel_values)
        torch.testing.assert_close(model(pixel_values).reconstruction, expected, atol=1e-5, rtol=0)
    restored = pipeline("image-restoration", model=str(output), device="cpu")(image)
    expected = to_uint8(expected[0]).permute(1, 2, 0).numpy()
    assert np.abs(np.array(restored).astype(int) - expected).max() <= 1


def test_another_scale_than_the_file_has(tmp_path, capsys):
    network = spandrel_network("hat", **SMALL_NETWORK["hat"])
    torch.save({"params_ema": network.state_dict()}, tmp_path / "HAT_SRx4.pth")
    (tmp_path / "x2.yml").write_text("network_g: {type: HAT, upscale: 2}")
    command = ["convert", "hat", str(tmp_path / "HAT_SRx4.pth"), "--config", str(tmp_path / "x2.yml")]
    assert main([*command, "--output", str(tmp_path / "folder")]) == 2
    assert "The checkpoint is for scale 4, but upscale=2 was requested" in capsys.readouterr().err
