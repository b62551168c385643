//! Tokenizers and templates in a GGUF file's metadata.

use super::builder::Builder;
use super::hostile::tokenizer_file;
use crate::common::fixture;
use candle_bitnet::checkpoint::ModelFiles;
use candle_bitnet::generate::GenerationDefaults;
use candle_bitnet::text::sentencepiece::{PieceKind, SentencePiece};
use candle_bitnet::text::{ChatTemplate, Message, Tokenizer};

fn open(b: &Builder) -> (tempfile::TempDir, ModelFiles) {
    let dir = tempfile::tempdir().unwrap();
    let files = ModelFiles::from(&b.write(dir.path()));
    (dir, files)
}

fn tokenizer(b: &Builder) -> Tokenizer {
    let (_dir, files) = open(b);
    Tokenizer::open(&files).unwrap()
}

/// Bytes as byte-level tokenizers spell them, in the order of GPT-2's vocabulary.
fn byte_level(more: &[&str]) -> Vec<String> {
    let printable = (0x21..=0x7e).chain(0xa1..=0xac).chain(0xae..=0xff);
    let letters = printable.chain(0x100..0x100 + 68).filter_map(char::from_u32).map(String::from);
    letters.chain(more.iter().map(|s| (*s).to_owned())).collect()
}

#[test]
fn sentencepiece_models_tokenise_as_their_file() {
    for (name, kind) in [("bpe.model", "llama"), ("unigram.model", "t5")] {
        let path = fixture("sentencepiece").join(name);
        let model = SentencePiece::parse(&path, &std::fs::read(&path).unwrap()).unwrap();
        let code = |kind| match kind {
            PieceKind::Normal => 1,
            PieceKind::Unknown => 2,
            PieceKind::Control => 3,
            PieceKind::UserDefined => 4,
            PieceKind::Unused => 5,
            PieceKind::Byte => 6,
        };
        let texts: Vec<&str> = model.pieces.iter().map(|p| p.text.as_str()).collect();
        let charsmap: Vec<u8> = model.charsmap.clone();
        let mut b = Builder::new()
            .text("tokenizer.ggml.model", kind)
            .strings("tokenizer.ggml.tokens", &texts)
            .f32s("tokenizer.ggml.scores", &model.pieces.iter().map(|p| p.score).collect::<Vec<_>>())
            .i32s("tokenizer.ggml.token_type", &model.pieces.iter().map(|p| code(p.kind)).collect::<Vec<_>>())
            .flag("tokenizer.ggml.add_space_prefix", model.add_dummy_prefix)
            .flag("tokenizer.ggml.remove_extra_whitespaces", model.remove_extra_whitespaces);
        if !charsmap.is_empty() {
            let value = super::builder::array(0, charsmap.len() as u64, &charsmap);
            b = b.raw("tokenizer.ggml.precompiled_charsmap", super::builder::ARRAY, &value);
        }
        for (key, id) in [("bos", model.bos), ("eos", model.eos)] {
            if let Some(id) = id {
                b = b.u32(&format!("tokenizer.ggml.{key}_token_id"), id);
            }
        }
        let want = model.to_tokenizer(&path, &[], model.bos, None).unwrap();
        let got = tokenizer(&b);
        for text in ["Hello world", "  two  spaces ", "naïve 你好 \u{1f600}", "", "line\nbreak\t!", "</s> and <s>"] {
            let ids = want.encode(text, true).unwrap().get_ids().to_vec();
            assert_eq!(got.encode(text, true).unwrap(), ids, "{name} {text:?}");
            assert_eq!(got.decode(&ids, true).unwrap(), want.decode(&ids, true).unwrap(), "{name} {text:?}");
        }
        assert_eq!((got.bos_id(), got.eos_id(), got.adds_bos()), (model.bos, model.eos, model.bos.is_some()));
        let plain = tokenizer(&b.clone().flag("tokenizer.ggml.add_bos_token", false));
        assert!(!plain.adds_bos());
    }
}

#[test]
fn bos_and_eos_are_added_as_the_file_says() {
    let tokens = byte_level(&["<|begin_of_text|>", "<end>", "<user>"]);
    let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
    let (bos, eos, user) = (256, 257, 258);
    let mut types = vec![1; 256];
    types.extend([3, 3, 4]);
    let b = tokenizer_file(&tokens, &[])
        .i32s("tokenizer.ggml.token_type", &types)
        .u32("tokenizer.ggml.bos_token_id", bos)
        .u32("tokenizer.ggml.eos_token_id", eos);
    let t = tokenizer(&b);
    let ids = t.encode("A<user>!", true).unwrap();
    assert_eq!(ids, [bos, 32, user, 0], "Llama 3's adds BOS by default");
    assert_eq!(t.decode(&ids, true).unwrap(), "A<user>!", "a user-defined token is text");
    assert_eq!((t.special_ids(), t.is_special(user)), (vec![bos, eos], false));
    assert_eq!(t.special_token("eos_token"), Some("<end>"));
    let both = tokenizer(&b.clone().flag("tokenizer.ggml.add_eos_token", true));
    assert_eq!(both.encode("!", true).unwrap(), [bos, 0, eos]);
    let none = tokenizer(&b.clone().flag("tokenizer.ggml.add_bos_token", false));
    assert_eq!(none.encode("!", true).unwrap(), [0]);
    // Without types, what the metadata names is special all the same.
    let untyped = tokenizer(&b.clone().without("tokenizer.ggml.token_type"));
    assert_eq!(untyped.special_ids(), [bos, eos]);
    let gpt2 = tokenizer(&b.clone().text("tokenizer.ggml.pre", "gpt-2"));
    assert_eq!(gpt2.encode("!", true).unwrap(), [0], "GPT-2's does not");
    // Files of Llama 3's vocabulary without a name are taken for what they are.
    for old in [b.clone().without("tokenizer.ggml.pre"), b.clone().text("tokenizer.ggml.pre", "default")] {
        assert!(tokenizer(&old).adds_bos());
    }
}

#[test]
fn pre_tokenisers_cut_words_as_their_names_say() {
    // Merges that only apply inside a word.
    let mut tokens = byte_level(&["12", "123", "Ġ1", "ĠĠ", "!!", "a!"]);
    tokens.push("<s>".into());
    let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
    let b = tokenizer_file(&tokens, &["1 2", "12 3", "Ġ 1", "Ġ Ġ", "! !", "a !"]);
    let words = |pre: &str, text: &str| -> Vec<String> {
        let t = tokenizer(&b.clone().text("tokenizer.ggml.pre", pre));
        t.encode(text, false).unwrap().into_iter().map(|id| t.id_to_token(id).unwrap()).collect()
    };
    for (pre, want) in [
        ("llama-bpe", vec!["123", "12", "!!", "Ġ", "12"]),
        ("falcon3", vec!["123", "12", "!!", "Ġ", "12"]),
        ("qwen2", vec!["1", "2", "3", "1", "2", "!!", "Ġ", "1", "2"]),
        ("gpt-2", vec!["123", "12", "!!", "Ġ", "12"]),
        ("smollm", vec!["1", "2", "3", "1", "2", "!!", "Ġ", "1", "2"]),
        ("falcon", vec!["123", "12", "!!", "Ġ", "12"]),
    ] {
        assert_eq!(words(pre, "12312!! 12"), want, "{pre}");
        assert_eq!(words(pre, "a!"), ["a", "!"], "{pre}");
    }
}

const WRONG: &str =
    "{% for message in messages %}{{ 'Human: ' + message['content'] + '\n\nBITNETAssistant: ' }}{% endfor %}";

#[test]
fn the_template_that_is_known_to_be_wrong_is_replaced() {
    let tokens = byte_level(&["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]);
    let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
    let b = tokenizer_file(&tokens, &[])
        .u32("tokenizer.ggml.bos_token_id", 256)
        .u32("tokenizer.ggml.eos_token_id", 257)
        .u32("tokenizer.ggml.eot_token_id", 258)
        .text("tokenizer.chat_template", WRONG);
    let (_dir, files) = open(&b);
    let tokenizer = Tokenizer::open(&files).unwrap();
    let template = ChatTemplate::open(&files).unwrap().unwrap();
    let messages = [Message::system(" Be brief. "), Message::user("Hi\n")];
    let text = template.apply(&tokenizer, &messages, true).unwrap().text;
    assert_eq!(text, "<|begin_of_text|>System: Be brief.<|eot_id|>User: Hi<|eot_id|>Assistant: ");
    // The same as the documented one, wherever that is at hand.
    let documented = ChatTemplate::from_dir(fixture("gguf_a1")).unwrap().unwrap();
    for add in [false, true] {
        let render = |t: &ChatTemplate| t.apply(&tokenizer, &messages, add).unwrap();
        assert_eq!(render(&template), render(&documented));
    }
    let (_dir, llama) = open(&b.clone().text("general.architecture", "llama"));
    let kept = ChatTemplate::open(&llama).unwrap().unwrap();
    assert!(kept.source().contains("BITNETAssistant"), "it is wrong for one model only");
    let (_dir, without) = open(&b.clone().without("tokenizer.chat_template"));
    assert!(ChatTemplate::open(&without).unwrap().is_none());
    let defaults = GenerationDefaults::open(&without, &tokenizer, None);
    assert!(defaults.is_err(), "there is no model in this file: {defaults:?}");
    let options = std::path::Path::new("generation_config.json");
    let read = |files: &ModelFiles| {
        let bytes = files.read("generation_config.json", 1 << 20).unwrap().unwrap();
        GenerationDefaults::from_generation_config(options, &serde_json::from_slice(&bytes).unwrap()).unwrap()
    };
    assert_eq!((read(&files).eos, read(&files).do_sample), (vec![257, 258], false));
    let sampling =
        b.f32("general.sampling.temp", 0.6).u32("general.sampling.top_k", 40).f32("general.sampling.top_p", 0.9);
    let (_dir, files) = open(&sampling);
    let read = read(&files);
    assert_eq!((read.do_sample, read.temperature, read.top_k, read.top_p), (true, Some(0.6), Some(40), Some(0.9)));
}
