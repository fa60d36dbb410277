"""Stage: reward. Text in, number out: the teacher of the run, as every false verdict is trained on.

    python reward.py '\\frac{1}{2}' 0.5       # is a RESPONSE, or a bare answer, right for REFERENCE?
    python reward.py --audit answers.jsonl    # verdicts over rows of response, reference, equal

The grader extracts the answer of a response, gives it one spelling, reads it (a choice, a number, a
set, an interval, a formula, else text) and compares exact values. RL finds and exploits whatever is
wrongly paid, so where a rule would have to guess it refuses. LESSON.md has the policy, point by
point. Left out on purpose: algebra (nothing is expanded, collected, cancelled or solved), sines and
logarithms, conversion of units, and eval, sympy, signals, threads.
"""

import decimal
import json
import math
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

DENIALS = (r"(?:(?<!\\)\b(?:not|never|neither|nor|none|cannot|anything|without|except|wrong|incorrect|false"
           r"|invalid|impossible|unlikely|rather|instead)\b|n['’]t\b|不|错|非)")
# words that deny an answer, hedge it, compare with it or change its number
CHANGES = re.compile(rf"{DENIALS}|(?<!\\)\b(?:either|may|maybe|perhaps|possibly|might|could|unsure"
    r"|guess|half|halves|thirds?|quarters?|(?:four|fif|six|seven|eigh|nin|ten|twelf|[a-z]+teen"
    r"|[a-z]+tie|hundred|thousand|million)ths?|dozens?|scores?|pairs?|couple|twice|thrice|doubled?"
    r"|tripled?|times|fold|squared|cubed|root|power|factorial|negative|minus|plus|point"
    r"|over|under|above|below|beyond|between|from|past|more|less|fewer|greater|larger|smaller|than"
    r"|least|most|minimum|maximum|within|until|up|down|off|hundred|thousand|[a-z]*illion|exceed\w*|increas\w*|decreas\w*|reduc\w*"
    r")\b|[或多少倍半至超负]|[大小]于|以[上下内外]", re.I)
DENIED = re.compile(DENIALS, re.I)

NESTED = r"(?:[^{}]|\{" * 6 + r"[^{}]*" + r"\})*" * 6  # braces in braces, six deep
BOX = re.compile(rf"\\(?:boxed|fbox)\s*(?:\{{({NESTED})\}}|([^\s{{$]+))")
PHRASE = re.compile(
    r"####|<answer>|\b(?:answer|option|choice)s?(?:\s+(?:to|of|for)\s[\w\s]{1,40}?)?[\s*]*"
    r"(?::|=|\b(?:is|are|(?:seems? to|must|should|would|will) be)\b)[\s:*#_]*|\banswer\**\s*\n[\s*#]*"
    r"|答案[\s*]*(?:应?[是为為]|:|：)?[\s:：*】]*|(?<!不)(?:[应應][该該]?|故)?[选選](?![项項])[择擇]?[\s:：为為*]*",
    re.I)
# what ends an answer: a full stop (but C. 120 goes on), a line, a tag; then its reason or an aside
END = re.compile(r"[.;!?](?:\s+(?![\s\d\\-])|$)|\n|</|<\||[。；]")
REASON = re.compile(r",?\s+(?:because|since|as)\s.*|[,，]?因为.*", re.S)
ASIDE = re.compile(r",?\s+which\s.*|\s\([^()]*[a-z]{2}[^()]*\)\W*$", re.S)
REMARK = re.compile(r"\W*(?:(?:indeed|also|thus)\s)?(?:(?:in)?(?:correct|right|wrong|valid|reasonable)"
                    r"|(?:as|given|shown|found|based|consistent|below|above|the same)\b.*)\W*", re.I)
TAKEN_BACK = re.compile(r"\b(?:wait|actually|however|correction|mistake|is wrong|['’]s wrong)\b", re.I)
NOT_THIS = re.compile(  # the answer is D, not B
    r"[,;]?\s*\b(?:(?:and|but)\s+)?(?:not|rather than|instead of|rules? out)\s+(?:be\s+)?(?:option\s+"
    r"|choice\s+)?(?:\(?[A-H]\b\)?|-?\d[\d.,]*(?![^\s,.]))(?:\W*but\b)?|不[是选選]\s*[A-H\d]+")
PROSE = re.compile(r"[^\W\d_]{2,}[\s,]+[^\W\d_]{2,}|[\u4e00-\u9fff]{4}")
SENTENCE = re.compile(r"[.;!?](?=\s|$)|\n|[。；]")
WORDS = re.compile(r"((?<![\\A-Za-z{])[A-Za-z]*[a-z]{2}[A-Za-z'’]*|[\u4e00-\u9fff]+)")
VALUE = re.compile(r"(?<![\^_\w])(?<![\^_]\{)\.?\d")
CHOSEN = re.compile(r"\(([A-H])\)|\b(?:option|choice|is|be|so)\W{1,4}([A-H])(?![\w'’])", re.ASCII)
LETTER = re.compile(r"(?<![A-Za-z\d])([B-H]|A(?! [a-z]))(?![A-Za-z\d'’])", re.ASCII)


def extract_answer(text: str) -> str | None:
    """The answer a response commits to, as it is written there; None where it commits to none."""
    # <think> itself may be missing: some chat templates put it at the end of the prompt
    text = text.rpartition("</think>")[2].partition("<think>")[0][-LONGEST_RESPONSE:].strip()
    if boxes := BOX.findall(text):
        return "".join(boxes[-1]).strip()
    if "\\boxed" in text:  # cut off inside its only box: what stands there is not the answer yet
        return None
    text, remark = NOT_THIS.sub("", text.replace("**", "")), None
    for phrase in reversed([*PHRASE.finditer(text)]):
        before, after = SENTENCE.split(text[:phrase.start()])[-1], text[phrase.end():]
        clause = re.sub(r"\\[()\[\]]|`+", " ", after[:LONGEST_ANSWER]).strip()
        clause = without_reason(END.split(clause)[0]).strip(" \t,*_")
        if says_nothing(clause) or REMARK.fullmatch(clause) or DENIED.search(before) or (
                TAKEN_BACK.search(after)):
            continue
        if not PROSE.search(clause) or CHANGES.search(clause):
            return clause
        if value := last_value(clause):
            return value
        remark = remark or clause  # words: an answer where no other phrase has a number or a letter
    if remark:
        return remark
    reads = understand(text)[1] if len(text) <= LONGEST_ANSWER else ""
    if "\n" not in text and (isinstance(reads, Number) or not PROSE.search(text)):
        return text or None  # a bare answer
    if first := re.match(r"(?:Option )?\(?[A-H](?:[.:)]\s[^\n]*|\)?[.:]?(?=\s*\n))", text):
        return first[0].strip()  # the response opens with a choice: B. 12
    short = len(text) < 100 and not SENTENCE.search(text[:-1]) and not DENIED.search(text)
    return text if reads in ("yes", "no") else last_value(text) or (text if short else None)


def without_reason(text: str) -> str:
    """An answer without "because .." and the like, unless an aside denies it: 20 (wrong)."""
    text = REASON.split(text)[0]
    aside = ASIDE.search(text)
    doubt = aside and (DENIED.search(aside[0]) or re.search(r"\bor\b", aside[0]))
    return text[:aside.start()] if aside and not doubt else text


def last_value(text: str) -> str | None:
    """The last number with its formula, or choice, in prose; None where it is denied or changed."""
    text = re.sub(r"\b(?:the|this|that|which|no|each|another|other)\s+one\b", " ", unwrapped(text))
    text = re.sub(r"\b(?:negative|minus)\s+(?=\d)", "-", COUNT.sub(counted, text))
    for sentence in reversed(SENTENCE.split(text)):
        parts = WORDS.split(sentence) + ["", ""]  # formulas, and between them words
        chosen, letters = [*CHOSEN.finditer(sentence)], set(LETTER.findall(sentence))
        last = max((i for i in range(0, len(parts), 2) if VALUE.search(parts[i])), default=None)
        if last is None and not chosen and not letters:
            continue
        at = len("".join(parts[:last or 0]))
        if last is None or chosen and chosen[-1].start() > at:
            hedge = len(letters) > 1 and (last is None and not chosen or re.search(r"\bor\b", sentence))
            at, said = (chosen[-1].start(), chosen[-1][1] or chosen[-1][2]) if chosen else (
                sentence.index(min(letters)), min(letters))
            return None if hedge or DENIED.search(sentence, sentence.rfind(",", 0, at) + 1) else said
        if DENIED.search(sentence, sentence.rfind(",", 0, at) + 1):
            return None
        end, said = last, parts[last]
        while last > 1 and parts[last - 1] in ("and", "or") and VALUE.search(parts[last - 2]):
            last, said = last - 2, f"{parts[last - 2]} {parts[last - 1]} {said}"
        around = " ".join([*parts[max(0, last - 1):last], said, *parts[end + 1:end + 5]])
        return None if CHANGES.search(around) else said.strip(" ,:$*_`\n\\") or None
    return None


# ---------------------------------------------------------------------------------------------
# Step 2. Normalise: answer -> one spelling, then tokens with one meaning each

NUMERALS = {word: n for n, words in [
    *enumerate("zero零 one一 two二两兩 three三 four四 five五 six六 seven七 eight八 nine九 ten eleven "
               "twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()),
    *zip(range(20, 100, 10), "twenty thirty forty fifty sixty seventy eighty ninety".split()),
    (10, "十"), (100, "hundred百"), (1000, "thousand千"), (10_000, "万"), (10**6, "million")]
    for word in re.findall("[a-z]+|[^a-z]", words)}
WORD = f"(?:{'|'.join(filter(str.isascii, NUMERALS))})"
COUNT = re.compile(  # 一 says one where it counts: 一个, but 一共 is "in all"
    rf"\b{WORD}(?:(?:(?:(?<=hundred)|(?<=thousand))\s+and)?[\s-]+{WORD})*\b"
    "|[零一二三四五六七八九两兩十百千万]+(?=[个個只隻张張条條块塊辆輛位名枚颗顆种種元度]|\\W*$)", re.I)
FILLER = re.compile(
    r"[\s*_\"'`]*(?:(?:so|thus|hence|therefore|then|i (?:think|believe)(?: that)?|we (?:get|have|find)"
    r"|(?:the )?(?:(?:final|correct|right|best) )?(?:answer|option|choice)s?(?: is| are|:)?|they are"
    r"|(?:it|there|that)(?:['’]s| is| are| were)|(?:a )?total of|only|just|exactly|about|around"
    r"|approximately|nearly|roughly)\b[\s,:]*|(?:答案|[应應]?[该該]?[选選]|所以|因此|一?共|有|约|大约"
    r"|[是为為]|等于)[是为為有:：\s]*)", re.I)
SUBJECT = re.compile(r"(?:the|its?|this|these|that|those|they|he|she|his|her|their|our|my|your)\b"
                     r"[^.;?!=]*?\s(?:is|are|was|were|equals?|=)\s+|[^\d=]*?[\u4e00-\u9fff](?:是|为|為|等于)\s*", re.I)
TAIL = re.compile(r"\s+(?:is|are)\s+(?:(?:the|my)\s+)?(?:correct|right|final)?(?:\s*(?:answer|option"
                  r"|choice))?\W*$", re.I)
GROUPING = str.maketrans("", "", ",~ \\")  # what stands between the thousands
SIGNS = str.maketrans("−–—×·⋅∗÷∕⁄∶≈∈∪∼⟨⟩、。", "---****///:==,=<>,.", "￥")
WRAPPED = re.compile(
    r"\\(?:text)?color\s*\{[^{}]*\}|\\(?:text|math|mbox|operatorname|underline|boldsymbol)[a-z]*\s*"
    r"\{([^{}]*)\}")
SPELLINGS = [(re.compile(pattern, re.ASCII), meaning) for pattern, meaning in (
    # what surrounds an answer and says nothing
    (r"\\(?:left|right|middle|[bB]igg?[lrm]?|displaystyle|limits|rm|bf)(?![a-z])|\\!", ""),
    (r"\\(?:emptyset|varnothing)(?![A-Za-z])|\\\{\s*\\\}|^\W*no (?:real )?solutions?\W*$", "∅"),
    (r"\\q?quad(?![a-z])|\\[,;:()\[\]]|~|(?<!\\)\\ |\\\\\s*$", " "),
    # money, degrees, powers of units, big numbers
    (r"\\\$", " dollar "),
    (r"(?:\{\})?\^\s*\{\s*(?:\\circ|o)\s*\}|\^?\s*\\(?:circ|degree)(?![a-z])|\^o\b", "°"),
    (r"\s*\^\s*(?:\{\s*(\d)\s*\}(?!\s*\d))?", r"^\1"),  # cm ^ {2} is cm^2
    (r"(?<=[a-z]{2})\.(?=\s)", ""), (r"\bmph\b", "mi per h"), (r"(?<=\d)\"$", " in"),
    (r"(?<=\d)\s*hundred\b", "*10^2"), (r"(?<=\d)\s*thousand\b", "*10^3"),
    (r"(?<=\d)\s*million\b", "*10^6"), (r"(?<=\d)\s*billion\b", "*10^9"),
    (r"(?<=\d)\s*x\s*(?=10\s*\^)", "*"), (r"(?<=:\d\d)\s*([aApP])\.?\s?[mM]\b\.?", r" \1m"),
    # 1{,}234 and 3{,}14; 0.1\overline{6}; mixed numbers; a point with its name, A(3, -2)
    (r"\{,\}(?=\d{3}(?!\d))", ","), (r"\{,\}", "."),
    (r"(\d*\.\d*)(?:\\(?:overline|dot|bar)\s*\{?(\d+)\}?|\((\d+)\))", r"\1r\2\3"),
    (r"(?<![\d.^_])(\d+)\s*\\[dtc]?frac\s*(\{)?(\d+)(?(2)\})\s*(\{)?(\d+)(?(4)\})", r"(\1+\3/\5)"),
    (r"(?<![\d.^_,/])(\d+)\s+(\d+)/(\d+)", r"(\1+\2/\3)"), (r"^\s*([A-Z]'*)\s*(?=\([^()]*,)", r"\1="),
    # names of segments and angles; what is asked for before its value; sets and matrices
    (r"\bm\s*(?=\\angle|∠|\\widehat|\\overarc)|\\(?:over(?:line|arc|rightarrow|leftrightarrow)"
     r"|widehat|vec|hat|bar)(?=\s*\{?\s*[A-Za-z])", ""),
    (r"^[\s$]*\\(?:(?:lim|sum|int|prod|sin|cos|tan)(?![a-z])|log_\S+\s*\(?\d)[^=]*=", ""),
    (r"\\\{\s*\(?([a-z])\)?\s*(?:\\mid|\||:)\s*(.*)\\\}", r"\2"), (r"\\langle", "("),
    (r"\\rangle", ")"), (r"\\[lr]?vert(?![a-z])|\\mid(?![a-z])", "|"),
    (r"\\begin\{[pb]matrix\}", "⟦("), (r"(?:\\\\)?\s*\\end\{[pb]matrix\}", ")⟧"),
    (r"&\s*(?=[=<>\\])", ""), (r"\\\\", "),("), (r"(?<=[\d\s])\(\s*([a-z]{3,}(?: [a-z]+){0,3})\s*\)$", r" \1"),  # 180 (days)
    (r"(?<=\d)\s+to\s+(?=\d)", ":"))]
TOKEN = re.compile(
    r"(?<![(\[{\d,.])[1-9]\d{0,2}(?:(?:,|\\,|~| )\d{3})+(?![\d)\]},])(?:\.\d*)?"  # 1,234
    r"|\d*\.\d*r\d+|\d+\.?\d*(?:[eE][-+]?[0-4]?\d(?!\d))?|\.\d+|(?<=[a-z])(?<!pi)\^[23](?!\d)"
    r"|\\not\s*=|[<>!]=|\\[A-Za-z]+|\\.|\*\*|[A-Za-z]+'*|平方|立方|[厘毫千公]?[米里]|[度元]|[\u4e00-\u9fff]|\S", re.ASCII)
TIME = re.compile(r"(?<![\d:.])0?((?:\d|1\d|2[0-4]):[0-5]\d(?::[0-5]\d)?)(\s*[ap]m)?(?![\d:.])", re.I)
MEANING = {spelling: meaning for meaning, spellings in {
    r"\frac": r"\dfrac \tfrac \cfrac dfrac frac", r"\binom": r"\dbinom \tbinom", r"\angle": "∠",
    r"\sqrt": "sqrt √", r"\pi": "pi π", "*": r"\times \cdot \ast", "/": r"\div", "^": "**",
    "±": r"\pm", "∞": r"\infty infinity", "%": r"\%", "{": r"\{", "}": r"\}",
    ",": r"\cup ; & and or", "≤": r"\le \leq \leqslant <=", "≥": r"\ge \geq \geqslant >=",
    "=": r"\approx \simeq \sim \in is are equals", "<": r"\lt", ">": r"\gt", r"\exp": "exp",
    "||": r"\parallel", "≠": r"!= \ne \neq \not=", "dollar": "USD", "pound": "£", "euro": "€", "yen": "¥",
}.items() for spelling in spellings.split()}
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


def unwrapped(text: str) -> str:
    r"""A text without fonts, colours and bold: \text{cm} is cm."""
    return WRAPPED.sub(r" \1 ", WRAPPED.sub(r" \1 ", text)).replace("**", " ")


def counted(words: re.Match) -> str:
    """A number in words as digits: twenty-one, 三十二. What is none (five six) stays as it is."""
    total = last = 0
    for word in re.findall(rf"{WORD}(?![a-z])|[^\sa-z-]", words[0].lower()):
        n = NUMERALS[word]
        if n < 100 and word != "十":  # it adds to the one before: twenty, one
            if last and (last < 20 or last % 10 or n > 9):
                return words[0]
            last += n
        elif total % (10 * n):
            return words[0]
        else:  # it multiplies the one before: two, hundred
            total, last = total + max(last, 1) * n, 0
    return str(total + last)


def normalise(answer: str) -> str:
    r"""One spelling, without what says nothing: "So it is $\dfrac12 \text{ cm}$." -> \dfrac12 cm."""
    if not answer.isascii():
        answer = re.sub("[⁰¹²³⁴-⁹⁻]+", r"^{\g<0>}", re.sub("[¼-¾⅐-⅞]", r" \g<0>", answer))
        answer = unicodedata.normalize("NFKC", re.sub("[º˚]", "°", answer)).translate(SIGNS)
    answer = NOT_THIS.sub("", unwrapped(answer[:2 * LONGEST_ANSWER]))  # one letter can normalise to eighteen
    for pattern, meaning in SPELLINGS:
        answer = pattern.sub(meaning, answer)
    answer = answer.replace("$", " dollar " if answer.count("$") % 2 else " ")  # else it is LaTeX's
    while lead := FILLER.match(answer) or SUBJECT.match(answer):
        if DENIED.search(lead[0]):
            break
        answer = answer[lead.end():]
    answer = COUNT.sub(counted, without_reason(TAIL.sub("", answer)))
    answer = re.sub(r"^\s*(?:negative|minus|负)\s*(?=\d|\\)", "-", answer, flags=re.I)
    return answer.lstrip(" \t\n*_:=`\"").rstrip(" \t\n*_:.,`\"\\")


def tokenise(text: str) -> list[str]:
    """Cut a normalised answer into tokens with one meaning each; 3ab is 3, a, b."""
    tokens = []
    for match in TOKEN.finditer(text):
        token = MEANING.get(match[0], match[0])
        token = token.translate(GROUPING) if token[0].isdigit() else token
        glued = len(token) < 3 or text[match.start() - 1:match.start()].isdigit()
        letters = token.isascii() and token.isalpha() and token.islower() and len(token) < 4
        tokens += token if letters and glued and token not in (*UNITS, *SMALL) else [token]
    return tokens


# ---------------------------------------------------------------------------------------------
# Step 3. Parse: tokens -> values

# 100 digits stand for exactness: two different fractions of 40-digit numbers differ by 10^-80 or
# more, two different a*sqrt(b)/c of 15-digit numbers likewise, so that 90 equal digits mean equal.
PRECISE = decimal.Context(prec=100, Emax=999, Emin=-999)
TINY = Decimal("1e-90")
PI = Decimal("3.141592653589793238462643383279502884197169399375"
             "1058209749445923078164062862089986280348253421170680")
BINDS = {"+": 1, "-": 1, "*": 2, "/": 2, ":": 2, "^": 4}  # how tightly a sign binds
RELATIONS = tuple("=<>≤≥≠")
UNITS = {word + plural: words.split()[0] for words in (
    "% percent percentage pct, ° degree deg 度, mm millimeter millimetre 毫米, cm centimeter centimetre 厘米, "
    "dm, m meter metre 米, km kilometer kilometre 千米 公里, in inch inche, ft foot feet, yd yard, mi mile, "
    "g gram, kg kilogram, mg, L l liter litre, mL ml, s sec second, min minute, h hr hour, rad "
    "radian, day, week, month, year, lb pound, oz ounce, gallon, pint, dollar, cent, euro, yen, N, "
    "kN, J, kJ, W watt, kW, MW, Wh, kWh, V volt, kV, mV, mA, Hz, kHz, MHz, GHz, Pa, kPa, MPa, eV, "
    "cal, kcal, mol, ohm \\Omega, dB, MB, GB, TB, 元, ^2 square sq 平方, ^3 cubic 立方, per"
).split(", ") for word in words.split() for plural in ("", "s")}
SMALL = ("a", "an", "the", "of", "on", "at")  # may stand among words that say what is counted
# decimals: as written, 2 in 0.50, and 0 for what is computed; exact: 21\sqrt3 in 21\sqrt3 = 36.37
Number = namedtuple("Number", "value decimals unit name exact", defaults=(0, frozenset(), "", None))
Group = namedtuple("Group", "brackets items name", defaults=("",))  # "{}" is a set, others have order
# A formula is a text: terms parted by " + ", their factors by " * ", both sorted, x^-1 for 1/x.


class Reader:
    """Recursive descent over the tokens of an answer; ArithmeticError is where we refuse."""

    def __init__(self, tokens: list[str]):
        self.rest, self.depth = ["", *reversed(tokens)], 0  # the next token is last, "" the end

    def items(self, ends: tuple) -> tuple[list, str]:
        """What commas part, up to a token of ends: (values, that token)."""
        items, signs = [], []
        while len(items) < MOST_ITEMS:
            while self.rest[-1] in ("=", ","):  # an empty part, as in "= 5" or ", and"
                self.rest.pop()
            parts = [self.expression(0)]
            while self.rest[-1] in RELATIONS:
                signs = [*signs[:len(parts) - 1], self.rest.pop()]
                while self.rest[-1] == "=":  # x == 1
                    self.rest.pop()
                parts.append(self.expression(0))
            items.append(relate(parts, signs) if parts[1:] else parts[0])
            if self.rest[-1] != ",":
                break
        if self.rest[-1] not in ends:
            raise ArithmeticError("something is left unread, or too many items")
        return items, self.rest.pop()

    def expression(self, binding: int):
        """Precedence climbing: read what binds tighter than binding."""
        left = self.factor()
        while True:
            left = self.measured(left) if isinstance(left, Number) else left
            token = self.rest[-1]
            beside = token[:1].isalpha() or token[:1] == "\\" or token in ("(", "{", "∞")
            sign = "*" if beside else "^" if token in ("^2", "^3") else token  # 21 \sqrt 3, x^2
            if BINDS.get(sign, 0) <= binding:
                return left
            if not beside:
                self.rest[-1:] = token[1:]
            left = combine(left, sign, self.expression(BINDS[sign] - (sign == "^")))

    def measured(self, left: Number) -> Number:
        """A number with its units, and without the words that say what is counted."""
        words, unit = 0, set(left.unit)
        while token := self.rest[-1]:
            if token in UNITS and (not words or token[0] == "^"):
                unit.update([UNITS[token]] * (not words))
            elif token in ("/", "*") and unit and self.rest[-2] in UNITS:
                unit.update(["per"] * (token == "/"))
            elif words < 5 and (token[0] > "\u4e00" or token.isalpha() and token.islower() and (
                    len(token) > 2 or words and token in (*SMALL, "in"))):
                words += 1
            elif not (unit == {"°"} and token in ("C", "F")):
                break
            self.rest.pop()
        return left._replace(unit=frozenset(unit))

    def factor(self):
        """What one sign joins to the next, with the signs that stand behind it."""
        token, self.depth = self.rest.pop(), self.depth + 1
        if self.depth > MOST_DEPTH or len(token) > MOST_DIGITS:
            raise ArithmeticError("nested too deep, or too many digits")
        value = self.atom(token)
        while self.rest[-1] in ("!", "_"):
            if self.rest.pop() == "_":  # an index, or the base of a number: 4210_5
                value = f"{inner(value)}_{self.argument()}"
            else:
                value = Number(Decimal(math.factorial(whole(value)))) if isinstance(
                    value, Number) else f"{inner(value)}!"
        self.depth -= 1
        return value

    def argument(self) -> str:
        """One token, or what stands in braces, as it is written."""
        token = text = self.rest.pop()
        if token == "{":
            text = "".join(iter(lambda: self.rest.pop() if self.rest else "", "}"))
        return text

    def atom(self, token: str):
        """A number, a bracket, a command with its arguments or a name."""
        if token[:1].isdigit() or token[:1] == "." != token:
            return repeating(token) if "r" in token else Number(
                Decimal(token), max(0, -Decimal(token).as_tuple().exponent))
        if token in ("-", "+"):
            value = self.expression(BINDS["+"])
            return value if token == "+" else combine(Number(Decimal(-1)), "*", value)
        if token in ("(", "[", "{", "⟦"):
            items, end = self.items((")", "]", "}", "⟧"))
            if token + end not in ("()", "[]", "{}", "⟦⟧", "(]", "[)"):
                raise ArithmeticError("a bracket that never closes")
            return items[0] if len(items) == 1 and token != "⟦" else Group(token + end, items)
        if token == "|":
            value = self.expression(0)
            if self.rest.pop() != "|":
                raise ArithmeticError("a bar that never closes")
            return Number(abs(value.value)) if isinstance(value, Number) else f"|{inner(value)}|"
        if token in ("\\frac", "\\binom"):
            if self.rest[-1].isdecimal():  # \frac12: each argument is one digit
                self.rest[-1:] = reversed(self.rest[-1])
            above, below = self.factor(), self.factor()
            return combine(above, "/", below) if token == "\\frac" else Number(
                Decimal(math.comb(whole(above), whole(below))))
        if token == "\\sqrt":
            index = self.factor() if self.rest[-1] == "[" else Number(Decimal(2))
            return combine(self.factor(), "^", combine(Number(Decimal(1)), "/", index))
        if token == "\\pi":
            return Number(PI)
        if token == "\\exp":
            return combine("e", "^", self.factor())
        if token in ("dollar", "pound", "euro", "yen"):
            value = self.expression(BINDS["+"])
            return combine(value, "*", Number(Decimal(1), unit=frozenset({token})))
        if token in ("\\angle", "\\triangle"):
            return token + self.argument()
        if not (token.strip("'").isalpha() or token[:1] == "\\" or token == "∞"):
            raise ArithmeticError("a part is missing, or we do not know the sign")
        while len(token) > 2 and len(self.rest[-1]) > 2 and self.rest[-1].isalpha():
            token += self.rest.pop()  # words are one name: side length
        if self.rest[-1] == "(" and (len(token) == 1 and token in "fgh" or token.isupper()):
            self.rest.pop()
            token += f"({','.join(map(text, self.items((')',))[0]))})"
        return token


def repeating(digits: str) -> Number:
    """0.1r6 is 0.1666..: all digits less those before the r, over nines and zeros."""
    before, again = digits.split("r")
    nines = 10 ** len(before.partition(".")[2]) * (10 ** len(again) - 1)
    before = before.replace(".", "") or "0"
    return Number(Decimal(int(before + again) - int(before)) / nines)


def whole(x) -> int:
    if not isinstance(x, Number) or x.unit or x.value not in range(100):
        raise ArithmeticError("neither a number nor a small one")
    return int(x.value)


def text(x) -> str:
    """One text for all spellings of a value."""
    if isinstance(x, Group):
        return x.brackets[0] + ",".join(map(text, x.items)) + x.brackets[1]
    return f"{x.value.normalize():.40g}" if isinstance(x, Number) else x


def inner(x) -> str:
    """A text that stands inside a larger formula: a sum, a product or a power in brackets."""
    return f"({text(x).replace(' ', '')})" if re.search("[ ^/]", text(x)) else text(x)


def combine(left, sign: str, right):
    """left sign right, of numbers and formulas: a number, or a formula's text."""
    if isinstance(left, Number) and isinstance(right, Number):
        if sign in "+-" and left.unit != right.unit and (left.unit | right.unit) - {"°", "%"}:
            raise ArithmeticError("two units in one sum, as 5m + 3 has")
        value = calculate(left.value, sign, right.value)
        if value and abs(value.adjusted()) > 50:
            raise ArithmeticError("too large or too small")
        return Number(value, 0, left.unit | right.unit)
    if any(isinstance(x, Group) or isinstance(x, Number) and x.unit for x in (left, right)):
        raise ArithmeticError("no formula has a unit or a list")
    if sign == "^":
        return f"{inner(left)}^{inner(right)}"
    if sign == "-":
        sign, right = "+", combine(Number(Decimal(-1)), "*", right)
    elif sign in "/:":
        sign, right = "*", combine(Number(Decimal(1)), "/", right) if isinstance(
            right, Number) else f"{inner(right)}^-1"
    parts = [part for x in (left, right) for part in (
        [inner(x)] if sign == "*" and " + " in text(x) else text(x).split(f" {sign} "))]
    return f" {sign} ".join(sorted(part for part in parts if (sign, part) != ("*", "1")))


def calculate(x: Decimal, sign: str, y: Decimal) -> Decimal:
    """x sign y. Powers are whole, or roots of a low degree: others take too long."""
    if sign != "^":
        return x + y if sign == "+" else x - y if sign == "-" else x * y if sign == "*" else x / y
    if y == Decimal("0.5"):
        return x.sqrt()
    degree = next((n for n in range(1, 13) if abs(y * n - round(y * n)) < TINY), None)
    if degree is None or degree > 1 and x < 0:
        raise ArithmeticError("a power that is no root")
    root = x if degree == 1 or not x else Decimal(float(x) ** (1 / degree))
    for _ in range(4 if root is not x else 0):  # Newton's steps, from 16 digits to 100
        root -= (root - x / root ** (degree - 1)) / degree
    return root ** round(y * degree)


NAME = re.compile(  # what can be asked for: x, AB, f(2), a_37, |AB|, side length; not 2x, x^2, |x|
    r"-?(?:[A-Za-z]'*|[A-Za-z]*_\w+|\|[A-Z]+\||[A-Z]+\w*(?:\^-1)?(?: \* [A-Z]+\w*(?:\^-1)?)?|[a-z]{3,}|[\u4e00-\u9fff]+"
    r"|\w+\(.*\)|\\[A-Za-z]+[A-Z]*(?:_\w+)?)'*")


def relate(parts: list, signs: list[str]):
    """Sides and the signs between them: a value with its name, an interval, or an equation."""
    first, last = parts[0], parts[-1]
    name = text(first) if isinstance(first, Group) or isinstance(first, str) and NAME.fullmatch(
        first) else ""
    if set(signs) == {"="}:
        if len(parts) == 2 and isinstance(first, (Number, Group)) and isinstance(
                last, str) and len(last) < 4 and NAME.fullmatch(last):
            return first._replace(name=last)
        numbers = [x for x in parts if isinstance(x, Number)]
        if isinstance(last, Number):
            agree = numbers[:-1] and all(rounds(x.value, last) for x in numbers[:-1])
            if name or agree and (len(numbers) == len(parts) or re.fullmatch(
                    r"[A-Za-z]+(?: \+ [A-Za-z]+)*", text(first))):
                return last._replace(name=name, exact=numbers[-2].value if agree else None)
        elif isinstance(last, Group) and name and len(parts) == 2:
            return last._replace(name=name)
    elif interval := between(parts, signs):
        return interval
    if not any(isinstance(x, str) for x in parts):
        raise ArithmeticError("numbers that differ")
    return "".join(map(str.__add__, map(text, parts), [*signs, ""]))


def between(parts: list, signs: list[str]) -> Group | None:
    """x > 3 or 1 < x <= 2 as an interval of one name; None where it is none."""
    if signs[0] in ">≥":  # read it from the other end
        parts, signs = parts[::-1], [{">": "<", "≥": "≤"}.get(sign, "") for sign in signs[::-1]]
    ends = [isinstance(x, Number) or "∞" in text(x) for x in parts]
    if not set(signs) <= {"<", "≤"} or ends not in ([True, False], [False, True], [True, False, True]):
        return None
    name = parts[ends.index(False)]
    low, high = parts[0] if ends[0] else "-1 * ∞", parts[-1] if ends[-1] else "∞"
    left = "[" if ends[0] and signs[0] == "≤" else "("
    right = "]" if ends[-1] and signs[-1] == "≤" else ")"
    return Group(left + right, [low, high], name) if NAME.fullmatch(name) else None


# ---------------------------------------------------------------------------------------------
# Step 4. Compare values

PLAIN = re.compile(r"-?\d{1,9}(?:\.\d{1,6})?", re.ASCII)  # read in a microsecond, without parsing
LONE = re.compile(r"\(([A-Ha-h])\)|([A-Ha-h])[.:)]?")
SEVERAL = re.compile(r"\(?[A-H]\)?(?:(?:\s*[,;&和与及]|\s+and\b)+\s*\(?[A-H]\)?)+")
# B with what it stands for: B. 45, (B) 45, B 45; or 45 (B)
BEFORE = re.compile(r"(?:\(([A-Ha-h])\)|([A-H])(?:[.:)](?=[\s\d])|\)|(?=\s+(?:[\d(]|\\[dt]?frac"
                    r"|\\sqrt))))\s*(\S.*)()", re.S)
BEHIND = re.compile(r"()()(\S*\d.*)\s+\(([A-H])\)", re.S)
OTHER = re.compile(r"(?<![A-Za-z])[A-H](?:\)|[.:](?=\s|\d|$))|(?:\b(?:and|not|nor)|,)\s*\(?[A-H]\b"
                   r"|\b(?:or|either)\b|^\W*(?:wrong|incorrect|not (?:correct|right))\b", re.I)
YES = re.compile(r"(yes|no)\b(?!\s+\w)\W*(.*)", re.I | re.S)


def is_equal(prediction: str, reference: str) -> bool:
    """Do two answers say the same, under the policy of LESSON.md?"""
    prediction, reference = prediction.strip(), reference.strip()
    if PLAIN.fullmatch(prediction) and PLAIN.fullmatch(reference):
        return float(prediction) == float(reference)  # a double tells 15 digits apart
    prediction, reference = (
        extract_answer(answer) or "" if "\\boxed" in answer or "answer is" in answer else answer
        for answer in (unwrapped(prediction[-LONGEST_RESPONSE:]), reference[-LONGEST_RESPONSE:]))
    if prediction == reference:
        return not says_nothing(prediction)
    if max(len(prediction), len(reference)) > LONGEST_ANSWER:
        return False
    (letters, said), (wanted_letters, wanted) = understand(prediction), understand(reference)
    with decimal.localcontext(PRECISE):
        if letters and wanted_letters:
            both = isinstance(said, Number) and isinstance(wanted, Number)
            return letters == wanted_letters and (not both or same(said, wanted))
        return said is not None and wanted is not None and same(said, wanted)


@lru_cache(maxsize=10_000)  # the responses to one prompt share a reference, and often an answer
def understand(answer: str) -> tuple:
    """An answer as (its choices or "", its value: Number, Group, formula or text, None for none)."""
    answer = normalise(answer)
    if says_nothing(answer):
        return "", None
    if choice := LONE.fullmatch(answer):
        return (choice[1] or choice[2]).upper(), None
    if SEVERAL.fullmatch(answer):
        return "".join(sorted(set(re.findall("[A-H]", answer)))), None
    choice = BEFORE.fullmatch(answer) or BEHIND.fullmatch(answer)
    if not choice:
        return "", read(answer)
    if OTHER.search(choice[3]):  # A. 20 or B. 30
        return "", plain(answer)
    return (choice[1] or choice[2] or choice[4]).upper(), read(choice[3].strip())


def read(answer: str):
    """The value of a normalised answer: a Number, a Group or a formula; else its plain text."""
    if yes := YES.fullmatch(answer):
        doubt = rf"\b(?:yes|no|but|or|maybe|perhaps)\b{'' if yes[1][0] in 'nN' else '|' + DENIALS}"
        return plain(answer) if re.search(doubt, yes[2], re.I) else yes[1].lower()
    if CHANGES.search(answer):
        return plain(answer)
    if not re.search(r"[\d\\=<>^_|!∅∞]", answer) and re.search(r"[^\W\d_]{3}", answer):
        items = [plain(item) for item in re.split(r",|;|&|\band\b", answer) if item.strip()]
    elif time := TIME.fullmatch(answer.rpartition("=")[2].strip()):
        items = [Group("time", [time[1] + (time[2] or "").strip().lower()])]
    else:
        tokens = tokenise(answer)
        if "±" in tokens:  # two answers, one with each sign
            tokens = [y for s in "+-" for y in [*(s if x == "±" else x for x in tokens), ","]][:-1]
        powers = tokens.count("^") + tokens.count("\\sqrt") > MOST_POWERS
        if powers or TIME.search(answer) or re.search(r":[^:=,]*:", answer):  # 1:2:3 is no quotient
            return plain(answer)
        try:
            with decimal.localcontext(PRECISE):
                items, _ = Reader(tokens).items(("",))
        except ArithmeticError:  # what we refuse; decimal's own errors are of this kind too
            return plain(answer)
    return items[0] if len(items) == 1 else Group("{}", items)


def plain(answer: str) -> str:
    """A text without case, article and punctuation where it is prose; else as it is written."""
    if re.search(r"[\\=<>^_]", answer) or not re.search(r"[^\W\d_]{3}", answer):
        return "".join(tokenise(answer))
    words = re.findall(r"[^\W\d_]+|\d[\d.,]*|[^\s\w,;:'\"()!?]", answer.casefold())
    return " ".join(words[words[0] in ("a", "an", "the") and len(words) > 1:])


def same(said, wanted) -> bool:
    """Equal values; but two units, or two names, must agree as well. 25% is 25 and 0.25."""
    left, right = (x.items if isinstance(x, Group) and x.brackets == "{}" else [x]
                   for x in (said, wanted))
    if len(left) > 1 or len(right) > 1:  # sets: "7.5 or 15/2" is the set {7.5}
        return (all(any(same(x, y) for x in left) for y in right)
                and all(any(same(x, y) for y in right) for x in left))
    if type(said) is not type(wanted) or isinstance(said, str):
        return said == wanted
    if said.name and wanted.name and said.name != wanted.name:
        return False
    if isinstance(said, Group):
        return (said.brackets == wanted.brackets and len(said.items) == len(wanted.items)
                and all(map(same, said.items, wanted.items)))
    if said.unit and wanted.unit and said.unit != wanted.unit:
        return False
    scales = [1] if said.unit == wanted.unit else [
        1, *[Decimal("0.01")] * ("%" in said.unit), *[100] * ("%" in wanted.unit)]
    values = [said.value] if said.exact is None else [said.value, said.exact]
    return any(rounds(value * scale, wanted) for value in values for scale in scales)


def rounds(value: Decimal, wanted: Number) -> bool:
    """value is the wanted one, or the wanted one is a decimal that stands for value rounded."""
    gap = abs(value - wanted.value)
    if gap <= TINY * abs(wanted.value):
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
