"""A worker's KV memory, counted in blocks."""

from __future__ import annotations

from core.prefix_cache import PrefixCache
from core.sequence_state import SequenceState


class KvBlocks:
    """Counts blocks in use; what is not in use is free, though it may still hold cached prefixes.

    Blocks have no identity here: a sequence owns a number of blocks and shares pieces of the prefix
    cache, each ``hash_block_tokens`` long. In use are owned blocks and pieces with a user.

    Args:
        num_blocks: capacity.
        block_size_tokens: tokens in a block.
        hash_block_tokens: tokens in a piece of the prefix cache, a multiple of the block size.
    """

    __slots__ = (
        "_blocks_per_piece",
        "block_size_tokens",
        "cache",
        "hash_block_tokens",
        "num_blocks",
        "num_used",
    )

    def __init__(self, num_blocks: int, block_size_tokens: int, hash_block_tokens: int) -> None:
        self.num_blocks = num_blocks
        self.block_size_tokens = block_size_tokens
        self.hash_block_tokens = hash_block_tokens
        self.num_used = 0
        self._blocks_per_piece = hash_block_tokens // block_size_tokens
        self.cache = PrefixCache()

    @property
    def num_free(self) -> int:
        return self.num_blocks - self.num_used

    def admit(self, seq: SequenceState, num_reserved: int) -> bool:
        """Gives a sequence that holds nothing the blocks of all its tokens so far, cached ones first.

        Returns:
            False, with nothing changed, if that would leave fewer than ``num_reserved`` free.
        """
        hashes = seq.spec.block_hashes
        # The last token is computed even if cached: the next one is sampled from it.
        num_hits = self.cache.match(hashes, (seq.num_tokens - 1) // self.hash_block_tokens)
        prefix = list(hashes[:num_hits])
        num_owned = -(-seq.num_tokens // self.block_size_tokens) - num_hits * self._blocks_per_piece
        num_revived = self.cache.count_idle(prefix) * self._blocks_per_piece
        if num_owned + num_revived + num_reserved > self.num_free:
            return False
        self.num_used += self.cache.share(prefix) * self._blocks_per_piece
        self.take(num_owned)
        seq.num_owned = num_owned
        seq.shared = prefix
        seq.num_published = num_hits
        seq.kv_tokens = num_hits * self.hash_block_tokens
        return True

    def take(self, num_blocks: int) -> None:
        """Puts free blocks in use, evicting cached prefixes where they lie."""
        if not num_blocks:
            return
        assert 0 < num_blocks <= self.num_free, "more KV blocks than there are"
        self.num_used += num_blocks
        while self.num_used + self.cache.num_idle * self._blocks_per_piece > self.num_blocks:
            self.cache.evict_oldest()

    def publish(self, seq: SequenceState) -> None:
        """Offers the sequence's newly full pieces to the prefix cache.

        Where another sequence has published the same content, this one keeps its own copy.
        """
        hashes = seq.spec.block_hashes
        if seq.num_published == len(hashes):
            return
        num_full = seq.kv_tokens // self.hash_block_tokens
        for piece in hashes[seq.num_published : num_full]:
            seq.num_published += 1
            if self.cache.publish(piece):
                seq.num_owned -= self._blocks_per_piece
                seq.shared.append(piece)

    def free(self, seq: SequenceState) -> None:
        """Ends the use of all the sequence holds; its full pieces stay cached while there is room."""
        self.publish(seq)
        num_freed = seq.num_owned + self.cache.unshare(seq.shared) * self._blocks_per_piece
        assert 0 <= num_freed <= self.num_used, "more KV blocks given back than were in use"
        self.num_used -= num_freed
        seq.num_owned, seq.shared, seq.num_published, seq.kv_tokens = 0, [], 0, 0
