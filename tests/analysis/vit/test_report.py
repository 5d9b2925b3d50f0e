"""The report in a browser: it loads without errors, and choosing a head in one view changes the others."""

import base64
import dataclasses
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from hf_attn.analysis.vit import analyze
from hf_attn.analysis.vit.report import write_page

from .models import build


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
#: records errors from the start
CATCH = "<script>window.errors = []; window.addEventListener('error', (event) => errors.push(String(event.message)));</script>"
#: runs after the page has loaded, and writes what it found into the document
DRIVE = """
<script>
window.addEventListener("load", () => {
  const views = () => ({
    head: document.getElementById("head-name").textContent,
    importance: [...document.querySelectorAll("#importance button")].findIndex((cell) => cell.getAttribute("aria-pressed") === "true"),
    profiles: [...document.querySelectorAll("#profiles button")].findIndex((cell) => cell.getAttribute("aria-pressed") === "true"),
    images: document.getElementById("image-facts").textContent,
    profile: document.getElementById("profile").innerHTML,
    trend: document.getElementById("trend").innerHTML,
    point: document.querySelector("#scatter circle:last-of-type").dataset.index,
    mean: document.getElementById("mean-map").toDataURL(),
    offsets: document.getElementById("offset-map").toDataURL(),
    patch: document.getElementById("patch-map").toDataURL(),
    partial: document.getElementById("partial").textContent,
    clusters: document.querySelectorAll("#legend span").length,
  });
  const key = (id, name) => {
    const element = id === "importance" ? document.querySelector("#importance [aria-pressed=true]") : document.getElementById(id);
    element.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true }));
  };
  const steps = [views()];
  const then = (act) => { act(); steps.push(views()); };
  then(() => document.querySelector('#importance [data-layer="2"][data-head="1"]').click());
  then(() => key("importance", "ArrowLeft"));
  then(() => key("importance", "ArrowUp"));
  then(() => document.querySelector('#profiles [data-layer="0"][data-head="2"]').click());
  then(() => document.querySelector('#scatter circle[data-index="4"]').dispatchEvent(new MouseEvent("click", { bubbles: true })));
  then(() => document.querySelectorAll("#images button")[2].click());
  then(() => key("patch-map", "ArrowDown"));
  then(() => { const input = document.getElementById("clusters"); input.value = 5; input.dispatchEvent(new Event("change")); });
  const result = document.createElement("pre");
  result.id = "result";
  result.textContent = btoa(JSON.stringify({ errors, steps, focus: document.activeElement.title }));
  document.body.append(result);
});
</script>
"""


@pytest.fixture(scope="module")
def analysis():
    model, _ = build("vit")
    torch.manual_seed(1)
    return analyze(model, torch.randn(5, 3, 24, 16), [0, 1, 2, 3, 4], curve_points=3, random_orders=2, partial_heads=2)


@pytest.fixture(scope="module")
def page(analysis, tmp_path_factory):
    return analysis.report(tmp_path_factory.mktemp("analysis") / "report")


def browse(page: Path, tmp_path: Path) -> dict:
    text = (
        page.read_text(encoding="utf-8")
        .replace("<head>", f"<head>{CATCH}", 1)
        .replace("</body>", f"{DRIVE}</body>", 1)
    )
    driven = tmp_path / "driven.html"
    driven.write_text(text, encoding="utf-8")
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=5000",
        "--dump-dom",
        driven.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    (found,) = re.findall(r'<pre id="result">([^<]+)</pre>', done.stdout)
    return json.loads(base64.b64decode(found))


def test_the_page_needs_no_network(page):
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)=["'](?!data:|\$\{)[^"']+""", text)
    assert "http" not in re.sub(r'<script id="data".*?</script>', "", text, flags=re.DOTALL)


@pytest.mark.skipif(
    CHROMIUM is None and os.environ.get("CI", "").lower() not in ("1", "true"),
    reason="needs Chromium (Debian: apt-get install chromium)",
)
def test_views_follow_the_head_that_is_chosen(page, analysis, tmp_path):
    result = browse(page, tmp_path)
    assert result["errors"] == []
    start, clicked, left, up, profile, point, image, patch, clusters = result["steps"]
    best = analysis.leave_one_out["jsd"].mean(-1).argmax().item()
    assert start["head"] == f"{best // 3}.{best % 3}" and best != 7
    assert "ring_1" in start["partial"]
    for step, head in ((clicked, 7), (left, 6), (up, 3), (profile, 2), (point, 4)):
        assert step["head"] == f"{head // 3}.{head % 3}"
        assert step["importance"] == step["profiles"] == int(step["point"]) == head
    for before, after in zip(result["steps"][:5], result["steps"][1:6], strict=True):
        for view in ("images", "profile", "trend", "mean", "offsets"):
            assert before[view] != after[view], view
    assert image["images"].startswith("Image 2: ") and image["patch"] != point["patch"]
    assert patch["patch"] != image["patch"] and patch["head"] == image["head"]
    assert clusters["clusters"] == 5
    assert result["focus"] == "Layer 1, head 0"


def test_a_name_from_elsewhere_cannot_end_the_script(analysis, tmp_path):
    hostile = "</script><script>alert(1)</script>$data"
    other = dataclasses.replace(analysis, model_name=hostile, class_names=(hostile,) * 5)
    text = write_page(other, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert text.count("</script>") == 2
