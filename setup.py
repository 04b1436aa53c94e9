"""Two packages: boreal_megatron, and boreal_kernels, which lives under kernels/ and knows torch only."""

from setuptools import find_packages, setup

setup(
    name="boreal-megatron",
    version="0.1.0",
    description="Pretraining of the BOREAL hybrid Gated DeltaNet language models on megatron-core",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=find_packages(include=["boreal_megatron*"]) + find_packages("kernels", include=["boreal_kernels*"]),
    package_dir={"boreal_kernels": "kernels/boreal_kernels"},
    package_data={"boreal_megatron": ["plan/*.yaml"], "boreal_kernels": ["*.json"]},
    install_requires=[
        "torch>=2.11",
        "megatron-core>=0.19.2,<0.20",
        "numpy>=2",
        "packaging",
        "psutil",  # megatron-core's checkpoint writer imports it and does not declare it
        "pydantic>=2.7",
        "pyyaml",
        "safetensors",
        "tensorboard",
        "tokenizers>=0.21",
        "tqdm",
    ],
    extras_require={
        # Preprocessing: fast engine, fast JSON, more kinds of tokenizers and files. Each is done without, or says so.
        "data": ["gigatoken>=0.10,<0.11", "orjson", "pyarrow", "sentencepiece", "zstandard"],
        "eval": ["lm-eval>=0.4.13"],
        "export": ["transformers>=5.23"],
        "plot": ["matplotlib"],
        "test": ["hypothesis", "pytest", "pytest-xdist"],
    },
    entry_points={"console_scripts": ["boreal=boreal_megatron.cli:main"]},
)
