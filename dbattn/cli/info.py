"""dbattn info: what a context holds."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from rich.table import Table

from ..files import check_output, write_json
from ..snapshot import SnapshotInfo, describe
from ._console import table_console


def run_info(*, context: Path, json_path: Path | TextIO | None, quiet: bool) -> None:
    """Print what the manifest of a snapshot says.

    Raises:
        FileNotFoundError, ValueError: it is not there, or not a snapshot.
    """
    check_output("--json", json_path)
    info = describe(context)
    facts = _facts(info)
    console = table_console()
    names = Table(box=None, show_header=False, pad_edge=False)
    for name, value in {**facts, "windows": info.windows}.items():
        if name not in ("files", "config") and (value or name not in ("windows", "states", "bytes_of_states")):
            names.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
    changed = {name: value for name, value in facts["config"].items() if value is not None}
    names.add_row("config", ", ".join(f"{name}={value}" for name, value in changed.items()))
    console.print(names)
    if not quiet:
        files = Table(box=None, pad_edge=False)
        for heading, side in (("kind", "left"), ("rows", "right"), ("layers", "right"), ("bytes", "right")):
            files.add_column(heading, justify="right" if side == "right" else "left")
        files.add_column("file", no_wrap=True)
        for file in info.files:
            rows = f"{file.first} to {file.stop - 1}"
            files.add_row(file.kind, rows, str(len(file.layers)), f"{file.bytes:,}", file.name)
        console.print()
        console.print(files)
    write_json(json_path, facts)


def _facts(info: SnapshotInfo) -> dict[str, Any]:
    layer = info.layers[0]
    model = info.model
    kinds = Counter(state.kind for state in info.states)
    return {
        "context": str(info.path),
        "format_version": info.format_version,
        "model": None if model is None else f"{model.name} (fingerprint {model.fingerprint})",
        "weights": None if model is None else (model.state or {}).get("weights"),
        "rows": info.rows,
        "windows": None if info.windows is None else asdict(info.windows),
        "texts": info.batch,
        "layers": len(info.layers),
        "states": ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or None,
        "bytes_of_states": sum(file.bytes for file in info.files if file.kind == "states"),
        "kv_heads": layer.num_kv_heads,
        "head_dim": layer.head_dim,
        "dtype": f"{layer.dtype}, rotated" if layer.rotated else layer.dtype,
        "rows_indexed": layer.indexed,
        "bytes_on_disk": info.nbytes,
        "bytes_per_token": round(info.nbytes / info.rows) if info.rows else None,
        "config": info.config.to_dict(),
        "files": [
            {
                "name": f.name,
                "kind": f.kind,
                "first": f.first,
                "stop": f.stop,
                "layers": len(f.layers),
                "bytes": f.bytes,
            }
            for f in info.files
        ],
    }
