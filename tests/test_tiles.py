"""The choices made from shapes and the card alone: tiles of the attention kernels, and segments of a sequence."""

import pytest
import torch
from tnl_kernels import segments, tiles

# Major compute capability and shared memory of a program: A100, H100, and the consumer cards of two generations.
CARDS = [(8, 166912), (8, 101376), (9, 232448), (12, 101376)]
DIMS = (1, 16, 40, 64, 96, 128, 192, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
H100 = 132  # multiprocessors
CACHED = (tiles.properties, tiles.attention_tiles, tiles.state_tiles, tiles.attention_bwd_tiles)


@pytest.fixture
def card(monkeypatch):
    """A function that puts a card of (major, shared memory) under every device."""

    def put(major, shared_memory):
        monkeypatch.setattr(tiles, "properties", lambda device: (major, shared_memory, H100))
        for function in CACHED:
            function.cache_clear()
        return torch.device("cuda", 0)

    yield put
    for function in CACHED:
        function.cache_clear()


def choice(function, *arguments):
    """What a function chooses, or the message of its refusal."""
    try:
        return function(*arguments)
    except ValueError as error:
        return str(error)


def refuses(major, shared_memory, widest, dtype, silu):
    """100 KB do not hold 256 columns of four bytes with their activation."""
    return shared_memory < 166912 and widest > 128 and dtype != torch.bfloat16 and silu


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("major", "shared_memory"), CARDS)
def test_every_choice_fits_the_card(major, shared_memory, dtype, silu, card):
    device = card(major, shared_memory)
    for K in DIMS:
        for V in DIMS:
            if refuses(major, shared_memory, K, dtype, silu):
                with pytest.raises(ValueError, match=rf"needs \d+ bytes of shared memory .* has {shared_memory}"):
                    tiles.attention_tiles(K, V, dtype, silu, device)
                continue
            for chosen in (
                tiles.attention_tiles(K, V, dtype, silu, device),
                tiles.state_tiles(K, V, dtype, silu, device),
            ):
                assert tiles.shared_memory(chosen, tiles.block(K), dtype, silu) <= shared_memory
                check_launchable(chosen.chunk, chosen.columns, chosen, V)
            if refuses(major, shared_memory, V, dtype, silu):
                continue
            both = tiles.attention_bwd_tiles(K, V, dtype, silu, device)
            for chunk, columns, inner, outer in (
                (both.chunk_k, both.columns_k, V, K),
                (both.chunk_v, both.columns_v, K, V),
            ):
                role = tiles.Tiles(chunk, columns, both.num_warps, both.num_stages)
                assert tiles.shared_memory(role, tiles.block(inner), dtype, silu) <= shared_memory
                check_launchable(chunk, columns, role, outer)


def check_launchable(chunk, columns, options, outer):
    """Dots take no fewer than 16 rows and columns; one stage gave an illegal access once; no columns are idle."""
    assert chunk in (16, 32, 64)
    assert columns in (16, 32, 64, 128)
    assert columns <= tiles.block(outer)
    assert options.num_warps in (4, 8)
    assert options.num_stages >= 2


def test_choices_are_the_same_each_time(card):
    arguments = [(K, V, dtype, silu) for K in DIMS for V in DIMS for dtype in DTYPES for silu in (False, True)]
    runs = []
    for _ in range(2):
        device = card(8, 101376)
        runs.append([choice(function, *case, device) for function in CACHED[1:] for case in arguments])
    assert runs[0] == runs[1]


def test_a_smaller_card_gets_smaller_tiles(card):
    chosen, needed = [], []
    for shared_memory in (232448, 101376, 65536, 49152):
        device = card(9, shared_memory)
        chosen.append(tiles.attention_tiles(128, 128, torch.bfloat16, True, device))
        needed.append(tiles.shared_memory(chosen[-1], 128, torch.bfloat16, True))
        assert needed[-1] <= shared_memory
    assert needed == sorted(needed, reverse=True)
    assert len(set(chosen)) > 1
    assert chosen[0].num_stages > chosen[-1].num_stages


@pytest.mark.parametrize("function", CACHED[1:])
def test_a_card_that_holds_nothing_is_refused_with_the_figures(function, card):
    device = card(8, 4096)
    with pytest.raises(ValueError, match=r"a head dim of 128 needs \d+ bytes of shared memory .* cuda:0 has 4096"):
        function(100, 100, torch.bfloat16, False, device)


def test_an_unknown_architecture_takes_the_tiles_that_fit_every_card(card):
    for dtype in DTYPES:
        choices = [tiles.attention_tiles(96, 96, dtype, False, card(major, 166912)) for major in (7, 8, 10, 12)]
        assert len(set(choices)) == 1


def test_cpu_tensors_have_properties_too():
    assert tiles.properties(torch.device("cpu")) == (9, tiles.DEFAULT_SHARED_MEMORY, tiles.DEFAULT_MULTIPROCESSORS)


@pytest.mark.parametrize(("dim", "size"), [(1, 16), (16, 16), (17, 32), (64, 64), (96, 128), (192, 256), (256, 256)])
def test_block_is_the_power_of_two_that_holds_the_dim(dim, size):
    assert tiles.block(dim) == size


# Segments

SHAPES = [(rows, walks, head_dim, kinds) for rows in (0, 1, 255, 4096, 131072) for walks in (0, 1, 16, 128, 4096)
          for head_dim in (16, 128, 256) for kinds in (1, 2)]  # fmt: skip


def count(rows, walks, head_dim=128, kinds=1, num_multiprocessors=H100, tiles_of_a_walk=None):
    """Segments of sequences of ``rows`` rows."""
    programs = (1 if kinds == 1 else 3) if tiles_of_a_walk is None else tiles_of_a_walk
    return segments.num_segments(rows, walks, programs, head_dim, head_dim, num_multiprocessors, kinds)


@pytest.mark.parametrize("kinds", [1, 2])
def test_heads_that_fill_the_gpu_are_not_cut(kinds):
    for rows in (1024, 4096, 65536):
        assert count(rows, 128, kinds=kinds) == 1
        assert count(rows, 16 * H100, kinds=kinds) == 1


@pytest.mark.parametrize("kinds", [1, 2])
def test_few_heads_and_long_sequences_are_cut(kinds):
    few = count(131072, 16, kinds=kinds)
    assert few > 1
    assert count(131072, 2, kinds=kinds) >= few
    assert count(16384, 2, kinds=kinds) > 1
    assert count(131072, 16, kinds=kinds, num_multiprocessors=16) == 1


def test_short_sequences_are_not_cut():
    assert {count(rows, walks) for rows in range(512) for walks in (1, 16)} == {1}


def test_segments_stay_within_their_bounds():
    for rows, walks, head_dim, kinds in SHAPES:
        cut = count(rows, walks, head_dim, kinds)
        assert 1 <= cut <= max(1, rows // segments.MIN_ROWS)
        if cut > 1:
            tensors = 16 * rows * walks * 2 * head_dim
            states = 4 * head_dim**2 * walks * kinds * cut
            assert states <= max(segments.FREE_BYTES, segments.MEMORY_SHARE * tensors)


def test_the_number_of_segments_is_the_same_each_time():
    runs = []
    for _ in range(2):
        segments.num_segments.cache_clear()
        runs.append([count(*shape) for shape in SHAPES])
    assert runs[0] == runs[1]
    assert max(runs[0]) > 1


def test_room_for_the_state_is_counted():
    # What the compiler asked for the backward pass of these head dims with states, bf16, on compute capability 9.0.
    for (K, V), compiled in {(256, 128): 131072, (256, 256): 143360}.items():
        of_k, of_v = (
            tiles.attention_tiles(*dims, torch.bfloat16, False, torch.device("cpu")) for dims in ((V, K), (K, V))
        )
        needs = [tiles.shared_memory(t, inner, torch.bfloat16, False) for t, inner in ((of_k, V), (of_v, K))]
        assert max(needs) >= compiled
