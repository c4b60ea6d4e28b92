"""Texts of files from elsewhere: what is no JSON or YAML is said in a sentence, in bounded time."""

import pytest
from pixstack.models_impl import parsing

N = 100_000


TEXTS = {"cut": "[" * N, "lists": "[" * N + "]" * N, "tables": '{"a":' * N + "1" + "}" * N}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_json_that_is_nested_too_deeply_is_refused_with_its_file(text):
    with pytest.raises(ValueError, match="^deep.json is not valid JSON: it is nested too deeply.$"):
        parsing.from_json(text, "deep.json")


@pytest.mark.parametrize("text, words", [("{", "Expecting property name"), ("9" * 5000, "digits"), (b"\xff", "utf-8")])
def test_what_is_no_json_is_refused_with_its_file(text, words):
    with pytest.raises(ValueError, match=f"odd.json is not valid JSON: .*{words}"):
        parsing.from_json(text, "odd.json")


@pytest.mark.parametrize("text", ['\ufeff{"a": 1}', b'\xef\xbb\xbf{"a": 1}', b'{"a": 1}'])
def test_the_mark_of_windows_editors_is_passed_over(text):
    assert parsing.from_json(text, "a.json") == {"a": 1}


@pytest.mark.parametrize("text", ["x: " + "[" * N, "{a: " * (N // 4), "- " * (N // 2), "? " * (N // 2),
                                  "\n".join(" " * i + "a:" for i in range(450))],
                         ids=["lists", "tables", "items", "keys", "lines"])
def test_yaml_that_is_nested_too_deeply_is_refused_before_it_is_parsed(text, monkeypatch):
    import yaml

    monkeypatch.setattr(yaml, "load", lambda *_: pytest.fail("parsed"))
    with pytest.raises(ValueError, match="deep.yaml is not valid YAML: it is nested too deeply"):
        parsing.from_yaml(text, "deep.yaml")


@pytest.mark.parametrize("text, words", [
    ("a: &a [x, x]\nb: [*a, *a]", "anchors"),
    ("a: " + "b " * 2**20, "2,097,155 characters"),
    ("a: [", "expected"),
    ("a: 2024-13-45", "month"),
])  # fmt: skip
def test_what_is_no_plain_yaml_is_refused_with_its_file(text, words):
    with pytest.raises(ValueError, match=f"odd.yaml (is not valid YAML: |has )(.|\n)*({words})"):
        parsing.from_yaml(text, "odd.yaml")


@pytest.mark.parametrize("text, whole", [
    ("a cat", "a cat"), ("caf\u00e9", "caf\u00e9"), ("\U0001f600", "\U0001f600"), ("\ud83d\ude00!", "\U0001f600!"),
    ("a \ud83d cat", "a \ufffd cat"), ("\udc80", "\ufffd"), ("\ude00\ud83d", "\ufffd\ufffd"), ("", ""),
])  # fmt: skip
def test_a_text_with_half_a_sign_can_be_written(text, whole):
    assert parsing.without_surrogates(text) == whole
    whole.encode()


def test_yaml_s_values_come_as_safe_load_gives_them():
    assert parsing.from_yaml("model:\n  params: {a: 1, b: [2.5, x]}\n", "a.yaml") == {
        "model": {"params": {"a": 1, "b": [2.5, "x"]}}}
