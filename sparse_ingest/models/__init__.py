"""The only room that knows torch: documents (and masked-LM queries) in, sparse vectors out."""
