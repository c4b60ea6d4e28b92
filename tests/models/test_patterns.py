"""Regular expressions out of files: those that could take forever are refused, the others mean what they meant."""
import re

import pytest
from pixstack.models_impl import patterns


@pytest.mark.parametrize("pattern", [
    "^cat</w>", "^(cat|kitten)s?</w>", "cat|dog|bird", "^ca.*t$", r".*\.attn1\.to_q", "[a-z]{3}", "(ab){3}", " {2,}",
    r"down_blocks\.\d+\..*to_k", "(?i:cat)", "(a|b)(c|d)(e|f)", r"\bcat\b", "a*?b", "",
])  # fmt: skip
def test_a_pattern_of_few_choices_is_compiled_as_it_stands(pattern):
    assert patterns.compiled(pattern, "token_base") == re.compile(pattern)


@pytest.mark.parametrize("pattern, words", [
    ("(a+)+$", "not run"),
    ("(a|a)*b", "not run"),
    ("(a|ab)*", "not run"),
    ("(ax|by)(cx|dy)(ex|fy)", "not run"),
    ("a?a?a?a?b", "not run"),
    ("a{2,}b*c+", "not run"),
    ("(?=a+)b", "not run"),
    (r"(a+)\1", "not run"),
    ("(", "not a regular expression"),
    ("a{99999999999}", "not a regular expression"),
    ("x" * 600, "600 characters"),
])  # fmt: skip
def test_a_pattern_of_many_choices_is_refused_by_its_entry(pattern, words):
    with pytest.raises(ValueError, match=f"^rank_pattern.*{words}"):
        patterns.compiled(pattern, "rank_pattern")


def peft(table, module):
    return next((v for p, v in table.items() if re.match(rf"(.*\.)?({p})$", module)), None)


@pytest.mark.parametrize("module", [
    "base_model.model.blocks.0.attn.qkv", "blocks.10.attn.qkv", "attn.qkv", "blocks.0.cross_attn.qkv", "qkv", "x.qkv.y",
])  # fmt: skip
@pytest.mark.parametrize("table", [
    {"attn.qkv": 4, "blocks.0.attn.qkv": 8},
    {"blocks.0.attn.qkv": 8, "attn.qkv": 4},
    {r".*\.qkv": 2, "attn.qkv": 4},
    {"attn.qkv": 4, r".*qkv": 2},
    {"^blocks.0.attn.qkv": 3, "^attn": 7, "qkv|y": 1},
    {r"blocks\.\d+\.attn\.qkv": 5},
    {},
])
def test_a_table_s_patterns_are_ends_of_names_as_peft_has_them(table, module):
    assert patterns.Ends(table, "rank_pattern").value(module) == peft(table, module)


def test_a_thousand_names_are_looked_up(monkeypatch):
    monkeypatch.setattr(patterns, "compiled", lambda *_, **__: pytest.fail("compiled"))
    ends = patterns.Ends({f"blocks.{i}.attn.qkv": i for i in range(100_000)}, "rank_pattern")
    assert ends.value("transformer.blocks.99999.attn.qkv") == 99_999 and ends.value("blocks.0.mlp", 7) == 7


def test_a_table_of_many_patterns_is_refused():
    with pytest.raises(ValueError, match="rank_pattern holds more than 50 patterns"):
        patterns.Ends({f".*{i}": i for i in range(51)}, "rank_pattern")
