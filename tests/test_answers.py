r"""answers.py, function by function: spellings, tokens, values and comparisons decided by hand, and laws.

What an independent hand can compute is computed here once more: number words by a speller of our own, repeating
decimals by Fraction, roots by decimal's power, sines and logarithms by mpmath (it comes with torch's sympy).

    pytest tests/test_answers.py
"""
import decimal
import random
import re
import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import mpmath
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import answers  # noqa: E402
import reward  # noqa: E402
from answers import PRECISE, Group, Number, read, same, spelled, tokenise  # noqa: E402
from reward import is_equal, normalise, understand  # noqa: E402


@pytest.fixture(autouse=True)
def precise():
    """The parts below `read` and above `same` count on the caller's context, as is_equal's."""
    with decimal.localcontext(PRECISE):
        yield


def number(x, decimals=0, *units, name="", exact=None):
    return Number(Decimal(x), decimals, tuple(sorted(units)), name, None if exact is None else Decimal(exact))


def group(brackets, *items, name=""):
    return Group(brackets, [item if isinstance(item, (str, tuple)) else number(item) for item in items], name)


def value(answer):
    return reward.value_of(normalise(answer))


def refuses(function, *arguments):
    with pytest.raises(ArithmeticError):
        function(*arguments)


def cases(table):
    return pytest.mark.parametrize("answer, wanted", table, ids=[f"{answer} | {wanted}" for answer, wanted in table])


# ---- normalise, and the functions it is made of

@cases([
    (r"\text{cm}", "cm"), (r"\mathrm{\mathbf{5}}", "5"), (r"\textbf {5}", "5"), (r"\mbox{B}", "B"), (r"\boldsymbol{x}", "x"),
    (r"\operatorname{lcm}", "lcm"), (r"\underline{5}", "5"), (r"\color{blue}5", "5"), (r"\textcolor{red}{5}", "{5}"),
    ("**5** cm", "5 cm"), (r"5\text{ cm}^2", "5 cm ^2"), (r"\frac{1}{2}", r"\frac{1}{2}"), (r"\sqrt{x}", r"\sqrt{x}"), ("5", "5"),
    (r"\text{a}b", "a b")])
def test_unwrapped(answer, wanted):
    assert " ".join(answers.unwrapped(answer).split()) == wanted


@cases([
    ("B because it is big", "B"), ("5, since 2+3=5", "5"), ("5, as\nshown", "5"), ("5，因为大", "5"), ("5 because\n1\n2", "5"),
    ("B, which is big", "B"), ("5 which is 2+3", "5"), ("20 (in metres)", "20"), ("20 (in metres).", "20"),
    # what an aside denies or leaves open is no reason
    ("20 (wrong)", "20 (wrong)"), ("20 (or 30 cm)", "20 (or 30 cm)"), ("20, which is not right", "20, which is not right"),
    ("20, which may be right", "20, which may be right"),
    # no reasons at all
    ("basis", "basis"), ("5 (a)", "5 (a)"), (r"5 (\alpha)", r"5 (\alpha)"), ("f(ab)", "f(ab)"), ("5 (ab) x", "5 (ab) x"),
    ("5 for it", "5 for it")])
def test_without_reason(answer, wanted):
    assert reward.without_reason(answer) == wanted


@cases([
    ("zero", "0"), ("seven", "7"), ("FIVE", "5"), ("Twenty-One", "21"), ("twenty one", "21"), ("nineteen", "19"),
    ("ninety", "90"),
    ("three hundred", "300"), ("one hundred and five", "105"), ("one-hundred", "100"), ("hundred", "100"),
    ("nineteen hundred", "1900"),
    ("two thousand five hundred", "2500"), ("five thousand and twenty", "5020"), ("ten thousand", "10000"),
    ("one million", "1000000"),
    ("two million three hundred one", "2000301"), ("thirty-two apples", "32 apples"), ("three and five", "3 and 5"),
    ("five or six", "5 or 6"), ("one hundred and", "100 and"),
    # no numbers
    ("five six", "five six"), ("twenty ten", "twenty ten"), ("ten five", "ten five"), ("twenty-eleven", "twenty-eleven"),
    ("one hundred one hundred", "one hundred one hundred"), ("hundred hundred", "hundred hundred"), ("two-three", "two-three"),
    ("one thousand three million", "one thousand three million"), ("twenty one two", "twenty one two"), ("someone", "someone"),
    ("phone", "phone"), ("tens", "tens"), ("sixth", "sixth"), ("weight", "weight"),
    # Chinese, where it counts something or ends the answer
    ("零", "0"), ("三", "3"), ("十", "10"), ("十五", "15"), ("二十", "20"), ("三十二", "32"), ("一百", "100"), ("一百零五", "105"),
    ("一百二十三", "123"), ("一千零一", "1001"), ("两千", "2000"), ("三万", "30000"), ("三万二千", "32000"), ("两個", "2個"),
    ("一个", "1个"), ("十二条边", "12条边"), ("五度", "5度"), ("九辆车", "9辆车"), ("三。", "3。"),
    ("一共", "一共"), ("五六", "五六"), ("三角形", "三角形"), ("二次函数", "二次函数"), ("一百一百", "一百一百"),
    ("十三万四千五百六十二个", "十三万四千五百六十二个")])
def test_number_words(answer, wanted):
    assert reward.COUNT.sub(reward.counted, answer) == wanted


ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
        "eighteen nineteen").split()
TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()


def english(n, joint, hyphen):
    """A speller of our own: 2,345 is two thousand three hundred (and) forty-five."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10] + (hyphen + ONES[n % 10] if n % 10 else "")
    size, word = (1000, "thousand") if n >= 1000 else (100, "hundred")
    rest = "" if n % size == 0 else (joint if n % size < 100 else " ") + english(n % size, joint, hyphen)
    return f"{english(n // size, joint, hyphen)} {word}{rest}"


def chinese(n, two):
    """2,045 is 二千零四十五, or 两千零四十五."""
    said, gap = "", False
    for size, word in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit = n // size % 10
        if digit:
            digits = "零一" + (two if size > 10 else "二") + "三四五六七八九"
            said += ("零" if gap and said else "") + ("" if n < 20 and size == 10 else digits[digit]) + word
        gap = not digit
    return said or "零"


def test_number_words_up_to_9999_are_read_back():
    for n in range(10_000):
        for said in (english(n, " and ", "-"), english(n, " ", " ").capitalize(), chinese(n, "二") + "个", chinese(n, "两")):
            assert re.match(r"\d+", reward.COUNT.sub(reward.counted, said))[0] == str(n), said
    for n in (7, 15, 40, 105, 999, 2045, 9999):
        for said in (english(n, " and ", "-"), chinese(n, "二") + "个", f"So there are {english(n, ' ', '-')} red cubes."):
            assert value(said)._replace(unit=()) == number(n), said


@cases([
    (r"So it is $\dfrac12 \text{ cm}$.", r"\dfrac12 cm"), ("", ""), ("5", "5"),
    # what an answer opens with
    ("so the answer is 5", "5"), ("Thus, it is 5.", "5"), ("I think that 5", "5"), ("we get 5", "5"), ("There are 4.", "4"),
    ("it's 5", "5"),
    ("that’s 5", "5"), ("a total of 5", "5"), ("approximately 5", "5"), ("just about 5", "5"), ("they are 1 and 2", "1 and 2"),
    ("The correct option: B", "B"), ("Final answer: 5", "5"), ("soup", "soup"), ("answering", "answering"), ("onlyx", "onlyx"),
    ("答案是5", "5"), ("答案：5", "5"), ("应选 B", "B"), ("所以 5", "5"), ("一共有5个", "5个"), ("约5", "5"), ("等于 5", "5"),
    # what it speaks of
    ("the length is 5", "5"), ("The area of the circle equals 5 cm", "5 cm"), ("its radius = 5", "5"), ("Their sum was 5", "5"),
    ("三角形的面积是5", "5"), ("面积为 5", "5"), ("the answer is: the length is 5", "5"), ("length is 5", "length is 5"),
    ("the sum; it is 5", "the sum; it is 5"),
    ("this cannot be what is 5", "this cannot be what is 5"),
    # what it ends with
    ("5 is correct", "5"), ("5 is the answer.", "5"), ("B is my final choice", "B"), ("5 are right", "5"),
    ("5 is wrong", "5 is wrong"),
    ("B because it fits", "B"), ("45, since it fits", "45"),
    # D, not B: what is denied goes
    ("D, not B", "D"), ("5, not 6", "5"), ("5 but not 6", "5"), ("5 rather than 6", "5"), ("D, and not option B", "D"),
    ("选A不选B", "A"),
    ("not 5 but 6", "6"), ("5 instead of 6.5", "5"), ("not 5", ""), ("not 5x", "not 5x"), ("not Bob", "not Bob"),
    ("not blue", "not blue"),
    # signs around it
    ("_5_", "5"), ("`5`", "5"), ("*5*", "5"), (": 5", "5"), ("= 5", "5"), ("5,", "5"), ("5:", "5"), ("5\\\\", "5"), ("$5$", "5"),
    (r"\(5\)", "5"),
    (r"\[ 5 \]", "5"), ("  5\n", "5"),
    # money
    ("$5", "dollar 5"), (r"\$5.00", "dollar 5.00"), (r"$\$12.50$", "dollar 12.50"), ("5 dollars", "5 dollars"), ("￥5", "¥5"),
    # degrees
    (r"45^\circ", "45°"), (r"45^{\circ}", "45°"), (r"45{}^{\circ}", "45°"), (r"45\degree", "45°"), (r"45^{ \circ }", "45°"),
    ("45^o", "45°"),
    ("45º", "45°"), ("45˚", "45°"), (r"m\angle ABC = 20^\circ", r"\angle ABC = 20°"), ("m∠A", "∠A"), (r"\measuredangle A", "∠ A"),
    # thousands, decimal commas
    ("1{,}234", "1234"), (r"1,\!234", "1234"), (r"12\,345", "12 345"), ("3{,}14", "3.14"), ("1,234", "1,234"),
    ("1{,}2345", "1.2345"),
    # mixed numbers
    ("2 1/2", "(2+1/2)"), (r"2\frac12", "(2+1/2)"), (r"2\frac{1}{2}", "(2+1/2)"), (r"-2 \dfrac{1}{2}", "-(2+1/2)"),
    ("2½", "(2+1/2)"),
    (r"2\frac{\sqrt3}{2}", r"2\frac{\sqrt3}{2}"), (r"x_2\frac12", r"x_2\frac12"), (r"x^2\frac12", r"x^2\frac12"),
    (r"1.5\frac12", r"1.5\frac12"),
    ("1.5 1/2", "1.5 1/2"), ("1/2 1/3", "1/2 1/3"), ("2^2 1/2", "2^2 1/2"),
    # repeating decimals
    (r"0.\overline{3}", "0.r3"), (r"0.1\overline{6}", "0.1r6"), (r"0.\dot{3}", "0.r3"), (r"0.\bar3", "0.r3"),
    ("0.1(6)", "0.1r6"), ("0.(3)", "0.r3"),
    ("5(3)", "5(3)"),
    # sets, matrices, names of segments and points
    (r"\emptyset", "∅"), (r"\varnothing", "∅"), (r"\{ \}", "∅"), ("no solution", "∅"), ("No real solutions.", "∅"), ("无解", "∅"),
    (r"\{x \mid x > 3\}", "x > 3"), (r"\{x : x>3\}", "x>3"), (r"\{(x) | x < 3 \}", "x < 3"), (r"\{1, 2\}", r"\{1, 2\}"),
    (r"\langle 1, 2 \rangle", "( 1, 2 )"),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", "⟦( 1 & 2 ),( 3 & 4)⟧"),
    (r"\begin{bmatrix}1\\2\\\end{bmatrix}", "⟦(1),(2)⟧"), (r"\begin{array}{cc}1&2\end{array}", "⟦(1&2)⟧"),
    (r"\overline{AB} = 5", "{AB} = 5"), (r"\overrightarrow{AB}", "{AB}"), (r"\vec{v}", "{v}"), (r"\bar x", "x"),
    (r"m\widehat{AB}", "{AB}"),
    ("A(3, -2)", "A=(3, -2)"), ("P'(1,2)", "P'=(1,2)"), ("AB(1,2)", "AB(1,2)"), ("A(3)", "A(3)"),
    (r"\lim_{x \to 0} f(x) = 3", "3"),
    (r"\left|-5\right|", "|-5|"), (r"\lvert -5 \rvert", "| -5 |"), (r"\bigl( 5 \bigr)", "( 5 )"), (r"\displaystyle 5\!", "5"),
    (r"5 \quad 6", "5 6"), (r"a\;b", "a b"), (r"\bfseries", r"\bfseries"),
    # words
    ("2 to 3", "2:3"), ("2 to x", "2 to x"), ('20"', "20 in"), ("180 (days)", "180 days"), ("180 (of the days)", "180"),
    ("4:30 p.m.", "4:30 pm"),
    ("4:30 PM", "4:30 Pm"), ("4:30 a.m. sharp", "4:30 am sharp"), ("5 sq. cm", "5 sq cm"), ("60 mph", "60 mi per h"),
    ("60 per cent", "60 percent"),
    ("5 million", "5*10^6"), ("2.5 billion", "2.5*10^9"), ("3 thousand", "3*10^3"), ("3 hundred", "3*10^2"),
    ("1.5 x 10^3", "1.5*10^3"),
    ("3 x 4", "3 x 4"), ("12 cm ^ {2}", "12 cm^2"), ("12 cm^{23}", "12 cm^{23}"), ("negative 5", "-5"),
    (r"minus \frac12", r"-\frac12"),
    ("负三个", "-3个"), ("negative x", "negative x"), ("twenty-one cubes", "21 cubes"), ("negative five", "-5"),
    # Unicode
    ("10⁻²", "10^{-2}"), ("x²", "x^2"), ("½", "1/2"), ("３，５", "3,5"), ("−5", "-5"), ("a·b", "a*b"), ("6÷3", "6/3"),
    ("1∶2", "1:2"), ("x∈[1,2]", "x=[1,2]"),
    ("a≈5", "a=5"), ("{1、2}", "{1,2}"), ("⟨1,2⟩", "<1,2>"), ("a＝5。", "a=5")])
def test_normalise(answer, wanted):
    assert " ".join(normalise(answer).split()) == wanted


def test_normalise_reads_twice_the_longest_answer():
    """One letter can become 18: what comes of it is cut."""
    assert normalise("7" * 2000) == "7" * 2 * answers.LONGEST_ANSWER
    assert normalise("\ufdfa" * 400).startswith("صلى الله") and len(normalise("\ufdfa" * 400)) <= 2 * answers.LONGEST_ANSWER


# ---- tokens and texts

@cases([
    ("3ab", "3|a|b"), ("2abc", "2|a|b|c"), ("2abcd", "2|abcd"), ("ab", "a|b"), ("abc", "abc"), ("AB", "AB"), ("2AB", "2|AB"),
    ("AB'", "AB'"), ("3 cm", "3|cm"),
    ("3cm", "3|cm"), ("3 in", "3|in"), ("3m", "3|m"), ("a of b", "a|of|b"), ("1,234", "1234"), ("1 234 567", "1234567"),
    (r"1\,234", "1234"),
    ("12,34", "12|,|34"), ("1,2345", "1|,|2345"), ("0,123", "0|,|123"), ("(1,234)", "(|1|,|234|)"),
    ("(5, 1,234)", "(|5|,|1|,|234|)"),
    ("[1,100]", "[|1|,|100|]"),
    ("1,234 apples", "1234|apples"), ("3.1,234", "3.1|,|234"), ("1.2e3", "1.2e3"), ("1.2E-3", "1.2E-3"), ("1e49", "1e49"),
    ("1e50", "1|e|50"), ("5e", "5|e"),
    (".5", ".5"), ("5.", "5."), ("0.1r6", "0.1r6"), ("2.r3", "2.r3"), ("x^2", "x|^2"), ("x^23", "x|^|23"), ("X^2", "X|^|2"),
    ("pi^2", r"\pi|^|2"),
    ("5^2", "5|^|2"), ("cm^3", "cm|^3"), (r"\dfrac12", r"\frac|12"), (r"\tbinom", r"\binom"), ("√3", r"\sqrt|3"),
    ("2π", r"2|\pi"), ("pi", r"\pi"),
    ("sin x", r"\sin|x"), ("cos", r"\cos"), (r"\times", "*"), ("2**3", "2|^|3"), (r"\leqslant", "≤"), (">=", "≥"),
    (r"\not=", "≠"), ("!=", "≠"), (r"\ne", "≠"),
    (r"\approx", "="), ("a is 5", "a|=|5"), ("a are 5", "a|=|5"), ("1 and 2", "1|,|2"), ("1;2", "1|,|2"), ("1 or 2", "1|,|2"),
    (r"A\cup B", "A|,|B"),
    (r"\{1\}", "{|1|}"),
    (r"25\%", "25|%"), ("€5", "euro|5"), ("5¢", "5|cent"), ("∠ABC", r"\angle|ABC"), (r"\parallel", "∥"), ("||", "∥"), ("infinity", "∞"),
    (r"\pm", "±"),
    ("12平方厘米", "12|平方|厘米"), ("3千米", "3|千米"), ("x_1", "x|_|1"), ("", ""), ("\\", "\\"), ("5 5", "5|5"),
    (r"\alpha\beta", r"\alpha|\beta")])
def test_tokenise(answer, wanted):
    assert "|".join(tokenise(answer)) == wanted


@cases([
    ("The red ball!", "red ball"), ("A triangle", "triangle"), ("an Apple", "apple"), ("the", "the"),
    ("Right  triangle.", "right triangle ."),
    ("5 Apples", "5 apples"), ("don't know", "don t know"), ("(blue)", "blue"), ('"Blue"', "blue"), ("STRASSE", "strasse"),
    ("Straße", "strasse"),
    ("red + blue", "red + blue"), ("red - blue", "red - blue"), ("theory", "theory"), ("1.5 Litres", "1.5 litres"),
    # no prose: as it is written, spelling of signs aside
    ("AB = CD", "AB=CD"), (r"x \le blue", "x≤blue"), ("A B", "AB"), ("AC BD", "ac bd"), ("a^2 blue", "a^2blue"),
    ("1:2:3", "1:2:3"), ("+", "+"), ("", "")])
def test_plain(answer, wanted):
    assert answers.plain(answer) == wanted


# ---- read: each kind of value

@cases([
    ("5", number(5)), ("-5", number(-5)), ("+5", number(5)), ("- -5", number(5)), ("007", number(7)), ("5.", number(5)),
    (".5", number("0.5", 1)),
    ("1.50", number("1.50", 2)), ("-1.41", number("-1.41", 2)), ("1.2e3", number(1200)), ("1.2e-3", number("0.0012", 4)),
    ("3{,}14", number("3.14", 2)),
    ("1,234.5", number("1234.5", 1)), ("twenty-one", number(21)), ("2 1/2", number("2.5")), (r"-2\frac12", number("-2.5")),
    (r"\frac34", number("0.75")),
    (r"\frac 3 4", number("0.75")), (r"\frac{3}4", number("0.75")), ("1:4", number("0.25")), ("1 to 4", number("0.25")),
    ("(5)", number(5)),
    ("[5]", number(5)), ("{5}", number(5)), ("((5))", number(5)), ("2.5 million", number(2_500_000)),
    ("2.50 + 1", number("3.5")), ("5!", number(120)),
    ("0!", number(1)), ("3!!", number(720)), ("2^3!", number(64)), (r"\binom{5}{2}", number(10)), (r"\binom52", number(10)),
    (r"\binom{2}{5}", number(0)),
    (r"\sqrt{49}", number(7)), ("√49", number(7)), ("sqrt(49)", number(7)), (r"\sqrt[3]{343}", number(7)),
    ("|-5|", number(5)),
    ("|2 - 5| + 1", number(4)), (r"\left|-5\right|", number(5)), ("2(3)", number(6)), ("(2)(3)", number(6)),
    ("2 + 3 * 4", number(14)), ("2^3^2", number(512)),
    ("-2^2", number(-4)), ("(-2)^2", number(4)), ("2^{-1}", number("0.5")), ("2^-1", number("0.5")), ("2 - 3 - 4", number(-5)),
    ("24/4/2", number(3)),
    ("2 - (3 - 4)", number(3)), ("6/2(3)", number(9)), ("-2 * -3", number(6)), ("5 - -3", number(8)),
    (r"2 \cdot 3 \div 4", number("1.5")),
    ("8^{2/3}", number(4)), (r"\sin 30^\circ", number("0.5")), (r"\cos 60°", number("0.5")), ("sin 30°", number("0.5")),
    (r"\sin(\pi/6)", number("0.5")),
    (r"\sin\frac{\pi}{6}", number("0.5")), (r"\sin 2\pi", number(0)), (r"\sin^2 30^\circ", number("0.25")),
    (r"\sin^{2} 30^\circ", number("0.25")), (r"\sin^3 30^\circ", number("0.125")), ("1 + 1:4", number("1.25")),
    ("2^-1*4", number(2)),
    (r"2\sin 30^\circ", number(1)), (r"\log_2 8", number(3)), (r"\log_{10} 1000", number(3)), (r"\log_2(4+4)", number(3)),
    (r"\tan 45^\circ", number(1)),
    (r"\tan^{-1} 45^\circ", number(1))])
def test_read_numbers(answer, wanted):
    said = value(answer)
    assert said._replace(value=0) == wanted._replace(value=0) and abs(said.value - wanted.value) < Decimal("1e-90")


@cases([
    # units: one spelling each
    ("12 cm", number(12, 0, "cm")), ("12cm", number(12, 0, "cm")), ("12 centimetres", number(12, 0, "cm")),
    ("12 厘米", number(12, 0, "cm")),
    ("12.50 cm", number("12.50", 2, "cm")), ("12 cm^2", number(12, 0, "cm^2")), ("12 cm²", number(12, 0, "cm^2")),
    ("12 square cm", number(12, 0, "cm^2")),
    ("12 sq. cm", number(12, 0, "cm^2")), ("12 平方厘米", number(12, 0, "cm^2")),
    ("12 cubic feet", number(12, 0, "ft^3")), ("12 m^3", number(12, 0, "m^3")),
    ("5 m/s", number(5, 0, "m", "/s")), ("5 m/s^2", number(5, 0, "m", "/s^2")),
    ("60 mph", number(60, 0, "mi", "/h")),
    ("60 miles per hour", number(60, 0, "mi", "/h")), ("60 km/hr", number(60, 0, "km", "/h")),
    ("5 N*m", number(5, 0, "N", "m")),
    ("3 kWh", number(3, 0, "kWh")), ("50 N", number(50, 0, "N")), (r"5 \Omega", number(5, 0, "ohm")), ("3 Litres", "3 * Litres"),
    ("5 litres", number(5, 0, "L")),
    ("25%", number(25, 0, "%")), (r"25\%", number(25, 0, "%")), ("25 percent", number(25, 0, "%")),
    ("25 pct", number(25, 0, "%")), ("-25%", number(-25, 0, "%")),
    ("45°", number(45, 0, "°")), ("45 degrees", number(45, 0, "°")), ("5°C", number(5, 0, "°", "C")),
    ("5 °F", number(5, 0, "°", "F")), 
    ("90° - 45°", number(45, 0, "°")), ("90° + 45", number(135, 0, "°")),
    ("5m + 3m", number(8, 0, "m")), ("|-5 cm|", number(5, 0, "cm")),
    (r"\frac{90^\circ}{2}", number(45, 0, "°")), ("2 * 3 cm", number(6, 0, "cm")), ("180 (days)", number(180, 0, "day")),
    ('20"', number(20, 0, "in")),
    # money
    ("€5", number(5, 0, "euro")), ("5 euros", number(5, 0, "euro")), ("¢5", number(5, 0, "cent")),
    ("$5", number(5, 0, "dollar")), (r"\$5 + \$3", number(8, 0, "dollar")),
    ("£ 7", number(7, 0, "lb")), ("5 USD", number(5, 0, "dollar")), ("-$5", number(-5, 0, "dollar")),
    ("￥5", number(5, 0, "yen")), ("5.00 dollars", number("5.00", 2, "dollar")),
    # words that say what is counted: up to five, plain, in lower case
    ("3 red cubes", number(3, 0, "")), ("3 cubes on the table", number(3, 0, "")), ("5 apples in the basket", number(5, 0, "")),
    ("5 big red shiny new bikes", number(5, 0, "")),
    ("3 years old", number(3, 0, "year")), ("5个", number(5, 0, "")), ("5 条边", number(5, 0, "")), ("5 units^2", number(5, 0, "")),
    ("5 years and", "5 years and"),
    ("5 Apples", "5 * Apples"),
     ("5 xy", "5 * x * y"), ("5 a", "5 * a"),
    # words that change the number
    ("5 dozen", "5 dozen"), ("3 halves", "3 halves"), ("5 less", "5 less"), ("more than 5", "more than 5"),
    ("5 below zero", "5 below 0"), ("5 squared", "5 squared"),
    ("at least 5", "at least 5"), ("5th", "5 th"), ("maybe 5", "maybe 5"), ("5 factorial", "5 factorial"),
    ("5 hours 30 minutes", "5 hours 30 minutes"),
    ("20 is wrong", "20 is wrong"), ("两倍于5", "两倍于 5"), ("5以上", "5 以上"), ("大于5", "大于 5"), ("sqrt 5 doubled", "sqrt 5 doubled")])
def test_read_units_and_words(answer, wanted):
    assert value(answer) == wanted


@cases([
    # names, and what stands last
    ("x = 5", number(5, name="x")), ("x == 5", number(5, name="x")), ("5 = x", number(5, name="x")),
    ("x = 5.0", number("5.0", 1, name="x")), ("BC = 5", number(5, name="BC")),
    (r"BC \approx 5", number(5, name="BC")), (r"\approx 5.12", number("5.12", 2)),
    (r"m\angle ABC = 20^\circ", number(20, 0, "°", name=r"\angleABC")),
    ("a_{37} = 5", number(5, name="a_37")), ("f(2) = 3", number(3, name="f(2)")), ("f(x) = 2", number(2, name="f(x)")),
    ("AB/CD = 2", number(2, name="AB * CD^-1")),
    ("A:B = 1", number(1, name="A * B^-1")), ("|AB| = 5", number(5, name="|AB|")),
    ("side length = 5", number(5, name="sidelength")), ("x' = 5", number(5, name="x'")),
    (r"\overline{AB} = 5", number(5, name="AB")), (r"\theta = 5", number(5, name=r"\theta")), (r"\sin(30) = 5", r"\sin(30)=5"),
    ("a = b = 5", number(5, name="a")),
    ("A = ab = 12", number(12, name="A")), ("V = r^2 h = 12", number(12, name="V")), ("V = 3 r^2 h = 12", number(12, name="V")),
    ("2 + 3 = 5", number(5, exact=5)), ("m+n = 256+37 = 293", number(293, exact=293)),
    ("x = 2+3 = 5", number(5, name="x", exact=5)),
    ("5 = 5.0", number("5.0", 1, exact=5)), ("(x, y) = (1, 2)", group("()", 1, 2, name="(x,y)")),
    ("A(1, 2)", group("()", 1, 2, name="A")), ("x = (1, 2)", group("()", 1, 2, name="x")),
    # equations stay
    ("2x = 12", "2 * x=12"), (r"\frac{x}{2} = 5", "0.5 * x=5"), (r"\sqrt{x} = 5", "x^0.5=5"), ("x! = 5", "x!=5"),
    ("n = 3k", "n=3 * k"), ("x^2 = 4", "x^2=4"), ("-x = 5", "-1 * x=5"),
    ("|x| = 5", "|x|=5"), ("20 = 30", "20=30"), (r"5.4 \approx 7", "5.4=7"), ("2m + n = 5 + 3 = 8", "2m+n=5+3=8"),
    ("AB = CD", "AB=CD"), ("x = 5 = y", "x=5=y"), ("5 = 2x", "5=2 * x"),
    ("5 = sides", "5=sides"), ("ab = 5", "a * b=5"), ("y = x = (1, 2)", "y=x=(1,2)"), (r"x \ne 5", "x≠5"),
    ("2x = (1, 2)", "2 * x=(1,2)")])
def test_read_equations(answer, wanted):
    assert value(answer) == wanted


def test_read_keeps_the_exact_part_of_an_approximation():
    for answer, name in ((r"21\sqrt{3} \approx 36.37", ""), (r"x = 21\sqrt{3} \approx 36.37", "x")):
        said = value(answer)
        assert said._replace(exact=None) == number("36.37", 2, name=name) and abs(said.exact ** 2 - 1323) < Decimal("1e-90")
    assert value(r"36.37 \approx 21\sqrt{3}") == r"36.37=21\sqrt{3}"


@cases([
    ("1, 2", group("{}", 1, 2)), ("1 and 2", group("{}", 1, 2)), ("1 or 2", group("{}", 1, 2)), ("1; 2", group("{}", 1, 2)),
    ("1, 2, and 3", group("{}", 1, 2, 3)),
    (r"\{1, 2\}", group("{}", 1, 2)), ("(1, 2)", group("()", 1, 2)), ("[1, 2]", group("[]", 1, 2)),
    ("(1, 2]", group("(]", 1, 2)), ("[1, 2)", group("[)", 1, 2)),
    ("(1, (2, 3))", group("()", 1, group("()", 2, 3))), (r"\langle 1, 2\rangle", group("()", 1, 2)),
    (r"\pm 2", group("{}", 2, -2)), (r"3 \pm 2", group("{}", 5, 1)),
    (r"x = \pm 2", Group("{}", [number(2, name="x"), number(-2, name="x")])),
    ("1, 2.50", Group("{}", [number(1), number("2.50", 2)])),
    ("x = 1, y = 2", Group("{}", [number(1, name="x"), number(2, name="y")])),
    ("3 cm, 5", Group("{}", [number(3, 0, "cm"), number(5)])),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", group("⟦⟧", group("()", 1, 2), group("()", 3, 4))),
    (r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}", group("⟦⟧", 1, 2)),
    (r"\begin{pmatrix}5\end{pmatrix}", group("⟦⟧", 5)), (r"(-\infty, 3]", group("(]", "-1 * ∞", 3)),
    (r"(-\infty, 1) \cup (2, \infty)", group("{}", group("()", "-1 * ∞", 1), group("()", 2, "∞"))),
    ("(x, 2x)", group("()", "x", "2 * x")), ("red and blue", group("{}", "red", "blue")),
    ("Red, the blue", group("{}", "red", "blue")), ("red & blue", group("{}", "red", "blue")),
    # times of day
    ("4:30", group("time", "4:30")), ("04:30", group("time", "4:30")), ("16:30:05", group("time", "16:30:05")),
    ("4:30 p.m.", group("time", "4:30", name="pm")),
    ("4:30AM", group("time", "4:30", name="am")), ("t = 4:30", group("time", "4:30")), ("24:59", group("time", "24:59")),
    ("25:10", number("2.5")), ("4:3", number(4) and "4/3"),
    ("4:60", "1/15"), ("4:30 + 1", "4:30+1"), ("1:2:3", "1:2:3"), ("30-40", "30-40"), ("30 - 40", number(-10)),
    ("1:2, 3:4", "1/2 3/4"),
    # no brackets that fit
    ("(1, 2", "(1,2"), ("1, 2)", "1,2)"), ("()", "()"), ("(1, 2}", "(1,2}"), ("]1, 2[", "]1,2["), (r"\{1, 2)", "{1,2)"),
    ("(]", "(]"), ("1,", number(1))])
def test_read_groups(answer, wanted):
    said = value(answer)
    if isinstance(wanted, str) and re.fullmatch(r"\d+/\d+( \d+/\d+)*", wanted):
        said = said.items if isinstance(said, Group) else [said]
        assert [Fraction(x.value).limit_denominator(1000) for x in said] == [*map(Fraction, wanted.split())]
    else:
        assert said == wanted


@cases([
    ("yes", "yes"), ("Yes.", "yes"), ("NO", "no"), ("Yes, there is.", "yes"), ("No, it is not", "no"), ("no: nothing fits", "no"),
    ("Yes, but no", "yes but no"), ("Yes, maybe", "yes maybe"), ("Yes, it is not", "yes it is not"), ("No, yes", "no yes"),
    ("No, or perhaps", "no or perhaps"), 
    ("blue", "blue"), ("The color is blue.", "blue"), ("a triangle", "triangle"), ("Right triangle", "right triangle"),
    ("red or blue", "red or blue"),
    ("not blue", "not blue"), ("x > 1 and x < 3", "x>1,x<3"), ("left - right", "left - right"),
    # what the reader refuses is text
    ("5 5", "5 5"), ("5% + 3", "5%+3"), ("5)", "5)"), ("x +", "x+"), ("1/0", "1/0"), ("0/0", "0/0"), ("0^0", "0^0"), ("41!", "41!"),
    ("(-1)!", "(-1)!"), ("2.5!", "2.5!"), (r"\binom{n}{2}", r"\binom{n}{2}"),
    (r"\binom{50}{2}", r"\binom{50}{2}"), (r"\sqrt{-1}", r"\sqrt{-1}"), (r"\sqrt[4]{-8}", r"\sqrt[4]{-8}"),
    (r"\sqrt[13]{2}", r"\sqrt[13]{2}"), (r"\sqrt", r"\sqrt"),
    (r"\sin 30", r"\sin30"), (r"\sin 1^\circ", r"\sin1°"), (r"\sec 60^\circ", r"\sec60°"), (r"\tan 90^\circ", r"\tan90°"),
    (r"\arcsin 1", r"\arcsin1"), (r"\log 100", r"\log100"),
    (r"\log_1 5", r"\log_1 5"), (r"\ln(-1)", r"\ln(-1)"), ("|5", "|5"), ("|1|2|", "|1|2|"), ("5m + 3", "5m+3"),
    ("5 m + 3 cm", "5 m + 3 cm"), ("5 m 3", "5m3"), ("5%3", "5%3"),
    ("10^{51}", "10^{51}"), ("10^{-51}", "10^{-51}"), ("2^x cm", "2^x * cm"), ("(1, 2) + 1", "(1,2)+1"),
    ("5 + (1, 2)", "5+(1,2)"), ("x * 5%", "x*5%"), ("(1, 2)!", "(1,2)!"),
    ("(1,2)^2", "(1,2)^2"), ("@", "@"), ("5 @ 3", "5@3"), (r"2^{\sqrt2}", r"2^{\sqrt2}"), (r"\not", r"\not"),
    ("x^{x^{2}", "x^{x^2"), ("5 > 3 > 1", "5>3>1"), ("3 < 5", "3<5")])
def test_read_text(answer, wanted):
    assert value(answer) == wanted


@cases([
    ("x", "x"), ("+x", "x"), ("-x", "-1 * x"), ("1x", "x"), ("x + 1", "1 + x"), ("x - 1", "-1 + x"), ("1 - x", "1 + -1 * x"),
    ("x - y - z", "-1 * y + -1 * z + x"),
    ("2ab", "2 * a * b"), ("b a 2", "ba2"), ("b * a * 2", "2 * a * b"), ("2(x + 1)", "2 * (1+x)"), ("x(x+1)", "(1+x) * x"),
    ("-(x + 1)", "-1 * (1+x)"),
    ("(x+1)(x-1)", "(-1+x) * (1+x)"), ("x^2", "x^2"), ("x^{2}", "x^2"), ("x²", "x^2"), ("x^2y", "x^2 * y"), ("x^{-2}", "x^-2"),
    ("x^{n+1}", "x^(1+n)"), ("(x+1)^2", "(1+x)^2"),
    ("(x^2)^3", "(x^2)^3"), ("x^2^3", "x^8"), ("2^x", "2^x"), ("-x^2", "-1 * x^2"), ("(-x)^2", "(-1*x)^2"), ("x/2", "0.5 * x"),
    (r"\frac{x}{2}", "0.5 * x"), (r"\frac x2", "0.5 * x"),
    ("2/x", "2 * x^-1"), ("1/x", "x^-1"), (r"\frac{1}{2x}", "(2*x)^-1"), ("1/2x", "0.5 * x"), ("x/y/z", "x * y^-1 * z^-1"),
    ("x/(y/z)", "(y*z^-1)^-1 * x"), ("x:y", "x * y^-1"),
    (r"\sqrt{x}", "x^0.5"), (r"\sqrt x", "x^0.5"), ("sqrt(x)", "x^0.5"), ("sin(x)", r"\sin(x)"),
    (r"2\sqrt{x + 1}", "2 * (1+x)^0.5"), (r"\sqrt[4]{x}", "x^0.25"),
    (r"x\sqrt{4}", "2 * x"), ("x^{1/2}", "x^0.5"),
    (r"\alpha\beta", r"\alpha * \beta"), ("AB' + 1", "1 + AB'"), ("AB + CD", "AB + CD"), (r"\triangle ABC", r"\triangleABC"),
    ("∠1", r"\angle1"),
    ("|x|", "|x|"), ("|x - 1|", "|(-1+x)|"), ("x!", "x!"), ("(x+1)!", "(1+x)!"), ("x_1", "x_1"), ("x_{12}", "x_12"),
    ("a_{n+1}", "a_(1+n)"), ("x_1 + x_2", "x_1 + x_2"), ("101_2", "101_2"),
    ("101_{2}", "101_2"), ("x_1^2", "x_1^2"), ("x_{i_j}", "x_i_j"), ("f(2)", "f(2)"), ("f(x+1)", "f(1 + x)"),
    ("g(x, y)", "g(x,y)"), ("AB(2)", "AB(2)"), ("x(2)", "2 * x"), ("xy(2)", "2 * x * y"),
    (r"\sin x", r"\sin(x)"), (r"\sin(x)", r"\sin(x)"), (r"\sin 2x", r"\sin(2 * x)"), (r"\sin{x}", r"\sin(x)"),
    (r"\sin^2 x", r"\sin(x)^2"), (r"\sin x \cos y", r"\cos(y) * \sin(x)"),
    (r"\sin(x) + 1", r"1 + \sin(x)"), (r"\log_2 x", r"\log_2(x)"), (r"\log_{b} x", r"\log_b(x)"),
    (r"\log_2(x + 1)", r"\log_2(1 + x)"), (r"\ln e", r"\ln(e)"), (r"\sin xy", r"\sin(x * y)"),
    ("e^x", "e^x"), (r"\exp(x)", "e^x"), (r"\exp 2", "e^2"), ("side length", "side length"),
    ("2 * side length", "2 * sidelength"),
    (r"\infty", "∞"), (r"-\infty", "-1 * ∞"), (r"2\infty", "2 * ∞"), ("0x", "0 * x"), ("x + 0", "x"), ("x * x", "x * x"),
    ("2x * 3", "6 * x"), ("x < y", "x<y"), ("y = 2x + 1", "y=1 + 2 * x")])
def test_read_formulas(answer, wanted):
    assert value(answer) == wanted


def test_what_units_and_words_do_not_make_a_number():
    """A unit behind other words is none of the number's; six words are a sentence."""
    for answer in ("5 red kg", "5 pieces of cm", "5 big kg of it", "5 big red shiny new fast bikes", "2 x", "5 Bob"):
        assert not isinstance(value(answer), Number), answer


def test_read_numbers_that_no_decimal_can_write():
    half_pi = "1.570796326794896619231321691639751442099"  # 40 digits
    for answer, wanted in ((r"\pi/2", half_pi), ("pi", "3.141592653589793238462643383279502884197"), ("π/2", half_pi),
                           ("pi/2", half_pi), (r"1/2\pi", half_pi),
                           (r"\frac{\pi}{2}", half_pi), ("0.(142857)", "0.1428571428571428571428571428571428571429"),
                           (r"\frac{1+\sqrt5}{2}", "1.618033988749894848204586834365638117720"),
                           (r"\sin 60^\circ", "0.8660254037844386467637231707529361834714"),
                           (r"\ln 2", "0.6931471805599453094172321214581765680755"),
                           ("2^{0.3}", "1.231144413344916284499393069168"),
                           (r"\sqrt[3]{2}", "1.259921049894873164767210607278228350570")):
        said = value(answer)
        assert abs(said.value - Decimal(wanted)) < Decimal("1e-29") and not said.decimals and not said.unit
    assert value(r"2\pi r").startswith("6.283185307179586476925286766559005768394") and value(r"2\pi r").endswith(" * r")
    assert re.fullmatch(r"3\.1415926535897932384626433\d* \* r\^2", value(r"\pi r^2"))


def test_every_bound_of_the_reader():
    assert isinstance(value("(" * 19 + "5" + ")" * 19), Number) and isinstance(value("(" * 20 + "5" + ")" * 20), str)
    assert isinstance(value("1" * 40), Number) and isinstance(value("1" * 41), str)
    assert isinstance(value("+".join(["2^2"] * 20)), Number) and isinstance(value("+".join(["2^2"] * 21)), str)
    assert isinstance(value("+".join([r"\sqrt4"] * 20)), Number) and isinstance(value("+".join([r"\sqrt4"] * 21)), str)
    assert isinstance(value("+".join([r"\sin 30°"] * 6)), Number) and isinstance(value("+".join([r"\sin 30°"] * 7)), str)
    assert isinstance(value(",".join(map(str, range(20)))), Group) and isinstance(value(",".join(map(str, range(21)))), str)
    names = [f"x_{{{n}}}" for n in range(1, 25) if n % 10]
    assert value("+".join(names[:20])) == " + ".join(sorted(f"x_{n}" for n in range(1, 23) if n % 10))
    assert value("+".join(names)) == "+".join(names)
    assert isinstance(value("40!"), Number) and isinstance(value("10^{50}"), Number) and isinstance(value("10^{-50}"), Number)


# ---- the parts of a value

def test_combine_numbers():
    combine, two, three = answers.combine, number(2, 0, "cm"), number("3.50", 2, "cm")
    assert combine(two, "+", three) == number("5.50", 0, "cm") and combine(two, "-", three) == number("-1.50", 0, "cm")
    assert combine(two, "*", number(3)) == number(6, 0, "cm")
    assert combine(number(90, 0, "°"), "-", number(45)) == number(45, 0, "°")
    for left, sign, right in (
            (two, "+", number(3)), (number(5, 0, "%"), "+", number(3)), (number(3), "-", two), (two, "+", number(3, 0, "mm")),
            (two, "^", number(2)), (number(2), "^", two), (number(6), "/", two), (two, "*", two), (number("1e30"), "*", number("1e21")),
            (number("1e-30"), "/", number("1e21")), (number(1), "/", number(0)), (number(0), "/", number(0)),
            (number(0), "^", number(0)), (number(-1), "^", number("0.5"))):
        refuses(combine, left, sign, right)
    assert combine(number("1e30"), "*", number("1e20")) == number("1e50") and combine(number(0), "*", number("1e40")) == number(0)


@pytest.mark.parametrize("left, sign, right, wanted", [
    ("x", "+", "y", "x + y"), ("y", "+", "x", "x + y"), ("x", "+", number(1), "1 + x"), ("x", "-", number(1), "-1 + x"),
    ("x", "-", "y", "-1 * y + x"), ("a + c", "+", "b + d", "a + b + c + d"),
    ("x", "*", "y", "x * y"), ("y * a", "*", "x", "a * x * y"), ("x", "*", "a + b", "(a+b) * x"),
    ("a + b", "*", "a + b", "(a+b) * (a+b)"), ("x", "*", number(1), "x"), (number(1), "*", "x", "x"),
    ("x", "+", "1", "1 + x"), ("x", "*", number(-1), "-1 * x"), ("x", "/", number(4), "0.25 * x"), ("x", ":", number(4),
    "0.25 * x"), (number(4), "/", "x", "4 * x^-1"), ("x", "/", "a * b", "(a*b)^-1 * x"),
    ("x", "/", "a + b", "(a+b)^-1 * x"), ("x", "^", number(2), "x^2"), ("x", "^", "n + 1", "x^(n+1)"), ("a * b", "^", number(2),
    "(a*b)^2"), ("a^2", "^", number(3), "(a^2)^3"), ("x", "^", number(-1), "x^-1"),
    (number(2), "^", "x", "2^x"), ("a + b", "-", "c + d", "-1 * (c+d) + a + b")])
def test_combine_formulas(left, sign, right, wanted):
    assert answers.combine(left, sign, right) == wanted


def test_combine_refuses():
    for other in (number(5, 0, "cm"), group("()", 1, 2), group("{}", "x")):
        for sign in "+-*/^":
            refuses(answers.combine, "x", sign, other)
            refuses(answers.combine, other, sign, "x")
    refuses(answers.combine, group("()", 1, 2), "+", number(5))
    refuses(answers.combine, " + ".join("abcdefghijklmnopqrst"), "+", "u")
    refuses(answers.combine, "x", "/", number(0))


def test_written():
    written = answers.written
    assert written(number("5.00", 2, "cm")) == written(number(5, name="x")) == "5" and written(number("-0.50", 2)) == "-0.5"
    assert written("a + b") == "a + b" and written(group("()", 1, "x", group("[)", 2, 3))) == "(1,x,[2,3))"
    assert written(number(Decimal(1) / 3)) == "0." + "3" * 80 and written(number(Decimal(2) / 3)) == "0." + "6" * 79 + "7"
    for said, inside in (("x", "x"), ("a + b", "(a+b)"), ("a * b", "(a*b)"), ("x^2", "(x^2)"), ("x/y", "(x/y)"), (number(-5),
                         "-5")):
        assert answers.inner(said) == inside


def test_whole():
    assert [answers.whole(number(n)) for n in (0, 1, 40)] == [0, 1, 40] and answers.whole(number("7.0", 1)) == 7
    for other in (number(41), number(-1), number("2.5"), number(5, 0, "cm"), "x", group("()", 1, 2)):
        refuses(answers.whole, other)


# ---- arithmetic, against independent references

def test_calculate():
    for x, sign, y, wanted in (("2", "+", "3", 5), ("2", "-", "3", -1), ("2", "*", "3", 6), ("3", "/", "2", "1.5"),
                               ("3", ":", "2", "1.5"), ("2", "^", "10", 1024), ("-2", "^", "3", -8), ("-2", "^", "2", 4),
                               ("2", "^", "-2", "0.25"), ("5", "^", "0", 1), ("0", "^", "3", 0), ("9", "^", "0.5", 3),
                               ("8", "^", "-1", "0.125"), ("0", "^", "0.25", 0), ("0.1", "+", "0.2", "0.3"), ("-2", "^", "1e0", -2)):
        assert answers.calculate(Decimal(x), sign, Decimal(y)) == Decimal(wanted), (x, sign, y)
    for x, sign, y in (("1", "/", "0"), ("0", "/", "0"), ("0", "^", "0"), ("-4", "^", "0.5"),
                       ("-4", "^", "0.25"), ("2", "^", str(Decimal(1) / 13)), ("2", "^", "0.37"),
                       ("2", "^", "0.3333333333"), ("9", "^", "1e9")):
        refuses(answers.calculate, Decimal(x), sign, Decimal(y))


def test_odd_roots_of_negative_numbers():
    for x, degree, wanted in (("-8", 3, -2), ("-1", 5, -1), ("-32", 5, -2)):
        assert abs(answers.calculate(Decimal(x), "^", Decimal(1) / degree) - wanted) < Decimal("1e-90")
    assert abs(answers.calculate(Decimal(-8), "^", Decimal(2) / 3) - 4) < Decimal("1e-90")


def test_roots_have_90_digits():
    """Newton's roots against decimal's own power, which goes by logarithms, with 130 digits."""
    for x in ("2", "3", "7.5", "0.001", "1e-9", "123456789", "31.00000001", "1", "1e40", "2e-45"):
        for degree in range(2, 13):
            for power in {1, 2, degree - 1, degree + 1, -1, -2}:
                root = answers.calculate(Decimal(x), "^", Decimal(power) / degree)
                with decimal.localcontext(prec=130, Emax=9999, Emin=-9999):
                    wanted = Decimal(x) ** (Decimal(power) / degree)
                    assert abs(root / wanted - 1) < Decimal("1e-90"), (x, power, degree)


def angle(kind, count):
    """count twentieths of 60 degrees, in degrees or as a multiple of pi."""
    return number(3 * count, 0, "°") if kind == "degrees" else number(answers.PI * count / 60)


def test_sines_are_those_of_mpmath():
    with mpmath.workdps(130):
        for kind in ("degrees", "pi"):
            for count in range(-45, 170):
                for name in ("sin", "cos", "tan"):
                    if name == "tan" and count % 60 == 30:
                        refuses(answers.computed, "\\tan", angle(kind, count), None)
                        continue
                    wanted = Decimal(mpmath.nstr(getattr(mpmath, name)(mpmath.pi * count / 60), 110))
                    said = answers.computed(f"\\{name}", angle(kind, count), None)
                    assert abs(said - wanted) < Decimal("1e-90"), (kind, count, name)


def test_sines_that_are_short_come_out_short():
    """So that no decimal is taken as a rounding of them: len(digits) of 0.5 is 1."""
    for name, count, wanted in (("sin", 0, 0), ("sin", 10, "0.5"), ("sin", 30, 1), ("sin", 70, "-0.5"), ("cos", 20, "0.5"),
                                ("cos", 40, "-0.5"), ("cos", 60, -1), ("cos", 30, 0), ("tan", 15, 1), ("tan", 45, -1)):
        for kind in ("degrees", "pi"):
            said = answers.computed(f"\\{name}", angle(kind, count), None)
            assert said == Decimal(wanted) and len(said.as_tuple().digits) < 3, (kind, name, count)


def test_what_is_not_computed():
    for name, inside in ((r"\sin", number(30)), (r"\sin", number(1, 0, "°")), (r"\cos", number("1.5", 1, "°")),
                         (r"\sin", number(30, 0, "cm")), (r"\sec", number(60, 0, "°")), (r"\cot", number(45, 0, "°")),
                         (r"\arcsin", number(0)), (r"\arctan", number(0)), (r"\log", number(100)), (r"\ln", number(-1)),
                         (r"\sin", number("0.523598775598", 12)), (r"\sin", number("3.00001", 5, "°"))):
        refuses(answers.computed, name, inside, None)
    refuses(answers.computed, r"\ln", number(0), None)
    refuses(answers.computed, r"\log", number(0), number(2))
    refuses(answers.computed, r"\log", number(5), number(1))
    refuses(answers.computed, r"\log", number(5), number(-2))
    refuses(answers.computed, r"\log", number(5), "b")


def test_logarithms_are_those_of_mpmath():
    with mpmath.workdps(130):
        for base in ("2", "3", "10", "0.5", "7.25"):
            for x in ("2", "10", "0.125", "123456", "1e-20", "1.0001"):
                wanted = Decimal(mpmath.nstr(mpmath.log(mpmath.mpf(x)) / mpmath.log(mpmath.mpf(base)), 110))
                assert abs(answers.computed(r"\log", number(x), number(base)) - wanted) < Decimal("1e-90"), (x, base)
            wanted = Decimal(mpmath.nstr(mpmath.log(mpmath.mpf(base)), 110))
            assert abs(answers.computed(r"\ln", number(base), None) - wanted) < Decimal("1e-90"), base


DIGITS = "0123456789"


@given(st.sampled_from(["", *DIGITS, "12", "999"]), st.text(DIGITS, max_size=6), st.text(DIGITS, min_size=1, max_size=9))
def test_repeating_decimals_are_their_fractions(before, behind, again):
    """0.1r6 is 1/10 + 6/90, summed here as the geometric series it is."""
    wanted = Fraction(before + behind or "0") / 10 ** len(behind)
    wanted += Fraction(int(again), (10 ** len(again) - 1) * 10 ** len(behind))
    with decimal.localcontext(PRECISE):
        said = answers.repeating(f"{before}.{behind}r{again}")
        assert abs(Fraction(said.value) - wanted) <= abs(wanted) / 10**95 and said.decimals == 0
        if before:
            for spelling in (rf"\overline{{{again}}}", f"({again})", rf"\dot{{{again}}}", rf"\bar {{{again}}}"):
                spelling = f"{before}.{behind}{spelling}"
                assert same(value(spelling), value(rf"\frac{{{wanted.numerator}}}{{{wanted.denominator}}}")), spelling


# ---- equations and inequalities

def test_relate():
    relate, five = answers.relate, number(5)
    for parts, wanted in ((["x", five], number(5, name="x")), ([five, "x"], number(5, name="x")),
                          (["AB", "x", five], number(5, name="AB")), ([five, five], number(5, exact=5)),
                          (["m + n", five, five], number(5, exact=5)), (["m + n", five], "m + n=5"),
                          (["2 * x", five, five], "2 * x=5=5"), (["2 * x", five], "2 * x=5"), ([five, "2 * x"], "5=2 * x"),
                          ([five, "x^2"], "5=x^2"), ([five, five, "x"], "5=5=x"), (["x", "y"], "x=y"),
                          (["x", group("()", 1, 2)], group("()", 1, 2, name="x")),
                          ([group("()", "x", "y"), five], number(5, name="(x,y)")),
                          ([group("()", 1, 2), "x"], group("()", 1, 2, name="x")), (["2 * x", group("()", 1, 2)], "2 * x=(1,2)"),
                          (["x", "y", group("()", 1, 2)], "x=y=(1,2)"), ([five, "abcd"], "5=abcd")):
        assert relate(parts, ["="] * (len(parts) - 1)) == wanted, parts
    assert relate(["x", five], ["≠"]) == "x≠5" and relate(["x", five, five], ["=", "≠"]) == "x=5≠5"
    assert relate(["x", five], ["<"]) == group("()", "-1 * ∞", 5, name="x")
    third = number(Decimal(1) / 3)
    assert relate(["x", third, number("0.33", 2)], ["=", "="]) == number("0.33", 2, name="x", exact=third.value)
    assert relate(["x", five, number("0.33", 2)], ["=", "="]).exact is None
    for parts, sign in (([number(20), number(30)], "="), ([number("0.33", 2), third], "="), ([number(3), five], "<"),
                        ([five, group("()", 1, 2)], "="), ([five, five], "≠")):
        refuses(relate, parts, [sign])
    for name in ("x", "x'", "AB", "AB'", "side", "f(2)", "a_37", "|AB|", "AB * CD", "AB * CD^-1", r"\theta", r"\angleABC", "面积"):
        assert relate([name, five], ["="]) == number(5, name=name), name
    for name in ("a * b", "x^2", "|x|", "x^0.5", "x!", "-1 * x", "a + b", "2", "x_1^2", "(1+x)"):
        assert isinstance(relate([name, five], ["="]), str), name


def interval(left, low, high, right, name="x"):
    return group(left + right, low, high, name=name)


LOW, HIGH = "-1 * ∞", "∞"


@pytest.mark.parametrize("inequality, wanted", [
    ("x > 3", interval("(", 3, HIGH, ")")), ("x ≥ 3", interval("[", 3, HIGH, ")")), ("x < 3", interval("(", LOW, 3, ")")),
    ("x ≤ 3", interval("(", LOW, 3, "]")),
    ("3 < x", interval("(", 3, HIGH, ")")), ("3 ≤ x", interval("[", 3, HIGH, ")")), ("3 > x", interval("(", LOW, 3, ")")),
    ("3 ≥ x", interval("(", LOW, 3, "]")),
    ("1 < x < 2", interval("(", 1, 2, ")")), ("1 ≤ x < 2", interval("[", 1, 2, ")")), ("1 < x ≤ 2", interval("(", 1, 2, "]")),
    ("1 ≤ x ≤ 2", interval("[", 1, 2, "]")),
    ("2 > x > 1", interval("(", 1, 2, ")")), ("2 ≥ x > 1", interval("(", 1, 2, "]")), ("2 > x ≥ 1", interval("[", 1, 2, ")")),
    ("2 ≥ x ≥ 1", interval("[", 1, 2, "]")),
    (r"-\infty < x < 3", interval("(", LOW, 3, ")")), (r"x > -\infty", interval("(", LOW, HIGH, ")")),
    (r"x \leq 3", interval("(", LOW, 3, "]")), (r"x >= 3", interval("[", 3, HIGH, ")")),
    (r"x \in [3, \infty)", interval("[", 3, HIGH, ")")), ("AB > 3", interval("(", 3, HIGH, ")", "AB")),
    (r"\{x \mid x > 3\}", interval("(", 3, HIGH, ")")),
    # none of one name
    ("x < y", "x<y"), ("2x > 3", "2 * x>3"), ("x^2 < 4", "x^2<4"), ("1 < x > 2", "1<x>2"), ("1 > x < 2", "1>x<2"),
    ("x < 1 < y", "x<1<y"), ("x < 5 > 3", "x<5>3"), ("1 < x < y", "1<x<y"), ("1 < x = 2", "1<x=2"),
    ("x = 1 < 2", "x=1<2"), ("1 < x < 2 < 3", "1<x<2<3"), ("x ≠ 3", "x≠3"), ("1 < 2 < x", "1<2<x"), ("3 < 2x < 5", "3<2 * x<5"),
    ("1 > x = 2", "1>x=2")])
def test_between(inequality, wanted):
    assert value(inequality) == wanted


# ---- compare

@pytest.mark.parametrize("said, wanted, equal", [
    ("5", "5.0", True), ("5", "6", False), ("x", "x", True), ("x", "y", False), ("5", "five x", False), ("(1, 2)", "5", False),
    # names, units, percent
    ("x = 5", "5", True), ("5", "x = 5", True), ("x = 5", "y = 5", False), ("x = 5", "5 = x", True), ("12 cm", "12", True),
    ("12", "12 cm", True), ("12 cm", "12 mm", False), ("12 cm", "12 centimeters", True),
    ("12 cm", "12 cm^2", False), ("18 cents", "18 dollars", False), ("$5", "5 dollars", True), ("90°", "90", True),
    ("90°", "90 cm", False), ("25%", "25", True), ("25%", "0.25", True), ("0.25", "25%", True),
    ("25", "25%", True), ("25%", "0.25%", False), ("0.25%", "25%", False), ("25%", "2.5", False), ("2500", "25%", False),
    ("25%", "2500", False), ("25%", "25 cm", False), ("1/4", "25%", True), ("1/3", "33.3%", True),
    ("25%", "1/4", True), ("0.25 cm", "25%", False),
    # sets
    ("1, 2", "2, 1", True), ("1, 2", r"\{2, 1\}", True), ("1, 2", "1, 2, 3", False), ("1, 2, 3", "1, 2", False),
    ("7.5 or 15/2", "7.5", True), ("7.5", "7.5 or 15/2", True), ("1, 1, 2", "1, 2", True), ("1, 2", "1", False),
    ("1", "1, 2", False), ("red and blue", "blue, red", True), ("red and blue", "red or blue", False),
    (r"\frac{1}{3}, 2", "2, 0.33", True), ("2, 0.33", r"\frac{1}{3}, 2", False), ("x = 1, y = 2", "y = 2, x = 1", True),
    ("x = 1, y = 2", "x = 2, y = 1", False), ("x = 1, y = 2", "1, 2", True), ("2, 1", "x = 1, y = 2", False),
    (r"\frac13 \pi r * 2", r"\frac{2\pi}{3} r", True), ("3.14r", "3.1415r", False),
    (r"\frac17 r \pi \cdot \frac13 * 11", r"\frac{11\pi}{21} r", True), ("1, 2", "(1, 2)", False), ("3 cm, 5 cm", "5, 3", True),
    # order and brackets
    ("(1, 2)", "(1, 2)", True), ("(1, 2)", "(2, 1)", False), ("(1, 2)", "[1, 2]", False), ("(1, 2)", "(1, 2, 3)", False),
    ("(1, 2, 3)", "(1, 2)", False), ("(0.5, 2)", r"(\frac12, 2)", True), ("A(1, 2)", "(1, 2)", True),
    ("A(1, 2)", "B(1, 2)", False), ("(1, (2, 3))", "(1, (2, 3))", True), ("(1, (2, 3))", "(1, (3, 2))", False),
    (r"x \geq 3", r"[3, \infty)", True), (r"x \geq 3", r"y \geq 3", False), (r"x \geq 3", r"(3, \infty)", False),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}", True),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", False),
    # times
    ("4:30", "4:30", True), ("4:30", "04:30", True), ("4:30 am", "4:30", True), ("4:30", "4:30 pm", True),
    ("4:30 am", "4:30 pm", False), ("4:30 PM", "4:30 p.m.", True), ("4:30", "4:31", False), ("4:30", "2/15", False),
    ("4:30", "16:30", False),
    # approximations: the exact part, or the rounded one
    (r"21\sqrt{3}", "36.37", True), ("36.37", r"21\sqrt{3}", False), (r"21\sqrt{3} \approx 36.37", r"21\sqrt{3}", True),
    (r"21\sqrt{3} \approx 36.37", "36.37", True), (r"21\sqrt{3} \approx 36.4", "36.37", True),
    (r"21\sqrt{3} \approx 36.37", "36.370", True),
    (r"x = 36.37", r"21\sqrt{3} \approx 36.37", True), ("20 = 30", "20", False), ("20 = 30", "30", False),
    ("20 = 30", "20 = 30", True)])
def test_same(said, wanted, equal):
    assert same(value(said), value(wanted)) is equal


with decimal.localcontext(PRECISE):
    THIRD, ROOT = Decimal(1) / 3, Decimal(1323).sqrt()  # 36.37306695894642
    TINY_FRACTION = 1 / (Decimal("1e49") + 1)
    NEAR, FAR = THIRD * (1 + Decimal("1e-95")), THIRD * (1 + Decimal("1e-80"))


@pytest.mark.parametrize("said, wanted, equal", [
    ("5", number(5), True), ("5", number("5.00", 2), True), ("5", number(6), False), ("-5", number(5), False),
    ("0", number(0), True), ("1e-40", number(0), False), ("1e-49", number(TINY_FRACTION), False),
    # equal in 90 digits
    (THIRD, number(THIRD), True), (NEAR, number(THIRD), True), (FAR, number(THIRD), False),
    (THIRD.copy_negate(), number(THIRD), False),
    # a rounding, of what no decimal can write, to two digits or more; to the nearest
    (ROOT, number("36.37", 2), True), (ROOT, number("36.4", 1), True), (ROOT, number("36.373067", 6), True),
    (ROOT, number("36.38", 2), False), (ROOT, number("36.36", 2), False), (ROOT, number(36), False),
    (ROOT, number(37), False), (ROOT, number("36.3731", 4), True), (ROOT, number("36.3730", 4), False),
    (THIRD, number("0.33", 2), True), (THIRD, number("0.3", 1), False), (THIRD, number("0.34", 2), False),
    (ROOT.copy_negate(), number("-36.37", 2), True), (ROOT, number("-36.37", 2), False),
    # not of a decimal, or only of seven digits and more, down to six
    ("36.373", number("36.37", 2), False), ("2.232", number("2.23", 2), False), ("36.37", number("36.373", 3), False),
    ("0.0123457", number("0.01234567891", 11), True), ("0.0123456", number("0.01234567891", 11), False),
    ("0.012346", number("0.01234567891", 11), False), ("1.23457", number("1.2345678", 7), True),
    ("1.23457", number("1.234568", 6), False), ("1.23456", number("1.2345678", 7), False)])
def test_rounds(said, wanted, equal):
    assert answers.rounds(Decimal(said), wanted) is equal


# ---- laws

term = st.sampled_from(["x", "y", "2ab", "3", "2x", "x^2", r"\sqrt{x}", r"\frac{x}{2}", r"\sin x", "a_1",
                        "|y|", "(x+1)^2", "2(x-y)", r"\pi", "x!", r"\alpha"])


@settings(max_examples=60)
@given(st.lists(term, min_size=2, max_size=6), st.randoms(use_true_random=False))
def test_terms_and_factors_commute(terms, shuffle):
    """Numbers among them aside, which are added up from the left: 3 + x + 3 stays as it is."""
    names = [x for x in terms if x not in ("3", r"\pi")]
    other = shuffle.sample(names, len(names))
    assert value("+".join(["z", *names])) == value("+".join([*other, "z"]))
    assert value("*".join(["z", *names])) == value(r" \cdot ".join([*other, "z"]))
    assert value("".join(f"({x})" for x in ["z", *names])) == value("*".join(f"({x})" for x in ["z", *other]))
    assert value(f"({'+'.join(names or ['1'])})^2") == value(f"({' + '.join(other or ['1'])})^{{2}}")
    assert not names or value("-".join(["z", *names])) != value("+".join(["z", *names]))


bound = st.decimals(-1000, 1000, places=2).map(lambda x: f"{x:f}")


@settings(max_examples=60)
@given(bound, bound, st.sampled_from("<≤"), st.sampled_from("<≤"), st.sampled_from(["x", "AB", r"\theta", "a_2"]))
def test_an_inequality_is_its_interval(low, high, left, right, name):
    mirror = {"<": ">", "≤": r"\geq"}
    brackets = "(["[left == "≤"], ")]"["≤" == right]
    both = value(f"{brackets[0]}{low}, {high}{brackets[1]}")
    for said in (f"{low} {left} {name} {right} {high}", f"{high} {mirror[right]} {name} {mirror[left]} {low}",
                 rf"{name} \in {brackets[0]}{low}, {high}{brackets[1]}"):
        assert same(value(said), both) and same(both, value(said)) and value(said).name == name, said
    for said in (f"{low} {left} {name}", f"{name} {mirror[left]} {low}", rf"{low} {left} {name} < \infty"):
        assert same(value(said), value(rf"{brackets[0]}{low}, \infty)")), said
    for said in (f"{name} {right} {high}", f"{high} {mirror[right]} {name}"):
        assert same(value(said), value(rf"(-\infty, {high}{brackets[1]}")), said
    assert same(value(f"{name} {left} {low}"), value(f"{name} < {low}")) is (left == "<")


@settings(max_examples=60)
@given(st.integers(-10**6, 10**6), st.sampled_from(["", ".5", ".25"]), st.permutations(["kg", "m", "s"]), st.sampled_from("* "))
def test_units_commute(whole, behind, units, joint):
    said, wanted = value(f"{whole}{behind} {joint.join(units)}"), value(f"{whole}{behind} kg*m*s")
    assert same(said, wanted) and said.unit == ("kg", "m", "s") and same(said, value(f"{whole}{behind}"))
    assert value(f"{whole}{behind} {units[0]}/{units[1]}").unit == tuple(sorted((units[0], "/" + units[1])))


PIECES = list("0123456789.,+-*/^=()[]{}|%$°±∞√πxeAt_:;<>!&' \n\\⟦⟧∅") + [
    r"\frac", r"\sqrt", r"\pm", r"\sin", r"\log", r"\ln", r"\binom", r"\angle", r"\exp", r"\text{",
    r"\overline{", r"\begin{pmatrix}", r"\end{pmatrix}", "cm", "per", "^2", " and ", " is ", "yes", "no",
    "four", "hundred", "half", "because ", "not ", "\ud800", "\u200b", "\0", "½", "²", "{,}", "1,234",
    "0.1r6", "r", "4:30", "pm", "f(", "二", "百", "个", "平方", "漢"]
hostile = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES), max_size=20).map("".join))


def is_value(x):
    return isinstance(x, str) or (isinstance(x, Number) and isinstance(x.value, Decimal) and isinstance(x.unit, tuple)) or (
        isinstance(x, Group) and isinstance(x.name, str) and all(map(is_value, x.items)))


@settings(max_examples=300, deadline=None)
@given(hostile)
def test_any_text_is_read_as_a_value(text):
    said = normalise(text)
    assert isinstance(said, str) and is_value(read(said)) and is_value(read(text)) and is_value(read(spelled(text)))
    assert isinstance(answers.written(read(said)), str)
    assert all(isinstance(token, str) and token for token in tokenise(said)) and isinstance(answers.plain(text), str)


@settings(max_examples=100, deadline=None)
@given(hostile)
def test_reading_depends_on_no_context_and_leaves_none(text):
    said = normalise(text)
    wanted = read(said)
    strict = decimal.Context(prec=50, rounding=decimal.ROUND_UP, Emax=9, Emin=-9, traps=[decimal.Inexact, decimal.Rounded])
    for context in (decimal.Context(prec=3), strict):
        with decimal.localcontext(context) as ambient:
            assert repr(read(said)) == repr(wanted) and not ambient.flags[decimal.Inexact] and ambient.prec == context.prec


def test_numbers_are_read_alike_in_any_context():
    """And by the grader's front door, which sets a context of its own."""
    for said, wanted, equal in ((r"21\sqrt{3}", "36.37", True), (r"\frac{1}{3}", r"\frac{2}{6}", True),
                                ("12345.6789", "12345.6788", False), (r"\sin 60^\circ", r"\frac{\sqrt3}{2}", True),
                                ("1234567 + 0.1", "1234567", False)):
        for context in (decimal.Context(prec=2), decimal.Context(traps=[decimal.Inexact]), decimal.Context(prec=200)):
            understand.cache_clear()
            with decimal.localcontext(context):
                assert is_equal(said, wanted) is equal, (said, context.prec)
    understand.cache_clear()


def test_reading_twice_reads_the_same():
    """No state is left behind by a value that was refused half-way."""
    texts = ["1/0", "x + 1", "(1, 2", r"\sin 30", "5!", r"\sqrt[3]{-8}", "a_{n+1}", "|1|2|", "4:30", "1 < x < 2"]
    first = [value(text) for text in texts]
    random.Random(0).shuffle(order := [*range(len(texts))])
    assert [value(texts[i]) for i in order] == [first[i] for i in order]
