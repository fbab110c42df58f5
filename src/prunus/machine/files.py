"""Files and folders that are complete or absent: written beside their place, under hidden names, then moved into it.

.NAME.TOKEN.partial    what is being written    .NAME.TOKEN.old    the folder that it replaces, until it is there
.NAME.TOKEN.lock       held by the process that writes it; whoever finds it free deletes the three
"""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_CHECKSUM = "crc32"
_PIECE = 1 << 20  # bytes of a file at once
_BYTES_A_THREAD, _MOST_THREADS = 1 << 31, 8
_NUMBERS = {text: float(text) for text in ("nan", "inf", "-inf")}


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Generator[Path]:
    """A path beside `path` to write to, moved there in one step at the end, or deleted after an error.

    Makes the folder if need be. Several threads and processes may write the same file: the last one's stays. What
    killed ones left of it is gone, too.

    >>> with atomic(Path("out/state.pt")) as partial:
    ...     torch.save(model.state_dict(), partial)
    """
    path = Path(path)
    with _beside(path) as partial, naming(path):
        yield partial
        os.replace(partial, path)


def cache(kind: str) -> Path:
    """Where what takes long to make is kept between runs: `$PRUNUS_CACHE/kind`, by default in `~/.cache/prunus`.

    >>> cache("tokens").name
    'tokens'
    """
    home = os.environ.get("PRUNUS_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "prunus"
    return Path(home).expanduser() / kind


@contextmanager
def naming(path: str | os.PathLike[str]) -> Generator[None]:
    """Context in which an error of the system names `path`, if it names no file: a full disk, for example.

    Those that safetensors and tokenizers raise as their own become OSErrors.

    >>> with naming("out/model"):
    ...     file.write(data)
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:
        if "(os error " in str(error):
            raise OSError(f"{path} cannot be written: {error}") from error
        raise


@contextmanager
def hidden_folder(near: str | os.PathLike[str]) -> Generator[Path]:
    """A new hidden folder beside `near`, which need not exist; it is gone at the end, and so is what killed ones left.

    >>> with hidden_folder("out/model") as folder:
    ...     (folder / "draft.txt").write_text("gone soon")
    9
    """
    with _beside(Path(near)) as partial:
        partial.mkdir()
        yield partial


@contextmanager
def _beside(path: Path) -> Generator[Path]:
    """A hidden path beside a file or folder, which is deleted at the end, as killed processes' are now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in glob.glob(f".{glob.escape(path.name)}.*.lock", root_dir=path.parent):
        _sweep(path.with_name(name))
    lock = FileLock(path.with_name(f".{path.name}.{secrets.token_hex(8)}.lock"))
    with lock:
        try:
            yield Path(lock.lock_file).with_suffix(".partial")
        finally:
            _delete(Path(lock.lock_file))


@contextmanager
def atomic_folder(folder: str | os.PathLike[str]) -> Generator[Path]:
    """A new folder to fill, moved to `folder` at the end, whose old contents go when the new ones are there.

    After an error everything is as before. It replaces whatever `folder` is: see to it that this is wanted.

    >>> with atomic_folder("out/model") as partial:
    ...     write_text(partial / "README.md", "Hello")
    """
    folder = Path(folder)
    with hidden_folder(folder) as partial, naming(folder):
        yield partial
        for path in partial.rglob("*.safetensors"):
            _share_(path, partial.stat().st_mode)
        _move_(partial, folder)


def _share_(file: Path, made: int) -> None:
    """Give a file the mode of what was made plainly; safetensors 0.8 makes files that only their owner reads."""
    file.chmod(made & 0o666)


def _move_(partial: Path, folder: Path) -> None:
    """Move a folder to its place, and what lies there, or another process puts there meanwhile, out of it."""
    old = partial.with_suffix(".old")
    while True:
        with suppress(FileNotFoundError):  # nothing is there, or another process has just taken it away
            os.replace(folder, old)
        try:
            os.replace(partial, folder)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                with suppress(OSError):  # what was there is there again
                    os.replace(old, folder)
                raise
        shutil.rmtree(old, ignore_errors=True)


def check_replaceable(folder: str | os.PathLike[str], ours: Sequence[str]) -> None:
    """Raise ValueError for a folder that is there and has files besides those that we wrote, or that is a file.

    >>> check_replaceable("out/nowhere", [])
    """
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"{folder} is a file; give another output folder")
    strange = sorted({path.name for path in folder.iterdir()} - set(ours)) if folder.is_dir() else []
    if strange:
        raise ValueError(
            f"{folder} has files that Prunus did not list when it wrote there ({strange[0]!r}, ...), so it is not "
            "replaced; give another output folder, or empty this one"
        )


def locked(path: str | os.PathLike[str]) -> FileLock | None:
    """The lock of a file, held from now on; None where somebody else has it."""
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    return lock


def remove_partials(folder: Path) -> None:
    """Delete, anywhere in a folder, what killed processes left half written, those of earlier versions without a lock
    included."""
    left = {path.with_suffix(".lock") for ending in ("lock", "partial") for path in folder.rglob(f".*.{ending}")}
    for lock in sorted(left, key=lambda path: -len(path.parts)):  # before the hidden folder in which it lies
        _sweep(lock)


def _sweep(lock: Path) -> None:
    """Delete what a killed process left beside its lock; a folder that it had moved out of its place is there again."""
    name, _, token = lock.stem.rpartition(".")
    if not re.fullmatch(r"[0-9a-f]{16}", token):
        return
    with suppress(Timeout), FileLock(lock).acquire(blocking=False):
        old, place = lock.with_suffix(".old"), lock.with_name(name[1:])
        if old.exists() and not place.exists():
            os.replace(old, place)
        _delete(lock)


def _delete(lock: Path) -> None:
    for ending in (".partial", ".old"):
        with suppress(OSError):  # of a folder, or nothing
            lock.with_suffix(ending).unlink()
        shutil.rmtree(lock.with_suffix(ending), ignore_errors=True)
    lock.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8 in one atomic step.

    >>> write_text(Path("out/notes.txt"), "done")
    """
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON to `path` in one atomic step; what JSON does not know is written as text.

    NaN and infinities are the strings "nan", "inf" and "-inf", which every JSON reader takes and `read_json` undoes.

    >>> write_json(Path("out/result.json"), {"perplexity": 12.5})
    """
    write_text(path, json.dumps(_plain(value), indent=1, allow_nan=False) + "\n")


def json_line(value: Any) -> str:
    """`value` as one line of JSON, as `write_json` writes it.

    >>> json_line({"loss": float("nan")})
    '{"loss": "nan"}'
    """
    return json.dumps(_plain(value), allow_nan=False)


def json_value(text: str) -> Any:
    """What JSON text says, with the numbers that `write_json` wrote as text. Raises ValueError for what is not JSON.

    >>> json_value(json_line({"loss": float("inf")}))
    {'loss': inf}
    """
    return _numbers(json.loads(text))


def read_json(path: str | Path) -> Any:
    """What a JSON file says. Raises ValueError that names the file when it is not JSON in UTF-8."""
    try:
        return json_value(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); it was damaged or edited: get it again") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors of any device and layout to a safetensors file in one atomic step, with a checksum.

    Tied weights share memory, which safetensors refuses: each is written by itself. Raises OSError for a full disk.

    >>> write_tensors(Path("out/model.safetensors"), model.state_dict())
    """
    plain, seen = dict[str, Tensor](), set[int]()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        storage = own.untyped_storage().data_ptr()
        plain[name] = own.clone() if storage in seen else own
        seen.add(storage)
    said = dict(metadata or {})
    said[_CHECKSUM] = checksum(plain, said)
    with atomic(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        save_file(plain, partial, metadata=said)
        _share_(partial, mode)


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """CRC-32 of tensors of any device and layout, and of what is said of them, in 8 hexadecimal digits.

    >>> checksum({"weight": torch.zeros(2)})
    '71c99bb7'
    """
    found = zlib.crc32(json.dumps({**(metadata or {}), _CHECKSUM: ""}, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        own = tensor.detach().cpu().contiguous()
        found = zlib.crc32(f"{name} {own.dtype} {list(own.shape)}".encode(), found)
        found = zlib.crc32(own.reshape(-1).view(torch.uint8).numpy().data, found) if own.numel() else found
    return f"{found:08x}"


def checksums(files: Sequence[Path]) -> dict[str, str]:
    """File name -> CRC-32 of its bytes, in 8 hexadecimal digits; large ones are read side by side.

    >>> checksums([])
    {}
    """
    threads = min(sum(file.stat().st_size for file in files) // _BYTES_A_THREAD, _MOST_THREADS)
    if threads < 2:
        return {file.name: _file_checksum(file) for file in files}
    with ThreadPoolExecutor(threads) as pool:
        return dict(zip([file.name for file in files], pool.map(_file_checksum, files), strict=True))


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and its metadata; the checksum of `write_tensors` is right.

    Raises ValueError naming a damaged file.

    >>> read_tensors("out/model.safetensors")[0].keys()
    dict_keys(['weight', 'bias'])
    """
    try:
        with safe_open(path, framework="pt") as file:
            said: dict[str, str] = file.metadata() or {}
            found: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to make it anew") from None
    if said.pop(_CHECKSUM, None) not in (None, checksum(found, said)):
        raise ValueError(f"{path} is damaged (its checksum is another); delete it to make it anew")
    return found, said


def _file_checksum(path: Path) -> str:
    found, room = 0, bytearray(_PIECE)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(room):
            found = zlib.crc32(memoryview(room)[:count], found)
    return f"{found:08x}"


def _plain(value: Any) -> Any:
    """The value in what JSON knows; numbers of other libraries by their `item`, the rest as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, float):
        return value if value - value == 0 else str(value)  # inf - inf and nan - nan are nan
    return _plain(value.item()) if callable(getattr(value, "item", None)) else str(value)


def _numbers(value: Any) -> Any:
    """The value with "nan", "inf" and "-inf" as numbers again."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return _NUMBERS.get(value, value) if isinstance(value, str) else value
