"""The manifest: what a snapshot holds, as JSON that no other program's idea of JSON can bend."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from index_kernels.integer import is_integer

from ..config import RetrievalConfig
from ..windows import Windows
from .folder import MANIFEST, SnapshotError

FORMAT, VERSION = "dbattn snapshot", 2
MANIFEST_LIMIT = 16 << 20
KINDS = ("rows", "segment", "index", "tokens", "queries", "states")
DTYPES = ("float32", "float16", "bfloat16", "int8")
# What a state names its numbers and tensors: an attribute of a layer, or an entry of one.
NAME, MOST_DIMENSIONS = r"[a-z_]{1,60}(\.\d{1,4})?", 8
Number = int | bool | None
_LARGEST = 1 << 48


@dataclass(frozen=True)
class FileInfo:
    """One file of a snapshot.

    Attributes:
        kind: "rows" (keys and values in the order of their positions), "segment" (those of a sealed segment, in the
            order of its lists, with the lists), "index" (what an index built), "tokens" (the token ids), "queries"
            (sampled queries that the index learnt from), "states" (what layers hold that are no databases).
        first, stop: the rows it is about.
        layers: the layers it is about; of states by their number in the model, else by that among the databases.
        bytes: its size.
        sha256: of its bytes, hex.
    """

    kind: str
    first: int
    stop: int
    layers: tuple[int, ...]
    bytes: int
    sha256: str

    @property
    def name(self) -> str:
        """The file's name: a function of what is in it, so a manifest can name nothing outside the folder."""
        return f"{self.kind}-{self.first:09}-{self.stop:09}-{self.sha256[:16]}.safetensors"


@dataclass(frozen=True)
class LayerInfo:
    """One layer: its dimensions, the dtype its rows are stored as (None without rows), and how far it is indexed.

    Attributes:
        start: first valid row of each batch row (left padding).
        settled: rows whose padding is settled; see KVStore.set_start.
        indexed: rows that the index answers for.
        rotated: whether int8 rows are kept rotated, see KVStore.turn; named in the manifest where they are, so that a
            library that knows no rotated rows refuses them.
    """

    num_kv_heads: int
    head_dim: int
    value_dim: int
    dtype: str | None
    start: tuple[int, ...]
    settled: int
    indexed: int
    rotated: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As the manifest has it."""
        return {name: value for name, value in asdict(self).items() if name != "rotated" or value}


@dataclass(frozen=True)
class StateInfo:
    """What a layer of the model holds that is no database; see LayerState. ``tensors``: dtype and shape by name."""

    layer: int
    kind: str
    numbers: dict[str, Number]
    tensors: dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class ModelInfo:
    """Whose rows they are.

    Attributes:
        name: the decoder's class.
        settings: its configuration.
        weights: SHA-256 over samples of its weights, hex.
        state: what else it computes with, by name: active adapters, attributes and buffers of its modules. None in
            snapshots of before this was kept.
    """

    name: str
    settings: dict[str, Any]
    weights: str
    state: dict[str, Any] | None = None

    @property
    def fingerprint(self) -> str:
        """All of it as one short hex string."""
        return hashlib.sha256(_dump(self.to_dict()).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """As the manifest has it."""
        return {name: value for name, value in asdict(self).items() if name != "state" or value is not None}


@dataclass(frozen=True)
class SnapshotInfo:
    """What a manifest says. ``digest`` (SHA-256 of its content) tells one state of a snapshot from every other.

    ``layers`` are those that keep rows in a database. ``states``: what other layers of the model hold, or those beside
    their rows. ``windows``: how the first rows were read, where that was by windows. Both are named in the manifest
    where there are any, so that a library that does not know them refuses it.
    """

    path: Path
    rows: int
    config: RetrievalConfig
    layers: tuple[LayerInfo, ...]
    model: ModelInfo | None
    files: tuple[FileInfo, ...]
    windows: Windows | None = None
    states: tuple[StateInfo, ...] = ()
    format_version: int = VERSION
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", hashlib.sha256(_dump(self._body()).encode()).hexdigest())

    @property
    def batch(self) -> int:
        """Batch rows; 0 without rows."""
        return len(self.layers[0].start)

    @property
    def nbytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(file.bytes for file in self.files)

    def to_bytes(self) -> bytes:
        """The manifest as it is written."""
        return (_dump({**self._body(), "sha256": self.digest}) + "\n").encode()

    def _body(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "format_version": self.format_version,
            "rows": self.rows,
            # Where rows lie is not a matter of what they are.
            "config": {name: value for name, value in self.config.to_dict().items() if name != "rows"},
            "model": None if self.model is None else self.model.to_dict(),
            **({} if self.windows is None else {"windows": asdict(self.windows)}),
            "layers": [layer.to_dict() for layer in self.layers],
            **({} if not self.states else {"states": [asdict(state) for state in self.states]}),
            "files": [{"name": file.name, **asdict(file)} for file in self.files],
        }

    @classmethod
    def from_bytes(cls, path: Path, raw: bytes) -> "SnapshotInfo":
        """Read a manifest that anyone may have written.

        Raises:
            SnapshotError: it is not one, of another format version, altered, or contradicts itself; says where.
        """
        try:
            data = _json(raw)
            written = (_dump(data) + "\n").encode()
            info = cls(path, **_parsed(data))
            _check_cover(info)
        except RecursionError:
            raise SnapshotError(f"{path / MANIFEST} is not a manifest: it is nested too deeply") from None
        except (ValueError, TypeError) as error:
            raise SnapshotError(f"{path / MANIFEST} is refused: {error}") from None
        if written != raw:
            raise SnapshotError(f"{path / MANIFEST} is damaged: its bytes are not those that were saved")
        return info


def _dump(data: Any) -> str:
    return json.dumps(data, indent=1, allow_nan=False)


def _json(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("ascii"))
    except ValueError as error:
        raise ValueError(f"it is not JSON ({error})") from None


def _parsed(data: Any) -> dict[str, Any]:
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f'it has no "format": "{FORMAT}"')
    if data.get("format_version") != VERSION:
        raise ValueError(f"format_version is {data.get('format_version')!r}, expected {VERSION}")
    windows, states = "windows " * ("windows" in data), "states " * ("states" in data)
    fields = _Fields(data, "", f"format format_version rows config model {windows}layers {states}files sha256")
    body = {name: value for name, value in data.items() if name != "sha256"}
    if hashlib.sha256(_dump(body).encode()).hexdigest() != data["sha256"]:
        raise ValueError("it is damaged: its SHA-256 is not the one it names")
    if isinstance(data["config"], dict):
        # Snapshots of before there was a choice.
        for name in ("prefill", "n_windows"):
            data["config"].setdefault(name, getattr(RetrievalConfig(), name))
    config = _Fields(data["config"], "config", " ".join(name for name in RetrievalConfig().to_dict() if name != "rows"))
    return {
        "rows": fields.integer("rows"),
        "config": RetrievalConfig(**config.data),
        "model": None if data["model"] is None else _model(data["model"]),
        "layers": tuple(_layer(item, f"layers[{i}]") for i, item in enumerate(fields.items("layers"))),
        "files": tuple(_file(item, f"files[{i}]") for i, item in enumerate(fields.items("files"))),
        "windows": _windows(data["windows"]) if windows else None,
        "states": tuple(
            _state(item, f"states[{i}]") for i, item in enumerate(fields.items("states") if states else [])
        ),
    }


class _Fields:
    """The fields of one JSON object: exactly the expected names, each of the expected kind."""

    def __init__(self, data: Any, where: str, names: str) -> None:
        self.where = where and f"{where}."
        if not isinstance(data, dict) or list(data) != names.split():
            raise ValueError(f"{where or 'the manifest'} does not have the fields {', '.join(names.split())}")
        self.data: dict[str, Any] = data

    def integer(self, name: str, least: int = 0) -> int:
        return _integer(self.data[name], self.where + name, least)

    def items(self, name: str) -> list[Any]:
        value = self.data[name]
        if not isinstance(value, list):
            raise ValueError(f"{self.where}{name} is {_short(value)}, expected a list")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        return tuple(_integer(item, self.where + name, 0) for item in self.items(name))

    def text(self, name: str, pattern: str) -> str:
        value = self.data[name]
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise ValueError(f"{self.where}{name} is {_short(value)}, expected {pattern}")
        return value


def _integer(value: Any, name: str, least: int) -> int:
    if not is_integer(value, least, _LARGEST - 1):
        raise ValueError(f"{name} is {_short(value)}, expected an integer of at least {least}")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _model(data: Any) -> ModelInfo:
    has_state = isinstance(data, dict) and "state" in data
    fields = _Fields(data, "model", "name settings weights" + " state" * has_state)
    for name in ("settings", *(["state"] if has_state else [])):
        if not isinstance(data[name], dict):
            raise ValueError(f"model.{name} is {_short(data[name])}, expected an object")
    name, weights = fields.text("name", r"\w{1,200}"), fields.text("weights", "[0-9a-f]{64}")
    return ModelInfo(name, data["settings"], weights, data.get("state"))


def _windows(data: Any) -> Windows:
    fields = _Fields(data, "windows", "prefix overlap tokens rows")
    return Windows(
        fields.integer("prefix"), fields.integer("overlap"), fields.integer("tokens", 1), fields.integer("rows", 1)
    )


def _layer(data: Any, where: str) -> LayerInfo:
    rotated = isinstance(data, dict) and "rotated" in data
    fields = _Fields(data, where, "num_kv_heads head_dim value_dim dtype start settled indexed" + " rotated" * rotated)
    dtype = None if data["dtype"] is None else fields.text("dtype", "|".join(DTYPES))
    if rotated and (data["rotated"] is not True or dtype != "int8"):
        raise ValueError(f"{where}.rotated is {_short(data['rotated'])} with dtype {dtype}, expected true with int8")
    return LayerInfo(
        fields.integer("num_kv_heads", 1),
        fields.integer("head_dim", 1),
        fields.integer("value_dim", 1),
        dtype,
        fields.integers("start"),
        fields.integer("settled"),
        fields.integer("indexed"),
        rotated,
    )


def _state(data: Any, where: str) -> StateInfo:
    fields = _Fields(data, where, "layer kind numbers tensors")
    for group in ("numbers", "tensors"):
        if not isinstance(data[group], dict) or not all(re.fullmatch(NAME, name) for name in data[group]):
            raise ValueError(f"{where}.{group} is {_short(data[group])}, expected an object of names like {NAME}")
    for name, value in data["numbers"].items():
        if value is not None and not isinstance(value, bool):
            _integer(value, f"{where}.numbers.{name}", 0)
    tensors = {name: _tensor(value, f"{where}.tensors.{name}") for name, value in data["tensors"].items()}
    return StateInfo(fields.integer("layer"), fields.text("kind", r"\w{1,200}"), data["numbers"], tensors)


def _tensor(data: Any, where: str) -> tuple[str, tuple[int, ...]]:
    if not isinstance(data, list) or len(data) != 2 or data[0] not in DTYPES[:3] or not isinstance(data[1], list):
        raise ValueError(f"{where} is {_short(data)}, expected one of {', '.join(DTYPES[:3])} and a shape")
    if len(data[1]) > MOST_DIMENSIONS:
        raise ValueError(f"{where} has {len(data[1])} dimensions, expected at most {MOST_DIMENSIONS}")
    return data[0], tuple(_integer(size, where, 0) for size in data[1])


def _file(data: Any, where: str) -> FileInfo:
    fields = _Fields(data, where, "name kind first stop layers bytes sha256")
    file = FileInfo(
        fields.text("kind", "|".join(KINDS)),
        fields.integer("first"),
        fields.integer("stop"),
        fields.integers("layers"),
        fields.integer("bytes"),
        fields.text("sha256", "[0-9a-f]{64}"),
    )
    if data["name"] != file.name:
        raise ValueError(f"{where}.name is {_short(data['name'])}, expected {file.name}")
    return file


def _check_cover(info: SnapshotInfo) -> None:
    """The files tile the rows of every layer, each row once, sealed segments first."""
    if not info.layers:
        raise ValueError("layers is empty, expected at least one")
    if info.windows is not None and info.windows.rows > info.rows:
        raise ValueError(f"windows.rows is {info.windows.rows}, more than the {info.rows} rows there are")
    owned: list[list[FileInfo]] = [[] for _ in info.layers]
    indexes, sampled = [0] * len(info.layers), [0] * len(info.layers)
    tokens = 0
    _check_states(info)
    for file in info.files:
        if file.kind == "states":
            continue
        if file.kind == "tokens":
            tokens += 1
            expected: Sequence[int] = range(len(info.layers))
            if (file.first, file.stop) != (0, info.rows) or list(file.layers) != list(expected) or tokens > 1:
                raise ValueError(f"{file.name} is not the one file of token ids of {info.rows} rows of every layer")
            continue
        if not file.layers or list(file.layers) != sorted(set(file.layers)) or file.layers[-1] >= len(info.layers):
            raise ValueError(f"{file.name} names the layers {_short(list(file.layers))} of {len(info.layers)}")
        for number in file.layers:
            if file.kind == "queries":
                if (file.first, file.stop) != (0, info.rows) or sampled[number]:
                    raise ValueError(f"{file.name} is not the one sample of queries of {info.rows} rows of a layer")
                sampled[number] = 1
            elif file.kind != "index":
                owned[number].append(file)
            elif (file.first, file.stop) != (0, info.layers[number].indexed) or indexes[number]:
                raise ValueError(f"{file.name} is not the one index of {info.layers[number].indexed} rows of a layer")
            else:
                indexes[number] = 1
    for number, (layer, files) in enumerate(zip(info.layers, owned, strict=True)):
        at, sealed = 0, True
        for file in sorted(files, key=lambda file: file.first):
            if file.first != at or file.stop <= at or (file.kind == "segment" and not sealed):
                raise ValueError(f"the rows of layer {number} are not whole: {file.name} does not follow row {at}")
            at, sealed = file.stop, file.kind == "segment"
        if at != info.rows:
            raise ValueError(f"the rows of layer {number} are not whole: {at} of {info.rows} are in files")
        if layer.settled > info.rows or layer.indexed > info.rows:
            raise ValueError(f"layer {number} has {layer.settled} rows settled, {layer.indexed} indexed of {info.rows}")
        if (
            len(layer.start) != info.batch
            or (layer.dtype is None) != (info.rows == 0)
            or bool(info.rows) != bool(info.batch)
        ):
            raise ValueError(f"layer {number} has {len(layer.start)} batch rows and dtype {layer.dtype}")
        kept = info.config.storage
        if layer.dtype is not None and layer.dtype != kept and (kept is not None or layer.dtype == "int8"):
            raise ValueError(f"layer {number} has dtype {layer.dtype} under storage={kept!r}")


def _check_states(info: SnapshotInfo) -> None:
    """The states are of different layers of the model, in order, and one file holds their tensors."""
    numbers = [state.layer for state in info.states]
    if numbers != sorted(set(numbers)) or (numbers and not info.rows):
        raise ValueError(
            f"states are of the layers {_short(numbers)} of {info.rows} rows, expected each once, in order"
        )
    held = tuple(state.layer for state in info.states if state.tensors)
    found = [(file.first, file.stop, file.layers) for file in info.files if file.kind == "states"]
    if found != [(0, info.rows, held)] * bool(held):
        raise ValueError(
            f"the files of states are {_short(found)}, expected one of {info.rows} rows and {_short(held)}"
        )
