"""How decode cuts a cache into pieces (csrc/cuda/core/split.h): host code, so it is tested without a GPU."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

CSRC = Path(__file__).resolve().parent.parent / "csrc"
SOURCE = """
#include "cuda/core/split.h"
extern "C" long long splits(long long tiles, long long items, long long slots, long long min_tiles) {
  return yoco::cuda::decode_splits(tiles, items, slots, min_tiles);
}
extern "C" void piece(long long tiles, long long splits, long long min_tiles, long long split, long long* out) {
  const yoco::KeyRange r = yoco::cuda::split_tiles(tiles, splits, min_tiles, split);
  out[0] = r.begin, out[1] = r.end;
}
"""

counts = st.integers(1, 1 << 15)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("split")
    (folder / "split.cpp").write_text(SOURCE)
    path = folder / "split.so"
    subprocess.run(
        [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{CSRC}", str(folder / "split.cpp"), "-o", str(path)],
        check=True,
    )
    handle = ctypes.CDLL(str(path))
    handle.splits.restype = ctypes.c_longlong
    handle.splits.argtypes = [ctypes.c_longlong] * 4
    handle.piece.restype = None
    handle.piece.argtypes = [ctypes.c_longlong] * 4 + [ctypes.POINTER(ctypes.c_longlong)]
    return handle


def pieces(library: ctypes.CDLL, tiles: int, splits: int, min_tiles: int) -> list[tuple[int, int]]:
    found = []
    for split in range(splits):
        out = (ctypes.c_longlong * 2)()
        library.piece(tiles, splits, min_tiles, split, out)
        found.append((out[0], out[1]))
    return found


@given(tiles=st.integers(0, 1 << 15), splits=st.integers(1, 300), min_tiles=st.integers(1, 16))
def test_pieces_cover_every_tile_once_and_in_order(
    library: ctypes.CDLL, tiles: int, splits: int, min_tiles: int
) -> None:
    end = 0
    for begin, stop in pieces(library, tiles, splits, min_tiles):
        assert begin == end and stop >= begin
        end = stop
    assert end == tiles


@given(tiles=counts, splits=st.integers(1, 300), min_tiles=st.integers(1, 16))
def test_pieces_are_even_and_not_too_small(library: ctypes.CDLL, tiles: int, splits: int, min_tiles: int) -> None:
    sizes = [stop - begin for begin, stop in pieces(library, tiles, splits, min_tiles) if stop > begin]
    assert all(size == sizes[0] for size in sizes[:-1])
    assert sizes[0] == max(-(-tiles // splits), min_tiles) or len(sizes) == 1


@given(tiles=st.integers(0, 1 << 15), items=counts, slots=st.integers(1, 512), min_tiles=st.integers(1, 16))
def test_one_wave_at_most(library: ctypes.CDLL, tiles: int, items: int, slots: int, min_tiles: int) -> None:
    splits = library.splits(tiles, items, slots, min_tiles)
    assert splits >= 1
    assert splits == 1 or splits * items <= slots
    assert splits == 1 or (splits - 1) * min_tiles < tiles


def test_decode_shapes_of_an_h200(library: ctypes.CDLL) -> None:
    resident = 2 * 132
    # 128K tokens, 8 KV heads: one full wave
    assert library.splits(2048, 8, resident, 4) == 33
    # 1K tokens: pieces of 256 keys, whatever the number of SMs
    assert library.splits(16, 8, resident, 4) == 4
    # more KV heads than resident blocks: no split
    assert library.splits(2048, 300, resident, 4) == 1
