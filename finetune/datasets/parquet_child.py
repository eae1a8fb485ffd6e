"""The process that reads a Parquet file: ``python -m finetune.datasets.parquet_child``, started by ``parquet``.

A damaged file can end a process from inside the library, past anything that Python could catch, and a few bytes can
unfold to more than a machine has. Here that ends this process and no other. Its input is one JSON object on standard
input; it writes JSON lines to the file named there: the columns, the rows, and last whether there was a fault.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, TextIO

_BATCH = 256
"""Rows in memory at once."""


def answer(request: dict[str, Any]) -> None:
    """Read what is asked for into the file that the request names."""
    with Path(request["output"]).open("w", encoding="utf-8") as output:
        try:
            fault = _read(request, output)
        except Exception as error:  # pyarrow's and datasets' own kinds: all say that the file is not as it should be
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            fault = f"not a readable Parquet file: {reason:.300}"
        output.write(json.dumps({"fault": fault}) + "\n")


def _read(request: dict[str, Any], output: TextIO) -> str | None:
    columns, kept, fault = _look(Path(request["path"]), set(request["wanted"]), request)
    if fault:
        return fault
    output.write(json.dumps(columns) + "\n")
    return _write_rows(request, kept, output) if kept else None


def _look(path: Path, wanted: set[str], limits: dict[str, Any]) -> tuple[dict[str, str], list[str], str | None]:
    """The columns with what is wrong with each, the wanted ones that hold text, and what the file claims amiss."""
    import pyarrow
    from pyarrow import parquet

    columns: dict[str, str] = {}
    with parquet.ParquetFile(path) as file:
        schema, about = file.schema_arrow, file.metadata
        if len(set(schema.names)) < len(schema.names):
            return {}, [], "two columns have the same name"
        if len(schema.names) > limits["most_columns"]:
            return {}, [], f"there are more than {limits['most_columns']:,} columns"
        for column in schema:
            kind = column.type.value_type if pyarrow.types.is_dictionary(column.type) else column.type
            text = pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
            columns[column.name] = "" if text else f"{column.type}"[:60]
        if not 0 < about.num_rows <= limits["most_rows"]:
            return {}, [], f"the file has {about.num_rows:,} rows; 1 to {limits['most_rows']:,} are read"
        kept = [name for name, fault in columns.items() if name in wanted and not fault]
        # What compressed text unfolds to is written beside it.
        groups = [about.row_group(number) for number in range(about.num_row_groups)]
        chunks = [group.column(place) for group in groups for place in range(group.num_columns)]
        claimed = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema in kept)
        if claimed > limits["most_bytes"]:
            return {}, [], f"its text unfolds to {claimed:,} bytes; at most {limits['most_bytes']:,} are read"
    return columns, kept, None


def _write_rows(request: dict[str, Any], kept: list[str], output: TextIO) -> str | None:
    """Write the rows, read with HF ``datasets``.

    It is told what the columns are. Left to itself it would follow what the file says of them, and open the images,
    sounds and addresses that rows name.
    """
    import datasets

    rows = datasets.Dataset.from_parquet(
        request["path"],
        columns=kept,
        features=datasets.Features({name: datasets.Value("string") for name in kept}),
        batch_size=_BATCH,
        cache_dir=request["cache"],
        streaming=True,
    )
    characters = 0
    for row in rows:
        values = [row[name] for name in kept]
        characters += sum(len(value) for value in values if value is not None)
        if characters > request["most_bytes"]:
            return f"its text unfolds to more than {request['most_bytes']:,} characters"
        output.write(json.dumps(dict(zip(kept, values, strict=True))) + "\n")
    return None


def _limit_memory(most_bytes: int) -> None:
    """Let this process take so much more memory than it has; where the system has no such limit, none is set."""
    import datasets  # noqa: F401 - what a library takes to be there at all is not the file's doing
    import pyarrow.parquet

    pyarrow.set_cpu_count(1)  # a thread for every core would take memory of its own
    status = Path("/proc/self/statm")
    if status.exists():
        import resource

        # What can be written to, not addresses: those are reserved by the gigabyte and never touched.
        now = int(status.read_text(encoding="ascii").split()[5]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        most = now + most_bytes if hard == resource.RLIM_INFINITY else min(now + most_bytes, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


if __name__ == "__main__":
    asked = json.loads(sys.stdin.read())
    _limit_memory(asked["memory_bytes"])
    answer(asked)
