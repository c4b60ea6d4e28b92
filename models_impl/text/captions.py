"""The cleaning of PixArt-alpha's training captions (diffusion/model/t5.py there, and DeepFloyd IF before it).

The captions came from the web, so this drops what a web page leaves in a caption: addresses, markup, article numbers,
file names, image sizes, offers of shipping. A prompt that is cleaned alike gives the tokens that the network knows.
"""
from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from urllib.parse import unquote_plus

try:
    import ftfy
except ImportError:
    ftfy = None
try:
    from bs4 import BeautifulSoup
    from bs4.builder import ParserRejectedMarkup
except ImportError:
    BeautifulSoup = ParserRejectedMarkup = None

# What is longer is cleaned from its beginning on. Rules and the markup's parser are quadratic in places: 40,000
# characters without a space took half a minute, in which ComfyUI answers nobody.
FIRST, ENOUGH, MOST = 8192, 6000, 32768
"""Characters that are cleaned at first; that must be left of them, 20 for each of 300 tokens, else more are cleaned;
and at most."""
TAGS = 100  # signs that may begin a tag: so many are looked at where no tag ends after them
LONGEST_NAME = 253  # characters of an address before its ending, as DNS has it

DASHES = (
    "-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
)
ENDINGS = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"  # of file names
DOMAIN = (rf"[a-zA-Z0-9.\-]{{1,{LONGEST_NAME}}}[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?"
          "(?!@)")  # an e-mail address's first half stays


FILE_NAME = re.compile(rf".+\.(?:{ENDINGS})", re.DOTALL)


def _without_file_name(word: re.Match) -> str:
    """A run without spaces from behind its last file name: what \\S+\\.(?:ENDINGS) leaves of it, found in one pass."""
    name = FILE_NAME.match(word[0])
    return word[0][name.end():] if name else word[0]


def _rules(*rules: tuple[str, str | Callable[[re.Match], str]]) -> tuple[tuple[re.Pattern, str | Callable], ...]:
    return tuple((re.compile(pattern), instead) for pattern, instead in rules)


# The order is part of the behaviour: what one rule leaves is what the next one reads.
ADDRESSES = _rules(
    ("<person>", "person"),  # how some data sets hide a name; before it would pass for markup
    (rf"\b(?:https?:(?:/{{1,3}}|[a-zA-Z0-9%])|{DOMAIN})", ""),
    (rf"\b(?:www:(?:/{{1,3}}|[a-zA-Z0-9%])|{DOMAIN})", ""),  # the colon is the release's; www.a.org goes as a domain
)
SIGNS = _rules(
    (r"@\w+\b", ""),  # nicknames
    (r"[\u31c0-\u9fff]+", ""),  # CJK from the strokes to the unified ideographs; kana and hangul stay
    (f"[{DASHES}]+", "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),  # numbers of articles
    (r"\\n", " "),  # a line break that was escaped
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (r"\S+", _without_file_name),
    ("[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
JOINED = re.compile("[-_]")  # a_caption_like_this, from a file's name
NOISE = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{ENDINGS})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),  # j2d1a2a
    (r"\b\d+\.?\d*[x\u0445×]\d+\.?\d*\b", ""),  # sizes; the second x is Cyrillic
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    ("^[\"']([\\w\\W]+)[\"']$", r"\1"),
    ("^['_,:;-]", ""),
    ("['_,:+-]$", ""),
    (r"^\.\S+$", ""),
)


def cleaning_needs() -> list[str]:
    """Names of the packages that clean_caption lacks here, as pip knows them; [] where it does all of its work."""
    wanted = {"beautifulsoup4": BeautifulSoup, "ftfy": ftfy}
    return [name for name, module in wanted.items() if module is None]


def clean_caption(text: str) -> str:
    """`text` as PixArt-alpha's T5 read it: cleaned twice, in lower case.

    Where cleaning_needs() names a package, the text is only stripped and in lower case, as diffusers has it: half of
    the rules would give a caption that no release was trained on. Callers that offer cleaning warn the user.
    """
    if cleaning_needs():
        return text.lower().strip()
    if len(text) > FIRST:
        text = re.sub(r"\s{3,}", lambda spaces: spaces[0][:2], text.strip())
    length = FIRST
    while True:
        part, rest = _beginning(text, length)
        joined = len(JOINED.findall(_apply(SIGNS, _apply(ADDRESSES, rest[:MOST].lower()))))
        # the release's text_preprocessing: once more, for what the first time laid bare
        cleaned = _cleaned(_cleaned(part, joined))
        if not rest or len(cleaned) >= ENOUGH or length >= MOST or part.count("<") > TAGS:
            return cleaned
        length *= 2


def _beginning(text: str, length: int) -> tuple[str, str]:
    """Whole words of about that many characters and the last one, which shows whether the text ends in a quote; and
    what is left out."""
    if len(text) <= length:
        return text, ""
    start = text[:length]
    words = start.rsplit(None, 1)
    if len(words) < 2:
        return start + text[-1], text[length:-1]
    return f"{words[0]} {text.rsplit(None, 1)[-1][-LONGEST_NAME:]}", text[len(words[0]):]


def _cleaned(text: str, joined: int = 0) -> str:
    """joined: hyphens and underscores in the part of the text that is left out."""
    text = _apply(ADDRESSES, unquote_plus(text).strip().lower())
    text = _apply(SIGNS, _without_markup(text))
    if len(JOINED.findall(text)) + joined > 3:
        text = JOINED.sub(" ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return _apply(NOISE, text).strip()


def _without_markup(text: str) -> str:
    last = text.rfind(">") + 1
    signs = text[last:].split("<")
    markup, rest = text[:last] + "<".join(signs[:TAGS]), "".join(f"<{part}" for part in signs[TAGS:])
    try:  # from a stream: BeautifulSoup warns of a str that looks like a file's name
        return BeautifulSoup(io.StringIO(markup), features="html.parser").text + rest
    except ParserRejectedMarkup:  # <![, on which the release itself stops: no markup, then
        return text


def _apply(rules, text: str) -> str:
    for pattern, instead in rules:
        text = pattern.sub(instead, text)
    return text
