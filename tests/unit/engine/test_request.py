from headrace.engine.request import Request, derive_seed, make_sequences
from headrace.engine.sampling import SamplingParams


def sample(max_len=100, eos_ids=(), **params):
    request = Request(request_id="r", prompt_ids=(1, 2), params=SamplingParams(**params), eos_ids=eos_ids)
    return make_sequences(request, serial=0, max_len=max_len)[0]


def test_seeds_are_reproducible_distinct_and_fit_both_int64_and_uint64():
    seeds = [derive_seed(seed, index) for seed in (-1, 0, 1, 2**63 - 1) for index in range(64)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, 0) == 0x53836E97A68CBF37, "part of what users may rely on: do not change"


def test_a_request_without_a_seed_draws_one_for_all_its_samples():
    request = Request(request_id="r", prompt_ids=(1,), params=SamplingParams(n=2))
    one, other = (make_sequences(request, serial=0, max_len=9) for _ in range(2))
    assert len({sequence.seed for sequence in one + other}) == 4
    seeded = Request(request_id="r", prompt_ids=(1,), params=SamplingParams(n=2, seed=5))
    assert [s.seed for s in make_sequences(seeded, serial=0, max_len=9)] == [derive_seed(5, 0), derive_seed(5, 1)]


def test_what_ends_a_sequence():
    assert sample(eos_ids=(7,)).append(7) == "stop"
    assert sample(eos_ids=(7,), ignore_eos=True).append(7) is None
    stopped = sample(eos_ids=(7,), stop_token_ids=(8,))
    assert stopped.append(6) is None
    assert stopped.append(8) == "stop"
    assert (stopped.stop_reason, stopped.output_ids) == (8, [6, 8])
    assert sample(max_len=3).append(6) == "length"
    assert sample(max_len=3, eos_ids=(7,)).append(7) == "stop", "a stop on the last place is a stop"


def test_min_tokens_bans_ends_and_does_not_end():
    sequence = sample(eos_ids=(7,), stop_token_ids=(8,), min_tokens=2, temperature=0.0)
    assert sequence.sample_row().banned_ids == (7, 8)
    assert sequence.append(7) is None
    sequence.append(5)
    assert sequence.sample_row().banned_ids == ()
    assert sequence.append(7) == "stop"
    assert sample(eos_ids=(7,), ignore_eos=True, min_tokens=2).sample_row().banned_ids == ()


def test_greedy_rows_are_one_object_and_others_count():
    assert sample(temperature=0.0).steady_row is not None
    assert sample(temperature=0.0, min_tokens=1).steady_row is None
    assert sample(temperature=0.0, presence_penalty=1.0).steady_row is None
    sequence = sample(temperature=1.0, seed=3, presence_penalty=1.0)
    sequence.append(9)
    row = sequence.sample_row()
    assert (row.seed, row.index, row.prompt_ids, row.output_ids) == (sequence.seed, 1, (1, 2), (9,))
    assert sample(temperature=1.0).sample_row().prompt_ids == (), "only penalties need the history"
