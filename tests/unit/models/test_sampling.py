"""Counter-based draws: the published generator, and independence of the batch."""

import numpy as np

from tenuto_models.sampling import philox4x32, uniforms


def test_philox_gives_the_known_answers() -> None:
    """The vectors of the reference implementation (Random123, kat_vectors, philox4x32 10)."""
    ones = 0xFFFFFFFF
    cases = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, expected in cases:
        assert philox4x32(*map(np.uint64, (*counter, *key))) == expected


def test_a_draw_depends_on_its_row_alone() -> None:
    seeds = np.arange(100, dtype=np.uint64) * np.uint64(2**57 + 1)
    counters = np.arange(100, dtype=np.uint64)
    together = uniforms(seeds, counters, 7)
    for row in (0, 13, 99):
        np.testing.assert_array_equal(together[row], uniforms(seeds[row : row + 1], counters[row : row + 1], 7)[0])
    np.testing.assert_array_equal(together[:, :3], uniforms(seeds, counters, 3))


def test_draws_are_uniform_distinct_and_inside_the_open_interval() -> None:
    draws = uniforms(np.full(50_000, 3, np.uint64), np.arange(50_000, dtype=np.uint64), 2)
    assert draws.dtype == np.float32 and draws.min() > 0 and draws.max() < 1
    histogram, _ = np.histogram(draws, bins=20, range=(0, 1))
    assert np.all(np.abs(histogram - 5000) < 350)
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.02
