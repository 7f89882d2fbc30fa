"""The prompts of an API server's requests, as front-ends look them up in the ranks' prefix indexes.

An engine's index holds fingerprints of vLLM's own block hashes (`dpshm.vllm.prefix_cache`). The API server
makes the same hashes with vLLM's own function, from what it is about to send: token ids, adapter, multimodal
content, cache salt. It makes them block by block, only as far as some rank has the prompt: at most twice as
many as match. And it keeps those that it made (`dpshm.vllm.known_hashes`), by the fingerprints that dpshm itself
makes of tokens, which are 20 times as cheap: of a prompt that goes on from an earlier one only what is new is
hashed by vLLM's function. A route is chosen in the API server's event loop, so at most `MOST_NEW` hashes are made
for one prompt. What lies beyond counts as cached nowhere, and is hashed when the prompt, or one that goes on from
it, comes again.

Without a prompt a request is routed by load alone: where prefix caching is off, for prompts of embeddings, and for
requests that must not read the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

from dpshm.errors import SettingError
from dpshm.rules.prefix_hash import DigestReducer, Fingerprints, Prompt
from dpshm.vllm.block_hashes import chain, chain_is_right, first_of_any_engine, identity_of
from dpshm.vllm.known_hashes import Known, KnownHashes
from dpshm.vllm.log import logger

MOST_NEW = 2048
"""Blocks of an index; with 16 tokens each some 3 ms. Until then no other request is served."""
_NOTHING = 1  # a fingerprint that no block has, unless by the chance that any has
_Hasher = Callable[[Any], list[bytes]]


class _Way(NamedTuple):
    """How the block hashes of an index are made.

    Attributes:
        hash: vLLM's hasher.
        parts: how many of its blocks make one of the index.
        reducer: makes fingerprints of its hashes.
        known: hashes that were made, of the last part of each block of the index.
        plain: the same in less time for blocks that hold tokens alone: of the hash before them, None at the start,
            and of their tokens. None if it is not known how.
    """

    hash: _Hasher
    parts: int
    reducer: DigestReducer
    known: KnownHashes
    plain: Callable[[bytes | None, list[int]], list[bytes]] | None = None


class PromptHasher:
    """Makes block hashes equal to those of the engines. One for each client.

    Attributes:
        caches: whether engines have a prefix cache.
        works: whether prompts can be hashed.
    """

    def __init__(self, client: Any) -> None:
        """Looks for vLLM's hash function in the configuration of a client.

        Args:
            client: vLLM's client. If its engines have no prefix cache, `works` is false.
        """
        self._client_index = client.client_index
        self._ways: dict[int, _Way | None] = {}
        self.works = self.caches = False
        try:
            config = client.vllm_config.cache_config
            if config.enable_prefix_caching:
                self.caches = True
                name = config.prefix_caching_hash_algo
                self._function = import_module("vllm.utils.hashing").get_hash_fn_by_name(name)
                self._make = import_module("vllm.v1.core.kv_cache_utils").get_request_block_hasher
                self._first = first_of_any_engine(self._function)
                if self._first is None:
                    self.leave(
                        f"the seed of {name} is random in each process. Set PYTHONHASHSEED for all processes (or "
                        "use sha256, from vLLM 0.32 on)"
                    )
                else:
                    self.works = True
        except Exception:
            self.leave("their hash function cannot be called", exc_info=True)

    def prompt(self, request: Any, num_tokens: int) -> RequestPrompt | None:
        """The prompt of a request; None if it is not to be looked up.

        Args:
            request: vLLM's ``EngineCoreRequest``.
            num_tokens: of its prompt.
        """
        if not self.works or not request.prompt_token_ids or getattr(request, "prompt_embeds", None) is not None:
            return None
        for parameters in (request.sampling_params, request.pooling_params):
            if getattr(parameters, "skip_reading_prefix_cache", None):
                return None
        return RequestPrompt(self, request, num_tokens)

    def of_index(self, block_tokens: int, identity: int, key: int) -> _Way | None:
        """How the hashes of an index are made; None if the index is of another hash."""
        if identity not in self._ways:
            found = None
            first = self._first
            if first is not None:
                for parts in range(1, block_tokens + 1):
                    size, rest = divmod(block_tokens, parts)
                    if not rest and identity_of(key, block_tokens, size, first) == identity:
                        made = self._make(size, self._function)
                        found = _Way(made, parts, DigestReducer(key), KnownHashes(), self._plain(size, first))
            if found is None:
                logger.warning(
                    "dpshm: API server %d cannot make the block hashes of an engine, and does not see what that "
                    "engine has cached: another hash function or another seed (said once for each kind of hash)",
                    self._client_index,
                )
            self._ways[identity] = found
        return self._ways[identity]

    def _plain(self, size: int, first: bytes) -> Callable[[bytes | None, list[int]], list[bytes]] | None:
        function = self._function
        try:
            if not chain_is_right(function, first, self._make(1, function)):
                return None
        except Exception:
            logger.debug("dpshm: vLLM's hasher makes all hashes of blocks", exc_info=True)
            return None
        return lambda parent, tokens: chain(function, parent or first, tokens, size)

    def failed(self) -> None:
        """Called in the handler of an exception of a hash: requests are routed by load alone from now on."""
        if self.works:
            self.leave("a prompt could not be hashed", exc_info=True)

    def leave(self, why: str, **kwargs: Any) -> None:
        """Looks nothing up from now on, and logs why."""
        self.works = False
        logger.warning(
            "dpshm: API server %d does not see what engines have cached: %s", self._client_index, why, **kwargs
        )


class RequestPrompt(Prompt):
    """One request's prompt."""

    def __init__(self, hasher: PromptHasher, request: Any, num_tokens: int) -> None:
        """Keeps the request; nothing is hashed before it is looked up.

        Args:
            hasher: of the client.
            request: vLLM's.
            num_tokens: of its prompt.
        """
        self._tokens = request.prompt_token_ids  # made an array when it is hashed
        self._salts = ()
        self._made: dict[int, Fingerprints] = {}
        self._hasher = hasher
        self._request = request
        self._num_tokens = num_tokens
        self._blocks: dict[int, Blocks | None] = {}

    def __len__(self) -> int:
        """How many tokens it has."""
        return self._num_tokens

    def fingerprints(self, block_tokens: int, identity: int, key: int) -> Blocks | None:
        """See `dpshm.rules.prefix_hash.Prompt`."""
        try:
            return self._blocks[identity]
        except KeyError:
            way = self._hasher.of_index(block_tokens, identity, key)
            made = None
            if way is not None and self._hasher.works:
                try:
                    self._salts = _salts(self._request)
                    names = self.token_fingerprints(block_tokens, key)
                    made = Blocks(self._hasher, way, self._request, self._num_tokens, block_tokens, names)
                except SettingError:  # what a client sent is no prompt: the others' are still looked up
                    logger.debug(
                        "dpshm: the prompt of %s is not looked up", self._request.request_id, exc_info=True
                    )
                except Exception:
                    self._hasher.failed()
            self._blocks[identity] = made
            return made


def _salts(request: Any) -> tuple[str, ...]:
    """What vLLM's block hashes depend on beside the tokens, as text; too much of it is harmless."""
    salts: list[str] = []
    if lora := request.lora_request:
        salts.append(f"lora {lora.lora_name!r} {getattr(lora, 'lora_path', None)!r}")
    if request.cache_salt:
        salts.append(f"salt {request.cache_salt!r}")
    for feature in request.mm_features or ():
        place = feature.mm_position
        salts.append(f"input {feature.identifier!r} {place.offset} {place.length}")
    return tuple(salts)


class Blocks:
    """The fingerprints of one prompt's blocks, made on demand.

    It stands for the request in vLLM's hasher, which reads the public attributes and hashes what `block_hashes`
    lacks of the first `num_tokens`. Of the hashes that are there it reads the last one alone.
    """

    def __init__(  # noqa: PLR0917 - what it is made of
        self,
        hasher: PromptHasher,
        way: _Way,
        request: Any,
        num_tokens: int,
        block_tokens: int,
        names: Fingerprints,
    ) -> None:
        self._hasher = hasher
        self._way = way
        self._block_tokens = block_tokens
        self._names = names  # of the blocks: under these their hashes are known
        self._name = names.item
        self._get = way.known.get
        self._young = way.known.young.get  # without a call of Python's: the usual case
        self._made: dict[int, int] = {}  # fingerprints: each rank is asked for about the same ones
        # vLLM always computes the last token, so a block that ends with it is never found.
        self._count = self._limit = max(0, num_tokens - 1) // block_tokens
        self._left = MOST_NEW
        self.all_token_ids = request.prompt_token_ids
        self.mm_features = request.mm_features or []
        self.lora_request = request.lora_request
        self.cache_salt = request.cache_salt
        self.prompt_embeds = None
        self.block_hashes: list[bytes] = []
        self.num_tokens = 0

    def __len__(self) -> int:
        """How many blocks can be found."""
        return self._count

    def item(self, index: int, /) -> int:
        """The fingerprint of a block; one that no engine has if the hasher fails or too many are to be made."""
        found = self._made.get(index)
        if found is None:
            if index >= self._limit:
                return _NOTHING
            name = self._name(index)
            known = self._young(name)
            if known is None and (known := self._get(name)) is None:
                try:
                    known = self._hash(index)
                except Exception:
                    self._hasher.failed()
                    self._count = self._limit = 0
                    return _NOTHING
                if known is None:
                    self._limit = index
                    return _NOTHING
            found = self._made[index] = known[0]
        return found

    def _hash(self, index: int) -> Known | None:
        """Hashes the blocks up to one, from the last known one before it; None if these are too many."""
        way, parts, size = self._way, self._way.parts, self._block_tokens
        last: bytes | None = None
        if self.mm_features:
            # Releases before 0.32 continue a chain wrongly where multimodal inputs are: all is hashed at once.
            begin, end = 0, self._count
            names = self._names[:end].tolist()
        else:
            begin = end = index + 1
            names = self._names[max(0, end - self._left - 1) : end].tolist()
            for name in reversed(names):
                known = self._get(name)
                if known is not None:
                    last = known[1]
                    break
                begin -= 1
            names = names[begin - end :]
        if end - begin > self._left:
            return None
        self._left -= end - begin
        if way.plain is not None and not (self.mm_features or self.lora_request or self.cache_salt):
            made = way.plain(last, self.all_token_ids[begin * size : end * size])
        else:
            self.block_hashes = [] if last is None else [last] * (begin * parts)
            self.num_tokens = end * size
            made = way.hash(self)
        digests = made[parts - 1 :: parts]
        pairs = list(zip(map(way.reducer.fingerprint, digests), digests, strict=True))
        way.known.put(zip(names, pairs, strict=True))
        return pairs[index - begin]
