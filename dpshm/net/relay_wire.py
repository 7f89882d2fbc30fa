"""What relays tell each other: one message, `News`, in one frame: its topic, two bytes, and then a msgpack array.

A row is whole in its words, and says of each pair of a front-end and a rank the counts that changed, each as an
absolute number. So the newest of each counts, and each message may be lost: all of it is said again.

Counts of a pair have the numbering of the board on the rank's node. A board begins its numbering at 0, so a number
is told together with the board that it is of.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
import numpy as np

from dpshm.board.layout import MAX_ENGINES, MAX_FRONTENDS, OWNER_BYTES
from dpshm.board.prefix_copy import Part
from dpshm.board.prefix_file import BUCKET_WORDS, MAX_BLOCKS, WORDS_A_BLOCK
from dpshm.board.words import MAX_WORD
from dpshm.errors import WireError
from dpshm.net.wire import CARRIED_BYTES, Receipts, decode

MAX_NODES: Final = MAX_FRONTENDS
MAX_NEWS_BYTES: Final = 1 << 20
"""Longer messages are refused. `dpshm.coordinator.relay` sends shorter ones, and more of them."""
MAX_BUCKETS: Final = 2 * MAX_BLOCKS * WORDS_A_BLOCK // BUCKET_WORDS
_TOPIC_BYTES: Final = 2

Word = Annotated[int, msgspec.Meta(ge=0, le=MAX_WORD)]
Id = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
Offset = Annotated[int, msgspec.Meta(gt=-(1 << 62), lt=1 << 62)]
Rank = Annotated[int, msgspec.Meta(ge=0, lt=MAX_ENGINES)]
Frontend = Annotated[int, msgspec.Meta(ge=0, lt=MAX_FRONTENDS)]
IndexSize = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]


class Received(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What a rank has received from one front-end: requests, and tokens as they were booked."""

    frontend: Frontend
    requests: Receipts
    tokens: Receipts


class Sent(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What a front-end has sent to one rank, in the numbering of the board ``News.boards[board]``."""

    rank: Rank
    board: Annotated[int, msgspec.Meta(ge=0)]
    requests: Receipts
    tokens: Receipts


class EngineNews(msgspec.Struct, array_like=True, frozen=True):
    """A rank's row.

    Attributes:
        rank: the rank.
        incarnation: of the row, on its board.
        report: grows with each of this row, whichever coordinator sends it.
        mark: verdict and `DRAINED`, as its node says.
        whole: `received` has every front-end that has sent anything.
        beat: of the sender's clock.
        request_offset, token_offset: as they stand on its board.
        words: those of `layout.CARRIED_WORDS`, 8 bytes each, little-endian; times are of the sender's clock.
        received: counts that changed.
    """

    rank: Rank
    incarnation: Id
    report: Id
    mark: Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]
    whole: bool
    beat: Word
    request_offset: Offset
    token_offset: Offset
    words: Annotated[bytes, msgspec.Meta(min_length=CARRIED_BYTES, max_length=CARRIED_BYTES)]
    received: Annotated[list[Received], msgspec.Meta(max_length=MAX_FRONTENDS)]


class FrontendNews(msgspec.Struct, array_like=True, frozen=True):
    """A front-end's row.

    Attributes:
        index: the number of the row, on every board.
        incarnation: of the row.
        report: grows with each of this row.
        mark: its verdict.
        whole: `sent` has every rank to which it has sent anything.
        pid: 0: it left in good order.
        version: of dpshm.
        routed: counter.
        beat: of the sender's clock.
        owner: its name.
        sent: counts that changed.
    """

    index: Frontend
    incarnation: Id
    report: Id
    mark: Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]
    whole: bool
    pid: Word
    version: Word
    routed: Word
    beat: Word
    owner: Annotated[bytes, msgspec.Meta(min_length=OWNER_BYTES, max_length=OWNER_BYTES)]
    sent: Annotated[list[Sent], msgspec.Meta(max_length=MAX_ENGINES)]


class IndexNews(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What changed in a rank's prefix index, or a slice of it (`dpshm.board.prefix_copy`).

    Attributes:
        rank: the rank.
        index: its `index_incarnation` on its board; 0: it has none any more.
        pass_: when the newest pass began, of the sender's clock; another process of that board begins another one.
        number: how many messages that say anything there have been since then, this one counted.
        header: tokens a block, identity of the hash, buckets, and blocks that are computed again.
        begin, end: the slice; equal: there is none.
        places: of words in the table, 4 bytes each, little-endian.
        words: their values, 8 bytes each.
    """

    rank: Rank
    index: Id
    pass_: Id
    number: Id
    header: tuple[IndexSize, Word, IndexSize, IndexSize] = (1, 0, 1, 0)
    begin: IndexSize = 0
    end: IndexSize = 0
    places: bytes = b""
    words: bytes = b""

    @property
    def part(self) -> Part:
        """The words."""
        places, words = np.frombuffer(self.places, "<u4"), np.frombuffer(self.words, "<u8")
        return Part(self.begin, self.end, places, words)


class Wanted(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A relay that missed something of an index, or has just begun, asks for a pass after that one."""

    board: Id
    rank: Rank
    index: Id
    pass_: Id


class Echo(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The head's answer to one node: the clock of its newest message, and for how long the head has had it, ns."""

    node: int
    clock_ns: Id
    held_ns: Id


class News(msgspec.Struct, array_like=True, frozen=True):
    """What changed on one node.

    Attributes:
        node: the number of the node.
        board: the number of its board (`Header.board_number`).
        clock_ns: CLOCK_MONOTONIC of the sender.
        delay_ns: half of its round trip to the head; 0 at the head.
        dp_size: the number of ranks, as the head has it.
        ask: every relay that hears this says all that it has: another one has come.
        boards: what `Sent.board` counts from.
        engines, frontends: rows.
        echoes: of the head.
        indexes: of ranks of this node.
        wanted: indexes of other nodes.
    """

    node: Annotated[int, msgspec.Meta(ge=0, lt=MAX_NODES)]
    board: Annotated[int, msgspec.Meta(ge=1, lt=1 << 62)]
    clock_ns: Id
    delay_ns: Id
    dp_size: Annotated[int, msgspec.Meta(ge=0, le=MAX_ENGINES)]
    ask: bool = False
    boards: Annotated[list[Id], msgspec.Meta(max_length=MAX_NODES)] = []
    engines: Annotated[list[EngineNews], msgspec.Meta(max_length=MAX_ENGINES)] = []
    frontends: Annotated[list[FrontendNews], msgspec.Meta(max_length=MAX_FRONTENDS)] = []
    echoes: Annotated[list[Echo], msgspec.Meta(max_length=MAX_NODES)] = []
    indexes: Annotated[list[IndexNews], msgspec.Meta(max_length=MAX_ENGINES)] = []
    wanted: Annotated[list[Wanted], msgspec.Meta(max_length=MAX_ENGINES)] = []


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(News)


def topic_of(node: int) -> bytes:
    """The topic of a node's news."""
    return node.to_bytes(_TOPIC_BYTES, "little")


def encode_news(news: News) -> bytes:
    """A message."""
    return topic_of(news.node) + _encoder.encode(news)


def decode_news(message: bytes) -> News:
    """A message of a relay.

    Raises:
        WireError: it is none.
    """
    news = decode(_decoder, "a relay's message", message[_TOPIC_BYTES:])
    if topic_of(news.node) != message[:_TOPIC_BYTES]:
        raise WireError("not a relay's message: its topic is another node's")
    for said in news.indexes:
        buckets = said.header[2]
        if not 1 <= buckets <= MAX_BUCKETS or buckets & (buckets - 1) or not said.header[0]:
            raise WireError(f"not a relay's message: a prefix index with the sizes {said.header}")
        if len(said.places) % 4 or len(said.words) != 2 * len(said.places):
            raise WireError(f"not a relay's message: {len(said.places)} and {len(said.words)} bytes of an index")
    return news
