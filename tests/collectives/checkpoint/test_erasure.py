"""Any k of n pieces give a stripe back."""

import itertools
import random

import pytest
import reedsolo

from collectives.checkpoint import Code
from collectives.errors import LocalFault


@pytest.mark.parametrize(("k", "n"), [(1, 1), (1, 3), (2, 3), (3, 5), (4, 6), (5, 5), (3, 8)])
def test_every_choice_of_k_pieces_gives_the_stripe(k, n):
    code, stripe = Code(k, n), random.Random(k * n).randbytes(1001)
    pieces = code.encode(stripe)
    assert len(pieces) == n
    for chosen in itertools.combinations(range(n), k):
        found = code.decode({i: pieces[i] for i in chosen}, len(stripe))
        assert found.tobytes() == stripe


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 65_535, 65_536 * 3 + 1])
def test_stripes_of_any_length(size):
    code, stripe = Code(3, 5), random.Random(size).randbytes(size)
    pieces = code.encode(stripe)
    assert {len(piece) for piece in pieces} == {code.piece_bytes(size)}
    assert code.decode({1: pieces[1], 3: pieces[3], 4: pieces[4]}, size).tobytes() == stripe


def test_it_is_the_librarys_code():
    code, stripe = Code(4, 7), bytes(range(40))
    pieces, library = code.encode(stripe), reedsolo.RSCodec(3, nsize=7)
    for column in range(10):
        word = bytes(piece[column] for piece in pieces)
        assert library.encode(word[:4]) == word


def test_too_few_or_misshapen_pieces_are_refused():
    code = Code(2, 3)
    pieces = code.encode(b"abcd")
    with pytest.raises(LocalFault):
        code.decode({0: pieces[0]}, 4)
    with pytest.raises(LocalFault):
        code.decode({0: pieces[0], 1: b"x"}, 4)
    with pytest.raises(LocalFault):
        code.decode({0: pieces[0], 3: pieces[1]}, 4)


@pytest.mark.parametrize(("k", "n"), [(0, 1), (3, 2), (1, 65)])
def test_codes_that_cannot_be(k, n):
    with pytest.raises(LocalFault):
        Code(k, n)
