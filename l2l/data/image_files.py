"""The published files of MNIST and CIFAR-10, read as they are and checked."""

import gzip
import zlib
from pathlib import Path

import numpy as np

from l2l.console import errors
from l2l.console.errors import UserError


def find(folder: Path, stem: str) -> Path | None:
    """The file of that stem, gzipped or not, as its publishers or a browser named it."""
    names = (stem, stem.replace("-idx", ".idx"))
    paths = [folder / (name + suffix) for name in names for suffix in ("", ".gz")]
    return next((path for path in paths if path.is_file()), None)


def read(path: Path) -> bytes:
    """The content of a file, unpacked if it is gzipped."""
    with errors.naming(path):
        content = path.read_bytes()
    if content[:2] != b"\x1f\x8b":  # By content: browsers unpack .gz and keep the name.
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise broken(path, f"is not a whole gzip file ({error})") from error


def broken(path: Path, fact: str) -> UserError:
    """The error of a file that is not what its name says."""
    return UserError(f"{path} {fact}: it was cut short or is another file; fetch it again.")


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """The uint8 array in an IDX file (LeCun's layout: 0, 0, type 8, rank, big-endian sizes, bytes),
    gzipped or not. UserError if it is anything else."""
    content = read(path)
    if content[:4] != bytes([0, 0, 8, ndim]) or len(content) < 4 + 4 * ndim:
        raise broken(path, f"does not start like an IDX file of {ndim}-dimensional bytes")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", ndim, offset=4))
    wanted, got = int(np.prod(shape, dtype=np.int64)), len(content) - 4 - 4 * ndim
    if got != wanted:
        raise broken(path, f"has {got:,} bytes of data where its header promises {wanted:,}")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def read_cifar(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A CIFAR-10 batch in the binary layout, gzipped or not: records of one label and 3,072 bytes
    in planes of red, green and blue. UserError if it is anything else."""
    content = np.frombuffer(read(path), np.uint8)
    if len(content) == 0 or len(content) % 3073:
        raise broken(path, f"has {len(content):,} bytes, not a multiple of a record's 3,073")
    records = content.reshape(-1, 3073)
    return checked(path, planes(records[:, 1:]), records[:, 0])


def planes(rows: np.ndarray) -> np.ndarray:
    """CIFAR's planes [n, 3072] as images [n, 32, 32, 3]."""
    return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def checked(path: Path, images: np.ndarray, labels: np.ndarray):
    """(images, int32 labels), if they belong together."""
    if len(images) != len(labels):
        raise broken(path, f"has {len(labels):,} labels for {len(images):,} images")
    if len(labels) and labels.max() > 9:  # XLA clamps a wrong index: nobody would notice.
        raise broken(path, f"has the label {labels.max()} where 0 to 9 are possible")
    return images, labels.astype(np.int32)
