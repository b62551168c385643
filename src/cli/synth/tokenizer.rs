//! A byte-level tokenizer with the special tokens that the configuration names: small, and able to encode any
//! text and to decode whatever it encoded.

use candle_bitnet::model::config::ModelConfig;
use serde_json::{Map, Value, json};

/// `<|eot_id|>` of the Llama 3 vocabulary, which 2B-4T uses.
const LLAMA3_EOT: u32 = 128_009;

/// 2B-4T's conversation format: `Role: content<|eot_id|>`, then `Assistant: `.
const CHAT_TEMPLATE: &str = "{% for message in messages %}\
    {{ message['role'] | capitalize + ': ' + message['content'] | trim + '<|eot_id|>' }}\
    {% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}";

/// Names and texts of the files beside the weights.
pub(super) fn files(config: &ModelConfig) -> [(&'static str, String); 3] {
    let taken = |id: &u32| config.bos_token == Some(*id) || config.eos_tokens.contains(id);
    let mut free = (0..config.vocab_size as u32).filter(|id| !taken(id));
    let eot_is_known = (LLAMA3_EOT as usize) < config.vocab_size && !taken(&LLAMA3_EOT);
    let bytes: Vec<(String, u32)> = byte_chars().map(String::from).into_iter().zip(&mut free).collect();
    let eot = if eot_is_known { Some(LLAMA3_EOT) } else { free.next() };

    let (bos, eos) = ("<|begin_of_text|>", "<|end_of_text|>");
    let specials: Vec<(&str, u32)> =
        [(bos, config.bos_token), (eos, config.eos_tokens.first().copied()), ("<|eot_id|>", eot)]
            .into_iter()
            .filter_map(|(text, id)| Some((text, id?)))
            .collect();
    let added: Vec<Value> = specials
        .iter()
        .map(|(content, id)| {
            json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": true })
        })
        .collect();
    let mut vocab = bytes;
    vocab.extend(specials.iter().map(|(text, id)| ((*text).to_owned(), *id)));
    vocab.sort_by_key(|(_, id)| *id);
    let vocab: Map<String, Value> = vocab.into_iter().map(|(text, id)| (text, id.into())).collect();

    let template = config.bos_token.map(|id| {
        json!({
            "type": "TemplateProcessing",
            "single": [{ "SpecialToken": { "id": bos, "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
            "pair": [{ "SpecialToken": { "id": bos, "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } },
                     { "Sequence": { "id": "B", "type_id": 1 } }],
            "special_tokens": { bos: { "id": bos, "ids": [id], "tokens": [bos] } },
        })
    });
    // Words as GPT-2 has them, which every program knows; without merges they make no difference.
    let byte_level = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": template,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": [],
        },
    });
    let eos_tokens: Vec<u32> = config.eos_tokens.iter().copied().chain(eot).collect();
    let tokenizer_config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": config.bos_token.map(|_| bos),
        "eos_token": config.eos_tokens.first().map(|_| eos),
        "model_max_length": config.max_positions,
        "clean_up_tokenization_spaces": false,
        "chat_template": CHAT_TEMPLATE,
    });
    let generation_config = json!({
        "bos_token_id": config.bos_token,
        "eos_token_id": eos_tokens,
        "do_sample": true,
        "temperature": 0.6,
        "top_p": 0.9,
        "max_length": config.max_positions,
    });
    let text = |v: Value| format!("{v:#}\n");
    [
        ("tokenizer.json", text(tokenizer)),
        ("tokenizer_config.json", text(tokenizer_config)),
        ("generation_config.json", text(generation_config)),
    ]
}

/// GPT-2's visible character for every byte: itself where it is one, else the next from U+0100 on.
fn byte_chars() -> [char; 256] {
    let mut next = 0x100u32;
    std::array::from_fn(|byte| match byte as u8 {
        b @ (b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff) => char::from(b),
        _ => {
            next += 1;
            char::from_u32(next - 1).unwrap_or_default()
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_bitnet::model::presets::PRESETS;
    use std::str::FromStr;
    use tokenizers::Tokenizer;

    #[test]
    fn every_preset_can_encode_and_decode_anything() {
        for preset in PRESETS {
            let config = preset.config();
            let [(_, tokenizer), (_, tokenizer_config), (_, generation)] = files(&config);
            let tokenizer = Tokenizer::from_str(&tokenizer).unwrap();
            let text = "Why is the sky blue?\n\t émoji 🦀 \u{0}\u{7f} ß";
            let encoded = tokenizer.encode(text, true).unwrap();
            assert_eq!(encoded.get_ids().first(), config.bos_token.as_ref(), "{}", preset.name);
            assert!(encoded.get_ids().iter().all(|id| (*id as usize) < config.vocab_size));
            assert_eq!(encoded.len(), text.len() + 1, "one token a byte");
            assert_eq!(tokenizer.decode(encoded.get_ids(), true).unwrap(), text);
            let eot = tokenizer.token_to_id("<|eot_id|>").unwrap();
            assert_eq!(tokenizer.encode("<|eot_id|>", false).unwrap().get_ids(), [eot]);
            let generation: Value = serde_json::from_str(&generation).unwrap();
            assert_eq!(generation["eos_token_id"], json!([config.eos_tokens[0], eot]));
            let tokenizer_config: Value = serde_json::from_str(&tokenizer_config).unwrap();
            assert!(tokenizer_config["chat_template"].as_str().unwrap().contains("add_generation_prompt"));
            if preset.name == "2b4t" {
                assert_eq!(eot, 128_009);
            }
        }
    }
}
