"""What a query-level router sees of a query: a vector, from a local model or from the words alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from agents.query_routing.outcomes import fewest_queries
from envs.decoding.session import Session
from envs.models.loading import load_model
from envs.models.pool import ModelPool

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer


class Embedder(Protocol):
    """Embeds queries."""

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings of n prompts: float32, (n, width).

        Raises:
            ValueError: a prompt is longer than what is read of it; the error names it.
        """


class Embedding(Protocol):
    """Makes an embedder."""

    def fit(self, prompts: Sequence[str], seed: int = 0) -> Embedder:
        """An embedder that has seen these prompts, of training queries, and no others."""


@dataclass(frozen=True)
class SlmEmbedding:
    """The last hidden state of a small model after it has read the query.

    Args:
        name: of the model, as `envs.models.source.ModelSpec` takes it.
        device: where it runs.
        dtype: its precision.
        rows: queries read in one pass.
        capacity: tokens of the longest query.
    """

    name: str = "embedded/slm"
    device: str = "cpu"
    dtype: str = "float32"
    rows: int = 64
    capacity: int = 512

    def fit(self, prompts: Sequence[str], seed: int = 0) -> Embedder:
        model = load_model(self.name, self.device, self.dtype, self.rows, self.capacity, verbose=False)
        return _SlmEmbedder(ModelPool([model], self.rows, self.capacity), self.rows)


class _SlmEmbedder:
    def __init__(self, pool: ModelPool, rows: int) -> None:
        self.pool, self.rows = pool, rows

    def embed(self, prompts: Sequence[str]) -> Tensor:
        session = Session(self.pool, self.rows, max_new_tokens=1)
        encoded = [self.pool.encode(prompt) for prompt in prompts]
        for number, (prompt, tokens) in enumerate(zip(prompts, encoded, strict=True)):
            session.check_fit(f"query {number} ({prompt[:40]!r})", tokens)
        states = torch.zeros(len(prompts), self.pool.slm.width)
        # alike lengths together, so that passes are even
        order = np.argsort([len(tokens) for tokens in encoded], kind="stable")
        for first in range(0, len(order), self.rows):
            part = order[first : first + self.rows]
            rows = np.arange(len(part))
            session.start(rows, [encoded[i] for i in part])
            states[torch.from_numpy(part)] = session.observe(rows).hidden.float().cpu()
        return states


@dataclass(frozen=True)
class TextEmbedding:
    """TF-IDF of words and pairs of words, reduced by a truncated SVD (latent semantic analysis), of unit length.

    It needs no model, and reads queries of any length.

    Args:
        dimensions: of the embedding.
        max_features: the most frequent words and pairs that are counted.
        fewest: training queries a word or pair must stand in.
    """

    dimensions: int = 128
    max_features: int = 50_000
    fewest: int = 2

    def __post_init__(self) -> None:
        if self.dimensions < 1 or self.max_features < 1 or self.fewest < 1:
            raise ValueError(
                f"dimensions ({self.dimensions}), max_features ({self.max_features}) and fewest ({self.fewest}) must "
                "be at least 1"
            )

    def fit(self, prompts: Sequence[str], seed: int = 0) -> TextEmbedder:
        from sklearn.decomposition import TruncatedSVD

        fewest_queries("dimensions", self.dimensions, prompts)
        words = vectorizer(max_features=self.max_features, min_df=self.fewest)
        counted = words.fit_transform(prompts)
        if counted.shape[1] <= self.dimensions:
            raise ValueError(
                f"the {len(prompts)} training queries hold {counted.shape[1]} words and pairs that stand in at least "
                f"{self.fewest} of them; lower dimensions ({self.dimensions}) below that, or fewest"
            )
        reduced = TruncatedSVD(self.dimensions, random_state=seed).fit(counted)
        terms = [str(term) for term in words.get_feature_names_out()]
        weights, directions = torch.tensor(words.idf_), torch.tensor(reduced.components_).contiguous()
        return TextEmbedder(terms, weights, directions, int(np.diff(counted.indptr).max()))


def vectorizer(**settings: Any) -> TfidfVectorizer:
    """What counts words and pairs of words; further settings are scikit-learn's."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), **settings)


class TextEmbedder:
    """Embeds by words and pairs of words that are known.

    Args:
        terms: the m words and pairs, distinct, in alphabetical order.
        weights: of each, its inverse document frequency: float64, (m,).
        directions: of the singular value decomposition: float64, (dimensions, m).
        most_terms: that one training query holds; `parameters` counts so many.

    Raises:
        ValueError: they do not belong together.
    """

    def __init__(self, terms: Sequence[str], weights: Tensor, directions: Tensor, most_terms: int) -> None:
        if weights.shape != (len(terms),) or directions.dim() != 2 or directions.shape[1] != len(terms):
            raise ValueError(
                f"{len(terms)} words and pairs need as many weights and columns; there are {tuple(weights.shape)} and "
                f"{tuple(directions.shape)}"
            )
        if not isinstance(most_terms, int) or most_terms < 0:
            raise ValueError(f"most_terms must be a whole number, is {most_terms!r}")
        self.terms, self.weights, self.directions, self.most_terms = list(terms), weights, directions, most_terms
        self._words = vectorizer(vocabulary=self.terms)
        self._words.idf_ = weights.numpy()

    @property
    def width(self) -> int:
        """Of the embedding."""
        return len(self.directions)

    @property
    def parameters(self) -> int:
        """Numbers read for one query: of each word and pair the row that is looked up, as many as any has held."""
        return self.most_terms * (self.width + 1)

    def embed(self, prompts: Sequence[str]) -> Tensor:
        from sklearn.preprocessing import normalize

        vectors = self._words.transform(prompts) @ self.directions.numpy().T
        return torch.tensor(normalize(vectors).astype(np.float32))  # a copy, as those that are read from files


@dataclass(frozen=True)
class SentenceEmbedding:
    """A sentence embedding, by the package `sentence-transformers` (`pip install 'citer-gym[sentences]'`).

    Args:
        name: a local folder, or a Hugging Face hub id.
        device: where it runs.
        batch_size: queries in one pass.
    """

    name: str = "sentence-transformers/all-MiniLM-L6-v2"
    device: str = "cpu"
    batch_size: int = 64

    def fit(self, prompts: Sequence[str], seed: int = 0) -> Embedder:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ValueError(
                "this embedding needs the package sentence-transformers; pip install 'citer-gym[sentences]', or choose "
                "embedding=text"
            ) from error
        return SentenceEmbedder(SentenceTransformer(self.name, device=self.device), self.batch_size)


class SentenceEmbedder:
    """Embeds by a model of sentence-transformers.

    Args:
        network: the model.
        batch_size: queries in one pass.
    """

    def __init__(self, network: Any, batch_size: int) -> None:
        self.network, self.batch_size = network, batch_size

    def embed(self, prompts: Sequence[str]) -> Tensor:
        limit = self.network.max_seq_length
        for number, prompt in enumerate(prompts):
            # it would read the beginning alone, and say nothing
            length = len(self.network.tokenizer(prompt, truncation=False)["input_ids"])
            if limit is not None and length > limit:
                raise ValueError(
                    f"query {number} ({prompt[:40]!r}) has {length} tokens, the embedding reads {limit}; drop it, or "
                    "choose an embedding that reads more (embedding=text reads all)"
                )
        vectors = self.network.encode(list(prompts), batch_size=self.batch_size, show_progress_bar=False)
        return torch.tensor(np.asarray(vectors, dtype=np.float32))  # a copy, as those that are read from files
