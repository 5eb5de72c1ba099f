"""Packaging, and nothing else."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
PRESETS = ["tnl.presets"] + [
    "tnl.presets." + ".".join(p.relative_to(ROOT / "configs").parts)
    for p in (ROOT / "configs").rglob("*")
    if p.is_dir()
]

setup(
    name="transnormer-llm",
    version="0.1.0",
    description="A training framework for TransNormerLLM, the language model on lightning attention",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["tnl", "tnl.*"]), "tnl_kernels", *PRESETS],
    package_dir={"tnl_kernels": "kernels/tnl_kernels", "tnl.presets": "configs"},
    package_data={package: ["*.yaml"] for package in PRESETS},
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19.8",
        "transformers>=5.3",
        "datasets>=4.0",
        "sentencepiece>=0.2.1",
        "protobuf",
        "safetensors",
        "numpy",
        "pydantic>=2",
        "PyYAML",
        "typer",
        "rich",
        "matplotlib",
        "wandb",
        "triton; platform_system == 'Linux' and platform_machine == 'x86_64'",
    ],
    extras_require={
        "eval": ["lm-eval[ruler]>=0.4.13"],
        "finetune": ["peft>=0.20"],
        "gpu": ["liger-kernel"],
        "preference": ["peft>=0.20", "trl>=1.16"],
        "quant": ["accelerate", "bitsandbytes>=0.50", "torchao>=0.18"],
        "dev": [
            "accelerate",
            "hypothesis",
            "lm-eval[ruler]>=0.4.13",
            "peft>=0.20",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "setuptools>=77",
            "torchao>=0.18",
            "trl>=1.16",
        ],
    },
    entry_points={"console_scripts": ["tnl = tnl.cli:main"]},
)
