"""Texts for pre-training: documents in files, tokenised once.

Files are read and tokenised through `datasets`, which keeps the result on the disk and maps it into
memory: a corpus may be larger than that, and starting again costs nothing. The cache goes by
content: of the files, the tokenizer and what is done here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..tasks.errors import InputError, LoadError
from ..tasks.reading import KINDS, LISTED, BadRow, TextFile
from .run_folder import writing_in

if TYPE_CHECKING:
    import datasets

__all__ = ["Corpus", "documents", "files_of"]

_FORMAT = 1  # raised when the same files and tokenizer would give other tokens or sentences
_SUFFIXES = tuple(f".{kind}{end}" for kind in KINDS for end in ("", ".gz"))
_BATCH = 256  # documents that are tokenised together


def files_of(sources: Iterable[Path | str]) -> list[Path]:
    """The files that files, folders (with everything in them) and globs name, in order, each once.

    In folders and globs only files of a kind that can be read count.

    Raises:
        InputError: a source that names no file.
    """
    found: dict[Path, None] = {}
    for source in map(Path, sources):
        if source.is_dir():
            inside = source.rglob("*")
        elif source.exists():
            found[source] = None
            continue
        else:
            inside = source.parent.glob(source.name) if source.parent.is_dir() else ()
        known = sorted(p for p in inside if p.is_file() and p.name.lower().endswith(_SUFFIXES))
        if not known:
            raise InputError(
                f"expected files of .{', .'.join(KINDS)} (also with .gz) in {str(source)!r}, got "
                "none; name files, folders or a glob"
            )
        found |= dict.fromkeys(known)
    return list(found)


def documents(file: TextFile) -> Iterator[str | BadRow]:
    """The documents of a file: of a .txt what stands between blank lines, else every row."""
    lines: list[str] = []
    for row in file.rows():
        if isinstance(row, BadRow):
            if not row.empty:
                yield row
            elif lines:
                yield "\n".join(lines)
                lines = []
        elif file.kind == "txt":
            lines.append(row.text)
        else:
            yield row.text
    if lines:
        yield "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents as tokens, which stay on the disk, and where their sentences end, in memory.

    Tokens are counted through the whole corpus: document ``d`` has those from ``starts[d]`` to
    ``starts[d + 1]``.

    Attributes:
        starts: int64 ``[D + 1]``.
        sentences: int64 ``[S + 1]``, where sentences start; the first of document ``d`` is
            ``sentences[first[d]]``.
        first: int64 ``[D + 1]``.
        digest: of the files and the tokenizer.
        bad: lines that held no text, the first `LISTED` of ``num_bad``.
    """

    starts: np.ndarray
    sentences: np.ndarray
    first: np.ndarray
    digest: str
    bad: tuple[str, ...]
    num_bad: int
    _parts: tuple[np.ndarray, ...]  # tokens, int32
    _part_starts: np.ndarray

    @classmethod
    def prepare(
        cls,
        files: Iterable[Path | str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        column: str | None = None,
        language: str = "en",
        cache_dir: Path | str | None = None,
    ) -> Corpus:
        """Read and tokenise files, or find what an earlier call has made of the same.

        Args:
            files: .txt (a blank line between documents), .csv, .tsv, .jsonl, .parquet (a document
                in each row); all but parquet also .gz.
            tokenizer: a fast one.
            column: column or key of the text, by default ``text``.
            language: code of the language whose rules end sentences (`sentencex` knows 300).
            cache_dir: in place of that of `datasets`.

        Raises:
            InputError: a file that cannot be read, or no document at all.
            LoadError: `datasets` or `sentencex` is not installed, or a tokenizer that is not fast.
        """
        if not tokenizer.is_fast:
            raise LoadError(
                f"expected a fast tokenizer (tokenizer.json), got a {type(tokenizer).__name__}"
            )
        readers = [TextFile(f, _column_of(f, column)) for f in files]
        facts = {
            "format": _FORMAT,
            "files": [(reader.digest(), reader.kind, reader.column) for reader in readers],
            "language": language,
            "tokenizer": tokenizer.backend_tokenizer.to_str(),
        }
        digest = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()
        made = _tokenised(readers, tokenizer, language, digest, cache_dir)
        return cls._of(made, digest, readers)

    @classmethod
    def _of(cls, made: datasets.Dataset, digest: str, readers: list[TextFile]) -> Corpus:
        import pyarrow.compute as compute

        table = made.data.table
        reasons = table.column("bad")
        bad = reasons.filter(compute.not_equal(reasons, ""))
        sentences = _numbers(compute.list_value_length(table["sentences"]))
        real = sentences > 0  # the others have no tokens, so that nothing of those is left out
        if not real.any():
            names = ", ".join(repr(reader.name) for reader in readers[:3])
            raise InputError(f"expected a document or more in {names}, got none")
        parts = [chunk.flatten() for chunk in table["tokens"].chunks]
        tokens = tuple(part.to_numpy(zero_copy_only=True) for part in parts if len(part))
        return cls(
            starts=_ends(_numbers(compute.list_value_length(table["tokens"]))[real]),
            sentences=_ends(_numbers(compute.list_flatten(table["sentences"]))),
            first=_ends(sentences[real]),
            digest=digest,
            bad=tuple(bad[:LISTED].to_pylist()),
            num_bad=len(bad),
            _parts=tokens,
            _part_starts=_ends(np.array([len(part) for part in tokens])),
        )

    @property
    def num_documents(self) -> int:
        return len(self.starts) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.starts[-1])

    def tokens(self, start: int, end: int) -> np.ndarray:
        """int32 ``[end - start]``, of one document."""
        part = int(np.searchsorted(self._part_starts, start, side="right")) - 1
        offset = int(self._part_starts[part])
        return self._parts[part][start - offset : end - offset]

    def counts(self, size: int) -> np.ndarray:
        """``[size]``, how often each token of the vocabulary comes."""
        return sum(np.bincount(part, minlength=size) for part in self._parts)

    def split(self, share: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Documents for training and those held out, by number: of one document nothing is in
        both.

        Args:
            share: of the documents that are held out; at least two are, of one document none.
            seed: of the choice.
        """
        count = self.num_documents
        held = min(max(round(share * count), 2), count - 1) if share else 0
        order = np.random.default_rng([seed, 0]).permutation(count)
        return np.sort(order[held:]), np.sort(order[:held])


def _column_of(file: Path | str, column: str | None) -> str | None:
    """Lines of a .txt have none; a corpus may hold both kinds."""
    return None if TextFile(file).kind == "txt" else column


def _numbers(values) -> np.ndarray:
    return values.to_numpy().astype(np.int64)


def _ends(sizes: np.ndarray) -> np.ndarray:
    """``[0, sizes[0], sizes[0] + sizes[1], ...]``."""
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def _tokenised(
    readers: list[TextFile],
    tokenizer: PreTrainedTokenizerBase,
    language: str,
    digest: str,
    cache_dir: Path | str | None,
) -> datasets.Dataset:
    try:
        import datasets
        import sentencex
    except ImportError as error:
        raise LoadError(
            f"a corpus needs datasets and sentencex ({error}): pip install 'fastbert-triton[train]'"
        ) from error
    from filelock import FileLock

    def read(readers: list[TextFile]) -> Iterator[dict[str, str]]:
        for reader in readers:
            for document in documents(reader):
                if isinstance(document, BadRow):
                    reason = f"{reader.name}, line {document.line}: {document.reason}"
                    yield {"text": "", "bad": reason}
                else:
                    yield {"text": document, "bad": ""}
        yield {"text": "", "bad": ""}  # datasets fails where nothing comes

    def tokenise(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        split = [sentencex.segment(language, text) if text else [] for text in batch["text"]]
        flat = [sentence for sentences in split for sentence in sentences]
        options = {"add_special_tokens": False, "return_attention_mask": False}
        ids = iter(tokenizer(flat, **options, verbose=False)["input_ids"] if flat else [])
        tokens, sizes = [], []
        for sentences in split:
            mine = [part for part in islice(ids, len(sentences)) if part]
            tokens.append([token for part in mine for token in part])
            sizes.append([len(part) for part in mine])
        return {"tokens": tokens, "sentences": sizes}

    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE)
    numbers = datasets.List(datasets.Value("int32"))
    texts = {"text": datasets.Value("large_string"), "bad": datasets.Value("string")}
    shown = datasets.is_progress_bar_enabled()
    # Of several processes one does it; the others find it done.
    with writing_in(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"fastbert-{digest}.lock"):
            datasets.disable_progress_bars()
            try:
                read_in = datasets.Dataset.from_generator(
                    read,
                    gen_kwargs={"readers": readers},
                    features=datasets.Features(texts),
                    cache_dir=str(folder),
                    fingerprint=f"{digest}-texts",
                )
                return read_in.map(
                    tokenise,
                    batched=True,
                    batch_size=_BATCH,
                    remove_columns=["text"],
                    features=datasets.Features(
                        {"bad": texts["bad"], "tokens": numbers, "sentences": numbers}
                    ),
                    new_fingerprint=f"{digest}-tokens",
                )
            except datasets.exceptions.DatasetGenerationError as error:
                raise error.__cause__ or error from None
            finally:
                if shown:
                    datasets.enable_progress_bars()
