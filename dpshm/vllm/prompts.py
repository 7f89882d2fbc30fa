"""The prompts of an API server's requests, as front-ends look them up in the ranks' prefix indexes.

An engine's index holds fingerprints of vLLM's own block hashes (`dpshm.vllm.prefix_cache`). The API server
makes the same hashes with vLLM's own function, from what it is about to send: token ids, adapter, multimodal
content, cache salt. It makes them block by block, only as far as some rank has the prompt: at most twice as
many as match. And it keeps those that it made (`dpshm.vllm.known_hashes`), by the fingerprints that dpshm itself
makes of tokens, which are 20 times as cheap: of a prompt that goes on from an earlier one only what is new is
hashed by vLLM's function.

Without a prompt a request is routed by load alone: where prefix caching is off, for prompts of embeddings, and for
requests that must not read the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

from dpshm.rules.prefix_hash import DigestReducer, Fingerprints, Prompt
from dpshm.vllm.block_hashes import first_of_any_engine, identity_of
from dpshm.vllm.known_hashes import KnownHashes
from dpshm.vllm.log import logger

_NOTHING = 1  # a fingerprint that no block has, unless by the chance that any has
_Hasher = Callable[[Any], list[bytes]]


class _Way(NamedTuple):
    """How the block hashes of an index are made.

    Attributes:
        hash: vLLM's hasher.
        parts: how many of its blocks make one of the index.
        reducer: makes fingerprints of its hashes.
        known: hashes that were made, of the last part of each block of the index.
    """

    hash: _Hasher
    parts: int
    reducer: DigestReducer
    known: KnownHashes


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
                        found = _Way(made, parts, DigestReducer(key), KnownHashes())
            if found is None:
                logger.warning(
                    "dpshm: API server %d cannot make the block hashes of an engine, and does not see what that "
                    "engine has cached: another hash function or another seed (said once for each kind of hash)",
                    self._client_index,
                )
            self._ways[identity] = found
        return self._ways[identity]

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

    growth = 2

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
        self._name = names.item  # of a block: under this name its hash is known
        self._made: dict[int, int] = {}  # fingerprints: each rank is asked for about the same ones
        # vLLM always computes the last token, so a block that ends with it is never found.
        self._count = max(0, num_tokens - 1) // block_tokens
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
        """The fingerprint of a block; if vLLM's hasher fails, one that no engine has."""
        found = self._made.get(index)
        if found is None:
            way = self._way
            digest = way.known.get(self._name(index))
            if digest is None:
                try:
                    digest = self._hash(index)
                except Exception:
                    self._hasher.failed()
                    self._count = 0
                    return _NOTHING
            found = self._made[index] = way.reducer.fingerprint(digest)
        return found

    def _hash(self, index: int) -> bytes:
        """Hashes the blocks up to one, from the last known one before it."""
        name, known, parts = self._name, self._way.known, self._way.parts
        if self.mm_features:
            # Releases before 0.32 continue a chain wrongly where multimodal inputs are: all is hashed at once.
            begin, end, hashes = 0, self._count, []
        else:
            begin, end, last = index, index + 1, None
            while begin and (last := known.get(name(begin - 1))) is None:
                begin -= 1
            hashes = [last] * (begin * parts) if last is not None else []
        self.block_hashes, self.num_tokens = hashes, end * self._block_tokens
        made = self._way.hash(self)
        for i in range(begin, end):
            known.put(name(i), made[(i - begin + 1) * parts - 1])
        return made[(index - begin + 1) * parts - 1]
