"""docs/datasets.md, the part that the contracts write: every dataset, every column, its type and its meaning.

    python -m pipelines.data.contract_docs docs/datasets.md         what `make docs` runs

The prose around the two marker lines is written by people and left alone.
"""

import sys
from pathlib import Path

import pyarrow as pa

from models.spec import SPECS
from pipelines.data.contracts import CONTRACTS, Contract

BEGIN = "<!-- generated from pipelines/data/contracts.py by `make docs`: begin -->"
END = "<!-- generated: end -->"


def type_text(kind: pa.DataType) -> str:
    """A short name of an Arrow type: `f16[64, 1024]`, `list<binary>`, `string`."""
    if isinstance(kind, pa.FixedShapeTensorType):
        short = {"halffloat": "f16", "float": "f32"}[str(kind.value_type)]
        return f"{short}[{', '.join(map(str, kind.shape))}]"
    if pa.types.is_list(kind):
        return f"list<{type_text(kind.value_type)}>"
    if pa.types.is_struct(kind):
        return f"struct<{', '.join(f'{field.name}: {type_text(field.type)}' for field in kind)}>"
    return {"halffloat": "f16", "float": "f32", "double": "f64"}.get(str(kind), str(kind))


def contract_table(contract: Contract) -> str:
    """One contract as a Markdown section with a table of its columns, for every named spec."""
    lines = [
        f"### {contract.name}, version {contract.version}",
        "",
        contract.doc,
        "",
        f"Key: {', '.join(f'`{name}`' for name in contract.key)}.",
        "",
        "| column | type | null | meaning |",
        "|---|---|---|---|",
    ]
    for column in contract.columns:
        by_spec = {name: type_text(column.type(spec)) for name, spec in SPECS.items()}
        if len(set(by_spec.values())) == 1:
            shown = f"`{next(iter(by_spec.values()))}`"
        else:
            shown = "<br>".join(f"{name}: `{text}`" for name, text in by_spec.items())
        null = "yes" if column.nullable else ""
        meaning = column.doc.replace("|", "\\|")
        lines.append(f"| `{column.name}` | {shown} | {null} | {meaning} |")
    return "\n".join(lines)


def generated_block() -> str:
    """Everything between the markers, the markers included."""
    sections = "\n\n".join(contract_table(contract) for contract in CONTRACTS.values())
    return f"{BEGIN}\n\n{sections}\n\n{END}"


def with_generated(page: str) -> str:
    """The page with its generated block replaced.

    Raises:
        ValueError: the page lacks the marker lines.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no block between '{BEGIN}' and '{END}'")
    return before + generated_block() + after


def main() -> None:
    """Rewrite the page named on the command line."""
    path = Path(sys.argv[1])
    path.write_text(with_generated(path.read_text()))


if __name__ == "__main__":
    main()
