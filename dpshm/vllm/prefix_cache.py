"""An engine's prefix cache, mirrored in its rank's prefix index (`dpshm.board.prefix_index`).

Every block that enters or leaves vLLM's prefix cache goes through one map of the block pool,
``cached_block_hash_to_block``: ``insert`` and ``pop``. A key of the map is a block's hash and four bytes of its KV
cache group; several blocks may share it. The hooks on that map only note which keys were touched. Once vLLM has
scheduled a step, before the model computes it, and when an engine is idle, the index gets what the map holds by
then of these keys: their order, and how often each came and went, are of no account. A reset of the cache gives
the pool a new map: the index is cleared, and the new map hooked.

Which group. The index has the keys of one KV cache group, the first with full attention over all tokens: such a
group finds a prompt's longest run of blocks from the start. In a model with that group alone the match is the hit.
In a model that has other groups too (sliding window, Mamba), the hit is at most the match. Without such a group
there is no index. With speculative decoding by EAGLE or MTP vLLM computes the last cached block again, for the
hidden states that the draft model needs: the index says so, and front-ends count one block less.

All of it runs in the thread that owns the scheduler. If code of dpshm raises, that is logged once, the hooks come
off and front-ends no longer see the index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

from dpshm.engine.cache import EngineCache
from dpshm.engine.row import EngineRow
from dpshm.rules.prefix_hash import DigestReducer
from dpshm.vllm.block_hashes import first_of_engine, identity_of
from dpshm.vllm.instance import InstanceHooks
from dpshm.vllm.log import logger

GROUP_BYTES = 4
"""How many bytes of a key name its KV cache group."""
_FULL_ATTENTION = ("FullAttentionManager", "SinkFullAttentionManager")


def _is_full_attention(manager: Any) -> bool:
    cacheable = getattr(getattr(manager, "kv_cache_spec", None), "prefix_cacheable", True)  # 0.32 on: some are not
    return bool(type(manager).__name__ in _FULL_ATTENTION and cacheable)


def _managers(scheduler: Any) -> Sequence[Any]:
    """The managers of all KV cache groups of vLLM."""
    managers: Sequence[Any] = scheduler.kv_cache_manager.coordinator.single_type_managers
    return managers


class PrefixCache:
    """The hooks on one engine's block pool, and its index.

    Attributes:
        cache: the engine's cache on the board.
    """

    def __init__(self, row: EngineRow, scheduler: Any, group: int, engine: int) -> None:
        """Makes the index, with what the cache holds already, and hooks the pool and the scheduler.

        Args:
            row: the engine's row.
            scheduler: vLLM's.
            group: the number of the group that is indexed.
            engine: for the log.
        """
        managers = _managers(scheduler)
        manager = managers[group]
        self._pool = pool = manager.block_pool
        self._one_group = len(managers) == 1
        self._touched: list[bytes] = []  # keys of the map, since the index was brought up to date
        self._shown: tuple[int, tuple[int, int] | None] | None = None
        self._engine = engine
        key = row.board.segment.header.prefix_key
        first = first_of_engine()
        if not 16 <= len(first) <= 32:
            raise ValueError(f"vLLM's block hashes have {len(first)} bytes, and the index is for 16 to 32")
        fingerprint = DigestReducer(key).fingerprint
        # Of 32 bytes no more count, so that the bytes of the group need not be cut off.
        self._fingerprint = fingerprint if len(first) == 32 else lambda key: fingerprint(key[:-GROUP_BYTES])
        self._group = group.to_bytes(GROUP_BYTES, "big")
        self.cache: EngineCache = row.open_cache(
            pool.num_gpu_blocks,
            manager.block_size,
            identity=identity_of(key, manager.block_size, pool.hash_block_size, first),
            recomputed_blocks=int(bool(getattr(manager, "use_eagle", False))),
        )
        self._pool_hooks, self._map_hooks = InstanceHooks(pool), InstanceHooks(None)
        self._scheduler_hooks = InstanceHooks(scheduler)
        if self.cache.has_index:
            try:
                self._hook_map()
                self._pool_hooks.put("reset_prefix_cache", self._resetting(pool.reset_prefix_cache))
                self._scheduler_hooks.put("schedule", self._scheduling(scheduler.schedule))
            except BaseException:
                self.close()
                raise

    @classmethod
    def open(cls, row: EngineRow, scheduler: Any, engine: int) -> Self | None:
        """Mirrors the prefix cache of a scheduler; None if it has none, or none that can be mirrored."""
        try:
            managers = _managers(scheduler)
            if not scheduler.kv_cache_manager.block_pool.enable_caching:
                return None
            group = next((i for i, manager in enumerate(managers) if _is_full_attention(manager)), None)
            if group is None:
                logger.info(
                    "dpshm: engine %d has no KV cache group with full attention, so front-ends do not see its "
                    "prefix cache",
                    engine,
                )
                return None
            made = cls(row, scheduler, group, engine)
        except Exception:
            if row.cache is not None:
                row.cache.close()
            logger.warning("dpshm: front-ends do not see the prefix cache of engine %d", engine, exc_info=True)
            return None
        if made.cache.has_index:
            logger.info(
                "dpshm: engine %d shows its prefix cache: %d blocks of %d tokens%s",
                *(engine, made._pool.num_gpu_blocks, managers[group].block_size),
                "" if len(managers) == 1 else f", group {group} of {len(managers)}",
            )
        return made

    def show(self) -> None:
        """Brings the index up to date, and stores how full it and the cache are where that has changed."""
        self._catch_up()
        free, index = self._pool.get_num_free_blocks(), self.cache.index
        shown = free, None if index is None else index.changes()
        if shown != self._shown:
            self._shown = shown
            self.cache.show(blocks_in_use=self._pool.num_gpu_blocks - 1 - free)  # one is vLLM's null block

    def close(self) -> None:
        """Takes the hooks off. The row closes its cache."""
        for hooks in (self._pool_hooks, self._map_hooks, self._scheduler_hooks):
            hooks.remove()
        self._touched.clear()

    def _resetting(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        pool = self._pool

        def reset(*args: Any, **kwargs: Any) -> Any:
            before = pool.cached_block_hash_to_block
            try:
                return stock(*args, **kwargs)
            finally:
                if pool.cached_block_hash_to_block is not before:
                    self._begin_anew()

        return reset

    def _scheduling(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        def schedule(*args: Any, **kwargs: Any) -> Any:
            result = stock(*args, **kwargs)
            self._catch_up()
            return result

        return schedule

    def _begin_anew(self) -> None:
        try:
            self._map_hooks.remove()
            self._touched.clear()
            self.cache.clear()
            self._hook_map()
        except Exception:
            self._fail()

    def _hook_map(self) -> None:
        """Indexes what the pool's map holds, and hooks it."""
        held = self._pool.cached_block_hash_to_block
        self._keys = held._cache
        self._touched += self._keys
        stock_insert, stock_pop, touch = held.insert, held.pop, self._touched.append

        def insert(key: bytes, block: Any) -> Any:
            touch(key)
            return stock_insert(key, block)

        def pop(key: bytes, block_id: int) -> Any:
            touch(key)
            return stock_pop(key, block_id)

        self._map_hooks = hooks = InstanceHooks(held)
        hooks.put("insert", insert)
        hooks.put("pop", pop)
        self._update_index()

    def _catch_up(self) -> None:
        if self._touched:
            try:
                self._update_index()
            except Exception:
                self._fail()

    def _update_index(self) -> None:
        """Gives the index what the map holds now of the keys that were touched."""
        index, keys, group, one_group = self.cache.index, self._keys, self._group, self._one_group
        assert index is not None
        enter, leave, names, fingerprint = index.enter, index.leave, index.names, self._fingerprint
        for key in self._touched:
            if key in keys:
                if key not in names and (one_group or key.endswith(group)):
                    enter(key, fingerprint(key))
            elif key in names:
                leave(key)
        self._touched.clear()

    def _fail(self) -> None:
        logger.warning(
            "dpshm: front-ends no longer see the prefix cache of engine %d", self._engine, exc_info=True
        )
        try:
            self.close()
            self.cache.close()
        except Exception:
            logger.debug("dpshm: the prefix index could not be closed", exc_info=True)
