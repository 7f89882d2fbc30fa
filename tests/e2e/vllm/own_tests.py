"""vLLM's own tests of data parallelism, from the release's source distribution, with dpshm and without it.

    python tests/e2e/vllm/own_tests.py [--prepare | --stock] [PYTEST-ARGUMENTS]

The wheel has no tests. pip downloads the source distribution of the release that is in the environment
(`environment.py`), and ``tests/v1/distributed/test_async_llm_dp.py`` runs as it is. Its models are replaced by
folders with a configuration alone that `bench.sleeping_executor` runs, without asynchronous scheduling, and each
prompt by token ids, since there is no tokenizer. Tests on Ray and on a GPU are left out. ``--stock`` sets
``DPSHM=0``; ``--prepare`` fetches the tests and runs none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from tests.e2e.vllm import environment, server  # noqa: E402

TESTS = "tests/v1/distributed/test_async_llm_dp.py"
BUILD = ("setuptools>=77.0.3,<81", "setuptools-rust", "setuptools-scm", "wheel")
"""What the metadata of vLLM's source distribution is made with; pip reads them before it keeps the file."""
RUN = ("pytest>=8", "pytest-asyncio", "pytest-timeout")
LEFT_OUT = "not ray and not device_idle"
TIMEOUT_S = 300


def prepare() -> Path:
    """The folder with the tests and a virtual environment that runs them; made once."""
    where = environment.folder() / "own-tests"
    if not (where / "test_async_llm_dp.py").exists():
        python = where / "env" / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", where / "env"], check=True)
        _below(where)
        pip = [str(python), "-m", "pip", "--quiet"]
        subprocess.run([*pip, "install", *BUILD, *RUN], check=True)
        version = ".".join(map(str, environment.installed()))
        download = ["download", "--no-deps", "--no-build-isolation", "--no-binary", "vllm", f"vllm=={version}"]
        named = os.environ | {"VLLM_VERSION_OVERRIDE": version, "VLLM_TARGET_DEVICE": "empty"}
        subprocess.run([*pip, *download, "--dest", str(where)], check=True, env=named)
        (archive,) = where.glob("vllm-*.tar.gz")
        with tarfile.open(archive) as source:
            (member,) = (m for m in source.getmembers() if m.name.endswith(TESTS))
            found = source.extractfile(member)
            assert found is not None
            (where / "test_async_llm_dp.py").write_bytes(found.read())
        archive.unlink()
    (where / "conftest.py").write_text(_CONFTEST)
    for name, model in server.MODELS.items():
        (where / name).mkdir(exist_ok=True)
        (where / name / "config.json").write_text(json.dumps(server.SIZES | model))
    return where


def _below(where: Path) -> None:
    """Puts vLLM's environment on the path of the one that runs the tests."""
    code = "import sys; print(*(p for p in sys.path if p.endswith('site-packages')), sep='\\n')"
    python = environment.folder() / "bin" / "python"
    paths = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout
    (packages,) = (where / "env" / "lib").glob("python3.*/site-packages")
    (packages / "below.pth").write_text(paths)


_CONFTEST = '''
"""Stands in for what a machine without a GPU and without models lacks."""

import multiprocessing
from pathlib import Path

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine import coordinator, utils
from vllm.v1.engine.async_llm import AsyncLLM

# Forked, as on a GPU: a spawned process imports all of vLLM again, which takes a minute on a busy machine.
coordinator.get_mp_context = utils.get_mp_context = lambda: multiprocessing.get_context("fork")
HERE = Path(__file__).parent
_init, _generate, _add = AsyncEngineArgs.__init__, AsyncLLM.generate, AsyncLLM.add_request


def init(self, *, model, **named):
    # In the constructor, which looks a model up by its name.
    folder = str(HERE / ("moe" if "MoE" in model else "dense"))
    replaced = dict(
        model=folder,
        tokenizer=folder,
        load_format="dummy",
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=2048,
        max_num_seqs=128,
        distributed_executor_backend="bench.sleeping_executor.SleepingExecutor",
        async_scheduling=False,
    )
    _init(self, **(named | replaced))


def tokens(prompt):
    return {"prompt_token_ids": [5, 6, 7]} if isinstance(prompt, str) else prompt


def generate(self, prompt, *rest, **named):
    return _generate(self, tokens(prompt), *rest, **named)


def add_request(self, request_id, prompt, *rest, **named):
    return _add(self, request_id, tokens(prompt), *rest, **named)


AsyncEngineArgs.__init__ = init
AsyncLLM.generate, AsyncLLM.add_request = generate, add_request
'''


def main(arguments: list[str]) -> int:
    """Runs the tests; gives pytest's exit status."""
    if reason := environment.why_not():
        sys.exit(reason)
    environment.install_dpshm(environment.folder())
    where = prepare()
    if "--prepare" in arguments:
        return 0
    stock = "--stock" in arguments
    others = [a for a in arguments if a != "--stock"]
    command = [
        *(str(where / "env" / "bin" / "python"), "-m", "pytest", "-q"),
        *("--rootdir", str(where), "-c", os.devnull, "-k", LEFT_OUT, f"--timeout={TIMEOUT_S}"),
        *others,
        *([] if any("::" in a for a in others) else ["test_async_llm_dp.py"]),
    ]
    steps = {"SLEEPER_STEP_MS": "10,0.02,0.05"}  # a test wants 400 tokens to take more than two seconds
    env = os.environ | server.ENVIRONMENT | steps | ({"DPSHM": "0"} if stock else {})
    return subprocess.run(command, env=env, cwd=where, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
