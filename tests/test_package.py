"""The package as a new user meets it: what it shows, where it is found, the rows it brings."""

import os
import pydoc
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dbattn

ROOT = Path(__file__).parents[1]


def test_every_public_name_is_listed_and_explained():
    assert set(dbattn.__all__) <= set(dir(dbattn))
    text = pydoc.render_doc(dbattn, renderer=pydoc.plaintext)
    for name in dbattn.__all__:
        assert f"class {name}(" in text or f"\n    {name}(" in text, name


def test_listing_the_names_imports_nothing_heavy():
    call = "import sys, dbattn; assert 'AttentionDB' in dir(dbattn); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", call], cwd=ROOT, timeout=60).returncode == 0


def test_an_editable_install_is_found_from_the_folder_above_the_clone(tmp_path):
    """There, ``dbattn/`` is the clone itself: a folder without code, which Python takes for a namespace package."""
    pytest.importorskip("setuptools", minversion="77")
    above, site = tmp_path / "above", tmp_path / "site"
    clone = above / "dbattn"
    for folder in (clone, site):
        folder.mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE", "dbattn", "index_kernels"):
        (clone / name).symlink_to(ROOT / name)
    build = (
        "import zipfile; from setuptools import build_meta\n"
        f"folder = {str(site)!r}; wheel = build_meta.build_editable(folder)\n"
        "zipfile.ZipFile(f'{folder}/{wheel}').extractall(folder)"
    )
    subprocess.run([sys.executable, "-c", build], cwd=clone, check=True, capture_output=True, timeout=120)
    call = f"import site; site.addsitedir({str(site)!r}); import dbattn; print(dbattn.__version__)"
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # -S: what is installed beside this test stays out of it.
    words = [sys.executable, "-S", "-c", call]
    found = subprocess.run(words, cwd=above, env=alone, capture_output=True, text=True, timeout=60)
    assert found.stdout.strip() == dbattn.__version__, found.stderr


def test_rows_of_a_real_model_come_with_the_package():
    keys, values, queries = dbattn.sample_rows()
    assert keys.shape == values.shape == (1, 1, 12280, 64)
    assert queries.shape == (1, 3, 16, 64)
    assert keys.dtype == values.dtype == queries.dtype == torch.float32


def test_the_quickstart_reads_a_few_percent_of_them(capsys):
    pytest.importorskip("numba")
    runpy.run_path(str(ROOT / "examples" / "quickstart.py"))
    printed = capsys.readouterr().out
    assert float(re.search(r"read a query, ([\d.]+)%", printed)[1]) < 6
    assert 0.001 < float(re.search(r"mean ([\d.]+)", printed)[1]) < 0.08
    assert re.search(r"step: [\d.]+ ms, torch's attention [\d.]+ ms", printed)
