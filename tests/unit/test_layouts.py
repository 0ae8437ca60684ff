"""Layouts of fragments: every element has one place, vectors are whole and lie where the tile's channels do."""

from itertools import product
from types import SimpleNamespace

import pytest

from kdagen.lower.layouts import Tile, along


def places(layout):
    """{element: set of (thread, position)}, one for each copy."""

    def fragment(shape, _, thread, replicate=1, forward_index_fn=None):
        copies = [(rep,) for rep in range(replicate)] if replicate > 1 else [()]
        elements = product(*map(range, shape))
        return {e: {(thread(*e, *copy), forward_index_fn(*e)) for copy in copies} for e in elements}

    return eval(layout, {"T": SimpleNamespace(Fragment=fragment)})


SHAPES = [((128, 32), "float32"), ((64, 32), "bfloat16"), ((32, 256), "float32"), ((32, 64), "bfloat16")]


@pytest.mark.parametrize("shape, dtype", SHAPES)
def test_each_thread_holds_its_share_in_whole_vectors(shape, dtype):
    tile = Tile(shape, dtype, 128)
    found = places(tile.whole)
    held = {place for places in found.values() for place in places}
    assert held == set(product(range(128), range(shape[0] * shape[1] // 128)))
    for i, j in found:
        ((thread, at),), ((first, start),) = found[i, j], found[i, j - j % tile.vector]
        assert (thread, at) == (first, start + j % tile.vector)


@pytest.mark.parametrize("shape, dtype", SHAPES)
def test_a_thread_holds_the_entries_of_vectors_that_its_part_of_the_tile_meets(shape, dtype):
    tile = Tile(shape, dtype, 128)
    rows, columns = places(tile.of_rows), places(tile.of_columns)
    for (i, j), ((thread, _),) in places(tile.whole).items():
        assert thread in {t for t, _ in columns[j,]}
        assert thread in {t for t, _ in rows[i,]}


@pytest.mark.parametrize(
    "layout, copies", [(along(128, 4, 32, 4), 4), (along(64, 2, 32, 1), 1), (along(256, 8, 32, 2), 2)]
)
def test_a_vector_is_whole_in_every_warp(layout, copies):
    found = places(layout)
    held = [place for places in found.values() for place in places]
    assert len(set(held)) == len(held) == copies * len(found)
    for warp in range(copies):
        assert all(any(t // 32 == warp for t, _ in places) for places in found.values())
