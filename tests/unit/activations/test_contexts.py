"""The texts of tokens in a row are what the tokenizer reads, in any language, of any kind."""

from __future__ import annotations

import codecs
import time

import pytest
import torch
from helpers.models import gpt2_tokenizer, tiny_hooked_sae_transformer
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import StandardSAE, StandardSAEConfig
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from sae_afa_plugin import evaluate_saes
from sae_afa_plugin.activations.contexts import TokenTexts, shown_text, token_texts
from sae_afa_plugin.activations.language_model import LanguageModelActivations
from sae_afa_plugin.activations.text import standard_library_texts
from sae_afa_plugin.activations.tokens import Protocol
from sae_afa_plugin.report import render_report

FOREIGN = "Ein Käfer 🦎 läuft über 日本語のテキスト, família 👩‍👩‍👧, Ελληνικά и кириллица. "
SPECIAL = ["<s>", "<unk>"]


def trained(model, trainer, parts):
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    text = " ".join(standard_library_texts("heldout"))[:60_000]
    texts = [text[i : i + 1000] for i in range(0, len(text), 1000)]
    tokenizer.train_from_iterator(
        texts, trainer(vocab_size=900, show_progress=False, special_tokens=SPECIAL)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL[0], unk_token=SPECIAL[1]
    )


def unigram():  # T5
    return trained(
        models.Unigram(),
        lambda **options: trainers.UnigramTrainer(unk_token=SPECIAL[1], **options),
        {"pre_tokenizer": pre_tokenizers.Metaspace(), "decoder": decoders.Metaspace()},
    )


def byte_fallback():  # Llama, Gemma and Mistral: what is no token is spelt in bytes
    def trainer(special_tokens, **options):
        spelt = [f"<0x{byte:02X}>" for byte in range(256)]
        return trainers.BpeTrainer(special_tokens=special_tokens + spelt, **options)

    return trained(
        models.BPE(byte_fallback=True, unk_token=SPECIAL[1]),
        trainer,
        {
            "normalizer": normalizers.Sequence(
                [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            ),
            "decoder": decoders.Sequence(
                [
                    decoders.Replace("▁", " "),
                    decoders.ByteFallback(),
                    decoders.Fuse(),
                    decoders.Strip(" ", 1, 0),
                ]
            ),
        },
    )


def word_piece():  # BERT
    return trained(
        models.WordPiece(unk_token=SPECIAL[1]),
        trainers.WordPieceTrainer,
        {"pre_tokenizer": pre_tokenizers.BertPreTokenizer(), "decoder": decoders.WordPiece()},
    )


def word_ends():  # the first GPT
    return trained(
        models.BPE(unk_token=SPECIAL[1], end_of_word_suffix="</w>"),
        lambda **options: trainers.BpeTrainer(end_of_word_suffix="</w>", **options),
        {"pre_tokenizer": pre_tokenizers.BertPreTokenizer(), "decoder": decoders.BPEDecoder()},
    )


MAKE = {
    "byte-level BPE": gpt2_tokenizer,
    "unigram": unigram,
    "byte fallback": byte_fallback,
    "WordPiece": word_piece,
    "ends of words": word_ends,
    "bytes": ByT5Tokenizer,  # in Python
}
WHOLE = ("byte-level BPE", "byte fallback", "bytes")  # nothing is unknown to them


@pytest.fixture(scope="module")
def tokenizers():
    return {kind: make() for kind, make in MAKE.items()}


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def read(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("kind", MAKE)
def test_contexts_read_as_the_text_does(tokenizers, kind):
    tokenizer = tokenizers[kind]
    text = "A context, where spaces are spaces. " * 2 + (FOREIGN if kind in WHOLE else "")
    ids = ids_of(tokenizer, text)
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids) > 5
    if kind in WHOLE:
        assert "".join(texts) == text
    assert " context" in "".join(texts)
    alone = [read(tokenizer, [i]) for i in ids]
    assert "".join(alone) != "".join(texts) or kind == "bytes"  # what it was before


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(list(MAKE)),
    st.text(max_size=40) | st.lists(st.sampled_from(FOREIGN.split())).map(" ".join),
    st.slices(12),
)
def test_any_part_of_any_text(tokenizers, kind, text, part):
    tokenizer = tokenizers[kind]
    ids = [tokenizer.convert_tokens_to_ids(tokenizer.unk_token), *ids_of(tokenizer, text)][part]
    assert "".join(token_texts(tokenizer, ids)) == read(tokenizer, ids)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(list(MAKE)), st.lists(st.integers(0, 258), max_size=20))
def test_tokens_that_nobody_would_write(tokenizers, kind, ids):
    texts = token_texts(tokenizers[kind], ids)
    assert (len(texts), "".join(texts)) == (len(ids), read(tokenizers[kind], ids))


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30) | st.lists(st.sampled_from(FOREIGN.split())).map(" ".join))
def test_a_character_stands_at_the_token_that_completes_it(tokenizers, text):
    tokenizer = tokenizers["byte-level BPE"]
    ids = ids_of(tokenizer, text)
    by_letter = {  # GPT-2 writes printable bytes as themselves, the others from U+0100 on
        **{chr(b): b for b in [*range(33, 127), *range(161, 173), *range(174, 256)]}
    }
    others = [b for b in range(256) if b not in by_letter.values()]
    by_letter.update({chr(256 + n): b for n, b in enumerate(others)})
    decoder = codecs.getincrementaldecoder("utf-8")()
    expected = [
        decoder.decode(bytes(by_letter[letter] for letter in token))
        for token in tokenizer.convert_ids_to_tokens(ids)
    ]
    assert token_texts(tokenizer, ids) == expected


def test_bytes_that_become_no_character_are_shown_where_they_stand(tokenizers):
    tokenizer = tokenizers["byte fallback"]
    spelt, word = ids_of(tokenizer, "日")[-3:], ids_of(tokenizer, "word")
    texts = token_texts(tokenizer, [*word, *spelt, *word])
    assert texts[len(word) : len(word) + 3] == ["", "", "日"]
    # one byte that fits nowhere makes its whole run unreadable
    texts = token_texts(tokenizer, [*word, *spelt, spelt[-1], *word])
    assert texts[len(word) : len(word) + 4] == ["�", "�", "", "��"]
    texts = token_texts(tokenizers["byte-level BPE"], [222, 222, 222])
    assert all(texts)


def test_special_tokens_stand_by_their_names(tokenizers):
    tokenizer = tokenizers["byte-level BPE"]
    ids = [tokenizer.bos_token_id, *ids_of(tokenizer, "Is it ?")]
    texts = token_texts(tokenizer, ids)
    assert texts[0] == "<|endoftext|>"
    assert "".join(texts[1:]) == "Is it ?"  # no space is cleaned up


def test_50_000_tokens_take_no_time(tokenizers):
    text = " ".join(standard_library_texts("heldout")) + FOREIGN * 100
    ids = ids_of(tokenizers["byte-level BPE"], text)[-50_000:]
    texts_of = TokenTexts(tokenizers["byte-level BPE"])
    start = time.perf_counter()
    found = [text for row in range(0, 50_000, 125) for text in texts_of(ids[row : row + 125])]
    assert time.perf_counter() - start < 5  # 0.1 seconds
    assert len(found) == 50_000


def test_a_report_shows_text_in_context_and_marks_tokens_without_text():
    sae = StandardSAE(StandardSAEConfig(d_in=192, d_sae=200))
    torch.nn.init.normal_(sae.W_enc, std=0.3)
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_pre"
    options = {"n_tokens": 16, "context_size": 17, "progress": False, "prepend_bos": True}
    results = evaluate_saes({"a": sae}, "sae-afa-demo", ["日本語のテキスト" * 4], **options)
    texts = results.sequences["token"].tolist()
    assert texts[0] == "<|endoftext|>"
    assert "".join(texts[1:]).startswith("日本語")
    page = render_report(results)
    assert shown_text("") == "⟨…⟩"
    assert "<mark>⟨…⟩</mark>" in page
    assert "<mark>日</mark>" in page
    assert "日本語" in page
    assert "<mark></mark>" not in page


def test_a_model_without_a_tokenizer_has_numbers():
    tokens = torch.arange(8).view(1, 8)
    protocol = Protocol(n_tokens=8, context_size=8, exclude_special_tokens=False)
    source = LanguageModelActivations(tiny_hooked_sae_transformer(), tokens, protocol)
    assert source.sequences["token"].tolist() == [f"<{n}>" for n in range(8)]
