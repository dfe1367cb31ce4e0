from hashlib import blake2b
from pathlib import Path

import pytest

from penstock.service.text.errors import TokenizerFilesError
from penstock.service.text.files import MAX_FILE_BYTES, TokenizerFiles, digest


def test_digest_is_as_specified() -> None:
    framed = b"".join(
        len(part).to_bytes(8, "little") + part for part in (b"chat_template.jinja", b"x", b"tokenizer.json", b"{}")
    )
    files = {"tokenizer.json": b"{}", "chat_template.jinja": b"x"}
    assert digest(files) == blake2b(framed, digest_size=32).hexdigest()
    assert TokenizerFiles(files).digest == digest(dict(reversed(files.items())))


def test_digest_tells_names_from_contents() -> None:
    assert digest({"a": b"bc"}) != digest({"ab": b"c"})
    assert digest({"a": b"", "b": b""}) != digest({"a": b"b"})


def test_directory_gives_the_files_that_exist(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    (tmp_path / "chat_template.jinja").write_bytes("ü".encode())
    (tmp_path / "model.safetensors").write_bytes(b"not for us")
    files = TokenizerFiles.from_directory(tmp_path)
    assert dict(files.contents) == {"tokenizer.json": b"{}", "chat_template.jinja": "ü".encode()}
    assert files.text("chat_template.jinja") == "ü"
    assert files.text("special_tokens_map.json") is None
    assert files.json_object("tokenizer_config.json") == {}


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({}, "no tokenizer.json"),
        ({"tokenizer.json": b"", "../../etc/passwd": b""}, "not a tokenizer file"),
        (
            {"tokenizer.json": b"", "chat_template.jinja": bytes(MAX_FILE_BYTES["chat_template.jinja"] + 1)},
            "1048577 bytes",
        ),
    ],
)
def test_bad_bundles_are_refused(contents: dict[str, bytes], message: str) -> None:
    with pytest.raises(TokenizerFilesError, match=message):
        TokenizerFiles(contents)


def test_large_files_are_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 40)  # sparse: reading it would end the test in a MemoryError
    with pytest.raises(TokenizerFilesError, match="at most"):
        TokenizerFiles.from_directory(tmp_path)


@pytest.mark.parametrize("content", [b"[]", b"{", b'{"a": "\xff"}'])
def test_json_that_is_no_object(content: bytes) -> None:
    files = TokenizerFiles({"tokenizer.json": b"{}", "tokenizer_config.json": content})
    with pytest.raises(TokenizerFilesError, match=r"tokenizer_config\.json is not a JSON object"):
        files.json_object("tokenizer_config.json")


def test_text_that_is_not_utf8() -> None:
    files = TokenizerFiles({"tokenizer.json": b"{}", "chat_template.jinja": b"a\xff"})
    with pytest.raises(TokenizerFilesError, match="not UTF-8: invalid start byte at byte 1"):
        files.text("chat_template.jinja")
