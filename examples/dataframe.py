"""Encode a pandas DataFrame, and look at the vectors. No server is needed.

python examples/dataframe.py
"""

import tempfile
from pathlib import Path

import pandas as pd

import sparse_ingest as si

products = pd.DataFrame(
    {
        "sku": ["00501", "00502", "00503"],
        "name": ["Bread knife", "Rubber boots", "Baker's yeast"],
        "description": ["cuts bread and cake", "keep your feet dry in the rain", "makes dough rise"],
        "price": [12.5, 27.99, 0.89],
    }
)

with tempfile.TemporaryDirectory() as folder:
    run = si.encode(
        products,
        Path(folder) / "run",
        model="package:cognition/model",
        id_field="sku",
        title_field="name",
        text_field="description",
        keep=["price"],
        progress=True,
    )
    for hit in run.search("yeast that lets dough rise", k=2):
        print(hit.id, hit.fields["title"], hit.fields["price"], f"{hit.score:.2f}")

    # Encoding the same rows again resumes the run: nothing is encoded twice.
    again = si.encode(products, run.path, model="package:cognition/model", id_field="sku", title_field="name",
                      text_field="description", keep=["price"])  # fmt: skip
    print("the same run:", again.manifest.run_id == run.manifest.run_id)
