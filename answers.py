"""What an answer is worth: mathematics as people write it, read as a value that can be compared.

Three steps, each one function: `spelled` gives a text one spelling, `read` makes a value of it (a
number of 100 digits, a list, an interval or a formula; its plain text where it is none of these)
and `same` compares two values. reward.py, which reads the words around an answer, has the policy.
Left out on purpose: algebra (nothing is expanded, collected, cancelled or solved), conversion of
units, eval, sympy, signals, threads.
"""

import decimal
import math
import re
import unicodedata
from collections import namedtuple
from decimal import Decimal

# Bounds on work: hostile text meets one of them, a real answer does not.
LONGEST_ANSWER, MOST_DIGITS, MOST_DEPTH, MOST_POWERS, MOST_ITEMS = 400, 40, 20, 20, 20


# ---------------------------------------------------------------------------------------------
# Step 1. Spell: a text -> one spelling

WRAPPED = re.compile(
    r"\\(?:text)?color\s*\{[^{}]*\}|\\(?:(?:text|math)(?:normal|rm|bf|it|sf|tt|bb|cal|up|md)?|mbox"
    r"|hbox|operatorname\*?|underline|boldsymbol)\s*\{([^{}]*)\}")
BOLD = re.compile(r"\*\*(?=\S)(.+?)(?<=\S)\*\*", re.S)
SIGNS = str.maketrans("−–—×·⋅∗÷∕⁄∶≈∈∪∼⟨⟩、。", "---****///:==,=<>,.")
POWERS = {"hundred": 2, "百": 2, "thousand": 3, "千": 3, "万": 4, "million": 6, "亿": 8, "billion": 9}
LATEX, SPELLINGS = ([(re.compile(x, re.ASCII), meaning) for x, meaning in table] for table in (
    # where a backslash stands: 1,\!234; fonts, sizes and spacing; the empty set; degrees
    ((r"(?<=\d),\\!\s*(?=\d{3}(?!\d))", ""),
     (r"\\(?:left|right|middle|[bB]igg?[lrm]?|displaystyle|limits|rm|bf)(?![a-z])|\\!", ""),
     (r"\\(?:emptyset|varnothing)(?![a-z])|\\\{\s*\\\}", "∅"),
     (r"\\q?quad(?![a-z])|\\[,;:()\[\]]|(?<!\\)\\ |\\\\\s*$", " "),
     (r"(?:\{\})?(?:\^\s*\{\s*\\circ\s*\}|\^?\s*\\(?:circ|degree)(?![a-z]))", "°"),
     # 0.1\overline{6}; names of segments and angles; mixed numbers; sets and matrices
     (r"(?<=\d)(\.\d*)\\(?:overline|dot|bar)\s*\{?(\d+)\}?", r"\1r\2"), (r"\\measuredangle", "∠"),
     (r"\bm\s*(?=\\angle|\\widehat|\\overarc)|\\(?:over(?:line|arc|rightarrow|leftrightarrow)|hat"
      r"|widehat|vec|bar)(?=\s*\{?\s*[A-Za-z])", ""),
     (r"^\s*\\(?:lim|sum|int|prod)(?![a-z])[^={]*(?:\{[^{}]*\}[^={]*)*=", ""),  # \lim_{x \to 0} = 1
     (r"\\langle", "("), (r"\\rangle", ")"), (r"\\[lr]?vert(?![a-z])|\\mid(?![a-z])", "|"),
     (r"\\begin\{(?:[pb]matrix\}|array\}\s*\{[^{}]*\})", "⟦("),
     (r"(?:\\\\)?\s*\\end\{(?:[pb]matrix|array)\}", ")⟧"), (r"\\\\", "),(")),
    # everywhere: 1{,}234 and 3{,}14; powers of units and big numbers; 4:30 p.m.
    ((r"(?<=\d)\{,\}(?=\d{3}(?!\d))", ""), (r"\{,\}", "."), (r"\^\s*\{?\s*o\s*\}?(?![a-z])", "°"),
     (r"\s*\^\s*(?:\{\s*(\d)\s*\}(?!\s*\d))?", r"^\1"),  # cm ^ {2} is cm^2
     (r"(?<![\d.^_])(\d+)\s*\\?[dtc]?frac\s*(\{)?(\d+)(?(2)\})\s*(\{)?(\d+)(?(4)\})",
      r"(\1+\3/\5)"),
     (r"\bper cent\b", "percent"), (r"\bmph\b", "mi per h"), (r"(?<=[a-z]{2})\.(?=\s)", ""),
     (r"(?<=\d)\s*(hundred\b|thousand\b|million\b|billion\b|[百千万亿](?![克米瓦]))",
      lambda m: f"*10^{POWERS[m[1]]}"),
     (r"(?<=[a-z]) squared\b", "^2"), (r"(?<=[a-z]) cubed\b", "^3"),
     (r"(?<=\d)\s*x\s*(?=10\s*\^)", "*"), (r"(?<=:\d\d)\s*([aApP])\.?\s?[mM]\b\.?", r" \1m"),
     (r"\\?\{\s*\(?([a-z])\)?\s*(?:\\mid|\||:)\s*(.*?)\\?\}", r"\2"),  # {x | x > 3}
     (r"^\s*([a-z]|[A-Za-z]{2,}):\s+(?=[-\d\\])", r"\1="),  # x: 45
     # 0.(3); 2 1/2; a point with its name, A(3, -2); 2 to 3; 20"; 180 (days)
     (r"(?<=\d)(\.\d*)\((\d+)\)", r"\1r\2"), (r"(?<![\d.^_,/])(\d+)\s+(\d+)/(\d+)", r"(\1+\2/\3)"),
     (r"^\s*([A-Z]'*)\s*(?=\([^()]*,)", r"\1="), (r"^(\d+)\s+to\s+(\d+)$", r"\1:\2"),
     (r"^([^\"]*\d)\"$", r"\1 in"),
     (r"(?<=[\d\s])\(\s*((?:[cmk]m|kg|ft|[a-z]{3,})(?: [a-z]+){0,3})\s*\)$", r" \1"),
     (r"√\s*(\d+)", r"√{\1}"), (r"(?<!\d)~|~(?!\d)", " "), (r"\.\.\.|\\[lc]?dots", "…"),
     (r"\bm\s*(?=∠)|&\s*(?=[=<>])", " "), (r"[ \t]{2,}", " "),
     (r"^\W*[Nn]o (?:real )?solutions?\W*$|^无解$", "∅"))))


def unwrapped(text: str) -> str:
    r"""A text without fonts, colours and bold: \text{cm} is cm."""
    return BOLD.sub(r"\1", WRAPPED.sub(r" \1 ", WRAPPED.sub(r" \1 ", text)))


def spelled(text: str) -> str:
    r"""A text with one spelling of what has several: $\dfrac12\text{ cm}^2$ is \dfrac12  cm^2."""
    if not text.isascii():
        text = re.sub("[⁰¹²³⁴-⁹⁻]+", r"^{\g<0>}", re.sub("[¼-¾⅐-⅞①-⑳]", r" \g<0>", text))
        text = re.sub("[₀-₉]+", r"_{\g<0>}", re.sub("[º˚]", "°", text))
        text = unicodedata.normalize("NFKC", text).translate(SIGNS)
    text = unwrapped(text[:2 * LONGEST_ANSWER]).replace("\\$", " dollar ")  # one letter becomes 18
    if text.count("$") == 1:
        text = re.sub(r"(?<=\d)\s*\$(?!\^)|\$(?=\s*[\d.])", " dollar ", text)
    else:  # two are LaTeX's
        text = text.replace("$", " ")
    for pattern, meaning in (LATEX if "\\" in text else []) + SPELLINGS:
        text = pattern.sub(meaning, text)
    return text


# ---------------------------------------------------------------------------------------------
# Step 2. Read: one spelling -> tokens -> a value

# 100 digits stand for exactness: two different fractions of 40-digit numbers differ by 10^-80 or
# more, two different a*sqrt(b)/c of 15-digit numbers likewise, so that 90 equal digits mean equal.
PRECISE = decimal.Context(prec=100, Emax=999, Emin=-999, traps=[
    decimal.InvalidOperation, decimal.DivisionByZero, decimal.Overflow, decimal.Underflow])
TINY = Decimal("1e-90")
PI = Decimal("3.141592653589793238462643383279502884197169399375"
             "1058209749445923078164062862089986280348253421170680")
ONE = Decimal(1)
BINDS = {"+": 1, "-": 1, "*": 2, "/": 2, ":": 2, "^": 4}  # how tightly a sign binds
FUNCTIONS = tuple(f"\\{x}" for x in "sin cos tan sec csc cot log ln arcsin arccos arctan".split())
CURRENCIES = ("dollar", "cent", "euro", "pound", "yen")
UNITS = {word + plural: words.split()[0] for words in (
    "% percent percentage pct, ° degree deg 度, celsius, fahrenheit, rad radian, per, dB, mol, "
    "mm millimeter millimetre 毫米, cm centimeter centimetre 厘米, dm, m meter metre 米, acre, "
    "km kilometer kilometre 千米 公里, in inch inche, ft foot feet, yd yard, mi mile, hectare, "
    "g gram 克, kg kilogram 千克 公斤, mg, ton tonne, lb pound, oz ounce, gallon, pint, L l liter "
    "litre, mL ml, ms millisecond, s sec second 秒, min minute 分钟, h hr hour 小时, day 天, week, "
    "month, year 年, decade, century, dollar, cent, euro, yen, 元, 角, N, kN, J, kJ, W watt, kW, MW, "
    "Wh, kWh, V volt, kV, mV, mA, Hz, kHz, MHz, GHz, Pa, kPa, MPa, eV, cal, kcal, ohm \\Omega, MB, "
    "GB, TB, ^2 square sq 平方, ^3 cubic 立方").split(", ") for word in words.split()
    for plural in ("", "s")}
MEASURES = "个個只隻张張条條块塊辆輛位名枚颗顆种種人件支本棵朵"  # stand between a number and what is counted
SMALL = ("a", "an", "the", "of", "on", "at")  # may stand among words that say what is counted
KEPT = {*UNITS, *SMALL}  # of short words, these are no product of letters
GROUPING = str.maketrans("", "", ", \\")  # what stands between the thousands
TOKEN = re.compile(
    r"(?<![(\[{\d,.])[1-9]\d{0,2}(?:(?:,|\\,| )\d{3})+(?![\d)\]},])(?:\.\d*)?"  # 1,234
    r"|\d*\.\d*r\d+|\d+\.?\d*(?:[eE][-+]?[0-4]?\d(?!\d))?|\.\d+"  # 0.1r6, 1.2e3, .5
    r"|(?<=[a-z])(?<!pi)\^[23](?!\d)|\\not\s*=|\|\||[<>]=|(?<!\d)!=|\\[A-Za-z]+|\\.|\*\*"
    r"|[A-Za-z]+'*|平方|立方|小时|分钟|千克|公斤|[厘毫千公]?[米里]|\S", re.ASCII)
TIME = re.compile(r"(?<![\d:.])0?((?:1?\d|2[0-4]):[0-5]\d(?::[0-5]\d)?)(\s*[ap]m)?(?![\d:.])", re.I)
MEANING = {spelling: meaning for meaning, spellings in {
    r"\frac": r"\dfrac \tfrac \cfrac dfrac frac", r"\binom": r"\dbinom \tbinom", r"\angle": "∠",
    r"\sqrt": "sqrt √", r"\pi": "pi π", "*": r"\times \cdot \ast", "/": r"\div", "^": "**",
    "±": r"\pm", "∞": r"\infty infinity", "%": r"\%", "{": r"\{", "}": r"\}", "∥": r"\parallel ||",
    ",": r"\cup ; & and or", "≤": r"\le \leq \leqslant <=", "≥": r"\ge \geq \geqslant >=",
    "=": r"\approx \simeq \sim \in is are equals", "<": r"\lt", ">": r"\gt", r"\exp": "exp",
    "≠": r"!= \ne \neq \not=", "dollar": "USD", "cent": "¢", "euro": "€", "pound": "£", "yen": "¥",
}.items() for spelling in spellings.split()} | {x[1:]: x for x in FUNCTIONS}
# what can be asked for: x, AB, f(2), a_37, |AB|, side length, AB/CD; not 2x, x^2, |x|, \sqrt{x}
NAME = re.compile(
    r"-?(?:[A-Za-z]'*|[A-Z]*[a-z]?_\w+|\|[A-Z]+\||[A-Z][A-Z\d]*(?:\^-1)?(?: \* [A-Z][A-Z\d]*"
    r"(?:\^-1)?)?|[A-Z]?[a-z]{3,}|[\u4e00-\u9fff]+|\w+\(.*\)"
    r"|\\(?:sin|cos|tan)\([^a-z]*(?:\\[a-z]+)?\)|\\(?:angle|triangle)\w+|\\(?:var)?(?:alpha|beta"
    r"|gamma|delta|epsilon|eta|theta|lambda|mu|rho|sigma|tau|phi|psi|omega)(?:_\w+)?)'*")
CLOCK = re.compile(  # alone, in brackets, behind a name
    rf"(?:[A-Z](?![a-z])\w*(?:_?{{\w+}})?(?::[A-Z]\w*)? ?=)?\s*"
    rf"(?:{TIME.pattern}|\({TIME.pattern}\))\s*", re.I)
RANGE = re.compile(  # 30-40, 2019-05-12: with blanks around its sign it is a difference
    r"(?:dollar )?\s*\d[\d.,]*%?(?:-(?: dollar)? ?\d[\d.,]*%?)+(?: [a-z].*)?")
FORMULA = re.compile(
    r"[\d\\=<>^_|!∅∞+*/]|[A-Za-z]'(?![a-z])|\w\(|^pi$|\b(?:sin|cos|tan|log|ln) [a-z]\b")

# decimals: as written, 2 in 0.50, and 0 for what is computed; exact: 21\sqrt3 in 21\sqrt3 = 36.37
# unit: sorted names, "/s" and "cm^2" among them; COUNTED alone where a word says what is counted
Number = namedtuple("Number", "value decimals unit name exact", defaults=(0, (), "", None))
COUNTED = ("",)
Group = namedtuple("Group", "brackets items name", defaults=("",))  # {} is a set; others keep order
# A formula is a text: terms parted by " + ", their factors by " * ", both sorted, x^-1 for 1/x.


def read(answer: str):
    """The value of a spelled answer: a Number, a Group or a formula; else its plain text."""
    if re.search(r"[^\W\d_]{2}", answer) and not FORMULA.search(answer):
        items = [plain(item) for item in re.split(r",|;|&|\band\b", answer) if item.strip()]
    elif time := CLOCK.fullmatch(answer):
        items = [Group("time", [time[1] or time[3]], (time[2] or time[4] or "").strip().lower())]
    else:
        tokens = tokenise(re.sub(r"^(?:\\approx|\\sim|=)", "", answer))
        if tokens.count("±") > 1 and ("=" in tokens or "\\pm\\pm" in answer):
            return plain(answer)
        if "±" in tokens:  # two answers, one with each sign
            tokens = [y for s in "+-" for y in [*(s if x == "±" else x for x in tokens), ","]][:-1]
        work = sum(3 * (x in FUNCTIONS) + (x in ("^", "\\sqrt")) for x in tokens)
        if work > MOST_POWERS or RANGE.fullmatch(answer) or TIME.search(answer) or (
                re.search(r":[^:=,]*:", answer)):  # 1:2:3 is no quotient
            return plain(answer)
        try:
            with decimal.localcontext(PRECISE):
                items, _ = Reader(tokens).items(("",))
        except ArithmeticError:  # what we refuse; decimal's own errors are of this kind too
            return plain(answer)
    return items[0] if len(items) == 1 else Group("{}", items)


def plain(answer: str) -> str:
    """A text without case, article and punctuation where it is prose; else as it is written."""
    if re.search(r"[\\=<>^_|]", answer) or not re.search(r"[^\W\d_]{2}", answer):
        return re.sub(r"(?<!\d) | (?!\d)", "", " ".join(tokenise(answer)))  # 1 0 is not 10
    words = re.findall(r"[^\W\d_]+|\d[\d.,]*|[^\s\w,;:'\"()!?]", answer.casefold())
    return " ".join(words[words[0] in ("a", "an", "the") and len(words) > 1:])


def tokenise(answer: str) -> list[str]:
    """Cut a spelled answer into tokens with one meaning each; 3ab is 3, a, b."""
    tokens = []
    for match in TOKEN.finditer(answer):
        token = MEANING.get(match[0], match[0])
        token = token.translate(GROUPING) if token[0].isdigit() else token
        glued = len(token) < 3 or answer[match.start() - 1:match.start()].isdigit()
        letters = token.isascii() and token.isalpha() and token.islower() and len(token) < 4
        tokens += token if letters and glued and token not in KEPT else [token]
    return tokens


class Reader:
    """Recursive descent over the tokens of an answer; ArithmeticError is where we refuse."""

    def __init__(self, tokens: list[str]):
        self.rest, self.depth = ["", *reversed(tokens)], 0  # the next token is last, "" the end

    def items(self, ends: tuple) -> tuple[list, str]:
        """What commas part, up to a token of ends: (values, that token)."""
        items = []
        while len(items) < MOST_ITEMS:
            parts, signs = [self.expression(0)], []
            while self.rest[-1] in tuple("=<>≤≥≠"):
                signs.append(self.rest.pop())
                while signs[-1] == "=" == self.rest[-1]:  # x == 1
                    self.rest.pop()
                parts.append(self.expression(0))
            items.append(relate(parts, signs) if signs else parts[0])
            if self.rest[-1] != ",":
                break
            while self.rest[-1] == ",":  # as in ", and"
                self.rest.pop()
        if self.rest[-1] not in ends:
            raise ArithmeticError("something is left unread, or too many items")
        return items, self.rest.pop()

    def expression(self, binding: int):
        """Precedence climbing: read what binds tighter than binding."""
        left = self.factor(binding)
        while True:
            if isinstance(left, Number) and binding < BINDS["^"] - 1:  # h in r^2 h is no unit of 2
                left = self.measured(left)
            token = self.rest[-1]
            beside = token[:1].isalpha() or token[:1] == "\\" or token in ("(", "∞")
            sign = "*" if beside else "^" if token in ("^2", "^3") else token  # 21 \sqrt 3, x^2
            if BINDS.get(sign, 0) <= binding or beside and isinstance(left, Number) and left.unit:
                return left
            if not beside:
                self.rest[-1:] = token[1:]
            left = combine(left, sign, self.expression(BINDS[sign] - (sign == "^")))

    def measured(self, left: Number) -> Number:
        """A number with its units, and without the words that say what is counted."""
        words, last, per, power, units = 0, "", "", "", [*left.unit]
        while token := self.rest[-1]:
            word = token.isalpha() and (token.islower() and len(token) > 2 or token in MEASURES
                                        or words and (token > "\u4e00" or token in (*SMALL, "in"))
                                        or token == "of")
            if token in ("^2", "^3") and units and not words:
                units[-1] += token
            elif UNITS.get(token, "")[:1] == "^" and (token[0] != "^" or last[:4] == "unit"):
                power = UNITS[token]
            elif token == "per" or token == "/" and units and self.rest[-2] in UNITS:
                per = "/"
            elif token in UNITS and not words:
                units.append(per + UNITS[token] + power)
                power = ""
            elif units == ["°"] and token in ("C", "F"):
                units.append(token)
            elif not word and not (token == "*" and units and self.rest[-2] in UNITS) or words == 5:
                break
            else:
                words += word
            last = self.rest.pop()
        return left._replace(unit=tuple(sorted(units)) or COUNTED * (words > 0))

    def factor(self, binding: int = 0):
        """What one sign joins to the next, with the marks behind it: 5!, a_{37}, 4210_5."""
        token, self.depth = self.rest.pop(), self.depth + 1
        if self.depth > MOST_DEPTH or len(token) > MOST_DIGITS:
            raise ArithmeticError("nested too deep, or too many digits")
        value = self.atom(token, binding)
        while self.rest[-1] in ("!", "_"):
            if self.rest.pop() == "_":
                value = f"{inner(value)}_{inner(self.factor())}"
            else:
                value = Number(Decimal(math.factorial(whole(value)))) if isinstance(
                    value, Number) else f"{inner(value)}!"
        self.depth -= 1
        return value

    def argument(self):
        """Of a command: what stands in brackets, one command, name or number."""
        token = self.rest.pop()
        if not (token.isalnum() or token[:1] in ("{", "(", "[", "\\")):
            raise ArithmeticError("a command without its argument")
        self.depth += 1
        value = self.atom(token, 0)
        self.depth -= 1
        return value

    def atom(self, token: str, binding: int):
        """A number, a bracket, a command with its arguments or a name."""
        if token[:1].isdigit() or token[:1] == "." != token:
            return repeating(token) if "r" in token else Number(
                Decimal(token), max(0, -Decimal(token).as_tuple().exponent))
        if token in ("-", "+"):
            value = self.expression(max(BINDS["+"], binding))  # of 2^-1*4 the 1 alone
            if token == "+":
                return value
            return value._replace(value=-value.value) if isinstance(  # -1.41 has two decimals
                value, Number) else combine(Number(-ONE), "*", value)
        if token in ("(", "[", "{", "⟦"):
            items, end = self.items((")", "]", "}", "⟧"))
            if token + end not in ("()", "[]", "{}", "⟦⟧", "(]", "[)"):
                raise ArithmeticError("a bracket that never closes")
            if token + end in ("()", "[]", "{}") and len(items) == 1:
                return items[0]
            return Group(token + end, items)
        if token == "|":
            value = self.expression(0)
            if self.rest.pop() != "|":
                raise ArithmeticError("a bar that never closes")
            return value._replace(value=abs(value.value)) if isinstance(
                value, Number) else f"|{inner(value)}|"
        if token in ("\\frac", "\\binom"):
            if self.rest[-1].isdecimal():  # \frac12 is 1/2
                self.rest[-1:] = reversed(self.rest[-1])
            above, below = self.argument(), self.argument()
            return combine(above, "/", below) if token == "\\frac" else Number(
                Decimal(math.comb(whole(above), whole(below))))
        if token == "\\sqrt":
            if self.rest[-1].isdecimal() and len(self.rest[-1]) > 1:
                raise ArithmeticError("\\sqrt25 is shown as a root of 2, and meant as one of 25")
            index = self.argument() if self.rest[-1] == "[" else Number(Decimal(2))
            return combine(self.argument(), "^", combine(Number(ONE), "/", index))
        if token in ("\\pi", "\\exp"):
            return Number(PI) if token == "\\pi" else combine("e", "^", self.factor())
        if token in FUNCTIONS:
            return self.function(token)
        if token in CURRENCIES:
            value = self.expression(BINDS["+"])
            if not isinstance(value, Number):
                raise ArithmeticError("money of no amount")
            if value.unit not in ((), (UNITS[token],)):
                raise ArithmeticError("money in another unit")
            return value._replace(unit=(UNITS[token],))
        if token in ("\\angle", "\\triangle"):
            return token + written(self.factor())
        if not (token.strip("'").isalpha() or token[:1] == "\\" or token == "∞"):
            raise ArithmeticError("a part is missing, or we do not know the sign")
        while len(token) > 2 and len(self.rest[-1]) > 2 and self.rest[-1].isalpha():
            token += self.rest.pop()  # words are one name: side length
        if self.rest[-1] == "(" and (len(token) == 1 and token in "fgh" or token.isupper()):
            self.rest.pop()
            token += f"({','.join(map(written, self.items((')',))[0]))})"
        return token

    def function(self, name: str):
        r"""\sin 2x, \log_2 8, \sin^2 x: a number where we can tell it exactly, else a name."""
        base = power = None
        while self.rest[-1][:1] in ("_", "^"):
            mark = self.rest.pop()
            if mark == "_":
                base = self.factor()
            else:
                power = self.factor() if mark == "^" else Number(Decimal(mark[1]))
        inside = self.factor()
        while self.rest[-1] == "°" or self.rest[-1].strip("\\").isalpha() and (
                self.rest[-1] not in (*FUNCTIONS, "\\frac", "\\sqrt")):  # sin 2x cos y
            inside = self.measured(inside) if self.rest[-1] == "°" and isinstance(
                inside, Number) else combine(inside, "*", self.factor())
        if isinstance(inside, Number):
            value = Number(computed(name, inside, base))
        else:
            value = f"{name}{'' if base is None else '_' + inner(base)}({written(inside)})"
        return value if power is None else combine(value, "^", power)


def computed(name: str, inside: Number, base: Number | None) -> Decimal:
    """A logarithm with its base, or the sine of a multiple of 3 degrees; no other has one value."""
    if name in ("\\log", "\\ln"):
        if (base is None) == (name == "\\log") or not all(
                isinstance(x, Number) and x.value > 0 for x in (inside, base or inside)):
            raise ArithmeticError("a logarithm without a base, or of no positive number")
        return inside.value.ln() / (base.value.ln() if base else ONE)
    turns = inside.value / (360 if inside.unit == ("°",) else 2 * PI)
    exact = inside.unit in ((), ("°",)) and abs(turns * 120 - round(turns * 120)) <= TINY
    if name not in ("\\sin", "\\cos", "\\tan") or not exact:
        raise ArithmeticError("a function's value that we do not compute")
    waves = []
    for x in (turns % 1 * 2 * PI, (turns + Decimal("0.25")) % 1 * 2 * PI):  # a cosine is a sine too
        wave, term, n = x, x, 1
        while abs(term) > Decimal("1e-99"):
            term *= -x * x / ((n + 1) * (n + 2))
            wave, n = wave + term, n + 2
        waves.append(round(wave, 95).normalize())
    return waves[0] if name == "\\sin" else waves[1] if name == "\\cos" else waves[0] / waves[1]


def repeating(digits: str) -> Number:
    """0.1r6 is 0.1666..: all digits less those before the r, over nines and zeros."""
    before, again = digits.split("r")
    nines = 10 ** len(before.partition(".")[2]) * (10 ** len(again) - 1)
    before = before.replace(".", "") or "0"
    return Number(Decimal(int(before + again) - int(before)) / nines)


def whole(x) -> int:
    if not isinstance(x, Number) or x.unit or x.value not in range(41):
        raise ArithmeticError("no whole number, or none that is small")
    return int(x.value)


def written(x) -> str:
    """One text for all spellings of a value."""
    if isinstance(x, Group):
        return x.brackets[0] + ",".join(map(written, x.items)) + x.brackets[1]
    return f"{Decimal(f'{x.value:.80g}').normalize():f}" if isinstance(x, Number) else x


def inner(x) -> str:
    """A text that stands inside a larger formula: a sum, a product or a power in brackets."""
    return f"({written(x).replace(' ', '')})" if re.search("[ ^/]", written(x)) else written(x)


DECIMAL, LONG = re.compile(r"-?\d+(?:\.\d+)?"), re.compile(r"-?\d+\.\d{50,}")


def shorter(number: re.Match) -> str:
    """Of a formula's 80 digits, products of rounded ones, 30 are safe."""
    return f"{Decimal(f'{Decimal(number[0]):.30g}').normalize()}"


def combine(left, sign: str, right):
    """left sign right, of numbers and formulas: a number, or a formula's text."""
    if any(isinstance(x, Number) and x.name for x in (left, right)):
        raise ArithmeticError("an equation inside a formula")
    if isinstance(left, Number) and isinstance(right, Number):
        unit, alike = left.unit or right.unit, left.unit == right.unit
        if not alike and sign in "+-" and unit != ("°",) or "%" in unit and (
                not alike or sign not in "+-") or right.unit and (
                left.unit and (not alike or sign not in "+-") or sign in "/:^") or (
                left.unit and sign == "^"):
            raise ArithmeticError("a sum of two units, as 5m + 3, or arithmetic with units")
        value = calculate(left.value, sign, right.value)
        if not value.is_finite() or value and abs(value.adjusted()) > 50:
            raise ArithmeticError("too large or too small")
        return Number(value, 0, unit)
    if any(isinstance(x, Group) or isinstance(x, Number) and x.unit for x in (left, right)):
        raise ArithmeticError("no formula has a unit or a list")
    if sign == "^":
        return f"{inner(left)}^{inner(right)}"
    if sign == "-":
        sign, right = "+", combine(Number(-ONE), "*", right)
    elif sign in "/:":
        sign, right = "*", combine(Number(ONE), "/", right) if isinstance(
            right, Number) else f"{inner(right)}^-1"
    parts = [part for x in (left, right) for part in (
        [inner(x)] if sign == "*" and " + " in written(x) else written(x).split(f" {sign} "))]
    if len(parts) > MOST_ITEMS:
        raise ArithmeticError("a formula too long")
    numbers = [Decimal(part) for part in parts if DECIMAL.fullmatch(part)]
    number = sum(numbers, start=ONE - ONE) if sign == "+" else math.prod(numbers, start=ONE)
    parts = sorted(part for part in parts if not DECIMAL.fullmatch(part))
    if number != (0 if sign == "+" else 1):
        parts.insert(0, written(Number(number)))
    return f" {sign} ".join(parts)


def calculate(x: Decimal, sign: str, y: Decimal) -> Decimal:
    """x sign y. Powers are whole, or roots of a low degree: others take too long."""
    if sign != "^":
        return x + y if sign == "+" else x - y if sign == "-" else x * y if sign == "*" else x / y
    if y == Decimal("0.5"):
        return x.sqrt()
    degree = next((n for n in range(1, 13) if abs(y * n - round(y * n)) < TINY), None)
    if degree and degree % 2 and degree > 1 and x < 0:  # the cube root of -8
        return calculate(-x, sign, y) * (-1) ** round(y * degree)
    if degree is None or degree > 1 and x < 0:
        raise ArithmeticError("a power that is no root")
    root = x if degree == 1 or not x else Decimal(float(x) ** (1 / degree))
    for _ in range(4 if root is not x else 0):  # Newton's steps, from 16 digits to 100
        root -= (root - x / root ** (degree - 1)) / degree
    return root ** round(y * degree)


def relate(parts: list, signs: list[str]):
    """Sides and the signs between them: a value with its name, an interval, or an equation."""
    first, last = parts[0], parts[-1]
    names = first.items if isinstance(first, Group) else [first]
    name = written(first) if all(isinstance(x, str) and NAME.fullmatch(x) for x in names) else ""
    if set(signs) != {"="}:
        if interval := between(parts, signs):
            return interval
    elif len(parts) == 2 and isinstance(last, str) and len(last) < 4 and NAME.fullmatch(
            last) and not isinstance(first, str):  # 5 = x
        return first._replace(name=last)
    elif isinstance(last, Number) and not (name and any(
            isinstance(x, str) and name in x for x in parts[1:])):  # x = x/2 = 5
        numbers = [x for x in parts if isinstance(x, Number)]
        agree = numbers[:-1] and all(rounds(x.value, last) for x in numbers[:-1])
        sums = re.fullmatch(r"[A-Za-z]+(?: \+ [A-Za-z]+)*", written(first))  # m + n = 2 + 3 = 5
        if name or agree and (len(numbers) == len(parts) or sums):
            return last._replace(name=name, exact=numbers[-2].value if agree else None)
    elif isinstance(last, Group) and name and len(parts) == 2:
        return last._replace(name=name)
    if not any(isinstance(x, str) for x in parts):
        raise ArithmeticError("numbers that differ, or lists")
    return "".join(map(str.__add__, map(written, parts), [*signs, ""]))


def between(parts: list, signs: list[str]) -> Group | None:
    """x > 3 or 1 < x <= 2 as an interval of one name; None where it is none."""
    if signs[0] in ">≥":  # read it from the other end
        parts, signs = parts[::-1], [{">": "<", "≥": "≤"}.get(sign, "") for sign in signs[::-1]]
    ends = [isinstance(x, Number) or "∞" in written(x) for x in parts]
    if not set(signs) <= {"<", "≤"} or ends not in ([1, 0], [0, 1], [1, 0, 1]):
        return None
    name = parts[ends.index(False)]
    low, high = parts[0] if ends[0] else "-1 * ∞", parts[-1] if ends[-1] else "∞"
    left = "[" if ends[0] and signs[0] == "≤" else "("
    right = "]" if ends[-1] and signs[-1] == "≤" else ")"
    named = NAME.fullmatch(written(name)) and not (name.isalpha() and len(name) > 3)
    return Group(left + right, [low, high], name) if named else None


# ---------------------------------------------------------------------------------------------
# Step 3. Compare: two values -> equal or not


def same(said, wanted) -> bool:
    """Equal values; but two units, or two names, must agree as well. 25% is 25 and 0.25."""
    left, right = (x.items if isinstance(x, Group) and x.brackets == "{}" else [x]
                   for x in (said, wanted))
    if len(left) > 1 or len(right) > 1:  # sets: "7.5 or 15/2" is the set {7.5}
        names = [{x.name for x in items if not isinstance(x, str)} - {""}
                 for items in (left, right)]
        if sorted(len(x) > 1 for x in names) == [False, True] and set() in names:  # x = 3, y = -2
            return len(left) == len(right) and all(map(same, left, right))
        return (all(any(same(x, y) for x in left) for y in right)
                and all(any(same(x, y) for y in right) for x in left))
    if type(said) is not type(wanted) or isinstance(said, str):
        texts = [x for x in (said, wanted) if isinstance(x, str)]
        return said == wanted or len(texts) == 2 and len({LONG.sub(shorter, x) for x in texts}) == 1
    if said.name and wanted.name and said.name != wanted.name:
        return False
    if isinstance(said, Group):
        return (said.brackets == wanted.brackets and len(said.items) == len(wanted.items)
                and all(map(same, said.items, wanted.items)))
    if said.unit and wanted.unit and said.unit != wanted.unit:
        return False
    scales = [ONE] if said.unit == wanted.unit else [
        ONE, *[Decimal("0.01")] * ("%" in said.unit), *[100] * ("%" in wanted.unit)]
    values = [said.value] if said.exact is None else [said.value, said.exact]
    return any(rounds(value * scale, wanted) for value in values for scale in scales)


def rounds(value: Decimal, wanted: Number) -> bool:
    """value is the wanted one, or the wanted one is a decimal that stands for value rounded."""
    gap = abs(value - wanted.value)
    if gap <= TINY * abs(wanted.value):
        return True
    _, digits, exponent = value.as_tuple()
    if len(digits) > 90:  # no decimal can write it: 1/3, \sqrt 3, \pi
        precise = wanted.decimals > 0 and len(wanted.value.normalize().as_tuple().digits) > 1
        return precise and 2 * gap <= Decimal(1).scaleb(-wanted.decimals)
    return wanted.decimals > 6 and len(digits) > 5 and 2 * gap <= Decimal(1).scaleb(exponent)
