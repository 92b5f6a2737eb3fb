"""The distribution's metadata and the files that set up a fresh machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def setup(*arguments: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_version_is_the_packages_own() -> None:
    import torch_bilevel

    assert setup("--version").splitlines()[-1] == torch_bilevel.__version__


def test_version_is_read_without_importing_the_package(tmp_path: Path) -> None:
    (tmp_path / "setup.py").write_text((ROOT / "setup.py").read_text())
    (tmp_path / "torch_bilevel").mkdir()
    (tmp_path / "torch_bilevel" / "__init__.py").write_text(
        'raise ImportError("imported")\n__version__ = "9.8.7"\n'
    )
    assert setup("--version", cwd=tmp_path).splitlines()[-1] == "9.8.7"


def test_core_needs_torch_and_tqdm_only() -> None:
    text = (ROOT / "setup.py").read_text()
    required = re.search(r"install_requires=\[([^\]]*)\]", text).group(1)
    assert re.findall(r'"([a-z]+)', required) == ["torch", "tqdm"]


def test_core_imports_nothing_else() -> None:
    code = (
        "import sys, torch_bilevel; "
        "heavy = {'torchvision', 'sklearn', 'matplotlib', 'omegaconf', 'pandas', 'optuna', 'scipy', "
        "'experiments'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    import_only_torch = subprocess.run(
        [sys.executable, "-c", "import sys, torch; print(sorted(set(sys.modules) & {'scipy', 'pandas'}))"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    ).stdout  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == import_only_torch


@pytest.mark.parametrize("target", ["demo", "test", "test-slow", "test-gpu", "bench", "lint", "clean", "install"])
def test_make_target_exists_and_honours_variables(target: str) -> None:
    done = subprocess.run(
        ["make", "--dry-run", target, "VENV=elsewhere", "PYTHON=python9"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    if target != "clean":
        assert "python9 -m venv elsewhere" in done.stdout
        assert "elsewhere/bin/python -m pip install -e" in done.stdout


def test_ci_script_runs_the_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text
    assert re.search(r"^make test$", text, flags=re.MULTILINE)


def test_strictness_of_the_test_configuration(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getini("xfail_strict") is True
    assert {line.split(":")[0] for line in pytestconfig.getini("markers")} >= {"slow", "gpu"}
    assert {"--strict-markers", "--strict-config"} <= set(pytestconfig.getini("addopts"))
