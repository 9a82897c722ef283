import pytest

from headrace.bench.workloads import Batch, least_steps, mixed, shared_prefix, uniform
from headrace.graph.cost import SequenceWork, Workload


def test_the_same_seed_gives_the_same_tokens_and_another_gives_others():
    assert uniform(3, 20, 5, 49152) == uniform(3, 20, 5, 49152)
    assert uniform(3, 20, 5, 49152) != uniform(3, 20, 5, 49152, seed=1)
    assert mixed(4, 49152) == mixed(4, 49152)


def test_uniform_prompts_differ_and_keep_clear_of_special_tokens():
    batch = uniform(8, 16, 4, 49152)
    assert len(set(batch.prompts)) == 8
    assert all(1_000 <= token < 40_000 for prompt in batch.prompts for token in prompt)
    assert batch.lengths == (4,) * 8
    assert batch.longest == 20
    assert batch.num_output_tokens == 32
    assert batch.with_lengths(1).num_output_tokens == 8


def test_a_small_vocabulary_has_room():
    assert all(48 <= token < 96 for token in uniform(1, 100, 1, 96).prompts[0])


def test_mixed_lengths_lie_in_their_ranges():
    batch = mixed(50, 1000, prompt_lens=(2, 9), output_lens=(3, 4))
    assert {len(prompt) for prompt in batch.prompts} <= set(range(2, 10))
    assert set(batch.lengths) == {3, 4}


def test_a_shared_prefix_is_shared_by_all_seeds_and_nothing_else_is():
    first, second = shared_prefix(3, 16, 8, 2, 1000, seed=0), shared_prefix(3, 16, 8, 2, 1000, seed=1)
    prompts = first.prompts + second.prompts
    assert len({prompt[:16] for prompt in prompts}) == 1
    assert len({prompt[16:] for prompt in prompts}) == 6


def test_least_steps_fill_the_budget_and_then_decode_whoever_goes_on():
    batch = Batch(((1,) * 6, (2,) * 3), (3, 5))
    assert least_steps(batch, max_batched_tokens=8) == [
        (1, work((6, 6), (2, 2), sampled=1)),
        (1, work((1, 3), sampled=1)),
        (2, work((1, 8), (1, 5), sampled=2)),
        (2, work((1, 7), sampled=1)),
    ]


def test_least_steps_compute_what_is_not_cached():
    batch = Batch(((1,) * 6, (1,) * 4), (1, 1))
    assert least_steps(batch, max_batched_tokens=8, cached=4) == [(1, work((2, 6), (1, 4), sampled=2))]


@pytest.mark.parametrize("budget", [1, 7, 64, 2048])
def test_least_steps_compute_every_token_once(budget):
    batch = mixed(5, 1000, prompt_lens=(2, 90), output_lens=(2, 30))
    steps = least_steps(batch, budget)
    computed = sum(count * sum(each.new_tokens for each in step.sequences) for count, step in steps)
    assert computed == sum(map(len, batch.prompts)) + batch.num_output_tokens - 5, "the last tokens are never fed back"


def work(*sequences, sampled):
    parts = tuple(SequenceWork(new_tokens=new, context_len=context) for new, context in sequences)
    return Workload(sequences=parts, sampled_rows=sampled)
