"""The determinism contract: what a request gets is a function of the request alone, bit for bit.

Random mixes of requests run through the real engine on the native executor, with random budgets and chunk sizes, pools
so small that sequences are preempted, prefix hits, cancellations, thread counts and instruction sets; each request's
tokens and logprobs equal those of a solo run on one thread, in a roomy pool, prefilled whole, with no prefix cache.
"""

from collections import Counter
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace._native import available_isas
from headrace.engine.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.engine.events import FailedEvent, TokenEvent
from headrace.engine.request import Request
from headrace.engine.sampling import SamplingParams
from headrace.executors.native import NativeExecutor
from headrace.graph.passes import fuse
from tests.support.tiny_llama import VOCAB, random_weights, tiny_llama

MAX_LEN, BLOCK_SIZE = 96, 8
FORMATS = ("q4_1", "int4_g32_bf16", "q8_0", "uint4_g64_f32", "bf16", "int8_g64_bf16", "f32")
MIXES_PER_ROUND = 40
MAX_ROUNDS = 20
ENOUGH = 20
"""Mixes of each kind that must have been seen, lest the test prove nothing. A round alone may hold few, because
hypothesis likes to repeat itself."""

Told = dict[int, list[tuple[int, float | None, tuple[tuple[int, float], ...]]]]
"""By sample, of each token: its id, its logprob, its alternatives."""


@cache
def executor_of(isa: str, kv_format: str, num_threads: int, num_blocks: int, window: int) -> NativeExecutor:
    graph = fuse(tiny_llama(window=window))
    return NativeExecutor(
        graph,
        random_weights(graph, FORMATS),
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        kv_format=kv_format,
        num_threads=num_threads,
        isa=isa,
        activation="auto",
        max_batched_tokens=256,
        max_num_seqs=8,
        max_model_len=MAX_LEN,
    )


def run(
    engine: Engine, requests: dict[str, Request], arrivals: dict[str, int], leaves: dict[str, int]
) -> dict[str, Told]:
    """Serve all requests, each added at its step, some cancelled at theirs; what those that stayed were told."""
    told: dict[str, Told] = {name: {index: [] for index in range(r.params.n)} for name, r in requests.items()}
    step = 0
    while engine.has_work or step <= max(arrivals.values()):
        for name, request in requests.items():
            if arrivals[name] == step:
                engine.add(request)
            if leaves.get(name) == step and engine.cancel(name):
                del told[name]
        for event in engine.step():
            assert not isinstance(event, FailedEvent), event
            if isinstance(event, TokenEvent) and event.request_id in told:
                told[event.request_id][event.index].append((event.token_id, event.logprob, event.top))
        engine.check_integrity()
        step += 1
    return told


@cache
def _solo_results() -> dict[tuple[object, ...], Told]:
    return {}


def solo(isa: str, kv_format: str, window: int, request: Request) -> Told:
    key = (isa, kv_format, window, request.prompt_ids, repr(request.params))
    if key not in _solo_results():
        config = EngineConfig(
            max_num_seqs=1, max_num_batched_tokens=256, max_model_len=MAX_LEN, enable_prefix_caching=False
        )
        engine = Engine(executor_of(isa, kv_format, 1, 64, window), config)
        _solo_results()[key] = run(engine, {"solo": request_named("solo", request)}, {"solo": 0}, {})["solo"]
    return _solo_results()[key]


def request_named(name: str, request: Request) -> Request:
    return Request(request_id=name, prompt_ids=request.prompt_ids, params=request.params)


# Few distinct beginnings, so that prompts share prefixes.
beginnings = st.sampled_from([tuple((7 * i + s) % VOCAB for i in range(40)) for s in range(2)])
prompts = st.builds(
    lambda beginning, shared, rest: beginning[:shared] + rest or (1,),
    beginnings,
    st.sampled_from([0, 8, 17, 40]),
    st.lists(st.integers(0, VOCAB - 1), max_size=12).map(tuple),
)
params = st.builds(
    SamplingParams,
    n=st.sampled_from([1, 1, 1, 2]),
    max_tokens=st.sampled_from([1, 6, 24, 40]),
    temperature=st.sampled_from([0.0, 1.0]),
    top_k=st.sampled_from([0, 20]),
    top_p=st.sampled_from([1.0, 0.9]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 3),
    logprobs=st.sampled_from([0, 3]),
)
# The number is drawn first, because lists alone are mostly short, and few requests never fill a pool.
requests_drawn = st.sampled_from([1, 3, 5, 7]).flatmap(
    lambda count: st.lists(
        st.builds(lambda prompt, p: Request(request_id="", prompt_ids=prompt, params=p), prompts, params),
        min_size=count,
        max_size=count,
    )
)


@pytest.mark.parametrize("isa", available_isas())
def test_a_request_in_any_company_equals_its_solo_run(isa, report_figure) -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=MIXES_PER_ROUND, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(data=st.data())
    def any_mix(data: st.DataObject) -> None:
        drawn = data.draw(requests_drawn)
        requests = {f"r{i}": request_named(f"r{i}", request) for i, request in enumerate(drawn)}
        arrivals = {name: data.draw(st.integers(0, 12)) for name in requests}
        leaves = {name: data.draw(st.integers(1, 15)) for name in requests if data.draw(st.integers(0, 4)) == 0}
        window = data.draw(st.sampled_from([0, 11]))
        num_threads = data.draw(st.integers(1, 3))
        kv_format = data.draw(st.sampled_from(["bf16", "fp8", "int8", "int4"]))
        # 12 blocks hold one longest sequence and no more.
        executor = executor_of(isa, kv_format, num_threads, data.draw(st.sampled_from([12, 15, 64])), window)
        config = EngineConfig(
            max_num_seqs=data.draw(st.sampled_from([1, 3, 4, 6])),
            max_num_batched_tokens=data.draw(st.sampled_from([6, 9, 32, 256])),
            max_model_len=MAX_LEN,
            enable_prefix_caching=data.draw(st.booleans()),
            max_prefill_chunk=data.draw(st.sampled_from([None, 1, 5, 16])),
        )
        engine = Engine(executor, config)
        found = run(engine, requests, arrivals, leaves)
        for name, told in found.items():
            assert told == solo(isa, kv_format, window, requests[name]), name

        metrics = engine.snapshot().metrics
        chunk = min(config.max_prefill_chunk or MAX_LEN, config.max_num_batched_tokens)
        seen["mixes"] += 1
        seen["threads"] += num_threads > 1
        seen[kv_format] += 1
        seen["chunks"] += any(len(request.prompt_ids) > chunk for request in requests.values())
        seen["prefix hits"] += metrics.cached_tokens > 0
        seen["preemptions"] += metrics.preemptions > 0
        seen["cancellations"] += len(found) < len(requests)

    kinds = ("threads", "fp8", "int8", "int4", "chunks", "prefix hits", "preemptions", "cancellations")
    for _ in range(MAX_ROUNDS):
        any_mix()
        if all(seen[kind] >= ENOUGH for kind in kinds):
            break
    assert all(seen[kind] >= ENOUGH for kind in kinds), dict(seen)
    report_figure(f"determinism, {isa}: {dict(seen)}")
