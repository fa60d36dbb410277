"""Stage: reward. Text in, number out: the teacher of the run, as every false verdict is trained on.

    python reward.py '\\frac{1}{2}' 0.5       # is PREDICTION equal to REFERENCE?
    python reward.py --audit answers.jsonl    # verdicts over rows of prediction, reference, equal

The grader extracts an answer, cuts it into tokens of one spelling, parses these into values of 100
digits and compares them. Left out on purpose: algebra (what is no number, list or interval is
compared as text), unit conversion, eval, sympy, signals, threads. The policy:
- A reference's decimals (two digits or more) are a rounding: 36.37 accepts 21\\sqrt{3}, not 36.373,
  and 21\\sqrt{3} refuses 36.37. Seven decimals or more accept their own rounding to six digits.
- 25\\% (pct, percent) is 25, 0.25 and 1/4. Degrees, units and $ are ignored where one side alone
  has them; two units must agree (12 cm is not 120 mm). Other words (12 apples) are dropped.
- A comma before three digits groups thousands (1,234 or 1{,}234, not next to a bracket), any other
  makes a list. A decimal comma is read in its LaTeX form alone, 3{,}14.
- An integer before a fraction makes a mixed number: 2 1/2 and 2\\frac12 are 2.5.
- 1, 2 and {2, 1} and "2 or 1" are one set, \\pm 2 is {2, -2}; (1, 2) keeps its order and brackets.
- x = 5, 5 = x, BC \\approx 5, x \\in (0, 5), "the length is 5": the value counts (and 21\\sqrt{3}
  of 21\\sqrt{3} \\approx 36.37); two names must agree; an equation (2x = 10, a^2 + b = 0), an
  inequality and a ratio of three are text.
- (B), b, \\text{B}, B. and B. 45 are choice B; B. 45 is 45 too.
- An answer that says nothing (\\boxed{}, \\text{}, ?, -, $$) equals nothing, itself neither. A sign
  (<, +, \\infty) does say something, \\{\\} is the empty set.
- Extraction, after all thinking: the last balanced \\boxed{}, even an empty one (a cut-off box is
  none); else what follows the last "answer is" or ####; else a choice the response opens with
  (B. 12); else the last number with its sum, ratio or bracket; else the last lone A to H.
- Mere spelling: trailing punctuation, LaTeX spacing and sizing (\\, \\! \\quad \\left \\big), $..$,
  \\text{ cm}, \\dfrac, \\frac12, \\sqrt3, 2*sqrt(3), 1.2e3, full-width digits, × ÷ − π √ ° ² ½.
"""

import decimal
import json
import os
import re
import sys
import unicodedata
from collections import Counter, namedtuple
from decimal import Decimal
from functools import lru_cache

# Bounds on work: hostile text meets one of them, a real answer does not.
LONGEST_ANSWER, LONGEST_RESPONSE = 400, 6_000  # characters; of a response the end is read
MOST_DIGITS, MOST_DEPTH, MOST_POWERS, MOST_ITEMS = 40, 20, 20, 20


# ---------------------------------------------------------------------------------------------
# Step 1. Extract: response -> answer

NESTED = r"(?:[^{}]|\{" * 6 + r"[^{}]*" + r"\})*" * 6  # braces in braces, six deep
BOX = re.compile(rf"\\boxed\s*(?:\{{({NESTED})\}}|([^\s{{$]+))")
PHRASE = re.compile(r"####|<answer>|(?:answers?|option|choice)[\s*]*(?:is|are|:|=)[\s:*#]*"
                    r"|answer\**\s*\n[\s*#]*", re.I)
# what ends an answer: a full stop (but C. 120 goes on), a line, a tag, its reason or a remark
END = re.compile(r"[.;!?](?:\s+(?![\s\d\\-])|$)|\n|</|<\||,?\s(?:because|since|as|which)\s"
                 r"|\s\((?=[^()]*[a-z]{2})")
ARGUMENT = r"\s*(?:\{(?:[^{}]|\{[^{}]*\})*\}|\d)"
ROOT = (rf"(?:\\?[dtc]?frac{ARGUMENT}{ARGUMENT}|(?:\\?sqrt|√)(?:\[\d\])?(?:{ARGUMENT}|\d+)"
        r"|\\pi|pi\b|π)")
DIGITS = r"(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE]-?\d+|\s*/\s*\d+|:\d+)*(?:\s\d+/\d+)?"
TIMES = r"(?:\\times|\\cdot|[*×·])"
TERM = (rf"(?:{DIGITS}(?:\s*{TIMES}\s*10\^\{{?-?\d+\}}?)?(?:\s*{TIMES}?\s*{ROOT})*|{ROOT}+)"
        r"(?:\s*/\s*\d+)?")  # 3, 13 1/3, 2:5, 3.2 \times 10^{-4}, 4\sqrt{2}/3
SUM = rf"(?:[-−–±]|\\pm\s*)?{TERM}(?:\s*(?:[-+−–±]|\\pm)\s*{TERM})*(?:\s*\\?%)?"
# a sum, or a bracket of them; not the tail of a name, a bracket, an exponent or an index
NUMBER = re.compile(rf"(?<![\w)}}\]^])(?<![\^_]\{{)(?:[(\[]\s*{SUM}(?:\s*,\s*{SUM}){{1,9}}\s*[)\]]"
                    rf"|{SUM})|(?<![\d^_])(?<![\^_]\{{){DIGITS}")


def extract_answer(text: str) -> str | None:
    """The answer a response commits to, as it is written there; None where it commits to none."""
    # <think> itself may be missing: some chat templates put it at the end of the prompt
    text = text.rpartition("</think>")[2].partition("<think>")[0][-LONGEST_RESPONSE:]
    if boxes := BOX.findall(text):
        return "".join(boxes[-1]).strip()
    if "\\boxed" in text:  # cut off inside its only box: what stands there is not the answer yet
        return None
    *_, last = [None, *PHRASE.finditer(text)]
    if last:
        text = re.sub(r"\\[()\[\]]|\$|\*\*|`+", " ", text[last.end():][:LONGEST_ANSWER]).strip()
        text = re.sub(r"^(?:-\s+|(?:option|choice)\s+)", "", END.split(text)[0].strip(), flags=re.I)
        if text and not re.search(r"[^\W\d_]{2,}\s+[^\W\d_]{2,}", text):  # two words are prose
            return text
    elif first := re.match(r"\s*(?:Option )?\(?[A-H][.:)]\s[^\n]*", text):
        return first[0].strip()  # the response opens with a choice: B. 12
    found = NUMBER.findall(text) or re.findall(r"\b(?:A(?! [a-z])|[B-H])\b(?!['’])", text)
    return found[-1] if found else text if last and text else None


# ---------------------------------------------------------------------------------------------
# Step 2. Normalise and tokenise: answer -> tokens with one spelling each

GROUPING = str.maketrans("", "", ",~ \\")  # what stands between the thousands
SIGNS = str.maketrans("−–—×·⋅∗÷∕⁄∶≈∈∪", "---****///:==,", "€£¥")
SPELLINGS = [(re.compile(pattern, re.ASCII), meaning) for pattern, meaning in (
    # what surrounds an answer and says nothing
    (r"\\(?:text(?!color)|math|mbox|operatorname|underline|boldsymbol)[a-z]*\s*\{([^{}]*)\}",
     r" \1 "),
    (r"\\!", ""), (r"^\W*(?:[Oo]ption|[Cc]hoice)\b", ""),
    (r"\\\{\s*(?:\\right\s*)?\\\}|\\(?:emptyset|varnothing)(?![A-Za-z])", "∅"),
    (r"(?<!\\)\b(?:left|right)(?=\s*\\?[()\[\]{}|])", ""),
    # degrees, powers of units, big numbers
    (r"(?:\{\})?\^\s*\{\s*(?:\\circ|o)\s*\}|\^?\s*\\(?:circ|degree)(?![a-z])|\^o\b", "°"),
    (r"\s*\^\s*(?:\{\s*(\d)\s*\}(?!\s*\d))?", r"^\1"),  # cm ^ {2} is cm^2
    (r"(?<=[a-z]{2})\.(?=\s)", ""), (r"\bmph\b", "mi per h"),  # sq. cm
    (r"(?<=[a-z])/(?=(?:h|hr|hour|s|sec|second|min|minute)\b)", " per "),
    (r"\bthousand\b", "*10^3"), (r"\bmillion\b", "*10^6"), (r"\bbillion\b", "*10^9"),
    (r"(?<=\d)\s*x\s*(?=10\s*\^)", "*"),  # 1.5 x 10^3
    # 1{,}234 and 3{,}14; mixed numbers; a point with its name, A(3, -2)
    (r"\{,\}(?=\d{3}(?!\d))", ","), (r"\{,\}", "."),
    (r"(?<![\d.^_])(\d+)\s*\\[dtc]?frac\s*(\{)?(\d+)(?(2)\})\s*(\{)?(\d+)(?(4)\})", r"(\1+\3/\5)"),
    (r"(?<![\d.^_,/])(\d+)\s+(\d+)/(\d+)", r"(\1+\2/\3)"), (r"^\s*([A-Z]'*)\s*(?=\(.*,)", r"\1="))]
TOKEN = re.compile(
    r"(?<![(\[{\d,.])[1-9]\d{0,2}(?:(?:,|\\,|~| )\d{3})+(?![\d)\]},])(?:\.\d*)?"  # 1,234
    r"|\d+\.?\d*(?:[eE][-+]?[0-4]?\d(?!\d))?|\.\d+|(?<=[a-z])(?<!pi)\^[23](?!\d)"  # 1.2e3, cm^2
    r"|\\not\s*=|[<>!]=|\\[A-Za-z]+|\\.|\*\*|[A-Za-z]+|\S", re.ASCII)
MEANING = {spelling: meaning for meaning, spellings in {
    "": r"\left \right \big \Big \bigl \bigr \Bigl \Bigr \bigg \displaystyle \rm \bf \limits \quad "
        r"\qquad ~ \, \; \: \( \) \[ \] \\ \$ $", r"\frac": r"\dfrac \tfrac \cfrac dfrac frac",
    r"\sqrt": "sqrt √", r"\pi": "pi π", "*": r"\times \cdot \ast", "/": r"\div", "^": "**",
    "±": r"\pm", "∞": r"\infty", "%": r"\%", "{": r"\{", "}": r"\}", ",": r"\cup and or ;",
    "=": r"\approx \simeq \in approx approximately about around nearly roughly is are equals",
    "≤": r"\le \leq <=", "≥": r"\ge \geq >=", "<": r"\lt", ">": r"\gt", "≠": r"!= \ne \neq \not=",
}.items() for spelling in spellings.split()} | {"\\ ": ""}
MUTE = re.compile(  # says nothing by itself; a command with an argument says what that says
    r"\\(?:[hv]?(?:space|phantom)|(?:text)?color|begin|end)\*?\s*\{[^{}]*\}|\\[A-Za-z]+\s*(?=\{)"
    r"|\\(?:[a-z]*(?:quad|space|skip|style|box|boxed|dots|fill|line)|(?:text|math)[a-z]*|left|right"
    r"|middle|[bB]igg?[lrm]?|limits|rm|bf|it|sf|tt|[dtc]?frac|sqrt|cdot|ast|circ|bullet|prime|mid"
    r"|[lr]?[vV]ert|[lL]arge|small|null|strut|relax)(?![A-Za-z])"
    r"|\\[^A-Za-z{}]|[−∗∘∙⋅∶∣⋮-⋱\u115f\u1160\u3164\uffa0]")
# a letter or a digit; a sign, an arrow, a shape, an emoji; the empty set
SAYS = re.compile(r"[^\W_]|[<=>+×÷±¬℀-⏿■-⟿⤀-⯿🀀-🫿]|\\\{\s*\\\}")


def says_nothing(answer: str) -> bool:
    """Is there no letter, digit or sign in an answer, LaTeX's spacing, fonts and frames aside?"""
    return not SAYS.search(MUTE.sub(" ", answer))


def tokenise(text: str) -> list[str]:
    r"""Cut an answer into tokens: "\dfrac12 \text{ cm}" -> \frac, 12, cm."""
    if not text.isascii():
        text = re.sub("[⁰¹²³⁴-⁹⁻]+", r"^{\g<0>}", re.sub("[¼-¾⅐-⅞]", r" \g<0>", text))
        text = unicodedata.normalize("NFKC", re.sub("[º˚]", "°", text)).translate(SIGNS)
        text = text[:2 * LONGEST_ANSWER]  # one letter can normalise to eighteen
    for pattern, meaning in SPELLINGS:
        text = pattern.sub(meaning, text)
    text = text.lstrip(" \t\n*_:=`\"").rstrip(" \t\n*_:.,`\"\\")
    word = text.isascii() and text.isalpha() and text != "pi"  # "and" by itself is no comma
    meaning = {} if word else MEANING
    tokens = [meaning.get(token, token) for token in TOKEN.findall(text)]
    return [token.translate(GROUPING) if token[0].isdigit() else token for token in tokens if token]


# ---------------------------------------------------------------------------------------------
# Step 3. Parse: tokens -> values

# 100 digits stand for exactness: two different fractions of 40-digit numbers differ by 10^-80 or
# more, two different a*sqrt(b)/c of 15-digit numbers likewise, so that 90 equal digits mean equal.
PRECISE = decimal.Context(prec=100, Emax=999, Emin=-999)
PI = Decimal("3.141592653589793238462643383279502884197169399375"
             "1058209749445923078164062862089986280348253421170680")
OPERATORS = {  # sign: (how tightly it binds, what it does); "=" is met in combine
    "=": (1, None), "+": (2, Decimal.__add__), "-": (2, Decimal.__sub__), "*": (3, Decimal.__mul__),
    "/": (3, Decimal.__truediv__), ":": (3, Decimal.__truediv__),
    "^": (5, lambda x, y: x.sqrt() if y == Decimal("0.5") else x ** y)}  # sqrt is 20 times faster
ENDS = {"", ",", "^2", "^3", *"=+-*/^)]}"}  # of a name
UNITS = {word + plural: words.split()[0] for words in (
    "% percent pct, ° degree deg, mm millimeter millimetre, cm centimeter centimetre, dm, m meter "
    "metre, km kilometer kilometre, in inch inche, ft foot feet, yd yard, mi mile, g gram, kg "
    "kilogram, L liter litre, mL ml, s sec second, min minute, h hr hour, rad radian, day, week, "
    "month, year, lb pound, oz ounce, gallon, pint, cent, ^2 square sq, ^3 cubic, per"
).split(", ") for word in words.split() for plural in ("", "s")}
AMOUNTS = set(  # words that change a number, and so are not dropped
    "hundred trillion dozen squared cubed plus minus over half halves third thirds quarter "
    "quarters fourth fourths fifth fifths sixth sixths tenth tenths".split())
# decimals: as written, 2 in 0.50, and 0 for what is computed; exact: 21\sqrt3 in 21\sqrt3 = 36.37
Number = namedtuple("Number", "value decimals unit name exact", defaults=(0, frozenset(), "", None))
Group = namedtuple("Group", "brackets items")  # "{}" is a set; "()", "[)" and so on keep the order


def expression(tokens: list[str], binding: int, depth: int):
    """Precedence climbing: read what binds tighter than binding. The next token is the last."""
    left = factor(tokens, depth)
    while True:
        token = tokens[-1]
        sign = "*" if token in ("\\frac", "\\sqrt", "\\pi", "(", "{") else token  # 21 \sqrt 3
        if isinstance(left, str) and token not in ENDS:
            left += str(factor(tokens, depth))  # a name goes on: m \angle A, f(2)
        elif isinstance(left, Number) and (token in UNITS or token.isalpha() and len(token) > 3
                                           and token not in AMOUNTS):
            tokens.pop()  # a word of four letters that is no unit is dropped: 12 apples
            left = left._replace(unit=left.unit | {UNITS[token]} if token in UNITS else left.unit)
        elif sign not in OPERATORS or OPERATORS[sign][0] <= binding:
            return left
        else:
            if sign == token:
                tokens.pop()
            right = expression(tokens, OPERATORS[sign][0] - (sign == "^"), depth + 1)
            left = combine(left, sign, right)


def factor(tokens: list[str], depth: int):
    """A number, root, fraction or bracket, one of these with a sign before it, or a name."""
    token = tokens.pop()
    while token in ("=", ","):  # an empty part, as in "x ==" or ", and"
        token = tokens.pop()
    if depth > MOST_DEPTH or token in ENDS - {"+", "-"} or len(token) > MOST_DIGITS:
        raise ArithmeticError("nested too deep, a part is missing, or too many digits")
    if token[0] in ".0123456789" and token != ".":
        value = Decimal(token)
        return Number(value, 0 if token.isdecimal() else max(0, -value.as_tuple().exponent))
    if token == "-":
        value = expression(tokens, 2, depth + 1)
        return value._replace(value=-value.value) if isinstance(value, Number) else f"-{value}"
    if token == "+":
        return expression(tokens, 2, depth + 1)
    if token in ("(", "[", "{"):
        items = [expression(tokens, 0, depth + 1)]
        while tokens[-1] == "," and len(items) < MOST_ITEMS:  # factor skips the comma itself
            items.append(expression(tokens, 0, depth + 1))
        brackets = token + tokens.pop()
        if brackets[1:] not in (")", "]", "}"):
            raise ArithmeticError("a bracket that never closes")
        return items[0] if len(items) == 1 else Group(brackets, items)
    if token == "\\frac":
        if tokens[-1].isdecimal():  # \frac12: each argument is one digit
            tokens[-1:] = reversed(tokens[-1])
        above, below = factor(tokens, depth + 1), factor(tokens, depth + 1)
        named = str in (type(above), type(below))
        return f"{above}/{below}" if named else combine(above, "/", below)
    if token == "\\sqrt":
        index = factor(tokens, depth + 1) if tokens[-1] == "[" else Number(Decimal(2))
        power = combine(Number(Decimal(1)), "/", index)
        return combine(factor(tokens, depth + 1), "^", power)
    return Number(PI) if token == "\\pi" else token


def combine(left, sign: str, right):
    """left sign right. Of an equation the right side is kept, under the name on its left."""
    numbers = isinstance(left, Number) and isinstance(right, Number)
    if sign == "=":
        if isinstance(left, str) and left[0] == "-":
            raise ArithmeticError("an equation: -x = 5")
        if isinstance(left, str) and isinstance(right, Number):
            return right._replace(name=left)
        if isinstance(right, str):  # 5 = x, or AB = CD
            return left._replace(name=right) if isinstance(left, Number) else f"{left}={right}"
        agree = numbers and rounds(left.value, right)
        return right._replace(name=left.name, exact=left.value) if agree else right
    if not numbers or (sign in "+-" and left.unit != right.unit
                       and (left.unit | right.unit) - {"°", "%"}):
        raise ArithmeticError("algebra, as 5m + 3 is")
    value = OPERATORS[sign][1](left.value, right.value)
    if value and abs(value.adjusted()) > 50:
        raise ArithmeticError("too large or too small")
    return Number(value, 0, left.unit | right.unit)


# ---------------------------------------------------------------------------------------------
# Step 4. Compare values

PLAIN = re.compile(r"-?\d{1,9}(?:\.\d{1,6})?", re.ASCII)  # read in a microsecond, without parsing
CHOICE = re.compile(  # B, (B), or B with what it stands for: B. 45
    r"(?:\( )?(?:([A-Ha-h])(?: \))?|([A-H])(?:(?: [).:])+|(?= [A-Za-z]{2}| \())(.+))")


def is_equal(prediction: str, reference: str) -> bool:
    """Do two answers say the same, under the policy at the top of this file?"""
    prediction, reference = prediction.strip(), reference.strip()
    if PLAIN.fullmatch(prediction) and PLAIN.fullmatch(reference):
        return float(prediction) == float(reference)  # a double tells 15 digits apart
    prediction, reference = (
        extract_answer(answer) or "" if "\\boxed" in answer or "answer is" in answer else answer
        for answer in (prediction[-LONGEST_RESPONSE:], reference[-LONGEST_RESPONSE:]))
    if prediction == reference:
        return not says_nothing(prediction)
    if max(len(prediction), len(reference)) > LONGEST_ANSWER:
        return False
    with decimal.localcontext(PRECISE):
        (letter, said), (wanted_letter, wanted) = understand(prediction), understand(reference)
        if not (said and wanted):  # a choice alone, or what equals nothing
            return letter == wanted_letter != ""
        return same(said, wanted)


@lru_cache(maxsize=10_000)  # the responses to one prompt share a reference, and often an answer
def understand(answer: str) -> tuple:
    """An answer, under PRECISE, as (choice letter or "", else: Number, Group, text; "" if none)."""
    letter, tokens = "", tokenise(answer)
    if choice := CHOICE.fullmatch(" ".join(tokens)):
        letter, tokens = (choice[1] or choice[2]).upper(), (choice[3] or "").split()
    text = "".join(tokens)
    if says_nothing(text if letter else answer):
        return letter, ""
    if "±" in text:  # two answers, one with each sign
        tokens = " , ".join(" ".join(tokens).replace("±", sign) for sign in "+-").split()
    rest = ["", "}", *reversed(tokens), "{"]  # an answer is read like what stands in braces
    ratio = re.search(r":[^:=,]*:", text)  # 1:2:3 is no quotient
    if ratio or tokens.count("^") + tokens.count("\\sqrt") > MOST_POWERS:
        return letter, text
    try:
        value = factor(rest, -1)
    except ArithmeticError:  # what we refuse; decimal's own errors are of this kind too
        return letter, text
    return letter, text if rest != [""] else value  # where something unread is left


def same(said, wanted) -> bool:
    """Equal values; but two units, or two names, must agree as well. 25% is 25 and 0.25."""
    left, right = (x.items if isinstance(x, Group) and x.brackets == "{}" else [x]
                   for x in (said, wanted))
    if len(left) > 1 or len(right) > 1:  # sets: "7.5 or 15/2" is the set {7.5}
        return (all(any(same(x, y) for x in left) for y in right)
                and all(any(same(x, y) for y in right) for x in left))
    if type(said) is not type(wanted) or isinstance(said, str):
        return said == wanted or str(said).isalpha() and str(said).lower() == str(wanted).lower()
    if isinstance(said, Group):
        return (said.brackets == wanted.brackets and len(said.items) == len(wanted.items)
                and all(map(same, said.items, wanted.items)))
    if any(x != y and x and y for x, y in ((said.name, wanted.name), (said.unit, wanted.unit))):
        return False
    scales = [1] if said.unit == wanted.unit else [
        1, *[Decimal("0.01")] * ("%" in said.unit), *[100] * ("%" in wanted.unit)]
    values = [said.value] if said.exact is None else [said.value, said.exact]
    return any(rounds(value * scale, wanted) for value in values for scale in scales)


def rounds(value: Decimal, wanted: Number) -> bool:
    """value is the wanted one, or the wanted one is a decimal that stands for value rounded."""
    gap = abs(value - wanted.value)
    if gap <= Decimal("1e-90") * abs(wanted.value):
        return True
    _, digits, exponent = value.as_tuple()
    if len(digits) > 90:  # no decimal can write it: 1/3, \sqrt 3, \pi
        precise = wanted.decimals > 0 and len(wanted.value.as_tuple().digits) > 1
        return precise and 2 * gap <= Decimal(1).scaleb(-wanted.decimals)
    return wanted.decimals > 6 and len(digits) > 5 and 2 * gap <= Decimal(1).scaleb(exponent)


# ---------------------------------------------------------------------------------------------
# Rewards: samples -> numbers


def accuracy_reward(completion: str, answer: str) -> float | None:
    """1.0 for the right answer, else 0.0; None (cannot be scored) where the data has no answer."""
    if not (answer and is_equal(answer, answer)):  # it says nothing: no answer could be right
        return None
    return float(is_equal(extract_answer(completion) or "", answer))


def language_reward(completion: str) -> float:
    """-0.1 times the share of letters that are neither Latin nor Greek (the paper's reward)."""
    letters = Counter(filter(str.isalpha, completion[-LONGEST_RESPONSE:]))
    foreign = [letter for letter in letters if not unicodedata.name(
        unicodedata.normalize("NFKC", letter)[0], "").startswith(("LATIN", "GREEK"))]
    return -0.1 * (sum(letters[letter] for letter in foreign) / max(1, letters.total()))


def format_reward(completion: str) -> float:
    """1.0 for exactly one balanced, filled \\boxed{} after all thinking, else 0.0."""
    text = completion.rpartition("</think>")[2][-LONGEST_RESPONSE:]
    boxes = BOX.findall(text)
    one = len(boxes) == text.count("\\boxed") == 1 and "<think>" not in text
    return float(one and not says_nothing("".join(boxes[0])))


def unfinished_penalty(samples: list, min_tokens: int = 1) -> list[float]:
    """-0.1 for a response cut off or shorter than min_tokens, else 0; score lets it stand alone."""
    return [-0.1 if s.finish_reason != "stop" or len(s.completion_ids) < min_tokens else 0.0
            for s in samples]


def overlong_penalty(samples: list, max_length: int = 2048, buffer: int = 512) -> list[float]:
    """0 up to max_length - buffer tokens, then a line down to -1 at max_length (DAPO, eq. 13)."""
    excess = [len(s.completion_ids) - max_length + buffer for s in samples]
    return [-min(1.0, max(0.0, tokens / buffer)) for tokens in excess]


# ---------------------------------------------------------------------------------------------
# The command line


def audit(path: str) -> dict:
    """Grade the rows of a JSON lines file, print what their "equal" denies, and count by kind."""
    kinds = {}
    with open(path, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                said, wanted, equal = row["prediction"] + "", row["reference"] + "", row["equal"]
            except (ValueError, KeyError, TypeError, RecursionError):
                print(f"{path}:{number}: left out: no row of prediction, reference and equal")
                continue
            found = extract_answer(said) if row.get("pred_form") == "response" else said
            verdict = is_equal(found or "", wanted)
            if verdict != equal:
                print(f"{path}:{number}: {found!r} {'=' if verdict else '!='} {wanted!r}")
            outcome = "right" if verdict == equal else "false +" if verdict else "false -"
            for kind in ["(doubtful)"] if row.get("doubtful") else ["all", str(row.get("kind"))]:
                counts = kinds.setdefault(kind, Counter({"right": 0, "false +": 0, "false -": 0}))
                counts.update(("rows", outcome))
    return kinds


def main() -> None:
    sys.stdout.reconfigure(errors="backslashreplace")  # a lone surrogate can be graded, not printed
    arguments = sys.argv[1:]
    if arguments in (["-h"], ["--help"]):
        print(__doc__)
    elif len(arguments) == 2 and arguments[0] == "--audit" and os.path.isfile(arguments[1]):
        print(json.dumps(audit(arguments[1])))
    elif len(arguments) == 2 and not arguments[0].startswith("--"):
        for answer in arguments:
            with decimal.localcontext(PRECISE):
                print(f"{answer} is read as {understand(answer[:LONGEST_ANSWER])}")
        print(json.dumps({"equal": is_equal(*arguments)}))
    else:
        sys.stderr.write("usage: reward.py PREDICTION REFERENCE, or --audit FILE, or --help\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
