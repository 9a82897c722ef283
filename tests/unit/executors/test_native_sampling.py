"""What the encoder keeps from one step to the next never shows in what it makes."""

import numpy as np

from headrace.engine.sampling import SamplingParams
from headrace.engine.step import SampleRow
from headrace.executors.native_sampling import SamplingEncoder

GREEDY = SampleRow(SamplingParams(temperature=0.0, logprobs=3), 0, 0)
DRAWN = SamplingParams(temperature=0.7, top_k=5, top_p=0.9)
BIASED = SamplingParams(logit_bias={3: 1.5, 7: -2.0})
PENALIZED = SamplingParams(repetition_penalty=1.2, min_p=0.1)
STEPS = [
    (),
    (GREEDY, SampleRow(DRAWN, 11, 0)),
    (GREEDY, SampleRow(DRAWN, 11, 1)),
    (GREEDY, SampleRow(DRAWN, 2**63 + 5, 1)),
    (SampleRow(BIASED, 1, 4), GREEDY, SampleRow(PENALIZED, 5, 2, (1, 2), (3,), (9,))),
    (SampleRow(BIASED, 1, 5), GREEDY, SampleRow(PENALIZED, 5, 3, (1, 2), (3, 4))),
    (SampleRow(BIASED, 1, 6), GREEDY, SampleRow(PENALIZED, 5, 4)),
    (GREEDY,),
    (GREEDY, GREEDY),
    (),
]


def test_steps_after_one_another_are_encoded_as_by_themselves():
    encoder = SamplingEncoder()
    for rows in [step for step in STEPS for _ in range(2)]:
        for made, expected in zip(encoder.encode(rows).arrays(), SamplingEncoder().encode(rows).arrays(), strict=True):
            assert made.dtype == expected.dtype
            np.testing.assert_array_equal(made, expected)


def test_what_the_arrays_hold():
    rows = (SampleRow(BIASED, 2**63 + 5, 4, banned_ids=(8,)), SampleRow(PENALIZED, 6, 2, (1, 2), (3,)))
    encoded = SamplingEncoder().encode(rows)
    assert encoded.numbers.tolist() == [[1.0, 1.0, 0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.1, 1.2, 0.0, 0.0]]
    assert encoded.integers.tolist() == [[5 - 2**63, 4, 0, -1], [6, 2, 0, -1]]
    assert encoded.ids.tolist() == [3, 7, 8, 1, 2, 3]
    assert encoded.ends.tolist() == [0, 2, 3, 3, 3, 3, 3, 5, 6]
    assert encoded.bias.tolist() == [1.5, -2.0]
    assert encoded.num_top == 0


def test_an_impossible_row_leaves_nothing_behind():
    encoder, rows = SamplingEncoder(), STEPS[1]
    encoder.encode(rows)
    try:
        encoder.encode((GREEDY, SampleRow(DRAWN, 12, 2**70)))
    except OverflowError:
        pass
    else:
        raise AssertionError("an index of 71 bits was taken")
    assert encoder.encode(rows).integers.tolist() == SamplingEncoder().encode(rows).integers.tolist()
