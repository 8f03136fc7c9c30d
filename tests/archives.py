"""Write archives in the formats of the benchmarks' downloads."""

import io
import tarfile
import zipfile
from pathlib import Path


def pack(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    """Write files into a zip file or a tar file, depending on the suffix."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return path
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pack_folder(path: Path, folder: Path, top: str = "") -> Path:
    """Pack the files below a folder; `top` is a prefix of their names, such as "folder/"."""
    files = {f"{top}{f.relative_to(folder).as_posix()}": f for f in sorted(folder.rglob("*")) if f.is_file()}
    return pack(path, {name: file.read_bytes() for name, file in files.items()})
