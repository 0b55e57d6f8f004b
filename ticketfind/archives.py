"""Zip archives from elsewhere, opened without much being made of little."""

import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHUNK = 2**20
"""Bytes to read at once."""


class _Careful(io.FileIO):
    """Of which nothing but a directory of very many members would be read in more than a few `CHUNK`s at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        """As a file's. Raises BadZipFile for more than that."""
        most = 4 * CHUNK
        found = super().read(most + 1 if size is None or size < 0 else min(size, most + 1)) or b""
        if len(found) > most:
            raise zipfile.BadZipFile("it has very many members, or very long names")
        return found


@contextmanager
def open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive. Raises whatever damaged bytes lead zipfile to."""
    with _Careful(path) as file, zipfile.ZipFile(file) as archive:
        yield archive
