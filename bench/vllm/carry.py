"""``python -m bench vllm --carry DIR``: what runs vLLM without a model on a machine with no network.

DIR gets ``vllm.tar.xz`` (about 30 MB) and ``run.sh``. The machine has CPython 3.12, PyTorch 2.11 or newer and the
packages that usually come with it for language models (numpy, transformers, tokenizers, aiohttp, uvloop, pillow,
protobuf, psutil, prometheus-client, jinja2, regex, requests, tiktoken, sentencepiece, pytest and so on); what
vLLM needs beyond these is in ``carry-requirements.txt``. In the checkout, there:

    sh DIR/run.sh python3 -m bench vllm --side-by-side

The archive is laid out as an environment of ``tests/e2e/vllm/environment.py``: the wheels, unpacked; vLLM's
Python files from the environment here, without compiled ones, because the executor that sleeps calls none; and
dpshm's entry point, whose code is found in the checkout.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from dpshm.version import __version__
from tests.e2e.vllm import environment

HERE = Path(__file__).parent
PYTHON = "3.12"
GLIBCS = (5, 12, 17, 24, 26, 27, 28, 31, 34, 35)
"""Wheels for glibc 2.N; pip matches each by itself."""
UNNEEDED = ("*.so", "*.pyc", "__pycache__", "vllm-rs", "tekken_*.json", "tests")
COMMAND = """#!/bin/sh
here=$(cd "$(dirname "$0")/.." && pwd)
PYTHONPATH="$here/lib/python{python}/site-packages:$PYTHONPATH" exec python3 -m vllm.entrypoints.cli.main "$@"
"""


def carry(folder: Path) -> None:
    """Makes them."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="dpshm-carry-") as scratch:
        root = Path(scratch, "environment")
        packages = root / "lib" / f"python{PYTHON}" / "site-packages"
        packages.mkdir(parents=True)
        for wheel in download(Path(scratch, "wheels")):
            unpack(wheel, packages)
        add_vllm(packages, environment.folder())
        add_entry_point(packages)
        command = root / "bin" / "vllm"
        command.parent.mkdir()
        command.write_text(COMMAND.format(python=PYTHON))
        command.chmod(0o755)
        (root / environment.CARRIED).touch()
        archive = folder / "vllm.tar.xz"
        with tarfile.open(archive, "w:xz", preset=6) as tar:
            tar.add(root, arcname=".")
    shutil.copy(HERE / "carried_run.sh", folder / "run.sh")
    print(f"{archive}: {archive.stat().st_size / 1e6:.0f} MB; {folder / 'run.sh'}")


def download(folder: Path) -> list[Path]:
    """The wheels of ``carry-requirements.txt`` for the machine's Python."""
    platforms = [f"manylinux_2_{n}_x86_64" for n in GLIBCS] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
    command = [sys.executable, "-m", "pip", "--quiet", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--python-version", PYTHON, "--implementation", "cp", "--dest", str(folder)]
    command += [word for platform in platforms for word in ("--platform", platform)]
    subprocess.run([*command, "--requirement", str(HERE / "carry-requirements.txt")], check=True)
    return sorted(folder.glob("*.whl"))


def unpack(wheel: Path, packages: Path) -> None:
    """Unpacks a wheel as pip would, without its scripts and without what is not needed."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            target = Path(name)
            if target.parts[0].endswith(".data"):
                if len(target.parts) < 3 or target.parts[1] not in ("purelib", "platlib"):
                    continue
                target = Path(*target.parts[2:])
            if name.endswith("/") or target.match("tekken_*.json"):
                continue
            (packages / target).parent.mkdir(parents=True, exist_ok=True)
            (packages / target).write_bytes(archive.read(name))


def add_vllm(packages: Path, where: Path) -> None:
    """Copies vLLM's Python files, and the name and version under which it finds itself."""
    (theirs,) = (where / "lib").glob("python3.*/site-packages")
    shutil.copytree(theirs / "vllm", packages / "vllm", ignore=shutil.ignore_patterns(*UNNEEDED))
    (info,) = theirs.glob("vllm-*+cpu.dist-info")
    shutil.copytree(info, packages / info.name)


def add_entry_point(packages: Path) -> None:
    """Tells vLLM of dpshm's plugin."""
    info = packages / f"dpshm-{__version__}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: dpshm\nVersion: {__version__}\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\ndpshm = dpshm.vllm:register\n")
