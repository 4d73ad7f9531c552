"""The tokenizer of a checkpoint: texts to windows of token ids, and the token string of each id.

In: texts. Out: windows of at most max_length token ids with special tokens and the prompt, without padding. Long texts
are tokenized in pieces: the library needs about 800 bytes per token, a token id 4 bytes, or 8 with its place.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sparse_ingest.checkpoints.checks import tokenizer_errors
from sparse_ingest.checkpoints.modules import damaged
from sparse_ingest.errors import CheckpointError, PipelineError
from sparse_ingest.models.nanotokens import Encode, build_nanotokens
from sparse_ingest.models.tokenizer_files import load_tokenizer
from sparse_ingest.pipeline import ModelSettings
from sparse_ingest.queries.weight_table import make_plain
from sparse_ingest.records import in_batches

logger = logging.getLogger(__name__)
TokenIds = npt.NDArray[np.int32]

# Where a long text may be divided: before the space between words, or after punctuation of scripts without spaces.
BORDER = re.compile(r"(?<=\S)(?=\s\S)|(?<=[。！？、，；])(?=\w)")
BORDER_CONTEXT = 64  # characters on each side
BORDERS_TRIED = 100
# Characters after which nanotoken is faster: building and checking it takes half a second.
QUICK_CHARACTERS = 1 << 21
_BARE = {"add_special_tokens": False}


class WindowLayout(NamedTuple):
    """The special tokens on both sides of a window, and the number of tokens between them and between two windows."""

    before: TokenIds
    after: TokenIds
    room: int
    stride: int


class Cut(NamedTuple):
    """One text as tokens, without special tokens, and its windows.

    The first `prompt` of `token_ids` are the prompt, which starts every window. Windows start `stride` tokens of
    text apart; the last one may be shorter. `starts` is the place of the first character of each token in the text
    (without prompt), or empty if it was not requested.
    """

    layout: WindowLayout
    token_ids: TokenIds
    prompt: int
    starts: npt.NDArray[np.int32]

    @property
    def windows(self) -> int:
        """Number of windows."""
        beyond = len(self.token_ids) - self.layout.room
        return 1 + max(0, -(-beyond // self.layout.stride))

    @property
    def tokens(self) -> int:
        """Number of tokens in all windows, with special tokens and prompt."""
        layout, more = self.layout, self.windows - 1
        around = len(layout.before) + len(layout.after) + self.prompt
        return len(self.token_ids) + around - self.prompt + more * (around + layout.room - self.prompt - layout.stride)

    def window(self, number: int) -> TokenIds:
        """Return the token ids of a window with special tokens and prompt."""
        first, end = self.text_tokens(number)
        layout, ids = self.layout, self.token_ids
        return np.concatenate((layout.before, ids[: self.prompt], ids[first:end], layout.after))

    def span(self, number: int, length: int) -> tuple[int, int]:
        """Return the first character of a window in its text, which is `length` long, and the end.

        Characters between two tokens belong to the first of them.
        """
        first, end = self.text_tokens(number)
        start = int(self.starts[first]) if number else 0
        return start, int(self.starts[end]) if end < len(self.token_ids) else length

    def text_tokens(self, number: int) -> tuple[int, int]:
        """Return the first token of a window that is neither special nor of the prompt, and the end."""
        first = self.prompt + number * self.layout.stride
        return first, min(first + self.layout.room - self.prompt, len(self.token_ids))


class FirstWindow(NamedTuple):
    """Token ids of a text with special tokens, at most max_length, and whether it was truncated."""

    token_ids: TokenIds
    truncated: bool


@dataclass
class _Reading:
    """A text that is being tokenized, with its prompt: the current piece, and the tokens of all pieces so far."""

    text: str
    start: int = 0
    end: int = 0
    tokens: int = 0
    ids: list[TokenIds] = field(default_factory=list)
    starts: list[npt.NDArray[np.int32]] = field(default_factory=list)
    prompt: int = 0


class Tokenizer:
    """The tokenizer of a checkpoint.

    `window_stride` is the number of text tokens from the start of one window to the start of the next; None: half of a
    window's text.
    """

    # Tokenized at a time
    CHUNK_TEXTS = 512
    CHUNK_CHARACTERS = 1 << 20
    PIECE_CHARACTERS = 1 << 15

    def __init__(self, folder: Path, settings: ModelSettings, *, window_stride: int | None = None) -> None:
        self._folder = folder
        loaded = load_tokenizer(folder)
        self._tokenizer, self.padding_id, self._special = loaded.tokenizer, loaded.padding_id, loaded.special
        self.special_ids = loaded.special_ids
        self._characters, self._prompt = 0, settings.document_prompt or ""
        with tokenizer_errors(folder):
            make_plain(self._tokenizer, lower_case=bool(settings.lower_case))
            self._prompt_tokens = len(self._ids(self._prompt))
            self._layout = self._layout_of(settings.max_length, window_stride)

    def __call__(self, texts: Sequence[str]) -> list[FirstWindow]:
        """Return the first window of each text."""
        return [FirstWindow(cut.window(0), cut.windows > 1) for cut in self.cut(texts, full=False)]

    def cut(self, texts: Sequence[str], *, full: bool = True, places: bool = False) -> list[Cut]:
        """Return texts, without prompt, as tokens for windows; not `full`: no more than the first window needs.

        `Cut.span` can be called only with `places`.
        """
        with tokenizer_errors(self._folder):
            return self._cut(texts, full, places)

    def spans(self, text: str) -> npt.NDArray[np.int32]:
        """Return the first character of each token of `cut([text])` in the text, and the end, `[tokens, 2]`.

        Both are zero or less for tokens of the prompt.
        """
        reading = _Reading(self._prompt + text)
        found: list[npt.NDArray[np.int32]] = []
        with tokenizer_errors(self._folder):
            while not found or reading.end < len(reading.text):
                encoding = self._tokenizer.encode(self._next_piece(reading), **_BARE)
                found.append(np.array(encoding.offsets, dtype=np.int32).reshape(-1, 2) + reading.start)
        return np.concatenate(found) - len(self._prompt)

    def _cut(self, texts: Sequence[str], full: bool, places: bool) -> list[Cut]:
        readings = waiting = [_Reading(self._prompt + text) for text in texts]
        # Offsets also separate the tokens of the prompt from the tokens of the text.
        with_offsets = full and (places or bool(self._prompt))
        # One token more than the first window: the text is truncated.
        enough = None if full else self._layout.room + 1
        self._characters += sum(map(len, texts))
        while waiting:
            pieces = map(self._next_piece, waiting)
            chunks = in_batches(pieces, self.CHUNK_TEXTS, self.CHUNK_CHARACTERS)
            if with_offsets:
                encodings = chain.from_iterable(self._tokenizer.encode_batch(chunk, **_BARE) for chunk in chunks)
                for one, encoding in zip(waiting, encodings, strict=True):
                    self._add(one, encoding, places=places)
            else:
                found = chain.from_iterable(self._encode(chunk, enough) for chunk in chunks)
                for one, ids in zip(waiting, found, strict=True):
                    one.tokens += len(ids)
                    one.ids.append(ids)
            waiting = [one for one in waiting if one.end < len(one.text) and (full or one.tokens <= self._layout.room)]
        return [
            Cut(self._layout, np.concatenate(one.ids), min(one.prompt, self._prompt_tokens), _ascending(one.starts))
            for one in readings
        ]

    def _add(self, reading: _Reading, encoding: Any, *, places: bool) -> None:
        """Add the tokens of a piece to its text, with the place of each."""
        reading.tokens += len(encoding.ids)
        reading.ids.append(np.array(encoding.ids, dtype=np.int32))
        # Places are not needed if the text fits one window.
        if reading.end < len(reading.text) or reading.tokens > self._layout.room:
            offsets = np.array(encoding.offsets, dtype=np.int32).reshape(-1, 2) + reading.start - len(self._prompt)
            # A token in both belongs to the text.
            reading.prompt += int(np.count_nonzero(offsets[:, 1] <= 0))
            if places:
                reading.starts.append(offsets[:, 0])

    def _encode(self, texts: list[str], enough: int | None) -> list[TokenIds]:
        """Return the token ids of texts: of each the first `enough`, or all."""
        if self._characters >= QUICK_CHARACTERS and self._quick:
            return self._quick(texts, enough)
        encodings = self._tokenizer.encode_batch_fast(texts, **_BARE)
        return [np.array(one.ids[:enough], dtype=np.int32) for one in encodings]

    @cached_property
    def _quick(self) -> Encode | None:
        quick = build_nanotokens(self._tokenizer)
        logger.info("Tokenizing with %s from now on.", "nanotoken" if quick else "the library tokenizers")
        return quick

    @property
    def lacks_nanotoken(self) -> bool:
        """Whether it would be faster if nanotoken were installed."""
        return type(self._tokenizer.model).__name__ == "WordPiece" and find_spec("nanotoken") is None

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode_batch_fast([text], **_BARE)[0].ids)

    def _next_piece(self, reading: _Reading) -> str:
        """Advance to the next piece of a text, and return it. Most texts are one piece."""
        reading.start, reading.end = reading.end, self._border(reading.text, reading.end + self.PIECE_CHARACTERS)
        return reading.text[reading.start : reading.end]

    def _border(self, text: str, after: int) -> int:
        """Return the first place from `after` on where dividing the text changes no token, or the end of the text.

        Each place is tried: tokenizers differ in what they do with a space at the start of a text. A text without such
        a place, such as base64, is tokenized in one piece.
        """
        if after >= len(text):
            return len(text)
        for match in islice(BORDER.finditer(text, after), BORDERS_TRIED):
            at = match.start()
            left, right = text[max(0, at - BORDER_CONTEXT) : at], text[at : at + BORDER_CONTEXT]
            if self._ids(left + right) == self._ids(left) + self._ids(right):
                return at
        return len(text)

    def _layout_of(self, max_length: int | None, window_stride: int | None) -> WindowLayout:
        """Return the layout of windows. Raise PipelineError if it has no room for text, or the stride omits tokens."""
        before, after = self._special_tokens()
        special, prompt = len(before) + len(after), self._prompt_tokens
        length = sys.maxsize if max_length is None else max_length
        room = length - special
        if room < 1:
            raise PipelineError(
                f"max_length = {length}, but every text gets {special} special tokens; expected at least {special + 1}."
            )
        if room <= prompt:
            raise PipelineError(
                f"max_length = {length}, but {special} special tokens and {prompt} of the prompt {self._prompt!r} "
                f"leave no room for text; expected at least {special + prompt + 1}, or a shorter prompt."
            )
        if window_stride is not None and window_stride > room - prompt:
            raise PipelineError(
                f"window_stride = {window_stride}, but a window of max_length = {length} has {room - prompt} tokens of "
                "text, and those between two windows would be lost; expected at most that many."
            )
        return WindowLayout(before, after, room, window_stride or max(1, (room - prompt) // 2))

    def _special_tokens(self) -> tuple[TokenIds, TokenIds]:
        """Return the special tokens before every text, and those after it."""
        for text in "a1.的":  # a tokenizer may not have all scripts
            encoding = self._tokenizer.encode(text)
            places = [place for place, sequence in enumerate(encoding.sequence_ids) if sequence is not None]
            if places:
                ids = np.array(encoding.ids, dtype=np.int32)
                return ids[: places[0]], ids[places[-1] + 1 :]
        raise damaged("The tokenizer gives no token for a letter, a digit or a dot")

    def ids_of_special(self, names: Iterable[str]) -> list[int]:
        """Return the ids of special tokens by their role, such as cls_token; a tokenizer may lack some."""
        return sorted({self._special[name] for name in names if name in self._special})

    def vocabulary(self, size: int) -> list[str | None]:
        """Return the token string of each id below `size`, None without one. Raise CheckpointError for a duplicate."""
        tokens: list[str | None] = [self._tokenizer.id_to_token(token_id) for token_id in range(size)]
        first: dict[str, int] = {}
        for token_id, token in enumerate(tokens):
            if token is not None and first.setdefault(token, token_id) != token_id:
                raise CheckpointError(
                    f"The vocabulary gives the token {token!r} to two ids, {first[token]} and {token_id}; "
                    "an index keys weights by token, so each id needs a string of its own. Fix tokenizer.json."
                )
        return tokens


def _ascending(starts: list[npt.NDArray[np.int32]]) -> npt.NDArray[np.int32]:
    """Return where each token starts, never before the previous one."""
    return np.maximum.accumulate(np.concatenate(starts)) if starts else np.empty(0, dtype=np.int32)
