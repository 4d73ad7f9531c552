"""`SearchableRun`: a run folder that is searched exactly, without a server."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

from sparse_ingest.errors import UsageError
from sparse_ingest.pipeline import Pipeline, options_from, refuse_options
from sparse_ingest.queries.weight_table import QueryWeights
from sparse_ingest.records import PARENT, Query
from sparse_ingest.reporting import SILENT, Reporter
from sparse_ingest.runs.run import Run
from sparse_ingest.searching.document_terms import DocumentTerms, TermReader, terms_in_run
from sparse_ingest.searching.hits import Explanation, Hit, Ranked
from sparse_ingest.searching.options import SearchOptions, for_one_document
from sparse_ingest.searching.pipelines import has_words, pipeline_of_run, refuse_hybrid, remembered_model
from sparse_ingest.searching.query import QueryModel, weights_of
from sparse_ingest.searching.run_search import explain_in_run, rank_run, search_run, why_empty_run

NO_WEIGHTS = "The query has no weights."


class SearchableRun(Run):
    """A run that can be searched with its own model, or with the one that `pipeline` names."""

    def __init__(
        self,
        run: Run,
        given: Pipeline = Pipeline(),  # noqa: B008 - frozen
        *,
        force: bool = False,
        reporter: Reporter = SILENT,
    ) -> None:
        super().__init__(run.path, run.manifest)
        self._given, self._force, self._reporter = given, force, reporter

    @cached_property
    def pipeline(self) -> Pipeline:
        """The pipeline of the run, changed by the given one."""
        return pipeline_of_run(self._given, self, force=self._force)

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: the model has threads, and is built again when it is needed."""
        return {name: value for name, value in vars(self).items() if name != "model"}

    @property
    def has_words(self) -> bool:
        """Whether terms are tokens; False for an autoencoder, whose terms are the numbers of features."""
        return has_words(self.manifest.model)

    @cached_property
    def model(self) -> QueryModel:
        """The model of the queries."""
        return QueryModel(self.pipeline)

    def query_weights(self, text: str) -> QueryWeights:
        """Return the weights of a query by token string, heaviest first."""
        return self.model.weights(text)

    def search(
        self, query: str | Mapping[str, float], options: SearchOptions | None = None, **settings: object
    ) -> list[Hit]:
        """Search the finished shards exactly.

        Args:
            query: A text, or weights by token string.
            options: All options in one object, instead of single keywords.
            **settings: Fields of `SearchOptions`, such as `k=10`.

        Raises:
            UsageError: an option needs a server.
            RunError: the model differs from the run's.
        """
        chosen = self.checked(options_from(SearchOptions, options, settings, "search"))
        weights = weights_of(query, self.query_weights)
        hits = search_run(self, weights, size=chosen.k, stored=chosen.stored, collapse=chosen.collapse)
        if not hits and self._reporter is not SILENT:
            for message in self.why_empty(query):
                self._reporter.note(message)
        return hits

    def why_empty(self, query: str | Mapping[str, float], options: SearchOptions | None = None) -> list[str]:
        """Return why a search of the run finds nothing; `options` have no influence."""
        weights = weights_of(query, self.query_weights)
        if not weights:
            return [self.model.why_unweighted(query)] if isinstance(query, str) else [NO_WEIGHTS]
        return why_empty_run(self, weights)

    def rank(
        self, queries: Iterable[Query], options: SearchOptions | None = None, **settings: object
    ) -> Iterator[Ranked]:
        """Yield the ranking of each query, in order. The run is read once per 4,096 queries."""
        chosen = self.checked(options_from(SearchOptions, options, settings, "rank"))
        refuse_options(chosen, ("collapse",), "is for the search of one query: rank returns documents of a run")
        return rank_run(self, self.model.many(queries), size=chosen.k, stored=chosen.stored)

    def explain(
        self, query: str | Mapping[str, float], doc_id: str, options: SearchOptions | None = None, **settings: object
    ) -> Explanation:
        """Return the rank and the score of one document, and why it is not among the first k hits.

        Arguments and errors are as for `search`, with the id of the document.
        """
        chosen = for_one_document(self.checked(options_from(SearchOptions, options, settings, "explain")), doc_id)
        weights = weights_of(query, self.query_weights)
        return explain_in_run(self, weights, doc_id, size=chosen.k, stored=chosen.stored)

    def show(self, *doc_ids: str, query: str | Mapping[str, float] | None = None) -> list[DocumentTerms]:
        """Return the terms of documents, heaviest first, with the contributions of a query if one is given.

        Args:
            *doc_ids: The documents. Only ids are read to find them, then a row group for each.
            query: A text, or weights by token string.

        Raises:
            RunError: the finished shards lack a document, or the model of the query differs from the run's.
        """
        weights = None if query is None else weights_of(query, self.query_weights)
        model = remembered_model(self._given.model, self.manifest.model)
        return terms_in_run(self, doc_ids, TermReader(self.vocabulary(), model, weights))

    def checked(self, options: SearchOptions) -> SearchOptions:
        """Return the options of a search. Raise `UsageError` for those that would have no effect on a run."""
        why = "needs a server, and a run is searched exactly without one"
        refuse_options(options, ("filter", "allow_partial"), why)
        if options.concurrency > 1:  # 1 is the default
            raise UsageError(f"concurrency {why}. Omit it.")
        refuse_hybrid(self._given.query, options, why)
        names = self.manifest.identity.get("fields") or {}
        known = [*(("title", "text") if names.get("carry_text", True) else ()), *names.get("keep", ())]
        known += [PARENT] if self.manifest.identity.get("overflow") == "passages" else []
        if names and options.collapse is not None and options.collapse not in known:
            raise UsageError(
                f"{self.path} has no field {options.collapse!r} for collapse; it has {', '.join(known)}. Correct the "
                "name, or encode with it in --keep."
            )
        return options
