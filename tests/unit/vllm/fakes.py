"""A small vLLM: the modules in which the plugin looks for names, with fakes in them."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

from tests.unit.vllm.fake_cache import SEED, hash_function, request_block_hasher
from tests.unit.vllm.fake_client import DPAsyncMPClient, DPLBAsyncMPClient, late_interaction_engine
from tests.unit.vllm.fake_core import (
    DPEngineCoreProc,
    EngineCoreProc,
    EventType,
    Request,
    RequestType,
    Scheduler,
    SentRequest,
    Status,
)


class CoreEngineProcManager:
    """Starts no engine."""

    def __init__(self, vllm_config: object = None) -> None:
        self.vllm_config = vllm_config


HOOKED_CLASSES = (EngineCoreProc, DPEngineCoreProc, DPAsyncMPClient, DPLBAsyncMPClient, CoreEngineProcManager)


def _count_tokens(token_ids: list[int] | None, embeds: list[float] | None) -> int:
    if token_ids is None and embeds is None:
        raise ValueError("no prompt")
    return len(token_ids or embeds or ())


class DPCoordinator:
    """vLLM's own."""

    def __init__(
        self, parallel_config: object, enable_wave_coordination: bool = True, logging_config: object = None
    ) -> None:
        self.parallel_config = parallel_config


class Vllm:
    """The modules of a vLLM of some release.

    Attributes:
        modules: by name, as `sys.modules` has them.
        core: the module of engine cores.
        client: the module of clients.
        utils: the module with the coordinator's name.
        hashes: the module with the hashes of blocks.
    """

    def __init__(self, version: str = "0.32.0") -> None:
        self.modules: dict[str, ModuleType] = {}
        self._module("vllm", __version__=version, SamplingParams=SimpleNamespace)
        self._module("vllm.envs")
        self._module("vllm.utils", length_from_prompt_token_ids_or_embeds=_count_tokens)
        self._module(
            "vllm.v1.engine",
            EngineCoreRequestType=RequestType,
            EngineCoreEventType=EventType,
            EngineCoreRequest=SentRequest,
        )
        self._module("vllm.v1.request", Request=Request, RequestStatus=Status)
        self._module("vllm.v1.core.sched.scheduler", Scheduler=Scheduler)
        self._module("vllm.utils.hashing", get_hash_fn_by_name={"sha256": hash_function}.__getitem__)
        self.hashes = self._module(
            "vllm.v1.core.kv_cache_utils",
            NONE_HASH=hash_function(SEED),
            get_request_block_hasher=request_block_hasher,
            resolve_none_hash_seed=lambda _: SEED,
        )
        self.core = self._module(
            "vllm.v1.engine.core", EngineCoreProc=EngineCoreProc, DPEngineCoreProc=DPEngineCoreProc
        )
        self.client = self._module(
            "vllm.v1.engine.core_client",
            DPAsyncMPClient=DPAsyncMPClient,
            DPLBAsyncMPClient=DPLBAsyncMPClient,
            get_late_interaction_engine_index=late_interaction_engine,
        )
        self.utils = self._module(
            "vllm.v1.engine.utils", DPCoordinator=DPCoordinator, CoreEngineProcManager=CoreEngineProcManager
        )

    def _module(self, name: str, **names: object) -> ModuleType:
        module = self.modules[name] = ModuleType(name)
        vars(module).update(names)
        return module
