"""The reference sampler: the processing order, the truncations, the random stream, logprobs, and what is refused."""

import math

import numpy as np
import pytest

from headrace.base.errors import ExecutorError
from headrace.engine.sampling import SamplingParams
from headrace.engine.step import SampleRow
from headrace.executors.sampler import Samples, sample, uniform


def row(seed: int = 0, index: int = 0, prompt=(), output=(), banned=(), **params) -> SampleRow:
    return SampleRow(SamplingParams(**params), seed, index, tuple(prompt), tuple(output), tuple(banned))


def choose(logits: list[float], *rows: SampleRow) -> list[int]:
    return sample(np.array([logits] * len(rows), dtype=np.float32), rows).token_ids.tolist()


def drawn(logits: list[float], count: int = 400, **params) -> set[int]:
    return set(choose(logits, *(row(seed=7, index=i, **params) for i in range(count))))


def log(*probabilities: float) -> list[float]:
    return [math.log(p) for p in probabilities]


class TestUniform:
    def test_is_the_published_splitmix64_stream(self) -> None:
        """First output for state 1234567, as published with the algorithm's C source: 6457827717110365317.

        A stream's state is the first output of the stream that its seed starts, so the number at (seed, 0) follows
        from that output alone.
        """
        mask, gamma = 2**64 - 1, 0x9E3779B97F4A7C15
        z = (6457827717110365317 + gamma) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        assert uniform(1234567, 0) == ((z ^ (z >> 31)) >> 11) / 2**53

    @pytest.mark.parametrize(
        ("seed", "index", "expected"),
        [
            (0, 0, 0.6524484863740322),
            (0, 1, 0.7012121095215252),
            (1, 0, 0.36818951565166946),
            (-1, 0, 0.3662420901697574),
            (2**64 - 1, 1, 0.7408050620013817),
        ],
    )
    def test_never_changes(self, seed: int, index: int, expected: float) -> None:
        """A seed that a user noted down must go on giving the same samples."""
        assert uniform(seed, index) == expected

    def test_is_uniform_along_indices_and_along_seeds(self) -> None:
        for numbers in ([uniform(3, i) for i in range(4000)], [uniform(s, 3) for s in range(4000)]):
            counts, _ = np.histogram(numbers, bins=20, range=(0, 1))
            chi_square = ((counts - 200) ** 2 / 200).sum()
            assert chi_square < 43.8, "beyond the 0.1 % quantile of 19 degrees of freedom"


class TestGreedy:
    def test_takes_the_largest_and_the_lower_id_on_a_tie(self) -> None:
        assert choose([1, 5, 3, 5], row(temperature=0.0)) == [1]

    def test_ignores_the_truncations_and_the_seed(self) -> None:
        assert choose([0, 2, 1], row(seed=5, temperature=0.0, top_k=2, top_p=0.1, min_p=0.9)) == [1]


class TestProcessing:
    def test_bias_comes_before_the_repetition_penalty(self) -> None:
        biased = row(temperature=0.0, logit_bias={0: 4.0}, repetition_penalty=2.0, prompt=[0])
        assert choose([-1, 1.6], biased) == [1], "(-1 + 4) / 2 = 1.5, not -1 * 2 + 4 = 2"

    def test_repetition_multiplies_negative_logits(self) -> None:
        penalized = row(temperature=0.0, repetition_penalty=2.0, prompt=[0])
        assert choose([-1, -1.5], penalized) == [1]
        assert choose([-1, -2.5], penalized) == [0]

    def test_repetition_counts_prompt_and_output_once(self) -> None:
        assert choose([8, 3.9], row(temperature=0.0, repetition_penalty=2.0, prompt=[0, 0], output=[0])) == [0]
        assert choose([8, 4.1], row(temperature=0.0, repetition_penalty=2.0, prompt=[0, 0], output=[0])) == [1]

    def test_repetition_counts_the_output_without_the_prompt(self) -> None:
        assert choose([8, 4.1], row(temperature=0.0, repetition_penalty=2.0, output=[0])) == [1]

    def test_presence_is_subtracted_once_and_only_for_the_output(self) -> None:
        assert choose([3, 1.9], row(temperature=0.0, presence_penalty=1.0, output=[0, 0, 0])) == [0]
        assert choose([3, 2.1], row(temperature=0.0, presence_penalty=1.0, output=[0, 0, 0])) == [1]
        assert choose([3, 2.1], row(temperature=0.0, presence_penalty=1.0, prompt=[0])) == [0]

    def test_frequency_is_subtracted_per_occurrence(self) -> None:
        assert choose([3, 0.1], row(temperature=0.0, frequency_penalty=1.0, output=[0, 0, 0])) == [1]
        assert choose([3, 0.1], row(temperature=0.0, frequency_penalty=1.0, output=[0, 0])) == [0]

    def test_a_ban_outweighs_any_bias(self) -> None:
        assert choose([0, -9], row(temperature=0.0, logit_bias={0: 100.0}, banned=[0])) == [1]

    def test_temperature_comes_before_the_truncations(self) -> None:
        # Probabilities 0.9 and 0.1 become 0.75 and 0.25 at temperature 2: only then does the second survive min-p.
        assert drawn(log(0.9, 0.1), min_p=0.2, temperature=1.0) == {0}
        assert drawn(log(0.9, 0.1), min_p=0.2, temperature=2.0) == {0, 1}


class TestTruncation:
    logits = log(0.1, 0.4, 0.3, 0.2)

    def test_none_leaves_all(self) -> None:
        assert drawn(self.logits) == {0, 1, 2, 3}

    def test_top_k(self) -> None:
        assert drawn(self.logits, top_k=2) == {1, 2}

    def test_top_k_beyond_the_vocabulary(self) -> None:
        assert drawn(self.logits, top_k=1000) == {0, 1, 2, 3}

    def test_top_k_takes_the_lower_ids_of_a_tie(self) -> None:
        logits = np.random.default_rng(0).integers(0, 2, 1000)
        lowest = np.flatnonzero(logits == 1)[:2].tolist()
        assert drawn(logits.tolist(), top_k=2) == set(lowest)

    def test_top_p_is_the_smallest_set_that_reaches_it(self) -> None:
        assert drawn(self.logits, top_p=0.69) == {1, 2}
        assert drawn(self.logits, top_p=0.71) == {1, 2, 3}

    def test_top_p_is_taken_of_what_top_k_left(self) -> None:
        # Of 0.4 and 0.3 the first is 0.57: it alone reaches 0.55, though it is 0.4 of the whole.
        assert drawn(self.logits, top_k=2, top_p=0.55) == {1}
        assert drawn(self.logits, top_p=0.55) == {1, 2}

    def test_top_p_leaves_one(self) -> None:
        assert drawn(self.logits, top_p=1e-9) == {1}

    def test_min_p_is_relative_to_the_most_likely(self) -> None:
        assert drawn(self.logits, min_p=0.6) == {1, 2}
        assert drawn(self.logits, min_p=1.0) == {1}
        assert drawn([1, 1, 0], min_p=1.0) == {0, 1}

    def test_impossible_tokens_are_never_drawn(self) -> None:
        assert drawn([-math.inf, 0, -math.inf, 0]) == {1, 3}


class TestDraw:
    def test_follows_the_distribution(self) -> None:
        probabilities = np.array([0.1, 0.4, 0.3, 0.2])
        tokens = choose(log(*probabilities), *(row(seed=11, index=i) for i in range(4000)))
        counts = np.bincount(tokens, minlength=4)
        chi_square = ((counts - 4000 * probabilities) ** 2 / (4000 * probabilities)).sum()
        assert chi_square < 16.3, "beyond the 0.1 % quantile of 3 degrees of freedom"

    def test_inverts_the_distribution_in_order_of_probability(self) -> None:
        """Step 5 of the definition, spelled out for one number: the order is 1, 2, 3, 0."""
        edges = np.cumsum([0.4, 0.3, 0.2, 0.1])
        for index in range(50):
            expected = [1, 2, 3, 0][int(np.searchsorted(edges, uniform(5, index), side="right"))]
            assert choose(log(0.1, 0.4, 0.3, 0.2), row(seed=5, index=index)) == [expected]

    def test_depends_on_seed_and_index_alone(self) -> None:
        logits = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)
        rows = [row(seed=s, index=s + 4) for s in range(3)]
        together = sample(logits, rows).token_ids.tolist()
        alone = [int(sample(logits[r : r + 1], [rows[r]]).token_ids[0]) for r in range(3)]
        assert together == alone

    def test_a_tiny_temperature_is_greedy(self) -> None:
        assert drawn([1, 1.001, 0], temperature=1e-320) == {1}


class TestLogprobs:
    logits = np.array([[2.0, -1.0, 2.0, 0.5], [1.0, 1.0, 1.0, 3.0]], dtype=np.float32)

    def sampled(self, *counts: int | None, **params) -> Samples:
        return sample(self.logits, [row(logprobs=count, temperature=0.0, **params) for count in counts])

    def test_are_raw_whatever_the_processing(self) -> None:
        made = self.sampled(0, 0, logit_bias={1: 50.0})
        exact = self.logits.astype(np.float64)
        exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
        assert made.token_ids.tolist() == [1, 1]
        np.testing.assert_array_equal(made.logprobs, exact[:, 1].astype(np.float32))

    def test_alternatives_are_best_first_and_the_lower_id_first(self) -> None:
        made = self.sampled(4, 4)
        assert made.top_ids.tolist() == [[0, 2, 3, 1], [3, 0, 1, 2]]
        assert (np.diff(made.top_logprobs) <= 0).all()
        assert np.exp(made.top_logprobs.astype(np.float64)).sum(axis=1) == pytest.approx([1, 1])

    def test_rows_that_ask_for_fewer_are_padded(self) -> None:
        made = self.sampled(1, 2)
        assert made.top_ids.tolist() == [[0, -1], [3, 0]]
        assert np.isnan(made.top_logprobs).tolist() == [[False, True], [False, False]]

    def test_rows_that_ask_for_none_get_nan(self) -> None:
        made = self.sampled(None, 0)
        assert np.isnan(made.logprobs).tolist() == [True, False]
        assert made.top_ids.shape == made.top_logprobs.shape == (2, 0)

    def test_more_than_the_vocabulary_is_padded(self) -> None:
        made = self.sampled(20, None)
        assert made.top_ids[0].tolist() == [0, 2, 3, 1] + [-1] * 16

    def test_no_rows(self) -> None:
        made = sample(np.empty((0, 4), dtype=np.float32), [])
        assert [part.shape for part in made] == [(0,), (0,), (0, 0), (0, 0)]


class TestRefusals:
    @pytest.mark.parametrize("bad", [[math.nan, 1], [math.inf, 1], [-math.inf, -math.inf]])
    def test_logits_without_a_largest(self, bad: list[float]) -> None:
        with pytest.raises(ExecutorError, match="Sampled row 1"):
            sample(np.array([[0, 1], bad], dtype=np.float32), [row(temperature=0.0)] * 2)

    def test_a_ban_does_not_hide_a_broken_logit(self) -> None:
        with pytest.raises(ExecutorError, match="nan"):
            choose([math.nan, 1], row(banned=[0]))

    def test_every_token_banned(self) -> None:
        with pytest.raises(ExecutorError, match="ban fewer"):
            choose([0, 1], row(banned=[0, 1]))

    @pytest.mark.parametrize(
        "outside",
        [
            row(logit_bias={2: 1.0}),
            row(banned=[2]),
            row(prompt=[2], repetition_penalty=2.0),
            row(output=[-1], presence_penalty=1.0),
        ],
    )
    def test_a_token_outside_the_vocabulary(self, outside: SampleRow) -> None:
        with pytest.raises(ExecutorError, match="outside the vocabulary of 2"):
            choose([0, 1], outside)
