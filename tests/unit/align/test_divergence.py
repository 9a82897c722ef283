import numpy as np
import pytest
import torch

from headrace.align.divergence import divergence_of, log_softmax, summarize

RNG = np.random.default_rng(0)


def logits_of(rows, vocab=50):
    return (3 * RNG.standard_normal((rows, vocab))).astype(np.float32)


def test_every_figure_is_torchs():
    reference, other, ids = logits_of(70), logits_of(70), RNG.integers(0, 50, 70).tolist()
    found = divergence_of(reference, other, ids)
    p, q = (torch.distributions.Categorical(logits=torch.from_numpy(x[:-1]).double()) for x in (reference, other))
    following = torch.tensor(ids[1:])
    np.testing.assert_allclose(found.kl, torch.distributions.kl_divergence(p, q), rtol=1e-9)
    np.testing.assert_allclose(found.reference_logprob, p.log_prob(following), rtol=1e-9)
    np.testing.assert_allclose(found.logprob_delta, q.log_prob(following) - p.log_prob(following), atol=1e-9)
    np.testing.assert_array_equal(found.top1_same, p.probs.argmax(-1) == q.probs.argmax(-1))


def test_a_model_beside_itself_differs_in_nothing():
    logits = logits_of(40)
    found = summarize([divergence_of(logits, logits, [1] * 40)])
    assert (found.kl_max, found.logprob_delta_max, found.top1_agreement) == (0, 0, 1)
    assert found.perplexity == found.reference_perplexity


def test_every_position_of_every_text_counts_alike():
    long, short = logits_of(100), logits_of(3)
    texts = [divergence_of(x, x + RNG.standard_normal(x.shape).astype(np.float32), [0] * len(x)) for x in (long, short)]
    found = summarize(texts)
    kl = np.concatenate([text.kl for text in texts])
    assert found.num_positions == 99 + 2
    assert found.kl_mean == pytest.approx(kl.mean())
    assert found.kl_p99 == pytest.approx(np.percentile(kl, 99))


def test_an_impossible_token_adds_nothing_and_a_lost_one_is_infinite():
    reference = np.zeros((2, 4), np.float32)
    reference[:, 3] = -np.inf
    assert divergence_of(reference, reference, [0, 1]).kl.tolist() == [0]
    assert divergence_of(np.zeros_like(reference), reference, [0, 1]).kl.tolist() == [np.inf]


def test_log_softmax_of_huge_logits_is_finite():
    rows = log_softmax(np.array([[3e38, -3e38], [1e-3, 0]], np.float32))
    assert np.isfinite(rows[1]).all()
    assert rows[0, 0] == 0
