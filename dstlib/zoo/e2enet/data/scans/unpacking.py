"""What a file may ask for, whatever its format: to be unpacked no further than its header promises, and held in memory.

Nothing is allocated before these numbers are compared: a header may promise anything.
"""

import gzip
import io
import zlib
from typing import Literal

from dstlib.bounds import available_memory

MAX_RATIO = 1032  # of packing: deflate's own limit

Packing = Literal["gzip", "zlib"]


def refuse_ratio(content: bytes | memoryview, num_bytes: int) -> None:
    """Refuses packed bytes that no packing makes so many of.

    Raises:
        ValueError: They are too few.
    """
    if num_bytes > MAX_RATIO * len(content):
        raise ValueError(f"its {len(content)} bytes cannot unpack to the {num_bytes} of its header")


def refuse_memory(num_bytes: int) -> None:
    """Refuses what does not fit into the memory that is left.

    Raises:
        ValueError: It does not.
    """
    if num_bytes > (left := available_memory()):
        raise ValueError(f"it asks for {num_bytes} bytes of memory, of which {left} are left")


def first_unpacked(content: bytes | memoryview, num_bytes: int) -> bytes:
    """Returns the first bytes of what gzip has packed, or all, where there are no more.

    Raises:
        OSError, EOFError, zlib.error: It is damaged.
    """
    with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
        return file.read(num_bytes)


def unpacked(content: bytes | memoryview, packing: Packing, num_bytes: int) -> bytes:
    """Unpacks bytes to the very end, where their checksum is; gzip's may end before, which is for the caller to see.

    Raises:
        ValueError: There is more in them than was promised, or they are damaged.

    >>> unpacked(zlib.compress(b"voxels"), "zlib", 6)
    b'voxels'
    """
    try:
        if packing == "gzip":
            found, is_whole = first_unpacked(content, num_bytes + 1), True
        else:
            unpacking = zlib.decompressobj()
            found = unpacking.decompress(content, num_bytes + 1)
            is_whole = unpacking.eof or len(found) > num_bytes
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(str(error)) from error
    if len(found) > num_bytes:
        raise ValueError(f"it unpacks to more than the {num_bytes} bytes that its header promises")
    if not is_whole:
        raise ValueError(f"it ends after {len(found)} of {num_bytes} bytes of voxels")
    return found
