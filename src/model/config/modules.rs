//! `modules_to_not_convert`: which linear layers stay dense.

/// Bytes of one pattern.
const MAX_PATTERN: usize = 256;

/// One entry, matched as transformers' `should_convert_module` does: as a regular expression at the start of a
/// module's name, or literally at its end.
///
/// Of regular expressions it knows literals, `\` before punctuation, `.`, `*`, `^` at the start and `$` at the
/// end, which covers what checkpoints use; other operators are refused rather than misread.
#[derive(Debug, Clone)]
pub(super) struct Pattern {
    text: String,
    atoms: Vec<(Option<u8>, bool)>,
    to_end: bool,
}

impl Pattern {
    pub(super) fn new(text: &str) -> Result<Self, String> {
        let bad = |reason: &str| Err(format!("pattern {text:?}: {reason}"));
        if text.len() > MAX_PATTERN {
            return Err(format!("a pattern of {} bytes; at most {MAX_PATTERN} are accepted", text.len()));
        }
        if text.is_empty() {
            return bad("an empty pattern would exclude every layer");
        }
        let mut atoms: Vec<(Option<u8>, bool)> = Vec::new();
        let mut to_end = false;
        let mut bytes = text.bytes().enumerate().peekable();
        while let Some((at, byte)) = bytes.next() {
            match byte {
                b'^' if at == 0 => {}
                b'$' if bytes.peek().is_none() => to_end = true,
                b'.' => atoms.push((None, false)),
                b'*' => match atoms.last_mut() {
                    Some((_, starred @ false)) => *starred = true,
                    _ => return bad("`*` follows nothing that it could repeat"),
                },
                b'\\' => match bytes.next() {
                    Some((_, b)) if b.is_ascii_punctuation() => atoms.push((Some(b), false)),
                    _ => return bad("this escape is not supported; write module names plainly"),
                },
                b'[' | b']' | b'(' | b')' | b'{' | b'}' | b'+' | b'?' | b'|' | b'^' | b'$' => {
                    return bad("of regular expressions only `.`, `*`, `^` and `$` are supported");
                }
                byte => atoms.push((Some(byte), false)),
            }
        }
        Ok(Self { text: text.to_owned(), atoms, to_end })
    }

    /// Whether the layer `name` stays dense.
    pub(super) fn excludes(&self, name: &str) -> bool {
        name.ends_with(&self.text) || self.matches_start(name)
    }

    /// Simulates the automaton: `live[i]` says that the first `i` atoms can have matched what was read.
    fn matches_start(&self, name: &str) -> bool {
        let n = self.atoms.len();
        let close = |live: &mut Vec<bool>| {
            for (i, (_, starred)) in self.atoms.iter().enumerate() {
                live[i + 1] |= live[i] && *starred;
            }
        };
        let mut live = vec![false; n + 1];
        live[0] = true;
        close(&mut live);
        for byte in name.bytes() {
            if live[n] && !self.to_end {
                return true;
            }
            let mut next = vec![false; n + 1];
            for (i, (atom, starred)) in self.atoms.iter().enumerate() {
                if live[i] && atom.is_none_or(|a| a == byte) {
                    next[if *starred { i } else { i + 1 }] = true;
                }
            }
            live = next;
            close(&mut live);
        }
        live[n]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_like_transformers() {
        // (pattern, name, re.match(pattern, name) or name.endswith(pattern)), as Python answers.
        let cases = [
            ("lm_head", "lm_head", true),
            ("down_proj", "model.layers.3.mlp.down_proj", true),
            ("mlp", "model.layers.3.mlp.down_proj", false),
            ("model.layers.1", "model.layers.10.mlp.up_proj", true),
            (r"model\.layers\.1\.", "model.layers.10.mlp.up_proj", false),
            ("model.layers.1$", "model.layers.1", true),
            ("model.layers.1$", "model.layers.10", false),
            ("model.layers.*.mlp", "model.layers.7.mlp.up_proj", true),
            (".*k_proj", "model.layers.0.self_attn.k_proj", true),
            (".*k_proj", "model.layers.0.self_attn.q_proj", false),
            ("^model.*proj$", "model.layers.0.self_attn.q_proj", true),
            ("a*b", "aaab", true),
            ("a*b", "b", true),
            ("a*b", "aac", false),
            ("x*", "anything", true),
        ];
        for (pattern, name, expected) in cases {
            assert_eq!(Pattern::new(pattern).unwrap().excludes(name), expected, "{pattern} on {name}");
        }
    }

    #[test]
    fn many_stars_stay_quick_and_bad_patterns_are_named() {
        let stars = ".*".repeat(60) + "!";
        assert!(!Pattern::new(&stars).unwrap().excludes(&"a".repeat(200)));
        for bad in ["", "*a", "a**", "a|b", "(a)", "[ab]", "a+", r"\d", "a\\", "a^b", "a$b"] {
            assert!(Pattern::new(bad).unwrap_err().contains("pattern"), "{bad}");
        }
        assert!(Pattern::new(&"a".repeat(257)).is_err());
    }
}
