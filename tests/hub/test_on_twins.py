"""Run the code of the hub tests against small copies of the models, served by a loopback hub under the real names.

The figures of the real models are not tested here: that needs a hub.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.cards import CARD_TWINS, Twin
from support.hub_cards import EXAMPLES, measure
from support.loopback_hub import begin, ended, loopback_hub

from sparse_ingest.pipeline import override, read_pipeline

# By hub id, as in the hub tests: only the names of the packaged pipelines are passed.
PROGRAM = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
from support.hub_cards import EXAMPLES, measure
from sparse_ingest.pipeline import read_pipeline
names = json.loads(sys.argv[2])
example = EXAMPLES[0]
found = {name: measure(read_pipeline(name), example.queries, example.documents) for name in names}
print(json.dumps({name: [one.dimensions, one.similarities] for name, one in found.items()}))
"""


@pytest.mark.slow
def test_the_hub_tests_measure_the_models_of_the_packaged_pipelines(tmp_path: Path) -> None:
    example = EXAMPLES[0]
    twins: dict[str, Twin] = {}
    with loopback_hub() as hub:
        for name, make in CARD_TWINS.items():
            twins[name], model = make(tmp_path / name), read_pipeline(name).model
            hub.add(model.document or "", twins[name].document)
            if model.query:
                hub.add(model.query, twins[name].query or tmp_path)
        paths = [str(Path(__file__).parents[1])]
        process = begin(
            PROGRAM, json.dumps(paths), json.dumps(list(CARD_TWINS)), endpoint=hub.url, home=tmp_path / "home"
        )
        result = ended(process)
    assert result.code == 0, result.err
    found = json.loads(result.out)
    for name, twin in twins.items():
        local = measure(override(read_pipeline(name), twin.assignments()), example.queries, example.documents)
        assert found[name] == [local.dimensions, local.similarities], name
        assert all(row and max(row) > 0 for row in local.similarities)


def test_similarity_matches_tokens_by_string() -> None:
    from support.hub_cards import Measured

    found = Measured(5, [{"a": 2.0, "b": 1.0}, {"c": 1.0}], [{"a": 3.0, "c": 0.5}, {"b": 4.0}, {}])
    assert found.similarities == [[6.0, 4.0, 0.0], [0.5, 0.0, 0.0]]
