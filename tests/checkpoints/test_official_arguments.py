"""Misspelt or impossible official arguments give an error of one line, in every converter."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hf_attn import from_official
from hf_attn.catalog import PAPERS
from hf_attn.checkpoints.official import ConversionError


GOLDENS = Path(__file__).parents[1] / "goldens"


def smallest_model_case(slug: str):
    """Weights and configuration of the smallest golden case of a paper that is a model with arguments."""
    files = sorted(GOLDENS.glob(f"{slug}/*/weights.safetensors"), key=lambda path: path.stat().st_size)
    for weights in files:
        config = json.loads((weights.parent / "case.json").read_text(encoding="utf-8")).get("config")
        state = load_file(weights)
        if not config or "_none" in state:
            continue
        try:
            from_official(slug, state, config)
        except ConversionError:
            continue
        return state, config
    return None


@pytest.fixture(scope="module", params=[slug for slug, paper in PAPERS.items() if paper.converter])
def model_case(request):
    found = smallest_model_case(request.param)
    if found is None:
        pytest.skip(f"{request.param} has no golden case of a model that is made from arguments")
    return request.param, *found


def test_misspelt_names_are_refused(model_case):
    slug, state, config = model_case
    # A complete config.json contains many fields that a converter does not use.
    if slug in ("landmark", "sd_rpn"):
        pytest.skip("its official configuration is that of a larger model")
    with pytest.raises(ConversionError, match="depht"):
        from_official(slug, state, config | {"depht": 3})
    for name in config:
        renamed = {key if key != name else f"{name}_x": value for key, value in config.items()}
        with pytest.raises(ConversionError) as caught:
            from_official(slug, state, renamed)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [None, -1, 0, "three"])
def test_impossible_values_end_in_one_line(model_case, value):
    slug, state, config = model_case
    for name in config:
        try:
            from_official(slug, state, config | {name: value})
        except ConversionError as error:
            assert "Traceback" not in str(error)
