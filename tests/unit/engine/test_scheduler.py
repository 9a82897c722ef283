"""The scheduler alone: the test plays executor by committing and appending a token whenever a sequence catches up."""

from headrace.engine.config import EngineConfig
from headrace.engine.kv_manager import KVManager
from headrace.engine.policy import FirstCome
from headrace.engine.request import Request, SequenceState, make_sequences
from headrace.engine.sampling import SamplingParams
from headrace.engine.scheduler import Scheduler


class Bench:
    def __init__(self, *, num_blocks=100, block_size=2, policy=None, **config):
        self.config = EngineConfig(max_model_len=1000, **{"max_num_seqs": 4, "max_num_batched_tokens": 16, **config})
        self.kv = KVManager(
            num_blocks,
            block_size,
            max_num_seqs=self.config.max_num_seqs,
            max_len=1000,
            enable_prefix_caching=self.config.enable_prefix_caching,
        )
        self.scheduler = Scheduler(self.config, self.kv, policy or FirstCome())
        self.num_added = 0

    def add(self, prompt, n=1):
        name = "abcdefgh"[self.num_added]
        request = Request(request_id=name, prompt_ids=tuple(prompt), params=SamplingParams(n=n))
        samples = make_sequences(request, serial=self.num_added, max_len=1000)
        self.num_added += 1
        self.scheduler.add(samples)
        return samples[0] if n == 1 else samples

    def step(self):
        """(request id, tokens) of every advance, once it is committed."""
        batch = self.scheduler.schedule()
        for advance in batch:
            self.scheduler.commit(advance)
            if advance.sequence.num_computed == len(advance.sequence.tokens):
                advance.sequence.tokens.append(50 + len(advance.sequence.tokens))
        self.scheduler.check_integrity()
        self.kv.check_integrity()
        return [(sequence.request.request_id, num_tokens) for sequence, num_tokens in batch]


def prompt(start, length):
    return range(start, start + length)


def test_decode_and_a_chunked_prefill_share_the_budget():
    bench = Bench()
    bench.add(prompt(0, 4))
    assert bench.step() == [("a", 4)]
    bench.add(prompt(100, 20))
    assert bench.step() == [("a", 1), ("b", 15)]
    assert bench.step() == [("a", 1), ("b", 5)]
    assert bench.step() == [("a", 1), ("b", 1)]


def test_whoever_wants_much_leaves_a_token_for_everyone_behind():
    bench = Bench(max_num_batched_tokens=8)
    first = bench.add(prompt(0, 8))
    bench.step()
    bench.add(prompt(100, 4))
    assert bench.step() == [("a", 1), ("b", 4)]
    first.tokens += range(500, 512)  # as when a tool has answered
    assert bench.step() == [("a", 7), ("b", 1)]
    assert bench.step() == [("a", 6), ("b", 1)]


def test_no_sequence_computes_more_than_its_chunk():
    bench = Bench(max_prefill_chunk=3)
    bench.add(prompt(0, 7))
    bench.add(prompt(100, 2))
    assert bench.step() == [("a", 3), ("b", 2)]
    assert bench.step() == [("a", 3), ("b", 1)]
    assert bench.step() == [("a", 1), ("b", 1)]


def test_no_more_run_than_allowed_and_the_rest_wait_in_order():
    bench = Bench(max_num_seqs=2)
    first, _, _ = (bench.add(prompt(100 * i, 2)) for i in range(3))
    assert bench.step() == [("a", 2), ("b", 2)]
    assert (bench.scheduler.num_running, bench.scheduler.num_waiting) == (2, 1)
    bench.scheduler.remove(first)
    assert bench.step() == [("b", 1), ("c", 2)]


def test_a_sequence_enters_only_with_blocks_for_its_whole_prompt():
    bench = Bench(num_blocks=6, max_prefill_chunk=2)
    bench.add(prompt(0, 8))
    bench.add(prompt(100, 6))
    assert bench.step() == [("a", 2)], "b's first chunk would fit, but not all of b"
    bench.add(prompt(200, 1))
    assert bench.step() == [("a", 2)], "first come, first served: c does not pass b"


def test_the_latest_is_preempted_and_goes_on_from_what_is_still_cached():
    bench = Bench(num_blocks=6)
    first = bench.add(prompt(0, 4))
    last = bench.add(prompt(100, 6))
    waiting = bench.add(prompt(200, 12))
    assert bench.step() == [("a", 4), ("b", 6)]
    assert bench.step() == [("a", 1)], "both want a block; the only one left goes to a, b's own wish preempts b"
    assert (last.state, last.num_preemptions, last.num_computed) == (SequenceState.WAITING, 1, 0)
    assert bench.scheduler._waiting[-1] is last, "in front of what came later"
    assert waiting.num_preemptions == 0
    bench.step()
    bench.scheduler.remove(first)
    assert bench.step() == [("b", 1)], "its full blocks were still cached: only the newest token is computed again"


def test_the_first_always_advances_and_everyone_ends():
    bench = Bench(num_blocks=8)
    live = [bench.add(prompt(100 * i, 5)) for i in range(4)]
    num_steps = 0
    while live:
        before = live[0].num_computed
        bench.step()
        num_steps += 1
        assert live[0].num_computed > before, "the oldest advances in every step"
        for sequence in [sequence for sequence in live if sequence.num_output_tokens >= 10]:
            bench.scheduler.remove(sequence)
            live.remove(sequence)
    assert bench.scheduler.num_preemptions > 0, "the pool is too small for all at once"
    assert num_steps <= 4 * 12


def test_a_sequence_alone_may_fill_the_pool():
    bench = Bench(num_blocks=4)
    sequence = bench.add(prompt(0, 3))
    while len(sequence.tokens) < 9:
        assert bench.step()
    assert (sequence.num_preemptions, bench.kv.num_available) == (0, 0)


def test_samples_wait_for_the_first_to_compute_the_prompt():
    bench = Bench(max_prefill_chunk=4)
    first, *_ = bench.add(prompt(0, 7), n=3)
    bench.add(prompt(100, 2))
    assert bench.step() == [("a", 4), ("b", 2)], "others pass while the samples are held"
    assert bench.scheduler.num_waiting == 2
    assert bench.step() == [("a", 3), ("b", 1)]
    assert bench.step() == [("a", 1), ("b", 1), ("a", 1), ("a", 1)], "three blocks of the prompt are found"
    assert first.index == 0


def test_samples_do_not_wait_for_a_first_that_is_gone_or_for_a_cache_that_is_off():
    bench = Bench()
    first, *others = bench.add(prompt(0, 4), n=3)
    bench.scheduler.remove(others[0])
    bench.scheduler.remove(first)
    assert bench.step() == [("a", 4)]
    bench = Bench(enable_prefix_caching=False)
    bench.add(prompt(0, 4), n=3)
    assert bench.step() == [("a", 4)] * 3


class ShortestFirst:
    def order(self, sequence):
        return (sequence.num_prompt_tokens, sequence.serial, sequence.index)


def test_another_policy_orders_admission_and_preemption():
    bench = Bench(num_blocks=6, policy=ShortestFirst())
    long = bench.add(prompt(0, 6))
    bench.add(prompt(100, 4))
    assert bench.step() == [("b", 4), ("a", 6)]
    bench.step()
    assert long.num_preemptions == 1


def test_a_newcomer_that_goes_first_is_not_held_back_by_one_that_did_not_fit():
    bench = Bench(num_blocks=6, policy=ShortestFirst())
    bench.add(prompt(0, 6))
    bench.step()
    bench.add(prompt(100, 8))
    assert bench.step() == [("a", 1)]
    bench.add(prompt(200, 2))
    assert bench.step() == [("a", 1), ("c", 2)]
