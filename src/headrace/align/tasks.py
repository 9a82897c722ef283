"""Small tasks that a small model can partly do, made from a seed and from texts that calibration never sees.

Every item is a prompt and a few continuations, of which one is right. Nothing is downloaded, and nothing is asked for
that a base model would not know how to answer. The tasks find what perplexity averages away: copying, looking up,
counting, remembering.
"""

import ast
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from headrace.align.corpus import texts

ITEMS = 60
"""Of each task."""

_FACTS = """
The capital of France is: Paris | Rome | Madrid | Vienna
The capital of Japan is: Tokyo | Beijing | Seoul | Bangkok
The capital of Italy is: Rome | Paris | Lisbon | Athens
The capital of Germany is: Berlin | Warsaw | Prague | Vienna
The capital of Spain is: Madrid | Lisbon | Paris | Rome
The capital of Egypt is: Cairo | Tunis | Nairobi | Baghdad
The capital of Russia is: Moscow | Kiev | Warsaw | Helsinki
The capital of Greece is: Athens | Rome | Sofia | Ankara
The opposite of hot is: cold | warm | wet | soft
The opposite of big is: small | large | tall | wide
The opposite of fast is: slow | quick | high | strong
The opposite of light is: dark | bright | white | thin
The opposite of happy is: sad | glad | calm | nice
The opposite of up is: down | over | above | high
The opposite of old is: young | aged | tall | short
The opposite of full is: empty | whole | round | deep
The opposite of early is: late | soon | first | always
The opposite of rich is: poor | wealthy | famous | clever
The color of the sky on a clear day is: blue | green | red | brown
The color of grass is: green | blue | pink | orange
The color of snow is: white | black | green | red
The color of blood is: red | blue | yellow | grey
The color of a ripe banana is: yellow | purple | blue | white
A baby dog is called a: puppy | kitten | calf | chick
A baby cat is called a: kitten | puppy | lamb | cub
A baby cow is called a: calf | foal | kitten | chick
A baby sheep is called a: lamb | puppy | foal | duckling
The day after Monday is: Tuesday | Sunday | Friday | Thursday
The day after Friday is: Saturday | Monday | Wednesday | Thursday
The day before Wednesday is: Tuesday | Thursday | Sunday | Monday
The month after January is: February | March | December | June
The month after June is: July | August | May | April
The first month of the year is: January | March | December | July
The last month of the year is: December | November | January | September
Water freezes into: ice | steam | sand | oil
When water boils it becomes: steam | ice | snow | dust
Bees make: honey | milk | wool | silk
Cows give: milk | honey | eggs | wool
Hens lay: eggs | stones | seeds | leaves
The sun rises in the: east | west | north | south
The sun sets in the: west | east | north | south
The largest planet in our solar system is: Jupiter | Mars | Venus | Mercury
The planet that we live on is: Earth | Mars | Saturn | Venus
The planet known as the red planet is: Mars | Venus | Neptune | Saturn
A triangle has three: sides | wheels | wings | colors
A week has seven: days | hours | months | years
A year has twelve: months | days | weeks | hours
An hour has sixty: minutes | days | seconds of arc | weeks
People see with their: eyes | ears | hands | knees
People hear with their: ears | eyes | noses | feet
People smell with their: noses | ears | elbows | eyes
Fish live in: water | trees | deserts | clouds
Birds fly with their: wings | beaks | claws | tails
Spiders spin: webs | nests | shells | hives
A person who teaches in a school is a: teacher | baker | pilot | farmer
A person who flies planes is a: pilot | teacher | tailor | miner
A person who bakes bread is a: baker | doctor | sailor | judge
A person who treats sick people is a: doctor | painter | farmer | singer
The author of Hamlet is William: Shakespeare | Wordsworth | Blake | Yeats
The theory of relativity is due to Albert: Einstein | Newton | Darwin | Curie
"""
_NAMES = (
    "Anna", "Boris", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Irene", "James", "Karen", "Louis", "Maria",
    "Nora", "Oscar", "Paula",
)  # fmt: skip
_SENTENCE = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True, slots=True)
class Item:
    """A question: `prompt`, and continuations that differ from each other, the right one at `answer`."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


def suite(seed: int = 0) -> dict[str, list[Item]]:
    """All tasks by name, `ITEMS` items of each; the same for the same seed and Python release."""
    return {name: _first(make(random.Random(f"{name} {seed}"))) for name, make in _TASKS.items()}


def _first(items: Iterator[Item]) -> list[Item]:
    return [item for item, _ in zip(items, range(ITEMS), strict=False)]


def _item(draw: random.Random, prompt: str, right: str, wrong: list[str]) -> Item:
    choices = [right, *wrong]
    draw.shuffle(choices)
    return Item(prompt, tuple(choices), choices.index(right))


def _facts(draw: random.Random) -> Iterator[Item]:
    """What everybody knows."""
    lines = _FACTS.strip().splitlines()
    draw.shuffle(lines)
    for line in lines:
        question, _, answers = line.partition(":")
        right, *wrong = (f" {answer.strip()}" for answer in answers.split("|"))
        yield _item(draw, question, right, wrong)


def _sums(draw: random.Random) -> Iterator[Item]:
    """Sums of small numbers, after three that are solved."""
    while True:
        pairs = [(draw.randint(2, 20), draw.randint(2, 20)) for _ in range(4)]
        (a, b), total = pairs[-1], sum(pairs[-1])
        solved = "".join(f"{x} + {y} = {x + y}\n" for x, y in pairs[:-1])
        wrong = draw.sample([n for n in range(total - 5, total + 6) if n != total and n > 0], 3)
        yield _item(draw, f"{solved}{a} + {b} =", f" {total}", [f" {n}" for n in wrong])


def _look_up(draw: random.Random) -> Iterator[Item]:
    """One of eight numbers that were said before."""
    while True:
        names = draw.sample(_NAMES, 8)
        numbers = draw.sample(range(100, 1000), 8)
        said = " ".join(f"The number of {name} is {number}." for name, number in zip(names, numbers, strict=True))
        asked = draw.randrange(8)
        wrong = draw.sample([f" {n}" for i, n in enumerate(numbers) if i != asked], 3)
        yield _item(draw, f"{said} The number of {names[asked]} is", f" {numbers[asked]}", wrong)


def _copying(draw: random.Random) -> Iterator[Item]:
    """What came next the first time, in a list of words without sense."""
    words = sorted({word for text in texts("held_out") for word in re.findall(r"\b[a-z]{4,7}\b", text)})
    while True:
        listed = draw.sample(words, 16)
        at = draw.randrange(4, 14)
        wrong = draw.sample([f" {word}" for i, word in enumerate(listed) if i not in (at, at - 1)], 3)
        yield _item(draw, " ".join([*listed, *listed[:at]]), f" {listed[at]}", wrong)


def _word_order(draw: random.Random) -> Iterator[Item]:
    """A sentence, or the same with two neighbouring words exchanged."""
    for sentence in _sentences(draw):
        words = sentence.split(" ")
        places = [i for i in range(3, len(words) - 2) if words[i].isalpha() and words[i + 1].isalpha()]
        if len(places) < 3:
            continue
        at = draw.choice(places)
        swapped = [*words[:at], words[at + 1], words[at], *words[at + 2 :]]
        if swapped != words:
            yield _item(draw, words[0], " " + " ".join(words[1:]), [" " + " ".join(swapped[1:])])


def _next_word(draw: random.Random) -> Iterator[Item]:
    """The word that a document goes on with, or another of its words."""
    for sentence in _sentences(draw):
        words = sentence.split(" ")
        places = [i for i in range(len(words) // 2, len(words)) if words[i].isalpha() and len(words[i]) > 3]
        if not places:
            continue
        at = draw.choice(places)
        others = sorted({word for word in words[:at] if word.isalpha() and len(word) > 3} - {words[at]})
        if len(others) >= 3:
            yield _item(draw, " ".join(words[:at]), f" {words[at]}", [f" {word}" for word in draw.sample(others, 3)])


def _code(draw: random.Random) -> Iterator[Item]:
    """The line that a function goes on with, or another of the same module."""
    modules = [text.splitlines() for text in texts("held_out") if _is_code(text)]
    while True:
        lines = draw.choice(modules)
        at = draw.randrange(8, len(lines))
        candidates = [line for line in lines if 12 <= len(line.strip()) <= 60 and not line.strip().startswith("#")]
        if lines[at] in candidates and all(line.strip() for line in lines[at - 4 : at]):
            wrong = draw.sample(sorted(set(candidates) - {lines[at]}), 3)
            yield _item(draw, "\n".join(lines[at - 6 : at]), f"\n{lines[at]}", [f"\n{line}" for line in wrong])


def _sentences(draw: random.Random) -> Iterator[str]:
    """Of the held-out prose, in any order, none twice."""
    prose = [text for text in texts("held_out") if not _is_code(text)]
    found = {
        " ".join(sentence.split())
        for text in prose
        for paragraph in text.split("\n\n")
        if not paragraph.startswith(" ")  # code and lists are indented
        for sentence in _SENTENCE.split(paragraph)
    }
    seen = " ".join(" ".join(text.split()) for text in texts("calibration"))  # documents repeat each other
    chosen = sorted(each for each in found if 8 <= len(each.split()) <= 30 and each not in seen)
    draw.shuffle(chosen)
    return iter(chosen)


def _is_code(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


_TASKS: dict[str, Callable[[random.Random], Iterator[Item]]] = {
    "facts": _facts,
    "sums": _sums,
    "look-up": _look_up,
    "copying": _copying,
    "word order": _word_order,
    "next word": _next_word,
    "code": _code,
}
