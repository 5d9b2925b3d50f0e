"""Converting GMAN: both layouts, the port with numbers of heads that its own code cannot mask, and bad checkpoints."""

import importlib.util
from pathlib import Path

import pytest
import torch

from hf_attn import from_official
from hf_attn.checkpoints.official import ConversionError
from tests.goldens.case import Case


GOLDENS = Path(__file__).parents[2] / "goldens" / "gman"


@pytest.fixture
def case():
    return Case(GOLDENS / "tf_causal")


def port_network(**arguments):
    """torch-geometric-temporal's network, loaded from a single module because its package needs torch-sparse."""
    package = importlib.util.find_spec("torch_geometric_temporal")
    if package is None:
        pytest.skip("torch-geometric-temporal is not installed (pip install --no-deps torch-geometric-temporal)")
    path = Path(package.origin).parent / "nn" / "attention" / "gman.py"
    spec = importlib.util.spec_from_file_location("port_gman", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.GMAN(**arguments)


@pytest.mark.parametrize(
    ("heads", "width", "mask", "bias"), [(2, 5, False, True), (5, 2, False, False), (3, 3, True, False)]
)
def test_the_port(heads, width, mask, bias):
    """Its `split(K)` makes d heads of width K."""
    torch.manual_seed(0)
    config = {"L": 2, "K": heads, "d": width, "num_his": 4, "bn_decay": 0.3, "steps_per_day": 10, "use_bias": bias}
    network = port_network(**config, mask=mask)
    embedding, values = torch.randn(7, heads * width), torch.randn(3, 4, 7)
    # Indices beyond the day wrap.
    features = torch.stack([torch.randint(14, (3, 7)), torch.randint(20, (3, 7))], dim=-1)
    network.train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(3, 4, 7), embedding, features)
        expected = network.eval()(values, embedding, features)
    config |= {"mask": mask, "num_pred": 3, "spatial_embedding": embedding}
    model = from_official("gman", network.state_dict(), config=config)
    assert (model.config.num_attention_heads, model.config.head_dim) == (width, heads)
    past, future = features.split([4, 3], dim=1)
    torch.testing.assert_close(model(values, past, future).prediction_outputs, expected, rtol=1e-4, atol=1e-5)


def test_the_vectors_of_the_sensors_come_from_a_file(case, tmp_path):
    embedding = case.input("spatial_embedding")
    lines = [f"{index} {' '.join(map(str, row.tolist()))}" for index, row in enumerate(embedding)]
    file = tmp_path / "SE.txt"
    file.write_text("\n".join([f"{len(embedding)} {embedding.shape[1]}", *lines[::-1]]))
    model = from_official("gman", case.weights, config={**case.config, "spatial_embedding": str(file)})
    assert torch.equal(model.gman.embeddings.spatial_embedding, embedding)


def test_what_does_not_fit(case):
    config = {**case.config, "spatial_embedding": case.input("spatial_embedding")}
    with pytest.raises(ConversionError, match="Pass `spatial_embedding`"):
        from_official("gman", case.weights, config=case.config)
    with pytest.raises(ConversionError, match="steps_per_day=24, but the configuration says 288"):
        from_official("gman", case.weights, config={**config, "steps_per_day": 288})
    with pytest.raises(ConversionError, match=r"ste\.te\.9\.weight|temporal\.9"):
        from_official("gman", {**case.weights, "ste.te.9.weight": torch.zeros(1)}, config=config)
    incomplete = {name: tensor for name, tensor in case.weights.items() if name != "encoder.0.spatial.q.weight"}
    with pytest.raises(ConversionError, match="no weights for"):
        from_official("gman", incomplete, config=config)
    with pytest.raises(ConversionError, match="no 'history_steps'"):
        from_official("gman", case.weights, config={"spatial_embedding": config["spatial_embedding"]})
    with pytest.raises(ConversionError, match="not a GMAN checkpoint"):
        from_official("gman", {"weight": torch.zeros(2)}, config=config)
