"""Reads folders, zip and tar archives through one interface, in place and safely."""

import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol, runtime_checkable

from redefense.data.source import Refuse, printable
from redefense.errors import DataError, one_line

MAX_FILE = 2**28  # bytes of one file in an archive; CIFAR-100's largest has 155 MB
MAX_FILES = 4_000_000
RATIO = 200  # maximum compression ratio of a file in an archive that is larger than a mebibyte
MAX_HEADER = 2**20  # bytes of a name in a tar archive
MAX_TAR = 2**30  # bytes held at once from a tar archive, which cannot be read out of order
BROKEN = (
    OSError, EOFError, ValueError, LookupError, ArithmeticError, NotImplementedError,
    struct.error, zlib.error, zipfile.BadZipFile, tarfile.TarError,
)  # fmt: skip
"""Exceptions of the standard library for damaged or malicious archives."""
LITTER = frozenset(
    {
        "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "$recycle.bin",
        "system volume information", "lost+found",
    }
)  # fmt: skip
"""Files and folders created by operating systems, in lower case."""


@runtime_checkable
class Tree(Protocol):
    """Files below one root that are not hidden, by their names with forward slashes."""

    root: Path
    kind: str
    names: Sequence[str]
    empty: Sequence[str]
    """Folders without any such file, at any depth."""

    def items(self, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """Each file's name (for messages) and bytes, in the given order."""
        ...

    def files(self, names: Sequence[str]) -> tuple[Path, ...]:
        """Paths on disk that the content of these files depends on."""
        ...


def is_hidden(name: str) -> bool:
    """Whether a name, or a folder in it, starts with a dot or is created by an operating system.

    Such files are skipped: version control, notebooks and file managers keep copies of images in
    them, which are no part of a data set.
    """
    parts = PurePosixPath(name).parts
    return any((part[0] == "." and part != "..") or part.lower() in LITTER for part in parts)


def open_tree(path: Path, refuse: Refuse) -> Tree:
    """Detect the kind of `path`, list its files and refuse unsafe ones.

    Raises:
        DataError: for anything but a folder, a zip or a tar archive, and for damaged archives;
            through `refuse` for names or links that point outside the root and decompression bombs.
    """
    if path.is_dir():
        return FolderTree(path, refuse)
    try:
        if zipfile.is_zipfile(path):
            return ZipTree(path, refuse)
        if _is_tar(path):
            return TarTree(path, refuse)
    except BROKEN as error:
        raise DataError(f"{path}: damaged archive ({one_line(error)})") from error
    raise DataError(f"{path}: neither a folder nor a zip or tar archive, or a damaged one")


def folders_above(files: Iterable[Path], root: Path) -> Sequence[Path]:
    """All folders between `root` and some files; their times reveal added or removed files."""
    above = {parent for file in files for parent in file.parents}
    return sorted(folder for folder in above if folder.is_relative_to(root))


def read_one(tree: Tree, name: str) -> bytes:
    """The bytes of one file."""
    ((_, raw),) = tree.items([name])
    return raw


def allowed_root(path: Path) -> Path:
    """The folder that links below `path` must point into.

    That is `path`, or the repository's folder in a cache of the Hugging Face hub, whose snapshots
    consist of links to `blobs`.
    """
    real = Path(os.path.realpath(path))  # unlike resolve() it accepts circular links
    for parent in real.parents:
        if parent.name == "snapshots" and (parent.parent / "blobs").is_dir():
            return parent.parent
    return real


def file_fault(file: Path, root: Path) -> str:
    """What is wrong with the name or kind of `file`; empty if nothing is."""
    if not file.name.isprintable():
        return f"{printable(str(file))}: unprintable name, refused"
    mode = file.lstat().st_mode
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return ""
    if not stat.S_ISLNK(mode):
        return f"{file}: neither file nor folder, refused"
    target = Path(os.path.realpath(file))
    if not target.is_relative_to(root):
        return f"{file}: link out of {root}, refused"
    if not target.exists():
        return f"{file}: link to nothing, refused"
    return "" if target.is_file() else f"{file}: link to a folder, refused"


def _unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be read ({error.strerror})")


class FolderTree:
    """Files below a folder on disk."""

    kind = "folder"

    def __init__(self, root: Path, refuse: Refuse) -> None:
        self.root = root
        found: list[str] = []
        inside: set[str] = set()
        limit = allowed_root(root)
        for place, folders, files in os.walk(root, onerror=_unreadable):
            folders[:] = sorted(name for name in folders if not is_hidden(name))
            files = [name for name in files if not is_hidden(name)]
            here = Path(place)
            # folders, too: os.walk does not enter links to folders, whose images would be missing
            # silently
            faults = {name: file_fault(here / name, limit) for name in (*folders, *files)}
            for fault in filter(None, faults.values()):
                refuse(fault)
            prefix = here.relative_to(root).as_posix()
            inside.add(prefix)
            found += [
                name if prefix == "." else f"{prefix}/{name}" for name in files if not faults[name]
            ]
            if len(found) > MAX_FILES:
                raise DataError(f"{root}: more than {MAX_FILES} files")
        # sorted, since the order of a folder differs between file systems
        self.names: Sequence[str] = sorted(found)
        self.empty = _empty(inside, self.names)

    def items(self, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        for name in names:
            file = self.root / name
            try:
                if fault := size_fault(size := file.stat().st_size, size, MAX_FILE):
                    raise DataError(f"{file}: {fault}")
                yield str(file), file.read_bytes()
            except OSError as error:
                raise DataError(f"{file}: cannot be read ({error.strerror})") from error

    def files(self, names: Sequence[str]) -> tuple[Path, ...]:
        files = [self.root / name for name in names]
        return (*folders_above(files, self.root), *files)


class ZipTree:
    """Files in a zip archive, read in place."""

    kind = "zip archive"

    def __init__(self, root: Path, refuse: Refuse) -> None:
        self.root = root
        with zipfile.ZipFile(root) as archive:
            everything = archive.infolist()
        self._entries: dict[str, zipfile.ZipInfo] = {}
        folders: set[str] = set()
        for entry in everything:
            # the folder still counts: a class with hidden files only is reported as empty
            if is_hidden(entry.filename):
                folders.add(str(PurePosixPath(entry.filename).parent))
            elif fault := self._fault(entry):
                refuse(f"{root}: {printable(entry.filename)}: {fault}")
            elif entry.is_dir():
                folders.add(entry.filename)
            else:
                self._entries[_plain(entry.filename)] = entry
        self.names: Sequence[str] = sorted(self._entries)
        self.empty = _empty(folders, self.names)

    def _fault(self, entry: zipfile.ZipInfo) -> str:
        if _plain(entry.filename) in self._entries:
            return "there twice"
        # the upper half holds the mode that Unix gave the file
        if stat.S_ISLNK(entry.external_attr >> 16):
            return "link in an archive, refused"
        if entry.flag_bits & 1:
            return "encrypted, refused"
        if fault := method_fault(entry):
            return fault
        return _name_fault(entry.filename) or size_fault(
            entry.file_size, entry.compress_size, MAX_FILE
        )

    def items(self, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        with zipfile.ZipFile(self.root) as archive:
            for name in names:
                try:
                    yield f"{self.root}: {name}", archive.read(self._entries[name])
                except BROKEN as error:
                    raise DataError(f"{self.root}: {name}: damaged ({one_line(error)})") from error

    def files(self, names: Sequence[str]) -> tuple[Path, ...]:
        return (self.root,)


class _Header(tarfile.TarInfo):
    """A header whose long names are short enough to be read before anything else is known."""

    def _proc_gnulong(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        return self._bounded(archive, super()._proc_gnulong)  # type: ignore[misc]  # of tarfile's own

    def _proc_pax(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        return self._bounded(archive, super()._proc_pax)  # type: ignore[misc]  # of tarfile's own

    def _bounded(
        self, archive: tarfile.TarFile, read: Callable[[tarfile.TarFile], tarfile.TarInfo]
    ) -> tarfile.TarInfo:
        if self.size > MAX_HEADER:
            raise DataError(
                f"{archive.name!r}: a name of {self.size} bytes, more than {MAX_HEADER}, refused"
            )
        return read(archive)


def _is_tar(path: Path) -> bool:
    try:
        with tarfile.open(path, tarinfo=_Header):
            return True
    except tarfile.TarError:
        return False


class TarTree:
    """Files in a tar archive, compressed or not, read in place."""

    kind = "tar archive"

    def __init__(self, root: Path, refuse: Refuse) -> None:
        self.root = root
        files: set[str] = set()
        folders: set[str] = set()
        total = 0
        with tarfile.open(root, tarinfo=_Header) as archive:
            for member in archive:
                if is_hidden(member.name):
                    folders.add(str(PurePosixPath(member.name).parent))
                elif fault := self._fault(member, files):
                    refuse(f"{root}: {printable(member.name)}: {fault}")
                else:
                    (folders if member.isdir() else files).add(_plain(member.name))
                total += member.size  # skipped members are unpacked, too
                if total > MAX_TAR:
                    raise DataError(f"{root}: more than {MAX_TAR} bytes; extract it first")
        self.names: Sequence[str] = sorted(files)
        self.empty = _empty(folders, self.names)

    def _fault(self, member: tarfile.TarInfo, known: Container[str]) -> str:
        if member.issym() or member.islnk():
            return "link in an archive, refused"
        if not (member.isfile() or member.isdir()):
            return "neither file nor folder, refused"
        if _plain(member.name) in known:
            return "there twice"
        # the compressed size of a tar member is unknown
        return _name_fault(member.name) or size_fault(member.size, member.size, MAX_FILE)

    def items(self, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        # one pass for all names: each jump back would unpack the archive from its start again
        wanted, found = set(names), {}
        try:
            with tarfile.open(self.root, tarinfo=_Header) as archive:
                for member in archive:
                    name = _plain(member.name)
                    if name in wanted and (handle := archive.extractfile(member)):
                        found[name] = handle.read()
        except BROKEN as error:
            raise DataError(f"{self.root}: damaged archive ({one_line(error)})") from error
        for name in names:
            yield f"{self.root}: {name}", found.pop(name)

    def files(self, names: Sequence[str]) -> tuple[Path, ...]:
        return (self.root,)


def _empty(folders: Iterable[str], names: Sequence[str]) -> Sequence[str]:
    """Those of some folders, and of their parents, that contain none of the files."""
    plain = {_plain(folder) for folder in folders}
    plain |= {str(parent) for folder in plain for parent in PurePosixPath(folder).parents}
    holders = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    return sorted(name for name in plain - holders if not is_hidden(name))


def _plain(name: str) -> str:
    """The normalised name of a file: archives also use ./a/b and a//b."""
    return str(PurePosixPath(name))


def _name_fault(name: str) -> str:
    path = PurePosixPath(name)
    # backslashes and colons separate folders and drives on Windows
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        return "name leads out of the archive, refused"
    return "" if name.isprintable() else "unprintable name, refused"


def method_fault(entry: zipfile.ZipInfo) -> str:
    """Error message for unsupported compression in a zip archive; empty if supported.

    With other methods `zipfile` unpacks the whole file before it checks the size.
    """
    known = entry.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    return "" if known else "packed by another method than deflate, refused"


def size_fault(size: int, packed: int, most: int, free: int = 2**20) -> str:
    """What is wrong with a file in an archive that expands from `packed` to `size` bytes.

    Files of up to `free` bytes may have any ratio.
    """
    if size > most:
        return f"{size} bytes, more than {most}, refused"
    if size > max(free, RATIO * packed):
        return f"{size} bytes from {packed}: decompression bomb, refused"
    return ""
