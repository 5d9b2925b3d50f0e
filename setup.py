"""Packaging of hf_attn.

`modeling/`, `pipelines/` and `model_cards/` stand at the top of the repository and are installed under the one import
name `hf_attn`, so that nothing generic lands in site-packages.
"""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup


ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "hf_attn" / "__init__.py").read_text("utf-8"), re.M).group(1)
MAPPED = ("modeling", "pipelines", "model_cards")

EXTRAS = {
    "vision": ["torchvision>=0.28", "pillow"],
    "diffusers": ["diffusers>=0.42,<0.43"],
    "peft": ["peft>=0.21"],
    "train": ["datasets>=4", "evaluate>=0.4", "scikit-image", "scikit-learn"],
    "gguf": ["gguf>=0.17"],
    "plot": ["matplotlib"],
    "analysis": ["matplotlib", "pandas>=2.2", "pillow", "scikit-image", "scikit-learn"],
    "traffic": ["pandas>=2.2", "scipy", "tables"],
    "embeddings": ["sentence-transformers>=6"],
    "ot": ["POT>=0.9.5"],
    "speech": ["scipy", "soundfile"],
    "kernels": ["triton>=3.6; platform_system == 'Linux'"],
}

EXTRAS["all"] = sorted({requirement for extra in EXTRAS.values() for requirement in extra})
# CUDA packages, which an installation of everything on another machine cannot use
EXTRAS["deberta-cuda"] = [
    "disentangled-flash>=1.1; platform_system == 'Linux'",
    "flashdeberta>=0.0.8; platform_system == 'Linux'",
]
EXTRAS["docs"] = ["mkdocs>=1.6,<2", "mkdocs-material>=9.8", "mkdocstrings[python]>=1.0"]
EXTRAS["test"] = (
    EXTRAS["all"]
    + EXTRAS["docs"]
    + [
        "multimatch-gaze>=0.1.3",
        "onnx>=1.23",
        "onnxruntime>=1.32",
        "onnxscript>=0.7",
        "parameterized",
        "pytest",
        "pytest-xdist",
        "ruff>=0.17,<0.18",
        "scikit-image",
        "setuptools>=77",
        "spandrel",
        "timm",
        "wheel",
    ]
)


def packages() -> list[str]:
    own = ["hf_attn", *(f"hf_attn.{name}" for name in find_namespace_packages("hf_attn"))]
    mapped = []
    for folder in MAPPED:
        mapped += [f"hf_attn.{folder}", *(f"hf_attn.{folder}.{name}" for name in find_namespace_packages(folder))]
    return [name for name in own + mapped if "__pycache__" not in name]


setup(
    name="hf_attn",
    version=VERSION,
    description="Attention research as Hugging Face components: 29 papers behind AutoModel, pipelines, Trainer and PEFT",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The hf_attn authors",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=packages(),
    package_dir={"hf_attn": "hf_attn", **{f"hf_attn.{folder}": folder for folder in MAPPED}},
    package_data={"hf_attn": ["py.typed"], "hf_attn.analysis.vit.report": ["page.*"], "hf_attn.model_cards": ["*.md"]},
    install_requires=[
        "torch>=2.13",
        "transformers>=5.23,<5.25",
        "accelerate>=1.15",
        "safetensors>=0.6",
        "huggingface_hub>=1.0",
        "filelock",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["hf-attn=hf_attn.cli:main"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
