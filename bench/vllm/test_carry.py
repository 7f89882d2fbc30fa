"""What is carried: a wheel's packages without its scripts, and an environment that vLLM and dpshm are found in."""

from __future__ import annotations

import zipfile
from importlib.metadata import distributions
from pathlib import Path

from bench.vllm import carry


def files_of(folder: Path) -> list[str]:
    """All files in it, by their paths."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_wheel_is_unpacked_as_pip_would(tmp_path: Path) -> None:
    """Guards against packages that lie in a wheel's data folder, and against files that only take space."""
    wheel = tmp_path / "a-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("a/__init__.py", "x = 1")
        archive.writestr("a/data/tekken_240911.json", "{}")
        archive.writestr("a-1.data/purelib/b.py", "y = 2")
        archive.writestr("a-1.data/scripts/run", "#!python")
    packages = tmp_path / "packages"
    carry.unpack(wheel, packages)
    assert files_of(packages) == ["a/__init__.py", "b.py"]


def test_the_plugin_is_found_there(tmp_path: Path) -> None:
    """Guards against servers that run without dpshm in all arms."""
    carry.add_entry_point(tmp_path)
    (found,) = distributions(path=[str(tmp_path)])
    (point,) = found.entry_points
    assert (point.group, point.name, point.value) == ("vllm.general_plugins", "dpshm", "dpshm.vllm:register")


def test_vllm_is_carried_without_what_is_compiled(tmp_path: Path) -> None:
    """Guards against hundreds of megabytes that nothing calls."""
    theirs = tmp_path / "environment" / "lib" / "python3.11" / "site-packages"
    (theirs / "vllm" / "sub").mkdir(parents=True)
    (theirs / "vllm" / "sub" / "a.py").write_text("")
    (theirs / "vllm" / "_C.abi3.so").write_text("")
    info = theirs / "vllm-0.32.0+cpu.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: vllm\n")
    packages = tmp_path / "packages"
    packages.mkdir()
    carry.add_vllm(packages, tmp_path / "environment")
    assert files_of(packages) == ["vllm-0.32.0+cpu.dist-info/METADATA", "vllm/sub/a.py"]
