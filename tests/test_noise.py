"""Noise: against Philox4x64-10 written out in pure Python, fixed vectors, and distributions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from canvasmar_rt import noise
from canvasmar_rt.errors import ConfigError
from canvasmar_rt.noise import Purpose, fill_gumbel, fill_normal

# -- the oracle: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011)

WORD = 2**64 - 1
MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)


def philox(counter: list[int], key: tuple[int, int]) -> list[int]:
    """One block: ten rounds of Philox4x64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (b >> 64) ^ c1 ^ k0, b & WORD, (a >> 64) ^ c3 ^ k1, a & WORD
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return [c0, c1, c2, c3]


def words(seed: int, stream: int, frame: int, purpose: int) -> Iterator[int]:
    """Words of one key; the 256-bit counter is incremented before each block."""
    value = purpose << 128 | frame << 192
    while True:
        value = (value + 1) % 2**256
        yield from philox([value >> s & WORD for s in (0, 64, 128, 192)], (seed, stream))


def uniforms(seed: int, stream: int, frame: int, purpose: int) -> Iterator[float]:
    for word in words(seed, stream, frame, purpose):
        yield ((word >> 12) + 0.5) / 2**52


def normals(count: int, *key: int) -> list[float]:
    out, source = list[float](), uniforms(*key)
    while len(out) < count:
        radius, angle = math.sqrt(-2 * math.log(next(source))), 2 * math.pi * next(source)
        out += [radius * math.cos(angle), radius * math.sin(angle)]
    return out[:count]


def gumbels(count: int, *key: int) -> list[float]:
    return [-math.log(-math.log(u)) for u in itertools.islice(uniforms(*key), count)]


FILLS = {"normal": (fill_normal, normals), "gumbel": (fill_gumbel, gumbels)}


def draw(kind: str, shape: tuple[int, ...], **key: Any) -> np.ndarray:
    out = np.full(shape, np.nan, np.float32)
    FILLS[kind][0](out, **{"seed": 0, "streams": range(shape[0]), "frame": 0} | key)
    return out


def test_the_oracle_is_philox() -> None:
    """Known answers of Random123 (kat_vectors, philox4x64 10)."""
    assert philox([0] * 4, (0, 0)) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]
    assert philox([WORD] * 4, (WORD, WORD)) == [
        0x87B092C3013FE90B,
        0x438C3C67BE8D0224,
        0x9CC7D7C69CD777B6,
        0xA09CAEBF594F0BA0,
    ]


@pytest.mark.parametrize("kind", FILLS)
@pytest.mark.parametrize("purpose", Purpose)
@pytest.mark.parametrize(
    ("seed", "stream", "frame"),
    [(0, 0, 0), (1234, 3, 17), (WORD, WORD, WORD), (2**63 + 5, 2**40, 10_000_000)],
)
def test_matches_the_oracle(
    kind: str, purpose: Purpose, seed: int, stream: int, frame: int
) -> None:
    got = draw(kind, (1, 7, 3), seed=seed, streams=[stream], frame=frame, purpose=purpose)
    want = FILLS[kind][1](21, seed, stream, frame, int(purpose))
    np.testing.assert_allclose(got.ravel(), np.array(want, np.float32), rtol=2e-7, atol=1e-15)


def test_fixed_vectors() -> None:
    """Videos of a seed must never change: these numbers are part of the format."""
    assert {p.name: p.value for p in Purpose} == {
        "FLOW": 0,
        "FRAME_AUGMENTATION": 1,
        "CANVAS_AUGMENTATION": 2,
        "ORDER": 3,
    }
    normal = draw("normal", (2, 3), seed=7, streams=[0, 1], frame=5, purpose=Purpose.FLOW)
    gumbel = draw("gumbel", (2, 3), seed=7, streams=[0, 1], frame=5, purpose=Purpose.ORDER)
    np.testing.assert_allclose(normal, NORMAL_VECTOR, rtol=1e-6)
    np.testing.assert_allclose(gumbel, GUMBEL_VECTOR, rtol=1e-6)


NORMAL_VECTOR = [
    [0.2122786, 0.7838370, -0.1048123],
    [-0.6506345, -2.0755932, -0.9800287],
]
GUMBEL_VECTOR = [
    [-0.0462933, -0.6057877, -1.2256753],
    [1.2999121, -0.5182888, -0.2375042],
]


@pytest.mark.parametrize("kind", FILLS)
def test_rows_do_not_depend_on_the_batch(kind: str) -> None:
    together = draw(kind, (5, 4, 3), seed=3, frame=2, purpose=Purpose.FLOW)
    for stream in range(5):
        alone = draw(kind, (1, 4, 3), seed=3, streams=[stream], frame=2, purpose=Purpose.FLOW)
        np.testing.assert_array_equal(together[stream], alone[0])
    shuffled = draw(kind, (3, 4, 3), seed=3, streams=[4, 0, 4], frame=2, purpose=Purpose.FLOW)
    np.testing.assert_array_equal(shuffled, together[[4, 0, 4]])


@pytest.mark.parametrize("kind", FILLS)
def test_every_part_of_the_key_counts(kind: str) -> None:
    base = {"seed": 1, "streams": [2], "frame": 3, "purpose": Purpose.FLOW}
    keys = [base, base | {"seed": 2}, base | {"streams": [1]}, base | {"frame": 4}]
    keys += [base | {"purpose": p} for p in list(Purpose)[1:]]
    keys.append({"seed": 2, "streams": [1], "frame": 3, "purpose": Purpose.FLOW})
    drawn = [draw(kind, (1, 16), **key) for key in keys]
    for a, b in itertools.combinations(drawn, 2):
        assert not np.intersect1d(a, b).size


@pytest.mark.parametrize("kind", FILLS)
def test_the_shape_only_lays_out_the_numbers(kind: str) -> None:
    """Odd sizes, single numbers, views with gaps and rows without axes all read one sequence."""
    key: dict[str, Any] = {"streams": [9], "purpose": Purpose.ORDER}
    flat = draw(kind, (1, 30), **key)[0]
    assert np.isfinite(flat).all()
    for shape in ((1, 1), (1, 3), (1, 29), (1, 3, 5), (1, 2, 3, 5)):
        got = draw(kind, shape, **key)
        np.testing.assert_array_equal(got.ravel(), flat[: got.size])
    assert draw(kind, (1,), **key)[0] == flat[0]
    assert draw(kind, (1, 0), **key).size == 0
    wide = np.full((1, 5, 6), np.nan, np.float32)
    FILLS[kind][0](wide[:, :, ::2], seed=0, frame=0, **key)
    np.testing.assert_array_equal(wide[0, :, ::2].ravel(), flat[:15])
    assert np.isnan(wide[:, :, 1::2]).all()


@pytest.mark.parametrize("kind", FILLS)
@pytest.mark.parametrize("name", ["seed", "stream", "frame"])
@pytest.mark.parametrize("value", [-1, 2**64])
def test_keys_out_of_range_are_named(kind: str, name: str, value: int) -> None:
    key: dict[str, Any] = {"seed": 1, "streams": [1], "frame": 1, "purpose": Purpose.FLOW}
    key |= {"streams": [value]} if name == "stream" else {name: value}
    with pytest.raises(ConfigError, match=rf"noise: {name} .* got {value}$"):
        draw(kind, (1, 4), **key)


@pytest.mark.parametrize("kind", FILLS)
def test_as_many_streams_as_rows(kind: str) -> None:
    with pytest.raises(ValueError, match="zip"):
        draw(kind, (2, 4), streams=[1], purpose=Purpose.FLOW)


@pytest.mark.parametrize(
    ("word", "want"),
    [
        (0, {"normal": math.sqrt(106 * math.log(2)), "gumbel": -math.log(53 * math.log(2))}),
        (WORD, {"normal": math.sqrt(2.0**-52), "gumbel": 53 * math.log(2)}),
    ],
)
def test_the_extreme_words_give_finite_numbers(
    word: int, want: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uniforms lie strictly inside (0, 1): 2**-53 and 1 - 2**-53 for the words at both ends."""
    source = SimpleNamespace(random_raw=lambda n: np.full(n, word, np.uint64))
    monkeypatch.setattr(noise.np.random, "Philox", lambda **_: source)
    for kind, value in want.items():
        # the angle of both ends is a whole turn, so the first of a pair is the radius
        got = draw(kind, (1, 4), purpose=Purpose.FLOW)[0, 0]
        assert got == pytest.approx(value, rel=1e-6)


# -- distributions


def test_normals_are_standard_normal() -> None:
    sample = draw("normal", (4, 50_000), seed=11, purpose=Purpose.FLOW).astype(np.float64)
    flat = sample.ravel()
    n = flat.size
    assert abs(flat.mean()) < 5 / math.sqrt(n)
    assert abs(flat.std() - 1) < 5 / math.sqrt(2 * n)
    assert abs(stats.skew(flat)) < 5 * math.sqrt(6 / n)
    assert abs(stats.kurtosis(flat)) < 5 * math.sqrt(24 / n)
    assert stats.kstest(flat, "norm").pvalue > 1e-3
    neighbours = np.corrcoef(flat[:-1], flat[1:])[0, 1]
    assert abs(neighbours) < 5 / math.sqrt(n)
    between = np.corrcoef(sample)
    assert np.abs(between - np.eye(4)).max() < 5 / math.sqrt(n / 4)


def test_gumbels_are_standard_gumbel() -> None:
    flat = draw("gumbel", (4, 50_000), seed=11, purpose=Purpose.ORDER).astype(np.float64).ravel()
    assert abs(flat.mean() - np.euler_gamma) < 5 * math.pi / math.sqrt(6 * flat.size)
    assert abs(flat.std() - math.pi / math.sqrt(6)) < 0.02
    assert stats.kstest(flat, "gumbel_r").pvalue > 1e-3


def test_noise_that_is_multiplied_by_nothing_is_nothing() -> None:
    out = np.full((2, 3), np.nan, np.float32)
    fill_normal(out, seed=0, streams=[0, 1], frame=0, purpose=Purpose.FLOW, level=0.0)
    assert not out.any()
