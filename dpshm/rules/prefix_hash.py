"""The fingerprints of a prompt's blocks: what engines insert into the prefix index and front-ends look up.

A prompt is cut into blocks of `block_tokens` tokens; a rest that fills no block has no fingerprint. A block's
fingerprint is 64 bits that depend on every token from the prompt's start to the block's end, in order, and on the
salt. Two prompts therefore share a fingerprint exactly where they share a prefix, up to collisions.

The hash of block j, with secret 64-bit keys drawn from the group's key:

    block_j       = fold(sum over k of token[k] * T[k] + B)         T: one odd key a position, B: one more
    chain_j       = sum over i <= j of block_i * K[i]               K: one odd key a block of the prompt
    fingerprint_j = fold(fold(chain_j + start) * M),  0 becomes 1   start: from the salt; M: an odd key

fold(x) is x ^ (x >> 32). The last line spreads what two chains differ in over all bits, and keeps them apart. All
arithmetic is modulo 2**64, so numpy computes all blocks at once: a matrix product, a cumulative sum. Every block
has a key of its own instead of a power of one number: sums of powers modulo 2**64 collide on Thue-Morse sequences
whatever the number is.

Collisions. For two given prompts that an author chose without the keys, the sums of a block differ with
probability at least 1 - 2**-(64 - z), where 2**z is the largest power of two that divides all differences of its
tokens (z < 20 for a vocabulary below a million). `fold` keeps apart what differs, and brings the high bits of a
difference, which its z low bits lack, into the low ones. Blocks whose differences end in v zero bits, which has
probability 2**-v, cancel each other in the chain with probability 2**-(63 - v) at most: 2**-57 for all v together.
A lookup of a fingerprint that is not there, among n fingerprints of a rank, is a false hit with probability
n / 2**64: 4e-15 for a million tokens in blocks of 16. A false hit costs one computation of a prefix. It never
changes an answer.

Sources: the sum is the multilinear family of Carter and Wegman, "Universal classes of hash functions", JCSS 18(2),
1979, in the form that Lemire and Kaser analyse, "Strongly universal string hashing is fast", Computer Journal
57(11), 2014.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping, Set
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dpshm.errors import SettingError

Tokens: TypeAlias = Iterable[int] | NDArray[Any] | memoryview
"""Token ids. Arrays and buffers of integers are read as they are; a list is converted, which costs as much as the
hash: some 5 ns a token."""
Fingerprints: TypeAlias = NDArray[np.uint64]


class FingerprintList(Protocol):
    """Fingerprints of a prompt's blocks for a lookup: an array, or a list that makes each at its first use."""

    def __len__(self) -> int:
        """How many blocks the prompt has."""

    def item(self, index: int, /) -> int:
        """The fingerprint of a block."""


MAX_TOKEN = (1 << 32) - 1
MAX_BLOCK_TOKENS = 4096
_MASK = (1 << 64) - 1
_DIGEST_BYTES = 32
_HALF = np.array(32, np.uint64)
_shift, _xor, _multiply, _accumulate = np.right_shift, np.bitwise_xor, np.multiply, np.add.accumulate
_CHUNK = 1024  # keys of blocks are derived in chunks of so many


class PrefixHasher:
    """Makes the fingerprints of one group's prompts; equal arguments make equal fingerprints in every process.

    Attributes:
        block_tokens: tokens a block.
        identity: 63 bits that differ where block size, key or method differ. Fingerprints compare only between
            hashers of one identity.
    """

    def __init__(self, block_tokens: int, key: int) -> None:
        """Derives the keys.

        Args:
            block_tokens: tokens a block, from 1 to 4096.
            key: the group's secret, 63 bits.

        Raises:
            SettingError: `block_tokens` is out of range.
        """
        if not 1 <= block_tokens <= MAX_BLOCK_TOKENS:
            raise SettingError(
                f"block_tokens is {block_tokens}: choose 1 to {MAX_BLOCK_TOKENS}, the KV cache's block size"
            )
        self.block_tokens = block_tokens
        self._secret = key.to_bytes(8, "little")
        keys = self._keys(b"token", 0, block_tokens + 1)
        self._token_keys, self._block_start = keys[:-1], keys[-1:].reshape(())
        self._last_key = self._keys(b"last", 0, 1).reshape(())
        self._block_keys = self._keys(b"block", 0, _CHUNK)
        name = f"dpshm-2:{block_tokens}".encode()
        self.identity = _number(blake2b(name, key=self._secret, digest_size=8).digest()) >> 1

    def start(self, *salts: str | bytes | int) -> int:
        """The start value for prompts that differ beside their tokens: adapter, multimodal content, cache salt.

        Returns:
            64 bits; 0 without a salt.
        """
        if not salts:
            return 0
        digest = blake2b(key=self._secret, digest_size=8)
        for salt in salts:
            data = salt if isinstance(salt, bytes) else str(salt).encode(errors="surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
        return _number(digest.digest())

    def fingerprints(self, tokens: Tokens, start: int = 0) -> Fingerprints:
        """One fingerprint a whole block, of shape (number of tokens // block_tokens,) and dtype uint64, none 0.

        Args:
            tokens: token ids from 0 to 2**32 - 1.
            start: from `start`.

        Raises:
            SettingError: the tokens are not integers of that range, or not one-dimensional.
        """
        ids = as_token_array(tokens)
        size = self.block_tokens
        blocks = len(ids) // size
        if blocks == 0:
            return np.empty(0, np.uint64)
        # Threads share a hasher. Each works with the keys that it has seen here; all make the same ones.
        block_keys = self._block_keys
        if (known := len(block_keys)) < blocks:
            more = self._keys(b"block", known, -(-blocks // _CHUNK) * _CHUNK)
            self._block_keys = block_keys = np.concatenate((block_keys, more))
        matrix = ids[: blocks * size].reshape(blocks, size).astype(np.uint64)
        # Short arrays cost what numpy's calls cost. These are the fewest, in place, into one other array, with
        # arrays for numbers (a scalar is made an array in each call), and ufuncs instead of methods.
        chain = matrix @ self._token_keys
        chain += self._block_start  # a block of zeros counts, too
        high = chain >> _HALF
        _xor(chain, high, chain)
        _multiply(chain, block_keys[:blocks], chain)
        _accumulate(chain, 0, None, chain)
        if start:
            chain += np.uint64(start)
        _shift(chain, _HALF, high)
        _xor(chain, high, chain)
        _multiply(chain, self._last_key, chain)
        _shift(chain, _HALF, high)
        _xor(chain, high, chain)
        if np.count_nonzero(chain) < blocks:
            chain[chain == 0] = 1
        return chain

    def _keys(self, purpose: bytes, first: int, end: int) -> NDArray[np.uint64]:
        """Odd 64-bit keys number `first` to `end` for a purpose."""
        data = b"".join(
            blake2b(i.to_bytes(8, "little"), key=self._secret, person=purpose, digest_size=8).digest()
            for i in range(first, end)
        )
        keys = np.frombuffer(data, "<u8").astype(np.uint64)
        keys |= np.uint64(1)
        return keys


class Prompt:
    """A prompt whose fingerprints are made once, however often it is routed.

    Pass it to `dpshm.Frontend.route` in the place of its tokens if the request may be routed again, or if prompts
    differ beside their tokens.
    """

    def __init__(self, tokens: Tokens, *salts: str | bytes | int) -> None:
        """Keeps the tokens; arrays and buffers are not copied, so do not change them until the request is routed.

        Args:
            tokens: token ids from 0 to 2**32 - 1.
            salts: what else the computed blocks depend on: an adapter's name, the hash of an image, a cache salt.
                Engines give the same to `PrefixHasher.start`.

        Raises:
            SettingError: the tokens are not integers of that range.
        """
        self._tokens: Any = as_token_array(tokens)
        self._salts: tuple[str | bytes | int, ...] = salts
        self._made: dict[int, Fingerprints] = {}  # by the hash's identity

    def __len__(self) -> int:
        """How many tokens it has."""
        return len(self._tokens)

    def fingerprints(self, block_tokens: int, identity: int, key: int) -> FingerprintList | None:
        """The fingerprints for an index; None if the index is of another hash.

        A subclass may make them by another hash, and only as far as a lookup asks for them.

        Args:
            block_tokens: tokens a block, as the index says.
            identity: of the index's hash.
            key: the group's.
        """
        found = self._made.get(identity)
        if found is None and hasher_for(block_tokens, key).identity == identity:
            found = self.token_fingerprints(block_tokens, key)
        return found

    def token_fingerprints(self, block_tokens: int, key: int) -> Fingerprints:
        """The fingerprints that `PrefixHasher` makes, whatever hash an index has.

        Args:
            block_tokens: tokens a block.
            key: the group's.
        """
        hasher = hasher_for(block_tokens, key)
        found = self._made.get(hasher.identity)
        if found is None:
            found = hasher.fingerprints(self._tokens, hasher.start(*self._salts))
            self._made[hasher.identity] = found
        return found


class DigestReducer:
    """Makes fingerprints of block hashes that an engine has already, such as vLLM's: at most 32 bytes each.

    A plain cut of a public hash could be made to collide by its author. The digest is therefore multiplied by a
    secret odd number of 256 bits, and the upper 64 bits of the product modulo 2**256 are the fingerprint. For two
    given digests it collides with probability 2**-63 at most.

    Source: Dietzfelbinger, Hagerup, Katajainen, Penttonen, "A reliable randomized algorithm for the closest-pair
    problem", Journal of Algorithms 25(1), 1997.

    Attributes:
        fingerprint: a function of a digest, which gives 64 bits, never 0. Bytes after the first 32 do not count.
            An engine calls it for each block that enters or leaves its cache.
    """

    def __init__(self, key: int) -> None:
        """Derives the multiplier from the group's secret, 63 bits."""
        secret = key.to_bytes(8, "little")
        self.fingerprint = _multiply_shift(
            _number(blake2b(secret, person=b"digest", digest_size=_DIGEST_BYTES).digest()) | 1
        )


def _multiply_shift(multiplier: int) -> Callable[[bytes], int]:
    from_bytes, bits, shift = int.from_bytes, (1 << 8 * _DIGEST_BYTES) - 1, 8 * _DIGEST_BYTES - 64

    def fingerprint(digest: bytes) -> int:
        return (from_bytes(digest, "little") * multiplier & bits) >> shift or 1

    return fingerprint


@lru_cache(maxsize=8)
def hasher_for(block_tokens: int, key: int) -> PrefixHasher:
    """The hasher of a group for one block size; one is kept for the next call."""
    return PrefixHasher(block_tokens, key)


def as_token_array(tokens: Tokens) -> NDArray[Any]:
    """Token ids as a one-dimensional array of integers, without a copy where they are an array or a buffer.

    Raises:
        SettingError: they are not integers from 0 to 2**32 - 1, or not one-dimensional.
    """
    try:
        if type(tokens) is list:  # the usual case of a server: nothing is to be checked beside each token
            held = array("I")
            held.fromlist(tokens)  # in two thirds of the time of array("I", tokens)
            return np.frombuffer(held, np.uintc) if held else np.empty(0, np.uintc)
        ids = tokens if type(tokens) is np.ndarray else np.asarray(_as_buffer(tokens))
    except (TypeError, ValueError, OverflowError, RuntimeError) as e:  # RuntimeError: the list changed
        raise SettingError(f"token ids must be integers from 0 to {MAX_TOKEN}: {e}") from None
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise SettingError(f"token ids must be a one-dimensional array of integers, not {ids.dtype} {ids.shape}")
    fits = ids.dtype.itemsize < 8 and ids.dtype.kind == "u"
    if not fits and len(ids) and (int(ids.min()) < 0 or int(ids.max()) > MAX_TOKEN):
        raise SettingError(f"token ids must be integers from 0 to {MAX_TOKEN}")
    return ids


def _as_buffer(tokens: Any) -> Any:
    """The tokens themselves if they are an array or a buffer, else an array of them."""
    if isinstance(tokens, (bytes, bytearray, str)):  # of a bytearray, array() would take four bytes for a token
        raise TypeError(f"{type(tokens).__name__} holds no token ids")
    if isinstance(tokens, (Set, Mapping)):
        raise TypeError(f"{type(tokens).__name__} has them in no order")
    if isinstance(tokens, (array, memoryview)) or hasattr(tokens, "__array_interface__"):
        return tokens
    return array("I", tokens)


def _number(digest: bytes) -> int:
    return int.from_bytes(digest, "little")
