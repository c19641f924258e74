"""Text files as they are found: byte order marks, UTF-16, another encoding by name, any line ends."""

import codecs
import gzip
import io
import re
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_mtbi.errors import ConfigError, DataError

# UTF-32's little-endian mark begins with UTF-16's, so it is tried first.
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# Thai, Lao, Burmese, Khmer, kana, Han, and the signs that are written with them.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]"
)
APOSTROPHES = str.maketrans("\u2019\u02bc\uff07", "'''")
ASCII_SIGNS = re.compile(r"[^a-z0-9']")
LOOKED_AT_BYTES = 4096  # of a file without a mark, to tell UTF-16 from UTF-8


def word_count(text: str, characters: int = 1) -> int:
    """Words between spaces; of scripts without any, every so many characters are one."""
    return sum(-(-len(UNSPACED.findall(word)) // characters) or 1 for word in text.split())


def read_text(path: Path, encoding: str | None = None) -> str:
    """A text file (``.gz`` too) without its byte order mark; line ends as they are.

    Args:
        path: of the file.
        encoding: its name for Python; None: the byte order mark's, UTF-16 if every other byte is zero, else UTF-8.

    Raises:
        ConfigError: an encoding that Python does not know.
        DataError: bytes that are none of that encoding, with their line.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read ({error}).") from error
    name, said_by = (encoding, "as configured") if encoding else guess_encoding(data)
    try:
        return data.decode(name).removeprefix("\ufeff")
    except LookupError as error:
        raise ConfigError(
            f"encoding={name!r} of {path}: Python knows no such encoding. Try latin-1 or cp1252."
        ) from error
    except UnicodeDecodeError as error:
        number = data[: error.start].decode(name, "replace").count("\n") + 1
        raise DataError(
            f"{path}, line {number}: byte 0x{data[error.start]:02x} is no {name.upper()} (tried {said_by}: "
            f"{error.reason}). Name the file's encoding, e.g. encoding: latin-1, or save it as UTF-8."
        ) from error


def numbered_lines(path: Path, encoding: str | None = None) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers in the file, from 1; see :func:`read_text`. One is in memory."""
    with opened(path, encoding) as stream:
        # Not str.splitlines, which also splits at U+2028 and other characters that a line may hold.
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield number, line.rstrip("\n")


@contextmanager
def opened(path: Path, encoding: str | None = None, newline: str | None = None) -> Iterator[Iterator[str]]:
    """The lines of a text file (``.gz`` too) without its byte order mark; ``newline`` as of ``open``.

    Raises:
        ConfigError, DataError: see :func:`read_text`.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as raw:
            name = encoding or guess_encoding(raw.peek(LOOKED_AT_BYTES))[0]
            lines = io.TextIOWrapper(raw, name, newline=newline)
            yield (line if number else line.removeprefix("\ufeff") for number, line in enumerate(lines))
    except (LookupError, UnicodeError, OSError, EOFError):
        read_text(path, encoding)  # says what is wrong, and where
        raise


def in_one(parts: Iterable[str]) -> str:
    """Pieces of one text, with a space between them where its script has spaces."""
    text = ""
    for part in filter(None, parts):
        together = UNSPACED.match(text[-1:]) and UNSPACED.match(part)
        text += part if together or not text else f" {part}"
    return text


def guess_encoding(data: bytes) -> tuple[str, str]:
    """Name of an encoding, and what speaks for it."""
    for mark, name in MARKS:
        if data.startswith(mark):
            return name, "because of its byte order mark"
    head = data[:LOOKED_AT_BYTES]
    for first, name in ((1, "utf-16-le"), (0, "utf-16-be")):
        if (
            len(head) >= 4
            and head[first::2].count(0) > 0.6 * len(head[first::2])
            and head[1 - first :: 2].count(0) == 0
        ):
            return name, "because every other byte is zero"
    return "utf-8", "as there is no byte order mark"


def normalized(text: str) -> str:
    """Lower case, letters, digits and apostrophes only, as the transcripts of many corpora are.

    Signs are Unicode's punctuation and symbols, in any script; vowel signs and accents are parts of letters (NFC).
    Marks that are not seen, of direction or between joined letters, are left out.
    """
    if text.isascii():
        return " ".join(ASCII_SIGNS.sub(" ", text.lower()).split())
    text = unicodedata.normalize("NFC", text.translate(APOSTROPHES).lower().replace("i\u0307", "i"))  # Turkish capital
    return " ".join("".join(map(_as_in_words, text)).split())


def _as_in_words(character: str) -> str:
    kind = unicodedata.category(character)
    sign = kind[0] in "PS" and character != "'"
    return " " if sign else "" if kind == "Cf" else character


def words_of(text: str) -> list[str]:
    """Words of a :func:`normalized` text, without quotation marks that look like apostrophes; of scripts without
    spaces, characters, so that an error rate is one of characters there."""
    return [word for part in UNSPACED.sub(r" \g<0> ", text).split() if (word := part.strip("'"))]


def language_code(language: str) -> str:
    """``zh`` of ``zh-CN``, ``zh_CN`` and ``Chinese`` (Lhotse's recipes write names)."""
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE  # start-up

    code = language.replace("_", "-").split("-")[0].strip().lower()
    return TO_LANGUAGE_CODE.get(code, code)
