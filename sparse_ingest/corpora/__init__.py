"""Text in: every form of corpus as a stream of `SourceRow`s, and collections' queries and judgments."""
