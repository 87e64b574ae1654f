"""The embedded corpus: sentences of a small stochastic grammar whose entropy is known exactly.

A language model trained on it can be held against the best that any model could do. The grammar is a Markov chain:
in each state a word is drawn, and the word tells the next state. The state remembers the subject, because verbs agree
with it across a relative clause or a prepositional phrase, and because the next sentence may speak of it as "it" or
"they"; and it remembers the topic, which mostly stays from sentence to sentence and decides the nouns and verbs.
Whoever knows all the words so far knows the state, whoever knows only the last few words often does not. So memory
pays: a word costs 1.639 nats, 0.11 more where all is forgotten every 35 words, 0.14 more where it is after every
sentence.
"""

import math
import random
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import accumulate

import numpy as np

EOS = "<eos>"

# What is being said; the topic; the number of the subject; the number of the noun that is being said.
State = tuple[str, str, str, str]
# Next word -> its probability and the state after it.
Arcs = dict[str, tuple[float, State]]

_SPLITS = {"train": (60_000, 1), "validation": (6_000, 2), "test": (6_000, 3)}
_STAY = 0.85
_NUMBERS = {"one": 0.6, "many": 0.4}

# Within a list, the words' weights fall as 1, 1/2, 1/3, ... A noun's plural is formed with -s, and so is the verb that
# goes with a singular.
_TOPICS = {
    "sea": {
        "nouns": "sailor captain whale gull diver",
        "verbs": "pull load paint chart",
        "things": "net rope anchor sail map",
        "places": "harbour bay fog",
    },
    "farm": {
        "nouns": "farmer horse goat neighbour shepherd",
        "verbs": "feed plough milk gather",
        "things": "hay cart fence wheat barrel",
        "places": "field barn valley",
    },
    "town": {
        "nouns": "baker clerk tailor judge visitor",
        "verbs": "sell weigh count deliver",
        "things": "bread letter coat ledger clock",
        "places": "market court square",
    },
    "stage": {
        "nouns": "singer dancer actor poet drummer",
        "verbs": "play recite practise applaud",
        "things": "song drum mask verse curtain",
        "places": "theatre hall garden",
    },
}
_SHARED_VERBS = "see find need"
_INNER_VERBS = "like follow know help"
_PRONOUNS = {"one": "it", "many": "they"}
_DETERMINERS = {"any": "the", "one": "this one every", "many": "some these"}
_ADJECTIVES = "old small quiet tired clever red strange heavy"
_OPENERS = "today then often later sometimes"
_PREPOSITIONS = "near behind beside"
_ADVERBS = "again slowly well alone gladly"


def _arcs(state: State) -> Iterator[tuple[float, str, State]]:
    """The ways out of `state`: a probability, the words that share it, and the state after each of them."""
    place, topic, subject, _ = state

    def to(next_place: str, number: str = "") -> State:
        return next_place, topic, subject, number

    match place:
        case "start" | "opened":
            if place == "start":
                yield 0.15, _OPENERS, to("opened")
            rest = 0.85 if place == "start" else 1.0
            yield rest * 0.35, _PRONOUNS[subject], to("verb")
            yield from _determiner(rest * 0.65, to, "noun")
        case "noun" | "bare noun":
            share = 1.0
            if place == "noun":
                share = 0.75
                yield 0.25, _ADJECTIVES, to("bare noun", state[3])
            for other in _TOPICS:
                turn = _STAY if other == topic else (1 - _STAY) / (len(_TOPICS) - 1)
                for number, chance in _noun_numbers(state[3]):
                    yield share * turn * chance, _nouns(other, number), ("subject", other, number, "")
        case "subject":
            yield 0.2, "that", to("that")
            yield 0.2, _PREPOSITIONS, to("prep")
            yield from _main_verb(0.6, state)
        case "that":
            yield from _determiner(1.0, to, "inner")
        case "prep":
            yield from _determiner(1.0, to, "near")
        case "inner" | "near":
            for number, chance in _noun_numbers(state[3]):
                yield chance, _nouns(topic, number), to("inner verb", number) if place == "inner" else to("verb")
        case "inner verb":
            yield 1.0, _verbs(_INNER_VERBS, state[3]), to("verb")
        case "verb":
            yield from _main_verb(1.0, state)
        case "object":
            yield 1.0, f"the {_DETERMINERS['one']}", to("thing")
        case "thing" | "bare thing":
            if place == "thing":
                yield 0.25, _ADJECTIVES, to("bare thing")
            yield 0.75 if place == "thing" else 1.0, _TOPICS[topic]["things"], to("end")
        case "end":
            yield 0.4, EOS, to("start")
            yield 0.25, "in", to("in")
            yield 0.2, _ADVERBS, to("last")
            yield 0.15, "and", to("verb")
        case "in":
            yield 1.0, "the", to("where")
        case "where":
            yield 1.0, _TOPICS[topic]["places"], to("last")
        case "last":
            yield 1.0, EOS, to("start")


def _determiner(share: float, to, next_place: str) -> Iterator[tuple[float, str, State]]:
    for number, part in (("any", 0.55), ("one", 0.3), ("many", 0.15)):
        yield share * part, _DETERMINERS[number], to(next_place, number)


def _noun_numbers(determined: str) -> Iterable[tuple[str, float]]:
    return _NUMBERS.items() if determined == "any" else [(determined, 1.0)]


def _nouns(topic: str, number: str) -> str:
    return " ".join(noun + "s" * (number == "many") for noun in _TOPICS[topic]["nouns"].split())


def _verbs(verbs: str, number: str) -> str:
    return " ".join(verb + "s" * (number == "one") for verb in verbs.split())


def _main_verb(share: float, state: State) -> Iterator[tuple[float, str, State]]:
    _, topic, subject, _ = state
    yield share * 0.7, _verbs(_TOPICS[topic]["verbs"], subject), ("object", topic, subject, "")
    yield share * 0.3, _verbs(_SHARED_VERBS, subject), ("object", topic, subject, "")


def _build() -> dict[State, Arcs]:
    grammar: dict[State, Arcs] = {}
    waiting = [("start", "sea", "one", "")]
    while waiting:
        state = waiting.pop()
        if state in grammar:
            continue
        arcs: Arcs = {}
        for share, words, after in _arcs(state):
            ranked = words.split()
            total = sum(1 / rank for rank in range(1, len(ranked) + 1))
            arcs |= {word: (share / (rank * total), after) for rank, word in enumerate(ranked, 1)}
            waiting.append(after)
        grammar[state] = arcs
    return grammar


GRAMMAR: dict[State, Arcs] = _build()
"""Each state's next words, with their probabilities (which sum to 1) and the states they lead to."""


@cache
def _stationary() -> dict[State, float]:
    """Share of the words that are drawn in each state, in the long run."""
    numbers = {state: number for number, state in enumerate(GRAMMAR)}
    balance = -np.eye(len(GRAMMAR))  # (to, from)
    for state, arcs in GRAMMAR.items():
        for probability, after in arcs.values():
            balance[numbers[after], numbers[state]] += probability
    # The balance equations add up to zero: the last is replaced by "the shares sum to 1".
    balance[-1] = 1.0
    right = np.zeros(len(GRAMMAR))
    right[-1] = 1.0
    return dict(zip(GRAMMAR, np.linalg.solve(balance, right).tolist(), strict=True))


def _first_states() -> dict[State, float]:
    """Distribution of the state before the first word: that of the beginning of any sentence."""
    starts = {state: share for state, share in _stationary().items() if state[0] == "start"}
    total = sum(starts.values())
    return {state: share / total for state, share in starts.items()}


def grammar_entropy() -> float:
    """The exact entropy rate: nats per word, `<eos>` counted as a word.

    It is the sum over states of the share of words drawn there times the entropy of the draw. No model's expected loss
    is below it; on a finite text the loss of the grammar itself scatters around it, see `grammar_nll`.
    """
    return sum(
        -share * probability * math.log(probability)
        for state, share in _stationary().items()
        for probability, _ in GRAMMAR[state].values()
    )


def grammar_nll(lines: Iterable[str]) -> float:
    """Mean negative log-likelihood of a text under the grammar, in nats per word, the `<eos>` of each line included.

    Args:
        lines: sentences in their order, without `<eos>`.

    Raises:
        ValueError: if there are no lines, or the grammar cannot produce them.
    """
    belief = _first_states()  # several states until the topic and the subject have been named, then one
    total, count = 0.0, 0
    for number, line in enumerate(lines, 1):
        for word in [*line.split(), EOS]:
            after: dict[State, float] = {}
            for state, share in belief.items():
                if word in GRAMMAR[state]:
                    probability, following = GRAMMAR[state][word]
                    after[following] = after.get(following, 0.0) + share * probability
            likelihood = sum(after.values())
            if not after:
                raise ValueError(
                    f"lines: word {word!r} in line {number} ({line!r:.80}) cannot follow what is before it in the "
                    "grammar; expected lines of sample_grammar, in their order: leave other text out"
                )
            belief = {state: share / likelihood for state, share in after.items()}
            total -= math.log(likelihood)
            count += 1
    if not count:
        raise ValueError("lines is empty; expected at least one sentence: pass what sample_grammar returns")
    return total / count


def sample_grammar(tokens: int, seed: int) -> list[str]:
    """Draw sentences until there are at least `tokens` words, the `<eos>` of each sentence counted.

    Args:
        tokens: how many words at least, above 0.
        seed: any integer; the same sentences on every machine.

    Returns:
        The sentences in order, without `<eos>`; they hang together and must not be shuffled.

    Raises:
        ValueError: if `tokens` is below 1.
    """
    if tokens < 1:
        raise ValueError(f"tokens is {tokens}; expected at least 1: ask for as many words as the text shall have")
    # Only random() is promised to give the same numbers in every version of Python: choices() is not.
    uniform = random.Random(seed).random
    state = _draw(_first_states(), uniform())
    lines: list[str] = []
    sentence: list[str] = []
    count = 0
    while count < tokens or sentence:
        arcs = GRAMMAR[state]
        word = _draw({word: probability for word, (probability, _) in arcs.items()}, uniform())
        state = arcs[word][1]
        count += 1
        if word == EOS:
            lines.append(" ".join(sentence))
            sentence = []
        else:
            sentence.append(word)
    return lines


def _draw(distribution: dict, point: float):
    """The outcome at `point`, in [0, 1), of the cumulated probabilities; the last where rounding leaves a gap."""
    for outcome, upper in zip(distribution, accumulate(distribution.values()), strict=True):
        if point < upper:
            return outcome
    return outcome


def grammar_corpus() -> dict[str, list[str]]:
    """The embedded corpus: lines of train (about 60,000 words), validation and test (about 6,000 each)."""
    return {split: sample_grammar(tokens, seed) for split, (tokens, seed) in _SPLITS.items()}
