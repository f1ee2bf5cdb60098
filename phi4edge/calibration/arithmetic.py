"""Word problems with worked solutions, made from our own sentences and seeded numbers.

A kind of problem is a function from a generator to a question, the steps of its solution and the answer; every step
is an equation that holds. The same kind never stands in both halves of a corpus.
"""

from __future__ import annotations

__all__ = ["PROBLEMS", "problems"]

import random
from collections.abc import Callable, Iterator
from fractions import Fraction

from phi4edge.calibration.sources import Document

_EACH = 120  # problems of a kind
_NAMES = ("Amina", "Bruno", "Chen", "Dalia", "Emeka", "Freya", "Goran", "Hana", "Ivo", "Joana", "Kofi", "Leila")
_GOODS = ("notebooks", "apples", "tickets", "light bulbs", "boxes of tea", "postcards", "batteries", "plants")

Worked = tuple[str, list[str], str]


def _shopping(r: random.Random) -> Worked:
    name, goods = r.choice(_NAMES), r.choice(_GOODS)
    count, price = r.randint(3, 25), r.randint(2, 40)
    paid = count * price + r.randint(1, 200)
    question = (
        f"{name} buys {count} {goods} at {price} dollars each and pays with {paid} dollars. How much change is due?"
    )
    steps = [
        f"The {goods} cost {count} * {price} = {count * price} dollars.",
        f"The change is {paid} - {count * price} = {paid - count * price} dollars.",
    ]
    return question, steps, f"{paid - count * price} dollars"


def _travel(r: random.Random) -> Worked:
    hours, speed, more, slower = r.randint(2, 6), r.randrange(40, 125, 5), r.randint(1, 4), r.randrange(20, 40, 5)
    first, second = hours * speed, more * slower
    question = (
        f"A train runs for {hours} hours at {speed} km/h and then, on a track under repair, for {more} hours at "
        f"{slower} km/h. What is its mean speed over the whole way?"
    )
    mean = Fraction(first + second, hours + more)
    steps = [
        f"On the first part it covers {hours} * {speed} = {first} km.",
        f"On the second part it covers {more} * {slower} = {second} km.",
        f"In all that is {first} + {second} = {first + second} km.",
        f"It takes {hours} + {more} = {hours + more} hours.",
        f"The mean speed is {first + second} / {hours + more} = {mean} km/h.",
    ]
    return question, steps, f"{mean} km/h"


def _percentage(r: random.Random) -> Worked:
    price, off = r.randrange(40, 900, 20), r.randrange(5, 60, 5)
    saved = price * off // 100
    question = f"A coat at {price} euros is sold {off} % cheaper. What does it cost now?"
    steps = [
        f"One percent of {price} is {price} / 100 = {Fraction(price, 100)}.",
        f"The reduction is {Fraction(price, 100)} * {off} = {Fraction(price * off, 100)} euros.",
        f"What is left is {price} - {Fraction(price * off, 100)} = {Fraction(price * (100 - off), 100)} euros.",
    ]
    assert saved * 100 == price * off, "multiples of 20 and 5 leave whole euros"
    return question, steps, f"{price - saved} euros"


def _linear_equation(r: random.Random) -> Worked:
    a, x, b = r.randint(2, 12), r.randint(1, 30), r.randint(1, 60)
    question = f"Solve {a}x + {b} = {a * x + b} for x."
    steps = [
        f"Take {b} from both sides: {a}x = {a * x}, since {a * x + b} - {b} = {a * x}.",
        f"Divide both sides by {a}: {a * x} / {a} = {x}.",
    ]
    return question, steps, f"x = {x}"


def _two_unknowns(r: random.Random) -> Worked:
    small, more = r.randint(4, 60), r.randint(2, 30)
    total, name, other = 2 * small + more, *r.sample(_NAMES, 2)
    question = (
        f"{name} and {other} have collected {total} shells together. {name} has {more} more than {other}. "
        f"How many has each?"
    )
    steps = [
        f"Without those {more}, both would have the same: {total} - {more} = {2 * small} shells together.",
        f"Each would have {2 * small} / 2 = {small}.",
        f"{name} has {small} + {more} = {small + more}.",
    ]
    return question, steps, f"{name} has {small + more}, {other} has {small}"


def _rectangle(r: random.Random) -> Worked:
    width, length, paint = r.randint(3, 20), r.randint(5, 40), r.randint(2, 9)
    area = width * length
    question = (
        f"A floor is {length} m long and {width} m wide. One can of varnish covers {paint} square metres. "
        "How many cans have to be bought?"
    )
    cans = -(-area // paint)
    steps = [f"The floor has {length} * {width} = {area} square metres."]
    if area % paint:
        steps.append(f"{cans - 1} cans cover {cans - 1} * {paint} = {(cans - 1) * paint} square metres, not enough.")
    steps.append(f"{cans} cans cover {cans} * {paint} = {cans * paint} square metres, which is enough.")
    return question, steps, f"{cans} cans"


def _fractions(r: random.Random) -> Worked:
    a, b = Fraction(r.randint(1, 9), r.randint(2, 12)), Fraction(r.randint(1, 9), r.randint(2, 12))
    common = a.denominator * b.denominator
    left, right = a.numerator * b.denominator, b.numerator * a.denominator
    question = f"What is {a} + {b} as a fraction in lowest terms?"
    steps = [
        f"Bring both over {a.denominator} * {b.denominator} = {common}.",
        f"The numerators are {a.numerator} * {b.denominator} = {left} and {b.numerator} * {a.denominator} = {right}.",
        f"Their sum is {left} + {right} = {left + right}, so the result is {left + right}/{common}.",
        f"In lowest terms, {left + right} / {common} = {a + b}.",
    ]
    return question, steps, str(a + b)


def _sequence(r: random.Random) -> Worked:
    first, step, n = r.randint(1, 40), r.randint(2, 15), r.randint(8, 60)
    last = first + (n - 1) * step
    question = f"An arithmetic sequence starts {first}, {first + step}, {first + 2 * step}. Add up its first {n} terms."
    steps = [
        f"The difference is {first + step} - {first} = {step}.",
        f"To the last term there are {n} - 1 = {n - 1} steps, which is {n - 1} * {step} = {last - first}.",
        f"The last term is {first} + {last - first} = {last}.",
        f"First and last together are {first} + {last} = {first + last}.",
        f"The sum is {n} * {first + last} / 2 = {n * (first + last) // 2}.",
    ]
    return question, steps, str(n * (first + last) // 2)


def _mean(r: random.Random) -> Worked:
    values = [r.randint(40, 100) for _ in range(r.randint(3, 6))]
    wanted = r.randint(60, 90)
    needed = wanted * (len(values) + 1) - sum(values)
    listed = ", ".join(map(str, values))
    question = (
        f"{r.choice(_NAMES)}'s results so far are {listed}. Which result in the next test makes the mean exactly "
        f"{wanted}?"
    )
    steps = [
        f"So far there are {' + '.join(map(str, values))} = {sum(values)} points.",
        f"{len(values) + 1} tests with a mean of {wanted} make {len(values) + 1} * {wanted} = "
        f"{wanted * (len(values) + 1)} points.",
        f"What is missing is {wanted * (len(values) + 1)} - {sum(values)} = {needed}.",
    ]
    return question, steps, f"{needed} points"


def _interest(r: random.Random) -> Worked:
    capital, rate = r.randrange(10000, 90000, 10000), r.randint(2, 8)
    first = capital * rate // 100
    second = (capital + first) * rate // 100  # whole, as capitals are multiples of 10,000
    question = (
        f"{capital} francs are put aside at {rate} % a year, and the interest stays in the account. What is there "
        "after two years?"
    )
    steps = [
        f"In the first year {capital} * {rate} / 100 = {first} francs of interest are added.",
        f"That makes {capital} + {first} = {capital + first} francs.",
        f"In the second year {capital + first} * {rate} / 100 = {second} francs are added.",
        f"In the end there are {capital + first} + {second} = {capital + first + second} francs.",
    ]
    return question, steps, f"{capital + first + second} francs"


def _clock(r: random.Random) -> Worked:
    start, minutes = r.randint(6 * 60, 12 * 60), r.randint(35, 400)
    end = start + minutes
    question = (
        f"A film festival begins at {start // 60}:{start % 60:02d} and lasts {minutes} minutes. When does it end?"
    )
    steps = [
        f"The beginning is {start // 60} * 60 + {start % 60} = {start} minutes after midnight.",
        f"The end is {start} + {minutes} = {end} minutes after midnight.",
        f"That is {end // 60} hours, {end // 60} * 60 = {end // 60 * 60} minutes, and {end} - {end // 60 * 60} = "
        f"{end % 60} minutes more.",
    ]
    return question, steps, f"{end // 60}:{end % 60:02d}"


def _long_sum(r: random.Random) -> Worked:
    a, b, c, d = r.randint(12, 99), r.randint(12, 99), r.randint(100, 999), r.randint(2, 9)
    tens, ones = b // 10 * 10, b % 10
    question = f"Compute {a} * {b} + {c} * {d} without a calculator, step by step."
    steps = [
        f"{a} * {tens} = {a * tens}.",
        f"{a} * {ones} = {a * ones}.",
        f"Together {a * tens} + {a * ones} = {a * b}.",
        f"{c} * {d} = {c * d}.",
        f"The sum is {a * b} + {c * d} = {a * b + c * d}.",
    ]
    return question, steps, str(a * b + c * d)


PROBLEMS: dict[str, Callable[[random.Random], Worked]] = {
    "shopping": _shopping,
    "travel": _travel,
    "percentage": _percentage,
    "linear-equation": _linear_equation,
    "two-unknowns": _two_unknowns,
    "rectangle": _rectangle,
    "fractions": _fractions,
    "sequence": _sequence,
    "mean": _mean,
    "interest": _interest,
    "clock": _clock,
    "long-sum": _long_sum,
}


def problems(kind: str) -> Iterator[Document]:
    """Chats of one question and its worked solution, the same ones every time."""
    for number in range(_EACH):
        question, steps, answer = PROBLEMS[kind](random.Random(f"{kind} {number}"))
        solution = "\n".join([*steps, f"The answer is {answer}."])
        turns = ({"role": "user", "content": question}, {"role": "assistant", "content": solution})
        yield Document(f"{question}\n{solution}\n\n", turns)
