"""Tokenizer directories, chat templates, incremental decoding and stop strings."""

from __future__ import annotations

import itertools
import json
import random

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from model_shards import ConfigError, IncrementalDecoder, StopMatcher, Tokenizer, TokenizerError

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "naïve café résumé, 東京 and 🦊🦊 said  hello",
    "def main():\n    return {'a': 1}\n",
] * 20
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def byte_level():
    """As Llama 3 and Qwen: bytes as letters, space at the front of words."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def byte_fallback():
    """As Llama 2: a mark for each space, one put in front, bytes for unknown characters."""
    trainer = trainers.BpeTrainer(
        vocab_size=140,
        special_tokens=[*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))][:5],
        show_progress=False,
    )
    seed = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    seed.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    seed.train_from_iterator([text for text in CORPUS if text.isascii()], trainer)
    state = json.loads(seed.to_str())
    vocab = state["model"]["vocab"]
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    state["model"].update(byte_fallback=True, vocab=vocab, fuse_unk=True)
    made = tokenizers.Tokenizer.from_str(json.dumps(state))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


KINDS = {"byte_level": byte_level, "byte_fallback": byte_fallback}


@pytest.fixture(scope="module", params=KINDS)
def directory(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    KINDS[request.param]().save(str(path / "tokenizer.json"))
    settings_json = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}}
    (path / "tokenizer_config.json").write_text(json.dumps(settings_json))
    return path


@pytest.fixture(scope="module")
def tokenizer(directory):
    return Tokenizer.from_dir(directory)


TEXTS = [*CORPUS[:3], " leading", "trailing ", "a\u0301 🏳️‍🌈", "日本語テキスト"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_encoding_and_decoding(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_incremental_text_is_the_whole_text_and_never_a_broken_character(tokenizer, text):
    decoder, parts = IncrementalDecoder(tokenizer), []
    for token in tokenizer.encode(text):
        parts.append(decoder.push(token))
    assert not any("\ufffd" in part for part in parts)
    parts.append(decoder.flush())
    assert "".join(parts) == text


@pytest.mark.parametrize("seed", range(20))
def test_incremental_text_of_any_text_is_that_text(tokenizer, seed):
    source = random.Random(seed)
    text = "".join(chr(source.choice([32, 101, 0xE9, 0x6771, 0x1F98A, 0x1F3B8, 0x301])) for _ in range(40))
    decoder, ids = IncrementalDecoder(tokenizer), tokenizer.encode(text)
    parts = [decoder.push(token) for token in ids]
    assert not any("\ufffd" in part for part in parts)
    assert "".join(parts) + decoder.flush() == tokenizer.decode(ids) == text


@pytest.mark.parametrize("seed", range(20))
def test_incremental_text_of_any_tokens_is_the_decoded_text(seed, tmp_path):
    # Byte level only: with byte fallback the library turns a whole run of bytes into U+FFFD when its end is broken.
    byte_level().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_dir(tmp_path)
    source = random.Random(seed)
    ids = [source.randrange(tokenizer.vocab_size) for _ in range(60)]
    decoder = IncrementalDecoder(tokenizer)
    parts = [decoder.push(token) for token in ids]
    assert "".join(parts) + decoder.flush() == tokenizer.decode(ids)


def test_the_space_between_prompt_and_answer_is_kept(directory, tokenizer):
    prompt = tokenizer.encode("the quick")
    # Byte fallback puts a mark for the space before the first word by itself.
    answer = tokenizer.encode(
        "brown fox" if "fallback" in directory.name else " brown fox", add_special=False
    )
    decoder = IncrementalDecoder(tokenizer, prompt)
    text = "".join(decoder.push(token) for token in answer) + decoder.flush()
    assert text == " brown fox"


def test_a_special_token_in_the_middle_does_not_eat_a_space(directory, tokenizer):
    answer = tokenizer.encode(
        "brown fox" if "fallback" in directory.name else " brown fox", add_special=False
    )
    ids = [*tokenizer.encode("the quick"), tokenizer.token_id("<|im_end|>"), *answer]
    decoder = IncrementalDecoder(tokenizer)
    text = "".join(decoder.push(token) for token in ids) + decoder.flush()
    assert text == tokenizer.decode(ids) == "the quick brown fox"


def test_an_incomplete_character_at_the_end_comes_out_as_replacement(tokenizer):
    ids = tokenizer.encode("fox 🎸")[:-1]
    decoder = IncrementalDecoder(tokenizer)
    text = "".join(decoder.push(token) for token in ids)
    assert "\ufffd" not in text
    assert "\ufffd" in decoder.flush()
    assert decoder.flush() == ""


def test_endless_broken_bytes_do_not_pile_up(tokenizer):
    broken = tokenizer.encode("🎸", add_special=False)[-1]
    decoder = IncrementalDecoder(tokenizer)
    parts = [decoder.push(broken) for _ in range(200)]
    assert max(len(part) for part in parts) <= 32
    assert len("".join(parts) + decoder.flush()) == len(tokenizer.decode([broken] * 200))


def test_special_tokens_and_ends_of_text(directory, tokenizer):
    assert tokenizer.eos_ids == (tokenizer.token_id("</s>"),)
    assert tokenizer.decode([tokenizer.token_id("</s>"), *tokenizer.encode("fox", False)]) == "fox"
    assert "</s>" in tokenizer.decode([tokenizer.token_id("</s>")], skip_special=False)
    assert tokenizer.vocab_size > 100
    assert tokenizer.decode([10**6]) == ""


def write(directory, template=None, **files):
    byte_level().save(str(directory / "tokenizer.json"))
    values = {"bos_token": "<s>", "eos_token": "</s>"}
    if template is not None:
        values["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(values))
    for name, text in files.items():
        (directory / name).write_text(text)
    return directory


MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""


def test_a_chat_template_is_rendered_as_transformers_renders_it(tmp_path):
    import transformers

    write(tmp_path, CHATML)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"),
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHATML,
    )
    ours = Tokenizer.from_dir(tmp_path)
    for prompt in (True, False):
        text = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompt)
        assert ours.chat_text(MESSAGES, prompt) == text
        ids = ours.chat(MESSAGES, prompt)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.token_id("<|im_start|>") in ours.chat(MESSAGES)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}", "<s>be brief</s>"),
        ("{{ messages | tojson }}", json.dumps(MESSAGES)),
        ("{{ {'é': 1} | tojson(indent=1) }}", '{\n "é": 1\n}'),
        (
            "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
            "user",
        ),
        ("{% if tools is defined %}t{% else %}n{% endif %}", "n"),
        ("  {% if true %}\nx\n  {% endif %}\n", "x\n"),
    ],
)
def test_templates_have_the_helpers_they_expect(tmp_path, template, text):
    assert Tokenizer.from_dir(write(tmp_path, template)).chat_text(MESSAGES) == text


def test_the_template_file_wins_over_the_settings(tmp_path):
    write(tmp_path, "settings", **{"chat_template.jinja": "file"})
    assert Tokenizer.from_dir(tmp_path).chat_text(MESSAGES) == "file"


def test_of_several_named_templates_the_default_is_taken(tmp_path):
    named = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "plain"}]
    assert Tokenizer.from_dir(write(tmp_path, named)).chat_text(MESSAGES) == "plain"


def test_without_a_template_roles_are_spelled_out(tmp_path):
    text = Tokenizer.from_dir(write(tmp_path)).chat_text(MESSAGES)
    assert text == "system: be brief\nuser: hi\nassistant:"


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[9].content }}", "failed"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for x in range(10**9) %}{% endfor %}", "[Rr]ange"),
        ("{% for x in range(99999) %}{{ 'y' * 10000 }}{% endfor %}", "characters"),
        ("{% include '/etc/passwd' %}", "failed"),
    ],
)
def test_a_template_that_raises_or_reaches_out_is_a_clear_error(tmp_path, template, what):
    tokenizer = Tokenizer.from_dir(write(tmp_path, template))
    with pytest.raises(TokenizerError, match=what):
        tokenizer.chat(MESSAGES)
    assert tokenizer.encode("fox")


@pytest.mark.parametrize("template", ["{% for %}", "{{ x", "{% endif %}"])
def test_a_template_that_does_not_parse_is_refused(tmp_path, template):
    with pytest.raises(TokenizerError, match="parse"):
        Tokenizer.from_dir(write(tmp_path, template))


@pytest.mark.parametrize("text", [None, "", "{}", "nonsense", '{"model": {"type": "BPE"}}'])
def test_a_bad_tokenizer_file_is_named(tmp_path, text):
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer.from_dir(tmp_path)


def test_bad_settings_are_named(tmp_path):
    write(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": 5}')
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json"):
        Tokenizer.from_dir(tmp_path)


def run_matcher(stops, pieces):
    matcher, out = StopMatcher(stops), ""
    for piece in pieces:
        text, stopped = matcher.push(piece)
        out += text
        if stopped:
            assert matcher.push("more") == ("", True)
            assert matcher.flush() == ""
            return out, True
    return out + matcher.flush(), False


@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        (["STOP"], ["abSTOPcd"], ("ab", True)),
        (["STOP"], ["ab", "ST", "OP", "cd"], ("ab", True)),
        (["STOP"], ["abST", "ART"], ("abSTART", False)),
        (["aab"], ["aaab"], ("a", True)),
        (["aab"], list("aaab"), ("a", True)),
        (["\n\n"], ["x\n", "y\n", "\nz"], ("x\ny", True)),
        (["long stop", "op"], ["a long st", "op"], ("a ", True)),
        (["long stop", "st"], ["a long st", "op"], ("a long ", True)),
        ([], ["a", "b"], ("ab", False)),
        ([""], ["a"], ("a", False)),
        (["end"], ["the en"], ("the en", False)),
    ],
)
def test_stop_strings_are_found_across_pieces(stops, pieces, expected):
    assert run_matcher(stops, pieces) == expected


def test_text_that_may_begin_a_stop_is_held_back_and_no_more_than_that():
    matcher = StopMatcher(["</s>", "\nuser"])
    assert matcher.push("hello <") == ("hello ", False)
    assert matcher.push("b>") == ("<b>", False)
    assert matcher.push("x\nus") == ("x", False)
    assert matcher.push("e") == ("", False)
    assert matcher.flush() == "\nuse"


@settings(deadline=None)
@given(
    st.text("ab", max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 12), max_size=5),
)
def test_how_the_text_is_cut_changes_nothing(text, stops, cuts):
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    assert run_matcher(stops, pieces) == run_matcher(stops, list(text)) == run_matcher(stops, [text])


def _saved(directory, decoder, vocab, added=()):
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.decoder = decoder
    backend.add_special_tokens([*added])
    directory.mkdir()
    backend.save(str(directory / "tokenizer.json"))
    return Tokenizer.from_dir(directory)


def test_the_bytes_of_single_tokens(tmp_path):
    letters = {"\u0120a": 0, "\u00c3": 1, "\u00a9": 2, "\u010a": 3}
    made = _saved(tmp_path / "bytes", decoders.ByteLevel(), letters, ["<end\u00e9>"])
    found = [made.token_bytes(token) for token in range(6)]
    assert found == [b" a", b"\xc3", b"\xa9", b"\n", "<end\u00e9>".encode(), b""]
    assert b"".join(found[1:3]).decode() == "\u00e9"
    pieces = {"\u2581a": 0, "<0xC3>": 1, "<0x0A>": 2, "\u00e9": 3}
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback()]
    made = _saved(tmp_path / "pieces", decoders.Sequence(steps), pieces)
    assert [made.token_bytes(token) for token in range(4)] == [b" a", b"\xc3", b"\n", "\u00e9".encode()]
