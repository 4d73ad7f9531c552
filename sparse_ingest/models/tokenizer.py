"""The checkpoint's own tokenizer: texts to windows of token ids, and the token string of each id.

In: texts. Out: token ids with special tokens and the prompt, at most max_length of them, without padding; the first
window of a text is what truncation leaves of it. Long texts are tokenised in pieces: the tokenizer takes some 800
bytes of memory a token while it works, and what stays of a token are 4 bytes, or 8 with its place.
Not covered: queries of weight tables, which need no transformers (queries/weight_table.py).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sparse_ingest.checkpoints.layouts import transformers_has
from sparse_ingest.checkpoints.modules import read_json
from sparse_ingest.errors import CheckpointError, PipelineError, first_line
from sparse_ingest.models.nanotokens import Encode, build_nanotokens
from sparse_ingest.pipeline import ModelSettings
from sparse_ingest.records import in_batches

TokenIds = npt.NDArray[np.int32]

# Where a long text may be cut: before a blank between two words, or behind the punctuation of scripts without blanks.
BORDER = re.compile(r"(?<=\S)(?=\s\S)|(?<=[。！？、，；])(?=\w)")
BORDER_CONTEXT = 64  # characters on each side by which a cut is tried
BORDERS_TRIED = 100
# Characters after which it pays to build nanotoken's tokenizer and to try it, which takes half a second.
QUICK_CHARACTERS = 1 << 21
PLAIN = {"add_special_tokens": False}
NO_STARTS = np.empty(0, dtype=np.int32)

# Each row is enough for transformers. With none of them it would make up a tokenizer without a single word.
FILES = (("tokenizer.json",), ("vocab.txt",), ("vocab.json", "merges.txt"), ("*.model",))


class Layout(NamedTuple):
    """What every window of a tokenizer shares: special tokens on both sides, and room for so many tokens between.

    A window's text begins `stride` tokens behind that of the one before.
    """

    before: TokenIds
    after: TokenIds
    room: int
    stride: int


class Cut(NamedTuple):
    """One text as tokens, without special ones, and where its windows lie.

    The first `prompt` of `token_ids` are the prompt's, which stand on every window. Windows begin `stride` tokens of
    text apart; the last one is the first that reaches the end of the text, and may be shorter than the others. So
    every token is in a window, and with a stride of at most a window's text none is between two. `starts` says for
    each token where in the text (without prompt) it starts, or is empty where nobody asked.
    """

    layout: Layout
    token_ids: TokenIds
    prompt: int
    starts: npt.NDArray[np.int32]

    @property
    def windows(self) -> int:
        """How many windows the text takes."""
        beyond = len(self.token_ids) - self.layout.room
        return 1 + max(0, -(-beyond // self.layout.stride))

    def length(self, number: int) -> int:
        """How many tokens a window has."""
        first, end = self._tokens(number)
        return len(self.layout.before) + self.prompt + end - first + len(self.layout.after)

    def window(self, number: int) -> TokenIds:
        """The token ids of a window, as the model reads them."""
        first, end = self._tokens(number)
        layout, ids = self.layout, self.token_ids
        return np.concatenate((layout.before, ids[: self.prompt], ids[first:end], layout.after))

    def span(self, number: int, length: int) -> tuple[int, int]:
        """Which characters of its text, `length` long, a window reads.

        A character between two tokens belongs to the one before, so that the spans leave none out.
        """
        first, end = self._tokens(number)
        start = int(self.starts[first]) if number else 0
        return start, int(self.starts[end]) if end < len(self.token_ids) else length

    def _tokens(self, number: int) -> tuple[int, int]:
        first = self.prompt + number * self.layout.stride
        return first, min(first + self.layout.room - self.prompt, len(self.token_ids))


class Tokenized(NamedTuple):
    """Token ids of each text with special tokens, cut at max_length, and which texts were cut."""

    token_ids: list[TokenIds]
    truncated: npt.NDArray[np.bool_]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Number of tokens of each text."""
        return np.fromiter((len(ids) for ids in self.token_ids), dtype=np.int64, count=len(self.token_ids))

    def take(self, places: npt.NDArray[np.int64]) -> Tokenized:
        """Those of the texts at these places."""
        return Tokenized([self.token_ids[place] for place in places.tolist()], self.truncated[places])


@dataclass
class _Reading:
    """A text that is being tokenised, prompt in front: the piece that is read, and what those before it gave."""

    text: str
    start: int = 0
    end: int = 0
    tokens: int = 0
    ids: list[TokenIds] = field(default_factory=list)
    starts: list[npt.NDArray[np.int32]] = field(default_factory=list)
    prompt: int = 0


class Tokenizer:
    """The checkpoint's own tokenizer, called in batches without padding.

    `window_stride` is how many tokens of text lie between the beginnings of two windows; None: half of the room that
    special tokens and the prompt, tokenised by itself, leave.
    """

    # Tokenised at a time: bounds what the tokenizer returns.
    CHUNK_TEXTS = 512
    CHUNK_CHARACTERS = 1 << 20
    PIECE_CHARACTERS = 1 << 15

    def __init__(self, folder: Path, settings: ModelSettings, *, window_stride: int | None = None) -> None:
        from transformers import AutoTokenizer, PretrainedConfig

        if not any(all(list(folder.glob(name)) for name in row) for row in FILES):
            looked = ", ".join(" with ".join(row) for row in FILES)
            raise CheckpointError(f"{folder} has no tokenizer: looked for {looked}. Fetch the model again.")
        # Without a config it reads that of the model, and complains of one whose architecture it does not know.
        known = transformers_has(str(read_json(folder / "config.json").get("model_type") or ""))
        config = {} if known else {"config": PretrainedConfig()}
        try:
            loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **config)
            self._tokenizer: Any = loaded.backend_tokenizer
        except Exception as error:  # of transformers, tokenizers, huggingface_hub and sentencepiece
            raise CheckpointError(
                f"The tokenizer in {folder} cannot be built: {first_line(error)}. Expected tokenizer.json, and a "
                "config.json that transformers can read. Fetch the model again."
            ) from error
        self.padding_id = int(loaded.pad_token_id or 0)
        self.special_ids = sorted(set(loaded.all_special_ids))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        if settings.lower_case:
            _lower_case_first(self._tokenizer)
        self._characters = 0
        self._prompt = settings.document_prompt or ""
        self._prompt_tokens = len(self._ids(self._prompt))
        self._layout = self._layout_of(settings.max_length, window_stride)

    def __call__(self, texts: Sequence[str]) -> Tokenized:
        """The first window of each text."""
        cuts = self.cut(texts, whole=False)
        return Tokenized([cut.window(0) for cut in cuts], np.array([cut.windows > 1 for cut in cuts], dtype=bool))

    def cut(self, texts: Sequence[str], *, whole: bool = True, places: bool = False) -> list[Cut]:
        """Texts as tokens, for windows.

        Args:
            texts: the texts without prompt.
            whole: False where the first window is enough: a text is then read only until it is known to have more.
            places: whether `Cut.span` will be asked for.
        """
        reading = [_Reading(self._prompt + text) for text in texts]
        # Where a token lies tells the prompt's from the text's, too, where windows behind the first are read.
        placed = whole and (places or bool(self._prompt))
        # The first window, and one token more, which tells that there are further ones.
        enough = None if whole else self._layout.room + 1
        self._characters += sum(map(len, texts))
        encode = None if placed else self._encode_up_to(enough)
        waiting = reading
        while waiting:
            pieces = (self._next_piece(one) for one in waiting)
            chunks = in_batches(pieces, self.CHUNK_TEXTS, self.CHUNK_CHARACTERS)
            if encode is None:
                encodings = (one for chunk in chunks for one in self._tokenizer.encode_batch(chunk, **PLAIN))
                for one, encoding in zip(waiting, encodings, strict=True):
                    self._add(one, encoding, places=places)
            else:
                for one, ids in zip(waiting, (ids for chunk in chunks for ids in encode(chunk)), strict=True):
                    one.tokens += len(ids)
                    one.ids.append(ids)
            waiting = [one for one in waiting if one.end < len(one.text) and (whole or one.tokens <= self._layout.room)]
        return [
            Cut(
                self._layout,
                _joined(one.ids),
                min(one.prompt, self._prompt_tokens),
                np.maximum.accumulate(_joined(one.starts)) if one.starts else NO_STARTS,
            )
            for one in reading
        ]

    def _add(self, reading: _Reading, encoding: Any, *, places: bool) -> None:
        """Take what the tokenizer made of a piece, with the place of each token."""
        reading.tokens += len(encoding.ids)
        reading.ids.append(np.array(encoding.ids, dtype=np.int32))
        # Of a text that fits into one window nobody asks where its tokens are.
        if reading.end < len(reading.text) or reading.tokens > self._layout.room:
            offsets = np.array(encoding.offsets, dtype=np.int32).reshape(-1, 2) + reading.start - len(self._prompt)
            # A token that lies in both is the text's. No token of the prompt ends beyond it.
            reading.prompt += int(np.count_nonzero(offsets[:, 1] <= 0))
            if places:
                reading.starts.append(offsets[:, 0])

    def _encode_up_to(self, enough: int | None) -> Callable[[list[str]], list[TokenIds]]:
        """How texts become token ids, of each the first `enough`, or all."""
        if self._characters >= QUICK_CHARACTERS and self._quick:
            return partial(self._quick, enough=enough)

        def encode(texts: list[str]) -> list[TokenIds]:
            encodings = self._tokenizer.encode_batch_fast(texts, **PLAIN)
            return [np.array(one.ids[:enough], dtype=np.int32) for one in encodings]

        return encode

    @cached_property
    def _quick(self) -> Encode | None:
        return build_nanotokens(self._tokenizer)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode_batch_fast([text], **PLAIN)[0].ids)

    def _next_piece(self, reading: _Reading) -> str:
        """Move over the next piece of a text; most texts are one."""
        reading.start, reading.end = reading.end, self._border(reading.text, reading.end + self.PIECE_CHARACTERS)
        return reading.text[reading.start : reading.end]

    def _border(self, text: str, after: int) -> int:
        """The first place from `after` on where a cut changes no token, or the end of the text.

        Each place is tried on its surroundings: tokenizers differ in what they do with a blank at the start of a text.
        A text that cannot be cut anywhere, as base64 cannot, is tokenised whole and takes the memory for that.
        """
        if after >= len(text):
            return len(text)
        for match in islice(BORDER.finditer(text, after), BORDERS_TRIED):
            at = match.start()
            left, right = text[max(0, at - BORDER_CONTEXT) : at], text[at : at + BORDER_CONTEXT]
            if self._ids(left + right) == self._ids(left) + self._ids(right):
                return at
        return len(text)

    def _layout_of(self, max_length: int | None, window_stride: int | None) -> Layout:
        """Where special tokens, prompt and text stand in a window.

        Raises:
            PipelineError: special tokens and prompt leave no room for text, or the stride would lose some.
        """
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
                f"window_stride = {window_stride}, but a window of max_length = {length} holds {room - prompt} tokens "
                "of text, and those between two windows would be lost; expected at most that many."
            )
        return Layout(before, after, room, window_stride or max(1, (room - prompt) // 2))

    def _special_tokens(self) -> tuple[TokenIds, TokenIds]:
        """The special tokens in front of every text, and those behind."""
        for text in "a1.的":  # a tokenizer may know none of some scripts
            encoding = self._tokenizer.encode(text)
            places = [place for place, sequence in enumerate(encoding.sequence_ids) if sequence is not None]
            if places:
                ids = np.array(encoding.ids, dtype=np.int32)
                return ids[: places[0]], ids[places[-1] + 1 :]
        raise CheckpointError("The tokenizer gives no token for a letter, a digit or a dot. Fetch the model again.")

    def vocabulary(self, size: int) -> list[str | None]:
        """The token string of each id below `size`; None where an id has none.

        Raises:
            CheckpointError: two ids have the same string, so an index could not tell them apart.
        """
        tokens: list[str | None] = [self._tokenizer.id_to_token(token_id) for token_id in range(size)]
        first: dict[str, int] = {}
        for token_id, token in enumerate(tokens):
            if token is not None and first.setdefault(token, token_id) != token_id:
                raise CheckpointError(
                    f"The vocabulary gives the token {token!r} to two ids, {first[token]} and {token_id}; "
                    "an index keys weights by token, so each id needs a string of its own. Mend tokenizer.json."
                )
        return tokens


def _lower_case_first(tokenizer: Any) -> None:
    """Lower-case before everything else, as sentence-transformers does for `do_lower_case`."""
    from tokenizers import normalizers

    steps = [normalizers.Lowercase()]
    if tokenizer.normalizer is not None:
        steps.append(tokenizer.normalizer)
    tokenizer.normalizer = normalizers.Sequence(steps)


def _joined(arrays: list[npt.NDArray[np.int32]]) -> npt.NDArray[np.int32]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
