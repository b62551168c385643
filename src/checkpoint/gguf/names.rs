//! The names that llama.cpp gives tensors (`gguf-py/gguf/constants.py`), and those of Hugging Face's checkpoints.

use crate::checkpoint::TensorInfo;

/// Tensors outside the layers.
const OUTER: [(&str, &str); 3] = [
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
];

/// Norms of a layer.
const NORMS: [(&str, &str); 4] = [
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("attn_sub_norm", "self_attn.attn_sub_norm"),
    ("ffn_sub_norm", "mlp.ffn_sub_norm"),
];

/// Linear layers of a layer.
const LINEARS: [(&str, &str); 7] = [
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// Hugging Face's name of a tensor of a GGUF file; none for one that no family here has.
pub fn hugging_face_name(name: &str) -> Option<String> {
    let find = |table: &[(&str, &'static str)], key: &str| table.iter().find(|(k, _)| *k == key).map(|(_, v)| *v);
    if let Some(found) = find(&OUTER, name) {
        return Some(found.to_owned());
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    // "07" and "7" would be one layer.
    layer.parse::<usize>().ok().filter(|n| n.to_string() == layer)?;
    let (module, part) = rest.rsplit_once('.')?;
    let path = match part {
        "weight" => match find(&NORMS, module).or_else(|| find(&LINEARS, module)) {
            Some(path) => format!("{path}.weight"),
            None => return None,
        },
        "scale" => format!("{}.weight_scale", find(&LINEARS, module)?),
        "bias" => format!("{}.bias", find(&LINEARS, module)?),
        _ => return None,
    };
    Some(format!("model.layers.{layer}.{path}"))
}

/// The GGUF name of a tensor: the inverse of [`hugging_face_name`].
pub(crate) fn gguf_name(name: &str) -> Option<String> {
    let find = |table: &[(&'static str, &str)], key: &str| table.iter().find(|(_, v)| *v == key).map(|(k, _)| *k);
    if let Some(found) = find(&OUTER, name) {
        return Some(found.to_owned());
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (path, part) = rest.rsplit_once('.')?;
    let module = find(&NORMS, path).or_else(|| find(&LINEARS, path))?;
    let part = if part == "weight_scale" { "scale" } else { part };
    Some(format!("blk.{layer}.{module}.{part}"))
}

/// Renames tensors; those without another name keep theirs.
pub(super) fn rename(mut info: TensorInfo) -> TensorInfo {
    if let Some(name) = hugging_face_name(&info.name) {
        info.stored_name = Some(std::mem::replace(&mut info.name, name));
    }
    info
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_mapped_one_to_one() {
        for (gguf, name) in [
            ("token_embd.weight", "model.embed_tokens.weight"),
            ("blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj.weight"),
            ("blk.12.ffn_down.scale", "model.layers.12.mlp.down_proj.weight_scale"),
            ("blk.3.attn_sub_norm.weight", "model.layers.3.self_attn.attn_sub_norm.weight"),
            ("blk.3.attn_k.bias", "model.layers.3.self_attn.k_proj.bias"),
        ] {
            assert_eq!(hugging_face_name(gguf).as_deref(), Some(name));
            assert_eq!(gguf_name(name).as_deref(), Some(gguf));
        }
        for other in ["rope_freqs.weight", "blk.07.attn_q.weight", "blk.1.attn_norm.scale", "blk.1.attn_q", "output"] {
            assert_eq!(hugging_face_name(other), None, "{other}");
        }
    }
}
