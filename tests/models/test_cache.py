"""The growing cache and the attention interface "ferrum", against transformers' own cache and sdpa."""

import mmap

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ferrum_models import Qwen3MoeForCausalLM, huge_pages
from ferrum_models.qwen3_moe.attention import NAME, ferrum_mask
from ferrum_models.qwen3_moe.cache import LEAST_GROWTH, GrowingLayer, let_grow
from ferrum_models.qwen3_moe.step_cache import ContiguousCache, PagedCache
from tests.models.example import EXAMPLE, ids


def load(**kwargs):
    return Qwen3MoeForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32, activation="full", **kwargs)


@pytest.fixture(scope="module")
def model():
    return load()


@pytest.fixture(scope="module")
def sdpa():
    return load(attn_implementation="sdpa")


def states(tokens, batch=2):
    """Keys and values as the model hands them over: token-major memory, heads in front."""
    return (torch.randn(batch, tokens, 3, 8).transpose(1, 2) for _ in range(2))


def test_it_is_the_default_and_can_be_left_out(model, sdpa):
    assert model.config._attn_implementation == NAME
    assert sdpa.config._attn_implementation == "sdpa"


def test_updates_equal_concatenation_and_do_not_move_the_buffer():
    layer, oracle = GrowingLayer(), DynamicCache()
    pointers = set()
    for tokens in (5, 1, 1, 3, LEAST_GROWTH, 1):
        keys, values = states(tokens)
        got, expected = layer.update(keys, values), oracle.update(keys, values, 0)
        assert all(torch.equal(g, e) for g, e in zip(got, expected))
        assert layer.get_seq_length() == oracle.get_seq_length()
        pointers.add(layer.keys.data_ptr())
    assert len(pointers) == 2  # one growth


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.crop(-2),
        lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(torch.tensor([1])),
    ],
    ids=["crop", "reorder", "repeat", "select"],
)
def test_changes_from_outside_are_kept(change):
    layer, oracle = GrowingLayer(), DynamicLayer()
    for tokens in (5, 2):
        keys, values = states(tokens)
        layer.update(keys, values), oracle.update(keys, values)
    change(layer), change(oracle)
    for _ in range(2):
        keys, values = states(1, batch=oracle.keys.shape[0])
        assert all(torch.equal(g, e) for g, e in zip(layer.update(keys, values), oracle.update(keys, values)))


def test_reset_forgets():
    layer = GrowingLayer()
    layer.update(*states(6))
    layer.reset()
    assert layer.get_seq_length() == 0
    keys, values = states(2)
    assert torch.equal(layer.update(keys, values)[0], keys)


def grown(tokens):
    layer = GrowingLayer()
    layer.update(*states(tokens))
    return layer._buffers


STEPS = (1, 2, 20000, 3, 8, torch.float32, torch.device("cpu"))
LONG = {
    "growing": lambda: grown(20000),
    "contiguous": lambda: ContiguousCache.allocate(*STEPS).buffers(),
    "paged": lambda: PagedCache(*STEPS, 16, False).keys,
    "int8": lambda: PagedCache(1, 2, 60000, *STEPS[3:], 16, True).values,
}


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no transparent huge pages")
@pytest.mark.parametrize("kind", LONG)
def test_long_buffers_ask_for_huge_pages(kind):
    buffers = LONG[kind]()
    assert all(buffer.data_ptr() % huge_pages.HUGE_PAGE_BYTES == 0 for buffer in buffers)
    assert kind == "growing" or not any(buffer.any() for buffer in buffers)


def test_only_empty_dynamic_caches_grow():
    empty, filled = DynamicCache(), DynamicCache()
    filled.update(*states(3), 0)
    kept = filled.layers[0]
    let_grow(empty), let_grow(filled)
    assert empty.layer_class_to_replicate is GrowingLayer and filled.layers[0] is kept


@pytest.mark.parametrize("chunks", [(17,), (9, 8), (1,) * 17, (16, 1)], ids=str)
def test_logits_equal_sdpa_in_any_chunks(model, sdpa, chunks):
    tokens = ids(2, 17)
    cache, got = DynamicCache(), []
    for part in tokens.split(chunks, 1):
        got.append(model(part, past_key_values=cache).logits)
    assert isinstance(cache.layers[0], GrowingLayer)
    torch.testing.assert_close(torch.cat(got, 1), sdpa(tokens).logits, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=["greedy", "beams", "static"]
)
def test_generation_equals_sdpa(model, sdpa, padding, options):
    tokens = ids(2, 12)
    mask = torch.ones_like(tokens)
    mask[0, :padding] = 0

    def generate(m):
        return m.generate(tokens, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0, **options)

    assert torch.equal(generate(model), generate(sdpa))


def test_the_mask_is_left_out_only_where_the_op_means_the_same():
    ones = torch.ones(2, 10, dtype=torch.bool)
    padded = ones.clone()
    padded[0, :2] = False
    assert ferrum_mask(2, 3, 10, 7, attention_mask=ones) is None
    assert ferrum_mask(2, 10, 10, 0) is None
    for mask in (
        ferrum_mask(2, 3, 10, 7, attention_mask=padded),
        ferrum_mask(2, 3, 10, 4),  # keys that are not filled yet
        ferrum_mask(2, 3, 10, torch.tensor(7)),  # a static cache's position
        ferrum_mask(2, 3, 10, 7, allow_is_causal_skip=False),
    ):
        assert mask.shape == (2, 1, 3, 10)
