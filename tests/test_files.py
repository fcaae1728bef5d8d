"""Files are written completely or not at all."""

import pytest

from noisear_rl.files import atomic, write_atomically


def test_atomic_writes(tmp_path):
    file = tmp_path / "folder" / "file.txt"
    with atomic(file) as temporary:
        temporary.write_text("old")
        assert not file.exists() and temporary.parent == file.parent  # a rename, not a copy
    assert file.read_text() == "old"
    with pytest.raises(OSError, match="full"), atomic(file) as temporary:
        temporary.write_text("ne")
        raise OSError("full")
    assert file.read_text() == "old" and [path.name for path in file.parent.iterdir()] == ["file.txt"]
    write_atomically(file, "ü")
    assert file.read_bytes() == "ü".encode()
