"""reward.py: hand-worked verdicts by policy point, properties, hostile text, rewards, command line.

answers.py, in which answers are read, has tests of its own in test_answers.py; test_keys.py searches for what should
not be right and is.

    pytest tests/test_reward.py
"""
import json
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
sys.path.insert(0, str(ROOT))
import answers  # noqa: E402
import reward  # noqa: E402
from data import INSTRUCTION  # noqa: E402
from reward import extract_answer, is_equal  # noqa: E402


# ---- tier 1: the policy, one point after the other; each pair was decided by hand

EQUAL = {
    "a decimal of the reference is a rounding of what no decimal can write": [
        (r"21\sqrt{3}", "36.37"), (r"\frac{1}{3}", "0.33"), (r"7\pi", "21.99"), (r"-\sqrt{2}", "-1.41"),
        (r"\sqrt{17}", "4.123105625617661"), ("0.0123457", "0.01234567891")],
    "the exact part of an approximation counts, and so does the rounded one": [
        (r"21\sqrt{3} \approx 36.37", r"21\sqrt3"), (r"21\sqrt{3} \approx 36.37", "36.37"),
        ("36.37", r"21\sqrt{3} \approx 36.37"), (r"x \approx 36.37", "36.37")],
    "percent": [
        (r"25\%", "25"), ("25", "25%"), ("0.25", r"25\%"), (r"\frac14", "25 percent"), ("25 pct", r"25\%"),
        ("25%", "0.25"), ("1/3", "33.33%")],
    "degrees with and without the sign": [
        (r"45^\circ", "45"), ("45", r"45^{\circ}"), ("45°", "45 degrees"), ("45^o", "45"), (r"90^\circ - 45^\circ", "45"),
        (r"\frac{90^\circ}{2}", "45"), (r"m\angle ABC = 45^{\circ}", "45")],
    "units on one side, or spelled in two ways": [
        (r"12\text{ cm}", "12"), ("12", "12 cm"), ("12 centimeters", r"12\,\mathrm{cm}"), ("12cm", "12 cm"),
        ("12 square centimetres", r"12 \text{ cm}^2"), ("12 cm²", r"12\text{ cm}^{2}"), ("$5", "5"), ("€5", "5"),
        ("5 dollars", "5"), ("12 apples", "12"), ("60 miles per hour", "60"), (r"\$5.00", "5"), ("9.8 m/s^2", "9.8"), ("12 kN",
        "12"),
        (r"17\pi \text{ in}^2", r"17\pi"), ("12 inches", "12 in"), ("50 N", "50"), ("3 kWh", "3"), (r"20\ \Omega", "20"),
        ("180 (days)", "180"), (r"20 \text{ (units)}", "20"), ("3 red cubes", "3"), ("2 of the small cubes", "2"),
        ("18 cents", "18"), ("18 USD", "$18"), (r"\$18", "18 dollars"), ("12 平方厘米", "12"), ("12 平方厘米", "12 cm^2"),
        (r"37^\circ\text{C}", "37"), ("$5 million", "5000000"), (r"20\text{ units}^2", "20")],
    "thousands and the decimal comma of LaTeX": [
        ("1,234", "1234"), ("1{,}234", "1234"), (r"1,\!234", "1234"), (r"12\,345", "12345"),
        ("1,234,567.5", "1234567.5"), ("3{,}14", "3.14")],
    "sets in any order; tuples and intervals as they stand": [
        ("2, 1", "1, 2"), (r"\{1, 2\}", "2, 1"), ("2 or 1", r"1 \text{ and } 2"), (r"\pm 2", "{-2, 2}"),
        (r"x = \pm 2", "2, -2"), (r"\frac{1 \pm \sqrt{5}}{2}", r"\frac{1-\sqrt5}{2}, \frac{1+\sqrt5}{2}"),
        (r"\left( 1, \frac{1}{2} \right)", "(1, 0.5)"), (r"x \in (-\infty, 3]", r"(-\infty, 3]"),
        (r"(-\infty, 1) \cup (2, \infty)", r"(2, \infty) \cup (-\infty, 1)"), ("(x, y) = (1, 2)", "(1, 2)"),
        ("[1,100]", "[1, 100]"), ("(5, 1,234)", "(5, 1, 234)"), ("15/2 or 7.5", "7.5"), ("x=1, y=2", "y = 2, x = 1"),
        (r"\langle 3, 4\rangle", "(3, 4)"), ("(3;4)", "(3,4)"), ("9 chickens and 10 rabbits", "10, 9"),
        (r"\begin{bmatrix}1\\2\end{bmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        (r"\begin{pmatrix} 1 & 0.5 \\ 3 & 4 \end{pmatrix}", r"\left[\begin{array}{cc}1&\frac12\\3&4\end{array}\right]")],
    "an inequality in one name is an interval": [
        (r"x \geq 3", r"[3, \infty)"), (r"3 \le x", r"x \in [3, +\infty)"), ("1 < x <= 2", "(1, 2]"), ("2 > y",
        r"y \in (-\infty, 2)"),
        (r"x < 1 \text{ or } x > 2", r"(-\infty, 1) \cup (2, \infty)"), (r"\{x \mid x > 3\}", r"(3, \infty)"), (r"5 \geq x",
        r"x \leq 5")],
    "mixed numbers": [
        ("2 1/2", "2.5"), (r"2\frac12", "2.5"), (r"-2\frac{1}{2}", "-5/2"), ("2½", "2.5"),
        (r"2\frac{\sqrt{3}}{2}", r"\sqrt3")],
    "repeating decimals": [(r"0.\overline{3}", "1/3"), (r"0.1\overline{6}", r"\frac16"), (r"2.\dot{4}", "22/9"), ("0.(142857)",
        "1/7")],
    "number words and signs as words": [
        ("three", "3"), (r"\text{twenty-one}", "21"), ("one hundred and five", "105"), ("two thousand three hundred", "2300"),
        ("negative five", "-5"), ("minus 5", "-5"), ("There are four red cubes.", "4"), ("三个", "3"), ("十二", "12"), ("二十三个", "23"),
        ("一百零五个", "105"), ("负5", "-5"), ("Four.", "4"), ("It is seven", "7"), ("a total of 7", "7")],
    "ratios, and times of day": [
        ("1:2", r"\frac{1}{2}"), (r"2\text{ to }3", "2:3"), ("3:6", "1/2"), ("4:30", "4:30 PM"), (r"4:30 \text{ p.m.}",
        "4:30 pm"), ("04:30", "4:30"),
        ("The time is 4:30.", "4:30"), ("1 : 2 : 3", "1:2:3")],
    "formulas, in their spelling and order": [
        (r"\frac{x}{2}", "x/2"), (r"\frac12 x", "x/2"), (r"\sqrt{x}", "sqrt(x)"), (r"\sqrt{x}", "x^{1/2}"), (r"2\pi r",
        "2*pi*r"), ("4210_5", "4210_{5}"),
        ("x+1", "1 + x"), ("2ab", r"b \cdot 2a"), ("x^{2}", "x²"), ("x^2 + 2*x - (-1)", "x^2+2x+1"), ("-1 + exp(16)",
        "e^{16} - 1"),
        (r"\frac{3}{4}i", r"\frac34i"), ("y=2x+1", "y = 1 + 2x"), (r"\frac{a}{b}", "a/b"), ("11z^17(11z^17+5)",
        "11z^{17}(5+11z^{17})"),
        (r"\frac{x^2}{4} + \frac{y^2}{3} = 1", r"\dfrac{y^2}{3}+\dfrac{x^2}{4}=1"), (r"\sin 2x", r"\sin(2x)"),
        (r"AB \parallel CD", "AB || CD")],
    "what stands last": [
        ("x = 5", "5"), ("5", "BC=5"), (r"\text{The length is } 5", "5"), ("x = 2+2+1 = 4+1 = 5", "5"),
        (r"\frac{AB}{CD} = 2", "2"), ("|AB| = 5", "5"), ("A:B = 1", "1"), ("f(2) = 3", "3"), (r"A = \pi r^2 = 25\pi", r"25\pi"),
        ("m+n = 256+37 = 293", "293"), (r"V = \pi r^2 h = 45\pi", r"45\pi"), (r"\overline{AB} = 5", "5"), (r"m\widehat{AB} = 50",
        "50"),
        ("m∠1 = 118°", "118"), (r"\log_2(8) = 3", "3"), (r"\lim_{x \to 0} \frac{\sin x}{x} = 1", "1"),
        (r"\sin A = \frac{BC}{AB} = \frac{5}{13}", "5/13"),
        ("S_{MBCN}:S = 7:32", "7:32"), (r"x == 5", "5"), (r"\approx 20", "20"), (r"\sim 20", "20"),
        (r"\text{The area is } 20 \text{ square centimeters}", "20")],
    "choice letters": [
        ("(B)", "B"), (r"\text{B}", "B"), ("b", "B"), ("B.", "(B)"), ("(B) 45", "B"), ("B. 45", "45"),
        (r"\textbf{(B)}", "B"), ("B", "B. Beatrice"), ("D", "Thus the answer is\n(D) Dora"), ("B 45", "B"),
        (r"\text{B}\ 45^\circ", "B"),
        ("45 (B)", "B"), ("45 (B)", "45"), ("(b) 45", "B"), (r"\text{The answer is B}", "B"), (r"\text{The correct option is B}",
        "B"), ("*B*", "B"), ("b)", "B"),
        ("A is correct", "A"), ("B because it is bigger", "B"), ("D, not B", "D"), ("B. both A and B", "B"),
        ("D. Not enough information", "D"),
        ("A, C", "(C) and (A)"), ("A、C", "A, C"), ("A和C", "C, A"), ("C: the second law", "C"), ("选C", "C"), ("答案是B", "B"), ("F",
        r"\text{(F)}")],
    "the spelling of numbers": [
        (r"\dfrac{1}{2}", "1/2"), (r"\frac12", "0.5"), (r"\frac1{2}", "0.5"), (r"\frac 1 2", "0.5"),
        (r"\tfrac{1}{2}", "0.5"), (r"\sqrt3", r"\sqrt{3}"), ("21*sqrt(3)", r"21 \sqrt { 3 }"), ("1.2e3", "1200"),
        (r"1.2 \times 10^3", "1200"), ("3e-2", "0.03"), (r"5 \quad", "5"), ("$5$.", "5"), (r"\(5\)", "5"),
        (r"\left(\frac{1}{2}\right)", "0.5"), (".5", "0.5"), ("5.", "5"), ("+5", "5"), ("**5**", "5"),
        (r"\boxed{5}", "5"), (r"\big(5\big)", "5"), (r"\displaystyle 5", "5"), ("007", "7")],
    "the spelling of signs in Unicode": [
        ("3 × 4", "12"), ("12 ÷ 4", "3"), ("−5", "-5"), ("–5", "-5"), ("2π", r"2\pi"), ("2√3", r"2\sqrt{3}"), ("５", "5"),
        ("１，２３４", "1234"), ("½", "0.5"), ("3²", "9"), ("10⁻²", "0.01"), ("2·3", "6")],
    "arithmetic": [
        ("2^{10}", "1024"), ("-2^2", "-4"), ("2^3^2", "512"), (r"\sqrt[3]{16}", r"2\sqrt[3]{2}"),
        (r"\frac{\sqrt{6}}{1+\sqrt{2}}", r"\sqrt{12}-\sqrt{6}"), (r"\sqrt{3+2\sqrt2}", r"1+\sqrt2"),
        ("4^{1/2}", "2"), (r"\pi^2", r"\pi \cdot \pi"), ("2.5 million", "2500000"), ("1/2\\pi", r"\frac{\pi}{2}"), ("(3+4)(2)",
        "14"), ("5 - -3", "8"),
        ("2 hundred", "200"), ("5!", "120"), (r"\binom52", "10"), (r"\binom{5}{2}", "10"), ("|-5|", "5"), (r"\left|3-7\right|",
        "4"), (r"\log_2 8", "3"),
        (r"\log_{3} \frac19", "-2"), (r"\sin 30^\circ", "0.5"), (r"20\cos 45^\circ", r"10\sqrt2"), (r"\tan\frac{\pi}{3}",
        r"\sqrt3"), (r"\sin^2 60^\circ", "3/4")],
    "wording": [
        ("option B", "B"), (r"\text{Option C}", "C"), ("D (30°)", "D"), ("24 sq. cm", "24 cm^2"), ("roughly 36.37", "36.37"),
        ("60 mph", "60 miles per hour"), ("60 km/hr", "60 km per hour"), ("1.5 x 10^3", "1500"), ("5 = x", "5"),
        (r"\boldsymbol{5}", "5"), ("A(3,-2)", "(3, -2)"), ("12˚", "12"), ('"5"', "5"), ("x >= 5", r"x \geq 5"),
        ("7 pounds", "7 lb"), ("90° + 45", "135")],
    "text": [
        ("Yes", "yes"), (r"2 \sin b \cos a", r"2\sin b\cos a"), (r"x \lt 3", "x < 3"), ("Yes, there is.", "yes"),
        ("No, it is not", "No"), ("(no)", "no"),
        ("The color is blue.", "blue"), ("A cat", "the cat"), ("Light Blue", "light blue"), ("red and blue", "blue, red"),
        ("DNE", r"\text{DNE}")],
    "signs, and the empty set": [
        (r"\infty", "∞"), (r"\text{ +}\infty", r"+\infty"), ("<", r"\lt"), ("$+$", "+"), (r"\alpha", r"$\alpha$"),
        (r"\varnothing", r"\emptyset"), (r"\left\{ \right\}", r"\{\}"), ("∅", r"\{ \}"), (r"$\pi$", "π"), ("or", "or"),
        (r"\text{no solution}", r"\emptyset"), ("无解", "∅")],
}
DIFFERENT = {
    "decimals are exact where they are not a rounding": [
        ("2.232", "2.23"), ("2.23", "2.232"), ("36.37", r"21\sqrt{3}"), ("0.33", "1/3"), (r"\frac{6}{13}", "0.5"),
        (r"21\sqrt{3}", "36.38"), (r"21\sqrt{3}", "36"), ("0.29", "0.28"), ("1.0000001", "1"), ("1e-40", "0"), ("1e-60", "0"),
        ("1e-400", "0"),
        ("1234.57 cm", "1234.568 cm"), ("0.0667", "0.066666793"), ("1234.5678", "1234.99999999"),
        ("5/2", "2.49"), (r"5.4 \approx 7", "5.4")],
    "percent": [("0.25%", "25%"), ("25%", "2.5"), ("25%", "25 cm")],
    "two units must agree": [
        ("12 cm", "12 mm"), ("12 cm", "120 mm"), ("12 cm^2", "12 cm^3"), ("90°", "90 cm"), ("18 cents", "18 dollars"), ("€5",
        "$5"), ("20 m/s", "20 m"),
        ("75°C", "75°F"), ("12 平方厘米", "12平方米"), ("$5 million", "5"), ("5 m", r"|\$5|"), ("20 kW", "20 W")],
    "the comma": [("12,34", "1234"), ("32, 349", "32349"), ("(1,234)", "1234"), ("0,5", "0.5")],
    "order and brackets": [
        ("(1, 2)", "(2, 1)"), ("(0, 1)", "[0, 1)"), ("[0, 9)", "[0, 1)"), ("1, 2", "1, 2, 3"), ("5, 7", "5"), ("(1, 2)",
        "(1, 2, 3)"),
        ("(1, 2)", "1, 2"), (r"\pm 2", "2"), (r"\begin{pmatrix}2\\1\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"\begin{pmatrix}1 & 2\end{pmatrix}", r"\begin{pmatrix}1 \\ 2\end{pmatrix}"), ("x > 3", "3"), ("x > 3",
        r"[3, \infty)"), ("x > 3", r"y \in (3, \infty)"),
        ("x > 1 and x < 3", r"(1, \infty) \cup (-\infty, 3)"), (r"1\leq|z|\leq 2", "[1, 2]"), ("(x, y) = (4, 3)", "(3, 4)")],
    "names and equations": [
        ("x = 5", "y = 5"), ("a=19, b=2", "a=2, b=19"), ("2x = 10", "10"), ("0", "a^2 + b = 0"), ("x^2 = 4", "4"),
        ("x > 3", "x < 3"), (r"\frac{x}{2} = 5", "5"), (r"\frac{1}{x} = 5", "5"), (r"\sqrt{x} = 5", "5"), ("x! = 5", "5"),
        ("|x| = 5", "5"), ("n = 3k", "3"),
        ("x/2=5", "5"), ("x + 1 = 20", "20"), (r"\log x = 5", "5"), ("2x+4y=3", "3"), ("20 = 30", "30"), ("2 + 2 = 5", "5"),
        ("f(x) = 20", "20x"),
        (r"\angle ABC = 20^\circ", r"\angle ACB = 20^\circ"), ("5 = a^2", "5"), ("20 = wrong", "20")],
    "formulas are not worked out": [
        ("(x+1)^2", "x^2+2x+1"), ("2(x+1)", "2x+2"), ("x+x", "2x"), ("x-1", "1-x"), ("2ab", "2"), ("4210_5", "4210"), ("x/2",
        "2/x"), (r"\sin b \cos a", r"\cos b \sin a"),
        (r"1 - \frac1e", r"1 + \frac1e"), ("(a+b)c", "a+bc"), ("1+i", "2"), (r"\sqrt{x}+1", r"\sqrt{x+1}"), ("x^{10}",
        "x^1 0"), (r"AB \perp CD", r"AB \parallel CD")],
    "wording that changes the value": [
        ("x >= 5", "5"), ("x != 5", "5"), (r"\not= 5", "5"), ("1:2:3", "1:3:2"), ("5 = x", "7 = x"), ("AB = CD", "EF = CD"),
        ("left", "right"), ("right triangle", "triangle"), ("-x = 5", "5"), (r"2 plus \sqrt3", r"2\sqrt3"), ("5 squared", "5"),
        ("2 hundred", "2"), ("20 trillion", "20"), ("5 sevenths", "5"), ("3 thousandths", "3"), ("2 ninths", "2"), ("20 doubled",
        "20"), ("5 tripled", "5"),
        ("20 negative", "20"), ("5 below zero", "5"), ("5 factorial", "5"), ("2 dozen", "2"), ("20 percent less", "20"),
        ("at least 5", "5"), ("5 or more", "5"),
        ("5 at most", "5"), ("less than 5", "5"), ("greater than 20", "20"), ("20th", "20"), ("5 tens", "5"), ("0.6 repeating",
        "0.6"), ("half of seven", "7"),
        ("square root of 49", "49"), ("5 hours 30 minutes", "30"), ("five six", "11"), ("twenty one hundred", "120"), ("0x14",
        "20"), ("3yx", "3"),
        (r"\gcd(20,30)", "20"), (r"20 \bmod 7", "20"), ("5m + 3", "8"), ("5 days", "5 weeks"), ("1/2 1/3", "3/7"), ("B C", "B"),
        ("A(1, 2)", "(2, 1)")],
    "what says nothing equals nothing": [
        ("", "B"), ("", ""), (".", "B"), ("*", "*"), (r"\text{}", ""), ("?", "?"), ("$$", "B. 45"), ("Option", "B"),
        ("B. ()", "A. ()"), ("A. ?", "B"), (",", "and"), ("=", "is"), ("and", "or"), ("is", "about"), ("{}", r"\{\}"),
        (r"\boxed{\boxed{\boxed{}}}", "B"), (r"the answer is \boxed{}", r"the answer is \boxed{}"), ("\ud800", "\ud800")],
    "denials and hedges": [
        ("20 is wrong", "20"), ("20 is not the answer", "20"), ("cannot be 20", "20"), ("not 20", "20"), ("30 is wrong, 20",
        "20"), ("20 (wrong)", "20"),
        ("maybe 20", "20"), ("20 or 30", "20"), ("either 10 or 20", "20"), ("20 maybe 30", "30"), ("20 (or 25)", "20"),
        ("20, which is wrong", "20"), ("可能是12", "12"),
        ("20 30", "20"), ("20; 30", "20"), ("Yes and no", "Yes"), ("Yes, but no", "yes"), ("yes/no", "yes"), ("not yes", "yes"),
        ("Yes, it is not", "yes"),
        ("red or blue", "red and blue"), ("red or blue", "red"), ("light blue", "blue"), ("not red", "red"), ("No response",
        "No")],
    "times of day": [("4:30", "2:15"), ("12:30", "6:15"), ("9:30", "4:30"), ("4:30", "4.5"), ("8:00", "8"), ("4:30 am",
        "4:30 pm"), ("10:20", "1:2"), ("12:00", "12")],
    "repeating decimals": [(r"0.\overline{3}", "0.3"), ("5.(3)", "15"), (r"20\overline{3}", "20")],
    "choice letters": [
        ("A", "B"), ("(A) 45", "B"), ("A", "45"), ("B. 45", "B. 46"), (r"\text{E}", "d"), ("A. 45", "B. 45"), ("A square", "A"),
        ("A red cube", "A"),
        ("C atom", "C"), ("(A) or (B)", "A"), ("A or B", "B"), ("A (or B)", "A"), ("A. 20 or B. 30", "A"), ("A. 20, B. 30",
        "B"), ("(A), (B), (C), (D)", "A"),
        ("A. B. C. D", "A"), ("A (wrong), B (right)", "A"), ("A is incorrect", "A"), ("AC", "A, C"), ("A", "A, C"), ("AB", "A"),
        ("A+B", "A"), ("A^2", "A"), ("A/B", "A"),
        ("either A or B", "B"), ("none of A", "A"), ("(B) and (D0", "B"), ("A B", "A"), ("F(x)", "F"), ("None", "A"), ("A or C",
        "A, C")],
    "numbers": [
        ("43", "42"), ("-5", "5"), (r"\sqrt{2}+\sqrt{3}", r"\sqrt{5}"), (r"\frac{2}{1}", r"\frac12"), ("5!", "5"),
        ("5 2", "5"), ("5)", "5"), ("(2, 3)) 4", "(2, 3)"), ("5 x", "5"), ("2ab", "2"), ("nan", "inf"), ("1_000", "1000"),
        ("1/0", "2/0"), ("", "0"),
        (r"\sqrt{10^{40}+1}", "10^{20}"), ("1/10^{49}", r"\frac{1}{10^{49}+1}"), ("3\\pi", "3"), ("2^2^2^2^2^2", "2^2^2^2^2^3"),
        ("5 cm^", "5")],
}


def flat(table):
    return [pytest.param(*pair, id=f"{point}: {pair[0]} | {pair[1]}") for point in table for pair in table[point]]


@pytest.mark.parametrize("prediction, reference", flat(EQUAL))
def test_equal(prediction, reference):
    assert is_equal(prediction, reference)


@pytest.mark.parametrize("prediction, reference", flat(DIFFERENT))
def test_different(prediction, reference):
    assert not is_equal(prediction, reference)


@pytest.mark.parametrize("text, answer", [
    (r"so \boxed{5}.", "5"),
    (r"\boxed{1} then \boxed{2}", "2"),
    (r"\boxed{\frac{\sqrt{2^{3}}}{4}} cm", r"\frac{\sqrt{2^{3}}}{4}"),
    (r"\boxed 7", "7"),
    (r"\boxed{}", ""),
    (r"the answer is 3 \boxed{\frac{1}{2", None),
    (r"\boxed{1} and then \boxed{\frac{1}{", "1"),
    (r"<think> \boxed{5}", None),
    (r"\boxed{4} <think> no: \boxed{5}", "4"),
    (r"<think> \boxed{5} </think>", None),
    (r"<think> \boxed{4} </think> \boxed{5}", "5"),
    (r"so far </think> the answer is 6.", "6"),
    ("The answer is 42.", "42"),
    ("The final answer is $(0, 1)$. I hope it is correct.", "(0, 1)"),
    ("Answer: \\[\n9\n\\]", "9"),
    ("**Answer:** 7 cm\nBye", "7 cm"),
    ("The answer is 1. No, the answer is 2.5.", "2.5"),
    ("Final answer: the volume of ABCD is 120. I hope so.", "120"),
    ("The answer is Paris.", "Paris"),
    ("#### 1,234", "1,234"),
    ("So the answer is C. 120.", "C. 120"),
    ("The answer is B. Because it fits.", "B"),
    ("Some <answer>77</answer> text 3", "77"),
    ("64 + 67 = **131**", "64 + 67 = 131"),
    ("we find 20 and then -3", "-3"),
    (r"hence it is $5\sqrt{3}$ long", r"hence it is $5\sqrt{3}$ long"),  # so does the word
    ("so it comes to 13/28", "13/28"),
    ("It is not A, therefore I think it's B", "B"),
    (r"so $x = \frac{28\sqrt{3}}{3}$.", r"x = \frac{28\sqrt{3}}{3}"),
    (r"hence V = 300 cm^3.", "hence V = 300 cm^3."),  # as it stands: the unit counts
    (r"an area of $24 \text{ cm}^2$", "24"),
    ("the slope is −3.", "−3"),
    (r"so it is $4+2\sqrt3$ long", r"4+2\sqrt3"),
    ("which makes 4π/3.", "4π/3"),
    ("in the ratio 3:5.", "3:5"),
    ("so 13 1/3 metres.\nWhich is it.", "13 1/3"),
    (r"about $3.2 \times 10^{-4}$", r"3.2 \times 10^{-4}"),
    ("the point (3, -2).", "(3, -2)"),
    ("The answer is 5 cm (half of 10 cm).", "5 cm"),
    ("The answer is B because AB = 12.", "B"),
    ("The answer is 36, which is 12 times 3.", "36"),
    ("The answer is $5 < x$.", "5 < x"),
    ("Answers: 2, 3", "2, 3"),
    ("### Final Answer\n12\n\n### Verification\nIt is 12.4 less 0.4", "12"),
    ("**Answer:**\n- 12", "12"),
    ("The answer is option C.", "C"),
    ("**Answer: B**", "B"),
    ("B. 12\nsince 5 and 13 are the sides", "B. 12"),
    ("A triangle has three sides.", "3"),
    (r"\fbox{42}", "42"),
    ("Final answer: **D**, since A is too small.", "D"),
    ("The answer is 5. I believe this answer is correct.", "5"),
    ("The final answer to this problem is 19.", "19"),
    ("Answer seems to be A.\n\nAnswer: B\n", "B"),
    ("Answer: this one asks which is a colour\nSo we rule out the rest.\nANSWER: B", "B"),
    ("The answer is D, not B.", "D"),
    ("It is D, not B.", "D"),
    ("Answer: rules out C, leaving D", "D"),
    ("The answer is not A, but C.", "C"),
    ("The answer is 94106 or 94107", "94106 or 94107"),
    ("Answer: either A or B", "either A or B"),
    ("The answer is greater than 20.", "greater than 20"),
    ("The answer is not 20.", None),
    ("It is not true that the answer is B.", None),
    ("The answer cannot be 35.", None),
    ("Option B is incorrect.", None),
    ("I do not believe the answer is 20.", None),
    ("It could be A or C.", None),
    ("Plant B is taller than plant A.", "Plant B is taller than plant A."),
    ("There are more than 20 cubes.", "There are more than 20 cubes."),
    ("It takes 5 hours 30 minutes to fly.\nSo 5 hours 30 minutes.", None),
    ("The answer is 12. Wait, the sides are 3 and 5, so we get 15.", "15"),
    ("The answer is 5 because 3+2=5. However I might be wrong, it could be 6.", None),
    ("The answer is B. No, C.", None),
    ("We see x = 2 or x = 3.", "x = 2 or x = 3"),
    ("We find that $x \\lt 3$.", "x \\lt 3"),
    ("The matrix is $ \\begin{pmatrix}1 & 0 \\\\ 0 & 1\\end{pmatrix} $.", "\\begin{pmatrix}1 & 0 \\\\ 0 & 1\\end{pmatrix}"),
    ("There are four red cubes.", "There are four red cubes."),
    ("The left one has four legs, the other one has none.\nSo we count seven.", "7"),
    ("Hence the value of k is negative 5.", "-5"),
    ("C\n\nThe others are too small.", "C"),
    ("Yes, there is.", "Yes, there is."),
    ("**yes**", "yes"),
    ("The color is blue.", "The color is blue."),
    ("我認為應該選 A", "A"),
    ("故选：B", "B"),
    ("【答案】B\n【解析】A项错误。", "B"),
    ("所以图中一共有3个物体。", "3"),
    ("不选A，应选C。", "C"),
    ("面积为1/2", "1/2"),
    ("I do not know.", None),
    ("", None),
])
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


PAID = {  # as they come from models, and what they answer
    "5": ["The answer is 5. I believe this answer is correct.", '{"answer": 5}', "```json\n{\"answer\": 5}\n```", "Dogs - 5",
        "Total:\n- 5", "Result—5",
          "2x = 10, so x = 5.", "Score: 5", "x: 5", "∴ x = 5", "⇒ 5", "5 ✓", "所以，x=5", "five (5)", "There are five (5) objects.",
          "共5个", "It is 5 (half of 10)."],
    "B": ["Looking at the graph, B is correct.", "B is correct because 3 > 2.", "B – mitochondria", "B - the blue one", "[B]",
        "The answer is 'B'.", "A is too short. So B.",
          "So this corresponds to option B.", "选择B选项", "应该选B", "A. B. C. are too short.\nThe answer is B.",
          "Final answer: (B) 12 cm", "B. B"],
    "False": ["False", "**False**", "</think>False"], "None": ["None"], "Incorrect": ["Answer: Incorrect",
        "The answer is Incorrect"],
    "Not enough information": ["Not enough information"], "not similar": ["They are not similar"],
    "yes": ["Yes\n\nThe picture shows a dog.", "Yes there is."], "no": ["No\n\nIt does not.", "No there isn't.",
        "No. The bar on the left is taller."],
    "45 min": ["45 minutes"], "36 cm^2": ["36 cm squared",
        "36 cm$^2$"], r"\frac{4\pi r^3}{3}": [r"\frac{4}{3}\pi r^3"], "0.002": ["10^-3*2"], "y/x": ["x^-1 y"],
    "50000": ["5万"], "4210_5": ["4210₅"], "5 pounds": ["£5"], "120": ["5!=120"], r"\$36.37": [r"21\sqrt{3}"], r"\sin x": ["sin x"], "1, 2": ["x₁=1, x₂=2"],
}
UNPAID = {
    "5": ["The answer is the opposite of 5.", "The answer is the square of 5.", "The answer is the reciprocal of 5.",
        "The answer is the log of 5.", "The answer is 5?",
          "The answer is divisible by 5.", "The answer is a multiple of 5.", "The answer is everything but 5.",
          "The answer is all but 5.", "The answer is 3 out of 5.",
          "Nobody says the answer is 5.", "Suppose the answer is 5.", "Whether the answer is 5 is unclear",
          "The answer is on page 5", "The answer is no 5",
          "The answer is a number among 1 to 5.", "The answer is 3 to 5.", "The answer is x = 5; y = -1",
          "It takes 2 hours 5 minutes.", "blue.5 and more",
          "twice the answer is 5", "5亿", "5成", "5的平方", "5 ten", "five hundred", r"\boxed{5 (2)}", "We saw 5 of 9.",
          "The sum is not 7, it is not 5 either.", "Of 5 or 7."],
    "0.5": ["See the blue.5 there"], "6": ["It lasts 5 hours 6 and then it ends"],
    "-5": ["Dogs - 5", "In total – 5", "mid-5", "sub-5"], "30": ["The answer is 20 of 30", "The answer is 20 by 30",
        "The answer is 20 and/or 30", "答案是20和30"],
    "10": ["5 (2)"], "350": ["三百五"], "305": ["三百五"], "5.0": [r"\sqrt{25.4}"], "2.0": ["61/30"], "23": ["2③"], "42105": ["4210₅"], "1/16": ["2^-1*4"], "-1": ["6/-2*3"],
    "B": ["The answer is everything but B", "It is no longer B", "Eliminate B.", "别选B", "答案排除B", "The answer is B. No, C.",
        "The answer is B. Or C.", "The answer is B; or C",
          "The answer is A to B", "A. 20 B 30", "B or C", "Vitamin B", "B, not B", "It is below (B).", "B. 45 per type A", "The answer is B unless C", "less than B",
          "It is (A) and (B)."],
    "A": ["A. 20\nB. 30\nC. 40", "A\nB\nC\nD", "A 3 B 4", "A) 20 vs C", "A. 20 / B", "A: B", "A还是B", "A as well as B", "The picture shows that it is A or B",
        "The answer is A. Yes B. No", "A. not 5 or so"],
    "C": ["A. 20\nB. 30\nC. 40", "A\nB\nC"], "40": ["A. 20\nB. 30\nC. 40"], "20": [
        f"20 {word}" for word in "halved trebled tenfold lakhs billionths reciprocal upwards untrue doubtful hardly excluded (30)".split()] + [
        "20, which must be doubled", "20 as well as 30", "20 as a lower bound", "20 (at least)"],
    "5 kg": ["5 tons", "5克"], "5 s": ["5 microseconds"], "5 m/s": ["5 s/m",
        "5 m/s/s"], "5 celsius": ["5 fahrenheit"], "x = 3, y = -2": ["-2, 3"], "0.333": ["0.333..."],
    "20-30": ["30-40"], "2002": ["2019-05-12"], "1234": ["1~234"], "25": [r"5\% \times 5\%"], "1.5": ["3frac{1}{2}"],
}


@pytest.mark.parametrize("response, reference", [pytest.param(text, wanted, id=f"{text} | {wanted}") for wanted in PAID for text in PAID[wanted]])
def test_what_is_paid(response, reference):
    assert reward.accuracy_reward(response, reference) == 1.0


@pytest.mark.parametrize("response, reference", [pytest.param(text, wanted, id=f"{text} | {wanted}") for wanted in UNPAID for text in UNPAID[wanted]])
def test_what_is_not_paid(response, reference):
    """By neither way: as a response, or as what stands in a box."""
    assert reward.accuracy_reward(response, reference) == 0.0
    assert "\n" in response or "answer is" in response or reward.accuracy_reward(rf"\boxed{{{response}}}", reference) == 0.0


def test_long_answers_are_not_read():
    assert reward.understand("5 " + "and 5 " * 80) == ("", None) and not is_equal("1+" * 199 + "1.0", "1+" * 199 + "1")


# ---- properties

whole = st.integers(-10**12, 10**12)
small = st.integers(1, 400)
latex_space = st.sampled_from(["", " ", r"\,", r"\!", r"\;", r"\:", r"\ ", "~", r"\quad "])


@st.composite
def exact_numbers(draw):
    """(spelling, a key that is equal for equal numbers alone): k sqrt(n) / d times a power of pi."""
    above, root, below, power = draw(whole), draw(small), draw(small), draw(st.integers(0, 2))
    spelling = rf"\frac{{{above} \sqrt{{{root}}}}}{{{below}}}" + r" \pi" * power
    sign = (above > 0) - (above < 0)
    return spelling, (sign, Fraction(above * above * root, below * below), power if above else 0)


@given(exact_numbers(), exact_numbers())
def test_exact_numbers_are_symmetric_and_told_apart(first, second):
    assert is_equal(first[0], second[0]) == is_equal(second[0], first[0]) == (first[1] == second[1])


@given(whole, small, st.integers(1, 9))
def test_neighbours_are_told_apart(above, below, step):
    fraction = rf"\frac{{{above}}}{{{below}}}"
    assert not is_equal(fraction, rf"\frac{{{above * 10**9 + step}}}{{{below * 10**9}}}")
    assert is_equal(fraction, f"{above * step}/{below * step}")
    assert is_equal(str(above), f"{above:,}".replace("-", "−"))


@given(st.decimals(-10**6, 10**6, places=3), st.decimals(-10**6, 10**6, places=2))
def test_decimals_are_exact(first, second):
    assert is_equal(f"{first:f}", f"{second:f}") == is_equal(f"{second:f}", f"{first:f}") == (first == second)


@given(st.lists(latex_space, min_size=9, max_size=9), st.sampled_from(["", r"\left", r"\big"]), whole, small)
def test_spacing_and_sizing_do_not_matter(space, size, number, root):
    right = r"\right" if size == r"\left" else size
    tokens = [size + "(", str(number), "+", r"\sqrt", "{", str(root), "}", right + ")", ""]
    spaced = "".join(gap + token for gap, token in zip(space, tokens))
    assert is_equal(spaced, rf"{number}+\sqrt{{{root}}}")
    assert is_equal(rf"{number}+\sqrt{{{root}}}", spaced)


@given(whole, st.sampled_from([("cm", "centimeters", r"\text{ cm}"), ("m", "metres", r"\,\mathrm{m}"),
                               ("%", r"\%", "percent"), ("°", r"^\circ", "degrees"), ("cm^2", "cm²", "square cm")]))
def test_sign_and_unit_spelling_do_not_matter(number, spellings):
    for spelling in spellings:
        assert is_equal(f"{number} {spelling}", f"{number} {spellings[0]}")
        assert is_equal(f"{number}".replace("-", "−"), f"{number} {spelling}")


# ---- an answer that says nothing

NOTHING = list("~!$%^&*()-_[]|\\:;'\",.?/ ") + [
    "", "{}", r"\,", r"\quad", r"\text{}", r"\mathrm{\mathbf{}}", r"\left(\right)", r"\boxed{}", r"\boxed{\boxed{}}", "…",
    r"\ldots", r"\frac{}{}", r"\sqrt{}", r"\hspace{1cm}", r"\phantom{x}", r"\textcolor{red}{}", r"\displaystyle", r"\bf",
    r"^\circ", r"\cdot", "\u200b", "\u00a0", "\ufeff", "\u3164", "−", "—", "·", r"\$", r"\\", "\ud800", r"\underline{\qquad}"]
SIGNS = ["<", "=", "+", r"\{", r"\}", r"\pm", "°"]
REFERENCES = [*"ABCDEFGH", "(B)", "B.", "B. 45", r"\text{C}", "5", "0", "-0.5", r"\frac{1}{2}", "25%", "12 cm", r"45^\circ",
r"2\pi",
              r"\{1, 2\}", "1, 2", "(0, 1)", r"(-\infty, 3]", r"\infty", "yes", "No", "blue", "and", "is", "about", "x = 5",
              "1:2:3"]


def test_no_answer_without_letter_or_digit_is_right():
    """3,000 of them, on either side, by every road on which an answer is found."""
    texts = {first + second for first in NOTHING + SIGNS for second in NOTHING + SIGNS}
    assert len(texts) > 2_500
    for text in texts:
        for wanted in REFERENCES:
            assert not is_equal(text, wanted) and not is_equal(wanted, text), (text, wanted)
    for text in NOTHING:
        for road in (r"\boxed{%s}", "The answer is %s", "the answer is: %s.", "Answer: %s", "#### %s", r"$\boxed{\text{%s}}$",
                     "<answer>%s</answer>", "**Answer**\n%s", "Option %s", "The correct choice is (%s)."):
            for wanted in REFERENCES:
                assert reward.accuracy_reward(road % text, wanted) == 0.0, (road, text, wanted)


@pytest.mark.parametrize("text", NOTHING)
def test_what_says_nothing(text):
    assert reward.says_nothing(text) and reward.says_nothing(f" {text} ")
    assert reward.format_reward(rf"so \boxed{{{text}}}") == 0.0
    assert not is_equal(text, text)
    assert reward.accuracy_reward(text, text) is reward.accuracy_reward("5", text) is None  # nobody could be right


@pytest.mark.parametrize("text", [
    r"\infty", "∞", r"+\infty", r"\pi", "π", r"\emptyset", r"\varnothing", "∅", r"\{\}", r"\left\{\right\}", r"\{\emptyset\}",
    "<", ">", "=", "+", "≤", r"\leq", r"\times", "÷", r"\theta", r"\triangle", "△", r"\checkmark", "✓", "★", r"(-\infty, \infty)",
    "漢字", "½", "℃", "①", "😀", "or", "Option", "-5"])
def test_what_says_something(text):
    assert not reward.says_nothing(text) and is_equal(text, text)
    assert reward.format_reward(rf"so \boxed{{{text}}}") == reward.accuracy_reward(rf"\boxed{{{text}}}", text) == 1.0


def test_echoing_the_instruction_earns_nothing():
    for text in (INSTRUCTION, INSTRUCTION + " " + INSTRUCTION, "A square? " + INSTRUCTION):
        assert {reward.accuracy_reward(text, wanted) for wanted in REFERENCES} == {0.0}


PIECES = list("0123456789.,+-*/^=()[]{}|%$°±∞√πxeA_:;<>!& \n\\") + [
    r"\frac", r"\sqrt", r"\pm", "cm", " and ", "is", r"\text{", r"\boxed{", "^2", "\ud800", "\udfff", "\u200b", "\0", "½", "²",
    "{,}",
    "answer is ", "<think>", "</think>", r"\infty", "B.", "1,234", "漢"]
hostile = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES), max_size=20).map("".join))


@settings(max_examples=400, deadline=None)  # work is counted, not timed
@given(hostile, hostile)
def test_any_text_keeps_the_contract(first, second):
    if "\\boxed" not in first and "answer is" not in first:
        assert is_equal(first, first) is not reward.says_nothing(first)
    assert is_equal(first, second) in (True, False)
    assert extract_answer(first) is None or isinstance(extract_answer(first), str)
    assert reward.accuracy_reward(first, second) in (None, 0.0, 1.0)
    assert -0.1 <= reward.language_reward(first) <= 0 and reward.format_reward(first) in (0.0, 1.0)


# ---- hostile text: work is counted, not timed

HOSTILE = {
    "tower": "9^{9^{9^9}}", "tower without braces": "9^9^9^9^9", "huge power": "1.1^{99999999999}",
    "braces": "{" * 10**5 + "5" + "}" * 10**5, "parentheses": "(" * 199 + "5" + ")" * 199,
    "boxed braces": r"\boxed{" + "{" * 10**5 + "5" + "}" * 10**5 + "}", "boxes": r"\boxed{" * 10**5,
    "digits": "9" * 10**6, "boxed digits": r"\boxed{" + "9" * 10**6 + "}", "NUL": "\0" * 10**5,
    "lone surrogates": "\ud800" * 10**5, "minus signs": "-" * 399 + "1", "roots": r"\sqrt" * 70 + "2",
    "many roots": "+".join([r"\sqrt[7]{2}"] * 36), "many powers": "+".join(["2^.37"] * 66), "commas": "1," * 199,
    "sines": "+".join([r"\sin 33^\circ"] * 28), "logarithms": "+".join([r"\log_3 7"] * 40), "factorials": "+".join(["40!"] * 99),
    "sum": "x+" * 199 + "x", "equation": "x=" * 199 + "5", "numerals": "一二三" * 2_000, "number words": "twenty one " * 500,
    "spaces": "answer" + " " * 10**6 + "x", "letters": "answer is " + "a" * 10**6, "fractions": r"\frac{" * 10**5,
    "half-numbers": "5 " * 10**5, "backslashes": "\\" * 10**6, "long ligatures": "\ufdfa" * 10**5,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_bounded_work(name, monkeypatch):
    """Function calls made, in Python and in C (an ordinary verdict: some 500), and costly powers and functions."""
    powers, calls = [], []
    for costly in ("calculate", "computed"):
        function = getattr(answers, costly)
        monkeypatch.setattr(answers, costly, lambda x, y, z, function=function: (
            y in "+-*/:" or powers.append(1)) and False or function(x, y, z))

    def count(frame, event, argument):
        if event in ("call", "c_call"):
            calls.append(event)

    text = HOSTILE[name]
    sys.setprofile(count)
    try:
        reward.accuracy_reward(text, "5.00001"), is_equal("5", text), is_equal(text, text + "1")
    finally:
        sys.setprofile(None)
    assert len(calls) < 30_000 and len(powers) <= 3 * 2 * answers.MOST_POWERS


def test_every_bound_is_met():
    """The parser refuses, one by one, what the bounds forbid: it is then text, equal to itself alone."""
    deep, digits = "(" * 21 + "5" + ")" * 21, "1" * 41
    powers, items = "+".join(["2^2"] * 21), ",".join("12345678901234567890123"[:n] for n in range(1, 22))
    for text, simpler in ((deep, "5"), (digits, digits + ".0"), (powers, "84"), (items, items + ",1"),
                          ("5+" * 200 + "5", "1005"), ("10^{51}", "10^{50}*10"), ("1e-50", "0")):
        assert is_equal(text, text) and not is_equal(text, simpler)


# ---- rewards on text and on samples

def sample(text, answer="5", tokens=10, finish="stop", name="q1"):
    return SimpleNamespace(id=name, question="?", answer=answer, completion_text=text,
                           completion_ids=list(range(tokens)), finish_reason=finish)


def test_accuracy_reward():
    assert reward.accuracy_reward(r"so \boxed{5}", "5") == 1.0
    assert reward.accuracy_reward(r"so \boxed{6}", "5") == 0.0
    assert reward.accuracy_reward(r"<think> so \boxed{5}", "5") == 0.0
    assert reward.accuracy_reward(r"so \boxed{5}", " ") is reward.accuracy_reward("5", None) is None
    assert reward.accuracy_reward(r"so \boxed{\{\}}", r"\emptyset") == 1.0


def test_lone_surrogates_are_graded():
    """What a byte-level tokenizer, or JSON with half an escape, brings in."""
    assert reward.accuracy_reward("\udfff \\boxed{5}", "5") == reward.accuracy_reward("it is a\udcff", "a\udcff") == 1.0
    assert reward.format_reward("\\boxed{\ud800}") == 0.0


def test_language_reward():
    assert reward.language_reward("only Latin, and ∠ABC = 2π × µ, 𝑥 ∈ ℝ, é") == 0.0
    assert reward.language_reward("ab 漢字") == pytest.approx(-0.05)  # 2 of 4 letters
    assert reward.language_reward("да") == pytest.approx(-0.1)
    assert reward.language_reward("12 + 3") == 0.0


def test_format_reward():
    assert reward.format_reward(r"thus \boxed{5}") == 1.0
    assert reward.format_reward(r"<think> \boxed{4} </think> \boxed{5}") == 1.0
    for text in ("5", r"\boxed{}", r"\boxed{5} \boxed{6}", r"<think> \boxed{5}", r"\boxed{5"):
        assert reward.format_reward(text) == 0.0


def test_unfinished_and_overlong_penalties():
    samples = [sample("a"), sample("a", finish="length"), sample("", tokens=0), sample("a", tokens=9)]
    assert reward.unfinished_penalty(samples) == [0.0, -0.1, -0.1, 0.0]
    assert reward.unfinished_penalty(samples, min_tokens=10) == [0.0, -0.1, -0.1, -0.1]
    lengths = [sample("", tokens=tokens) for tokens in (10, 80, 81, 90, 100, 120)]
    assert reward.overlong_penalty(lengths, max_length=100, buffer=20) == [0.0, 0.0, -0.05, -0.5, -1.0, -1.0]


# ---- the command line

def run(*arguments):
    result = subprocess.run([sys.executable, str(ROOT / "reward.py"), *arguments], capture_output=True, text=True)
    return result.returncode, result.stdout, result.stderr


def test_command_line_pair():
    code, out, _ = run(r"-\frac{1}{2}", "-0.5")
    assert code == 0 and out.count("is read as") == 2 and json.loads(out.splitlines()[-1])["equal"] is True
    code, out, _ = run("2", "3")
    assert code == 0 and json.loads(out.splitlines()[-1])["equal"] is False
    code, out, _ = run(os.fsdecode(b"\xff"), "3")
    assert code == 0 and json.loads(out.splitlines()[-1])["equal"] is False


def test_command_line_judges_as_training_does():
    """Whole responses, whose answer is extracted; both readings are shown."""
    for response, wanted, equal, shown in (
            ("Yes", "yes", True, "answer 'Yes' is read as choice none, value str yes"),
            (r"<think>6</think> So \boxed{12\text{ cm}}",
            "12", True, r"answer '12\\text{ cm}' is read as choice none, value Number 12"),
            ("The answer is not B.", "B", False, "answer None is read as choice none, value none"),
            ("(B) 45", "45", True, "answer '(B) 45' is read as choice B, value Number 45"),
            ("5", "(1, 2)", False, "reference '(1, 2)' is read as choice none, value Group (1,2)")):
        code, out, _ = run(response, wanted)
        assert code == 0 and shown in out.splitlines(), out
        assert json.loads(out.splitlines()[-1])["equal"] is equal is bool(reward.accuracy_reward(response, wanted))


def test_command_line_help_and_misuse(tmp_path):
    code, out, _ = run("--help")
    assert code == 0 and "RESPONSE" in out and "--audit" in out
    (tmp_path / "empty.jsonl").write_text("\n")
    for wrong, sentence in (((), "usage"), (("5",), "usage"), (("--audit",), "usage"), (("a", "b", "c"), "usage"), (("--x",
    "5"), "usage"),
                            (("--audit", str(tmp_path / "missing.jsonl")), "missing.jsonl cannot be read: No such file or directory"),
                            (("--audit", str(tmp_path)), "cannot be read: Is a directory"),
                            (("--audit", str(tmp_path / "empty.jsonl")), "empty.jsonl has no row to judge, JSON with response")):
        code, out, errors = run(*wrong)
        assert code == 2 and out == "" and sentence in errors and errors.count("\n") == 1


def test_command_line_audit(tmp_path):
    """Rows of other people: responses, judged as in training; each that differs with its place, id and text."""
    rows = [{"id": "q1", "response": "so \\boxed{5}", "reference": "5", "equal": True, "kind": "int"},
            {"id": 7, "prediction": "so it is 5", "answer": "5", "equal": False, "kind": "int"},
            {"response": "I get 7", "reference": "5", "equal": True, "kind": "decimal"},
            {"response": "who knows", "reference": "5", "equal": False, "kind": "int"},
            {"response": "7", "reference": "5", "equal": True, "kind": "int", "doubtful": "policy"}]
    lines = [json.dumps(row) for row in rows]
    lines[1:1] = ["not json", '{"response": 5, "reference": "5", "equal": true}', "[" * 100_000, "",
                  '{"response": "5", "reference": "5", "equal": "yes"}', '{"response": "5", "reference": "5"}', "[1]"]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    code, out, errors = run("--audit", str(tmp_path / "rows.jsonl"))
    assert code == 0 and errors == ""
    found = json.loads(out.splitlines()[-1])
    assert re.findall(r"rows.jsonl:(\d+): left out", out) == ["2", "3", "4", "6", "7", "8"]
    assert re.findall(r"rows.jsonl:(\d+: [^l].+)", out) == [
        "9: 7: '5' = '5' in 'so it is 5'", "10: no id: '7' != '5' in 'I get 7'", "12: no id: '7' != '5' in '7'"]
    numbers = {kind: [found[kind][name] for name in ("rows", "right", "false +", "false -")] for kind in found}
    assert numbers == {"all": [4, 2, 1, 1], "int": [3, 2, 1, 0], "decimal": [1, 0, 0, 1], "(doubtful)": [1, 0, 0, 1]}
    (tmp_path / "rows.jsonl").write_text("not json\n")
    code, out, errors = run("--audit", str(tmp_path / "rows.jsonl"))
    assert code == 2 and "rows.jsonl has no row to judge" in errors


# ---- the shared corpora, where they are

def grade(name):
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"{path} is not here: the corpora live outside the repository")
    for line in path.read_text().splitlines():
        row = json.loads(line)
        found = extract_answer(row["prediction"]) if row["pred_form"] == "response" else row["prediction"]
        if not row.get("doubtful"):
            yield row["kind"], row["equal"], found is not None and is_equal(found, row["reference"])


@pytest.mark.parametrize("name, shares", [
    ("grader_dev.jsonl", {"int decimal fraction sqrt pi degree percent unit": 0.98, "choice set interval": 0.94}),
    ("grader_dev2.jsonl", {"": 0.98})])  # of all rows
def test_development_corpora(name, shares):
    """Answers of open-source test suites, of public bug reports and of an attacker."""
    verdicts = list(grade(name))
    assert not [row for row in verdicts if row[2] and not row[1]], "a false positive"
    for kinds, share in shares.items():
        chosen = [wanted == verdict for kind, wanted, verdict in verdicts if not kinds or kind in kinds.split()]
        assert sum(chosen) >= share * len(chosen) > 0


def test_choice_pairs():
    verdicts = list(grade("geometry3k_choice_pairs.jsonl"))
    assert len(verdicts) > 500 and all(wanted == verdict for _, wanted, verdict in verdicts)
