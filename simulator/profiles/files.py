"""Performance profiles on disk: JSON for people to read, published CSV tables, profiles in the package.

The JSON format, one point a line, times in milliseconds::

    {
      "format": "baton-profile/1",
      "name": "...", "source": "...", "model": "...", "accelerator": "...",
      "gpus_per_worker": 1, "kv_capacity_tokens": 945029, "block_size_tokens": 16,
      "kv_bytes_per_token": 131072, "max_num_seqs": 1024, "max_num_batched_tokens": 8192,
      "startup_s": 60.0,
      "link": {"latency_ms": 1.0, "gigabytes_per_s": 40.0},
      "prefill": [{"prompt_tokens": 100, "context_tokens": 0, "ms": 19.525}],
      "decode": [{"num_decoding": 1, "kv_tokens": 350, "ms": 4.38}]
    }

``startup_s`` and ``context_tokens`` may be left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from core.errors import ConfigError
from core.performance_model import KvLink
from core.performance_profile import DecodePoint, PerformanceProfile, PrefillPoint
from simulator.profiles.csv_tables import CsvOptions, is_table, read_tables, selection_of

FORMAT = "baton-profile/1"
_PACKAGED = Path(__file__).parent / "packaged"
_TEXTS = ("name", "source", "model", "accelerator")
_INTS = (
    "gpus_per_worker",
    "kv_capacity_tokens",
    "block_size_tokens",
    "kv_bytes_per_token",
    "max_num_seqs",
    "max_num_batched_tokens",
)


def find_profile(text: str) -> PerformanceProfile:
    """A packaged profile by name, or a file by path; tables take a selection after a colon.

    Examples: ``h200-llama-3.1-8b-fp8-tp1``, ``mine.json``,
    ``h100_llama3_vllm:model=llama-3.1-8b,dtype=fp8,tp=2``.

    Raises:
        ConfigError: there is no such profile, or the file is wrong.
    """
    if text in packaged_profiles():
        return packaged_profile(text)
    path, selection = text, ""
    if not Path(text).exists() and "=" in text.rpartition(":")[2]:
        path, _, selection = text.rpartition(":")
    if not (Path(path).exists() or is_table(Path(path))):
        raise ConfigError(
            f"there is no profile {path!r}: give the path of one, or choose {', '.join(packaged_profiles())}"
        )
    return read_profile(path, csv=CsvOptions(selection=selection_of(selection)))


def packaged_profiles() -> list[str]:
    """Names of the profiles that come with the package, sorted."""
    return sorted(path.stem for path in _PACKAGED.glob("*.json"))


def packaged_profile(name: str) -> PerformanceProfile:
    """A profile that comes with the package.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in packaged_profiles():
        raise ConfigError(f"there is no packaged profile {name!r}: choose {', '.join(packaged_profiles())}")
    return _read_json(_PACKAGED / f"{name}.json")


def read_profile(path: str | Path, *, csv: CsvOptions | None = None) -> PerformanceProfile:
    """Reads a profile.

    Args:
        path: a JSON file; or one table of a pair ``X_prefill.csv`` and ``X_decode.csv``; or their ``X``.
        csv: what to take from tables and what they do not say; unused for JSON.

    Raises:
        ConfigError: the file is missing or wrong.
    """
    path = Path(path)
    if is_table(path):
        return read_tables(path, csv or CsvOptions())
    if csv is not None and csv.selection:
        raise ConfigError(f"{path} is one profile, not a table: drop the selection after the colon")
    return _read_json(path)


def write_profile(profile: PerformanceProfile, path: str | Path) -> None:
    """Writes a profile as JSON; times are rounded to a picosecond."""
    head: dict[str, Any] = {"format": FORMAT}
    head |= {key: getattr(profile, key) for key in (*_TEXTS, *_INTS, "startup_s")}
    head["link"] = {
        "latency_ms": _round(profile.link.latency_s * 1e3),
        "gigabytes_per_s": _round(profile.link.bytes_per_s / 1e9),
    }
    prefill = []
    for prompt in profile.prefill:
        point: dict[str, float] = {"prompt_tokens": prompt.prompt_tokens}
        if prompt.context_tokens:
            point["context_tokens"] = prompt.context_tokens
        prefill.append(point | {"ms": _round(prompt.seconds * 1e3)})
    decode = [
        {
            "num_decoding": step.num_decoding,
            "kv_tokens": step.kv_tokens,
            "ms": _round(step.seconds * 1e3),
        }
        for step in profile.decode
    ]
    lines = [f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()]
    lines += [
        f'  "{key}": [\n    ' + ",\n    ".join(json.dumps(point) for point in points) + "\n  ]"
        for key, points in (("prefill", prefill), ("decode", decode))
    ]
    Path(path).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _round(number: float) -> float:
    return round(number, 9)


def _read_json(path: Path) -> PerformanceProfile:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the profile {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ConfigError(f'{path} is no profile: it lacks "format": "{FORMAT}"')
    fields = _Fields(str(path), data)
    fields.take("format", str)
    texts = {key: fields.take(key, str) for key in _TEXTS}
    ints = {key: fields.take(key, int) for key in _INTS}
    startup_s = fields.take("startup_s", float, 60.0)
    link = _Fields(f"{path}: link", fields.take("link", dict))
    latency_ms, gigabytes_per_s = link.take("latency_ms", float), link.take("gigabytes_per_s", float)
    link.nothing_left()
    prefill, decode = fields.take("prefill", list), fields.take("decode", list)
    fields.nothing_left()
    return PerformanceProfile(
        **texts,
        **ints,
        startup_s=startup_s,
        link=KvLink(latency_s=latency_ms / 1e3, bytes_per_s=gigabytes_per_s * 1e9),
        prefill=tuple(_prefill_point(f"{path}: prefill[{i}]", point) for i, point in enumerate(prefill)),
        decode=tuple(_decode_point(f"{path}: decode[{i}]", point) for i, point in enumerate(decode)),
    )


def _prefill_point(where: str, data: object) -> PrefillPoint:
    fields = _Fields(where, data)
    point = PrefillPoint(
        prompt_tokens=fields.take("prompt_tokens", int),
        context_tokens=fields.take("context_tokens", int, 0),
        seconds=fields.take("ms", float) / 1e3,
    )
    fields.nothing_left()
    return point


def _decode_point(where: str, data: object) -> DecodePoint:
    fields = _Fields(where, data)
    point = DecodePoint(
        num_decoding=fields.take("num_decoding", int),
        kv_tokens=fields.take("kv_tokens", int),
        seconds=fields.take("ms", float) / 1e3,
    )
    fields.nothing_left()
    return point


class _Fields:
    """The keys of one JSON object, each taken once and checked."""

    def __init__(self, where: str, data: object) -> None:
        if not isinstance(data, dict):
            raise ConfigError(f"{where} must be an object with keys, not {data!r}")
        self._where = where
        self._data = dict(data)

    def take(self, key: str, kind: type, default: Any = None) -> Any:
        value = self._data.pop(key, default)
        if value is None:
            raise ConfigError(f"{self._where} lacks {key!r}: add it")
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ConfigError(f"{self._where}: {key!r} must be of type {kind.__name__}, not {value!r}")
        return value

    def nothing_left(self) -> None:
        if self._data:
            raise ConfigError(f"{self._where} has unknown keys, remove them: {', '.join(self._data)}")
