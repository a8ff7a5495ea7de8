"""Noise for draws: a pure function of (seed, output position, token id), whatever batch, order and filters are.

Standard Gumbel noise −log(−log u) over the counter-based generator Philox4x64-10 (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", 2011) with key = seed: token t has word t mod 4 of the block at counter
(t div 4 + 1, position), which is where numpy's generator has it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_ROUNDS = 10
_MULTIPLIERS = np.array([[0xD2E7470EE14C6C93], [0xCA5A826395121157]], dtype=np.uint64)
_KEY_STEPS = np.array([[0x9E3779B97F4A7C15], [0xBB67AE8584CAA73B]], dtype=np.uint64)
_LOW_MULTIPLIERS, _HIGH_MULTIPLIERS = _MULTIPLIERS & np.uint64(0xFFFFFFFF), _MULTIPLIERS >> np.uint64(32)

# Where words for chosen tokens alone begin to cost less than the generator's words for whole rows, in such words.
_WORDS_PER_CHOSEN = 40
_WORDS_PER_CALL = 64_000


def gumbel_noise(seed: int, position: int, vocab_size: int) -> np.ndarray:
    """The noise of every token, `[vocab]` float64."""
    # Position sits in the second word: the generator itself counts in the first.
    generator = np.random.Philox(key=seed, counter=np.array([0, position, 0, 0], dtype=np.uint64))
    return _gumbel(generator.random_raw(vocab_size))


def gumbel_noise_at(
    seeds: Sequence[int], positions: Sequence[int], rows: np.ndarray, token_ids: np.ndarray, vocab_size: int
) -> np.ndarray:
    """The noise of some tokens, `[chosen]` float64: of `token_ids` `[chosen]`, each with the seed and position that its
    row in `rows` `[chosen]` (ascending) has."""
    if _WORDS_PER_CALL + _WORDS_PER_CHOSEN * len(rows) < len(seeds) * vocab_size:
        words = philox_words(np.array(seeds, np.uint64)[rows], np.array(positions, np.uint64)[rows], token_ids)
        return _gumbel(words)
    noise = np.empty(len(rows))
    bounds = np.searchsorted(rows, np.arange(len(seeds) + 1))
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        mine = slice(bounds[row], bounds[row + 1])
        noise[mine] = gumbel_noise(seed, position, vocab_size)[token_ids[mine]]
    return noise


def philox_words(seeds: np.ndarray, positions: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
    """The generator's words `[n]` uint64 at (seed, position, token id), each argument `[n]`, without those between."""
    indices = token_ids.astype(np.uint64)
    even = np.stack([indices // np.uint64(4) + np.uint64(1), np.zeros_like(indices)])  # words 0 and 2: [2, n]
    odd = np.stack([positions.astype(np.uint64), np.zeros_like(indices)])  # words 1 and 3
    keys = np.stack([seeds.astype(np.uint64), np.zeros_like(indices)])
    for _ in range(_ROUNDS):
        high, low = _product(even)
        even, odd = high[::-1] ^ odd ^ keys, low[::-1]
        keys = keys + _KEY_STEPS
    words = np.stack([even[0], odd[0], even[1], odd[1]])
    return words[token_ids % 4, np.arange(len(token_ids))]


def _product(factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """High and low words of multiplier · factor, `[2, n]` each: numpy has no 128-bit product."""
    low, high = (_halves(factors)[..., half].astype(np.uint64) for half in (0, 1))
    cross = _halves(high * _LOW_MULTIPLIERS)
    middle = _halves(low * _LOW_MULTIPLIERS)[..., 1] + cross[..., 0].astype(np.uint64) + low * _HIGH_MULTIPLIERS
    return high * _HIGH_MULTIPLIERS + cross[..., 1] + _halves(middle)[..., 1], factors * _MULTIPLIERS


def _halves(words: np.ndarray) -> np.ndarray:
    """Low and high half of each word, `[…, 2]` uint32."""
    little_endian = words.astype("<u8", order="C", copy=False)
    return little_endian.view("<u4").reshape(*words.shape, 2)


def _gumbel(words: np.ndarray) -> np.ndarray:
    uniform = ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52  # in (0, 1)
    return -np.log(-np.log(uniform))
