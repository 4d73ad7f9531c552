"""Predict the size of an index: one merged segment per shard, the packaged rank_features body, no replicas.

Each file of a Lucene segment has its own rule: postings of the vectors (scores.py), postings and positions of the words
of title and text, the dictionary, ids, compressed `_source`, kept fields. Not included: the clusters of sparse_vector,
vectors in `_source` (`source = "keep"`), other index bodies or codecs.

Compared with OpenSearch 3.6.0 and the vectors of a BERT-tiny model: Cranfield -1.0% (without text -0.7%), its long
documents joined -2.1%, 46 documents of LIMIT +1.0%, 6,000 docstrings -1.9% (without text -1.5%, with five kept fields
+0.3%), 6,000 titles with UUIDs +1.4%, 4,000 texts of one template +2.9%, 3,000 texts of random words +0.9%, 2,000
Chinese texts +5.3%. Predictions from every fifth document are within 6%.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress

import numpy as np
import pyarrow as pa

from sparse_ingest.cluster.field_types import MAX_KEYWORD
from sparse_ingest.cluster.scores import BLOCK, DICTIONARY_BYTES, posting_bytes
from sparse_ingest.errors import RunError
from sparse_ingest.runs.shards import ShardPart, parse_fields

# Words as OpenSearch's standard analyzer finds them: ideographs and hiragana are words of one character.
_ALONE = "\u3040-\u309f\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+(?:['.][^\W{_ALONE}]+)*")
_TEXT = ("title", "text")

# `_source` and ids are compressed by LZ4 in chunks of 80 KB or 1,024 documents; a twentieth of a chunk is the
# dictionary of ten blocks. Lucene's compressor searches less than Arrow's.
_CHUNK_BYTES, _CHUNK_DOCUMENTS, _BLOCKS, _LZ4 = 80 * 1024, 1024, 10, 1.06
_WORD_CODE_BITS, _WORD_CODE_BYTES = 1.5, 0.2  # of a word's frequency in a document, in blocks and after them
_SEGMENT_BYTES = 3000.0  # field names, headers
_DOCUMENT_BYTES = 5.5  # sequence number and version
_NORM_BYTES = 3.0  # of a document with title or text: their lengths
_ID_BYTES, _BYTES_OF_ID = 5.0, 0.6  # in the dictionary, of each id and of each byte of it
_KEYWORD_BYTES, _BYTES_OF_KEYWORD = 8.0, 0.8  # in two dictionaries, of each distinct value and of each byte of it
_VALUE_BYTES = 3.0  # of a keyword in a document: its posting and its number
_INTEGER_BYTES, _FLOAT_BYTES = 8.0, 14.0  # of a number in a document: a point and a doc value


class IndexSize:
    """Counts documents, words and bytes, and predicts the size of their index."""

    def __init__(self) -> None:
        self.documents = 0
        self._frequencies = np.zeros(0, dtype=np.int64)  # documents with each token id
        self._words: Counter[tuple[str, str]] = Counter()  # documents with each field and word
        self._tokens = self._squared_lengths = self._norms = 0
        self._keywords: set[tuple[str, object]] = set()
        self._id_bytes = self._source_bytes = self._keyword_bytes = 0
        self._value_bytes = 0.0

    def add(self, part: ShardPart) -> None:
        """Count the documents of a part of a shard."""
        self.documents += len(part.rows)
        found = np.bincount(part.vectors.token_ids.astype(np.int64), minlength=len(self._frequencies))
        found[: len(self._frequencies)] += self._frequencies
        self._frequencies = found
        self._id_bytes += sum(len(doc_id.encode()) for doc_id in part.vectors.doc_ids)
        self._source_bytes += _compressed_bytes(part.vectors.doc_ids, part.fields)
        for doc_id, fields in zip(part.vectors.doc_ids, part.fields, strict=True):
            with suppress(RunError):  # not a JSON object, which load refuses
                for name, value in parse_fields(fields, doc_id).items():
                    if name in _TEXT and isinstance(value, str):
                        self._add_text(name, value)
                    else:
                        self._add_kept(name, value)

    def bytes(self, scale: float = 1.0) -> float:
        """Return the size in bytes of an index of `scale` times these documents."""
        documents = max(1, round(self.documents * scale))
        frequencies = np.round(self._frequencies * scale).astype(np.int64)
        linear = (
            self._source_bytes * _LZ4
            + self.documents * (_DOCUMENT_BYTES + _ID_BYTES)
            + self._id_bytes * _BYTES_OF_ID
            + self._norms * _NORM_BYTES
            + self._value_bytes
            + len(self._keywords) * _KEYWORD_BYTES
            + self._keyword_bytes * _BYTES_OF_KEYWORD
        )
        words = self._word_bytes(scale, documents) if self._words else 0.0
        return _SEGMENT_BYTES + posting_bytes(frequencies, documents) + words + linear * scale

    def _add_text(self, name: str, text: str) -> None:
        words = _WORD.findall(text.lower())
        self._words.update((name, word) for word in set(words))
        self._tokens += len(words)
        self._squared_lengths += len(words) ** 2
        self._norms += bool(words)

    def _add_kept(self, name: str, value: object) -> None:
        """Count the values of a kept field as load maps it: strings as keywords, numbers as numbers."""
        for each in _leaves(value):
            if isinstance(each, float):
                self._value_bytes += _FLOAT_BYTES
            elif isinstance(each, int) and not isinstance(each, bool):
                self._value_bytes += _INTEGER_BYTES
            elif not isinstance(each, str) or len(each) <= MAX_KEYWORD:
                self._value_bytes += _VALUE_BYTES
                if (name, each) not in self._keywords:
                    self._keywords.add((name, each))
                    self._keyword_bytes += len(str(each).encode(errors="replace"))

    def _word_bytes(self, scale: float, documents: int) -> float:
        """Return the bytes of postings, positions and dictionary of the words of title and text."""
        counts = np.array(list(self._words.values()), dtype=np.int64)
        frequencies = np.round(counts * scale).astype(np.int64)
        postings = posting_bytes(frequencies, documents, code_bits=_WORD_CODE_BITS, code_bytes=_WORD_CODE_BYTES)
        # The share of words in only one document is the rate of new words in further documents (Good-Turing).
        new = len(counts) * (scale ** (float(np.mean(counts == 1))) - 1)
        # A position takes a byte; in blocks of frequent words, as many bits as positions in long texts need.
        length = self._squared_lengths / max(1, self._tokens)
        in_blocks = (frequencies // BLOCK * BLOCK).sum() / max(1, frequencies.sum())
        position = 1 - in_blocks + in_blocks * np.log2(1 + length) / 8
        return float(postings + round(new) * DICTIONARY_BYTES + self._tokens * scale * position)


def _leaves(value: object) -> Iterator[object]:
    """Yield the values in lists and objects."""
    left = [value]
    while left:
        each = left.pop()
        if isinstance(each, dict | list):
            left.extend(each.values() if isinstance(each, dict) else each)
        elif each is not None:
            yield each


def _compressed_bytes(doc_ids: Sequence[str], sources: Sequence[str]) -> int:
    """Return the bytes of ids and sources as Lucene compresses them."""
    total, chunk, documents = 0, bytearray(), 0
    for doc_id, source in zip(doc_ids, sources, strict=True):
        # OpenSearch packs most ids: digits in half a byte, base64 in three quarters of one.
        chunk += doc_id.encode()[: max(1, len(doc_id) * 3 // 4)] + source.encode() + b"\0\0\0"
        documents += 1
        if len(chunk) >= _CHUNK_BYTES or documents == _CHUNK_DOCUMENTS:
            total, chunk, documents = total + _chunk_bytes(bytes(chunk)), bytearray(), 0
    return total + _chunk_bytes(bytes(chunk))


def _chunk_bytes(chunk: bytes) -> int:
    dictionary = chunk[: len(chunk) // (2 * _BLOCKS)]
    block_bytes = max(1, -(-(len(chunk) - len(dictionary)) // _BLOCKS))
    starts = range(len(dictionary), len(chunk), block_bytes)
    shared = _lz4(dictionary)
    return shared + sum(_lz4(dictionary + chunk[start : start + block_bytes]) - shared for start in starts)


def _lz4(data: bytes) -> int:
    return len(pa.compress(data, "lz4_raw", asbytes=True)) if data else 0
