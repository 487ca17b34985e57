"""Recorded decode steps: replays equal steps run one by one, whatever has changed in the buffers since."""

import copy
import pickle
import warnings

import pytest
import torch

from ferrum_models import DecodeGraph, Qwen3MoeForCausalLM
from ferrum_models.graphs import HostReadError, NoHostReads, StepRunner
from ferrum_models.moe import registry
from ferrum_models.qwen3_moe import decode
from ferrum_ops import RuntimeConfig
from tests.models.example import EXAMPLE
from tests.models.recording import RecordedGraphs

PAGED_INT8 = RuntimeConfig(kv_dtype="int8", paged_block_size=4)


@pytest.fixture(scope="module")
def loaded():
    return Qwen3MoeForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32)


@pytest.fixture
def model(loaded):
    yield loaded
    loaded.set_moe_implementation("fused")
    loaded.set_activation("int8")
    loaded.runtime_config = RuntimeConfig()
    loaded.decode_graph = None
    loaded.__dict__.pop("_graph_reasons", None)


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    monkeypatch.setattr(decode, "LEAST_BUCKET", 16)


def prompts(batch, length, seed=0):
    return torch.randint(1, 2000, (batch, length), generator=torch.Generator().manual_seed(seed))


def recorded(model, batch=2, capacity=64, **options):
    return DecodeGraph(model, batch, capacity, graphs=RecordedGraphs(), **options)


def eager(model, batch=2, capacity=64, **options):
    graph = DecodeGraph(model, batch, capacity, **options)
    assert graph.runner.graphs is None
    return graph


def greedy(model, ids, tokens, **options):
    options = {"eos_token_id": None, "pad_token_id": 0} | options
    return model.generate(ids, max_new_tokens=tokens, do_sample=False, **options)


# The recording itself.


def test_a_recording_fixes_what_python_decided():
    x, calls = torch.zeros(3), []

    def step():
        calls.append(1)
        return (x + len(calls)).sum()[None]

    replay, result = RecordedGraphs().capture(step)
    assert result.item() == 6  # the second call's 2
    x += 1
    replay()
    assert result.item() == 9 and len(calls) == 2


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x),
        lambda x: x.unique(),
        lambda x: x.masked_select(x > 0),
    ],
    ids=["item", "bool", "nonzero", "mask", "equal", "unique", "masked_select"],
)
def test_host_reads_are_refused(read):
    x = torch.arange(4)
    read(x)
    with pytest.raises(HostReadError, match=r"aten\.\w+\.\w+ reads a tensor's values on the host"), NoHostReads():
        read(x)


def test_what_stays_on_the_device_is_no_host_read():
    x = torch.arange(4)
    with NoHostReads():
        assert x[torch.tensor([1, 2])].shape == (2,)
        x.clone().scatter_(0, x, x).to(torch.float32).argmax()


# Replays equal eager steps.


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_tokens_are_those_of_generate(model, batch, paged):
    ids = prompts(batch, 9)
    graph = recorded(model, batch, paged=paged)
    got = graph.generate(ids, max_new_tokens=30)
    assert torch.equal(got, greedy(model, ids, 30))
    # Lengths from 10 to 38: a recording each for up to 16, 32 and 64 keys, and every step a replay.
    assert [key.kv_bucket for key in graph.runner.keys] == [16, 32, 64]
    assert (graph.runner.captures, graph.runner.replays, graph.runner.eager_steps) == (3, 29, 0)
    assert graph.fallback is None


@pytest.mark.parametrize("options", [{}, {"paged": True}], ids=["contiguous", "paged"])
def test_other_prompts_replay_the_same_recording(model, options):
    """Other tokens, so other routing; other lengths, so other positions and pages; the same launches."""
    model.runtime_config = PAGED_INT8
    graph, other = recorded(model, **options), eager(model, **options)
    for seed, length in ((0, 2), (1, 7), (2, 5)):
        ids = prompts(2, length, seed)
        for g in (graph, other):
            g.start(ids)
        assert torch.equal(graph.run(8), other.run(8))
        assert torch.equal(graph.tokens(9), other.tokens(9))
    assert graph.runner.captures == 1 and graph.runner.replays == 24


def test_pages_may_be_handed_out_anew(model):
    graph, other = recorded(model, paged=True), eager(model, paged=True)
    for g in (graph, other):
        g.start(prompts(2, 6))
        g.run(3)
    # Every page of the recorded one moves to another place in the pool.
    cache = graph.cache
    order = torch.randperm(cache.block_tables.numel())
    for pool in (*cache.keys, *cache.values):
        pool[order] = pool.clone()
    cache.block_tables.copy_(order[cache.block_tables.long()])
    assert torch.equal(graph.run(5), other.run(5))
    assert graph.runner.captures == 1
    # A table that points elsewhere gives something else: the recording does read it.
    cache.block_tables.copy_(cache.block_tables.roll(1, 0))
    assert not torch.equal(graph.run(1), other.run(1))


def test_tokens_may_be_given(model):
    graph, other = recorded(model), eager(model)
    for g in (graph, other):
        g.start(prompts(2, 6))
        g.run(2)
    given = torch.tensor([5, 900])
    free = other.ids.clone()
    assert torch.equal(graph.run(1, given), other.run(1, given))
    assert torch.equal(graph.tokens(4), other.tokens(4)) and torch.equal(graph.tokens(3)[:, 2], given)
    assert not torch.equal(free, given)


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_padding_on_the_left(model, paged):
    ids = prompts(3, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[2, :1] = 0
    got = recorded(model, 3, paged=paged).generate(ids, mask, max_new_tokens=12)
    assert torch.equal(got, greedy(model, ids, 12, attention_mask=mask))
    # Sequences do not see each other, nor their padding.
    alone = recorded(model, 1).generate(ids[:1, 4:], max_new_tokens=12)
    assert torch.equal(alone[0, 5:], got[0, 9:])


def test_an_end_stops_a_sequence(model):
    ids = prompts(2, 9)
    free = greedy(model, ids, 24)[:, 9:]
    first, second = int(free[0, 3]), int(free[1, 20])  # the sequences end at different steps
    expected = greedy(model, ids, 24, eos_token_id=[first, second], pad_token_id=7)
    graph = recorded(model)
    got = graph.generate(ids, max_new_tokens=24, eos_token_ids=[first, second], pad_token_id=7)
    assert torch.equal(got, expected)
    assert torch.equal(graph.generate(ids, max_new_tokens=24), torch.cat([ids, free], 1))  # nothing of it is left


# Keys, resets, failures.


def test_what_changes_a_launch_changes_the_key(model):
    graph = recorded(model)
    graph.start(prompts(2, 6))
    seen = {graph.key()}
    model.set_activation("full")
    seen.add(graph.key())
    model.set_moe_implementation("bucketed")
    seen.add(graph.key())
    model.runtime_config = RuntimeConfig(vllm_atomic_add=True)
    seen.add(graph.key())
    assert len(seen) == 4
    assert len({recorded(model, paged=paged).key().cache for paged in (False, True)}) == 2


def test_switching_records_anew_and_back_uses_what_there_is(model):
    graph, other = recorded(model), eager(model)
    for activation, captures in (("int8", 1), ("full", 2), ("int8", 2)):
        model.set_activation(activation)
        for g in (graph, other):
            g.start(prompts(2, 6))
        assert torch.equal(graph.run(4), other.run(4))
        assert graph.runner.captures == captures


def test_moved_weights_drop_the_recordings(model):
    graph, other = recorded(model), eager(model)
    for g in (graph, other):
        g.start(prompts(2, 6))
        g.run(2)
    norm = model.model.norm
    weight = norm.weight
    try:
        norm.weight = torch.nn.Parameter(weight.flip(0), requires_grad=False)
        assert torch.equal(graph.run(3), other.run(3))
        assert (graph.runner.resets, graph.runner.captures) == (1, 2)
    finally:
        norm.weight = weight
    weight.mul_(2)  # in place: the recordings read it where it is
    graph.run(1), other.run(1)  # back at the old address: recorded once more
    captures = graph.runner.captures
    weight.mul_(0.5)
    assert torch.equal(graph.run(1), other.run(1)) and graph.runner.captures == captures


def test_a_moved_buffer_drops_the_recordings(model):
    graph, other = recorded(model), eager(model)
    for g in (graph, other):
        g.start(prompts(2, 6))
        g.run(2)
    graph.cache.keys[1] = graph.cache.keys[1].clone()
    assert torch.equal(graph.run(3), other.run(3))
    assert graph.runner.resets == 1


def test_a_capture_that_fails_is_told_and_decoding_goes_on(model, monkeypatch):
    fused = registry.IMPLEMENTATIONS["fused"]

    def reads_back(hidden, topk_ids, topk_weights, weights, *blocks):
        assert topk_ids.max().item() < weights.num_experts
        return fused(hidden, topk_ids, topk_weights, weights, *blocks)

    ids = prompts(2, 9)
    expected = greedy(model, ids, 6)
    graph = recorded(model)
    monkeypatch.setitem(registry.IMPLEMENTATIONS, "bucketed", reads_back)
    model.set_moe_implementation("bucketed")
    with pytest.warns(UserWarning, match=r"\[DecodeGraph\] runs without a graph, capture failed: HostReadError: aten"):
        assert torch.equal(graph.generate(ids, max_new_tokens=6), expected)
    assert "aten._local_scalar_dense.default" in graph.fallback
    assert graph.runner.replays == 0 and graph.runner.eager_steps == 5
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=r"\[DecodeGraph\]")  # told once
        graph.generate(ids, max_new_tokens=6)
    monkeypatch.setitem(registry.IMPLEMENTATIONS, "bucketed", fused)
    graph.runner.reset()
    assert graph.fallback is None
    assert torch.equal(graph.generate(ids, max_new_tokens=6), expected)
    assert graph.runner.replays == 5


def test_a_failure_in_the_middle_of_a_capture_leaves_no_trace():
    """Warm-ups change the state; whatever happens then, the step starts from what was there."""
    count = torch.zeros(1)

    class Breaks:
        def capture(self, step, rewind):
            step()
            raise RuntimeError("\nout of graphs\nand more")

    runner = StepRunner("test", Breaks())
    with pytest.warns(UserWarning, match="RuntimeError: out of graphs$"):
        runner.run("key", lambda: count.add_(1), [count])
    assert count.item() == 1 and runner.failures == {"key": "RuntimeError: out of graphs"}


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_a_recording_of_the_last_step_there_is_room_for(model, paged):
    """Its warm-ups must not go on behind the end, where a device would stop with an assertion."""
    graph, other = recorded(model, paged=paged), eager(model, paged=paged)
    for each in (graph, other):
        each.start(prompts(2, graph.capacity - 1))
    assert torch.equal(graph.run(1), other.run(1)) and torch.equal(graph.history, other.history)
    assert graph.fallback is None and graph.runner.replays == 1


def test_bad_arguments(model):
    for wrong, message in (
        ({"batch": 0, "capacity": 8}, "batch: expected at least 1, got 0"),
        ({"batch": 1, "capacity": 0}, "capacity: expected at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            DecodeGraph(model, **wrong)
    graph = recorded(model, 2, 12)
    with pytest.raises(ValueError, match=r"steps: expected at least 1 after start\(\)"):
        graph.run(1)
    with pytest.raises(ValueError, match=r"input_ids: expected shape \(2, 1 to 12\), got \(2, 13\)"):
        graph.start(prompts(2, 13))
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \(2, 9\)"):
        graph.start(prompts(2, 9), torch.ones(2, 8))
    for mask in (torch.ones(2, 9).tril(7).flip(1).flip(0), torch.zeros(2, 9)):
        with pytest.raises(ValueError, match="padding on the left"):
            graph.start(prompts(2, 9), mask.flip(1))
    with pytest.raises(ValueError, match="eos_token_ids: expected at most 16, got 17"):
        graph.start(prompts(2, 9), eos_token_ids=range(17))
    graph.start(prompts(2, 9))
    graph.run(3)
    with pytest.raises(ValueError, match="room for one more token, but 12 are held"):
        graph.run(1)
    handle = model.model.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="a hook watches"):
        DecodeGraph(model, 1, 8)
    handle.remove()


# model.generate.


@pytest.fixture
def graphs(monkeypatch, model):
    """model.generate as on a device that records, with the knob on."""
    model.runtime_config = RuntimeConfig(cuda_graph=True)
    monkeypatch.setattr(decode, "graphs_for", lambda device: RecordedGraphs())


def plain(model):
    """The same knobs without the graph."""
    model.runtime_config = RuntimeConfig()
    return model


class Streamer:
    def __init__(self):
        self.tokens, self.ended = [], 0

    def put(self, value):
        self.tokens.append(value)

    def end(self):
        self.ended += 1


def test_generate_replays(model, graphs):
    ids = prompts(2, 9)
    got = [greedy(model, ids, tokens) for tokens in (12, 20, 3)]
    graph = model.decode_graph
    assert graph.runner.replays == 11 + 19 + 2 and graph.runner.eager_steps == 0  # one for all three calls
    assert all(torch.equal(g, greedy(plain(model), ids, g.shape[1] - 9)) for g in got)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_record_steps_of_their_own(model, graphs, copied):
    ids = prompts(2, 9)
    expected = greedy(model, ids, 6)
    other = copied(model)
    assert other.decode_graph is None and model.decode_graph.runner.replays == 5
    with torch.no_grad():
        model.lm_head.weight.neg_()  # recorded, and the original's alone
    try:
        assert torch.equal(greedy(other, ids, 6), expected)
        assert other.decode_graph.model is other and other.decode_graph.runner.replays == 5
    finally:
        with torch.no_grad():
            model.lm_head.weight.neg_()


def test_generate_samples_from_the_same_logits(model, graphs):
    options = dict(max_new_tokens=12, do_sample=True, top_k=20, temperature=0.9, pad_token_id=0)
    ids = prompts(2, 9)
    torch.manual_seed(3)
    got = model.generate(ids, repetition_penalty=1.3, **options)
    assert model.decode_graph.runner.replays == got.shape[1] - 9 - 1
    torch.manual_seed(3)
    assert torch.equal(got, plain(model).generate(ids, repetition_penalty=1.3, **options))


def test_generate_with_an_end_a_mask_and_a_streamer(model, graphs):
    ids = prompts(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    eos = int(greedy(plain(model), ids, 8, attention_mask=mask)[0, 13])
    model.runtime_config = RuntimeConfig(cuda_graph=True)
    options = dict(attention_mask=mask, eos_token_id=eos, pad_token_id=2)
    got = greedy(model, ids, 20, **options)
    assert model.decode_graph.runner.replays > 0
    streamers = Streamer(), Streamer()
    greedy(model, ids[:1], 6, streamer=streamers[0])
    assert torch.equal(got, greedy(plain(model), ids, 20, **options))
    greedy(model, ids[:1], 6, streamer=streamers[1])
    assert streamers[0].ended == streamers[1].ended == 1
    streamed = [torch.cat([t.flatten() for t in s.tokens]) for s in streamers]
    assert torch.equal(*streamed)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"use_cache": False}, "use_cache is False"),
        ({"cache_implementation": "static"}, "a cache was given"),
        ({"num_beams": 2}, "the generation mode is beam_search"),
        ({"prompt_lookup_num_tokens": 2}, "the generation mode is assisted_generation"),
    ],
    ids=["dict", "no cache", "static cache", "beams", "assisted"],
)
def test_what_a_graph_cannot_do_is_told_and_done_without(model, graphs, options, reason):
    ids = prompts(1, 5)
    with pytest.warns(UserWarning, match=rf"\[generate\] cuda_graph: not used: .*{reason}"):
        got = greedy(model, ids, 3, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=r"\[generate\]")
        greedy(model, ids, 3, **options)  # told once
    assert model.decode_graph is None
    if "num_beams" not in options:
        got = got.sequences if options.get("return_dict_in_generate") else got
        assert torch.equal(got, greedy(plain(model), ids, 3))


def test_sequences_longer_than_cuda_max_kv_go_without(model, graphs):
    model.runtime_config = RuntimeConfig(cuda_graph=True, cuda_max_kv=16)
    with pytest.warns(UserWarning, match="max_length 21 is above cuda_max_kv 16"):
        greedy(model, prompts(1, 9), 12)
    greedy(model, prompts(1, 9), 7)
    assert model.decode_graph.capacity == 16


def test_without_a_device_that_records_the_knob_changes_nothing(model):
    """Loading has said so (test_runtime_config.py)."""
    model.runtime_config = RuntimeConfig(cuda_graph=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=r"\[(generate|RuntimeConfig)\]")
        greedy(model, prompts(1, 5), 3)
    assert model.decode_graph is None
