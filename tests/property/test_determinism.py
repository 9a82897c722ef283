"""The determinism contract: what a request gets is a function of the request alone, bit for bit.

Random mixes of requests run through the real engine on the native executor, with random budgets and chunk sizes, pools
so small that sequences are preempted, prefix hits, cancellations, thread counts and instruction sets; each request's
tokens and logprobs equal those of a solo run on one thread, in a roomy pool, prefilled whole, with no prefix cache.
"""

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
FORMATS = ("q4_1", "q8_0", "bf16", "f32")

Told = list[tuple[int, float | None, tuple[tuple[int, float], ...]]]
"""Of each token: its id, its logprob, its alternatives."""


@cache
def executor_of(isa: str, num_threads: int, num_blocks: int, window: int) -> NativeExecutor:
    graph = fuse(tiny_llama(window=window))
    return NativeExecutor(
        graph,
        random_weights(graph, FORMATS),
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        num_threads=num_threads,
        isa=isa,
        max_batched_tokens=256,
        max_num_seqs=8,
        max_model_len=MAX_LEN,
    )


def run(
    engine: Engine, requests: dict[str, Request], arrivals: dict[str, int], leaves: dict[str, int]
) -> dict[str, Told]:
    """Serve all requests, each added at its step, some cancelled at theirs; what those that stayed were told."""
    told: dict[str, Told] = {name: [] for name in requests}
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
                told[event.request_id].append((event.token_id, event.logprob, event.top))
        engine.check_integrity()
        step += 1
    return told


@cache
def _solo_results() -> dict[tuple[object, ...], Told]:
    return {}


def solo(isa: str, window: int, request: Request) -> Told:
    key = (isa, window, request.prompt_ids, repr(request.params))
    if key not in _solo_results():
        config = EngineConfig(
            max_num_seqs=1, max_num_batched_tokens=256, max_model_len=MAX_LEN, enable_prefix_caching=False
        )
        engine = Engine(executor_of(isa, 1, 64, window), config)
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
    max_tokens=st.integers(1, 24),
    temperature=st.sampled_from([0.0, 1.0]),
    top_p=st.sampled_from([1.0, 0.9]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    seed=st.integers(0, 3),
    logprobs=st.sampled_from([0, 3]),
)
requests_drawn = st.lists(
    st.builds(lambda prompt, p: Request(request_id="", prompt_ids=prompt, params=p), prompts, params),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("isa", available_isas())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_request_in_any_company_equals_its_solo_run(isa, data) -> None:
    drawn = data.draw(requests_drawn)
    requests = {f"r{i}": request_named(f"r{i}", request) for i, request in enumerate(drawn)}
    arrivals = {name: data.draw(st.integers(0, 12)) for name in requests}
    leaves = {name: data.draw(st.integers(1, 15)) for name in requests if data.draw(st.integers(0, 4)) == 0}
    window = data.draw(st.sampled_from([0, 11]))
    # 12 blocks hold one longest sequence and no more.
    executor = executor_of(isa, data.draw(st.integers(1, 3)), data.draw(st.sampled_from([12, 15, 64])), window)
    config = EngineConfig(
        max_num_seqs=data.draw(st.integers(1, 6)),
        max_num_batched_tokens=data.draw(st.sampled_from([6, 9, 32, 256])),
        max_model_len=MAX_LEN,
        enable_prefix_caching=data.draw(st.booleans()),
        max_prefill_chunk=data.draw(st.sampled_from([None, 1, 5, 16])),
    )
    for name, told in run(Engine(executor, config), requests, arrivals, leaves).items():
        assert told == solo(isa, window, requests[name]), name
