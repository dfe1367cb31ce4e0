import json
from array import array
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from penstock.service.text.encode import Tokenizer
from penstock.service.text.errors import PromptTooLong, TemplateError, TokenizerFilesError
from penstock.service.text.files import TokenizerFiles

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two spaces",
    "def f(x):\n    return x  # naïve",
    "中文 русский Ελληνικά 🎉👩‍👩‍👧",
    "e\u0301 combining",
    "<|bos|> <s> <|start|>user<|eos|></s>",
    "a <|text|> b <|eos|> quizzes",
    "\x00\x7f\ufffd\U0010ffff",
]

CHAT = [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": "Wie geht's?\n🎉"}]


@pytest.fixture(scope="session")
def reference(shape: str, model_dirs: dict[str, Path]) -> Any:
    return AutoTokenizer.from_pretrained(model_dirs[shape])


@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_encode_equals_transformers(tokenizer: Tokenizer, reference: Any, add_special_tokens: bool) -> None:
    for text in TEXTS:
        expected = reference(text, add_special_tokens=add_special_tokens)["input_ids"]
        assert tokenizer.encode(text, add_special_tokens=add_special_tokens) == array("I", expected)


@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_decode_equals_transformers(tokenizer: Tokenizer, reference: Any, skip_special_tokens: bool) -> None:
    for text in TEXTS:
        ids = list(tokenizer.encode(text))
        expected = reference.decode(ids, skip_special_tokens=skip_special_tokens)
        assert tokenizer.decode(ids, skip_special_tokens=skip_special_tokens) == expected


def test_special_tokens_equal_transformers(tokenizer: Tokenizer, reference: Any) -> None:
    assert tokenizer.bos_id == reference.bos_token_id
    assert tokenizer.eos_id == reference.eos_token_id
    assert tokenizer.vocab_size == len(reference)
    added = reference.added_tokens_decoder.items()
    assert tokenizer.special_ids == {token for token, added_token in added if added_token.special}
    assert tokenizer.special_tokens == reference.special_tokens_map


def test_post_processor_wins_over_configuration(tokenizers: dict[str, Tokenizer]) -> None:
    llama3, gpt2 = tokenizers["llama3"], tokenizers["gpt2"]
    assert llama3.encode("a")[0] == llama3.bos_id
    assert gpt2.bos_id not in gpt2.encode("a")
    assert tokenizers["unigram"].encode("a")[-1] == tokenizers["unigram"].eos_id


def test_truncation_and_padding_are_off(tokenizers: dict[str, Tokenizer]) -> None:
    assert len(tokenizers["qwen"].encode("x!" * 100)) == 200
    assert len(tokenizers["qwen"].encode("x")) == 1


def test_chat_equals_transformers_and_has_one_bos(llama3_tokenizer: Tokenizer, model_dirs: dict[str, Path]) -> None:
    reference = AutoTokenizer.from_pretrained(model_dirs["llama3"])
    expected = reference.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    ids = llama3_tokenizer.encode_chat(CHAT)
    assert ids == array("I", expected)
    assert list(ids).count(llama3_tokenizer.encode("")[0]) == 1


def test_special_tokens_map_file_overrides(model_dirs: dict[str, Path]) -> None:
    contents = dict(TokenizerFiles.from_directory(model_dirs["llama3"]).contents)
    contents["special_tokens_map.json"] = json.dumps({"eos_token": {"content": "<|end|>"}}).encode()
    tokenizer = Tokenizer(TokenizerFiles(contents))
    assert tokenizer.special_tokens == {"bos_token": "<|bos|>", "eos_token": "<|end|>"}
    assert tokenizer.eos_id == tokenizer.encode("<|end|>")[1]


def test_no_configuration_at_all(model_dirs: dict[str, Path]) -> None:
    content = (model_dirs["llama3"] / "tokenizer.json").read_bytes()
    tokenizer = Tokenizer(TokenizerFiles({"tokenizer.json": content}))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.has_chat_template) == (None, None, False)
    with pytest.raises(TemplateError, match="no chat template"):
        tokenizer.encode_chat(CHAT)


def test_special_token_outside_the_vocabulary_gets_no_id(model_dirs: dict[str, Path]) -> None:
    content = (model_dirs["llama3"] / "tokenizer.json").read_bytes()
    config = b'{"pad_token": "<never>", "eos_token": "<|eos|>"}'
    files = TokenizerFiles({"tokenizer.json": content, "tokenizer_config.json": config})
    tokenizer = Tokenizer(files)
    assert tokenizer.vocab_size == Tokenizer(TokenizerFiles({"tokenizer.json": content})).vocab_size
    assert max(tokenizer.encode("<never>")) < tokenizer.vocab_size


def test_broken_template_fails_chats_only(model_dirs: dict[str, Path]) -> None:
    contents = dict(TokenizerFiles.from_directory(model_dirs["llama3"]).contents)
    contents["chat_template.jinja"] = b"{% for %}"
    tokenizer = Tokenizer(TokenizerFiles(contents))
    assert len(tokenizer.encode("text")) > 0
    for _ in range(2):
        with pytest.raises(TemplateError, match="wrong in line 1"):
            tokenizer.encode_chat(CHAT)


@pytest.mark.parametrize("content", [b"", b"{}", b"null", b"\xff\xfe", b'{"model": {"type": "BPE"}}'])
def test_unreadable_tokenizer(content: bytes) -> None:
    with pytest.raises(TokenizerFilesError, match=r"tokenizer\.json is unreadable"):
        Tokenizer(TokenizerFiles({"tokenizer.json": content}))


def test_length_check(tokenizers: dict[str, Tokenizer]) -> None:
    llama3 = tokenizers["llama3"]
    assert llama3.max_token_chars is not None
    fits = 10 * llama3.max_token_chars
    llama3.check_length("a" * fits, 10)
    with pytest.raises(PromptTooLong) as caught:
        llama3.check_length("a" * (fits + 1), 10)
    assert (caught.value.chars, caught.value.max_chars) == (fits + 1, fits)


def test_length_check_allows_for_a_normalizer(tokenizers: dict[str, Tokenizer]) -> None:
    qwen = tokenizers["qwen"]
    assert qwen.max_token_chars is not None
    fits = 10 * qwen.max_token_chars * 4
    qwen.check_length("a" * fits, 10)
    with pytest.raises(PromptTooLong):
        qwen.check_length("a" * (fits + 1), 10)


@pytest.mark.parametrize("name", ["llama3", "qwen", "llama2"])
def test_length_check_refuses_nothing_that_fits(tokenizers: dict[str, Tokenizer], name: str) -> None:
    tokenizer = tokenizers[name]
    for text in [*TEXTS, "<|start|>" * 20, "e\u0301" * 50, "    " * 50, "🎉" * 20]:
        tokenizer.check_length(text, len(tokenizer.encode(text, add_special_tokens=False)))


def test_length_check_knows_when_it_does_not_know(tokenizers: dict[str, Tokenizer]) -> None:
    assert tokenizers["unigram"].max_token_chars is None
    tokenizers["unigram"].check_length("☃" * 10_000, 1)  # one <unk>
