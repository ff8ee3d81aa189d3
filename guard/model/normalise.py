"""Undoes what disguises a text: only what Unicode itself, or the eye, reads in exactly one way.

Sources: UAX #15 (NFKC; once TR15), UTR #36 and UTS #39 with its confusables.txt (letters that look alike),
UTS #51 (emoji and their tags), DerivedCoreProperties.txt (Default_Ignorable_Code_Point).
"""

import re
import unicodedata
from base64 import b64decode, b64encode
from typing import Final

from guard.model.rot13 import undo_rot13

# Latin letters in other dress that NFKC leaves as they are: small capitals, and white letters in black discs and boxes.
_DRESSED: Final = str.maketrans(
    "ɑɡᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘʀꜱᴛᴜᴠᴡʏᴢ🅐🅑🅒🅓🅔🅕🅖🅗🅘🅙🅚🅛🅜🅝🅞🅟🅠🅡🅢🅣🅤🅥🅦🅧🅨🅩🅰🅱🅲🅳🅴🅵🅶🅷🅸🅹🅺🅻🅼🅽🅾🅿🆀🆁🆂🆃🆄🆅🆆🆇🆈🆉",
    "agabcdefghijklmnoprstuvwyz" + 2 * "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
)
# What confusables.txt calls confusable with a Latin letter: Cyrillic, Greek, Armenian and Cherokee letters.
_TWINS: Final = "аАВсСԁеЕԌһНіІӏӀјЈКМоОрРԛѕЅТѵѴԝԜхХуУΑΒΕϜΗΙͿΚΜΝΟοΡΤνΧΥΖհոօՕՏսՍᎪᏴᏟᎠᎬᏀᎻᎫᏦᏞᎷᏢᎡᏚᎢᏙᎳᎩᏃ"
_LIKE_TWINS: Final = "aABcCdeEGhHiIlIjJKMoOpPqsSTvVwWxXyYABEFHIJKMNOoPTvXYZhnoOSuUABCDEGHJKLMPRSTVWYZ"
# Those of its letters that words of their own are full of, where no Latin one stands beside them.
_KIN: Final = "ЬвҽԍнкмгтѡүҮαιϳκϺσρτυγքցռգզաᏏᏧᏻᏂᎥᏒᏕᏔᎽ"
_LIKE_KIN: Final = "bbeghkmrtwyYaijkMoptuyfgnqqwbdGhiRSWY"
_LOOK_ALIKES: Final = str.maketrans(_TWINS + _KIN, _LIKE_TWINS + _LIKE_KIN)
_LATIN: Final = re.compile("[A-Za-z]")
_LATIN_LOOKING: Final = re.compile(rf"(?<!\w)[0-9A-Z_a-zÀ-ɏ\u0300-\u036fḀ-ỿ{_TWINS}{_KIN}]++(?!\w)")
_OTHER_SCRIPT: Final = re.compile(rf"(?![{_TWINS}])[Ͱ-ԯԱ-ֈᎠ-ᏽ]")

# A flag such as Scotland's is a black one, tags that spell a subdivision, and the tag that ends it.
_TAG: Final = "[\U000e0020-\U000e007e]"
_FLAG: Final = "\U0001f3f4[\U000e0030-\U000e0039\U000e0061-\U000e007a]{3,6}\U000e007f"
_TAGS: Final = re.compile(f"({_FLAG})|{_TAG}+")
# What Latin text has beside ASCII, and so stands there for everyone to see among the tags.
_AMONG_TAGS: Final = "[\nÀ-ɏ\u2010-\u2027\u0300-\u036f]"
_HIDDEN: Final = re.compile(f"{_FLAG}|({_TAG}(?:{_AMONG_TAGS}*{_TAG})*+(?:(?!\n){_AMONG_TAGS})*)")
_TAGGED: Final = {0xE0000 + ascii: ascii for ascii in range(0x20, 0x7F)}

_INVISIBLE: Final = (
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
# Latin, Greek, Cyrillic and Armenian letters, their marks, digits, punctuation and spaces; none of them invisible.
_JOINS_NOTHING: Final = "\0-\u00ac\u00ae-\u034e\u0350-\u058f\u1d00-\u1fff\u2010-\u2029\u202f-\u205f"
_SPLITTERS: Final = re.compile(f"(?<![^{_JOINS_NOTHING}])[{_INVISIBLE}]++(?![^{_JOINS_NOTHING}])")

_ALONE: Final = r"[0-9A-Za-zÀ-ɏͰ-ԯ][\u0300-\u036f]*+(?![^\W_])"
_FIRST: Final = rf"(?:{_ALONE}|[^\w\s])"
_NEXT: Final = rf"(?:{_ALONE}|(?!(?P=apart)[^\W_])[^\w\s])"
_GAP: Final = rf"(?!(?P=apart){_NEXT})(?:\s++|(?P=apart)++)"
_SPACED: Final = re.compile(
    rf"(?<![^\W_])(?:{_FIRST}\s\s++)?+{_FIRST}(?P<apart>[ ._-]){_NEXT}(?:(?P=apart){_NEXT})*+"
    rf"(?:{_GAP}(?:{_NEXT}{_GAP})?+{_NEXT}(?:(?P=apart){_NEXT})++)*+(?:{_GAP}{_NEXT})?+"
)

_BASE64: Final = re.compile(r"(?<![\w+/=-])(?:[0-9A-Za-z+/_-]{16,}+={0,2}|[0-9A-Za-z+/_-]{6,}+={1,2})(?![\w+/=-])")
_URL_SAFE: Final = str.maketrans("-_", "+/")
# A figure one is an l at the end of a word and beside another one, otherwise an i.
_LS: Final = re.compile(r"1(?=1)|(?<=1)1|(?<=[^\W_])1(?![^\W_])")
_LEET: Final = str.maketrans("013457@$", "oieastas")
_TOKEN: Final = re.compile(r"(?:[^\W_]|[@$])++")
_LETTER: Final = re.compile(r"[^\W\d_]")
_FIGURE_WITHIN: Final = re.compile(r"[^\W\d_][013457@$]+[^\W\d_]")
_CASED: Final = re.compile("[A-Za-z]{2,}")
_CHANGE: Final = re.compile("(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[a-z])")

# A long text in pieces that end with a line, or else with a word: what is looked at as a whole is never dear then.
_PIECE: Final = re.compile(r"(?s).{1,16383}(?:\n|\Z)|.{1,16383}\s|.{1,16384}")

_WORD: Final = re.compile("[A-Za-zÀ-ɏͰ-ԯḀ-ỿἀ-῿]{3,}")
# What stands within words of ordinary print though NFKC changes it: µ, ª and others of Latin-1, ligatures, and ™.
_PRINT: Final = {
    code: unicodedata.normalize("NFKC", chr(code)) for code in (*range(0xA0, 0x100), *range(0xFB00, 0xFB07), 0x2122)
}


def normalise(text: str) -> str:
    """The text without disguises; idempotent.

    - NFKC, and Latin letters of other dress as plain ones.
    - What tag characters (U+E0020 to U+E007E) spell is read, on a line after the visible text, and with what Latin text
      has beside ASCII where that stands among them; flags stay.
    - Invisible characters go, unless they stand beside a letter or symbol that may need them to join or to part: one
      of a script other than Latin, Greek, Cyrillic and Armenian, or an emoji.
    - Base64 of sixteen characters and more, or of eight with its padding, is decoded where print comes out.
    - ROT13 is undone where letters are such as it makes of Western languages.
    - Figures become the letters they look like if they stand within two words and a quarter of all words.
    - Capitals become small where case changes as if by chance, and where there is nothing else.
    - Words spelled letter by letter are joined, and signs among them: four letters and more, all apart by one and
      the same space, dot, hyphen or underscore; wider gaps are those between words.
    - Look-alikes become Latin in words that hold nothing but them and Latin letters. A word of look-alikes alone is
      taken for real, if the text has any other letter of such a script, or no Latin one.
    """
    while (plain := _pass(text)) != text:  # one disguise may cover another; each pass leaves fewer
        text = plain
    return plain


def undisguise(text: str) -> str:
    """The text normalised, if that changes any word of three letters or more; otherwise as it is.

    So what ordinary text holds – full-width punctuation, ligatures, odd spaces, emoji – is not worth a second reading.
    Of a long text that is decided for each 16,384 characters or so: what is disguised there may be the least of it.
    """
    return "".join(map(_undisguised, _PIECE.findall(text)))


def _undisguised(piece: str) -> str:
    plain = normalise(piece)
    return piece if _words(plain) == _words(piece) else plain


def _pass(text: str) -> str:
    text = unicodedata.normalize("NFKC", text.translate(_DRESSED))
    text = _as_latin(_SPACED.sub(_joined, _SPLITTERS.sub("", _with_tags_read(text))))
    return _in_small_letters(_without_figures(undo_rot13(_BASE64.sub(_decoded, text))))


def _decoded(run: re.Match[str]) -> str:
    text = run[0]
    while (inner := _decode(text)) is not None:  # all at once, as a pass over a long text is dear
        text = inner
    return text


def _decode(run: str) -> str | None:
    """What Base64 stands for; None for what only looks like it."""
    if not _BASE64.fullmatch(run) or run.lower() == run or run.upper() == run:
        return None
    digits = run.rstrip("=").translate(_URL_SAFE)
    try:
        decoded = b64decode(digits + "=" * (-len(digits) % 4), validate=True)
        text = decoded.decode("utf-8" if len(digits) >= 16 else "ascii")
    except ValueError:
        return None
    if "=" in run and b64encode(decoded).decode() != run.translate(_URL_SAFE):
        return None
    is_print = sum(map(str.isalpha, text)) >= 3 and all(c.isprintable() or c in "\n\r\t" for c in text)
    return text if is_print else None


def _without_figures(text: str) -> str:
    words = [token for token in _TOKEN.findall(text) if _LETTER.search(token)]
    odd = sum(_FIGURE_WITHIN.search(word) is not None for word in words)
    return _LS.sub("l", text).translate(_LEET) if odd >= 2 and odd * 4 >= len(words) else text


def _in_small_letters(text: str) -> str:
    words = _CASED.findall(text)
    pairs = sum(map(len, words)) - len(words)  # of neighbours; half of them differ by chance, a third in code at most
    shouted = len(words) >= 3 and all(map(str.isupper, words))
    changes = len(_CHANGE.findall(text))
    return text.lower() if shouted or (changes >= 6 and changes >= 0.4 * pairs) else text


def _with_tags_read(text: str) -> str:
    hidden = "".join(_HIDDEN.findall(text)).translate(_TAGGED)
    return "\n".join(filter(None, (_TAGS.sub(r"\1", text), hidden)))


def _joined(run: re.Match[str]) -> str:
    apart = run["apart"]
    words = " ".join(_spelled(word, apart) for word in re.split(r"\s\s+" if apart == " " else r"\s+", run[0]))
    letters = sum(map(str.isalpha, words))
    signs = sum(not (c.isalnum() or c.isspace()) for c in words)  # many of them are a list's, or a formula's
    joints = sum(len(word) - 1 for word in words.split())
    return words if letters >= 4 and letters > 2 * signs and joints >= 3 else run[0]


def _spelled(word: str, apart: str) -> str:
    if set(word[1::2]) == {apart}:  # so that what stands between may also be a sign of its own
        return word[::2]
    return " ".join(part.replace(apart, "") for part in re.split(re.escape(2 * apart) + "+", word))


def _as_latin(text: str) -> str:
    strays = _LATIN.search(text) and not _OTHER_SCRIPT.search(text)

    def plain(word: re.Match[str]) -> str:
        return word[0].translate(_LOOK_ALIKES) if strays or _LATIN.search(word[0]) else word[0]

    return _LATIN_LOOKING.sub(plain, text)


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFC", text).translate(_PRINT))
