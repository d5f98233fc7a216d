"""Files made to deceive: tar headers that claim anything, checksum and all, and an object whose pickle is code."""

import tarfile

from tests.audio_files import encode, noise


def header(name: str, size: int | bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar header with a true checksum, whatever it claims."""
    content = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT)[:512])
    content[124:136] = size if isinstance(size, bytes) else tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    content[156:157] = kind
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content)
    return bytes(content)


def pax(records: dict[str, str], claimed: int | None = None) -> bytes:
    """An extension header with these records."""
    lines = b""
    for key, value in records.items():
        rest = f" {key}={value}\n".encode()
        length = len(rest) + len(str(len(rest) + 3))
        lines += str(length).encode().ljust(length - len(rest), b" ")[: length - len(rest)] + rest
    size = len(lines) if claimed is None else claimed
    return header("x", size, tarfile.XHDTYPE) + lines.ljust(-(-len(lines) // 512) * 512, b"\0")


END = bytes(1024)
CLIP = encode(noise(4000))


def member(name: str, content: bytes) -> bytes:
    return header(name, len(content)) + content.ljust(-(-len(content) // 512) * 512, b"\0")


class Payload:
    """What an unpickler would call."""

    def __reduce__(self):
        return (exec, ("import builtins; builtins.planted = True; raise SystemError('code ran')",))
