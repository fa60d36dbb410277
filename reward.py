"""Stage: reward. Text in, number out: the teacher of the run, as every false verdict is trained on.

    python reward.py '\\frac{1}{2}' 0.5      # is a RESPONSE, or a bare answer, right for REFERENCE?
    python reward.py --audit answers.jsonl   # verdicts over rows of response, reference and equal

A response's answer is extracted here, read and compared in answers.py. RL finds and exploits what
is wrongly paid, so where a rule would have to guess the grader refuses. Its policy:
- What says nothing (\\boxed{}, \\text{}, ?, $$, {}) equals nothing, itself neither. \\{\\},
  \\emptyset and "no solution" are the empty set.
- A word that denies, hedges, compares or changes a number (not, maybe, than, half, dozen, below)
  makes an answer text, right for that same text alone; but "D, not B" is D.
- (B), b, B., \\text{B}, Option B, B because .. are choice B; B. 45, B 45 and 45 (B) are 45 too. Two
  letters must agree, and two numbers behind one. A, C is a set; AC, A or C, A square are text.
- A reference's decimals (2 figures or more) are a rounding: 36.37 accepts 21\\sqrt{3}, not 36.373,
  and 21\\sqrt{3} refuses 36.37. Seven decimals or more accept their own rounding to six digits.
- 25\\% is 25, 0.25 and 1/4. Degrees, units and currencies are ignored where one side alone has one;
  two must agree (12 cm is not 120 mm). Up to five plain words after a number say what is counted.
- A comma before three digits groups thousands, not next to a bracket; 3{,}14 is 3.14; else it makes
  a list. 2 1/2 is 2.5, 0.\\overline{3} is 1/3, twenty-one is 21, 1:2 is 1/2. 4:30 is a time of day.
- 1, 2 and {2, 1} and "2 or 1" are one set, \\pm 2 is {2, -2}; (1, 2) keeps its order and brackets,
  a matrix its rows; x \\geq 3 and x \\in [3, \\infty) are one interval.
- Sines of multiples of 3 degrees (or of \\pi/60) and logarithms with a base are numbers.
- x = 5, 5 = x, BC \\approx 5, "the length is 5", A = \\pi r^2 = 25\\pi: the last value counts (and
  21\\sqrt{3} of 21\\sqrt{3} \\approx 36.37); two names must agree. What does more to an unknown
  than name it (2x = 10, \\sqrt{x} = 5, n = 3k) stays an equation; 20 = 30 is text.
- Formulas may differ in spelling and in the order of terms and factors: nothing is expanded,
  collected or cancelled. Texts may differ in case, article and punctuation; "Yes, it is" is yes.
- Extraction, after all thinking: the last balanced \\boxed{}, even an empty one (a cut-off box is
  none); else what follows the last "answer is" or its like; else a choice the response opens with;
  else the last number, formula or letter that is not denied; else a short response itself.
"""

import json
import os
import re
import sys
import unicodedata
from collections import Counter
from decimal import localcontext
from functools import lru_cache

from answers import (
    BOLD, LONGEST_ANSWER, MEASURES, PRECISE, UNITS, Number, plain, read, same, spelled, unwrapped,
    written)

LONGEST_RESPONSE = 6_000  # characters; of a longer response the end is read


# ---------------------------------------------------------------------------------------------
# Words around an answer


def any_of(words: str) -> str:
    r"""A pattern for one of these words, whole, and no LaTeX command: times, not \times."""
    return rf"(?<![\\a-z])(?=[a-z])(?:{'|'.join(words.split())})(?![a-z])"


NUMERALS = {word: n for n, words in [
    *enumerate("zero零 one一 two二两兩 three三 four四 five五 six六 seven七 eight八 nine九 ten eleven "
               "twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()),
    *zip(range(20, 100, 10), "twenty thirty forty fifty sixty seventy eighty ninety".split()),
    (10, "十"), (100, "hundred百"), (1000, "thousand千"), (10_000, "万"), (10**6, "million")]
    for word in re.findall("[a-z]+|[^a-z]", words)}
WORD = f"(?:{'|'.join(filter(str.isascii, NUMERALS))})"
CJK = "".join(word for word in NUMERALS if not word.isascii())

# words that deny an answer or hedge it, and words that compare with it or change its number
DENIALS = any_of(
    "not never neither nor none nobody cannot anything everything without except wrong incorrect "
    "untrue false invalid impossible unlikely doubtful likely probably hardly rarely unless longer "
    "rather instead nope isnt either may maybe perhaps possibly might could unsure guess suppose "
    "whether (?:exclu|elimina)[a-z]*"
) + r"|n['’]t\b|ruled? out|all but|[不错非若勿]|(?<![区特分])别|可能|也许|还是|如果|排除"
DENIED = re.compile(DENIALS, re.I)
CHANGES = re.compile(DENIALS + "|" + any_of(
    "[a-z]*(?:half|dozen)[a-z]* (?:halv|negat|invert|repeat|doubl|tripl|trebl|quadrupl|quintupl"
    "|increas|decreas|reduc|exceed)[a-z]* thirds? quarters? (?:four|fif|six|seven|eigh|nin|ten"
    "|twelf|[a-z]+teen|[a-z]+tie)ths? (?:hundred|thousand|[a-z]*illion|lakh|crore)(?:s|ths?)? "
    "(?:one|two|three|four|five|sixe|seven|eight|nine|ten)s pairs? couple gross grand kilo twice "
    "thrice times [a-z]*fold percentile inclusive further additional squared cubed [a-z]*root "
    "power factorial reciprocal inverse opposite negative minus plus repeating recurring binary "
    "hex points mod over under above below beyond between among from past within until "
    "up down upwards? onwards? off more less fewer greater larger smaller than least most minimum "
    "maximum too many few short missing extra odd something sometimes multiple divisible un non mid"
    " sub lower upper bound"
) + rf"|\d{WORD}" + r"|(?:square|cube|log|sin|cos|tan)[a-z]* of|out of|and/or|…"
    r"|\d(?:st|nd|rd|th|ish)\b|[或多少倍半至超负几余]|[大小]于|以[上下内外]", re.I)
NOT_THIS = re.compile(  # of D, not B the second goes
    r"[,;]?\s*\b(?:(?:and|but)\s+)?(?:not|rather than|instead of|rules? out)\s+(?:be\s+)?"
    r"(?:(?:option|choice)\s+)?(?P<value>\(?[A-H]\b\)?|-?\d+(?:[.,]\d+)*)"
    r"(?:\W*but\b|(?=\s*(?:$|[,;](?!\s*\(?[A-H]\b)|\.(?!\s*\d)|it['’ ])))"
    r"|不[是选選]\s*[A-H\d]+")
MUTE = re.compile(  # says nothing by itself; a command with an argument says what that says
    r"\\(?:[hv]?(?:space|phantom)|(?:text)?color|begin|end)\*?\s*\{[^{}]*\}|\\[A-Za-z]+\s*(?=\{)"
    r"|\\(?:[a-z]*(?:quad|space|skip|style|box|boxed|dots|fill|line)|(?:text|math)[a-z]*|left|right"
    r"|middle|[bB]igg?[lrm]?|limits|rm|bf|it|sf|tt|[dtc]?frac|sqrt|cdot|ast|circ|bullet|prime|mid"
    r"|[lr]?[vV]ert|[lL]arge|small|null|strut|relax)(?![A-Za-z])"
    r"|\\[^A-Za-z{}]|[−∗∘∙⋅∶∣⋮-⋱\u115f\u1160\u3164\uffa0]")
# a letter or a digit; a sign, an arrow, a shape, an emoji; the empty set
SAYS = re.compile(r"[^\W_]|[<=>+×÷±¬℀-⏿■-⟿⤀-⯿🀀-🫿]|\\\{\s*\\\}")
REASON = re.compile(
    r",?\s+(?:because|since|as(?! (?:well|an?|the|many|much|few)\b))\s.*|[,，]?因为.*", re.S)
ASIDE = re.compile(
    r",?\s+which\s(?!(?:is|equals) [^\s+*/-]*\d[^\s+*/-]*$).*"
    r"|\s\([^()\\]*[a-z]{3}[^()\\]*\)\W*$", re.S)
YES = re.compile(  # Yes, there is. No there are none.
    r"(yes|no)\b(?![ \t]+(?!there|it|they|he|she|this|that|we|i)\w)[^.\w]*"
    r"([^.;\n]*)((?:\W.*[a-z]{2}.*)?)", re.I | re.S)

COUNT = re.compile(  # 一 says one where it counts: 一个, but 一共 is "in all"
    rf"(?<!\b[A-H] )\b{WORD}(?:(?:(?:(?<=hundred)|(?<=thousand))\s+and)?[\s-]+{WORD})*\b"
    f"|(?<![\\d{CJK}])[{CJK}]{{1,9}}(?=[{MEASURES}元度]|\\W*$)", re.I)
FILLER = re.compile(  # what an answer may open with, and what it may speak of
    r"[\s*_\"'`]*(?:(?:so|thus|hence|therefore|then|i (?:think|believe)(?: that)?|they are"
    r"|we (?:get|have|find)|(?:the )?(?:(?:final|correct|right|best) )?(?:answer|option|choice)s?"
    r"(?: is| are|:)?|(?:it|there|that)(?:['’]s| is| are| were)|(?:a )?total of|only|just|exactly"
    r"|about|around|approximately|nearly|roughly)\b[\s,:]*|(?:[∴⇒→✅✓]|\\therefore|\\implies)\s*"
    r"|(?:答案|[应應]?[该該]?[选選]|所以|因此|一?共|有|约|大约"
    r"|[是为為]|等于)[是为為有:：,\s]*)", re.I)
SUBJECT = re.compile(
    r"(?:the|its?|this|these|that|those|they|he|she|his|her|their|our|my|your)\b[^.;?!=]*?"
    r"\s(?:is|are|was|were|equals?|=)\s+"
    r"|[^\d=]*?[\u4e00-\u9fff](?<![还若果要而就不])(?:是|为|為|等于)\s*", re.I)
TAIL = re.compile(r"\s+(?:is|are)\s+(?:(?:the|my)\s+)?(?:correct|right|final)?"
                  r"(?:\s*(?:answer|option|choice))?\W*$", re.I)


def says_nothing(answer: str) -> bool:
    """Is there no letter, digit or sign in an answer, LaTeX's spacing, fonts and frames aside?"""
    return not SAYS.search(MUTE.sub(" ", answer))


def without_reason(text: str) -> str:
    """An answer without "because .." and the like, unless an aside denies it: 20 (wrong)."""
    text = REASON.split(text)[0]
    aside = ASIDE.search(text)
    doubt = aside and (DENIED.search(aside[0]) or re.search(r"\bor\b", aside[0]) or (
        CHANGES.search(aside[0]) and not re.search(r"\d", aside[0])))  # but (half of 10 cm)
    return text[:aside.start()] if aside and not doubt else text


def struck(clause: re.Match) -> str:
    """What is left of "not B": nothing; but B may stand elsewhere, and "A. not 5" is an option."""
    before, value = clause.string[:clause.start()], (clause["value"] or "\0").strip("()")
    stays = value in before + clause.string[clause.end():] or re.search(r"\b[A-H][.):]\s*$", before)
    return clause[0] if stays else ""


def counted(words: re.Match) -> str:
    """A number in words as digits: twenty-one, 三十二. What is none (five six) stays as it is."""
    total = last = unit = 0
    for word in re.findall(rf"{WORD}(?![a-z])|[^\sa-z-]", words[0].lower()):
        n = NUMERALS[word]
        if n < 100 and word != "十":  # it adds to the one before: twenty, one
            if last and (last < 20 or last % 10 or not 0 < n < 10):
                return words[0]
            last, unit = last + n, 0 if n == 0 else unit
        elif total % (10 * n) or total and not last:
            return words[0]
        else:  # it multiplies the one before: two, hundred
            total, last, unit = total + max(last, 1) * n, 0, n
    colloquial = last and unit > 10 and not word.isascii()  # 三百五 is 350
    return words[0] if colloquial else str(total + last)


def normalise(answer: str) -> str:
    r"""One spelling, without what says nothing: "So it is $\dfrac12$ cm." is "\dfrac12  cm"."""
    answer = NOT_THIS.sub(struck, spelled(answer))
    while lead := FILLER.match(answer) or SUBJECT.match(answer):
        if DENIED.search(lead[0]):
            break
        answer = answer[lead.end():]
    answer = COUNT.sub(counted, TAIL.sub("", without_reason(answer)))
    answer = re.sub(r"^\s*(?:negative|minus|负)\s*(?=\d|\\)", "-", answer, flags=re.I)
    answer = re.sub(r"\b(\d+) \(\1\)", r"\1", answer)  # five (5)
    return answer.lstrip(" \t\n*_:=`\"'").rstrip(" \t\n*_:.,`\"\\✓✅")


# ---------------------------------------------------------------------------------------------
# Extract: response -> answer

NESTED = r"(?:[^{}]|\{" * 6 + r"[^{}]*" + r"\})*" * 6  # braces in braces, six deep
BOX = re.compile(rf"\\(?:boxed|fbox)\s*(?:\{{({NESTED})\}}|([^\s{{$]+))")
PHRASE = re.compile(
    r"####|<answer>|\b(?:answer|option|choice)s?(?:\s+(?:to|of|for)\s[\w\s]{1,30}?)?[\s*\"']*(?::|="
    r"|\b(?:is|are|(?:seems? to|must|should|would|will) be)\b)(?:[\s:*#_]*\n\s*-\s+|[\s:*#_]*)"
    r"|\banswer\**\s*\n[\s*#]*(?:-\s+)?"
    r"|答案[\s*]*(?:应?[是为為]|:|：)?[\s:：*】]*|(?<![不别勿没未])(?:[应應][该該]?|故)?[选選](?![项項])"
    r"[择擇]?[\s:：为為*]*", re.I)
# what ends an answer: a full stop (but C. 120 goes on), a line, a tag
END = re.compile(
    r"[.!](?:\s+(?![\s\d\\+/=-]|(?:and|or|is|are|not|but|to|unless|except)\b"
    r"|\(?(?:Option )?[A-H]\b(?! [a-z]))|$)|\?(?:\s|$)|;(?:$|\s+[a-z]+ [a-z]+ [a-z])|\n|</|<\|"
    r"|[。；]")
REMARK = re.compile(
    r"\W*(?:(?:indeed|also|thus)\s)?(?:(?:in)?(?:correct|right|wrong|valid|reasonable)"
    r"|(?:as|given|shown|found|based|consistent|below|above|the same)\b.*)\W*", re.I)
# somewhere after an answer: the writer has changed their mind, by a word that leads to another
REGRETS = ("wait", "actually", "however", "correction", "mistake", "sorry", "oops", "scratch")
TAKEN_BACK = re.compile(
    rf"\b(?:{'|'.join(REGRETS)}|(?:is|s) wrong)\b"
    r"|[.;!?…]\W{0,4}(?:no[,.]|or\b)|\bor\s+\(?[A-H][.):]"
    r"|\A\W*[A-H][.):] [^\n]*\W[A-H][.):] ", re.I)
OPTION = re.compile(r"^\W*([A-H])(?:[.:)].*|\W*)$", re.M)
SENTENCE = re.compile(r"(?<!\b[A-H])[.;!?](?=\s(?!\s*[=<>])|$)|\n|[。；]")
WORDS = re.compile(r"((?<![\\A-Za-z\d{])(?![A-Za-z]*_)(?!(?:sqrt|frac|pi|exp|sin|cos|tan|log|ln)\b)"
                   r"[A-Za-z]*[a-z]{2}[A-Za-z'’]*|[\u4e00-\u9fff]+)")
COPULA = re.compile(r"\b(?:is|are|was|were|equals|gives|makes)\b|[=,]|\d")
BEFORE_NO_ANSWER = re.compile(  # page 5, Vitamin D
    r"\b(?:but|no|page|step|figure|fig|table|question|problem|example|theorem|max|min|gcd|lcm|log)"
    r"\W*$", re.I)
DASH = re.compile(  # no minus: Dogs - 45, mid-20, and the mark of a list
    r"(?<=[a-z]{2})(?:[-–—]|\s+[-–—]\s+)(?=\d)|^\s*(?:[-–—•]|\d+[.)])\s+", re.M)
COUNTED_BY = {*MEASURES, *(unit[0] for unit in UNITS)}  # what stands behind a number: 5个, not 5成
VALUE = re.compile(r"(?<![\^_\w])(?<![\^_]\{)\.?\d")
CHOSEN = re.compile(
    r"\(([A-H])\)|(?:\b(?:option|choice|answer|is|be|[Ss]o|[Tt]hus|[Hh]ence|therefore|leaving"
    r"|leaves|choose|pick|select|conclude|think|say|with)|['’]s)\W{1,4}([A-H])(?![\w'’])"
    r"|^\W*([A-H])(?:\W*$|(?= is (?:correct|right|the )))"
    r"|(?<=, )([A-H])(?= is (?:correct|right|the ))", re.ASCII)
TWO = re.compile(r"\b[A-H]\W{1,4}(?:(?:or|and|to|unless|except|Option)\W+)?[A-H]\b")
LETTER = re.compile(r"(?<![A-Za-z\d])([B-H]|A(?! (?!or\b|and\b)[a-z]))(?![A-Za-z\d'’])", re.ASCII)


def extract_answer(text: str) -> str | None:
    """The answer a response commits to, as it is written there; None where it commits to none."""
    # <think> itself may be missing: some chat templates put it at the end of the prompt
    text = text.rpartition("</think>")[2].partition("<think>")[0][-LONGEST_RESPONSE:].strip()
    if boxes := BOX.findall(text):
        return "".join(boxes[-1]).strip()
    if "\\boxed" in text:  # cut off inside its only box: what stands there is not the answer yet
        return None
    text = NOT_THIS.sub(lambda match: struck(match) or ",", BOLD.sub(r"\1", text))
    words, remark, refused = None, None, False
    for phrase in [*PHRASE.finditer(text)][:-9:-1]:  # the last eight, from the last on
        before, after = text[:phrase.start()][-60:], text[phrase.end():]
        before = re.search(r"(?:\w+\W+){0,4}$", SENTENCE.split(before)[-1])[0]
        clause = re.sub(r"\\[()\[\]]|`+", " ", after[:LONGEST_ANSWER]).strip()
        end = END.search(clause)
        clause = without_reason(END.split(clause)[0]).strip(" \t,*_\"")
        clause = clause if "{" in clause else clause.rstrip("\"} ")  # of {"answer": 45}
        if back := TAKEN_BACK.search(after):
            text, refused = after[back.start():], back[0].lower() not in REGRETS
        if says_nothing(clause) or back:
            continue
        if end and end[0][0] == "?" or CHANGES.search(before):  # is the answer 5?
            refused = True
            continue
        if REMARK.fullmatch(clause):
            remark = remark or clause
            continue
        letters, value = understand(clause)
        if letters or not isinstance(value, str) or not WORDS.search(clause) or (
                CHANGES.search(clause) or re.search(r"\band\b|(?<!equal )\bto\b|;", clause)):
            return bare(clause)
        if value := last_value(clause):
            return value
        words = words or clause  # an answer where no other phrase has a number or a letter
    if words or refused:
        return words
    letters, value = understand(text) if len(text) <= LONGEST_ANSWER else ("", "")
    if value in ("yes", "no"):
        return text
    if "\n" not in text and (letters or isinstance(value, Number) or not WORDS.search(text)):
        return bare(text) or None
    if len({*OPTION.findall(text)}) > 1:  # options, said over again
        text = OPTION.sub("", text)
    elif first := re.match(r"(?:Option )?\(?[A-H](?:[.:)]\s[^\n]*|\)?[.:]?(?=\s*\n))", text):
        return first[0].strip()  # the response opens with a choice: B. 12
    denied = PHRASE.search(text) or DENIED.search(text) and (  # I cannot tell
        VALUE.search(text) or LETTER.search(text) or re.match(r"\W*(?:I|We|Sorry)\b", text))
    short = len(text) < 100 and not SENTENCE.search(text[:-1]) and not denied
    return last_value(text) or remark or (text if short else None)


def bare(text: str) -> str:
    """What says the value of a text by itself, where that says all of it: 5 of "it is $5$"."""
    value = last_value(text)
    return value if value and understand(value) == understand(text) else text


def last_value(text: str) -> str | None:
    """The last number with its formula, or choice, in prose; None where it is denied or changed."""
    text = re.sub(r"\b(?:the|this|that|which|no|each|another|other)\s+one\b", " ",
                  unwrapped(text[-2 * LONGEST_ANSWER:]))
    text = DASH.sub(" ", text if text.count("$") % 2 else text.replace("$", ""))
    text = re.sub(r"\b(?:negative|minus)\s+(?=\d)", "-", COUNT.sub(counted, text))
    for sentence in reversed(SENTENCE.split(text)):
        parts = ["", "", *WORDS.split(sentence), "", ""]  # formulas, and words between them
        place = max((i for i in range(0, len(parts), 2) if VALUE.search(parts[i])), default=None)
        chosen = [*CHOSEN.finditer(sentence)]
        if place is None and not LETTER.search(sentence):
            continue
        at = len("".join(parts[:place or 0]))
        if place is None or chosen and chosen[-1].start() > at:
            at = chosen[-1].start() if chosen else 0
            two = TWO.search(sentence)
            before = sentence[max(0, at - 12):at]
            hedged = not chosen or two or CHANGES.search(before) or BEFORE_NO_ANSWER.search(before)
            said = None if hedged else "".join(filter(None, chosen[-1].groups()))
        else:
            said = number_at(place, parts)
        denied = DENIED.search(sentence, sentence.rfind(",", 0, at) + 1)
        said = re.sub(r":\s*-$", "", (said or "").strip(" ,:*_`\n"))
        said = said.rstrip("\\ " if "{" in said else "\\ }")
        return said if said and not denied else None
    return None


def number_at(place: int, parts: list[str]) -> str | None:
    """A formula among words; None where the words beside it hedge, compare with it or change it."""
    said, before, after = parts[place], parts[place - 1], parts[place + 1]
    around = COPULA.split("".join(parts[max(0, place - 5):place]))[-1]
    two = VALUE.search(parts[place - 2])
    glued = before.isascii() and not COPULA.search(before) and re.match(r"[\d.+*/^_(\[-]", said)
    parted = before in UNITS or before in ("to", "of", "by")
    if before and glued or two and parted:  # blue.5, 5 hours 30
        return None
    two = two and not re.match(r"\s*[:,;=(]", said)
    joins = before == "or" or before == "and" and "=" not in said
    if (after == "or" or before == "or" and not two or len(said) > LONGEST_ANSWER
            or BEFORE_NO_ANSWER.search(around)
            or said[-1:].isdigit() and after[:1] > "\u4e00" and after[0] not in COUNTED_BY
            or CHANGES.search(around + "".join(parts[place:place + 9]))):
        return None
    if two and joins:  # 2 or 3
        return parts[place - 2] + before + said
    return None if two and "=" not in said and not COPULA.search(before) else said


# ---------------------------------------------------------------------------------------------
# Judge: answer -> choices and value; two answers -> equal or not

PLAIN = re.compile(r"-?\d{1,9}(?:\.\d{1,6})?", re.ASCII)  # read in a microsecond, without parsing
LONE = re.compile(r"\(([A-Ha-h])\)|\[([A-Ha-h])\]|([A-Ha-h])[.:)'’]?")
SEVERAL = re.compile(r"\(?[A-H]\)?(?:(?:\s*[,;&和与及]|\s+and\b)+\s*\(?[A-H]\)?)+")
# B with what it stands for: B. 45, (B) 45, B 45; or 45 (B)
BEFORE = re.compile(
    r"(?:\((?P<small>[A-Ha-h])\)|(?P<letter>[A-H])(?:[.:)](?=[\s\d])|\)|\s+-\s+(?=[A-Za-z]{2})"
    r"|(?=\s+(?:[\d(]|\\[dt]?frac|\\sqrt))))\s*(?P<rest>\S.*)", re.S)
BEHIND = re.compile(r"(?P<rest>\S*\d[^=<>]*)\s+\((?P<letter>[A-H])\)")
OTHER = re.compile(  # a second option: any lone letter but that of a name, vitamin C, \angle A
    r"(?<![A-Za-z])[A-H](?:\)|[.:](?=\s|\d))|\\(?!angle|triangle)[a-z]+ ?[A-H]\b"
    r"|(?<![A-Za-z\\])(?<![a-z]{2} )(?!A [a-z])[A-H](?![A-Za-z'’])"
    r"|(?i:(?<![a-z])(?:and|not|nor|but|vs|is|then|to|option|choice|unless|except|maybe))\W+[A-H]\b"
    r"|(?i:\b(?:or|either)\b|^\W*(?:not\W*(?:$|\d)|(?:and|(?:is |was )?(?:wrong"
    r"|incorrect|not (?:correct|right)))\b)|\b(?:is|are|\() ?(?:wrong|incorrect|false)\W*$"
    r"|\b(?:not|and)\W*$)|\?")
TOGETHER = re.compile(r"\W*(?:both|neither|all|none|only)\b", re.I)  # C. both A and B


def is_equal(prediction: str, reference: str) -> bool:
    """Do two answers say the same, under the policy at the top of this file?"""
    prediction, reference = prediction.strip(), reference.strip()
    if PLAIN.fullmatch(prediction) and PLAIN.fullmatch(reference):
        return float(prediction) == float(reference)  # a double tells 15 digits apart
    prediction, reference = (
        extract_answer(unwrapped(x)) or "" if "\\boxed" in x or "answer is" in x else x
        for x in (prediction[-LONGEST_RESPONSE:], reference[-LONGEST_RESPONSE:]))
    if prediction == reference:
        return not says_nothing(prediction)
    if max(len(prediction), len(reference)) > LONGEST_ANSWER:
        return False
    (letters, said), (wanted_letters, wanted) = understand(prediction), understand(reference)
    with localcontext(PRECISE):
        if letters and wanted_letters:
            words = any(x is None or isinstance(x, str) and not re.search(r"\d", x)
                        for x in (said, wanted))
            return letters == wanted_letters and (words or same(said, wanted))
        return said is not None and wanted is not None and same(said, wanted)


@lru_cache(maxsize=10_000)  # the responses to one prompt share a reference, and often an answer
def understand(answer: str) -> tuple:
    """An answer as (its choices or "", its value; None where it has none)."""
    answer = normalise(answer) if len(answer) <= LONGEST_ANSWER else ""
    if says_nothing(answer):
        return "", None
    if choice := LONE.fullmatch(answer):
        return "".join(filter(None, choice.groups())).upper(), None
    if SEVERAL.fullmatch(answer):
        return "".join(sorted(set(re.findall("[A-H]", answer)))), None
    choice = BEFORE.fullmatch(answer) or BEHIND.fullmatch(answer)
    if not choice:
        return "", value_of(answer)
    found, rest = choice.groupdict(), choice["rest"].strip()
    letter = (found["letter"] or found["small"]).upper()
    other = OTHER.search(rest) or re.search(r"\d", rest) and LETTER.search(rest)
    if other and rest != letter and not TOGETHER.match(rest):  # A. 20 or B. 30
        return "", plain(answer)
    return letter, value_of(rest)


def value_of(answer: str):
    """What a normalised answer is worth; where words deny or change it, its plain text."""
    if (yes := YES.fullmatch(answer)) and (not yes[2] or re.search("[a-z]{2}", yes[2] + yes[3])):
        doubt = any_of("yes but or if maybe perhaps nope")
        if yes[1][0] in "yY":
            doubt += rf"|\bno\b|{DENIALS}"
        return plain(answer) if re.search(doubt, yes[2], re.I) else yes[1].lower()
    both = re.search(r"\band\b", answer) and re.search(r"[<>≤≥]|\\[gl]e", answer) or (
        re.search(r"[(\[][^()\[\]]*\bor\b", answer))  # x > 1 and x < 3, (1 or 2): no lists
    twice = re.search(r"\d\s+\(\s*[\d.]+\s*\)", answer)  # 20 (30) is no product
    return plain(answer) if both or twice or CHANGES.search(answer) else read(answer)


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
    """-0.1 for a response cut off or shorter than min_tokens, else 0: then nothing else counts."""
    return [-0.1 if s.finish_reason != "stop" or len(s.completion_ids) < min_tokens else 0.0
            for s in samples]


def overlong_penalty(samples: list, max_length: int = 2048, buffer: int = 512) -> list[float]:
    """0 up to max_length - buffer tokens, then a line down to -1 at max_length (DAPO, eq. 13)."""
    excess = [len(s.completion_ids) - max_length + buffer for s in samples]
    return [-min(1.0, max(0.0, tokens / buffer)) for tokens in excess]


# ---------------------------------------------------------------------------------------------
# The command line


def audit(path: str) -> dict:
    """Judge the rows of a JSON lines file as training does, print what their "equal" denies, count.

    A row has "response", "reference" and "equal"; and perhaps "id", "kind", "doubtful". Some data
    call these "prediction" and "answer".
    """
    kinds, rows = {}, 0
    with open(path, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                said = row["response" if "response" in row else "prediction"] + ""
                wanted = row["reference" if "reference" in row else "answer"] + ""
                equal = {True: True, False: False}[row["equal"]]
            except (ValueError, KeyError, TypeError, RecursionError):
                print(f"{path}:{number}: left out: no row of response, reference and equal")
                continue
            rows += 1
            verdict = bool(accuracy_reward(said, wanted))
            if verdict != equal:
                print(f"{path}:{number}: {row.get('id', 'no id')}: {extract_answer(said)!r} "
                      f"{'=' if verdict else '!='} {wanted!r} in {said[-80:]!r}")
            outcome = "right" if verdict == equal else "false +" if verdict else "false -"
            for kind in ["(doubtful)"] if row.get("doubtful") else ["all", str(row.get("kind"))]:
                counts = kinds.setdefault(kind, Counter({"right": 0, "false +": 0, "false -": 0}))
                counts.update(("rows", outcome))
    if not rows:
        refuse(f"{path} has no row to judge, JSON with response, reference and equal in each line")
    return kinds


def refuse(sentence: str) -> None:
    sys.stderr.write(f"{sentence}\n")
    sys.exit(2)


def main() -> None:
    sys.stdout.reconfigure(errors="backslashreplace")  # a lone surrogate can be graded, not printed
    match sys.argv[1:]:
        case ["-h" | "--help"]:
            print(__doc__)
        case ["--audit", path]:
            try:
                print(json.dumps(audit(path)))
            except OSError as error:
                refuse(f"{path} cannot be read: {error.strerror}")
        case [response, reference] if not response.startswith("--"):
            for name, answer in (("answer", extract_answer(response)), ("reference", reference)):
                choice, value = understand(answer or "")
                kind = "none" if value is None else f"{type(value).__name__} {written(value)}"
                print(f"{name} {answer!r} is read as choice {choice or 'none'}, value {kind}")
            print(json.dumps({"equal": bool(accuracy_reward(response, reference))}))
        case _:
            refuse("usage: reward.py RESPONSE REFERENCE, or --audit FILE, or --help")


if __name__ == "__main__":
    main()
