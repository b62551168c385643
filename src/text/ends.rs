//! Tokens that stand around every text.

use tokenizers::processors::template::{SpecialToken, TemplateProcessing};

/// Puts tokens, given by spelling and id, before and after every text; none if there are neither.
///
/// # Errors
/// The tokenizer library's reason, if it refuses them.
pub(super) fn around(
    bos: Option<(String, u32)>,
    eos: Option<(String, u32)>,
) -> Result<Option<TemplateProcessing>, String> {
    if bos.is_none() && eos.is_none() {
        return Ok(None);
    }
    // Under names of their own: a token's spelling could be mistaken for a part of the template.
    let sides = |sequence: &'static str| {
        let (bos, eos) = (bos.as_ref().map(|_| "bos"), eos.as_ref().map(|_| "eos"));
        [bos, Some(sequence), eos].into_iter().flatten().collect::<Vec<&str>>()
    };
    let (single, pair) = (sides("$A"), [sides("$A"), sides("$B:1")].concat());
    let named = |token: &Option<(String, u32)>, name: &str| {
        let (text, id) = token.clone()?;
        Some(SpecialToken::new(name.into(), vec![id], vec![text]).map_err(|e| e.to_string()))
    };
    let tokens: Result<Vec<_>, String> = [named(&bos, "bos"), named(&eos, "eos")].into_iter().flatten().collect();
    let mut builder = TemplateProcessing::builder();
    builder.try_single(single).map_err(|e| e.to_string())?;
    builder.try_pair(pair).map_err(|e| e.to_string())?;
    builder.special_tokens(tokens?).build().map(Some).map_err(|e| e.to_string())
}
