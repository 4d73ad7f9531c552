"""The only package that imports torch: documents (and masked-LM queries) in, sparse vectors out."""
