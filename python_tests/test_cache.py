"""YOCOCache: prefill in any pieces + decode = one forward; ragged batches; memory; files."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import SELF_DECODERS, tiny_config, tiny_model, tokens
from torch import Tensor

from yoco_ext import YOCOCache, YOCOConfig, YOCOForCausalLM
from yoco_ext.cache import transformer_cache_bytes, yoco_cache_bytes

both_ops = pytest.mark.parametrize("ops", ["fused", "reference"])
both_decoders = pytest.mark.parametrize("self_decoder", SELF_DECODERS)
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}  # of logits around 1 in float64


def double(self_decoder: str, ops: str, **overrides) -> YOCOForCausalLM:
    return tiny_model(self_decoder, ops, torch.float64, **overrides)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, **TOLERANCE)


@both_ops
@both_decoders
@settings(max_examples=8)
@given(data=st.data())
def test_any_chunking_gives_the_logits_of_one_forward(ops: str, self_decoder: str, data: st.DataObject) -> None:
    """Prompts of random lengths in random pieces by prefill and decode, against one forward per sequence."""
    model = double(self_decoder, ops)
    batch, time = data.draw(st.integers(1, 3)), 60
    ids = tokens(batch, time)
    full = model(ids).detach()
    cache = model.new_cache(batch, data.draw(st.sampled_from([None, time])))
    while min(cache.lengths) < time:
        if max(cache.lengths) < time and data.draw(st.booleans()):
            begins = torch.tensor(cache.lengths)
            steps = data.draw(st.integers(1, min(20, time - max(cache.lengths))))
            rows = begins[:, None] + torch.arange(steps)
            logits = model.decode(ids.gather(1, rows), cache)
            close(logits, full.gather(1, rows[..., None].expand_as(logits)))
            continue
        # Rows that are finished still have to be given a token each; leave the loop instead of going past the text.
        if max(cache.lengths) == time:
            break
        left = [time - length for length in cache.lengths]
        counts = [data.draw(st.integers(1, n)) for n in left]
        padded = torch.zeros(batch, max(counts), dtype=torch.int64)
        for b, (begin, n) in enumerate(zip(cache.lengths, counts, strict=True)):
            padded[b, :n] = ids[b, begin : begin + n]
        begins = cache.lengths
        kind = data.draw(st.sampled_from(["last", "all", "none"]))
        chunk_size = data.draw(st.sampled_from([None, 1, 5, 16, 17, 33]))
        logits = model.prefill(padded, cache, lengths=counts, chunk_size=chunk_size, logits=kind)
        assert cache.lengths == cache.seqlens.tolist() == [b + n for b, n in zip(begins, counts, strict=True)]
        for b, (begin, n) in enumerate(zip(begins, counts, strict=True)):
            if kind == "last":
                close(logits[b], full[b, begin + n - 1])
            elif kind == "all":
                close(logits[b, :n], full[b, begin : begin + n])
                assert not logits[b, n:].any()
    assert max(cache.lengths) == time


@both_ops
@both_decoders
@pytest.mark.parametrize("length", [1, 6, 7, 8, 40])
def test_decode_from_every_side_of_the_window(ops: str, self_decoder: str, length: int) -> None:
    """The window is 7: prompts shorter, as long and longer, then tokens one by one round the ring."""
    model = double(self_decoder, ops)
    ids = tokens(2, 75)
    full = model(ids).detach()
    cache = model.new_cache(2)
    close(model.prefill(ids[:, :length], cache), full[:, length - 1])
    for i in range(length, 75):
        close(model.decode(ids[:, i : i + 1], cache)[:, 0], full[:, i])


@both_ops
@both_decoders
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_decode_stays_with_the_forward(ops: str, self_decoder: str, dtype: torch.dtype) -> None:
    exact = double(self_decoder, "reference")
    ids = tokens(2, 96)
    expected = exact(ids).detach()
    model = YOCOForCausalLM(exact.config, ops)
    model.load_state_dict(exact.state_dict())
    model = model.to(dtype)
    cache = model.new_cache(2)
    assert cache.kv.k.dtype == dtype and all(state.dtype == torch.float32 for state in cache.states)
    with torch.no_grad():
        forward = model(ids).double()
    pieces = [model.prefill(ids[:, :64], cache, logits="all", chunk_size=24)]
    pieces += [model.decode(ids[:, i : i + 1], cache) for i in range(64, 96)]
    error, limit = ((x.double() - expected).norm() for x in (torch.cat(pieces, 1), forward))
    assert error <= 1.5 * limit  # of the same size as the forward's own rounding error


@both_ops
@both_decoders
def test_early_exit_runs_the_cross_decoder_for_one_token_a_row(ops: str, self_decoder: str) -> None:
    model = double(self_decoder, ops)
    seen = []
    model.cross_decoder.layers[0].register_forward_hook(lambda _, args, __: seen.append(tuple(args[0].shape[:2])))
    model.output_projection.register_forward_hook(lambda _, args, __: seen.append(tuple(args[0].shape[:2])))
    cache = model.new_cache(3)
    model.prefill(tokens(3, 50), cache, lengths=[50, 3, 20], chunk_size=16)
    assert seen == [(3, 1), (3, 1)]
    model.prefill(tokens(3, 20), cache, logits="none")
    assert seen == [(3, 1), (3, 1)]


@both_ops
@both_decoders
def test_padding_and_neighbours_do_not_matter(ops: str, self_decoder: str) -> None:
    """Whatever stands in the padding or in other rows, a row's state and logits are the same bits."""
    model = tiny_model(self_decoder, ops)
    ids = tokens(3, 40)
    results = []
    for _ in range(2):
        ids[0, 11:], ids[2] = tokens(29), tokens(40)
        cache = model.new_cache(3, 64)
        logits = model.prefill(ids, cache, lengths=[11, 40, 40])
        results.append((logits[:2], model.decode(ids[:, :1], cache)[:2], [state[:2] for state in cache.states]))
    (logits, step, states), (other_logits, other_step, other_states) = results
    assert torch.equal(logits, other_logits) and torch.equal(step[1], other_step[1])
    assert all(torch.equal(a, b) for a, b in zip(states, other_states, strict=True))


@both_ops
@both_decoders
def test_unused_memory_is_never_read(ops: str, self_decoder: str) -> None:
    model = tiny_model(self_decoder, ops)
    ids = tokens(2, 40)
    results = []
    for fill in (0.0, float("nan")):
        cache = model.new_cache(2, 64)
        for tensor in (cache.kv.k, cache.kv.v, *(t for ring in cache.rings for t in (ring.k, ring.v))):
            tensor.fill_(fill)
        prefill = model.prefill(ids, cache, lengths=[5, 30], chunk_size=20, logits="all")
        results.append((prefill, model.decode(ids[:, :1], cache), model.decode(ids[:, :17], cache)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@both_ops
@both_decoders
def test_saved_and_restored_caches_continue_alike(ops: str, self_decoder: str, tmp_path) -> None:
    model = tiny_model(self_decoder, ops)
    ids = tokens(2, 60)
    cache = model.new_cache(2, 80)
    model.prefill(ids[:, :40], cache, lengths=[40, 33])
    cache.save(tmp_path / "cache.safetensors")
    restored = YOCOCache.load(tmp_path / "cache.safetensors")
    assert (restored.lengths, restored.max_length, restored.config) == ([40, 33], 80, model.config)
    assert restored.nbytes == cache.nbytes
    for i in range(40, 60):
        assert torch.equal(model.decode(ids[:, i : i + 1], cache), model.decode(ids[:, i : i + 1], restored))


def test_loading_something_else_says_so(tmp_path) -> None:
    from safetensors.torch import save_file

    save_file({"k": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="is not a saved YOCOCache"):
        YOCOCache.load(tmp_path / "x.safetensors")


@both_decoders
def test_reset_keeps_the_memory_and_forgets_the_rest(self_decoder: str) -> None:
    model = tiny_model(self_decoder)
    ids = tokens(2, 30)
    cache = model.new_cache(2, 50)
    memory = cache.kv.k.data_ptr()
    first = model.prefill(ids, cache)
    cache.reset()
    assert torch.equal(model.prefill(ids, cache), first) and cache.kv.k.data_ptr() == memory


def test_growth_and_its_limit() -> None:
    model = tiny_model(ops="reference")
    cache = model.new_cache(1)
    capacities = set()
    for _ in range(40):
        model.prefill(tokens(1, 30), cache, logits="none")
        capacities.add(cache.kv.capacity)
    assert cache.lengths == [1200] and len(capacities) <= 6  # far fewer copies than calls
    cache = model.new_cache(1, 32)
    model.prefill(tokens(1, 30), cache)
    before = cache.states[0].clone()
    with pytest.raises(ValueError, match="max_length 32, 33 tokens do not fit"):
        model.decode(tokens(1, 3), cache)
    assert torch.equal(cache.states[0], before) and cache.lengths == [30]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@both_decoders
def test_bytes_are_what_is_allocated(self_decoder: str, dtype: torch.dtype) -> None:
    config = tiny_config(self_decoder)
    cache = YOCOCache(config, 3, 500, dtype=dtype)
    assert cache.nbytes == yoco_cache_bytes(config, 500, batch_size=3, dtype=dtype)


def test_bytes_of_the_papers_3b() -> None:
    config = YOCOConfig.preset("3b")
    state = yoco_cache_bytes(config, 0, dtype=torch.bfloat16)
    assert state == pytest.approx(20.4e6, rel=0.01)
    assert yoco_cache_bytes(config, 1000, dtype=torch.bfloat16) - state == 1000 * 4 * 1024
    assert transformer_cache_bytes(config, 1000, dtype=torch.bfloat16) == 1000 * 104 * 1024


def test_bad_calls_name_the_argument() -> None:
    model = tiny_model(ops="reference")
    cache = model.new_cache(2)
    for call, message in (
        (lambda: model.prefill(tokens(3, 4), cache), "input_ids has batch size 3, the cache 2"),
        (lambda: model.prefill(tokens(2, 0), cache), r"input_ids must be \[batch, time\]"),
        (lambda: model.decode(tokens(4), cache), r"input_ids must be \[batch, time\]"),
        (lambda: model.prefill(tokens(2, 4), cache, lengths=[4, 5]), "lengths must be 2 numbers in 1..4"),
        (lambda: model.prefill(tokens(2, 4), cache, lengths=[4]), "lengths must be 2 numbers in 1..4"),
        (lambda: model.prefill(tokens(2, 4), cache, lengths=[0, 4]), "lengths must be 2 numbers in 1..4"),
        (lambda: model.prefill(tokens(2, 4), cache, chunk_size=0), "chunk_size must be at least 1"),
        (lambda: model.prefill(tokens(2, 4), cache, logits="first"), "logits must be"),
        (lambda: YOCOCache(model.config, 0), "batch_size must be at least 1"),
        (lambda: YOCOCache(model.config, 1, 0), "max_length must be at least 1"),
        (lambda: tiny_model("sliding_window").decode(tokens(2, 1), cache), "another configuration"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert cache.lengths == [0, 0]
