"""The ops of an encoder layer against plain torch in float64, and that bits do not depend on the batch."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from support.backends import backend_params
from support.encoder_cases import (
    AHEAD,
    EPS,
    SUBJECTS,
    TORCH_ACTIVATIONS,
    UNTOUCHED,
    WAYS,
    H,
    Layout,
    parameters,
    values_of,
)
from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb

from earlyexit_kernels import ops
from earlyexit_kernels.backends import TRITON_INTERPRETED
from earlyexit_kernels.ops.rows_linear import GROUP, rows_linear_triton
from earlyexit_kernels.ops.rows_linear_tma import (
    TMA_TILES,
    has_bulk_copies,
    rows_linear_tma,
    tma_tiles,
    uses_tma,
)
from earlyexit_kernels.ops.tiles import TILES, resident_programs, tiles_for

BACK_ENDS = ("torch", "triton")
FLOAT32, HALF, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
#: Tolerance of a result against float64. Half precision rounds twice: attention's probabilities, and the result.
TOLERANCE = {FLOAT32: 4e-6, HALF: 2e-3, BFLOAT16: 1.6e-2}
#: The interpreter cannot multiply matrices of bfloat16.
DTYPES = [
    pytest.param(p.values[0], dtype, marks=p.marks, id=f"{p.values[0]}-{dtype}".replace("torch.", ""))
    for p in backend_params(BACK_ENDS)
    for dtype in ((FLOAT32, HALF) if p.values[0] == "triton" else (FLOAT32, HALF, BFLOAT16))
]
#: No row, a single token, rows that have left between others, and full buffers of more than 64 tokens.
LAYOUTS = {
    "no_rows": Layout((), rows=0),
    "no_tokens": Layout(()),
    "one": Layout((1,)),
    "between": Layout((5, 3, 7, 1), left=(0, 2)),
    "none_live": Layout((4, 2), left=(0, 1)),
    "full": Layout((30, 1, 39), rows=3, capacity=70, left=(1,)),
}

on_both = pytest.mark.parametrize("backend", backend_params(BACK_ENDS))
interpreted = pytest.mark.parametrize("backend", backend_params(["triton"]))
#: Further ways of an op that read other memory than its first two: windows, and sums.
MORE_WAYS = [("rows_attention", 2), ("rows_add_norm", 4), ("rows_add_norm", 6)]


@pytest.mark.sample(7)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("backend", "dtype"), DTYPES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_float64_and_writes_only_present_tokens(way, backend, dtype, name):
    """All buffers hold NaN outside of the rows."""
    (subject, how), layout = WAYS[way], dataclasses.replace(LAYOUTS[name], side=int(dtype != FLOAT32))
    values = values_of(layout)
    out = subject.run(layout, values, dtype, backend, how)
    others = torch.ones(len(out), dtype=torch.bool)
    for row, value in enumerate(values):
        if row in layout.live or subject.writes_left:
            place = subject.place(layout, row, how)
            want = subject.truth(value.to(dtype).double(), how, dtype)
            torch.testing.assert_close(out[place].double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
            others[place] = False
    assert (out[others] == UNTOUCHED).all()


@pytest.mark.sample(4)
@pytest.mark.parametrize(("name", "way"), [*((name, way) for name in SUBJECTS for way in (0, 1)), *MORE_WAYS])
@on_both
def test_rows_that_have_left_do_not_affect_others(name, way, backend):
    subject, layout = SUBJECTS[name], Layout((5, 3, 30, 1, 2), left=(0, 2), capacity=50, side=way % 2)
    how = subject.ways[way]
    values = values_of(layout)
    clean = subject.run(layout, values, FLOAT32, backend, how)
    for row in layout.left:
        values[row].fill_(torch.nan)
    poisoned = subject.run(layout, values, FLOAT32, backend, how)
    for row in layout.live:
        place = subject.place(layout, row, how)
        assert not clean[place].isnan().any() and torch.equal(clean[place], poisoned[place])


#: Op -> sizes of a layout for which it uses large tiles, if it has any.
LARGE = {"rows_linear": {"capacity": 33792}, "first_tokens_linear": {"rows": 33792}}


@pytest.mark.sample(6)
@pytest.mark.parametrize("dtype", [FLOAT32, HALF], ids=str)
@pytest.mark.parametrize(("name", "way"), [*((name, 1) for name in SUBJECTS), *MORE_WAYS])
@interpreted
def test_bits_of_a_row_do_not_depend_on_the_batch(name, way, backend, dtype, products_in_order):
    """Alone, and among others in larger buffers, on both sides and with all tile sizes."""
    subject, how = SUBJECTS[name], SUBJECTS[name].ways[way]
    among = Layout((5, 3, 70, 1), left=(1,), capacity=90)
    companies = [
        among,
        dataclasses.replace(among, side=1, **LARGE.get(name, {"capacity": 120})),
        Layout((1, 70, 5), side=1, capacity=77),
    ]
    alone = [Layout((n,), rows=1, capacity=n) for n in (5, 70, 1)]
    seen: dict[int, list] = {}
    for layout in alone + companies:
        out = subject.run(layout, values_of(layout), dtype, backend, how)
        for row in layout.live:
            seen.setdefault(layout.lengths[row], []).append(out[subject.place(layout, row, how)])
    assert [len(results) for results in seen.values()] == [4, 4, 4]
    for first, *others in seen.values():
        assert not first.isnan().any() and all(torch.equal(first, other) for other in others)


def test_tiles_of_all_sizes_have_the_same_depth():
    """Else the order of a sum, and its bits, would depend on the capacity."""
    for sizes in TILES.values():
        assert len({tiles.depth for tiles in sizes}) == 1
        areas = [tiles.rows * tiles.columns for tiles in sizes]
        assert areas == sorted(areas, reverse=True)


def test_tiles_are_the_largest_of_which_there_are_enough():
    """BERT-base on an H100 of 132 multiprocessors: B 1 and B 32 of 128 tokens."""
    products = ((2304, (64, 64), (128, 128)), (768, (64, 16), (128, 128)), (3072, (64, 64), (128, 128)))
    for columns, one, many in products:
        for tokens, want in ((128, one), (4096, many)):
            tiles = tiles_for(HALF, tokens, columns, torch.device("cpu"))
            assert (tiles.rows, tiles.columns) == want
            assert tiles.count(tokens, columns) >= 132 / 2, "no more than half of the multiprocessors are idle"


def test_stages_fit_into_the_shared_memory(monkeypatch):
    """A consumer GPU has 99 KiB for a program, an H100 227."""
    small, large = (
        SimpleNamespace(shared_memory_per_block=48 * 1024, shared_memory_per_block_optin=kib * 1024)
        for kib in (99, 227)
    )
    for card, stages in ((large, 8), (small, 6)):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, card=card: card)
        tiles = tiles_for(HALF, 128, 3072, torch.device("cuda"))
        assert tiles.stages == stages and tiles.shared_bytes(2) < card.shared_memory_per_block_optin
        for sizes in TILES.values():
            for each in sizes:
                itemsize = 2 if each.depth == 64 else 4
                assert each.fitted(itemsize, card.shared_memory_per_block_optin).stages >= 2


@pytest.mark.parametrize(("k", "n"), [(1, 1), (7, 3), (16, 64), (65, 66), (130, 129)])
@pytest.mark.parametrize(("backend", "dtype"), DTYPES)
def test_widths_not_divisible_by_tiles(backend, dtype, k, n):
    layout = Layout((3, 64), rows=2, capacity=67)
    x, (weight, bias) = torch.randn(67, k).to(dtype), parameters(n, k, dtype=dtype)
    out, first = torch.full((67, n), torch.nan, dtype=dtype), torch.full((2, n), torch.nan, dtype=dtype)
    ops.rows_linear(x, weight, bias, layout.offsets, out, backend=backend)
    hidden = torch.cat([x, torch.full_like(x, torch.nan)])
    ops.first_tokens_linear(hidden, weight, bias, layout.offsets, layout.row_ids, first, backend=backend)
    want = x.double() @ weight.double().T + bias.double()
    tolerance = {"atol": 4 * TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(out.double(), want, **tolerance)
    torch.testing.assert_close(first.double(), want[[0, 3]], **tolerance)
    assert backend == "torch" or torch.equal(first, out[[0, 3]])


@on_both
def test_more_tiles_than_programs(backend):
    layout = Layout((500, 199), rows=2, capacity=800)
    x, (weight, bias) = torch.randn(800, 3), parameters(130, 3, dtype=FLOAT32)
    out = torch.full((800, 130), UNTOUCHED)
    tiles = tiles_for(FLOAT32, 800, 130, x.device)
    assert tiles.count(699, 130) > 2 * resident_programs(tiles, 800, 130, x.device) and GROUP * tiles.rows < 699
    ops.rows_linear(x, weight, bias, layout.offsets, out, backend=backend)
    torch.testing.assert_close(out[:699].double(), x[:699].double() @ weight.double().T + bias.double())
    assert (out[699:] == UNTOUCHED).all()


@pytest.mark.parametrize("size", [32, 64, 96, 128])
@on_both
def test_head_sizes(backend, size):
    layout = Layout((9, 33), rows=2, capacity=42)
    qkv, out = torch.randn(42, 3 * 2 * size), torch.full((42, 2 * size), torch.nan)
    ops.rows_attention(qkv, layout.offsets, layout.row_ids, 2, 64, out, backend=backend)
    for tokens in (slice(0, 9), slice(9, 42)):
        want = SUBJECTS["rows_attention"].truth(qkv[tokens].double(), {"heads": 2, "size": size}, FLOAT32)
        torch.testing.assert_close(out[tokens].double(), want, atol=4e-6, rtol=4e-6)


@pytest.mark.parametrize("window", [1, 9, 65, 300, 2**31 - 1])
@pytest.mark.parametrize(("backend", "dtype"), DTYPES)
def test_windows_over_many_blocks(backend, dtype, window):
    """Blocks of keys that no query of a block reaches are left out; others hold queries without a key."""
    subject, layout = SUBJECTS["rows_attention"], Layout((150, 7), rows=2, capacity=160)
    how = {"heads": 1, "size": 20, "window": window}
    out = subject.run(layout, values_of(layout), dtype, backend, how)
    for row, value in enumerate(values_of(layout)):
        want = subject.truth(value.to(dtype).double(), how, dtype)
        got = out[layout.tokens(row, absolute=False)].double()
        torch.testing.assert_close(got, want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("size", [2, 6, 64, 128])
@on_both
def test_rotary_head_sizes(backend, size):
    layout, generator = Layout((40, 3), rows=2, capacity=43), torch.Generator().manual_seed(0)
    values = [torch.randn(n, 6 * size, generator=generator) for n in layout.lengths]
    out = SUBJECTS["rows_rotary"].run(layout, values, FLOAT32, backend, {"heads": 2, "size": size})
    want = [SUBJECTS["rows_rotary"].truth(v.double(), {"heads": 2, "size": size}, FLOAT32) for v in values]
    torch.testing.assert_close(out.double(), torch.cat(want), atol=4e-6, rtol=4e-6)


@on_both
def test_rotary_equals_transformers(backend):
    """Bit for bit in float32, since the family's angles and order of operations are used."""
    layout = Layout((9,), rows=1, capacity=9)
    qkv, (cos, sin) = torch.randn(9, 3 * 2 * 16), torch.randn(2, 12, 16)
    q, k, v = qkv.view(1, 9, 3, 2, 16).permute(2, 0, 3, 1, 4)
    turned = apply_rotary_pos_emb(q, k, cos[None, AHEAD:], sin[None, AHEAD:])
    want = torch.stack((*turned, v)).permute(1, 3, 0, 2, 4).reshape(9, -1)
    ops.rows_rotary(qkv, cos, sin, layout.starts, layout.offsets, layout.row_ids, 2, 9, backend=backend)
    assert torch.equal(qkv, want)


@on_both
def test_attention_with_large_logits(backend):
    layout = Layout((40,), rows=1)
    qkv, out = 300 * torch.randn(40, 24), torch.empty(40, 8)
    ops.rows_attention(qkv, layout.offsets, layout.row_ids, 1, 40, out, backend=backend)
    want = SUBJECTS["rows_attention"].truth(qkv.double(), {"heads": 1, "size": 8}, FLOAT32)
    torch.testing.assert_close(out.double(), want, atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("width", [1, 3, 384, 768, 1000, 4096])
@on_both
def test_norm_widths(backend, width):
    layout = Layout((1, 2), rows=2, capacity=3)
    x, residual, out = torch.randn(3, width), 3 + torch.randn(3, width), torch.empty(3, width)
    weight, bias = torch.randn(width), torch.randn(width)
    ops.rows_add_norm(x, residual, weight, bias, EPS, layout.offsets, out, backend=backend)
    y, weight, bias = (t.double() for t in (x + residual, weight, bias))
    want = torch.nn.functional.layer_norm(y, (width,), weight, bias, EPS)
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)


@on_both
def test_norm_in_place(backend):
    layout = Layout((3, 2), rows=2, capacity=8, side=1)
    x, hidden, (weight, bias) = torch.randn(8, H), torch.randn(16, H), parameters(H, dtype=FLOAT32)
    norm = weight, bias, EPS, layout.offsets
    want, apart = torch.zeros(8, H), torch.full((16, H), torch.nan)
    ops.rows_add_norm(x, hidden, *norm, apart, residual_absolute=True, out_absolute=True, backend=backend)
    ops.rows_add_norm(x, hidden[8:], *norm, want, backend=backend)
    over_x, over_hidden, before = x.clone(), hidden.clone(), hidden.clone()
    ops.rows_add_norm(over_x, hidden, *norm, over_x, residual_absolute=True, backend=backend)
    ops.rows_add_norm(x, over_hidden, *norm, over_hidden, residual_absolute=True, out_absolute=True, backend=backend)
    assert all(torch.equal(got[:5], want[:5]) for got in (over_x, apart[8:], over_hidden[8:]))
    assert torch.equal(over_x[5:], x[5:]) and torch.equal(over_hidden[13:], before[13:])
    assert torch.equal(over_hidden[:8], before[:8]), "the other side was written"


@pytest.mark.parametrize("name", TORCH_ACTIVATIONS)
@on_both
def test_activations_equal_torch(backend, name):
    x = torch.cat([torch.linspace(-12, 12, 2001), 10.0 ** torch.linspace(-8, 0, 41)])[:, None]
    layout, out = Layout((len(x),), rows=1, capacity=len(x)), torch.empty_like(x)
    ops.rows_linear(x, torch.ones(1, 1), torch.zeros(1), layout.offsets, out, activation=name, backend=backend)
    want = TORCH_ACTIVATIONS[name](x.double())
    # 1 + erf cancels below zero, in torch too
    torch.testing.assert_close(out.double(), want, rtol=5e-7, atol=1e-6 if name.startswith("gelu") else 1e-30)


@pytest.mark.parametrize("name", TORCH_ACTIVATIONS)
@on_both
def test_activations_keep_nan(backend, name):
    layout, out = Layout((1,), rows=1, capacity=1), torch.zeros(1, 1)
    nan = torch.full((1, 1), torch.nan)
    ops.rows_linear(nan, nan.new_ones(1, 1), torch.zeros(1), layout.offsets, out, activation=name, backend=backend)
    assert out.isnan().all()


@pytest.mark.sample(7)
@pytest.mark.triton
@pytest.mark.skipif(not TRITON_INTERPRETED, reason="runs in Triton's interpreter, as TRITON_INTERPRET=1")
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize(("present", "capacity"), [(1, 130), (128, 128), (129, 300), (255, 260), (0, 5)])
@pytest.mark.parametrize("tiles", TMA_TILES, ids=lambda tiles: str(tiles.columns))
def test_bulk_copies_give_the_sums_of_pointers(tiles, present, capacity, absolute):
    """Whole numbers, whose sums are exact: the interpreter adds in an order that depends on the tile.

    Rows that are not present are neither read nor written, though the copies are of whole tiles.
    """
    k, n, first = 72, 264, 3 if absolute else 0
    x = torch.full((2 * capacity if absolute else capacity, k), torch.nan, dtype=HALF)
    x[first : first + present] = torch.randint(-3, 4, (present, k)).to(HALF)
    offsets = torch.tensor([first, first + present], dtype=torch.int32)
    weight, bias = torch.randint(-3, 4, (n, k)).to(HALF), torch.randint(-3, 4, (n,)).to(HALF)
    out, wide = torch.full((capacity, n), UNTOUCHED, dtype=HALF), torch.full((capacity, 3 * n), UNTOUCHED, dtype=HALF)
    ops.rows_linear(x, weight, bias, offsets, out, activation="gelu", absolute=absolute, backend="triton")
    rows_linear_tma(x, weight, bias, offsets, wide[:, n : 2 * n], "gelu", absolute, False, tiles)
    assert torch.equal(wide[:, n : 2 * n], out) and not out[:present].isnan().any()
    assert (wide[:, :n] == UNTOUCHED).all() and (wide[:, 2 * n :] == UNTOUCHED).all()


def test_bulk_copies_take_the_tiles_whose_turns_read_the_least():
    """BERT-base on an H100 of 132 multiprocessors: 768 columns of 4096 tokens are 96 wide tiles, or 128 narrow ones."""
    cases = {(4096, 768): 192, (4096, 3072): 256, (16384, 768): 256, (16384, 3072): 256}
    assert {case: tma_tiles(*case, 132, False).columns for case in cases} == cases
    assert {tma_tiles(*case, 132, True).columns for case in cases} == {192}, "a second register for every sum"


CARDS = [(8, 163, False), (9, 227, True), (10, 227, True), (12, 99, False)]


@pytest.mark.parametrize(("major", "kib", "is_there"), CARDS)
def test_bulk_copies_need_shared_memory_beside_the_instruction(monkeypatch, major, kib, is_there):
    card = SimpleNamespace(shared_memory_per_block=48 * 1024, shared_memory_per_block_optin=kib * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    assert has_bulk_copies(torch.device("cuda")) is is_there
    assert not has_bulk_copies(torch.device("cpu"))


@pytest.mark.parametrize(("major", "kib", "is_there"), CARDS)
def test_products_on_cards_without_bulk_copies_load_by_pointers(monkeypatch, major, kib, is_there):
    card = SimpleNamespace(shared_memory_per_block=1, shared_memory_per_block_optin=kib * 1024, multi_processor_count=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    launched = []
    for kernel in ("rows_linear_tma", "rows_linear_tiled"):
        own = rows_linear_triton.__globals__
        monkeypatch.setitem(own, kernel, lambda *_, kernel=kernel: launched.append(kernel))
    monkeypatch.setitem(uses_tma.__globals__, "has_bulk_copies", lambda device: has_bulk_copies(torch.device("cuda")))
    x, weight = torch.empty(4096, 768, dtype=HALF), torch.empty(768, 768, dtype=HALF)
    offsets = torch.tensor([0, 4096], dtype=torch.int32)
    rows_linear_triton(x, [weight], [weight[0]], offsets, torch.empty_like(x), "none", False, False)
    assert launched == ["rows_linear_tma" if is_there else "rows_linear_tiled"]


def test_bulk_copies_are_for_many_aligned_tokens_on_hopper(monkeypatch):
    def product(tokens=4096, k=768, n=768, dtype=HALF, weights=3, shift=0):
        x, weight, out = (
            torch.empty(0, dtype=dtype).new_empty(s) for s in ((tokens, k), (n, k), (tokens, weights * n))
        )
        return uses_tma(x.flatten()[shift:][: (tokens - 1) * k].view(-1, k), [weight] * weights, out, False)

    assert not product(), "on a CPU"
    monkeypatch.setattr("earlyexit_kernels.ops.rows_linear_tma.has_bulk_copies", lambda device: True)
    assert product() and product(weights=1)
    refused = {"few": {"tokens": 128}, "float32": {"dtype": FLOAT32}, "odd K": {"k": 767}, "odd N": {"n": 770}}
    refused |= {"odd address": {"shift": 4}}
    assert not any(product(**given) for given in refused.values())
