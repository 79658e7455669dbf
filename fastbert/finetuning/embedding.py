"""What sentence embeddings are trained on: questions with passages, or pairs with a score.

Losses, evaluators and samplers are sentence-transformers' own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..tasks.errors import InputError, LoadError
from .sequences import Regression
from .table import Table

if TYPE_CHECKING:
    from scipy.sparse import spmatrix
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.evaluation import BaseEvaluator
    from torch import nn

__all__ = ["Embedding", "Retrieval", "Similarity", "embedding_task", "embedding_task_of"]

_TOP = 10  # passages of a question that are looked at


def embedding_task(table: Table, asked: str | None) -> Embedding | None:
    """What embeddings are trained for, if that is what columns say or who asks.

    Raises:
        InputError: other columns, where embeddings are asked for.
        LoadError: sentence-transformers is not installed.
    """
    columns = set(table.columns)
    if asked not in (None, "embeddings"):
        return None
    if {"query", "passage"} <= columns:
        task: Embedding = Retrieval("negative" in columns)
    elif asked is None:
        return None
    elif {"text_a", "text_b", "score"} <= columns:
        task = Similarity()
        Regression.of(table)  # has something to say where all scores are the same
    else:
        raise InputError(
            f"expected columns query and passage, or text_a, text_b and score in {table.name!r} "
            f"for embeddings, got {', '.join(table.columns)}"
        )
    try:
        import sentence_transformers  # noqa: F401
    except ImportError as error:
        raise LoadError(
            f"embeddings need sentence-transformers ({error}): pip install 'fastbert-triton[embed]'"
        ) from error
    return task


def embedding_task_of(model: str | Path, table: Table) -> Embedding | None:
    """What a table says of embeddings of a model; None for a model with a head.

    Raises:
        InputError, LoadError: as `embedding_task`.
    """
    is_one = (Path(model) / "modules.json").is_file()
    return embedding_task(table, "embeddings" if is_one else None)


class Embedding(ABC):
    """What is the same for both.

    Attributes:
        columns: of texts, in the order in which losses take them.
        best: the metric that a model is chosen by; more is better.
        distinct: whether a text may be in a batch once only.
    """

    distinct = False
    name = "embeddings"
    best: str
    columns: tuple[str, ...]

    def check(self, table: Table) -> None:
        """Look at all rows.

        Raises:
            InputError: a column or a text that is missing.
        """
        for name in self.columns:
            if name not in table.columns:
                raise InputError(
                    f"expected a column {name!r} in {table.name!r}, got {', '.join(table.columns)}"
                )
            for row, value in enumerate(table.column(name), table.first):
                if not isinstance(value, str) or not value.strip():
                    raise InputError(
                        f"expected a text in {name!r}, row {row} of {table.name!r}, got {value!r}"
                    )

    @abstractmethod
    def rows(self, table: Table) -> list[dict[str, Any]]:
        """As the collator takes them."""

    @abstractmethod
    def loss(self, model: SentenceTransformer, processes: int) -> nn.Module:
        """What is trained by so many processes."""

    @abstractmethod
    def prompts(self, model: SentenceTransformer) -> dict[str, str]:
        """What the model wants before the texts of each column."""

    def scores(self, model: SentenceTransformer, table: Table) -> dict[str, float]:
        """Metrics of a model, by an evaluator."""
        model.eval()
        found = self._evaluator(table)(model)
        return {name: float(np.nan_to_num(found[key])) for name, key in self._metrics.items()}

    _metrics: ClassVar[dict[str, str]]  # our names: theirs

    @abstractmethod
    def _evaluator(self, table: Table) -> BaseEvaluator: ...

    @abstractmethod
    def words_alone(self, table: Table) -> float:
        """`best` of TF-IDF vectors of the table's own texts, which know no language."""

    @abstractmethod
    def predictions(self, model: SentenceTransformer, table: Table) -> Iterator[dict[str, Any]]:
        """What a model says of each row, beside what is right."""


class Retrieval(Embedding):
    """A question and a passage that answers it; others' passages, and negatives, do not."""

    best = f"ndcg@{_TOP}"
    distinct = True  # or it would be its own negative
    _metrics: ClassVar = {
        name: f"cosine_{name}"
        for name in (best, f"mrr@{_TOP}", "accuracy@1", f"accuracy@{_TOP}")
    }  # fmt: skip

    def __init__(self, has_negatives: bool):
        self.columns = ("query", "passage", *(["negative"] * has_negatives))

    def rows(self, table: Table) -> list[dict[str, Any]]:
        return [dict(zip(self.columns, row, strict=True)) for row in table.rows(self.columns)]

    def loss(self, model: SentenceTransformer, processes: int) -> nn.Module:
        from sentence_transformers.sentence_transformer import losses

        return losses.MultipleNegativesRankingLoss(model, gather_across_devices=processes > 1)

    def prompts(self, model: SentenceTransformer) -> dict[str, str]:
        passage = next(
            (model.prompts[name] for name in ("document", "passage", "corpus")
             if model.prompts.get(name)), "",
        )  # fmt: skip
        found = {"query": model.prompts.get("query", ""), "passage": passage, "negative": passage}
        return {name: found[name] for name in self.columns if found[name]}

    def _corpus(self, table: Table) -> tuple[list[str], list[str], dict[str, set[int]]]:
        """Distinct questions and passages, and which of these answer each of those."""
        texts = [text for name in self.columns[1:] for text in table.column(name)]
        passages = list(dict.fromkeys(texts))
        places = {text: i for i, text in enumerate(passages)}
        right: dict[str, set[int]] = {}
        for query, passage in table.rows(("query", "passage")):
            right.setdefault(query, set()).add(places[passage])
        return list(right), passages, right

    def _evaluator(self, table: Table) -> BaseEvaluator:
        from sentence_transformers.sentence_transformer.evaluation import (
            InformationRetrievalEvaluator,
        )
        from sentence_transformers.util import cos_sim

        queries, passages, right = self._corpus(table)
        return InformationRetrievalEvaluator(
            {str(i): query for i, query in enumerate(queries)},
            {str(i): passage for i, passage in enumerate(passages)},
            {str(i): {*map(str, right[query])} for i, query in enumerate(queries)},
            score_functions={"cosine": cos_sim},
            main_score_function="cosine",
            write_csv=False,
        )

    def words_alone(self, table: Table) -> float:
        queries, passages, right = self._corpus(table)
        vectors = _tf_idf([*queries, *passages])
        if vectors is None:
            return 0.0
        asked, there = vectors[: len(queries)], vectors[len(queries) :]
        found = []
        for start in range(0, len(queries), 256):
            scores = (asked[start : start + 256] @ there.T).toarray()
            for query, row in zip(queries[start:], scores, strict=False):
                found.append(_ndcg(np.argsort(-row, kind="stable")[:_TOP], right[query]))
        return float(np.mean(found))

    def predictions(self, model: SentenceTransformer, table: Table) -> Iterator[dict[str, Any]]:
        from sentence_transformers.util import semantic_search

        queries, passages, _ = self._corpus(table)
        found = semantic_search(
            model.encode_query(queries, convert_to_tensor=True),
            model.encode_document(passages, convert_to_tensor=True),
            top_k=_TOP,
        )
        ranked = {
            query: [{"passage": passages[hit["corpus_id"]], "score": hit["score"]} for hit in hits]
            for query, hits in zip(queries, found, strict=True)
        }
        for query, passage in table.rows(("query", "passage")):
            yield {"query": query, "prediction": ranked[query], "label": passage}


class Similarity(Embedding):
    """Two texts and how alike they are, on any scale: only the order counts (Su, 2022, CoSENT)."""

    best = "spearman"
    columns = ("text_a", "text_b")
    _metrics: ClassVar = {"spearman": "spearman_cosine", "pearson": "pearson_cosine"}

    def check(self, table: Table) -> None:
        super().check(table)
        self._gold(table)

    @staticmethod
    def _gold(table: Table) -> list[float]:
        """The scores.

        Raises:
            InputError: something else than numbers, or always the same.
        """
        if "score" not in table.columns:
            raise InputError(
                f"expected a column 'score' in {table.name!r}, got {', '.join(table.columns)}"
            )
        return Regression([]).gold(table)

    def rows(self, table: Table) -> list[dict[str, Any]]:
        rows = zip(table.rows(self.columns), self._gold(table), strict=True)
        return [{"text_a": a, "text_b": b, "score": score} for (a, b), score in rows]

    def loss(self, model: SentenceTransformer, processes: int) -> nn.Module:
        from sentence_transformers.sentence_transformer import losses

        return losses.CoSENTLoss(model)

    def prompts(self, model: SentenceTransformer) -> dict[str, str]:
        prompt = model.prompts.get(model.default_prompt_name or "", "")
        return dict.fromkeys(self.columns, prompt) if prompt else {}

    def _evaluator(self, table: Table) -> BaseEvaluator:
        from sentence_transformers.sentence_transformer.evaluation import (
            EmbeddingSimilarityEvaluator,
        )

        return EmbeddingSimilarityEvaluator(
            table.column("text_a"), table.column("text_b"), self._gold(table),
            similarity_fn_names=["cosine"], write_csv=False,
        )  # fmt: skip

    def words_alone(self, table: Table) -> float:
        a, b = table.column("text_a"), table.column("text_b")
        vectors = _tf_idf([*a, *b])
        if vectors is None:
            return 0.0
        alike = vectors[: len(a)].multiply(vectors[len(a) :]).sum(1)
        said = np.asarray(alike).ravel().tolist()
        return Regression([]).score(said, self._gold(table))[self.best]

    def predictions(self, model: SentenceTransformer, table: Table) -> Iterator[dict[str, Any]]:
        from sentence_transformers.util import pairwise_cos_sim

        sides = [model.encode(table.column(name), convert_to_tensor=True) for name in self.columns]
        for said, right in zip(pairwise_cos_sim(*sides).tolist(), self._gold(table), strict=True):
            yield {"prediction": said, "label": right}


def _tf_idf(texts: list[str]) -> spmatrix | None:
    """Vectors of length 1; None where there is no word in all of them."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    try:
        return TfidfVectorizer(token_pattern=r"\w+", sublinear_tf=True).fit_transform(texts).tocsr()
    except ValueError:  # an empty vocabulary
        return None


def _ndcg(ranked: Sequence[int], right: set[int]) -> float:
    """Normalised discounted cumulative gain of the first `_TOP` (Jarvelin and Kekalainen, 2002)."""
    gains = 1 / np.log2(np.arange(2, _TOP + 2))
    hits = [i in right for i in ranked]
    return float(gains[: len(hits)] @ hits / gains[: len(right)].sum())
