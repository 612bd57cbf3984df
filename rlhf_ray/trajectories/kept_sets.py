"""The tokens among which each token was sampled, where top-k, top-p or min-p left fewer than the whole vocabulary.

A sampler that cuts its distribution draws from what it keeps, and the log-prob of a token is normalised over that. The set
cannot be computed again elsewhere: ties, the order of a sort and the last bits of logits differ between devices. So it travels
with the token, and the trainer normalises over the same one (DeepSeek-V3.2, 2025, section 3.3, "keep sampling mask").

Invariants: a set is whole, a list of ids or a bitmap, whichever is smallest, so that no set takes more than one bit for each
token of the vocabulary. What comes out is the set that went in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int32, Int64
from torch import Tensor

BITS = 32
"""Of a word."""


def bitmap_words(vocabulary: int) -> int:
    """Words of the bitmap of a set, which is the most that a set takes."""
    return -(-vocabulary // BITS)


@dataclass(frozen=True, eq=False)
class KeptSets:
    """One set for each of some tokens.

    ``sizes`` says for each token how many of ``words`` its set takes: n > 0 are n ids, n < 0 are -n words of a bitmap whose bit
    b of word w stands for id 32 w + b, and 0 is the whole vocabulary. ``words`` holds those of all tokens one after another.
    """

    sizes: Int32[Tensor, "tokens"]
    words: Int32[Tensor, "words"]

    @classmethod
    def from_mask(cls, mask: Bool[Tensor, "tokens vocabulary"]) -> KeptSets:
        """Make the sets of the ids that are True in each row."""
        kept = mask.cpu().numpy()
        vocabulary = kept.shape[1]
        most = bitmap_words(vocabulary)
        counts = kept.sum(1, dtype=np.int32)
        _refuse_empty(counts)
        sizes = np.where(counts == vocabulary, 0, np.where(counts < most, counts, -most)).astype(np.int32)
        words = np.empty(np.abs(sizes).sum(), np.int32)
        of_list = np.repeat(sizes > 0, np.abs(sizes))
        words[of_list] = np.nonzero(kept[sizes > 0])[1]
        bits = np.packbits(kept[sizes < 0], axis=1, bitorder="little")
        padded = np.zeros((len(bits), most * BITS // 8), np.uint8)
        padded[:, : bits.shape[1]] = bits
        words[~of_list] = padded.view("<i4").ravel()
        return cls(torch.from_numpy(sizes), torch.from_numpy(words))

    @classmethod
    def from_ids(cls, ids: Sequence[Sequence[int]], vocabulary: int) -> KeptSets:
        """Make the sets of these ids, one list for each token. Short lists cost no pass over the vocabulary."""
        most = bitmap_words(vocabulary)
        distinct = [np.unique(np.asarray(own, np.int32)) for own in ids]
        _refuse_empty(np.array([len(own) for own in distinct], np.int32))
        sets = []
        for own in distinct:
            if len(own) < most and len(own) < vocabulary:
                sets.append(cls(torch.tensor([len(own)], dtype=torch.int32), torch.from_numpy(own)))
            else:
                mask = torch.zeros(1, vocabulary, dtype=torch.bool)
                mask[0, torch.from_numpy(own).long()] = True
                sets.append(cls.from_mask(mask))
        return cls.join(sets)

    @classmethod
    def whole(cls, tokens: int) -> KeptSets:
        """Make whole sets."""
        return cls(torch.zeros(tokens, dtype=torch.int32), torch.zeros(0, dtype=torch.int32))

    @classmethod
    def join(cls, parts: Sequence[KeptSets]) -> KeptSets:
        """Put the tokens of all parts one after another."""
        if not parts:
            return cls.whole(0)
        return cls(torch.cat([part.sizes for part in parts]), torch.cat([part.words for part in parts]))

    def __len__(self) -> int:
        return len(self.sizes)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, KeptSets)
            and torch.equal(self.sizes, other.sizes)
            and torch.equal(self.words, other.words)
        )

    __hash__ = None  # type: ignore[assignment]  # as of any value that holds tensors

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_arrays, (self.sizes.cpu().numpy(), self.words.cpu().numpy())

    def select(self, rows: Int64[Tensor, "selected"] | slice) -> KeptSets:
        """Return the sets of these tokens, in this order."""
        ends = self.sizes.abs().long().cumsum(0)
        if isinstance(rows, slice):
            first, last, _ = rows.indices(len(self))
            start = int(ends[first - 1]) if first else 0
            stop = int(ends[last - 1]) if last > first else start
            return KeptSets(self.sizes[first:last], self.words[start:stop])
        sizes = self.sizes[rows]
        places = spread_ranges((ends - self.sizes.abs())[rows], sizes.abs().long())
        return KeptSets(sizes, self.words[places])

    def mask(self, vocabulary: int) -> Bool[Tensor, "tokens vocabulary"]:
        """Return for each token which ids of the vocabulary are in its set."""
        inside = (self.sizes == 0)[:, None].repeat(1, vocabulary)
        tokens = torch.repeat_interleave(torch.arange(len(self), device=self.sizes.device), self.sizes.abs().long())
        listed = self.sizes[tokens] > 0
        inside[tokens[listed], self.words[listed].long()] = True
        bitmaps = self.sizes < 0
        if bool(bitmaps.any()):
            parts = (
                self.words[~listed].view(int(bitmaps.sum()), -1).view(torch.uint8)
            )  # a byte a bit, and no more, at once
            bits = (parts[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=parts.device)) & 1
            inside[bitmaps] = bits.flatten(1)[:, :vocabulary].bool()
        return inside

    def contains(self, ids: Sequence[int]) -> bool:
        """Whether each token is in its own set."""
        ends = self.sizes.abs().long().cumsum(0).tolist()
        start = 0
        for size, end, own in zip(self.sizes.tolist(), ends, ids, strict=True):
            words = self.words[start:end]
            start = end
            if size > 0 and not bool((words == own).any()):
                return False
            if size < 0 and not int(words[own // BITS]) >> own % BITS & 1:
                return False
        return True


def _refuse_empty(counts: Any) -> None:
    if not counts.all():
        raise ValueError(f"token {int(counts.argmin())} was drawn from no token at all: its log-probs are not numbers")


def _from_arrays(sizes: Any, words: Any) -> KeptSets:
    return KeptSets(torch.from_numpy(sizes), torch.from_numpy(words))


def spread_ranges(starts: Int64[Tensor, "ranges"], lengths: Int64[Tensor, "ranges"]) -> Int64[Tensor, "total"]:
    """Lay the ranges ``starts[i] .. starts[i] + lengths[i]`` end to end."""
    shift = starts - (lengths.cumsum(0) - lengths)
    return torch.repeat_interleave(shift, lengths) + torch.arange(int(lengths.sum()), device=starts.device)
