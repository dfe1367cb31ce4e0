"""An import-linter contract for an allow-list: each part imports only what its row names.

A row is ``part -> names``; a module belongs to the row with the longest name that it is inside of. It may import from
its own row, whatever is inside one of the names, and the standard library. Other distributions are named by their top
level. Direct imports count, lazy ones inside functions too: each row speaks for itself.
"""

import sys
from collections.abc import Iterator

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output

ROOT = "penstock"


class FloorsContract(Contract):
    """Fails for every import that no row allows, and for every module without a row."""

    rows = fields.ListField(subfield=fields.StringField())

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        """Compare all direct imports with the rows."""
        rows: list[str] = list(self.rows)  # type: ignore[call-overload]
        split = [row.partition("->") for row in rows]
        found = list(_violations(graph, {part.strip(): names.split() for part, _, names in split}))
        return ContractCheck(kept=not found, metadata={"found": found})

    def render_broken_contract(self, check: ContractCheck) -> None:
        """Name each import."""
        for line in check.metadata["found"]:
            output.print_error(line, bold=False)
        output.new_line()


def _violations(graph: ImportGraph, rows: dict[str, list[str]]) -> Iterator[str]:
    for module in sorted(name for name in graph.modules if _is_inside(name, ROOT) and name != ROOT):
        part = _row_of(rows, module)
        if part is None:
            yield f"{module} belongs to no row"
            continue
        for imported in sorted(graph.find_modules_directly_imported_by(module)):
            inside = any(_is_inside(imported, name) for name in rows[part])
            if not inside and _row_of(rows, imported) != part and not _is_standard(imported):
                yield f"{module} imports {imported}, which the row of {part} does not name"


def _row_of(rows: dict[str, list[str]], module: str) -> str | None:
    return max((part for part in rows if _is_inside(module, part)), key=len, default=None)


def _is_inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def _is_standard(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names
