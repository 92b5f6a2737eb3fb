"""Package metadata. The version is read from torch_bilevel/__init__.py without importing it (torch need not
be there yet).
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def version() -> str:
    """The string assigned to `__version__` in torch_bilevel/__init__.py."""
    text = (ROOT / "torch_bilevel" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r"""^__version__\s*(?::\s*str\s*)?=\s*["']([^"']+)["']""", text, flags=re.MULTILINE)
    if match is None:
        raise RuntimeError('torch_bilevel/__init__.py has no line of the form __version__ = "1.2.3"; add one')
    return match.group(1)


def readme() -> str:
    """The long description; empty in a tree without a README."""
    path = ROOT / "README.md"
    return path.read_text(encoding="utf-8") if path.exists() else ""


EXPERIMENTS = [
    "torchvision>=0.21",
    "scikit-learn>=1.4",
    "matplotlib>=3.8",
    "omegaconf>=2.3",
    "pandas>=2.0",
    "tensorboard>=2.15",
]
TEST = ["pytest>=8.0", "pytest-xdist>=3.5", "scipy>=1.11"]
BASELINES = ["optuna>=4.0"]
# What the benchmarks compare with. boat-torch is not among them: it wants numpy <= 1.26 (install it with --no-deps).
PEERS = ["torchopt>=0.7.3", "betty-ml>=0.1.1", "higher>=0.2.1", "curvlinops-for-pytorch>=3.0", "jaxopt>=0.8.5", "scipy>=1.11"]

setup(
    name="torch-bilevel",
    version=version(),
    description="Second-order bilevel and minimax optimization in PyTorch by cubic Newton methods",
    long_description=readme(),
    long_description_content_type="text/markdown",
    author="torch_bilevel contributors",
    license="MIT",
    packages=find_packages(include=["torch_bilevel", "torch_bilevel.*"]),
    package_data={"torch_bilevel": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=["torch>=2.6", "tqdm>=4.60"],
    extras_require={
        "experiments": EXPERIMENTS,
        "test": TEST,
        "baselines": BASELINES,
        "bench": [*EXPERIMENTS, *BASELINES, *PEERS],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Mathematics",
    ],
)
