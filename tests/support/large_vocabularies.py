"""Models and runs whose token ids reach 32,768 and more."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from sparse_ingest.checkpoints.locate import locate
from sparse_ingest.pipeline import IndexSettings, Pipeline
from sparse_ingest.runs.run import Run
from support.checkpoints import PACKAGED
from support.runs import make_run
from support.tables import TOKENS, write_table

SIZE = 40_000
VOCABULARY = [*TOKENS, *(f"w{number}" for number in range(len(TOKENS), SIZE))]
USED = [*range(5, 10), *range(500, SIZE, 499)]  # ids; about a fifth are above 32,767
WEIGHTS = {VOCABULARY[token_id]: 0.5 + token_id % 13 / 8 for token_id in range(5, SIZE)}


def write_large_table(folder: Path) -> str:
    return str(write_table(folder, VOCABULARY, WEIGHTS))


def random_documents(count: int, used: list[int], seed: int = 1) -> dict[str, dict[str, float]]:
    random = np.random.default_rng(seed)
    return {
        f"d{number}": {
            VOCABULARY[token_id]: float(random.gamma(2.0, 0.4) + 0.01)
            for token_id in sorted(random.choice(used, 12, replace=False).tolist())
        }
        for number in range(count)
    }


def make_large_run(folder: Path, documents: dict[str, dict[str, float]], model: str = "made-by-hand") -> Run:
    return make_run(folder, documents, shard_rows=20, vocabulary=VOCABULARY, model=model)


def ids_of(documents: dict[str, dict[str, float]]) -> list[int]:
    """Return the ids of the tokens that occur, in ascending order."""
    place = {token: token_id for token_id, token in enumerate(VOCABULARY)}
    return sorted({place[token] for terms in documents.values() for token in terms})


def exact_seismic(folder: Path) -> Pipeline:
    """Return the pipeline of a field whose segments are all searched exactly."""
    path = folder / "exact.json"
    parameters = {"approximate_threshold": 1_000_000}
    sparse = {"type": "sparse_vector", "method": {"name": "seismic", "parameters": parameters}}
    mappings = {"dynamic": False, "properties": {"sparse": sparse, "text": {"type": "text"}}}
    path.write_text(json.dumps({"settings": {"index": {"sparse": True}}, "mappings": mappings}))
    return Pipeline(index=IndexSettings(kind="sparse_vector", body=str(path)))


def write_shifted_model(folder: Path, *, first: int = 1000, by: int = 20_000) -> Path:
    """Copy the packaged model with larger ids: `by` unused tokens are before the token of id `first`."""
    from safetensors.numpy import load_file, save_file

    packaged = locate(PACKAGED)[0]
    shutil.copytree(packaged, folder)
    tokenizer = json.loads((packaged / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    shifted = {token: token_id + by * (token_id >= first) for token, token_id in vocabulary.items()}
    tokenizer["model"]["vocab"] = shifted | {f"[filler{number}]": first + number for number in range(by)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    weights = load_file(packaged / "model.safetensors")
    for name, unused in (("bert.embeddings.word_embeddings.weight", 0.0), ("cls.predictions.bias", -100.0)):
        rows = np.full((by, *weights[name].shape[1:]), unused, dtype=weights[name].dtype)
        weights[name] = np.concatenate((weights[name][:first], rows, weights[name][first:]))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((packaged / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + by}))
    return folder
