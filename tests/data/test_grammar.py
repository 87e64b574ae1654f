"""The embedded corpus: its entropy is exact, its sentences obey the grammar, and memory pays."""

import math
from collections import Counter

import pytest

from born_again.data.grammar import EOS, GRAMMAR, grammar_corpus, grammar_entropy, grammar_nll, sample_grammar

SAMPLE = sample_grammar(150_000, seed=11)


def words_of(lines: list[str]) -> list[str]:
    return [word for line in lines for word in (*line.split(), EOS)]


def test_every_state_is_a_distribution_and_reaches_a_state():
    for state, arcs in GRAMMAR.items():
        assert math.isclose(sum(probability for probability, _ in arcs.values()), 1.0, abs_tol=1e-12), state
        assert all(probability > 0 and after in GRAMMAR for probability, after in arcs.values())
        assert (EOS in arcs) == (state[0] in ("end", "last"))


@pytest.fixture(scope="module")
def shares() -> dict:
    """Share of the words drawn in each state in the long run, by following the chain word for word."""
    shares = {("start", "sea", "one", ""): 1.0}
    for _ in range(2_000):
        following: dict = {}
        for state, share in shares.items():
            for probability, after in GRAMMAR[state].values():
                following[after] = following.get(after, 0.0) + share * probability
        shares = following
    return shares


def test_entropy_is_that_of_the_chain_followed_for_long(shares):
    entropy = -sum(
        share * probability * math.log(probability)
        for state, share in shares.items()
        for probability, _ in GRAMMAR[state].values()
    )
    assert math.isclose(grammar_entropy(), entropy, rel_tol=1e-9)


@pytest.mark.parametrize("first", [0, 1, 2, 3, 40])
def test_likelihood_is_the_sum_over_what_may_have_come_before(shares, first):
    """With the distributions of all states, this makes it a distribution over texts."""
    starts = {state: share for state, share in shares.items() if state[0] == "start"}
    lines = SAMPLE[first : first + 3]
    likelihood = 0.0
    for state, share in starts.items():
        path = share / sum(starts.values())
        for word in words_of(lines):
            probability, state = GRAMMAR[state].get(word, (0.0, state))
            path *= probability
        likelihood += path
    assert math.isclose(grammar_nll(lines), -math.log(likelihood) / len(words_of(lines)), rel_tol=1e-9)


def test_entropy_is_the_mean_loss_of_a_long_sample():
    assert grammar_nll(SAMPLE) == pytest.approx(grammar_entropy(), rel=0.01)


def ngram_loss(words: list[str], order: int) -> float:
    """Loss of the n-gram model fitted on these very words: no n-gram model does better on them."""
    grams = Counter(zip(*(words[start:] for start in range(order)), strict=False))
    contexts: Counter = Counter()
    for gram, count in grams.items():
        contexts[gram[:-1]] += count
    return -sum(count * math.log(count / contexts[gram[:-1]]) for gram, count in grams.items()) / grams.total()


def test_memory_pays():
    words = words_of(SAMPLE)
    assert grammar_entropy() + 0.2 < ngram_loss(words, 3) < ngram_loss(words, 2) < ngram_loss(words, 1)
    # Forgetting at every sentence costs too: the topic and the subject carry over.
    apart = sum(grammar_nll([line]) * (len(line.split()) + 1) for line in SAMPLE[:3_000])
    together = grammar_nll(SAMPLE[:3_000]) * len(words_of(SAMPLE[:3_000]))
    assert apart > together + 0.1 * len(words_of(SAMPLE[:3_000]))


def test_sentences_agree_with_their_subject():
    checked = Counter()
    for line in SAMPLE:
        words = line.split()
        if words[0] in ("it", "they"):
            assert words[1].endswith("s") == (words[0] == "it"), line
            checked[words[0]] += 1
        if "that" in words[:5]:
            subject = words[words.index("that") - 1]
            inner = words[words.index("that") + 2 : words.index("that") + 4]
            assert inner[0].endswith("s") != inner[1].endswith("s"), line
            assert subject.endswith("s") != words[words.index("that") + 4].endswith("s"), line
            checked["that"] += 1
    assert min(checked.values()) > 200 and len(checked) == 3


def test_pronoun_refers_to_the_last_subject():
    plural = None
    for line in SAMPLE:
        words = [word for word in line.split() if word not in ("today", "then", "often", "later", "sometimes")]
        if words[0] in ("it", "they"):
            assert plural is None or plural == (words[0] == "they")
        else:
            plural = words[1 + (words[1] in "old small quiet tired clever red strange heavy".split())].endswith("s")


def test_corpus_has_its_sizes_and_one_vocabulary():
    corpus = grammar_corpus()
    words = {split: words_of(lines) for split, lines in corpus.items()}
    assert {split: len(ids) for split, ids in words.items()} == {"train": 60_004, "validation": 6_005, "test": 6_001}
    assert set(words["train"]) == {word for arcs in GRAMMAR.values() for word in arcs}
    assert set(words["validation"]) | set(words["test"]) <= set(words["train"])
    assert "<unk>" not in words["train"]
    assert 60 <= len(set(words["train"])) <= 200
    assert 8 <= len(words["train"]) / len(corpus["train"]) <= 12
    assert corpus["validation"] != corpus["test"]
    for split, lines in corpus.items():
        assert grammar_nll(lines) == pytest.approx(grammar_entropy(), abs=0.03), split


def test_samples_depend_on_the_seed_alone():
    assert sample_grammar(500, seed=4) == sample_grammar(500, seed=4)
    assert sample_grammar(500, seed=4) != sample_grammar(500, seed=5)
    longer = sample_grammar(900, seed=4)
    assert longer[: len(sample_grammar(500, seed=4))] == sample_grammar(500, seed=4)
    # The same on every machine.
    assert sample_grammar(20, seed=4) == [
        "often the quiet horse feeds every fence slowly",
        "the sailors that the sailor helps see one anchor",
        "they chart one sail and pull this rope in the harbour",
    ]


def test_a_sample_is_just_long_enough():
    lines = sample_grammar(100, seed=0)
    assert len(words_of(lines)) >= 100 > len(words_of(lines[:-1]))
    assert len(sample_grammar(1, seed=0)) == 1


def test_refusals():
    with pytest.raises(ValueError, match="tokens is 0; expected at least 1"):
        sample_grammar(0, seed=1)
    with pytest.raises(ValueError, match="lines is empty; expected at least one sentence"):
        grammar_nll([])
    with pytest.raises(ValueError, match="word 'pull' in line 2 .*cannot follow .*leave other text out"):
        grammar_nll(["it pulls the net", "it pull the net"])
    with pytest.raises(ValueError, match="word '<eos>' in line 1"):
        grammar_nll(["it pulls the"])
