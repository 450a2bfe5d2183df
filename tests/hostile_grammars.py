"""Grammars that take too much time, memory or recursion, and a tokenizer of bytes for them."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from common.grammar import GrammarCompiler, lark_grammar, schema_grammar

VOCAB, STOP = 257, 256
VALID = lark_grammar('start: "a" | "b"')
RULES = 3500
HOSTILE = {
    "chain of rules": lark_grammar(
        "start: r0\n" + "".join(f"r{index}: r{index + 1}\n" for index in range(RULES)) + f'r{RULES}: "a"'
    ),
    "chain of references": schema_grammar(
        {
            "$ref": "#/$defs/0",
            "$defs": {str(index): {"items": {"$ref": f"#/$defs/{index + 1}"}} for index in range(1300)}
            | {"1300": {"type": "null"}},
        }
    ),
    "product of patterns": schema_grammar({"allOf": [{"pattern": f"(a|b)*a(a|b){{{index}}}"} for index in range(18)]}),
    "many classes": lark_grammar("start: /" + r"\p{L}*\p{N}?" * 3000 + "/"),
}


@cache
def tokenizer_json() -> str:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate([*alphabet, "<end>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return str(tokenizer.to_str())


def ids_of(text: str) -> list[int]:
    return list(Tokenizer.from_str(tokenizer_json()).encode(text).ids)


def new_compiler() -> GrammarCompiler:
    return GrammarCompiler.of_tokenizer(tokenizer_json(), VOCAB, frozenset({STOP}))
